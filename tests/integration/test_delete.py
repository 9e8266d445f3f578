"""Delete, for real: a session with a running run, a queue, readers that lag and requests behind the delete is gone with
all of it, everybody who is concerned hears so, and the id is free for a new session."""

import sqlite3
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import trio
import trio.testing

from bamboo.config import StreamConfig
from bamboo.core.events import Event
from bamboo.core.types import SessionId
from bamboo.wire.encode import item_json
from tests.support import ws_client
from tests.support.http_client import ask
from tests.support.readers import Reader, Seen, WsReader, log_of, open_reader
from tests.support.server import DEADLINE_S
from tests.support.stalled import open_stalled, read_on
from tests.support.stopping import Stand, open_stand
from tests.support.tcp import clients_of
from tests.support.upstream import Answer, FakeToolCall, Reply

WINDOW_BYTES = 64 * 1024
TOKENS = 3000
"""Far more than the window and the kernel hold."""


async def delete(stand: Stand) -> None:
    answer = await ask(stand.server.http_url, "DELETE", f"/api/v1/sessions/{stand.session_id}")
    assert (answer.status, answer.body) == (204, b"")


def rows(stand: Stand, table: str) -> int:
    """How many rows the table has, committed."""
    with closing(sqlite3.connect(stand.directory / "bamboo.db")) as database:
        return int(database.execute(f"SELECT count(*) FROM {table}").fetchone()[0])  # noqa: S608 - names of ours


async def erased(stand: Stand) -> None:
    """Return when the database has nothing of any session, but that there was one: the content goes soon after the
    answer, in small steps."""
    for table in ("sessions", "heads", "epochs", "runs", "events", "messages", "keys"):
        while rows(stand, table):
            await trio.testing.wait_all_tasks_blocked(0.01)
    assert rows(stand, "tombstones") == 1


async def begin_streaming(stand: Stand, **fields: Any) -> tuple[str, Reply]:
    reply = stand.upstream.answer(Answer(tokens=["one", "two", "three"], gated=True))
    run_id = await stand.chat(**fields)
    reply.release()
    await reply.wait_sent(1)
    return run_id, reply


async def test_a_deleted_session_is_gone_with_all_that_ran_and_waited(tmp_path: Path) -> None:
    with trio.fail_after(DEADLINE_S):
        async with open_stand(tmp_path) as stand, stand.reader() as sse, stand.reader("connect") as ws:
            running, reply = await begin_streaming(stand, client_message_id="key")
            queued = [await stand.chat(text) for text in ("two", "three")]
            run_readers = [open_reader(stand.server, "after", stand.session_id, None, run_id=id_) for id_ in queued]
            async with run_readers[0] as first, run_readers[1] as second:
                await delete(stand)
                assert clients_of(stand.upstream.port) == 0, "the connection to the model is open"
                assert stand.server.agents.active_runs == stand.server.agents.queued_runs == 0
                assert (rows(stand, "sessions"), rows(stand, "tombstones")) == (0, 1), "the delete is not committed"
                await reply.wait_client_left()
                over_runs = [await reader.rest() for reader in (first, second)]
                assert {first.ended, second.ended} == {"properly"}
            over_sse = await sse.rest()
            assert sse.ended == "properly"
            over_ws = await ws.until("session_closed")
            assert over_ws == over_sse
            stopped = {item.fields["run_id"]: item for item in over_sse if item.type == "agent_stopped"}
            assert stopped.keys() == {running, *queued}
            assert {item.fields["reason"] for item in stopped.values()} == {"deleted"}
            assert [seen[-1] for seen in over_runs] == [stopped[run_id] for run_id in queued]
            seqs = [item.fields["seq"] for item in over_sse]
            assert seqs == list(range(seqs[0], seqs[0] + len(seqs)))
            assert len(stand.upstream.requests) == 2, "a queued run began"

            await check_that_nothing_is_there(stand, [running, *queued], over_sse)
            await erased(stand)
            assert isinstance(ws, WsReader)
            await check_that_it_is_usable(ws, stand)
        assert stand.tasks() == 0


