"""Small trainings that tests run."""

from typing import Any

from deepseek_trainer.data.mini import VOCABULARY
from dstrain_api.config import TrainerConfig
from dstrain_api.model import Architecture, MlaSpec, MoeSpec
from dstrain_api.spec import (
    CheckpointSpec,
    DataSource,
    DataSpec,
    OptimizerSpec,
    ParallelismSpec,
    PrecisionSpec,
    TotalSpec,
    TrainingSpec,
)

SEQUENCE = 32


def tiny(**moe: Any) -> Architecture:
    """Two layers, one of them with experts in groups: every part of a large model."""
    experts = {"experts": 8, "top_k": 2, "shared": 1, "ffn": 32, "groups": 4, "limited_groups": 2}
    return Architecture(
        vocabulary=VOCABULARY,
        layers=2,
        dense_layers=1,
        hidden=48,
        heads=4,
        dense_ffn=96,
        init_std=0.05,
        mla=MlaSpec(q_rank=24, kv_rank=16, nope_dim=8, rope_dim=4, v_dim=8),
        moe=MoeSpec(**(experts | {"sequence_loss_weight": 0.01} | moe)),
    )


def config(
    *,
    steps: int = 6,
    global_batch: int = 12,
    micro_batch: int = 4,
    compute: str = "fp32",
    every_steps: int = 3,
    keep_last: int = 3,
    architecture: Architecture | None = None,
    optimizer: dict[str, Any] | None = None,
    **parallelism: Any,
) -> TrainerConfig:
    """A training of the tiny model on the mini corpus."""
    return TrainerConfig(
        architecture=architecture or tiny(),
        data=DataSpec(sources=[DataSource(uri="builtin://mini")], sequence_length=SEQUENCE),
        training=TrainingSpec(
            total=TotalSpec(tokens=steps * global_batch * SEQUENCE),
            global_batch=global_batch,
            micro_batch=micro_batch,
        ),
        optimizer=OptimizerSpec(**({"lr": 3e-3} | (optimizer or {}))),
        precision=PrecisionSpec(compute=compute),
        parallelism=ParallelismSpec(**parallelism),
        checkpoint=CheckpointSpec(every_steps=every_steps, keep_last=keep_last),
    )
