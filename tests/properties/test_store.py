"""SQLite is what the memory store is: the same random life, step by step, and the same answers to every question."""

import tempfile
from collections.abc import Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import trio
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from bamboo.core.events import (
    AgentComplete,
    AgentError,
    AgentMessage,
    AgentReasoning,
    AgentStopped,
    AgentToken,
    AgentToolComplete,
    ApprovalRequired,
    Event,
    EventBody,
    RunStarted,
    SessionClosed,
    UserMessage,
)
from bamboo.core.types import (
    Cursor,
    Epoch,
    EpochStart,
    MessageId,
    RunId,
    RunStats,
    RunStatus,
    SessionId,
    ToolCallId,
    text_content,
)
from bamboo.store.base import SLICE_MS, Commit, DuplicateKey, IdempotencyKey, KeyHolder, Run, Session, SessionLog, Store
from tests.support.hypothesis import examples
from tests.support.store_stands import DAY_MS, MemoryStand, SqliteStand, Stand

SESSIONS = [SessionId("a"), SessionId("b"), SessionId("c")]
KEYS = ["k1", "k2"]


@dataclass(frozen=True)
class Step:
    """One thing that happens. The numbers choose among what is possible then: which run, how much."""

    what: str
    session: SessionId = SESSIONS[0]
    number: int = 0
    text: str = ""
    key: str | None = None
    clean: bool = False


