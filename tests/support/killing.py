"""A server process that lives and is killed again and again on one database, with clients that come back after each.

    async with open_world(tmp_path) as world:
        await world.live(Kill("accept:2:before"))    # a life of the server: killed there, or at the scenario's end
        await world.settle()                         # the last one: everything is asked for again, and must be so

`killed_clients` has the scenario. What its clients are told goes into `world.ledger`.
"""

import json
import signal
import subprocess
import sys
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Final

import trio

from tests.support import http_client
from tests.support.killed_clients import GONE, Clients
from tests.support.killed_server import VARIABLE
from tests.support.promises import Ledger, tokens_of
from tests.support.server import ServerProcess, process_environment
from tests.support.upstream import Answer, Reply, Request, Upstream

ROOT: Final = Path(__file__).parents[2]

DEADLINE_S: Final = 60
"""What one life of the server may take: far more than any needs."""

LINGER_ROUND_TRIPS: Final = 5
"""How often the event loop answers while the thread that writes stands at a commit: whatever it wants to tell goes out
meanwhile."""

STALLED: Final = 5
"""Runs with which a first life begins: one in each session."""

CONFIGURATION: Final = """
[server]
drain_s = 0.05
[llm]
default_provider = "fake"
max_retries = 0
[llm.providers.fake]
kind = "openai"
base_url = "{url}"
model = "fake-model"
"""


@dataclass(frozen=True, slots=True)
class Kill:
    """When a server is killed: at a commit (`killed_server` has the notation), after so many events that clients saw,
    or after so many texts of the model; otherwise when the scenario is over. `stop`: after so many events it is first
    told to stop, properly, and killed only at a commit. `stall` is a stop too: every answer of the model stalls after
    so many texts, and when those do that a first life begins with (STALLED), the server is told."""

    at: str = ""
    seen: int = 0
    texts: int = 0
    stop: int = 0
    stall: int = 0

    @property
    def stops(self) -> bool:
        return bool(self.stop or self.stall)

    def __str__(self) -> str:
        named = [f"{name}-{number}" for name in ("seen", "texts", "stop", "stall") if (number := getattr(self, name))]
        return "-".join([*([self.at.replace(":", "-")] if self.at else []), *named]) or "end"


class PacedUpstream(Upstream):
    """A model that answers each message with `tokens_of` it. While there is a `pace`, a text goes out when a client of
    the server has seen the one before."""

    def __init__(self, port: int, ledger: Ledger) -> None:
        super().__init__(port)
        self.texts = 0
        """Sent in this life of the server."""
        self.stalls = False
        """It says no more."""
        self.stalled = 0
        """Answers that stalled."""
        self._stall = 0
        self.pace: trio.Nursery | None = None
        self._ledger = ledger

    def begin(self, pace: trio.Nursery | None, stall: int = 0) -> None:
        """A new life of the server. `stall`: after so many texts an answer stalls."""
        self.texts, self.stalls, self.pace = 0, False, pace
        self.stalled, self._stall = 0, stall

    def _reply_to(self, request: Request) -> Reply:
        sent = [(message["role"], message["content"]) for message in request.json["messages"]]
        message = sent[-1][1]
        self._ledger.asked.append((message, sent))
        reply = Reply(Answer(tokens=tokens_of(message), gated=self.pace is not None))
        reply.request = request
        if self.pace is not None:
            self.pace.start_soon(self._let_out, reply)
        return reply

    async def _let_out(self, reply: Reply) -> None:
        for index, text in enumerate(reply.answer.tokens):
            if self.stalls or (self._stall and index == self._stall):
                self.stalled += 1
                self._turned()
                return
            reply.release()
            self.texts += 1
            self._turned()
            await self._ledger.wait(partial(self._ledger.texts.__contains__, text))

    async def wait_texts(self, count: int) -> None:
        while self.texts < count:
            await self._changed.wait()

    async def wait_stalled(self) -> None:
        while self.stalled < STALLED:
            await self._changed.wait()


class KilledServer(ServerProcess):
    """A process of `killed_server`."""

    def __init__(self, process: trio.Process, ledger: Ledger) -> None:
        super().__init__(process)
        self.commits: list[list[str]] = []
        """What each commit of this process had in it."""
        self.at: list[str] = []
        """The same of the commit at which it stands and waits to be killed."""
        self.gone = trio.Event()
        """It has ended, and all that it said was heard."""
        self._ledger = ledger

    @property
    def listens(self) -> bool:
        """And what it committed before it did was heard."""
        return bool(self.http_url) and any("start" in names for names in self.commits)

    async def wait_until(self, true: Callable[[], bool]) -> None:
        """Return when something that it said made it true, or it is gone."""
        while not (true() or self.gone.is_set()):
            await self._logged.wait()

    async def go(self) -> None:
        """Let it die at its commit. It may be dead already."""
        assert self.process.stdin is not None
        with suppress(trio.BrokenResourceError):
            await self.process.stdin.send_all(b"\n")

    async def watch(self) -> None:
        """Hear everything that it says, to its end."""
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self.read_log)
            nursery.start_soon(self._read_commits)
        await self.process.wait()
        self.gone.set()
        self._turn()

    async def _read_commits(self) -> None:
        assert self.process.stdout is not None
        rest = b""
        async for data in self.process.stdout:
            *whole, rest = (rest + data).split(b"\n")
            for line in map(json.loads, whole):
                if "at" in line:
                    self.at = line["at"]
                else:
                    self.commits.append(line["done"])
                    self._ledger.committed(line["done"])
            self._turn()

    def _turn(self) -> None:
        for line in self.lines:
            if line["event"] == "listening":
                self.http_url, self.gateway_url = line["http"], line["gateway"]
        super()._turn()


