"""A DeepSeekTraining as a person at a terminal handles it: apply, watch, read its logs, delete it.

Everything goes through `kubectl`. One `kubectl get --watch` per training keeps every version of the
object with the time it was seen, so that a test waits on what happened and not on a clock.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import yaml

from e2e.clusters.interface import Cluster

Object = dict[str, Any]


@dataclass(frozen=True)
class Seen:
    """One version of the object; `at_s` is this machine's monotonic clock."""

    at_s: float
    event: str  # ADDED, MODIFIED, DELETED
    object: Object

    @property
    def status(self) -> Object:
        return dict(self.object.get("status") or {})

    @property
    def step(self) -> int:
        return int(self.status.get("progress", {}).get("step", 0))

    def condition(self, kind: str) -> Object:
        """The condition of that type, or an empty one."""
        found = [c for c in self.status.get("conditions", []) if c["type"] == kind]
        return dict(found[0]) if found else {}

    def is_true(self, kind: str) -> bool:
        return self.condition(kind).get("status") == "True"


@dataclass
class Training:
    """A training of one name in one namespace; close it to end its watch."""

    cluster: Cluster
    manifest: Object
    namespace: str
    seen: list[Seen] = field(default_factory=list)
    applied_at_s: float = 0.0

    def __post_init__(self) -> None:
        self._changed = threading.Condition()
        self._watch: subprocess.Popen[str] | None = None
        self._closed = False

    @property
    def name(self) -> str:
        return str(self.manifest["metadata"]["name"])

    def apply(self) -> None:
        """`kubectl apply -f`, then watch."""
        self.applied_at_s = time.monotonic()
        self.kubectl("apply", "-f", "-", stdin=yaml.safe_dump(self.manifest))
        if self._watch is None:
            self._watch = self._start_watch()
            threading.Thread(target=self._read, daemon=True).start()

    def patch(self, **spec: object) -> None:
        """`kubectl patch` of the spec's top-level fields."""
        body = json.dumps({"spec": spec})
        self.kubectl("patch", "dst", self.name, "--type=merge", "-p", body)

    def delete(self) -> None:
        """`kubectl delete`, without waiting."""
        self.kubectl("delete", "dst", self.name, "--wait=false", "--ignore-not-found")

    def close(self) -> None:
        """End the watch."""
        self._closed = True
        if self._watch is not None:
            self._watch.kill()
            self._watch.wait()

    def kubectl(self, *arguments: str, stdin: str | None = None) -> str:
        return self.cluster.kubectl("--namespace", self.namespace, *arguments, stdin=stdin)

    def wait(self, what: str, holds: Callable[[Seen], bool], timeout_s: float) -> Seen:
        """The first version, from the last one on, of which `holds` is true.

        Raises:
            AssertionError: it did not come about in time; the message tells the training's story.
        """
        deadline = time.monotonic() + timeout_s
        position = max(0, len(self.seen) - 1)
        with self._changed:
            while True:
                while position < len(self.seen):
                    if holds(self.seen[position]):
                        return self.seen[position]
                    position += 1
                left = deadline - time.monotonic()
                if left <= 0:
                    break
                self._changed.wait(left)
        raise AssertionError(f"{self.name}: not within {timeout_s:.0f} s: {what}\n{self.story()}")

    def wait_complete(self, timeout_s: float) -> Seen:
        done = self.wait("Finished", lambda s: s.is_true("Finished"), timeout_s)
        assert done.is_true("Complete"), self.story()
        return done

    def wait_step(self, step: int, timeout_s: float) -> Seen:
        return self.wait(f"step {step}", lambda s: s.step >= step, timeout_s)

    def pods(self) -> list[Object]:
        """The training's pods, in order of slot."""
        selector = f"dstrain.dev/training={self.name}"
        items = json.loads(self.kubectl("get", "pods", "-l", selector, "-o", "json"))["items"]
        return sorted(
            items,
            key=lambda p: (p["metadata"]["labels"]["dstrain.dev/slot"], p["metadata"]["name"]),
        )

    def live_pods(self) -> list[Object]:
        return [
            p
            for p in self.pods()
            if p["status"]["phase"] in ("Pending", "Running")
            and "deletionTimestamp" not in p["metadata"]
        ]

    def events(self) -> list[Object]:
        field_selector = f"involvedObject.name={self.name}"
        return list(
            json.loads(
                self.kubectl("get", "events", "--field-selector", field_selector, "-o", "json")
            )["items"]
        )

    def steps(self, pod: str) -> list[tuple[int, float]]:
        """(step, loss) of every step line in a pod's log, in order."""
        return list(step_lines(self.kubectl("logs", pod)))

    def story(self) -> str:
        """What a person would look at when something is wrong."""
        parts = [self.kubectl("get", "dst,pods", "-o", "wide")]
        parts.append(self.kubectl("describe", "dst", self.name)[-6000:])
        for pod in self.pods():
            name = pod["metadata"]["name"]
            try:
                parts.append(f"--- {name}\n{self.kubectl('logs', name, '--tail=25')}")
            except Exception as error:  # noqa: BLE001 - a story with a gap is better than none
                parts.append(f"--- {name}: no log ({error})")
        return "\n".join(parts)

    def _start_watch(self) -> subprocess.Popen[str]:
        command = ["kubectl", "get", "dst", self.name, "--namespace", self.namespace]
        command += ["--watch", "--output-watch-events", "-o", "json"]
        environment = {**os.environ, **self.cluster.exports()}
        return subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment)

    def _read(self) -> None:
        """Keep every version. A watch ends when the API server is away: then there is another."""
        while not self._closed and self._watch is not None:
            assert self._watch.stdout is not None
            for line in self._watch.stdout:
                document = json.loads(line)
                if document["type"] == "ERROR":
                    break
                with self._changed:
                    seen = Seen(time.monotonic(), document["type"], document["object"])
                    self.seen.append(seen)
                    self._changed.notify_all()
            self._watch.kill()
            self._watch.wait()
            time.sleep(0.5)
            if not self._closed:
                self._watch = self._start_watch()


STEP_LINE = re.compile(r"step[= ](\d+)\b.*?\bloss[= ]([0-9.]+)")


def step_lines(log: str) -> Iterator[tuple[int, float]]:
    """(step, loss) of every line of a trainer's log that tells of a step."""
    for line in log.splitlines():
        if match := STEP_LINE.search(line):
            yield int(match[1]), float(match[2])


def with_config_map(name: str, path: str) -> dict[str, Any]:
    """A pod template patch that mounts a config map."""
    mount = {"name": name, "mountPath": path}
    return {
        "spec": {
            "volumes": [{"name": name, "configMap": {"name": name}}],
            "containers": [{"name": "trainer", "volumeMounts": [mount]}],
        }
    }


def with_secret(name: str) -> dict[str, Any]:
    """A pod template patch that gives the variables of a secret to the trainer."""
    trainer = {"name": "trainer", "envFrom": [{"secretRef": {"name": name}}]}
    return {"spec": {"containers": [trainer]}}
