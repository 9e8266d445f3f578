"""Looking after the store: logs stay within their bounds, and what deleted sessions left goes. In small steps, between
the commits of sessions. Messages stay."""

from collections.abc import Awaitable, Callable
from typing import Final

import structlog
import trio

from bamboo.config import StorageConfig
from bamboo.errors import StoreError
from bamboo.store import wall_clock_ms
from bamboo.store.base import Store

EVERY_S: Final = 60.0
"""Between two looks at the logs, and before a store that refused is asked again."""

GROWTH_SHARE: Final = 8
"""Logs are looked at early when they have grown, all together, by this part of the smaller of their bounds."""

GROWTH_MIN_BYTES: Final = 64 * 1024
"""Less growth than this is no reason to look, however small the bounds."""

STEP_ROWS: Final = 1000
"""Rows in one step: with `STEP_BYTES` what keeps a step at a few milliseconds of the writer's time."""

STEP_PAUSE_S: Final = 0.005
"""Between two steps: the writer is at most about a third of its time at this, and a commit waits for one step at most.
"""

ERASE_PAUSE_S: Final = 1.0
"""Between two erasings: each ends with a checkpoint, and what is deleted meanwhile shares the next one."""

DAY_MS: Final = 24 * 3600 * 1000

log = structlog.get_logger("bamboo.store")


async def retain(store: Store, config: StorageConfig) -> None:
    """Keep the logs within `config`'s bounds and erase what deleted sessions left, until cancelled. A store that
    refuses is asked again.

    A log passes its bound, as all of them pass theirs, by no more than an eighth of the smaller one (at least
    GROWTH_MIN_BYTES), by what is committed while a look is taken and steps are on their way, and by what an unfinished
    run holds, or has held since the last look.
    """
    async with trio.open_nursery() as nursery:
        nursery.start_soon(_erase, store)
        nursery.start_soon(_trim, store, config)


async def _erase(store: Store) -> None:
    """Erase at once, which finishes what an earlier process began, and whenever a session was deleted."""
    while True:
        await _in_steps("erasing", lambda: store.erase(limit=STEP_ROWS))
        await trio.sleep(ERASE_PAUSE_S)
        with trio.move_on_after(EVERY_S):  # a reader, or the disk, may have been in the way
            await store.wait_deleted()


async def _trim(store: Store, config: StorageConfig) -> None:
    """Trim at once, every EVERY_S, and when the logs have grown. Expired keys go in any case."""
    bounds = [size for size in (config.retention_session_bytes, config.retention_total_bytes) if size]
    growth_bytes = max(min(bounds, default=0) // GROWTH_SHARE, GROWTH_MIN_BYTES)

    async def step() -> int:
        return await store.trim(
            limit=STEP_ROWS,
            before_ms=wall_clock_ms() - round(config.retention_days * DAY_MS) if config.retention_days else 0,
            session_bytes=config.retention_session_bytes,
            total_bytes=config.retention_total_bytes,
        )

    while True:
        trimmed = await _in_steps("retention", step)
        with trio.move_on_after(EVERY_S):
            if bounds and trimmed:
                await store.wait_grown(growth_bytes)
            else:
                await trio.sleep_forever()


async def _in_steps(what: str, step: Callable[[], Awaitable[int]]) -> bool:
    """Take steps until one has found nothing to do. Returns whether that was so: else the store refuses."""
    done = 0
    try:
        while taken := await step():
            done += taken
            await trio.sleep(STEP_PAUSE_S)
    except StoreError as error:
        log.warning(f"{what}_failed", error=error.message)
        return False
    finally:
        if done:
            log.debug(what, removed=done)
    return True
