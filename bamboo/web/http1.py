"""HTTP/1 on one connection: hypercorn's protocol code between a ConnectionStream and the app, within our limits.

It stands where hypercorn has its `TCPServer`: that has no deadline for a request's head, needs a task per request to
time an idle connection, and takes a client that has only stopped sending for one that is gone. hypercorn promises
nothing about the classes that are used here: its minor version is pinned, and `tests/integration/test_web_traps.py`
fails when a release changes what this leans on.
"""

from contextlib import suppress
from math import inf
from typing import Any, Final

import h11
import trio
from hypercorn.config import Config as HypercornConfig
from hypercorn.events import Closed, Event, RawData, Updated
from hypercorn.protocol.events import Event as StreamEvent
from hypercorn.protocol.events import Response
from hypercorn.protocol.h11 import H11Protocol
from hypercorn.trio.task_group import TaskGroup
from hypercorn.trio.worker_context import WorkerContext
from hypercorn.typing import AppWrapper, ConnectionState
from hypercorn.utils import parse_socket_addr

from bamboo.config import ServerConfig
from bamboo.errors import ClientError, ErrorCode
from bamboo.web.bodies import error_answer
from bamboo.web.connections import ConnectionStream
from bamboo.web.peer import PEER, Peer

CONNECTION: Final = "connection"
"""The key of a request's `scope["state"]` under which its ConnectionStream is: where a response may write past
hypercorn."""

MAX_HEADERS: Final = 256
"""Of one request: each costs us much more than the four bytes that it may have in `server.max_header_bytes`."""

HALF_CLOSED_S: Final = 2.0
"""How long a client that has stopped sending counts as one that waits for its answer. Then it is gone."""

LINGER_S: Final = 1.0
"""How long a client may take to read why its connection ends."""

_RECEIVE_BYTES: Final = 65536
_HTTP_VERSIONS: Final = frozenset({b"1.0", b"1.1"})
_BODYLESS: Final = frozenset({204, 304})
_REFUSALS: Final = {
    400: "this is no HTTP/1.1 request",
    408: "the request's head took longer than server.header_timeout_s",
    431: f"the request's head is larger than server.max_header_bytes, or has more than {MAX_HEADERS} headers",
    501: "of transfer codings only chunked is known",
    505: "only HTTP/1.0 and HTTP/1.1 are spoken here",
}


class RequestParser(h11.Connection):
    """h11 that hands out HTTP/1.0 and 1.1 requests only, within our limits, and none that wants another protocol.

    An upgrade may be ignored (RFC 9110 section 7.8), so `Upgrade: h2c` and `websocket` get the plain answer. An HTTP/2
    preface ends the connection.
    """

    def __init__(self, max_header_bytes: int) -> None:
        super().__init__(h11.SERVER, max_incomplete_event_size=max_header_bytes)
        self._max_header_bytes = max_header_bytes
        self.asked_for_head = False
        """The request that was handed out last has an answer without a body."""

    @property
    def has_input(self) -> bool:
        """Whether something was received that no request was made of."""
        return bool(self.trailing_data[0])

    def receive_data(self, data: bytes) -> None:
        if self.their_state is not h11.MUST_CLOSE:
            super().receive_data(data)

    def next_event(self) -> Any:
        if self.their_state is h11.MUST_CLOSE:
            # What comes behind a request that is to be the last is ignored (RFC 9112 section 9.6). To h11 it is an
            # error, which would take the answer away.
            return h11.NEED_DATA
        event = super().next_event()
        if not isinstance(event, h11.Request):
            return event
        self.asked_for_head = event.method == b"HEAD"
        if event.http_version not in _HTTP_VERSIONS:
            raise h11.RemoteProtocolError("another version", error_status_hint=505)
        # h11 measures only what waits for its end, and so nothing of a head that comes in one piece.
        size = len(event.method) + len(event.target) + sum(len(name) + len(value) + 4 for name, value in event.headers)
        if size > self._max_header_bytes or len(event.headers) > MAX_HEADERS:
            raise h11.RemoteProtocolError("too large", error_status_hint=431)
        headers = [(name, value) for name, value in event.headers if name != b"upgrade"]
        if len(headers) == len(event.headers):
            return event
        return h11.Request(method=event.method, target=event.target, headers=headers, http_version=event.http_version)


