"""The one thread that writes, with group commit: whatever waits is committed together, at one price.

A thread of its own and not one of trio's: it keeps its connection, takes its work in the order in which it was handed
over, and answers through trio's token. Nothing here knows what is written.
"""

import os
import sqlite3
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from queue import Empty, SimpleQueue
from threading import Thread
from typing import Any, Final, Generic, TypeVar, cast

import structlog
import trio

from bamboo.errors import StoreError
from bamboo.store.sqlite.checkpoint import Checkpointer
from bamboo.store.sqlite.files import BUSY_MS, store_error, wal_path

GROUP: Final = 256
"""The most operations of one transaction: what bounds how long the first one waits for the last."""

CHECKPOINT_BUSY_MS: Final = 50
"""How long a checkpoint in the writer waits for readers: all commits wait with it."""

log = structlog.get_logger("bamboo.store")

T = TypeVar("T")


class _Operation(Generic[T]):
    """Work that waits for the writer, and later what came of it."""

    __slots__ = ("done", "error", "folds", "result", "work")

    def __init__(self, work: Callable[[sqlite3.Connection], T], *, folds: bool = False) -> None:
        self.work = work
        self.folds = folds
        self.done = trio.Event()
        self.result: T | None = None
        self.error: Exception | None = None


class Writer:
    """Runs operations, each in a savepoint of its own, in transactions that it shares among those that wait.

    Owned by the store that opens it: `start`, then `stop` once. `connection` is the writer's from then on, and closed
    by it.
    """

    def __init__(
        self,
        path: Path,
        connection: sqlite3.Connection,
        checkpointer: Checkpointer,
        *,
        wal_limit_bytes: int,
    ) -> None:
        self._wal = wal_path(path)
        self._connection = connection
        self._checkpointer = checkpointer
        self._wal_limit_bytes = wal_limit_bytes
        self._force_above_bytes = wal_limit_bytes
        self._awaited_pass: int | None = None
        self._queue: SimpleQueue[_Operation[Any] | None] = SimpleQueue()
        self._token = trio.lowlevel.current_trio_token()
        self._thread = Thread(target=self._run, name="bamboo-store-writer", daemon=True)
        self._stopped = False
        self.failing = False
        """The last transaction that wrote something could not be committed."""

    def __repr__(self) -> str:
        return f"<Writer {self._queue.qsize()} waiting{' failing' if self.failing else ''}>"

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        """Commit what waits, fold the write-ahead log into the database, close the connection. Blocks until that is
        done.
        """
        self._stopped = True
        self._queue.put(None)
        self._thread.join()

    async def run(self, work: Callable[[sqlite3.Connection], T]) -> T:
        """Run `work` on the writer's connection, in the order of the calls, and return what it returned once that is
        committed.

        What `work` raises is raised here, and nothing that it did is kept; the others of its transaction are not
        affected. Database errors are raised as StoreError, broken constraints as AssertionError: the rules are
        checked before, so that is a bug of ours. A transaction that cannot be committed fails all that it was made of
        with StoreError. Runs in the writer's thread: `work` must not touch anything of trio's. If cancelled, the work
        is done all the same, later.
        """
        return await self._hand_over(_Operation(work))

    async def fold(self) -> bool:
        """Fold all of the write-ahead log that is committed so far into the database, and empty it, between two
        transactions. False: not done, because a reader is in the way.

        Commits wait as long as it takes. Raises StoreError if the store is closed or does not take writes.
        """
        return await self._hand_over(_Operation(lambda _connection: False, folds=True))

    async def _hand_over(self, operation: _Operation[T]) -> T:
        if self._stopped:
            raise StoreError("the store is closed", retry_after_s=None)
        self._queue.put(operation)
        await operation.done.wait()
        if operation.error is not None:
            raise operation.error
        return cast(T, operation.result)

    # From here on: in the writer's thread.

    def _run(self) -> None:
        going = True
        while going:
            first = self._queue.get()
            group: list[_Operation[Any]] = []
            waiting: _Operation[Any] | None = first
            while waiting is not None:
                group.append(waiting)
                if len(group) == GROUP:
                    break
                try:
                    waiting = self._queue.get_nowait()
                except Empty:
                    break
            going = waiting is not None
            if group:
                self._commit(group)
                self._answer([operation for operation in group if not operation.folds])
                self._checkpointer.ask()
                self._fold_for([operation for operation in group if operation.folds])
                self._bound_wal()
        self._close()

    def _commit(self, group: Sequence[_Operation[Any]]) -> None:
        connection = self._connection
        changes = connection.total_changes
        try:
            connection.execute("BEGIN IMMEDIATE")
            for operation in group:
                self._operate(connection, operation)
            connection.execute("COMMIT")
            if connection.total_changes != changes:
                self.failing = False  # what writes nothing goes through on a full disk too
        except sqlite3.Error as error:
            self.failing = True
            for operation in group:
                operation.result = None
                operation.error = store_error(error)
                operation.error.__cause__ = error
            if connection.in_transaction:
                # If even this fails the connection is as good as lost, and the next BEGIN says so.
                with suppress(sqlite3.Error):
                    connection.execute("ROLLBACK")

    def _operate(self, connection: sqlite3.Connection, operation: _Operation[Any]) -> None:
        """One operation of the group. Raises sqlite3.Error if the whole transaction is lost."""
        connection.execute("SAVEPOINT operation")
        try:
            operation.result = operation.work(connection)
        except Exception as error:  # goes to whoever waits for the operation; the thread goes on
            if isinstance(error, sqlite3.Error) and not connection.in_transaction:
                raise  # some errors, a full disk among them, undo the whole transaction
            operation.error = _told(error)
            connection.execute("ROLLBACK TO operation")
        connection.execute("RELEASE operation")

    def _answer(self, group: Sequence[_Operation[Any]]) -> None:
        # The loop is gone only if the program is coming down: then nobody waits for an answer.
        with suppress(trio.RunFinishedError):
            self._token.run_sync_soon(_set_done, group)

    def _fold_for(self, folds: Sequence[_Operation[Any]]) -> None:
        if not folds:
            return
        folded = False
        try:
            folded = self._empty_wal()
        except sqlite3.Error as error:
            log.warning("checkpoint_failed", error=str(error))
        for operation in folds:
            if operation.error is None:
                operation.result = folded
        self._answer(folds)

    def _empty_wal(self) -> bool:
        self._connection.execute(f"PRAGMA busy_timeout = {CHECKPOINT_BUSY_MS}")
        try:
            with self._checkpointer.turn:
                busy: int = self._connection.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchone()[0]
        finally:
            self._connection.execute(f"PRAGMA busy_timeout = {BUSY_MS}")
        return not busy

    def _bound_wal(self) -> None:
        """Checkpoint for real where the checkpointer alone does not keep up: it never gets the last frames while
        writing goes on. It is told to go first, so that there is little left to do while commits wait.
        """
        try:
            size = os.stat(self._wal).st_size
            if size <= self._force_above_bytes:
                self._awaited_pass = None
                return
            if self._awaited_pass is None:
                self._awaited_pass = self._checkpointer.hurry()
            late = size > self._force_above_bytes + self._wal_limit_bytes // 4
            if self._checkpointer.passes < self._awaited_pass and not late:
                return
            self._awaited_pass = None
            # A reader that keeps an old snapshot stops it: come back when the log has grown some more, not after each
            # commit.
            self._force_above_bytes = self._wal_limit_bytes if self._empty_wal() else size + self._wal_limit_bytes // 8
        except (OSError, sqlite3.Error) as error:
            self._force_above_bytes += self._wal_limit_bytes // 8
            log.warning("checkpoint_failed", error=str(error))

    def _close(self) -> None:
        try:
            # A backup that is being made keeps it from being done: it is no reason to wait, the next start reads on.
            self._empty_wal()
        except sqlite3.Error as error:
            log.warning("checkpoint_failed", error=str(error))
        self._connection.close()


def _set_done(group: Sequence[_Operation[Any]]) -> None:
    for operation in group:
        operation.done.set()


def _told(error: Exception) -> Exception:
    """What the caller of an operation that failed is told."""
    if isinstance(error, sqlite3.IntegrityError):
        told: Exception = AssertionError(f"a rule of the database is broken: {error}")
    elif isinstance(error, sqlite3.Error):
        told = store_error(error)
    else:
        return error
    told.__cause__ = error
    return told
