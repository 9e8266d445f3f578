"""What readers that have stopped reading cost: the run's CPU per token, the readers that read, the server's memory."""

import asyncio
import contextlib
import datetime as dt
import socket
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Final

import orjson
import uvloop

from benchmarks.calls import HOST, HttpConnection, WsConnection, upgrade
from benchmarks.client import ChatRecord, DeliveryError
from benchmarks.client_ws import client_frame
from benchmarks.harness import BAMBOO, BenchmarkError, RunningServer, measure, open_server, open_upstream, settle
from benchmarks.load import WARM_UP, Load
from benchmarks.machine import describe, tree_cpu, tree_rss_bytes
from benchmarks.report import setting_line, table

NAME: Final = "slow_readers"
DEFAULT_RUNS: Final = 3
SESSION: Final = "talk"
TALK: Final = Load("talk", chats=1, tokens=50_000, delay_s=0)
COUNTS: Final = (0, 10, 50, 100)
RECEIVE_BUFFER_BYTES: Final = 4096
"""Of a stopped reader's socket: little is on its way to it, and the server feels it at once."""
ANSWER_S: Final = 10.0


@dataclass(frozen=True, slots=True)
class Plan:
    """A run of this load for each number of stopped readers, every one on a server of its own, `runs` times."""

    load: Load
    counts: Sequence[int]
    runs: int


QUICK_PLAN: Final = Plan(Load("talk", chats=1, tokens=500, delay_s=0), counts=(0, 2), runs=1)


def plan(runs: int) -> Plan:
    return Plan(TALK, COUNTS, runs)


def run(plan: Plan, say: Callable[[str], None]) -> dict[str, Any]:
    """Measure, and return the result as it is written to JSON. `say` is told each figure as it comes.

    Raises BenchmarkError.
    """
    rows: list[dict[str, Any]] = []
    with open_upstream() as upstream:
        for turn in range(plan.runs):
            for count in plan.counts:
                with open_server(BAMBOO, upstream) as server:
                    measure(server, "sse", WARM_UP)
                    row = {"run": turn + 1, "stopped": count, **measure_talk(server, plan.load, count)}
                rows.append(row)
                say(
                    f"run {turn + 1}/{plan.runs}  {count:>3} stopped readers: {row['cpu_us_per_token']:.1f} µs per "
                    f"token, the others done after {row['fast_s']:.2f} s, {row['rss_mib']:.1f} MiB"
                )
    return {
        "question": NAME,
        "made": dt.datetime.now(dt.UTC).isoformat(timespec="seconds"),
        **describe(),
        "load": str(plan.load),
        "summary": summarize(rows),
        "runs": rows,
    }


def measure_talk(server: RunningServer, load: Load, count: int) -> dict[str, float]:
    """A run that two readers follow, one over each transport, while `count` others have stopped reading; then two of
    these read on, and must get all of it. Raises BenchmarkError."""
    with contextlib.ExitStack() as stack:
        try:
            after = uvloop.run(_begin(server, f"bench-1-{load.delay_s:g}"))
            for number in range(count):
                follow = _follow_over_ws if number % 2 else _follow_over_sse
                stopped = stack.enter_context(follow(server, after))
                if number < 2:
                    stack.callback(read_on, stopped, load)
            before = tree_cpu(server.pid)
            fast_s = uvloop.run(_talk(server, load, after))
            settle(server.pid)
            used = tree_cpu(server.pid) - before
            rss = tree_rss_bytes(server.pid)
            stack.close()
        except (DeliveryError, OSError, EOFError, TimeoutError) as error:
            raise BenchmarkError(f"{count} stopped readers: {error!r}") from error
    return {
        "cpu_us_per_token": round(used.total_s / load.tokens * 1e6, 2),
        "fast_s": round(fast_s, 3),
        "rss_mib": round(rss / 2**20, 2),
    }


async def _begin(server: RunningServer, model: str) -> str:
    """Make the session, with a run of one token. The cursor behind it."""
    async with asyncio.timeout(ANSWER_S):
        connection = await HttpConnection.open(server.ports["sse"])
        chat = {"message": "Hello.", "session_id": SESSION, "model": model}
        await connection.open_stream("POST", "/api/v1/chat", chat)
        events = [event async for event in connection.events()]
        connection.close()
    return str(orjson.loads(events[-1])["cursor"])


