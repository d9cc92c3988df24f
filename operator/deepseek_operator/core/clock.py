"""Seconds since the epoch as the API writes them (RFC 3339), and back."""

from datetime import UTC, datetime


def rfc3339(at_s: float) -> str:
    """Whole seconds, as Kubernetes writes times: `2026-11-21T12:00:00Z`."""
    return datetime.fromtimestamp(int(at_s), UTC).strftime("%Y-%m-%dT%H:%M:%SZ")


def rfc3339_ms(at_s: float) -> str:
    """With milliseconds, for times that durations are computed from."""
    whole, ms = divmod(round(at_s * 1000), 1000)
    return f"{datetime.fromtimestamp(whole, UTC):%Y-%m-%dT%H:%M:%S}.{ms:03d}Z"


def seconds(text: str) -> float:
    """The seconds that a time of the API stands for."""
    return datetime.fromisoformat(text).timestamp()
