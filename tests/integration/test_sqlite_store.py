"""What only a store in a file has: a process that dies, a full disk, a write-ahead log, a thread that writes."""

import signal
import sqlite3
import sys
import textwrap
import threading
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path

import pytest
import trio
import trio.testing

from bamboo.config import StorageConfig
from bamboo.core.events import AgentComplete, AgentMessage, AgentToken, Event
from bamboo.core.types import Epoch, MessageId, RunId, RunStats, SessionId, text_content
from bamboo.errors import StoreError
from bamboo.store.base import Commit, DuplicateKey
from bamboo.store.sqlite import open_sqlite_store
from bamboo.store.sqlite.files import connect, wal_path
from bamboo.store.sqlite.store import SqliteStore
from tests.support.store_stands import Author, Clock, all_events, opened

ONE = SessionId("one")
MIB = 1024 * 1024


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "bamboo #1%?.db"  # a name that a URI has to quote


# A process that dies

CHILD = """
    import os, signal, sys
    from pathlib import Path
    import trio
    from bamboo.config import StorageConfig
    from bamboo.core.events import AgentToken
    from bamboo.core.types import SessionId
    from bamboo.store.sqlite import open_sqlite_store
    from tests.support.store_stands import Author, Clock

    async def main():
        async with open_sqlite_store(StorageConfig(path=Path(sys.argv[1]))) as store:
            async with store.own(SessionId("one")) as log:
                author = Author(log, Clock())
                await author.start("r")
                for index in range(50):
                    await author.write("r", AgentToken(str(index)), AgentToken("x"))
                    print(log.epoch, log.head, flush=True)
                async with trio.open_nursery() as nursery:
                    nursery.start_soon(author.write, "r", AgentToken("in flight"))
                    await trio.lowlevel.checkpoint()
                    os.kill(os.getpid(), signal.SIGKILL)

    trio.run(main)
"""


async def test_what_was_committed_survives_kill_and_the_lock_does_not(path: Path) -> None:
    command = [sys.executable, "-c", textwrap.dedent(CHILD), str(path)]
    with trio.fail_after(30):
        died = await trio.run_process(command, capture_stdout=True, check=False, cwd=Path(__file__).parents[2])
    assert died.returncode == -signal.SIGKILL
    epoch, head = died.stdout.decode().split()[-2:]
    assert int(head) == 102
    async with opened(path) as store:
        async with store.own(ONE) as log:
            assert log.head in (102, 103)
            assert log.epoch != epoch
            assert log.first_seq == log.head + 1
            assert [run.run_id for run in log.unfinished] == ["r"]
        events = await all_events(store, ONE)
        assert [event.seq for event in events] == list(range(1, len(events) + 1))
        assert {event.epoch for event in events} == {epoch}


# The disk


async def test_full_disk_refuses_the_commit_and_the_same_seqs_go_through_later(path: Path) -> None:
    async with opened(path) as store, store.own(ONE) as log:
        author = Author(log, Clock())
        await author.start("r")
        pages = await store._writer.run(
            lambda connection: connection.execute("PRAGMA page_count").fetchone()[0]  # what it has, and no more
        )
        await store._writer.run(lambda connection: connection.execute(f"PRAGMA max_page_count = {pages}").fetchone())
        big = author.events("r", AgentMessage(MessageId("m"), text_content("x" * MIB), "p", "m"))
        for _ in range(2):
            with pytest.raises(StoreError, match="SQLITE_FULL"):
                await log.commit(Commit(big))
        assert log.head == 2
        assert len(await all_events(store, ONE)) == 2
        await store._writer.run(lambda connection: connection.execute("PRAGMA max_page_count = 1000000").fetchone())
        await log.commit(Commit(big))
        await author.write("r", AgentComplete("stop", None, RunStats(0, None, 0)))
        assert [event.seq for event in await all_events(store, ONE)] == [1, 2, 3, 4]


async def test_health_is_what_the_disk_says_once_a_commit_has_failed(path: Path) -> None:
    async with opened(path) as store, store.own(ONE) as log:
        await Author(log, Clock()).start("r")
        await store._writer.run(lambda connection: connection.execute("PRAGMA busy_timeout = 10").fetchone())
        other = connect(path)
        other.execute("BEGIN IMMEDIATE")
        assert not await store.healthy()
        with pytest.raises(StoreError):
            await Author(log, Clock()).write("r", AgentToken("x"))
        assert not await store.healthy()
        other.execute("ROLLBACK")
        other.close()
        assert await store.healthy()


