"""What one look at a running training costs the operator, by the size of the gang."""

from __future__ import annotations

import statistics
import time

from deepseek_operator.core.model import (
    Gathering,
    Membership,
    MemberView,
    NodeView,
    Observed,
    PodView,
    Settings,
    Training,
)
from deepseek_operator.core.plan import plan
from dstrain_api.protocol import ProgressReport
from dstrain_api.rules import validate
from dstrain_api.status import DeepSeekTrainingStatus

SIZES = (2, 128, 1024)
ROUNDS = 15
NOW_S = 1_800_000_000.0
SETTINGS = Settings(trainer_image="trainer:1", coordinator_url="http://operator:8080")


def main() -> None:
    """Print the median CPU time of a plan that has nothing to do but write progress."""
    print(f"{'workers':>8}{'CPU ms':>10}{'CPU us per worker':>20}")
    for size in SIZES:
        training, observed = running(size)
        spent = []
        for _ in range(ROUNDS):
            began_s = time.process_time()
            plan(training, observed, SETTINGS, NOW_S)
            spent.append(time.process_time() - began_s)
        middle_s = statistics.median(spent)
        print(f"{size:>8}{1e3 * middle_s:>10.2f}{1e6 * middle_s / size:>20.1f}")


def running(size: int) -> tuple[Training, Observed]:
    """A gang of that size in its first generation, with progress to write."""
    spec = {"entrypoint": {"module": "program"}, "workers": {"replicas": size}}
    status = DeepSeekTrainingStatus(attempt=1, generation=1)
    training = Training(
        namespace="team",
        name="big",
        uid="t",
        resource_version="1",
        generation=1,
        created_at_s=NOW_S - 1000,
        deleting=False,
        spec=validate(spec),
        spec_error="",
        status=status,
    )
    members = tuple(
        MemberView(
            pod=f"big-{slot}-1",
            pod_uid=f"u{slot}",
            slot=slot,
            node=f"n{slot}",
            state="running",
            generation=1,
            silent_s=0.5,
            group_world_size=size,
        )
        for slot in range(size)
    )
    pods = tuple(
        PodView(
            namespace="team",
            name=m.pod,
            uid=m.pod_uid,
            training="big",
            training_uid="t",
            slot=m.slot,
            attempt=1,
            node=m.node,
            phase="Running",
            deleting=False,
            created_at_s=NOW_S - 900,
        )
        for m in members
    )
    gathering = Gathering(
        members=members,
        membership=Membership(
            generation=1,
            pod_uids=tuple(m.pod_uid for m in members),
            master_address="10.0.0.1",
            master_port=5,
        ),
        progress=ProgressReport(step=7, total_steps=100),
        progress_generation=1,
        listening_s=900.0,
    )
    nodes = {m.node: NodeView(name=m.node, ready=True) for m in members}
    return training, Observed(pods=pods, nodes=nodes, gathering=gathering, token="t")


if __name__ == "__main__":
    main()
