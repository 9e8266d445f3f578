"""Starts the fake upstream, servers and clients, each as its own process, and measures one load on one server.

Everything is on the loopback, on free ports; every wait has a deadline; leaving a block ends its process.
"""

import contextlib
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, Final, Literal
from urllib.error import URLError
from urllib.request import ProxyHandler, build_opener

import orjson

from benchmarks.load import Load
from benchmarks.machine import ROOT, CpuTime, tree_cpu, tree_rss_bytes

Transport = Literal["sse", "ws"]
TRANSPORTS: Final[tuple[Transport, ...]] = ("sse", "ws")

READY_S: Final = 30.0
STOP_S: Final = 10.0
CLIENT_START_S: Final = 60.0
SETTLE_S: Final = 5.0
SETTLE_STEP_S: Final = 0.1
SETTLED_CPU_S: Final = 0.002  # in one step: what a server does that has nothing to do


class BenchmarkError(Exception):
    """A process did not do what it had to. The text says which, and what it wrote last."""


@dataclass(frozen=True, slots=True)
class ServerKind:
    """A server that can be measured. `command` takes (a directory for it, HTTP port, WebSocket port, the upstream)."""

    name: str
    title: str
    command: Callable[[Path, int, int, str], Sequence[str]]
    one_port: bool
    """It has HTTP and WebSocket on one port."""


def _bamboo(directory: Path, http_port: int, ws_port: int, upstream: str) -> Sequence[str]:
    # All the defaults but for addresses and the provider: logs at level info, the store on disk, and so on.
    config = directory / "bamboo.toml"
    config.write_text(
        f"""
[server]
port = {http_port}

[gateway]
bind = "127.0.0.1:{ws_port}"

[storage]
path = "{directory / "bamboo.db"}"

[llm]
default_provider = "bench"

[llm.providers.bench]
kind = "openai"
base_url = "{upstream}"
model = "bench-1-0"
"""
    )
    return [sys.executable, "-m", "bamboo", "--config", str(config)]


def _fastapi(flavour: str) -> Callable[[Path, int, int, str], Sequence[str]]:
    def command(_directory: Path, http_port: int, _ws_port: int, upstream: str) -> Sequence[str]:
        module = "benchmarks.reference_fastapi"
        return [
            sys.executable, "-m", module, "--flavour", flavour, "--port", str(http_port), "--upstream", upstream
        ]  # fmt: skip

    return command


BAMBOO: Final = ServerKind("bamboo", "Bamboo", _bamboo, one_port=False)
FASTAPI_OPENAI: Final = ServerKind(
    "fastapi-openai", "FastAPI + uvicorn[standard] + openai SDK", _fastapi("openai"), one_port=True
)
FASTAPI_HTTPX: Final = ServerKind(
    "fastapi-httpx", "FastAPI + uvicorn[standard] + httpx, hand-written", _fastapi("httpx"), one_port=True
)
SERVERS: Final = {kind.name: kind for kind in (BAMBOO, FASTAPI_OPENAI, FASTAPI_HTTPX)}


@dataclass(frozen=True, slots=True)
class RunningServer:
    """A server that is ready. `ports` are by transport."""

    kind: ServerKind
    pid: int
    ports: Mapping[Transport, int]


@dataclass(frozen=True, slots=True)
class Measurement:
    """One load on one server.

    `setup` is for connecting, `stream` from the first chat's sending until the server has settled again.
    """

    setup: CpuTime
    stream: CpuTime
    rss_bytes: int
    client: Mapping[str, Any]

    def us_per_token(self, load: Load) -> float:
        """Microseconds of the server's CPU, of everything from connecting to closing, per delivered token."""
        return (self.setup.total_s + self.stream.total_s) / load.delivered * 1e6


def environment() -> dict[str, str]:
    """Ours, without what would change a server under test: proxies and settings of Bamboo."""
    kept = {
        name: value
        for name, value in os.environ.items()
        if not name.upper().endswith("_PROXY") and not name.upper().startswith("BAMBOO_")
    }
    kept["PYTHONPATH"] = os.pathsep.join(filter(None, [str(ROOT), kept.get("PYTHONPATH")]))
    return kept


def free_ports(count: int) -> list[int]:
    """TCP ports of the loopback that nobody listened on a moment ago."""
    with contextlib.ExitStack() as stack:
        listeners = [stack.enter_context(socket.socket()) for _ in range(count)]
        for listener in listeners:
            listener.bind(("127.0.0.1", 0))
        return [listener.getsockname()[1] for listener in listeners]