FULL_DISK = """
    import os, resource, sys
    from pathlib import Path
    import trio
    from bamboo.config import StorageConfig
    from bamboo.core.events import AgentMessage
    from bamboo.core.types import MessageId, SessionId, text_content
    from bamboo.errors import StoreError
    from bamboo.store.base import Commit
    from bamboo.store.sqlite import open_sqlite_store
    from tests.support.store_stands import Author, Clock

    def allow(size):
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, resource.RLIM_INFINITY))

    async def main():
        path = Path(sys.argv[1])
        async with open_sqlite_store(StorageConfig(path=path)) as store, store.own(SessionId("one")) as log:
            author = Author(log, Clock())
            await author.start("r")
            big = Commit(author.events("r", AgentMessage(MessageId("m"), text_content("x" * 2**20), "p", "m")))
            allow(os.stat(f"{path}-wal").st_size)
            for _ in range(3):
                try:
                    await log.commit(big)
                    print("written")
                except StoreError:
                    print("refused")
                async with store.own(SessionId("other")):  # goes through, because it writes nothing
                    pass
                print("healthy" if await store.healthy() else "failing")
            allow(resource.RLIM_INFINITY)
            print("healthy" if await store.healthy() else "failing")
            await log.commit(big)
            print(log.head, len(await store.messages(SessionId("one"))))

    trio.run(main)
"""


async def test_store_is_unhealthy_while_no_file_may_grow_and_loses_nothing(path: Path) -> None:
    """A limit on the size of files stands for a full disk: writing beyond it fails in the operating system."""
    command = [sys.executable, "-c", textwrap.dedent(FULL_DISK), str(path)]
    with trio.fail_after(30):
        ended = await trio.run_process(command, capture_stdout=True, cwd=Path(__file__).parents[2])
    assert ended.stdout.decode().split() == ["refused", "failing"] * 3 + ["healthy", "3", "2"]


async def test_failing_read_is_a_store_error(path: Path) -> None:
    async with opened(path) as store:
        async with store.own(ONE) as log:
            await Author(log, Clock()).start("r")
        await store._writer.run(lambda connection: connection.execute("ALTER TABLE events RENAME TO gone") and None)
        with pytest.raises(StoreError) as failed:
            await store.read(ONE, 0, max_bytes=1000)
        assert isinstance(failed.value.__cause__, sqlite3.Error)
        await store._writer.run(lambda connection: connection.execute("ALTER TABLE gone RENAME TO events") and None)
        assert len(await all_events(store, ONE)) == 2


@pytest.mark.parametrize("reader_in_the_way", [False, True])
async def test_write_ahead_log_stays_bounded(path: Path, *, reader_in_the_way: bool) -> None:
    limit = MIB
    sizes: list[int] = []
    async with opened(path, wal_limit_bytes=limit) as store, store.own(ONE) as log:
        author = Author(log, Clock())
        await author.start("r")
        reader = connect(path, read_only=True)
        for index in range(140):
            await author.write("r", AgentMessage(MessageId(f"m{index}"), text_content("x" * 50_000), "p", "m"))
            if reader_in_the_way and index == 40:
                reader.execute("BEGIN")
                reader.execute("SELECT count(*) FROM events").fetchone()
            if reader_in_the_way and index == 64:
                assert max(sizes) > 2 * limit  # it cannot be bounded under a reader that stays
                sizes.clear()
                reader.execute("ROLLBACK")
            elif not (reader_in_the_way and 64 < index < 70):
                sizes.append(wal_path(path).stat().st_size)
        reader.close()
    # Each commit adds about 100 KiB (the event and the message); the log is cut after the one that goes beyond the
    # limit, or a few later if the checkpointer is at work just then.
    assert max(sizes) <= 2 * limit
    assert not wal_path(path).exists()  # folded in at the end


# What is in the tables


async def test_index_stops_a_second_terminal_event(path: Path) -> None:
    """The rule is checked before; the index holds even if that check were wrong."""
    complete = AgentComplete("stop", None, RunStats(0, None, 0))
    async with opened(path) as store, store.own(ONE) as log:
        author = Author(log, Clock())
        await author.accept("r", complete)

        def again(connection: sqlite3.Connection) -> None:
            connection.execute("INSERT INTO events SELECT id + 1, run, 15, time_ms, data FROM events WHERE kind = 13")

        with pytest.raises(AssertionError, match="rule of the database"):
            await store._writer.run(again)
        assert len(await all_events(store, ONE)) == 2


