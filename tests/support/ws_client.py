"""A client of the gateway on trio-websocket: frames are dicts, an answer is found by its `ref`, what comes in between
waits until it is asked for.

`async with connect(url) as client: accepted = await client.chat("hi"); events = await client.until_terminal()`. One
task per client. No method has a deadline: the test has one.
"""

import json
import socket
import ssl
import struct
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass
from typing import Any, Final, cast
from urllib.parse import urlsplit

import trio
from trio_websocket import ConnectionClosed, WebSocketConnection, open_websocket_url

JsonFrame = dict[str, Any]


def types(frames: list[JsonFrame]) -> list[str]:
    return [frame["type"] for frame in frames]


def seqs(frames: list[JsonFrame]) -> list[int]:
    return [frame["seq"] for frame in frames if "seq" in frame]


CONTINUATION: Final = 0
TEXT: Final = 1
BINARY: Final = 2
CLOSE: Final = 8
PING: Final = 9
PONG: Final = 10
"""Opcodes, RFC 6455 section 5.2."""

TERMINAL = frozenset({"agent_complete", "agent_error", "agent_stopped"})


class WsClient:
    """`connected` is the answer to `connect`, where `connect()` opened it. `seen` is every frame, in order."""

    def __init__(self, websocket: WebSocketConnection) -> None:
        self.websocket = websocket
        self.connected: JsonFrame = {}
        self.seen: list[JsonFrame] = []
        self._waiting: list[JsonFrame] = []
        self._refs = 0

    @property
    def session_id(self) -> str:
        return str(self.connected["session_id"])

    async def send(self, frame: Mapping[str, Any]) -> None:
        await self.websocket.send_message(json.dumps(frame))

    async def send_raw(self, message: str | bytes) -> None:
        await self.websocket.send_message(message)

    async def receive(self) -> JsonFrame:
        """The next frame that nothing has taken yet. Raises ConnectionClosed."""
        return self._waiting.pop(0) if self._waiting else await self._read()

    async def call(self, frame: Mapping[str, Any]) -> JsonFrame:
        """Send a frame and return its answer, be it an error. What comes in between waits for `receive`."""
        self._refs += 1
        ref = f"ref-{self._refs}"
        await self.send({**frame, "ref": ref})
        return await self.answer(ref)

    async def answer(self, ref: str | int) -> JsonFrame:
        """The answer with this `ref`. What comes before it waits for `receive`."""
        for index, waiting in enumerate(self._waiting):
            if waiting.get("ref") == ref:
                return self._waiting.pop(index)
        while True:
            frame = await self._read()
            if frame.get("ref") == ref:
                return frame
            self._waiting.append(frame)

    async def chat(self, text: str, **fields: Any) -> JsonFrame:
        """The `accepted` answer to a chat."""
        accepted = await self.call({"type": "chat", "content": text, **fields})
        assert accepted["type"] == "accepted", accepted
        return accepted

    async def until(self, wanted: Callable[[JsonFrame], bool]) -> list[JsonFrame]:
        """Frames up to and with the first that is wanted."""
        frames = []
        while True:
            frames.append(await self.receive())
            if wanted(frames[-1]):
                return frames

    async def until_type(self, *types: str) -> list[JsonFrame]:
        return await self.until(lambda frame: frame["type"] in types)

    async def until_terminal(self, run_id: str | None = None) -> list[JsonFrame]:
        """Frames up to and with the terminal event of a run."""
        return await self.until(
            lambda frame: frame["type"] in TERMINAL and (run_id is None or frame["run_id"] == run_id)
        )

    async def quiet(self) -> list[JsonFrame]:
        """Everything that the server had to say before it answers a ping sent now."""
        self._refs += 1
        ref = f"ref-{self._refs}"
        await self.send({"type": "ping", "ref": ref})
        return (await self.until(lambda frame: frame.get("ref") == ref))[:-1]

    async def close_code(self) -> int:
        """Read to the end of the connection; the code that the server closed it with (1006: without a close frame)."""
        with suppress(ConnectionClosed):
            while True:
                self._waiting.append(await self._read())
        assert self.websocket.closed is not None
        return self.websocket.closed.code

    async def rest(self) -> list[JsonFrame]:
        """Every frame to the end of the connection."""
        await self.close_code()
        frames, self._waiting = self._waiting, []
        return frames

    async def _read(self) -> JsonFrame:
        message = await self.websocket.get_message()
        assert isinstance(message, str), "the gateway speaks text"
        frame = json.loads(message)
        assert isinstance(frame, dict), frame
        self.seen.append(frame)
        return frame


