"""The gateway's contract over real sockets: every frame of a client, its answer, and the order of what comes back."""

from typing import Any

import pytest
import trio

from bamboo.bus.event_bus import EventBus
from bamboo.core.events import AgentToken, Event, SessionCreated
from bamboo.core.types import RunId, SessionId
from bamboo.errors import StartError
from bamboo.gateway.listener import open_gateway
from bamboo.store.base import Commit, Session
from bamboo.store.memory import MemoryStore
from tests.support.gateway import GatewayWorld, gateway_config, open_gateway_world
from tests.support.ws_client import JsonFrame, WsClient, connect, handshake, open_ws

DEADLINE_S = 10


def types(frames: list[JsonFrame]) -> list[str]:
    return [frame["type"] for frame in frames]


def seqs(frames: list[JsonFrame]) -> list[int]:
    return [frame["seq"] for frame in frames if "seq" in frame]


async def finished_session(world: GatewayWorld, *texts: str) -> tuple[str, list[JsonFrame]]:
    """A session with one finished run that said `texts`, and the run's events."""
    async with world.connect() as client:
        await client.chat("hello")
        await world.finish_run(*(texts or ("hi",)))
        return client.session_id, await client.until_terminal()


# connect


async def test_a_connection_without_a_session_gets_a_fresh_one_that_is_not_stored_yet() -> None:
    with trio.fail_after(DEADLINE_S):
        async with open_gateway_world() as world, world.connect() as client:
            assert client.connected["cursor"] is None
            assert client.connected["protocol"] == 1
            assert client.connected["heartbeat_interval_s"] == 30
            assert client.connected["limits"]["max_message_bytes"] == 1048576
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
            session_id, events = await finished_session(world)
            async with world.connect(session_id=session_id) as client:
                assert client.connected["cursor"] == events[-1]["cursor"]
                assert await client.quiet() == []
                await client.chat("again")
                assert seqs([(await client.receive())]) == [events[-1]["seq"] + 1]


async def test_a_client_that_comes_back_with_its_cursor_gets_the_rest_exactly() -> None:
    with trio.fail_after(DEADLINE_S):
        async with open_gateway_world() as world:
            session_id, events = await finished_session(world, "a", "b", "c")
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


# chat


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
            session_id, _ = await finished_session(world)
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
            session_id, _ = await finished_session(world)
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


# subscribe, unsubscribe


async def test_a_subscription_goes_on_from_its_cursor_without_a_hole() -> None:
    with trio.fail_after(DEADLINE_S):
        async with open_gateway_world() as world:
            session_id, events = await finished_session(world, "a", "b")
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
            session_id, events = await finished_session(world)
            async with world.connect() as client:
                await client.call({"type": "subscribe", "session_id": session_id, "after": "elsewhere.7"})
                gap, created, *rest = await client.until_terminal()
                assert (gap["type"], gap["reason"], created["type"]) == ("gap", "epoch", "session_created")
                assert rest == events


async def test_a_subscription_that_cannot_be_is_told_why() -> None:
    with trio.fail_after(DEADLINE_S):
        async with open_gateway_world(gateway_config(max_subscriptions=2)) as world:
            ids = [(await finished_session(world))[0] for _ in range(3)]

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
            session_id, events = await finished_session(world)
            async with world.connect(session_id=session_id, after=events[-1]["cursor"]) as client:
                await world.world.agents.delete(SessionId(session_id))
                assert types(await client.until_type("session_closed")) == ["session_closed"]
                assert (await client.call({"type": "command", "name": "status"}))["result"]["subscriptions"] == 0
                await client.chat("a new one")
                assert (await client.receive())["type"] == "user_message"


# stop