async def test_run_id_that_was_used_before_undoes_the_commit(path: Path) -> None:
    async with opened(path) as store, store.own(ONE) as log:
        author = Author(log, Clock())
        await author.accept("r", AgentComplete("stop", None, RunStats(0, None, 0)))
        with pytest.raises(AssertionError):
            await author.accept("r")
        assert log.head == 2
        await author.accept("other")


# Waiting


def events_behind(log_head: int, epoch: str, *tokens: str) -> list[Event]:
    return [
        Event(ONE, Epoch(epoch), log_head + index, 0, RunId("r"), AgentToken(token))
        for index, token in enumerate(tokens, start=1)
    ]


@asynccontextmanager
async def held_writer(store: SqliteStore) -> AsyncIterator[None]:
    """The writer's thread is busy with something else while the block lasts."""
    entered, leave = threading.Event(), threading.Event()

    def hold(_connection: sqlite3.Connection) -> None:
        entered.set()
        assert leave.wait(10)

    async with trio.open_nursery() as nursery:
        nursery.start_soon(store._writer.run, hold)
        await trio.to_thread.run_sync(entered.wait)
        yield
        leave.set()


async def test_commits_of_one_log_are_done_in_the_order_of_their_calls(path: Path) -> None:
    async with opened(path) as store, store.own(ONE) as log:
        await Author(log, Clock()).start("r")
        async with trio.open_nursery() as nursery, held_writer(store):
            for index in range(20):
                nursery.start_soon(log.commit, Commit(events_behind(2 + index, log.epoch, str(index))))
                await trio.testing.wait_all_tasks_blocked()
        assert log.head == 22
        tokens = [event.body.token for event in await all_events(store, ONE) if isinstance(event.body, AgentToken)]
        assert tokens == [str(index) for index in range(20)]


async def test_commit_that_waits_behind_a_refused_one_is_refused_with_it(path: Path) -> None:
    outcomes: list[type[Exception]] = []

    async with opened(path) as store, store.own(ONE) as log:
        author = Author(log, Clock())
        await author.accept("r", key="k")

        async def attempt(commit: Commit) -> None:
            try:
                await log.commit(commit)
            except (StoreError, DuplicateKey) as refusal:
                outcomes.append(type(refusal))

        async with trio.open_nursery() as nursery, held_writer(store):
            for commit in (author.acceptance("again", key="k"), Commit(events_behind(2, log.epoch, "x"))):
                nursery.start_soon(attempt, commit)
                await trio.testing.wait_all_tasks_blocked()
        assert outcomes == [DuplicateKey, StoreError]
        assert log.head == 1
        await log.commit(Commit(events_behind(1, log.epoch, "y")))


async def test_log_whose_commit_was_cancelled_takes_no_more_and_the_next_owner_loads_behind_it(path: Path) -> None:
    async with opened(path) as store:
        heads: list[int] = []

        async def take_over() -> None:
            async with store.own(ONE) as log:
                heads.append(log.head)

        async with trio.open_nursery() as heirs, AsyncExitStack() as held:
            async with store.own(ONE) as log:
                author = Author(log, Clock())
                await author.start("r")
                await held.enter_async_context(held_writer(store))
                with trio.CancelScope() as scope:
                    async with trio.open_nursery() as nursery:
                        nursery.start_soon(author.write, "r", AgentToken("x"))
                        await trio.testing.wait_all_tasks_blocked()
                        scope.cancel()
                with pytest.raises(StoreError, match="not known"):
                    await author.write("r", AgentToken("y"))
            heirs.start_soon(take_over)
            await trio.testing.wait_all_tasks_blocked()
            assert heads == []
        assert heads == [3]


async def test_store_that_is_closed_by_a_cancellation_commits_what_waits(path: Path) -> None:
    with trio.fail_after(30), trio.CancelScope() as scope:
        async with open_sqlite_store(StorageConfig(path=path), now_ms=Clock()) as store, store.own(ONE) as log:
            author = Author(log, Clock())
            await author.start("r")
            async with trio.open_nursery() as nursery:
                nursery.start_soon(author.write, "r", AgentToken("x"))
                await trio.testing.wait_all_tasks_blocked()
                scope.cancel()
    async with opened(path) as store:
        assert len(await all_events(store, ONE)) == 3
