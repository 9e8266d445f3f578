"""Stop, for real: when its receipt is there, the run's connection to the model is closed, nothing of it is alive, its
end is committed and was told, and the next chat goes on from what was said.

Everything over sockets, with a model server that the test plays. `tests/faults/test_stop_sweep.py` has the races.
"""

import select
from collections.abc import Awaitable, Callable
from pathlib import Path

import pytest
import trio
import trio.testing

from bamboo.core.types import RunId, RunStatus
from bamboo.store import wall_clock_ms
from tests.support import http_client, ws_client
from tests.support.http_client import HttpConnection, ask, request_bytes
from tests.support.readers import Reader, log_of
from tests.support.server import DEADLINE_S
from tests.support.stalled import STALLED_BUFFER_BYTES, open_stalled, read_on
from tests.support.stopping import (
    Receipt,
    Stand,
    Stop,
    by_cancelling,
    by_command,
    check_valid,
    open_stand,
    over_http,
    over_ws,
)
from tests.support.stores import GatedStore
from tests.support.upstream import Answer, FakeToolCall, Reply, error_answer
from tests.support.web import open_web_world

TOKENS = ("Half", " a", " sentence", " and", " more")

STOPS = pytest.mark.parametrize("stop", [over_http, over_ws])
EVERY_STOP = pytest.mark.parametrize("stop", [over_http, by_cancelling, over_ws, by_command])


# Where the run is. Each begins a run in the stand's session, brings it there, and gives its id and its model call.

Situation = Callable[[Stand, Reader], Awaitable[tuple[str, Reply]]]


async def streaming(stand: Stand, reader: Reader) -> tuple[str, Reply]:
    reply = stand.upstream.answer(Answer(tokens=TOKENS, gated=True))
    run_id = await stand.chat()
    reply.release(3)
    for _ in range(3):
        await reader.until("agent_token")
    return run_id, reply


async def reasoning(stand: Stand, reader: Reader) -> tuple[str, Reply]:
    reply = stand.upstream.answer(Answer(tokens=TOKENS, reasoning=["hm", "hm"], gated=True))
    run_id = await stand.chat()
    await reader.until("agent_reasoning")
    return run_id, reply


async def awaiting_the_first_token(stand: Stand, _reader: Reader) -> tuple[str, Reply]:
    reply = stand.upstream.answer(Answer(tokens=TOKENS, gated=True))
    run_id = await stand.chat()
    await reply.wait_requested()
    return run_id, reply


async def awaiting_the_head(stand: Stand, _reader: Reader) -> tuple[str, Reply]:
    reply = stand.upstream.answer(Answer(fault="stall", fault_after=None))
    run_id = await stand.chat()
    await reply.wait_requested()
    return run_id, reply


async def awaiting_a_tool(stand: Stand, reader: Reader) -> tuple[str, Reply]:
    call = FakeToolCall("look")
    reply = stand.upstream.answer(Answer(tokens=TOKENS[:3], tool_calls=[call], headers={"connection": "close"}))
    run_id = await stand.chat()
    await reader.until("agent_tool_start")
    await stand.tool.called.wait()
    return run_id, reply


async def awaiting_a_retry(stand: Stand, reader: Reader) -> tuple[str, Reply]:
    refusal = error_answer(429, "slow down", headers={"retry-after": "25", "connection": "close"})
    reply = stand.upstream.answer(refusal)
    run_id = await stand.chat()
    [*_, retry] = await reader.until("agent_retry")
    assert retry.fields["delay_ms"] == 25_000
    return run_id, reply