async def test_stopped_comes_after_the_terminal_events_of_what_it_stopped() -> None:
    with trio.fail_after(DEADLINE_S):
        async with open_gateway_world() as world, world.connect() as client:
            first = await client.chat("one")
            second = await client.chat("two")
            await world.next_call()
            stopped = await client.call({"type": "stop", "session_id": client.session_id})

            assert stopped["type"] == "stopped"
            assert stopped["stopped"] == [first["run_id"], second["run_id"]]
            assert stopped["tools_stopped"] == 0
            ended = [frame["run_id"] for frame in client.seen if frame["type"] == "agent_stopped"]
            assert sorted(ended) == sorted(stopped["stopped"])
            assert client.seen[-1] == stopped


async def test_a_stop_names_its_run_or_finds_nothing() -> None:
    with trio.fail_after(DEADLINE_S):
        async with open_gateway_world() as world, world.connect() as client:
            stop = {"type": "stop", "session_id": client.session_id}
            assert (await client.call(stop))["code"] == "session_not_found"
            accepted = await client.chat("one")
            await world.next_call()
            assert (await client.call({**stop, "run_id": "no run of ours"}))["code"] == "run_not_found"
            assert (await client.call({**stop, "run_id": "run_x"}))["code"] == "run_not_found"
            assert (await client.call({**stop, "run_id": accepted["run_id"]}))["stopped"] == [accepted["run_id"]]
            assert (await client.call(stop))["stopped"] == []


async def test_a_session_that_is_not_followed_can_be_stopped() -> None:
    with trio.fail_after(DEADLINE_S):
        async with open_gateway_world() as world, world.connect() as client, world.connect() as other:
            accepted = await client.chat("one")
            await world.next_call()
            stopped = await other.call({"type": "stop", "session_id": client.session_id})
            assert stopped["stopped"] == [accepted["run_id"]]
            assert types(other.seen) == ["connected", "stopped"]


async def test_while_a_stop_is_under_way_the_rest_goes_on_and_its_own_session_waits() -> None:
    with trio.fail_after(DEADLINE_S):
        async with open_gateway_world() as world, world.connect() as client:
            await client.chat("one")
            await world.next_call()
            world.agents.stop_gate.close()
            await client.send({"type": "stop", "session_id": client.session_id, "ref": "stop"})
            await world.agents.stop_gate.arrived()

            assert (await client.call({"type": "ping"}))["type"] == "pong"
            assert (await client.chat("elsewhere", session_id="other"))["accepted_as"] == "started"
            await client.send({"type": "chat", "content": "two", "ref": "two"})
            await client.send({"type": "ping", "ref": "behind"})
            elsewhere = await world.next_call()
            elsewhere.say("still here")
            await client.until_type("agent_token")
            assert not {"two", "behind"} & {frame.get("ref") for frame in client.seen}

            world.agents.stop_gate.open()
            await client.answer("behind")
            refs = [frame["ref"] for frame in client.seen if "ref" in frame]
            assert refs[-3:] in (["stop", "two", "behind"], ["two", "stop", "behind"])


async def test_a_client_that_leaves_during_its_stop_leaves_nothing_behind() -> None:
    with trio.fail_after(DEADLINE_S):
        async with open_gateway_world() as world:
            world.agents.stop_gate.close()
            async with world.connect(session_id="s") as client:
                await client.chat("one")
                await world.next_call()
                await client.send({"type": "stop", "session_id": "s"})
                await world.agents.stop_gate.arrived()
            await world.until_idle()
            assert world.world.agents.active_runs == 0


# history, command, ping, approve


async def test_history_is_the_snapshot_and_with_before_only_older_messages() -> None:
    with trio.fail_after(DEADLINE_S):
        async with open_gateway_world() as world:
            session_id, events = await finished_session(world, "a", "b")
            async with world.connect() as client:
                snapshot = await client.call({"type": "history", "session_id": session_id})
                assert [(m["role"], m["content"]) for m in snapshot["messages"]] == [
                    ("user", "hello"),
                    ("assistant", "ab"),
                ]
                assert (snapshot["cursor"], snapshot["live"], snapshot["queue"]) == (events[-1]["cursor"], None, [])
                newest = await client.call({"type": "history", "session_id": session_id, "limit": 1})
                assert newest["messages"] == snapshot["messages"][1:]
                older = await client.call(
                    {"type": "history", "session_id": session_id, "before": newest["messages"][0]["message_id"]}
                )
                assert older["messages"] == snapshot["messages"][:1]
                assert not {"cursor", "live", "queue"} & set(older)
                for limit in (0, 100_000, "5", True):
                    answer = await client.call({"type": "history", "session_id": session_id, "limit": limit})
                    assert answer["code"] == "invalid_message"


