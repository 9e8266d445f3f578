"""What the HTTP server answers from. It owns none of it."""

from collections.abc import Callable
from dataclasses import dataclass

from bamboo.agent.registry import Agents
from bamboo.bus.event_bus import EventBus
from bamboo.config import Config
from bamboo.llm.base import Providers
from bamboo.store.base import Store
from bamboo.web.readiness import StoreProbe
from bamboo.web.stream import OpenStreams


@dataclass(frozen=True, slots=True)
class Services:
    """`gateway_url` is None without a gateway. `ready` is false while the server starts."""

    config: Config
    agents: Agents
    bus: EventBus
    store: Store
    providers: Providers
    gateway_url: str | None
    ready: Callable[[], bool]
    streams: OpenStreams
    store_probe: StoreProbe
