"""What a worker process is told about its training: the trainer's part of the spec, with every URI made a path.

The operator (or a local run) makes it once per pod and puts it as JSON into `DSTRAIN_CONFIG`.
"""

from dstrain_api.base import ApiModel
from dstrain_api.model import Architecture
from dstrain_api.spec import (
    CheckpointSpec,
    DataSpec,
    OptimizerSpec,
    ParallelismSpec,
    PrecisionSpec,
    TrainingSpec,
)


class TrainerConfig(ApiModel):
    """Input of the DeepSeek trainer. `data` holds `file:///` and `builtin://` URIs only."""

    architecture: Architecture
    data: DataSpec
    training: TrainingSpec
    optimizer: OptimizerSpec
    precision: PrecisionSpec
    parallelism: ParallelismSpec
    checkpoint: CheckpointSpec
