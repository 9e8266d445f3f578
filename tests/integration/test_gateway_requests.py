"""The gateway over real sockets: stops, and the frames that ask for something."""

import pytest
import trio
import trio.testing

from tests.support.gateway import open_gateway_world
from tests.support.ws_client import JsonFrame, open_ws, types

DEADLINE_S = 10


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


async def test_history_is_the_snapshot_and_with_before_only_older_messages() -> None:
    with trio.fail_after(DEADLINE_S):
        async with open_gateway_world() as world:
            session_id, events = await world.finished_session("a", "b")
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
