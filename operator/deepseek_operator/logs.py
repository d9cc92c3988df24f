"""One line of key=value pairs per event, on standard error."""

from __future__ import annotations

import json
import logging
from datetime import UTC, datetime
from typing import Final

LEVELS: Final = {
    "uvicorn": logging.WARNING,
    "kopf": logging.WARNING,
    "kopf._core.reactor.running": logging.ERROR,  # warns that signals are not its business
    "asyncio": logging.WARNING,
}


class KeyValueFormatter(logging.Formatter):
    """`time=... level=info logger=... message="..."`; a traceback stays in the one line."""

    def format(self, record: logging.LogRecord) -> str:
        """The line of a record."""
        at = datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds")
        message = record.getMessage()
        if record.exc_info:
            message += "\n" + self.formatException(record.exc_info)
        return (
            f"time={at.replace('+00:00', 'Z')} level={record.levelname.lower()} "
            f"logger={record.name} message={json.dumps(message, ensure_ascii=False)}"
        )


def configure() -> None:
    """Make this the logging of the process."""
    handler = logging.StreamHandler()
    handler.setFormatter(KeyValueFormatter())
    logging.basicConfig(level=logging.INFO, handlers=[handler], force=True)
    for name, level in LEVELS.items():
        logging.getLogger(name).setLevel(level)
