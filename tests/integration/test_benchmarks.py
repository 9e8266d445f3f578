"""The benchmarks work: all processes start, every token is counted, a server that loses one is found out. No timing."""

import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import httpx
import orjson
import pytest
import trio

from benchmarks import cpu_per_token, harness, report, shares
from benchmarks.__main__ import QUESTIONS, parse
from benchmarks.client import ChatRecord, DeliveryError, percentile
from benchmarks.client_ws import FrameReader, client_frame
from benchmarks.load import LOADS, QUICK_LOADS, Load, parse_model, token_text
from benchmarks.machine import tree_cpu

SMALL = Load("small", chats=2, tokens=5, delay_s=0.001)


def event(kind: str, seq: int, **fields: Any) -> bytes:
    return orjson.dumps({"type": kind, "seq": seq, **fields})


def token(index: int, seq: int | None = None) -> bytes:
    return event("agent_token", index + 1 if seq is None else seq, token=token_text(index))


async def test_quick_pass_gets_every_token_from_bamboo_and_from_the_references(tmp_path: Path) -> None:
    with trio.fail_after(180):
        done = await trio.run_process(
            [sys.executable, "-m", "benchmarks", "cpu_per_token", "--quick", "--out", str(tmp_path)],
            capture_stdout=True,
            capture_stderr=True,
            check=False,
        )
    assert done.returncode == 0, done.stderr.decode()

    result = orjson.loads((tmp_path / "cpu_per_token.json").read_bytes())
    measured = {(row["server"], row["transport"], row["load"]): row["client"]["tokens"] for row in result["runs"]}
    assert measured == {
        (server, transport, load.name): load.delivered
        for server in ("bamboo", "fastapi-httpx", "fastapi-openai")
        for transport in ("sse", "ws")
        for load in QUICK_LOADS.values()
    }
    assert all(row["cpu_us_per_token"] > 0 for row in result["runs"])
    references = [entry for entry in result["summary"] if entry["server"] == cpu_per_token.REFERENCE]
    assert {entry["ratio_to_reference"]["median"] for entry in references} == {1.0}
    assert {"commit", "machine", "python", "versions", "made"} <= result.keys()
    assert cpu_per_token.render(result) in done.stdout.decode()


async def test_upstream_streams_what_the_models_name_says() -> None:
    request = {"model": SMALL.model, "messages": [], "stream": True}
    with trio.fail_after(30), harness.open_upstream() as base_url:
        async with httpx.AsyncClient(trust_env=False) as client:
            url = f"{base_url}/chat/completions"
            plain = await client.post(url, json=request)
            counted = await client.post(url, json=request | {"stream_options": {"include_usage": True}})
            unknown = await client.post(url, json=request | {"model": "gpt-4o"})

    *chunks, done = [line.removeprefix("data: ") for line in plain.text.split("\n\n") if line]
    deltas = [orjson.loads(chunk)["choices"][0]["delta"] for chunk in chunks]
    assert deltas == [{"role": "assistant", "content": ""}, *({"content": token_text(i)} for i in range(5)), {}]
    assert done == "[DONE]"
    assert '"completion_tokens":5' in counted.text
    assert "usage" not in plain.text
    assert unknown.status_code == 404


async def test_measurement_of_a_server_that_speaks_something_else_fails_and_says_why() -> None:
    def measure_upstream(transport: harness.Transport) -> None:
        with harness.open_upstream() as base_url:
            port = httpx.URL(base_url).port
            assert port is not None
            with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as idle:
                server = harness.RunningServer(harness.BAMBOO, idle.pid, {"sse": port, "ws": port})
                harness.measure(server, transport, SMALL)

    with trio.fail_after(60):
        with pytest.raises(harness.BenchmarkError, match="not an event"):
            await trio.to_thread.run_sync(measure_upstream, "sse")
        with pytest.raises(harness.BenchmarkError, match="no upgrade"):
            await trio.to_thread.run_sync(measure_upstream, "ws")


async def test_server_that_ends_before_it_is_ready_is_reported_with_its_last_words() -> None:
    def command(_directory: Path, _http_port: int, _ws_port: int, _upstream: str) -> Sequence[str]:
        return [sys.executable, "-c", "print('no luck today'); raise SystemExit(3)"]

    def start() -> None:
        with harness.open_server(harness.ServerKind("x", "Server X", command, one_port=True), "http://127.0.0.1:1/v1"):
            pytest.fail("it cannot be ready")

    with trio.fail_after(30), pytest.raises(harness.BenchmarkError, match=r"Server X: ended with status 3[^$]*no luck"):
        await trio.to_thread.run_sync(start)


