"""A deleted session is gone at once, whatever is still to be erased of it."""

from contextlib import AsyncExitStack

import pytest
import trio
import trio.testing

from bamboo.core.events import (
    AgentStopped,
    AgentToken,
    SessionClosed,
)
from bamboo.core.types import (
    RunId,
    SessionId,
)
from bamboo.store.base import Commit, Store
from tests.support.store_stands import COMPLETE, STARTED, Author, Clock, Stand, all_events, said

ONE = SessionId("one")
TWO = SessionId("two")
LIMIT = 1_000_000


async def erase_all(store: Store, *, limit: int = 2) -> None:
    for _ in range(1000):
        if not await store.erase(limit=limit):
            return
    raise AssertionError("erasing comes to no end")


async def write_much(author: Author, name: str, *, key: str | None = None) -> None:
    """A session with more of everything than one small step takes."""
    for index in range(4):
        run_id = f"{name}-{index}"
        await author.accept(run_id, STARTED, AgentToken("x"), key=None if key is None else f"{key}{index}")
        await author.write(run_id, said("x", f"{run_id}-m"), COMPLETE)


async def test_deleted_session_leaves_nothing_and_its_id_begins_anew(stand: Stand, clock: Clock) -> None:
    store = stand.store
    async with store.own(TWO) as other:
        await Author(other, clock).accept("kept", STARTED, key="kept")
    async with store.own(ONE) as log:
        author = Author(log, clock)
        first = log.epoch
        await author.accept("r", STARTED, AgentToken("x"), said("x", "m"), key="k")
        closing = [*author.events("r", AgentStopped("deleted")), *author.events(None, SessionClosed())]
        closing[1].seq += 1
        await log.commit(Commit(closing, delete=True))
        with pytest.raises(AssertionError):
            await log.commit(Commit(session=author.session()))

    assert await store.extent(ONE) is None
    assert await store.read(ONE, 0, max_bytes=LIMIT) is None
    assert await store.session(ONE) is None
    assert await store.history(ONE, limit=10) is None
    assert tuple(await store.messages(ONE)) == ()
    assert tuple(await store.runs(ONE, limit=10)) == ()
    assert await store.run(RunId("r")) is None
    assert await store.key_holder("k", clock.now_ms) is None
    assert await store.unfinished_sessions() == [TWO]
    assert [session.session_id for session in (await store.sessions(limit=9))[0]] == [TWO]

    async with store.own(ONE) as log:
        assert (log.session, log.first_seq, log.head) == (None, 1, 0)
        assert log.epoch != first
        await Author(log, clock).accept("again", key="k")
    for _ in range(2):  # before anything of the old one is erased, and after
        assert [event.seq for event in await all_events(store, ONE)] == [1]
        assert len(await all_events(store, TWO)) == 2
        assert await store.key_holder("kept", clock.now_ms) is not None
        await erase_all(store)


async def test_delete_that_is_refused_deletes_nothing(stand: Stand, clock: Clock) -> None:
    async with stand.store.own(ONE) as log:
        author = Author(log, clock)
        with pytest.raises(AssertionError):
            await log.commit(Commit(delete=True))
        await author.start("r")
        with pytest.raises(AssertionError):
            await log.commit(Commit(author.events("nobody", SessionClosed()), delete=True))
        assert len(await all_events(stand.store, ONE)) == 2
        await author.write("r", COMPLETE)


async def test_session_that_got_the_id_meanwhile_is_left_alone_by_the_erasing(stand: Stand, clock: Clock) -> None:
    store = stand.store
    async with store.own(ONE) as log, store.own(TWO) as other:
        author = Author(log, clock)
        await write_much(author, "old", key="k")
        await author.accept("unfinished")
        await write_much(Author(other, clock), "two")
        await log.commit(Commit(author.events(None, SessionClosed()), delete=True))
    assert await store.unfinished_sessions() == []
    async with store.own(ONE) as log:
        await write_much(Author(log, clock), "new", key="k")
        before = [await all_events(store, name) for name in (ONE, TWO)]
        while await store.erase(limit=1):
            await Author(log, clock).accept(f"meanwhile-{log.head}")
    after = [await all_events(store, name) for name in (ONE, TWO)]
    assert [list(events)[: len(older)] for events, older in zip(after, before, strict=True)] == [*map(list, before)]
    assert [event.seq for event in after[0]] == list(range(1, len(after[0]) + 1))
    for name, prefix in ((ONE, "new"), (TWO, "two")):
        said_ids = [message.message_id for message in await store.messages(name) if message.role == "assistant"]
        assert said_ids == [f"{prefix}-{index}-m" for index in range(4)]
        assert await store.run(RunId(f"{prefix}-3")) is not None
    for index in range(4):
        holder = await store.key_holder(f"k{index}", clock.now_ms)
        assert holder is not None
        assert holder.run.run_id == f"new-{index}"


