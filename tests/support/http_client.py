"""A client of HTTP/1 on a bare socket: it sends exactly the bytes that it is told to, and reads answers as strictly as
h11 does.

`async with connect(url) as connection: answer = await connection.request("GET", "/healthz")`. For SSE, `open_sse` and
the SseReader that it gives. No method has a deadline: the test has one.
"""

import json as jsonlib
import socket
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

import h11
import trio

Cut = h11.RemoteProtocolError
"""An answer whose end never came: what reading it raises."""

Headers = Mapping[str, str] | Sequence[tuple[str, str]]


@dataclass(frozen=True, slots=True)
class Head:
    """`headers` have lower-case names."""

    status: int
    headers: Mapping[str, str]


@dataclass(frozen=True, slots=True)
class Answer:
    status: int
    headers: Mapping[str, str]
    body: bytes

    def json(self) -> Any:
        assert self.headers["content-type"] == "application/json", self
        return jsonlib.loads(self.body)

    @property
    def error(self) -> dict[str, Any]:
        """What is in the error envelope."""
        envelope = self.json()
        assert set(envelope) == {"error"}, envelope
        return dict(envelope["error"])


def request_bytes(
    method: str, target: str, *, headers: Headers = (), body: bytes = b"", host: str = "127.0.0.1", version: str = "1.1"
) -> bytes:
    """A request. `Content-Length` is added if there is a body and no framing was given, `Host` if none was given."""
    pairs = list(headers.items() if isinstance(headers, Mapping) else headers)
    names = {name.lower() for name, _ in pairs}
    if "host" not in names:
        pairs.insert(0, ("Host", host))
    if body and not names & {"content-length", "transfer-encoding"}:
        pairs.append(("Content-Length", str(len(body))))
    lines = [f"{method} {target} HTTP/{version}", *(f"{name}: {value}" for name, value in pairs), "", ""]
    return "\r\n".join(lines).encode("latin-1") + body


class HttpConnection:
    """One connection. Requests one after the other; or raw bytes with `send`, then `read_answer`."""

    def __init__(self, stream: trio.SocketStream, host: str) -> None:
        self.stream = stream
        self._host = host
        self._rest = b""
        self._parser = h11.Connection(h11.CLIENT)
        self.receive_bytes = 65536
        """How much one read takes at most: a client that wants to stop in the middle of something reads less."""

    async def send(self, data: bytes, *, step: int | None = None) -> None:
        """`step`: so many bytes in each packet."""
        for start in range(0, len(data), step or max(1, len(data))):
            await self.stream.send_all(data[start : start + (step or len(data))])

    async def request(
        self,
        method: str,
        target: str,
        *,
        headers: Headers = (),
        body: bytes = b"",
        json: Any = None,
        version: str = "1.1",
    ) -> Answer:
        """Ask and read the whole answer. `json` is a body with its content type."""
        if json is not None:
            body = jsonlib.dumps(json).encode()
            headers = [
                *(headers.items() if isinstance(headers, Mapping) else headers),
                ("Content-Type", "application/json"),
            ]
        await self.send(request_bytes(method, target, headers=headers, body=body, host=self._host, version=version))
        return await self.read_answer(method)

    async def read_head(self, method: str = "GET") -> Head:
        """The head of the answer to a request of this method; `read_piece` then gives its body."""
        self._parser = h11.Connection(h11.CLIENT)
        self._parser.send(h11.Request(method=method, target="/", headers=[("Host", "unused")]))
        self._parser.send(h11.EndOfMessage())
        if self._rest:
            self._parser.receive_data(self._rest)
        while True:
            event = await self._next()
            if isinstance(event, h11.Response):
                headers = {name.decode().lower(): value.decode("latin-1") for name, value in event.headers}
                return Head(event.status_code, headers)

    async def read_piece(self) -> bytes:
        """The next piece of the body; b"" at its proper end. Raises Cut if the connection ends before that."""
        event = await self._next()
        if isinstance(event, h11.Data):
            return bytes(event.data)
        assert isinstance(event, h11.EndOfMessage), event
        self._rest = self._parser.trailing_data[0]
        return b""

    async def read_answer(self, method: str = "GET") -> Answer:
        head = await self.read_head(method)
        pieces = []
        while piece := await self.read_piece():
            pieces.append(piece)
        return Answer(head.status, head.headers, b"".join(pieces))

    async def open_sse(self, method: str, target: str, *, headers: Headers = (), json: Any = None) -> "SseReader":
        """Ask for a stream. Asserts that there is one."""
        pairs = list(headers.items() if isinstance(headers, Mapping) else headers)
        body = b""
        if json is not None:
            body = jsonlib.dumps(json).encode()
            pairs.append(("Content-Type", "application/json"))
        if not any(name.lower() == "accept" for name, _ in pairs):
            pairs.append(("Accept", "text/event-stream"))
        await self.send(request_bytes(method, target, headers=pairs, body=body, host=self._host))
        head = await self.read_head(method)
        assert head.status == 200, (head, await self.read_piece())
        return SseReader(self, head)

    async def wait_closed(self) -> bytes:
        """Wait until the server has closed the connection. Returns what it still sent."""
        rest = self._rest
        while data := await self.stream.receive_some(65536):
            rest += data
        return rest

    async def _next(self) -> Any:
        while True:
            event = self._parser.next_event()
            if event is not h11.NEED_DATA:
                return event
            try:
                data = await self.stream.receive_some(self.receive_bytes)
            except trio.BrokenResourceError as error:
                raise Cut("the server reset the connection") from error
            self._parser.receive_data(data)


