"""START HERE: the server is composed and shut down here, and nowhere else.

```
store → bus → agents → gateway → web        opened in this order, closed in the reverse order
```

Follow a message: `web/routes.py` or `gateway/connection.py` takes a chat, `agent/registry.py` finds or starts the
session's runner, `agent/runner.py` accepts it in one commit, `agent/execution.py` drives its run, `agent/writer.py`
writes every event to the store and publishes it on the bus, and each reader's subscription takes it from there.
"""

import os
import signal
import sys
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Final

import structlog
import trio

from bamboo import __version__, systemd
from bamboo.agent.expiry import expire_sessions
from bamboo.agent.registry import Agents, open_agents
from bamboo.bus.event_bus import EventBus
from bamboo.config import Config
from bamboo.errors import StoreError
from bamboo.gateway.listener import Gateway, open_gateway
from bamboo.llm.base import Providers
from bamboo.llm.providers import open_providers
from bamboo.open_files import raise_open_files
from bamboo.store import wall_clock_ms
from bamboo.store.base import Store
from bamboo.store.retention import retain
from bamboo.store.sqlite import open_sqlite_store
from bamboo.tools.toolbox import EmptyToolbox, Toolbox
from bamboo.web.app import Web, open_web
from bamboo.wire.addresses import AddressLimits

log = structlog.get_logger("bamboo.server")

CLOSE_S: Final = 30.0
"""More than closing everything takes after the drain: what systemd is asked for."""

SWITCH_INTERVAL_S: Final = 0.001
"""How long a busy loop may keep the store's thread from running. At Python's 5 ms, a saturated loop lets a commit wait
for seconds: each statement of it has to win the interpreter's lock anew.
"""


@dataclass(frozen=True, slots=True)
class Server:
    """A running server and its parts."""

    config: Config
    store: Store
    bus: EventBus
    providers: Providers
    agents: Agents
    gateway: Gateway | None
    web: Web

    @property
    def http_url(self) -> str:
        """The real address, also where the configuration says port 0."""
        return self.web.url

    @property
    def gateway_url(self) -> str | None:
        return None if self.gateway is None else self.gateway.url

    async def drain(self) -> None:
        """Refuse new chats, let the active runs finish within `server.drain_s`, interrupt the rest. Subscriptions stay.

        Returns when no run is active. If cancelled, closing the server ends what is left.
        """
        grace_s = self.config.server.drain_s
        if self.gateway is not None:
            self.gateway.draining(grace_s)
        await self.agents.drain(grace_s)


@asynccontextmanager
async def open_server(
    config: Config,
    *,
    toolbox: Callable[[], Toolbox] = EmptyToolbox,
    environ: Mapping[str, str] = os.environ,
    stopping: trio.Event | None = None,
) -> AsyncIterator[Server]:
    """Start every component, in order; leaving the block stops them in the reverse order and marks the stop as clean,
    if nothing had to be left behind.

    `toolbox` gives the tools that a run pins when it starts. `stopping`, set while this starts, keeps it from taking up
    the runs that an earlier process left: they stay for the next start. Raises StartError, alone or in a group, if a
    component cannot start; those before it are stopped again. An exception in any component's task cancels the block
    and comes out of it.
    """
    async with open_sqlite_store(config.storage) as store, open_providers(config.llm, environ) as providers:
        bus = EventBus(store, window_bytes=config.stream.window_bytes)
        async with (
            open_agents(
                config,
                store=store,
                bus=bus,
                providers=providers,
                toolbox=toolbox,
                now_ms=wall_clock_ms,
                draining=stopping is not None and stopping.is_set(),
            ) as agents,
            trio.open_nursery() as nursery,
        ):
            nursery.start_soon(retain, store, config.storage)
            nursery.start_soon(expire_sessions, agents, store, config.storage, wall_clock_ms)
            async with _open_edge(config, nursery, agents, bus, store, providers) as (gateway, web):
                yield Server(config, store, bus, providers, agents, gateway, web)
            nursery.cancel_scope.cancel()
        await _mark_clean(store, config.storage.commit_timeout_s, settled=agents.settled)


