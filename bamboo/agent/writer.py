"""The one way into a session's log: events are numbered, committed and published here, strictly in order.

A token delta goes out at once if nothing before it waits for a commit, and is made durable soon after. Everything else
is an `Entry`: it is committed first, holds back what is behind it for that one commit, and takes the deltas that wait
for theirs along.

`LogWriter.run` is the only task that commits. Handing over is synchronous and cannot be taken back: whoever waits for
an entry and is cancelled changes nothing about it.
"""

from collections import deque
from collections.abc import Callable, Sequence
from typing import Final

import structlog
import trio

from bamboo.bus.topic import Doorbell, Window
from bamboo.core.events import Delta, Event, EventBody, event_bytes
from bamboo.core.types import Cursor, RunId
from bamboo.errors import StoreError
from bamboo.store.base import Commit, DuplicateKey, IdempotencyKey, Run, Session, SessionLog

FLUSH_S: Final = 0.1
"""Deltas are durable at most this long after they went out: what a crash can take from a reader."""

FLUSH_BYTES: Final = 16 * 1024
"""And not more of them wait than this, as `event_bytes` counts: about 4 KiB of text."""

RETRY_S: Final = (0.05, 0.1, 0.25, 0.5, 1.0)
"""Pauses between attempts while the store refuses; the last one repeats."""

log = structlog.get_logger("bamboo.agent")


class WriterLostError(StoreError):
    """The store did not say in time whether a commit was done: the session has to be loaded again."""


class Entry:
    """Events and settings to be committed as one, and then published.

    `retried` says what a store that refuses means: True, the entry is tried again until it is done (a run's own
    events), False, it is given up and its numbers are free again (a chat that was not accepted yet).
    """

    __slots__ = ("_done", "_refusal", "accept", "bodies", "delete", "first", "key", "retried", "session", "time_ms")

    def __init__(
        self,
        bodies: Sequence[tuple[RunId | None, EventBody]],
        *,
        session: Session | None = None,
        accept: Run | None = None,
        key: IdempotencyKey | None = None,
        delete: bool = False,
        retried: bool = True,
    ) -> None:
        self.bodies = bodies
        self.session = session
        self.accept = accept
        self.key = key
        self.delete = delete
        self.retried = retried
        self.time_ms = 0
        self.first: Cursor | None = None
        self._done = trio.Event()
        self._refusal: DuplicateKey | StoreError | None = None

    async def wait(self) -> Cursor:
        """Return when the entry is durable and published: the place just before its first event.

        Raises DuplicateKey or StoreError if it was refused; a WriterLostError among them says that it may be durable
        all the same. If cancelled, the entry goes its way.
        """
        await self._done.wait()
        if self._refusal is not None:
            raise self._refusal
        assert self.first is not None
        return self.first

    def settle(self, first: Cursor) -> None:
        self.first = first
        self._done.set()

    def refuse(self, refusal: DuplicateKey | StoreError) -> None:
        self._refusal = refusal
        self._done.set()


