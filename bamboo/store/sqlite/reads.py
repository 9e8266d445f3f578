"""Reading: what each question is in SQL, and the few read-only connections that answer it beside the writer."""

import sqlite3
from collections.abc import Callable, Generator, Sequence
from contextlib import closing
from typing import Final, TypeVar

import trio

from bamboo.bus.log_reader import LogExtent, LogPage
from bamboo.core.cursors import epoch_at
from bamboo.core.events import Event
from bamboo.core.history import fold_step
from bamboo.core.types import Cursor, Epoch, EpochStart, Message, MessageId, RunId, SessionId
from bamboo.store.base import KeyHolder, LiveStep, Run, Session, Snapshot
from bamboo.store.codec import (
    Row,
    decode_message,
    decode_row,
    decode_run,
    decode_session,
)
from bamboo.store.listing import fold_title, page_token, parse_page_token
from bamboo.store.projection import fill_page, queue_of, running_of
from bamboo.store.sqlite.files import store_error
from bamboo.store.sqlite.schema import row_key, seq_of

T = TypeVar("T")


class Readers:
    """Read-only connections, and as many threads at a time. Owned by the store that opens it; `close` once no read is
    left.
    """

    def __init__(self, connections: Sequence[sqlite3.Connection]) -> None:
        self._idle = list(connections)
        self._limiter = trio.CapacityLimiter(len(connections))

    async def run(self, query: Callable[[sqlite3.Connection], T]) -> T:
        """Ask `query` in one read transaction, in a thread. Raises StoreError.

        A thread cannot be stopped: a read that is cancelled is waited for, and it is short, because every page of the
        log is bounded.
        """
        return await trio.to_thread.run_sync(self._ask, query, limiter=self._limiter)

    def _ask(self, query: Callable[[sqlite3.Connection], T]) -> T:
        connection = self._idle.pop()  # there is one: the limiter lets in no more than there are
        try:
            connection.execute("BEGIN")
            try:
                return query(connection)
            finally:
                connection.execute("ROLLBACK")
        except sqlite3.Error as error:
            raise store_error(error) from error
        finally:
            self._idle.append(connection)

    def close(self) -> None:
        for connection in self._idle:
            connection.close()


# Queries. Each takes a connection that is inside a transaction.


def session_number(connection: sqlite3.Connection, session_id: SessionId) -> int | None:
    found = connection.execute("SELECT number FROM sessions WHERE session_id = ?", (session_id,)).fetchone()
    return None if found is None else found[0]


_SESSION: Final = """
    SELECT session_id, created_ms, updated_ms, settings
    FROM sessions JOIN heads ON session = number
"""


def find_session(connection: sqlite3.Connection, session_id: SessionId) -> Session | None:
    found = connection.execute(f"{_SESSION} WHERE session_id = ?", (session_id,)).fetchone()
    return None if found is None else decode_session(*found)


def list_sessions(
    connection: sqlite3.Connection, limit: int, before: str | None, query: str | None
) -> tuple[Sequence[Session], str | None]:
    end = (1 << 62, 0) if before is None else parse_page_token(before)
    found = connection.execute(
        """SELECT session_id, created_ms, updated_ms, settings, number
        FROM heads JOIN sessions ON number = session
        WHERE (updated_ms, session) < (?, ?) AND instr(folded_title, ?) > 0
        ORDER BY updated_ms DESC, session DESC LIMIT ?""",
        (*end, fold_title(query), limit + 1),
    ).fetchall()
    sessions = [decode_session(*values) for *values, _ in found[:limit]]
    if len(found) <= limit:
        return sessions, None
    return sessions, page_token(sessions[-1].updated_ms, found[limit - 1][-1])


def find_extent(connection: sqlite3.Connection, number: int) -> LogExtent:
    floor, head = connection.execute("SELECT floor, head FROM heads WHERE session = ?", (number,)).fetchone()
    epochs = connection.execute("SELECT epoch, first_seq FROM epochs WHERE session = ? ORDER BY ordinal", (number,))
    return LogExtent(tuple(EpochStart(Epoch(epoch), first_seq) for epoch, first_seq in epochs), floor, head)


