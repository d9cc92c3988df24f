"""`torchrun -m deepseek_trainer`: train what DSTRAIN_CONFIG describes."""

import logging
import os
import sys
import traceback

from dstrain_api.config import TrainerConfig
from dstrain_api.constants import ENV_CONFIG

from deepseek_trainer.loop import main


def run() -> int:
    """Train; the exit code. An error goes to stderr, where the pod's agent reads its end."""
    try:
        return main(TrainerConfig.model_validate_json(os.environ[ENV_CONFIG]))
    except BaseException:  # noqa: BLE001 - DCP's errors are no Exception
        traceback.print_exc()
        return 1


if __name__ == "__main__":
    exit_code = run()
    logging.shutdown()
    sys.stdout.flush()
    sys.stderr.flush()
    # Taking the interpreter and torch down in order costs 0.9 s of CPU, and peers wait for it.
    os._exit(exit_code)
