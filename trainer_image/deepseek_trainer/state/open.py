"""The store that a URI names."""

import os
from pathlib import Path

from dstrain_api.constants import ENV_TRAINING_UID

from deepseek_trainer.bucket import SCHEME, Bucket
from deepseek_trainer.state.folder import CheckpointFolder
from deepseek_trainer.state.objects import CheckpointBucket
from deepseek_trainer.state.store import Store


def open_store(uri: str | None, folder: Path) -> Store:
    """The store at a URI.

    Args:
        uri: s3://bucket/prefix; anything else is `folder`.
        folder: shared by all workers, or for s3:// one of this machine.
    """
    if uri and uri.startswith(SCHEME):
        training = os.environ.get(ENV_TRAINING_UID, "")
        return CheckpointBucket(Bucket(uri), folder, training=training)
    return CheckpointFolder(folder)
