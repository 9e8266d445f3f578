"""Accepting chats: one commit, one answer, in order, within the limits."""

import pytest
import trio
import trio.testing

from bamboo.config import AgentConfig
from bamboo.core.events import AgentStopped, Event, RunQueued, RunStarted
from bamboo.core.types import RunStatus, SessionId, content_text
from bamboo.errors import BambooError, ErrorCode
from tests.support.agents import chat, config, is_terminal, open_world, types
from tests.support.stores import GatedStore


async def test_a_chat_streams_from_its_message_to_one_terminal_event(store: GatedStore) -> None:
    with trio.fail_after(5):
        async with open_world(store) as world:
            accepted = await world.agents.chat(chat("hi", "s"))
            call = await world.model.next_call()
            call.say("Hel", "lo")
            call.end()
            events = await world.read_run("s", accepted.run_id, accepted.cursor)
    assert accepted.accepted_as == "started"
    assert accepted.status is RunStatus.RUNNING
    assert types(events) == [
        "user_message",
        "run_started",
        "agent_token",
        "agent_token",
        "agent_message",
        "agent_complete",
    ]
    assert [event.seq for event in events if isinstance(event, Event)] == [2, 3, 4, 5, 6, 7]


async def test_a_second_chat_in_mid_stream_waits_its_turn_and_the_history_stays_valid(store: GatedStore) -> None:
    with trio.fail_after(5):
        async with open_world(store) as world:
            first = await world.agents.chat(chat("one", "s"))
            call = await world.model.next_call()
            call.say("a")
            second = await world.agents.chat(chat("two", "s"))
            call.say("b")
            call.end()
            await world.read_run("s", first.run_id, first.cursor)
            call = await world.model.next_call()
            told = [(message.role, content_text(message.content)) for message in call.call.messages]
            call.end()
            await world.read_run("s", second.run_id, second.cursor)
            log = await world.events("s")
    assert second.accepted_as == "queued"
    assert told == [("user", "one"), ("assistant", "ab"), ("user", "two")]
    assert [event.seq for event in log] == list(range(1, len(log) + 1))
    assert [event.body.position for event in log if isinstance(event.body, RunQueued)] == [1]
    assert len([event for event in log if is_terminal(event)]) == 2


async def test_reject_on_a_busy_session_stores_nothing(store: GatedStore) -> None:
    with trio.fail_after(5):
        async with open_world(store) as world:
            await world.agents.chat(chat("one", "s"))
            before = len(await world.events("s"))
            with pytest.raises(BambooError) as refusal:
                await world.agents.chat(chat("two", "s", on_busy="reject"))
            assert refusal.value.code is ErrorCode.BUSY
            assert len(await world.events("s")) == before
            assert len(await store.runs(SessionId("s"), limit=10)) == 1


async def test_interrupt_is_accepted_first_then_ends_the_running_and_the_queued_runs(store: GatedStore) -> None:
    with trio.fail_after(5):
        async with open_world(store) as world:
            running = await world.agents.chat(chat("one", "s"))
            call = await world.model.next_call()
            queued = await world.agents.chat(chat("two", "s"))
            newest = await world.agents.chat(chat("three", "s", on_busy="interrupt"))
            next_call = await world.model.next_call()
            assert call.closed.is_set()
            next_call.end()
            await world.read_run("s", newest.run_id, newest.cursor)
            log = await world.events("s")
    ends = {event.run_id: event.body for event in log if is_terminal(event)}
    assert ends[running.run_id] == AgentStopped("superseded")
    assert ends[queued.run_id] == AgentStopped("superseded")
    accepted_at = next(event.seq for event in log if event.run_id == newest.run_id)
    assert all(event.seq > accepted_at for event in log if is_terminal(event))
    assert [content_text(message.content) for message in next_call.call.messages] == ["one", "three"]


async def test_the_same_key_and_content_give_the_same_run(store: GatedStore) -> None:
    with trio.fail_after(5):
        async with open_world(store) as world:
            first = await world.agents.chat(chat("hi", idempotency_key="k"))
            again = await world.agents.chat(chat("hi", idempotency_key="k"))
            with pytest.raises(BambooError) as refusal:
                await world.agents.chat(chat("something else", idempotency_key="k"))
    assert again.accepted_as == "duplicate"
    assert (again.session_id, again.run_id, again.cursor) == (first.session_id, first.run_id, first.cursor)
    assert refusal.value.code is ErrorCode.IDEMPOTENCY_CONFLICT
    assert refusal.value.run_id == first.run_id


