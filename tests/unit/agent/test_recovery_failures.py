"""The store fails at each thing that a recovery waits for: afterwards the run has one end, for the reason that it
had."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

import pytest
import trio
import trio.testing

from bamboo.config import StorageConfig
from bamboo.core.events import AgentError, Event, Terminal
from bamboo.core.types import Accepted, SessionId, content_text
from bamboo.errors import BambooError, ErrorCode
from bamboo.store import wall_clock_ms
from bamboo.store.memory import MemoryStore
from tests.support.agents import World, chat, config, open_world
from tests.support.mortal_store import Fault, MortalStore

S: Final = SessionId("s")
TIMEOUT_S: Final = 2.0
SETTINGS: Final = config(storage=StorageConfig(commit_timeout_s=TIMEOUT_S))


@dataclass(frozen=True)
class Failing:
    """What the store does to a recovery: so many loads and reads fail, the first commits have these faults."""

    loads: int = 0
    reads: int = 0
    faults: Sequence[Fault | None] = ()

    def strike(self, store: MortalStore) -> None:
        store.failing_loads = self.loads
        store.failing_reads = self.reads
        store.faults.extend(self.faults)


ALWAYS: Final = {
    "loading": Failing(loads=2),
    "reading the log": Failing(reads=2),
    "loading, then reading": Failing(loads=1, reads=1),
}

AFTER_A_CRASH: Final = {
    **ALWAYS,
    "settlement refused": Failing(faults=["refused"] * 3),
    "settlement without an answer, not done": Failing(faults=["lost"]),
    "settlement without an answer, though done": Failing(faults=["unanswered"]),
    "settlement without an answer twice": Failing(faults=["lost", "lost"]),
    "everything": Failing(loads=2, reads=2, faults=["refused", "lost"]),
}

AFTER_A_BUG: Final = {
    **ALWAYS,
    "tail refused": Failing(faults=["refused"] * 2),
    "settlement refused": Failing(faults=[None, "refused", "refused"]),
    "settlement without an answer, not done": Failing(faults=[None, "lost"]),
    "settlement without an answer, though done": Failing(faults=[None, "unanswered"]),
    "everything": Failing(loads=2, reads=2, faults=["refused", None, "refused", "lost"]),
}


def ends_of(store: MortalStore, accepted: Accepted) -> list[Event]:
    [life] = store.lives[S]
    return [event for event in life.events if event.run_id == accepted.run_id and isinstance(event.body, Terminal)]


async def ask(world: World) -> str:
    try:
        return (await world.agents.chat(chat("meanwhile", "s"))).accepted_as
    except BambooError as error:
        return error.code


async def insist(world: World) -> Accepted:
    while True:
        try:
            return await world.agents.chat(chat("again", "s"))
        except BambooError as error:
            if not error.retryable:
                raise
            await trio.sleep(0.1)


async def check_settled(world: World, store: MortalStore, accepted: Accepted, code: ErrorCode) -> None:
    """With nobody asking for it; and then the session is as good as any other."""
    await store.all_ended()
    [end] = ends_of(store, accepted)
    assert isinstance(end.body, AgentError)
    assert end.body.code == code
    assert [content_text(message.content) for message in await store.store.messages(S)] == ["hi", "durable "]
    again = await insist(world)
    (await world.model.next_call()).end()
    await world.read_run("s", again.run_id, again.cursor)
    assert len(ends_of(store, accepted)) == 1


@pytest.mark.parametrize("name", AFTER_A_CRASH)
async def test_after_a_crash_a_run_has_one_end_whatever_the_store_fails_at(
    name: str, autojump_clock: trio.testing.MockClock
) -> None:
    memory = MemoryStore(wall_clock_ms)
    store = MortalStore(memory)
    with trio.CancelScope() as process:
        async with open_world(store.store, SETTINGS) as world:
            accepted = await world.agents.chat(chat("hi", "s"))
            (await world.model.next_call()).say("durable ")
            await trio.sleep(1)
            store.die()
            process.cancel()
            await trio.lowlevel.checkpoint()
    memory.crash()
    store.revive(memory)
    AFTER_A_CRASH[name].strike(store)
    async with open_world(store.store, SETTINGS) as world:
        await check_settled(world, store, accepted, ErrorCode.INTERRUPTED)
    assert autojump_clock.current_time() < 60


@pytest.mark.parametrize("name", AFTER_A_BUG)
async def test_after_a_bug_a_run_has_one_end_whatever_the_store_fails_at(
    name: str, autojump_clock: trio.testing.MockClock
) -> None:
    """What was shown and not durable yet is there in the end, whoever it was that failed."""
    store = MortalStore(MemoryStore(wall_clock_ms))
    async with open_world(store.store, SETTINGS) as world:
        accepted = await world.agents.chat(chat("hi", "s"))
        call = await world.model.next_call()
        call.say("durable ")
        await trio.testing.wait_all_tasks_blocked()
        AFTER_A_BUG[name].strike(store)
        call.fail(RuntimeError("a bug"))
        await check_settled(world, store, accepted, ErrorCode.INTERNAL)
    assert autojump_clock.current_time() < 60


@pytest.mark.parametrize("name", ["loading", "reading the log", "settlement refused", "everything"])
async def test_a_chat_that_comes_meanwhile_is_told_to_come_again_and_hurts_nothing(
    name: str, autojump_clock: trio.testing.MockClock
) -> None:
    store = MortalStore(MemoryStore(wall_clock_ms))
    async with open_world(store.store, SETTINGS) as world:
        accepted = await world.agents.chat(chat("hi", "s"))
        call = await world.model.next_call()
        call.say("durable ")
        await trio.testing.wait_all_tasks_blocked()
        AFTER_A_BUG[name].strike(store)
        call.fail(RuntimeError("a bug"))
        await trio.sleep(0.001)
        assert await ask(world) == ErrorCode.STORE_UNAVAILABLE
        await check_settled(world, store, accepted, ErrorCode.INTERNAL)
        assert len(await store.store.runs(S, limit=10)) == 2
    assert autojump_clock.current_time() < 60
