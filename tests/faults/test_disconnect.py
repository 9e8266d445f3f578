"""Clients that are cut at every event of two interleaved runs and come back with their cursor: what they had and what
they then get is the log, byte for byte.

Everything is real: sockets, server, database. The model server is gated, so that the runs are where the test says.
"""

from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import pytest
import trio
import trio.testing

from bamboo.core.types import JsonObject, ToolResult
from bamboo.server import Server
from tests.support import http_client
from tests.support.http_client import ask
from tests.support.readers import READ_BYTES, WAYS, Reader, Seen, Way, WsReader, log_of, open_reader
from tests.support.server import DEADLINE_S, running, server_config
from tests.support.tools import FakeToolbox
from tests.support.upstream import Answer, FakeToolCall, Upstream, open_upstream

How = Literal["fin", "reset", "half"]
"""How a client is cut: it closes; it resets; it resets with half of the next event in its hands."""

Run = Literal["first", "second"] | None
"""Whose stream a client reads: of one of the two runs, or of the whole session."""

HOWS: tuple[How, ...] = ("fin", "reset", "half")

STEP_BYTES = 61
"""What a client that is cut in mid-event reads at once: less than half of any event."""

FIRST_RUN = (
    "user_message run_started agent_reasoning agent_reasoning agent_token agent_token agent_token agent_message "
    "agent_tool_start agent_tool_complete agent_token agent_token agent_message agent_complete"
)
SECOND_RUN = "user_message run_queued run_started agent_token agent_token agent_message agent_complete"


def types(seen: Sequence[Seen]) -> str:
    return " ".join(item.type for item in seen)


@dataclass
class Turns:
    """What has happened so far, one act after the other."""

    number: int = 0
    turned: trio.Event = field(default_factory=trio.Event)

    def turn(self) -> None:
        self.number += 1
        self.turned.set()
        self.turned = trio.Event()

    async def next(self) -> None:
        await self.turned.wait()


class Story:
    """Two runs of one session, the second accepted while the first streams. `act` goes on to the next act and returns
    when its events are published; `seen` are all so far."""

    def __init__(self, server: Server, upstream: Upstream, tool: trio.Event) -> None:
        self.server = server
        self.turns = Turns()
        self.seen: list[Seen] = []
        self.session_id = self.first_run = self.second_run = self.start = ""
        self.observer: Reader | None = None
        self._tool = tool
        texts = ["Let me", " lo", "ok. "]
        first = Answer(tokens=texts, reasoning=["hm", "m"], tool_calls=[FakeToolCall("look")], gated=True)
        answers = [first, Answer(tokens=["It is", " there."], gated=True), Answer(tokens=["Twi", "ce."], gated=True)]
        self._replies = [upstream.answer(answer) for answer in answers]

    async def begin(self) -> None:
        """The first run is accepted, and its model thinks."""
        answer = await ask(self.server.http_url, "POST", "/api/v1/chat", json={"message": "one"})
        accepted = answer.json()
        self.session_id, self.first_run = accepted["session_id"], accepted["run_id"]
        self.start = accepted["cursor"].rpartition(".")[0] + ".0"

    async def acts(self) -> AsyncIterator[None]:
        """Each is over when the observer has read what it caused."""
        thought, looked, repeated = self._replies
        await self._until("agent_reasoning", 2)
        yield
        thought.release()
        await self._until("agent_token")
        yield
        chat = {"message": "two", "session_id": self.session_id}
        answer = await ask(self.server.http_url, "POST", "/api/v1/chat", json=chat)
        assert answer.json()["accepted_as"] == "queued"
        self.second_run = answer.json()["run_id"]
        await self._until("run_queued")
        yield
        thought.release()
        await self._until("agent_token")
        yield
        thought.release()
        await self._until("agent_tool_start")
        yield
        self._tool.set()
        await self._until("agent_tool_complete")
        yield
        looked.release()
        await self._until("agent_token")
        yield
        looked.release()
        await self._until("run_started")
        yield
        repeated.release()
        await self._until("agent_token")
        yield
        repeated.release()
        await self._until("agent_complete")
        yield

    async def _until(self, kind: str, count: int = 1) -> None:
        assert self.observer is not None
        for _ in range(count):
            self.seen += await self.observer.until(kind)

    async def ask_for_run(self, run_id: str, way: Way, after: str) -> http_client.Answer:
        target = f"/api/v1/stream/{self.session_id}?run_id={run_id}"
        if way == "after":
            return await ask(self.server.http_url, "GET", f"{target}&after={after}")
        return await ask(self.server.http_url, "GET", target, headers={"Last-Event-ID": after})

    def of(self, run_id: str | None) -> list[Seen]:
        return [item for item in self.seen if run_id is None or item.fields.get("run_id") == run_id]


