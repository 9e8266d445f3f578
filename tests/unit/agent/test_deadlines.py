"""Every deadline has its own code; retries come before the first delta only. On a mock clock: no test waits."""

import pytest
import trio
import trio.testing

from bamboo.config import AgentConfig
from bamboo.core.events import AgentError, AgentRetry, AgentStopped, Event, Gap
from bamboo.core.types import SessionId
from bamboo.errors import ErrorCode, UpstreamError
from tests.support.agents import chat, config, open_world, types
from tests.support.stores import GatedStore

S = SessionId("s")
AGENT = AgentConfig(
    run_timeout_s=100, first_token_timeout_s=10, idle_timeout_s=5, queue_timeout_s=30, idle_evict_s=100_000
)


def failure(item: Event | Gap) -> AgentError:
    assert isinstance(item, Event)
    assert isinstance(item.body, AgentError)
    return item.body


async def test_a_provider_that_never_begins(store: GatedStore, autojump_clock: trio.testing.MockClock) -> None:
    async with open_world(store, config(AGENT)) as world:
        accepted = await world.agents.chat(chat("hi", "s"))
        items = await world.read_run("s", accepted.run_id, accepted.cursor)
        assert world.model.calls[0].closed.is_set()
    assert failure(items[-1]).code == "first_token_timeout"
    assert failure(items[-1]).retryable
    assert autojump_clock.current_time() == pytest.approx(10, abs=0.5)


async def test_a_provider_that_falls_silent_in_mid_answer(
    store: GatedStore, autojump_clock: trio.testing.MockClock
) -> None:
    async with open_world(store, config(AGENT)) as world:
        accepted = await world.agents.chat(chat("hi", "s"))
        call = await world.model.next_call()
        for _ in range(4):
            await trio.sleep(4)  # each pause is shorter than the deadline, all of them together are longer
            call.say("x")
        items = await world.read_run("s", accepted.run_id, accepted.cursor)
    assert failure(items[-1]).code == "idle_timeout"
    assert types(items)[-2:] == ["agent_message", "agent_error"]
    assert autojump_clock.current_time() == pytest.approx(21, abs=0.5)


async def test_a_run_that_goes_on_for_ever(store: GatedStore, autojump_clock: trio.testing.MockClock) -> None:
    async with open_world(store, config(AGENT)) as world:
        accepted = await world.agents.chat(chat("hi", "s"))
        call = await world.model.next_call()
        while not call.closed.is_set():
            call.say("x")
            await trio.sleep(3)
        items = await world.read_run("s", accepted.run_id, accepted.cursor)
    assert failure(items[-1]).code == "run_timeout"
    assert autojump_clock.current_time() == pytest.approx(101, abs=3)


async def test_a_run_that_waits_too_long_for_its_turn(
    store: GatedStore, autojump_clock: trio.testing.MockClock
) -> None:
    async with open_world(store, config(AGENT)) as world:
        first = await world.agents.chat(chat("one", "s"))
        second = await world.agents.chat(chat("two", "s"))
        call = await world.model.next_call()
        for _ in range(12):
            call.say("x")
            await trio.sleep(3)
        items = await world.read_run("s", second.run_id, second.cursor)
        assert types(items) == ["user_message", "run_queued", "agent_error"]
        assert failure(items[-1]).code == "queue_timeout"
        call.end()
        await world.read_run("s", first.run_id, first.cursor)
        assert len(world.model.calls) == 1
    assert autojump_clock.current_time() < 60


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
                seen: list[Event | Gap] = []
                while "agent_retry" not in types(seen):
                    seen += await subscription.receive()
            receipt = await world.agents.stop(S)
            log = await world.events("s")
    assert receipt.stopped == (accepted.run_id,)
    assert log[-1].body == AgentStopped("user")


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
