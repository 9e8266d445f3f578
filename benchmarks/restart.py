"""How long a start takes until the server is ready, and its cost: with nothing, with many sessions, after a crash."""

import contextlib
import datetime as dt
import http.client
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from threading import Event, Thread
from typing import IO, Any, Final

import orjson

from benchmarks import restart_store
from benchmarks.harness import BAMBOO, READY_S, STOP_S, BenchmarkError, environment, free_ports, open_upstream
from benchmarks.machine import describe, tree_cpu, tree_rss_bytes
from benchmarks.report import setting_line, table

NAME: Final = "restart"
DEFAULT_RUNS: Final = 5
FILL_S: Final = 300.0
OVER_S: Final = 60.0
"""What the runs that a crash left may take to be over: far more than any server that works needs."""


@dataclass(frozen=True, slots=True)
class Case:
    """What a start finds. `running` and `queued` are runs, each in a session of its own; with them, a server that was
    killed."""

    name: str
    title: str
    sessions: int = 0
    running: int = 0
    queued: int = 0


CASES: Final = (
    Case("empty", "no database"),
    Case("sessions", "10,000 sessions, stopped cleanly", sessions=10_000),
    Case(
        "crashed",
        "10,000 sessions, killed with 100 runs running and 100 queued",
        sessions=10_000,
        running=100,
        queued=100,
    ),
)
QUICK_CASES: Final = (
    Case("empty", "no database"),
    Case("sessions", "20 sessions, stopped cleanly", sessions=20),
    Case("crashed", "20 sessions, killed with 3 runs running and 2 queued", sessions=20, running=3, queued=2),
)


@dataclass(frozen=True, slots=True)
class Plan:
    cases: Sequence[Case]
    runs: int


def run(plan: Plan, say: Callable[[str], None]) -> dict[str, Any]:
    """Measure, and return the result as it is written to JSON. `say` is told each figure as it comes.

    Raises BenchmarkError.
    """
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory(prefix="bamboo-bench-") as name, open_upstream() as upstream:
        left = {case.name: Path(name) / case.name for case in plan.cases}
        for case in plan.cases:
            leave_database(case, left[case.name])
        for turn in range(plan.runs):
            for case in plan.cases:
                row = {"run": turn + 1, "case": case.name, **measure(case, left[case.name], upstream)}
                rows.append(row)
                say(
                    f"run {turn + 1}/{plan.runs}  {case.name:<9} ready after {row['ready_s']:.3f} s, "
                    f"{row['cpu_s']:.3f} s of CPU"
                )
    return {
        "question": NAME,
        "made": dt.datetime.now(dt.UTC).isoformat(timespec="seconds"),
        **describe(),
        "titles": {case.name: case.title for case in plan.cases},
        "summary": summarize(rows),
        "runs": rows,
    }


