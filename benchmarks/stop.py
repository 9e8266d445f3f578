"""How long a stop takes until its receipt is there, over HTTP and over the gateway, while many runs stream."""

import asyncio
import datetime as dt
import time
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from typing import Any, Final, Protocol

import orjson
import uvloop

from benchmarks.calls import HttpConnection, WsConnection
from benchmarks.client import DeliveryError, percentile
from benchmarks.harness import BAMBOO, TRANSPORTS, BenchmarkError, Transport, measure, open_server, open_upstream
from benchmarks.load import WARM_UP, Load
from benchmarks.machine import describe
from benchmarks.report import setting_line, table

NAME: Final = "stop"
DEFAULT_RUNS: Final = 3
TARGET_MS: Final = 250
STREAMING: Final = Load("streaming", chats=50, tokens=20_000, delay_s=0.02)
"""Each run would take 400 s: none ends by itself."""
STOPS: Final = 200
STOP_S: Final = 60.0
"""What all the stops of one case may take: far more than any server that works needs."""

_LABEL: Final = {"sse": "HTTP", "ws": "WebSocket"}
_PATTERN: Final = {"in turn": "one after the other", "at once": "all runs at once"}


@dataclass(frozen=True, slots=True)
class Plan:
    """So many stops for every way to ask and every pattern; each stopped run is followed by another in its session."""

    load: Load
    stops: int
    runs: int
    transports: Sequence[Transport] = TRANSPORTS


QUICK_PLAN: Final = Plan(Load("streaming", chats=4, tokens=20_000, delay_s=0.02), stops=8, runs=1)


def plan(runs: int, transports: Sequence[Transport] | None = None) -> Plan:
    return Plan(STREAMING, STOPS, runs, transports or TRANSPORTS)


@dataclass(frozen=True, slots=True)
class Stopped:
    """One stop: from asking until the receipt was read, and what the receipt says of it."""

    wall_ms: float
    elapsed_ms: int


class Talk(Protocol):
    """One session with a client that follows it."""

    async def begin(self) -> None:
        """Start a run. Returns when it streams."""

    async def stop(self) -> Stopped:
        """Stop the run, and see its end."""

    def close(self) -> None: ...


class HttpTalk:
    """The chat's answer is the stream; stops go over a connection of their own."""

    def __init__(self, stream: HttpConnection, control: HttpConnection, session_id: str, model: str) -> None:
        self._stream = stream
        self._control = control
        self._session_id = session_id
        self._model = model
        self._run_id = ""
        self._rest: asyncio.Task[bytes] | None = None

    async def begin(self) -> None:
        chat = {"message": "Tell me a story.", "session_id": self._session_id, "model": self._model}
        head = await self._stream.open_stream("POST", "/api/v1/chat", chat)
        self._run_id = head["x-bamboo-run"]
        events = self._stream.events()
        async for event in events:
            if b'"agent_token"' in event:
                break

        async def last() -> bytes:
            return ([event async for event in events] or [b"{}"])[-1]

        self._rest = asyncio.create_task(last())

    async def stop(self) -> Stopped:
        assert self._rest is not None
        begun = time.perf_counter()
        receipt = await self._control.call("POST", f"/api/v1/stop/{self._session_id}", {"run_id": self._run_id})
        wall_s = time.perf_counter() - begun
        return checked(receipt, self._run_id, orjson.loads(await self._rest), wall_s)

    def close(self) -> None:
        if self._rest is not None:
            self._rest.cancel()
        self._stream.close()
        self._control.close()


class WsTalk:
    """Everything over one connection: the stop's receipt comes behind the run's end."""

    def __init__(self, connection: WsConnection, session_id: str, model: str) -> None:
        self._connection = connection
        self._session_id = session_id
        self._model = model
        self._run_id = ""
        self._rest: asyncio.Task[tuple[float, dict[str, Any], dict[str, Any]]] | None = None

    async def begin(self) -> None:
        self._connection.send(type="chat", content="Tell me a story.", session_id=self._session_id, model=self._model)
        while b'"agent_token"' not in (frame := await self._connection.receive()):
            fields = orjson.loads(frame)
            if fields["type"] == "accepted":
                self._run_id = fields["run_id"]
        self._rest = asyncio.create_task(self._read_to_the_receipt())

    async def _read_to_the_receipt(self) -> tuple[float, dict[str, Any], dict[str, Any]]:
        end: dict[str, Any] = {}
        while True:
            frame = await self._connection.receive()
            if b'"agent_token"' in frame:
                continue
            fields = orjson.loads(frame)
            if fields["type"] == "stopped":
                return time.perf_counter(), end, fields
            end = fields

    async def stop(self) -> Stopped:
        assert self._rest is not None
        begun = time.perf_counter()
        self._connection.send(type="stop", session_id=self._session_id, run_id=self._run_id)
        read, end, receipt = await self._rest
        return checked(receipt, self._run_id, end, read - begun)

    def close(self) -> None:
        if self._rest is not None:
            self._rest.cancel()
        self._connection.close()


def checked(receipt: dict[str, Any], run_id: str, end: dict[str, Any], wall_s: float) -> Stopped:
    """Raises DeliveryError if the receipt is not of this run, or the run did not end by it."""
    if receipt.get("stopped") != [run_id]:
        raise DeliveryError(f"the receipt of {run_id} is {receipt}")
    if (end.get("type"), end.get("run_id")) != ("agent_stopped", run_id):
        raise DeliveryError(f"the stopped run {run_id} ended with {end}")
    return Stopped(wall_s * 1000, receipt["elapsed_ms"])