@pytest.mark.parametrize(
    ("situation", "ends_with", "told"),
    [
        (streaming, "agent_message agent_stopped", ["user", "assistant"]),
        (reasoning, "agent_reasoning agent_stopped", ["user"]),
        (awaiting_the_first_token, "run_started agent_stopped", ["user"]),
        (awaiting_the_head, "run_started agent_stopped", ["user"]),
        (awaiting_a_retry, "agent_retry agent_stopped", ["user"]),
        (awaiting_a_tool, "agent_tool_start agent_tool_complete agent_stopped", ["user", "assistant", "tool"]),
    ],
)
@EVERY_STOP
async def test_a_stop_ends_a_run_wherever_it_is(
    tmp_path: Path, situation: Situation, ends_with: str, told: list[str], stop: Stop
) -> None:
    with trio.fail_after(DEADLINE_S):
        async with open_stand(tmp_path, max_retries=1) as stand, stand.reader() as sse, stand.reader("connect") as ws:
            run_id, reply = await situation(stand, sse)
            requests = len(stand.upstream.requests)
            receipt = await stop(stand, run_id)
            stand.check_nothing_is_left(ends=2)
            tools = int(situation is awaiting_a_tool)
            assert receipt == {"stopped": [run_id], "tools_stopped": tools, "elapsed_ms": receipt["elapsed_ms"]}
            assert 0 <= receipt["elapsed_ms"] < DEADLINE_S * 1000
            assert stand.tool.cancelled.is_set() == bool(tools)
            if situation not in (awaiting_a_tool, awaiting_a_retry):
                await reply.wait_client_left()

            log = await log_of(stand.server.store, stand.session_id, run_id)
            assert " ".join(item.type for item in log).endswith(ends_with)
            assert log[-1].fields["reason"] == "user"
            assert (await sse.until("agent_stopped"))[-1] == (await ws.until("agent_stopped"))[-1] == log[-1]
            run = await stand.get(f"runs/{run_id}")
            assert (run["status"], run["stop_reason"]) == ("stopped", "user")

            messages = await stand.next_request()
            assert [message["role"] for message in messages] == ["user", "assistant", *told, "user"]
            assert len(stand.upstream.requests) == requests + 1, "the stopped run asked its model again"
            if situation is streaming:
                assert messages[-2]["content"] == "Half a sentence"
                history = await stand.get(f"history/{stand.session_id}?limit=3")
                assert [message.get("partial", False) for message in history["messages"]] == [True, False, False]


async def test_a_stop_without_a_run_takes_the_queue_along_and_one_with_a_run_takes_that(tmp_path: Path) -> None:
    with trio.fail_after(DEADLINE_S):
        async with open_stand(tmp_path) as stand, stand.reader() as reader:
            first, reply = await streaming(stand, reader)
            second, third, fourth = [await stand.chat(text) for text in ("two", "three", "four")]
            assert (await over_http(stand, third))["stopped"] == [third]
            assert (await stand.get(f"runs/{third}"))["status"] == "stopped"
            assert (await stand.get(f"runs/{first}"))["status"] == "running"
            next_reply = stand.upstream.answer(Answer(tokens=TOKENS, gated=True))
            assert (await over_http(stand, first))["stopped"] == [first]
            await reply.wait_client_left()
            await next_reply.wait_requested()  # the next of the queue has begun
            fifth = await stand.chat("five")
            receipt = await over_ws(stand)
            stand.check_nothing_is_left(ends=6)
            await next_reply.wait_client_left()
            assert receipt["stopped"] == [second, fourth, fifth]
            assert len(stand.upstream.requests) == 3
            log = await log_of(stand.server.store, stand.session_id)
            stopped = [item.fields["run_id"] for item in log if item.type == "agent_stopped"]
            assert stopped[:2] == [third, first]
            assert sorted(stopped[2:]) == sorted([second, fourth, fifth])
            texts = [message["content"] for message in await stand.next_request()]
    assert texts == ["hi", "Hello.", "go on", "Half a sentence", "two", "next"], "what never started is no history"


@EVERY_STOP
async def test_a_stop_of_a_run_that_is_over_stops_nothing(tmp_path: Path, stop: Stop) -> None:
    with trio.fail_after(DEADLINE_S):
        async with open_stand(tmp_path) as stand:
            run_id = await stand.chat()
            [*_, end] = await stand.read_to_the_end_of(run_id)
            assert end.type == "agent_complete"
            for _ in range(2):
                receipt = await stop(stand, run_id)
                assert receipt == {"stopped": [], "tools_stopped": 0, "elapsed_ms": receipt["elapsed_ms"]}
            assert (await stand.get(f"runs/{run_id}"))["status"] == "completed"


@STOPS
async def test_a_session_where_nothing_runs_has_nothing_to_stop(tmp_path: Path, stop: Stop) -> None:
    with trio.fail_after(DEADLINE_S):
        async with open_stand(tmp_path) as stand:
            assert (await stop(stand, None))["stopped"] == []


