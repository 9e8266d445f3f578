"""A fake OpenAI-compatible server on a real socket: what it answers, how fast, cut into which pieces and broken in
which way is the test's choice.

    async with open_upstream() as upstream:
        reply = upstream.answer(Answer(tokens=["Hel", "lo"], gated=True))
        ...                          # ask the provider at upstream.base_url
        reply.release()              # lets the first token out
        await reply.wait_client_left()

Answers are given in the order in which they were queued, one per request; without one, `upstream.default` answers.
HTTP/1.1, written by hand: it owes nothing to the code under test. Every `wait_*` wants a deadline from the test.
"""

import json
import socket
import struct
from collections import deque
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any

import trio

from tests.support.answers import Answer, FakeToolCall, Fault, error_answer, events, json_answer

__all__ = [
    "Answer",
    "FakeToolCall",
    "Fault",
    "Reply",
    "Request",
    "Upstream",
    "error_answer",
    "json_answer",
    "open_dead_address",
    "open_upstream",
]

HUGE_LINE_BYTES = 10_000_000


@dataclass(frozen=True, slots=True)
class Request:
    method: str
    path: str
    headers: Mapping[str, str]
    """Names in lower case."""
    body: bytes
    connection: int
    """Which connection it came on, counted from 1."""

    @property
    def json(self) -> Any:
        return json.loads(self.body)


class Reply:
    """One answer on its way: how the test drives it, and what became of it."""

    def __init__(self, answer: Answer) -> None:
        self.answer = answer
        self.request: Request | None = None
        self.texts_sent = 0
        """Texts that were written."""
        self._released = 0
        self._open = not answer.gated
        self._turn = trio.Event()
        self._requested = trio.Event()
        self._finished = trio.Event()
        self._client_left = trio.Event()

    def release(self, texts: int = 1) -> None:
        """Let so many more texts out."""
        self._released += texts
        self._turned()

    def release_all(self) -> None:
        self._open = True
        self._turned()

    async def wait_requested(self) -> Request:
        """Return when the request came, whole."""
        await self._requested.wait()
        assert self.request is not None
        return self.request

    async def wait_sent(self, texts: int) -> None:
        """Return when so many texts were written."""
        while self.texts_sent < texts:
            await self._turn.wait()

    async def wait_finished(self) -> None:
        """Return when the answer is written to its end, or its fault has happened."""
        await self._finished.wait()

    async def wait_client_left(self) -> None:
        """Return when the client closed the connection before the answer's end."""
        await self._client_left.wait()

    @property
    def client_left(self) -> bool:
        return self._client_left.is_set()

    def _turned(self) -> None:
        self._turn.set()
        self._turn = trio.Event()

    async def _may_send(self) -> None:
        while not self._open and self._released <= self.texts_sent:
            await self._turn.wait()

    def _text_sent(self) -> None:
        self.texts_sent += 1
        self._turned()


class Upstream:
    """The running server. `default` answers requests that nothing was queued for."""

    def __init__(self, port: int) -> None:
        self.port = port
        self.default = Answer()
        self.requests: list[Request] = []
        self.connections = 0
        """Ever accepted."""
        self.open_connections = 0
        self._queue: deque[Reply] = deque()
        self._changed = trio.Event()

    @property
    def base_url(self) -> str:
        return f"http://127.0.0.1:{self.port}/v1"

    def answer(self, answer: Answer) -> Reply:
        """Queue an answer for the next request that has none yet."""
        reply = Reply(answer)
        self._queue.append(reply)
        return reply

    def forget(self) -> None:
        """Drop the answers that no request has taken."""
        self._queue.clear()

    async def wait_requests(self, count: int) -> None:
        """Return when so many requests have come in all."""
        while len(self.requests) < count:
            await self._changed.wait()

    async def wait_connections(self, count: int) -> None:
        """Return when exactly so many connections are open."""
        while self.open_connections != count:
            await self._changed.wait()

    def _turned(self) -> None:
        self._changed.set()
        self._changed = trio.Event()

    def _reply_to(self, request: Request) -> Reply:
        self.requests.append(request)
        if request.path != "/v1/chat/completions":
            reply = Reply(error_answer(404, f"nothing at {request.path}"))
        else:
            reply = self._queue.popleft() if self._queue else Reply(self.default)
        reply.request = request
        reply._requested.set()
        self._turned()
        return reply

    async def _serve(self, stream: trio.SocketStream) -> None:
        self.connections += 1
        self.open_connections += 1
        connection = _Connection(stream, self.connections)
        try:
            while (request := await connection.read_request()) is not None:
                if not await connection.write_reply(self._reply_to(request)):
                    break
        except trio.BrokenResourceError:
            pass
        finally:
            stream.socket.close()
            self.open_connections -= 1
            self._turned()


@asynccontextmanager
async def open_upstream() -> AsyncIterator[Upstream]:
    """A server on 127.0.0.1; leaving closes its connections at once."""
    async with trio.open_nursery() as nursery:
        listeners = await trio.open_tcp_listeners(0, host="127.0.0.1")
        upstream = Upstream(listeners[0].socket.getsockname()[1])
        await nursery.start(trio.serve_listeners, upstream._serve, listeners)
        yield upstream
        nursery.cancel_scope.cancel()


@asynccontextmanager
async def open_dead_address() -> AsyncIterator[str]:
    """A base_url where nobody listens: connections are refused for as long as the block lasts."""
    with socket.socket() as bound:
        bound.bind(("127.0.0.1", 0))
        yield f"http://127.0.0.1:{bound.getsockname()[1]}/v1"


