"""The server as a process: how it starts, how it refuses to, how it ends."""

import signal
import sqlite3
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import trio

from bamboo.server import open_server
from bamboo.tools.toolbox import EmptyToolbox
from tests.support import http_client, ws_client
from tests.support.server import DEADLINE_S, process_environment, running, server_config, server_process


async def run_to_its_end(directory: Path, *arguments: str, **variables: str) -> subprocess.CompletedProcess[bytes]:
    return await trio.run_process(
        [sys.executable, "-m", "bamboo", *arguments],
        cwd=directory,
        env=process_environment(directory, **variables),
        capture_stdout=True,
        capture_stderr=True,
        check=False,
    )


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
async def test_a_signal_drains_and_exits_with_0(tmp_path: Path, number: signal.Signals) -> None:
    with trio.fail_after(DEADLINE_S):
        async with server_process(tmp_path) as server:
            answer = await http_client.ask(server.http_url, "POST", "/api/v1/chat", json={"message": "hello"})
            assert answer.status == 201
            async with ws_client.connect(server.gateway_url, session_id=answer.json()["session_id"]) as ws:
                server.send_signal(number)
                assert await ws.close_code() == 1001
            assert await server.wait() == 0
            events = [line["event"] for line in server.lines]
            assert "stopped" in events
            # What an operator is told first: where, what answers, how to get a real model, where it is kept.
            assert events[:4] == ["listening", "provider", "demo_model", "database"]
            assert "OPENAI_API_KEY" in server.lines[2]["hint"]
            assert server.lines[3]["path"] == str(tmp_path / "bamboo.db")
    with sqlite3.connect(tmp_path / "bamboo.db") as database:
        statuses = database.execute("SELECT count(*) FROM runs").fetchone()
    database.close()
    assert statuses == (1,)


async def test_a_second_signal_ends_the_process_at_once(tmp_path: Path) -> None:
    variables = {
        "BAMBOO_LLM__PROVIDERS__OPENAI__KIND": "scripted",
        "BAMBOO_LLM__PROVIDERS__OPENAI__SCRIPT": "stall",
    }
    with trio.fail_after(DEADLINE_S):
        async with server_process(tmp_path, **variables) as server:
            await http_client.ask(server.http_url, "POST", "/api/v1/chat", json={"message": "hello"})
            server.send_signal(signal.SIGTERM)
            await server.wait_logged("draining")
            server.send_signal(signal.SIGTERM)
            assert await server.wait() == 128 + signal.SIGTERM


async def test_a_port_that_is_taken_is_one_line_and_exit_1(tmp_path: Path) -> None:
    with trio.fail_after(DEADLINE_S):
        async with running(server_config(tmp_path)) as server:
            port = server.http_url.rpartition(":")[2]
            other = tmp_path / "other"
            other.mkdir()
            ended = await run_to_its_end(other, BAMBOO_SERVER__PORT=port)
            assert server.gateway_url is not None
            bind = server.gateway_url.removeprefix("ws://").rstrip("/")
            gateway = await run_to_its_end(other, BAMBOO_GATEWAY__BIND=bind)
    for process, name in ((ended, port), (gateway, bind)):
        assert process.returncode == 1
        [line] = process.stderr.decode().splitlines()
        assert name in line


async def test_a_database_that_another_process_has_is_one_line_and_exit_1(tmp_path: Path) -> None:
    with trio.fail_after(DEADLINE_S):
        async with running(server_config(tmp_path)):
            ended = await run_to_its_end(tmp_path)
    assert ended.returncode == 1
    [line] = ended.stderr.decode().splitlines()
    assert "bamboo.db" in line


async def test_a_database_that_cannot_be_used_is_one_line_and_exit_1(tmp_path: Path) -> None:
    (tmp_path / "bamboo.db").write_bytes(b"this is no database" * 1000)
    with trio.fail_after(DEADLINE_S):
        ended = await run_to_its_end(tmp_path)
        nowhere = await run_to_its_end(tmp_path, BAMBOO_STORAGE__PATH=str(tmp_path / "missing" / "bamboo.db"))
        # A place where nobody, not even root, may write.
        not_writable = await run_to_its_end(tmp_path, BAMBOO_STORAGE__PATH="/proc/bamboo.db")
    for process in (ended, nowhere, not_writable):
        assert process.returncode == 1
        [line] = process.stderr.decode().splitlines()
        assert "bamboo.db" in line


async def test_a_bad_configuration_is_exit_2(tmp_path: Path) -> None:
    (tmp_path / "bamboo.toml").write_text("[server]\nprot = 1\n")
    with trio.fail_after(DEADLINE_S):
        ended = await run_to_its_end(tmp_path)
    assert ended.returncode == 2
    assert b"server.prot" in ended.stderr
    assert b"port" in ended.stderr


class BugError(Exception):
    """What a component of ours must never raise."""


async def test_an_exception_in_a_components_task_ends_the_whole_server(tmp_path: Path) -> None:
    """Broken from outside where a component can be: the HTTP server's listening socket is pulled from under it."""
    with trio.fail_after(DEADLINE_S), pytest.RaisesGroup(trio.ClosedResourceError, flatten_subgroups=True):
        async with open_server(server_config(tmp_path), environ={}) as server:
            for listener in server.web.server._listeners:
                await listener.aclose()
            await trio.sleep_forever()


async def test_one_bad_session_leaves_the_server_alone(tmp_path: Path) -> None:
    with trio.fail_after(DEADLINE_S):
        async with running(server_config(tmp_path), toolbox=_broken_once()) as server:
            bad = await http_client.ask(server.http_url, "POST", "/api/v1/chat", json={"message": "a"})
            good = await http_client.ask(server.http_url, "POST", "/api/v1/chat", json={"message": "b"})
    assert bad.status == 500
    assert bad.error["code"] == "internal"
    assert good.status == 201


def _broken_once() -> Callable[[], EmptyToolbox]:
    broken = [True]

    def toolbox() -> EmptyToolbox:
        if broken:
            broken.clear()
            raise BugError
        return EmptyToolbox()

    return toolbox
