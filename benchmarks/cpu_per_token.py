"""How much server CPU a delivered token costs, over SSE and over the gateway, beside a reference in the same run."""

import datetime as dt
import statistics
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Final

from benchmarks.harness import (
    BAMBOO,
    FASTAPI_HTTPX,
    FASTAPI_OPENAI,
    TRANSPORTS,
    Measurement,
    ServerKind,
    Transport,
    measure,
    open_server,
    open_upstream,
)
from benchmarks.load import WARM_UP, Load
from benchmarks.machine import describe
from benchmarks.report import setting_line, table

NAME: Final = "cpu_per_token"
REFERENCE: Final = FASTAPI_OPENAI.name
DEFAULT_SERVERS: Final = (BAMBOO, FASTAPI_HTTPX, FASTAPI_OPENAI)
_LABEL: Final = {"sse": "SSE", "ws": "WS"}


@dataclass(frozen=True, slots=True)
class Plan:
    """What is measured: every load over every transport on every server, `runs` times."""

    loads: Sequence[Load]
    runs: int
    servers: Sequence[ServerKind] = DEFAULT_SERVERS
    transports: Sequence[Transport] = TRANSPORTS

    def order(self, run: int) -> Iterator[ServerKind]:
        """The servers take turns, and each run begins with another: what slows the machine a while hits them all."""
        for index in range(len(self.servers)):
            yield self.servers[(index + run) % len(self.servers)]


def run(plan: Plan, say: Callable[[str], None]) -> dict[str, Any]:
    """Measure, and return the result as it is written to JSON. `say` is told each figure as it comes.

    Raises BenchmarkError.
    """
    rows: list[dict[str, Any]] = []
    with open_upstream() as upstream:
        for turn in range(plan.runs):
            for kind in plan.order(turn):
                with open_server(kind, upstream) as server:
                    for transport in plan.transports:
                        measure(server, transport, WARM_UP)
                    for load in plan.loads:
                        for transport in plan.transports:
                            row = _row(turn, kind, transport, load, measure(server, transport, load))
                            rows.append(row)
                            say(
                                f"run {turn + 1}/{plan.runs}  {load.name} {_LABEL[transport]:<3} {kind.name:<15}"
                                f"{row['cpu_us_per_token']:8.1f} µs per token"
                            )
    return {
        "question": NAME,
        "made": dt.datetime.now(dt.UTC).isoformat(timespec="seconds"),
        **describe(),
        "reference": REFERENCE,
        "loads": {load.name: str(load) for load in plan.loads},
        "titles": {kind.name: kind.title for kind in plan.servers},
        "summary": summarize(rows),
        "runs": rows,
    }


def _row(turn: int, kind: ServerKind, transport: Transport, load: Load, measured: Measurement) -> dict[str, Any]:
    return {
        "run": turn + 1,
        "server": kind.name,
        "transport": transport,
        "load": load.name,
        "cpu_us_per_token": round(measured.us_per_token(load), 2),
        "cpu_s": round(measured.setup.total_s + measured.stream.total_s, 4),
        "cpu_user_s": round(measured.setup.user_s + measured.stream.user_s, 2),
        "cpu_system_s": round(measured.setup.system_s + measured.stream.system_s, 2),
        "connect_cpu_us_per_chat": round(measured.setup.total_s / load.chats * 1e6, 1),
        "rss_mib": round(measured.rss_bytes / 2**20, 1),
        "client": measured.client,
    }


def summarize(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Per load, transport and server: min, median and max over the runs.

    The ratio is taken in each run, to the reference in that run, before the median is.
    """
    by_place = {(row["run"], row["load"], row["transport"], row["server"]): row for row in rows}
    places = dict.fromkeys((row["load"], row["transport"], row["server"]) for row in rows)
    summary = []
    for load, transport, server in places:
        mine = [row for row in rows if (row["load"], row["transport"], row["server"]) == (load, transport, server)]
        ratios = [
            row["cpu_us_per_token"] / reference["cpu_us_per_token"]
            for row in mine
            if (reference := by_place.get((row["run"], load, transport, REFERENCE))) is not None
        ]
        summary.append(
            {
                "load": load,
                "transport": transport,
                "server": server,
                "cpu_us_per_token": _spread([row["cpu_us_per_token"] for row in mine], 1),
                "ratio_to_reference": _spread(ratios, 3) if ratios else None,
                "connect_cpu_us_per_chat": _spread([row["connect_cpu_us_per_chat"] for row in mine], 0),
                "rss_mib": _spread([row["rss_mib"] for row in mine], 0),
                "ttft_p99_ms": _spread([row["client"]["ttft_ms"]["p99"] for row in mine], 1),
                "gap_p99_ms": _spread([row["client"]["gap_ms"]["p99"] for row in mine], 1),
            }
        )
    return sorted(summary, key=lambda entry: (entry["load"], entry["transport"]))


def _spread(values: Sequence[float], digits: int) -> dict[str, float]:
    return {
        "min": round(min(values), digits),
        "median": round(statistics.median(values), digits),
        "max": round(max(values), digits),
    }


def render(result: dict[str, Any]) -> str:
    """The README's section: the ratio first, it is what carries over to another machine."""
    head = [
        "load",
        "over",
        "server",
        "ratio",
        "µs CPU per token: median",
        "min to max",
        "first token p99, ms",
        "gap p99, ms",
        "MiB",
    ]
    rows = []
    for entry in result["summary"]:
        cost, ratio = entry["cpu_us_per_token"], entry["ratio_to_reference"]
        rows.append(
            [
                entry["load"],
                _LABEL[entry["transport"]],
                result["titles"][entry["server"]],
                "" if ratio is None else f"{ratio['median']:.2f}",
                f"{cost['median']:.1f}",
                f"{cost['min']:.1f} to {cost['max']:.1f}",
                f"{entry['ttft_p99_ms']['median']:.0f}",
                f"{entry['gap_p99_ms']['median']:.1f}",
                f"{entry['rss_mib']['median']:.0f}",
            ]
        )
    loads = "; ".join(f"**{name}** = {text}" for name, text in result["loads"].items())
    runs = max(row["run"] for row in result["runs"])
    times = "once" if runs == 1 else f"{runs} times"
    return f"{loads}. Each measured {times}.\n\n{table(head, rows)}\n\n{setting_line(result)}"
