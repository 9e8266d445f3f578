"""The gateway over real sockets: `connect`, `subscribe`, `unsubscribe`, and what a connection then follows."""

from typing import Any

import pytest
import trio
import trio.testing

from bamboo.core.types import SessionId
from tests.support.gateway import gateway_config, open_gateway_world
from tests.support.ws_client import JsonFrame, WsClient, open_ws, seqs, types

DEADLINE_S = 10


async def test_a_connection_without_a_session_gets_a_fresh_one_that_is_not_stored_yet() -> None:
    with trio.fail_after(DEADLINE_S):
        async with open_gateway_world() as world, world.connect() as client:
            assert client.connected["cursor"] is None
            assert client.connected["protocol"] == 1
            assert client.connected["heartbeat_interval_s"] == 30
            assert client.connected["limits"]["gateway.max_message_bytes"] == 1048576
            assert await world.world.store.session(SessionId(client.session_id)) is None
            history = await client.call({"type": "history", "session_id": client.session_id})
            assert history["code"] == "session_not_found"


async def test_an_unknown_session_is_the_clients_own_and_is_stored_with_its_first_message() -> None:
    with trio.fail_after(DEADLINE_S):
        async with open_gateway_world() as world, world.connect(session_id="my-session", after="abc.5") as client:
            assert (client.connected["session_id"], client.connected["cursor"]) == ("my-session", None)
            accepted = await client.chat("hello")
            assert accepted["session_id"] == "my-session"
            await world.finish_run("hi")
            assert types(await client.until_terminal())[0] == "user_message"


async def test_a_stored_session_is_followed_from_now_on() -> None:
    with trio.fail_after(DEADLINE_S):
        async with open_gateway_world() as world:
            session_id, events = await world.finished_session()
            async with world.connect(session_id=session_id) as client:
                assert client.connected["cursor"] == events[-1]["cursor"]
                assert await client.quiet() == []
                await client.chat("again")
                assert seqs([(await client.receive())]) == [events[-1]["seq"] + 1]


async def test_a_client_that_comes_back_with_its_cursor_gets_the_rest_exactly() -> None:
    with trio.fail_after(DEADLINE_S):
        async with open_gateway_world() as world:
            session_id, events = await world.finished_session("a", "b", "c")
            for index, event in enumerate(events[:-1]):
                async with world.connect(session_id=session_id, after=event["cursor"]) as client:
                    assert client.connected["cursor"] == event["cursor"]
                    assert await client.until_terminal() == events[index + 1 :]


@pytest.mark.parametrize(
    ("fields", "code"),
    [
        ({"after": "nonsense", "session_id": "s"}, "invalid_cursor"),
        ({"session_id": "no spaces"}, "invalid_message"),
        ({"session_id": ""}, "invalid_message"),
        ({"session_id": "x" * 129}, "invalid_message"),
        ({"protocol": 2}, "invalid_message"),
        ({"auth": 5}, "invalid_message"),
    ],
)
async def test_a_bad_connect_is_told_and_may_be_mended(fields: dict[str, Any], code: str) -> None:
    with trio.fail_after(DEADLINE_S):
        async with open_gateway_world() as world, open_ws(world.url) as client:
            assert (await client.call({"type": "connect", **fields}))["code"] == code
            assert (await client.call({"type": "connect"}))["type"] == "connected"


async def test_before_connect_nothing_else_is_answered() -> None:
    with trio.fail_after(DEADLINE_S):
        async with open_gateway_world() as world, open_ws(world.url) as client:
            for frame in ({"type": "ping"}, {"type": "chat", "content": "hi"}, {"type": "command", "name": "ping"}):
                assert (await client.call(frame))["code"] == "not_connected"
            assert world.world.model.calls == []


async def test_a_second_connect_is_an_error() -> None:
    with trio.fail_after(DEADLINE_S):
        async with open_gateway_world() as world, world.connect() as client:
            assert (await client.call({"type": "connect"}))["code"] == "invalid_message"
            assert (await client.call({"type": "ping"}))["type"] == "pong"


