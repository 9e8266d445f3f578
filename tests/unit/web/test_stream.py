"""An SSE response's body, asked for its chunks by hand: no sockets, the clock is the test's."""

from collections.abc import Callable

import pytest
import trio
import trio.testing
from trio.testing import MockClock

from bamboo.bus.event_bus import EventBus
from bamboo.bus.log_reader import LogExtent, LogPage
from bamboo.bus.topic import Window
from bamboo.core.events import AgentComplete, AgentToken, Event, EventBody
from bamboo.core.types import Epoch, EpochStart, RunId, RunStats, SessionId
from bamboo.errors import StoreError
from bamboo.web.stream import EventStream, OpenStreams
from bamboo.wire import sse

SESSION, RUN, EPOCH = SessionId("s1"), RunId("r1"), Epoch("e")
END = AgentComplete("stop", None, RunStats(0, 0, 0))


class Log:
    """A log of which the store has everything; it fails on demand."""

    def __init__(self, *events: Event) -> None:
        self.events = events
        self.fails = False

    async def extent(self, session_id: SessionId) -> LogExtent | None:
        await trio.lowlevel.checkpoint()
        assert session_id == SESSION
        return LogExtent((EpochStart(EPOCH, 1),), 0, len(self.events))

    async def read(
        self, session_id: SessionId, after_seq: int, *, max_bytes: int, run_id: RunId | None = None
    ) -> LogPage | None:
        await trio.lowlevel.checkpoint()
        if self.fails:
            raise StoreError("the disk is gone")
        assert max_bytes > 0
        extent = await self.extent(session_id)
        assert extent is not None
        events = [event for event in self.events[after_seq:] if run_id in (None, event.run_id)]
        return LogPage(extent, events, len(self.events))


def event(seq: int, body: EventBody) -> Event:
    return Event(SESSION, EPOCH, seq, 0, RUN, body)


def live(*tokens: str) -> tuple[EventBus, Window, Callable[[EventBody], None]]:
    """A session with a window, and how to publish in it."""
    bus = EventBus(Log(), window_bytes=100_000)
    window = bus.open_window(SESSION, EPOCH, 0, first_seq=1)

    def publish(body: EventBody) -> None:
        window.publish(event(window.head + 1, body))

    for token in tokens:
        publish(AgentToken(token))
    return bus, window, publish


async def test_the_first_chunk_tells_the_reconnection_time_whether_there_is_something_or_not() -> None:
    bus, _, publish = live()
    with bus.subscribe(SESSION) as subscription:
        stream = EventStream(subscription, keep_alive_s=15)
        assert await anext(stream) == sse.PREAMBLE
        publish(AgentToken("a"))
        assert (await anext(stream)).startswith(b"id: e.1\ndata: {")
    with bus.subscribe(SESSION) as subscription:
        assert (await anext(EventStream(subscription, keep_alive_s=15))).startswith(sse.PREAMBLE + b"id: e.1\ndata: {")


async def test_everything_that_is_pending_is_one_chunk() -> None:
    bus, _, publish = live("a", "b")
    with bus.subscribe(SESSION) as subscription:
        stream = EventStream(subscription, keep_alive_s=15)
        assert (await anext(stream)).count(b"id: ") == 2
        publish(AgentToken("line\nbreak"))
        publish(AgentToken("d"))
        chunk = await anext(stream)
        assert chunk.count(b"\n\n") == 2
        assert b'"token":"line\\nbreak"' in chunk


async def test_a_stream_ends_after_the_last_event_of_its_run() -> None:
    bus, window, publish = live("a")
    with bus.subscribe(SESSION, run_id=RUN) as subscription:
        stream = EventStream(subscription, keep_alive_s=15)
        publish(END)
        window.publish(Event(SESSION, EPOCH, 3, 0, RunId("another"), AgentToken("b")))
        chunk = await anext(stream)
        assert b"agent_complete" in chunk
        assert b"another" not in chunk
        with pytest.raises(StopAsyncIteration):
            await anext(stream)


async def test_a_comment_comes_after_each_silence_and_only_then(autojump_clock: MockClock) -> None:
    assert autojump_clock.autojump_threshold == 0
    bus, _, publish = live()
    with bus.subscribe(SESSION) as subscription:
        stream = EventStream(subscription, keep_alive_s=15)
        await anext(stream)
        for _ in range(2):
            begun = trio.current_time()
            assert await anext(stream) == sse.KEEP_ALIVE
            assert trio.current_time() - begun == 15
        async with trio.open_nursery() as nursery:

            async def speak() -> None:
                await trio.sleep(14)
                publish(AgentToken("a"))

            nursery.start_soon(speak)
            assert b"agent_token" in await anext(stream)