@dataclass
class Client:
    """One that is cut behind its first `events` events, and comes back: at once, or, if `away`, when more has
    happened."""

    way: Way
    how: How
    events: int
    away: bool
    run: Run = None
    seen: list[Seen] = field(default_factory=list)
    cut_at: int = 0
    cut: trio.Event = field(default_factory=trio.Event)
    back: trio.Event = field(default_factory=trio.Event)
    whole: trio.Event = field(default_factory=trio.Event)
    told_to_stop: bool = False
    last_code: int | None = None

    def run_id(self, story: Story) -> str | None:
        return {"first": story.first_run, "second": story.second_run, None: None}[self.run]

    @property
    def due(self) -> int:
        """How many of its events there have to be for it to be cut."""
        return self.events + (self.how == "half")

    async def live(self, story: Story) -> None:
        await self.read_and_be_cut(story)
        if self.away:
            await story.turns.next()
        await self.resume(story)

    async def read_and_be_cut(self, story: Story) -> None:
        step = STEP_BYTES if self.how == "half" else READ_BYTES
        place = (story.session_id, self.start(story))
        async with open_reader(story.server, self.way, *place, run_id=self.run_id(story), step=step) as reader:
            self.seen += await reader.take(self.events)
            if self.how == "half":
                await reader.half_an_event(13 + self.events * 37 % 80)
            reader.cut(reset=self.how != "fin")
        self.cut_at = story.turns.number
        self.cut.set()

    def start(self, story: Story) -> str | None:
        """Where it begins: at the log's start, or, with its run, at that one's."""
        return story.start if self.run is None else None

    async def keep_up(self, story: Story) -> None:
        """Return when it is cut, if it has to be by now, and back, if it has to be by now."""
        run_id = self.run_id(story)
        if run_id == "" or len(story.of(run_id)) < self.due:
            return
        await self.cut.wait()
        if not self.away or self.cut_at < story.turns.number:
            await self.back.wait()

    async def resume(self, story: Story) -> None:
        """Come back with the cursor of the last whole event, and read to the end."""
        run_id = self.run_id(story)
        after = self.seen[-1].cursor if self.seen else self.start(story)
        if run_id is not None and is_over(self.seen, run_id):
            assert after is not None
            await self._hear_that_it_is_over(story, run_id, after)
            return
        async with open_reader(story.server, self.way, story.session_id, after, run_id=run_id) as reader:
            self.back.set()
            self._look_for_the_end(run_id or story.second_run)
            while (item := await reader.next()) is not None:
                self.seen.append(item)
                self._look_for_the_end(run_id or story.second_run)
            assert reader.ended == "properly", self
            if isinstance(reader, WsReader):
                self.last_code = reader.close_code

    def _look_for_the_end(self, run_id: str) -> None:
        if is_over(self.seen, run_id):
            self.whole.set()

    async def _hear_that_it_is_over(self, story: Story, run_id: str, after: str) -> None:
        answer = await story.ask_for_run(run_id, self.way, after)
        self.told_to_stop = (answer.status, answer.body) == (204, b"")
        self.back.set()
        self.whole.set()


