"""Readers of a session's events on bare sockets, over SSE and over the gateway: each event with its bytes as they came,
at any pace, until the reader is cut in any way.

    async with open_reader(server, "after", session_id, cursor) as reader:
        seen = await reader.take(3)
        reader.cut(reset=True)

No method has a deadline: the test has one.
"""

import socket
import struct
from collections import deque
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from typing import Any, Literal, NamedTuple, Protocol

import orjson
import trio

from bamboo.core.types import SessionId
from bamboo.store.base import Store
from bamboo.wire.encode import event_json
from tests.support import http_client, ws_client

Way = Literal["last_event_id", "after", "connect", "subscribe"]
"""How a reader says where it goes on: two over SSE, two over the gateway."""

WAYS: tuple[Way, ...] = ("last_event_id", "after", "connect", "subscribe")

READ_BYTES = 65536


class Addresses(Protocol):
    """Where a server listens: `Server` and `ServerProcess` have it."""

    @property
    def http_url(self) -> str: ...

    @property
    def gateway_url(self) -> str | None: ...


class Seen(NamedTuple):
    """An event, or a gap, as a reader got it: `data` is its JSON, byte for byte. A tuple, because there are many."""

    cursor: str
    data: bytes

    @property
    def fields(self) -> dict[str, Any]:
        return dict(orjson.loads(self.data))

    @property
    def type(self) -> str:
        return str(self.fields["type"])


async def log_of(store: Store, session_id: str, run_id: str | None = None) -> list[Seen]:
    """The log as it is kept, encoded: what a reader must have got."""
    log: list[Seen] = []
    seq = 0
    while (page := await store.read(SessionId(session_id), seq, max_bytes=1_000_000)) is not None and page.events:
        log += (
            Seen(str(event.cursor), event_json(event))
            for event in page.events
            if run_id is None or event.run_id == run_id
        )
        seq = page.through
    return log


class Reader:
    """A connection that events come on. `others` are the frames that are no events: answers, errors, pongs.

    It reads `step` bytes at a time, and no further than it is asked to.
    """

    def __init__(self, stream: trio.SocketStream, step: int) -> None:
        self.stream = stream
        self.step = step
        self.others: list[dict[str, Any]] = []
        self.ended: str | None = None
        """How the connection ended: "properly", with whatever the transport has for that, or "cut"."""
        self._whole: deque[Seen] = deque()
        self._rest = b""

    async def next(self) -> Seen | None:
        """The next event or gap; None at the connection's end."""
        while not self._whole:
            if self.ended is not None:
                return None
            await self._read()  # events may come together with the end
        return self._whole.popleft()

    async def some(self) -> list[Seen]:
        """All that have come, and at least one; none at the connection's end."""
        first = await self.next()
        taken = [] if first is None else [first, *self._whole]
        self._whole.clear()
        return taken

    async def take(self, count: int) -> list[Seen]:
        """The next `count` of them."""
        taken: list[Seen] = []
        while len(taken) < count:
            item = await self.next()
            assert item is not None, f"the stream ended, {self.ended}, after {taken[-1:]}: {self.others}"
            taken.append(item)
        return taken

    async def until(self, *types: str) -> list[Seen]:
        """All up to and with the next of one of these types."""
        taken: list[Seen] = []
        while not taken or taken[-1].type not in types:
            taken += await self.take(1)
        return taken

    async def rest(self) -> list[Seen]:
        """All to the connection's end, however it ends."""
        taken: list[Seen] = []
        while some := await self.some():
            taken += some
        return taken

    async def half_an_event(self, size: int) -> None:
        """Return when at least `size` bytes of the next event have come, and not all of it. Needs a small `step`."""
        while len(self._rest) < size:
            assert not self._whole, "the whole event has come: step or size is too large"
            assert await self._read(), f"the stream ended, {self.ended}"

    def cut(self, *, reset: bool) -> None:
        """Leave without a word: with a FIN, or with a RST."""
        if reset:
            self.stream.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.stream.socket.close()

    async def _read(self) -> bool:
        """Read once. False at the end, with `ended` set."""
        raise NotImplementedError