texts = st.text(max_size=20)
sessions = st.sampled_from(SESSIONS)
numbers = st.integers(0, 7)
steps = st.one_of(
    st.builds(Step, st.just("accept"), sessions, numbers, texts, st.none() | st.sampled_from(KEYS)),
    st.builds(Step, st.just("go_on"), sessions, numbers, texts),
    st.builds(Step, st.just("go_on"), sessions, numbers, texts),
    st.builds(Step, st.just("go_on"), sessions, numbers, texts),
    st.builds(Step, st.just("retitle"), sessions, numbers, texts),
    st.builds(Step, st.just("delete"), sessions),
    st.builds(Step, st.just("wait"), number=st.sampled_from([1, 1000, SLICE_MS // 2, DAY_MS // 2])),
    st.builds(Step, st.just("trim"), number=st.sampled_from([0, 1, DAY_MS // 2])),
    st.builds(Step, st.just("bound"), number=st.sampled_from([1, 100, 300, 1000])),
    st.builds(Step, st.just("bound all"), number=st.sampled_from([1, 300, 1000, 3000])),
    st.builds(Step, st.just("erase")),
    st.builds(Step, st.just("restart"), clean=st.booleans()),
)


@dataclass
class Life:
    """One of the two stores, living through the steps. The other one gets the same commits, but for the epochs."""

    stand: Stand
    accepted: int = 0
    said: int = 0
    epochs: dict[str, str] = field(default_factory=dict)

    async def live(self, step: Step) -> object:
        """Do the step. Returns what can be told of it without knowing the store."""
        store, clock = self.stand.store, self.stand.clock
        match step.what:
            case "wait":
                clock.now_ms += step.number
                return None
            case "restart":
                await self.stand.restart(clean=step.clean)
                return None
            # How much a step did is not told: of deleted sessions one store has something left, the other one nothing.
            case "trim":
                await store.trim(before_ms=clock.now_ms - step.number, limit=3)
                return None
            case "bound":
                await store.trim(session_bytes=step.number, before_ms=clock.now_ms - SLICE_MS, limit=3)
                return None
            case "bound all":
                await store.trim(total_bytes=step.number, session_bytes=500, limit=3)
                return None
            case "erase":
                await store.erase(limit=2)
                return None
        async with store.own(step.session) as log:
            commit = self._commit(log, step)
            if commit is None:
                return None
            try:
                await log.commit(commit)
            except DuplicateKey as refused:
                return self.known(refused.holder)
            return log.head

    def _commit(self, log: SessionLog, step: Step) -> Commit | None:
        now_ms = self.stand.clock.now_ms
        stored = log.session is not None
        if step.what == "accept":
            self.accepted += 1
            run_id, content = RunId(f"run-{self.accepted}"), text_content(step.text)
            message_id = MessageId(f"{run_id}-user")
            bodies: list[EventBody] = [UserMessage(message_id, content)]
            if step.number % 2 and not any(run.status is not RunStatus.QUEUED for run in log.unfinished):
                bodies.append(RunStarted("p", "m", 1))
            return Commit(
                self._events(log, run_id, bodies),
                session=None if stored else Session(log.session_id, now_ms, now_ms, title=step.text),
                accept=Run(run_id, log.session_id, message_id, content, now_ms, metadata={"n": step.number}),
                key=None if step.key is None else IdempotencyKey(step.key, step.text.encode(), now_ms + DAY_MS),
            )
        if not stored:
            return None
        if step.what == "retitle":
            assert log.session is not None
            return Commit(session=replace(log.session, title=step.text, params={"n": step.number}))
        if step.what == "delete":
            return Commit(self._events(log, None, [SessionClosed()]), delete=True)
        if not log.unfinished:
            return None
        run = log.unfinished[step.number % len(log.unfinished)]
        return Commit(self._events(log, run.run_id, self._next(run, step, log.unfinished)))

    def _next(self, run: Run, step: Step, unfinished: Sequence[Run]) -> list[EventBody]:
        """What the run does next: at most one of a session runs."""
        self.said += 1
        message_id = MessageId(f"m{self.said}")
        if run.status is RunStatus.QUEUED:
            if any(other.status is not RunStatus.QUEUED for other in unfinished) or step.number == 7:
                return [AgentStopped("user")]
            return [RunStarted("p", "m", 1)]
        deltas: list[EventBody] = [AgentToken(letter) for letter in step.text]
        match step.number:
            case 0:
                return [*deltas, AgentComplete("stop", None, RunStats(1, None, 2))]
            case 1:
                return [*deltas, AgentError("interrupted", step.text, retryable=True)]
            case 2:
                return [*deltas, AgentMessage(message_id, text_content(step.text), "p2", "m2")]
            case 3:
                # What a step has said is a message before its tools are run.
                said = AgentMessage(MessageId(f"{message_id}-said"), text_content(step.text), "p", "m")
                done = AgentToolComplete(message_id, ToolCallId("c"), "t", ok=True, result=step.text, elapsed_ms=1)
                return [said, done, *deltas]
            case 4:
                return [ApprovalRequired("a", ToolCallId("c"), "t", {"x": step.text}, 5)]
            case _:
                return [*deltas, AgentReasoning(step.text), *deltas]

    def _events(self, log: SessionLog, run_id: RunId | None, bodies: list[EventBody]) -> list[Event]:
        now_ms = self.stand.clock.now_ms
        first = log.head + 1
        return [
            Event(log.session_id, log.epoch, seq, now_ms, run_id, body) for seq, body in enumerate(bodies, start=first)
        ]

    # What can be asked

    async def answers(self, max_bytes: int) -> dict[str, object]:
        """Everything that the store says, epochs by the order of their appearance."""
        store, now_ms = self.stand.store, self.stand.clock.now_ms
        told: dict[str, Any] = {"unfinished": await store.unfinished_sessions(), "sessions": await listed(store)}
        told["idle"] = await store.idle_sessions(before_ms=now_ms - 500, limit=2)
        told["found"] = await store.sessions(limit=9, query="a")
        for key in KEYS:
            told[key] = await store.key_holder(key, now_ms)
        for session_id in SESSIONS:
            told[session_id] = [
                await store.extent(session_id),
                await store.session(session_id),
                await store.history(session_id, limit=3),
                await store.history(session_id, limit=2, before=MessageId("m3")),
                await store.messages(session_id),
                await store.runs(session_id, limit=4),
                await pages(store, session_id, None, max_bytes),
                await pages(store, session_id, RunId("run-2"), max_bytes),
            ]
        told["run"] = await store.run(RunId("run-1"))
        return {name: self.known(value) for name, value in told.items()}

    def known(self, value: Any) -> Any:
        """The value with epochs by the order of their appearance, and sequences as lists."""
        match value:
            case Event():
                epoch = self._epoch(value.epoch)
                return (value.session_id, epoch, value.seq, value.time_ms, value.run_id, value.body)
            case Cursor():
                return (self._epoch(value.epoch), value.seq)
            case EpochStart():
                return (self._epoch(value.epoch), value.first_seq)
            case KeyHolder():
                return (value.fingerprint, self.known(value.run))
            case list() | tuple():
                return [self.known(item) for item in value]
            case Run():
                cursor = self.known(value.first_cursor)
                return (cursor, replace(value, first_cursor=None))
        if hasattr(value, "__dataclass_fields__") and not isinstance(value, Session):
            return {name: self.known(getattr(value, name)) for name in value.__dataclass_fields__}
        return value

    def _epoch(self, epoch: Epoch) -> str:
        return self.epochs.setdefault(epoch, f"epoch {len(self.epochs)}")


async def listed(store: Store) -> list[list[Session]]:
    found: list[list[Session]] = []
    token: str | None = None
    while True:
        page, token = await store.sessions(limit=2, before=token)
        found.append(list(page))
        if token is None:
            return found


async def pages(store: Store, session_id: SessionId, run_id: RunId | None, max_bytes: int) -> list[Any]:
    """The log read page by page, as a subscription does."""
    found: list[Any] = []
    seq = 0
    while True:
        page = await store.read(session_id, seq, max_bytes=max_bytes, run_id=run_id)
        found.append(page)
        if page is None or page.through == seq:
            return found
        seq = page.through


@settings(max_examples=examples(40), suppress_health_check=[HealthCheck.too_slow])
@given(life=st.lists(steps, min_size=5, max_size=40), max_bytes=st.sampled_from([1, 1000, 1_000_000]))
def test_sqlite_answers_as_the_memory_store_does(life: list[Step], max_bytes: int) -> None:
    async def live_both() -> None:
        with trio.fail_after(60), tempfile.TemporaryDirectory() as directory:
            async with AsyncExitStack() as stands:
                memory = Life(await stands.enter_async_context(MemoryStand()))
                sqlite = Life(await stands.enter_async_context(SqliteStand(Path(directory) / "bamboo.db")))
                for step in life:
                    assert await sqlite.live(step) == await memory.live(step), step
                    if step.what in ("restart", "delete", "trim", "bound", "bound all", "erase"):
                        assert await sqlite.answers(max_bytes) == await memory.answers(max_bytes), step
                assert await sqlite.answers(max_bytes) == await memory.answers(max_bytes)

    trio.run(live_both)
