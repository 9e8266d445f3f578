"""The store in memory: the oracle that every other store is compared with. Simple before all else; nothing outlives
the process.
"""

from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from dataclasses import dataclass, replace
from secrets import token_urlsafe

import trio

from bamboo.bus.log_reader import LogExtent, LogPage
from bamboo.core.cursors import epoch_at
from bamboo.core.events import Event
from bamboo.core.history import fold_step
from bamboo.core.types import Cursor, Epoch, EpochStart, Message, MessageId, RunId, SessionId
from bamboo.store import wall_clock_ms
from bamboo.store.base import (
    SLICE_MS,
    STEP_BYTES,
    STEP_LOGS,
    TOMBSTONES,
    Commit,
    DuplicateKey,
    IdempotencyKey,
    KeyHolder,
    LiveStep,
    Run,
    Session,
    SessionLog,
    Snapshot,
)
from bamboo.store.codec import Row, encode_events
from bamboo.store.listing import fold_title, page_token, parse_page_token
from bamboo.store.projection import Projected, accepted, fill_page, project_commit, queue_of, running_of
from bamboo.store.upkeep import Upkeep


@dataclass(slots=True)
class _Kept:
    """All that is kept of one session. `generation` is that of the store when the newest epoch was drawn. `rows` are
    the events as a database keeps them, because what goes is whole rows.
    """

    number: int
    session: Session
    epochs: list[EpochStart]
    generation: int
    floor: int
    head: int
    events: list[Event]
    rows: list[Row]
    messages: list[Message]
    runs: dict[RunId, Run]

    @property
    def unfinished(self) -> list[Run]:
        return [run for run in self.runs.values() if not run.status.finished]

    @property
    def extent(self) -> LogExtent:
        return LogExtent(tuple(self.epochs), self.floor, self.head)

    @property
    def log_bytes(self) -> int:
        return sum(row.size_bytes for row in self.rows)

    @property
    def held(self) -> bool:
        """The front row, if there is one, is the oldest unfinished run's or behind its first event."""
        firsts = [run.first_cursor.seq + 1 for run in self.unfinished if run.first_cursor is not None]
        return not self.rows or self.rows[0].last_seq >= min(firsts, default=self.head + 1)

    def drop_row(self) -> int:
        """Remove the front row. Returns what it took."""
        row = self.rows.pop(0)
        self.floor = row.last_seq
        self.events = [event for event in self.events if event.seq > self.floor]
        return row.size_bytes


@dataclass(frozen=True, slots=True)
class Tombstone:
    """What is left of a deleted session."""

    session_id: SessionId
    epoch: Epoch
    last_seq: int
    time_ms: int


