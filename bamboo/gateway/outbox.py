"""What one connection has to be sent, and in which order: answers, and the events of the sessions that it follows.

Nothing here writes or knows of WebSockets. The connection's reader puts answers in, its writer gathers batches out.
"""

from dataclasses import dataclass, field
from typing import Final

import trio

from bamboo.bus.subscription import Subscription
from bamboo.bus.topic import Doorbell
from bamboo.core.events import Item
from bamboo.core.types import SessionId
from bamboo.errors import StoreError
from bamboo.wire.encode import item_json

BATCH_BYTES: Final = 256 * 1024
"""About how much one write takes: enough to be cheap, little enough that one session does not keep the others
waiting.
"""

ANSWERS_BYTES: Final = 256 * 1024
"""Answers that may wait for their client; with more, its frames are not read."""

_FRAME_BYTES: Final = 128  # what a waiting answer costs besides its text

RETRY_S: Final = (1.0, 8.0)
"""A subscription whose store read failed is tried again after this long, doubled each time up to the second number."""


@dataclass(slots=True)
class _Feed:
    """A subscription, what was read for it and is not gathered yet, and when it may be read for again."""

    subscription: Subscription
    backlog: list[Item] = field(default_factory=list)
    retry_at: float = 0.0
    retry_s: float = RETRY_S[0]
    failing: bool = False

    def caught_up(self, seq: int) -> bool:
        return not self.backlog and self.subscription.seq >= seq


@dataclass(frozen=True, slots=True)
class _Deferred:
    """An answer that comes after its session's events up to `seq`."""

    session_id: SessionId
    seq: int
    frame: bytes


