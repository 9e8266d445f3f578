"""The server looks after its store by itself: what is deleted, too much or too old goes while it runs."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import trio

from bamboo.config import Config
from tests.support import http_client
from tests.support.server import DEADLINE_S, running, server_config

SECRET = "hunter2"


def config(directory: Path, **storage: float) -> Config:
    base = server_config(directory)
    return base.model_copy(update={"storage": base.storage.model_copy(update=storage)})


async def finished_chat(url: str, session_id: str, text: str) -> dict[str, Any]:
    json = {"message": text, "session_id": session_id}
    answer = await http_client.ask(url, "POST", "/api/v1/chat", json=json)
    assert answer.status == 201, answer
    async with http_client.connect(url) as connection:
        await (await connection.open_sse("GET", answer.json()["stream_url"])).rest()
    return dict(answer.json())


async def until(url: str, done: Callable[[], bool]) -> None:
    """Wait for what the server does of itself, asking it something in between."""
    while not done():
        answer = await http_client.ask(url, "GET", "/healthz")
        assert answer.status == 200


def in_files(directory: Path) -> bool:
    return any(SECRET.encode() in file.read_bytes() for file in directory.iterdir())


async def test_text_of_a_deleted_session_is_soon_in_no_file(tmp_path: Path) -> None:
    with trio.fail_after(DEADLINE_S):
        async with running(config(tmp_path)) as server:
            url = server.http_url
            await finished_chat(url, "secret", f"{SECRET} " * 1000)
            await finished_chat(url, "other", "hello")
            assert in_files(tmp_path)
            answer = await http_client.ask(url, "DELETE", "/api/v1/sessions/secret")
            assert answer.status in (200, 204), answer
            await until(url, lambda: not in_files(tmp_path))
            history = await http_client.ask(url, "GET", "/api/v1/history/other")
            assert [message["content"] for message in history.json()["messages"]] == ["hello", "hello"]


async def test_what_was_deleted_just_before_a_stop_is_erased_by_the_next_start(tmp_path: Path) -> None:
    with trio.fail_after(DEADLINE_S):
        async with running(config(tmp_path)) as server:
            await finished_chat(server.http_url, "secret", f"{SECRET} " * 4000)
            await http_client.ask(server.http_url, "DELETE", "/api/v1/sessions/secret")
        async with running(config(tmp_path)) as server:
            await until(server.http_url, lambda: not in_files(tmp_path))


async def test_log_that_grows_past_its_bound_loses_its_oldest_events_and_no_message(tmp_path: Path) -> None:
    with trio.fail_after(DEADLINE_S):
        async with running(config(tmp_path, retention_session_bytes=100_000)) as server:
            url = server.http_url
            first = await finished_chat(url, "s", "a" * 70_000)
            for letter in "bcd":
                await finished_chat(url, "s", letter * 70_000)
            async with http_client.connect(url) as connection:
                stream = await connection.open_sse("GET", f"/api/v1/stream/s?after={first['cursor']}")
                [gap] = await stream.take(1)
            assert (gap.data["type"], gap.data["reason"]) == ("gap", "retention")
            history = await http_client.ask(url, "GET", "/api/v1/history/s")
            assert [message["content"][0] for message in history.json()["messages"]] == list("aabbccdd")


async def test_session_in_which_nothing_happened_for_long_is_deleted(tmp_path: Path) -> None:
    with trio.fail_after(DEADLINE_S):
        async with running(config(tmp_path)) as server:
            await finished_chat(server.http_url, "s", "hello")
        async with running(config(tmp_path, session_retention_days=1000.0)) as server:
            await finished_chat(server.http_url, "other", "hello")
            assert (await http_client.ask(server.http_url, "GET", "/api/v1/sessions/s")).status == 200
        async with running(config(tmp_path, session_retention_days=1e-9)) as server:
            for name in ("s", "other"):
                while (await http_client.ask(server.http_url, "GET", f"/api/v1/sessions/{name}")).status == 200:
                    pass
