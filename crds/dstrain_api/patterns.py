"""The written forms of the API: patterns, and the words for whoever missed them.

The patterns are RE2 and mean the same to pydantic and to the API server.
"""

from typing import Final

DURATION_PATTERN: Final = r"^([0-9]+(\.[0-9]+)?(ms|s|m|h))+$"
AUTO_DURATION_PATTERN: Final = r"^(auto|([0-9]+(\.[0-9]+)?(ms|s|m|h))+)$"
QUANTITY_PATTERN: Final = r"^[0-9]+(\.[0-9]+)?(m|k|Ki|M|Mi|G|Gi|T|Ti|P|Pi)?$"
URI_PATTERN: Final = r"^(file:///|pvc://[a-z0-9]|builtin://[a-z0-9]).*$"
STORE_PATTERN: Final = (
    r"^((file:///|pvc://[a-z0-9]).*|s3://[a-z0-9][a-z0-9.-]{1,61}[a-z0-9](/[^/]+)*/?)$"
)
AUTO_PATTERN: Final = r"^auto$"
RESOURCE_PATTERN: Final = r"^[a-z0-9.-]+/[A-Za-z0-9._-]+$"
NAME_PATTERN: Final = r"^[a-z]([-a-z0-9]*[a-z0-9])?$"
NAME_LIMIT: Final = (
    40  # pod and service names add a slot, an attempt and a suffix; a label holds 63
)

HELP: Final[dict[str, str]] = {
    DURATION_PATTERN: "write a duration such as 500ms, 90s, 5m or 1h30m",
    AUTO_DURATION_PATTERN: "write auto, or a duration such as 500ms, 90s, 5m or 1h30m",
    QUANTITY_PATTERN: "write a quantity such as 500m, 2 or 10Gi",
    AUTO_PATTERN: "write auto, or a whole number from 1",
    URI_PATTERN: "write file:///path, pvc://claim/path or builtin://name",
    STORE_PATTERN: "write pvc://claim/path, file:///path or s3://bucket/prefix",
    RESOURCE_PATTERN: "write an extended resource as domain/name, such as rdma/ib",
}