class MemoryStore:
    """`bamboo.store.base.Store`, in memory."""

    def __init__(self, now_ms: Callable[[], int]) -> None:
        self._now_ms = now_ms
        self._sessions: dict[SessionId, _Kept] = {}
        self._keys: dict[str, tuple[IdempotencyKey, RunId]] = {}
        self._owners: dict[SessionId, MemoryLog | None] = {}
        self._generation = 0
        self._clean = False
        self._numbers = 0
        self._upkeep = Upkeep()
        self.tombstones: list[Tombstone] = []

    def __repr__(self) -> str:
        return f"<MemoryStore {len(self._sessions)} sessions, {len(self._owners)} owned>"

    # Stopping and starting

    def restart(self) -> None:
        """Become what a new process finds: a clean start after `mark_clean`, else an unclean one. No owner may be
        left.
        """
        assert not self._owners, "a session is owned"
        if not self._clean:
            self._generation += 1
        self._clean = False

    def crash(self) -> None:
        """Die and start again: owners are forgotten, and what they still write is refused."""
        self._owners.clear()
        self._clean = False
        self.restart()

    async def mark_clean(self) -> None:
        await trio.lowlevel.checkpoint()
        assert not self._owners, "a session is owned"
        self._clean = True

    async def healthy(self) -> bool:
        await trio.lowlevel.checkpoint()
        return True

    # Writing

    @asynccontextmanager
    async def own(self, session_id: SessionId, *, new_epoch: bool = False) -> AsyncIterator[SessionLog]:
        assert session_id not in self._owners, f"session {session_id} has an owner already"
        assert not self._clean, "the store is marked as cleanly stopped"
        self._owners[session_id] = log = MemoryLog(self, session_id, new_epoch=new_epoch)
        try:
            await trio.lowlevel.checkpoint()
            yield log
        finally:
            if self._owners.get(session_id) is log:
                del self._owners[session_id]

    def load(self, session_id: SessionId, *, new_epoch: bool) -> tuple[_Kept | None, Epoch]:
        """What there is of a session, its epoch renewed where it has to be; a fresh epoch where there is nothing."""
        epoch = Epoch(token_urlsafe(6))
        kept = self._sessions.get(session_id)
        if kept is None:
            return None, epoch
        if new_epoch or kept.generation < self._generation:
            kept.epochs.append(EpochStart(epoch, kept.head + 1))
            kept.generation = self._generation
        return kept, kept.epochs[-1].epoch

    def owned_by(self, log: "MemoryLog") -> bool:
        return self._owners.get(log.session_id) is log

    def apply(self, log: "MemoryLog", commit: Commit) -> Projected:
        """Do a commit: all of it or, by raising, nothing."""
        session_id, now_ms = log.session_id, self._now_ms()
        kept = self._sessions.get(session_id)
        unfinished = {} if kept is None else {run.run_id: run for run in kept.unfinished}
        projected = project_commit(
            commit,
            session_id=session_id,
            epoch=log.epoch,
            head=log.head,
            stored=kept is not None,
            unfinished=unfinished,
        )
        if commit.accept is not None:
            assert self._find_run(commit.accept.run_id) is None, f"run {commit.accept.run_id} is accepted twice"
            if commit.key is not None:
                holder = self._holder(commit.key.key, commit.accept.accepted_ms)
                if holder is not None:
                    raise DuplicateKey(holder)
                self._keys[commit.key.key] = (commit.key, commit.accept.run_id)
        if commit.delete:
            self._delete(session_id, log.epoch, projected.head, now_ms)
            return projected
        if kept is None:
            assert commit.session is not None
            self._numbers += 1
            epochs = [EpochStart(log.epoch, 1)]
            kept = _Kept(self._numbers, commit.session, epochs, self._generation, 0, 0, [], [], [], {})
            self._sessions[session_id] = kept
        if commit.accept is not None:
            kept.runs[commit.accept.run_id] = accepted(commit.accept)
        kept.runs.update((run.run_id, run) for run in projected.changed)
        rows = encode_events(commit.events)
        kept.events += commit.events
        kept.rows += rows
        self._upkeep.grown.add(sum(row.size_bytes for row in rows))
        kept.messages += (message for _, message in projected.messages)
        kept.head = projected.head
        settings = commit.session or kept.session
        kept.session = replace(settings, created_ms=kept.session.created_ms, updated_ms=now_ms)
        return projected

    def _delete(self, session_id: SessionId, epoch: Epoch, head: int, now_ms: int) -> None:
        gone = self._sessions.pop(session_id)
        self._keys = {name: (key, run_id) for name, (key, run_id) in self._keys.items() if run_id not in gone.runs}
        self.tombstones = [*self.tombstones, Tombstone(session_id, epoch, head, now_ms)][-TOMBSTONES:]
        self._upkeep.deleted.add(1)

    # Looking after it

    async def idle_sessions(self, *, before_ms: int, limit: int) -> Sequence[SessionId]:
        await trio.lowlevel.checkpoint()
        idle = [
            (kept.session.updated_ms, kept.number, session_id)
            for session_id, kept in self._sessions.items()
            if kept.session.updated_ms < before_ms and not kept.unfinished
        ]
        return [session_id for _, _, session_id in sorted(idle)[:limit]]

    async def trim(self, *, limit: int, before_ms: int = 0, session_bytes: int = 0, total_bytes: int = 0) -> int:
        await trio.lowlevel.checkpoint()

        def goes(kept: _Kept) -> bool:
            too_much = bool(session_bytes) and kept.log_bytes > session_bytes
            return too_much or kept.rows[0].time_ms < before_ms

        def too_much_in_all(_kept: _Kept) -> bool:
            return bool(total_bytes) and sum(kept.log_bytes for kept in self._sessions.values()) > total_bytes

        removed = self._drop_rows(limit, goes) or self._drop_rows(limit, too_much_in_all)
        now_ms = self._now_ms()
        expired = [name for name, (key, _) in self._keys.items() if key.expires_ms <= now_ms][:limit]
        for name in expired:
            del self._keys[name]
        return removed + len(expired)

    def _drop_rows(self, limit: int, goes: Callable[[_Kept], bool]) -> int:
        """Remove front rows that go, at most a step's. Returns how many."""
        removed = freed = 0
        touched: set[int] = set()
        while removed < limit and freed < STEP_BYTES:
            losing = [kept for kept in self._sessions.values() if not kept.held and goes(kept)]
            if not losing:
                break
            kept = min(losing, key=lambda kept: (kept.rows[0].time_ms, kept.number))
            touched.add(kept.number)
            if len(touched) > STEP_LOGS:
                break
            slice_end_ms = kept.rows[0].time_ms + SLICE_MS
            while not kept.held and goes(kept) and kept.rows[0].time_ms < slice_end_ms:
                freed += kept.drop_row()
                removed += 1
                if removed == limit or freed >= STEP_BYTES:
                    break
        return removed

    async def erase(self, *, limit: int) -> int:
        """Nothing is left of what is deleted, from the first moment on."""
        del limit
        await trio.lowlevel.checkpoint()
        return 0

    async def wait_deleted(self) -> None:
        await self._upkeep.deleted.wait(1)

    async def wait_grown(self, by_bytes: int) -> None:
        await self._upkeep.grown.wait(by_bytes)

    # Reading

    async def extent(self, session_id: SessionId) -> LogExtent | None:
        await trio.lowlevel.checkpoint()
        kept = self._sessions.get(session_id)
        return None if kept is None else kept.extent

    async def read(
        self, session_id: SessionId, after_seq: int, *, max_bytes: int, run_id: RunId | None = None
    ) -> LogPage | None:
        await trio.lowlevel.checkpoint()
        kept = self._sessions.get(session_id)
        if kept is None:
            return None
        wanted = (e for e in kept.events if e.seq > after_seq and (run_id is None or e.run_id == run_id))
        events, complete = fill_page(wanted, max_bytes=max_bytes)
        through = max(after_seq, kept.head) if complete else events[-1].seq
        return LogPage(kept.extent, events, through)

    async def session(self, session_id: SessionId) -> Session | None:
        await trio.lowlevel.checkpoint()
        kept = self._sessions.get(session_id)
        return None if kept is None else kept.session

    async def sessions(
        self, *, limit: int, before: str | None = None, query: str | None = None
    ) -> tuple[Sequence[Session], str | None]:
        end = None if before is None else parse_page_token(before)
        await trio.lowlevel.checkpoint()
        places = {(kept.session.updated_ms, kept.number): kept.session for kept in self._sessions.values()}
        wanted = [
            (place, session)
            for place, session in sorted(places.items(), key=lambda item: item[0], reverse=True)
            if (end is None or place < end) and fold_title(query) in fold_title(session.title)
        ]
        page = wanted[:limit]
        return [session for _, session in page], page_token(*page[-1][0]) if len(wanted) > limit else None

    async def history(self, session_id: SessionId, *, limit: int, before: MessageId | None = None) -> Snapshot | None:
        await trio.lowlevel.checkpoint()
        kept = self._sessions.get(session_id)
        if kept is None:
            return None
        older = kept.messages
        if before is not None:
            ids = [message.message_id for message in older]
            older = older[: ids.index(before)] if before in ids else []
        live = None
        running = running_of(kept.unfinished)
        if running is not None:
            step = fold_step(event.body for event in kept.events if event.run_id == running.run_id)
            live = LiveStep(running.run_id, running.status, step.text, step.reasoning)
        return Snapshot(
            session_id,
            Cursor(epoch_at(kept.epochs, kept.head), kept.head),
            tuple(older[-limit:]),
            live,
            queue_of(kept.unfinished),
            more=len(older) > limit,
        )

    async def messages(self, session_id: SessionId) -> Sequence[Message]:
        await trio.lowlevel.checkpoint()
        kept = self._sessions.get(session_id)
        return () if kept is None else tuple(kept.messages)

    async def run(self, run_id: RunId) -> Run | None:
        await trio.lowlevel.checkpoint()
        return self._find_run(run_id)

    async def runs(self, session_id: SessionId, *, limit: int) -> Sequence[Run]:
        await trio.lowlevel.checkpoint()
        kept = self._sessions.get(session_id)
        return () if kept is None else tuple(reversed(kept.runs.values()))[:limit]

    async def key_holder(self, key: str, now_ms: int) -> KeyHolder | None:
        await trio.lowlevel.checkpoint()
        return self._holder(key, now_ms)

    async def unfinished_sessions(self) -> Sequence[SessionId]:
        await trio.lowlevel.checkpoint()
        return [session_id for session_id, kept in self._sessions.items() if kept.unfinished]

    def _find_run(self, run_id: RunId) -> Run | None:
        return next((kept.runs[run_id] for kept in self._sessions.values() if run_id in kept.runs), None)

    def _holder(self, name: str, now_ms: int) -> KeyHolder | None:
        if name not in self._keys:
            return None
        key, run_id = self._keys[name]
        if key.expires_ms <= now_ms:
            return None
        run = self._find_run(run_id)
        assert run is not None, "a key is deleted with its run"
        return KeyHolder(key.fingerprint, run)


