"""Who owns a session, and what a start makes of its epochs."""

import pytest

from bamboo.core.events import (
    AgentStopped,
    AgentToken,
)
from bamboo.core.types import (
    Cursor,
    EpochStart,
    RunStatus,
    SessionId,
)
from bamboo.store.base import Commit
from tests.support.store_stands import COMPLETE, STARTED, Author, Clock, Stand, all_events

ONE = SessionId("one")
TWO = SessionId("two")


async def test_second_owner_is_a_bug(stand: Stand) -> None:
    store = stand.store
    async with store.own(ONE), store.own(TWO):
        with pytest.raises(AssertionError):
            async with store.own(ONE):
                pass
    async with store.own(ONE):
        pass


async def test_log_takes_nothing_after_its_owner_has_left(stand: Stand, clock: Clock) -> None:
    async with stand.store.own(ONE) as log:
        author = Author(log, clock)
        await author.start("r")
    with pytest.raises(AssertionError):
        await author.write("r", AgentToken("late"))
    assert len(await all_events(stand.store, ONE)) == 2


async def test_epoch_is_drawn_on_entering_and_stored_with_the_first_commit(stand: Stand, clock: Clock) -> None:
    async with stand.store.own(ONE) as log, stand.store.own(TWO) as other:
        epoch = log.epoch
        assert epoch != other.epoch
        await Author(log, clock).start("r")
    extent = await stand.store.extent(ONE)
    assert extent is not None
    assert tuple(extent.epochs) == (EpochStart(epoch, 1),)
    Cursor.parse(f"{epoch}.1")


async def test_clean_restart_changes_no_epoch(stand: Stand, clock: Clock) -> None:
    async with stand.store.own(ONE) as log:
        first = log.epoch
        await Author(log, clock).start("r")
    for _ in range(2):
        await stand.restart(clean=True)
        async with stand.store.own(ONE) as log:
            assert (log.epoch, log.first_seq, log.head) == (first, 1, 2)


async def test_each_unclean_start_gives_an_owned_session_one_new_epoch(stand: Stand, clock: Clock) -> None:
    async with stand.store.own(ONE) as log, stand.store.own(TWO) as never_owned_again:
        first, untouched = log.epoch, never_owned_again.epoch
        await Author(log, clock).start("r")
        await Author(never_owned_again, clock).start("s")

    await stand.restart(clean=False)
    extent = await stand.store.extent(ONE)
    assert extent is not None
    assert [start.epoch for start in extent.epochs] == [first]
    async with stand.store.own(ONE) as log:
        second = log.epoch
        assert (log.first_seq, log.head) == (3, 2)
        extent = await stand.store.extent(ONE)  # stored before there is any event of it
        assert extent is not None
        assert tuple(extent.epochs) == (EpochStart(first, 1), EpochStart(second, 3))
    async with stand.store.own(ONE) as log:
        assert log.epoch == second

    await stand.restart(clean=False)
    async with stand.store.own(ONE) as log:
        third = log.epoch
        await Author(log, clock).write("r", AgentToken("x"))

    await stand.restart(clean=True)
    await stand.restart(clean=False)
    async with stand.store.own(ONE) as log:
        fourth = log.epoch
    extent = await stand.store.extent(ONE)
    assert extent is not None
    expected = (EpochStart(first, 1), EpochStart(second, 3), EpochStart(third, 3), EpochStart(fourth, 4))
    assert tuple(extent.epochs) == expected
    assert len({first, second, third, fourth}) == 4
    assert [event.epoch for event in await all_events(stand.store, ONE)] == [first, first, third]

    other = await stand.store.extent(TWO)
    assert other is not None
    assert tuple(other.epochs) == (EpochStart(untouched, 1),)


async def test_owner_that_asks_gets_a_new_epoch_without_a_crash(stand: Stand, clock: Clock) -> None:
    async with stand.store.own(ONE) as log:
        first = log.epoch
        await Author(log, clock).start("r")
    async with stand.store.own(ONE, new_epoch=True) as log:
        second = log.epoch
        assert (log.first_seq, log.head) == (3, 2)
    async with stand.store.own(ONE) as log:
        assert log.epoch == second
    extent = await stand.store.extent(ONE)
    assert extent is not None
    assert tuple(extent.epochs) == (EpochStart(first, 1), EpochStart(second, 3))


async def test_owner_begins_with_settings_and_unfinished_runs_in_order(stand: Stand, clock: Clock) -> None:
    async with stand.store.own(ONE) as log:
        author = Author(log, clock)
        await author.start("done")
        await author.write("done", COMPLETE)
        for run_id in ("z", "m", "a"):
            await author.accept(run_id)
        await author.write("z", STARTED)
        await log.commit(Commit(session=author.session(title="Hello")))
    await stand.restart(clean=False)
    async with stand.store.own(ONE) as log:
        assert log.session == await stand.store.session(ONE)
        assert log.session is not None
        assert log.session.title == "Hello"
        assert [(run.run_id, run.status) for run in log.unfinished] == [
            ("z", RunStatus.RUNNING),
            ("m", RunStatus.QUEUED),
            ("a", RunStatus.QUEUED),
        ]
        await Author(log, clock).write("m", AgentStopped("user"))
    async with stand.store.own(ONE) as log:
        assert [run.run_id for run in log.unfinished] == ["z", "a"]


async def test_mark_of_a_clean_stop_is_refused_while_a_session_is_owned(stand: Stand) -> None:
    async with stand.store.own(ONE):
        with pytest.raises(AssertionError):
            await stand.store.mark_clean()
    await stand.store.mark_clean()
    with pytest.raises(AssertionError):
        async with stand.store.own(ONE):
            pass
