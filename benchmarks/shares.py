"""Where Bamboo's time goes: shares of the server's CPU, by part and by library, from samples of its main thread.

A sample is the stack that the main thread had when it had used a bit more CPU (`sampler.py`), and counts twice: for the
innermost part of Bamboo on the stack, with all that this part called, and for the library whose code ran (what C code
and the kernel did counts for the Python function that called them). cProfile would not do: it slows every call, and so
makes small functions look dear.
"""

import datetime as dt
import os
import signal
import statistics
import sys
import sysconfig
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Final

import orjson

from benchmarks.harness import (
    BAMBOO,
    TRANSPORTS,
    BenchmarkError,
    RunningServer,
    ServerKind,
    Transport,
    measure,
    open_server,
    open_upstream,
)
from benchmarks.load import WARM_UP, Load
from benchmarks.machine import describe
from benchmarks.report import setting_line, table

NAME: Final = "shares"
SAMPLE_S: Final = 20.0
QUICK_SAMPLE_S: Final = 1.0
WRITTEN_S: Final = 10.0
COST_RUNS: Final = 3
HOTTEST: Final = 40
LEAST_SHARE: Final = 0.005
"""Less than this is in `everything else`."""

_H11: Final = "h11, under hypercorn and httpcore"

# What a package is called in the tables; packages that only pass calls on count for their caller.
_LIBRARIES: Final = {
    "hypercorn": "hypercorn",
    "h11": _H11,
    "quart": "quart and quart-trio",
    "quart_trio": "quart and quart-trio",
    "werkzeug": "quart and quart-trio",
    "flask": "quart and quart-trio",
    "httpx": "httpx and httpcore",
    "httpcore": "httpx and httpcore",
    "trio_websocket": "trio-websocket and wsproto",
    "wsproto": "trio-websocket and wsproto",
    "structlog": "structlog",
    "pydantic": "pydantic",
    "pydantic_settings": "pydantic",
}
_TRIO: Final = {
    "_core/_io_epoll.py": "trio: waiting for I/O",
    "_core/_io_kqueue.py": "trio: waiting for I/O",
    "_socket.py": "trio: sockets, with the kernel's part",
    "_highlevel_socket.py": "trio: sockets, with the kernel's part",
    "_channel.py": "trio: channels",
    "_threads.py": "trio: threads",
    "_core/_thread_cache.py": "trio: threads",
}
_PARTS: Final = {
    "web": "web: HTTP and SSE",
    "gateway": "gateway: WebSocket",
    "llm": "llm: reading the provider",
    "agent": "agent and core: the run",
    "core": "agent and core: the run",
    "tools": "agent and core: the run",
    "store": "store, on the loop",
    "bus": "bus",
    "wire": "wire: encoding",
    "server.py": "server",
    "log.py": "log",
}
_THREADS: Final = "other threads (the store's)"
_STDLIB: Final = sysconfig.get_path("stdlib")
_ELSE: Final = "everything else"


Frame = tuple[str, str]
"""(path of the file, function)."""


@dataclass(frozen=True, slots=True)
class Place:
    """Where code lives: its package ("" for the standard library and what is no package) and the path inside of it."""

    package: str
    inside: str


def place(path: str) -> Place:
    """Of the code in a file."""
    for mark in ("/site-packages/", "/dist-packages/"):
        _, found, rest = path.rpartition(mark)
        if found:
            package, _, inside = rest.partition("/")
            return Place(package.removesuffix(".py"), inside)
    _, found, inside = path.rpartition("/bamboo/")
    return Place("bamboo", inside) if found and not path.startswith(_STDLIB) else Place("", path)


def library(stack: Sequence[Frame]) -> str:
    """The library whose code a sample was in: of the innermost frame that is one's. `stack` is innermost first."""
    for path, _ in stack:
        found = place(path)
        if found.package == "bamboo":
            return "Bamboo's own code"
        if found.package == "trio":
            return _TRIO.get(found.inside, "trio: tasks and scheduling")
        name = _LIBRARIES.get(found.package)
        if name is not None:
            return name
    return _ELSE


def part(stack: Sequence[Frame]) -> str:
    """The part of Bamboo that a sample was spent for. `stack` is innermost first."""
    other = ""
    for path, _ in stack:
        found = place(path)
        if found.package == "bamboo":
            name = _PARTS.get(found.inside.partition("/")[0])
            if name is not None:
                return name
        elif not other and _LIBRARIES.get(found.package, _H11) != _H11:
            other = _LIBRARIES[found.package]  # h11 is two libraries' parser: the one that called it
    return f"{other}, on its own" if other else "trio's loop, on its own"


@dataclass(frozen=True, slots=True)
class Shares:
    """Of the whole process's CPU, each from 0 to 1, largest first."""

    samples: int
    by_part: Mapping[str, float]
    by_library: Mapping[str, float]
    by_function: Mapping[str, float]
    """`path:function` of the innermost frames, the HOTTEST of them."""


