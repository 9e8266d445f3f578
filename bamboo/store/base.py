"""The store's contract: sessions, messages, runs, the log, epochs, idempotency keys.

Reading is on the `Store`, writing is on a `SessionLog` that only a session's owner has. What is written are events;
run states and the history are projections of them, made in the same transaction with `bamboo.core.history`. One
contract suite (`tests/contracts/store/`) holds every implementation to these docstrings; `memory.py` is the oracle.

Every method may raise `StoreError`. A read that is cancelled has no effect. A write that was handed over cannot be
taken back: the caller awaits it shielded, with a deadline of its own.
"""

from collections.abc import Sequence
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass
from typing import Final, Protocol

from bamboo.bus.log_reader import LogReader
from bamboo.core.events import Event
from bamboo.core.types import (
    Content,
    Cursor,
    Epoch,
    JsonObject,
    Message,
    MessageId,
    RunId,
    RunStats,
    RunStatus,
    SessionId,
    StopReason,
    Usage,
)

STEP_BYTES: Final = 1024 * 1024
"""What one step of `trim` or `erase` removes: no further row once that much has gone. A few milliseconds of a writer's
time.
"""

STEP_LOGS: Final = 50
"""From how many logs one step of `trim` removes rows: each lies in a place of its own, which costs like many rows."""

SLICE_MS: Final = 3600 * 1000
"""How exactly the oldest rows of all logs go first: a log gives up to an hour's rows at a time."""

TOMBSTONES: Final = 10_000
"""How many deleted sessions are remembered, the newest ones: ids and numbers only, about 100 bytes each."""


@dataclass(frozen=True, slots=True)
class Session:
    """A session's settings. `updated_ms` is the time of its newest commit."""

    session_id: SessionId
    created_ms: int
    updated_ms: int
    title: str | None = None
    provider: str | None = None
    model: str | None = None
    system_prompt: str | None = None
    params: JsonObject | None = None
    metadata: JsonObject | None = None


@dataclass(frozen=True, slots=True)
class Run:
    """One execution of the agent for one user message.

    As handed to `commit` in `accept` only the first block counts; the second is the store's projection of the run's
    events. `provider`, `model`, `system_prompt`, `params` are what the chat named, None where it named nothing.
    """

    run_id: RunId
    session_id: SessionId
    message_id: MessageId
    content: Content
    accepted_ms: int
    provider: str | None = None
    model: str | None = None
    system_prompt: str | None = None
    params: JsonObject | None = None
    metadata: JsonObject | None = None
    client_message_id: str | None = None
    cancel_after_s: float | None = None

    status: RunStatus = RunStatus.QUEUED
    first_cursor: Cursor | None = None
    """Just before the run's first event."""
    last_seq: int | None = None
    """The terminal event's seq."""
    used_provider: str | None = None
    used_model: str | None = None
    started_ms: int | None = None
    finished_ms: int | None = None
    finish_reason: str | None = None
    usage: Usage | None = None
    stats: RunStats | None = None
    error_code: str | None = None
    error_message: str | None = None
    stop_reason: StopReason | None = None


@dataclass(frozen=True, slots=True)
class IdempotencyKey:
    """`fingerprint` stands for the content that the key was first used with; `expires_ms` is when the key may be used
    anew.
    """

    key: str
    fingerprint: bytes
    expires_ms: int


@dataclass(frozen=True, slots=True)
class KeyHolder:
    """The run that a key was first used for."""

    fingerprint: bytes
    run: Run


@dataclass(frozen=True, slots=True)
class LiveStep:
    """The text of a running run's current step as far as it is durable."""

    run_id: RunId
    status: RunStatus
    text: str
    reasoning: str


@dataclass(frozen=True, slots=True)
class QueuedRun:
    run_id: RunId
    message_id: MessageId
    content: Content
    position: int


@dataclass(frozen=True, slots=True)
class Snapshot:
    """A session's history at one moment: everything here is what the log says up to `cursor`, the durable head.

    `messages` are oldest first, the newest `limit` of them (before `before`, if given). Every accepted user message
    is in exactly one of `messages`, `queue` and an event after `cursor`, but for one whose run ended before it
    started: that stays in the log only.
    """

    session_id: SessionId
    cursor: Cursor
    messages: tuple[Message, ...]
    live: LiveStep | None
    queue: tuple[QueuedRun, ...]
    more: bool
    """There are older messages."""


@dataclass(frozen=True, slots=True)
class Commit:
    """One transaction of a session's owner: all of it or nothing.

    `events` go on from the log's head without a hole. `session` creates the session or replaces its settings;
    `accept` adds a queued run whose `UserMessage` is among the events, `key` is its idempotency key; a run's id is used
    once, for ever. `delete` takes the session and all that belongs to it (log, messages, runs, epochs, keys) away after
    `events`: from this commit on none of it can be read, and its id and its keys are free. A tombstone stays, one of
    the newest TOMBSTONES; what the session held is erased in steps behind it (`Store.erase`).
    """

    events: Sequence[Event] = ()
    session: Session | None = None
    accept: Run | None = None
    key: IdempotencyKey | None = None
    delete: bool = False


class DuplicateKey(Exception):  # noqa: N818 - an answer, not an error
    """A commit's key is held by another run; nothing of the commit was done."""

    def __init__(self, holder: KeyHolder) -> None:
        super().__init__("the idempotency key is held by another run")
        self.holder = holder