@asynccontextmanager
async def open_ws(
    url: str, *, headers: Mapping[str, str] | None = None, tls: ssl.SSLContext | None = None
) -> AsyncIterator[WsClient]:
    """An upgraded connection that has not said `connect`. Where the upgrade is refused, use `handshake`."""
    pairs = [(name.encode(), value.encode()) for name, value in (headers or {}).items()]
    async with open_websocket_url(
        url, ssl_context=tls, extra_headers=pairs, max_message_size=64 * 1024 * 1024, disconnect_timeout=5
    ) as ws:
        try:
            yield WsClient(ws)
        finally:
            if ws.closed is not None:  # then trio-websocket's client leaves its socket open
                await trio.aclose_forcefully(ws._stream)


@asynccontextmanager
async def connect(
    url: str, *, headers: Mapping[str, str] | None = None, tls: ssl.SSLContext | None = None, **fields: Any
) -> AsyncIterator[WsClient]:
    """A connection that has said `connect` with these fields, and been answered `connected`."""
    async with open_ws(url, headers=headers, tls=tls) as client:
        client.connected = await client.call({"type": "connect", **fields})
        assert client.connected["type"] == "connected", client.connected
        yield client


def upgrade_request(url: str, **headers: str) -> bytes:
    """The bytes of a handshake, for those who want to send them in their own way."""
    fields = {
        "Host": urlsplit(url).netloc,
        "Upgrade": "websocket",
        "Connection": "Upgrade",
        "Sec-WebSocket-Key": "dGhlIHNhbXBsZSBub25jZQ==",
        "Sec-WebSocket-Version": "13",
    } | {name.replace("_", "-"): value for name, value in headers.items()}
    return b"".join(
        [b"GET / HTTP/1.1\r\n", *(f"{name}: {value}\r\n".encode() for name, value in fields.items()), b"\r\n"]
    )


def client_frame(payload: bytes, *, opcode: int = 1, final: bool = True) -> bytes:
    """One masked frame, as RFC 6455 section 5.2 has it, with a mask of zeros."""
    length = len(payload)
    head = bytes((opcode | (0x80 if final else 0),))
    if length < 126:
        head += bytes((0x80 | length,))
    elif length < 1 << 16:
        head += bytes((0x80 | 126,)) + length.to_bytes(2)
    else:
        head += bytes((0x80 | 127,)) + length.to_bytes(8)
    return head + bytes(4) + payload


