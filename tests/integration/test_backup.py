"""`bamboo backup`: what is in the copy, what is not, and what is told when there is none."""

import os
import shutil
import sqlite3
import subprocess
import sys
import textwrap
from collections.abc import Sequence
from contextlib import closing
from pathlib import Path

import pytest
import trio

from bamboo.core.events import AgentToken, Event, SessionClosed
from bamboo.core.types import Cursor, RunId, RunStatus, SessionId
from bamboo.store.base import Commit
from bamboo.store.sqlite.backup import BackupError, TargetError, back_up
from bamboo.store.sqlite.files import connect, wal_path
from bamboo.store.sqlite.schema import MIGRATIONS
from bamboo.store.sqlite.store import SqliteStore
from tests.support.server import process_environment
from tests.support.store_stands import COMPLETE, STARTED, Author, Clock, all_events, opened, said

ONE, TWO = SessionId("one"), SessionId("two")
MIB = 1024 * 1024


@pytest.fixture
def path(tmp_path: Path) -> Path:
    directory = tmp_path / "data"
    directory.mkdir()
    return directory / "bamboo #1%?.db"  # a name that a URI has to quote


@pytest.fixture
def target(tmp_path: Path) -> Path:
    directory = tmp_path / "backups"
    directory.mkdir()
    return directory / "copy #1%?.db"


async def write_two_sessions(store: SqliteStore) -> None:
    """One with a finished run, a key and two epochs, and one with a run in the middle and a queued one."""
    for new_epoch in (False, True):
        async with store.own(ONE, new_epoch=new_epoch) as log:
            run_id = f"one-{log.first_seq}"
            await Author(log, Clock()).accept(
                run_id, STARTED, AgentToken("hello"), said("hello", f"{run_id}-m"), key=run_id
            )
            await Author(log, Clock()).write(run_id, COMPLETE)
    async with store.own(TWO) as log:
        author = Author(log, Clock())
        await author.accept("running", STARTED, AgentToken("hal"))
        await author.accept("queued", key="queued")


async def make(path: Path, target: Path, *, force: bool = False) -> int:
    return await trio.to_thread.run_sync(lambda: back_up(path, target, force=force))


def told(events: Sequence[Event]) -> list[object]:
    return [(event.seq, event.time_ms, event.run_id, event.body) for event in events]


def put(path: Path, data: bytes) -> None:
    path.write_bytes(data)


def content(path: Path) -> bytes:
    return path.read_bytes()


def stat(path: Path) -> os.stat_result:
    return path.stat()


def contents(directory: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in directory.iterdir()}


# What is in it


async def test_copy_has_everything_and_one_new_epoch_for_each_session(path: Path, target: Path) -> None:
    async with opened(path) as store:
        await write_two_sessions(store)
        size = await make(path, target)
        events = {name: await all_events(store, name) for name in (ONE, TWO)}
        messages = {name: await store.messages(name) for name in (ONE, TWO)}
        old = {start.epoch for name in (ONE, TWO) for start in (await store.extent(name)).epochs}  # type: ignore[union-attr]
    assert size == stat(target).st_size
    assert os.listdir(target.parent) == [target.name]
    new = set()
    async with opened(target) as copy:
        for name in (ONE, TWO):
            extent = await copy.extent(name)
            assert extent is not None
            [start] = extent.epochs
            assert start.first_seq == 1
            new.add(start.epoch)
            assert told(await all_events(copy, name)) == told(events[name])
            assert await copy.messages(name) == messages[name]
            for run in await copy.runs(name, limit=9):
                first = next(event for event in events[name] if event.run_id == run.run_id)
                assert run.first_cursor == Cursor(start.epoch, first.seq - 1)
        for key, run_id in (("one-1", "one-1"), ("queued", "queued")):
            holder = await copy.key_holder(key, Clock().now_ms)
            assert holder is not None
            assert holder.run.run_id == run_id
        assert await copy.unfinished_sessions() == [TWO]
    assert len(new | old) == 5