async def open_talk(transport: Transport, port: int, session_id: str, model: str) -> Talk:
    if transport == "sse":
        return HttpTalk(await HttpConnection.open(port), await HttpConnection.open(port), session_id, model)
    return WsTalk(await WsConnection.open(port, session_id=session_id), session_id, model)


async def in_turn(talks: Sequence[Talk], stops: int) -> list[Stopped]:
    """One stop after the other, while all the other runs stream."""
    stopped = []
    for number in range(stops):
        talk = talks[number % len(talks)]
        stopped.append(await talk.stop())
        await talk.begin()
    return stopped


async def at_once(talks: Sequence[Talk], stops: int) -> list[Stopped]:
    """All the runs in the same moment, again and again."""
    stopped: list[Stopped] = []
    while len(stopped) < stops:
        stopped += await asyncio.gather(*(talk.stop() for talk in talks))
        await asyncio.gather(*(talk.begin() for talk in talks))
    return stopped[:stops]


PATTERNS: Final[dict[str, Callable[[Sequence[Talk], int], Awaitable[list[Stopped]]]]] = {
    "in turn": in_turn,
    "at once": at_once,
}


async def stop_runs(plan: Plan, transport: Transport, pattern: str, port: int) -> list[Stopped]:
    """Begin the load's runs, stop them in this pattern, and leave. Raises DeliveryError, OSError or TimeoutError, maybe
    in a group."""
    async with asyncio.timeout(STOP_S):
        names = [f"{pattern.replace(' ', '-')}-{transport}-{number}" for number in range(plan.load.chats)]
        talks = await asyncio.gather(*(open_talk(transport, port, name, plan.load.model) for name in names))
        try:
            await asyncio.gather(*(talk.begin() for talk in talks))
            stopped = await PATTERNS[pattern](talks, plan.stops)
            await asyncio.gather(*(talk.stop() for talk in talks))
        finally:
            for talk in talks:
                talk.close()
        return stopped


def run(plan: Plan, say: Callable[[str], None]) -> dict[str, Any]:
    """Measure, and return the result as it is written to JSON. `say` is told each figure as it comes.

    Raises BenchmarkError.
    """
    rows: list[dict[str, Any]] = []
    with open_upstream() as upstream:
        for turn in range(plan.runs):
            with open_server(BAMBOO, upstream) as server:
                for transport in plan.transports:
                    measure(server, transport, WARM_UP)
                for transport in plan.transports:
                    for pattern in PATTERNS:
                        try:
                            stopped = uvloop.run(stop_runs(plan, transport, pattern, server.ports[transport]))
                        except (DeliveryError, OSError, EOFError, TimeoutError) as error:
                            raise BenchmarkError(f"{transport}, {pattern}: {error!r}") from error
                        row = {"run": turn + 1, "transport": transport, "pattern": pattern, **_figures(stopped)}
                        rows.append(row)
                        say(
                            f"run {turn + 1}/{plan.runs}  {_LABEL[transport]:<9} {pattern}: "
                            f"p50 {row['wall_ms']['p50']:.1f} ms, p99 {row['wall_ms']['p99']:.1f} ms"
                        )
    return {
        "question": NAME,
        "made": dt.datetime.now(dt.UTC).isoformat(timespec="seconds"),
        **describe(),
        "load": str(plan.load),
        "stops": plan.stops,
        "target_ms": TARGET_MS,
        "summary": summarize(rows),
        "runs": rows,
    }


def _figures(stopped: Sequence[Stopped]) -> dict[str, Any]:
    return {
        "stops": len(stopped),
        "wall_ms": _percentiles([one.wall_ms for one in stopped]),
        "elapsed_ms": _percentiles([one.elapsed_ms for one in stopped]),
    }


def _percentiles(values: Sequence[float]) -> dict[str, float]:
    ordered = sorted(values)
    return {name: round(percentile(ordered, share), 2) for name, share in (("p50", 0.5), ("p99", 0.99), ("max", 1.0))}


def summarize(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Per transport and pattern, the worst that any run had of each figure."""
    summary = []
    for transport, pattern in dict.fromkeys((row["transport"], row["pattern"]) for row in rows):
        mine = [row for row in rows if (row["transport"], row["pattern"]) == (transport, pattern)]
        worst = {
            figure: {name: max(row[figure][name] for row in mine) for name in ("p50", "p99", "max")}
            for figure in ("wall_ms", "elapsed_ms")
        }
        stops = sum(row["stops"] for row in mine)
        summary.append({"transport": transport, "pattern": pattern, "stops": stops, **worst})
    return summary


def render(result: dict[str, Any]) -> str:
    """The README's section."""
    head = [
        "asked over", "stopped", "stops", "until the receipt is read, ms: p50", "p99", "max",
        "`elapsed_ms` of the receipt: p50", "p99", "max",
    ]  # fmt: skip
    rows = []
    for entry in result["summary"]:
        figures = [f"{entry['wall_ms'][name]:.1f}" for name in ("p50", "p99", "max")]
        figures += [f"{entry['elapsed_ms'][name]:.0f}" for name in ("p50", "p99", "max")]
        rows.append([_LABEL[entry["transport"]], _PATTERN[entry["pattern"]], str(entry["stops"]), *figures])
    runs = max(row["run"] for row in result["runs"])
    times = "once" if runs == 1 else f"{runs} times; each figure is the worst of them"
    return (
        f"{result['load']}; {result['stops']} stops of each kind, measured {times}. "
        f"The target is a p99 of {result['target_ms']} ms.\n\n{table(head, rows)}\n\n{setting_line(result)}"
    )
