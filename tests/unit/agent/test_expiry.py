"""Sessions in which nothing happened for long are deleted whole; whoever is used stays."""

from collections.abc import Sequence

import pytest
import trio
import trio.testing

from bamboo.agent.expiry import DAY_MS, EVERY_S, STEP, STEP_PAUSE_S, expire_sessions
from bamboo.config import StorageConfig
from bamboo.core.types import SessionId
from bamboo.errors import BambooError, ClientError, ErrorCode, StoreError
from bamboo.store.memory import MemoryStore
from tests.support.agents import World, chat, open_world, types
from tests.support.store_stands import Clock
from tests.support.stores import GatedStore

S = SessionId("s")
THIRTY_DAYS = StorageConfig(session_retention_days=30)


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def store(clock: Clock) -> GatedStore:
    return GatedStore(clock)


async def finished_chat(world: World, session_id: str) -> None:
    accepted = await world.agents.chat(chat("hello", session_id))
    (await world.model.next_call()).end()
    await world.read_run(session_id, accepted.run_id, accepted.cursor)


async def stored(store: MemoryStore) -> list[str]:
    sessions, _ = await store.sessions(limit=1000)
    return sorted(session.session_id for session in sessions)


async def expire_once(world: World, clock: Clock, config: StorageConfig = THIRTY_DAYS) -> None:
    with trio.move_on_after(EVERY_S / 2):
        await expire_sessions(world.agents, world.store, config, clock)


async def test_sessions_without_a_commit_for_so_long_are_deleted_and_the_others_stay(
    store: GatedStore, clock: Clock, autojump_clock: trio.testing.MockClock
) -> None:
    async with open_world(store, now_ms=clock) as world:
        for name in ("old", "used", "watched"):
            await finished_chat(world, name)
        clock.now_ms += 30 * DAY_MS
        await finished_chat(world, "used")
        await expire_once(world, clock)
        assert await stored(store) == ["old", "used", "watched"]  # not a moment too early
        clock.now_ms += 1
        with world.bus.subscribe(SessionId("watched")) as subscription:
            await subscription.begin(None)
            await expire_once(world, clock)
            assert types(await subscription.receive()) == ["session_closed"]
        assert await stored(store) == ["used"]
        assert {tombstone.session_id for tombstone in store.tombstones} == {"old", "watched"}
    assert autojump_clock.current_time() < 2 * EVERY_S


async def test_a_session_with_an_unfinished_run_is_never_taken(
    store: GatedStore, clock: Clock, autojump_clock: trio.testing.MockClock
) -> None:
    del autojump_clock
    async with open_world(store, now_ms=clock) as world:
        await world.agents.chat(chat("one", "s"))
        call = await world.model.next_call()
        clock.now_ms += 365 * DAY_MS
        with trio.move_on_after(1):
            await expire_sessions(world.agents, store, THIRTY_DAYS, clock)
        assert await stored(store) == ["s"]
        assert not call.closed.is_set()


async def test_without_the_key_nothing_is_deleted(store: GatedStore, clock: Clock) -> None:
    with trio.fail_after(5):
        async with open_world(store, now_ms=clock) as world:
            await finished_chat(world, "s")
            clock.now_ms += 10_000 * DAY_MS
            await expire_sessions(world.agents, store, StorageConfig(), clock)
            assert await stored(store) == ["s"]


async def test_it_looks_again_every_hour(
    store: GatedStore, clock: Clock, autojump_clock: trio.testing.MockClock
) -> None:
    del autojump_clock
    async with open_world(store, now_ms=clock) as world, trio.open_nursery() as nursery:
        await finished_chat(world, "s")
        nursery.start_soon(expire_sessions, world.agents, store, THIRTY_DAYS, clock)
        await trio.sleep(EVERY_S / 2)
        clock.now_ms += 31 * DAY_MS
        await trio.sleep(EVERY_S / 4)
        assert await stored(store) == ["s"]
        await trio.sleep(EVERY_S / 2)
        assert await stored(store) == []
        nursery.cancel_scope.cancel()


