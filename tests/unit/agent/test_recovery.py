"""Nothing is lost when a runner or the process dies, and one bad session stays one bad session."""

import pytest
import trio
import trio.testing

from bamboo.core.events import AgentError, AgentToolComplete, Event, Gap, Item
from bamboo.core.types import JsonObject, RunStatus, SessionId, ToolResult, content_text
from bamboo.errors import BambooError, ErrorCode, StoreError
from tests.support.agents import chat, open_world, types
from tests.support.stores import GatedStore
from tests.support.tools import FakeToolbox

S = SessionId("s")


async def statuses(store: GatedStore) -> list[RunStatus]:
    return [run.status for run in await store.runs(S, limit=100)]


async def test_a_bug_in_one_session_ends_its_run_keeps_its_text_and_goes_on_with_its_queue(store: GatedStore) -> None:
    with trio.fail_after(5):
        async with open_world(store) as world:
            other = await world.agents.chat(chat("other", "t"))
            other_call = await world.model.next_call()
            first = await world.agents.chat(chat("one", "s"))
            call = await world.model.next_call()
            second = await world.agents.chat(chat("two", "s"))
            with world.bus.subscribe(S) as subscription:
                await subscription.begin(first.cursor)
                call.say("seen but not durable")
                seen: list[Item] = []
                while "agent_token" not in types(seen):
                    seen += await subscription.receive()
                call.fail(RuntimeError("a bug"))
                while "agent_error" not in types(seen):
                    seen += await subscription.receive()
            call = await world.model.next_call()
            assert [content_text(message.content) for message in call.call.messages] == [
                "one",
                "seen but not durable",
                "two",
            ]
            call.end()
            await world.read_run("s", second.run_id, second.cursor)
            other_call.end()
            await world.read_run("t", other.run_id, other.cursor)
            log = await world.events("s")
    end = next(event.body for event in log if event.run_id == first.run_id and isinstance(event.body, AgentError))
    assert end.code == "internal"
    assert "gap" not in types(seen)
    assert log[: len(seen) + 1][1:] == seen
    assert [event.seq for event in log] == list(range(1, len(log) + 1))
    assert {event.epoch for event in log} == {first.cursor.epoch}
    assert world.agents.active_runs == 0


async def test_a_clean_stop_leaves_queued_runs_and_the_next_start_runs_them_in_order(store: GatedStore) -> None:
    with trio.fail_after(5):
        async with open_world(store) as world:
            first = await world.agents.chat(chat("one", "s"))
            for text in ("two", "three"):
                await world.agents.chat(chat(text, "s"))
            await world.agents.drain(0)
            assert await statuses(store) == [RunStatus.QUEUED, RunStatus.QUEUED, RunStatus.INTERRUPTED]
        async with open_world(store) as world:
            for expected in (["one", "two"], ["one", "two", "three"]):
                call = await world.model.next_call()
                assert [content_text(message.content) for message in call.call.messages] == expected
                call.end()
            while RunStatus.QUEUED in await statuses(store) or RunStatus.RUNNING in await statuses(store):
                await trio.lowlevel.checkpoint()
            log = await world.events("s")
    assert {event.epoch for event in log} == {first.cursor.epoch}


async def test_after_a_crash_a_running_run_is_interrupted_once_with_its_durable_text(
    store: GatedStore, autojump_clock: trio.testing.MockClock
) -> None:
    with trio.CancelScope() as process:
        async with open_world(store) as world:
            accepted = await world.agents.chat(chat("one", "s"))
            await world.agents.chat(chat("two", "s"))
            call = await world.model.next_call()
            call.say("durable ")
            await trio.sleep(1)
            call.say("lost")
            await trio.testing.wait_all_tasks_blocked()
            store.failures += [StoreError("the process is dead")] * 100
            process.cancel()
            await trio.lowlevel.checkpoint()
    store.failures.clear()
    store.crash()
    async with open_world(store) as world:
        call = await world.model.next_call()
        assert [content_text(message.content) for message in call.call.messages] == ["one", "durable ", "two"]
        call.end()
        with world.bus.subscribe(S) as subscription:
            # A client that had seen the lost delta.
            seen_seq = accepted.cursor.seq + 6
            await subscription.begin(type(accepted.cursor)(accepted.cursor.epoch, seen_seq))
            first = (await subscription.receive())[0]
        log = await world.events("s")
    assert isinstance(first, Gap)
    assert first.reason == "crash"
    ends = [event.body for event in log if event.run_id == accepted.run_id and isinstance(event.body, AgentError)]
    assert [end.code for end in ends] == ["interrupted"]
    assert [event.seq for event in log] == list(range(1, len(log) + 1))
    assert autojump_clock.current_time() < 100