def extent(connection: sqlite3.Connection, session_id: SessionId) -> LogExtent | None:
    number = session_number(connection, session_id)
    return None if number is None else find_extent(connection, number)


def read_log(
    connection: sqlite3.Connection, session_id: SessionId, after_seq: int, max_bytes: int, run_id: RunId | None
) -> LogPage | None:
    number = session_number(connection, session_id)
    if number is None:
        return None
    extent = find_extent(connection, number)
    if run_id is None:
        events = _events(connection, session_id, number, extent.epochs, after_seq, extent.head)
    else:
        events = _run_events(connection, session_id, number, extent, after_seq, run_id)
    with closing(events):
        page, complete = fill_page(events, max_bytes=max_bytes)
    return LogPage(extent, page, max(after_seq, extent.head) if complete else page[-1].seq)


def _run_events(
    connection: sqlite3.Connection,
    session_id: SessionId,
    number: int,
    extent: LogExtent,
    after_seq: int,
    run_id: RunId,
) -> Generator[Event, None, None]:
    """The run's events after `after_seq`: only the part of the log that it can be in is looked at."""
    found = connection.execute(
        "SELECT number, first_seq, last_seq FROM runs WHERE run_id = ? AND session = ?", (run_id, number)
    ).fetchone()
    if found is not None:
        run, first_seq, last_seq = found
        last_seq = extent.head if last_seq is None else last_seq
        after_seq = max(after_seq, first_seq - 1)
        yield from _events(connection, session_id, number, extent.epochs, after_seq, last_seq, run=run)


def _events(
    connection: sqlite3.Connection,
    session_id: SessionId,
    number: int,
    epochs: Sequence[EpochStart],
    after_seq: int,
    last_seq: int,
    *,
    run: int | None = None,
) -> Generator[Event, None, None]:
    """The events after `after_seq` up to `last_seq`, which ends a row. A row is read when its first event is asked
    for.
    """
    rows = connection.execute(
        """SELECT events.id, run_id, kind, time_ms, data FROM events LEFT JOIN runs ON runs.number = events.run
        WHERE events.id > :after AND events.id <= :last AND (:run IS NULL OR run = :run) ORDER BY events.id""",
        {"after": row_key(number, after_seq), "last": row_key(number, last_seq), "run": run},
    )
    with closing(rows):
        for key, run_id, kind, time_ms, data in rows:
            row = Row(seq_of(key), run_id, kind, time_ms, data)
            for event in decode_row(row, session_id, epoch_at(epochs, row.last_seq)):
                if event.seq > after_seq:
                    yield event


_RUN: Final = "SELECT run_id, session_id, accepted, state FROM runs JOIN sessions ON sessions.number = session"


def find_run(connection: sqlite3.Connection, run_id: RunId) -> Run | None:
    found = connection.execute(f"{_RUN} WHERE run_id = ?", (run_id,)).fetchone()
    return None if found is None else decode_run(*found)


def list_runs(connection: sqlite3.Connection, session_id: SessionId, limit: int) -> Sequence[Run]:
    found = connection.execute(
        f"{_RUN} WHERE session_id = ? ORDER BY runs.number DESC LIMIT ?", (session_id, limit)
    ).fetchall()
    return tuple(decode_run(*values) for values in found)


def unfinished_runs(connection: sqlite3.Connection, session_id: SessionId, number: int) -> list[tuple[int, Run]]:
    """The session's runs without a terminal event, with their numbers, in the order of their acceptance."""
    found = connection.execute(
        "SELECT number, run_id, accepted, state FROM runs WHERE session = ? AND finished = 0 ORDER BY number", (number,)
    ).fetchall()
    return [(run, decode_run(run_id, session_id, accepted, state)) for run, run_id, accepted, state in found]