async def check_that_nothing_is_there(stand: Stand, runs: list[str], seen: list[Seen]) -> None:
    """Asked in any way, over either transport."""
    session, url = stand.session_id, stand.server.http_url
    for method, target, code in (
        ("GET", f"sessions/{session}", "session_not_found"),
        ("PATCH", f"sessions/{session}", "session_not_found"),
        ("DELETE", f"sessions/{session}", "session_not_found"),
        ("GET", f"sessions/{session}/runs", "session_not_found"),
        ("GET", f"history/{session}", "session_not_found"),
        ("GET", f"stream/{session}", "session_not_found"),
        ("GET", f"stream/{session}?after={seen[0].cursor}", "session_not_found"),
        ("GET", f"stream/{session}?run_id={runs[0]}", "session_not_found"),
        ("POST", f"stop/{session}", "session_not_found"),
        *(("GET", f"runs/{run_id}", "run_not_found") for run_id in runs),
        *(("POST", f"runs/{run_id}/cancel", "run_not_found") for run_id in runs),
    ):
        body = {"title": "gone"} if method == "PATCH" else None
        answer = await ask(url, method, f"/api/v1/{target}", json=body)
        assert (answer.status, answer.error["code"]) == (404, code), (method, target, answer)
    assert (await stand.get("sessions"))["sessions"] == []
    assert stand.server.gateway_url is not None
    async with ws_client.connect(stand.server.gateway_url, session_id=session, after=seen[0].cursor) as client:
        assert client.connected["cursor"] is None, "an unknown session, which may become one"
        for kind in ("subscribe", "history", "stop"):
            error = await client.call({"type": kind, "session_id": session})
            assert (error["type"], error["code"]) == ("error", "session_not_found")
    assert stand.server.bus.subscriptions == 0


async def check_that_it_is_usable(ws: WsReader, stand: Stand) -> None:
    """A connection that has followed a deleted session: it chats on, elsewhere and under the old id."""
    before = len(ws.others)
    for session_id in ("elsewhere", stand.session_id):
        stand.upstream.answer(Answer(tokens=["Fine."]))
        await ws.send(type="chat", content="anew", session_id=session_id)
        events = await ws.until("agent_complete")
        assert [item.type for item in events if item.type != "session_created"] == [
            "user_message", "run_started", "agent_token", "agent_message", "agent_complete"
        ]  # fmt: skip
        assert {item.fields["session_id"] for item in events} == {session_id}
    assert [frame["type"] for frame in ws.others[before:]] == ["accepted", "accepted"]
    assert await stand.server.store.messages(SessionId("elsewhere"))


@asynccontextmanager
async def held_delete(stand: Stand) -> AsyncIterator[trio.Nursery]:
    """In the block a delete is under way, and waits for a tool to die; leaving it lets the tool die, and waits for
    everything in the nursery."""
    stand.tool.may_die = trio.Event()
    stand.upstream.answer(Answer(tool_calls=[FakeToolCall("look")], headers={"connection": "close"}))
    await stand.chat(client_message_id="key")
    await stand.tool.called.wait()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(delete, stand)
        await stand.tool.cancelled.wait()
        yield nursery
        stand.tool.may_die.set()


def waiting(stand: Stand) -> int:
    """Requests in the session's inbox."""
    return stand.server.agents._live[SessionId(stand.session_id)].inbox.statistics().current_buffer_used


async def test_what_waits_behind_a_delete_finds_no_session(tmp_path: Path) -> None:
    codes: list[str] = []
    with trio.fail_after(DEADLINE_S):
        async with open_stand(tmp_path) as stand:
            session = stand.session_id
            assert stand.server.gateway_url is not None

            async def over_http(method: str, target: str, **body: Any) -> None:
                answer = await ask(stand.server.http_url, method, f"/api/v1/{target}", json=body)
                assert answer.status == 404, answer
                codes.append(answer.error["code"])

            async def over_ws(**frame: Any) -> None:
                assert stand.server.gateway_url is not None
                async with ws_client.connect(stand.server.gateway_url, session_id=session) as client:
                    answer = await client.call({"session_id": session, **frame})
                    assert answer["type"] == "error", answer
                    codes.append(answer["code"])
                    assert (await client.call({"type": "ping"}))["type"] == "pong"

            async with held_delete(stand) as nursery:
                requests = (
                    lambda: over_http("POST", "chat", message="late", session_id=session),
                    lambda: over_http("POST", "chat", message="late", session_id=session, client_message_id="other"),
                    lambda: over_http("POST", f"stop/{session}"),
                    lambda: over_http("PATCH", f"sessions/{session}", title="late"),
                    lambda: over_http("DELETE", f"sessions/{session}"),
                    lambda: over_ws(type="chat", content="late"),
                    lambda: over_ws(type="stop"),
                )
                for number, request in enumerate(requests):
                    nursery.start_soon(request)
                    while waiting(stand) != number + 1:
                        await trio.testing.wait_all_tasks_blocked(0.001)
            assert codes == ["session_not_found"] * len(requests)
            await erased(stand)
            await trio.testing.wait_all_tasks_blocked(0.01)
            assert stand.tasks() == 0


