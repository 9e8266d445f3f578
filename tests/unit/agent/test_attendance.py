"""`on_disconnect`: a run that asked for it is stopped when nobody has followed its session for so long."""

import pytest
import trio
import trio.testing

from bamboo.config import AgentConfig
from bamboo.core.events import AgentStopped, Event
from bamboo.core.types import SessionId
from tests.support.agents import chat, config, open_world, types
from tests.support.stores import GatedStore

S = SessionId("s")
AGENT = AgentConfig(
    run_timeout_s=100, first_token_timeout_s=10, idle_timeout_s=5, queue_timeout_s=30, idle_evict_s=100_000
)


async def test_a_run_that_nobody_follows_is_stopped_when_it_asked_for_that(
    store: GatedStore, autojump_clock: trio.testing.MockClock
) -> None:
    patient = AGENT.model_copy(update={"idle_timeout_s": 50.0})
    async with open_world(store, config(patient)) as world:
        accepted = await world.agents.chat(chat("hi", "s", cancel_after_s=2.0))
        call = await world.model.next_call()
        with world.bus.subscribe(S) as subscription:
            await subscription.begin(accepted.cursor)
            for _ in range(5):
                call.say("x")
                await trio.sleep(3)
        assert not call.closed.is_set(), "stopped although somebody followed it"
        left_at = trio.current_time()
        await call.closed.wait()
        assert trio.current_time() - left_at == pytest.approx(2, abs=0.1)
        items = await world.read_run("s", accepted.run_id, accepted.cursor)
    assert isinstance(items[-1], Event)
    assert items[-1].body == AgentStopped("abandoned")
    assert autojump_clock.current_time() < 60


async def test_a_queued_run_that_nobody_follows_is_stopped_too(
    store: GatedStore, autojump_clock: trio.testing.MockClock
) -> None:
    async with open_world(store, config(AGENT)) as world:
        await world.agents.chat(chat("one", "s"))
        second = await world.agents.chat(chat("two", "s", cancel_after_s=2.0))
        await trio.sleep(3)
        items = await world.read_run("s", second.run_id, second.cursor)
        assert len(world.model.calls) == 1
    assert types(items) == ["user_message", "run_queued", "agent_stopped"]
    assert autojump_clock.current_time() < 60


async def test_a_run_that_ends_with_its_reader_waits_for_it_to_come(
    store: GatedStore, autojump_clock: trio.testing.MockClock
) -> None:
    async with open_world(store, config(AGENT)) as world:
        accepted = await world.agents.chat(chat("hi", "s", cancel_after_s=0.0))
        call = await world.model.next_call()
        await trio.sleep(0.5)
        with world.bus.subscribe(S) as subscription:
            await subscription.begin(accepted.cursor)
            await trio.sleep(2)
            assert not call.closed.is_set()
        left_at = trio.current_time()
        await call.closed.wait()
        assert trio.current_time() == pytest.approx(left_at, abs=0.1)
    assert autojump_clock.current_time() < 60
