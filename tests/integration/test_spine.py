"""The main job, for real: clients on sockets, the whole server with its database, a model server on a socket.

One scenario, every transport: what is asked over one is watched over all.
"""

import json
import sqlite3
import sys
from collections.abc import Sequence
from contextlib import closing
from pathlib import Path
from types import FrameType
from typing import Any

import httpx
import pytest
import trio
from httpx_sse import aconnect_sse

from bamboo.config import StreamConfig
from tests.support import http_client, ws_client
from tests.support.server import DEADLINE_S, running, server_config
from tests.support.upstream import Answer, open_upstream

TOKENS = [f"t{number} " for number in range(12)]


def texts(events: Sequence[Any]) -> str:
    return "".join(event["token"] for event in events if event["type"] == "agent_token")


async def test_two_sse_readers_and_a_websocket_see_the_same_events(tmp_path: Path) -> None:
    with trio.fail_after(DEADLINE_S):
        async with open_upstream() as upstream, running(server_config(tmp_path, upstream.base_url)) as server:
            assert server.gateway_url is not None
            reply = upstream.answer(Answer(tokens=TOKENS, gated=True))
            async with (
                ws_client.connect(server.gateway_url) as ws,
                http_client.connect(server.http_url) as first,
                http_client.connect(server.http_url) as second,
            ):
                accepted = await ws.chat("hello")
                session_id, cursor = accepted["session_id"], accepted["cursor"]
                from_start = await first.open_sse("GET", f"/api/v1/stream/{session_id}?after={cursor}")
                reply.release(5)
                await reply.wait_sent(5)
                of_run = await second.open_sse("GET", f"/api/v1/stream/{session_id}?run_id={accepted['run_id']}")
                reply.release_all()
                over_ws = await ws.until_terminal()
                over_sse = await from_start.until("agent_complete")
                over_run = await of_run.rest()
    assert [item.data for item in over_sse] == over_ws
    assert [item.data for item in over_run] == over_ws
    assert [item.id for item in over_sse] == [event["cursor"] for event in over_ws]
    assert texts(over_ws) == "".join(TOKENS)
    assert over_ws[0]["type"] == "user_message"


async def all_events(url: str, accepted: dict[str, Any]) -> list[dict[str, Any]]:
    async with http_client.connect(url) as connection:
        target = f"/api/v1/stream/{accepted['session_id']}?run_id={accepted['run_id']}"
        return [item.data for item in await (await connection.open_sse("GET", target)).rest()]


@pytest.mark.parametrize("transport", ["sse", "ws"])
async def test_a_reader_that_is_cut_at_any_event_gets_the_rest_exactly(tmp_path: Path, transport: str) -> None:
    """Live, while the run still streams, and again when it is long over."""
    with trio.fail_after(DEADLINE_S):
        async with open_upstream() as upstream, running(server_config(tmp_path, upstream.base_url)) as server:
            reply = upstream.answer(Answer(tokens=TOKENS, gated=True))
            answer = await http_client.ask(server.http_url, "POST", "/api/v1/chat", json={"message": "hello"})
            accepted = answer.json()
            seen: list[dict[str, Any]] = []
            cursor = accepted["cursor"]
            for number in range(len(TOKENS)):
                # Cut behind each event in turn; what is next is released only once the reader is gone.
                wanted = 3 if number == 0 else 1  # the message and the start come with the first token
                reply.release()
                part = await read_some(server, transport, accepted, cursor, wanted)
                assert len(part) == wanted
                seen += part
                cursor = seen[-1]["cursor"]
            reply.release_all()
            seen += await read_some(server, transport, accepted, cursor, 2)
            whole = await all_events(server.http_url, accepted)
            assert seen == whole
            for number in range(len(whole)):
                rest = await read_some(server, transport, accepted, whole[number]["cursor"], len(whole) - number - 1)
                assert rest == whole[number + 1 :]


