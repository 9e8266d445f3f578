"""A copy of the database that can be started from, made while the server runs or not.

`VACUUM INTO` writes it from one read transaction: the server's writer is never in its way, nor it in the writer's, and
the copy has neither free pages nor anything that was deleted. Only the write-ahead log cannot be emptied meanwhile.

The copy is another life of every log: whoever starts it goes on where the original goes on too, with other events. So
each session gets one new epoch, from its first event on, and the copy counts as uncleanly stopped, so that each start
from it draws another one before it adds anything. No cursor of the original is good in it.
"""

import os
import sqlite3
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from secrets import token_hex, token_urlsafe
from typing import Final

from bamboo.core.types import Epoch
from bamboo.errors import StartError
from bamboo.store.codec import moved_state
from bamboo.store.sqlite.files import connect, locate
from bamboo.store.sqlite.schema import ForeignDatabaseError, check, version_of

OWN_SUFFIXES: Final = ("", "-wal", "-shm", "-journal", ".lock")
"""What SQLite and the store add to the database's name."""


class TargetError(Exception):
    """The backup cannot have the name that it was to have. `str(error)` says why."""


class BackupError(Exception):
    """There is no backup. `str(error)` says why, with nothing of what is stored."""


def back_up(database: Path, target: Path, *, force: bool = False) -> int:
    """Copy the database to the file `target`, which only its owner can read, and return the copy's size in bytes.

    Blocks. The file appears under its name once it is whole, checked and on the disk; with `force` it replaces the one
    that is there. Raises TargetError or BackupError: then nothing has changed.
    """
    try:
        source = locate(database)
    except StartError as error:
        raise BackupError(str(error)) from error
    if not source.is_file():
        raise BackupError(f"storage.path: there is no database {database}")
    _check_target(source, target, force=force)
    with _partial(target) as partial:
        try:
            with closing(connect(source, read_only=True)) as original:
                _copy(original, partial)
            with closing(connect(partial)) as copy:
                _renew(copy)
                whole = _is_whole(copy)
        except ForeignDatabaseError as error:
            raise BackupError(f"storage.path: {source} {error}") from error
        except sqlite3.Error as error:
            name = getattr(error, "sqlite_errorname", type(error).__name__)
            raise BackupError(f"cannot copy the database {source}: {name}") from error
        if not whole:
            raise BackupError(f"the copy of {source} is damaged, and so may the database be (PRAGMA quick_check)")
        size = partial.stat().st_size
        _put_in_place(source, partial, target, force=force)
    return size


def _check_target(source: Path, target: Path, *, force: bool) -> None:
    if not target.parent.is_dir():
        raise TargetError(f"there is no directory {target.parent}")
    if target.is_dir():
        raise TargetError(f"{target} is a directory")
    if os.path.realpath(target) in [f"{source}{suffix}" for suffix in OWN_SUFFIXES]:
        raise TargetError(f"{target} is the database's own file")
    if not force and os.path.lexists(target):
        raise TargetError(f"{target} is there already (--force replaces it)")


@contextmanager
def _partial(target: Path) -> Iterator[Path]:
    """A new, empty file beside `target`. It is gone at the end, unless it was renamed."""
    path = Path(os.path.abspath(target)).with_name(f"{target.name}.{token_hex(4)}.partial")
    try:
        os.close(os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY | os.O_CLOEXEC, 0o600))
    except OSError as error:
        raise BackupError(f"cannot write beside {target}: {error.strerror}") from error
    try:
        yield path
    finally:
        for name in (path, path.with_name(path.name + "-journal")):
            name.unlink(missing_ok=True)


def _copy(original: sqlite3.Connection, partial: Path) -> None:
    check(original)
    if not version_of(original):
        raise ForeignDatabaseError("is empty")
    original.execute("PRAGMA query_only = OFF")  # it would forbid VACUUM; the connection cannot write all the same
    original.execute("VACUUM INTO ?", (str(partial),))


def _renew(copy: sqlite3.Connection) -> None:
    """Give each session its new epoch, here and in the places of its runs. Good for every version of the schema: an old
    database is not migrated here, so that what wrote it can start from the copy.
    """
    copy.create_function("new_epoch", 0, lambda: token_urlsafe(6))
    copy.create_function("moved_state", 2, lambda state, epoch: moved_state(state, Epoch(epoch)))
    copy.execute("PRAGMA journal_mode = MEMORY")
    copy.execute("PRAGMA synchronous = OFF")  # it is synced as a whole
    copy.execute("PRAGMA secure_delete = ON").fetchone()
    copy.execute("BEGIN IMMEDIATE")
    copy.execute("DELETE FROM epochs")
    copy.execute("INSERT INTO epochs SELECT number, 0, new_epoch(), 1 FROM sessions")
    copy.execute(
        """UPDATE runs SET state = moved_state(state, (SELECT epoch FROM epochs WHERE epochs.session = runs.session))
        WHERE session IN (SELECT number FROM sessions)"""
    )
    copy.execute("UPDATE meta SET clean = 0")
    copy.execute("COMMIT")


def _is_whole(copy: sqlite3.Connection) -> bool:
    found: str = copy.execute("PRAGMA quick_check(1)").fetchone()[0]
    return found == "ok"


def _put_in_place(source: Path, partial: Path, target: Path, *, force: bool) -> None:
    try:
        with open(partial, "rb") as file:
            os.fsync(file.fileno())
        _check_target(source, target, force=force)  # it takes a while until here
        os.replace(partial, target)
        directory = os.open(target.parent, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            os.fsync(directory)
        finally:
            os.close(directory)
    except OSError as error:
        raise BackupError(f"cannot write {target}: {error.strerror}") from error
