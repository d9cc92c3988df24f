"""A rank's part of the state in host memory: taken by the training thread in one go, written from
there in the background.
"""

from collections.abc import Mapping

import torch
from torch.distributed.tensor import DTensor

_ALIGN = 64  # bytes; a tensor starts at a cache line


class HostCopy:
    """A copy of tensors in one piece of host memory.

    Args:
        tensors: by name, plain or distributed; they stay where they are while training goes on.
        memory: `size_of(tensors)` bytes, 1-D uint8 on the CPU; pinned for tensors of a GPU.
    """

    def __init__(self, tensors: Mapping[str, torch.Tensor], memory: torch.Tensor) -> None:
        self.memory = memory
        self._parts = [_part(tensor) for tensor in tensors.values()]
        self._views = []
        offset = 0
        for part in self._parts:
            view = memory[offset : offset + part.nbytes].view(part.dtype).view(part.shape)
            self._views.append(view)
            offset += _aligned(part.nbytes)
        self._cuda = any(part.is_cuda for part in self._parts)
        self._taken: torch.cuda.Event | None = None
        # from_local would move the copy to the mesh's device.
        self.tensors = {
            name: DTensor(view, tensor._spec, requires_grad=False)  # type: ignore[no-untyped-call]
            if isinstance(tensor, DTensor)
            else view
            for (name, tensor), view in zip(tensors.items(), self._views, strict=True)
        }

    def take(self) -> None:
        """Copy the tensors here. On a GPU this only queues the copies: `wait` before reading."""
        torch._foreach_copy_(self._views, self._parts, non_blocking=self._cuda)
        if self._cuda:
            self._taken = torch.cuda.Event()  # type: ignore[no-untyped-call]
            self._taken.record()

    def wait(self) -> None:
        """Wait until what `take` began is here."""
        if self._taken:
            self._taken.synchronize()

    def put_back(self) -> None:
        """Copy what is here into the tensors."""
        torch._foreach_copy_(self._parts, self._views)


def size_of(tensors: Mapping[str, torch.Tensor]) -> int:
    """Bytes that a copy of this rank's parts needs."""
    return sum(_aligned(_part(tensor).nbytes) for tensor in tensors.values())


def host_memory(tensors: Mapping[str, torch.Tensor]) -> torch.Tensor:
    """Memory of this process for a copy."""
    pinned = any(tensor.is_cuda for tensor in tensors.values())
    return torch.empty(size_of(tensors), dtype=torch.uint8, pin_memory=pinned)


def _part(tensor: torch.Tensor) -> torch.Tensor:
    local = tensor.to_local() if isinstance(tensor, DTensor) else tensor
    return local.detach()


def _aligned(size_bytes: int) -> int:
    return -(-size_bytes // _ALIGN) * _ALIGN
