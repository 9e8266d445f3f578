"""Told to stop: one path, whenever the signal comes; and what systemd hears of it."""

import json
import signal
import socket
import sqlite3
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, closing
from pathlib import Path
from secrets import token_hex

import pytest
import trio

from bamboo.server import open_server
from tests.support import http_client, ws_client
from tests.support.http_client import SseItem
from tests.support.server import DEADLINE_S, ServerProcess, running, server_config, server_process, starting_process
from tests.support.upstream import Answer, Upstream, open_upstream

TOKENS = ["one ", "two ", "three"]
STOP_SIGNALS = [signal.SIGTERM, signal.SIGINT]


def provider(upstream: Upstream) -> dict[str, str]:
    return {
        "BAMBOO_LLM__PROVIDERS__OPENAI__BASE_URL": upstream.base_url,
        "BAMBOO_LLM__PROVIDERS__OPENAI__API_KEY_ENV": "",
    }


@asynccontextmanager
async def served(directory: Path, upstream: Upstream, **variables: str) -> AsyncIterator[ServerProcess]:
    async with server_process(directory, **provider(upstream), **variables) as server:
        yield server


async def chat(server: ServerProcess, text: str, session_id: str) -> http_client.Answer:
    body = {"message": text, "session_id": session_id}
    return await http_client.ask(server.http_url, "POST", "/api/v1/chat", json=body)


def kinds(items: list[SseItem]) -> list[str]:
    return [item.data["type"] for item in items]


@pytest.mark.parametrize("number", STOP_SIGNALS)
async def test_a_run_may_finish_while_new_chats_are_refused_and_the_queue_waits_for_the_next_start(
    tmp_path: Path, number: signal.Signals
) -> None:
    with trio.fail_after(DEADLINE_S):
        async with open_upstream() as upstream:
            reply = upstream.answer(Answer(tokens=TOKENS, gated=True))
            async with served(tmp_path, upstream) as server:
                await chat(server, "first", "s")
                queued = (await chat(server, "second", "s")).json()
                async with (
                    http_client.connect(server.http_url) as connection,
                    ws_client.connect(server.gateway_url, session_id="s") as ws,
                ):
                    sse = await connection.open_sse("GET", f"/api/v1/stream/s?after={queued['cursor']}")
                    reply.release(1)
                    await reply.wait_sent(1)
                    server.send_signal(number)
                    assert (await ws.until_type("draining"))[-1]["grace_s"] == 30
                    refused = await chat(server, "third", "s")
                    ready = await http_client.ask(server.http_url, "GET", "/readyz")
                    alive = await http_client.ask(server.http_url, "GET", "/healthz")
                    reply.release_all()
                    seen = await sse.rest()  # ends properly, with the server
                    assert await ws.close_code() == 1001
                assert await server.wait() == 0
            assert (refused.status, refused.error["code"], ready.status, alive.status) == (503, "draining", 503, 200)
            assert int(refused.headers["retry-after"]) >= 1
            assert kinds(seen)[-1] == "agent_complete"
            assert "run_started" not in kinds(seen)
            async with served(tmp_path, upstream) as server, http_client.connect(server.http_url) as connection:
                target = f"/api/v1/stream/s?run_id={queued['run_id']}"
                sse = await connection.open_sse("GET", target, headers={"Last-Event-ID": seen[-1].id or ""})
                rest = await sse.rest()
    assert kinds(rest)[0] == "run_started"  # no gap: a clean stop changes no epoch
    assert kinds(rest)[-1] == "agent_complete"
    assert rest[0].data["cursor"].split(".")[0] == seen[-1].data["cursor"].split(".")[0]


async def test_what_is_not_done_in_time_is_interrupted_and_every_client_sees_that(tmp_path: Path) -> None:
    with trio.fail_after(DEADLINE_S):
        async with open_upstream() as upstream:
            reply = upstream.answer(Answer(tokens=TOKENS, gated=True))
            async with served(tmp_path, upstream, BAMBOO_SERVER__DRAIN_S="0") as server:
                accepted = (await chat(server, "first", "s")).json()
                async with (
                    http_client.connect(server.http_url) as connection,
                    ws_client.connect(server.gateway_url, session_id="s", after=accepted["cursor"]) as ws,
                ):
                    sse = await connection.open_sse("GET", f"/api/v1/stream/s?after={accepted['cursor']}")
                    reply.release(2)
                    await sse.until("agent_token")
                    server.send_signal(signal.SIGTERM)
                    seen = await sse.rest()
                    over_ws = await ws.until_terminal()
                    assert await ws.close_code() == 1001
                assert await server.wait() == 0
            await reply.wait_client_left()
    [partial, error] = [item.data for item in seen[-2:]]
    assert (partial["type"], partial["partial"], partial["content"]) == ("agent_message", True, "one two ")
    assert (error["type"], error["code"], error["retryable"]) == ("agent_error", "interrupted", True)
    assert over_ws[-1] == error


