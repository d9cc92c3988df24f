"""How the operator itself does: a row for the dashboards of what it looks after."""

from __future__ import annotations

from dstrain_api.metrics import CONTROLLER

from dashboards.panels import Panel, Query, Row, quantiles

# Other controllers use these names as well; only the operator's targets have its build info.
_OF_OPERATOR = "and on (job, instance) dstrain_operator_build_info"

OPERATOR = Row(
    "Operator",
    (
        Panel(
            "Reconcile time",
            "One look at a training and the writes that follow. Above a second: the API is slow.",
            "s",
            quantiles(
                "controller_runtime_reconcile_time_seconds", f'{{controller="{CONTROLLER}"}}'
            ),
        ),
        Panel(
            "Reconciles",
            "Per second, by result. Errors that stay: read the operator's log.",
            "ops",
            (
                Query(
                    "sum by (result) (rate(controller_runtime_reconcile_total"
                    f'{{controller="{CONTROLLER}"}}[$__rate_interval]))',
                    "{{result}}",
                ),
            ),
        ),
        Panel(
            "Queue depth",
            "Trainings that wait to be looked at. It should return to zero.",
            "none",
            (Query(f'sum(workqueue_depth{{name="{CONTROLLER}"}})', "waiting"),),
        ),
        Panel(
            "Kubernetes API calls",
            "Requests per second by status code; 409 is normal now and then, 429 and 5xx are not.",
            "reqps",
            (
                Query(
                    "sum by (code) (rate(rest_client_requests_total[$__rate_interval]) "
                    f"{_OF_OPERATOR})",
                    "{{code}}",
                ),
            ),
        ),
        Panel(
            "Event loop lag",
            "How late the operator's event loop wakes up. Above a second it misses beats.",
            "s",
            (Query("max(dstrain_operator_event_loop_lag_seconds)", "lag"),),
        ),
        Panel(
            "Leader",
            "The replica that acts. A gap is a takeover: training goes on meanwhile.",
            "none",
            (Query("dstrain_operator_leader > 0", "{{instance}}"),),
        ),
        Panel(
            "Trainings finished",
            "All trainings that ended in the time shown, by result.",
            "none",
            (
                Query(
                    "sum by (result) (increase(dstrain_trainings_finished_total[$__range]))",
                    "{{result}}",
                ),
            ),
            kind="stat",
            decimals=0,
        ),
    ),
)
