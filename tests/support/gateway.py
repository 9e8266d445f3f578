"""The gateway over real sockets, the agents and the memory store behind it, and a model that the test plays."""

import ssl
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from dataclasses import dataclass
from typing import Any

import trio
import trio.testing

from bamboo.agent.registry import Agents as RealAgents
from bamboo.config import AgentConfig, Config, GatewayConfig, LlmConfig, ProviderConfig, ServerConfig, StreamConfig
from bamboo.core.types import Accepted, Chat, RunId, SessionId, StopReceipt
from bamboo.gateway.listener import Gateway, open_gateway
from bamboo.store import wall_clock_ms
from bamboo.store.base import Store
from bamboo.store.memory import MemoryStore
from bamboo.wire.addresses import AddressLimits
from tests.support.agents import World, open_world
from tests.support.model import PlayedCall
from tests.support.stores import Gate
from tests.support.ws_client import JsonFrame, RawClient, WsClient, connect


def gateway_config(
    *,
    server: dict[str, Any] | None = None,
    agent: AgentConfig | None = None,
    stream: StreamConfig | None = None,
    **gateway: Any,
) -> Config:
    return Config(
        server=ServerConfig(port=0, **(server or {})),
        gateway=GatewayConfig(bind="127.0.0.1:0", **gateway),
        agent=agent or AgentConfig(),
        stream=stream or StreamConfig(),
        llm=LlmConfig(
            default_provider="played",
            max_retries=0,
            providers={"played": ProviderConfig(kind="scripted", model="played-1")},
        ),
    )


class HeldAgents:
    """The agents behind two gates: a chat or stop that is done waits at its gate before the gateway hears of it.

    `bugs` are raised by the next chats instead.
    """

    def __init__(self, agents: RealAgents) -> None:
        self._agents = agents
        self.chat_gate = Gate()
        self.stop_gate = Gate()
        self.bugs: list[Exception] = []

    @property
    def draining(self) -> bool:
        return self._agents.draining

    @property
    def active_runs(self) -> int:
        return self._agents.active_runs

    @property
    def queued_runs(self) -> int:
        return self._agents.queued_runs

    async def chat(self, chat: Chat) -> Accepted:
        if self.bugs:
            raise self.bugs.pop(0)
        accepted = await self._agents.chat(chat)
        await self.chat_gate.pass_through()
        return accepted

    async def stop(self, session_id: SessionId, run_id: RunId | None = None) -> StopReceipt:
        receipt = await self._agents.stop(session_id, run_id)
        await self.stop_gate.pass_through()
        return receipt


@dataclass
class GatewayWorld:
    """`nursery` is the one that the gateway runs in. `tls` is how clients trust it."""

    world: World
    agents: HeldAgents
    gateway: Gateway
    addresses: AddressLimits
    nursery: trio.Nursery
    tls: ssl.SSLContext | None = None

    @property
    def url(self) -> str:
        return self.gateway.url

    def connect(self, **fields: Any) -> AbstractAsyncContextManager[WsClient]:
        return connect(self.url, tls=self.tls, **fields)

    async def next_call(self) -> PlayedCall:
        return await self.world.model.next_call()

    async def finish_run(self, *texts: str) -> None:
        """Let the model say `texts` in the next call, and end it."""
        call = await self.next_call()
        for text in texts:
            call.say(text)
        call.end()

    async def finished_session(self, *texts: str) -> tuple[str, list[JsonFrame]]:
        """A session with one finished run that said `texts`, and the run's events."""
        async with self.connect() as client:
            await client.chat("hello")
            await self.finish_run(*(texts or ("hi",)))
            return client.session_id, await client.until_terminal()

    async def big_session(self, megabytes: int = 16) -> str:
        """A finished session with a log of this size."""
        async with self.connect(session_id="big") as client:
            await client.chat("talk")
            call = await self.next_call()
            for _ in range(megabytes * 16):
                call.say("x" * 65536)
            call.end()
            await client.until_terminal()
        return "big"

    async def stall(self, client: RawClient, session_id: str) -> None:
        """Make `client`, which does not read, follow a session with more to say than the kernel holds; wait for it."""
        await client.send_frame({"type": "connect", "session_id": session_id, "after": "none.0"})
        while not any(connection._stream.writing for connection in self.gateway._connections):
            await trio.testing.wait_all_tasks_blocked(0.01)

    async def assert_alive(self) -> None:
        async with self.connect() as client:
            assert (await client.call({"type": "ping"}))["type"] == "pong"

    async def no_handshake_left(self) -> None:
        while self.gateway.waiting:
            await trio.testing.wait_all_tasks_blocked(0.001)

    async def until_idle(self) -> None:
        """Return when no connection is left and nothing of one is left in the bus."""
        while self.gateway.connections or self.world.bus.subscriptions:
            await trio.testing.wait_all_tasks_blocked(0.001)


@asynccontextmanager
async def open_gateway_world(
    config: Config | None = None,
    *,
    store: Store | None = None,
    page_origins: Callable[[], Sequence[str]] = lambda: ("http://127.0.0.1:8081", "http://localhost:8081"),
    tls: ssl.SSLContext | None = None,
) -> AsyncIterator[GatewayWorld]:
    config = config or gateway_config()
    async with open_world(store or MemoryStore(wall_clock_ms), config) as world, trio.open_nursery() as nursery:
        agents = HeldAgents(world.agents)
        addresses = AddressLimits.of(config.server)
        async with open_gateway(
            config,
            nursery,
            agents=agents,
            bus=world.bus,
            store=world.store,
            page_origins=page_origins,
            addresses=addresses,
        ) as gateway:
            yield GatewayWorld(world, agents, gateway, addresses, nursery, tls)