async def test_ending_soon_wakes_a_silent_stream_and_cuts_off_nothing_pending() -> None:
    bus, _, publish = live()
    streams = OpenStreams()
    with bus.subscribe(SESSION) as silent, bus.subscribe(SESSION) as behind, trio.fail_after(5):
        one, two = EventStream(silent, keep_alive_s=15), EventStream(behind, keep_alive_s=15)
        with streams.joined(one), streams.joined(two):
            await anext(one)
            await anext(two)

            async def wait_for_end() -> None:
                with pytest.raises(StopAsyncIteration):
                    await anext(one)

            async with trio.open_nursery() as nursery:
                nursery.start_soon(wait_for_end)
                await trio.testing.wait_all_tasks_blocked()
                streams.end_all()
            publish(AgentToken("a"))
            assert b"agent_token" in await anext(two)
            with pytest.raises(StopAsyncIteration):
                await anext(two)
        assert len(streams) == 0
        with bus.subscribe(SESSION) as late:
            three = EventStream(late, keep_alive_s=15)
            with streams.joined(three):
                assert b"agent_token" in await anext(three)
                with pytest.raises(StopAsyncIteration):
                    await anext(three)


async def test_an_outage_is_told_once_then_kept_alive_and_nothing_is_lost(autojump_clock: MockClock) -> None:
    assert autojump_clock.autojump_threshold == 0
    log = Log(event(1, AgentToken("a")), event(2, END))
    log.fails = True
    bus = EventBus(log, window_bytes=1024)
    with bus.subscribe(SESSION, run_id=RUN) as subscription:
        stream = EventStream(subscription, keep_alive_s=15)
        chunk = await anext(stream)
        assert chunk.startswith(sse.PREAMBLE + b'data: {"type":"error","code":"store_unavailable"')
        assert b"id:" not in chunk
        assert await anext(stream) == sse.KEEP_ALIVE
        assert trio.current_time() >= 15
        log.fails = False
        assert (await anext(stream)).count(b"id: ") == 2
        with pytest.raises(StopAsyncIteration):
            await anext(stream)


async def test_an_outage_of_the_sessions_writer_is_a_frame_without_an_id_and_the_stream_goes_on() -> None:
    bus, window, publish = live("a")
    with bus.subscribe(SESSION, run_id=RUN) as subscription, trio.fail_after(5):
        stream = EventStream(subscription, keep_alive_s=15)
        await anext(stream)
        async with trio.open_nursery() as nursery:

            async def fail() -> None:
                await trio.testing.wait_all_tasks_blocked()
                window.begin_outage(StoreError("the disk is full"))

            nursery.start_soon(fail)
            chunk = await anext(stream)
        assert chunk == (
            b'data: {"type":"error","code":"store_unavailable","message":"the disk is full","retryable":true,'
            b'"retry_after_ms":1000,"session_id":"s1"}\n\n'
        )
        window.end_outage()
        publish(END)
        assert (await anext(stream)).startswith(b"id: e.2\ndata: {")


async def test_an_outage_that_the_writer_told_of_is_not_told_again_by_a_read_that_fails(
    autojump_clock: MockClock,
) -> None:
    assert autojump_clock.autojump_threshold == 0
    log = Log(event(1, AgentToken("a")), event(2, END))
    log.fails = True
    bus = EventBus(log, window_bytes=1024)
    window = bus.open_window(SESSION, EPOCH, 2, first_seq=1)
    with bus.subscribe(SESSION, run_id=RUN) as subscription:
        window.begin_outage(StoreError("the disk is full"))
        stream = EventStream(subscription, keep_alive_s=15)
        assert b"the disk is full" in await anext(stream)
        began = trio.current_time()
        for _ in range(3):
            assert await anext(stream) == sse.KEEP_ALIVE
        assert 45 <= trio.current_time() - began <= 50
        log.fails = False
        assert (await anext(stream)).count(b"id: ") == 2


async def test_a_stream_that_cannot_read_still_ends_soon(autojump_clock: MockClock) -> None:
    assert autojump_clock.autojump_threshold == 0
    log = Log(event(1, AgentToken("a")))
    log.fails = True
    with EventBus(log, window_bytes=1024).subscribe(SESSION) as subscription:
        stream = EventStream(subscription, keep_alive_s=15)
        assert b"the disk is gone" in await anext(stream)
        stream.end_soon()
        with pytest.raises(StopAsyncIteration):
            await anext(stream)
        assert trio.current_time() == 0


async def test_a_chunk_that_is_cancelled_is_not_lost() -> None:
    bus, _, publish = live()
    with bus.subscribe(SESSION) as subscription:
        stream = EventStream(subscription, keep_alive_s=15)
        await anext(stream)
        with trio.move_on_after(0):
            await anext(stream)
        publish(AgentToken("a"))
        with trio.CancelScope() as scope:
            scope.cancel()
            chunk = await anext(stream)
            await trio.lowlevel.checkpoint()
        assert b"agent_token" in chunk
