"""What a controller is told of trainings: by events, and by lists that repair missed ones."""

from __future__ import annotations

import logging
from collections.abc import Iterable
from typing import Any

from deepseek_operator.core.model import Key
from deepseek_operator.kube.port import TRAININGS, Cluster
from deepseek_operator.runtime.controller import Controller
from deepseek_operator.runtime.views import training_view

log = logging.getLogger(__name__)


def put_object(controller: Controller, stored: dict[str, Any]) -> None:
    """Give the controller a training as stored. One that cannot be read is left as it is."""
    try:
        controller.put(training_view(stored))
    except ValueError as error:
        log.error("left alone: %s", error)  # noqa: TRY400 - the message says all


def remove_object(controller: Controller, stored: dict[str, Any]) -> None:
    """Tell the controller that this object was deleted."""
    meta = stored["metadata"]
    controller.remove(Key(meta.get("namespace", ""), meta["name"]), meta["uid"])


async def relist(controller: Controller, cluster: Cluster, namespaces: Iterable[str]) -> None:
    """Compare all trainings with those the controller knows: a deletion may have had no event.

    Raises ClusterError.
    """
    before = {key: training.uid for key, training in controller.trainings.items()}
    listed = set()
    for namespace in namespaces:
        async for page in cluster.list_pages(TRAININGS, namespace=namespace):
            for stored in page.items:
                listed.add(stored["metadata"]["uid"])
                put_object(controller, stored)
    for key, uid in before.items():
        if uid not in listed:
            controller.remove(key, uid)
