"""A store that a test can hold up or break: a memory store whose commits wait at a gate and fail on demand."""

from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager

import trio

from bamboo.core.types import SessionId
from bamboo.store.base import Commit, SessionLog
from bamboo.store.memory import MemoryStore


class Gate:
    """Open at first. While it is closed, whoever comes to `pass_through` waits; `arrived` tells that somebody does."""

    def __init__(self) -> None:
        self._open = trio.Event()
        self._open.set()
        self.waiting = 0
        self._arrival = trio.Event()

    def close(self) -> None:
        if self._open.is_set():
            self._open = trio.Event()

    def open(self) -> None:
        self._open.set()

    async def arrived(self) -> None:
        while not self.waiting:
            await self._arrival.wait()

    async def pass_through(self) -> None:
        self.waiting += 1
        self._arrival.set()
        self._arrival = trio.Event()
        try:
            await self._open.wait()
        finally:
            self.waiting -= 1


class GatedLog:
    def __init__(self, log: SessionLog, store: "GatedStore") -> None:
        self._log = log
        self._store = store
        self.session_id = log.session_id
        self.epoch = log.epoch
        self.first_seq = log.first_seq
        self.session = log.session
        self.unfinished = log.unfinished
        self.head = log.head

    async def commit(self, commit: Commit) -> None:
        await self._store.gate.pass_through()
        if self._store.failures:
            raise self._store.failures.pop(0)
        await self._log.commit(commit)
        self.head = self._log.head
        self._store.commits.append(commit)
        if not self._store.answers:
            await trio.sleep_forever()


class GatedStore(MemoryStore):
    """`gate` holds commits up, `failures` are raised by the next ones; `loading_gate` and `loading_failures` are for
    the next owners' loading. `commits` are those that were done, `loads` counts the owners that came, also in vain.
    """

    def __init__(self, now_ms: Callable[[], int]) -> None:
        super().__init__(now_ms)
        self.gate = Gate()
        self.failures: list[Exception] = []
        self.loading_gate = Gate()
        self.loading_failures: list[Exception] = []
        self.loads = 0
        self.commits: list[Commit] = []
        self.answers = True
        """While it is False, whoever commits never hears that it was done."""

    @asynccontextmanager
    async def own(self, session_id: SessionId, *, new_epoch: bool = False) -> AsyncIterator[SessionLog]:
        self.loads += 1
        await self.loading_gate.pass_through()
        if self.loading_failures:
            await trio.lowlevel.checkpoint()
            raise self.loading_failures.pop(0)
        async with super().own(session_id, new_epoch=new_epoch) as log:
            yield GatedLog(log, self)
