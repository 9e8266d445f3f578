"""The event bus, contract by contract: windows, doorbells, coming and going."""

from collections.abc import AsyncIterator

import pytest
import trio
import trio.testing

from bamboo.bus.event_bus import EventBus
from bamboo.bus.topic import Doorbell, Window
from bamboo.core.events import (
    AgentMessage,
    AgentToolComplete,
    Event,
    Gap,
    Outage,
    SessionClosed,
    UserMessage,
    event_bytes,
)
from bamboo.core.types import (
    Cursor,
    Epoch,
    ImagePart,
    MessageId,
    RunId,
    TextPart,
    ToolCall,
    ToolCallId,
    text_content,
)
from bamboo.errors import StoreError
from tests.support.bus_world import (
    OTHER,
    RUN,
    SESSION,
    TINY_WINDOW,
    World,
    Writer,
    complete,
    real_bus,
    rung,
    seqs,
    stored,
    take_all,
    token,
)

E1, E2 = Epoch("e1"), Epoch("e2")
OTHER_RUN = RunId("other run")
TOKEN_BYTES = event_bytes(token())


@pytest.fixture
async def world() -> AsyncIterator[World]:
    """Everything in a test is done within five seconds."""
    with trio.fail_after(5):
        yield World()


# The window


def window_of(max_bytes: int) -> tuple[EventBus, Window]:
    bus = real_bus(World().logs, max_bytes)
    return bus, bus.open_window(SESSION, E1, 0, first_seq=1)


def publish(window: Window, times: int) -> None:
    for _ in range(times):
        window.publish(Event(SESSION, window.epoch, window.head + 1, 0, RUN, token()))


def test_window_never_drops_what_is_not_durable() -> None:
    _, window = window_of(TINY_WINDOW)
    publish(window, 10)
    assert seqs(window.after(0)) == list(range(1, 11))

    window.mark_durable(4)
    assert window.after(3) is None
    assert seqs(window.after(4)) == list(range(5, 11))


def test_window_keeps_the_newest_durable_events_within_its_bytes() -> None:
    _, window = window_of(3 * TOKEN_BYTES)
    publish(window, 10)
    window.mark_durable(10)
    assert (window.first_seq, seqs(window.after(7))) == (8, [8, 9, 10])


def test_window_keeps_its_newest_event_however_big_it_is() -> None:
    _, window = window_of(TINY_WINDOW)
    publish(window, 2)
    window.mark_durable(2)
    assert seqs(window.after(1)) == [2]
    assert window.after(2) == []


def test_pending_bytes_are_what_is_not_durable() -> None:
    _, window = window_of(2 * TOKEN_BYTES)
    pending = []
    publish(window, 3)
    pending.append(window.pending_bytes)
    window.mark_durable(1)
    pending.append(window.pending_bytes)
    publish(window, 2)
    pending.append(window.pending_bytes)
    window.mark_durable(1)
    pending.append(window.pending_bytes)
    window.mark_durable(5)
    pending.append(window.pending_bytes)
    assert [count / TOKEN_BYTES for count in pending] == [3, 2, 4, 4, 0]


@pytest.mark.parametrize("seq", [1, 4])
def test_nothing_is_durable_that_was_not_published_and_nothing_stops_being_durable(seq: int) -> None:
    _, window = window_of(TINY_WINDOW)
    publish(window, 3)
    window.mark_durable(2)
    with pytest.raises(AssertionError):
        window.mark_durable(seq)


@pytest.mark.parametrize("seq", [1, 3])
def test_log_with_a_hole_or_a_seq_given_twice_is_refused(seq: int) -> None:
    _, window = window_of(TINY_WINDOW)
    publish(window, 1)
    with pytest.raises(AssertionError):
        window.publish(Event(SESSION, E1, seq, 0, RUN, token()))


def test_session_has_one_window_that_is_closed_once() -> None:
    bus, window = window_of(TINY_WINDOW)
    with pytest.raises(AssertionError):
        bus.open_window(SESSION, E1, 0, first_seq=1)
    window.close()
    with pytest.raises(AssertionError):
        window.close()
    assert (bus.sessions, bus.subscriptions) == (0, 0)


async def test_reader_that_stalls_costs_a_cursor_and_gets_everything_in_the_end() -> None:
    """Fifty thousand events behind, it holds no more than when it came, nor does the window; then it catches up."""
    with trio.fail_after(60):
        world = World(window_bytes=100 * TOKEN_BYTES, page_events=1_000)
        await world.writer.open()
        with world.bus.subscribe(SESSION) as stalled:
            await stalled.begin(None)
            doorbell = stalled.doorbell
            for _ in range(1_000):
                world.writer.publish(*[token()] * 50)
                await world.writer.flush()
                assert world.writer.window.head - world.writer.window.first_seq < 100
            assert doorbell._receive.statistics().current_buffer_used == 1
            assert [getattr(stalled, name) for name in ("_gap", "_until", "seq")] == [None, None, 0]

            await world.writer.commit(complete())
            assert seqs(await take_all(stalled)) == list(range(1, 50_002))