class SessionLog(Protocol):
    """What a session's owner writes through, and what it needs to know to begin.

    `session` is None for a session that is not stored yet; its epoch is drawn all the same, and stored with its first
    commit. `first_seq` is the first seq of `epoch`. `unfinished` are the session's runs that have no terminal event,
    in the order in which they were accepted. `head` is the durable head and moves with each commit; the others are as
    they were found on entering.
    """

    session_id: SessionId
    epoch: Epoch
    first_seq: int
    head: int
    session: Session | None
    unfinished: Sequence[Run]

    async def commit(self, commit: Commit) -> None:
        """Make `commit` durable. Returns once it is; what was committed before is durable too.

        Commits of one log are done in the order of their calls. Times: one transaction is shared with whatever other
        sessions hand over meanwhile (group commit). Raises `DuplicateKey` or `StoreError`; then nothing of it was
        done and its seqs are free again; commits of this log that were already waiting behind it are refused with it.
        If cancelled, the commit may or may not have been done, and this log takes no more: own the session again. The
        first commit of a session that is not stored carries `session`; after one with `delete` there is no other.

        A commit that breaks a rule of the log is a bug of the caller's and an AssertionError, with nothing of it
        done: a hole in the seqs, a second terminal event of a run or anything after its terminal event, an event of a
        run that was not accepted here.
        """


class Store(LogReader, Protocol):
    """Everything that Bamboo keeps."""

    def own(self, session_id: SessionId, *, new_epoch: bool = False) -> AbstractAsyncContextManager[SessionLog]:
        """Become the session's only writer until the block is left. Entering it loads what the owner begins with.

        At most one owner at a time in one process is the caller's promise (the registry's); a second one is an
        AssertionError. After an unclean start, or with `new_epoch`, the session gets a new epoch here, whose first
        seq is the one after the durable head.
        """

    async def session(self, session_id: SessionId) -> Session | None: ...

    async def sessions(
        self, *, limit: int, before: str | None = None, query: str | None = None
    ) -> tuple[Sequence[Session], str | None]:
        """A page of sessions, the one with the newest commit first, and the token for the next page (None at the
        end).

        `before` is such a token; one that is not of ours raises ValueError. `query` is a substring of the title,
        case-insensitive.
        """

    async def history(self, session_id: SessionId, *, limit: int, before: MessageId | None = None) -> Snapshot | None:
        """The snapshot, from one read transaction. None: there is no such session. `before` that is no message of it:
        an empty page.
        """

    async def messages(self, session_id: SessionId) -> Sequence[Message]:
        """The whole history, oldest first: what a provider is sent."""

    async def run(self, run_id: RunId) -> Run | None: ...

    async def runs(self, session_id: SessionId, *, limit: int) -> Sequence[Run]:
        """The session's newest runs, newest first."""

    async def key_holder(self, key: str, now_ms: int) -> KeyHolder | None:
        """The run that this key stands for, unless it has expired."""

    async def unfinished_sessions(self) -> Sequence[SessionId]:
        """Sessions with a run that has no terminal event: what a start has to take up again."""

    async def healthy(self) -> bool:
        """The store can write: a write transaction was begun and given up again, or, after a commit that failed,
        really committed.
        """

    async def idle_sessions(self, *, before_ms: int, limit: int) -> Sequence[SessionId]:
        """Sessions whose newest commit is from before `before_ms` and that have no unfinished run, the one that has
        been idle longest first.
        """

    async def trim(self, *, limit: int, before_ms: int = 0, session_bytes: int = 0, total_bytes: int = 0) -> int:
        """Retention, in a small step: remove from the logs what is older than `before_ms`, what is more than
        `session_bytes` in one log and what is more than `total_bytes` in all of them, and the keys that have expired.
        A bound of 0 is none.

        A row holds one event or a chunk of deltas that were committed together (`codec.encode_events`), and counts
        `Row.size_bytes`; the bytes of a log are those of its rows. What goes is always the front row of a log, and the
        floor rises with it; never the first event of the session's oldest unfinished run or what is behind it, so that
        a log keeps more than its bound while such a run holds it. Messages, runs and the head stay.

        A front row goes if all of it is older than `before_ms` or its log keeps more than `session_bytes`. Only a call
        that finds none of these looks at the total: then front rows go until the rest fits. Of the logs whose front row
        goes, the one with the earliest is next (at one time that of the session that was stored first), and loses with
        it what goes too and is less than SLICE_MS younger.

        At most `limit` rows go in one call, no further one after STEP_BYTES, of at most STEP_LOGS logs, and `limit`
        keys; the number of rows and keys removed is returned, 0 when there is nothing left to remove. A session that is
        deleted meanwhile may let one step go further than `total_bytes` asks for.
        """

    async def erase(self, *, limit: int) -> int:
        """Remove, in a small step, what deleted sessions have left: at most `limit` rows, no further one after
        STEP_BYTES. Returns how much there was to do, 0 when no row is left.

        With that last step nothing of a deleted session's content is left in any file of the store, unless a read that
        began before keeps it from going: then a later call does it. Safe to interrupt by anything: the next call, or
        the next process, goes on.
        """

    async def wait_deleted(self) -> None:
        """Return as soon as `erase` has work: a session was deleted since the store was opened or this last returned.
        For one task.
        """

    async def wait_grown(self, by_bytes: int) -> None:
        """Return as soon as commits have added `by_bytes` to the logs, all together, since the store was opened or this
        last returned. For one task.
        """

    async def mark_clean(self) -> None:
        """Write the mark that the next start takes for a clean stop. The last write before the store is closed; no
        owner may be left.
        """
