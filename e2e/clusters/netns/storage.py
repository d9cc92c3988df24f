"""ReadWriteMany storage, as users have it by NFS: folders of this machine, seen by every node."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

CLASS = "shared"
# A released volume is not given to another claim, so this bounds the claims of a cluster's life.
VOLUMES = 100
CAPACITY = "100Gi"


def make_folders(volumes: Path) -> None:
    """One folder per volume, writable by any user: kubelet changes no owner on a hostPath."""
    for i in range(VOLUMES):
        folder = volumes / f"volume-{i}"
        folder.mkdir(parents=True)
        folder.chmod(0o777)


def manifests(volumes: Path) -> str:
    """The default storage class and its volumes, for `kubectl apply`."""
    storage_class: dict[str, Any] = {
        "apiVersion": "storage.k8s.io/v1",
        "kind": "StorageClass",
        "metadata": {
            "name": CLASS,
            "annotations": {"storageclass.kubernetes.io/is-default-class": "true"},
        },
        "provisioner": "kubernetes.io/no-provisioner",
        "volumeBindingMode": "Immediate",
    }
    items = [storage_class, *(_volume(volumes / f"volume-{i}") for i in range(VOLUMES))]
    return json.dumps({"apiVersion": "v1", "kind": "List", "items": items})


def _volume(folder: Path) -> dict[str, Any]:
    return {
        "apiVersion": "v1",
        "kind": "PersistentVolume",
        "metadata": {"name": folder.name},
        "spec": {
            "capacity": {"storage": CAPACITY},
            "accessModes": ["ReadWriteMany", "ReadWriteOnce"],
            "persistentVolumeReclaimPolicy": "Retain",
            "storageClassName": CLASS,
            "hostPath": {"path": str(folder), "type": "Directory"},
        },
    }
