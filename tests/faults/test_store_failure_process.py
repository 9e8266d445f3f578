"""A real server whose disk is full, or whose database another program holds: what clients are told, and how everything
is back by itself."""

import resource
import signal
import sqlite3
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, closing, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import trio

from tests.support import http_client, ws_client
from tests.support.server import DEADLINE_S, ServerProcess, server_process
from tests.support.upstream import Answer, Reply, Upstream, open_upstream
from tests.support.wire_readers import TERMINAL, Told

TOKENS = ["one ", "two ", "three ", "four"]
TERMINALS = set(TERMINAL)


@asynccontextmanager
async def served(directory: Path, upstream: Upstream, **variables: str) -> AsyncIterator[ServerProcess]:
    provider = {
        "BAMBOO_LLM__PROVIDERS__OPENAI__BASE_URL": upstream.base_url,
        "BAMBOO_LLM__PROVIDERS__OPENAI__API_KEY_ENV": "",
    }
    async with server_process(directory, **provider, **variables) as server:
        yield server


def allow_files(server: ServerProcess, size: int) -> None:
    """Let the server write to files up to this size: with 0 every write fails, as on a full disk."""
    _, hard = resource.prlimit(server.process.pid, resource.RLIMIT_FSIZE)
    resource.prlimit(server.process.pid, resource.RLIMIT_FSIZE, (size, hard))


@contextmanager
def held_database(path: Path) -> Iterator[sqlite3.Connection]:
    """Another program's transaction, which keeps every writer out until it is rolled back."""
    with closing(sqlite3.connect(path, isolation_level=None)) as holder:
        holder.execute("BEGIN EXCLUSIVE")
        yield holder


async def post(server: ServerProcess, target: str, **body: Any) -> http_client.Answer:
    return await http_client.ask(server.http_url, "POST", target, json=body)


async def ready(server: ServerProcess, status: int) -> http_client.Answer:
    """The first answer of /readyz with this status: it may be a second late."""
    while (answer := await http_client.ask(server.http_url, "GET", "/readyz")).status != status:
        await trio.lowlevel.checkpoint()
    return answer


async def history(server: ServerProcess) -> dict[str, Any]:
    answer = await http_client.ask(server.http_url, "GET", "/api/v1/history/s")
    assert answer.status == 200
    return dict(answer.json())


async def whole_log(server: ServerProcess, run: dict[str, Any]) -> list[dict[str, Any]]:
    """The run's events, as they are kept."""
    async with http_client.connect(server.http_url) as connection:
        reader = await connection.open_sse("GET", f"/api/v1/stream/s?run_id={run['run_id']}")
        return [item.data for item in await reader.rest()]


def check_refused(answer: http_client.Answer) -> None:
    assert (answer.status, answer.error["code"], answer.error["retryable"]) == (503, "store_unavailable", True)
    assert int(answer.headers["retry-after"]) == 1
    assert answer.error["retry_after_ms"] == 1000


@dataclass
class Scene:
    """A run that has said its first word, and whoever follows it."""

    server: ServerProcess
    reply: Reply
    run: dict[str, Any]
    nursery: trio.Nursery
    readers: dict[str, Told] = field(default_factory=dict)

    def follow_sse(self, name: str) -> Told:
        told = self.readers[name] = Told()
        self.nursery.start_soon(self._follow_sse, told)
        return told

    def follow_ws(self, name: str) -> Told:
        told = self.readers[name] = Told()
        self.nursery.start_soon(self._follow_ws, told)
        return told

    async def _follow_sse(self, told: Told) -> None:
        async with http_client.connect(self.server.http_url) as connection:
            reader = await connection.open_sse("GET", f"/api/v1/stream/s?after={self.run['cursor']}")
            while not told.ended:
                [item] = await reader.take(1)
                assert item.id == item.data.get("cursor"), item
                told.take(item.data)

    async def _follow_ws(self, told: Told) -> None:
        async with ws_client.connect(self.server.gateway_url, session_id="s", after=self.run["cursor"]) as ws:
            while not told.ended:
                frame = await ws.receive()
                if frame["type"] != "draining":
                    told.take(frame)

    async def all_told(self, *types: str) -> None:
        for told in self.readers.values():
            await told.wait(*types)

    async def check_refusals(self) -> None:
        """No chat is taken, in this session or another, over HTTP or over WebSocket; the server is not ready, and what
        is stored can be read."""
        for session_id in ("s", "t"):
            check_refused(await post(self.server, "/api/v1/chat", message="no", session_id=session_id))
        async with ws_client.connect(self.server.gateway_url) as ws:
            refusal = await ws.call({"type": "chat", "content": "no", "session_id": "s"})
            assert (refusal["type"], refusal["code"], refusal["retryable"], refusal["retry_after_ms"]) == (
                "error",
                "store_unavailable",
                True,
                1000,
            )
        check_refused(await ready(self.server, 503))
        snapshot = await history(self.server)
        assert [message["role"] for message in snapshot["messages"]] == ["user"]
        assert snapshot["queue"] == []

    def check_readers(self, log: list[dict[str, Any]]) -> None:
        """Each has the run's log, but for what a gap named, and was told once."""
        assert [event["seq"] for event in log] == list(range(log[0]["seq"], log[0]["seq"] + len(log)))
        assert [event["type"] in TERMINALS for event in log].count(True) == 1
        for name, told in self.readers.items():
            assert list(told.kept.values()) == log, name
            [outage] = told.outages
            assert (outage["code"], outage["session_id"]) == ("store_unavailable", "s"), name