@dataclass(frozen=True, slots=True)
class SseItem:
    """One event, or one line that is none: a comment, `retry`. `data` is the decoded JSON."""

    id: str | None = None
    data: Any = None
    comment: str | None = None
    retry: int | None = None


class SseReader:
    """Reads an SSE response's body, as far as the test asks for it. `head` is the answer's head."""

    def __init__(self, connection: HttpConnection, head: Head) -> None:
        self.connection = connection
        self.head = head
        self._text = b""

    async def next_item(self) -> SseItem | None:
        """The next event, comment or `retry`; None at the stream's proper end. Raises Cut."""
        fields: dict[str, str] = {}
        while (line := await self._next_line()) is not None:
            if not line:
                assert "data" in fields, f"an event without data: {fields}"
                return SseItem(id=fields.get("id"), data=jsonlib.loads(fields["data"]))
            name, separator, value = line.partition(":")
            value = value.removeprefix(" ")
            assert separator, line
            if name in ("", "retry"):
                assert not fields, "neither comments nor retry come inside an event"
                return SseItem(retry=int(value)) if name else SseItem(comment=value)
            assert name in ("id", "data"), f"{name!r} is no field of ours"
            assert name not in fields, line
            fields[name] = value
        assert not fields, "a stream ends behind a whole event"
        return None

    async def _next_line(self) -> str | None:
        while b"\n" not in self._text:
            piece = await self.connection.read_piece()
            if not piece:
                assert not self._text, "a stream ends behind a whole line"
                return None
            self._text += piece
        line, _, self._text = self._text.partition(b"\n")
        return line.decode()

    async def next_event(self) -> SseItem | None:
        """The next event; None at the stream's proper end. Raises Cut."""
        while True:
            item = await self.next_item()
            if item is None or item.data is not None:
                return item

    async def take(self, count: int) -> list[SseItem]:
        """The next `count` events."""
        items: list[SseItem] = []
        for _ in range(count):
            item = await self.next_event()
            assert item is not None, f"the stream ended after {items}"
            items.append(item)
        return items

    async def until(self, kind: str) -> list[SseItem]:
        """The events up to and including the next of type `kind`."""
        items: list[SseItem] = []
        while not items or items[-1].data["type"] != kind:
            items += await self.take(1)
        return items

    async def rest(self) -> list[SseItem]:
        """Every event up to the stream's proper end. Raises Cut."""
        items: list[SseItem] = []
        while (item := await self.next_event()) is not None:
            items.append(item)
        return items


@asynccontextmanager
async def connect(url: str, *, receive_buffer_bytes: int | None = None) -> AsyncIterator[HttpConnection]:
    """A connection to `http://host:port`. With a small `receive_buffer_bytes` a client that stops reading is soon
    noticed."""
    parts = urlsplit(url)
    assert parts.hostname is not None
    assert parts.port is not None
    if receive_buffer_bytes is None:
        stream = await trio.open_tcp_stream(parts.hostname, parts.port)
    else:
        sock = trio.socket.socket()
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_buffer_bytes)
        await sock.connect((parts.hostname, parts.port))
        stream = trio.SocketStream(sock)
    async with stream:
        yield HttpConnection(stream, parts.netloc)


async def ask(
    url: str, method: str, target: str, *, headers: Headers = (), body: bytes = b"", json: Any = None
) -> Answer:
    """One request on a connection of its own."""
    async with connect(url) as connection:
        return await connection.request(method, target, headers=headers, body=body, json=json)
