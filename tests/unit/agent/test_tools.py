"""The agent loop with tools: intent before act, result after it, a valid history whatever happens between."""

from collections.abc import Sequence

import trio
import trio.testing

from bamboo.config import AgentConfig
from bamboo.core.events import AgentError, AgentMessage, AgentToolComplete, AgentToolStart, Event, Item
from bamboo.core.types import JsonObject, SessionId, ToolResult, content_text
from tests.support.agents import World, chat, config, open_world, types
from tests.support.stores import GatedStore
from tests.support.tools import FakeToolbox

S = SessionId("s")


def results(items: Sequence[Item]) -> list[AgentToolComplete]:
    return [item.body for item in items if isinstance(item, Event) and isinstance(item.body, AgentToolComplete)]


async def test_a_tool_call_is_made_and_its_result_goes_back_to_the_model(store: GatedStore) -> None:
    async def add(arguments: JsonObject) -> ToolResult:
        await trio.lowlevel.checkpoint()
        return ToolResult(str(arguments["a"] + arguments["b"]))

    with trio.fail_after(5):
        async with open_world(store, toolbox=lambda: FakeToolbox(add=add)) as world:
            accepted = await world.agents.chat(chat("what is 2 + 3?", "s"))
            call = await world.model.next_call()
            assert [spec.name for spec in call.call.tools] == ["add"]
            call.say("Let me see.")
            call.ask("add", '{"a": 2, ')
            call.ask("", '"b": 3}', tool_call_id="")
            call.end("tool_calls")
            call = await world.model.next_call()
            told = [(message.role, content_text(message.content)) for message in call.call.messages]
            call.say("5")
            call.end()
            items = await world.read_run("s", accepted.run_id, accepted.cursor)
    assert types(items) == [
        "user_message",
        "run_started",
        "agent_token",
        "agent_message",
        "agent_tool_start",
        "agent_tool_complete",
        "agent_token",
        "agent_message",
        "agent_complete",
    ]
    assert told == [("user", "what is 2 + 3?"), ("assistant", "Let me see."), ("tool", "5")]
    assert [message.role for message in await store.messages(S)] == ["user", "assistant", "tool", "assistant"]


async def test_a_tool_is_not_touched_before_its_intent_is_durable(store: GatedStore) -> None:
    durable: list[str] = []

    async def act(_: JsonObject) -> ToolResult:
        page = await store.read(S, 0, max_bytes=1_000_000)
        assert page is not None
        durable.extend(types(list(page.events)))
        return ToolResult("done")

    with trio.fail_after(5):
        async with open_world(store, toolbox=lambda: FakeToolbox(act=act)) as world:
            accepted = await world.agents.chat(chat("go", "s"))
            call = await world.model.next_call()
            call.ask("act")
            call.end()
            (await world.model.next_call()).end()
            await world.read_run("s", accepted.run_id, accepted.cursor)
    assert durable[-2:] == ["agent_message", "agent_tool_start"]


async def test_an_unknown_tool_and_bad_arguments_are_results_and_the_run_goes_on(store: GatedStore) -> None:
    async def act(_: JsonObject) -> ToolResult:
        raise AssertionError("called with bad arguments")

    with trio.fail_after(5):
        async with open_world(store, toolbox=lambda: FakeToolbox(act=act)) as world:
            accepted = await world.agents.chat(chat("go", "s"))
            call = await world.model.next_call()
            call.ask("nothing", tool_call_id="call_1", index=0)
            call.ask("act", "{not json", tool_call_id="call_2", index=1)
            call.end()
            (await world.model.next_call()).end()
            items = await world.read_run("s", accepted.run_id, accepted.cursor)
    assert [result.ok for result in results(items)] == [False, False]
    assert types(items)[-1] == "agent_complete"