async def test_commands_are_answered() -> None:
    with trio.fail_after(DEADLINE_S):
        async with open_gateway_world() as world, world.connect() as client:

            async def command(name: str, **args: object) -> JsonFrame:
                return await client.call({"type": "command", "name": name, "args": args})

            assert (await command("ping"))["type"] == "pong"
            accepted = await client.chat("hello")
            await world.next_call()
            status = await command("status")
            assert (status["type"], status["name"]) == ("command_result", "status")
            assert status["result"] == {
                "connection_id": client.connected["connection_id"],
                "session_id": client.session_id,
                "subscriptions": 1,
                "draining": False,
                "active_runs": 1,
                "queued_runs": 0,
            }
            assert (await command("skills"))["result"] == {"revision": 0, "skills": [], "errors": []}
            assert (await command("stop", run_id=5))["code"] == "invalid_message"
            stopped = await command("stop")
            assert (stopped["type"], stopped["name"]) == ("command_result", "stop")
            assert stopped["result"]["stopped"] == [accepted["run_id"]]
            assert client.seen[-2]["type"] == "agent_stopped"
            assert (await command("reboot"))["code"] == "unknown_command"


async def test_a_ping_is_answered_with_its_own_timestamp() -> None:
    with trio.fail_after(DEADLINE_S):
        async with open_gateway_world() as world, world.connect() as client:
            for timestamp in (12345, 1.5, "2026-01-01T00:00:00Z"):
                assert (await client.call({"type": "ping", "timestamp": timestamp}))["timestamp"] == timestamp
            assert isinstance((await client.call({"type": "ping"}))["timestamp"], int)


async def test_there_are_no_approvals_yet() -> None:
    with trio.fail_after(DEADLINE_S):
        async with open_gateway_world() as world, world.connect() as client:
            answer = await client.call({"type": "approve", "approval_id": "a", "decision": "approve"})
            assert answer["code"] == "approval_not_found"


@pytest.mark.parametrize("ref", ["mine", 7, ""])
async def test_a_ref_comes_back_in_every_answer_and_in_errors(ref: str | int) -> None:
    with trio.fail_after(DEADLINE_S):
        async with open_gateway_world() as world, open_ws(world.url) as client:
            for frame in (
                {"type": "ping"},
                {"type": "connect"},
                {"type": "connect", "auth": 5},
                {"type": "ping"},
                {"type": "subscribe", "session_id": "x"},
                {"type": "unsubscribe", "session_id": "x"},
                {"type": "nonsense"},
                {"no": "type"},
            ):
                await client.send({**frame, "ref": ref})
                assert (await client.receive())["ref"] == ref, frame


async def test_frames_are_answered_in_their_order() -> None:
    with trio.fail_after(DEADLINE_S):
        async with open_gateway_world() as world, world.connect() as client:
            for n in range(100):
                await client.send({"type": ("ping", "nonsense", "unsubscribe")[n % 3], "session_id": "s", "ref": n})
            await client.answer(99)
            assert [frame["ref"] for frame in client.seen[1:]] == list(range(100))


# Who may come in