class _Protocol(H11Protocol):
    """hypercorn's HTTP/1 with `RequestParser`, and errors in our form."""

    connection: RequestParser

    def __init__(self, connection: "HttpConnection", *arguments: Any, max_header_bytes: int) -> None:
        super().__init__(*arguments)
        self.connection = RequestParser(max_header_bytes)
        self._owner = connection

    async def stream_send(self, event: StreamEvent) -> None:
        if isinstance(event, Response) and event.status_code >= 200:
            length_is_known = any(name.lower() == b"content-length" for name, _ in event.headers)
            self._owner.answering(ends=length_is_known or event.status_code in _BODYLESS)
        await super().stream_send(event)

    async def refuse(self, status: int) -> None:
        """Answer what is no request, instead of the app. `Closed` has to follow."""
        message = _REFUSALS.get(status, _REFUSALS[400])
        answer = error_answer(ClientError(ErrorCode.INVALID_REQUEST, message))
        events: list[Any] = [
            h11.Response(status_code=status, headers=[*answer.headers, (b"Connection", b"close")]),
            h11.EndOfMessage(),
        ]
        if not self.connection.asked_for_head:
            events.insert(1, h11.Data(data=answer.body))
        self._owner.refused()
        await self.send(RawData(b"".join([self.connection.send(event) or b"" for event in events])))

    async def _send_error_response(self, status_code: int) -> None:
        await self.refuse(status_code)