async def test_of_concurrent_chats_with_one_key_one_wins_and_the_others_leave_nothing(store: GatedStore) -> None:
    answers = []

    with trio.fail_after(5):
        async with open_world(store) as world:

            async def ask() -> None:
                answers.append(await world.agents.chat(chat("hi", idempotency_key="k")))

            store.gate.close()
            async with trio.open_nursery() as nursery:
                for _ in range(5):
                    nursery.start_soon(ask)
                while store.gate.waiting < 5:  # all five have passed the first look at the key
                    await trio.lowlevel.checkpoint()
                store.gate.open()
            sessions, _ = await store.sessions(limit=10)
            assert world.agents.active_runs == 1
    assert len({answer.run_id for answer in answers}) == 1
    assert sorted(answer.accepted_as for answer in answers) == ["duplicate"] * 4 + ["started"]
    assert len(sessions) == 1


async def test_a_duplicate_is_answered_where_a_new_chat_would_be_refused(store: GatedStore) -> None:
    settings = config(AgentConfig(max_active_runs=1, max_queued_runs=1, max_queued_runs_per_session=1))
    with trio.fail_after(5):
        async with open_world(store, settings) as world:
            first = await world.agents.chat(chat("one", "s", idempotency_key="k1"))
            queued = await world.agents.chat(chat("two", "s", idempotency_key="k2"))
            busy = await world.agents.chat(chat("one", "s", on_busy="reject", idempotency_key="k1"))
            overloaded = await world.agents.chat(chat("two", "s", idempotency_key="k2"))
            world.agents.draining = True
            draining = await world.agents.chat(chat("two", "s", idempotency_key="k2"))
    assert busy.run_id == first.run_id
    assert overloaded.run_id == draining.run_id == queued.run_id


async def test_a_duplicate_that_comes_while_the_first_is_being_accepted_is_never_busy(store: GatedStore) -> None:
    answers = []

    with trio.fail_after(5):
        async with open_world(store) as world:

            async def ask() -> None:
                answers.append(await world.agents.chat(chat("hi", "s", on_busy="reject", idempotency_key="k")))

            store.gate.close()
            async with trio.open_nursery() as nursery:
                nursery.start_soon(ask)
                await store.gate.arrived()
                nursery.start_soon(ask)  # the key is not in the store yet, so it gets into the inbox
                await trio.testing.wait_all_tasks_blocked()
                store.gate.open()
    assert sorted(answer.accepted_as for answer in answers) == ["duplicate", "started"]
    assert answers[0].run_id == answers[1].run_id


async def test_a_full_queue_refuses_and_says_when_to_come_back(store: GatedStore) -> None:
    settings = config(AgentConfig(max_active_runs=1, max_queued_runs=3, max_queued_runs_per_session=2))
    refusals = []
    with trio.fail_after(5):
        async with open_world(store, settings) as world:
            for _ in range(3):
                await world.agents.chat(chat("x", "a"))
            for session in ("a", "b", "c"):
                try:
                    await world.agents.chat(chat("x", session))
                except BambooError as error:
                    refusals.append(error)
            assert world.agents.queued_runs == 3
    assert [refusal.code for refusal in refusals] == [ErrorCode.OVERLOADED, ErrorCode.OVERLOADED]
    assert all(refusal.retry_after_s and refusal.retryable for refusal in refusals)
    assert await store.session(SessionId("c")) is None


async def test_slots_go_to_sessions_in_the_order_in_which_they_asked(store: GatedStore) -> None:
    settings = config(AgentConfig(max_active_runs=1))
    order = []
    with trio.fail_after(5):
        async with open_world(store, settings) as world:
            await world.agents.chat(chat("0", "a"))
            for number, session in enumerate("baca", start=1):
                accepted = await world.agents.chat(chat(str(number), session))
                assert accepted.accepted_as == "queued"
            for _ in range(5):
                call = await world.model.next_call()
                assert world.agents.active_runs == 1
                order.append(content_text(call.call.messages[-1].content))
                call.end()
    # Session a's second run asks for a slot only when its first is over: b and c were there before it.
    assert order == ["0", "1", "3", "2", "4"]