async def read_some(
    server: Any, transport: str, accepted: dict[str, Any], cursor: str, count: int
) -> list[dict[str, Any]]:
    """The next `count` events after `cursor`, by a reader that then vanishes without a word."""
    session_id = accepted["session_id"]
    if transport == "sse":
        async with http_client.connect(server.http_url) as connection:
            reader = await connection.open_sse("GET", f"/api/v1/stream/{session_id}", headers={"Last-Event-ID": cursor})
            return [item.data for item in await reader.take(count)]
    async with ws_client.connect(server.gateway_url, session_id=session_id, after=cursor) as ws:
        return [await ws.receive() for _ in range(count)]


async def test_a_chat_accepted_in_mid_stream_keeps_every_reader_in_order_and_the_history_valid(tmp_path: Path) -> None:
    with trio.fail_after(DEADLINE_S):
        async with open_upstream() as upstream, running(server_config(tmp_path, upstream.base_url)) as server:
            assert server.gateway_url is not None
            reply = upstream.answer(Answer(tokens=TOKENS, gated=True))
            second_reply = upstream.answer(Answer(tokens=["second"]))
            async with (
                ws_client.connect(server.gateway_url) as ws,
                http_client.connect(server.http_url) as connection,
            ):
                accepted = await ws.chat("one")
                session_id = accepted["session_id"]
                target = f"/api/v1/stream/{session_id}?after={accepted['cursor']}"
                sse = await connection.open_sse("GET", target)
                reply.release(6)
                await reply.wait_sent(6)
                later = await http_client.ask(
                    server.http_url, "POST", "/api/v1/chat", json={"message": "two", "session_id": session_id}
                )
                assert later.json()["accepted_as"] == "queued"
                reply.release_all()
                over_ws = await ws.until_terminal(later.json()["run_id"])
                over_sse = [item.data for item in await sse.take(len(over_ws))]
            request = await second_reply.wait_requested()
            history = (await http_client.ask(server.http_url, "GET", f"/api/v1/history/{session_id}")).json()
    assert over_sse == over_ws
    seqs = [event["seq"] for event in over_ws]
    assert seqs == list(range(seqs[0], seqs[0] + len(seqs)))
    told = [(message["role"], message["content"]) for message in request.json["messages"]]
    assert told == [("user", "one"), ("assistant", "".join(TOKENS)), ("user", "two")]
    assert [message["role"] for message in history["messages"]] == ["user", "assistant", "user", "assistant"]
    assert history["seq"] == seqs[-1]


async def test_a_run_goes_on_when_its_client_vanishes_and_stop_ends_it_upstream_too(tmp_path: Path) -> None:
    with trio.fail_after(DEADLINE_S):
        async with open_upstream() as upstream, running(server_config(tmp_path, upstream.base_url)) as server:
            reply = upstream.answer(Answer(tokens=TOKENS, gated=True))
            async with http_client.connect(server.http_url) as connection:
                reader = await connection.open_sse("POST", "/api/v1/chat", json={"message": "hello"})
                session_id = reader.head.headers["x-bamboo-session"]
                reply.release(2)
                await reader.until("agent_token")
            reply.release(3)
            await reply.wait_sent(5)
            assert not reply.client_left
            stopped = await http_client.ask(server.http_url, "POST", f"/api/v1/stop/{session_id}", json={})
            await reply.wait_client_left()
            history = (await http_client.ask(server.http_url, "GET", f"/api/v1/history/{session_id}")).json()
            assert stopped.json()["stopped"] == [reader.head.headers["x-bamboo-run"]]
            assert server.agents.active_runs == 0
    assert history["live"] is None
    assert history["messages"][-1]["partial"] is True


async def test_the_history_and_then_the_stream_show_everything_once(tmp_path: Path) -> None:
    with trio.fail_after(DEADLINE_S):
        async with open_upstream() as upstream, running(server_config(tmp_path, upstream.base_url)) as server:
            reply = upstream.answer(Answer(tokens=TOKENS, gated=True))
            answer = await http_client.ask(server.http_url, "POST", "/api/v1/chat", json={"message": "hello"})
            session_id = answer.json()["session_id"]
            reply.release(7)
            await reply.wait_sent(7)
            snapshot = (await http_client.ask(server.http_url, "GET", f"/api/v1/history/{session_id}")).json()
            reply.release_all()
            async with http_client.connect(server.http_url) as connection:
                target = f"/api/v1/stream/{session_id}?after={snapshot['cursor']}"
                rest = [item.data for item in await (await connection.open_sse("GET", target)).until("agent_complete")]
    live = snapshot["live"] or {"text": ""}
    assert live["text"] + texts(rest) == "".join(TOKENS)


