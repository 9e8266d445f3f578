"""What each write is in SQL. Each function here gives work for the writer: it runs in the writer's thread, inside a
transaction.
"""

import sqlite3
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from bamboo.core.types import Epoch, Message, RunId, SessionId
from bamboo.store.base import DuplicateKey, IdempotencyKey, Run, Session
from bamboo.store.codec import Row, encode_accepted, encode_message, encode_settings, encode_state
from bamboo.store.listing import fold_title
from bamboo.store.sqlite.erasing import take_away
from bamboo.store.sqlite.reads import find_extent, find_session, key_holder, session_number, unfinished_runs
from bamboo.store.sqlite.schema import row_key


@dataclass(frozen=True, slots=True)
class Loaded:
    """What a session's owner begins with. `unfinished` come with their numbers."""

    number: int
    session: Session
    epoch: Epoch
    first_seq: int
    head: int
    unfinished: Sequence[tuple[int, Run]]


def load(
    session_id: SessionId, epoch: Epoch, generation: int, *, new_epoch: bool
) -> Callable[[sqlite3.Connection], Loaded | None]:
    """Read a session for its owner; None if it is not stored. Its first owner of this generation gives it `epoch`, and
    so does one that asks for a new one.
    """

    def work(connection: sqlite3.Connection) -> Loaded | None:
        number = session_number(connection, session_id)
        if number is None:
            return None
        drawn: int = connection.execute("SELECT generation FROM heads WHERE session = ?", (number,)).fetchone()[0]
        if new_epoch or drawn < generation:
            connection.execute(
                """INSERT INTO epochs
                SELECT session, (SELECT count(*) FROM epochs WHERE session = :session), :epoch, head + 1
                FROM heads WHERE session = :session""",
                {"session": number, "epoch": epoch},
            )
            connection.execute("UPDATE heads SET generation = ? WHERE session = ?", (generation, number))
        extent = find_extent(connection, number)
        session = find_session(connection, session_id)
        assert session is not None
        newest = extent.epochs[-1]
        unfinished = unfinished_runs(connection, session_id, number)
        return Loaded(number, session, newest.epoch, newest.first_seq, extent.head, unfinished)

    return work


@dataclass(frozen=True, slots=True)
class Plan:
    """A commit, checked, projected and encoded. `changed` are runs that were accepted before; `number` is None for a
    new session; `size_bytes` is what the rows add to the log.
    """

    session_id: SessionId
    number: int | None
    epoch: Epoch
    generation: int
    now_ms: int
    head: int
    settings: Session | None
    accept: Run | None
    key: IdempotencyKey | None
    changed: Sequence[Run]
    rows: Sequence[Row]
    size_bytes: int
    messages: Sequence[tuple[int, Message]]
    run_numbers: Mapping[RunId, int]
    delete: bool


@dataclass(frozen=True, slots=True)
class Applied:
    """The numbers that the database gave: the session's, and the accepted run's if there was one."""

    session: int
    run: int | None


def apply(plan: Plan) -> Callable[[sqlite3.Connection], Applied]:
    """Do what is planned. Raises DuplicateKey."""

    def work(connection: sqlite3.Connection) -> Applied:
        if plan.delete:
            assert plan.number is not None
            take_away(connection, plan.number, plan.epoch, plan.head, plan.now_ms)
            return Applied(plan.number, None)
        number = _put_session(connection, plan)
        run = _accept(connection, plan, number)
        numbers = plan.run_numbers
        if run is not None and plan.accept is not None:
            numbers = {**numbers, plan.accept.run_id: run}
        _add_events(connection, plan, number, numbers)
        for changed in plan.changed:
            connection.execute(
                "UPDATE runs SET finished = ?, last_seq = ?, state = ? WHERE number = ?",
                (changed.status.finished, changed.last_seq, encode_state(changed), numbers[changed.run_id]),
            )
        return Applied(number, run)

    return work