async def test_a_token_is_checked_before_the_upgrade_or_in_connect() -> None:
    config = gateway_config(server={"auth_token": "secret-token"})
    with trio.fail_after(DEADLINE_S):
        async with open_gateway_world(config) as world:
            for wrong in ("Bearer wrong", "Basic secret-token", "Bearer", "", "secret-token"):
                answer = await handshake(world.url, Authorization=wrong)
                assert (answer.status, answer.error_code) == (401, "unauthorized"), wrong
            async with connect(world.url, headers={"Authorization": "Bearer secret-token"}) as client:
                assert (await client.call({"type": "ping"}))["type"] == "pong"
            async with world.connect(auth="secret-token") as client:
                assert (await client.call({"type": "ping"}))["type"] == "pong"


@pytest.mark.parametrize("fields", [{}, {"auth": "wrong"}, {"auth": ""}, {"auth": "secret-tokén"}])
async def test_a_connect_without_the_token_is_told_and_closed_with_4401(fields: dict[str, str]) -> None:
    config = gateway_config(auth_token="secret-token", server={"auth_token": "of the http server".replace(" ", "-")})
    with trio.fail_after(DEADLINE_S):
        async with open_gateway_world(config) as world, open_ws(world.url) as client:
            await client.send({"type": "connect", "ref": "c", **fields})
            error = await client.receive()
            assert (error["type"], error["code"], error["ref"]) == ("error", "unauthorized", "c")
            assert await client.close_code() == 4401


@pytest.mark.parametrize("host", ["evil.example", "evil.example:18790", "127.0.0.1.evil.example", "10.0.0.1", ""])
async def test_a_foreign_host_is_refused_before_the_upgrade(host: str) -> None:
    with trio.fail_after(DEADLINE_S):
        async with open_gateway_world() as world:
            answer = await handshake(world.url, Host=host)
            assert (answer.status, answer.error_code) == (403, "forbidden")


@pytest.mark.parametrize("host", ["127.0.0.1", "LOCALHOST:99", "[::1]:5", "bamboo.example", "Bamboo.Example:443"])
async def test_a_known_host_comes_in(host: str) -> None:
    with trio.fail_after(DEADLINE_S):
        config = gateway_config(server={"allowed_hosts": ("bamboo.example",)})
        async with open_gateway_world(config) as world:
            assert (await handshake(world.url, Host=host)).status == 101


async def test_a_browser_comes_in_from_known_origins_only() -> None:
    config = gateway_config(allowed_origins=("https://bamboo.example",))
    with trio.fail_after(DEADLINE_S):
        async with open_gateway_world(config) as world:
            for origin in ("http://127.0.0.1:8081", "http://localhost:8081", "https://bamboo.example"):
                async with connect(world.url, headers={"Origin": origin}):
                    pass
            for origin in ("https://evil.example", "http://127.0.0.1:9999", "null", "", "https://bamboo.example.evil"):
                assert (await handshake(world.url, Origin=origin)).status == 403, origin


async def test_over_the_cap_the_upgrade_is_refused_until_somebody_leaves() -> None:
    with trio.fail_after(DEADLINE_S):
        async with open_gateway_world(gateway_config(max_connections=2)) as world, world.connect() as staying:
            async with world.connect():
                assert world.gateway.connections == 2
                answer = await handshake(world.url)
                assert (answer.status, answer.error_code) == (503, "overloaded")
                assert answer.headers["retry-after"] == "5"
            while world.gateway.connections == 2:
                await staying.call({"type": "ping"})
            async with world.connect() as third:
                assert (await third.call({"type": "ping"}))["type"] == "pong"


# The server's end


async def test_draining_is_told_to_all_and_to_those_who_come_later_and_chats_are_refused() -> None:
    with trio.fail_after(DEADLINE_S):
        async with open_gateway_world() as world, world.connect() as client, world.connect() as other:
            world.gateway.draining(12.5)
            for each in (client, other):
                assert await each.receive() == {"type": "draining", "grace_s": 12.5}
            async with open_ws(world.url) as late:
                await late.send({"type": "connect"})
                frames = await late.until_type("connected")
                assert "draining" in types(frames) or (await late.receive())["type"] == "draining"
            world.world.agents.draining = True
            answer = await client.call({"type": "chat", "content": "hi"})
            assert (answer["code"], answer["retryable"]) == ("draining", True)
            assert answer["retry_after_ms"] > 0


