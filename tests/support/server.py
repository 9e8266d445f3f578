"""The whole server, as it is shipped: in this process through `open_server`, or as a process of its own."""

import json
import os
import signal
import subprocess
import sys
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import asynccontextmanager
from functools import partial
from pathlib import Path
from typing import Any

import trio

from bamboo.config import (
    AgentConfig,
    Config,
    GatewayConfig,
    LlmConfig,
    LogConfig,
    ProviderConfig,
    ServerConfig,
    StorageConfig,
    StreamConfig,
)
from bamboo.server import Server, open_server
from bamboo.tools.toolbox import EmptyToolbox, Toolbox

DEADLINE_S = 30
"""What one test may take: far more than any needs."""


def server_config(
    directory: Path,
    base_url: str = "",
    *,
    server: Mapping[str, Any] | None = None,
    gateway: Mapping[str, Any] | None = None,
    agent: AgentConfig | None = None,
    stream: StreamConfig | None = None,
    max_retries: int = 0,
) -> Config:
    """On free ports, the database in `directory`; with `base_url` the provider is the OpenAI-compatible server there,
    without it the script `echo`."""
    if base_url:
        provider = ProviderConfig(kind="openai", base_url=base_url, model="fake-model")
    else:
        provider = ProviderConfig(kind="scripted", model="echo", script="echo")
    return Config(
        server=ServerConfig(**{"port": 0, "drain_s": 0.0, **(server or {})}),
        gateway=GatewayConfig(**{"bind": "127.0.0.1:0", **(gateway or {})}),
        llm=LlmConfig(default_provider="fake", max_retries=max_retries, providers={"fake": provider}),
        agent=agent or AgentConfig(),
        stream=stream or StreamConfig(),
        storage=StorageConfig(path=directory / "bamboo.db"),
        log=LogConfig(level="warning"),
    )


@asynccontextmanager
async def running(config: Config, *, toolbox: Callable[[], Toolbox] = EmptyToolbox) -> AsyncIterator[Server]:
    """A server in this process, through the production `open_server`."""
    async with open_server(config, toolbox=toolbox, environ={}) as server:
        yield server


class ServerProcess:
    """`python -m bamboo` as a process. `lines` are what it has logged so far, decoded."""

    def __init__(self, process: trio.Process) -> None:
        self.process = process
        self.lines: list[dict[str, Any]] = []
        self.http_url = ""
        self.gateway_url = ""
        self._logged = trio.Event()
        self._ended = False

    def send_signal(self, number: signal.Signals) -> None:
        self.process.send_signal(number)

    async def wait(self) -> int:
        """The exit code."""
        return await self.process.wait()

    async def wait_logged(self, event: str) -> dict[str, Any]:
        """The first line of this event, as soon as it is there. Fails if the process ends before."""
        while True:
            for line in self.lines:
                if line["event"] == event:
                    return line
            assert not self._ended, f"the server ended before it logged {event}: {self.lines}"
            await self._logged.wait()

    async def read_log(self) -> None:
        """Keep the pipe empty, to the end of the process."""
        assert self.process.stderr is not None
        rest = b""
        async for data in self.process.stderr:
            *whole, rest = (rest + data).split(b"\n")
            for line in whole:
                self.lines.append(json.loads(line) if line.startswith(b"{") else {"event": "text", "text": str(line)})
            self._turn()
        self._ended = True
        self._turn()

    def _turn(self) -> None:
        self._logged.set()
        self._logged = trio.Event()


def process_environment(directory: Path, **variables: str) -> dict[str, str]:
    """Free ports, the database in `directory`, nothing of this process's own BAMBOO_ variables."""
    inherited = {name: value for name, value in os.environ.items() if not name.startswith(("BAMBOO_", "OPENAI_"))}
    return {
        **inherited,
        "BAMBOO_SERVER__PORT": "0",
        "BAMBOO_GATEWAY__BIND": "127.0.0.1:0",
        "BAMBOO_STORAGE__PATH": str(directory / "bamboo.db"),
        "BAMBOO_LOG__FORMAT": "json",
        "PYTHONWARNINGS": "error",
        **variables,
    }


@asynccontextmanager
async def starting_process(directory: Path, *arguments: str, **variables: str) -> AsyncIterator[ServerProcess]:
    """A server process that was just started. Killed at the end, if it still lives."""
    command = [sys.executable, "-m", "bamboo", *arguments]
    async with trio.open_nursery() as nursery:
        run = partial(
            trio.run_process,
            cwd=directory,
            env=process_environment(directory, **variables),
            stderr=subprocess.PIPE,
            check=False,
        )
        server = ServerProcess(await nursery.start(run, command))
        nursery.start_soon(server.read_log)
        yield server
        server.process.kill()


@asynccontextmanager
async def server_process(directory: Path, *arguments: str, **variables: str) -> AsyncIterator[ServerProcess]:
    """A server process that listens. Killed at the end, if it still lives."""
    async with starting_process(directory, *arguments, **variables) as server:
        start = await server.wait_logged("listening")
        server.http_url, server.gateway_url = start["http"], start["gateway"]
        yield server
