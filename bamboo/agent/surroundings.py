"""What a session's runner is made with, and what it needs of whoever keeps it."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

from bamboo.agent.slots import Slots
from bamboo.bus.event_bus import EventBus
from bamboo.config import Config
from bamboo.core.types import RunId, SessionId
from bamboo.llm.base import Providers
from bamboo.store.base import Store
from bamboo.tools.toolbox import Toolbox


@dataclass(frozen=True, slots=True)
class Surroundings:
    """What every runner is made with."""

    config: Config
    store: Store
    bus: EventBus
    providers: Providers
    toolbox: Callable[[], Toolbox]
    """The newest toolbox; a run pins the one it starts with."""
    slots: Slots
    now_ms: Callable[[], int]
    new_run_id: Callable[[], RunId]


class Home(Protocol):
    """What a runner needs of the registry."""

    draining: bool
    queued_runs: int
    """Of all sessions."""

    def rest(self, session_id: SessionId) -> None:
        """The session has nothing to do: from now on, until its next request, it may be told to leave."""

    def forget(self, session_id: SessionId) -> None:
        """Close the session's inbox. Its next request starts a new runner, as soon as this one has ended."""