def test_whole_stream_is_taken_and_timed() -> None:
    record = ChatRecord(wanted=3)
    record.sent_s = 10.0
    record.feed(event("user_message", 2), 10.1)
    for index, now_s in enumerate((11.0, 11.5, 13.0)):
        record.feed(token(index, seq=index + 3), now_s)
    record.feed(event("agent_complete", 6), 13.1)
    assert (record.complete, record.tokens, record.events) == (True, 3, 5)
    assert (record.ttft_s, record.gaps_s) == (1.0, [0.5, 1.5])


@pytest.mark.parametrize(
    ("events", "reason"),
    [
        ([token(0), token(2, seq=2)], "came as number 1"),
        ([token(0), token(0, seq=2)], "came as number 1"),
        ([token(0), token(1, seq=3)], "seq 3 after 1"),
        ([token(0), token(1, seq=1)], "seq 1 after 1"),
        ([token(0), event("agent_complete", 2)], "after 1 of 2"),
        ([token(0), event("agent_error", 2, code="internal")], "did not complete"),
        ([token(0), event("agent_stopped", 2, reason="user")], "did not complete"),
        ([token(0), token(1), event("agent_complete", 3), token(2, seq=4)], "after the terminal"),
        ([orjson.dumps({"type": "gap"})], "not an event"),
    ],
)
def test_stream_with_a_fault_is_refused(events: list[bytes], reason: str) -> None:
    record = ChatRecord(wanted=2)
    *before, last = events
    for one in before:
        record.feed(one, 0.0)
    with pytest.raises(DeliveryError, match=reason):
        record.feed(last, 0.0)


def test_frames_are_the_same_at_any_split() -> None:
    sizes = (0, 5, 125, 126, 70_000)
    payloads = [bytes([size % 251]) * size for size in sizes]
    heads = [b"\x81\x00", b"\x81\x05", b"\x81\x7d", b"\x81\x7e\x00\x7e", b"\x81\x7f" + (70_000).to_bytes(8, "big")]
    stream = b"".join(head + payload for head, payload in zip(heads, payloads, strict=True))
    for step in (1, 3, 127, len(stream)):
        reader = FrameReader()
        frames = [frame for at in range(0, len(stream), step) for frame in reader.feed(stream[at : at + step])]
        assert frames == [(1, payload) for payload in payloads]


@pytest.mark.parametrize("head", [b"\x01\x00", b"\x81\x80", b"\xc1\x00"])
def test_fragmented_masked_or_compressed_frame_is_refused(head: bytes) -> None:
    with pytest.raises(DeliveryError):
        list(FrameReader().feed(head))


def test_clients_frame_has_its_mask_and_its_length() -> None:
    assert client_frame(1, b"hi") == b"\x81\x82\x00\x00\x00\x00hi"
    assert client_frame(1, b"x" * 300)[:8] == b"\x81\xfe\x01\x2c\x00\x00\x00\x00"


def test_model_name_stands_for_a_load() -> None:
    for load in LOADS.values():
        assert parse_model(load.model) == (load.tokens, load.delay_s)
    with pytest.raises(ValueError, match="bench-"):
        parse_model("bench-0-0")


def test_percentile_is_a_value_that_was_measured() -> None:
    values = [float(value) for value in range(1, 101)]
    assert [percentile(values, share) for share in (0, 0.5, 0.99, 1)] == [1.0, 51.0, 100.0, 100.0]
    assert percentile([], 0.5) == 0.0


