"""The writer thread: one transaction for what waits, a savepoint for each; what fails fails alone."""

import sqlite3
import threading
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
import trio
import trio.testing

from bamboo.errors import StoreError
from bamboo.store.sqlite.checkpoint import Checkpointer
from bamboo.store.sqlite.files import connect, wal_path
from bamboo.store.sqlite.writer import Writer

Work = Callable[[sqlite3.Connection], None]


@asynccontextmanager
async def open_writer(path: Path, *, wal_limit_bytes: int = 1 << 26) -> AsyncIterator[Writer]:
    """A writer over two tables: unique numbers in `t`, and `child`, whose rows need a parent at the commit."""
    connection = connect(path)
    connection.execute("PRAGMA journal_mode = WAL")
    connection.execute("PRAGMA wal_autocheckpoint = 0")
    connection.execute("PRAGMA foreign_keys = ON")
    connection.execute("CREATE TABLE t (n INTEGER PRIMARY KEY)")
    connection.execute("CREATE TABLE child (n INTEGER REFERENCES t DEFERRABLE INITIALLY DEFERRED)")
    checkpointer = Checkpointer(connect(path))
    writer = Writer(path, connection, checkpointer, wal_limit_bytes=wal_limit_bytes)
    checkpointer.start()
    writer.start()
    try:
        with trio.fail_after(20):
            yield writer
    finally:
        checkpointer.stop()
        writer.stop()


def insert(number: int) -> Work:
    def work(connection: sqlite3.Connection) -> None:
        connection.execute("INSERT INTO t VALUES (?)", (number,))

    return work


def orphan(connection: sqlite3.Connection) -> None:
    connection.execute("INSERT INTO child VALUES (-1)")


def stored(path: Path) -> list[int]:
    reader = connect(path, read_only=True)
    try:
        return [number for (number,) in reader.execute("SELECT n FROM t ORDER BY n")]
    finally:
        reader.close()


class Hold:
    """Keeps the writer's thread inside one operation until `let_go`, so that others gather behind it."""

    def __init__(self) -> None:
        self._go_on = threading.Event()
        self.entered = trio.Event()
        self._token = trio.lowlevel.current_trio_token()

    def work(self, _connection: sqlite3.Connection) -> None:
        self._token.run_sync_soon(self.entered.set)
        assert self._go_on.wait(10)

    def let_go(self) -> None:
        self._go_on.set()


async def outcome(writer: Writer, work: Work, outcomes: dict[int, object], place: int) -> None:
    try:
        await writer.run(work)
        outcomes[place] = "done"
    except Exception as error:  # noqa: BLE001 - whatever it is, it is what the test looks at
        outcomes[place] = type(error)


async def run_together(writer: Writer, works: list[Work]) -> dict[int, object]:
    """Run these in one group: they are handed over while the writer is busy. What came of each, by its place."""
    hold = Hold()
    outcomes: dict[int, object] = {}
    async with trio.open_nursery() as nursery:
        nursery.start_soon(writer.run, hold.work)
        await hold.entered.wait()
        for place, work in enumerate(works):
            nursery.start_soon(outcome, writer, work, outcomes, place)
            await trio.testing.wait_all_tasks_blocked()
        hold.let_go()
    return outcomes


async def test_what_waits_is_committed_in_one_transaction(tmp_path: Path) -> None:
    versions: list[int] = []

    def note(number: int) -> Work:
        def work(connection: sqlite3.Connection) -> None:
            insert(number)(connection)
            # The number of changes that other connections have committed: a reader sees it move once per transaction.
            versions.append(connection.execute("SELECT count(*) FROM t").fetchone()[0])

        return work

    path = tmp_path / "db"
    async with open_writer(path) as writer:
        seen: list[list[int]] = []

        def look(_connection: sqlite3.Connection) -> None:
            seen.append(stored(path))

        outcomes = await run_together(writer, [note(1), note(2), look, note(3)])
        assert list(outcomes.values()) == ["done"] * 4
    assert versions == [1, 2, 3]
    assert seen == [[]]  # the first ones were not committed yet when the third ran: they share its transaction
    assert stored(path) == [1, 2, 3]


async def test_operations_run_in_the_order_in_which_they_were_handed_over(tmp_path: Path) -> None:
    ran: list[int] = []

    def note(number: int) -> Work:
        return lambda _connection: ran.append(number)

    async with open_writer(tmp_path / "db") as writer:
        await run_together(writer, [note(number) for number in range(600)])
    assert ran == list(range(600))


async def test_operation_that_fails_is_undone_alone(tmp_path: Path) -> None:
    class WrongError(Exception):
        pass

    def fail(connection: sqlite3.Connection) -> None:
        insert(100)(connection)
        raise WrongError

    path = tmp_path / "db"
    async with open_writer(path) as writer:
        outcomes = await run_together(writer, [insert(1), fail, insert(1), insert(2)])
    assert outcomes == {0: "done", 1: WrongError, 2: AssertionError, 3: "done"}
    assert stored(path) == [1, 2]


async def test_commit_that_fails_fails_the_whole_group_and_the_writer_goes_on(tmp_path: Path) -> None:
    class AnswerError(Exception):
        """An operation's own answer, which would be a lie: what it rests on was not committed."""

    def answer(_connection: sqlite3.Connection) -> None:
        raise AnswerError

    path = tmp_path / "db"
    async with open_writer(path) as writer:
        outcomes = await run_together(writer, [insert(1), answer, orphan, insert(2)])
        assert outcomes == dict.fromkeys(range(4), StoreError)
        assert [writer.failing, stored(path)] == [True, []]
        await writer.run(insert(3))
        assert [writer.failing, stored(path)] == [False, [3]]