class SseReader(Reader):
    def __init__(self, connection: http_client.HttpConnection, step: int) -> None:
        super().__init__(connection.stream, step)
        self._connection = connection

    async def _read(self) -> bool:
        self._connection.receive_bytes = self.step
        try:
            piece = await self._connection.read_piece()
        except http_client.Cut:
            self.ended = "cut"
            return False
        if not piece:
            self.ended = "properly"
            assert not self._rest, f"a stream ends behind a whole event, not behind {self._rest!r}"
            return False
        self._rest += piece
        while self._rest.startswith((b"retry: ", b": ")) and b"\n" in self._rest:
            self._rest = self._rest.partition(b"\n")[2]
        *blocks, self._rest = self._rest.split(b"\n\n")
        for block in blocks:
            self._take_block(block)
        return True

    def _take_block(self, block: bytes) -> None:
        while block.startswith((b": ", b"retry: ")):
            block = block.partition(b"\n")[2]
        cursor, separator, data = block.partition(b"\ndata: ")
        if not separator:
            assert block.startswith(b"data: "), block
            self.others.append(orjson.loads(block[6:]))
            return
        assert cursor.startswith(b"id: "), block
        assert b"\n" not in data, block
        self._whole.append(Seen(cursor[4:].decode(), data))


class WsReader(Reader):
    """`close_code` is the server's, once the connection has ended properly."""

    def __init__(self, client: ws_client.RawClient, step: int) -> None:
        super().__init__(client.stream, step)
        self._client = client
        self._rest, client.unread = client.unread, b""
        self.close_code: int | None = None

    async def send(self, **frame: Any) -> None:
        await self._client.send_frame(frame)

    async def answer(self, kind: str) -> dict[str, Any]:
        """The first answer of this type, as soon as it is there. Events that come before it wait."""
        while not any(frame["type"] == kind for frame in self.others):
            assert self.ended is None, f"no {kind}, but {self.others}"
            await self._read()
        return next(frame for frame in self.others if frame["type"] == kind)

    async def _read(self) -> bool:
        try:
            data = await self.stream.receive_some(self.step)
        except trio.BrokenResourceError:
            data = b""
        if not data:
            self.ended = self.ended or "cut"
            return False
        self._rest += data
        for opcode, payload in self._frames():
            if opcode == 8:
                self.ended, self.close_code = "properly", int.from_bytes(payload[:2])
                return False
            if opcode == 9:
                await self._client.send(ws_client.client_frame(payload, opcode=10))
            else:
                assert opcode == 1, (opcode, payload)
                self._take_text(payload)
        return True

    def _frames(self) -> Iterator[tuple[int, bytes]]:
        """The frames that are whole (RFC 6455 section 5.2); a server's are neither masked nor in pieces."""
        buffer, start = self._rest, 0
        while len(buffer) - start >= 2:
            size, at = buffer[start + 1], start + 2
            if size >= 126:
                at += 2 if size == 126 else 8
                size = int.from_bytes(buffer[start + 2 : at])
            if at + size > len(buffer) or at > len(buffer):
                break
            yield buffer[start] & 0x0F, buffer[at : at + size]
            start = at + size
        self._rest = buffer[start:]

    def _take_text(self, payload: bytes) -> None:
        fields = orjson.loads(payload)
        if "seq" in fields or fields["type"] == "gap":
            self._whole.append(Seen(fields["cursor"], payload))
        else:
            self.others.append(fields)


@asynccontextmanager
async def open_reader(
    server: Addresses,
    way: Way,
    session_id: str,
    after: str | None,
    *,
    run_id: str | None = None,
    step: int = READ_BYTES,
    receive_buffer_bytes: int | None = None,
) -> AsyncIterator[Reader]:
    """A reader that follows a session from a cursor (None: from now), or one run of it (None: from its beginning).

    Entered, it is subscribed, and has read the answer, and at most `step` bytes more. Only SSE has streams of one run.
    With a small `receive_buffer_bytes` the server soon notices that it does not read.
    """
    if way in ("last_event_id", "after"):
        async with http_client.connect(server.http_url, receive_buffer_bytes=receive_buffer_bytes) as connection:
            query = [] if run_id is None else [f"run_id={run_id}"]
            headers = {}
            if after is not None and way == "after":
                query.append(f"after={after}")
            elif after is not None:
                headers["Last-Event-ID"] = after
            target = f"/api/v1/stream/{session_id}?{'&'.join(query)}"
            connection.receive_bytes = step
            await connection.open_sse("GET", target, headers=headers)
            yield SseReader(connection, step)
        return
    assert run_id is None, "the gateway has no streams of one run"
    assert server.gateway_url is not None
    async with ws_client.open_upgraded(server.gateway_url, receive_buffer=receive_buffer_bytes) as client:
        reader = WsReader(client, step)
        place = {"session_id": session_id} | ({} if after is None else {"after": after})
        if way == "connect":
            await reader.send(type="connect", **place)
            connected = await reader.answer("connected")
            assert connected["cursor"] is not None, "the session is not stored"
        else:
            await reader.send(type="connect")
            await reader.answer("connected")
            await reader.send(type="subscribe", **place)
            await reader.answer("subscribed")
        yield reader
