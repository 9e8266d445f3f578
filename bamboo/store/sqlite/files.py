"""The database's files: whose they are, and connections to them."""

import fcntl
import os
import sqlite3
from pathlib import Path
from typing import Final, Literal

from bamboo.errors import StartError, StoreError
from bamboo.store.sqlite.schema import ForeignDatabaseError, check, migrate

BUSY_MS: Final = 5000
"""How long a statement waits for a lock that another program holds: somebody may look into the database."""


def store_error(error: sqlite3.Error) -> StoreError:
    """What callers are told of a database error: its name, never its text, which may quote what was stored."""
    name = getattr(error, "sqlite_errorname", type(error).__name__)
    return StoreError(f"the database failed ({name})")


class FileLock:
    """Keeps every other process off the database: `flock` on `<path>.lock`, which the kernel releases when this
    process ends, however it ends.

    The lock file is never removed: whoever removes it lets two processes hold locks on two files of one name.
    """

    def __init__(self, path: Path) -> None:
        """Raises StartError if another process has the database or there is no writing beside it."""
        self.path = path.with_name(path.name + ".lock")
        try:
            self._fd = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        except OSError as error:
            raise StartError(f"storage.path: cannot write beside {path}: {error.strerror}") from error
        try:
            fcntl.flock(self._fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            os.ftruncate(self._fd, 0)
            os.write(self._fd, b"%d\n" % os.getpid())
        except BlockingIOError as error:
            holder = os.pread(self._fd, 20, 0).decode("ascii", "replace").strip()
            os.close(self._fd)
            raise StartError(
                f"storage.path: another process{f' (pid {holder})' if holder else ''} has the database {path} open"
            ) from error
        except OSError as error:
            os.close(self._fd)
            raise StartError(f"storage.path: cannot lock {self.path}: {error.strerror}") from error

    def release(self) -> None:
        os.close(self._fd)


def locate(path: Path) -> Path:
    """The database's real path, so that links to it share its lock. Raises StartError if there is no such directory;
    none is made.
    """
    real = Path(os.path.realpath(path))
    if not real.parent.is_dir():
        raise StartError(f"storage.path: there is no directory {real.parent} for the database {path}")
    if real.is_dir():
        raise StartError(f"storage.path: {path} is a directory, not a database")
    return real


def wal_path(path: Path) -> Path:
    return path.with_name(path.name + "-wal")


def connect(path: Path, *, read_only: bool = False) -> sqlite3.Connection:
    """A connection without implicit transactions. Any one thread at a time may use it."""
    connection = sqlite3.connect(
        f"{path.as_uri()}?mode={'ro' if read_only else 'rwc'}",
        uri=True,
        timeout=BUSY_MS / 1000,
        isolation_level=None,
        check_same_thread=False,
    )
    if read_only:
        try:
            connection.execute("PRAGMA query_only = ON")
        except sqlite3.Error:
            connection.close()
            raise
    return connection


def connect_writer(path: Path, synchronous: Literal["normal", "full"]) -> tuple[sqlite3.Connection, int]:
    """The one connection that writes, to a database of this version, and the database's generation. Raises
    StartError.

    The mark of a clean stop is taken away; where there is none, the generation is counted up. Either is on the disk
    when this returns.
    """
    try:
        # Nobody else on this machine is to read the conversations; SQLite gives its other files the same mode.
        os.close(os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600))
        connection = connect(path)
    except OSError as error:
        raise StartError(f"storage.path: cannot write the database {path}: {error.strerror}") from error
    except sqlite3.Error as error:
        raise _start_error(path, error) from error
    try:
        generation = _prepare(connection, synchronous)
    except sqlite3.Error as error:
        connection.close()
        raise _start_error(path, error) from error
    except ForeignDatabaseError as error:
        connection.close()
        raise StartError(f"storage.path: {path} {error}") from error
    return connection, generation


def _prepare(connection: sqlite3.Connection, synchronous: Literal["normal", "full"]) -> int:
    # Checkpoints are the checkpointer's and the writer's: an automatic one would sit in the middle of a commit.
    connection.execute("PRAGMA wal_autocheckpoint = 0")
    connection.execute("PRAGMA synchronous = FULL")
    # What is removed is overwritten. FAST would leave it in every page that becomes free as a whole, which is nearly
    # all of a deleted session.
    connection.execute("PRAGMA secure_delete = ON").fetchone()
    check(connection)
    # The write-ahead log is what makes readers and the writer independent of each other.
    mode: str = connection.execute("PRAGMA journal_mode = WAL").fetchone()[0]
    if mode != "wal":
        raise ForeignDatabaseError("lies where SQLite cannot keep a write-ahead log (a network file system?)")
    migrate(connection)
    connection.execute("BEGIN IMMEDIATE")
    connection.execute("UPDATE meta SET generation = generation + (1 - clean), clean = 0")
    generation: int = connection.execute("SELECT generation FROM meta").fetchone()[0]
    connection.execute("COMMIT")
    connection.execute(f"PRAGMA synchronous = {synchronous}")
    return generation


def _start_error(path: Path, error: sqlite3.Error) -> StartError:
    name = getattr(error, "sqlite_errorname", "")
    if name == "SQLITE_NOTADB":
        return StartError(f"storage.path: {path} is not a database")
    if name.startswith(("SQLITE_READONLY", "SQLITE_CANTOPEN")):
        return StartError(f"storage.path: the database {path} cannot be opened for writing")
    if name.startswith("SQLITE_BUSY"):
        return StartError(f"storage.path: another process holds a lock on the database {path}")
    return StartError(f"storage.path: cannot open the database {path}: {error}")
