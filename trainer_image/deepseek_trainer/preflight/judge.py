"""Which ranks are bad, from what each has measured. Pure.

Two rounds, as in DLRover's node check (its docs/design): the first pairs everybody; in the second
each suspect has one of the healthiest for a partner, so that the good half of a slow pair clears
itself. Bad is who fails both. Slowness is judged only between nodes: on one node there is nothing
better to move to.
"""

from collections.abc import Mapping
from statistics import median_low
from typing import Final

from dstrain_api.base import ApiModel

SLOW: Final = 2.0  # times the median

Pairs = dict[int, int]  # by rank, both ways; who is not in it has no partner


class Result(ApiModel):
    """What one rank has found out in one round.

    `compute_s`: for a fixed amount of matrix products. `exchange_s`: to exchange a fixed amount of
    data with its partner; None without one. `trouble`: what is broken; empty: nothing that it knows
    of. `margin_s`: differences below it are chance on this kind of device.
    """

    node: str
    compute_s: float
    exchange_s: float | None = None
    trouble: str = ""
    margin_s: float = 0.0


def first_pairs(world: int) -> Pairs:
    """Everybody with somebody half the world away, on another node where there is one; the last of
    an odd number alone.
    """
    half = world // 2
    return {
        rank: other for low in range(half) for rank, other in ((low, low + half), (low + half, low))
    }


def second_pairs(results: Mapping[int, Result], suspects: Mapping[int, str]) -> Pairs:
    """Each suspect with one of the healthiest, as far as there are enough."""
    healthy = sorted((r for r in results if r not in suspects), key=lambda r: results[r].compute_s)
    pairs: Pairs = {}
    for suspect, other in zip(suspects, healthy, strict=False):
        pairs[suspect], pairs[other] = other, suspect
    return pairs


def suspects(results: Mapping[int, Result], usual: Mapping[int, Result]) -> dict[int, str]:
    """The ranks that something is wrong with, and what.

    Args:
        results: to be judged, by rank.
        usual: of all ranks in the first round: their medians are the measure.
    """
    compared = len({result.node for result in usual.values()}) > 1
    compute_s = median_low(result.compute_s for result in usual.values())
    exchanges_s = [r.exchange_s for r in usual.values() if r.exchange_s is not None]
    exchange_s = median_low(exchanges_s) if exchanges_s else 0.0
    found = {}
    for rank, result in sorted(results.items()):
        why = result.trouble
        if compared and not why:
            why = _slow("matrix products", result.compute_s, compute_s, result.margin_s)
        if compared and not why and result.exchange_s is not None:
            why = _slow("exchange of data", result.exchange_s, exchange_s, result.margin_s)
        if why:
            found[rank] = why
    return found


def _slow(what: str, seconds: float, usual_s: float, margin_s: float) -> str:
    if seconds <= SLOW * usual_s or seconds - usual_s <= margin_s:
        return ""
    times = f", {seconds / usual_s:.1f} times the median" if usual_s else ""
    return f"{what} took {1000 * seconds:.0f} ms{times}"
