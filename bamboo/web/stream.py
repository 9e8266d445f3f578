"""One SSE response: a subscription's events as server-sent events."""

from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager
from types import TracebackType
from typing import Final, Self

import trio
from quart.wrappers.response import ResponseBody

from bamboo.bus.subscription import Subscription
from bamboo.core.events import Event, Item, Outage
from bamboo.errors import StoreError
from bamboo.wire import sse
from bamboo.wire.encode import event_json, item_json

HEADERS: Final = {
    "Content-Type": "text/event-stream; charset=utf-8",
    "Cache-Control": "no-store, no-transform",
    "X-Accel-Buffering": "no",
}
"""Of every SSE response: nothing on the way may store, compress or hold it back."""

OUTAGE_RETRY_S: Final = 1.0
"""How long a stream that cannot read from the store waits before it tries again."""


class EventStream(ResponseBody):
    """An SSE response's body. Iterating gives everything that is pending as one chunk, a comment after `keep_alive_s`
    of silence.

    It ends after the subscription's last event, or, once `end_soon` was called, after what is pending. An outage of the
    store is an `error` frame without an id; the stream goes on from its place when the store is back. It owns no task
    and no scope while it waits to be asked, and does not close the subscription: whoever opened that closes it.
    """

    def __init__(self, subscription: Subscription, *, keep_alive_s: float) -> None:
        self._subscription = subscription
        self._keep_alive_s = keep_alive_s
        self._ending = False
        self._preamble = sse.PREAMBLE
        self._unread_since: float | None = None
        """When a read from the store failed, or the last comment after it; None while reading works."""

    def end_soon(self) -> None:
        """End after what is pending. Idempotent."""
        self._ending = True
        self._subscription.doorbell.ring()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, exc_type: type[BaseException] | None, exc_value: BaseException | None, tb: TracebackType | None
    ) -> None:
        return None

    def __aiter__(self) -> AsyncIterator[bytes]:
        return self

    async def __anext__(self) -> bytes:
        """The next chunk. If cancelled, nothing was taken from the subscription."""
        chunk = await self._next_chunk()
        if self._preamble:
            chunk = self._preamble + chunk
            self._preamble = b""
        return chunk

    async def _next_chunk(self) -> bytes:
        subscription = self._subscription
        while True:
            items = subscription.take_nowait()
            if items is None:
                try:
                    items = await subscription.fetch()
                except StoreError:
                    items = subscription.take_nowait()  # the outage, unless that was told before
                    if items is None and await self._rest():
                        return sse.KEEP_ALIVE
                else:
                    self._unread_since = None
                if not items:
                    continue
            if items:
                return b"".join([_encode(item) for item in items])
            if self._preamble:
                return b""  # it goes out alone, at once: the answer's head is waited for
            if subscription.ended or self._ending:
                raise StopAsyncIteration
            with trio.move_on_after(self._keep_alive_s) as silence:
                await subscription.doorbell.wait()
            if silence.cancelled_caught:
                return sse.KEEP_ALIVE

    async def _rest(self) -> bool:
        """Wait before the next events, which could not be read, are asked for again. True: a comment is due
        instead."""
        if self._ending:
            raise StopAsyncIteration
        now = trio.current_time()
        if self._unread_since is None:
            self._unread_since = now
        if now - self._unread_since >= self._keep_alive_s:
            self._unread_since = now
            return True
        await trio.sleep(OUTAGE_RETRY_S)
        return False


def _encode(item: Item) -> bytes:
    if isinstance(item, Event):  # nearly all are
        return sse.event(item.cursor, event_json(item))
    data = item_json(item)
    return sse.frame(data) if isinstance(item, Outage) else sse.event(item.cursor, data)


class OpenStreams:
    """The SSE responses that are open, so that they can be ended when the server closes."""

    def __init__(self) -> None:
        self._streams: set[EventStream] = set()
        self._ending = False

    def __len__(self) -> int:
        return len(self._streams)

    @contextmanager
    def joined(self, stream: EventStream) -> Iterator[EventStream]:
        """`stream` is one of the open ones for as long as this is."""
        self._streams.add(stream)
        if self._ending:
            stream.end_soon()
        try:
            yield stream
        finally:
            self._streams.discard(stream)

    def end_all(self) -> None:
        """End each after what is pending, and every later one too."""
        self._ending = True
        for stream in self._streams:
            stream.end_soon()
