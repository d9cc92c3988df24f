"""Where data and checkpoints lie: claims are mounted, `pvc://` becomes a path, and a bucket needs
neither.
"""

from __future__ import annotations

from typing import Any

from dstrain_api.constants import ENV_CHECKPOINT_DIR, ENV_CHECKPOINT_URI, VOLUME_ROOT
from dstrain_api.spec import CheckpointSpec, DataSpec, DeepSeekTrainingSpec

_PVC = "pvc://"
_FILE = "file://"
_S3 = "s3://"


def checkpoint_claim(training: str) -> str:
    """Name of the claim that is made when `checkpoint.uri` is absent."""
    return f"{training}-checkpoints"


def checkpoint_uri(training: str, checkpoint: CheckpointSpec) -> str:
    """Where the checkpoints are, as a URI."""
    return checkpoint.uri or f"{_PVC}{checkpoint_claim(training)}/"


def local_uri(uri: str) -> str:
    """A URI as the worker sees it: `file:///` for a claim's path, others unchanged."""
    if not uri.startswith(_PVC):
        return uri
    return f"{_FILE}{VOLUME_ROOT}/{uri.removeprefix(_PVC)}".rstrip("/")


def public_uri(uri: str) -> str:
    """A URI of a worker as people know it: the inverse of `local_uri`."""
    inside = f"{_FILE}{VOLUME_ROOT}/"
    return f"{_PVC}{uri.removeprefix(inside)}" if uri.startswith(inside) else uri


def checkpoint_place(uri: str) -> dict[str, str]:
    """The variable that tells a worker where checkpoints are: a folder that all workers share, or
    the URI of a bucket.
    """
    if uri.startswith(_S3):
        return {ENV_CHECKPOINT_URI: uri}
    return {ENV_CHECKPOINT_DIR: local_uri(uri).removeprefix(_FILE)}


def local_data(data: DataSpec) -> DataSpec:
    """Data with every URI as the worker sees it."""
    return data.model_copy(
        update={
            "sources": [
                source.model_copy(update={"uri": local_uri(source.uri)}) for source in data.sources
            ],
            "tokenizer": local_uri(data.tokenizer),
        }
    )


def claims(training: str, spec: DeepSeekTrainingSpec) -> dict[str, bool]:
    """Claims to mount, and whether the worker only reads them."""
    read = [source.uri for source in spec.data.sources] + [spec.data.tokenizer] if spec.data else []
    found = {name: True for uri in read if (name := _claim(uri))}
    written = _claim(checkpoint_uri(training, spec.checkpoint))
    if written:
        found[written] = False
    return found


def mounts(claims: dict[str, bool]) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Volumes of the pod and mounts of the container for these claims."""
    volumes, mounted = [], []
    for index, (claim, read_only) in enumerate(sorted(claims.items())):
        name = f"claim-{index}"  # a claim's name may be too long for a volume's
        source = {"claimName": claim, "readOnly": True} if read_only else {"claimName": claim}
        volumes.append({"name": name, "persistentVolumeClaim": source})
        mount = {"name": name, "mountPath": f"{VOLUME_ROOT}/{claim}"}
        mounted.append({**mount, "readOnly": True} if read_only else mount)
    return volumes, mounted


def _claim(uri: str) -> str:
    return uri.removeprefix(_PVC).split("/", 1)[0] if uri.startswith(_PVC) else ""
