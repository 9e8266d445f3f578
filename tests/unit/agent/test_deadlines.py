"""Every deadline that a run has, in one table: its key, how long, what it is told as. On a mock clock, so none of this
waits."""

from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Final

import pytest
import trio
import trio.testing

from bamboo.config import AgentConfig, Config, ProviderConfig, Section, StorageConfig, StreamConfig
from bamboo.core.events import AgentError, AgentRetry, AgentToolComplete, Event, Item
from bamboo.core.types import JsonObject, SessionId, ToolResult
from bamboo.errors import RETRYABLE, ErrorCode, UpstreamError
from bamboo.llm.base import Provider, Providers
from bamboo.llm.openai import open_openai
from tests.support.agents import World, chat, config, open_world, types
from tests.support.model import PlayedCall
from tests.support.network import MuteNetwork
from tests.support.stores import GatedStore
from tests.support.tools import FakeToolbox

S: Final = SessionId("s")

CONNECT_S: Final = 3.0
AGENT: Final = AgentConfig(
    first_token_timeout_s=11,
    idle_timeout_s=5,
    tool_timeout_s=7,
    run_timeout_s=100,
    queue_timeout_s=31,
    idle_evict_s=100_000,
)
"""No two are the same: one that stands in for another is seen."""


def agent(**deadlines: float) -> AgentConfig:
    return AGENT.model_copy(update=deadlines)


async def hang(_: JsonObject) -> ToolResult:
    await trio.sleep_forever()
    raise AssertionError


@asynccontextmanager
async def open_deadline_world(
    store: GatedStore, settings: Config | None = None, provider: Provider | None = None
) -> AsyncIterator[World]:
    """A tool that hangs, and a wall clock that goes with the mock clock."""
    with trio.fail_after(1000):
        async with open_world(
            store,
            settings or config(AGENT),
            toolbox=lambda: FakeToolbox(hang=hang),
            providers=None if provider is None else Providers({provider.name: provider}, provider.name),
            now_ms=lambda: round(trio.current_time() * 1000),
        ) as world:
            yield world


async def run_of(world: World) -> list[Item]:
    """A whole run of session `s`."""
    accepted = await world.agents.chat(chat("hi", "s"))
    return await world.read_run("s", accepted.run_id, accepted.cursor)


async def run_over_the_network(store: GatedStore, scheme: str) -> list[Item]:
    """Through the provider's real HTTP client, down to the socket."""
    url = f"{scheme}://127.0.0.1:9/v1"
    async with (
        open_openai("p", base_url=url, default_model="m", api_key=None, connect_timeout_s=CONNECT_S) as provider,
        open_deadline_world(store, provider=provider) as world,
    ):
        return await run_of(world)


def failure(items: list[Item]) -> AgentError:
    assert isinstance(items[-1], Event)
    assert isinstance(items[-1].body, AgentError)
    return items[-1].body


async def talk_on(call: PlayedCall) -> None:
    """Something every 3 s, for as long as anybody listens."""
    while not call.closed.is_set():
        call.say("x")
        await trio.sleep(3)


# One scenario for each deadline: it is met once, and nothing else is. The events, and when it began to count.

Scenario = Callable[[GatedStore], Awaitable[tuple[list[Item], float]]]


async def nobody_to_connect_to(store: GatedStore) -> tuple[list[Item], float]:
    network = MuteNetwork()
    trio.socket.set_custom_socket_factory(network)
    items = await run_over_the_network(store, "http")
    assert [socket.closed for socket in network.sockets] == [True]
    return items, 0


async def provider_that_never_begins(store: GatedStore) -> tuple[list[Item], float]:
    async with open_deadline_world(store) as world:
        items = await run_of(world)
        assert world.model.calls[0].closed.is_set()
    return items, 0


async def provider_that_falls_silent(store: GatedStore) -> tuple[list[Item], float]:
    async with open_deadline_world(store) as world:
        accepted = await world.agents.chat(chat("hi", "s"))
        call = await world.model.next_call()
        for _ in range(4):
            await trio.sleep(4)  # each pause is shorter than the deadline, all of them together are longer
            call.say("x")
        items = await world.read_run("s", accepted.run_id, accepted.cursor)
    assert types(items)[-2:] == ["agent_message", "agent_error"]
    return items, 16