@asynccontextmanager
async def begun(server: ServerProcess, upstream: Upstream) -> AsyncIterator[Scene]:
    reply = upstream.answer(Answer(tokens=TOKENS, gated=True))
    accepted = await post(server, "/api/v1/chat", message="hi", session_id="s")
    assert accepted.status == 201
    async with trio.open_nursery() as nursery:
        scene = Scene(server, reply, accepted.json(), nursery)
        scene.follow_sse("sse")
        scene.follow_ws("ws")
        reply.release(1)
        await scene.all_told("agent_token")
        yield scene
        nursery.cancel_scope.cancel()


async def test_a_full_disk_is_told_and_refuses_chats_and_the_stream_goes_on_without_a_seam(tmp_path: Path) -> None:
    with trio.fail_after(DEADLINE_S):
        async with open_upstream() as upstream, served(tmp_path, upstream) as server:
            async with begun(server, upstream) as scene:
                allow_files(server, 0)
                scene.reply.release(1)
                await scene.all_told("error")
                await scene.check_refusals()
                await scene.follow_sse("late sse").wait("error")
                await scene.follow_ws("late ws").wait("error")
                scene.reply.release_all()
                allow_files(server, resource.RLIM_INFINITY)
                await scene.all_told(*TERMINAL)
                scene.check_readers(await whole_log(server, scene.run))
            assert not any(told.gaps for told in scene.readers.values())
            assert (await ready(server, 200)).json() == {"status": "ready"}
            messages = (await history(server))["messages"]
            assert [message["content"] for message in messages] == ["hi", "".join(TOKENS)]
            assert (await post(server, "/api/v1/chat", message="and on", session_id="s")).status == 201
            assert [line["event"] for line in server.lines].count("store_failing") == 1
            assert "runner_failed" not in [line["event"] for line in server.lines]


async def test_a_stop_on_a_full_disk_takes_effect_and_is_stored_when_there_is_room(tmp_path: Path) -> None:
    with trio.fail_after(DEADLINE_S):
        async with (
            open_upstream() as upstream,
            served(tmp_path, upstream, BAMBOO_STORAGE__COMMIT_TIMEOUT_S="0.5") as server,
        ):
            async with begun(server, upstream) as scene:
                allow_files(server, 0)
                scene.reply.release(1)
                await scene.all_told("error")
                check_refused(await post(server, "/api/v1/stop/s"))
                await scene.reply.wait_client_left()
                check_refused(await http_client.ask(server.http_url, "DELETE", "/api/v1/sessions/s"))
                allow_files(server, resource.RLIM_INFINITY)
                await scene.all_told(*TERMINAL)
                log = await whole_log(server, scene.run)
                scene.check_readers(log)
            assert (log[-1]["type"], log[-1]["reason"]) == ("agent_stopped", "user")
            stopped = await post(server, "/api/v1/stop/s")
            assert (stopped.status, stopped.json()["stopped"]) == (200, [])


