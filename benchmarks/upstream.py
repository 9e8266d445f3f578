"""A fake OpenAI-compatible provider, as cheap as it can be: `POST …/completions` streams what the model's name says.

Tokens are written one by one, each with a write of its own, in turn over all connections, as a model server does. At
a pace each chat ticks on a schedule of its own, which does not drift and is out of step with the others': tokens of
different chats do not come together, as they do not in life.

Prints its port once it listens; ends when its standard input does.
"""

import asyncio
import contextlib
import itertools
import sys
from collections.abc import Callable, Iterator
from functools import lru_cache, partial
from typing import Final, cast

import httptools
import orjson
import uvloop

from benchmarks.load import parse_model, token_text

BACKLOG: Final = 1024
_STEP: Final = 0.6180339887498949
"""Multiples of the golden ratio, modulo 1, are spread evenly however many there are."""

_HEAD: Final = (
    b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream; charset=utf-8\r\ncache-control: no-cache\r\n"
    b"transfer-encoding: chunked\r\n\r\n"
)


def _chunk(data: bytes) -> bytes:
    """An HTTP/1.1 chunk (RFC 9112 section 7.1) with one SSE event in it."""
    event = b"data: " + data + b"\n\n"
    return b"%x\r\n%b\r\n" % (len(event), event)


def _completion(delta: dict[str, str], finish_reason: str | None = None) -> bytes:
    """A `chat.completion.chunk`, with the fields that OpenAI's own have."""
    return orjson.dumps(
        {
            "id": "chatcmpl-bench0000000000000000000",
            "object": "chat.completion.chunk",
            "created": 1750000000,
            "model": "bench",
            "service_tier": "default",
            "system_fingerprint": "fp_bench",
            "choices": [{"index": 0, "delta": delta, "logprobs": None, "finish_reason": finish_reason}],
        }
    )


@lru_cache(maxsize=8)
def _token_chunks(tokens: int) -> tuple[bytes, ...]:
    return tuple(_chunk(_completion({"content": token_text(index)})) for index in range(tokens))


def _tail(tokens: int, *, with_usage: bool) -> bytes:
    usage = {"prompt_tokens": 10, "completion_tokens": tokens, "total_tokens": 10 + tokens}
    tail = _chunk(_completion({}, "stop"))
    if with_usage:
        tail += _chunk(
            orjson.dumps({"id": "chatcmpl-bench", "object": "chat.completion.chunk", "choices": [], "usage": usage})
        )
    return tail + _chunk(b"[DONE]") + b"0\r\n\r\n"


def _refusal(status: bytes, message: str) -> bytes:
    body = orjson.dumps({"error": {"message": message, "type": "invalid_request_error", "code": None}})
    return b"HTTP/1.1 %b\r\ncontent-type: application/json\r\ncontent-length: %d\r\n\r\n%b" % (status, len(body), body)


class Connection(asyncio.Protocol):
    """One keep-alive connection from the server under test; one answer at a time."""

    def __init__(self, loop: asyncio.AbstractEventLoop, phases: Iterator[float]) -> None:
        self._loop = loop
        self._phases = phases
        self._parser = httptools.HttpRequestParser(self)
        self._body = bytearray()
        self._rest: Iterator[bytes] = iter(())
        self._delay_s = 0.0
        self._due = 0.0  # of the next piece, on the loop's clock
        self._timer: asyncio.Handle | None = None
        self._paused = False
        self._transport: asyncio.Transport | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast("asyncio.Transport", transport)  # uvloop's is one without being a subclass

    def connection_lost(self, exc: Exception | None) -> None:  # noqa: ARG002 - asyncio.Protocol's signature
        self._transport = None
        if self._timer is not None:
            self._timer.cancel()

    def data_received(self, data: bytes) -> None:
        try:
            self._parser.feed_data(data)
        except httptools.HttpParserError as error:
            self._answer(_refusal(b"400 Bad Request", str(error)))

    def on_body(self, body: bytes) -> None:
        self._body += body

    def on_message_complete(self) -> None:
        body, self._body = self._body, bytearray()
        try:
            request = orjson.loads(body)
            tokens, delay_s = parse_model(request["model"])
        except (ValueError, KeyError, TypeError) as error:
            self._answer(_refusal(b"404 Not Found", str(error)))
            return
        with_usage = (request.get("stream_options") or {}).get("include_usage") is True
        self._answer(_HEAD + _chunk(_completion({"role": "assistant", "content": ""})))
        self._rest = itertools.chain(_token_chunks(tokens), (_tail(tokens, with_usage=with_usage),))
        self._delay_s = delay_s
        self._due = self._loop.time() + delay_s * next(self._phases)
        self._schedule()

    def pause_writing(self) -> None:
        self._paused = True

    def resume_writing(self) -> None:
        self._paused = False
        self._schedule()

    def _answer(self, data: bytes) -> None:
        if self._transport is not None:
            self._transport.write(data)

    def _schedule(self) -> None:
        self._timer = (
            self._loop.call_at(self._due, self._write_next) if self._delay_s else self._loop.call_soon(self._write_next)
        )

    def _write_next(self) -> None:
        self._timer = None
        piece = next(self._rest, None)
        if piece is None or self._transport is None:
            return
        self._due += self._delay_s
        self._transport.write(piece)
        if not self._paused:
            self._schedule()


async def serve(announce: Callable[[int], None], until_closed: Callable[[], object]) -> None:
    """Serve on a free port, which `announce` is told, until `until_closed`, called in a thread, returns."""
    loop = asyncio.get_running_loop()
    phases = (index * _STEP % 1 for index in itertools.count())
    server = await loop.create_server(partial(Connection, loop, phases), "127.0.0.1", 0, backlog=BACKLOG)
    async with server:
        announce(server.sockets[0].getsockname()[1])
        await asyncio.to_thread(until_closed)


def main() -> None:
    with contextlib.suppress(KeyboardInterrupt):
        uvloop.run(serve(partial(print, flush=True), sys.stdin.read))


if __name__ == "__main__":
    main()
