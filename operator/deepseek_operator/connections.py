"""What a stranger's connection may cost: it sends a whole request soon or is hung up on, and there
is a limit to how many there are.

uvicorn waits for ever for the rest of a request, so a few thousand half requests would take all
file descriptors.
"""

from __future__ import annotations

import asyncio
import resource
from typing import Any, Final

import h11
from uvicorn.protocols.http.h11_impl import H11Protocol

REQUEST_S: Final = 10.0  # from the first byte of a request, or from the connection, to its end
MOST_CONNECTIONS: Final = 16_384  # three for each pod of a large training
RESERVED_FILES: Final = 256  # of this process, for all else


class BoundedConnection(H11Protocol):
    """uvicorn's HTTP/1.1, with a time limit for each request to arrive. `bounded` sets both."""

    request_s: float
    most: int

    def __init__(self, *args: Any, **named: Any) -> None:
        super().__init__(*args, **named)
        self._waiting: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Take a connection, if there is room for it."""
        super().connection_made(transport)
        if len(self.connections) > self.most:
            transport.abort()
        else:
            self._wait()

    def data_received(self, data: bytes) -> None:
        """Go on with the request that is arriving."""
        super().data_received(data)
        if self.conn.their_state in (h11.IDLE, h11.SEND_BODY):
            self._wait()
        else:
            self._stop_waiting()

    def connection_lost(self, exc: Exception | None) -> None:
        """Forget it."""
        self._stop_waiting()
        super().connection_lost(exc)

    def _wait(self) -> None:
        if self._waiting is None:
            self._waiting = self.loop.call_later(self.request_s, self.transport.abort)

    def _stop_waiting(self) -> None:
        if self._waiting:
            self._waiting.cancel()
            self._waiting = None


def bounded(request_s: float, most: int) -> type[H11Protocol]:
    """The protocol with these limits."""
    return type("Connection", (BoundedConnection,), {"request_s": request_s, "most": most})


def raise_file_limit() -> None:
    """Let this process open as many files as it may: many containers begin with 1024."""
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))


def affordable_connections() -> int:
    """How many connections this process may hold."""
    files, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    if files == resource.RLIM_INFINITY:
        return MOST_CONNECTIONS
    return max(1, min(MOST_CONNECTIONS, files - RESERVED_FILES))