async def tool_that_hangs(store: GatedStore) -> tuple[list[Item], float]:
    async with open_deadline_world(store) as world:
        accepted = await world.agents.chat(chat("hi", "s"))
        call = await world.model.next_call()
        call.ask("hang")
        call.end()
        (await world.model.next_call()).end()
        items = await world.read_run("s", accepted.run_id, accepted.cursor)
    assert types(items)[-1] == "agent_complete", "a tool that takes too long is no run's end"
    return items, 0


async def run_that_goes_on_and_on(store: GatedStore) -> tuple[list[Item], float]:
    async with open_deadline_world(store) as world, trio.open_nursery() as nursery:
        accepted = await world.agents.chat(chat("hi", "s"))
        nursery.start_soon(talk_on, await world.model.next_call())
        items = await world.read_run("s", accepted.run_id, accepted.cursor)
    return items, 0


async def run_that_waits_for_its_turn(store: GatedStore) -> tuple[list[Item], float]:
    async with open_deadline_world(store) as world, trio.open_nursery() as nursery:
        first = await world.agents.chat(chat("one", "s"))
        await trio.sleep(2)
        second = await world.agents.chat(chat("two", "s"))
        nursery.start_soon(talk_on, await world.model.next_call())
        items = await world.read_run("s", second.run_id, second.cursor)
        assert len(world.model.calls) == 1
        await world.agents.stop(S, first.run_id)
    assert types(items) == ["user_message", "run_queued", "agent_error"]
    return items, 2


@dataclass(frozen=True)
class Deadline:
    """`code` None: it is no run's end, and told as a result that is not `ok`."""

    key: str
    seconds: float
    code: ErrorCode | None
    scenario: Scenario


DEADLINES: Final = {
    "connect": Deadline(
        "llm.providers.*.connect_timeout_s", CONNECT_S, ErrorCode.PROVIDER_CONNECT_TIMEOUT, nobody_to_connect_to
    ),
    "first token": Deadline(
        "agent.first_token_timeout_s", 11, ErrorCode.FIRST_TOKEN_TIMEOUT, provider_that_never_begins
    ),
    "idle between chunks": Deadline("agent.idle_timeout_s", 5, ErrorCode.IDLE_TIMEOUT, provider_that_falls_silent),
    "tool": Deadline("agent.tool_timeout_s", 7, None, tool_that_hangs),
    "whole run": Deadline("agent.run_timeout_s", 100, ErrorCode.RUN_TIMEOUT, run_that_goes_on_and_on),
    "queue wait": Deadline("agent.queue_timeout_s", 31, ErrorCode.QUEUE_TIMEOUT, run_that_waits_for_its_turn),
}


@pytest.mark.parametrize("name", DEADLINES)
async def test_each_deadline_has_its_code_and_comes_when_it_says(
    store: GatedStore, name: str, autojump_clock: trio.testing.MockClock
) -> None:
    deadline = DEADLINES[name]
    items, since = await deadline.scenario(store)
    [ended] = [item for item in items if isinstance(item, Event) and is_told(item, deadline)]
    assert ended.time_ms / 1000 - since == pytest.approx(deadline.seconds, abs=0.2)
    assert autojump_clock.autojump_threshold == 0


def is_told(event: Event, deadline: Deadline) -> bool:
    body = event.body
    if deadline.code is None:
        return isinstance(body, AgentToolComplete) and not body.ok and f"{deadline.seconds:g} s" in body.result
    return isinstance(body, AgentError) and body.code == deadline.code and body.retryable is (body.code in RETRYABLE)


def test_each_deadline_is_a_key_of_the_configuration_with_a_code_of_its_own() -> None:
    sections: dict[str, type[Section]] = {"agent": AgentConfig, "llm.providers.*": ProviderConfig}
    for deadline in DEADLINES.values():
        section, _, key = deadline.key.rpartition(".")
        assert key in sections[section].model_fields
    keys = {f"agent.{key}" for key in AgentConfig.model_fields if key.endswith("_timeout_s")}
    assert keys <= {deadline.key for deadline in DEADLINES.values()}, "a deadline without its place in the table"
    assert len({deadline.code for deadline in DEADLINES.values()}) == len(DEADLINES)