@pytest.mark.parametrize("clean", [False, True])
async def test_erasing_is_finished_by_the_next_process(stand: Stand, clock: Clock, *, clean: bool) -> None:
    async with stand.store.own(ONE) as log, stand.store.own(TWO) as other:
        author = Author(log, clock)
        await write_much(author, "old")
        await write_much(Author(other, clock), "two")
        await log.commit(Commit(author.events(None, SessionClosed()), delete=True))
    await stand.store.erase(limit=2)
    await stand.restart(clean=clean)
    assert await stand.store.session(ONE) is None
    await erase_all(stand.store)
    assert await stand.store.erase(limit=1) == 0
    assert len(await all_events(stand.store, TWO)) == 20
    assert await stand.store.session(ONE) is None


async def test_key_of_a_deleted_session_is_free_before_it_is_erased(stand: Stand, clock: Clock) -> None:
    store = stand.store
    async with store.own(ONE) as log, store.own(TWO) as other:
        author = Author(log, clock)
        await author.accept("old", key="k")
        await log.commit(Commit(author.events(None, SessionClosed()), delete=True))
        await Author(other, clock).accept("new", key="k", fingerprint=b"other content")
        holder = await store.key_holder("k", clock.now_ms)
        assert holder is not None
        assert (holder.run.run_id, holder.fingerprint) == ("new", b"other content")
        await erase_all(store)
        assert await store.key_holder("k", clock.now_ms) == holder


async def test_whoever_erases_is_told_of_each_delete(stand: Stand, clock: Clock) -> None:
    store, told = stand.store, 0

    async def listen() -> None:
        nonlocal told
        while True:
            await store.wait_deleted()
            told += 1

    async with trio.open_nursery() as nursery:
        nursery.start_soon(listen)
        for expected, names in enumerate((["a"], ["b"], ["c", "d"]), start=1):
            logs = []
            async with AsyncExitStack() as owned:
                for name in names:
                    log = await owned.enter_async_context(store.own(SessionId(name)))
                    await Author(log, clock).start(f"r-{name}")
                    logs.append(log)
                await trio.testing.wait_all_tasks_blocked()
                assert told == expected - 1  # by nothing but a delete
                for log in logs:
                    await log.commit(Commit(Author(log, clock).events(None, SessionClosed()), delete=True))
            await trio.testing.wait_all_tasks_blocked()
            assert told >= expected
            told = expected
        nursery.cancel_scope.cancel()
    async with store.own(SessionId("e")) as log:
        await Author(log, clock).start("r-e")
        await log.commit(Commit(Author(log, clock).events(None, SessionClosed()), delete=True))
    await store.wait_deleted()  # nobody was waiting then


async def test_idle_sessions_are_those_with_no_commit_since_and_no_unfinished_run(stand: Stand, clock: Clock) -> None:
    async def idle(before_ms: int, limit: int = 9) -> list[str]:
        return list(await stand.store.idle_sessions(before_ms=before_ms, limit=limit))

    start_ms = clock.now_ms
    for name in ("c", "a", "busy", "b"):
        async with stand.store.own(SessionId(name)) as log:
            await Author(log, clock).start(f"r-{name}")
            if name != "busy":
                await Author(log, clock).write(f"r-{name}", COMPLETE)
        clock.now_ms += 10 if name != "c" else 0  # the first two at one moment
    assert await idle(start_ms) == []
    assert await idle(start_ms + 1) == ["c", "a"]
    assert await idle(start_ms + 1000) == ["c", "a", "b"]
    assert await idle(start_ms + 1000, limit=2) == ["c", "a"]
    async with stand.store.own(SessionId("c")) as log:
        await log.commit(Commit(session=Author(log, clock).session(title="used")))
    assert await idle(start_ms + 1000) == ["a", "b", "c"]
    await stand.restart(clean=False)
    async with stand.store.own(SessionId("a")):  # a new epoch is nothing that happened in the session
        pass
    async with stand.store.own(SessionId("busy")) as log:
        await Author(log, clock).write("r-busy", AgentStopped("user"))
    assert await idle(start_ms + 1000) == ["a", "b", "c", "busy"]
