"""The work that one rank does in a round: matrix products, whose results are known, and an exchange
of data with its partner. Every rank does the same amount, so that only its speed tells.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from typing import Final

import torch
import torch.distributed as dist

from deepseek_trainer.preflight import gpu
from deepseek_trainer.preflight.judge import Result

# The shortest counts: others of the machine hold up some, a quota of CPU time all.
FIRST_TRIES: Final = 3
SECOND_TRIES: Final = 8
EXCHANGE_TIMEOUT: Final = timedelta(seconds=20)


@dataclass(frozen=True, kw_only=True)
class _Load:
    size: int  # of square matrices
    products: int
    dtype: torch.dtype
    exchanged_bytes: int
    margin_s: float


# Long enough that a quota of CPU time shows (a fifth is 20 ms of every 100): 46 ms of an
# EPYC's core.
_CPU: Final = _Load(
    size=512, products=16, dtype=torch.float32, exchanged_bytes=2**22, margin_s=0.06
)
_CUDA: Final = _Load(
    size=4096, products=32, dtype=torch.bfloat16, exchanged_bytes=2**26, margin_s=0.005
)


def measure(device: torch.device, node: str, partner: int | None, tries: int) -> Result:
    """One round of this rank."""
    load = _CUDA if device.type == "cuda" else _CPU
    compute_s, trouble = _products(device, load, tries)
    trouble = trouble or _device_trouble(device)
    exchange_s = None
    if partner is not None:
        try:
            exchange_s, wrong = _exchange(device, load, partner, tries)
        except RuntimeError as error:
            wrong = f"the exchange of data with rank {partner} failed: {error}"
        trouble = trouble or wrong
    if device.type == "cuda":
        torch.cuda.empty_cache()  # the model finds the memory as if nothing had been
    return Result(
        node=node,
        compute_s=compute_s,
        exchange_s=exchange_s,
        trouble=trouble[:512],
        margin_s=load.margin_s,
    )


def _products(device: torch.device, load: _Load, tries: int) -> tuple[float, str]:
    """Seconds, and what is wrong. Small whole numbers: their sums are exact in any precision."""
    source = torch.Generator(device).manual_seed(1)
    shape = (load.size, load.size)
    left, right = (
        torch.randint(-2, 3, shape, generator=source, device=device, dtype=load.dtype)
        for _ in range(2)
    )
    product = left @ right  # and the kernel is loaded

    def work() -> None:
        for _ in range(load.products):
            torch.mm(left, right, out=product)

    seconds = _shortest(device, work, tries)
    ones = torch.ones(load.size, dtype=torch.float64, device=device)
    by_matrix = (left.float() @ right.float()).double() @ ones
    by_vector = left.double() @ (right.double() @ ones)
    return seconds, "" if torch.equal(by_matrix, by_vector) else "a matrix product is wrong"


def _exchange(device: torch.device, load: _Load, partner: int, tries: int) -> tuple[float, str]:
    """Seconds, and what is wrong."""
    own = torch.full((load.exchanged_bytes // 4,), dist.get_rank(), dtype=torch.int32).to(device)
    other = torch.empty_like(own)

    def work() -> None:
        both = [dist.P2POp(dist.isend, own, partner), dist.P2POp(dist.irecv, other, partner)]
        for request in dist.batch_isend_irecv(both):
            request.wait(EXCHANGE_TIMEOUT)

    work()  # connects, and waits for a partner that comes later
    seconds = _shortest(device, work, tries)
    good = bool((other == partner).all())
    return seconds, "" if good else f"data from rank {partner} arrived damaged"


def _shortest(device: torch.device, work: Callable[[], None], tries: int) -> float:
    found_s = []
    for _ in range(tries):
        _settle(device)
        began_s = time.perf_counter()
        work()
        _settle(device)
        found_s.append(time.perf_counter() - began_s)
    return min(found_s)


def _settle(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _device_trouble(device: torch.device) -> str:
    if device.type != "cuda":
        return ""
    return gpu.trouble(f"GPU-{torch.cuda.get_device_properties(device).uuid}")
