"""Which pods of a cluster a Prometheus outside of it scrapes, as the chart's monitors say inside.

Debian's Prometheus is built without the discovery of Kubernetes pods, so a list of them is served
to it. It scrapes through the API server: pods need not be reachable from here.
"""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import httpx
from dstrain_api.constants import COORDINATOR_PORT, LABEL_TRAINING, METRICS_PORT

from e2e.clusters.interface import Cluster
from e2e.clusters.shell import ClusterError
from e2e.serving import serve

PROXIED = "/proxy/metrics"
# Path of a list -> label selector of its pods, and their port.
LISTS = {
    "/workers": (LABEL_TRAINING, METRICS_PORT),
    "/operator": ("app.kubernetes.io/name=deepseek-operator", COORDINATOR_PORT),
}


@contextmanager
def cluster_jobs(cluster: Cluster) -> Iterator[list[dict[str, Any]]]:
    """Scrape configs for the worker pods and the operator of a cluster, also for pods to come.

    Series get `namespace`, `pod` and, as `instance`, the pod's name.
    """
    with (
        _api_on_loopback(cluster) as api,
        serve(lambda path: json.dumps(_targets(api, *LISTS[path])), "application/json") as lists,
    ):
        yield [
            _job("dstrain-worker", f"http://{lists}/workers", honor_labels=False),
            _job("dstrain-operator", f"http://{lists}/operator", honor_labels=True),
        ]


def _job(name: str, url: str, *, honor_labels: bool) -> dict[str, Any]:
    return {
        "job_name": name,
        "honor_labels": honor_labels,
        "http_sd_configs": [{"url": url, "refresh_interval": "1s"}],
    }


@contextmanager
def _api_on_loopback(cluster: Cluster) -> Iterator[str]:
    """`kubectl proxy`: the cluster's API at `host:port`, without TLS and without credentials."""
    process = subprocess.Popen(
        ["kubectl", "proxy", "--port=0"],
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, **cluster.exports()},
    )
    try:
        assert process.stdout is not None
        line = process.stdout.readline()  # Starting to serve on 127.0.0.1:43211
        if not line:
            raise ClusterError(f"`kubectl proxy` ended ({process.wait()})")
        yield line.split()[-1]
    finally:
        process.terminate()
        process.wait()


def _targets(api: str, selector: str, port: int) -> list[dict[str, Any]]:
    """The running pods of a label selector, as `http_sd` wants them."""
    answer = httpx.get(f"http://{api}/api/v1/pods", params={"labelSelector": selector})
    answer.raise_for_status()
    found = [
        (pod["metadata"]["namespace"], pod["metadata"]["name"])
        for pod in answer.json()["items"]
        if pod["status"]["phase"] == "Running"
    ]
    return [
        {
            "targets": [api],
            "labels": {
                "__metrics_path__": f"/api/v1/namespaces/{namespace}/pods/{name}:{port}{PROXIED}",
                "instance": name,
                "namespace": namespace,
                "pod": name,
            },
        }
        for namespace, name in found
    ]
