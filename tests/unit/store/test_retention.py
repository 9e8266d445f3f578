"""Old events leave the log by themselves, in small steps; what a store refuses is asked for again."""

import trio
import trio.testing

from bamboo.config import StorageConfig
from bamboo.errors import StoreError
from bamboo.store import wall_clock_ms
from bamboo.store.memory import MemoryStore
from bamboo.store.retention import DAY_MS, EVERY_S, retain


class Trimmed(MemoryStore):
    """Has `rows` to remove, three at most in a step; `failures` are raised first. `asked` are the times it was
    given."""

    def __init__(self) -> None:
        super().__init__(wall_clock_ms)
        self.rows = 0
        self.failures = 0
        self.asked: list[int] = []

    async def trim(self, *, before_ms: int, limit: int) -> int:
        await trio.lowlevel.checkpoint()
        self.asked.append(before_ms)
        if self.failures:
            self.failures -= 1
            raise StoreError("disk failing")
        removed = min(self.rows, 3, limit)
        self.rows -= removed
        return removed


async def test_everything_that_is_too_old_goes_at_once_and_then_every_hour(
    autojump_clock: trio.testing.MockClock,
) -> None:
    store = Trimmed()
    store.rows = 10
    with trio.move_on_after(EVERY_S - 1):
        await retain(store, StorageConfig(retention_days=2))
    assert store.rows == 0
    assert all(abs(wall_clock_ms() - 2 * DAY_MS - before_ms) < 60_000 for before_ms in store.asked)
    assert autojump_clock.current_time() >= EVERY_S - 1


async def test_a_store_that_refuses_is_asked_again_at_the_next_turn(autojump_clock: trio.testing.MockClock) -> None:
    store = Trimmed()
    store.rows, store.failures = 10, 1
    with trio.move_on_after(EVERY_S + 10):
        await retain(store, StorageConfig(retention_days=2))
    assert store.rows == 0
    assert autojump_clock.current_time() >= EVERY_S


async def test_without_a_limit_nothing_is_ever_removed() -> None:
    store = Trimmed()
    with trio.fail_after(5):
        await retain(store, StorageConfig(retention_days=0))
    assert store.asked == []
