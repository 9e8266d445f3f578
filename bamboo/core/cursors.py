"""Where a cursor stands in a log that may have lived through crashes.

The idea is Kafka's leader epoch, for one node (KIP-101): a seq says a place only together with the life of the log that
it was seen in.
"""

from collections.abc import Sequence

from bamboo.core.events import Gap
from bamboo.core.types import Cursor, Epoch, EpochStart, SessionId


def resolve(
    session_id: SessionId, cursor: Cursor, epochs: Sequence[EpochStart], head: int, floor: int
) -> tuple[int, Gap | None]:
    """The seq after which a reader with this cursor goes on, and the gap that it must be told of first.

    `epochs` are the log's lives, oldest first, never empty; `head` is its last seq, `floor` the highest seq that
    retention removed (0 if none). A cursor is good up to the seq before the next epoch's first, in the newest epoch up
    to the head: what lies beyond died with a process (`crash`). An epoch that is not of this log is `epoch`: from the
    start. A place below the floor is no gap of the cursor's: whoever reads from there meets it.
    """
    for index, start in enumerate(epochs):
        if start.epoch == cursor.epoch:
            last = epochs[index + 1].first_seq - 1 if index + 1 < len(epochs) else head
            if cursor.seq <= last:
                return cursor.seq, None
            return last, Gap(session_id, last + 1, cursor.seq, "crash", Cursor(cursor.epoch, last))
    return floor, Gap(session_id, None, None, "epoch", Cursor(epoch_at(epochs, floor), floor))


def epoch_at(epochs: Sequence[EpochStart], seq: int) -> Epoch:
    """The epoch that the event with this seq belongs to; before the first event, the first epoch."""
    epoch = epochs[0].epoch
    for start in epochs:
        if start.first_seq > seq:
            break
        epoch = start.epoch
    return epoch
