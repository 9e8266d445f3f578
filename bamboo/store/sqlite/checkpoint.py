"""Moves committed pages from the write-ahead log into the database, beside the writer and never in its way."""

import sqlite3
from threading import Event, Thread
from typing import Final

import structlog

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
        self._stop = Event()
        self._thread = Thread(target=self._run, name="bamboo-store-checkpointer", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def ask(self) -> None:
        """Something was written."""
        self._due.set()

    def stop(self) -> None:
        """Blocks until a checkpoint that is under way is done."""
        self._stop.set()
        self._due.set()
        self._thread.join()

    def _run(self) -> None:
        self._due.wait()
        while not self._stop.wait(self._pause_s):
            self._due.clear()
            try:
                self._connection.execute("PRAGMA wal_checkpoint(PASSIVE)").fetchone()
            except sqlite3.Error as error:
                # Nothing is lost: the pages stay in the log, and a disk that fails fails the next commit too.
                log.warning("checkpoint_failed", error=str(error))
            self._due.wait()
        self._connection.close()