def clients_of(way: Way, *, live: bool) -> list[Client]:
    """One for every event, of the session and of each run, for every way to be cut, and, of live runs, to come back."""
    first, second = FIRST_RUN.split(), SECOND_RUN.split()
    runs: dict[Run, int] = {None: 1 + len(first) + len(second)}
    if way in ("last_event_id", "after"):
        runs |= {"first": len(first), "second": len(second)}
    return [
        Client(way, how, events, away, run)
        for run, total in runs.items()
        for how in HOWS
        for events in range(total + (how != "half"))
        for away in ((False, True) if live else (False,))
    ]


@asynccontextmanager
async def open_story(tmp_path: Path, upstream: Upstream) -> AsyncIterator[Story]:
    tool = trio.Event()

    async def look(arguments: JsonObject) -> ToolResult:  # noqa: ARG001
        await tool.wait()
        return ToolResult("it is there")

    toolbox = FakeToolbox(look=look)
    async with running(server_config(tmp_path, upstream.base_url), toolbox=lambda: toolbox) as server:
        story = Story(server, upstream, tool)
        await story.begin()
        async with open_reader(server, "connect", story.session_id, story.start) as story.observer:
            yield story


def check(clients: Sequence[Client], story: Story, log: Sequence[Seen]) -> None:
    assert story.seen == log
    assert [item.fields["seq"] for item in log] == list(range(1, len(log) + 1))
    assert types(story.of(story.first_run)) == FIRST_RUN
    assert types(story.of(story.second_run)) == SECOND_RUN
    assert all(item.fields["cursor"] == item.cursor for item in log)
    for client in clients:
        run_id = client.run_id(story)
        assert client.seen == story.of(run_id), client
        assert client.told_to_stop is (run_id is not None and client.events == len(story.of(run_id))), client
        assert client.last_code == (1001 if client.way in ("connect", "subscribe") else None)


@pytest.mark.parametrize("way", WAYS)
async def test_a_client_that_is_cut_at_any_event_of_live_runs_gets_the_rest_exactly(tmp_path: Path, way: Way) -> None:
    """Every one is cut while the runs are at that very event: nothing goes on before it has been cut."""
    clients = clients_of(way, live=True)
    waiting = list(clients)
    with trio.fail_after(DEADLINE_S):
        async with (
            open_upstream() as upstream,
            trio.open_nursery() as nursery,
            open_story(tmp_path, upstream) as story,
        ):
            async for _ in story.acts():
                for client in [client for client in waiting if client.run_id(story) != ""]:
                    waiting.remove(client)
                    nursery.start_soon(client.live, story)
                for client in clients:
                    await client.keep_up(story)
                story.turns.turn()
            for client in clients:
                await client.whole.wait()
            log = await log_of(story.server.store, story.session_id)
    check(clients, story, log)


@pytest.mark.parametrize("restarted", [False, True])
@pytest.mark.parametrize("way", WAYS)
async def test_a_client_that_is_cut_at_any_event_of_finished_runs_gets_the_rest_exactly(
    tmp_path: Path, way: Way, *, restarted: bool
) -> None:
    """From a session that is in memory, and from one that the next server has on disk only."""
    clients = clients_of(way, live=False)
    with trio.fail_after(DEADLINE_S):
        async with open_upstream() as upstream, trio.open_nursery() as nursery:
            async with open_story(tmp_path, upstream) as story:
                async for _ in story.acts():
                    pass
                async with trio.open_nursery() as first_connections:
                    for client in clients:
                        first_connections.start_soon(client.read_and_be_cut, story)
                if not restarted:
                    log = await all_resume(clients, story, nursery)
            if restarted:
                async with running(server_config(tmp_path, upstream.base_url)) as story.server:
                    log = await all_resume(clients, story, nursery)
    check(clients, story, log)