def count(seen: Mapping[str, Any]) -> Shares:
    """The shares of what the sampler has written. Raises BenchmarkError if it has seen nothing."""
    samples = sum(hits for _, hits in seen["stacks"])
    if not samples:
        raise BenchmarkError("not one sample: the server did next to nothing")
    parts: Counter[str] = Counter()
    libraries: Counter[str] = Counter()
    functions: Counter[str] = Counter()
    for frames, hits in seen["stacks"]:
        stack = [(path.replace("\\", "/"), function) for path, function in frames]
        parts[part(stack)] += hits
        libraries[library(stack)] += hits
        functions[_function(stack[0])] += hits
    main = min(1.0, seen["main_s"] / seen["process_s"])

    def shares(hits: Counter[str], others: str | None = None) -> dict[str, float]:
        found = {name: main * number / samples for name, number in hits.most_common(None if others else HOTTEST)}
        if others is not None:
            found[others] = 1 - main
        return {name: round(share, 4) for name, share in sorted(found.items(), key=lambda item: -item[1])}

    return Shares(samples, shares(parts, _THREADS), shares(libraries, _THREADS), shares(functions))


def _function(frame: Frame) -> str:
    path, function = frame
    found = place(path)
    return f"{found.package}/{found.inside}:{function}" if found.package else f"{path.rpartition('/')[2]}:{function}"


@dataclass(frozen=True, slots=True)
class Plan:
    """Each load over each transport is repeated for `sample_s`."""

    loads: Sequence[Load]
    sample_s: float
    transports: Sequence[Transport] = TRANSPORTS
    server: ServerKind = BAMBOO


def run(plan: Plan, say: Callable[[str], None]) -> dict[str, Any]:
    """Sample, and return the result as it is written to JSON. Raises BenchmarkError."""
    if sys.platform != "linux":
        raise BenchmarkError("shares: the sampler needs Linux's CPU timers")
    rows = []
    with tempfile.TemporaryDirectory(prefix="bamboo-shares-") as name, open_upstream() as upstream:
        output = Path(name) / "samples.json"
        with open_server(_under_sampler(plan.server, output), upstream) as server:
            for transport in plan.transports:
                measure(server, transport, WARM_UP)
            for load in plan.loads:
                for transport in plan.transports:
                    row = _sampled(server, transport, load, plan.sample_s, output)
                    rows.append(row)
                    say(
                        f"{load.name} {transport}: {row['samples']} samples, {row['cpu_us_per_token']:.1f} µs per token"
                    )
    return {
        "question": NAME,
        "made": dt.datetime.now(dt.UTC).isoformat(timespec="seconds"),
        **describe(),
        "loads": {load.name: str(load) for load in plan.loads},
        "shares": rows,
    }


def _under_sampler(kind: ServerKind, output: Path) -> ServerKind:
    """The same server with the sampler in it."""

    def command(directory: Path, http_port: int, ws_port: int, upstream: str) -> Sequence[str]:
        interpreter, flag, *rest = kind.command(directory, http_port, ws_port, upstream)
        assert flag == "-m"
        return [interpreter, flag, "benchmarks.sampler", str(output), *rest]

    return replace(kind, command=command)


def _sampled(server: RunningServer, transport: Transport, load: Load, sample_s: float, output: Path) -> dict[str, Any]:
    # What a token costs is measured while no sample is taken.
    cost = statistics.median(measure(server, transport, load).us_per_token(load) for _ in range(COST_RUNS))
    os.kill(server.pid, signal.SIGUSR1)
    until = time.monotonic() + sample_s
    while time.monotonic() < until:
        measure(server, transport, load)
    os.kill(server.pid, signal.SIGUSR2)
    shares = count(orjson.loads(_take(output)))
    return {"load": load.name, "transport": transport, "cpu_us_per_token": round(cost, 2), **asdict(shares)}


def _take(output: Path) -> bytes:
    """What the sampler writes; the file is gone then. Raises BenchmarkError if it does not come."""
    deadline = time.monotonic() + WRITTEN_S
    while not output.exists():
        if time.monotonic() > deadline:
            raise BenchmarkError(f"the sampler has not written {output.name} after {WRITTEN_S:.0f} s")
        time.sleep(0.02)
    data = output.read_bytes()
    output.unlink()
    return data


def render(result: dict[str, Any]) -> str:
    """The README's section: a share, and what it is of a token's microseconds."""
    rows = result["shares"]
    loads = "; ".join(f"**{name}** = {text}" for name, text in result["loads"].items())
    return "\n\n".join(
        [
            f"{loads}. Each cell: share of the samples, and the µs per delivered token that it stands for.",
            _shares_table("part of Bamboo, with what it calls", "by_part", rows),
            _shares_table("library whose code ran", "by_library", rows),
            setting_line(result),
        ]
    )


def _shares_table(title: str, key: str, columns: Sequence[Mapping[str, Any]]) -> str:
    head = [title, *(f"{column['load']} {column['transport'].upper()}" for column in columns)]
    names = sorted(
        {name for column in columns for name in column[key]},
        key=lambda name: -sum(column[key].get(name, 0.0) for column in columns),
    )
    shown = [name for name in names if any(column[key].get(name, 0.0) >= LEAST_SHARE for column in columns)]
    rows = [[name, *(_cell(column, column[key].get(name, 0.0)) for column in columns)] for name in shown]
    rows.append(["µs of CPU per token", *(f"{column['cpu_us_per_token']:.1f}" for column in columns)])
    return table(head, rows)


def _cell(column: Mapping[str, Any], share: float) -> str:
    return f"{share:.0%} ({share * column['cpu_us_per_token']:.1f})"