async def test_at_the_end_clients_get_what_there_is_and_then_1001() -> None:
    with trio.fail_after(DEADLINE_S):
        endings: list[tuple[int, list[JsonFrame]]] = []

        async def stay(url: str, session_id: str, task_status: trio.TaskStatus[None]) -> None:
            """Asks for the whole session as the last thing before the server goes, and reads to the end."""
            async with open_ws(url) as client:
                await client.call({"type": "connect"})
                await client.send({"type": "subscribe", "session_id": session_id, "after": "none.0", "ref": 1})
                await client.answer(1)
                task_status.started()
                endings.append((await client.close_code(), client.seen))

        async with trio.open_nursery() as nursery, open_gateway_world() as world:
            session_id, events = await finished_session(world, *(f"{n} " for n in range(50)))
            for _ in range(5):
                await nursery.start(stay, world.url, session_id)

        assert [code for code, _ in endings] == [1001] * 5
        for _, seen in endings:
            assert seen[-len(events) :] == events


async def test_what_was_published_in_the_last_moment_comes_before_1001() -> None:
    with trio.fail_after(DEADLINE_S):
        session_id, run_id = SessionId("s"), RunId("r")
        endings: list[tuple[int, list[JsonFrame]]] = []

        async def stay(url: str, task_status: trio.TaskStatus[None]) -> None:
            async with connect(url, session_id=session_id) as client:
                task_status.started()
                endings.append((await client.close_code(), client.seen))

        async with (
            trio.open_nursery() as nursery,
            open_gateway_world() as world,
            world.world.store.own(session_id) as log,
        ):
            created = Event(session_id, log.epoch, 1, 0, None, SessionCreated())
            await log.commit(Commit(events=[created], session=Session(session_id, 0, 0)))
            window = world.world.bus.open_window(session_id, log.epoch, 1, first_seq=1)
            await nursery.start(stay, world.url)
            for seq in range(2, 10):
                window.publish(Event(session_id, log.epoch, seq, 0, run_id, AgentToken("x")))

        ((code, seen),) = endings
        assert (code, seqs(seen)) == (1001, list(range(2, 10)))


async def test_after_the_end_nobody_listens() -> None:
    with trio.fail_after(DEADLINE_S):
        async with open_gateway_world() as world:
            url = world.url
        with pytest.raises(OSError, match=r"refused|connect"):
            await trio.open_tcp_stream("127.0.0.1", int(url.split(":")[2].strip("/")))


async def test_a_port_that_is_taken_is_one_clear_line() -> None:
    with trio.fail_after(DEADLINE_S):
        async with open_gateway_world() as world, trio.open_nursery() as nursery:
            config = gateway_config()
            config = config.model_copy(
                update={"gateway": config.gateway.model_copy(update={"bind": f"127.0.0.1:{world.gateway.port}"})}
            )
            store = MemoryStore(lambda: 0)
            with pytest.raises(StartError) as caught:
                async with open_gateway(
                    config,
                    nursery,
                    agents=world.agents,
                    bus=EventBus(store, window_bytes=1024),
                    store=store,
                    page_origins=list,
                ):
                    pass
            assert str(caught.value).startswith(f"gateway.bind: cannot listen on 127.0.0.1:{world.gateway.port}: ")
            assert "\n" not in str(caught.value)


async def test_nothing_of_a_connection_is_left_when_it_is_gone() -> None:
    with trio.fail_after(DEADLINE_S):
        async with open_gateway_world() as world:
            session_id, _ = await finished_session(world)
            for _ in range(20):
                async with world.connect(session_id=session_id) as client:
                    await client.chat("hello", session_id="another")
            await world.until_idle()
            assert world.gateway.connections == 0
            assert world.world.bus.subscriptions == 0
