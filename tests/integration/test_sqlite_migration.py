"""A database of an older version becomes one of this version, with everything that was in it."""

import sqlite3
from contextlib import closing
from pathlib import Path

import pytest
import trio

from bamboo.config import StorageConfig
from bamboo.core.events import AgentToken, SessionClosed
from bamboo.core.types import RunId, RunStatus, SessionId, content_text
from bamboo.errors import StartError
from bamboo.store.base import Commit
from bamboo.store.codec import encode_events
from bamboo.store.sqlite import open_sqlite_store
from bamboo.store.sqlite.schema import MIGRATIONS
from tests.support.store_stands import DAY_MS, Author, Clock, all_events

DUMP = Path(__file__).with_name("schema_1.sql")
"""Written by the released statements of version 1 and the code around them; no test and no tool writes it anew."""

TRIMMED, TWO, EMPTY = SessionId("trimmed"), SessionId("two"), SessionId("empty")


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """A database of version 1: a session whose log was trimmed and that lived through a crash, one with runs that are
    not finished, one without events, and the tombstone of another."""
    path = tmp_path / "bamboo.db"
    with closing(sqlite3.connect(path)) as connection:
        connection.executescript(DUMP.read_text(encoding="utf-8"))
    return path


@pytest.fixture
def clock() -> Clock:
    clock = Clock()
    clock.now_ms += DAY_MS + 1000
    return clock


def schema(path: Path) -> dict[str, str]:
    with closing(sqlite3.connect(path)) as connection:
        return dict(connection.execute("SELECT name, sql FROM sqlite_master WHERE sql IS NOT NULL"))


async def migrate(path: Path) -> None:
    with trio.fail_after(30):
        async with open_sqlite_store(StorageConfig(path=path)):
            pass


async def test_everything_of_version_1_is_there_in_version_2(path: Path, clock: Clock) -> None:
    with trio.fail_after(30):
        async with open_sqlite_store(StorageConfig(path=path), now_ms=clock) as store:
            extent = await store.extent(TRIMMED)
            assert extent is not None
            assert [(start.epoch, start.first_seq) for start in extent.epochs] == [("UyRwgGgh", 1), ("lbaeFXa0", 711)]
            assert (extent.floor, extent.head) == (5, 711)
            events = await all_events(store, TRIMMED)
            assert [event.seq for event in events] == list(range(6, 712))
            tokens = [event.body.token for event in events if isinstance(event.body, AgentToken)]
            assert tokens == [f"tökn {index} " for index in range(700)]
            messages = await store.messages(TRIMMED)
            assert [content_text(message.content) for message in messages] == ["hello", "old", "hello", "Größe 世界"]
            assert await store.unfinished_sessions() == [TWO]
            assert [run.status for run in await store.runs(TWO, limit=9)] == [RunStatus.QUEUED, RunStatus.RUNNING]
            for key, run_id in (("held", "r3"), ("queued", "r4")):
                holder = await store.key_holder(key, clock.now_ms)
                assert holder is not None
                assert holder.run.run_id == run_id
            assert await store.key_holder("gone", clock.now_ms) is None
            assert await store.session(SessionId("deleted")) is None
            sessions, _ = await store.sessions(limit=9)
            assert sorted(session.session_id for session in sessions) == [EMPTY, TRIMMED, TWO]


async def test_migrated_logs_are_bounded_by_their_bytes_like_new_ones(path: Path, clock: Clock) -> None:
    def bytes_by(query: str) -> dict[int, int]:
        with closing(sqlite3.connect(path)) as connection:
            return dict(connection.execute(query))

    with closing(sqlite3.connect(path)) as connection:  # the neighbour of another log has rows too
        connection.execute("INSERT INTO events VALUES ((2 << 32) + 1, NULL, 1, 1700086401000, x'7b7d')")
        connection.execute("UPDATE heads SET head = 1, oldest_ms = 1700086401000 WHERE session = 2")
        connection.commit()
    sizes = bytes_by("SELECT id >> 32, sum(length(data) + 20) FROM events GROUP BY 1")
    assert sizes[2] == 22
    total = sum(sizes.values())
    with trio.fail_after(30):
        async with open_sqlite_store(StorageConfig(path=path), now_ms=clock) as store:
            assert bytes_by("SELECT session, bytes FROM heads") == sizes
            assert await store.trim(limit=1, total_bytes=total) == 0
            async with store.own(TRIMMED) as log:
                more = Commit(Author(log, clock).events(None, SessionClosed()))
                await log.commit(more)
            total += encode_events(more.events)[0].size_bytes
            assert await store.trim(limit=1, total_bytes=total) == 0
            assert await store.trim(limit=1, total_bytes=total - 1) == 1
            extent = await store.extent(TRIMMED)
            assert extent is not None
            assert extent.floor == 6


async def test_migrated_session_can_be_deleted_and_erased(path: Path, clock: Clock) -> None:
    with trio.fail_after(30):
        async with open_sqlite_store(StorageConfig(path=path), now_ms=clock) as store:
            async with store.own(TWO) as log:
                await log.commit(Commit(Author(log, clock).events(None, SessionClosed()), delete=True))
            while await store.erase(limit=2):
                pass
            assert await store.run(RunId("r3")) is None
            assert len(await store.messages(TRIMMED)) == 4
    with closing(sqlite3.connect(path)) as connection:
        assert connection.execute("SELECT count(*) FROM runs WHERE run_id IN ('r3', 'r4')").fetchone() == (0,)
        assert connection.execute("SELECT session_id, last_seq FROM tombstones ORDER BY number").fetchall() == [
            ("deleted", 2),
            ("two", 5),
        ]


async def test_migrated_schema_is_the_one_of_a_new_database(path: Path, tmp_path: Path) -> None:
    new = tmp_path / "new.db"
    await migrate(path)
    await migrate(new)
    assert schema(path) == schema(new)
    with closing(sqlite3.connect(path)) as connection:
        assert connection.execute("PRAGMA user_version").fetchone() == (len(MIGRATIONS),)
        assert connection.execute("PRAGMA integrity_check").fetchall() == [("ok",)]


def test_statements_of_version_1_are_those_that_were_released(path: Path, tmp_path: Path) -> None:
    again = tmp_path / "again.db"
    with closing(sqlite3.connect(again)) as connection:
        for statement in MIGRATIONS[0]:
            connection.execute(statement)
        connection.commit()
    assert schema(again) == schema(path)


async def test_migration_that_fails_leaves_the_old_version_as_it_was(path: Path) -> None:
    with closing(sqlite3.connect(path)) as connection:
        connection.execute("CREATE TABLE erasures (something INTEGER)")  # in the way of the last statements
        connection.commit()
    before = schema(path)
    with pytest.raises(StartError, match=r"storage\.path"):
        await migrate(path)
    assert schema(path) == before
    with closing(sqlite3.connect(path)) as connection:
        assert connection.execute("PRAGMA user_version").fetchone() == (1,)
        connection.execute("DROP TABLE erasures")
        connection.commit()
    await migrate(path)
