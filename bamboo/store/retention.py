"""Retention: events that are older than `storage.retention_days` leave the log, in small steps. Messages stay."""

from typing import Final

import structlog
import trio

from bamboo.config import StorageConfig
from bamboo.errors import StoreError
from bamboo.store import wall_clock_ms
from bamboo.store.base import Store

EVERY_S: Final = 3600.0
STEP_ROWS: Final = 200
"""Rows in one transaction: a few milliseconds of the writer's time."""

STEP_PAUSE_S: Final = 0.05
"""Between two steps, so that commits of sessions go between them."""

DAY_MS: Final = 24 * 3600 * 1000

log = structlog.get_logger("bamboo.store")


async def retain(store: Store, config: StorageConfig) -> None:
    """Trim at once, then every hour, until cancelled. With `retention_days` 0 nothing is removed and this returns.

    A store that refuses is asked again at the next turn.
    """
    if not config.retention_days:
        return
    while True:
        before_ms = wall_clock_ms() - round(config.retention_days * DAY_MS)
        removed = 0
        try:
            while step := await store.trim(before_ms=before_ms, limit=STEP_ROWS):
                removed += step
                await trio.sleep(STEP_PAUSE_S)
        except StoreError as error:
            log.warning("retention_failed", error=error.message)
        if removed:
            log.info("retention", removed=removed)
        await trio.sleep(EVERY_S)
