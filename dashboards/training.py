"""The dashboard of one training: is it healthy, how does it learn, what holds it up."""

from __future__ import annotations

from dashboards.operator_row import OPERATOR
from dashboards.panels import Board, Panel, Query, Row, Variable, quantiles

_OF = '{namespace="$namespace", training="$training"}'


def _quantiles_shown(histogram: str) -> tuple[Query, ...]:
    """Of rare events: over all of the time shown, without an answer where there was none."""
    buckets = f"sum by (le) (increase({histogram}_bucket{_OF}[$__range]))"
    return tuple(
        Query(f"histogram_quantile({q}, {buckets}) >= 0", legend)
        for q, legend in ((0.5, "median"), (0.95, "95th percentile"))
    )


def _recoveries(part: str) -> str:
    metric = f"dstrain_training_recovery_duration_seconds_{part}"
    return f"sum(increase({metric}{_OF}[$__range]))"


_HEALTH = Row(
    "Is it healthy?",
    (
        Panel(
            "Phase",
            "What the training is doing now, as the PHASE column of `kubectl get dst` says.",
            "none",
            (Query(f"dstrain_training_phase{_OF} == 1", "{{phase}}"),),
            kind="stat",
            width=4,
            colors={
                "Running": "green",
                "Complete": "green",
                "Starting": "yellow",
                "Recovering": "orange",
                "Failed": "red",
            },
        ),
        Panel(
            "Progress",
            "Finished share of the training's steps.",
            "percentunit",
            (Query(f"max(dstrain_training_progress_ratio{_OF})"),),
            kind="stat",
            width=3,
            decimals=0,
        ),
        Panel(
            "Time left",
            "Until complete, at the current throughput.",
            "s",
            (Query(f"max(dstrain_training_eta_seconds{_OF})"),),
            kind="stat",
            width=3,
            decimals=1,
        ),
        Panel(
            "Throughput",
            "Tokens per second of all workers over the last steps.",
            "si:tok/s",
            (Query(f"max(dstrain_throughput_tokens_per_second{_OF})"),),
            kind="stat",
            width=3,
            decimals=1,
        ),
        Panel(
            "MFU",
            "Model FLOP utilisation: the share of the hardware's peak that the model's own "
            "arithmetic uses.",
            "percentunit",
            (Query(f"max(dstrain_mfu_ratio{_OF})"),),
            kind="stat",
            width=2,
            decimals=0,
        ),
        Panel(
            "Loss",
            "Training loss of the last step, in nats per token.",
            "none",
            (Query(f"max(dstrain_loss{_OF})"),),
            kind="stat",
            width=3,
            decimals=3,
        ),
        Panel(
            "Restarts",
            "Failures in the time shown. More than a few per hour: look at the row Recovery.",
            "none",
            (Query(f"sum(increase(dstrain_training_restarts_total{_OF}[$__range]))"),),
            kind="stat",
            width=3,
            decimals=0,
        ),
        Panel(
            "Checkpoint age",
            "Work that would be lost now: time since the last committed checkpoint.",
            "s",
            (Query(f"time() - max(dstrain_training_last_checkpoint_timestamp_seconds{_OF})"),),
            kind="stat",
            width=3,
            decimals=1,
        ),
    ),
)

_CURVES = Row(
    "Training",
    (
        Panel(
            "Throughput",
            "Tokens per second of all workers. A dip is a restart, a checkpoint or slow data.",
            "si:tok/s",
            (Query(f"sum(rate(dstrain_tokens_total{_OF}[$__rate_interval]))", "tokens"),),
        ),
        Panel(
            "Loss",
            "Training loss, in nats per token. It steps back where a restart repeats steps.",
            "none",
            (Query(f"max(dstrain_loss{_OF})", "loss"),),
            zero=False,
        ),
        Panel(
            "Step time",
            "Wall time of an optimizer step. Tail far above the median: uneven workers or data.",
            "s",
            quantiles("dstrain_step_duration_seconds", _OF),
        ),
        Panel(
            "Gradient norm",
            "Global norm before clipping. Growth ahead of the loss announces divergence.",
            "none",
            (Query(f"max(dstrain_grad_norm{_OF})", "norm"),),
        ),
        Panel(
            "Learning rate",
            "As the schedule gives it: warm-up, then cosine down to the floor.",
            "sci",
            (Query(f"max(dstrain_learning_rate{_OF})", "learning rate"),),
        ),
        Panel(
            "Skipped steps",
            "Steps whose gradient was not finite, in each interval. Rare ones are normal in fp16.",
            "none",
            (
                Query(
                    f"sum(increase(dstrain_skipped_steps_total{_OF}[$__rate_interval]))", "skipped"
                ),
            ),
            kind="bars",
        ),
        Panel(
            "Steps",
            "Steps done, steps safe in a checkpoint, and the goal.",
            "none",
            (
                Query(f"max(dstrain_step{_OF})", "done"),
                Query(f"max(dstrain_training_last_checkpoint_step{_OF})", "in a checkpoint"),
                Query(f"max(dstrain_total_steps{_OF})", "goal"),
            ),
            width=16,
        ),
        Panel(
            "Checkpoint save time",
            "From the start of a save to its commit, over the saves in the time shown.",
            "s",
            _quantiles_shown("dstrain_checkpoint_save_duration_seconds"),
            kind="stat",
            decimals=1,
            empty="before the first save",
        ),
    ),
)