@contextlib.contextmanager
def open_upstream() -> Iterator[str]:
    """The fake provider's base URL."""
    with _process(
        [sys.executable, "-m", "benchmarks.upstream"], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as process:
        assert process.stdout is not None
        line = process.stdout.readline()
        if not line:
            raise BenchmarkError(f"the fake upstream did not start (status {process.wait(STOP_S)})")
        yield f"http://127.0.0.1:{int(line)}/v1"


@contextlib.contextmanager
def open_server(kind: ServerKind, upstream: str) -> Iterator[RunningServer]:
    """A fresh server with a directory of its own, ready. A BenchmarkError of the block gets the server's last words."""
    http_port, ws_port = free_ports(2)
    with tempfile.TemporaryDirectory(prefix="bamboo-bench-") as name, (Path(name) / "output.txt").open("w+b") as output:
        directory = Path(name)
        command = kind.command(directory, http_port, ws_port, upstream)
        with _process(command, cwd=directory, stdin=subprocess.DEVNULL, stdout=output, stderr=output) as process:
            try:
                _wait_ready(process, f"http://127.0.0.1:{http_port}/readyz")
                yield RunningServer(
                    kind, process.pid, {"sse": http_port, "ws": http_port if kind.one_port else ws_port}
                )
            except BenchmarkError as error:
                raise BenchmarkError(f"{kind.title}: {error}\n{_last_words(output)}") from error


def measure(server: RunningServer, transport: Transport, load: Load) -> Measurement:
    """Run a load once. Raises BenchmarkError if the server ended, or did not deliver every token in order."""
    command = [
        sys.executable, "-m", f"benchmarks.client_{transport}", "--port", str(server.ports[transport]),
        "--chats", str(load.chats), "--tokens", str(load.tokens), "--delay-s", f"{load.delay_s:g}",
    ]  # fmt: skip
    before = tree_cpu(server.pid)
    with _process(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as client:
        deadline = CLIENT_START_S + load.deadline_s
        assert client.stdout is not None
        if client.stdout.readline() != b"connected\n":
            raise BenchmarkError(f"{transport} client: {_outcome(client, deadline)[1]}")
        connected = tree_cpu(server.pid)
        seen, reason = _outcome(client, deadline, b"go\n")
        if client.returncode != 0:
            raise BenchmarkError(f"{transport} client, {load}: {reason}")
    settle(server.pid)
    after = tree_cpu(server.pid)
    return Measurement(connected - before, after - connected, tree_rss_bytes(server.pid), orjson.loads(seen))


def _outcome(client: subprocess.Popen[bytes], deadline_s: float, say: bytes | None = None) -> tuple[bytes, str]:
    """What the client wrote until its end, and its last complaint."""
    try:
        output, errors = client.communicate(say, timeout=deadline_s)
    except subprocess.TimeoutExpired:
        return b"", f"not done after {deadline_s:.0f} s"
    return output, errors.decode(errors="replace").strip()[-2000:]


def settle(pid: int) -> None:
    """Wait until the server has nothing to do any more, so that what it does behind the stream counts too."""
    deadline = time.monotonic() + SETTLE_S
    before_s = tree_cpu(pid).total_s
    while time.monotonic() < deadline:
        time.sleep(SETTLE_STEP_S)
        now_s = tree_cpu(pid).total_s
        if now_s - before_s < SETTLED_CPU_S:
            return
        before_s = now_s


def _wait_ready(process: subprocess.Popen[bytes], url: str) -> None:
    opener = build_opener(ProxyHandler({}))
    deadline = time.monotonic() + READY_S
    while time.monotonic() < deadline:
        if process.poll() is not None:
            raise BenchmarkError(f"ended with status {process.returncode} before it was ready")
        # Refused as long as nobody listens; a 503 while it starts is a URLError too.
        with contextlib.suppress(URLError, ConnectionError, TimeoutError), opener.open(url, timeout=2) as answer:
            answer.read()
            return
        time.sleep(0.05)
    raise BenchmarkError(f"not ready after {READY_S:.0f} s")


def _last_words(output: IO[bytes]) -> str:
    output.seek(0)
    return output.read().decode(errors="replace")[-4000:]


@contextlib.contextmanager
def _process(command: Sequence[str], **streams: Any) -> Iterator[subprocess.Popen[bytes]]:
    """A child that is gone when the block is left: asked with SIGTERM, and killed when it takes its time."""
    with subprocess.Popen(command, env=environment(), **streams) as process:
        try:
            yield process
        finally:
            if process.poll() is None:
                process.send_signal(signal.SIGTERM)
                try:
                    process.wait(STOP_S)
                except subprocess.TimeoutExpired:
                    process.kill()
