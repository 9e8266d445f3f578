"""Agents without a socket: the memory store, the bus, the registry, and a model that the test plays."""

from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass

from bamboo.agent.registry import Agents, open_agents
from bamboo.bus.event_bus import EventBus
from bamboo.config import AgentConfig, Config, LlmConfig, ProviderConfig, StorageConfig, StreamConfig
from bamboo.core.events import AgentComplete, AgentError, AgentStopped, Event, Gap, Item, Outage
from bamboo.core.types import Chat, Cursor, RunId, SessionId, text_content
from bamboo.llm.base import Providers
from bamboo.store import wall_clock_ms
from bamboo.store.base import Store
from bamboo.tools.toolbox import EmptyToolbox, Toolbox
from tests.support.model import PlayedModel


def chat(text: str, session_id: str | None = None, **options: object) -> Chat:
    return Chat(text_content(text), SessionId(session_id) if session_id is not None else None, **options)  # type: ignore[arg-type]  # a test's shorthand


def config(
    agent: AgentConfig | None = None,
    stream: StreamConfig | None = None,
    storage: StorageConfig | None = None,
    *,
    max_retries: int = 0,
) -> Config:
    return Config(
        agent=agent or AgentConfig(),
        stream=stream or StreamConfig(),
        storage=storage or StorageConfig(),
        llm=LlmConfig(
            default_provider="played",
            max_retries=max_retries,
            providers={"played": ProviderConfig(kind="scripted", model="played-1")},
        ),
    )


@dataclass
class World:
    store: Store
    bus: EventBus
    agents: Agents
    model: PlayedModel

    async def events(self, session_id: str) -> list[Event]:
        """Everything that is durable of a log."""
        page = await self.store.read(SessionId(session_id), 0, max_bytes=10_000_000)
        return [] if page is None else list(page.events)

    async def read_run(self, session_id: str, run_id: RunId, after: Cursor) -> list[Item]:
        """A run's events as a subscriber gets them, to its terminal event."""
        items: list[Item] = []
        with self.bus.subscribe(SessionId(session_id), run_id=run_id) as subscription:
            await subscription.begin(after)
            while batch := await subscription.receive():
                items += batch
        return items


@asynccontextmanager
async def open_world(
    store: Store,
    settings: Config | None = None,
    *,
    toolbox: Callable[[], Toolbox] = EmptyToolbox,
    model: PlayedModel | None = None,
    providers: Providers | None = None,
    now_ms: Callable[[], int] = wall_clock_ms,
) -> AsyncIterator[World]:
    """`providers` are there instead of `model` alone, if they are given."""
    settings = settings or config()
    model = model or PlayedModel()
    providers = providers or Providers({"played": model}, "played")
    bus = EventBus(store, window_bytes=settings.stream.window_bytes)
    async with open_agents(
        settings, store=store, bus=bus, providers=providers, toolbox=toolbox, now_ms=now_ms
    ) as agents:
        yield World(store, bus, agents, model)


def types(items: Sequence[Item]) -> list[str]:
    return [type_of(item) for item in items]


def type_of(item: Item) -> str:
    """As the wire has it."""
    if isinstance(item, Gap | Outage):
        return "gap" if isinstance(item, Gap) else "error"
    return item.body.type


def is_terminal(item: Item) -> bool:
    return isinstance(item, Event) and isinstance(item.body, AgentComplete | AgentError | AgentStopped)
