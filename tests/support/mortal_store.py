"""A store as a process sees it that may die any moment, over a disk that may fail; and a record of all that was
committed.

`MortalStore` stands before a real store. Once it is dead nothing is committed any more and nobody gets an answer, as
if the process had been killed: the test then cancels what is left of it, starts the real store again, and revives this.
"""

from collections import deque
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from typing import Any, Final, Literal, cast

import trio

from bamboo.core.events import Event, Terminal
from bamboo.core.types import RunId, SessionId
from bamboo.errors import StoreError
from bamboo.store.base import Commit, Run, SessionLog, Store
from tests.support.bugs import InjectedBug

Fault = Literal["refused", "slow", "lost", "unanswered", "dies before", "dies after"]
"""What becomes of a commit: it is refused; it takes `slow_s`; its answer is late, and it was not done, or was; the
process dies, and it was not done, or was."""

_LATE_S: Final = 3.0
"""Longer than the tests' writers wait for a commit."""

_READS: Final = frozenset({"extent", "read", "history", "messages", "runs", "key_holder", "session"})


class Life:
    """A session from its first commit to its deletion: every event that was committed, also those trimmed since."""

    def __init__(self, session_id: SessionId) -> None:
        self.session_id = session_id
        self.events: list[Event] = []
        self.handed_over: Sequence[Event] = ()
        """With the store right now: a reader may see them a moment before it says that they are done."""
        self.epochs: set[str] = set()
        self.accepted: dict[RunId, int] = {}
        """With the number of the commit that did it."""
        self.unfinished: set[RunId] = set()
        self.deleted_at: int | None = None
        """The number of the commit that did it."""
        self.floor = 0
        """The highest seq that retention removed."""

    def __repr__(self) -> str:
        return f"<Life of {self.session_id}, {len(self.events)} events{', deleted' if self.deleted else ''}>"

    @property
    def head(self) -> int:
        return len(self.events)

    @property
    def deleted(self) -> bool:
        return self.deleted_at is not None

    def record(self, commit: Commit, number: int) -> None:
        self.events += commit.events
        if commit.accept is not None:
            self.accepted[commit.accept.run_id] = number
            self.unfinished.add(commit.accept.run_id)
        self.unfinished -= {
            event.run_id for event in commit.events if event.run_id and isinstance(event.body, Terminal)
        }
        if commit.delete:
            self.deleted_at = number


class MortalStore:
    """See the module. Satisfies `bamboo.store.base.Store` through `store`."""

    def __init__(self, inner: Store, *, slow_s: float = 0.01) -> None:
        self._inner = inner
        self._slow_s = slow_s
        self.dead = False
        self.lives: dict[SessionId, list[Life]] = {}
        """Of each session, in order; only the last one may be not deleted."""
        self.faults: deque[Fault | None] = deque()
        """Of the next commits, one each."""
        self.failing_reads = 0
        """So many of the next reads are refused."""
        self.failing_loads = 0
        """And so many of the next owners."""
        self.broken_looks = 0
        """So many of the next looks for one run meet a bug: what no store may raise. Only a runner looks so."""
        self.commits = 0
        self._committed = trio.Event()
        self.on_death: Callable[[], None] = _nothing

    @property
    def store(self) -> Store:
        return cast("Store", self)

    def die(self) -> None:
        """From now on nothing is done, and nobody gets an answer."""
        if not self.dead:
            self.dead = True
            self.on_death()

    def revive(self, inner: Store) -> None:
        """A new process, on a healthy disk; `inner` is the real store, started again."""
        self._inner = inner
        self.dead = False
        self.on_death = _nothing
        self.heal()

    def heal(self) -> None:
        """No fault is left."""
        self.faults.clear()
        self.failing_reads = self.failing_loads = self.broken_looks = 0

    def __getattr__(self, name: str) -> Any:
        if name in _READS and self.failing_reads:
            self.failing_reads -= 1
            return _refuse
        return getattr(self._inner, name)

    async def run(self, run_id: RunId) -> Run | None:
        if self.broken_looks:
            self.broken_looks -= 1
            await trio.lowlevel.checkpoint()
            raise InjectedBug
        return await self._inner.run(run_id)

    @asynccontextmanager
    async def own(self, session_id: SessionId, *, new_epoch: bool = False) -> AsyncIterator[SessionLog]:
        if self.dead:
            await trio.sleep_forever()
        if self.failing_loads:
            self.failing_loads -= 1
            await _refuse()
        async with self._inner.own(session_id, new_epoch=new_epoch) as log:
            life = self.life(session_id)
            if life is not None:
                life.epochs.add(log.epoch)
            yield cast("SessionLog", _MortalLog(log, self))

    async def commit(self, log: SessionLog, commit: Commit) -> None:
        fault = self.faults.popleft() if self.faults else None
        if fault == "slow":
            await trio.sleep(self._slow_s)
        elif fault == "refused":
            await _refuse()
        elif fault == "lost":
            await trio.sleep(_LATE_S)
            await _refuse()
        elif fault == "dies before":
            self.die()
        if self.dead:
            await trio.sleep_forever()
        life = self.life(log.session_id) or self._new_life(log)
        life.handed_over = commit.events
        try:
            with trio.CancelScope(shield=True):  # so that what was done is always known here
                await log.commit(commit)
            self.commits += 1
            life.record(commit, self.commits)
        finally:
            life.handed_over = ()
            if not life.events:
                self.lives[log.session_id].remove(life)
        self._committed.set()
        self._committed = trio.Event()
        if fault == "dies after":
            self.die()
        if self.is_dead():
            await trio.sleep_forever()
        if fault == "unanswered":
            await trio.sleep(_LATE_S)

    def is_dead(self) -> bool:
        return self.dead

    async def all_ended(self) -> None:
        """Return when every accepted run has its terminal event, durably."""
        await trio.lowlevel.checkpoint()
        while any(life.unfinished for lives in self.lives.values() for life in lives):
            await self._committed.wait()

    def life(self, session_id: SessionId) -> Life | None:
        """The one that goes on, if there is one."""
        lives = self.lives.get(session_id)
        return lives[-1] if lives and not lives[-1].deleted else None

    def _new_life(self, log: SessionLog) -> Life:
        life = Life(log.session_id)
        life.epochs.add(log.epoch)
        self.lives.setdefault(log.session_id, []).append(life)
        return life


class _MortalLog:
    def __init__(self, log: SessionLog, store: MortalStore) -> None:
        self._log = log
        self._store = store

    def __getattr__(self, name: str) -> Any:
        return getattr(self._log, name)

    async def commit(self, commit: Commit) -> None:
        await self._store.commit(self._log, commit)


async def _refuse(*_args: object, **_options: object) -> Any:
    await trio.lowlevel.checkpoint()
    raise StoreError("the disk is on fire")


def _nothing() -> None:
    pass