class MemoryLog:
    """`bamboo.store.base.SessionLog`, in memory."""

    def __init__(self, store: MemoryStore, session_id: SessionId, *, new_epoch: bool) -> None:
        kept, self.epoch = store.load(session_id, new_epoch=new_epoch)
        self._store = store
        self._deleted = False
        self.session_id = session_id
        self.first_seq = 1 if kept is None else kept.epochs[-1].first_seq
        self.head = 0 if kept is None else kept.head
        self.session = None if kept is None else kept.session
        self.unfinished: Sequence[Run] = () if kept is None else kept.unfinished

    def __repr__(self) -> str:
        return f"<MemoryLog {self.session_id} {self.epoch}.{self.head}>"

    async def commit(self, commit: Commit) -> None:
        assert self._store.owned_by(self), f"session {self.session_id} is not owned any more"
        assert not self._deleted, f"session {self.session_id} was deleted"
        projected = self._store.apply(self, commit)
        self.head = projected.head
        self._deleted = commit.delete
        await trio.lowlevel.checkpoint()


@asynccontextmanager
async def _open(now_ms: Callable[[], int]) -> AsyncIterator[MemoryStore]:
    yield MemoryStore(now_ms)


def open_memory_store(*, now_ms: Callable[[], int] = wall_clock_ms) -> AbstractAsyncContextManager[MemoryStore]:
    """An empty store that lives as long as the block."""
    return _open(now_ms)
