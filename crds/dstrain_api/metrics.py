"""Every metric of dstrain, once: exporters build their objects from it, dashboards and docs use it.

Names follow prometheus.io/docs/practices/naming: prefix `dstrain_`, base units as suffix, `_total`
for counters. Where the operator measures what any controller measures, it uses controller-runtime's
names, so that stock dashboards work.

`training` is on every series of a training, whatever the scrape adds. `namespace` is emitted by the
operator, which must be scraped with honorLabels; on worker pods it comes from the scrape. Series
that carry `training` are removed with the training.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Final, Literal, get_args

from dstrain_api.constants import SINGULAR
from dstrain_api.status import Phase, Restarts

MetricType = Literal["gauge", "counter", "histogram"]
Exporter = Literal["operator", "agent"]
Unit = Literal[
    "", "bytes", "celsius", "hertz", "info", "ratio", "seconds", "tokens_per_second", "watts"
]


@dataclass(frozen=True)
class Metric:
    """One metric family as it is exposed.

    `buckets` are upper bounds in `unit`, without +Inf. `absent` says when there is no series of it;
    every other counter and histogram is exposed, as zero, as soon as its program knows the labels.
    """

    name: str
    type: MetricType
    help: str
    labels: tuple[str, ...] = ()
    unit: Unit = ""
    buckets: tuple[float, ...] | None = None
    absent: str = ""
    exporter: Exporter = "operator"

    @property
    def sample_names(self) -> tuple[str, ...]:
        """Names of the series that PromQL sees."""
        if self.type == "histogram":
            return tuple(f"{self.name}_{part}" for part in ("bucket", "sum", "count"))
        return (self.name,)


def _exposed(exporter: Exporter, common: tuple[str, ...], *metrics: Metric) -> tuple[Metric, ...]:
    """The metrics of one program, each with the labels that all of them have in front."""
    return tuple(replace(m, exporter=exporter, labels=(*common, *m.labels)) for m in metrics)


CONTROLLER: Final = SINGULAR  # value of the labels `controller` and `name`

_GPU = ("gpu", "gpu_uuid")
_NO_GPU = "on nodes without an NVIDIA GPU"
# About two bounds per doubling where most values lie: a quantile is no better than its bucket.
_STEP_BUCKETS = (
    *(0.01, 0.02, 0.05, 0.1, 0.15, 0.2, 0.3, 0.5, 0.75, 1.0, 1.5, 2.0, 3.0, 5.0, 7.5),
    *(10.0, 15.0, 20.0, 30.0, 60.0, 120.0),
)
_SAVE_BUCKETS = (
    *(0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 3.0, 5.0, 7.5, 10.0, 15.0, 20.0, 30.0, 60.0),
    *(120.0, 300.0, 600.0),
)
_RENDEZVOUS_BUCKETS = (0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 300.0)
_RECOVERY_BUCKETS = (0.5, 1.0, 2.0, 4.0, 8.0, 15.0, 20.0, 30.0, 45.0, 60.0, 120.0, 300.0, 900.0)
_RECONCILE_BUCKETS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 10.0)

# Of the whole training: exposed by the pod that holds rank 0, and no longer when it loses it.
_RANK_ZERO = _exposed(
    "agent",
    ("training",),
    Metric("dstrain_step", "gauge", "Last finished optimizer step."),
    Metric("dstrain_total_steps", "gauge", "Optimizer steps until the training is complete."),
    Metric("dstrain_loss", "gauge", "Training loss of the last step, in nats per token."),
    Metric(
        "dstrain_tokens_total",
        "counter",
        "Tokens trained on by all workers, those repeated after a failure included.",
    ),
    Metric(
        "dstrain_throughput_tokens_per_second",
        "gauge",
        "Throughput of all workers over the last steps.",
        unit="tokens_per_second",
    ),
    Metric(
        "dstrain_mfu_ratio",
        "gauge",
        "Model FLOP utilisation of all workers.",
        unit="ratio",
        absent="on hardware whose peak is unknown, such as CPUs",
    ),
    Metric(
        "dstrain_step_duration_seconds",
        "histogram",
        "Wall time of an optimizer step.",
        unit="seconds",
        buckets=_STEP_BUCKETS,
    ),
    Metric("dstrain_grad_norm", "gauge", "Global norm of the gradient before clipping."),
    Metric("dstrain_learning_rate", "gauge", "Learning rate of the last step."),
    Metric(
        "dstrain_skipped_steps_total",
        "counter",
        "Steps whose update was skipped because the gradient was not finite.",
    ),
    Metric(
        "dstrain_loss_spikes_total",
        "counter",
        "Times that the loss jumped far above what it had been.",
    ),
    Metric(
        "dstrain_rollbacks_total",
        "counter",
        "Times that training went back to a checkpoint because of bad numbers.",
    ),
    Metric(
        "dstrain_checkpoint_stall_seconds_total",
        "counter",
        "Time by which checkpoints and local copies have held up training.",
        unit="seconds",
    ),
    Metric(
        "dstrain_checkpoint_last_step",
        "gauge",
        "Optimizer step of the last committed checkpoint.",
        absent="before the first commit",
    ),
    Metric(
        "dstrain_checkpoint_last_verified_step",
        "gauge",
        "Optimizer step of the last checkpoint that was read back from its storage and is whole.",
        absent="before the first one was",
    ),
    Metric(
        "dstrain_checkpoint_last_timestamp_seconds",
        "gauge",
        "When the last checkpoint was committed, in seconds since the epoch.",
        unit="seconds",
        absent="before the first commit",
    ),
    Metric(
        "dstrain_checkpoint_save_duration_seconds",
        "histogram",
        "Time from the start of a save to its commit.",
        unit="seconds",
        buckets=_SAVE_BUCKETS,
    ),
)

_WORKER = _exposed(
    "agent",
    ("training",),
    Metric("dstrain_generation", "gauge", "Generation that this pod is in; 0 before the first."),
    Metric(
        "dstrain_worker_restarts_total",
        "counter",
        "Times that the worker processes of this pod were started again.",
    ),
    Metric(
        "dstrain_rendezvous_duration_seconds",
        "histogram",
        "Time from asking for a generation to having a place in it.",
        unit="seconds",
        buckets=_RENDEZVOUS_BUCKETS,
    ),
)

# Of every training process of the pod, as it says itself.
_RANKS = _exposed(
    "agent",
    ("training",),
    Metric(
        "dstrain_rank_compute_seconds_total",
        "counter",
        "Time that a training process has worked on steps without waiting for other ranks: data, "
        "forward, optimizer. The rank whose rate is highest is the one that all others wait for.",
        labels=("local_rank",),
        unit="seconds",
        absent="before its first step",
    ),
)

# Through NVML. `gpu` is the index inside the pod.
_GPUS = _exposed(
    "agent",
    ("training",),
    Metric(
        "dstrain_gpu_utilization_ratio",
        "gauge",
        "Share of time in which a kernel ran on the GPU.",
        labels=_GPU,
        absent=_NO_GPU,
        unit="ratio",
    ),
    Metric(
        "dstrain_gpu_memory_used_bytes",
        "gauge",
        "GPU memory in use.",
        labels=_GPU,
        absent=_NO_GPU,
        unit="bytes",
    ),
    Metric(
        "dstrain_gpu_memory_total_bytes",
        "gauge",
        "GPU memory installed.",
        labels=_GPU,
        absent=_NO_GPU,
        unit="bytes",
    ),
    Metric(
        "dstrain_gpu_power_watts",
        "gauge",
        "Power drawn.",
        labels=_GPU,
        absent=_NO_GPU,
        unit="watts",
    ),
    Metric(
        "dstrain_gpu_temperature_celsius",
        "gauge",
        "Temperature of the GPU die.",
        labels=_GPU,
        absent=_NO_GPU,
        unit="celsius",
    ),
    Metric(
        "dstrain_gpu_sm_clock_hertz",
        "gauge",
        "Clock of the streaming multiprocessors.",
        labels=_GPU,
        absent=_NO_GPU,
        unit="hertz",
    ),
    Metric(
        "dstrain_gpu_memory_clock_hertz",
        "gauge",
        "Clock of the memory.",
        labels=_GPU,
        absent=_NO_GPU,
        unit="hertz",
    ),
    Metric(
        "dstrain_gpu_xid_total",
        "counter",
        "XID errors reported by the driver since the pod started.",
        labels=_GPU,
        absent=_NO_GPU,
    ),
)

_TRAININGS = _exposed(
    "operator",
    ("namespace", "training"),
    Metric(
        "dstrain_training_phase",
        "gauge",
        f"1 for the present phase, 0 for the others ({', '.join(get_args(Phase))}).",
        labels=("phase",),
    ),
    Metric(
        "dstrain_training_workers",
        "gauge",
        "Worker pods by state: desired, or ready (in the current generation).",
        labels=("state",),
    ),
    Metric(
        "dstrain_training_restarts_total",
        "counter",
        f"Failures since it was created, by class ({', '.join(Restarts.model_fields)}).",
        labels=("failure_class",),
    ),
    Metric(
        "dstrain_training_recovery_duration_seconds",
        "histogram",
        "Time from noticing a failure to the next new step.",
        unit="seconds",
        buckets=_RECOVERY_BUCKETS,
    ),
    Metric(
        "dstrain_training_progress_ratio",
        "gauge",
        "Finished share of the training's steps.",
        unit="ratio",
    ),
    Metric(
        "dstrain_training_eta_seconds",
        "gauge",
        "Time until complete at the current throughput.",
        unit="seconds",
        absent="before the first report and when finished",
    ),
    Metric(
        "dstrain_training_last_checkpoint_step",
        "gauge",
        "Optimizer step of the checkpoint that the next generation resumes from.",
        absent="before the first commit",
    ),
    Metric(
        "dstrain_training_last_checkpoint_timestamp_seconds",
        "gauge",
        "When that checkpoint was committed, in seconds since the epoch.",
        unit="seconds",
        absent="before the first commit",
    ),
)

_OPERATOR = _exposed(
    "operator",
    (),
    Metric(
        "dstrain_operator_build_info",
        "gauge",
        "1, with the operator's versions as labels.",
        labels=("version", "python", "kopf"),
        unit="info",
    ),
    Metric(
        "dstrain_operator_leader",
        "gauge",
        "1 while this replica of the operator holds the Lease and acts, 0 while it stands by.",
    ),
    Metric(
        "dstrain_operator_event_loop_lag_seconds",
        "gauge",
        "How much later than asked the event loop woke up; high when something blocks it.",
        unit="seconds",
    ),
    Metric(
        "dstrain_trainings_finished_total",
        "counter",
        "Trainings that ended while this operator ran, by result (Complete, Failed).",
        labels=("result",),
    ),
    Metric(
        "controller_runtime_reconcile_total",
        "counter",
        f"Reconciles by result (success, requeue, error); controller is {CONTROLLER}.",
        labels=("controller", "result"),
    ),
    Metric(
        "controller_runtime_reconcile_errors_total",
        "counter",
        "Reconciles that raised an error.",
        labels=("controller",),
    ),
    Metric(
        "controller_runtime_reconcile_time_seconds",
        "histogram",
        "Time of one reconcile: observe, plan and act.",
        labels=("controller",),
        unit="seconds",
        buckets=_RECONCILE_BUCKETS,
    ),
    Metric(
        "workqueue_depth",
        "gauge",
        f"Trainings waiting to be reconciled; name is {CONTROLLER}.",
        labels=("name",),
    ),
    Metric(
        "rest_client_requests_total",
        "counter",
        "Requests to the Kubernetes API by HTTP status code and method.",
        labels=("code", "method"),
    ),
)

METRICS: Final = (*_RANK_ZERO, *_WORKER, *_RANKS, *_GPUS, *_TRAININGS, *_OPERATOR)
RANK_ZERO_NAMES: Final = frozenset(m.name for m in _RANK_ZERO)
GPU_NAMES: Final = frozenset(m.name for m in _GPUS)

_BY_NAME: Final = {m.name: m for m in METRICS}
_BY_SAMPLE: Final = {sample: m for m in METRICS for sample in m.sample_names}


def by_name(name: str) -> Metric:
    """The metric called `name`; KeyError if there is none."""
    return _BY_NAME[name]


def by_sample(name: str) -> Metric:
    """The metric that exposes series called `name` (`..._bucket`: its histogram), or KeyError."""
    return _BY_SAMPLE[name]


def by_exporter(exporter: Exporter) -> tuple[Metric, ...]:
    """What one program exposes, in the order of the registry."""
    return tuple(m for m in METRICS if m.exporter == exporter)
