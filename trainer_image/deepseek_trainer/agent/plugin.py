"""`torchrun --rdzv-backend=dstrain` finds `creator` by the entry point group `torchrun.handlers`.

torch loads the entry points of that group in worker processes too, in the middle of its own
imports: so this module imports nothing before a rendezvous is really wanted.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch.distributed.elastic.rendezvous import RendezvousHandler, RendezvousParameters


def creator() -> Callable[[RendezvousParameters], RendezvousHandler]:
    """What the entry point promises: a function that makes the handler."""
    return _create


def _create(parameters: RendezvousParameters) -> RendezvousHandler:
    from deepseek_trainer.agent.handler import Handler

    if threading.current_thread() is not threading.main_thread():
        raise RuntimeError("the dstrain rendezvous must be made by torchrun's main thread")
    logger = logging.getLogger("deepseek_trainer")
    console = logging.StreamHandler()
    console.setFormatter(logging.Formatter("%(asctime)s dstrain: %(message)s"))
    logger.addHandler(console)
    logger.setLevel(logging.INFO)
    logger.propagate = False
    return Handler(parameters)