async def test_stop_in_a_tool_ends_it_and_gives_every_open_call_a_result(store: GatedStore) -> None:
    async def hang(_: JsonObject) -> ToolResult:
        await trio.sleep_forever()
        raise AssertionError

    toolbox = FakeToolbox(hang=hang)
    with trio.fail_after(5):
        async with open_world(store, toolbox=lambda: toolbox) as world:
            await world.agents.chat(chat("go", "s"))
            call = await world.model.next_call()
            call.ask("hang", tool_call_id="call_1", index=0)
            call.ask("hang", tool_call_id="call_2", index=1)
            call.end()
            await toolbox.called.wait()
            receipt = await world.agents.stop(S)
            assert toolbox.running == set()
            log = await world.events("s")
    assert receipt.tools_stopped == 1
    assert types(log)[-5:] == [
        "agent_message",
        "agent_tool_start",
        "agent_tool_complete",
        "agent_tool_complete",
        "agent_stopped",
    ]
    assert [(result.tool_call_id, result.status) for result in results(log)] == [
        ("call_1", "stopped"),
        ("call_2", "stopped"),
    ]
    assert [message.role for message in await store.messages(S)] == ["user", "assistant", "tool", "tool"]


async def test_a_tool_that_takes_too_long_is_a_failed_result(
    store: GatedStore, autojump_clock: trio.testing.MockClock
) -> None:
    async def hang(_: JsonObject) -> ToolResult:
        await trio.sleep_forever()
        raise AssertionError

    settings = config(AgentConfig(tool_timeout_s=5, idle_evict_s=1000))
    async with open_world(store, settings, toolbox=lambda: FakeToolbox(hang=hang)) as world:
        accepted = await world.agents.chat(chat("go", "s"))
        call = await world.model.next_call()
        call.ask("hang")
        call.end()
        (await world.model.next_call()).end()
        items = await world.read_run("s", accepted.run_id, accepted.cursor)
    [result] = results(items)
    assert not result.ok
    assert result.elapsed_ms == 5000
    assert types(items)[-1] == "agent_complete"
    assert autojump_clock.current_time() < 1000


async def test_a_model_that_never_stops_calling_tools_runs_into_its_budget(store: GatedStore) -> None:
    async def act(_: JsonObject) -> ToolResult:
        await trio.lowlevel.checkpoint()
        return ToolResult("again")

    settings = config(AgentConfig(max_steps=3))
    with trio.fail_after(5):
        async with open_world(store, settings, toolbox=lambda: FakeToolbox(act=act)) as world:
            accepted = await world.agents.chat(chat("go", "s"))
            for _ in range(3):
                call = await world.model.next_call()
                call.ask("act")
                call.end()
            items = await world.read_run("s", accepted.run_id, accepted.cursor)
    end = items[-1]
    assert isinstance(end, Event)
    assert isinstance(end.body, AgentError)
    assert end.body.code == "budget_exceeded"
    roles = [message.role for message in await store.messages(S)]
    assert roles == ["user", *["assistant", "tool"] * 3]


async def test_stop_before_the_calls_message_is_durable_leaves_a_valid_history(store: GatedStore) -> None:
    async def act(_: JsonObject) -> ToolResult:
        raise AssertionError("called after the stop")

    async def stop(world: World) -> None:
        await world.agents.stop(S)

    with trio.fail_after(5):
        async with open_world(store, toolbox=lambda: FakeToolbox(act=act)) as world:
            await world.agents.chat(chat("go", "s"))
            call = await world.model.next_call()
            call.ask("act")
            store.gate.close()
            call.end()
            await store.gate.arrived()
            async with trio.open_nursery() as nursery:
                nursery.start_soon(stop, world)
                await trio.testing.wait_all_tasks_blocked()
                store.gate.open()
            log = await world.events("s")
    assert types(log)[-3:] == ["agent_message", "agent_tool_complete", "agent_stopped"]
    assert not any(isinstance(event.body, AgentToolStart) for event in log)
    assert isinstance(log[-3].body, AgentMessage)