class LogWriter:
    """One session's writer. Owned by its AgentRunner, which runs `run` in its nursery.

    Invariants: seqs are given without a hole in the order of `append_delta` and `submit`; what is published and not
    durable is in `_uncommitted`, all of it deltas; while an entry waits, everything behind it waits unnumbered in
    `_queue`.
    """

    def __init__(
        self,
        session_log: SessionLog,
        window: Window,
        *,
        now_ms: Callable[[], int],
        commit_timeout_s: float,
        max_uncommitted_bytes: int,
    ) -> None:
        self._log = session_log
        self._window = window
        self._now_ms = now_ms
        self._commit_timeout_s = commit_timeout_s
        self._max_uncommitted_bytes = max_uncommitted_bytes
        self._uncommitted: list[Event] = []
        self._uncommitted_bytes = 0
        self._flush_at = 0.0
        self._queue: deque[Entry | tuple[int, RunId, Delta]] = deque()
        self._held_bytes = 0
        self._wake = Doorbell()
        self._room = trio.Event()
        self._finishing = False
        self._refusals = 0
        self.lost = False
        """The store went without an answer: what readers saw may not be what is kept."""
        self.failing = False
        """The store refuses just now, and the window's readers are told so: what is pending is kept and tried again,
        and nothing new is let in."""

    @property
    def cursor(self) -> Cursor:
        """The end of what is published."""
        return Cursor(self._window.epoch, self._window.head)

    @property
    def idle(self) -> bool:
        """Everything is durable."""
        return not self._uncommitted and not self._queue

    @property
    def tail(self) -> list[Event]:
        """What is published but not known to be durable. Only of use once `run` has ended."""
        return list(self._uncommitted)

    def append_delta(self, run_id: RunId, body: Delta) -> None:
        """Publish a delta, at once if nothing before it waits for a commit."""
        if self._queue:
            self._queue.append((self._now_ms(), run_id, body))
            self._held_bytes += event_bytes(body)
        else:
            self._publish_delta(self._now_ms(), run_id, body)

    def submit(self, entry: Entry) -> Entry:
        """Hand an entry over. It is committed and published in its turn; `entry.wait()` tells."""
        assert not self._finishing, "an entry for a writer that is done"
        entry.time_ms = self._now_ms()
        self._queue.append(entry)
        self._wake.ring()
        return entry

    @property
    def has_room(self) -> bool:
        """The store does not fail, and less than `max_uncommitted_bytes` waits for it: a run may go on reading its
        provider."""
        return not self.failing and self._window.pending_bytes + self._held_bytes < self._max_uncommitted_bytes

    async def wait_room(self) -> None:
        """Return when `has_room`."""
        await trio.lowlevel.checkpoint()
        while not self.has_room:
            await self._room.wait()

    def finish(self) -> None:
        """Nothing more comes: `run` returns when all is durable."""
        self._finishing = True
        self._wake.ring()

    async def run(self) -> None:
        """Commit what is handed over until `finish`. Raises WriterLostError if the store does not answer in time.

        If cancelled, a commit that was handed over is still waited for, at most `commit_timeout_s`.
        """
        try:
            while await self._wait_for_work():
                await self._commit_next()
        finally:
            self._wake.close()
            lost = WriterLostError("the session's writer ended before this was durable")
            for item in self._queue:
                if isinstance(item, Entry):
                    item.refuse(lost)

    async def _wait_for_work(self) -> bool:
        """Wait until there is something to commit now. False: finished, and nothing is left."""
        while True:
            if self._queue:
                return True
            if self._uncommitted:
                due = self._finishing or self._uncommitted_bytes >= FLUSH_BYTES
                if due or trio.current_time() >= self._flush_at:
                    return True
                with trio.move_on_at(self._flush_at):
                    await self._wake.wait()
            elif self._finishing:
                return False
            else:
                await self._wake.wait()

    async def _commit_next(self) -> None:
        """One transaction: the deltas that wait, and the first entry, if one waits."""
        deltas, self._uncommitted, self._uncommitted_bytes = self._uncommitted, [], 0
        entry = self._queue[0] if self._queue else None
        assert entry is None or isinstance(entry, Entry), "a delta is held back only by an entry before it"
        before = self.cursor
        events = [] if entry is None else self._number(entry)
        done = False
        try:
            refusal = await self._commit([*deltas, *events], entry)
            done = refusal is None
        finally:
            if not done:
                self._uncommitted[:0] = deltas
                self._uncommitted_bytes += sum(event_bytes(event.body) for event in deltas)
        if refusal is None:
            self._committed(deltas, events, entry, before)
        else:
            await self._refused(entry, refusal)

    def _number(self, entry: Entry) -> list[Event]:
        window = self._window
        return [
            Event(self._log.session_id, window.epoch, window.head + 1 + index, entry.time_ms, run_id, body)
            for index, (run_id, body) in enumerate(entry.bodies)
        ]

    async def _commit(self, events: list[Event], entry: Entry | None) -> StoreError | DuplicateKey | None:
        if entry is None:
            commit = Commit(events)
        else:
            commit = Commit(events, session=entry.session, accept=entry.accept, key=entry.key, delete=entry.delete)
        # What was handed over cannot be taken back: shielded, and bounded.
        with trio.move_on_after(self._commit_timeout_s, shield=True):
            try:
                await self._log.commit(commit)
            except (StoreError, DuplicateKey) as refusal:
                return refusal
            return None
        self.lost = True
        lost = WriterLostError(f"the store did not answer a commit within {self._commit_timeout_s:g} s")
        self._fail(lost)
        raise lost

    def _fail(self, error: StoreError) -> None:
        if not self.failing:
            self.failing = True
            self._window.begin_outage(error)
            log.error("store_failing", session_id=self._log.session_id, error=error.message)

    def _committed(self, deltas: list[Event], events: list[Event], entry: Entry | None, before: Cursor) -> None:
        if self.failing:
            self.failing = False
            self._refusals = 0
            self._window.end_outage()
            log.info("store_back", session_id=self._log.session_id)
        for event in events:
            self._window.publish(event)
        if events or deltas:
            self._window.mark_durable((events or deltas)[-1].seq)
        if entry is not None:
            self._queue.popleft()
            entry.settle(before)
            self._release()
        if self.has_room:
            self._room.set()
            self._room = trio.Event()

    async def _refused(self, entry: Entry | None, refusal: StoreError | DuplicateKey) -> None:
        if isinstance(refusal, DuplicateKey):
            assert entry is not None
            self._queue.popleft()
            entry.refuse(refusal)
            self._release()
            return
        self._give_up_entries(refusal)
        if self.idle:
            # Nothing is left to be tried again, so nothing would find out when the store is back: the next chat does.
            log.warning("store_refused", session_id=self._log.session_id, error=refusal.message)
            return
        self._fail(refusal)
        pause_s = RETRY_S[min(self._refusals, len(RETRY_S) - 1)]
        self._refusals += 1
        await trio.sleep(pause_s)

    def _give_up_entries(self, refusal: StoreError) -> None:
        """Refuse every entry that is not to be tried again; what was behind one of them moves up."""
        kept: deque[Entry | tuple[int, RunId, Delta]] = deque()
        for item in self._queue:
            if isinstance(item, Entry) and not item.retried:
                item.refuse(refusal)
            else:
                kept.append(item)
        self._queue = kept
        self._release()

    def _release(self) -> None:
        """Publish the deltas that were held back only by what is done now."""
        while self._queue:
            held = self._queue[0]
            if isinstance(held, Entry):
                return
            self._queue.popleft()
            time_ms, run_id, body = held
            self._held_bytes -= event_bytes(body)
            self._publish_delta(time_ms, run_id, body)

    def _publish_delta(self, time_ms: int, run_id: RunId, body: Delta) -> None:
        window = self._window
        event = Event(self._log.session_id, window.epoch, window.head + 1, time_ms, run_id, body)
        window.publish(event)
        if not self._uncommitted:
            # All sessions flush at the same ticks, so that their chunks share a transaction: a third of the cost.
            self._flush_at = (int(trio.current_time() / FLUSH_S) + 1) * FLUSH_S
            self._wake.ring()
        self._uncommitted.append(event)
        before = self._uncommitted_bytes
        self._uncommitted_bytes += event_bytes(body)
        if before < FLUSH_BYTES <= self._uncommitted_bytes:
            self._wake.ring()