async def test_database_error_is_a_store_error_without_what_was_stored(tmp_path: Path) -> None:
    def query(connection: sqlite3.Connection) -> None:
        connection.execute("SELECT * FROM 'my secret'")

    async with open_writer(tmp_path / "db") as writer:
        with pytest.raises(StoreError) as failed:
            await writer.run(query)
    assert "secret" not in str(failed.value)
    assert isinstance(failed.value.__cause__, sqlite3.Error)


async def test_other_program_that_holds_the_database_fails_the_group_only(tmp_path: Path) -> None:
    path = tmp_path / "db"
    async with open_writer(path) as writer:
        await writer.run(lambda connection: connection.execute("PRAGMA busy_timeout = 20") and None)
        other = connect(path)
        other.execute("BEGIN IMMEDIATE")
        with pytest.raises(StoreError, match="SQLITE_BUSY"):
            await writer.run(insert(1))
        other.execute("ROLLBACK")
        other.close()
        await writer.run(insert(2))
    assert stored(path) == [2]


async def test_cancelled_operation_is_done_all_the_same(tmp_path: Path) -> None:
    path = tmp_path / "db"
    async with open_writer(path) as writer:
        hold = Hold()
        async with trio.open_nursery() as nursery:
            nursery.start_soon(writer.run, hold.work)
            await hold.entered.wait()
            with trio.CancelScope() as scope:
                scope.cancel()
                await writer.run(insert(1))
            assert scope.cancelled_caught
            hold.let_go()
        await writer.run(insert(2))
    assert stored(path) == [1, 2]


async def test_stop_commits_what_waits_and_then_refuses(tmp_path: Path) -> None:
    path = tmp_path / "db"
    async with open_writer(path) as writer:
        hold = Hold()
        async with trio.open_nursery() as nursery:
            nursery.start_soon(writer.run, hold.work)
            await hold.entered.wait()
            nursery.start_soon(writer.run, insert(1))
            await trio.testing.wait_all_tasks_blocked()
            hold.let_go()
            await trio.to_thread.run_sync(writer.stop)
        with pytest.raises(StoreError):
            await writer.run(insert(2))
    assert not wal_path(path).exists()  # folded into the database
    assert stored(path) == [1]


def read_from_now(path: Path) -> sqlite3.Connection:
    """A reader whose transaction has begun: the write-ahead log cannot be emptied under it."""
    reader = connect(path, read_only=True)
    reader.execute("BEGIN")
    reader.execute("SELECT count(*) FROM t").fetchone()
    return reader


async def test_fold_empties_the_write_ahead_log_behind_what_was_handed_over_before(tmp_path: Path) -> None:
    path = tmp_path / "db"
    async with open_writer(path) as writer:
        hold = Hold()
        folded: list[bool] = []

        async def fold() -> None:
            folded.append(await writer.fold())
            folded.append(wal_path(path).stat().st_size == 0)

        async with trio.open_nursery() as nursery:
            nursery.start_soon(writer.run, hold.work)
            await hold.entered.wait()
            for number in (1, 2):
                nursery.start_soon(writer.run, insert(number))
                await trio.testing.wait_all_tasks_blocked()
            nursery.start_soon(fold)
            await trio.testing.wait_all_tasks_blocked()
            assert wal_path(path).stat().st_size > 0
            hold.let_go()
        assert folded == [True, True]
        assert stored(path) == [1, 2]
        await writer.run(insert(3))
        assert await writer.fold()
    assert stored(path) == [1, 2, 3]


async def test_fold_under_a_reader_says_so_and_nothing_is_lost(tmp_path: Path) -> None:
    path = tmp_path / "db"
    async with open_writer(path) as writer:
        await writer.run(insert(1))
        reader = read_from_now(path)
        await writer.run(insert(2))
        assert not await writer.fold()
        assert stored(path) == [1, 2]
        reader.close()
        assert await writer.fold()
        assert stored(path) == [1, 2]


async def test_fold_of_a_group_that_cannot_be_committed_fails_with_it(tmp_path: Path) -> None:
    path = tmp_path / "db"
    async with open_writer(path) as writer:
        hold = Hold()
        async with trio.open_nursery() as nursery:
            nursery.start_soon(writer.run, hold.work)
            await hold.entered.wait()
            outcomes: dict[int, object] = {}
            nursery.start_soon(outcome, writer, orphan, outcomes, 0)
            await trio.testing.wait_all_tasks_blocked()

            async def fold() -> None:
                with pytest.raises(StoreError):
                    await writer.fold()

            nursery.start_soon(fold)
            await trio.testing.wait_all_tasks_blocked()
            hold.let_go()
        assert outcomes == {0: StoreError}


async def test_write_ahead_log_is_folded_by_the_checkpointer_before_the_writer_has_to(tmp_path: Path) -> None:
    """What is left to the writer is what was written during the checkpointer's pass."""
    path = tmp_path / "db"
    async with open_writer(path, wal_limit_bytes=1 << 16) as writer:
        passes = writer._checkpointer.passes
        number = biggest = 0
        while (size := wal_path(path).stat().st_size) >= biggest:
            biggest = size
            number += 1
            await writer.run(insert(number))
        assert writer._checkpointer.passes > passes
