"""Many owners at once, and cancellation."""

import pytest
import trio

from bamboo.core.events import (
    AgentToken,
)
from bamboo.core.types import (
    SessionId,
)
from bamboo.store.base import DuplicateKey
from tests.support.store_stands import COMPLETE, STARTED, Author, Clock, Stand, all_events

ONE = SessionId("one")


async def test_many_owners_write_at_once_and_each_log_is_whole(stand: Stand, clock: Clock) -> None:
    async def write(name: str) -> None:
        async with stand.store.own(SessionId(name)) as log:
            author = Author(log, clock)
            await author.accept(f"{name}-r", key=name)
            await author.write(f"{name}-r", STARTED)
            for index in range(5):
                await author.write(f"{name}-r", AgentToken(f"{index}"), AgentToken(name))
            with pytest.raises(DuplicateKey):
                await log.commit(author.acceptance(f"{name}-again", key=name))
            await author.write(f"{name}-r", COMPLETE)

    async with trio.open_nursery() as nursery:
        for index in range(40):
            nursery.start_soon(write, f"s{index}")
    for index in range(40):
        events = await all_events(stand.store, SessionId(f"s{index}"))
        assert [event.seq for event in events] == list(range(1, 14))
        tokens = "".join(event.body.token for event in events if isinstance(event.body, AgentToken))
        assert tokens == "".join(f"{step}s{index}" for step in range(5))


async def test_cancelled_commit_leaves_the_store_usable_and_the_log_whole(stand: Stand, clock: Clock) -> None:
    for attempt in range(10):
        async with stand.store.own(ONE) as log:
            author = Author(log, clock)
            if log.session is None:
                await author.start("r")
            head = log.head
            with trio.CancelScope() as scope:
                async with trio.open_nursery() as nursery:
                    nursery.start_soon(author.write, "r", AgentToken(f"a{attempt}"), AgentToken("b"))
                    if attempt % 2:
                        await trio.lowlevel.checkpoint()
                    scope.cancel()
        async with stand.store.own(ONE) as log:
            # All of it or nothing, and what is loaded is behind it.
            assert log.head in (head, head + 2)
            await Author(log, clock).write("r", AgentToken("c"))
            assert log.head in (head + 1, head + 3)
    events = await all_events(stand.store, ONE)
    assert [event.seq for event in events] == list(range(1, len(events) + 1))
    assert sum(1 for event in events if event.body == AgentToken("c")) == 10


async def test_cancelled_owner_is_owner_no_more(stand: Stand) -> None:
    with trio.CancelScope() as scope:
        scope.cancel()
        async with stand.store.own(ONE):
            pass
    async with stand.store.own(ONE):
        pass


async def test_cancelled_read_has_no_effect(stand: Stand, clock: Clock) -> None:
    async with stand.store.own(ONE) as log:
        await Author(log, clock).start("r")
    for _ in range(10):
        with trio.CancelScope() as scope:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(stand.store.messages, ONE)
                await trio.lowlevel.checkpoint()
                scope.cancel()
    assert len(await stand.store.messages(ONE)) == 1


async def test_store_that_can_write_is_healthy(stand: Stand) -> None:
    assert await stand.store.healthy()
