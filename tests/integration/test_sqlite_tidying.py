"""Retention and erasing where it is a file that they are about: its size, what is left in it, how long the writer is
held."""

import sqlite3
from contextlib import closing
from pathlib import Path

import pytest
import trio

from bamboo.config import StorageConfig
from bamboo.core.events import (
    AgentReasoning,
    AgentToken,
    AgentToolStart,
    EventBody,
    SessionClosed,
    SessionCreated,
)
from bamboo.core.types import SessionId, ToolCallId, text_content
from bamboo.store.base import STEP_BYTES, TOMBSTONES, Commit, SessionLog
from bamboo.store.retention import STEP_ROWS, retain
from bamboo.store.sqlite import trimming
from bamboo.store.sqlite.files import connect, wal_path
from bamboo.store.sqlite.store import SqliteStore
from tests.support.store_stands import COMPLETE, STARTED, Author, Clock, all_events, opened, said

ONE, TWO = SessionId("one"), SessionId("two")
TABLES = ("sessions", "heads", "epochs", "runs", "keys", "events", "messages", "erasures")
KIB = 1024


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "bamboo.db"


def rows(path: Path, *tables: str) -> dict[str, int]:
    with closing(connect(path, read_only=True)) as look:
        counts = {name: look.execute(f"SELECT count(*) FROM {name}").fetchone()[0] for name in tables}  # noqa: S608 - ours
    return {name: count for name, count in counts.items() if count}


async def changes(store: SqliteStore) -> int:
    """How many rows the writer has changed so far."""
    return await store._writer.run(lambda connection: connection.total_changes)


async def delete(log: SessionLog) -> None:
    await log.commit(Commit(Author(log, Clock()).events(None, SessionClosed()), delete=True))


async def erase_all(store: SqliteStore, *, limit: int = STEP_ROWS) -> None:
    while await store.erase(limit=limit):
        pass


async def put(store: SqliteStore, session_id: SessionId, *bodies: EventBody) -> None:
    """Events of no run, in a session that is made with the first ones."""
    async with store.own(session_id) as log:
        author = Author(log, Clock())
        await log.commit(
            Commit(author.events(None, *bodies), session=author.session() if log.session is None else None)
        )


# Deleting


async def test_delete_is_as_short_for_a_long_session_as_for_a_short_one(path: Path) -> None:
    changed: list[int] = []
    async with opened(path) as store:
        for name, runs in (("short", 1), ("long", 300)):
            async with store.own(SessionId(name)) as log:
                author = Author(log, Clock())
                for index in range(runs):
                    await author.accept(f"{name}-{index}", STARTED, COMPLETE, key=f"{name}-{index}")
                before = await changes(store)
                await delete(log)
                changed.append(await changes(store) - before)
        assert changed[0] == changed[1] < 10
        assert rows(path, *TABLES) == {"runs": 301, "keys": 301, "events": 903, "messages": 301, "erasures": 2}
        before = await changes(store)
        assert await store.erase(limit=50) == 50
        assert await changes(store) - before < 3 * 50  # a run takes its key along, and a session is marked
        await erase_all(store)
        assert rows(path, *TABLES) == {}


async def test_deleted_session_leaves_a_tombstone_and_nothing_else(path: Path) -> None:
    async with opened(path) as store, store.own(ONE) as log:
        author = Author(log, Clock())
        await author.accept("r", key="k")
        await author.write("r", *(AgentToken("tokn") for _ in range(1000)))
        assert rows(path, "events") == {"events": 3}  # one event, and 8,000 bytes in chunks of at most 4 KiB less 96
        await delete(log)
        await erase_all(store)
        assert rows(path, *TABLES) == {}
        with closing(connect(path, read_only=True)) as look:
            tombstones = look.execute("SELECT session_id, epoch, last_seq, time_ms FROM tombstones").fetchall()
        assert tombstones == [(ONE, log.epoch, 1002, Clock().now_ms)]


async def test_only_the_newest_tombstones_are_kept(path: Path) -> None:
    def many(connection: sqlite3.Connection) -> None:
        values = ((f"{number}", "e", 1, 0) for number in range(TOMBSTONES))
        connection.executemany(
            "INSERT INTO tombstones (session_id, epoch, last_seq, time_ms) VALUES (?, ?, ?, ?)", values
        )

    async with opened(path) as store:
        await store._writer.run(many)
        async with store.own(ONE) as log:
            await Author(log, Clock()).start("r")
            await delete(log)
        assert rows(path, "tombstones") == {"tombstones": TOMBSTONES}
        with closing(connect(path, read_only=True)) as look:
            found = look.execute("SELECT session_id FROM tombstones ORDER BY number").fetchall()
        assert (found[0], found[-1]) == (("1",), ("one",))