async def _mark_clean(store: Store, timeout_s: float, *, settled: bool) -> None:
    """Without the mark the next start is one after a crash, and readers are told what they had seen and is not there:
    so it must not be written where that may be so, and a store that fails has to do without."""
    if settled:
        try:
            with trio.fail_after(timeout_s):
                await store.mark_clean()
        except (StoreError, trio.TooSlowError) as error:
            log.warning("stopped_unclean", error=str(error) or "the store did not answer in time")
    else:
        log.warning("stopped_unclean", error="not all that readers were shown is stored")


@asynccontextmanager
async def _open_edge(
    config: Config, nursery: trio.Nursery, agents: Agents, bus: EventBus, store: Store, providers: Providers
) -> AsyncIterator[tuple[Gateway | None, Web]]:
    """The two listeners. Their tasks are `nursery`'s."""
    addresses = AddressLimits.of(config.server)
    port: list[int] = []
    scheme = "http" if config.server.certfile is None else "https"

    def page_origins() -> list[str]:
        """Of the page that the HTTP server shows; it listens only after the gateway does."""
        return [f"{scheme}://{host}:{number}" for number in port for host in ("127.0.0.1", "localhost")]

    def ready() -> bool:
        return bool(port) and not agents.draining

    @asynccontextmanager
    async def no_gateway() -> AsyncIterator[None]:
        yield None

    gateway_or_none = (
        open_gateway(
            config, nursery, agents=agents, bus=bus, store=store, page_origins=page_origins, addresses=addresses
        )
        if config.gateway.enabled
        else no_gateway()
    )
    async with gateway_or_none as gateway:
        gateway_url = None if gateway is None else config.gateway.public_url or gateway.url
        async with open_web(
            config,
            nursery,
            agents=agents,
            bus=bus,
            store=store,
            providers=providers,
            addresses=addresses,
            gateway_url=gateway_url,
            ready=ready,
        ) as web:
            port.append(web.port)
            yield gateway, web


async def serve(config: Config, *, task_status: trio.TaskStatus[Server] = trio.TASK_STATUS_IGNORED) -> None:
    """Serve until SIGTERM or SIGINT, then drain and stop. A second signal ends the process at once.

    Raises StartError, alone or in a group, if the server cannot start, and whatever a component's task raises.
    """
    sys.setswitchinterval(SWITCH_INTERVAL_S)
    raise_open_files(config)
    stopping = trio.Event()
    with trio.open_signal_receiver(signal.SIGTERM, signal.SIGINT) as signals:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(_obey, signals, stopping)
            log.debug("starting", version=__version__)
            async with open_server(config, stopping=stopping) as server:
                _log_start(server)
                systemd.notify(os.environ, systemd.READY)
                task_status.started(server)
                await stopping.wait()
                patience_s = config.server.drain_s + CLOSE_S
                systemd.notify(os.environ, systemd.STOPPING, systemd.extend_timeout(patience_s))
                await server.drain()
            nursery.cancel_scope.cancel()
    log.info("stopped")


async def _obey(signals: AsyncIterator[int], stopping: trio.Event) -> None:
    async for number in signals:
        name = signal.Signals(number).name
        if stopping.is_set():
            log.warning("killed", signal=name)
            os._exit(128 + number)
        log.info("stopping", signal=name, hint="once more ends the process at once")
        stopping.set()


def _log_start(server: Server) -> None:
    """What an operator wants to know first: where, what answers, where it is kept, what to do next."""
    config = server.config
    log.info("listening", http=server.http_url, gateway=server.gateway_url or "off")
    for name, provider in server.providers.by_name.items():
        chosen = name == server.providers.default
        log.info("provider", name=name, kind=provider.kind, model=provider.default_model, default=chosen)
        if provider.demo:
            key = config.llm.providers[name].api_key_env
            hint = f"{key} is not set, so a demo answers; set it, or a base_url under [llm.providers.{name}]"
            log.warning("demo_model", provider=name, hint=hint)
    log.info("database", path=str(config.storage.path.resolve()), synchronous=config.storage.synchronous)
    missing = [str(path) for path in config.skills.directories if path.is_dir()]
    if missing:
        log.warning("skills_ignored", directories=missing, hint="this version has no skills")