def leave_database(case: Case, directory: Path) -> None:
    """Make the directory that a server of this case left, with the database as it was on the disk when it ended."""
    directory.mkdir()
    if not case.sessions:
        return
    numbers = map(str, (case.sessions, case.running, case.queued))
    command = [sys.executable, "-m", "benchmarks.restart_store", str(directory / "bamboo.db"), *numbers]
    with subprocess.Popen(command, env=environment(), stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        try:
            if case.running + case.queued and process.stdout.readline() == b"crash\n":
                process.kill()
            status = process.wait(FILL_S)
        except subprocess.TimeoutExpired as error:
            raise BenchmarkError(f"the database of {case.name} was not made within {FILL_S:.0f} s") from error
        finally:
            process.kill()
    if status != (-signal.SIGKILL if case.running + case.queued else 0):
        raise BenchmarkError(f"the database of {case.name} was not made (status {status})")


def measure(case: Case, left: Path, upstream: str) -> dict[str, float]:
    """Start a server on a copy of what was left, once. Raises BenchmarkError if it does not do what is due."""
    try:
        return _measure(case, left, upstream)
    except (OSError, http.client.HTTPException, subprocess.TimeoutExpired) as error:
        raise BenchmarkError(f"{case.name}: {error!r}") from error


def _measure(case: Case, left: Path, upstream: str) -> dict[str, float]:
    with tempfile.TemporaryDirectory(prefix="bamboo-bench-") as name:
        directory = Path(name)
        shutil.copytree(left, directory, dirs_exist_ok=True)
        (port, gateway), bytes_left = free_ports(2), _sizes(directory)
        begun = time.monotonic()
        with _server(BAMBOO.command(directory, port, gateway, upstream)) as (process, listening):
            listening_s = listening.wait() - begun
            with contextlib.closing(http.client.HTTPConnection("127.0.0.1", port, timeout=READY_S)) as client:
                _get(client, "/readyz")
                ready_s = time.monotonic() - begun
                used = tree_cpu(process.pid)
                rss = tree_rss_bytes(process.pid)
                _wait_over(case, client)
            over_s = time.monotonic() - begun
            process.send_signal(signal.SIGTERM)
            if process.wait(STOP_S) != 0:
                raise BenchmarkError(f"{case.name}: stopped with status {process.returncode}")
    return {
        "listening_s": round(listening_s, 4),
        "ready_s": round(ready_s, 4),
        "cpu_s": round(used.total_s, 4),
        "over_s": round(over_s, 4),
        "rss_mib": round(rss / 2**20, 1),
        **bytes_left,
    }


def _sizes(directory: Path) -> dict[str, float]:
    files = {"database_mib": directory / "bamboo.db", "wal_mib": directory / "bamboo.db-wal"}
    return {name: round(path.stat().st_size / 2**20, 1) if path.exists() else 0.0 for name, path in files.items()}


class Listening:
    """Hears a server's log to its end, in a thread of its own, and knows when it said that it listens."""

    def __init__(self, lines: IO[bytes]) -> None:
        self._lines = lines
        self._last: list[bytes] = []
        self._at: float | None = None
        self._known = Event()
        self._thread = Thread(target=self._hear, daemon=True)
        self._thread.start()

    def wait(self) -> float:
        """When it was, on the monotonic clock. Raises BenchmarkError if the server ended before."""
        self._known.wait(READY_S)
        if self._at is None:
            raise BenchmarkError(f"the server did not listen:\n{b''.join(self._last).decode(errors='replace')}")
        return self._at

    def join(self) -> None:
        self._thread.join()

    def _hear(self) -> None:
        for line in self._lines:
            self._last = [*self._last[-20:], line]
            if self._at is None and b'"event": "listening"' in line:
                self._at = time.monotonic()
                self._known.set()
        self._known.set()


@contextlib.contextmanager
def _server(command: Sequence[str]) -> Iterator[tuple[subprocess.Popen[bytes], Listening]]:
    with subprocess.Popen(command, env=environment(), stdin=subprocess.DEVNULL, stderr=subprocess.PIPE) as process:
        assert process.stderr is not None
        listening = Listening(process.stderr)
        try:
            yield process, listening
        finally:
            process.kill()
            listening.join()


def _get(client: http.client.HTTPConnection, target: str) -> Any:
    client.request("GET", target)
    answer = client.getresponse()
    body = answer.read()
    if answer.status != 200:
        raise BenchmarkError(f"{target}: status {answer.status}, {body.decode(errors='replace')}")
    return orjson.loads(body)


def _wait_over(case: Case, client: http.client.HTTPConnection) -> None:
    """Return when the runs that were left are over. Raises BenchmarkError unless each ended as it must."""
    deadline = time.monotonic() + OVER_S
    for session in range(case.running + case.queued):
        due = "interrupted" if session < case.running else "completed"
        while True:
            status = _get(client, f"/api/v1/runs/{restart_store.run_id(session, restart_store.RUNS)}")["status"]
            if status == due:
                break
            if status not in ("queued", "running") or time.monotonic() > deadline:
                raise BenchmarkError(f"{case.name}: the run of session {session} is {status}, not {due}")
            time.sleep(0.02)


def summarize(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Per case: min, median and max over the runs."""
    summary = []
    for case in dict.fromkeys(row["case"] for row in rows):
        mine = [row for row in rows if row["case"] == case]
        figures = [name for name in mine[0] if name not in ("run", "case")]
        summary.append({"case": case, **{name: _spread([row[name] for row in mine]) for name in figures}})
    return summary


def _spread(values: Sequence[float]) -> dict[str, float]:
    return {"min": min(values), "median": round(statistics.median(values), 4), "max": max(values)}


def render(result: dict[str, Any]) -> str:
    """The README's section."""
    head = [
        "what the start finds", "ready after, s: median", "min to max", "listening after, s", "CPU until ready, s",
        "all runs over after, s", "MiB", "database and log, MiB",
    ]  # fmt: skip
    rows = []
    for entry in result["summary"]:
        ready = entry["ready_s"]
        rows.append(
            [
                result["titles"][entry["case"]],
                f"{ready['median']:.2f}",
                f"{ready['min']:.2f} to {ready['max']:.2f}",
                f"{entry['listening_s']['median']:.2f}",
                f"{entry['cpu_s']['median']:.2f}",
                f"{entry['over_s']['median']:.2f}",
                f"{entry['rss_mib']['median']:.0f}",
                f"{entry['database_mib']['median']:.0f} + {entry['wal_mib']['median']:.0f}",
            ]
        )
    runs = max(row["run"] for row in result["runs"])
    times = "once" if runs == 1 else f"{runs} times"
    return f"Each measured {times}. The target is 1 s.\n\n{table(head, rows)}\n\n{setting_line(result)}"