def _put_session(connection: sqlite3.Connection, plan: Plan) -> int:
    """Create the session or replace its settings, if the commit says so. Returns its number."""
    number, settings = plan.number, plan.settings
    if number is None:
        assert settings is not None
        number = connection.execute(
            "INSERT INTO sessions (session_id, created_ms, folded_title, settings) VALUES (?, ?, ?, ?)",
            (plan.session_id, settings.created_ms, fold_title(settings.title), encode_settings(settings)),
        ).lastrowid
        assert number is not None
        connection.execute("INSERT INTO epochs VALUES (?, 0, ?, 1)", (number, plan.epoch))
        connection.execute("INSERT INTO heads VALUES (?, 0, 0, ?, NULL, ?, 0)", (number, plan.now_ms, plan.generation))
    elif settings is not None:
        connection.execute(
            "UPDATE sessions SET folded_title = ?, settings = ? WHERE number = ?",
            (fold_title(settings.title), encode_settings(settings), number),
        )
    return number


def _accept(connection: sqlite3.Connection, plan: Plan, number: int) -> int | None:
    """Add the accepted run and its key. Returns the run's number."""
    run, key = plan.accept, plan.key
    if run is None:
        return None
    assert run.first_cursor is not None
    run_number = connection.execute(
        """INSERT INTO runs (run_id, session, finished, first_seq, last_seq, accepted, state)
        VALUES (?, ?, ?, ?, ?, ?, ?)""",
        (
            run.run_id,
            number,
            run.status.finished,
            run.first_cursor.seq + 1,
            run.last_seq,
            encode_accepted(run),
            encode_state(run),
        ),
    ).lastrowid
    if key is not None:
        taken = connection.execute(
            """INSERT INTO keys VALUES (:name, :fingerprint, :expires_ms, :run)
            ON CONFLICT (name) DO UPDATE SET fingerprint = :fingerprint, expires_ms = :expires_ms, run = :run
            WHERE keys.expires_ms <= :accepted_ms OR NOT EXISTS (
                SELECT 1 FROM runs JOIN sessions ON sessions.number = session WHERE runs.number = keys.run
            )""",
            {
                "name": key.key,
                "fingerprint": key.fingerprint,
                "expires_ms": key.expires_ms,
                "run": run_number,
                "accepted_ms": run.accepted_ms,
            },
        ).rowcount
        if not taken:
            holder = key_holder(connection, key.key, run.accepted_ms)
            assert holder is not None
            raise DuplicateKey(holder)
    return run_number


def _add_events(connection: sqlite3.Connection, plan: Plan, number: int, numbers: Mapping[RunId, int]) -> None:
    for row in plan.rows:
        connection.execute(
            "INSERT INTO events VALUES (?, ?, ?, ?, ?)",
            (
                row_key(number, row.last_seq),
                None if row.run_id is None else numbers[row.run_id],
                row.kind,
                row.time_ms,
                row.data,
            ),
        )
    for seq, message in plan.messages:
        connection.execute(
            "INSERT INTO messages VALUES (?, ?, ?, ?)",
            (row_key(number, seq), numbers[message.run_id], message.message_id, encode_message(message)),
        )
    connection.execute(
        """UPDATE heads SET head = ?, updated_ms = ?, oldest_ms = coalesce(oldest_ms, ?), bytes = bytes + ?
        WHERE session = ?""",
        (plan.head, plan.now_ms, plan.rows[0].time_ms if plan.rows else None, plan.size_bytes, number),
    )


def mark_clean(connection: sqlite3.Connection) -> None:
    connection.execute("UPDATE meta SET clean = 1")


def probe(connection: sqlite3.Connection) -> None:
    """A real write, which shows whether there is room on the disk again. (One that changes nothing is not written.)"""
    connection.execute("UPDATE meta SET probes = probes + 1")


def nothing(connection: sqlite3.Connection) -> None:
    """Of no effect: that its transaction begins is what is asked for."""
    del connection
