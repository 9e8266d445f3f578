"""The HTTP server over real sockets, the agents and the memory store behind it, and a model that the test plays."""

from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from dataclasses import dataclass

import trio
import trio.testing

from bamboo.config import AgentConfig, Config, LlmConfig, ProviderConfig, ServerConfig, StreamConfig
from bamboo.store import wall_clock_ms
from bamboo.store.base import Store
from bamboo.store.memory import MemoryStore
from bamboo.web.app import Web, open_web
from bamboo.wire.addresses import AddressLimits
from tests.support.agents import World, open_world
from tests.support.http_client import Answer, Headers, HttpConnection, SseReader, ask, connect
from tests.support.model import PlayedCall

DEADLINE_S = 20
"""What one test may take: far more than any needs."""


def web_config(
    server: ServerConfig | None = None, *, stream: StreamConfig | None = None, agent: AgentConfig | None = None
) -> Config:
    return Config(
        server=server or ServerConfig(port=0),
        stream=stream or StreamConfig(),
        agent=agent or AgentConfig(),
        llm=LlmConfig(
            default_provider="played",
            max_retries=0,
            providers={"played": ProviderConfig(kind="scripted", model="played-1")},
        ),
    )


@dataclass
class WebWorld:
    world: World
    web: Web
    nursery: trio.Nursery

    @property
    def url(self) -> str:
        return self.web.url

    def connect(self) -> AbstractAsyncContextManager[HttpConnection]:
        return connect(self.url)

    async def ask(
        self, method: str, target: str, *, headers: Headers = (), body: bytes = b"", json: object = None
    ) -> Answer:
        return await ask(self.url, method, target, headers=headers, body=body, json=json)

    async def chat(self, text: str, session_id: str | None = None, **fields: object) -> dict[str, str]:
        """Start a run; its model call is then `next_call`'s."""
        json = {"message": text, **fields} | ({} if session_id is None else {"session_id": session_id})
        answer = await self.ask("POST", "/api/v1/chat", json=json)
        assert answer.status in (200, 201), answer
        return dict(answer.json())

    async def nobody_subscribed(self) -> None:
        """Return when the bus has no subscription left: a client hears the end of an answer before the server is done
        with it."""
        while self.world.bus.subscriptions:
            await trio.testing.wait_all_tasks_blocked(0.001)

    async def next_call(self) -> PlayedCall:
        return await self.world.model.next_call()

    async def finished_run(self, *texts: str, session_id: str | None = None) -> dict[str, str]:
        """A run that said `texts` and ended."""
        accepted = await self.chat("hello", session_id)
        call = await self.next_call()
        for text in texts:
            call.say(text)
        call.end()
        async with self.connect() as connection:
            reader = await connection.open_sse("GET", accepted["stream_url"])
            await reader.rest()
        return accepted

    async def open_stream(self, connection: HttpConnection, target: str, **headers: str) -> SseReader:
        names = {name.replace("_", "-"): value for name, value in headers.items()}
        return await connection.open_sse("GET", target, headers=names)


@asynccontextmanager
async def open_web_world(
    config: Config | None = None,
    *,
    store: Store | None = None,
    gateway_url: str | None = "ws://127.0.0.1:18790/",
    ready: Callable[[], bool] = lambda: True,
) -> AsyncIterator[WebWorld]:
    """Everything in the block, leaving it included, has `DEADLINE_S`."""
    config = config or web_config()
    with trio.fail_after(DEADLINE_S):
        async with _open(config, store or MemoryStore(wall_clock_ms), gateway_url, ready) as world:
            yield world


@asynccontextmanager
async def _open(
    config: Config, store: Store, gateway_url: str | None, ready: Callable[[], bool]
) -> AsyncIterator[WebWorld]:
    async with (
        open_world(store, config) as world,
        trio.open_nursery() as nursery,
        open_web(
            config,
            nursery,
            agents=world.agents,
            bus=world.bus,
            store=world.store,
            providers=world.agents._around.providers,
            addresses=AddressLimits.of(config.server),
            gateway_url=gateway_url,
            ready=ready,
        ) as web,
    ):
        yield WebWorld(world, web, nursery)