class RawClient:
    """A socket on which a test says WebSocket byte by byte, or stops reading. `tcp` is what is under `stream`, which
    may go through TLS.
    """

    def __init__(self, stream: trio.SocketStream, tcp: trio.SocketStream | None = None) -> None:
        self.stream = stream
        self.tcp = tcp or stream
        self.unread = b""

    async def send(self, data: bytes) -> None:
        await self.stream.send_all(data)

    async def send_frame(self, frame: Mapping[str, Any]) -> None:
        await self.send(client_frame(json.dumps(frame).encode()))

    async def head(self) -> bytes:
        """The head of the server's answer to the handshake."""
        while b"\r\n\r\n" not in self.unread:
            data = await self.stream.receive_some(65536)
            assert data, f"the server left after {self.unread!r}"
            self.unread += data
        head, _, self.unread = self.unread.partition(b"\r\n\r\n")
        return head

    async def handshake_answer(self) -> "HandshakeAnswer":
        status, *lines = (await self.head()).decode("latin-1").split("\r\n")
        fields = {name.lower(): value.strip() for name, _, value in (line.partition(":") for line in lines)}
        code = int(status.split()[1])
        return HandshakeAnswer(code, fields, b"" if code == 101 else await self.rest())

    async def receive(self) -> tuple[int, bytes]:
        """The next frame: its opcode and its payload. (0, b"") at the end of the connection."""
        header = await self._exactly(2)
        if header is None:
            return 0, b""
        length = header[1]
        if length >= 126:
            extended = await self._exactly(2 if length == 126 else 8)
            assert extended is not None
            length = int.from_bytes(extended)
        payload = await self._exactly(length)
        assert payload is not None
        return header[0] & 0x0F, payload

    async def receive_json(self) -> JsonFrame:
        opcode, payload = await self.receive()
        assert opcode == 1, (opcode, payload)
        frame = json.loads(payload)
        assert isinstance(frame, dict)
        return frame

    async def next_json(self) -> JsonFrame:
        """The next text frame; pings on the way are answered."""
        while True:
            opcode, payload = await self.receive()
            if opcode == PING:
                await self.send(client_frame(payload, opcode=PONG))
            else:
                assert opcode == TEXT, (opcode, payload)
                return dict(json.loads(payload))

    async def beat(self, pings: int) -> None:
        """Answer this many pings of the server: for a test, a clock that needs no sleep."""
        while pings:
            opcode, payload = await self.receive()
            assert opcode in (PING, TEXT)
            if opcode == PING:
                await self.send(client_frame(payload, opcode=PONG))
                pings -= 1

    async def close_code(self) -> int:
        """Read to the close frame; 1006 if the connection ends without one."""
        while True:
            opcode, payload = await self.receive()
            if opcode == CLOSE:
                return int.from_bytes(payload[:2])
            if opcode == 0:
                return 1006

    def reset(self) -> None:
        """Drop the connection as a client does that is gone: a RST, nothing said."""
        self.tcp.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.tcp.socket.close()

    async def rest(self) -> bytes:
        """Everything to the end of the connection, be it a reset."""
        pieces = [self.unread]
        try:
            while data := await self.stream.receive_some(65536):
                pieces.append(data)
        except trio.BrokenResourceError:
            pass
        return b"".join(pieces)

    async def _exactly(self, count: int) -> bytes | None:
        while len(self.unread) < count:
            data = await self.stream.receive_some(65536)
            if not data:
                assert not self.unread, f"cut inside a frame: {self.unread!r}"
                return None
            self.unread += data
        taken, self.unread = self.unread[:count], self.unread[count:]
        return taken


@asynccontextmanager
async def open_raw(
    url: str, *, receive_buffer: int | None = None, tls: ssl.SSLContext | None = None
) -> AsyncIterator[RawClient]:
    """A connection to the gateway, nothing sent, but the TLS handshake for a `wss:` URL. With a small `receive_buffer`
    (bytes) a client that does not read is felt early. It ends without a word of TLS.
    """
    parts = urlsplit(url)
    assert parts.hostname is not None
    sock = trio.socket.socket()
    if receive_buffer is not None:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_buffer)
    await sock.connect((parts.hostname, parts.port))
    async with trio.SocketStream(sock) as tcp:
        if parts.scheme == "ws":
            yield RawClient(tcp)
            return
        assert tls is not None, "a wss: URL needs a context that trusts the server"
        through = trio.SSLStream(tcp, tls, server_hostname=parts.hostname)
        await through.do_handshake()
        # RawClient needs a stream only; its type is for those that look at the socket.
        yield RawClient(cast(trio.SocketStream, through), tcp)


@asynccontextmanager
async def open_upgraded(
    url: str, *, receive_buffer: int | None = None, tls: ssl.SSLContext | None = None
) -> AsyncIterator[RawClient]:
    """A raw connection behind its handshake."""
    async with open_raw(url, receive_buffer=receive_buffer, tls=tls) as client:
        await client.send(upgrade_request(url))
        assert (await client.head()).startswith(b"HTTP/1.1 101 ")
        yield client


@dataclass(frozen=True, slots=True)
class HandshakeAnswer:
    """`headers` have lower-case names; `body` is what came before the server closed, empty for an upgrade."""

    status: int
    headers: Mapping[str, str]
    body: bytes

    @property
    def error_code(self) -> str:
        return str(json.loads(self.body)["error"]["code"])


async def handshake(url: str, *, tls: ssl.SSLContext | None = None, **headers: str) -> HandshakeAnswer:
    """Ask for the upgrade, and leave."""
    async with open_raw(url, tls=tls) as client:
        await client.send(upgrade_request(url, **headers))
        return await client.handshake_answer()