@pytest.mark.parametrize(
    ("body", "text"),
    [
        (token("x" * 1_000), 1_000),
        (UserMessage(MessageId("m"), (TextPart("x" * 500), ImagePart("x" * 500))), 1_000),
        (AgentMessage(MessageId("m"), text_content("x" * 1_000), "p", "m"), 1_000),
        (
            AgentMessage(MessageId("m"), (), "p", "m", tool_calls=(ToolCall(ToolCallId("t"), "t", "x" * 1_000),)),
            1_000,
        ),
        (AgentToolComplete(MessageId("m"), ToolCallId("t"), "t", ok=True, result="x" * 1_000, elapsed_ms=1), 1_000),
        (SessionClosed(), 0),
    ],
)
def test_event_counts_with_its_text_and_a_little_more(body: object, text: int) -> None:
    assert text < event_bytes(body) <= text + 700  # type: ignore[arg-type]


# Doorbells


async def test_doorbell_that_was_rung_while_nobody_waited_rings_once() -> None:
    with trio.fail_after(5):
        doorbell = Doorbell()
        doorbell.ring()
        doorbell.ring()
        assert await rung(doorbell)
        assert not await rung(doorbell)
        doorbell.ring()
        assert await rung(doorbell)


async def test_closed_doorbell_may_be_rung_and_closed_again() -> None:
    await trio.lowlevel.checkpoint()
    doorbell = Doorbell()
    doorbell.close()
    doorbell.ring()
    doorbell.close()


class CountingDoorbell(Doorbell):
    __slots__ = ("rings",)

    def __init__(self) -> None:
        super().__init__()
        self.rings = 0

    def ring(self) -> None:
        self.rings += 1
        super().ring()


async def test_publish_rings_nobody_but_its_own_sessions_subscribers(world: World) -> None:
    doorbells = [CountingDoorbell() for _ in range(50)]
    mine = CountingDoorbell()
    others = [world.bus.subscribe(OTHER, doorbell=doorbell) for doorbell in doorbells]
    await world.writer.open()
    with world.bus.subscribe(SESSION, doorbell=mine):
        for _ in range(10):
            world.writer.publish(token())
            await mine.wait()
    assert mine.rings == 10
    assert sum(doorbell.rings for doorbell in doorbells) == 0
    for subscription in others:
        subscription.close()
    await world.writer.evict()
    world.check_empty()


async def test_subscriber_that_is_awake_is_rung_once_for_a_burst(world: World) -> None:
    await world.writer.open()
    doorbell = CountingDoorbell()
    with world.bus.subscribe(SESSION, doorbell=doorbell):
        world.writer.publish(*[token()] * 8)
        assert doorbell.rings == 1


async def test_reader_with_a_shared_doorbell_is_rung_when_the_store_has_more_behind_a_gap(world: World) -> None:
    await stored(world, 1)
    doorbell = Doorbell()
    with world.bus.subscribe(SESSION, doorbell=doorbell) as subscription:
        await subscription.begin(Cursor(Epoch("restored"), 1))
        assert subscription.take_nowait() == [Gap(SESSION, None, None, "epoch", Cursor(E1, 0))]
        assert await rung(doorbell)
        assert seqs(await take_all(subscription)) == [1]
    doorbell.close()


async def test_ring_of_a_shared_doorbell_cannot_be_taken_by_one_subscription(world: World) -> None:
    doorbell = Doorbell()
    with world.bus.subscribe(SESSION, doorbell=doorbell) as subscription:
        with pytest.raises(AssertionError):
            await subscription.receive()
        subscription.close()
        doorbell.ring()
        assert await rung(doorbell), "closing a subscription leaves a shared doorbell alone"


# Receiving


async def test_receive_sleeps_until_there_is_something_for_this_reader(world: World) -> None:
    await world.writer.open()
    received: list[int] = []

    async def read() -> None:
        with world.bus.subscribe(SESSION, run_id=RUN) as subscription:
            subscription.begin_at(0)
            received.extend(seqs(await subscription.receive()))

    async with trio.open_nursery() as nursery:
        nursery.start_soon(read)
        await trio.testing.wait_all_tasks_blocked()
        world.writer.publish(token("other"), run_id=OTHER_RUN)
        await trio.testing.wait_all_tasks_blocked()
        assert received == []
        world.writer.publish(token())
    assert received == [2]


