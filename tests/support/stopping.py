"""A session whose runs are to be stopped: a real server, a model server and a tool that the test plays, and everything
that has to be true in the very step in which a receipt came."""

import sqlite3
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from contextlib import AbstractAsyncContextManager, asynccontextmanager, closing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import trio
import trio.testing

from bamboo.config import StreamConfig
from bamboo.core.types import JsonObject, ToolResult
from bamboo.server import Server
from tests.support import ws_client
from tests.support.http_client import ask
from tests.support.readers import Reader, Seen, Way, open_reader
from tests.support.server import running, server_config
from tests.support.tcp import clients_of
from tests.support.tools import FakeToolbox
from tests.support.upstream import Answer, Upstream, open_upstream


class Tool:
    """A tool that works until it is cancelled, and then dies, as soon as it may."""

    def __init__(self) -> None:
        self.called = trio.Event()
        self.cancelled = trio.Event()
        self.may_die = trio.Event()
        self.may_die.set()

    async def __call__(self, _arguments: JsonObject) -> ToolResult:
        self.called.set()
        try:
            await trio.sleep_forever()
        finally:
            self.cancelled.set()
            with trio.CancelScope(shield=True):
                await self.may_die.wait()
        raise AssertionError("only a cancellation ends it")


@dataclass
class Stand:
    """A server, its model server, and a session whose runner lives and is idle. `idle_tasks` are then alive in the
    agents' nursery."""

    server: Server
    upstream: Upstream
    directory: Path
    tool: Tool = field(default_factory=Tool)
    session_id: str = ""
    start: str = ""
    idle_tasks: int = 0

    async def chat(self, text: str = "go on", **fields: Any) -> str:
        """The accepted run's id."""
        chat = {"message": text, "session_id": self.session_id, **fields}
        answer = await ask(self.server.http_url, "POST", "/api/v1/chat", json=chat)
        assert answer.status == 201, answer
        return str(answer.json()["run_id"])

    async def get(self, target: str) -> dict[str, Any]:
        return dict((await ask(self.server.http_url, "GET", f"/api/v1/{target}")).json())

    def reader(self, way: Way = "after") -> AbstractAsyncContextManager[Reader]:
        return open_reader(self.server, way, self.session_id, self.start)

    async def read_to_the_end_of(self, run_id: str) -> list[Seen]:
        async with open_reader(self.server, "after", self.session_id, None, run_id=run_id) as reader:
            return await reader.rest()

    def tasks(self) -> int:
        """Tasks of the agents that are alive."""
        return _tasks_in(self.server.agents._nursery)

    def ends_in_the_database(self) -> int:
        """Terminal events that are committed: what another process would find now."""
        with closing(sqlite3.connect(self.directory / "bamboo.db")) as database:
            [[ends]] = database.execute("SELECT count(*) FROM runs WHERE finished")
            return int(ends)

    def check_nothing_is_left(self, *, ends: int) -> None:
        """To be called in the very step in which a receipt came."""
        assert clients_of(self.upstream.port) == 0, "the connection to the model is open"
        assert self.tasks() <= self.idle_tasks, "something of the run is alive"
        assert self.server.agents.active_runs == self.server.agents.queued_runs == 0
        assert self.ends_in_the_database() == ends, "the terminal event is not committed"

    async def next_request(self) -> list[Mapping[str, Any]]:
        """What the model is told of the session so far, by the next chat. The session's runs have to be over."""
        self.upstream.forget()
        reply = self.upstream.answer(Answer(tokens=["Fine."]))
        await self.read_to_the_end_of(await self.chat("next"))
        messages = (await reply.wait_requested()).json["messages"]
        check_valid(messages)
        return list(messages)


def _tasks_in(nursery: trio.Nursery) -> int:
    return sum(1 + sum(map(_tasks_in, task.child_nurseries)) for task in nursery.child_tasks)


