"""The event bus while the store fails: every reader is told once, whoever noticed it, and loses nothing."""

from collections.abc import AsyncIterator

import pytest
import trio
import trio.testing

from bamboo.bus.subscription import READ_TIMEOUT_S, Subscription
from bamboo.bus.topic import Window
from bamboo.core.events import Event, Gap, Item, Outage
from bamboo.core.types import Cursor, Epoch, RunId, SessionId
from bamboo.errors import StoreError
from tests.support.bus_world import (
    OTHER,
    RUN,
    SESSION,
    TINY_WINDOW,
    World,
    Writer,
    complete,
    rung,
    seqs,
    started,
    stored,
    token,
)

START = Cursor(Epoch("e1"), 0)
FULL = StoreError("the disk is full", retry_after_s=3.0)
TOLD = Outage(SESSION, "the disk is full", 3.0)
UNREADABLE = Outage(SESSION, "the disk is on fire", 1.0)


@pytest.fixture
async def world() -> AsyncIterator[World]:
    """Everything in a test is done within five seconds."""
    with trio.fail_after(5):
        yield World()


async def behind(world: World) -> tuple[Subscription, Window]:
    """A reader of a session with a tiny window that begins at its start: two events are in the store only."""
    await world.writer.open()
    world.writer.publish(token("1"), token("2"))
    await world.writer.flush()
    world.writer.publish(token("3"))
    await world.writer.flush()
    subscription = world.bus.subscribe(SESSION)
    await subscription.begin(START)
    return subscription, world.writer.window


async def failed_read(subscription: Subscription) -> list[Item] | None:
    """What there is to hand out when a read from the store has failed."""
    assert subscription.take_nowait() is None
    with pytest.raises(StoreError):
        await subscription.fetch()
    return subscription.take_nowait()


def items_of(items: list[Item] | None) -> list[int | str]:
    """Seqs of events, and the kind of everything else."""
    assert items is not None
    return [item.seq if isinstance(item, Event) else type(item).__name__ for item in items]


async def test_each_reader_is_woken_by_an_outage_and_told_once(world: World) -> None:
    await world.writer.open()
    readers = [world.bus.subscribe(SESSION) for _ in range(3)]
    for reader in readers:
        await reader.begin(START)
    world.writer.window.begin_outage(FULL)
    world.writer.window.begin_outage(StoreError("still"))
    for reader in readers:
        assert await rung(reader.doorbell)
        assert reader.take_nowait() == [TOLD]
        assert reader.take_nowait() == []


async def test_deltas_still_come_in_an_outage_and_behind_the_news_of_it(world: World) -> None:
    await world.writer.open()
    with world.bus.subscribe(SESSION) as subscription:
        await subscription.begin(START)
        world.writer.publish(token())
        world.writer.window.begin_outage(FULL)
        assert items_of(subscription.take_nowait()) == ["Outage", 1]
        world.writer.publish(token())
        assert items_of(subscription.take_nowait()) == [2]


async def test_next_outage_is_told_anew(world: World) -> None:
    await world.writer.open()
    with world.bus.subscribe(SESSION) as subscription:
        await subscription.begin(START)
        for message in ("one", "two"):
            world.writer.window.begin_outage(StoreError(message))
            assert subscription.take_nowait() == [Outage(SESSION, message, 1.0)]
            world.writer.window.end_outage()
            assert subscription.take_nowait() == []


async def test_outage_that_is_over_when_the_reader_looks_is_no_news(world: World) -> None:
    await world.writer.open()
    with world.bus.subscribe(SESSION) as subscription:
        await subscription.begin(START)
        world.writer.window.begin_outage(FULL)
        world.writer.window.end_outage()
        world.writer.window.end_outage()
        assert subscription.take_nowait() == []


async def test_reader_that_comes_in_an_outage_is_told_too(world: World) -> None:
    await stored(world, 2)
    await world.writer.open()
    world.writer.window.begin_outage(FULL)
    with world.bus.subscribe(SESSION) as subscription:
        await subscription.begin(START)
        assert await subscription.receive() == [TOLD]
        assert seqs(await subscription.receive()) == [1, 2]


async def test_outage_of_one_session_is_none_of_anothers(world: World) -> None:
    other = Writer(world.bus, world.logs, OTHER)
    await world.writer.open()
    await other.open()
    with world.bus.subscribe(OTHER) as subscription:
        await subscription.begin(START)
        world.writer.window.begin_outage(FULL)
        assert not await rung(subscription.doorbell)
        assert subscription.take_nowait() == []


async def test_outage_outlives_a_writer_that_gives_up_and_ends_when_the_next_one_comes(world: World) -> None:
    await world.writer.open()
    await world.writer.commit(started())
    with world.bus.subscribe(SESSION) as first, world.bus.subscribe(SESSION) as second:
        for subscription in (first, second):
            await subscription.begin(START)
        world.writer.publish(token("lost"))
        world.writer.window.begin_outage(FULL)
        assert items_of(first.take_nowait()) == ["Outage", 1, 2]
        world.writer.give_up()
        with world.bus.subscribe(SESSION) as late:
            assert late.take_nowait() == [TOLD]
        await world.writer.open(new_epoch=True)
        assert first.take_nowait() == [Gap(SESSION, 2, 2, "crash", Cursor(Epoch("e2"), 1))]
        assert second.take_nowait() is None  # it took nothing in time: no news, no loss, and the log is in the store
        assert seqs(await second.fetch()) == [1]