def _gpu(
    title: str,
    description: str,
    unit: str,
    metric: str,
    maximum: float | None = None,
    zero: bool = True,
) -> Panel:
    query = Query(f"{metric}{_OF}", "{{pod}} GPU {{gpu}}")
    return Panel(title, description, unit, (query,), maximum=maximum, zero=zero)


_GPUS = Row(
    "GPUs",
    (
        _gpu(
            "Utilisation",
            "Share of time in which a kernel ran. High with a low MFU: waiting in collectives.",
            "percentunit",
            "dstrain_gpu_utilization_ratio",
            maximum=1,
        ),
        Panel(
            "Memory",
            "Used share of the GPU's memory. Near 100%: the next longer batch may not fit.",
            "percentunit",
            (
                Query(
                    f"dstrain_gpu_memory_used_bytes{_OF} / dstrain_gpu_memory_total_bytes{_OF}",
                    "{{pod}} GPU {{gpu}}",
                ),
            ),
            maximum=1,
        ),
        _gpu(
            "Power",
            "Power drawn. Even lines are even work; a low one is a worker that waits.",
            "watt",
            "dstrain_gpu_power_watts",
        ),
        _gpu(
            "Temperature",
            "Of the GPU die. Clocks fall when it is too hot.",
            "celsius",
            "dstrain_gpu_temperature_celsius",
            zero=False,
        ),
        _gpu(
            "SM clock",
            "Clock of the streaming multiprocessors. A drop under load is throttling.",
            "hertz",
            "dstrain_gpu_sm_clock_hertz",
            zero=False,
        ),
        Panel(
            "XID errors",
            "Errors reported by the NVIDIA driver in each interval; every one deserves a look.",
            "none",
            (
                Query(
                    f"increase(dstrain_gpu_xid_total{_OF}[$__rate_interval])",
                    "{{pod}} GPU {{gpu}}",
                ),
            ),
            kind="bars",
        ),
    ),
    note=(
        "Figures that worker pods read through NVML. On nodes without an NVIDIA GPU this row is "
        "empty, and nothing is wrong."
    ),
)

_RECOVERY = Row(
    "Recovery",
    (
        Panel(
            "Restarts by class",
            "Failures in each interval: infrastructure (nodes, evictions), application (the "
            "program), voluntary (asked for by a person).",
            "none",
            (
                Query(
                    "sum by (failure_class) "
                    f"(increase(dstrain_training_restarts_total{_OF}[$__rate_interval]))",
                    "{{failure_class}}",
                ),
            ),
            kind="bars",
        ),
        Panel(
            "Mean recovery time",
            "From noticing a failure to the next new step, over the time shown.",
            "s",
            (Query(f"{_recoveries('sum')} / ({_recoveries('count')} > 0)", "mean"),),
            kind="stat",
            width=4,
            decimals=1,
            empty="before the first failure",
        ),
        Panel(
            "Recoveries",
            "Failures in the time shown after which the training went on.",
            "none",
            (Query(_recoveries("count"), "recoveries"),),
            kind="stat",
            width=4,
            decimals=0,
        ),
        Panel(
            "Workers",
            "Pods wanted, and pods in the current generation.",
            "none",
            (Query(f"max by (state) (dstrain_training_workers{_OF})", "{{state}}"),),
        ),
        Panel(
            "Generation",
            "Newest and oldest generation that a worker pod is in; apart: a pod is left behind.",
            "none",
            (
                Query(f"max(dstrain_generation{_OF})", "newest"),
                Query(f"min(dstrain_generation{_OF})", "oldest"),
            ),
            zero=False,
        ),
        Panel(
            "Rendezvous time",
            "From a pod's wish for a generation to its place in it, over the time shown. The first "
            "rendezvous of a pod that is new to Prometheus is not in it.",
            "s",
            _quantiles_shown("dstrain_rendezvous_duration_seconds"),
            kind="stat",
            decimals=1,
            empty="before the first restart",
        ),
        Panel(
            "Own work by rank",
            "Share of time in which a rank works on steps without waiting for others (data, "
            "forward, optimizer). A line far above the others is the rank that all wait for.",
            "percentunit",
            (
                Query(
                    f"rate(dstrain_rank_compute_seconds_total{_OF}[$__rate_interval])",
                    "{{pod}} {{local_rank}}",
                ),
            ),
        ),
        Panel(
            "Worker restarts",
            "Times that a pod's worker processes were started again, in each interval.",
            "none",
            (
                Query(
                    f"sum(increase(dstrain_worker_restarts_total{_OF}[$__rate_interval]))",
                    "restarts",
                ),
            ),
            kind="bars",
        ),
    ),
)

TRAINING = Board(
    uid="dstrain-training",
    title="dstrain / Training",
    description="One DeepSeekTraining: is it healthy, how does it learn, what holds it up.",
    variables=(
        Variable("namespace", "Namespace", "dstrain_training_phase"),
        Variable("training", "Training", 'dstrain_training_phase{namespace="$namespace"}'),
    ),
    rows=(_HEALTH, _CURVES, _GPUS, _RECOVERY, OPERATOR),
)
