"""The one loop that keeps every training as it should be: observe, plan, act, look again.

Everything that happens only puts a key into the queue: a change of the training, of one of its
pods or nodes, news of the coordinator, a time that has come. What is decided is decided by `plan`,
from caches; nothing is read from the API.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Collection, Iterable, Iterator
from dataclasses import replace
from typing import Any, Final

from dstrain_api.constants import LABEL_TRAINING
from dstrain_api.quantities import duration_s

from deepseek_operator.core.model import (
    Key,
    NodeView,
    Observed,
    Plan,
    PodView,
    Settings,
    Training,
)
from deepseek_operator.core.plan import plan
from deepseek_operator.kube.port import NODES, PODS, Cluster, ClusterError, NotFound
from deepseek_operator.metrics import OperatorMetrics
from deepseek_operator.runtime.act import Outcome, act
from deepseek_operator.runtime.coordinator import DEFAULT_SILENCE_S, Coordinator, training_token
from deepseek_operator.runtime.informer import Informer, newer
from deepseek_operator.runtime.pulse import Pulse
from deepseek_operator.runtime.queue import KeyedQueue
from deepseek_operator.runtime.views import node_view, pod_view

WORKERS: Final = 8
TICK_S: Final = 0.5
RESYNC_S: Final = 300.0
BLIND_AFTER_S: Final = 10.0  # without contact to the API server nothing is decided any more
BLIND_RETRY_S: Final = 1.0
PAUSE_S: Final = 1.0  # a longer standstill of this process must not look like silent pods
STUCK_AFTER_S: Final = 300.0  # every call of the API has a shorter limit
QUIET_AFTER_S: Final = 150.0  # two bookmarks of the API server

log = logging.getLogger(__name__)


class Controller:
    """Reconciles the trainings given to `put` on `cluster`, until `stop`.

    `clock` gives seconds since the epoch, `jitter` a number in [0, 1). `namespaces` are those
    whose pods are watched; "" is all of them. `leads` says whether this process may act: while it
    may not, nothing is decided. All methods belong to the event loop in which `run` runs.
    """

    def __init__(
        self,
        *,
        cluster: Cluster,
        coordinator: Coordinator,
        settings: Settings,
        operator_key: bytes,
        clock: Callable[[], float],
        jitter: Callable[[], float],
        namespaces: Collection[str] = ("",),
        metrics: OperatorMetrics | None = None,
        leads: Callable[[], bool] = lambda: True,
    ) -> None:
        self.queue: KeyedQueue[Key] = KeyedQueue(jitter=jitter)
        self.metrics = metrics or OperatorMetrics()
        self.metrics.follow(lambda: list(self.trainings.values()), self.queue.__len__)
        self.unhealthy: tuple[str, ...] = ()  # as of the last beat of the pulse; read by any thread
        self.unready: tuple[str, ...] = ("not started yet",)
        self.pulse = Pulse(every_s=TICK_S, on_beat=self._tick)
        self.trainings: dict[Key, Training] = {}
        self._cluster = cluster
        self._coordinator = coordinator
        self._settings = settings
        self._operator_key = operator_key
        self._clock = clock
        self._jitter = jitter
        self._leads = leads
        self._keys: dict[str, Key] = {}  # by uid
        self._pods: dict[Key, dict[str, PodView]] = {}
        self._nodes: dict[str, NodeView] = {}
        self._refused: dict[Key, str] = {}
        self._written_at_s: dict[Key, float] = {}
        self._was_blind = ""
        self._stopped = asyncio.Event()
        self._pod_informers = [
            Informer(
                cluster,
                PODS,
                narrow=pod_view,
                on_change=self._pod_changed,
                jitter=jitter,
                namespace=namespace,
                label_selector=LABEL_TRAINING,
            )
            for namespace in namespaces
        ]
        nodes = Informer(
            cluster, NODES, narrow=node_view, on_change=self._node_changed, jitter=jitter
        )
        self.informers: tuple[Informer[PodView] | Informer[NodeView], ...] = (
            *self._pod_informers,
            nodes,
        )

    def put(self, training: Training) -> None:
        """Take a training as it is now; one older than what was seen or written is ignored."""
        known = self.trainings.get(training.key)
        if known and not newer(training.resource_version, known.resource_version):
            return
        if known and known.uid != training.uid:
            self.remove(known.key, known.uid)
        self.trainings[training.key] = training
        self._keys[training.uid] = training.key
        self.metrics.followed(training.key)
        self.queue.add(training.key)

    def remove(self, key: Key, uid: str) -> None:
        """Forget a training that is no more."""
        known = self.trainings.get(key)
        if known is None or known.uid != uid:
            return
        del self.trainings[key]
        del self._keys[uid]
        self._refused.pop(key, None)
        self._written_at_s.pop(key, None)
        self._coordinator.retire(uid)
        self.queue.discard(key)
        self.metrics.gone(key)

    @property
    def blind(self) -> str:
        """Why nothing can be decided at present; empty when all can be seen."""
        if not self._leads():
            return "the Lease could not be renewed, another replica may lead"
        if self.pulse.late_s > PAUSE_S:
            return "this process stood still"
        if unlisted := list(self._unlisted()):
            return unlisted[0]
        for informer in self.informers:
            if informer.lost_s > BLIND_AFTER_S:
                return f"no contact to the API server for {informer.lost_s:.0f} s"
        return ""

    async def run(self) -> None:
        """Work until `stop`; then finish what is being done. Raises what a bug raises."""
        loop = asyncio.get_running_loop()
        self._coordinator.listen()

        def tell(uid: str) -> None:
            loop.call_soon_threadsafe(self._news, uid)

        self._coordinator.on_transition = tell
        watching: list[asyncio.Task[None]]
        watching = [asyncio.create_task(informer.run()) for informer in self.informers]
        watching.append(asyncio.create_task(self.pulse.run()))
        working = [asyncio.create_task(self._work()) for _ in range(WORKERS)]
        stopped = asyncio.create_task(self._stopped.wait())
        tasks: list[asyncio.Task[Any]] = [*watching, *working, stopped]
        try:
            await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
            self.queue.close()
            await asyncio.gather(*working)
            for task in watching:
                if task.done():
                    task.result()
        finally:
            for task in tasks:
                task.cancel()

    def stop(self) -> None:
        """Let `run` end."""
        self._stopped.set()

    async def _work(self) -> None:
        while (key := await self.queue.get()) is not None:
            began_s = asyncio.get_running_loop().time()
            try:
                result = await self._reconcile(key)
            except ClusterError as error:
                result = "error"
                retry_s = self.queue.retry(key)
                log.warning("cannot act for %s, again in %.1f s: %s", key, retry_s, error)
            except Exception:
                result = "error"
                retry_s = self.queue.retry(key)
                log.exception("a defect of the operator, at %s, again in %.1f s", key, retry_s)
            finally:
                self.queue.done(key)
            self.metrics.reconciled(result, asyncio.get_running_loop().time() - began_s)

    async def _reconcile(self, key: Key) -> str:
        training = self.trainings.get(key)
        if training is None:
            return "success"
        if training.deleting:  # its pods go with it, by their owner references
            self._coordinator.retire(training.uid)
            return "success"
        if self._blind():
            self.queue.add_after(key, BLIND_RETRY_S)
            return "requeue"
        token = self._register(training)
        decided = plan(training, self._observe(training, token), self._settings, self._clock())
        try:
            outcome = await act(decided, training, self._cluster, self._coordinator)
        except NotFound:
            log.info("%s is no more", key)
            self.remove(key, training.uid)
            return "success"
        self._take_over(training, decided, outcome.resource_version)
        self._expect(outcome)
        self._remember_refusal(key, decided, outcome)
        if outcome.conflict:
            self.queue.retry(key)
            return "requeue"
        self.queue.succeeded(key)
        resync_s = RESYNC_S * (0.8 + 0.4 * self._jitter())
        self.queue.add_after(key, min(resync_s, decided.requeue_after_s or resync_s))
        return "success"

    def _register(self, training: Training) -> str:
        token = training_token(self._operator_key, training.uid)
        silence_s = (
            duration_s(training.spec.recovery.heartbeat_timeout)
            if training.spec
            else DEFAULT_SILENCE_S
        )
        self._coordinator.register(
            training.uid,
            generation=training.status.generation,
            token=token,
            silence_s=silence_s,
        )
        return token

    def _observe(self, training: Training, token: str) -> Observed:
        key = training.key
        return Observed(
            pods=tuple(self._pods.get(key, {}).values()),
            nodes=self._nodes,
            gathering=self._coordinator.snapshot(training.uid),
            refused=self._refused.get(key, ""),
            token=token,
            status_written_at_s=self._written_at_s.get(key, 0.0),
        )

    def _take_over(self, training: Training, decided: Plan, resource_version: str) -> None:
        """Go on from the status that was written, until the watch shows it or a newer one.

        The watch's event of this very write says nothing new then, so nobody else would look again.
        """
        key, status = training.key, decided.status
        known = self.trainings.get(key)
        if status is None or known is None or known.uid != training.uid:
            return
        if not newer(resource_version, training.resource_version):
            return
        self._written_at_s[key] = self._clock()
        self.metrics.status_written(key, training.status, status)
        if newer(resource_version, known.resource_version):
            self.trainings[key] = replace(
                training, status=status, resource_version=resource_version
            )
            self.queue.add(key)

    def _expect(self, outcome: Outcome) -> None:
        """Know the pods just made before the watch tells of them, so as not to make them again."""
        for stored in outcome.created:
            if stored["kind"] == PODS.kind:
                for informer in self._pod_informers:
                    if informer.namespace in ("", stored["metadata"]["namespace"]):
                        informer.expect(stored)

    def _remember_refusal(self, key: Key, decided: Plan, outcome: Outcome) -> None:
        """What was refused stays refused until a create succeeds; the status has to say so soon."""
        if outcome.refused:
            if key not in self._refused:
                self.queue.add(key)
            self._refused[key] = outcome.refused
        elif decided.creates:
            self._refused.pop(key, None)

    def _blind(self) -> bool:
        blind = self.blind
        if bool(blind) != bool(self._was_blind):
            log.info("nothing is decided: %s", blind) if blind else log.info("all can be seen")
        self._was_blind = blind
        return bool(blind)

    def _tick(self, lag_s: float) -> None:
        if lag_s > PAUSE_S:
            log.warning("stood still for %.1f s: nobody is taken for silent because of that", lag_s)
            self._coordinator.forgive(lag_s)
        if not self._leads():  # pods are sent away, so they cannot be heard
            self._coordinator.forgive(TICK_S)
        self._coordinator.tick()
        self.metrics.lagged(lag_s)
        self.unready = tuple(self._unlisted())
        self.unhealthy = tuple(self._defects())

    def _unlisted(self) -> Iterator[str]:
        """Once listed is ready for good: worker pods need the coordinator also without the API."""
        for informer in self.informers:
            if not informer.synced:
                yield f"the list of {informer.name} is not complete yet"

    def _defects(self) -> Iterator[str]:
        """What a restart of this process may cure; an API server that is away is none of that."""
        if self.queue.age_s > STUCK_AFTER_S:
            yield f"a training has been waiting for {self.queue.age_s:.0f} s"
        for informer in self.informers:
            if informer.synced and not informer.lost_s and informer.quiet_s > QUIET_AFTER_S:
                yield f"the watch of {informer.name} is silent for {informer.quiet_s:.0f} s"

    def _news(self, uid: str) -> None:
        if key := self._keys.get(uid):
            self.queue.add(key)

    def _pod_changed(self, before: PodView | None, after: PodView | None) -> None:
        for pod in (before, after):
            if pod is None:
                continue
            key = Key(pod.namespace, pod.training)
            if pod is after:
                self._pods.setdefault(key, {})[pod.name] = pod
            else:
                self._pods[key].pop(pod.name)
                if not self._pods[key]:
                    del self._pods[key]
            self._wake([key])

    def _node_changed(self, before: NodeView | None, after: NodeView | None) -> None:
        if after:
            self._nodes[after.name] = after
        elif before:
            del self._nodes[before.name]
        name = (after or before).name  # type: ignore[union-attr]
        held = (k for k, pods in self._pods.items() if any(p.node == name for p in pods.values()))
        self._wake(held)
        self._wake(
            key
            for key, training in self.trainings.items()
            if any(n.name == name for n in training.status.excluded_nodes)
        )

    def _wake(self, keys: Iterable[Key]) -> None:
        for key in keys:
            if key in self.trainings:
                self.queue.add(key)