async def test_a_subscription_goes_on_from_its_cursor_without_a_hole() -> None:
    with trio.fail_after(DEADLINE_S):
        async with open_gateway_world() as world:
            session_id, events = await world.finished_session("a", "b")
            async with world.connect() as client:
                answer = await client.call(
                    {"type": "subscribe", "session_id": session_id, "after": events[2]["cursor"]}
                )
                assert answer["type"] == "subscribed"
                assert answer["cursor"] == events[2]["cursor"]
                assert types(client.seen) == ["connected", "subscribed"]
                assert await client.until_terminal() == events[3:]


async def test_a_cursor_of_another_log_gets_a_gap_and_then_everything() -> None:
    with trio.fail_after(DEADLINE_S):
        async with open_gateway_world() as world:
            session_id, events = await world.finished_session()
            async with world.connect() as client:
                await client.call({"type": "subscribe", "session_id": session_id, "after": "elsewhere.7"})
                gap, created, *rest = await client.until_terminal()
                assert (gap["type"], gap["reason"], created["type"]) == ("gap", "epoch", "session_created")
                assert rest == events


async def test_a_subscription_that_cannot_be_is_told_why() -> None:
    with trio.fail_after(DEADLINE_S):
        async with open_gateway_world(gateway_config(max_subscriptions=2)) as world:
            ids = [(await world.finished_session())[0] for _ in range(3)]

            async def subscribe(client: WsClient, session_id: str, **fields: str) -> JsonFrame:
                return await client.call({"type": "subscribe", "session_id": session_id, **fields})

            async with world.connect(session_id=ids[0]) as client:
                assert (await subscribe(client, ids[0]))["code"] == "already_subscribed"
                assert (await subscribe(client, "nowhere"))["code"] == "session_not_found"
                assert (await subscribe(client, ids[1], after="x"))["code"] == "invalid_cursor"
                assert (await subscribe(client, ids[1]))["type"] == "subscribed"
                refused = await subscribe(client, ids[2])
                assert (refused["code"], refused["retryable"]) == ("overloaded", True)
                assert (await client.call({"type": "chat", "content": "hi", "session_id": ids[2]}))[
                    "code"
                ] == "overloaded"
                await client.call({"type": "unsubscribe", "session_id": ids[1]})
                assert (await subscribe(client, ids[2]))["type"] == "subscribed"
            await world.until_idle()


async def test_nothing_of_a_session_follows_its_unsubscribed() -> None:
    with trio.fail_after(DEADLINE_S):
        async with open_gateway_world() as world, world.connect() as client:
            await client.chat("hello")
            call = await world.next_call()
            for n in range(200):
                call.say(f"{n} ")
                if n == 100:
                    answer = client.call({"type": "unsubscribe", "session_id": client.session_id})
            assert (await answer)["type"] == "unsubscribed"
            call.end()
            async with world.connect(session_id=client.session_id) as other:
                history: JsonFrame = {"live": 1}
                while history["live"] is not None:
                    history = await other.call({"type": "history", "session_id": client.session_id})
            await client.quiet()
            assert types(client.seen)[-2:] == ["unsubscribed", "pong"]


async def test_unsubscribing_from_what_is_not_followed_is_no_error() -> None:
    with trio.fail_after(DEADLINE_S):
        async with open_gateway_world() as world, world.connect() as client:
            answer = await client.call({"type": "unsubscribe", "session_id": "whatever"})
            assert (answer["type"], answer["session_id"]) == ("unsubscribed", "whatever")


async def test_a_deleted_session_is_told_and_followed_no_more() -> None:
    with trio.fail_after(DEADLINE_S):
        async with open_gateway_world() as world:
            session_id, events = await world.finished_session()
            async with world.connect(session_id=session_id, after=events[-1]["cursor"]) as client:
                await world.world.agents.delete(SessionId(session_id))
                assert types(await client.until_type("session_closed")) == ["session_closed"]
                assert (await client.call({"type": "command", "name": "status"}))["result"]["subscriptions"] == 0
                await client.chat("a new one")
                assert (await client.receive())["type"] == "user_message"
