"""The store fails at every commit of a run, once and for long, by refusing and by giving no answer: the log has no
hole, the run has one end, and every reader gets all of it and is told once."""

import json
from collections.abc import Callable, Sequence
from functools import partial
from typing import Final

import pytest
import trio
import trio.testing

from bamboo.config import StorageConfig, StreamConfig
from bamboo.core.events import AgentComplete, AgentError, Event
from bamboo.core.types import Accepted, JsonObject, SessionId, ToolResult
from bamboo.wire.encode import event_json
from tests.support.agents import chat, config, is_terminal
from tests.support.ground import Ground, Process, Tools
from tests.support.mortal_store import Fault
from tests.support.sweep import scheduled_by
from tests.support.talker import END, Answer, Silence, Talker, ask, say
from tests.support.wire_readers import READERS, TERMINAL, Told

S = SessionId("s")
TIMEOUT_S = 1.0
TINY = 1024
PACE = Silence(0.03)
SEEDS = range(8)

REFUSED: Final[list[Fault]] = ["refused"] * 12
SLOW: Final[list[Fault]] = ["slow"] * 500

WITH_A_TOOL: Final[Answer] = (say("let "), PACE, say("me "), PACE, say("see"), Silence(0.15), ask("look", "c1"), END)
THE_REST: Final[Answer] = (PACE, say("it "), Silence(0.15), say("is "), PACE, say("so"), END)

COMMITS = 7
"""Of the whole run: accept, deltas, message, intent, result, deltas, end."""


async def look(_: JsonObject) -> ToolResult:
    await trio.sleep(0.05)
    return ToolResult("so it is")


class Story:
    """A chat with a tool call over a store with these faults, followed over SSE and over WebSocket from its beginning,
    and by a reader that comes when the run has begun to fail.

    TINY `window_bytes`: whoever is not awake reads the store.
    """

    def __init__(self, faults: Sequence[Fault | None], *, window_bytes: int = TINY, failing_loads: int = 0) -> None:
        self.ground = Ground()
        self.ground.mortal.faults.extend(faults)
        self.faults = self.ground.mortal.faults
        self.failing_loads = failing_loads
        self.settings = config(
            stream=StreamConfig(window_bytes=window_bytes), storage=StorageConfig(commit_timeout_s=TIMEOUT_S)
        )
        self.model = Talker([WITH_A_TOOL, THE_REST])
        self.told = {name: Told() for name in READERS}
        self.late = {name: Told() for name in READERS}
        self.accepted: Accepted

    @property
    def log(self) -> list[Event]:
        return self.ground.log(S)

    @property
    def end(self) -> Event:
        return self.log[-1]

    async def run(self) -> None:
        with trio.fail_after(600):
            await self.ground.live(self._chat, self.settings, model=self.model, tools=Tools(look=look))
        await self.ground.check([self.accepted])

    async def _chat(self, process: Process) -> None:
        self.accepted = await process.insist(chat("hi", "s", idempotency_key="k"))
        self.ground.mortal.failing_loads = self.failing_loads
        async with trio.open_nursery() as readers:
            for name, read in READERS.items():
                readers.start_soon(read, process.bus, S, self.accepted.cursor, self.told[name])
            for told in self.told.values():
                await told.wait("error", *TERMINAL)
            for name, read in READERS.items():
                readers.start_soon(read, process.bus, S, self.accepted.cursor, self.late[name])

    def check_readers(self, outages: int | None = None) -> None:
        """Each has the whole log from the chat on, byte for byte; each of those from the beginning was told of so many
        outages, and those that came in the middle at most of as many."""
        expected = [json.loads(event_json(event)) for event in self.log if event.seq > self.accepted.cursor.seq]
        for told in (*self.told.values(), *self.late.values()):
            assert list(told.kept.values()) == expected
        for told in self.told.values():
            assert outages is None or len(told.outages) == outages, told.frames
            for outage in told.outages:
                assert (outage["code"], outage["retryable"], outage["session_id"]) == ("store_unavailable", True, "s")
                assert outage["retry_after_ms"] == 1000
        for late in self.late.values():
            assert len(late.outages) <= len(next(iter(self.told.values())).outages)


def play(story: Story, seed: int) -> Story:
    with scheduled_by(seed):
        trio.run(story.run, clock=trio.testing.MockClock(autojump_threshold=0))
    return story


def at_every_commit(make: Callable[[int], Story], check: Callable[[Story, int], None]) -> None:
    """Let the fault of `make(n)` come at commit n, for as many as there are, under several schedules."""
    for number in range(COMMITS + 3):
        for seed in SEEDS:
            story = play(make(number), seed)
            if story.faults:
                assert number >= COMMITS, f"the run has only {number} commits: this tests less than it says"
                return
            check(story, number)
    raise AssertionError("the run has no end of commits")


