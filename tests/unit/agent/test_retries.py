"""Retries of one provider: before the first delta only, told as `agent_retry`. Nothing here really waits."""

import trio
import trio.testing

from bamboo.config import AgentConfig
from bamboo.core.events import AgentError, AgentRetry, AgentStopped, Event, Item
from bamboo.core.types import SessionId
from bamboo.errors import ErrorCode, UpstreamError
from tests.support.agents import chat, config, open_world, types
from tests.support.stores import GatedStore

S = SessionId("s")
AGENT = AgentConfig(
    run_timeout_s=100, first_token_timeout_s=10, idle_timeout_s=5, queue_timeout_s=30, idle_evict_s=100_000
)


def failure(item: Item) -> AgentError:
    assert isinstance(item, Event)
    assert isinstance(item.body, AgentError)
    return item.body


async def test_a_failure_before_the_first_delta_is_tried_again_and_told(
    store: GatedStore, autojump_clock: trio.testing.MockClock
) -> None:
    async with open_world(store, config(AGENT, max_retries=2)) as world:
        world.model.refusals += [
            UpstreamError(ErrorCode.PROVIDER_RATE_LIMITED, "slow down", retry_after_s=7),
            UpstreamError(ErrorCode.PROVIDER_ERROR, "oops"),
        ]
        accepted = await world.agents.chat(chat("hi", "s"))
        call = await world.model.next_call()
        call.say("at last")
        call.end()
        items = await world.read_run("s", accepted.run_id, accepted.cursor)
    retries = [item.body for item in items if isinstance(item, Event) and isinstance(item.body, AgentRetry)]
    assert [(retry.attempt, retry.code) for retry in retries] == [
        (1, "provider_rate_limited"),
        (2, "provider_error"),
    ]
    assert retries[0].delay_ms == 7000
    assert types(items)[-1] == "agent_complete"
    assert autojump_clock.current_time() >= 7


async def test_a_failure_after_a_delta_is_final_and_keeps_the_text(store: GatedStore) -> None:
    with trio.fail_after(5):
        async with open_world(store, config(AGENT, max_retries=2)) as world:
            accepted = await world.agents.chat(chat("hi", "s"))
            call = await world.model.next_call()
            call.say("half")
            call.fail(UpstreamError(ErrorCode.PROVIDER_PROTOCOL, "cut"))
            items = await world.read_run("s", accepted.run_id, accepted.cursor)
            assert len(world.model.calls) == 1
    assert failure(items[-1]).code == "provider_protocol"
    assert types(items)[-2:] == ["agent_message", "agent_error"]


async def test_stop_in_the_pause_before_a_retry(store: GatedStore) -> None:
    with trio.fail_after(5):
        async with open_world(store, config(AGENT, max_retries=2)) as world:
            world.model.refusals.append(UpstreamError(ErrorCode.PROVIDER_RATE_LIMITED, "slow", retry_after_s=20))
            accepted = await world.agents.chat(chat("hi", "s"))
            with world.bus.subscribe(S) as subscription:
                await subscription.begin(accepted.cursor)
                seen: list[Item] = []
                while "agent_retry" not in types(seen):
                    seen += await subscription.receive()
            receipt = await world.agents.stop(S)
            log = await world.events("s")
    assert receipt.stopped == (accepted.run_id,)
    assert log[-1].body == AgentStopped("user")


async def test_a_provider_that_asks_for_more_patience_than_there_is_has_failed(
    store: GatedStore, autojump_clock: trio.testing.MockClock
) -> None:
    async with open_world(store, config(AGENT, max_retries=2)) as world:
        world.model.refusals.append(UpstreamError(ErrorCode.PROVIDER_RATE_LIMITED, "tomorrow", retry_after_s=3600))
        accepted = await world.agents.chat(chat("hi", "s"))
        items = await world.read_run("s", accepted.run_id, accepted.cursor)
    assert types(items)[-2:] == ["run_started", "agent_error"]
    assert failure(items[-1]).code == "provider_rate_limited"
    assert autojump_clock.current_time() < 1


async def test_the_pause_is_as_long_as_it_was_told_and_a_little_of_it_is_chance(
    store: GatedStore, autojump_clock: trio.testing.MockClock
) -> None:
    """Of 20 runs that fail together, no two come back at the same moment."""
    pauses = set()
    async with open_world(store, config(AGENT, max_retries=1)) as world:
        for number in range(20):
            began = trio.current_time()
            world.model.refusals.append(UpstreamError(ErrorCode.PROVIDER_UNREACHABLE, "gone"))
            accepted = await world.agents.chat(chat("hi", f"s{number}"))
            call = await world.model.next_call()
            pause_s = trio.current_time() - began
            call.end()
            items = await world.read_run(f"s{number}", accepted.run_id, accepted.cursor)
            [told] = [item.body for item in items if isinstance(item, Event) and isinstance(item.body, AgentRetry)]
            assert abs(told.delay_ms - pause_s * 1000) <= 1
            assert 250 <= told.delay_ms <= 500
            pauses.add(pause_s)
    assert len(pauses) == 20
    assert autojump_clock.current_time() < 20