class World:
    """A database, the model, the clients, and one server after the other."""

    def __init__(self, directory: Path, upstream: PacedUpstream, ledger: Ledger) -> None:
        self.ledger = ledger
        self._directory = directory
        self._upstream = upstream
        self._clients = Clients(ledger)

    async def live(self, kill: Kill) -> KilledServer:
        """Start the server, let the clients do what they do, until it is killed."""
        self._clients.begin()
        async with self._server(kill) as server, trio.open_nursery() as nursery:
            self._upstream.begin(nursery, kill.stall)
            self.ledger.events = 0
            nursery.start_soon(self._kill, server, kill)
            await server.wait_until(lambda: server.listens)
            if not server.gone.is_set():
                await self._clients.scenario(server, to_the_end=kill.stops)
                if not kill.stops and not server.at:
                    server.process.kill()
            await server.gone.wait()
            nursery.cancel_scope.cancel()
        code = server.process.returncode
        assert code in ((-signal.SIGKILL, 0) if kill.stops else (-signal.SIGKILL,)), f"exit code {code} {server.lines}"
        return server

    async def settle(self) -> KilledServer:
        """Start the server and leave it alone: every promise is kept. It is stopped properly in the end."""
        async with self._server(Kill()) as server:
            self._upstream.begin(None)
            await server.wait_until(lambda: server.listens)
            await self._clients.settle(server)
            server.send_signal(signal.SIGTERM)
            await server.gone.wait()
        assert server.process.returncode == 0, server.lines
        assert self.ledger.clean, "a stop without the mark"
        return server

    @asynccontextmanager
    async def _server(self, kill: Kill) -> AsyncIterator[KilledServer]:
        (self._directory / "bamboo.toml").write_text(CONFIGURATION.format(url=self._upstream.base_url))
        variables = {"PYTHONPATH": str(ROOT)} | ({VARIABLE: kill.at} if kill.at else {})
        start = partial(
            trio.run_process,
            [sys.executable, "-m", "tests.support.killed_server"],
            cwd=self._directory,
            env=process_environment(self._directory, **variables),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            check=False,
        )
        with trio.fail_after(DEADLINE_S):
            async with trio.open_nursery() as nursery:
                server = KilledServer(await nursery.start(start), self.ledger)
                nursery.start_soon(server.watch)
                try:
                    yield server
                finally:
                    server.process.kill()
        bad = [line for line in server.lines if line["event"] == "text" or line["level"] == "error"]
        assert not bad, f"the server says that it failed: {bad}"

    async def _kill(self, server: KilledServer, kill: Kill) -> None:
        """At the last moment a client sends a chat. Should its answer come all the same, it counts."""
        async with trio.open_nursery() as nursery:
            if kill.at:
                nursery.start_soon(self._kill_at_commit, server, nursery)
            if kill.seen:
                nursery.start_soon(self._kill_when, server, nursery, partial(self.ledger.wait_events, kill.seen))
            if kill.texts:
                nursery.start_soon(self._kill_when, server, nursery, partial(self._upstream.wait_texts, kill.texts))
            if kill.stop:
                nursery.start_soon(self._stop_when, server, partial(self.ledger.wait_events, kill.stop))
            if kill.stall:
                nursery.start_soon(self._stop_when, server, self._upstream.wait_stalled)

    async def _kill_at_commit(self, server: KilledServer, nursery: trio.Nursery) -> None:
        await server.wait_until(lambda: bool(server.at))
        if not {"schema", "start"} & {*server.at}:  # else it opens its database, and listens only after that
            await server.wait_until(lambda: server.listens)
            await nursery.start(self._clients.flight, server)
            await self._linger(server)
        await server.go()

    async def _kill_when(
        self, server: KilledServer, nursery: trio.Nursery, moment: Callable[[], Awaitable[None]]
    ) -> None:
        await moment()
        await nursery.start(self._clients.flight, server)
        server.process.kill()

    async def _stop_when(self, server: KilledServer, moment: Callable[[], Awaitable[None]]) -> None:
        await moment()
        self.ledger.stops += 1
        self._upstream.stalls = True  # so that there is something to interrupt
        server.send_signal(signal.SIGTERM)

    async def _linger(self, server: KilledServer) -> None:
        with suppress(*GONE):  # a server that stops has left its port
            async with http_client.connect(server.http_url) as connection:
                for _ in range(LINGER_ROUND_TRIPS):
                    await connection.request("GET", "/healthz")
            await self._clients.look(server)


@asynccontextmanager
async def open_world(directory: Path) -> AsyncIterator[World]:
    """An empty database, and a model that is there for all lives of the server."""
    ledger = Ledger()
    async with trio.open_nursery() as nursery:
        listeners = await trio.open_tcp_listeners(0, host="127.0.0.1")
        upstream = PacedUpstream(listeners[0].socket.getsockname()[1], ledger)
        await nursery.start(trio.serve_listeners, upstream._serve, listeners)
        yield World(directory, upstream, ledger)
        nursery.cancel_scope.cancel()
