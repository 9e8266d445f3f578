"""How a database is opened, and when it is refused."""

import os
import sqlite3
import subprocess
import sys
import textwrap
from functools import partial
from pathlib import Path

import pytest
import trio

from bamboo.core.types import SessionId
from bamboo.errors import StartError
from bamboo.store.sqlite.files import connect
from bamboo.store.sqlite.schema import APPLICATION_ID, MIGRATIONS
from tests.support.store_stands import Author, Clock, all_events, opened

ONE = SessionId("one")


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "bamboo #1%?.db"  # a name that a URI has to quote


def put(path: Path, data: bytes) -> None:
    path.write_bytes(data)


def content(path: Path) -> bytes:
    return path.read_bytes()


async def start_error(path: Path) -> str:
    with pytest.raises(StartError) as refused:
        async with opened(path):
            pass
    assert "\n" not in str(refused.value)
    assert "storage.path" in str(refused.value)
    return str(refused.value)


async def test_second_store_on_one_database_is_refused(path: Path, tmp_path: Path) -> None:
    link = tmp_path / "link.db"
    link.symlink_to(path)
    async with opened(path) as store:
        for name in (path, link):
            error = await start_error(name)
            assert "another process" in error
            assert str(path) in error
            assert str(os.getpid()) in error
        async with store.own(ONE) as log:  # and the first one is none the worse
            await Author(log, Clock()).start("r")
    async with opened(link) as store:
        assert len(await all_events(store, ONE)) == 2


async def test_missing_directory_is_not_made(tmp_path: Path) -> None:
    error = await start_error(tmp_path / "missing" / "bamboo.db")
    assert "no directory" in error
    assert os.listdir(tmp_path) == []


async def test_directory_in_the_place_of_the_database_is_refused(tmp_path: Path) -> None:
    assert "is a directory" in await start_error(tmp_path)


@pytest.mark.skipif(not Path("/proc/self").exists(), reason="needs a directory where even root may not write")
async def test_place_where_nothing_can_be_written_is_refused() -> None:
    assert "cannot write" in await start_error(Path("/proc/self/bamboo.db"))


async def test_file_that_is_no_database_is_refused_and_left_alone(path: Path) -> None:
    put(path, b"Dear diary, " * 1000)
    assert "is not a database" in await start_error(path)
    assert content(path) == b"Dear diary, " * 1000
    put(path, b"")  # an empty file is a database with nothing in it
    async with opened(path):
        pass


async def test_database_of_another_program_is_refused_and_left_alone(path: Path) -> None:
    other = sqlite3.connect(path)
    other.execute("CREATE TABLE bookmarks (url TEXT)")
    other.commit()
    other.close()
    before = content(path)
    assert "another program" in await start_error(path)
    assert content(path) == before


async def test_database_of_a_newer_version_is_refused(path: Path) -> None:
    async with opened(path):
        pass
    newer = connect(path)
    newer.execute(f"PRAGMA user_version = {len(MIGRATIONS) + 1}")
    newer.close()
    assert "newer version" in await start_error(path)


async def test_new_database_has_all_migrations_and_says_whose_it_is(path: Path) -> None:
    async with opened(path):
        look = connect(path, read_only=True)
        assert look.execute("PRAGMA user_version").fetchone() == (len(MIGRATIONS),)
        assert look.execute("PRAGMA application_id").fetchone() == (APPLICATION_ID,)
        assert look.execute("PRAGMA journal_mode").fetchone() == ("wal",)
        with pytest.raises(sqlite3.OperationalError):
            look.execute("DELETE FROM events")
        look.close()


async def test_files_of_a_new_database_are_nobody_elses(path: Path, tmp_path: Path) -> None:
    async with opened(path) as store, store.own(ONE) as log:
        await Author(log, Clock()).start("r")
        modes = {name: os.stat(tmp_path / name).st_mode & 0o777 for name in os.listdir(tmp_path)}
    assert len(modes) == 4  # the database, its write-ahead log, its shared memory, its lock
    assert set(modes.values()) == {0o600}


async def test_clean_mark_is_taken_away_by_the_next_start(path: Path) -> None:
    def mark() -> tuple[int, int]:
        look = connect(path, read_only=True)
        found: tuple[int, int] = look.execute("SELECT generation, clean FROM meta").fetchone()
        look.close()
        return found

    async with opened(path) as store:
        assert mark() == (0, 0)
        await store.mark_clean()
        assert mark() == (0, 1)
    async with opened(path):
        assert mark() == (0, 0)
    async with opened(path):
        assert mark() == (1, 0)


async def test_store_that_could_not_start_leaves_the_lock_free(path: Path) -> None:
    put(path, b"no database at all" * 100)
    await start_error(path)
    put(path, b"")
    async with opened(path):
        pass


async def test_lock_of_another_process_is_respected_and_gone_with_it(path: Path) -> None:
    holder = """
        import fcntl, os, sys
        fd = os.open(sys.argv[1] + ".lock", os.O_RDWR | os.O_CREAT)
        fcntl.flock(fd, fcntl.LOCK_EX)
        os.write(1, b"locked")
        sys.stdin.read()
    """
    command = [sys.executable, "-c", textwrap.dedent(holder), str(path)]
    with trio.fail_after(30):
        async with trio.open_nursery() as nursery:
            process: trio.Process = await nursery.start(
                partial(trio.run_process, command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, check=False)
            )
            assert process.stdout is not None
            assert await process.stdout.receive_some() == b"locked"
            assert "another process" in await start_error(path)
            process.kill()
    async with opened(path):
        pass
