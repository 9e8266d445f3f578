"""The client over SSE: per chat one connection and one `POST /api/v1/chat` with `Accept: text/event-stream`."""

import asyncio
import time

import httptools
import orjson

from benchmarks.client import ChatRecord, DeliveryError, main
from benchmarks.load import Load


class SseChat(asyncio.Protocol):
    """A ChatConnection that reads one chunked `text/event-stream`."""

    def __init__(self, host: str, port: int, load: Load) -> None:
        self.record = ChatRecord(load.tokens)
        self._host = host
        self._port = port
        self._model = load.model
        self._parser = httptools.HttpResponseParser(self)
        self._rest = b""
        self._transport: asyncio.Transport | None = None
        self._ended: asyncio.Future[None] | None = None

    async def connect(self) -> None:
        loop = asyncio.get_running_loop()
        self._ended = loop.create_future()
        self._transport, _ = await loop.create_connection(lambda: self, self._host, self._port)

    def send_chat(self) -> None:
        assert self._transport is not None
        body = orjson.dumps({"message": "Tell me a story.", "model": self._model})
        head = (
            f"POST /api/v1/chat HTTP/1.1\r\nHost: {self._host}:{self._port}\r\nAccept: text/event-stream\r\n"
            f"Content-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
        )
        self.record.sent_s = time.monotonic()
        self._transport.write(head.encode() + body)

    async def wait_delivered(self) -> None:
        assert self._ended is not None
        await self._ended

    async def close(self) -> None:
        assert self._transport is not None
        self._transport.close()

    def data_received(self, data: bytes) -> None:
        try:
            self._parser.feed_data(data)
        except httptools.HttpParserError as error:
            # An exception of a callback of ours comes as the context of the parser's own.
            self._fail(error.__context__ if isinstance(error.__context__, DeliveryError) else DeliveryError(str(error)))

    def connection_lost(self, exc: Exception | None) -> None:
        self._fail(exc or DeliveryError("the server closed the connection in the middle of the stream"))

    def on_body(self, body: bytes) -> None:
        status = self._parser.get_status_code()
        if status != 200:
            raise DeliveryError(f"status {status}: {body[:300]!r}")
        now_s = time.monotonic()
        *events, self._rest = (self._rest + body).split(b"\n\n")
        for event in events:
            for line in event.split(b"\n"):
                if line.startswith(b"data: "):
                    self.record.feed(line[6:], now_s)

    def on_message_complete(self) -> None:
        if not self.record.complete:
            raise DeliveryError(f"the stream ended after {self.record.tokens} tokens without a terminal event")
        if self._ended is not None and not self._ended.done():
            self._ended.set_result(None)

    def _fail(self, error: BaseException) -> None:
        if self._ended is not None and not self._ended.done():
            self._ended.set_exception(error)
            self._ended.exception()  # seen: who waits for it raises it, and nobody may be waiting yet


if __name__ == "__main__":
    main(SseChat)