@pytest.mark.parametrize("ending", ["killed", "told to stop"])
async def test_a_server_that_ends_on_a_full_disk_loses_no_more_than_the_uncommitted_tail(
    tmp_path: Path, ending: str
) -> None:
    with trio.fail_after(2 * DEADLINE_S):
        async with open_upstream() as upstream:
            async with served(tmp_path, upstream, BAMBOO_SERVER__DRAIN_S="0") as server:
                async with begun(server, upstream) as scene:
                    allow_files(server, 0)
                    scene.reply.release(1)
                    await scene.all_told("error")
                    scene.nursery.cancel_scope.cancel()
                if ending == "killed":
                    server.process.kill()
                    await server.wait()
                else:
                    server.send_signal(signal.SIGTERM)
                    await server.wait_logged("runners_stuck")
                    allow_files(server, resource.RLIM_INFINITY)  # from here on the stop could be marked as a clean one
                    assert await server.wait() == 0
            before = scene.readers["sse"]
            async with served(tmp_path, upstream) as server, http_client.connect(server.http_url) as connection:
                last = max(before.kept.values(), key=lambda frame: frame["seq"])
                stream = await connection.open_sse("GET", f"/api/v1/stream/s?after={last['cursor']}")
                while not before.ended:
                    before.take((await stream.take(1))[0].data)
                log = await whole_log(server, scene.run)
                assert list(before.kept.values()) == log
                assert (log[-1]["type"], log[-1]["code"]) == ("agent_error", "interrupted")
                lost = sum(gap["to_seq"] - gap["from_seq"] + 1 for gap in before.gaps)
                assert lost <= 2, "the words that were not durable when the disk was full"
                assert lost >= 1 or ending == "told to stop", "there may have been room just in time"
                assert len(before.gaps) <= 1
                assert (await post(server, "/api/v1/chat", message="and on", session_id="s")).status == 201


async def test_a_server_that_is_told_to_stop_on_a_full_disk_stops_cleanly_when_there_is_room(tmp_path: Path) -> None:
    with trio.fail_after(DEADLINE_S):
        async with open_upstream() as upstream:
            async with (
                served(tmp_path, upstream, BAMBOO_SERVER__DRAIN_S="0") as server,
                begun(server, upstream) as scene,
            ):
                allow_files(server, 0)
                scene.reply.release(1)
                await scene.all_told("error")
                server.send_signal(signal.SIGTERM)
                await server.wait_logged("draining")
                allow_files(server, resource.RLIM_INFINITY)
                await scene.all_told(*TERMINAL)
                assert await server.wait() == 0
            assert "stopped_unclean" not in [line["event"] for line in server.lines]
            async with served(tmp_path, upstream) as server:
                log = await whole_log(server, scene.run)
                scene.check_readers(log)
            assert (log[-1]["type"], log[-1]["code"]) == ("agent_error", "interrupted")


async def test_an_idle_server_on_a_full_disk_stops_in_order_and_its_readers_lose_nothing(tmp_path: Path) -> None:
    """The mark of a clean stop cannot be written: the next start is one as after a crash, and there was none."""
    with trio.fail_after(DEADLINE_S):
        async with open_upstream() as upstream:
            async with served(tmp_path, upstream) as server:
                run = (await post(server, "/api/v1/chat", message="hi", session_id="s")).json()
                log = await whole_log(server, run)
                allow_files(server, 0)
                server.send_signal(signal.SIGTERM)
                assert await server.wait() == 0
                assert "stopped_unclean" in [line["event"] for line in server.lines]
            async with served(tmp_path, upstream) as server:
                assert await whole_log(server, run) == log
                again = (await post(server, "/api/v1/chat", message="and on", session_id="s")).json()
                async with http_client.connect(server.http_url) as connection:
                    target = f"/api/v1/stream/s?after={log[-1]['cursor']}"
                    items = await (await connection.open_sse("GET", target)).until("agent_complete")
                assert [item.data["type"] for item in items[:2]] == ["user_message", "run_started"]
                assert again["cursor"].partition(".")[0] != log[-1]["cursor"].partition(".")[0]


async def test_a_database_that_another_program_holds_ends_the_run_and_everything_is_back_when_it_lets_go(
    tmp_path: Path,
) -> None:
    with trio.fail_after(DEADLINE_S):
        async with (
            open_upstream() as upstream,
            served(tmp_path, upstream, BAMBOO_STORAGE__COMMIT_TIMEOUT_S="1") as server,
        ):
            async with begun(server, upstream) as scene:
                with held_database(tmp_path / "bamboo.db") as holder:
                    scene.reply.release(1)
                    await scene.all_told("error")
                    await scene.reply.wait_client_left()
                    await scene.check_refusals()
                    check_refused(await post(server, "/api/v1/stop/s"))
                    check_refused(await http_client.ask(server.http_url, "DELETE", "/api/v1/sessions/s"))
                    await scene.follow_sse("late sse").wait("error")
                    holder.execute("ROLLBACK")
                await scene.all_told(*TERMINAL)
                log = await whole_log(server, scene.run)
                scene.check_readers(log)
            assert (log[-1]["type"], log[-1]["code"]) == ("agent_error", "store_unavailable")
            await ready(server, 200)
            again = await post(server, "/api/v1/chat", message="and on", session_id="s")
            assert again.status == 201
            assert again.json()["cursor"].partition(".")[0] == log[-1]["cursor"].partition(".")[0]
            assert "runner_failed" not in [line["event"] for line in server.lines]
