"""What a session's owner writes through. What is computed is computed here, in the event loop; the writer's thread
only runs statements.
"""

from collections.abc import Callable, Mapping, Sequence
from secrets import token_urlsafe

import trio

from bamboo.core.types import Epoch, RunId, SessionId
from bamboo.errors import StoreError
from bamboo.store.base import Commit, Run, Session
from bamboo.store.codec import encode_events
from bamboo.store.projection import project_commit
from bamboo.store.sqlite.writer import Writer
from bamboo.store.sqlite.writes import Plan, apply, load
from bamboo.store.upkeep import Upkeep


class SqliteLog:
    """`bamboo.store.base.SessionLog`, in SQLite.

    One commit at a time is with the writer, so what is known here of the log is what is durable. `_in_doubt` is True
    from handing one over until its answer: only a commit that was cancelled leaves it so.
    """

    def __init__(
        self,
        writer: Writer,
        session_id: SessionId,
        now_ms: Callable[[], int],
        generation: int,
        upkeep: Upkeep,
    ) -> None:
        self._writer = writer
        self._upkeep = upkeep
        self._now_ms = now_ms
        self._generation = generation
        self._turn = trio.Lock()
        self._refusals = 0
        self._in_doubt = False
        self._closed = False
        self._number: int | None = None
        self._runs: Mapping[RunId, Run] = {}
        self._run_numbers: Mapping[RunId, int] = {}
        self.session_id = session_id
        self.epoch = Epoch(token_urlsafe(6))
        self.first_seq = 1
        self.head = 0
        self.session: Session | None = None
        self.unfinished: Sequence[Run] = ()

    def __repr__(self) -> str:
        return f"<SqliteLog {self.session_id} {self.epoch}.{self.head}>"

    async def load(self, *, new_epoch: bool) -> None:
        """Read what the owner begins with, behind every write that was handed over before. Raises StoreError."""
        found = await self._writer.run(load(self.session_id, self.epoch, self._generation, new_epoch=new_epoch))
        if found is None:
            return
        self._number = found.number
        self._runs = {run.run_id: run for _, run in found.unfinished}
        self._run_numbers = {run.run_id: number for number, run in found.unfinished}
        self.epoch, self.first_seq, self.head = found.epoch, found.first_seq, found.head
        self.session = found.session
        self.unfinished = tuple(self._runs.values())

    def close(self) -> None:
        """The owner has left: nothing more is taken."""
        self._closed = True

    async def commit(self, commit: Commit) -> None:
        refusals = self._refusals
        async with self._turn:
            assert not self._closed, f"session {self.session_id} is not owned any more, or was deleted"
            if self._in_doubt:
                raise StoreError("whether an earlier commit was done is not known: own the session again")
            if refusals != self._refusals:
                raise StoreError("an earlier commit of the session was refused, and this one with it")
            try:
                await self._commit(commit)
            except Exception:
                self._refusals += 1
                raise

    async def _commit(self, commit: Commit) -> None:
        projected = project_commit(
            commit,
            session_id=self.session_id,
            epoch=self.epoch,
            head=self.head,
            stored=self._number is not None,
            unfinished=self._runs,
        )
        rows = () if commit.delete else encode_events(commit.events)
        size_bytes = sum([row.size_bytes for row in rows])
        changed = {run.run_id: run for run in projected.changed}
        accept = None if commit.accept is None else changed.pop(commit.accept.run_id)
        plan = Plan(
            session_id=self.session_id,
            number=self._number,
            epoch=self.epoch,
            generation=self._generation,
            now_ms=self._now_ms(),
            head=projected.head,
            settings=commit.session,
            accept=accept,
            key=commit.key,
            changed=tuple(changed.values()),
            rows=rows,
            size_bytes=size_bytes,
            messages=projected.messages,
            run_numbers=self._run_numbers,
            delete=commit.delete,
        )
        self._in_doubt = True
        try:
            applied = await self._writer.run(apply(plan))
        except Exception:
            self._in_doubt = False
            raise
        self._in_doubt = False
        numbers = dict(self._run_numbers)
        if accept is not None and applied.run is not None:
            numbers[accept.run_id] = applied.run
        self._number = applied.session
        self._runs = projected.unfinished
        self._run_numbers = {run_id: numbers[run_id] for run_id in projected.unfinished}
        self.head = projected.head
        self._closed = commit.delete
        if commit.delete:
            self._upkeep.deleted.add(1)
        else:
            self._upkeep.grown.add(size_bytes)
