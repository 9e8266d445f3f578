"""The gateway over real sockets: chats, their answers, and the order of what comes back."""

from typing import Any

import pytest
import trio
import trio.testing

from bamboo.core.types import SessionId
from tests.support.gateway import open_gateway_world
from tests.support.ws_client import types

DEADLINE_S = 10


async def test_a_chat_is_accepted_and_streams_to_its_terminal_event() -> None:
    with trio.fail_after(DEADLINE_S):
        async with open_gateway_world() as world, world.connect() as client:
            accepted = await client.chat("hello", client_message_id="m1")
            await world.finish_run("he", "llo")
            events = await client.until_terminal(accepted["run_id"])

            assert accepted["accepted_as"] == "started"
            assert accepted["session_id"] == client.session_id
            assert types(events) == [
                "user_message",
                "run_started",
                "agent_token",
                "agent_token",
                "agent_message",
                "agent_complete",
            ]
            assert events[0]["message_id"] == accepted["message_id"]
            assert events[0]["client_message_id"] == "m1"
            epoch, _, before = accepted["cursor"].partition(".")
            assert [event["cursor"] for event in events] == [f"{epoch}.{int(before) + n}" for n in range(1, 7)]


async def test_a_chat_sent_again_on_a_new_connection_is_the_same_run() -> None:
    """Its client never learned the session that was made for it: the answer was lost with the connection."""
    with trio.fail_after(DEADLINE_S):
        async with open_gateway_world() as world:
            async with world.connect() as client:
                first = await client.chat("hello", client_message_id="m1")
            async with world.connect() as client:
                again = await client.chat("hello", client_message_id="m1")
                call = await world.next_call()
                call.end()
                events = await client.until_terminal()
            async with world.connect(session_id="named") as client:
                other = await client.call({"type": "chat", "content": "hello", "client_message_id": "m1"})
    assert again["accepted_as"] == "duplicate"
    assert (again["session_id"], again["run_id"]) == (first["session_id"], first["run_id"])
    assert events[0]["type"] == "user_message"
    assert other["code"] == "idempotency_conflict"


async def test_everybody_who_follows_a_session_gets_the_same_events() -> None:
    with trio.fail_after(DEADLINE_S):
        async with open_gateway_world() as world:
            session_id, _ = await world.finished_session()
            async with world.connect() as one, world.connect(session_id=session_id) as two:
                await one.call({"type": "subscribe", "session_id": session_id})
                await two.chat("hello")
                await world.finish_run("x", "y", "z")
                assert await one.until_terminal() == await two.until_terminal()


async def test_a_chat_to_another_session_is_followed_too() -> None:
    with trio.fail_after(DEADLINE_S):
        async with open_gateway_world() as world, world.connect() as client:
            accepted = await client.chat("hello", session_id="other")
            await world.finish_run("hi")
            events = await client.until_terminal()
            assert {event["session_id"] for event in events} == {accepted["session_id"]} == {"other"}


@pytest.mark.parametrize("before", ["not followed before", "followed already"])
async def test_the_answer_to_a_chat_comes_before_any_event_that_it_causes(before: str) -> None:
    with trio.fail_after(DEADLINE_S):
        async with open_gateway_world() as world:
            session_id, _ = await world.finished_session()
            async with world.connect(session_id=session_id) as other, world.connect() as client:
                if before == "followed already":
                    await client.call({"type": "subscribe", "session_id": session_id})
                world.agents.chat_gate.close()
                await client.send({"type": "chat", "content": "go", "session_id": session_id, "ref": 1})
                await world.finish_run("hi")
                events = await other.until_terminal()
                world.agents.chat_gate.open()

                frames = await client.until_terminal()
                assert types(frames[:1]) == ["accepted"]
                assert frames[1:] == events


async def test_events_of_other_sessions_go_on_while_a_chat_is_being_accepted() -> None:
    with trio.fail_after(DEADLINE_S):
        async with open_gateway_world() as world, world.connect() as client:
            await client.chat("first")
            first = await world.next_call()
            world.agents.chat_gate.close()
            await client.send({"type": "chat", "content": "second", "session_id": "other", "ref": "second"})
            await world.agents.chat_gate.arrived()
            first.say("still here")
            assert (await client.until_type("agent_token"))[-1]["token"] == "still here"
            world.agents.chat_gate.open()
            assert (await client.answer("second"))["type"] == "accepted"


async def test_a_chat_that_is_sent_again_gives_the_same_run_and_is_followed_from_its_beginning() -> None:
    with trio.fail_after(DEADLINE_S):
        async with open_gateway_world() as world:
            async with world.connect(session_id="s") as client:
                first = await client.chat("hello", client_message_id="key")
                await world.finish_run("hi")
                events = await client.until_terminal()
            async with world.connect() as client:
                second = await client.chat("hello", client_message_id="key", session_id="s")
                assert second["accepted_as"] == "duplicate"
                assert second["run_id"] == first["run_id"]
                assert await client.until_terminal() == events
                conflict = await client.call(
                    {"type": "chat", "content": "else", "client_message_id": "key", "session_id": "s"}
                )
                assert conflict["code"] == "idempotency_conflict"


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"content": ""},
        {"content": 5},
        {"content": []},
        {"content": "hi", "on_busy": "never"},
        {"content": "hi", "model": 1},
        {"content": [{"type": "video"}]},
    ],
)
async def test_a_chat_that_is_wrong_is_told_which_field_and_stores_nothing(fields: dict[str, Any]) -> None:
    with trio.fail_after(DEADLINE_S):
        async with open_gateway_world() as world, world.connect() as client:
            answer = await client.call({"type": "chat", **fields})
            assert answer["code"] == "invalid_message"
            assert answer["message"].split(":")[0].split(".")[0] in ("content", "on_busy", "model")
            assert await world.world.store.session(SessionId(client.session_id)) is None


async def test_a_chat_to_a_provider_that_is_not_there_is_invalid() -> None:
    with trio.fail_after(DEADLINE_S):
        async with open_gateway_world() as world, world.connect() as client:
            answer = await client.call({"type": "chat", "content": "hi", "provider": "nobody"})
            assert answer["code"] == "invalid_request"


async def test_a_client_that_leaves_costs_its_run_nothing() -> None:
    with trio.fail_after(DEADLINE_S):
        async with open_gateway_world() as world:
            async with world.connect(session_id="s") as client:
                await client.chat("hello")
                call = await world.next_call()
                call.say("one")
                seen = await client.until_type("agent_token")
            await world.until_idle()
            call.say("two")
            call.end()
            async with world.connect(session_id="s", after=seen[-1]["cursor"]) as client:
                rest = await client.until_terminal()
            assert types(rest) == ["agent_token", "agent_message", "agent_complete"]
            assert rest[1]["content"] == "onetwo"


async def test_a_chat_whose_client_leaves_before_the_answer_is_accepted_all_the_same() -> None:
    with trio.fail_after(DEADLINE_S):
        async with open_gateway_world() as world:
            world.agents.chat_gate.close()
            async with world.connect(session_id="s") as client:
                await client.send({"type": "chat", "content": "hello"})
                await world.agents.chat_gate.arrived()
            await world.until_idle()
            await world.finish_run("hi")
            async with world.connect() as client:
                await client.call({"type": "subscribe", "session_id": "s"})
                history = await client.call({"type": "history", "session_id": "s"})
                assert history["messages"][0]["content"] == "hello"
