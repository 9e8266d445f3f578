"""Moves committed pages from the write-ahead log into the database, beside the writer and never in its way."""

import sqlite3
from collections import deque
from collections.abc import Sequence
from contextlib import suppress
from threading import Event, Lock, Thread
from typing import Final

import structlog
import trio

PAUSE_S: Final = 1.0
"""Between two checkpoints while there is writing: each costs two disk flushes and moves each changed page once."""

log = structlog.get_logger("bamboo.store")


class Checkpointer:
    """A thread that makes PASSIVE checkpoints, at most one per PAUSE_S, and none while nothing is written.

    A passive checkpoint waits for nobody, so it never gets what is written meanwhile, and alone it does not bound the
    log: the writer does. `connection` is the checkpointer's from `start` on, and closed by it.
    """

    def __init__(self, connection: sqlite3.Connection, *, pause_s: float = PAUSE_S) -> None:
        self._connection = connection
        self._pause_s = pause_s
        self._due = Event()
        self._urgent = Event()
        self._stopping = False
        self._begun = 0
        self.passes = 0
        self.turn = Lock()
        """Held while a checkpoint is made. Whoever else makes one takes it: one at a time, else both do nothing."""
        self._waiting: deque[trio.Event] = deque()
        self._token = trio.lowlevel.current_trio_token()
        self._thread = Thread(target=self._run, name="bamboo-store-checkpointer", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def ask(self) -> None:
        """Something was written."""
        self._due.set()

    def hurry(self) -> int:
        """Make a checkpoint at once. From any thread. It is done, or has failed, when `passes` has this value."""
        self._urgent.set()
        self._due.set()
        return self._begun + 1

    async def checkpoint(self) -> None:
        """Return when a checkpoint that began after this call is done, or has failed, or the checkpointer stops."""
        if self._stopping:
            await trio.lowlevel.checkpoint()
            return
        done = trio.Event()
        self._waiting.append(done)
        self.hurry()
        await done.wait()

    def stop(self) -> None:
        """Blocks until a checkpoint that is under way is done."""
        self._stopping = True
        self.hurry()
        self._thread.join()

    def _run(self) -> None:
        while not self._stopping:
            self._due.wait()
            self._urgent.wait(self._pause_s)
            self._due.clear()
            self._urgent.clear()
            self._begun += 1
            waiting = self._take_waiting()
            if not self._stopping:
                self._checkpoint()
            self.passes = self._begun
            self._answer(waiting)
        self._answer(self._take_waiting())
        self._connection.close()

    def _take_waiting(self) -> Sequence[trio.Event]:
        return [self._waiting.popleft() for _ in range(len(self._waiting))]

    def _answer(self, waiting: Sequence[trio.Event]) -> None:
        # The loop is gone only if the program is coming down: then nobody waits for an answer.
        with suppress(trio.RunFinishedError):
            self._token.run_sync_soon(_set_all, waiting)

    def _checkpoint(self) -> None:
        try:
            with self.turn:
                self._connection.execute("PRAGMA wal_checkpoint(PASSIVE)").fetchone()
        except sqlite3.Error as error:
            # Nothing is lost: the pages stay in the log, and a disk that fails fails the next commit too.
            log.warning("checkpoint_failed", error=str(error))


def _set_all(waiting: Sequence[trio.Event]) -> None:
    for done in waiting:
        done.set()
