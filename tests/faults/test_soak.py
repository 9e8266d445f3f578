"""Many short sessions, one after another and side by side: what they took comes back.

`BAMBOO_SOAK=5000 pytest tests/faults/test_soak.py` soaks for minutes; by default a few hundred sessions show that the
ground is the same before and after.
"""

import os
from collections.abc import Awaitable, Callable
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from itertools import cycle, islice
from pathlib import Path
from typing import Final

import trio

from bamboo.config import AgentConfig
from bamboo.server import Server
from tests.support import http_client, ws_client
from tests.support.server import ServerProcess, running, server_config, server_process

SESSIONS: Final = int(os.environ.get("BAMBOO_SOAK", "240"))
AT_ONCE: Final = 12
DEADLINE_S: Final = 60 + SESSIONS * 0.2

IDLE_EVICT_S: Final = 0.2

MEMORY_SLACK_BYTES: Final = 6 * 1024 * 1024
"""What the allocator may keep of a round more than of the one before; a leak of a few kilobytes a session is more."""

LATE_FILES: Final = 6
"""What SQLite's readers open once they are used: the log and its index, for each of the three."""

DATABASE_SLACK_BYTES: Final = 256 * 1024 + 120 * SESSIONS
"""Pages that are free come and go with what happens at once; a deleted session leaves a tombstone behind."""


@dataclass(frozen=True)
class Target:
    http: str
    gateway: str

    async def ask(self, method: str, path: str, json: object = None) -> http_client.Answer:
        return await http_client.ask(self.http, method, path, json=json)


async def read_over_sse(target: Target, session_id: str) -> None:
    async with http_client.connect(target.http) as connection:
        body = {"message": "read over SSE", "session_id": session_id}
        sse = await connection.open_sse("POST", "/api/v1/chat", json=body)
        assert (await sse.rest())[-1].data["type"] == "agent_complete"


async def read_over_websocket(target: Target, session_id: str) -> None:
    async with ws_client.connect(target.gateway, session_id=session_id) as ws:
        await ws.chat("read over a WebSocket")
        assert (await ws.until_terminal())[-1]["type"] == "agent_complete"


async def leave_and_stop(target: Target, session_id: str) -> None:
    body = {"message": "never ends", "session_id": session_id, "model": "stall"}
    async with http_client.connect(target.http) as connection:
        await (await connection.open_sse("POST", "/api/v1/chat", json=body)).take(3)
    assert len((await target.ask("POST", f"/api/v1/stop/{session_id}", {})).json()["stopped"]) == 1


async def leave_a_run_that_stops_by_itself(target: Target, session_id: str) -> None:
    body = {"message": "nobody waits", "session_id": session_id, "model": "stall"}
    answer = await target.ask("POST", "/api/v1/chat", {**body, "on_disconnect": {"cancel_after_s": 0}})
    accepted = answer.json()
    async with ws_client.connect(target.gateway, session_id=session_id, after=accepted["cursor"]) as ws:
        await ws.until_type("agent_token")
    while (await target.ask("GET", f"/api/v1/runs/{accepted['run_id']}")).json()["status"] != "stopped":
        pass


async def queue_and_delete(target: Target, session_id: str) -> None:
    for text in ("runs for ever", "waits"):
        await target.ask("POST", "/api/v1/chat", {"message": text, "session_id": session_id, "model": "stall"})


async def be_refused(target: Target, session_id: str) -> None:
    assert (await target.ask("POST", "/api/v1/chat", {"message": ""})).status == 400
    assert (await target.ask("GET", f"/api/v1/history/{session_id}")).status == 404


Life = Callable[[Target, str], Awaitable[None]]
LIVES: Final[tuple[Life, ...]] = (
    read_over_sse,
    read_over_websocket,
    leave_and_stop,
    leave_a_run_that_stops_by_itself,
    queue_and_delete,
    be_refused,
)


async def a_round(target: Target, sessions: int) -> None:
    """`sessions` short lives, `AT_ONCE` side by side, each deleted at its end."""
    places = trio.CapacityLimiter(AT_ONCE)

    async def live(life: Life, session_id: str) -> None:
        async with places:
            await life(target, session_id)
            deleted = await target.ask("DELETE", f"/api/v1/sessions/{session_id}")
            assert deleted.status == (404 if life is be_refused else 204)

    async with trio.open_nursery() as nursery:
        for number, life in enumerate(islice(cycle(LIVES), sessions)):
            nursery.start_soon(live, life, f"s{number}")


def open_files(server: ServerProcess) -> tuple[int, int]:
    """Sockets, and everything else. (SQLite opens some files only when they are needed.)"""
    directory = f"/proc/{server.process.pid}/fd"
    links: list[str] = []
    for name in os.listdir(directory):
        with suppress(FileNotFoundError):  # closed meanwhile
            links.append(os.readlink(f"{directory}/{name}"))
    sockets = sum(link.startswith("socket:") for link in links)
    return sockets, len(links) - sockets


def memory_bytes(server: ServerProcess) -> int:
    with open(f"/proc/{server.process.pid}/statm") as statm:
        return int(statm.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")


async def test_memory_files_and_the_database_are_after_a_round_what_they_were_before(tmp_path: Path) -> None:
    with trio.fail_after(DEADLINE_S):
        async with server_process(
            tmp_path,
            BAMBOO_LLM__PROVIDERS__OPENAI__KIND="scripted",
            BAMBOO_LLM__PROVIDERS__OPENAI__MODEL="echo",
            BAMBOO_AGENT__IDLE_EVICT_S=str(IDLE_EVICT_S),
        ) as server:
            target = Target(server.http_url, server.gateway_url)
            sockets, _ = open_files(server)
            sizes, memory, files = [], [], []
            for _ in range(2):
                await a_round(target, SESSIONS)
                while open_files(server)[0] > sockets:
                    await target.ask("GET", "/healthz")
                files.append(open_files(server)[1])
                sizes.append(await trio.to_thread.run_sync(partial(database_bytes, tmp_path)))
                memory.append(memory_bytes(server))
    assert files[1] <= files[0] + LATE_FILES
    assert memory[1] - memory[0] < MEMORY_SLACK_BYTES
    assert sizes[1] - sizes[0] < DATABASE_SLACK_BYTES


def database_bytes(directory: Path) -> int:
    return (directory / "bamboo.db").stat().st_size


async def test_every_task_and_every_session_is_gone_after_a_round(tmp_path: Path) -> None:
    settings = server_config(tmp_path, agent=AgentConfig(idle_evict_s=IDLE_EVICT_S))
    with trio.fail_after(DEADLINE_S):
        async with running(settings) as server:
            assert server.gateway_url is not None
            target = Target(server.http_url, server.gateway_url)
            await a_round(target, len(LIVES))
            await nothing_left(server)
            before = trio.lowlevel.current_statistics().tasks_living
            await a_round(target, SESSIONS // 4)
            await nothing_left(server)
            assert trio.lowlevel.current_statistics().tasks_living <= before


async def nothing_left(server: Server) -> None:
    """Return when the server has no session, subscription, run and connection."""
    assert server.gateway is not None
    while (
        server.agents.sessions
        or server.agents.active_runs
        or server.bus.sessions
        or server.web.server.connections
        or server.gateway.connections
    ):
        await trio.lowlevel.checkpoint()
