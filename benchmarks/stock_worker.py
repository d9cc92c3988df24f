"""The trainer as stock torchrun's users write one: a SIGTERM ends it where it is.

Ours saves first, which torchrun would wait 30 s for where no save can come about.
"""

from __future__ import annotations

import logging
import os
import traceback

from deepseek_trainer.loop import StopFlag, Trainer
from deepseek_trainer.parallel.mesh import join_world
from dstrain_api.config import TrainerConfig
from dstrain_api.constants import ENV_CONFIG


def main() -> int:
    """Train what DSTRAIN_CONFIG describes; the exit code."""
    logging.basicConfig(format="%(asctime)s %(levelname)s %(message)s", level=logging.INFO)
    config = TrainerConfig.model_validate_json(os.environ[ENV_CONFIG])
    try:
        return Trainer(config, join_world(), StopFlag()).run()
    except BaseException:  # noqa: BLE001 - DCP's errors are no Exception
        traceback.print_exc()
        return 1


if __name__ == "__main__":
    os._exit(main())