class Outbox:
    """In this order: answers, then the events of each session in turn, then the answers that had to wait for them.

    All feeds ring the one doorbell. Closing is sync and leaves nothing in the bus.
    """

    def __init__(self) -> None:
        self.doorbell = Doorbell()
        self._answers: list[bytes] = []
        self._deferred: list[_Deferred] = []
        self._feeds: dict[SessionId, _Feed] = {}
        self._lagging: list[_Feed] = []
        self._held: SessionId | None = None
        self._waiting_bytes = 0
        self._gathered_bytes = 0
        self._room: trio.Event | None = None

    def __repr__(self) -> str:
        return f"<Outbox {len(self._feeds)} feeds, {self._waiting_bytes} bytes of answers>"

    # The reader's side

    def put(self, frame: bytes) -> None:
        """An answer: before any event that is gathered from now on."""
        self._answers.append(frame)
        self._waiting_bytes += len(frame) + _FRAME_BYTES
        self.doorbell.ring()

    def put_after(self, session_id: SessionId, seq: int, frame: bytes) -> None:
        """An answer that comes after the session's events up to `seq`; at once if this connection does not follow it
        (any more).
        """
        self._deferred.append(_Deferred(session_id, seq, frame))
        self._waiting_bytes += len(frame) + _FRAME_BYTES
        self.doorbell.ring()

    async def wait_room(self) -> None:
        """Return when less than ANSWERS_BYTES of answers wait to be written."""
        while self._waiting_bytes >= ANSWERS_BYTES:
            if self._room is None:
                self._room = trio.Event()
            await self._room.wait()

    @property
    def following(self) -> int:
        return len(self._feeds)

    def follows(self, session_id: SessionId) -> bool:
        """Not a session that was deleted and of which only the last words are to be gathered: a new one may have its
        id.
        """
        feed = self._feeds.get(session_id)
        return feed is not None and not feed.subscription.deleted

    def follow(self, subscription: Subscription) -> None:
        """Gather from a subscription that has its place; of a deleted session with the same id the last words come
        before. From here on it is the outbox's to close.
        """
        session_id = subscription.session_id
        assert not self.follows(session_id)
        last_words: list[Item] = []
        if (before := self._feeds.get(session_id)) is not None:
            last_words = [*before.backlog, *(before.subscription.take_nowait() or ())]
            self.unfollow(session_id)
        self._feeds[session_id] = _Feed(subscription, last_words)
        self.doorbell.ring()

    def unfollow(self, session_id: SessionId) -> None:
        """No event of this session is gathered any more. Answers that waited for its events go before whatever is put
        next.
        """
        feed = self._feeds.pop(session_id, None)
        if feed is None:
            return
        feed.subscription.close()
        self._answers += (deferred.frame for deferred in self._deferred if deferred.session_id == session_id)
        self._deferred = [deferred for deferred in self._deferred if deferred.session_id != session_id]
        self.doorbell.ring()

    def unfollow_all(self) -> None:
        for session_id in list(self._feeds):
            self.unfollow(session_id)

    def hold(self, session_id: SessionId) -> None:
        """Gather nothing of this session until `release`: an answer is on its way that has to come first."""
        assert self._held is None, "frames are answered one at a time"
        self._held = session_id

    def release(self) -> None:
        self._held = None
        self.doorbell.ring()

    def close(self) -> None:
        self.unfollow_all()
        self.doorbell.close()

    # The writer's side

    @property
    def lagging(self) -> bool:
        """The last `gather` met a feed that has to be read for: `fetch`."""
        return bool(self._lagging)

    @property
    def retry_at(self) -> float:
        """When `gather` has a reason to look again though nothing rings."""
        return min((feed.retry_at for feed in self._feeds.values() if feed.failing), default=float("inf"))

    def gather(self, now: float) -> list[bytes]:
        """The next batch, in order; empty if there is nothing now. `gathered` says that it was written."""
        batch, self._answers = self._answers, []
        size = sum(map(len, batch))
        self._gathered_bytes += size + len(batch) * _FRAME_BYTES
        self._lagging.clear()
        served: list[SessionId] = []
        for session_id, feed in list(self._feeds.items()):
            if size >= BATCH_BYTES:
                self._turn(served)
                break
            served.append(session_id)
            if session_id == self._held:
                continue
            items, feed.backlog = feed.backlog, []
            more = feed.subscription.take_nowait()
            if more is not None:
                items += more
            elif feed.retry_at <= now:
                self._lagging.append(feed)
            for item in items:
                payload = item_json(item)
                batch.append(payload)
                size += len(payload)
            if feed.subscription.ended:
                self.unfollow(session_id)
        if self._deferred:
            self._gather_deferred(batch)
        return batch

    def _turn(self, served: list[SessionId]) -> None:
        """The next batch begins where this one was full."""
        for session_id in served:
            if session_id in self._feeds:
                self._feeds[session_id] = self._feeds.pop(session_id)
        self.doorbell.ring()

    def _gather_deferred(self, batch: list[bytes]) -> None:
        waiting: list[_Deferred] = []
        for deferred in self._deferred:
            feed = self._feeds.get(deferred.session_id)
            if feed is None or feed.caught_up(deferred.seq):
                batch.append(deferred.frame)
                self._gathered_bytes += len(deferred.frame) + _FRAME_BYTES
            else:
                waiting.append(deferred)
        self._deferred = waiting

    def gathered(self) -> None:
        """Everything gathered so far was written: its answers wait no more."""
        self._waiting_bytes -= self._gathered_bytes
        self._gathered_bytes = 0
        if self._room is not None and self._waiting_bytes < ANSWERS_BYTES:
            self._room.set()
            self._room = None

    async def fetch(self) -> None:
        """Read from the store for the feed that has lagged longest. After a failure, which its subscription tells of,
        it is tried again later.
        """
        feed = self._lagging.pop(0)
        try:
            items = await feed.subscription.fetch()
        except StoreError:
            feed.retry_at = trio.current_time() + feed.retry_s
            feed.retry_s = min(2 * feed.retry_s, RETRY_S[1])
            feed.failing = True
            return
        feed.failing, feed.retry_s = False, RETRY_S[0]
        if self._feeds.get(feed.subscription.session_id) is feed:  # else it was left meanwhile
            feed.backlog += items
