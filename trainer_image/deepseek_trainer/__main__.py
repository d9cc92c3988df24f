"""`torchrun -m deepseek_trainer`: train what DSTRAIN_CONFIG describes."""

import os
import sys

from dstrain_api.config import TrainerConfig
from dstrain_api.constants import ENV_CONFIG

from deepseek_trainer.loop import main

if __name__ == "__main__":
    sys.exit(main(TrainerConfig.model_validate_json(os.environ[ENV_CONFIG])))