async def _talk(server: RunningServer, load: Load, after: str) -> float:
    """Begin the run and follow it to its end, over both transports. How long that took, in seconds."""
    http = await HttpConnection.open(server.ports["sse"])
    ws = await WsConnection.open(server.ports["ws"], session_id=SESSION, after=after)
    control = await HttpConnection.open(server.ports["sse"])
    await http.open_stream("GET", f"/api/v1/stream/{SESSION}?after={after}")

    async def over_sse() -> None:
        record = ChatRecord(load.tokens)
        async for event in http.events():
            record.feed(event, time.monotonic())
            if record.complete:
                return

    async def over_ws() -> None:
        record = ChatRecord(load.tokens)
        while not record.complete:
            record.feed(await ws.receive(), time.monotonic())

    async with asyncio.timeout(load.deadline_s):
        begun = time.monotonic()
        chat = {"message": "Tell me a story.", "session_id": SESSION, "model": load.model}
        await control.call("POST", "/api/v1/chat", chat)
        await asyncio.gather(over_sse(), over_ws())
        took_s = time.monotonic() - begun
    for connection in (http, ws, control):
        connection.close()
    return took_s


# Readers that read nothing but the answer to their asking.


@contextlib.contextmanager
def _connected(port: int) -> Iterator[socket.socket]:
    with socket.socket() as client:
        client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, RECEIVE_BUFFER_BYTES)
        client.settimeout(ANSWER_S)
        client.connect((HOST, port))
        yield client


@contextlib.contextmanager
def _follow_over_sse(server: RunningServer, after: str) -> Iterator[socket.socket]:
    with _connected(server.ports["sse"]) as client:
        client.sendall(f"GET /api/v1/stream/{SESSION}?after={after} HTTP/1.1\r\nHost: {HOST}\r\n\r\n".encode())
        _read_until(client, b"retry: ")
        yield client


@contextlib.contextmanager
def _follow_over_ws(server: RunningServer, after: str) -> Iterator[socket.socket]:
    with _connected(server.ports["ws"]) as client:
        client.sendall(upgrade(server.ports["ws"]))
        _read_until(client, b"\r\n\r\n")
        client.sendall(client_frame(1, orjson.dumps({"type": "connect", "session_id": SESSION, "after": after})))
        _read_until(client, b'"connected"')
        yield client


def _read_until(client: socket.socket, wanted: bytes) -> None:
    data = b""
    while wanted not in data:
        more = client.recv(256)
        if not more:
            raise DeliveryError(f"the server closed the connection after {data[-300:]!r}")
        data += more


def read_on(client: socket.socket, load: Load) -> None:
    """Read to the run's end. Raises DeliveryError if a token is missing."""
    client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1 << 20)
    tokens, window = 0, b""
    while b'"agent_complete"' not in window:
        tail = window[-64:]  # a name may come in two pieces
        data = client.recv(1 << 16)
        if not data:
            raise DeliveryError(f"cut after {tokens} of {load.tokens} tokens")
        window = tail + data
        tokens += window.count(_TOKEN) - tail.count(_TOKEN)
    if tokens != load.tokens:
        raise DeliveryError(f"{tokens} of {load.tokens} tokens came to a reader that had stopped")


_TOKEN: Final = b'"type":"agent_token"'


def summarize(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Per number of stopped readers: min, median and max over the runs. What one of them costs is taken in each run,
    beside that run's without them."""
    alone = {row["run"]: row for row in rows if row["stopped"] == 0}
    summary = []
    for count in dict.fromkeys(row["stopped"] for row in rows):
        mine = [row for row in rows if row["stopped"] == count]
        entry: dict[str, Any] = {"stopped": count}
        for figure, digits in (("cpu_us_per_token", 1), ("fast_s", 2), ("rss_mib", 1)):
            entry[figure] = _spread([row[figure] for row in mine], digits)
        entry["kib_per_stopped"] = None
        if count and alone:
            kib = [(row["rss_mib"] - alone[row["run"]]["rss_mib"]) * 1024 / count for row in mine]
            entry["kib_per_stopped"] = _spread(kib, 0)
        summary.append(entry)
    return summary


def _spread(values: Sequence[float], digits: int) -> dict[str, float]:
    ordered = sorted(values)
    return {
        "min": round(ordered[0], digits),
        "median": round(statistics.median(ordered), digits),
        "max": round(ordered[-1], digits),
    }


def render(result: dict[str, Any]) -> str:
    """The README's section."""
    head = [
        "readers that have stopped", "µs CPU per token: median", "min to max", "both others done after, s: median",
        "min to max", "MiB", "KiB per stopped reader",
    ]  # fmt: skip
    rows = []
    for entry in result["summary"]:
        cost, fast, kib = entry["cpu_us_per_token"], entry["fast_s"], entry["kib_per_stopped"]
        rows.append(
            [
                str(entry["stopped"]),
                f"{cost['median']:.1f}",
                f"{cost['min']:.1f} to {cost['max']:.1f}",
                f"{fast['median']:.2f}",
                f"{fast['min']:.2f} to {fast['max']:.2f}",
                f"{entry['rss_mib']['median']:.1f}",
                "" if kib is None else f"{kib['median']:.0f}",
            ]
        )
    runs = max(row["run"] for row in result["runs"])
    times = "once" if runs == 1 else f"{runs} times"
    return f"{result['load']}, measured {times}.\n\n{table(head, rows)}\n\n{setting_line(result)}"
