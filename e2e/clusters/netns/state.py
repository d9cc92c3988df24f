"""The folder of one cluster: everything it writes lies below it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

# A unix socket's path has 107 bytes; the longest below a node is
# kubelet/device-plugins/kubelet.sock, and node names add up to 7.
MAX_FOLDER_BYTES = 60


@dataclass(frozen=True)
class State:
    """Where the parts of a cluster keep their files."""

    folder: Path

    def __post_init__(self) -> None:
        if len(str(self.folder).encode()) > MAX_FOLDER_BYTES:
            raise ValueError(
                f"{self.folder} is too long a path for the sockets below it: choose a "
                f"DSTRAIN_HOME or a cluster name that makes it at most {MAX_FOLDER_BYTES} bytes"
            )

    @property
    def plan(self) -> Path:
        return self.folder / "plan.json"

    @property
    def complete(self) -> Path:
        """Exists from the end of `up` to the beginning of `down`, also over a reboot."""
        return self.folder / "complete"

    @property
    def keys(self) -> Path:
        return self.folder / "keys"

    @property
    def certificate(self) -> Path:
        """The API server signs itself; its certificate is its authority."""
        return self.folder / "apiserver" / "apiserver.crt"

    @property
    def volumes(self) -> Path:
        return self.folder / "volumes"

    def kubeconfig(self, user: str) -> Path:
        return self.folder / f"{user}.kubeconfig"

    def log(self, daemon: str) -> Path:
        return self.folder / "log" / f"{daemon}.log"

    def node(self, node: str) -> Path:
        return self.folder / node

    def socket(self, node: str) -> Path:
        return self.node(node) / "containerd.sock"