async def test_step_of_erasing_removes_no_further_row_once_enough_bytes_have_gone(path: Path) -> None:
    async with opened(path) as store, store.own(ONE) as log:
        author = Author(log, Clock())
        big = "x" * (STEP_BYTES // 2 + 1)
        for index in range(3):
            await log.commit(author.acceptance(f"r{index}", COMPLETE, content=text_content(big)))
        await delete(log)
        assert [await store.erase(limit=100), await store.erase(limit=100)] == [2, 2]  # runs; one of them with an event
        assert rows(path, "runs", "events") == {"events": 5}
        await erase_all(store)
        assert rows(path, *TABLES) == {}


async def test_many_small_sessions_are_erased_together(path: Path) -> None:
    async with opened(path) as store:
        for index in range(60):
            async with store.own(SessionId(f"s{index}")) as log:
                if index % 2:
                    await Author(log, Clock()).start(f"r{index}")
                else:
                    await log.commit(Commit(session=Author(log, Clock()).session()))
                await delete(log)
        steps = []
        while step := await store.erase(limit=20):
            steps.append(step)
        assert sum(steps) == 60 + 30 * 4  # each session, and a run, two events and a message of every second one
        assert set(steps[:-1]) == {20}
        assert rows(path, *TABLES) == {}


# What is left in the files

SECRET = "hunter2"


def traces(path: Path, secret: str = SECRET) -> dict[str, int]:
    """How often the text is in each file of the database."""
    counts = {file.name: file.read_bytes().count(secret.encode()) for file in path.parent.iterdir()}
    return {name: count for name, count in counts.items() if count}


async def write_secrets(store: SqliteStore, session_id: SessionId, secret: str) -> None:
    """A session with a secret in everything that a client or a model can fill, short and long, in turns with another
    session's commits."""
    async with store.own(session_id) as log, store.own(SessionId(f"beside {session_id}")) as beside:
        author, other = Author(log, Clock()), Author(beside, Clock())
        await other.start(f"beside {session_id}")
        for index, size in enumerate((1, 50, 3000, 40, 700, 1)):
            text, run_id = f"{secret} " * size, f"{session_id}-{index}"
            acceptance = author.acceptance(run_id, STARTED, content=text_content(text), key=f"{secret}-{run_id}")
            assert acceptance.accept is not None
            await log.commit(acceptance)
            await author.write(run_id, *(AgentToken(f"{secret} {number}") for number in range(size)))
            await other.write(f"beside {session_id}", AgentToken("x" * 300))
            await author.write(run_id, AgentReasoning(text), said(text, f"{run_id}-m"))
            await author.write(run_id, AgentToolStart(ToolCallId("c"), "t", {secret: text}))
            await log.commit(Commit(session=author.session(title=text)))
            await other.write(f"beside {session_id}", AgentToken("y" * 30))
            await author.write(run_id, COMPLETE)


async def test_deleted_text_is_in_no_file_once_it_is_erased(path: Path) -> None:
    async with opened(path) as store:
        await write_secrets(store, ONE, SECRET)
        await write_secrets(store, TWO, "kept")
        await store._writer.fold()  # some of it in the database,
        await put(store, ONE, SessionCreated(SECRET))  # and some in the write-ahead log
        assert set(traces(path)) == {path.name, wal_path(path).name}
        async with store.own(ONE) as log:
            await delete(log)
        await erase_all(store, limit=7)
        assert traces(path) == {}
        assert traces(path, "kept")[path.name] > 7000
        assert len(await store.messages(TWO)) == 12


async def test_text_that_retention_removed_is_gone_from_the_file_too(path: Path) -> None:
    async with opened(path) as store:
        for index in range(20):
            await put(store, ONE, SessionCreated(SECRET * index * 20))
        await store._writer.fold()
        assert traces(path)
        while await store.trim(limit=3, session_bytes=1):
            pass
        await store._writer.fold()
        assert traces(path) == {}


async def test_reader_that_keeps_deleted_text_in_the_write_ahead_log_does_not_keep_it_for_ever(path: Path) -> None:
    async with opened(path) as store:
        await write_secrets(store, ONE, SECRET)
        reader = connect(path, read_only=True)
        reader.execute("BEGIN")
        reader.execute("SELECT count(*) FROM events").fetchone()
        async with store.own(ONE) as log:
            await delete(log)
        await erase_all(store)
        assert rows(path, "erasures") == {"erasures": 1}  # not forgotten
        assert await store.session(ONE) is None
        assert traces(path)
        reader.close()
        await erase_all(store)
        assert rows(path, "erasures") == {}
        assert traces(path) == {}


async def test_erasing_that_was_cut_off_is_finished_by_the_next_process(path: Path) -> None:
    for done in range(4):
        session_id = SessionId(f"one{done}")
        async with opened(path) as store:
            await write_secrets(store, session_id, SECRET)
            async with store.own(session_id) as log:
                await delete(log)
            for _ in range(done):
                await store.erase(limit=10)
        async with opened(path) as store:  # the stop was not marked as a clean one
            assert rows(path, "erasures") == {"erasures": 1}
            assert await store.session(session_id) is None
            await erase_all(store)
            assert traces(path) == {}


async def test_deleted_session_is_erased_by_the_task_that_looks_after_the_store(path: Path) -> None:
    async with opened(path) as store, trio.open_nursery() as nursery:
        nursery.start_soon(retain, store, StorageConfig(path=path, retention_days=0))
        await write_secrets(store, ONE, SECRET)
        async with store.own(ONE) as log:
            await delete(log)
        while rows(path, "erasures"):
            await trio.lowlevel.checkpoint()
        assert traces(path) == {}
        nursery.cancel_scope.cancel()


# The file's size


async def test_file_does_not_grow_once_what_is_written_is_what_goes(path: Path) -> None:
    def page_count(connection: sqlite3.Connection) -> int:
        count: int = connection.execute("PRAGMA page_count").fetchone()[0]
        return count

    async def cycle(store: SqliteStore, number: int) -> int:
        for name in ("a", "b", "c", f"d{number}"):
            for size in (20, 3000, 100, 9000, 700, 50):
                await put(store, SessionId(name), *(SessionCreated("x" * (size + number)) for _ in range(10)))
        async with store.own(SessionId(f"d{number}")) as log:
            await delete(log)
        while await store.trim(limit=50, session_bytes=100 * KIB, total_bytes=200 * KIB):
            pass
        await erase_all(store)
        return await store._writer.run(page_count)

    async with opened(path) as store:
        pages = [await cycle(store, number) for number in range(15)]
    assert pages[0] > 100
    # A cycle writes about as much again as the file is long. From the third on there is always room for it inside.
    assert max(pages[3:]) <= max(pages[:3]) * 1.1


# Trimming beside commits


NO_BOUND = trimming.Bounds(0, 0, 1)
"""Of everything only a byte may stay."""


async def chosen(store: SqliteStore) -> trimming.Step:
    """What the next step would remove: all that there is."""
    return await store._readers.run(lambda connection: trimming.choose(connection, NO_BOUND, 100, 0))


async def carry_out(store: SqliteStore, step: trimming.Step) -> int:
    return await store._writer.run(trimming.carry_out(step, 100, 0))


async def test_what_is_written_after_a_step_of_retention_was_chosen_stays_and_goes_with_a_later_one(path: Path) -> None:
    async with opened(path) as store:
        await put(store, ONE, *(SessionCreated("x") for _ in range(5)))
        step = await chosen(store)
        await put(store, ONE, SessionCreated("y"))
        assert await carry_out(store, step) == 5
        assert [event.seq for event in await all_events(store, ONE)] == [6]
        assert await store.trim(limit=9, before_ms=Clock().now_ms + 1) == 1
        assert await store.trim(limit=9, total_bytes=1) == 0


async def test_session_that_is_deleted_after_a_step_of_retention_was_chosen_is_erased_by_the_erasing(
    path: Path,
) -> None:
    async with opened(path) as store:
        for name in (ONE, TWO):
            await put(store, name, *(SessionCreated("x") for _ in range(5)))
        step = await chosen(store)
        async with store.own(ONE) as log:
            await delete(log)
        assert await carry_out(store, step) == 5
        assert await all_events(store, TWO) == []
        assert rows(path, "events") == {"events": 5}
        await erase_all(store)
        assert rows(path, "events") == {}


async def test_step_that_was_done_already_does_nothing(path: Path) -> None:
    async with opened(path) as store:
        await put(store, ONE, *(SessionCreated("x") for _ in range(5)))
        step = await chosen(store)
        assert [await carry_out(store, step), await carry_out(store, step)] == [5, 0]
        with closing(connect(path, read_only=True)) as look:
            assert look.execute("SELECT floor, bytes, oldest_ms FROM heads").fetchall() == [(5, 0, None)]


async def test_nothing_is_written_where_there_is_nothing_to_do(path: Path) -> None:
    async with opened(path) as store:
        await put(store, ONE, SessionCreated("x"))
        async with store.own(TWO) as log:
            await Author(log, Clock()).start("r")
            await delete(log)
        await erase_all(store)
        size = wal_path(path).stat().st_size
        for _ in range(3):
            assert await store.trim(limit=9, before_ms=1, session_bytes=1000, total_bytes=1000) == 0
            assert await store.erase(limit=9) == 0
        assert wal_path(path).stat().st_size == size
