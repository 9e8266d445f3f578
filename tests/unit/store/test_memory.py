"""What only the memory store has: it can be made to crash, and its tombstones can be looked at."""

import pytest
import trio

from bamboo.core.events import AgentToken, SessionClosed
from bamboo.core.types import Epoch, SessionId
from bamboo.store.base import TOMBSTONES, Commit
from bamboo.store.memory import Tombstone, open_memory_store
from tests.support.store_stands import Author, Clock

ONE = SessionId("one")


async def test_owner_from_before_a_crash_writes_nothing_more() -> None:
    with trio.fail_after(5):
        async with open_memory_store(now_ms=Clock()) as store:
            async with store.own(ONE) as log:
                author = Author(log, Clock())
                await author.start("r")
                store.crash()
                with pytest.raises(AssertionError):
                    await author.write("r", AgentToken("late"))
                async with store.own(ONE) as heir:
                    assert heir.epoch != log.epoch
                    assert heir.head == 2
            with pytest.raises(AssertionError):  # leaving did not take the session from anybody, for nobody had it
                await author.write("r", AgentToken("later"))


async def test_restart_while_owned_is_a_bug() -> None:
    with trio.fail_after(5):
        async with open_memory_store() as store, store.own(ONE):
            with pytest.raises(AssertionError):
                store.restart()


async def test_deleted_session_leaves_a_tombstone() -> None:
    clock = Clock()
    with trio.fail_after(5):
        async with open_memory_store(now_ms=clock) as store, store.own(ONE) as log:
            author = Author(log, clock)
            await author.start("r")
            await log.commit(Commit(author.events(None, SessionClosed()), delete=True))
            (tombstone,) = store.tombstones
            assert (tombstone.session_id, tombstone.epoch, tombstone.last_seq) == (ONE, log.epoch, 3)
            assert tombstone.time_ms == clock.now_ms


async def test_only_the_newest_tombstones_are_kept() -> None:
    with trio.fail_after(5):
        async with open_memory_store() as store:
            store.tombstones = [Tombstone(SessionId(f"{index}"), Epoch("e"), 1, 0) for index in range(TOMBSTONES)]
            async with store.own(ONE) as log:
                author = Author(log, Clock())
                await author.start("r")
                await log.commit(Commit(author.events(None, SessionClosed()), delete=True))
            assert len(store.tombstones) == TOMBSTONES
            assert [store.tombstones[index].session_id for index in (0, -1)] == ["1", "one"]