async def test_after_a_crash_in_a_tool_its_call_is_uncertain(store: GatedStore) -> None:
    async def hang(_: JsonObject) -> ToolResult:
        await trio.sleep_forever()
        raise AssertionError

    toolbox = FakeToolbox(hang=hang)
    with trio.fail_after(5):
        with trio.CancelScope() as process:
            async with open_world(store, toolbox=lambda: toolbox) as world:
                await world.agents.chat(chat("go", "s"))
                call = await world.model.next_call()
                call.ask("hang", tool_call_id="call_1", index=0)
                call.ask("hang", tool_call_id="call_2", index=1)
                call.end()
                await toolbox.called.wait()
                process.cancel()
                await trio.lowlevel.checkpoint()
        store.crash()
        async with open_world(store) as world:
            while RunStatus.RUNNING in await statuses(store):
                await trio.lowlevel.checkpoint()
            log = await world.events("s")
    results = [event.body for event in log if isinstance(event.body, AgentToolComplete)]
    assert [(result.tool_call_id, result.status) for result in results] == [
        ("call_1", "uncertain"),
        ("call_2", "stopped"),
    ]
    assert types(log)[-1] == "agent_error"


async def test_drain_refuses_new_chats_and_lets_active_runs_finish(store: GatedStore) -> None:
    with trio.fail_after(5):
        async with open_world(store) as world:
            accepted = await world.agents.chat(chat("one", "s"))
            call = await world.model.next_call()
            async with trio.open_nursery() as nursery:
                nursery.start_soon(world.agents.drain, 30)
                await trio.testing.wait_all_tasks_blocked()
                with pytest.raises(BambooError) as refusal:
                    await world.agents.chat(chat("two", "t"))
                call.say("whole")
                call.end()
            log = await world.events("s")
    assert refusal.value.code is ErrorCode.DRAINING
    assert refusal.value.retry_after_s
    assert types(log)[-1] == "agent_complete"
    assert log[-1].run_id == accepted.run_id


async def test_what_is_left_after_the_grace_is_interrupted_and_committed(
    store: GatedStore, autojump_clock: trio.testing.MockClock
) -> None:
    async with open_world(store) as world:
        await world.agents.chat(chat("one", "s"))
        call = await world.model.next_call()
        call.say("half")
        await world.agents.drain(3)
        assert call.closed.is_set()
        log = await world.events("s")
    assert types(log)[-2:] == ["agent_message", "agent_error"]
    assert isinstance(log[-1].body, AgentError)
    assert log[-1].body.code == "interrupted"
    assert autojump_clock.current_time() == pytest.approx(3, abs=0.5)


async def test_a_chat_that_is_being_accepted_when_the_server_leaves_holds_nothing_up(
    store: GatedStore, autojump_clock: trio.testing.MockClock
) -> None:
    """Its run starts when it has been looked for what there is to interrupt."""
    async with open_world(store) as world, trio.open_nursery() as nursery:
        store.gate.close()
        nursery.start_soon(world.agents.chat, chat("one", "s"))
        await store.gate.arrived()
        nursery.start_soon(world.agents.drain, 0)
        await trio.testing.wait_all_tasks_blocked()
        store.gate.open()
    assert await statuses(store) == [RunStatus.INTERRUPTED]
    assert autojump_clock.current_time() < 1


async def test_a_session_that_cannot_be_loaded_refuses_what_waits_and_is_tried_again_later(store: GatedStore) -> None:
    with trio.fail_after(5):
        async with open_world(store) as world:
            store.loading_failures += [StoreError("disk failing")]
            with pytest.raises(BambooError) as refusal:
                await world.agents.chat(chat("one", "s"))
            assert refusal.value.code is ErrorCode.STORE_UNAVAILABLE
            store.loading_failures += [RuntimeError("a bug")]
            with pytest.raises(BambooError) as refusal:
                await world.agents.chat(chat("one", "s"))
            assert refusal.value.code is ErrorCode.INTERNAL
            accepted = await world.agents.chat(chat("one", "s"))
            assert world.agents.active_runs == 1
    assert accepted.accepted_as == "started"


async def test_a_commit_that_was_handed_over_is_waited_for_when_everything_is_cancelled(store: GatedStore) -> None:
    """The process is told to die while a chat's commit is with the store: the store is not left in mid-write."""
    with trio.fail_after(5):
        async with trio.open_nursery() as nursery:
            process = trio.CancelScope()

            async def serve() -> None:
                with process:
                    async with open_world(store) as world:
                        await world.agents.chat(chat("one", "s"))

            store.gate.close()
            nursery.start_soon(serve)
            await store.gate.arrived()
            process.cancel()
            await trio.testing.wait_all_tasks_blocked()
            assert store.gate.waiting == 1
            store.gate.open()
    assert [run.status for run in await store.runs(S, limit=5)] == [RunStatus.RUNNING]


async def test_what_a_dead_runner_had_shown_outlives_a_store_that_fails_just_then(store: GatedStore) -> None:
    with trio.fail_after(5):
        async with open_world(store) as world:
            first = await world.agents.chat(chat("one", "s"))
            call = await world.model.next_call()
            with world.bus.subscribe(S) as subscription:
                await subscription.begin(first.cursor)
                seen: list[Item] = []
                call.say("shown")
                while "agent_token" not in types(seen):
                    seen += await subscription.receive()
                store.loading_failures += [StoreError("disk failing")]
                call.fail(RuntimeError("a bug"))
                while "agent_error" not in types(seen):
                    seen += await subscription.receive()
            log = await world.events("s")
    assert types(seen) == [
        "user_message",
        "run_started",
        "agent_token",
        "error",
        "agent_message",
        "agent_error",
    ]
    assert log[1:] == [item for item in seen if isinstance(item, Event)]
    assert {event.epoch for event in log} == {first.cursor.epoch}
