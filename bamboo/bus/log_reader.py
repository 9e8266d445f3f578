"""What a subscription reads of a stored log, and how."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from bamboo.core.events import Event
from bamboo.core.types import EpochStart, RunId, SessionId

READ_BYTES = 256 * 1024
"""How much of a log one read from the store brings: bounds a lagging reader's memory, and one write to its client."""


@dataclass(frozen=True, slots=True)
class LogExtent:
    """What there is of a stored log: its lives, oldest first; the highest seq that retention removed; its last durable
    seq."""

    epochs: Sequence[EpochStart]
    floor: int
    head: int


@dataclass(frozen=True, slots=True)
class LogPage:
    """A piece of a log from one read transaction: `events` in order, everything that there is after the asked seq and
    up to `through`."""

    extent: LogExtent
    events: Sequence[Event]
    through: int


class LogReader(Protocol):
    """Where a subscription reads what the window no longer has. The store satisfies it."""

    async def extent(self, session_id: SessionId) -> LogExtent | None:
        """None: there is no such session."""

    async def read(
        self, session_id: SessionId, after_seq: int, *, max_bytes: int, run_id: RunId | None = None
    ) -> LogPage | None:
        """The durable events after `after_seq`, oldest first, about `max_bytes` of them and at least one if there is
        one.

        With `run_id` only that run's; `through` moves past the others all the same. None: there is no such session.
        Raises StoreError.
        """
