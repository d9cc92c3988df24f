"""A training that can be put into any state, to ask the plan what it would do."""

from dataclasses import replace

from deepseek_operator.core.model import (
    ContainerView,
    Gathering,
    Membership,
    MemberView,
    NodeView,
    Observed,
    PodView,
    Settings,
    Training,
    WorkerError,
)
from deepseek_operator.core.plan import plan
from dstrain_api.protocol import ProgressReport
from dstrain_api.rules import validate
from dstrain_api.status import DeepSeekTrainingStatus

NOW_S = 1_800_000_000.0
SETTINGS = Settings(trainer_image="example/trainer:1", coordinator_url="http://op:8080")
ELASTIC = {"minReplicas": 1, "maxReplicas": 4, "replacementWait": "45s", "scaleUpSnooze": "5m"}


class Case:
    """A training of two workers that can be put into any state, and what the plan says to it."""

    def __init__(self, replicas=2, **spec):
        self.spec = {
            "entrypoint": {"module": "program"},
            "workers": {"replicas": replicas},
            "recovery": {"heartbeatTimeout": "5s"},
            **spec,
        }
        self.status = DeepSeekTrainingStatus()
        self.pods, self.members, self.nodes = {}, {}, {}
        self.gathering = Gathering(listening_s=100.0)
        self.refused = ""
        self.settings = SETTINGS
        self.now_s = NOW_S
        for name in ("n0", "n1", "n2", "n3"):
            self.nodes[name] = NodeView(name=name, ready=True)

    def started(self, *slots, attempt=1):
        """Pods of these slots run and have not joined."""
        self.status = self.status.model_copy(update={"attempt": max(attempt, self.status.attempt)})
        for slot in slots:
            self.pods[slot] = PodView(
                namespace="team",
                name=f"mini-{slot}-{attempt}",
                uid=f"u{slot}-{attempt}",
                training="mini",
                training_uid="t",
                slot=slot,
                attempt=attempt,
                node=f"n{slot}",
                phase="Running",
                deleting=False,
                created_at_s=self.now_s - 50,
                container=ContainerView(running=True),
            )
        return self

    def joining(self, *slots, waiting_s=1.0, attempt=1):
        self.started(*slots, attempt=attempt)
        for slot in slots:
            self._member(slot, state="joining", waiting_s=waiting_s)
        return self

    def running(self, *slots, generation=1, attempt=1):
        """A generation of these slots is formed and at step 40."""
        self.started(*slots, attempt=attempt)
        for slot in slots:
            self._member(
                slot,
                state="running",
                generation=generation,
                group_world_size=len(slots),
            )
        members = tuple(self.pods[s].uid for s in slots)
        self.gathering = replace(
            self.gathering,
            membership=Membership(
                generation=generation,
                pod_uids=members,
                master_address="10.0.0.0",
                master_port=1,
            ),
            progress=ProgressReport(step=40, total_steps=100, tokens=4000, resumed_step=0),
            progress_generation=generation,
            progress_at_s=self.now_s,
        )
        self.status = self.status.model_copy(update={"generation": generation})
        return self.written()

    def written(self):
        """The status is as the operator would have written it."""
        decided = self.plan()
        self.status = decided.status or self.status
        return self

    def _member(self, slot, **facts):
        pod = self.pods[slot]
        self.members[pod.uid] = MemberView(
            pod=pod.name,
            pod_uid=pod.uid,
            slot=slot,
            node=pod.node,
            **{"silent_s": 0.5, "generation": 0, "address": f"10.0.0.{slot}", "port": 5, **facts},
        )

    def change_pod(self, slot, **facts):
        self.pods[slot] = replace(self.pods[slot], **facts)
        return self

    def change_member(self, slot, **facts):
        uid = self.pods[slot].uid
        self.members[uid] = replace(self.members[uid], **facts)
        return self

    def fails(self, slot, exit_code=1, **facts):
        container = ContainerView(exit_code=exit_code, terminated_reason="Error", **facts)
        return self.change_pod(slot, phase="Failed", container=container)

    def silent(self, slot, silent_s=6.0):
        return self.change_member(slot, silent_s=silent_s)

    def knows(self, **facts):
        self.gathering = replace(self.gathering, **facts)
        return self

    def edit(self, **spec):
        self.spec = {**self.spec, **spec}
        return self

    def error(
        self, slot, exit_code=1, ago_s=1.0, message="ValueError: no", fingerprint="f", **facts
    ):
        pod = self.pods[slot]
        found = WorkerError(
            pod=pod.name,
            pod_uid=pod.uid,
            node=pod.node,
            generation=self.status.generation,
            exit_code=exit_code,
            message=message,
            fingerprint=fingerprint,
            at_s=self.now_s - ago_s,
            **facts,
        )
        return self.knows(errors=(*self.gathering.errors, found))

    def training(self):
        return Training(
            namespace="team",
            name="mini",
            uid="t",
            resource_version="7",
            generation=1,
            created_at_s=NOW_S - 1000,
            deleting=False,
            spec=validate(self.spec),
            spec_error="",
            status=self.status,
        )

    def plan(self, **training):
        observed = Observed(
            pods=tuple(self.pods.values()),
            nodes=self.nodes,
            gathering=replace(self.gathering, members=tuple(self.members.values())),
            refused=self.refused,
            token="token",
            status_written_at_s=self.now_s - 60,
        )
        return plan(replace(self.training(), **training), observed, self.settings, self.now_s)


def made(decided):
    return [m["metadata"]["name"] for m in decided.creates if m["kind"] == "Pod"]


def deleted(decided):
    return [(d.name, d.grace_s) for d in decided.deletes]


def says(status, kind):
    return next((c for c in status.conditions if c.type == kind), None)
