"""Clients for questions about single requests, in this process: they call, follow and stop, and see each event as it
comes.

One connection is one task's. Nothing here has a deadline: who asks has one. What must not be is a DeliveryError.
"""

import asyncio
import base64
import os
from collections import deque
from collections.abc import AsyncIterator
from typing import Any, Final, Self

import orjson

from benchmarks.client import DeliveryError
from benchmarks.client_ws import FrameReader, client_frame

HOST: Final = "127.0.0.1"
READ_BYTES: Final = 256 * 1024
_TEXT: Final = 0x1
_PING: Final = 0x9
_PONG: Final = 0xA

Json = dict[str, Any]


class HttpConnection:
    """A keep-alive connection: one call or one stream at a time."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._reader = reader
        self._writer = writer

    @classmethod
    async def open(cls, port: int) -> Self:
        return cls(*await asyncio.open_connection(HOST, port, limit=READ_BYTES))

    async def call(self, method: str, target: str, body: Json | None = None) -> Json:
        """A call's answer, an object; {} where there is none. Raises DeliveryError for any status but 2xx."""
        head = await self._ask(method, target, body, "application/json")
        answer = await self._reader.readexactly(int(head.get("content-length", "0")))
        if not head["status"].startswith("2"):
            raise DeliveryError(f"{method} {target}: {head['status']} {answer.decode(errors='replace')}")
        return dict(orjson.loads(answer)) if answer else {}

    async def open_stream(self, method: str, target: str, body: Json | None = None) -> Json:
        """Ask for a stream of events, which `events` then gives. The answer's headers, lower case."""
        head = await self._ask(method, target, body, "text/event-stream")
        if head["status"] != "200" or "chunked" not in head.get("transfer-encoding", ""):
            raise DeliveryError(f"{method} {target}: no stream but {head}")
        return head

    async def events(self) -> AsyncIterator[bytes]:
        """The JSON of each event of the stream that was asked for, to its proper end."""
        rest = b""
        while size := int(await self._reader.readuntil(b"\r\n"), 16):
            *blocks, rest = (rest + await self._reader.readexactly(size)).split(b"\n\n")
            await self._reader.readexactly(2)
            for block in blocks:
                _, found, data = block.rpartition(b"data: ")
                if found:
                    yield data
        await self._reader.readexactly(2)

    def close(self) -> None:
        self._writer.close()

    async def _ask(self, method: str, target: str, body: Json | None, accept: str) -> dict[str, str]:
        lines = [f"{method} {target} HTTP/1.1", f"Host: {HOST}", f"Accept: {accept}"]
        content = b"" if body is None else orjson.dumps(body)
        if body is not None:
            lines += ["Content-Type: application/json", f"Content-Length: {len(content)}"]
        self._writer.write("\r\n".join([*lines, "", ""]).encode() + content)
        status, *fields = (await self._reader.readuntil(b"\r\n\r\n")).decode("latin-1").split("\r\n")
        pairs = (field.partition(": ") for field in fields if field)
        return {"status": status.split(" ")[1], **{name.lower(): value for name, _, value in pairs}}


class WsConnection:
    """A connection to the gateway that has said `connect`. Frames come with `receive`, in their order."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._reader = reader
        self._writer = writer
        self._frames = FrameReader()
        self._texts: deque[bytes] = deque()

    @classmethod
    async def open(cls, port: int, **connect: Any) -> Self:
        connection = cls(*await asyncio.open_connection(HOST, port, limit=READ_BYTES))
        connection._writer.write(upgrade(port))
        head = await connection._reader.readuntil(b"\r\n\r\n")
        if not head.startswith(b"HTTP/1.1 101 "):
            raise DeliveryError(f"no upgrade: {head!r}")
        connection.send(type="connect", **connect)
        connected = orjson.loads(await connection.receive())
        if connected["type"] != "connected":
            raise DeliveryError(f"not connected: {connected}")
        return connection

    def send(self, **frame: Any) -> None:
        self._writer.write(client_frame(_TEXT, orjson.dumps(frame)))

    async def receive(self) -> bytes:
        """The JSON of the next frame."""
        while not self._texts:
            data = await self._reader.read(READ_BYTES)
            if not data:
                raise DeliveryError("the server closed the connection")
            for opcode, payload in self._frames.feed(data):
                if opcode == _TEXT:
                    self._texts.append(payload)
                elif opcode == _PING:
                    self._writer.write(client_frame(_PONG, payload))
        return self._texts.popleft()

    def close(self) -> None:
        self._writer.close()


def upgrade(port: int) -> bytes:
    """The bytes of a handshake."""
    key = base64.b64encode(os.urandom(16)).decode()
    lines = [
        "GET / HTTP/1.1", f"Host: {HOST}:{port}", "Upgrade: websocket", "Connection: Upgrade",
        f"Sec-WebSocket-Key: {key}", "Sec-WebSocket-Version: 13", "", "",
    ]  # fmt: skip
    return "\r\n".join(lines).encode()