async def test_a_client_that_takes_each_empty_line_for_an_event_sees_nothing_but_events(tmp_path: Path) -> None:
    """httpx-sse does, once it has seen an id or a retry: behind a comment too."""
    with trio.fail_after(DEADLINE_S):
        async with open_upstream() as upstream:
            settings = server_config(tmp_path, upstream.base_url, stream=StreamConfig(keep_alive_s=0.05))
            async with running(settings) as server:
                reply = upstream.answer(Answer(tokens=TOKENS, gated=True))
                accepted = (
                    await http_client.ask(server.http_url, "POST", "/api/v1/chat", json={"message": "hello"})
                ).json()
                url = server.http_url + accepted["stream_url"]
                async with (
                    httpx.AsyncClient() as client,
                    aconnect_sse(client, "GET", url) as source,
                    http_client.connect(server.http_url) as connection,
                ):
                    watching = await connection.open_sse("GET", accepted["stream_url"])
                    comments = 0
                    while comments < 3:  # both are silent for as long, so this one has had comments too
                        item = await watching.next_item()
                        comments += item is not None and item.comment is not None
                    reply.release_all()
                    seen = [json.loads(event.data) async for event in source.aiter_sse()]
                whole = await all_events(server.http_url, accepted)
    assert seen == whole


async def test_no_statement_of_the_database_runs_on_the_loops_thread(tmp_path: Path) -> None:
    """From opening it to closing it, with a chat, its stream, its history and a stop between."""
    called: list[str] = []

    def profile(_frame: FrameType, event: str, function: Any) -> None:
        if event == "c_call" and isinstance(getattr(function, "__self__", None), sqlite3.Connection | sqlite3.Cursor):
            called.append(function.__name__)

    sys.setprofile(profile)  # of this thread only
    try:
        with trio.fail_after(DEADLINE_S):
            async with running(server_config(tmp_path)) as server:
                url = server.http_url
                accepted = (await http_client.ask(url, "POST", "/api/v1/chat", json={"message": "hello"})).json()
                await all_events(url, accepted)
                for path in ("history/{}", "sessions/{}", "sessions/{}/runs"):
                    answer = await http_client.ask(url, "GET", f"/api/v1/{path.format(accepted['session_id'])}")
                    assert answer.status == 200
                await http_client.ask(url, "POST", f"/api/v1/stop/{accepted['session_id']}")
        on_the_loop = list(called)
        with closing(sqlite3.connect(":memory:")) as database:
            database.execute("SELECT 1")
    finally:
        sys.setprofile(None)
    assert "execute" in called, "the profile sees nothing"
    assert on_the_loop == []


async def test_a_clean_restart_makes_no_gap_and_loses_nothing(tmp_path: Path) -> None:
    with trio.fail_after(DEADLINE_S):
        async with open_upstream() as upstream:
            config = server_config(tmp_path, upstream.base_url)
            async with running(config) as server:
                answer = await http_client.ask(server.http_url, "POST", "/api/v1/chat", json={"message": "hello"})
                before = await all_events(server.http_url, answer.json())
            async with running(config) as server:
                after = await all_events(server.http_url, answer.json())
                rest = await read_some(server, "sse", answer.json(), before[2]["cursor"], len(before) - 3)
                again = await http_client.ask(
                    server.http_url,
                    "POST",
                    "/api/v1/chat",
                    json={"message": "more", "session_id": answer.json()["session_id"]},
                )
    assert after == before
    assert rest == before[3:]
    assert again.json()["cursor"] == before[-1]["cursor"]
