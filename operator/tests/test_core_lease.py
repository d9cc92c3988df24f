"""The rules of the Lease: when it may be taken, and until when its holder may act."""

from __future__ import annotations

from typing import Any

import pytest
from deepseek_operator.core.lease import (
    DEADLINE_S,
    DURATION_S,
    Candidate,
    Lease,
    destination,
    lease_of,
    new_lease,
    released,
    renewed,
    route,
    taken,
)

OWNER = {"apiVersion": "v1", "kind": "Service", "name": "op", "uid": "u"}


def lease(version: str, holder: str) -> Lease:
    return Lease(version=version, holder=holder, duration_s=12.0)


def stored(**spec: Any) -> dict[str, Any]:
    made = new_lease("ns", "op", "a", OWNER, 0.0)
    return {
        **made,
        "metadata": {**made["metadata"], "resourceVersion": "7"},
        "spec": made["spec"] | spec,
    }


def test_a_lease_of_another_is_free_only_when_unchanged_for_as_long_as_it_asked_for() -> None:
    b = Candidate("b")
    assert not b.may_take(lease("1", "a"), 100.0)
    assert not b.may_take(lease("1", "a"), 112.0)
    assert b.may_take(lease("1", "a"), 112.1)


def test_each_renewal_starts_the_wait_anew() -> None:
    b = Candidate("b")
    for second in range(60):
        assert not b.may_take(lease(str(second // 2), "a"), float(second))


def test_a_replica_that_has_just_started_waits_however_old_the_lease_looks() -> None:
    assert not Candidate("b").may_take(lease_of(stored(renewTime="1999-01-01T00:00:00Z")), 5.0)


def test_a_replica_that_could_not_look_watches_anew() -> None:
    b = Candidate("b")
    b.may_take(lease("1", "a"), 100.0)
    b.looked_away()
    assert not b.may_take(lease("1", "a"), 160.0)
    assert b.may_take(lease("1", "a"), 172.1)


def test_a_released_lease_and_one_of_the_same_name_are_free_at_once() -> None:
    assert Candidate("b").may_take(lease("1", ""), 0.0)
    assert Candidate("b").may_take(lease("1", "b"), 0.0)


def test_a_leader_stops_before_another_one_may_begin() -> None:
    a, b = Candidate("a"), Candidate("b")
    a.took(sent_at_s=10.0)
    b.may_take(lease("1", "a"), 10.0)  # at the earliest when the request was sent
    for tenth in range(100, 400):
        now_s = tenth / 10
        assert not (a.leads(now_s) and b.may_take(lease("1", "a"), now_s))
    assert DEADLINE_S < DURATION_S


def test_a_replica_that_yields_acts_no_more() -> None:
    a = Candidate("a")
    a.took(10.0)
    assert a.leads(11.0)
    a.yielded()
    assert not a.leads(11.0)


def test_a_renewal_moves_only_its_time_and_a_change_of_holder_is_counted() -> None:
    after = renewed(stored(), "a", 60.0)
    assert after == stored(renewTime="1970-01-01T00:01:00.000000Z")
    spec = taken(stored(), "b", OWNER, 60.0)["spec"]
    assert (spec["holderIdentity"], spec["leaseTransitions"]) == ("b", 1)
    assert spec["acquireTime"] == spec["renewTime"]
    assert released(stored())["spec"]["holderIdentity"] == ""


def test_a_write_names_the_version_that_was_read() -> None:
    for after in (taken(stored(), "b", OWNER, 60.0), renewed(stored(), "a", 60.0)):
        assert after["metadata"]["resourceVersion"] == "7"


@pytest.mark.parametrize(("address", "family"), [("10.0.0.1", "IPv4"), ("fd00::1", "IPv6")])
def test_the_route_leads_to_one_pod(address: str, family: str) -> None:
    made = route("ns", "op", address, 8080, "op-1", OWNER)
    assert made["addressType"] == family
    assert made["metadata"]["labels"]["kubernetes.io/service-name"] == "op"
    assert destination(made) == ([address], [8080], ["u"])
    assert destination({"metadata": {}}) == ([], [], [])
