"""The client over the WebSocket gateway: one connection per chat, `connect` and then one `chat` frame."""

import asyncio
import base64
import os
import time
from collections.abc import Iterator
from typing import Any, Final

import orjson

from benchmarks.client import ChatRecord, DeliveryError, main
from benchmarks.load import Load

# Opcodes of RFC 6455 section 11.8.
_TEXT: Final = 0x1
_CLOSE: Final = 0x8
_PING: Final = 0x9
_PONG: Final = 0xA
_NORMAL: Final = (1000).to_bytes(2, "big")


def client_frame(opcode: int, payload: bytes) -> bytes:
    """One unfragmented frame from a client: masked with the key 0, which leaves the payload as it is."""
    size = len(payload)
    if size < 126:
        return bytes((0x80 | opcode, 0x80 | size, 0, 0, 0, 0)) + payload
    return bytes((0x80 | opcode, 0x80 | 126)) + size.to_bytes(2, "big") + bytes(4) + payload


class FrameReader:
    """Takes a server's frames apart, which are not masked. Fragments are refused: no server here has need of them."""

    __slots__ = ("_buffer",)

    def __init__(self) -> None:
        self._buffer = b""

    def feed(self, data: bytes) -> Iterator[tuple[int, bytes]]:
        """(opcode, payload) of every frame that is whole now. Raises DeliveryError for what no server may send."""
        buffer = self._buffer + data if self._buffer else data
        start, end = 0, len(buffer)
        while end - start >= 2:
            first, size = buffer[start], buffer[start + 1]
            if first & 0xF0 != 0x80 or size & 0x80:
                raise DeliveryError(f"frame head {buffer[start : start + 2].hex()}: masked, fragmented or compressed")
            at = start + 2
            if size >= 126:
                at += 2 if size == 126 else 8
                if at > end:
                    break
                size = int.from_bytes(buffer[start + 2 : at], "big")
            if at + size > end:
                break
            start = at + size
            yield first & 0x0F, buffer[at:start]
        self._buffer = buffer[start:]


class WsChat(asyncio.Protocol):
    """A ChatConnection over a WebSocket."""

    def __init__(self, host: str, port: int, load: Load) -> None:
        self.record = ChatRecord(load.tokens)
        self._host = host
        self._port = port
        self._model = load.model
        self._frames = FrameReader()
        self._handshake: bytes | None = b""  # None once the server has taken the upgrade
        self._accepted = False
        self._transport: asyncio.Transport | None = None
        self._connected: asyncio.Future[None] | None = None
        self._delivered: asyncio.Future[None] | None = None
        self._closed: asyncio.Future[None] | None = None

    async def connect(self) -> None:
        loop = asyncio.get_running_loop()
        self._connected, self._delivered, self._closed = (loop.create_future() for _ in range(3))
        self._transport, _ = await loop.create_connection(lambda: self, self._host, self._port)
        key = base64.b64encode(os.urandom(16)).decode()
        self._transport.write(
            f"GET / HTTP/1.1\r\nHost: {self._host}:{self._port}\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
            f"Sec-WebSocket-Key: {key}\r\nSec-WebSocket-Version: 13\r\n\r\n".encode()
        )
        await self._connected

    def send_chat(self) -> None:
        self.record.sent_s = time.monotonic()
        self._send({"type": "chat", "content": "Tell me a story.", "model": self._model})

    async def wait_delivered(self) -> None:
        assert self._delivered is not None
        await self._delivered

    async def close(self) -> None:
        assert self._transport is not None
        assert self._closed is not None
        if not self._transport.is_closing():
            self._transport.write(client_frame(_CLOSE, _NORMAL))
        await self._closed

    def data_received(self, data: bytes) -> None:
        try:
            if self._handshake is not None:
                data = self._upgrade(data)
            for opcode, payload in self._frames.feed(data):
                self._frame(opcode, payload)
        except DeliveryError as error:
            self._fail(error)

    def connection_lost(self, exc: Exception | None) -> None:
        self._fail(exc or DeliveryError("the server closed the connection in the middle of the stream"))
        if self._closed is not None and not self._closed.done():
            self._closed.set_result(None)

    def _upgrade(self, data: bytes) -> bytes:
        """What comes behind the server's answer to the handshake; b"" as long as that is not whole."""
        assert self._handshake is not None
        head, end, rest = (self._handshake + data).partition(b"\r\n\r\n")
        if not end:
            self._handshake = head
            return b""
        if not head.startswith(b"HTTP/1.1 101 "):
            raise DeliveryError(f"no upgrade: {(head + rest)[:300]!r}")
        self._handshake = None
        self._send({"type": "connect"})
        return rest

    def _frame(self, opcode: int, payload: bytes) -> None:
        if opcode == _TEXT:
            self._text(payload)
        elif opcode == _PING:
            self._write(client_frame(_PONG, payload))
        elif opcode == _CLOSE and self._transport is not None:
            self._transport.close()

    def _text(self, payload: bytes) -> None:
        if self._accepted:
            self.record.feed(payload, time.monotonic())
            if self.record.complete and self._delivered is not None and not self._delivered.done():
                self._delivered.set_result(None)
            return
        kind = orjson.loads(payload)["type"]
        if kind == "connected" and self._connected is not None and not self._connected.done():
            self._connected.set_result(None)
        elif kind == "accepted":
            self._accepted = True
        else:
            raise DeliveryError(f"unexpected frame: {payload[:300]!r}")

    def _send(self, frame: dict[str, Any]) -> None:
        self._write(client_frame(_TEXT, orjson.dumps(frame)))

    def _write(self, data: bytes) -> None:
        if self._transport is not None:
            self._transport.write(data)

    def _fail(self, error: Exception) -> None:
        for future in (self._connected, self._delivered):
            if future is not None and not future.done():
                future.set_exception(error)
                future.exception()  # seen: who waits for it raises it, and nobody may be waiting yet


if __name__ == "__main__":
    main(WsChat)