async def test_what_is_not_there_cannot_be_stopped(tmp_path: Path) -> None:
    with trio.fail_after(DEADLINE_S):
        async with open_stand(tmp_path) as stand, stand.reader() as reader:
            run_id, _ = await streaming(stand, reader)
            url, gateway_url = stand.server.http_url, stand.server.gateway_url
            assert gateway_url is not None
            codes = []
            for target, body in (
                ("stop/nobody", {}),
                ("stop/nobody", {"run_id": run_id}),
                (f"stop/{stand.session_id}", {"run_id": "run_nobody"}),
                ("runs/run_nobody/cancel", {}),
            ):
                answer = await ask(url, "POST", f"/api/v1/{target}", json=body)
                assert answer.status == 404
                codes.append(answer.error["code"])
            async with ws_client.connect(gateway_url) as client:
                for fields in (
                    {"session_id": "nobody"},
                    {"session_id": "nobody", "run_id": run_id},
                    {"session_id": stand.session_id, "run_id": "run_nobody"},
                ):
                    error = await client.call({"type": "stop", **fields})
                    assert error["type"] == "error"
                    codes.append(error["code"])
            assert codes[:4] == ["session_not_found", "run_not_found", "run_not_found", "run_not_found"]
            assert codes[4:] == codes[:3]
            assert (await stand.get(f"runs/{run_id}"))["status"] == "running", "another run was stopped"


async def test_stops_that_come_at_once_name_the_run_once_and_all_wait_for_its_end(tmp_path: Path) -> None:
    receipts: list[Receipt] = []
    with trio.fail_after(DEADLINE_S):
        async with open_stand(tmp_path) as stand, stand.reader() as reader:
            run_id, _ = await awaiting_a_tool(stand, reader)

            async def stop(how: Stop, named: str | None) -> None:
                receipts.append(await how(stand, named))
                assert stand.tool.cancelled.is_set()
                assert stand.ends_in_the_database() == 2

            async with trio.open_nursery() as nursery:
                for how in (over_http, by_cancelling, over_ws, by_command):
                    for named in (run_id, None) if how is over_http else (run_id,):
                        nursery.start_soon(stop, how, named)
            stand.check_nothing_is_left(ends=2)
            log = await log_of(stand.server.store, stand.session_id, run_id)
    assert sorted(receipt["stopped"] for receipt in receipts) == [[], [], [], [], [run_id]]
    assert [item.type for item in log].count("agent_stopped") == 1


@STOPS
async def test_a_stop_that_comes_while_a_run_completes_says_what_became_of_it(tmp_path: Path, stop: Stop) -> None:
    """The model's last words come behind the stop, each time a step of the loop later, until the stop has won for
    good. Whichever wins, the receipt, the log and the next request say the same."""
    outcomes: list[str] = []
    receipts: list[Receipt] = []

    async def stop_it(stand: Stand, run_id: str) -> None:
        receipts.append(await stop(stand, run_id))
        stand.check_nothing_is_left(ends=len(outcomes) + 2)

    with trio.fail_after(DEADLINE_S):
        async with open_stand(tmp_path) as stand, stand.reader() as reader:
            while outcomes[-5:] != ["agent_stopped"] * 5:
                reply = stand.upstream.answer(Answer(tokens=TOKENS, gated=True, headers={"connection": "close"}))
                run_id = await stand.chat()
                await reply.wait_requested()
                async with trio.open_nursery() as nursery:
                    nursery.start_soon(stop_it, stand, run_id)
                    for _ in range(len(outcomes)):
                        await trio.lowlevel.checkpoint()
                    reply.release_all()
                outcomes.append((await reader.until("agent_complete", "agent_stopped"))[-1].type)
                assert receipts[-1]["stopped"] == ([run_id] if outcomes[-1] == "agent_stopped" else [])
                check_valid(stand.upstream.requests[-1].json["messages"])
            log = await log_of(stand.server.store, stand.session_id)
    assert [item.type for item in log if item.type in ("agent_complete", "agent_stopped")][1:] == outcomes


def unread(connection: HttpConnection) -> bool:
    """Something has come that was not read."""
    return bool(select.select([connection.stream.socket.fileno()], [], [], 0)[0])


async def test_a_receipt_waits_for_a_tool_that_takes_its_time_to_die(tmp_path: Path) -> None:
    with trio.fail_after(DEADLINE_S):
        async with open_stand(tmp_path) as stand, stand.reader() as reader:
            stand.tool.may_die = trio.Event()
            run_id, _ = await awaiting_a_tool(stand, reader)
            async with http_client.connect(stand.server.http_url) as stopper:
                await stopper.send(request_bytes("POST", f"/api/v1/runs/{run_id}/cancel"))
                await stand.tool.cancelled.wait()
                assert (await ask(stand.server.http_url, "GET", "/healthz")).status == 200
                assert not unread(stopper)
                assert stand.ends_in_the_database() == 1
                stand.tool.may_die.set()
                receipt = (await stopper.read_answer()).json()
                stand.check_nothing_is_left(ends=2)
    assert (receipt["stopped"], receipt["tools_stopped"]) == ([run_id], 1)


