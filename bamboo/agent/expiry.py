"""Sessions in which nothing has happened for long are deleted, each by its own runner: one that is used meanwhile
stays."""

from collections.abc import Callable, Sequence
from typing import Final, Protocol

import structlog
import trio

from bamboo.config import StorageConfig
from bamboo.core.types import SessionId
from bamboo.errors import BambooError, StoreError
from bamboo.store.base import Store

EVERY_S: Final = 3600.0
"""Between two turns."""

STEP: Final = 20
"""How many sessions are looked for at once."""

STEP_PAUSE_S: Final = 0.2
"""Between two steps, so that they stay a small part of what the store does."""

DAY_MS: Final = 24 * 3600 * 1000

log = structlog.get_logger("bamboo.agent")


class Deleter(Protocol):
    """What this needs of the agents."""

    async def delete(self, session_id: SessionId, *, unused_since_ms: int | None = None) -> None:
        """Delete the session, unless it was used since then. Raises BambooError."""


async def expire_sessions(agents: Deleter, store: Store, config: StorageConfig, now_ms: Callable[[], int]) -> None:
    """Delete every session to which nothing was committed for `session_retention_days`, at once and then every hour,
    until cancelled; with 0 nothing is deleted and this returns.

    A session with an unfinished run is never taken. What a session or the store refuses waits for the next turn.
    """
    if not config.session_retention_days:
        return
    while True:
        before_ms = now_ms() - round(config.session_retention_days * DAY_MS)
        deleted = 0
        try:
            while sessions := await store.idle_sessions(before_ms=before_ms, limit=STEP):
                gone = await _delete(agents, sessions, before_ms)
                deleted += gone
                if gone < len(sessions):
                    break  # it would be found again, and again
                await trio.sleep(STEP_PAUSE_S)
        except StoreError as error:
            log.warning("expiry_failed", error=error.message)
        if deleted:
            log.info("sessions_expired", deleted=deleted)
        await trio.sleep(EVERY_S)


async def _delete(agents: Deleter, sessions: Sequence[SessionId], before_ms: int) -> int:
    """Delete one after the other; returns how many went."""
    deleted = 0
    for session_id in sessions:
        try:
            await agents.delete(session_id, unused_since_ms=before_ms)
        except BambooError as error:
            log.info("session_not_expired", session_id=session_id, code=error.code)
        else:
            deleted += 1
    return deleted