async def test_cpu_of_a_child_counts_while_it_lives_and_when_it_was_waited_for() -> None:
    child = "sum(range(30_000_000)); print('burnt', flush=True); input()"
    run = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {child!r}])"
    program = f"{run}; print('waited', flush=True); input()"

    def readings() -> tuple[float, float]:
        with subprocess.Popen([sys.executable, "-c", program], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as parent:
            assert parent.stdin is not None
            assert parent.stdout is not None
            assert parent.stdout.readline() == b"burnt\n"
            living = tree_cpu(parent.pid).total_s
            parent.stdin.write(b"\n")
            parent.stdin.flush()
            assert parent.stdout.readline() == b"waited\n"
            waited_for = tree_cpu(parent.pid).total_s
            parent.stdin.close()
        return living, waited_for

    with trio.fail_after(30):
        living, waited_for = await trio.to_thread.run_sync(readings)
    # Tens of millions of steps: many times what starting two interpreters costs.
    assert living > 0.15
    assert waited_for > 0.15


def test_ratio_is_taken_within_each_run_and_then_the_median() -> None:
    def row(run: int, server: str, cost: float) -> dict[str, Any]:
        client = {"ttft_ms": {"p99": 1.0}, "gap_ms": {"p99": 2.0}}
        return {
            "run": run, "server": server, "transport": "sse", "load": "A", "cpu_us_per_token": cost,
            "connect_cpu_us_per_chat": 1.0, "rss_mib": 50.0, "client": client,
        }  # fmt: skip

    rows = [row(1, "bamboo", 10), row(1, "fastapi-openai", 100), row(2, "bamboo", 40), row(2, "fastapi-openai", 200)]
    mine, reference = cpu_per_token.summarize(rows)
    assert mine["cpu_us_per_token"] == {"min": 10, "median": 25.0, "max": 40}
    assert mine["ratio_to_reference"] == {"min": 0.1, "median": 0.15, "max": 0.2}
    assert reference["ratio_to_reference"] == {"min": 1.0, "median": 1.0, "max": 1.0}


def test_servers_take_turns() -> None:
    plan = cpu_per_token.Plan(loads=(), runs=3)
    orders = [[kind.name for kind in plan.order(run)] for run in range(3)]
    assert len({order[0] for order in orders}) == 3
    assert all(sorted(order) == sorted(orders[0]) for order in orders)


def test_samples_count_for_the_part_that_asked_and_for_the_library_that_ran() -> None:
    site = "/venv/lib/python3.11/site-packages"
    loop = (f"{site}/trio/_core/_run.py", "run")
    run = [("/src/bamboo/llm/openai.py", "receive"), ("/src/bamboo/agent/execution.py", "drive"), loop]
    socket = (f"{site}/trio/_highlevel_socket.py", "send_all")
    stacks = [
        ([("/usr/lib/nowhere.py", "len"), (f"{site}/httpx/_models.py", "aiter"), *run], 6),
        ([socket, ("/src/bamboo/web/stream.py", "write"), loop], 3),
        ([(f"{site}/trio/_core/_io_epoll.py", "get_events"), loop], 1),
        ([(f"{site}/h11/_connection.py", "next_event"), (f"{site}/hypercorn/trio/tcp_server.py", "handle"), loop], 2),
        ([("/src/bamboo/bus/topic.py", "publish"), *run[1:]], 4),
    ]
    found = shares.count({"main_s": 8.0, "process_s": 10.0, "stacks": stacks})
    assert found.samples == 16
    assert found.by_part == {
        "llm: reading the provider": 0.3,
        "other threads (the store's)": 0.2,
        "bus": 0.2,
        "web: HTTP and SSE": 0.15,
        "hypercorn, on its own": 0.1,
        "trio's loop, on its own": 0.05,
    }
    assert found.by_library == {
        "httpx and httpcore": 0.3,
        "other threads (the store's)": 0.2,
        "Bamboo's own code": 0.2,
        "trio: sockets, with the kernel's part": 0.15,
        "h11, under hypercorn and httpcore": 0.1,
        "trio: waiting for I/O": 0.05,
    }
    assert found.by_function["bamboo/bus/topic.py:publish"] == 0.2


PROGRAM = """
import os, signal, threading, time

def burn(cpu_s):
    start = time.thread_time()
    while time.thread_time() < start + cpu_s:
        pass

burn(1.0)
os.kill(os.getpid(), signal.SIGUSR1)
other = threading.Thread(target=burn, args=(0.3,))
other.start()
other.join()
(lambda: burn(0.3))()
os.kill(os.getpid(), signal.SIGUSR2)
burn(0.1)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="the sampler needs Linux's CPU timers")
async def test_sampler_sees_what_the_main_thread_does_and_how_much_the_others_used(tmp_path: Path) -> None:
    (tmp_path / "program.py").write_text(PROGRAM)
    output = tmp_path / "samples.json"
    environment = harness.environment()
    environment["PYTHONPATH"] += f":{tmp_path}"
    with trio.fail_after(60):
        command = [sys.executable, "-m", "benchmarks.sampler", str(output), "program"]
        await trio.run_process(command, env=environment, cwd=tmp_path)

    seen = orjson.loads(output.read_bytes())
    functions = [[function for _, function in frames[:3]] for frames, _ in seen["stacks"]]
    assert functions[0] == ["burn", "<lambda>", "<module>"]
    # The main thread waited for the other one: none of that is sampled, and all of it is in the process's time.
    assert 0.3 <= seen["main_s"] < seen["process_s"] - 0.25
    assert seen["main_s"] < 1.0, "what it did before it was told to begin counts too"
    # One per 4 ms of its own time at the most; signals that come while the machine is busy with others count as one.
    samples = sum(hits for _, hits in seen["stacks"])
    assert 3 <= samples <= seen["main_s"] / 0.003


def test_readme_has_a_section_for_every_question_and_only_that_is_replaced() -> None:
    text = report.README.read_text()
    for name in QUESTIONS:
        replaced = report.replace_section(text, name, "| new |")
        assert f"<!-- {name}:begin -->\n| new |\n<!-- {name}:end -->" in replaced
        assert report.replace_section(replaced, name, "| new |") == replaced
    with pytest.raises(ValueError, match="0 times"):
        report.replace_section(text, "nothing", "")


def test_question_that_nobody_asks_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        parse(["how_many_angels"])
    assert "cpu_per_token" in capsys.readouterr().err