@pytest.mark.parametrize("number", STOP_SIGNALS)
async def test_a_signal_while_the_server_starts_takes_nothing_up_and_ends_it_cleanly(
    tmp_path: Path, number: signal.Signals
) -> None:
    with trio.fail_after(DEADLINE_S):
        async with open_upstream() as upstream:
            reply = upstream.answer(Answer(tokens=TOKENS, gated=True))
            async with served(tmp_path, upstream, BAMBOO_SERVER__DRAIN_S="0") as server:
                await chat(server, "first", "s")
                await reply.wait_requested()
                queued = (await chat(server, "second", "s")).json()
                server.send_signal(signal.SIGTERM)
                assert await server.wait() == 0
            # Another program holds the database: the start waits for it, and the signal comes just then.
            with closing(sqlite3.connect(tmp_path / "bamboo.db", isolation_level=None)) as holder:
                holder.execute("BEGIN IMMEDIATE")
                async with starting_process(tmp_path, **provider(upstream), BAMBOO_LOG__LEVEL="debug") as server:
                    await server.wait_logged("starting")
                    server.send_signal(number)
                    await server.wait_logged("stopping")
                    holder.execute("COMMIT")
                    assert await server.wait() == 0
                    assert "stopped" in [line["event"] for line in server.lines]
            assert len(upstream.requests) == 1
            async with served(tmp_path, upstream) as server, http_client.connect(server.http_url) as connection:
                sse = await connection.open_sse("GET", f"/api/v1/stream/s?run_id={queued['run_id']}")
                seen = await sse.rest()
    assert kinds(seen)[-1] == "agent_complete"
    assert "gap" not in kinds(seen)


async def test_a_server_that_is_told_to_stop_before_it_is_up_starts_no_queued_run(tmp_path: Path) -> None:
    stopping = trio.Event()
    with trio.fail_after(DEADLINE_S):
        async with open_upstream() as upstream:
            settings = server_config(tmp_path, upstream.base_url)
            reply = upstream.answer(Answer(tokens=TOKENS, gated=True))
            async with running(settings) as server:
                for text in ("first", "second"):
                    body = {"message": text, "session_id": "s"}
                    await http_client.ask(server.http_url, "POST", "/api/v1/chat", json=body)
                await reply.wait_requested()
            stopping.set()
            async with open_server(settings, environ={}, stopping=stopping) as server:
                assert server.agents.sessions == 0
                refused = await http_client.ask(server.http_url, "POST", "/api/v1/chat", json={"message": "third"})
            async with open_server(settings, environ={}) as server:
                assert server.agents.sessions == 1
    assert refused.error["code"] == "draining"


@pytest.mark.parametrize("kind", ["path", "abstract"])
async def test_systemd_is_told_when_the_server_is_ready_and_when_it_stops(tmp_path: Path, kind: str) -> None:
    name = f"bamboo-test-{token_hex(8)}"
    # A path by way of the working directory: a test's own directory may be too long for a socket's name.
    address = f"@{name}" if kind == "abstract" else "notify"
    with trio.fail_after(DEADLINE_S), trio.socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as supervisor:
        await supervisor.bind(f"\0{name}" if kind == "abstract" else str(tmp_path / address))
        async with starting_process(tmp_path, NOTIFY_SOCKET=address, BAMBOO_SERVER__DRAIN_S="7") as server:
            ready = (await supervisor.recv(4096)).decode().split("\n")
            await server.wait_logged("listening")
            server.send_signal(signal.SIGTERM)
            stopping = (await supervisor.recv(4096)).decode().split("\n")
            assert await server.wait() == 0
    assert ready == ["READY=1"]
    assert stopping[0] == "STOPPING=1"
    key, _, value = stopping[1].partition("=")
    assert key == "EXTEND_TIMEOUT_USEC"
    assert 7_000_000 < int(value) < 60_000_000


async def test_a_supervisor_that_is_not_there_stops_nothing(tmp_path: Path) -> None:
    with trio.fail_after(DEADLINE_S):
        async with server_process(tmp_path, NOTIFY_SOCKET=str(tmp_path / "nobody")) as server:
            told = await server.wait_logged("systemd_not_told")
            server.send_signal(signal.SIGTERM)
            assert await server.wait() == 0
    assert told["level"] == "warning"
    assert json.dumps(told["assignments"]) == '["READY=1"]'