# Two things at once.


async def test_a_tls_handshake_that_hangs_is_a_connection_that_takes_too_long(
    store: GatedStore, autojump_clock: trio.testing.MockClock
) -> None:
    network = MuteNetwork(connect_s=1)
    trio.socket.set_custom_socket_factory(network)
    items = await run_over_the_network(store, "https")
    assert failure(items).code == "provider_connect_timeout"
    assert autojump_clock.current_time() <= 1 + CONNECT_S + 0.5
    assert [socket.closed for socket in network.sockets] == [True]


async def test_a_server_that_takes_the_request_and_says_nothing_has_the_first_tokens_time(
    store: GatedStore, autojump_clock: trio.testing.MockClock
) -> None:
    trio.socket.set_custom_socket_factory(MuteNetwork(connect_s=1))
    items = await run_over_the_network(store, "http")
    assert failure(items).code == "first_token_timeout"
    assert autojump_clock.current_time() == pytest.approx(11, abs=0.2)


async def test_every_attempt_has_its_own_time_to_the_first_token(
    store: GatedStore, autojump_clock: trio.testing.MockClock
) -> None:
    """Longer together than one may take; the last one says nothing at all."""
    async with open_deadline_world(store, config(AGENT, max_retries=2)) as world:
        accepted = await world.agents.chat(chat("hi", "s"))
        for _ in range(2):
            call = await world.model.next_call()
            await trio.sleep(9)
            call.fail(UpstreamError(ErrorCode.PROVIDER_ERROR, "oops", retry_after_s=1))
        items = await world.read_run("s", accepted.run_id, accepted.cursor)
    assert failure(items).code == "first_token_timeout"
    assert types(items).count("agent_retry") == 2
    assert autojump_clock.current_time() == pytest.approx(9 + 1 + 9 + 1 + 11, abs=0.2)


async def held_up(world: World, store: GatedStore, call: PlayedCall) -> None:
    """The store holds a commit up, and the run has stopped reading its provider."""
    store.gate.close()
    for _ in range(100):
        call.say("x" * 100)
    await trio.testing.wait_all_tasks_blocked()
    assert 0 < call.unread < 100
    assert world.agents.active_runs == 1


PATIENT_STORE: Final = StorageConfig(commit_timeout_s=1000)
SMALL: Final = StreamConfig(window_bytes=1024, max_uncommitted_bytes=4096)


async def test_time_that_the_store_takes_is_not_the_providers_silence(
    store: GatedStore, autojump_clock: trio.testing.MockClock
) -> None:
    async with open_deadline_world(store, config(AGENT, SMALL, PATIENT_STORE)) as world:
        accepted = await world.agents.chat(chat("hi", "s"))
        call = await world.model.next_call()
        await held_up(world, store, call)
        await trio.sleep(50)
        store.gate.open()
        await trio.sleep(4)
        call.say("still here")
        call.end()
        items = await world.read_run("s", accepted.run_id, accepted.cursor)
    assert types(items)[-1] == "agent_complete"
    assert autojump_clock.current_time() == pytest.approx(54, abs=0.5)


async def test_a_provider_that_falls_silent_while_the_store_is_behind_has_its_time_behind_that(
    store: GatedStore, autojump_clock: trio.testing.MockClock
) -> None:
    async with open_deadline_world(store, config(AGENT, SMALL, PATIENT_STORE)) as world:
        accepted = await world.agents.chat(chat("hi", "s"))
        call = await world.model.next_call()
        store.gate.close()
        call.say("x" * 5000)
        await trio.sleep(50)
        store.gate.open()
        items = await world.read_run("s", accepted.run_id, accepted.cursor)
    assert failure(items).code == "idle_timeout"
    assert autojump_clock.current_time() == pytest.approx(55, abs=0.2)


# The whole run's time, whatever it is doing.


async def test_a_run_that_is_out_of_time_in_a_tool(store: GatedStore, autojump_clock: trio.testing.MockClock) -> None:
    async with open_deadline_world(store, config(agent(tool_timeout_s=1000.0))) as world:
        accepted = await world.agents.chat(chat("hi", "s"))
        call = await world.model.next_call()
        call.ask("hang")
        call.end()
        items = await world.read_run("s", accepted.run_id, accepted.cursor)
    assert failure(items).code == "run_timeout"
    [result] = [item.body for item in items if isinstance(item, Event) and isinstance(item.body, AgentToolComplete)]
    assert result.status == "stopped"
    assert autojump_clock.current_time() == pytest.approx(100, abs=0.2)