class _Connection:
    """One connection: reads requests, writes answers, and notices while it writes that the client has gone."""

    def __init__(self, stream: trio.SocketStream, number: int) -> None:
        self._stream = stream
        self._number = number
        self._buffer = b""

    async def read_request(self) -> Request | None:
        """None: the client closed the connection between requests, or in the middle of one."""
        while b"\r\n\r\n" not in self._buffer:
            if not await self._fill():
                return None
        head, _, self._buffer = self._buffer.partition(b"\r\n\r\n")
        line, *fields = head.decode("latin-1").split("\r\n")
        method, path, _ = line.split(" ")
        headers = {name.strip().lower(): value.strip() for name, _, value in (text.partition(":") for text in fields)}
        length = int(headers.get("content-length", "0"))
        while len(self._buffer) < length:
            if not await self._fill():
                return None
        body, self._buffer = self._buffer[:length], self._buffer[length:]
        return Request(method, path, headers, body, self._number)

    async def _fill(self) -> bool:
        data = await self._stream.receive_some()
        self._buffer += data
        return bool(data)

    async def write_reply(self, reply: Reply) -> bool:
        """Whether the connection is good for another request."""
        keep = False

        async def watch() -> None:
            try:
                while await self._fill():
                    pass
            except trio.BrokenResourceError:
                pass
            gone()

        def gone() -> None:
            reply._client_left.set()
            nursery.cancel_scope.cancel()

        async with trio.open_nursery() as nursery:
            nursery.start_soon(watch)
            try:
                keep = await _Writer(self._stream, reply).write()
                reply._finished.set()
            except trio.BrokenResourceError:
                gone()
            nursery.cancel_scope.cancel()
        return keep


class _Writer:
    """Writes one answer."""

    def __init__(self, stream: trio.SocketStream, reply: Reply) -> None:
        self._stream = stream
        self._reply = reply
        self._answer = reply.answer
        self._held: list[bytes] = []

    async def write(self) -> bool:
        answer = self._answer
        if answer.fault is not None and answer.fault_after is None:
            return await self._fault(answer.fault)
        if answer.body is not None:
            await self._send(self._head(len(answer.body) if answer.body_length is None else answer.body_length))
            await self._send(answer.body)
            if answer.body_length is not None:
                await trio.sleep_forever()
            return True
        await self._send(self._head(None))
        if answer.fault is not None and answer.fault_after == 0:
            return await self._fault(answer.fault)
        assert self._reply.request is not None
        stream_options = self._reply.request.json.get("stream_options") or {}
        for data, is_text in events(answer, usage_asked=stream_options.get("include_usage", False)):
            if is_text:
                if answer.delay_s:
                    await trio.sleep(answer.delay_s)
                await self._reply._may_send()
            await self._event(data)
            if is_text:
                self._reply._text_sent()
                if answer.fault is not None and answer.fault_after == self._reply.texts_sent:
                    return await self._fault(answer.fault)
        if answer.fault is not None:
            assert answer.fault_after == "end", "a fault behind more texts than there are"
            return await self._fault(answer.fault)
        return await self._end()

    def _head(self, length: int | None) -> bytes:
        answer = self._answer
        lines = [f"HTTP/1.1 {answer.status} Whatever"]
        if answer.content_type is not None:
            lines.append(f"content-type: {answer.content_type}")
        lines.append("transfer-encoding: chunked" if length is None else f"content-length: {length}")
        lines.extend(f"{name}: {value}" for name, value in answer.headers.items())
        return "\r\n".join([*lines, "", ""]).encode("latin-1")

    async def _event(self, data: str) -> None:
        end = self._answer.line_end
        encoded = f"data: {data}{end}{end}".encode()
        if self._answer.joined:
            self._held.append(encoded)
        elif self._answer.split is None:
            await self._http_chunk(encoded)
        else:
            for start in range(0, len(encoded), self._answer.split):
                await self._http_chunk(encoded[start : start + self._answer.split])
                if self._answer.drip_s:
                    await trio.sleep(self._answer.drip_s)

    async def _http_chunk(self, data: bytes) -> None:
        await self._send(b"%x\r\n%b\r\n" % (len(data), data))

    async def _end(self) -> bool:
        await self._flush()
        await self._send(b"0\r\n\r\n")
        return True

    async def _flush(self) -> None:
        if self._held:
            await self._http_chunk(b"".join(self._held))
            self._held.clear()

    async def _send(self, data: bytes) -> None:
        await self._stream.send_all(data)

    async def _fault(self, fault: Fault) -> bool:
        """What the answer ends with. Whether the connection is good for another request."""
        if fault not in ("garbage", "error"):
            await self._flush()
        match fault:
            case "reset":
                self._stream.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            case "stall":
                await trio.sleep_forever()
            case "half_chunk":
                await self._send(b'400\r\ndata: {"choi')
            case "garbage":
                await self._event("<html>oops</html>")
                return await self._end()
            case "huge_line":
                await self._http_chunk(b"data: " + b"x" * HUGE_LINE_BYTES)
            case "bad_http":
                await self._send(b"\x16\x03\x01 this is no HTTP\r\n\r\n")
            case "error":
                await self._event(json.dumps({"error": self._answer.error}))
                return await self._end()
            case "close":
                pass
        return False
