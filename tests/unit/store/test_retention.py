"""Logs keep within their bounds by themselves, and what deleted sessions left goes; what a store refuses is asked for
again."""

import pytest
import trio
import trio.testing

from bamboo.config import StorageConfig
from bamboo.core.events import SessionClosed, SessionCreated
from bamboo.core.types import SessionId
from bamboo.errors import StoreError
from bamboo.store import wall_clock_ms
from bamboo.store.base import Commit
from bamboo.store.memory import MemoryStore
from bamboo.store.retention import DAY_MS, ERASE_PAUSE_S, EVERY_S, GROWTH_MIN_BYTES, STEP_ROWS, retain
from tests.support.store_stands import Author, Clock

ONE = SessionId("one")
KIB = 1024


class Tidied(MemoryStore):
    """Has `rows` to trim and `left` to erase, three at most in a step; `failures` are raised first. `trims` are the
    bounds that it was given, `looks` the times at which an erasing found nothing."""

    def __init__(self) -> None:
        super().__init__(wall_clock_ms)
        self.rows = 0
        self.left = 0
        self.failures = 0
        self.trims: list[dict[str, int]] = []
        self.looks: list[float] = []

    async def trim(self, *, limit: int, before_ms: int = 0, session_bytes: int = 0, total_bytes: int = 0) -> int:
        await trio.lowlevel.checkpoint()
        self.trims.append({"before_ms": before_ms, "session_bytes": session_bytes, "total_bytes": total_bytes})
        self._fail()
        removed = min(self.rows, 3, limit)
        self.rows -= removed
        return removed

    async def erase(self, *, limit: int) -> int:
        await trio.lowlevel.checkpoint()
        self._fail()
        removed = min(self.left, 3, limit)
        self.left -= removed
        if not removed:
            self.looks.append(trio.current_time())
        return removed

    def _fail(self) -> None:
        if self.failures:
            self.failures -= 1
            raise StoreError("disk failing")


async def run_for(seconds: float, store: MemoryStore, config: StorageConfig) -> None:
    with trio.move_on_after(seconds):
        await retain(store, config)


async def test_everything_that_is_too_much_goes_at_once_and_again_a_minute_later(
    autojump_clock: trio.testing.MockClock,
) -> None:
    store, now_ms = Tidied(), wall_clock_ms()
    store.rows = 10
    config = StorageConfig(retention_days=2, retention_session_bytes=5000, retention_total_bytes=7000)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(retain, store, config)
        await trio.sleep(EVERY_S / 2)
        assert store.rows == 0
        asked = len(store.trims)
        store.rows = 10
        await trio.sleep(EVERY_S)
        assert store.rows == 0
        nursery.cancel_scope.cancel()
    assert asked == 5  # four steps, and one that found nothing
    for bounds in store.trims:
        assert abs(now_ms - 2 * DAY_MS - bounds["before_ms"]) < 60_000
        assert (bounds["session_bytes"], bounds["total_bytes"]) == (5000, 7000)
    assert autojump_clock.current_time() >= EVERY_S


async def test_without_bounds_only_keys_and_deleted_sessions_go(autojump_clock: trio.testing.MockClock) -> None:
    del autojump_clock
    store = Tidied()
    store.rows = store.left = 5
    config = StorageConfig(retention_days=0, retention_session_bytes=0, retention_total_bytes=0)
    await run_for(3 * EVERY_S, store, config)
    assert (store.rows, store.left) == (0, 0)
    assert {tuple(bounds.values()) for bounds in store.trims} == {(0, 0, 0)}


@pytest.mark.parametrize("failures", [1, 2, 7])
async def test_a_store_that_refuses_is_asked_again_a_minute_later(
    autojump_clock: trio.testing.MockClock, failures: int
) -> None:
    del autojump_clock
    store = Tidied()
    store.rows, store.left, store.failures = 10, 10, failures
    await run_for(EVERY_S * failures + 10, store, StorageConfig())
    assert (store.rows, store.left) == (0, 0)


async def delete(store: MemoryStore, name: str) -> None:
    async with store.own(SessionId(name)) as log:
        author = Author(log, Clock())
        await author.start(f"r-{name}")
        await log.commit(Commit(author.events(None, SessionClosed()), delete=True))


async def test_a_deleted_session_is_erased_at_once_and_those_deleted_soon_after_it_together(
    autojump_clock: trio.testing.MockClock,
) -> None:
    store = Tidied()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(retain, store, StorageConfig())
        await trio.sleep(EVERY_S / 3)
        assert store.looks == [0.0]  # at the start: what an earlier process left
        since = autojump_clock.current_time()
        store.left = 3
        await delete(store, "a")
        await trio.testing.wait_all_tasks_blocked()
        assert store.left == 0
        for name in "bcdefg":
            await delete(store, name)
            await trio.sleep(ERASE_PAUSE_S / 10)
        await trio.sleep(5 * ERASE_PAUSE_S)
        nursery.cancel_scope.cancel()
    looks = store.looks[1:]
    assert looks[0] - since < ERASE_PAUSE_S / 10
    assert len(looks) == 2
    assert looks[1] - looks[0] >= ERASE_PAUSE_S


async def put(store: MemoryStore, text: str) -> None:
    async with store.own(ONE) as log:
        author = Author(log, Clock())
        session = author.session() if log.session is None else None
        await log.commit(Commit(author.events(None, SessionCreated(text)), session=session))


def kept_bytes(store: MemoryStore) -> int:
    return store._sessions[ONE].log_bytes


@pytest.mark.parametrize("key", ["retention_session_bytes", "retention_total_bytes"])
async def test_a_log_that_grows_quickly_passes_its_bound_by_an_eighth_at_most(
    autojump_clock: trio.testing.MockClock, key: str
) -> None:
    del autojump_clock
    bound = 1024 * KIB
    row = 8 * KIB
    most = 0
    store = MemoryStore(wall_clock_ms)
    config = StorageConfig(retention_days=0, retention_session_bytes=0, retention_total_bytes=0)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(retain, store, config.model_copy(update={key: bound}))
        for _ in range(1000):
            await put(store, "x" * row)
            most = max(most, kept_bytes(store))
            await trio.sleep(EVERY_S / 3000)
        nursery.cancel_scope.cancel()
    # What was written since the last look, and the row that is being written.
    assert bound < most <= bound + bound // 8 + 2 * (row + 100)


async def test_a_small_bound_is_not_looked_after_at_every_commit(autojump_clock: trio.testing.MockClock) -> None:
    del autojump_clock

    store = Tidied()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(retain, store, StorageConfig(retention_session_bytes=KIB))
        for _ in range(100):
            await put(store, "x" * (GROWTH_MIN_BYTES // 50))
            await trio.testing.wait_all_tasks_blocked()
        nursery.cancel_scope.cancel()
    assert 2 <= len(store.trims) - 1 <= 3


async def test_one_step_is_small(autojump_clock: trio.testing.MockClock) -> None:
    del autojump_clock
    limits: list[int] = []

    class Noting(MemoryStore):
        async def trim(self, *, limit: int, before_ms: int = 0, session_bytes: int = 0, total_bytes: int = 0) -> int:
            limits.append(limit)
            return await super().trim(
                limit=limit, before_ms=before_ms, session_bytes=session_bytes, total_bytes=total_bytes
            )

        async def erase(self, *, limit: int) -> int:
            limits.append(limit)
            return await super().erase(limit=limit)

    store = Noting(wall_clock_ms)
    await run_for(1, store, StorageConfig())
    assert set(limits) == {STEP_ROWS}