async def test_a_stop_before_the_delete_is_answered_and_decides_the_reason(tmp_path: Path) -> None:
    receipts: list[dict[str, Any]] = []
    with trio.fail_after(DEADLINE_S):
        async with open_stand(tmp_path) as stand, stand.reader() as reader:
            stand.tool.may_die = trio.Event()
            stand.upstream.answer(Answer(tool_calls=[FakeToolCall("look")], headers={"connection": "close"}))
            run_id = await stand.chat()
            await stand.tool.called.wait()

            async def stop() -> None:
                receipts.append((await ask(stand.server.http_url, "POST", f"/api/v1/stop/{stand.session_id}")).json())

            async with trio.open_nursery() as nursery:
                nursery.start_soon(stop)
                await stand.tool.cancelled.wait()
                nursery.start_soon(delete, stand)
                await trio.testing.wait_all_tasks_blocked(0.01)
                stand.tool.may_die.set()
            seen = await reader.rest()
    assert [receipt["stopped"] for receipt in receipts] == [[run_id]]
    assert [item.type for item in seen[-2:]] == ["agent_stopped", "session_closed"]
    assert seen[-2].fields["reason"] == "user"


async def test_the_id_and_the_keys_of_a_deleted_session_are_free(tmp_path: Path) -> None:
    with trio.fail_after(DEADLINE_S):
        async with open_stand(tmp_path) as stand:
            old_epoch = stand.start.partition(".")[0]
            old_run = await stand.chat("hello", client_message_id="key")
            await stand.read_to_the_end_of(old_run)
            chat = {"message": "hello", "session_id": stand.session_id, "client_message_id": "key"}
            again = await ask(stand.server.http_url, "POST", "/api/v1/chat", json=chat)
            assert again.json()["accepted_as"] == "duplicate"
            await delete(stand)
            answer = await ask(stand.server.http_url, "POST", "/api/v1/chat", json=chat)
            assert (answer.status, answer.json()["accepted_as"]) == (201, "started")
            new = answer.json()
            assert new["run_id"] != old_run
            epoch, _, seq = new["cursor"].partition(".")
            assert (epoch != old_epoch, seq) == (True, "1"), "a new log, from its beginning"
            events = await stand.read_to_the_end_of(new["run_id"])
            assert stand.upstream.requests[-1].json["messages"] == [{"role": "user", "content": "hello"}]
            history = await stand.get(f"history/{stand.session_id}")
            assert [message["role"] for message in history["messages"]] == ["user", "assistant"]

            # Whoever comes back with a cursor of the old one is told, and gets the new one from its beginning.
            async with stand.reader() as reader:
                gap, *rest = await reader.until("agent_complete")
            assert (gap.type, gap.cursor) == ("gap", f"{epoch}.0")
            assert (gap.fields["reason"], gap.fields["from_seq"], gap.fields["to_seq"]) == ("epoch", None, None)
            assert rest[1:] == events


@dataclass
class Lagging:
    """A session that has said far more than its window holds, and three readers that have read next to nothing of
    it. `log` is all of it so far."""

    stand: Stand
    of_session: Reader
    of_run: Reader
    ws: WsReader
    run_id: str
    log: list[Seen]