def check_valid(messages: Sequence[Mapping[str, Any]]) -> None:
    """What every provider takes: no empty or doubled assistant, every tool call with its result right behind it, no
    result without a call, the user last."""
    open_calls: list[str] = []
    before = ""
    for message in messages:
        role = message["role"]
        if role == "tool":
            assert message["tool_call_id"] in open_calls, messages
            open_calls.remove(message["tool_call_id"])
        else:
            assert not open_calls, messages
        if role == "assistant":
            assert before in ("user", "tool"), messages
            open_calls = [call["id"] for call in message.get("tool_calls", [])]
            assert message["content"] or open_calls, messages
        before = role
    assert before == "user", messages
    assert not open_calls


@asynccontextmanager
async def open_stand(
    directory: Path, *, max_retries: int = 0, drain_s: float = 0, stream: StreamConfig | None = None
) -> AsyncIterator[Stand]:
    tool = Tool()
    toolbox = FakeToolbox(look=tool)
    async with open_upstream() as upstream:
        settings = server_config(
            directory, upstream.base_url, max_retries=max_retries, server={"drain_s": drain_s}, stream=stream
        )
        async with running(settings, toolbox=lambda: toolbox) as server:
            stand = Stand(server, upstream, directory, tool)
            # Closed at its end, so that every connection to the model server is a run's.
            upstream.answer(Answer(tokens=["Hello."], headers={"connection": "close"}))
            accepted = (await ask(server.http_url, "POST", "/api/v1/chat", json={"message": "hi"})).json()
            stand.session_id = accepted["session_id"]
            [*_, last] = await stand.read_to_the_end_of(accepted["run_id"])
            stand.start = last.cursor
            await trio.testing.wait_all_tasks_blocked(0.01)
            stand.idle_tasks = stand.tasks()
            assert stand.idle_tasks > 0
            assert not toolbox.running
            yield stand
            assert not toolbox.running, "a tool runs on"


# How a client can ask for a stop, of one run or of all. Each gives the receipt as soon as it is there.

Receipt = dict[str, Any]

Stop = Callable[[Stand, str | None], Awaitable[Receipt]]


async def over_http(stand: Stand, run_id: str | None = None) -> Receipt:
    body = {} if run_id is None else {"run_id": run_id}
    answer = await ask(stand.server.http_url, "POST", f"/api/v1/stop/{stand.session_id}", json=body)
    assert answer.status == 200, answer
    return dict(answer.json())


async def by_cancelling(stand: Stand, run_id: str | None = None) -> Receipt:
    assert run_id is not None
    answer = await ask(stand.server.http_url, "POST", f"/api/v1/runs/{run_id}/cancel")
    assert answer.status == 200, answer
    return dict(answer.json())


async def over_ws(stand: Stand, run_id: str | None = None) -> Receipt:
    """On a connection that follows the session: it hears of every end before it gets the receipt."""
    assert stand.server.gateway_url is not None
    async with ws_client.connect(stand.server.gateway_url, session_id=stand.session_id, after=stand.start) as client:
        named = {} if run_id is None else {"run_id": run_id}
        stopped = await client.call({"type": "stop", "session_id": stand.session_id, **named})
        assert (stopped["type"], stopped["session_id"]) == ("stopped", stand.session_id), stopped
        told = {frame["run_id"] for frame in client.seen if frame["type"] == "agent_stopped"}
        assert client.seen[-1] is stopped
        assert told >= set(stopped["stopped"]), "the receipt came before what it is about"
        return {name: stopped[name] for name in stopped if name not in ("type", "session_id", "ref")}


async def by_command(stand: Stand, run_id: str | None = None) -> Receipt:
    assert stand.server.gateway_url is not None
    async with ws_client.connect(stand.server.gateway_url, session_id=stand.session_id) as client:
        arguments = {} if run_id is None else {"run_id": run_id}
        answer = await client.call({"type": "command", "name": "stop", "args": arguments})
        receipt = dict(answer["result"])
        assert receipt.pop("session_id") == stand.session_id
        return receipt
