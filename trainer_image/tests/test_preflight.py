"""The check before training, with real ranks, and what it concludes."""

import os
import time
from datetime import timedelta
from typing import Any

import pytest
import torch
from deepseek_trainer import preflight
from deepseek_trainer.parallel.mesh import join_world
from deepseek_trainer.preflight import check, judge, measure
from deepseek_trainer.preflight.judge import Result
from dstrain_api.constants import ENV_NODE, ENV_PREFLIGHT

from .ranks import answers, launch, start


def results(*compute_ms: float, exchange_ms: tuple[float, ...] = (), nodes: int = 9) -> Any:
    """By rank; every rank on a node of its own, as far as there are so many."""
    exchanges = exchange_ms or (10.0,) * len(compute_ms)
    return {
        rank: Result(
            node=f"n{rank % nodes}", compute_s=ms / 1000, exchange_s=other / 1000, margin_s=0.05
        )
        for rank, (ms, other) in enumerate(zip(compute_ms, exchanges, strict=True))
    }


def found(measured: dict[int, Result]) -> list[int]:
    return [*judge.suspects(measured, measured)]


@pytest.mark.parametrize("world", [1, 2, 3, 8, 9])
def test_everybody_has_one_partner_and_an_odd_one_has_none(world: int) -> None:
    pairs = judge.first_pairs(world)
    assert all(pairs[other] == rank != other for rank, other in pairs.items())
    assert len(pairs) == world // 2 * 2


def test_who_is_twice_as_slow_as_the_median_is_suspected() -> None:
    assert found(results(100, 110, 190, 250)) == [3]
    assert found(results(100, 250)) == [1]


def test_both_of_a_slow_pair_are_suspected_and_each_gets_the_healthiest() -> None:
    measured = results(100, 90, 100, 80, 100, 100, exchange_ms=(10, 90, 10, 10, 90, 10))
    assert found(measured) == [1, 4]
    pairs = judge.second_pairs(measured, judge.suspects(measured, measured))
    assert pairs == {1: 3, 3: 1, 4: 0, 0: 4}


def test_without_enough_healthy_ranks_a_suspect_has_no_partner() -> None:
    assert judge.second_pairs(results(1, 1, 1), {0: "slow", 1: "slow"}) == {0: 2, 2: 0}


def test_a_few_milliseconds_are_chance() -> None:
    assert found(results(10, 10, 45)) == []


def test_on_one_node_nobody_is_slow() -> None:
    assert found(results(100, 100, 900, nodes=1)) == []


def test_what_is_broken_is_broken_on_any_node() -> None:
    measured = results(100, 100, nodes=1)
    measured[1] = measured[1].model_copy(update={"trouble": "a matrix product is wrong"})
    assert judge.suspects(measured, measured) == {1: "a matrix product is wrong"}


def try_it(kind: str, wanted: str = "1") -> tuple[str, float, int]:
    """How the check ends on this rank, its seconds, and how often it was measured.

    Rank 1 is the one that something is wrong with.
    """
    rank = int(os.environ["RANK"])
    os.environ[ENV_NODE] = f"node-{rank}"
    if rank == 0:
        os.environ[ENV_PREFLIGHT] = wanted
    device = join_world()
    products, rounds = measure._products, 0

    def faulty(*arguments: Any) -> tuple[float, str]:
        nonlocal rounds
        rounds += 1
        seconds, trouble = products(*arguments)
        if rank != 1 or kind == "healthy" or (kind == "once" and rounds > 1):
            return seconds, trouble
        if kind == "wrong":
            return seconds, "a matrix product is wrong"
        return 10 * seconds + 1.0, trouble

    measure._products = faulty
    torch.distributed.barrier()
    began_s = time.monotonic()
    try:
        end = str(preflight.passed(device))
    except preflight.PreflightFailed as error:
        end = str(error)
    took_s = time.monotonic() - began_s
    if end == "True":
        torch.distributed.barrier()  # as training does: rank 0 holds the store
    return end, took_s, rounds


def test_healthy_ranks_pass_in_one_round() -> None:
    ends = launch(3, try_it, "healthy")
    print([round(seconds, 3) for _, seconds, _ in ends])
    assert [end for end, _, _ in ends] == ["True"] * 3


@pytest.mark.parametrize(
    ("kind", "why"), [("slow", "matrix products took"), ("wrong", "a matrix product is wrong")]
)
def test_a_bad_rank_says_why_and_the_others_do_not_begin(kind: str, why: str) -> None:
    ends = launch(3, try_it, kind)
    assert [ends[0][0], ends[2][0]] == ["False", "False"]
    assert why in ends[1][0]
    assert ends[1][2] == 2


def test_a_rank_that_was_slow_once_clears_itself() -> None:
    ends = launch(3, try_it, "once")
    assert [end for end, _, _ in ends] == ["True"] * 3
    assert ends[1][2] == 2


def test_nothing_is_measured_unless_rank_zero_was_told_to() -> None:
    ends = launch(3, try_it, "slow", "0")
    assert [(end, rounds) for end, _, rounds in ends] == [("True", 0)] * 3


def stand_still() -> str:
    """Rank 1 gets no answer from its device."""
    check.LIMIT_S = check.SILENT_S = 2.0  # type: ignore[misc]
    measure.EXCHANGE_TIMEOUT = timedelta(seconds=1)  # type: ignore[misc]
    os.environ[ENV_PREFLIGHT] = "1"
    device = join_world()
    if os.environ["RANK"] == "1":
        measure._products = lambda *_: time.sleep(600)  # type: ignore[assignment, return-value]
    return str(preflight.passed(device))


def test_a_rank_whose_device_does_not_answer_ends_itself_and_the_others_do_not_begin() -> None:
    first, second, third = start(3, stand_still)
    process, connection = second
    with pytest.raises(EOFError):
        connection.recv_bytes()
    process.join(10)
    assert process.exitcode == 1
    assert answers([first, third]) == ["False", "False"]