@asynccontextmanager
async def open_lagging(tmp_path: Path) -> AsyncIterator[Lagging]:
    async with open_stand(tmp_path, stream=StreamConfig(window_bytes=WINDOW_BYTES)) as stand:
        # Many events and little text: the message that ends the run fits into the window, so whoever is awake gets it.
        reply = stand.upstream.answer(Answer(tokens=["x"] * TOKENS, gated=True))
        run_id = await stand.chat()
        place = (stand.session_id, stand.start)
        async with (
            open_stalled(stand.server, "after", *place) as of_session,
            open_stalled(stand.server, "after", *place, run_id=run_id) as of_run,
            open_stalled(stand.server, "connect", *place) as ws,
        ):
            assert isinstance(ws, WsReader)
            reply.release(TOKENS - 1)
            async with stand.reader() as reader:
                said = await reader.take(TOKENS + 1)
            yield Lagging(stand, of_session, of_run, ws, run_id, said)


async def read_at_once(stand: Stand, told: list[Seen], *, task_status: trio.TaskStatus[None]) -> None:
    """Read the session from here to its last event, with no socket in between that could make it lag."""
    with stand.server.bus.subscribe(SessionId(stand.session_id)) as subscription:
        await subscription.begin(None)
        task_status.started()
        while items := await subscription.receive():
            told += [Seen(str(item.cursor), item_json(item)) for item in items if isinstance(item, Event)]


def check_lagging(seen: list[Seen], told: list[Seen], lagging: Lagging) -> None:
    """`told` is all that there was of the log: `seen` is that, but for what one gap names."""
    [at] = [index for index, item in enumerate(seen) if item.type == "gap"]
    gap = seen[at].fields
    first = lagging.log[0].fields["seq"]
    assert gap["reason"] == "retention"
    assert gap["from_seq"] == first + at, "it begins behind what the reader has"
    assert gap["to_seq"] - gap["from_seq"] > 500
    assert seen[at].cursor == gap["cursor"] == told[gap["to_seq"] - first].cursor
    assert seen[:at] == told[:at]
    assert seen[at + 1 :] == told[gap["to_seq"] - first + 1 :]


async def test_readers_that_lag_behind_a_delete_get_a_gap_the_last_words_and_the_end(tmp_path: Path) -> None:
    """And nothing of a new session with the same id, which lives by then."""
    with trio.fail_after(DEADLINE_S):
        async with open_lagging(tmp_path) as lagging:
            stand = lagging.stand
            async with trio.open_nursery() as nursery:
                told = list(lagging.log)
                await nursery.start(read_at_once, stand, told)
                await delete(stand)
            assert [item.type for item in told[-3:]] == ["agent_message", "agent_stopped", "session_closed"]
            stand.upstream.answer(Answer(tokens=["Fine."]))
            new_run = await stand.chat("anew")
            await stand.read_to_the_end_of(new_run)

            for one in (lagging.of_session, lagging.of_run, lagging.ws):
                read_on(one)
            over_sse, over_run = await lagging.of_session.rest(), await lagging.of_run.rest()
            assert (lagging.of_session.ended, lagging.of_run.ended) == ("properly", "properly")
            over_ws = await lagging.ws.until("session_closed")
            check_lagging(over_sse, told, lagging)
            check_lagging(over_run, told[:-1], lagging)
            check_lagging(over_ws, told, lagging)
            await lagging.ws.send(type="ping")
            await lagging.ws.answer("pong")
            assert stand.server.bus.subscriptions == 0


async def test_a_connection_that_lags_behind_a_delete_and_chats_anew_follows_the_new_session(tmp_path: Path) -> None:
    with trio.fail_after(DEADLINE_S):
        async with open_lagging(tmp_path) as lagging:
            stand, ws = lagging.stand, lagging.ws
            await delete(stand)
            stand.upstream.answer(Answer(tokens=["Fine."]))
            await ws.send(type="chat", content="anew", session_id=stand.session_id)
            while not await stand.server.store.messages(SessionId(stand.session_id)):
                await trio.testing.wait_all_tasks_blocked(0.001)
            read_on(ws)
            await ws.until("session_closed")
            events = await ws.until("agent_complete")
            accepted = await ws.answer("accepted")
            assert events == await log_of(stand.server.store, stand.session_id, accepted["run_id"])
