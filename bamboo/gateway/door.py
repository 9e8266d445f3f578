"""The way in: connections between their accept and being in, or refused and gone."""

import errno
import os
from contextlib import suppress
from typing import Final

import structlog
import trio

from bamboo.errors import BambooError
from bamboo.gateway.admission import NoRoomError
from bamboo.gateway.stream import ClientStream
from bamboo.wire.encode import dumps, error_fields

log = structlog.get_logger("bamboo.gateway")

MAX_HANDSHAKES: Final = 256
"""Connections that may be on their way in at once; further ones wait in the kernel's queue."""

FAIR_S: Final = 2.0
"""How long a connection may be on its way in when others wait: the oldest is cut then, so that slow ones cannot keep
the rest out. When nobody waits it has `gateway.connect_timeout_s`.
"""

_NO_MORE_FILES: Final = (errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM)
_ACCEPT_RETRY_S: Final = 0.1  # as trio.serve_listeners has it


class Door:
    """At most `most` connections are on their way in, one more for each further accept loop."""

    def __init__(self, most: int = MAX_HANDSHAKES) -> None:
        self._most = most
        self._inside: dict[ClientStream, float] = {}  # and since when; the oldest first
        self._left: trio.Event | None = None
        self._failing = False

    def __repr__(self) -> str:
        return f"<Door {len(self._inside)} on their way in>"

    @property
    def waiting(self) -> int:
        """Connections that are on their way in."""
        return len(self._inside)

    def enter(self, stream: ClientStream) -> None:
        """A connection was accepted. `leave` is owed."""
        self._inside[stream] = trio.current_time()

    def leave(self, stream: ClientStream) -> None:
        """It is in, or gone. Idempotent."""
        self._inside.pop(stream, None)
        if self._left is not None:
            self._left.set()
            self._left = None

    async def accept(self, listener: trio.abc.Listener[trio.SocketStream]) -> trio.SocketStream:
        """The next connection, as soon as there is room for it. Where the process has no file descriptor or memory for
        it, this waits until it has: connections that end give theirs back.

        Raises ClosedResourceError for a listener that is closed, OSError for one that is broken.
        """
        while True:
            await self._wait_room()
            try:
                accepted = await listener.accept()
            except OSError as error:
                if error.errno not in _NO_MORE_FILES:
                    raise
                if not self._failing:
                    self._failing = True
                    log.error("accept_failed", error=str(error))  # noqa: TRY400 - no bug of ours
                await trio.sleep(_ACCEPT_RETRY_S)
                continue
            if self._failing:
                self._failing = False
                log.info("accept_resumed")
            return accepted

    async def _wait_room(self) -> None:
        while len(self._inside) >= self._most:
            oldest, since = next(iter(self._inside.items()))
            if self._left is None:
                self._left = trio.Event()
            with trio.move_on_at(since + FAIR_S):
                await self._left.wait()
                continue
            log.debug("handshake_cut")
            oldest.abort()
            self.leave(oldest)


def refusal(error: NoRoomError) -> bytes:
    """An answer that needs no request: `503`, with the body that errors have over HTTP."""
    body = error_body(error)
    head = (
        "HTTP/1.1 503 Service Unavailable\r\n"
        "Content-Type: application/json\r\n"
        f"Content-Length: {len(body)}\r\n"
        f"Retry-After: {error.retry_after_s:.0f}\r\n"
        "Connection: close\r\n\r\n"
    )
    return head.encode() + body


def error_body(error: BambooError) -> bytes:
    return dumps({"error": error_fields(error)})


def refuse_nowait(accepted: trio.SocketStream, answer: bytes) -> None:
    """Write `answer`, if the kernel takes it, and close; whoever has sent something already may not get it."""
    with suppress(OSError):
        os.write(accepted.socket.fileno(), answer)
    accepted.socket.close()


def peer_of(accepted: trio.SocketStream) -> str:
    """The address at the other end. Raises OSError if it is gone already."""
    return str(accepted.socket.getpeername()[0])