async def test_starts_from_one_backup_never_share_an_epoch_that_grows(path: Path, target: Path, tmp_path: Path) -> None:
    async with opened(path) as store:
        await write_two_sessions(store)
        await store.mark_clean()
    await make(path, target)  # of a database that was cleanly stopped
    grown = []
    for name in ("first.db", "second.db"):
        shutil.copy(target, tmp_path / name)
        for _ in range(2):  # started, cleanly stopped, started again before the session is used
            async with opened(tmp_path / name) as store:
                await store.mark_clean()
        async with opened(tmp_path / name) as store, store.own(ONE) as log:
            extent = await store.extent(ONE)
            assert extent is not None
            assert [start.first_seq for start in extent.epochs] == [1, log.head + 1]
            grown.append([start.epoch for start in extent.epochs])
    assert grown[0][0] == grown[1][0]  # it ends where the backup ends
    assert len({epoch for epochs in grown for epoch in epochs}) == 3


async def test_backup_of_a_database_whose_process_died_has_what_is_in_the_write_ahead_log(
    path: Path, target: Path, tmp_path: Path
) -> None:
    dead = tmp_path / "dead" / "bamboo.db"
    dead.parent.mkdir()
    async with opened(path) as store:
        await store._writer.fold()
        await write_two_sessions(store)
        assert wal_path(path).stat().st_size > 0
        shutil.copy(path, dead)
        shutil.copy(wal_path(path), wal_path(dead))
    before = contents(dead.parent)
    await make(dead, target)
    assert before.items() <= contents(dead.parent).items()
    async with opened(target) as copy:
        run = await copy.run(RunId("running"))
        assert run is not None
        assert run.status is RunStatus.RUNNING


async def test_backup_has_neither_free_pages_nor_what_was_deleted(path: Path, target: Path) -> None:
    async with opened(path) as store:
        await write_two_sessions(store)
        async with store.own(SessionId("big")) as log:
            author = Author(log, Clock())
            await author.accept("big", STARTED, said("hunter2 " * MIB, "m"), COMPLETE)
            await log.commit(Commit(author.events(None, SessionClosed()), delete=True))
        while await store.erase(limit=100):
            pass
        assert await make(path, target) < MIB < stat(path).st_size
    assert b"hunter2" not in content(target)


async def test_erasing_that_was_under_way_is_finished_in_the_copy(path: Path, target: Path) -> None:
    async with opened(path) as store:
        await write_two_sessions(store)
        async with store.own(ONE) as log:
            await log.commit(Commit(Author(log, Clock()).events(None, SessionClosed()), delete=True))
        await make(path, target)
    async with opened(target) as copy:
        assert await copy.session(ONE) is None
        assert await copy.erase(limit=100) > 0
        while await copy.erase(limit=100):
            pass
        assert len(await all_events(copy, TWO)) == 4


async def test_backup_of_an_old_version_stays_of_that_version(tmp_path: Path, target: Path) -> None:
    old = tmp_path / "old.db"
    with closing(sqlite3.connect(old)) as connection:
        connection.executescript((Path(__file__).with_name("schema_1.sql")).read_text(encoding="utf-8"))
    await make(old, target)
    with closing(sqlite3.connect(target)) as connection:
        assert connection.execute("PRAGMA user_version").fetchone() == (1,)
        assert connection.execute("SELECT count(*), count(DISTINCT epoch), max(first_seq) FROM epochs").fetchone() == (
            3,
            3,
            1,
        )
    async with opened(target) as copy:
        run = await copy.run(RunId("r3"))
        extent = await copy.extent(TWO)
        assert run is not None
        assert extent is not None
        assert run.first_cursor == Cursor(extent.epochs[0].epoch, 0)