class HttpConnection:
    """Answers the requests of one connection, one after the other, until the client leaves, is idle or slow for too
    long, or sends what is no HTTP.

    - A connection on which nothing is under way, and nothing has come of the next request, is closed after
      `keep_alive_s`; before its first request, and before the end of its handshake, after `header_timeout_s`.
    - A request's head has `header_timeout_s` from its first byte on, else 408. The body's deadline is the middleware's.
    - A client that has stopped sending still gets the answer to what it has asked, unless that is a stream: then it
      counts as gone, as it does after HALF_CLOSED_S without an answer.

    It runs inside of `stream.life`, and cancels that when it is done.
    """

    def __init__(
        self,
        app: AppWrapper,
        config: ServerConfig,
        hypercorn: HypercornConfig,
        context: WorkerContext,
        stream: ConnectionStream,
        peer: Peer,
    ) -> None:
        self.stream = stream
        self.peer = peer
        self._app = app
        self._config = config
        self._hypercorn = hypercorn
        self._context = context
        self._writing = trio.Lock()
        self._idle = True  # no request is under way
        self._head_begun = False
        self._refused = False
        self._stopping = False
        self._deadline = inf  # for the client's next bytes
        self._reading = trio.CancelScope()  # around the wait for them
        self._answer_ends: bool | None = None  # None: no answer was begun
        self._patience: trio.CancelScope | None = None  # around the wait for an answer after the client's last byte

    def stop_when_idle(self) -> None:
        """Close as soon as no answer is under way: now, if none is. `context.terminated` is set already."""
        self._stopping = True
        if self._idle:
            self._reading.cancel()

    async def run(self) -> None:
        """Serve. Nothing of the connection is at work any more when this returns."""
        try:
            if not await self._shake_hands():
                return
            client, server = self._addresses()
        except (trio.BrokenResourceError, trio.ClosedResourceError, OSError):
            return
        async with TaskGroup() as tasks:
            protocol = _Protocol(
                self,
                self._app,
                self._hypercorn,
                self._context,
                tasks,
                ConnectionState({CONNECTION: self.stream, PEER: self.peer}),
                self.stream.encrypted,
                client,
                server,
                self._send,
                max_header_bytes=self._config.max_header_bytes,
            )
            with suppress(trio.BrokenResourceError, trio.ClosedResourceError):
                await self._read(protocol)
            await self._part()

    def answering(self, *, ends: bool) -> None:
        """The answer begins. `ends`: it is no stream, its length is known."""
        self._answer_ends = ends
        self._judge_patience()

    def refused(self) -> None:
        """What came was no request, and is answered instead of the app. Nothing more is read."""
        self._refused = True

    async def _shake_hands(self) -> bool:
        """Whether it was done in time. Raises BrokenResourceError."""
        self._expect_within(self._config.header_timeout_s)
        with self._reading:
            await self.stream.handshake()
        return not self._reading.cancelled_caught

    def _addresses(self) -> tuple[tuple[str, int] | None, tuple[str, int] | None]:
        """The client's and our own. Raises OSError if the client is gone."""
        sock = self.stream.socket
        return parse_socket_addr(sock.family, sock.getpeername()), parse_socket_addr(sock.family, sock.getsockname())

    def _expect_within(self, seconds: float) -> None:
        """When the client's next bytes are late, from now on, also for who waits for them already."""
        self._deadline = trio.current_time() + seconds
        self._reading.deadline = self._deadline

    async def _read(self, protocol: _Protocol) -> None:
        """Hand what the client sends to `protocol`, until there is a reason to part."""
        self._expect_within(self._config.header_timeout_s)
        while not self._refused and not (self._stopping and self._idle):
            data = await self._receive()
            if data is None:
                if self._head_begun and not self._stopping:
                    await protocol.refuse(408)
                return
            await protocol.handle(RawData(data))
            if not data:
                await self._finish_answering()
                return
            if self._idle and not self._head_begun and protocol.connection.has_input:
                self._head_begun = True
                self._expect_within(self._config.header_timeout_s)

    async def _receive(self) -> bytes | None:
        """What the client sends next, b"" if that is nothing any more; None: it did not come in time."""
        with trio.CancelScope(deadline=self._deadline) as self._reading:
            return bytes(await self.stream.receive_some(_RECEIVE_BYTES))
        return None

    async def _finish_answering(self) -> None:
        """The client sends nothing more: wait for the end of the answer under way, as long as there is a point in
        that."""
        if not self._idle and not self._refused:
            with trio.CancelScope(deadline=trio.current_time() + HALF_CLOSED_S) as self._patience:
                self._judge_patience()
                await trio.sleep_forever()  # the end of the answer is the end of `life`

    def _judge_patience(self) -> None:
        if self._patience is None or self._answer_ends is None:
            return
        if self._answer_ends:
            self._patience.deadline = inf  # it is being written, and that has a deadline
        else:
            self._patience.cancel()

    async def _part(self) -> None:
        if self._refused:
            with trio.move_on_after(LINGER_S), suppress(trio.BrokenResourceError, trio.ClosedResourceError):
                await self.stream.linger()
            self.stream.close_nowait()
        elif self._idle:
            await self.stream.aclose()
        else:
            self.stream.abort()  # the client must not take half an answer for a whole one
        self.stream.life.cancel()  # whoever is still at work for this connection works for nobody

    async def _send(self, event: Event) -> None:
        """What hypercorn's protocol wants done."""
        if isinstance(event, RawData):
            async with self._writing:
                try:
                    with trio.CancelScope(shield=True):  # with the stream's deadline: half a write would be garbage
                        await self.stream.send_all(event.data)
                except (trio.BrokenResourceError, trio.ClosedResourceError):
                    self.stream.abort()
        elif isinstance(event, Updated):
            self._idle = event.idle
            self._head_begun = False
            self._answer_ends = None
            self._expect_within(self._config.keep_alive_s if event.idle else inf)
        elif isinstance(event, Closed) and not self._refused:
            await self.stream.aclose()
            self.stream.life.cancel()
