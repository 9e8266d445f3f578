"""What outlives a process of the server, and the processes that come and go on it: agents over a mortal store."""

from collections.abc import Awaitable, Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Final, Protocol

import trio

from bamboo.agent.registry import Agents
from bamboo.bus.event_bus import EventBus
from bamboo.config import AgentConfig, Config, StorageConfig
from bamboo.core.events import Event
from bamboo.core.types import Accepted, Chat, JsonObject, RunId, SessionId, ToolCallId, ToolResult
from bamboo.errors import BambooError
from bamboo.store.base import Store
from bamboo.store.memory import MemoryStore
from tests.support.agents import config, open_world
from tests.support.follower import Follower
from tests.support.invariants import check_history, check_log, history_of, runs_of
from tests.support.mortal_store import Life, MortalStore
from tests.support.talker import Talker
from tests.support.tools import FakeToolbox

_START_MS: Final = 1_700_000_000_000


def now_ms() -> int:
    """The wall's time goes with the loop's: virtual where that is."""
    return _START_MS + round(trio.current_time() * 1000)


def settings(**agent: float) -> Config:
    """Small and impatient: a store that does not answer within 1 s is given up; a failed model call is repeated
    once."""
    return config(AgentConfig(**agent), storage=StorageConfig(commit_timeout_s=1), max_retries=1)  # type: ignore[arg-type]  # a test's shorthand


class Tools(FakeToolbox):
    """Keeps count of the calls that were really made."""

    def __init__(self, **tools: Callable[[JsonObject], Awaitable[ToolResult]]) -> None:
        super().__init__(**tools)
        self.touched: list[ToolCallId] = []

    async def call(self, tool_call_id: ToolCallId, tool: str, arguments: JsonObject) -> ToolResult:
        self.touched.append(tool_call_id)
        return await super().call(tool_call_id, tool, arguments)


@dataclass
class Process:
    """A process of the server. `readers` are tasks that end with it."""

    agents: Agents
    bus: EventBus
    model: Talker
    tools: Tools
    readers: trio.Nursery

    async def insist(self, chat: Chat) -> Accepted:
        """Send the chat as a client does: again, as long as it is told that this may help."""
        while True:
            try:
                return await self.agents.chat(chat)
            except BambooError as error:
                if not error.retryable:
                    raise
                await trio.sleep(0.1)

    def follow(self, follower: Follower) -> None:
        self.readers.start_soon(follower.follow_on, self.bus)

    def check_nothing_left(self) -> None:
        assert self.agents.active_runs == self.agents.queued_runs == self.agents.sessions == 0, repr(self.agents)
        assert self.bus.sessions == self.bus.subscriptions == 0, repr(self.bus)
        assert not self.model.speaking
        assert not self.tools.running


class Disk(Protocol):
    """A real store. `restart` ends and begins it, cleanly or as a crash would, and renews `store`."""

    store: Store

    async def restart(self, *, clean: bool) -> None: ...


class MemoryDisk:
    def __init__(self) -> None:
        self._memory = MemoryStore(now_ms)
        self.store: Store = self._memory

    async def restart(self, *, clean: bool) -> None:
        if clean:
            await self.store.mark_clean()
            self._memory.restart()
        else:
            self._memory.crash()


class Ground:
    """A store, and the processes that use it, one after another."""

    def __init__(self, disk: Disk | None = None) -> None:
        self._disk = disk or MemoryDisk()
        self.mortal = MortalStore(self._disk.store)

    async def live(
        self,
        do: Callable[[Process], Awaitable[None]],
        settings: Config | None = None,
        *,
        model: Talker | None = None,
        tools: Tools | None = None,
    ) -> None:
        """A process's life: it takes up what is there, does `do`, and stops. Where the store dies it is cut short."""
        model, tools = model or Talker(), tools or Tools()
        alive: Process | None = None
        with trio.CancelScope() as process:
            self.mortal.on_death = process.cancel
            async with trio.open_nursery() as readers:
                async with open_world(
                    self.mortal.store, settings, model=model, toolbox=lambda: tools, now_ms=now_ms
                ) as world:
                    alive = Process(world.agents, world.bus, model, tools, readers)
                    await do(alive)
                readers.cancel_scope.cancel()
        if alive is not None:
            alive.check_nothing_left()

    async def finish(self, *followers: Follower, settings: Config | None = None) -> None:
        """One more process, in which everything comes to its end, and the `followers` get all of it."""

        async def do(process: Process) -> None:
            await self.mortal.all_ended()
            for follower in followers:
                await follower.catch_up(process.bus)

        await self.live(do, settings)

    async def restart(self, *, clean: bool) -> None:
        """What the next process finds is what was committed; `clean` says that the last one stopped cleanly. No process
        may be alive."""
        await self._disk.restart(clean=clean)
        self.mortal.revive(self._disk.store)

    async def trim(self, rows: int) -> None:
        """Retention: about so many rows go, whatever their age."""
        store = self._disk.store
        await store.trim(before_ms=now_ms() + 1, limit=rows)
        for life in list(self.lives):
            extent = None if life.deleted else await store.extent(life.session_id)
            life.floor = life.floor if extent is None else extent.floor

    @property
    def lives(self) -> Iterator[Life]:
        for lives in self.mortal.lives.values():
            yield from lives

    @property
    def runs(self) -> list[RunId]:
        """All that were ever accepted."""
        return [run_id for life in self.lives for run_id in runs_of(life.events)]

    def log(self, session_id: SessionId) -> list[Event]:
        """Of the session's last life."""
        return self.mortal.lives[session_id][-1].events

    async def check(self, accepted: Iterable[Accepted] = (), followers: Iterable[Follower] = ()) -> None:
        """Everything is over, and is as it has to be: the logs, the histories, and whoever was told something."""
        for life in list(self.lives):
            check_log(life.events)
            if not life.deleted:
                await self._check_kept(life)
        runs = self.runs
        for answer in accepted:
            assert runs.count(answer.run_id) == 1, f"{answer.run_id} was accepted"
        for follower in followers:
            follower.check_all()

    async def _check_kept(self, life: Life) -> None:
        store = self._disk.store
        page = await store.read(life.session_id, 0, max_bytes=10**9)
        assert page is not None
        assert page.events == life.events[page.extent.floor :]
        messages = await store.messages(life.session_id)
        check_history(messages)
        assert list(messages) == history_of(life.events)
        epochs = page.extent.epochs
        assert len({start.epoch for start in epochs}) == len(epochs)
        for start, end in zip(epochs, [*[start.first_seq for start in epochs[1:]], life.head + 1], strict=True):
            assert {event.epoch for event in life.events[start.first_seq - 1 : end - 1]} <= {start.epoch}