@pytest.mark.parametrize("window_bytes", [TINY, 100_000])
@pytest.mark.parametrize("times", [1, 2, 12])
def test_a_commit_that_is_refused_costs_time_and_nothing_else(times: int, window_bytes: int) -> None:
    calm = play(Story([]), 0)

    def make(number: int) -> Story:
        return Story([None] * number + ["refused"] * times, window_bytes=window_bytes)

    def check(story: Story, number: int) -> None:
        assert isinstance(story.end.body, AgentComplete)
        assert [event.body.type for event in story.log] == [event.body.type for event in calm.log]
        story.check_readers(outages=1 if number else 0)  # nobody follows what is not accepted yet
        assert {event.epoch for event in story.log} == {story.accepted.cursor.epoch}
        if number and times == 12:
            assert all(len(late.outages) == 1 for late in story.late.values()), "it came while the store failed"

    at_every_commit(make, check)


def test_a_store_that_fails_again_and_again_is_told_each_time() -> None:
    faults: list[Fault | None] = [None, "refused", None, "refused", "refused", None, "refused"]
    for seed in SEEDS:
        story = play(Story(faults), seed)
        story.check_readers(outages=3)
        assert isinstance(story.end.body, AgentComplete)


@pytest.mark.parametrize("fault", ["lost", "unanswered"])
def test_a_commit_without_an_answer_ends_the_run_once_and_names_what_its_readers_lost(fault: Fault) -> None:
    def make(number: int) -> Story:
        return Story([None] * number + [fault], failing_loads=3)

    def check(story: Story, number: int) -> None:
        end = story.end
        assert [is_terminal(event) for event in story.log if event.run_id == story.accepted.run_id].count(True) == 1
        if number == 0 and fault == "lost":
            assert isinstance(end.body, AgentComplete), "the chat was sent again, and nothing of the first one is left"
        elif not isinstance(end.body, AgentComplete):
            assert isinstance(end.body, AgentError)
            assert (end.body.code, end.body.retryable) == ("store_unavailable", True)
        story.check_readers(outages=1 if number else 0)
        for told in story.told.values():
            assert len(told.gaps) <= 1
            lost = {frame["type"] for gap in told.gaps for frame in told.frames if in_gap(frame, gap)}
            assert lost <= {"agent_token"}, "only deltas are seen before they are durable"

    at_every_commit(make, check)


def in_gap(frame: JsonObject, gap: JsonObject) -> bool:
    return (
        frame.get("seq") is not None
        and gap["from_seq"] <= frame["seq"] <= gap["to_seq"]
        and (frame["cursor"].rpartition(".")[0] != gap["cursor"].rpartition(".")[0])
    )


def test_a_store_that_can_neither_be_written_nor_read_is_one_outage() -> None:
    """Those that lag cannot read either: whoever is told by the writer is not told by his read."""

    async def with_failing_reads(story: Story) -> None:
        async def fail() -> None:
            await trio.sleep(0.1)
            story.ground.mortal.failing_reads = 20

        async with trio.open_nursery() as nursery:
            nursery.start_soon(fail)
            await story.run()

    for seed in SEEDS:
        story = Story([None, *REFUSED])
        with scheduled_by(seed):
            trio.run(partial(with_failing_reads, story), clock=trio.testing.MockClock(autojump_threshold=0))
        story.check_readers(outages=1)
        assert all(len(late.outages) == 1 for late in story.late.values())


def test_memory_is_bounded_while_the_store_keeps_everybody_waiting() -> None:
    """A provider at full speed, a store that takes a second for each commit: the run waits for the store, not the
    memory."""
    bound = 20_000
    flood: Answer = (*[say("x" * 100)] * 2_000, END)
    pending: list[int] = []

    async def watch(process: Process) -> None:
        accepted = await process.insist(chat("hi", "s"))
        async with trio.open_nursery() as nursery:
            told = Told()
            nursery.start_soon(READERS["sse"], process.bus, S, accepted.cursor, told)
            while not told.ended:
                topic = process.bus._topics[S]
                assert topic.window is not None
                pending.append(topic.window.pending_bytes)
                await trio.sleep(0.05)
            assert len(told.kept) > 2_000

    async def main() -> None:
        ground = Ground()
        ground.mortal._slow_s = 0.9 * TIMEOUT_S
        ground.mortal.faults.extend([None, *SLOW])
        settings = config(
            stream=StreamConfig(window_bytes=TINY, max_uncommitted_bytes=bound),
            storage=StorageConfig(commit_timeout_s=TIMEOUT_S),
        )
        with trio.fail_after(3600):
            await ground.live(watch, settings, model=Talker([flood]))
        await ground.check()

    trio.run(main, clock=trio.testing.MockClock(autojump_threshold=0))
    assert bound / 2 < max(pending) <= bound + 1_000
