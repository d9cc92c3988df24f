"""`torchrun -m deepseek_trainer`: train what DSTRAIN_CONFIG describes."""

import os
import sys

from dstrain_api.config import TrainerConfig
from dstrain_api.constants import ENV_CONFIG
from torch.distributed.elastic.multiprocessing.errors import record

from deepseek_trainer.loop import main


@record
def run() -> int:
    """Train; an error is written where torchrun's agent looks for it."""
    return main(TrainerConfig.model_validate_json(os.environ[ENV_CONFIG]))


if __name__ == "__main__":
    sys.exit(run())