async def test_receive_is_a_checkpoint_that_takes_nothing_when_it_is_cancelled(world: World) -> None:
    await world.writer.open()
    world.writer.publish(token())
    with world.bus.subscribe(SESSION) as subscription:
        subscription.begin_at(0)
        with trio.CancelScope() as scope:
            scope.cancel()
            await subscription.receive()
        assert scope.cancelled_caught
        with trio.testing.assert_checkpoints():
            assert seqs(await subscription.receive()) == [1]
        subscription.ended = True
        with trio.testing.assert_checkpoints():
            assert await subscription.receive() == []


async def test_receive_lets_the_others_run_even_if_there_is_always_more(world: World) -> None:
    await world.writer.open()
    with world.bus.subscribe(SESSION) as subscription:
        subscription.begin_at(0)
        order: list[str] = []

        async def other() -> None:
            await trio.lowlevel.checkpoint()
            order.append("other")

        async with trio.open_nursery() as nursery:
            nursery.start_soon(other)
            for _ in range(5):
                world.writer.publish(token())
                await subscription.receive()
            order.append("reader")
        assert order == ["other", "reader"]


async def test_nothing_is_lost_when_the_store_fails_in_mid_stream(world: World) -> None:
    await stored(world, 3)
    with world.bus.subscribe(SESSION) as subscription:
        await subscription.begin(Cursor(E1, 0))
        assert seqs(await subscription.receive()) == [1, 2]
        world.logs.failures = 1
        with pytest.raises(StoreError):
            await subscription.receive()
        assert await subscription.receive() == [Outage(SESSION, "the disk is on fire", 1.0)]
        assert seqs(await subscription.receive()) == [3]


async def test_reader_is_moved_from_the_store_to_the_window_without_reading_twice(world: World) -> None:
    await stored(world, 2)
    with world.bus.subscribe(SESSION) as subscription:
        await subscription.begin(Cursor(E1, 0))
        assert subscription.take_nowait() is None
        assert seqs(await subscription.fetch()) == [1, 2]
        await world.writer.open()
        reads = world.logs.reads
        with trio.testing.assert_checkpoints():
            assert await subscription.fetch() == []
        world.writer.publish(token("3"))
        assert seqs(subscription.take_nowait()) == [3]
        assert world.logs.reads == reads


# Coming and going


async def test_nothing_is_left_when_everybody_has_left_in_whatever_order(world: World) -> None:
    subscription = world.bus.subscribe(SESSION)
    await world.writer.open()
    assert (world.bus.sessions, world.bus.subscriptions) == (1, 1)
    subscription.close()
    subscription.close()
    assert (world.bus.sessions, world.bus.subscriptions) == (1, 0)
    world.writer.window.close()
    world.check_empty()

    second = Writer(world.bus, world.logs)
    await second.open()
    with world.bus.subscribe(SESSION):
        second.window.close()
        assert (world.bus.sessions, world.bus.subscriptions) == (1, 1)
    world.check_empty()


async def test_subscription_that_was_closed_has_nothing_more(world: World) -> None:
    await world.writer.open()
    with world.bus.subscribe(SESSION) as subscription:
        subscription.begin_at(0)
    world.writer.publish(token())
    assert await subscription.receive() == []


async def test_attendance_is_waited_for_both_ways(world: World) -> None:
    await world.writer.open()
    window = world.writer.window
    seen: list[str] = []

    async def watch() -> None:
        await window.wait_attendance(attended=True)
        seen.append("somebody")
        await window.wait_attendance(attended=False)
        seen.append("nobody")
        await window.wait_attendance(attended=True)
        seen.append("somebody again")

    async def settled(expected: list[str]) -> None:
        await trio.testing.wait_all_tasks_blocked()
        assert seen == expected

    async with trio.open_nursery() as nursery:
        nursery.start_soon(watch)
        await settled([])
        first, second = world.bus.subscribe(SESSION), world.bus.subscribe(SESSION)
        await settled(["somebody"])
        first.close()
        first.close()
        await settled(["somebody"])
        second.close()
        await settled(["somebody", "nobody"])
        with world.bus.subscribe(SESSION):
            await settled(["somebody", "nobody", "somebody again"])


async def test_attendance_that_is_as_asked_for_is_only_a_checkpoint(world: World) -> None:
    await world.writer.open()
    with trio.testing.assert_checkpoints():
        await world.writer.window.wait_attendance(attended=False)


def test_everything_says_what_it_is() -> None:
    bus, window = window_of(TINY_WINDOW)
    subscription = bus.subscribe(SESSION)
    publish(window, 1)
    assert repr(bus) == "<EventBus 1 sessions, 1 subscriptions>"
    assert repr(window) == "<Window session e1 1..1 durable 0>"
    assert repr(subscription) == "<Subscription session after 0>"
    subscription.close()
    assert repr(subscription) == "<Subscription session after 0 ended>"
