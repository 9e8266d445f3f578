"""The event bus, contract by contract: what a subscription gets, from where to where."""

from collections.abc import AsyncIterator

import pytest
import trio
import trio.testing

from bamboo.core.events import Event, Gap, SessionClosed, event_bytes
from bamboo.core.types import (
    Cursor,
    Epoch,
    RunId,
)
from bamboo.errors import StoreError
from tests.support.bus_world import (
    RUN,
    SESSION,
    TINY_WINDOW,
    World,
    complete,
    gap_and_seqs,
    rung,
    seqs,
    started,
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


# Where a reader begins


@pytest.mark.parametrize("open_window", [True, False])
async def test_reader_with_a_cursor_gets_everything_behind_it(world: World, *, open_window: bool) -> None:
    await stored(world, 3)
    if open_window:
        await world.writer.open()
        world.writer.publish(token("4"))

    with world.bus.subscribe(SESSION) as subscription:
        assert await subscription.begin(Cursor(E1, 1)) == Cursor(E1, 1)
        assert seqs(await take_all(subscription)) == ([2, 3, 4] if open_window else [2, 3])


@pytest.mark.parametrize("open_window", [True, False])
async def test_reader_without_a_cursor_begins_at_the_end(world: World, *, open_window: bool) -> None:
    await stored(world, 3)
    if open_window:
        await world.writer.open()

    with world.bus.subscribe(SESSION) as subscription:
        assert await subscription.begin(None) == Cursor(E1, 3)
        assert await take_all(subscription) == []


async def test_reader_that_begins_in_an_old_epoch_reads_on_into_the_new_one(world: World) -> None:
    await stored(world, 2)
    await world.writer.open(new_epoch=True)
    world.writer.publish(token("3"))

    with world.bus.subscribe(SESSION) as subscription:
        assert await subscription.begin(Cursor(E1, 2)) == Cursor(E1, 2)
        (event,) = await take_all(subscription)
        assert event.cursor == Cursor(E2, 3)


async def test_session_that_is_not_stored_has_no_place_and_its_reader_gets_it_from_its_first_event(
    world: World,
) -> None:
    with world.bus.subscribe(SESSION) as subscription:
        assert await subscription.begin(None) is None
        assert await take_all(subscription) == []

        await world.writer.open()
        assert await take_all(subscription) == []
        world.writer.publish(token("1"), token("2"))
        assert seqs(await subscription.receive()) == [1, 2]


async def test_reader_that_asked_for_what_comes_from_now_on_sleeps_without_reading_again(world: World) -> None:
    await stored(world, 2)
    with world.bus.subscribe(SESSION) as subscription:
        await subscription.begin(None)
        await take_all(subscription)
        reads = world.logs.reads

        assert subscription.take_nowait() == []
        assert world.logs.reads == reads
        await world.writer.open()
        assert await rung(subscription.doorbell)


@pytest.mark.parametrize("open_window", [True, False])
async def test_cursor_beyond_the_head_is_a_crash_gap_that_names_what_died(world: World, *, open_window: bool) -> None:
    await stored(world, 2)
    if open_window:
        await world.writer.open()

    with world.bus.subscribe(SESSION) as subscription:
        assert await subscription.begin(Cursor(E1, 5)) == Cursor(E1, 2)
        assert await take_all(subscription) == [Gap(SESSION, 3, 5, "crash", Cursor(E1, 2))]


async def test_cursor_beyond_its_epochs_end_is_a_crash_gap_and_the_stream_goes_on_in_the_next(world: World) -> None:
    await stored(world, 2)
    await world.writer.open(new_epoch=True)
    await world.writer.commit(token("3"), token("4"))

    with world.bus.subscribe(SESSION) as subscription:
        assert await subscription.begin(Cursor(E1, 3)) == Cursor(E1, 2)
        assert await gap_and_seqs(subscription) == (Gap(SESSION, 3, 3, "crash", Cursor(E1, 2)), [3, 4])


async def test_cursor_of_another_log_is_an_epoch_gap_and_the_stream_begins_at_the_start(world: World) -> None:
    await stored(world, 3)
    with world.bus.subscribe(SESSION) as subscription:
        assert await subscription.begin(Cursor(Epoch("restored"), 2)) == Cursor(E1, 0)
        assert await gap_and_seqs(subscription) == (Gap(SESSION, None, None, "epoch", Cursor(E1, 0)), [1, 2, 3])


async def test_cursor_of_another_log_begins_behind_what_retention_removed(world: World) -> None:
    await stored(world, 3)
    world.writer.trim(2)
    with world.bus.subscribe(SESSION) as subscription:
        await subscription.begin(Cursor(Epoch("restored"), 1))
        assert await gap_and_seqs(subscription) == (Gap(SESSION, None, None, "epoch", Cursor(E1, 2)), [3])


async def test_event_that_is_committed_but_not_yet_published_is_no_gap_for_who_has_seen_it(world: World) -> None:
    await stored(world, 1)
    await world.writer.open()
    window = world.writer.window
    event = Event(SESSION, E1, 2, 2_000, RUN, started())
    world.writer.log.events.append(event)
    world.writer.log.head = 2

    with world.bus.subscribe(SESSION) as subscription:
        assert await subscription.begin(Cursor(E1, 2)) == Cursor(E1, 2)
        window.publish(event)
        assert await take_all(subscription) == []
        window.publish(Event(SESSION, E1, 3, 3_000, RUN, token()))
        assert seqs(await take_all(subscription)) == [3]


async def test_reader_that_falls_below_retentions_floor_is_told_what_it_misses(world: World) -> None:
    await stored(world, 5)
    world.writer.trim(3)
    with world.bus.subscribe(SESSION) as subscription:
        assert await subscription.begin(Cursor(E1, 1)) == Cursor(E1, 1)
        assert await gap_and_seqs(subscription) == (Gap(SESSION, 2, 3, "retention", Cursor(E1, 3)), [4, 5])


async def test_retention_that_overtakes_a_reader_is_told_in_mid_stream(world: World) -> None:
    await stored(world, 5)
    with world.bus.subscribe(SESSION) as subscription:
        await subscription.begin(Cursor(E1, 0))
        assert subscription.take_nowait() is None
        assert seqs(await subscription.fetch()) == [1, 2]
        world.writer.trim(4)
        assert await gap_and_seqs(subscription) == (Gap(SESSION, 3, 4, "retention", Cursor(E1, 4)), [5])


async def test_begin_can_be_called_again_after_the_store_failed(world: World) -> None:
    await stored(world, 2)
    world.logs.failures = 1
    with world.bus.subscribe(SESSION) as subscription:
        with pytest.raises(StoreError):
            await subscription.begin(Cursor(E1, 0))
        assert await subscription.begin(Cursor(E1, 0)) == Cursor(E1, 0)


async def test_window_that_is_replaced_while_a_reader_begins_gives_it_no_place_that_is_no_more() -> None:
    """Between `begin`'s checkpoint and its answer a writer gives up and the next one opens its window."""
    with trio.fail_after(5):
        world = World()
        await stored(world, 2)
        await world.writer.open()
        world.writer.publish(token("lost"))
        with world.bus.subscribe(SESSION) as subscription:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(subscription.begin, None)
                nursery.start_soon(world.writer.replace)
            world.writer.publish(token("3"), token("4"))
            gone = [item for item in await take_all(subscription) if isinstance(item, Event)]
            assert all(event.epoch == E2 for event in gone if event.seq > 2)
            assert subscription.seq == 4


# A writer that gives up


async def test_reader_that_saw_what_a_writer_gave_up_is_rewound_with_a_gap(world: World) -> None:
    await stored(world, 2)
    await world.writer.open()
    with world.bus.subscribe(SESSION) as subscription:
        await subscription.begin(None)
        world.writer.publish(token("lost"), token("lost"))
        assert seqs(await take_all(subscription)) == [3, 4]

        world.writer.give_up()
        await world.writer.open(new_epoch=True)
        assert await rung(subscription.doorbell)
        world.writer.publish(token("3"))
        assert await gap_and_seqs(subscription) == (Gap(SESSION, 3, 4, "crash", Cursor(E2, 2)), [3])


async def test_reader_that_had_not_seen_what_was_given_up_notices_nothing(world: World) -> None:
    await stored(world, 2)
    await world.writer.open()
    with world.bus.subscribe(SESSION) as subscription:
        await subscription.begin(None)
        world.writer.publish(token("lost"))
        world.writer.give_up()
        await world.writer.open(new_epoch=True)
        world.writer.publish(token("3"))
        assert [item.cursor for item in await take_all(subscription)] == [Cursor(E2, 3)]


async def test_page_that_was_read_for_a_place_that_was_rewound_meanwhile_is_not_believed(world: World) -> None:
    await stored(world, 2)
    await world.writer.open()
    with world.bus.subscribe(SESSION) as subscription:
        await subscription.begin(None)
        world.writer.publish(token("lost"), token("lost"))
        await take_all(subscription)
        world.writer.give_up()
        assert subscription.take_nowait() is None
        world.logs.hold = trio.Event()
        async with trio.open_nursery() as nursery:
            nursery.start_soon(subscription.fetch)
            await trio.testing.wait_all_tasks_blocked()
            await world.writer.open(new_epoch=True)
            world.logs.hold.set()
        world.writer.publish(token("3"), token("4"), token("5"))
        assert await gap_and_seqs(subscription) == (Gap(SESSION, 3, 4, "crash", Cursor(E2, 2)), [3, 4, 5])


async def test_one_gap_tells_of_what_a_cursor_had_lost_and_of_what_was_given_up_since(world: World) -> None:
    await stored(world, 2)
    await world.writer.open()
    world.writer.publish(token("lost"))
    with world.bus.subscribe(SESSION) as subscription:
        assert await subscription.begin(Cursor(E1, 5)) == Cursor(E1, 3)
        world.writer.give_up()
        await world.writer.open(new_epoch=True)
        assert await take_all(subscription) == [Gap(SESSION, 3, 5, "crash", Cursor(E2, 2))]


async def test_reader_that_is_at_its_end_is_not_rewound(world: World) -> None:
    await world.writer.open()
    await world.writer.commit(complete())
    world.writer.publish(token("lost"), run_id=OTHER_RUN)
    with world.bus.subscribe(SESSION, run_id=RUN) as subscription:
        subscription.begin_at(0)
        assert seqs(await subscription.receive()) == [1]
        await world.writer.replace()
        assert await subscription.receive() == []


# Where a reader ends


async def test_reader_of_a_run_gets_that_run_and_ends_with_its_terminal_event(world: World) -> None:
    await world.writer.open()
    with world.bus.subscribe(SESSION, run_id=RUN) as subscription:
        subscription.begin_at(0)
        world.writer.publish(token("1"))
        world.writer.publish(token("other"), run_id=OTHER_RUN)
        assert seqs(await subscription.receive()) == [1]
        await world.writer.commit(complete(), run_id=OTHER_RUN)
        await world.writer.commit(complete())
        world.writer.publish(token("other"), run_id=OTHER_RUN)

        assert seqs(await subscription.receive()) == [4]
        assert subscription.ended
        assert await subscription.receive() == []
        assert await subscription.receive() == []


async def test_reader_of_a_run_ends_with_its_terminal_event_from_the_store(world: World) -> None:
    await world.writer.open()
    await world.writer.commit(token("1"))
    await world.writer.commit(token("other"), run_id=OTHER_RUN)
    await world.writer.commit(complete())
    await world.writer.commit(token("other"), run_id=OTHER_RUN)
    await world.writer.evict()
    with world.bus.subscribe(SESSION, run_id=RUN) as subscription:
        await subscription.begin(Cursor(E1, 0))
        assert seqs(await take_all(subscription)) == [1, 3]
        assert subscription.ended


@pytest.mark.parametrize("window_bytes", [TINY_WINDOW, 1_000_000])
@pytest.mark.parametrize("run_id", [None, RUN])
async def test_reader_with_an_until_gets_nothing_behind_it(window_bytes: int, run_id: RunId | None) -> None:
    with trio.fail_after(5):
        world = World(window_bytes=window_bytes, page_events=2)
        await world.writer.open()
        await world.writer.commit(*[token()] * 5)
        with world.bus.subscribe(SESSION, run_id=run_id) as subscription:
            subscription.begin_at(0, until=3)
            assert seqs(await take_all(subscription)) == [1, 2, 3]
            assert subscription.ended
            assert await subscription.receive() == []


async def test_reader_whose_until_is_at_its_place_has_nothing_to_wait_for(world: World) -> None:
    await stored(world, 3)
    with world.bus.subscribe(SESSION) as subscription:
        subscription.begin_at(3, until=3)
        assert await subscription.receive() == []


async def test_run_whose_log_is_trimmed_is_a_gap_and_the_end(world: World) -> None:
    await stored(world, 5)
    world.writer.trim(4)
    with world.bus.subscribe(SESSION, run_id=RUN) as subscription:
        await subscription.begin(Cursor(E1, 0))
        subscription.begin_at(subscription.seq, until=3)
        assert await subscription.receive() == [Gap(SESSION, 1, 4, "retention", Cursor(E1, 4))]
        assert await subscription.receive() == []


# Deletion


async def test_reader_in_the_window_of_a_deleted_session_gets_everything_to_the_end(world: World) -> None:
    await stored(world, 1)
    await world.writer.open()
    with world.bus.subscribe(SESSION) as subscription:
        await subscription.begin(None)
        world.writer.publish(token("2"))
        await world.writer.delete()
        items = await subscription.receive()
        assert seqs(items) == [2, 3]
        assert isinstance(items[-1], Event)
        assert isinstance(items[-1].body, SessionClosed)
        assert await subscription.receive() == []
    world.check_empty()


@pytest.mark.parametrize("run_id", [None, RUN])
async def test_reader_behind_the_window_of_a_deleted_session_gets_a_gap_and_the_end(run_id: RunId | None) -> None:
    with trio.fail_after(5):
        world = World(window_bytes=TINY_WINDOW)
        await stored(world, 3)
        await world.writer.open()
        with world.bus.subscribe(SESSION, run_id=run_id) as subscription:
            await subscription.begin(Cursor(E1, 1))
            await world.writer.delete()
            gap, events = await gap_and_seqs(subscription)
            assert gap == Gap(SESSION, 2, 3, "retention", Cursor(E1, 3))
            assert events == ([4] if run_id is None else [])
            assert await subscription.receive() == []


async def test_reader_behind_the_window_sleeps_while_its_session_is_being_deleted() -> None:
    with trio.fail_after(5):
        world = World(window_bytes=TINY_WINDOW)
        await stored(world, 3)
        await world.writer.open()
        world.writer.publish(token())
        await world.writer.commit(token())
        with world.bus.subscribe(SESSION) as subscription:
            await subscription.begin(Cursor(E1, 1))
            del world.logs.logs[SESSION]

            assert await take_all(subscription) == []

            world.writer.window.publish(Event(SESSION, E1, 6, 0, None, SessionClosed()))
            world.writer.window.mark_durable(6)
            assert await take_all(subscription) == []
            world.writer.window.close_deleted()
            assert await rung(subscription.doorbell)
            gap, events = await gap_and_seqs(subscription)
            assert (gap.from_seq, gap.to_seq, events) == (2, 5, [6])


async def test_new_session_with_a_deleted_ones_id_has_nothing_of_it(world: World) -> None:
    await stored(world, 1)
    await world.writer.open()
    with world.bus.subscribe(SESSION) as old:
        await old.begin(Cursor(E1, 0))
        await world.writer.delete()
        await world.writer.open()
        await world.writer.commit(token("new"))
        with world.bus.subscribe(SESSION) as new:
            assert await new.begin(Cursor(E1, 1)) == Cursor(E2, 0)
            assert await gap_and_seqs(new) == (Gap(SESSION, None, None, "epoch", Cursor(E2, 0)), [1])
        assert [item.cursor for item in await take_all(old)] == [Cursor(E1, 1), Cursor(E1, 2)]
        await world.writer.evict()
    world.check_empty()


async def test_page_of_the_new_session_is_not_believed_by_the_deleted_ones_reader() -> None:
    with trio.fail_after(5):
        world = World(window_bytes=TINY_WINDOW)
        await stored(world, 3)
        await world.writer.open()
        await world.writer.commit(token())
        with world.bus.subscribe(SESSION) as old:
            await old.begin(Cursor(E1, 1))
            assert old.take_nowait() is None
            world.logs.hold = trio.Event()
            async with trio.open_nursery() as nursery:
                nursery.start_soon(old.fetch)
                await trio.testing.wait_all_tasks_blocked()
                await world.writer.delete()
                await world.writer.open()
                await world.writer.commit(*[token("new")] * 3)
                world.logs.hold.set()
            assert await gap_and_seqs(old) == (Gap(SESSION, 2, 4, "retention", Cursor(E1, 4)), [5])


async def test_reader_that_subscribed_before_the_deletion_and_begins_behind_it_reads_the_old_log(
    world: World,
) -> None:
    await stored(world, 1)
    await world.writer.open()
    with world.bus.subscribe(SESSION) as old:
        await world.writer.delete()
        await world.writer.open()
        await world.writer.commit(*[token("new")] * 3)
        await world.writer.evict()
        assert await old.begin(Cursor(E2, 1)) == Cursor(E1, 0)
        assert [item.cursor.epoch for item in await take_all(old)] == [E1] * 2 + [E1]
        assert old.ended
