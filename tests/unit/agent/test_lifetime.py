"""When a session is in memory, and when it is gone."""

import pytest
import trio
import trio.testing

from bamboo.config import AgentConfig
from bamboo.core.events import Event, Item
from bamboo.core.types import SessionId
from bamboo.errors import BambooError, ErrorCode, StoreError
from tests.support.agents import World, chat, config, open_world, types
from tests.support.stores import GatedStore

S = SessionId("s")


async def test_an_idle_session_leaves_memory_and_comes_back_without_a_seam(
    store: GatedStore, autojump_clock: trio.testing.MockClock
) -> None:
    settings = config(AgentConfig(idle_evict_s=10))
    async with open_world(store, settings) as world:
        first = await world.agents.chat(chat("one", "s"))
        (await world.model.next_call()).end()
        await world.read_run("s", first.run_id, first.cursor)
        await trio.sleep(11)
        assert world.agents.sessions == 0
        assert world.bus.sessions == 0
        with world.bus.subscribe(S) as subscription:
            place = await subscription.begin(None)
            second = await world.agents.chat(chat("two", "s"))
            items = await subscription.receive()
        (await world.model.next_call()).end()
    assert place == second.cursor
    assert types(items)[0] == "user_message"
    assert first.cursor.epoch == second.cursor.epoch
    assert autojump_clock.current_time() < 60


async def test_a_session_with_a_run_does_not_leave(store: GatedStore, autojump_clock: trio.testing.MockClock) -> None:
    settings = config(AgentConfig(idle_evict_s=10, first_token_timeout_s=1000))
    async with open_world(store, settings) as world:
        await world.agents.chat(chat("one", "s"))
        await trio.sleep(100)
        assert world.agents.sessions == 1
        assert not world.model.calls[0].closed.is_set()
        with trio.fail_after(1):
            await world.agents.stop(S)
    assert autojump_clock.current_time() < 200


async def test_a_refused_first_chat_leaves_nothing_behind(store: GatedStore) -> None:
    with trio.fail_after(5):
        async with open_world(store) as world:
            store.failures.append(StoreError("disk full"))
            with pytest.raises(BambooError):
                await world.agents.chat(chat("no", "unknown"))
            while world.agents.sessions:
                await trio.lowlevel.checkpoint()
            assert world.bus.sessions == 0


async def test_requests_that_race_with_eviction_are_answered(store: GatedStore) -> None:
    """Every first request finds a runner that is just leaving, or a new one: never a closed door."""
    with trio.fail_after(10):
        async with open_world(store) as world:
            for _ in range(200):
                store.failures.append(StoreError("disk full"))
                with pytest.raises(BambooError) as refusal:
                    await world.agents.chat(chat("no", "s"))
                assert refusal.value.code is ErrorCode.STORE_UNAVAILABLE


async def test_delete_ends_everything_and_the_id_begins_a_new_life(store: GatedStore) -> None:
    codes: list[ErrorCode] = []

    async def late_chat(world: World) -> None:
        try:
            await world.agents.chat(chat("late", "s"))
        except BambooError as error:
            codes.append(error.code)

    with trio.fail_after(5):
        async with open_world(store) as world:
            first = await world.agents.chat(chat("one", "s", idempotency_key="k"))
            await world.agents.chat(chat("two", "s"))
            call = await world.model.next_call()
            with world.bus.subscribe(S) as reader, world.bus.subscribe(S) as lagging:
                await reader.begin(first.cursor)
                lagging.begin_at(0)
                async with trio.open_nursery() as nursery:
                    store.gate.close()
                    nursery.start_soon(world.agents.delete, S)
                    await store.gate.arrived()
                    nursery.start_soon(late_chat, world)
                    await trio.testing.wait_all_tasks_blocked()
                    store.gate.open()
                assert call.closed.is_set()
                seen: list[Item] = []
                while batch := await reader.receive():
                    seen += batch
                while batch := await lagging.receive():
                    last = batch[-1]
            assert codes == [ErrorCode.SESSION_NOT_FOUND]
            assert await store.session(S) is None
            again = await world.agents.chat(chat("one", "s", idempotency_key="k"))
            assert world.bus.subscriptions == 0
    assert types(seen)[-1] == "session_closed"
    assert types(seen).count("agent_stopped") == 2
    assert isinstance(last, Event)
    assert last.body.type == "session_closed"
    assert again.accepted_as == "started"
    assert again.cursor.epoch != first.cursor.epoch
    assert again.cursor.seq == 1
