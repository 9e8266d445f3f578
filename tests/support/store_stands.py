"""Stores to test with, how they are stopped and started, and a session's owner that writes what a runner would."""

from collections.abc import AsyncIterator, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path
from typing import Protocol, Self

import trio

from bamboo.config import StorageConfig
from bamboo.core.events import (
    AgentComplete,
    AgentMessage,
    AgentToolComplete,
    Event,
    EventBody,
    RunStarted,
    UserMessage,
)
from bamboo.core.types import (
    Content,
    MessageId,
    RunId,
    RunStats,
    SessionId,
    ToolCall,
    ToolCallId,
    Usage,
    text_content,
)
from bamboo.store.base import Commit, IdempotencyKey, Run, Session, SessionLog, Store
from bamboo.store.memory import MemoryStore
from bamboo.store.sqlite import open_sqlite_store
from bamboo.store.sqlite.store import SqliteStore

DAY_MS = 24 * 3600 * 1000
HELLO = text_content("hello")


class Clock:
    """Milliseconds that go on only when a test says so."""

    def __init__(self) -> None:
        self.now_ms = 1_700_000_000_000

    def __call__(self) -> int:
        return self.now_ms


class Stand(Protocol):
    """A store of one kind. `restart` stops and starts it, cleanly or as a crash would, and renews `store`."""

    store: Store
    clock: Clock

    async def restart(self, *, clean: bool) -> None: ...


class MemoryStand:
    def __init__(self) -> None:
        self.clock = Clock()
        self.memory = MemoryStore(self.clock)
        self.store: Store = self.memory

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_exc: object) -> None:
        return None

    async def restart(self, *, clean: bool) -> None:
        if clean:
            await self.store.mark_clean()
            self.memory.restart()
        else:
            self.memory.crash()


class SqliteStand:
    def __init__(self, path: Path) -> None:
        self.clock = Clock()
        self.config = StorageConfig(path=path)
        self._opened = AsyncExitStack()
        self.store: Store

    async def __aenter__(self) -> Self:
        self.store = await self._opened.enter_async_context(open_sqlite_store(self.config, now_ms=self.clock))
        return self

    async def __aexit__(self, *_exc: object) -> None:
        await self._opened.aclose()

    async def restart(self, *, clean: bool) -> None:
        if clean:
            await self.store.mark_clean()
        await self._opened.aclose()
        await self.__aenter__()


@asynccontextmanager
async def opened(path: Path, *, wal_limit_bytes: int = 64 * 1024 * 1024) -> AsyncIterator[SqliteStore]:
    """The store in this file; everything in the block, leaving it included, has 30 seconds."""
    with trio.fail_after(30):
        async with open_sqlite_store(
            StorageConfig(path=path), now_ms=Clock(), wal_limit_bytes=wal_limit_bytes
        ) as store:
            yield store


class Author:
    """Writes a session's log: numbers events behind the head, and stamps them with the clock."""

    def __init__(self, log: SessionLog, clock: Clock) -> None:
        self.log = log
        self.clock = clock

    def events(self, run_id: str | None, *bodies: EventBody) -> list[Event]:
        return [
            Event(
                self.log.session_id,
                self.log.epoch,
                self.log.head + 1 + index,
                self.clock.now_ms,
                None if run_id is None else RunId(run_id),
                body,
            )
            for index, body in enumerate(bodies)
        ]

    def session(self, *, title: str | None = None) -> Session:
        return Session(self.log.session_id, self.clock.now_ms, self.clock.now_ms, title=title)

    def acceptance(
        self,
        run_id: str,
        *more: EventBody,
        content: Content = HELLO,
        key: str | None = None,
        fingerprint: bytes = b"content",
    ) -> Commit:
        """A chat that is accepted; it creates the session if there is none. `more` are further events of the run."""
        message_id = MessageId(f"{run_id}-user")
        run = Run(RunId(run_id), self.log.session_id, message_id, content, self.clock.now_ms)
        return Commit(
            events=self.events(run_id, UserMessage(message_id, content), *more),
            session=self.session() if self.log.head == 0 and self.log.session is None else None,
            accept=run,
            key=None if key is None else IdempotencyKey(key, fingerprint, self.clock.now_ms + DAY_MS),
        )

    async def accept(
        self, run_id: str, *more: EventBody, key: str | None = None, fingerprint: bytes = b"content"
    ) -> None:
        await self.log.commit(self.acceptance(run_id, *more, key=key, fingerprint=fingerprint))

    async def start(self, run_id: str) -> None:
        await self.accept(run_id, STARTED)

    async def write(self, run_id: str | None, *bodies: EventBody) -> None:
        await self.log.commit(Commit(self.events(run_id, *bodies)))


STARTED = RunStarted("openai", "gpt", 1)
COMPLETE = AgentComplete("stop", Usage(1, 2, 3), RunStats(1, 2, 3))


def said(text: str, message_id: str, *, calls: tuple[ToolCall, ...] = ()) -> AgentMessage:
    return AgentMessage(MessageId(message_id), text_content(text), "openai", "gpt", tool_calls=calls)


def tool_result(message_id: str, call_id: str) -> AgentToolComplete:
    return AgentToolComplete(MessageId(message_id), ToolCallId(call_id), "t", ok=True, result="out", elapsed_ms=1)


async def all_events(store: Store, session_id: SessionId, *, max_bytes: int = 10_000_000) -> Sequence[Event]:
    page = await store.read(session_id, 0, max_bytes=max_bytes)
    return () if page is None else page.events