class Listed(MemoryStore):
    """Has these sessions to delete; `failures` are raised first."""

    def __init__(self, clock: Clock, sessions: int) -> None:
        super().__init__(clock)
        self.idle = [SessionId(f"s{index}") for index in range(sessions)]
        self.failures: list[Exception] = []
        self.deleted: list[tuple[float, SessionId]] = []
        self.refused: set[SessionId] = set()
        self.looks = 0

    async def idle_sessions(self, *, before_ms: int, limit: int) -> Sequence[SessionId]:
        await trio.lowlevel.checkpoint()
        del before_ms
        self.looks += 1
        if self.failures:
            raise self.failures.pop()
        return self.idle[:limit]

    async def delete(self, session_id: SessionId, *, unused_since_ms: int | None = None) -> None:
        await trio.lowlevel.checkpoint()
        assert unused_since_ms is not None
        if session_id in self.refused:
            raise ClientError(ErrorCode.BUSY, "in use", session_id=session_id)
        self.idle.remove(session_id)
        self.deleted.append((trio.current_time(), session_id))


async def test_many_are_deleted_in_small_steps(clock: Clock, autojump_clock: trio.testing.MockClock) -> None:
    listed = Listed(clock, 3 * STEP + 1)
    with trio.move_on_after(EVERY_S / 2):
        await expire_sessions(listed, listed, THIRTY_DAYS, clock)
    assert listed.idle == []
    times = [time for time, _ in listed.deleted]
    assert [times.count(time) for time in sorted(set(times))] == [STEP] * 3 + [1]
    assert sorted(set(times))[1] - times[0] >= STEP_PAUSE_S
    assert autojump_clock.current_time() >= EVERY_S / 2


async def test_what_is_refused_waits_for_the_next_turn_and_holds_up_nothing_else(
    clock: Clock, autojump_clock: trio.testing.MockClock
) -> None:
    del autojump_clock
    listed = Listed(clock, 3)
    listed.refused = {SessionId("s0")}
    listed.failures = [StoreError("disk failing")]
    with trio.move_on_after(EVERY_S / 2):
        await expire_sessions(listed, listed, THIRTY_DAYS, clock)
    assert listed.deleted == []
    assert listed.looks == 1  # the store failed, and was left alone
    with trio.move_on_after(EVERY_S / 2):
        await expire_sessions(listed, listed, THIRTY_DAYS, clock)
    assert [session_id for _, session_id in listed.deleted] == ["s1", "s2"]
    assert listed.looks == 2  # and so was the session
    listed.refused.clear()
    with trio.move_on_after(EVERY_S / 2):
        await expire_sessions(listed, listed, THIRTY_DAYS, clock)
    assert listed.idle == []


# The session's runner has the last word.


async def refusal(world: World, session_id: str, unused_since_ms: int) -> ErrorCode:
    with pytest.raises(BambooError) as refused:
        await world.agents.delete(SessionId(session_id), unused_since_ms=unused_since_ms)
    return refused.value.code


async def test_a_session_that_is_used_after_it_was_found_idle_stays(store: GatedStore, clock: Clock) -> None:
    with trio.fail_after(5):
        async with open_world(store, now_ms=clock) as world:
            await finished_chat(world, "s")
            before_ms = clock.now_ms + 1
            clock.now_ms += 10
            assert await store.idle_sessions(before_ms=before_ms, limit=9) == ["s"]
            await finished_chat(world, "s")  # it has come and gone, and its runner is still there
            assert await refusal(world, "s", before_ms) is ErrorCode.BUSY
            assert await stored(store) == ["s"]
            assert len(await store.messages(S)) >= 2
            await world.agents.delete(S, unused_since_ms=clock.now_ms + 1)
            assert await stored(store) == []


async def test_a_run_that_was_accepted_meanwhile_goes_on(store: GatedStore, clock: Clock) -> None:
    with trio.fail_after(5):
        async with open_world(store, now_ms=clock) as world:
            await finished_chat(world, "s")
            accepted = await world.agents.chat(chat("again", "s"))
            # Even if the clock was set back since: an unfinished run is enough.
            assert await refusal(world, "s", clock.now_ms + 1000) is ErrorCode.BUSY
            call = await world.model.next_call()
            call.say("hi")
            call.end()
            items = await world.read_run("s", accepted.run_id, accepted.cursor)
            assert types(items)[-1] == "agent_complete"


async def test_only_what_is_there_expires(store: GatedStore, clock: Clock) -> None:
    with trio.fail_after(5):
        async with open_world(store, now_ms=clock) as world:
            assert await refusal(world, "nobody", clock.now_ms) is ErrorCode.SESSION_NOT_FOUND
            await finished_chat(world, "s")
            await world.agents.delete(S)  # a client's delete asks nothing
            assert await stored(store) == []