async def test_commits_go_through_while_a_backup_is_made(path: Path, target: Path) -> None:
    """The copy is of one moment, and the server is none the wiser."""
    async with opened(path) as store, store.own(ONE) as log:
        author = Author(log, Clock())
        await author.start("r")
        done = trio.Event()

        async def back_up_often() -> None:
            for index in range(5):
                await make(path, target.with_name(f"{index}.db"))
            done.set()

        async with trio.open_nursery() as nursery:
            nursery.start_soon(back_up_often)
            while not done.is_set():
                await author.write("r", AgentToken("a"), AgentToken("b"))
        head = log.head
    heads = []
    for index in range(5):
        async with opened(target.with_name(f"{index}.db")) as copy:
            events = await all_events(copy, ONE)
            assert [event.seq for event in events] == list(range(1, len(events) + 1))
            heads.append(len(events))
    assert heads == sorted(heads)
    assert heads[-1] <= head
    assert {heads_of % 2 for heads_of in heads} == {0}


# The file


async def test_copy_is_nobody_elses(path: Path, target: Path) -> None:
    async with opened(path) as store:
        await write_two_sessions(store)
    before = os.umask(0)
    try:
        await make(path, target)
        assert stat(target).st_mode & 0o777 == 0o600
        os.chmod(target, 0o640)
        await make(path, target, force=True)
        assert stat(target).st_mode & 0o777 == 0o600
    finally:
        os.umask(before)


async def test_file_that_is_there_is_replaced_only_by_force(path: Path, target: Path) -> None:
    async with opened(path) as store:
        await write_two_sessions(store)
    put(target, b"precious")
    with pytest.raises(TargetError, match="--force"):
        await make(path, target)
    assert contents(target.parent) == {target.name: b"precious"}
    await make(path, target, force=True)
    async with opened(target) as copy:
        assert await copy.session(ONE) is not None
    link = target.with_name("link.db")
    link.symlink_to(target.with_name("nowhere.db"))
    with pytest.raises(TargetError, match="is there already"):
        await make(path, link)


async def test_database_itself_is_not_replaced_by_its_backup(path: Path, tmp_path: Path) -> None:
    link = tmp_path / "link.db"
    link.symlink_to(path)
    async with opened(path) as store:
        await write_two_sessions(store)
        before = stat(path).st_ino
        own = [path, link, wal_path(path), path.with_name(f"{path.name}-shm"), path.with_name(f"{path.name}.lock")]
        for name in own:
            with pytest.raises(TargetError, match="own file"):
                await make(path, name, force=True)
        with pytest.raises(TargetError, match="own file"):
            await make(link, path, force=True)
    assert stat(path).st_ino == before


@pytest.mark.parametrize("force", [False, True])
async def test_place_that_is_none_is_refused(path: Path, target: Path, *, force: bool) -> None:
    async with opened(path):
        pass
    with pytest.raises(TargetError, match="is a directory"):
        await make(path, target.parent, force=force)
    with pytest.raises(TargetError, match="no directory"):
        await make(path, target.parent / "missing" / "copy.db", force=force)
    assert os.listdir(target.parent) == []


# No backup