async def all_resume(clients: Sequence[Client], story: Story, nursery: trio.Nursery) -> list[Seen]:
    """Return the log when they have all of it. They read on until the server stops."""
    for client in clients:
        nursery.start_soon(client.resume, story)
    for client in clients:
        await client.whole.wait()
    return await log_of(story.server.store, story.session_id)


@pytest.mark.parametrize("way", ["last_event_id", "after"])
async def test_a_run_that_is_over_is_not_streamed_again_from_its_end_or_any_later_event(
    tmp_path: Path, way: Way
) -> None:
    with trio.fail_after(DEADLINE_S):
        async with open_upstream() as upstream, open_story(tmp_path, upstream) as story:
            async for _ in story.acts():
                pass
            [*_, end] = story.of(story.first_run)
            later = [item.cursor for item in story.seen if item.fields["seq"] >= end.fields["seq"]]
            assert len(later) > 3
            answers = [await story.ask_for_run(story.first_run, way, cursor) for cursor in later]
    assert {(answer.status, answer.body) for answer in answers} == {(204, b"")}


@pytest.mark.parametrize("way", WAYS)
async def test_a_clean_restart_in_between_makes_no_gap(tmp_path: Path, way: Way) -> None:
    """The server stops while one run streams and another waits: the one is interrupted, the other runs on the next
    server. A client was cut before at any event, or by the server's end itself."""
    clients: list[list[Seen]] = []
    with trio.fail_after(DEADLINE_S):
        async with open_upstream() as upstream, trio.open_nursery() as nursery:
            config = server_config(tmp_path, upstream.base_url)
            reply = upstream.answer(Answer(tokens=["Let me", " look."], reasoning=["hm"], gated=True))
            next_reply = upstream.answer(Answer(tokens=["Twi", "ce."], gated=True))
            async with running(config) as server:
                one = (await ask(server.http_url, "POST", "/api/v1/chat", json={"message": "one"})).json()
                session_id, start = one["session_id"], one["cursor"].rpartition(".")[0] + ".0"
                chat = {"message": "two", "session_id": session_id}
                two = (await ask(server.http_url, "POST", "/api/v1/chat", json=chat)).json()
                assert two["accepted_as"] == "queued"
                reply.release()
                async with open_reader(server, way, session_id, start) as reader:
                    before = await reader.until("agent_token")
                for events in range(len(before) + 1):
                    async with open_reader(server, way, session_id, start) as reader:
                        clients.append(await reader.take(events))
                        reader.cut(reset=events % 2 == 0)
                stays: list[Seen] = []
                clients.append(stays)
                await nursery.start(read_to_the_end, server, way, session_id, start, stays)
            async with running(config) as server:
                for seen in clients:
                    after = seen[-1].cursor if seen else start
                    await nursery.start(read_to_the_end, server, way, session_id, after, seen)
                next_reply.release_all()
                while not all(is_over(seen, two["run_id"]) for seen in clients):
                    await trio.testing.wait_all_tasks_blocked(0.001)
                log = await log_of(server.store, session_id)
    assert all(seen == log for seen in clients)
    assert "gap" not in types(log)
    assert types(log).endswith(
        "agent_token agent_message agent_error run_started agent_token agent_token agent_message agent_complete"
    )
    assert len({item.cursor.partition(".")[0] for item in log}) == 1, "a clean stop changes no epoch"


def is_over(seen: Sequence[Seen], run_id: str) -> bool:
    """The run's end was seen."""
    return bool(seen) and seen[-1].type == "agent_complete" and seen[-1].fields["run_id"] == run_id


async def read_to_the_end(
    server: Server,
    way: Way,
    session_id: str,
    after: str,
    seen: list[Seen],
    *,
    task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED,
) -> None:
    """Read until the server stops."""
    async with open_reader(server, way, session_id, after) as reader:
        task_status.started()
        while (item := await reader.next()) is not None:
            seen.append(item)
        assert reader.ended == "properly"