async def test_a_receipt_waits_for_the_commit_of_the_end() -> None:
    """The store takes its time; the model is let go of all the same."""
    store = GatedStore(wall_clock_ms)
    async with open_web_world(store=store) as web:
        accepted = await web.chat("hello")
        call = await web.next_call()
        store.gate.close()
        async with web.connect() as stopper:
            await stopper.send(request_bytes("POST", f"/api/v1/stop/{accepted['session_id']}"))
            await call.closed.wait()
            await store.gate.arrived()
            assert (await web.ask("GET", "/healthz")).status == 200
            assert not unread(stopper)
            store.gate.open()
            assert (await stopper.read_answer()).json()["stopped"] == [accepted["run_id"]]
        run = await store.run(RunId(accepted["run_id"]))
    assert run is not None
    assert run.status is RunStatus.STOPPED


async def saying_much(stand: Stand) -> tuple[str, Reply]:
    """A run that has said far more than the kernel holds for readers that read nothing, and is not done."""
    reply = stand.upstream.answer(Answer(tokens=["x" * 5000] * 100, gated=True))
    run_id = await stand.chat()
    reply.release(99)
    await reply.wait_sent(99)
    return run_id, reply


@STOPS
async def test_a_stop_waits_for_no_reader(tmp_path: Path, stop: Stop) -> None:
    """Two that follow the session have stopped reading; they get everything, the end too, when they read on."""
    with trio.fail_after(DEADLINE_S):
        async with (
            open_stand(tmp_path) as stand,
            open_stalled(stand.server, "after", stand.session_id, stand.start) as sse,
            open_stalled(stand.server, "connect", stand.session_id, stand.start) as ws,
        ):
            run_id, _ = await saying_much(stand)
            receipt = await stop(stand, run_id)
            stand.check_nothing_is_left(ends=2)
            assert receipt["stopped"] == [run_id]
            log = await log_of(stand.server.store, stand.session_id, run_id)
            assert log[-1].type == "agent_stopped"
            for reader in (sse, ws):
                read_on(reader)
                assert await reader.until("agent_stopped") == log


async def test_a_client_that_stalls_on_its_own_stop_finds_the_receipt_behind_the_end(tmp_path: Path) -> None:
    with trio.fail_after(DEADLINE_S):
        async with open_stand(tmp_path) as stand:
            assert stand.server.gateway_url is not None
            async with ws_client.open_upgraded(stand.server.gateway_url, receive_buffer=STALLED_BUFFER_BYTES) as client:
                await client.send_frame({"type": "connect", "session_id": stand.session_id, "after": stand.start})
                run_id, reply = await saying_much(stand)
                await client.send_frame({"type": "stop", "session_id": stand.session_id})
                await reply.wait_client_left()
                frames = [await client.receive_json()]
                while frames[-1]["type"] != "stopped":
                    frames.append(await client.receive_json())
                log = await log_of(stand.server.store, stand.session_id, run_id)
    assert frames[-1]["stopped"] == [run_id]
    assert frames[1:-1] == [item.fields for item in log]
    assert frames[-2]["type"] == "agent_stopped"


@STOPS
async def test_a_run_can_be_stopped_while_the_server_drains(tmp_path: Path, stop: Stop) -> None:
    """The drain is over with it, long before its grace; a run that was queued then stays for the next start."""
    with trio.fail_after(DEADLINE_S):
        async with open_stand(tmp_path, drain_s=3600) as stand, stand.reader() as reader:
            run_id, reply = await streaming(stand, reader)
            queued = await stand.chat("later")
            async with trio.open_nursery() as nursery:
                nursery.start_soon(stand.server.drain)
                await trio.testing.wait_all_tasks_blocked(0.01)
                assert stand.server.agents.draining
                receipt = await stop(stand, run_id)
                assert receipt["stopped"] == [run_id]
                assert stand.ends_in_the_database() == 2
                await reply.wait_client_left()
            assert (await stand.get(f"runs/{queued}"))["status"] == "queued"
            assert (await stop(stand, queued))["stopped"] == [queued]
            stand.check_nothing_is_left(ends=3)