async def test_store_that_fails_a_session_without_a_window_is_told_to_its_readers_only(world: World) -> None:
    world.bus.begin_outage(SESSION, FULL)
    assert world.bus.sessions == 0
    with world.bus.subscribe(SESSION) as subscription:
        world.bus.begin_outage(SESSION, FULL)
        assert subscription.take_nowait() == [TOLD]
        world.bus.begin_outage(SESSION, FULL)
        assert subscription.take_nowait() is None
    assert world.bus.sessions == 0


async def test_gap_comes_before_the_news_of_an_outage(world: World) -> None:
    await world.writer.open()
    await world.writer.commit(started())
    with world.bus.subscribe(SESSION) as subscription:
        await subscription.begin(Cursor(Epoch("elsewhere"), 7))
        world.writer.window.begin_outage(FULL)
        assert items_of(subscription.take_nowait()) == ["Gap", "Outage", 1]


async def test_reader_at_its_end_is_told_nothing(world: World) -> None:
    await world.writer.open()
    with world.bus.subscribe(SESSION, run_id=RUN) as subscription:
        await subscription.begin(START)
        await world.writer.commit(complete())
        assert seqs(subscription.take_nowait()) == [1]
        assert subscription.ended
        world.writer.window.begin_outage(FULL)
        assert subscription.take_nowait() == []


async def test_reader_whose_own_read_fails_is_told_once_and_reads_on_from_its_place() -> None:
    with trio.fail_after(5):
        world = World(window_bytes=TINY_WINDOW)
        subscription, _ = await behind(world)
        with subscription:
            world.logs.failures = 2
            assert await failed_read(subscription) == [UNREADABLE]
            assert await failed_read(subscription) is None
            assert seqs(await subscription.fetch()) == [1, 2]
            assert seqs(subscription.take_nowait()) == [3]


@pytest.mark.parametrize("writing_first", [True, False])
async def test_writer_and_read_that_fail_together_are_one_outage(*, writing_first: bool) -> None:
    with trio.fail_after(5):
        world = World(window_bytes=TINY_WINDOW)
        subscription, window = await behind(world)
        with subscription:
            world.logs.failing = True
            if writing_first:
                window.begin_outage(FULL)
                assert subscription.take_nowait() == [TOLD]
                assert await failed_read(subscription) is None
            else:
                assert await failed_read(subscription) == [UNREADABLE]
                window.begin_outage(FULL)
            assert await failed_read(subscription) is None
            window.end_outage()
            assert await failed_read(subscription) is None
            window.begin_outage(FULL)
            world.logs.failing = False
            assert subscription.take_nowait() is None
            assert seqs(await subscription.fetch()) == [1, 2]
            assert seqs(subscription.take_nowait()) == [3]
            window.end_outage()
            window.begin_outage(FULL)
            assert subscription.take_nowait() == [TOLD], "neither failed in between: this is another one"


async def test_reader_whose_read_failed_is_told_of_the_next_outage_though_a_window_has_saved_it(world: World) -> None:
    await stored(world, 2)
    with world.bus.subscribe(SESSION) as subscription:
        await subscription.begin(Cursor(Epoch("e1"), 2))
        world.logs.failures = 1
        assert await failed_read(subscription) == [UNREADABLE]
        await world.writer.open()
        world.writer.publish(token())
        assert seqs(subscription.take_nowait()) == [3]
        world.writer.window.begin_outage(FULL)
        assert subscription.take_nowait() == [TOLD]


async def test_store_that_does_not_answer_a_read_fails_it_in_time(autojump_clock: trio.testing.MockClock) -> None:
    world = World()
    await stored(world, 2)
    world.logs.hold = trio.Event()
    with world.bus.subscribe(SESSION) as subscription:
        with pytest.raises(StoreError):
            await subscription.begin(None)
        assert trio.current_time() == READ_TIMEOUT_S
        subscription.begin_at(0)
        assert await failed_read(subscription) == [Outage(SESSION, "the store did not answer in time", 1.0)]
        assert trio.current_time() == 2 * READ_TIMEOUT_S
        world.logs.hold.set()
        assert subscription.take_nowait() is None
        assert seqs(await subscription.fetch()) == [1, 2]
    assert autojump_clock.autojump_threshold == 0


async def test_readers_of_one_connection_are_told_for_each_session_that_fails(world: World) -> None:
    """One doorbell, two subscriptions: one ring, and each says which session it is."""
    other = Writer(world.bus, world.logs, SessionId("other"))
    await world.writer.open()
    await other.open()
    with world.bus.subscribe(SESSION) as first, world.bus.subscribe(OTHER, doorbell=first.doorbell) as second:
        for subscription in (first, second):
            await subscription.begin(START)
        world.writer.window.begin_outage(FULL)
        other.window.begin_outage(FULL)
        assert first.take_nowait() == [TOLD]
        assert second.take_nowait() == [Outage(OTHER, "the disk is full", 3.0)]


async def test_a_cancelled_read_neither_tells_nor_forgets_an_outage() -> None:
    with trio.fail_after(5):
        world = World(window_bytes=TINY_WINDOW)
        subscription, window = await behind(world)
        with subscription:
            window.begin_outage(FULL)
            with trio.CancelScope() as scope:
                scope.cancel()
                await subscription.receive()
            assert scope.cancelled_caught
            assert await subscription.receive() == [TOLD]
            with trio.CancelScope() as scope:
                scope.cancel()
                await subscription.receive()
            assert seqs(await subscription.receive()) == [1, 2]
            assert seqs(await subscription.receive()) == [3]


async def test_reader_of_one_run_is_told_of_its_sessions_outage(world: World) -> None:
    await world.writer.open()
    with world.bus.subscribe(SESSION, run_id=RunId("another run")) as subscription:
        await subscription.begin(START)
        world.writer.publish(token())
        world.writer.window.begin_outage(FULL)
        assert subscription.take_nowait() == [TOLD]