async def test_provider_and_model_come_from_the_chat_then_the_session_then_the_configuration(store: GatedStore) -> None:
    models = []
    with trio.fail_after(5):
        async with open_world(store) as world:

            async def ask(**options: object) -> None:
                accepted = await world.agents.chat(chat("x", "s", **options))
                call = await world.model.next_call()
                call.end()
                events = await world.read_run("s", accepted.run_id, accepted.cursor)
                started = events[1]
                assert isinstance(started, Event)
                assert isinstance(started.body, RunStarted)
                models.append(started.body.model)
                assert call.call.model == models[-1]

            await ask()
            await world.agents.update_session(SessionId("s"), {"model": "session-model", "provider": "played"})
            await ask()
            await ask(model="chat-model")
            await ask(provider="played")
    assert models == ["played-1", "session-model", "chat-model", "session-model"]


async def test_an_unknown_provider_is_refused_before_anything_is_stored(store: GatedStore) -> None:
    with trio.fail_after(5):
        async with open_world(store) as world:
            with pytest.raises(BambooError) as refusal:
                await world.agents.chat(chat("x", "s", provider="nobody"))
            assert refusal.value.code is ErrorCode.INVALID_REQUEST
            await world.agents.chat(chat("x", "t"))
            with pytest.raises(BambooError) as refusal:
                await world.agents.update_session(SessionId("t"), {"provider": "nobody"})
            assert refusal.value.code is ErrorCode.INVALID_REQUEST
    assert await store.session(SessionId("s")) is None


async def test_prompt_and_parameters_of_chat_session_and_configuration_are_joined(store: GatedStore) -> None:
    settings = config(AgentConfig(system_prompt="of the server"))
    seen = []
    with trio.fail_after(5):
        async with open_world(store, settings) as world:

            async def ask(**options: object) -> None:
                accepted = await world.agents.chat(chat("x", "s", **options))
                call = await world.model.next_call()
                seen.append((call.call.system_prompt, call.call.params))
                call.end()
                await world.read_run("s", accepted.run_id, accepted.cursor)

            await ask()
            await world.agents.update_session(
                SessionId("s"), {"system_prompt": "of the session", "params": {"temperature": 1, "top_p": 0.5}}
            )
            await ask()
            await ask(system_prompt="of the chat", params={"temperature": 0})
    assert seen == [
        ("of the server", None),
        ("of the session", {"temperature": 1, "top_p": 0.5}),
        ("of the chat", {"temperature": 0, "top_p": 0.5}),
    ]


async def test_a_caller_that_leaves_undoes_nothing(store: GatedStore) -> None:
    with trio.fail_after(5):
        async with open_world(store) as world:
            store.gate.close()
            async with trio.open_nursery() as nursery:
                nursery.start_soon(world.agents.chat, chat("hi", "s"))
                await store.gate.arrived()
                nursery.cancel_scope.cancel()
            store.gate.open()
            call = await world.model.next_call()
            call.end()
            [run] = await store.runs(SessionId("s"), limit=5)
            assert run.first_cursor is not None
            await world.read_run("s", run.run_id, run.first_cursor)
    assert [run.status for run in await store.runs(SessionId("s"), limit=5)] == [RunStatus.COMPLETED]


async def test_a_full_inbox_is_overloaded(store: GatedStore) -> None:
    settings = config(AgentConfig(inbox_size=1))
    codes = []
    with trio.fail_after(5):
        async with open_world(store, settings) as world:
            store.gate.close()
            async with trio.open_nursery() as nursery:
                nursery.start_soon(world.agents.chat, chat("1", "s"))
                await store.gate.arrived()
                nursery.start_soon(world.agents.chat, chat("2", "s"))
                await trio.testing.wait_all_tasks_blocked()
                try:
                    await world.agents.chat(chat("3", "s"))
                except BambooError as error:
                    codes.append(error.code)
                store.gate.open()
    assert codes == [ErrorCode.OVERLOADED]
