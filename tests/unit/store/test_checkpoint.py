"""The checkpointer: beside the writer, at once when it is asked to."""

import sqlite3
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import trio
import trio.testing

from bamboo.store.sqlite.checkpoint import Checkpointer
from bamboo.store.sqlite.files import connect

HOUR_S = 3600.0


@contextmanager
def checkpointed(path: Path) -> Iterator[tuple[Checkpointer, sqlite3.Connection]]:
    """A checkpointer that does nothing of itself for an hour, and a connection that writes."""
    writer = connect(path)
    writer.execute("PRAGMA journal_mode = WAL")
    writer.execute("PRAGMA wal_autocheckpoint = 0")
    writer.execute("CREATE TABLE t (n INTEGER PRIMARY KEY)")
    checkpointer = Checkpointer(connect(path), pause_s=HOUR_S)
    checkpointer.start()
    try:
        yield checkpointer, writer
    finally:
        checkpointer.stop()
        writer.close()


def in_the_database(path: Path) -> bool:
    """The table is in the file itself, not only in the write-ahead log."""
    return b"CREATE TABLE t" in path.read_bytes()


async def test_checkpoint_that_is_waited_for_is_made_at_once(tmp_path: Path) -> None:
    path = tmp_path / "db"
    with trio.fail_after(20), checkpointed(path) as (checkpointer, _):
        assert not in_the_database(path)
        await checkpointer.checkpoint()
        assert in_the_database(path)
        async with trio.open_nursery() as nursery:
            for _ in range(20):
                nursery.start_soon(checkpointer.checkpoint)


async def test_hurry_ends_the_pause_before_a_checkpoint_that_was_asked_for(tmp_path: Path) -> None:
    path = tmp_path / "db"
    with trio.fail_after(20), checkpointed(path) as (checkpointer, _):
        checkpointer.ask()
        awaited = checkpointer.hurry()
        assert awaited > checkpointer.passes or in_the_database(path)
        await checkpointer.checkpoint()
        assert checkpointer.passes >= awaited


async def test_whoever_waits_when_the_checkpointer_stops_is_let_go(tmp_path: Path) -> None:
    with trio.fail_after(20), checkpointed(tmp_path / "db") as (checkpointer, _):
        checkpointer.turn.acquire()  # somebody else makes a checkpoint: what begins now waits for that
        async with trio.open_nursery() as nursery:
            nursery.start_soon(checkpointer.checkpoint)
            while not checkpointer._begun:
                await trio.lowlevel.checkpoint()
            for _ in range(2):
                nursery.start_soon(checkpointer.checkpoint)  # for these there is to be another one
            await trio.testing.wait_all_tasks_blocked()
            nursery.start_soon(trio.to_thread.run_sync, checkpointer.stop)
            while not checkpointer._stopping:
                await trio.lowlevel.checkpoint()
            checkpointer.turn.release()
        await checkpointer.checkpoint()  # and nothing is waited for any more


async def test_two_never_make_a_checkpoint_at_once(tmp_path: Path) -> None:
    path = tmp_path / "db"
    with trio.fail_after(20), checkpointed(path) as (checkpointer, writer):
        writer.execute("INSERT INTO t VALUES (1)")
        checkpointer.turn.acquire()
        async with trio.open_nursery() as nursery:
            nursery.start_soon(checkpointer.checkpoint)
            await trio.testing.wait_all_tasks_blocked()
            assert writer.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchone()[0] == 0
            assert checkpointer.passes == 0
            checkpointer.turn.release()
