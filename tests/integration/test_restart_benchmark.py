"""The benchmark of starts works: it makes the databases that it says, and finds out a server that does not recover."""

import sqlite3
import subprocess
import sys
from collections.abc import Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

import orjson
import pytest
import trio

from benchmarks import harness, restart

SMALL = restart.Case("small", "small", sessions=6, running=2, queued=1)
DEADLINE_S = 60


async def test_quick_pass_starts_on_every_database_and_waits_for_the_runs_that_were_left(tmp_path: Path) -> None:
    with trio.fail_after(3 * DEADLINE_S):
        done = await trio.run_process(
            [sys.executable, "-m", "benchmarks", "restart", "--quick", "--out", str(tmp_path)],
            capture_stdout=True,
            capture_stderr=True,
            check=False,
        )
    assert done.returncode == 0, done.stderr.decode()
    result = orjson.loads((tmp_path / "restart.json").read_bytes())
    assert [row["case"] for row in result["runs"]] == [case.name for case in restart.QUICK_CASES]
    for row in result["runs"]:
        assert 0 < row["listening_s"] <= row["ready_s"] <= row["over_s"]
        assert row["cpu_s"] > 0
    assert {"commit", "machine", "python", "versions", "made"} <= result.keys()
    assert restart.render(result) in done.stdout.decode()


async def test_the_database_of_a_crash_is_what_a_killed_server_leaves(tmp_path: Path) -> None:
    with trio.fail_after(DEADLINE_S):
        await trio.to_thread.run_sync(restart.leave_database, SMALL, tmp_path / "left")
    assert (tmp_path / "left" / "bamboo.db-wal").stat().st_size > 0, "what a kill leaves is not folded in"
    with closing(sqlite3.connect(tmp_path / "left" / "bamboo.db")) as database:
        assert database.execute("SELECT count(*) FROM sessions").fetchone() == (6,)
        assert database.execute("SELECT clean FROM meta").fetchone() == (0,)
        finished = database.execute("SELECT finished, count(*) FROM runs GROUP BY finished ORDER BY finished")
        assert finished.fetchall() == [(0, 3), (1, 12)]


async def test_a_server_that_does_not_end_the_runs_as_it_must_is_found_out(tmp_path: Path) -> None:
    """One that was stopped cleanly has no run that was left: the first one asked for is not there."""

    def measure() -> None:
        restart.leave_database(restart.Case("clean", "clean", sessions=2), tmp_path / "left")
        with harness.open_upstream() as upstream:
            restart.measure(SMALL, tmp_path / "left", upstream)

    with trio.fail_after(DEADLINE_S), pytest.raises(harness.BenchmarkError, match="status 404"):
        await trio.to_thread.run_sync(measure)


async def test_a_server_that_ends_before_it_listens_is_reported_with_its_last_words(tmp_path: Path) -> None:
    """Its database is none."""
    (tmp_path / "bamboo.db").write_bytes(b"this is no database" * 1000)
    with trio.fail_after(DEADLINE_S), pytest.raises(harness.BenchmarkError, match="is not a database"):
        await trio.to_thread.run_sync(restart.measure, restart.CASES[0], tmp_path, "http://127.0.0.1:1/v1")


def test_each_case_is_summed_up_by_itself() -> None:
    def row(case: str, ready_s: float) -> dict[str, Any]:
        return {"run": 1, "case": case, "ready_s": ready_s, "cpu_s": 0.5}

    rows: Sequence[dict[str, Any]] = [row("a", 1.0), row("b", 9.0), row("a", 3.0), row("a", 1.5)]
    first, second = restart.summarize(rows)
    assert (first["case"], first["ready_s"]) == ("a", {"min": 1.0, "median": 1.5, "max": 3.0})
    assert (second["case"], second["ready_s"]["median"]) == ("b", 9.0)


def test_a_process_that_says_nothing_more_than_that_it_listens_is_heard_to_its_end() -> None:
    program = """print('{"event": "starting"}'); print('{"event": "listening"}'); print('{"event": "x"}' * 100_000)"""
    with subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        listening = restart.Listening(process.stdout)
        assert listening.wait() > 0
        listening.join()
        assert process.wait(DEADLINE_S) == 0, "it was not held up by a pipe that nobody reads"