def unfinished_sessions(connection: sqlite3.Connection) -> Sequence[SessionId]:
    found = connection.execute(
        "SELECT session_id FROM sessions WHERE number IN (SELECT session FROM runs WHERE finished = 0) ORDER BY number"
    ).fetchall()
    return [session_id for (session_id,) in found]


def idle_sessions(connection: sqlite3.Connection, before_ms: int, limit: int) -> Sequence[SessionId]:
    found = connection.execute(
        """SELECT session_id FROM heads JOIN sessions ON number = session
        WHERE updated_ms < ? AND NOT EXISTS (SELECT 1 FROM runs WHERE runs.session = heads.session AND finished = 0)
        ORDER BY updated_ms, session LIMIT ?""",
        (before_ms, limit),
    ).fetchall()
    return [session_id for (session_id,) in found]


_MESSAGES: Final = "SELECT message_id, run_id, data FROM messages JOIN runs ON runs.number = run"


def messages(connection: sqlite3.Connection, session_id: SessionId) -> Sequence[Message]:
    number = session_number(connection, session_id)
    if number is None:
        return ()
    found = connection.execute(
        f"{_MESSAGES} WHERE id >= ? AND id < ? ORDER BY id", (row_key(number, 0), row_key(number + 1, 0))
    ).fetchall()
    return tuple(decode_message(*values) for values in found)


def history(
    connection: sqlite3.Connection, session_id: SessionId, limit: int, before: MessageId | None
) -> Snapshot | None:
    number = session_number(connection, session_id)
    if number is None:
        return None
    extent = find_extent(connection, number)
    end = row_key(number + 1, 0) if before is None else _message_key(connection, number, before)
    found = connection.execute(
        f"{_MESSAGES} WHERE id >= ? AND id < ? ORDER BY id DESC LIMIT ?", (row_key(number, 0), end, limit + 1)
    ).fetchall()
    unfinished = [run for _, run in unfinished_runs(connection, session_id, number)]
    running = running_of(unfinished)
    return Snapshot(
        session_id,
        Cursor(epoch_at(extent.epochs, extent.head), extent.head),
        tuple(decode_message(*values) for values in reversed(found[:limit])),
        None if running is None else _live(connection, session_id, number, extent, running),
        queue_of(unfinished),
        more=len(found) > limit,
    )


def _message_key(connection: sqlite3.Connection, number: int, message_id: MessageId) -> int:
    """The row id of a message of the session; the place before all of them for one that is not of it."""
    found = connection.execute(
        "SELECT id FROM messages WHERE message_id = ? AND id >= ? AND id < ?",
        (message_id, row_key(number, 0), row_key(number + 1, 0)),
    ).fetchone()
    return row_key(number, 0) if found is None else found[0]


def _live(connection: sqlite3.Connection, session_id: SessionId, number: int, extent: LogExtent, run: Run) -> LiveStep:
    """What the running run has said in its current step: the step began behind the newest message of the run."""
    newest: int = connection.execute(
        """SELECT id FROM messages WHERE id >= ? AND id < ? AND run = (SELECT number FROM runs WHERE run_id = ?)
        ORDER BY id DESC LIMIT 1""",
        (row_key(number, 0), row_key(number + 1, 0), run.run_id),
    ).fetchone()[0]
    events = _run_events(connection, session_id, number, extent, seq_of(newest), run.run_id)
    with closing(events):
        step = fold_step(event.body for event in events)
    return LiveStep(run.run_id, run.status, step.text, step.reasoning)


def key_holder(connection: sqlite3.Connection, name: str, now_ms: int) -> KeyHolder | None:
    found = connection.execute(
        "SELECT fingerprint, run_id FROM keys JOIN runs ON number = run WHERE name = ? AND expires_ms > ?",
        (name, now_ms),
    ).fetchone()
    if found is None:
        return None
    fingerprint, run_id = found
    run = find_run(connection, run_id)  # None: its session was deleted, and the key is not erased yet
    return None if run is None else KeyHolder(fingerprint, run)