async def test_a_run_that_is_out_of_time_while_the_store_is_behind(
    store: GatedStore, autojump_clock: trio.testing.MockClock
) -> None:
    """It lets go of its provider in time; its end is committed as soon as that is possible."""
    async with open_deadline_world(store, config(AGENT, SMALL, PATIENT_STORE)) as world:
        accepted = await world.agents.chat(chat("hi", "s"))
        call = await world.model.next_call()
        await held_up(world, store, call)
        with trio.fail_after(101):
            await call.closed.wait()
        assert autojump_clock.current_time() == pytest.approx(100, abs=0.2)
        await trio.sleep(60)
        store.gate.open()
        items = await world.read_run("s", accepted.run_id, accepted.cursor)
    assert failure(items).code == "run_timeout"
    assert types(items)[-2:] == ["agent_message", "agent_error"]


async def test_a_run_that_is_out_of_time_in_a_commit(store: GatedStore, autojump_clock: trio.testing.MockClock) -> None:
    async with open_deadline_world(store, config(AGENT, None, PATIENT_STORE)) as world:
        accepted = await world.agents.chat(chat("hi", "s"))
        call = await world.model.next_call()
        call.ask("hang")
        store.gate.close()
        call.end()
        await trio.sleep(150)
        store.gate.open()
        items = await world.read_run("s", accepted.run_id, accepted.cursor)
    assert failure(items).code == "run_timeout"
    assert types(items)[-3:] == ["agent_message", "agent_tool_complete", "agent_error"]
    assert autojump_clock.current_time() == pytest.approx(150, abs=0.2)


async def test_a_run_that_is_out_of_time_in_the_pause_before_a_retry(
    store: GatedStore, autojump_clock: trio.testing.MockClock
) -> None:
    async with open_deadline_world(store, config(agent(run_timeout_s=20.0), max_retries=1)) as world:
        world.model.refusals.append(UpstreamError(ErrorCode.PROVIDER_RATE_LIMITED, "slow down", retry_after_s=30))
        items = await run_of(world)
        assert world.model.calls == []
    retries = [item.body for item in items if isinstance(item, Event) and isinstance(item.body, AgentRetry)]
    assert [retry.delay_ms for retry in retries] == [30_000]
    assert failure(items).code == "run_timeout"
    assert autojump_clock.current_time() == pytest.approx(20, abs=0.2)


# The wait for a turn, over a restart.


async def test_the_wait_for_a_turn_goes_on_over_a_restart(
    store: GatedStore, autojump_clock: trio.testing.MockClock
) -> None:
    """Of three, the first is interrupted, the second starts, and the third is still waiting when its time is up."""
    async with open_deadline_world(store) as world:
        accepted = [await world.agents.chat(chat(text, "s")) for text in ("one", "two", "three")]
        await trio.sleep(5)
    await trio.sleep(10)
    async with open_deadline_world(store) as world, trio.open_nursery() as nursery:
        nursery.start_soon(talk_on, await world.model.next_call())
        items = await world.read_run("s", accepted[2].run_id, accepted[2].cursor)
        assert failure(items).code == "queue_timeout"
        assert autojump_clock.current_time() == pytest.approx(31, abs=0.2)
        await world.agents.stop(S)


async def test_a_run_whose_time_was_up_while_no_server_was_there_does_not_start(
    store: GatedStore, autojump_clock: trio.testing.MockClock
) -> None:
    """Not even the first of the queue, for which a slot is free."""
    async with open_deadline_world(store) as world:
        accepted = [await world.agents.chat(chat(text, "s")) for text in ("one", "two", "three")]
    await trio.sleep(40)
    async with open_deadline_world(store) as world:
        for queued in accepted[1:]:
            items = await world.read_run("s", queued.run_id, queued.cursor)
            assert failure(items).code == "queue_timeout"
        assert world.model.calls == []
        assert world.agents.active_runs == world.agents.queued_runs == 0
    assert autojump_clock.current_time() < 50
