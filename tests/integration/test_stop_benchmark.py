"""The benchmarks of stops and of slow readers work: every stop is seen through, every token counted, and whatever is
not as it must be is found out. No timing."""

import asyncio
import socket
import sys
from pathlib import Path
from typing import Any

import orjson
import pytest
import trio

from benchmarks import harness, slow_readers, stop
from benchmarks.calls import HttpConnection
from benchmarks.client import DeliveryError
from benchmarks.load import Load

TEN = Load("ten", chats=1, tokens=10, delay_s=0)


async def quick(question: str, out: Path) -> tuple[dict[str, Any], str]:
    """The result, and what was printed."""
    with trio.fail_after(120):
        done = await trio.run_process(
            [sys.executable, "-m", "benchmarks", question, "--quick", "--out", str(out)],
            capture_stdout=True,
            capture_stderr=True,
            check=False,
        )
    assert done.returncode == 0, done.stderr.decode()
    result = orjson.loads((out / f"{question}.json").read_bytes())
    assert {"question", "commit", "machine", "python", "versions", "made"} <= result.keys()
    return result, done.stdout.decode()


async def test_quick_pass_sees_every_stop_through_over_both_transports(tmp_path: Path) -> None:
    result, said = await quick("stop", tmp_path)
    measured = {(row["transport"], row["pattern"]): row["stops"] for row in result["runs"]}
    assert measured == {(transport, pattern): 8 for transport in ("sse", "ws") for pattern in ("in turn", "at once")}
    assert all(row["wall_ms"]["p50"] >= row["elapsed_ms"]["p50"] - 1 for row in result["runs"])
    assert stop.render(result) in said


async def test_quick_pass_measures_with_and_without_stopped_readers(tmp_path: Path) -> None:
    result, said = await quick("slow_readers", tmp_path)
    assert [row["stopped"] for row in result["runs"]] == [0, 2]
    assert all(row["cpu_us_per_token"] > 0 and row["fast_s"] > 0 for row in result["runs"])
    assert slow_readers.render(result) in said


async def test_a_run_that_ends_by_itself_is_no_stop() -> None:
    short = stop.Plan(Load("streaming", chats=1, tokens=1, delay_s=0), stops=1, runs=1)

    def measure() -> None:
        stop.run(short, lambda _line: None)

    with trio.fail_after(60), pytest.raises(harness.BenchmarkError, match="the receipt of"):
        await trio.to_thread.run_sync(measure)


@pytest.mark.parametrize("tokens", [9, 11])
def test_a_reader_that_reads_on_and_does_not_get_every_token_once_is_found_out(tokens: int) -> None:
    token, end = b'id: e.1\ndata: {"type":"agent_token"}\n\n', b'data: {"type":"agent_complete","usage":null}\n\n'
    server, client = socket.socketpair()
    with server, client:
        server.sendall(token * 10 + end)
        slow_readers.read_on(client, TEN)
        server.sendall(token * tokens + end)
        with pytest.raises(DeliveryError, match=f"{tokens} of 10 tokens"):
            slow_readers.read_on(client, TEN)
        server.sendall(token)
        server.close()
        with pytest.raises(DeliveryError, match="cut after 1 of 10"):
            slow_readers.read_on(client, TEN)


@pytest.mark.parametrize(
    ("receipt", "end"),
    [
        ({"stopped": [], "elapsed_ms": 1}, {"type": "agent_complete", "run_id": "r"}),
        ({"stopped": ["other"], "elapsed_ms": 1}, {"type": "agent_stopped", "run_id": "r"}),
        ({"stopped": ["r"], "elapsed_ms": 1}, {"type": "agent_complete", "run_id": "r"}),
        ({"stopped": ["r"], "elapsed_ms": 1}, {"type": "agent_stopped", "run_id": "other"}),
        ({"stopped": ["r"], "elapsed_ms": 1}, {}),
        ({"error": {"code": "session_not_found"}}, {}),
    ],
)
def test_a_stop_that_is_not_of_its_run_is_refused(receipt: dict[str, Any], end: dict[str, Any]) -> None:
    with pytest.raises(DeliveryError):
        stop.checked(receipt, "r", end, 0.001)


def test_a_stop_is_timed_in_milliseconds() -> None:
    seen = stop.checked({"stopped": ["r"], "elapsed_ms": 3}, "r", {"type": "agent_stopped", "run_id": "r"}, 0.005)
    assert (seen.wall_ms, seen.elapsed_ms) == (5.0, 3)


def test_the_summary_of_stops_is_the_worst_of_the_runs() -> None:
    def row(run: int, scale: float) -> dict[str, Any]:
        figures = {"p50": 1.0 * scale, "p99": 2.0 / scale, "max": 3.0}
        fields = {"run": run, "transport": "ws", "pattern": "in turn", "stops": 4}
        return fields | {"wall_ms": figures, "elapsed_ms": figures}

    [entry] = stop.summarize([row(1, 1.0), row(2, 2.0)])
    assert entry["stops"] == 8
    assert entry["wall_ms"] == entry["elapsed_ms"] == {"p50": 2.0, "p99": 2.0, "max": 3.0}


def test_what_a_stopped_reader_costs_is_taken_beside_the_same_run_without_any() -> None:
    def row(run: int, stopped: int, mib: float) -> dict[str, Any]:
        return {"run": run, "stopped": stopped, "cpu_us_per_token": 20.0 + run, "fast_s": 1.0, "rss_mib": mib}

    alone, ten = slow_readers.summarize([row(1, 0, 60), row(1, 10, 70), row(2, 0, 64), row(2, 10, 84)])
    assert alone["kib_per_stopped"] is None
    assert ten["kib_per_stopped"] == {"min": 1024, "median": 1536, "max": 2048}
    assert ten["cpu_us_per_token"] == {"min": 21, "median": 21.5, "max": 22}


async def read_stream(wire: bytes) -> list[bytes]:
    reader = asyncio.StreamReader()
    reader.feed_data(wire)
    connection = HttpConnection.__new__(HttpConnection)
    connection._reader = reader
    return [event async for event in connection.events()]


@pytest.mark.parametrize("step", [1, 7, 1000])
def test_events_of_a_stream_come_whole_however_they_are_cut(step: int) -> None:
    body = b'retry: 1000\nid: e.1\ndata: {"seq":1}\n\n: keep-alive\nid: e.2\ndata: {"seq":2}\n\n'
    chunks = [body[at : at + step] for at in range(0, len(body), step)]
    wire = b"".join(b"%x\r\n%b\r\n" % (len(chunk), chunk) for chunk in chunks) + b"0\r\n\r\n"
    assert asyncio.run(asyncio.wait_for(read_stream(wire), 10)) == [b'{"seq":1}', b'{"seq":2}']
