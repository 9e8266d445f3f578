"""Retention in SQL. What goes is chosen on a read connection, beside the writer, which only carries it out: choosing
reads far more than goes, and most of the time finds nothing.
"""

import sqlite3
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from heapq import heapify, heappop, heappush

from bamboo.store.base import SLICE_MS, STEP_BYTES, STEP_LOGS
from bamboo.store.codec import ROW_BYTES
from bamboo.store.sqlite.schema import row_key, seq_of


@dataclass(frozen=True, slots=True)
class Bounds:
    """What logs may keep, as `Store.trim` has it; 0 is no bound."""

    before_ms: int
    session_bytes: int
    total_bytes: int


@dataclass(frozen=True, slots=True)
class Cut:
    """The rows of one log that go: those behind `floor`, up to the one with the key `last`."""

    session: int
    floor: int
    last: int
    size_bytes: int


@dataclass(frozen=True, slots=True)
class Step:
    """What one step removes: rows, and as many keys as a step may if some have expired."""

    cuts: Sequence[Cut]
    expired_keys: bool

    def __bool__(self) -> bool:
        return self.expired_keys or bool(self.cuts)


class _Log:
    """A log whose front may go, row by row, up to `first_held`. `front_ms` is the time of its front row, None if no
    further one may go.
    """

    def __init__(self, session: int, floor: int, size_bytes: int, front_ms: int, first_held: int) -> None:
        self.front_ms: int | None = front_ms
        self.size_bytes = size_bytes
        self.cut: Cut | None = None
        self._session = session
        self._floor = floor
        self._first_held = first_held
        self._cut_bytes = 0
        self._rows: sqlite3.Cursor | None = None
        self._front: tuple[int, int, int] | None = None

    def drop_front(self, connection: sqlite3.Connection, opened: ExitStack) -> int:
        """Let the front row go. Returns what it takes."""
        if self._rows is None:
            span = (row_key(self._session, self._floor), row_key(self._session, self._first_held))
            query = "SELECT id, time_ms, length(data) FROM events WHERE id > ? AND id < ? ORDER BY id"
            self._rows = connection.execute(query, span)
            opened.callback(self._rows.close)
            self._front = self._rows.fetchone()
        assert self._front is not None, "what has a front has a row"
        last, _, length = self._front
        row_bytes = ROW_BYTES + length
        self.size_bytes -= row_bytes
        self._cut_bytes += row_bytes
        self.cut = Cut(self._session, self._floor, last, self._cut_bytes)
        self._front = self._rows.fetchone()
        self.front_ms = None if self._front is None else self._front[1]
        return row_bytes


def choose(connection: sqlite3.Connection, bounds: Bounds, limit: int, now_ms: int) -> Step:
    """What the next step of retention removes. In a read transaction."""
    expired: int = connection.execute("SELECT EXISTS (SELECT 1 FROM keys WHERE expires_ms <= ?)", (now_ms,)).fetchone()[
        0
    ]
    return Step(_choose_rows(connection, bounds, limit), bool(expired))


def _choose_rows(connection: sqlite3.Connection, bounds: Bounds, limit: int) -> Sequence[Cut]:
    logs = _logs(connection, "oldest_ms < ?", bounds.before_ms)
    if bounds.session_bytes:
        logs |= _logs(connection, "bytes > ?", bounds.session_bytes)

    def goes(log: _Log, _freed: int) -> bool:
        too_old = log.front_ms is not None and log.front_ms < bounds.before_ms
        return too_old or 0 < bounds.session_bytes < log.size_bytes

    cuts = _cut(connection, logs, limit, goes)
    if cuts or not bounds.total_bytes:
        return cuts
    kept: int = connection.execute("SELECT coalesce(sum(bytes), 0) FROM heads").fetchone()[0]
    excess = kept - bounds.total_bytes
    if excess <= 0:
        return ()
    return _cut(connection, _logs(connection, "oldest_ms > ?", -1), limit, lambda _log, freed: freed < excess)


def _logs(connection: sqlite3.Connection, wanted: str, value: int) -> dict[int, _Log]:
    """The logs that are `wanted` and whose front no unfinished run holds, by their numbers: those with the earliest
    fronts, one more than a step can touch.
    """
    found = connection.execute(
        f"""SELECT session, floor, bytes, oldest_ms, first_held FROM (
            SELECT session, floor, bytes, oldest_ms, coalesce(
                (SELECT min(first_seq) FROM runs WHERE runs.session = heads.session AND finished = 0), head + 1
            ) AS first_held
            FROM heads WHERE {wanted}
        ) WHERE first_held > floor + 1 ORDER BY oldest_ms, session LIMIT ?""",  # noqa: S608 - a condition from above
        (value, STEP_LOGS + 1),
    ).fetchall()
    return {session: _Log(session, *values) for session, *values in found}


def _cut(
    connection: sqlite3.Connection, logs: Mapping[int, _Log], limit: int, goes: Callable[[_Log, int], bool]
) -> Sequence[Cut]:
    """Let front rows go, of the logs of which one `goes` with so many bytes gone before it, until the step is full."""
    fronts = [(log.front_ms, session) for session, log in logs.items() if log.front_ms is not None]
    heapify(fronts)
    removed = freed = 0
    touched: set[int] = set()
    with ExitStack() as opened:
        while fronts and removed < limit and freed < STEP_BYTES:
            front_ms, session = heappop(fronts)
            log = logs[session]
            if not goes(log, freed):
                continue
            touched.add(session)
            if len(touched) > STEP_LOGS:
                break
            while log.front_ms is not None and log.front_ms < front_ms + SLICE_MS and goes(log, freed):
                freed += log.drop_front(connection, opened)
                removed += 1
                if removed == limit or freed >= STEP_BYTES:
                    break
            if log.front_ms is not None:
                heappush(fronts, (log.front_ms, session))
    return [log.cut for log in logs.values() if log.cut is not None]


def carry_out(step: Step, limit: int, now_ms: int) -> Callable[[sqlite3.Connection], int]:
    """Remove what was chosen; a log that has lost its front since, or is gone, is left alone. Returns the number of
    rows and keys.
    """

    def work(connection: sqlite3.Connection) -> int:
        removed = sum(_remove(connection, cut) for cut in step.cuts)
        if step.expired_keys:
            removed += connection.execute(
                "DELETE FROM keys WHERE name IN (SELECT name FROM keys WHERE expires_ms <= ? LIMIT ?)", (now_ms, limit)
            ).rowcount
        return removed

    return work


def _remove(connection: sqlite3.Connection, cut: Cut) -> int:
    start, end = row_key(cut.session, cut.floor), row_key(cut.session + 1, 0)
    found = connection.execute(
        """UPDATE heads SET floor = ?, bytes = bytes - ?, oldest_ms = (
            SELECT time_ms FROM events WHERE id > ? AND id < ? ORDER BY id LIMIT 1
        ) WHERE session = ? AND floor = ?""",
        (seq_of(cut.last), cut.size_bytes, cut.last, end, cut.session, cut.floor),
    )
    if not found.rowcount:
        return 0
    return connection.execute("DELETE FROM events WHERE id > ? AND id <= ?", (start, cut.last)).rowcount
