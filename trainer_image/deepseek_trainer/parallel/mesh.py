"""One mesh with named purposes: replicate (HSDP copies) x shard (FSDP2) x tensor (innermost, so
that its ranks are neighbours).
"""

import os
from dataclasses import asdict, dataclass
from datetime import timedelta
from typing import Final

import torch
import torch.distributed as dist
from dstrain_api.model import Architecture
from dstrain_api.spec import ParallelismSpec
from torch._C._distributed_c10d import HashStore
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

REPLICATE: Final = "replicate"
SHARD: Final = "shard"
TENSOR: Final = "tensor"
_TIMEOUT: Final = timedelta(
    minutes=10
)  # a peer that died is seen at once; this is for one that went silent


@dataclass(frozen=True, kw_only=True)
class Layout:
    """Sizes of the mesh."""

    replicate: int
    shard: int
    tensor: int

    @property
    def data(self) -> int:
        """Ranks that read different samples."""
        return self.replicate * self.shard

    def to_json(self) -> dict[str, int]:
        """As a JSON record."""
        return asdict(self)


def plan_layout(spec: ParallelismSpec, world: int, architecture: Architecture) -> Layout:
    """Sizes of the mesh for a number of processes.

    Raises:
        ValueError: the sizes do not divide; the message names the fields.
    """
    fixed = spec.tensor * spec.data_replicate
    shard = world // fixed if spec.data_shard == "auto" else spec.data_shard
    if fixed * shard != world:
        raise ValueError(
            f"parallelism: tensor {spec.tensor} x dataReplicate {spec.data_replicate} x dataShard "
            f"{spec.data_shard} does not fit {world} processes (workers.replicas x "
            "processesPerWorker)"
        )
    for name, size in (
        ("heads", architecture.heads),
        ("denseFfn", architecture.dense_ffn),
        ("moe.ffn", architecture.moe.ffn),
    ):
        if size % spec.tensor:
            raise ValueError(
                f"parallelism.tensor {spec.tensor} must divide model.overrides.{name} {size}"
            )
    return Layout(replicate=spec.data_replicate, shard=shard, tensor=spec.tensor)


@dataclass(frozen=True, kw_only=True)
class Mesh:
    """The processes of this generation and this process's place among them."""

    layout: Layout
    device: torch.device
    devices: DeviceMesh
    rank: int
    world: int

    @property
    def data_parallel(self) -> DeviceMesh:
        """What FSDP2 shards over: one dimension, or (replicate, shard) for hybrid sharding."""
        return self.devices[REPLICATE, SHARD] if self.layout.replicate > 1 else self.devices[SHARD]

    @property
    def tensor_group(self) -> dist.ProcessGroup | None:
        """The ranks that split each layer with this one; none when nothing is split."""
        return self.devices.get_group(TENSOR) if self.layout.tensor > 1 else None

    @property
    def tensor_rank(self) -> int:
        """Place among the ranks that split a layer."""
        return self.rank % self.layout.tensor

    @property
    def shard_rank(self) -> int:
        """Place among the ranks that share one copy of the weights."""
        return self.rank // self.layout.tensor % self.layout.shard

    @property
    def replicate_rank(self) -> int:
        """Which copy of the weights this rank holds a part of."""
        return self.rank // (self.layout.tensor * self.layout.shard)

    @property
    def data_rank(self) -> int:
        """Place among the ranks that read different samples."""
        return self.rank // self.layout.tensor


def join_world() -> torch.device:
    """Form the process group that torchrun's environment describes (one process without it); the
    device of this rank.
    """
    local_rank = int(os.environ.get("LOCAL_RANK", "0"))
    cuda = torch.cuda.is_available()
    device = torch.device("cuda", local_rank) if cuda else torch.device("cpu")
    if cuda:
        torch.cuda.set_device(device)
    # OpenMP threads spin at every operation's end: with a busy neighbour a mini step takes 1 s
    # instead of 16 ms.
    one_thread = not cuda and "OMP_NUM_THREADS" not in os.environ
    # Also where nothing changes: in a fork, the first two threads that ask for torch's thread pool
    # at once may get none (2.13).
    torch.set_num_threads(1 if one_thread else torch.get_num_threads())
    alone = "WORLD_SIZE" not in os.environ
    dist.init_process_group(
        "cpu:gloo,cuda:nccl" if cuda else "gloo",
        device_id=device if cuda else None,
        timeout=_TIMEOUT,
        store=HashStore() if alone else None,
        rank=0 if alone else -1,
        world_size=1 if alone else -1,
    )
    return device


def make_mesh(layout: Layout, device: torch.device) -> Mesh:
    """The mesh over all processes of the group."""
    devices = init_device_mesh(
        device.type,
        (layout.replicate, layout.shard, layout.tensor),
        mesh_dim_names=(REPLICATE, SHARD, TENSOR),
    )
    return Mesh(
        layout=layout,
        device=device,
        devices=devices,
        rank=dist.get_rank(),
        world=dist.get_world_size(),
    )
