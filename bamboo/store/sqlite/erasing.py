"""What deleted sessions leave, and how it goes: in steps, behind the one transaction that took the session away.

That transaction puts the session's number into `erasures`. It stays there until the session's rows are gone and the
write-ahead log, where they could be found too, was emptied since; so a crash in between forgets nothing. The space of
rows is overwritten as it is freed (`PRAGMA secure_delete`).
"""

import sqlite3
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from bamboo.store.base import STEP_BYTES, TOMBSTONES
from bamboo.store.sqlite.schema import row_key


def take_away(connection: sqlite3.Connection, session: int, epoch: str, head: int, now_ms: int) -> None:
    """Remove what a session is found by, and leave a tombstone and the erasing. In a transaction of the writer's."""
    connection.execute(
        """INSERT INTO tombstones (session_id, epoch, last_seq, time_ms)
        SELECT session_id, ?, ?, ? FROM sessions WHERE number = ?""",
        (epoch, head, now_ms, session),
    )
    connection.execute("DELETE FROM tombstones WHERE number <= (SELECT max(number) FROM tombstones) - ?", (TOMBSTONES,))
    connection.execute("DELETE FROM epochs WHERE session = ?", (session,))
    connection.execute("DELETE FROM heads WHERE session = ?", (session,))
    connection.execute("DELETE FROM sessions WHERE number = ?", (session,))
    connection.execute("INSERT INTO erasures VALUES (?, 0)", (session,))


def pending(connection: sqlite3.Connection) -> bool:
    """Something of a deleted session may be left."""
    found: int = connection.execute("SELECT EXISTS (SELECT 1 FROM erasures)").fetchone()[0]
    return bool(found)


@dataclass(frozen=True, slots=True)
class Erased:
    """What a step did: how much, and, if there was nothing left to do, the sessions that are bare of rows."""

    done: int
    bare: Sequence[int]


class _Room:
    """How much of a step is left: rows, and bytes of which the last row may take more."""

    def __init__(self, rows: int) -> None:
        self.rows = rows
        self.size_bytes = STEP_BYTES
        self.taken = 0

    def __bool__(self) -> bool:
        return self.rows > self.taken and self.size_bytes > 0

    def fill(self, found: Iterable[tuple[int, int]]) -> int | None:
        """Take rows of these keys and sizes, as many as there is room for. Returns the key of the last one."""
        last = None
        for key, size_bytes in found:
            if not self:
                break
            last = key
            self.taken += 1
            self.size_bytes -= size_bytes
        return last


def erase(limit: int) -> Callable[[sqlite3.Connection], Erased]:
    """One step: at most `limit` rows, no further one after STEP_BYTES."""

    def work(connection: sqlite3.Connection) -> Erased:
        room = _Room(limit)
        deleted = "SELECT session FROM erasures WHERE bare = 0 ORDER BY session LIMIT ?"
        for (session,) in connection.execute(deleted, (limit,)).fetchall():
            _erase_runs(connection, session, room)
            _erase_rows(connection, "events", session, room)
            _erase_rows(connection, "messages", session, room)
            if not room:
                break
            connection.execute("UPDATE erasures SET bare = 1 WHERE session = ?", (session,))
            room.taken += 1
        if room.taken:
            return Erased(room.taken, ())
        return Erased(0, [session for (session,) in connection.execute("SELECT session FROM erasures")])

    return work


def forget(bare: Sequence[int]) -> Callable[[sqlite3.Connection], None]:
    """Nothing of these sessions is left anywhere."""

    def work(connection: sqlite3.Connection) -> None:
        connection.executemany("DELETE FROM erasures WHERE session = ?", [(session,) for session in bare])

    return work


def _erase_runs(connection: sqlite3.Connection, session: int, room: _Room) -> None:
    """With each run its idempotency key, which until then counts as held by nobody."""
    found = connection.execute(
        "SELECT number, length(accepted) + length(state) FROM runs WHERE session = ? ORDER BY number LIMIT ?",
        (session, room.rows),
    ).fetchall()
    last = room.fill(found)
    if last is not None:
        runs = "SELECT number FROM runs WHERE session = ? AND number <= ?"
        connection.execute(f"DELETE FROM keys WHERE run IN ({runs})", (session, last))  # noqa: S608 - the line above
        connection.execute("DELETE FROM runs WHERE session = ? AND number <= ?", (session, last))


def _erase_rows(connection: sqlite3.Connection, table: str, session: int, room: _Room) -> None:
    start, end = row_key(session, 0), row_key(session + 1, 0)
    found = connection.execute(
        f"SELECT id, length(data) FROM {table} WHERE id >= ? AND id < ? ORDER BY id LIMIT ?",  # noqa: S608 - ours
        (start, end, room.rows),
    ).fetchall()
    last = room.fill(found)
    if last is not None:
        connection.execute(f"DELETE FROM {table} WHERE id >= ? AND id <= ?", (start, last))  # noqa: S608 - ours