def damage(path: Path) -> None:
    """Overwrite pages in the middle."""
    with open(path, "r+b") as file:
        file.seek(path.stat().st_size // 2 // 4096 * 4096)
        file.write(b"\xff" * 8192)


def put_null(path: Path) -> None:
    """A row that breaks a rule of its table: it can be copied as it is, and only the check finds it."""
    with closing(sqlite3.connect(path)) as connection:
        connection.execute("CREATE TABLE odd (a INTEGER)")
        connection.execute("INSERT INTO odd VALUES (NULL)")
        connection.execute("PRAGMA writable_schema = ON")
        connection.execute("UPDATE sqlite_master SET sql = 'CREATE TABLE odd (a INTEGER NOT NULL)' WHERE name = 'odd'")
        connection.commit()


async def failure(path: Path, target: Path) -> str:
    """What is told; the file that was to be replaced is as it was, and nothing lies beside it."""
    put(target, b"precious")
    with pytest.raises(BackupError) as failed:
        await make(path, target, force=True)
    assert contents(target.parent) == {target.name: b"precious"}
    assert "\n" not in str(failed.value)
    return str(failed.value)


async def test_database_that_is_damaged_gives_no_backup(path: Path, target: Path) -> None:
    async with opened(path) as store:
        for index in range(50):
            async with store.own(SessionId(f"s{index}")) as log:
                await Author(log, Clock()).accept(f"r{index}", STARTED, said("x" * 1000, f"m{index}"), COMPLETE)
    whole = content(path)
    damage(path)
    assert "SQLITE_CORRUPT" in await failure(path, target)
    put(path, whole)
    put_null(path)
    assert "quick_check" in await failure(path, target)


async def test_what_is_no_database_of_ours_gives_no_backup(path: Path, target: Path) -> None:
    assert "there is no database" in await failure(path, target)
    assert os.listdir(path.parent) == []
    assert "no directory" in await failure(path.parent / "missing" / "bamboo.db", target)
    assert "is a directory" in await failure(path.parent, target)
    put(path, b"")
    assert "is empty" in await failure(path, target)
    put(path, b"Dear diary, " * 1000)
    assert "NOTADB" in await failure(path, target)
    os.unlink(path)
    with closing(sqlite3.connect(path)) as other:
        other.execute("CREATE TABLE bookmarks (url TEXT)")
    assert "another program" in await failure(path, target)
    os.unlink(path)
    async with opened(path):
        pass
    with closing(connect(path)) as newer:
        newer.execute(f"PRAGMA user_version = {len(MIGRATIONS) + 1}")
    assert "newer version" in await failure(path, target)


# The command


def run(directory: Path, *arguments: str, limit_bytes: int | None = None) -> "subprocess.CompletedProcess[str]":
    code = textwrap.dedent("""
        import resource, sys
        from bamboo.cli import main
        if sys.argv[1] != "-":
            resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[1]), resource.RLIM_INFINITY))
        main(sys.argv[2:])
    """)
    command = [sys.executable, "-c", code, "-" if limit_bytes is None else str(limit_bytes), *arguments]
    environment = process_environment(directory)
    return subprocess.run(
        command, cwd=directory, env=environment, capture_output=True, text=True, timeout=60, check=False
    )


async def test_command_says_what_it_did_or_why_not(tmp_path: Path) -> None:
    missing = run(tmp_path, "backup", "copy.db")
    async with opened(tmp_path / "bamboo.db") as store:
        await write_two_sessions(store)
        done = run(tmp_path, "backup", "copy.db")  # while the server has it
    again = run(tmp_path, "backup", "copy.db")
    forced = run(tmp_path, "backup", "--force", "copy.db")
    nowhere = run(tmp_path, "backup", "missing/copy.db")
    unnamed = run(tmp_path, "backup")
    (tmp_path / "other.toml").write_text("[storage]\npaht = 1\n")
    badly = run(tmp_path, "backup", "--config", "other.toml", "copy2.db")
    full = run(tmp_path, "backup", "full.db", limit_bytes=8192)

    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout == f"copy.db: {(tmp_path / 'copy.db').stat().st_size} bytes, checked\n"
    assert (forced.returncode, forced.stderr) == (0, "")
    assert [process.returncode for process in (missing, full)] == [1, 1]
    assert [process.returncode for process in (again, nowhere, unnamed, badly)] == [2, 2, 2, 2]
    for process in (missing, again, nowhere, badly, full):
        assert process.stdout == ""
        [line] = process.stderr.splitlines()
        assert line.startswith("bamboo: ")
    assert "storage.path: there is no database" in missing.stderr
    assert "--force" in again.stderr
    assert "storage.paht" in badly.stderr
    assert sorted(name for name in os.listdir(tmp_path) if "copy" in name or "full" in name) == ["copy.db"]
