"""The tables, and how a database of an older version becomes one of this version. Forward only.

A session's events, and its messages, lie together in the order of their seqs: the row id is the session's number and
the seq in one integer (`row_key`), so a piece of a log is one range of the table, with no index beside it.
"""

import sqlite3
from typing import Final

APPLICATION_ID: Final = 0x62616D62
"""Marks a file as ours (`PRAGMA application_id`): "bamb"."""

SEQ_BITS: Final = 32
"""How much of a row id is the seq: four billion events per session, and two billion sessions."""

_VERSION_1: Final = (
    # One row. `clean` is 1 only between a clean stop and the next start; `generation` counts unclean starts.
    # `probes` is there to be written when nothing else is to.
    "CREATE TABLE meta (generation INTEGER NOT NULL, clean INTEGER NOT NULL, probes INTEGER NOT NULL)",
    "INSERT INTO meta VALUES (0, 1, 0)",
    # Numbers are never used again, so that nothing of a deleted session can turn up in another.
    """CREATE TABLE sessions (
        number INTEGER PRIMARY KEY AUTOINCREMENT,
        session_id TEXT NOT NULL UNIQUE,
        created_ms INTEGER NOT NULL,
        folded_title BLOB NOT NULL,
        settings BLOB NOT NULL
    )""",
    # What every commit changes, apart from the settings, which may be long. `generation` is that of the newest epoch;
    # `oldest_ms` is the time of the oldest row in `events`, NULL without one.
    """CREATE TABLE heads (
        session INTEGER PRIMARY KEY,
        head INTEGER NOT NULL,
        floor INTEGER NOT NULL,
        updated_ms INTEGER NOT NULL,
        oldest_ms INTEGER,
        generation INTEGER NOT NULL
    )""",
    "CREATE INDEX heads_by_update ON heads (updated_ms)",
    "CREATE INDEX heads_by_age ON heads (oldest_ms)",
    """CREATE TABLE epochs (
        session INTEGER NOT NULL,
        ordinal INTEGER NOT NULL,
        epoch TEXT NOT NULL,
        first_seq INTEGER NOT NULL,
        PRIMARY KEY (session, ordinal)
    ) WITHOUT ROWID""",
    # `first_seq` is the seq of the run's user message.
    """CREATE TABLE runs (
        number INTEGER PRIMARY KEY AUTOINCREMENT,
        run_id TEXT NOT NULL UNIQUE,
        session INTEGER NOT NULL,
        finished INTEGER NOT NULL,
        first_seq INTEGER NOT NULL,
        last_seq INTEGER,
        accepted BLOB NOT NULL,
        state BLOB NOT NULL
    )""",
    "CREATE INDEX runs_by_session ON runs (session)",
    "CREATE INDEX runs_unfinished ON runs (session) WHERE finished = 0",
    # `id` is the key of the row's last seq; `kind` is one of codec.KINDS.
    """CREATE TABLE events (
        id INTEGER PRIMARY KEY,
        run INTEGER,
        kind INTEGER NOT NULL,
        time_ms INTEGER NOT NULL,
        data BLOB NOT NULL
    )""",
    "CREATE UNIQUE INDEX events_one_terminal ON events (run) WHERE kind IN (13, 14, 15)",
    # `id` is the key of the event that made the message.
    """CREATE TABLE messages (
        id INTEGER PRIMARY KEY,
        run INTEGER NOT NULL,
        message_id TEXT NOT NULL,
        data BLOB NOT NULL
    )""",
    "CREATE INDEX messages_by_id ON messages (message_id)",
    """CREATE TABLE keys (
        name TEXT PRIMARY KEY,
        fingerprint BLOB NOT NULL,
        expires_ms INTEGER NOT NULL,
        run INTEGER NOT NULL
    ) WITHOUT ROWID""",
    "CREATE INDEX keys_by_run ON keys (run)",
    "CREATE INDEX keys_by_expiry ON keys (expires_ms)",
    """CREATE TABLE tombstones (
        number INTEGER PRIMARY KEY,
        session_id TEXT NOT NULL,
        epoch TEXT NOT NULL,
        last_seq INTEGER NOT NULL,
        time_ms INTEGER NOT NULL
    )""",
    f"PRAGMA application_id = {APPLICATION_ID}",
)

_VERSION_2: Final = (
    # The bytes of a log: the sum of `Row.size_bytes` over its rows. 20 is codec.ROW_BYTES, for ever.
    "ALTER TABLE heads ADD COLUMN bytes INTEGER NOT NULL DEFAULT 0",
    """UPDATE heads SET bytes = (
        SELECT coalesce(sum(20 + length(data)), 0) FROM events
        WHERE id >= heads.session << 32 AND id < (heads.session + 1) << 32
    )""",
    # Numbers of deleted sessions of which something may still be there: rows, or, for those that are `bare` of rows,
    # what the write-ahead log has of them.
    "CREATE TABLE erasures (session INTEGER PRIMARY KEY, bare INTEGER NOT NULL)",
    "CREATE INDEX erasures_with_rows ON erasures (session) WHERE bare = 0",
)

MIGRATIONS: Final = (_VERSION_1, _VERSION_2)
"""What makes version n + 1 of version n. Released ones never change; a new one is added at the end."""


class ForeignDatabaseError(Exception):
    """The file is a database, but none that this version can work with. `str(error)` says why."""


def check(connection: sqlite3.Connection) -> None:
    """Raise ForeignDatabaseError if this is neither an empty database nor one of ours that this version knows.
    Changes nothing.
    """
    version = version_of(connection)
    application = _pragma(connection, "application_id")
    tables: int = connection.execute("SELECT count(*) FROM sqlite_master").fetchone()[0]
    if application != APPLICATION_ID and (application or version or tables):
        raise ForeignDatabaseError("is another program's database")
    if version > len(MIGRATIONS):
        raise ForeignDatabaseError(
            f"was written by a newer version of Bamboo (schema {version}, this one knows {len(MIGRATIONS)})"
        )


def version_of(connection: sqlite3.Connection) -> int:
    """Of the schema; 0 for a database with nothing in it."""
    return _pragma(connection, "user_version")


def migrate(connection: sqlite3.Connection) -> None:
    """Bring a database that was checked to this version, each step in a transaction of its own."""
    version = version_of(connection)
    for number, statements in enumerate(MIGRATIONS[version:], start=version + 1):
        connection.execute("BEGIN IMMEDIATE")
        for statement in statements:
            connection.execute(statement)
        connection.execute(f"PRAGMA user_version = {number}")
        connection.execute("COMMIT")


def _pragma(connection: sqlite3.Connection, name: str) -> int:
    value: int = connection.execute(f"PRAGMA {name}").fetchone()[0]
    return value


def row_key(session: int, seq: int) -> int:
    """The row id of an event or message: `session` is the session's number."""
    return session << SEQ_BITS | seq


def seq_of(key: int) -> int:
    return key & ((1 << SEQ_BITS) - 1)
