"""One reader's place in one session's log, and the way from it to the log's end."""

from collections.abc import Awaitable, Sequence
from types import TracebackType
from typing import Final, Self, TypeVar

import trio

from bamboo.bus.log_reader import READ_BYTES, LogExtent
from bamboo.bus.topic import Doorbell, Topic
from bamboo.core.cursors import epoch_at, resolve
from bamboo.core.events import Event, Gap, Item, Outage, Terminal
from bamboo.core.types import Cursor, Epoch, EpochStart, RunId, SessionId
from bamboo.errors import StoreError

READ_TIMEOUT_S: Final = 15.0
"""How long one read from the store may take: longer than the store's own deadlines, so that it speaks first."""

T = TypeVar("T")


class Subscription:
    """One reader of one session's log. Not for two tasks at once.

    Every event after its place comes exactly once and in order, whatever the reader's speed; what it cannot get as it
    was is told by a `Gap`. While the store fails, be it the session's writer or a read of this subscription's own, it
    hands out one `Outage`: one from the first failure to the moment when neither fails, and none once that is over. A
    cancelled call loses nothing: the place moves in the same synchronous step that hands the items out.
    """

    __slots__ = (
        "_gap",
        "_idle_version",
        "_outage",
        "_own_doorbell",
        "_read_outage",
        "_run_id",
        "_told",
        "_topic",
        "_until",
        "_urgent",
        "doorbell",
        "ended",
        "seq",
    )

    def __init__(self, topic: Topic, run_id: RunId | None, doorbell: Doorbell | None) -> None:
        self._topic = topic
        self._run_id = run_id
        self._until: int | None = None
        self._urgent = False
        """`_gap` or `_outage` waits to be handed out, before any event."""
        self._gap: Gap | None = None
        self._outage: Outage | None = None
        self._read_outage: Outage | None = None
        """The last read failed."""
        self._told = False
        """`_outage` is there, or was handed out, and it is not over."""
        self._idle_version = -1
        self._own_doorbell = doorbell is None
        self.doorbell = Doorbell() if doorbell is None else doorbell
        self.seq = 0
        """Everything up to here was handed out, or is not this subscription's."""
        self.ended = False
        """Nothing will follow: the run's terminal event or `session_closed` was handed out."""

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def __repr__(self) -> str:
        return f"<Subscription {self._topic.session_id} after {self.seq}{' ended' if self.ended else ''}>"

    @property
    def session_id(self) -> SessionId:
        return self._topic.session_id

    @property
    def deleted(self) -> bool:
        """The session is gone: what is left for this reader ends with `session_closed`, and waits for no store."""
        return self._topic.closed_seq is not None

    def close(self) -> None:
        """Leave. Idempotent; nothing of the subscription is left in the bus."""
        self._topic.leave(self)
        self.ended = True
        if self._own_doorbell:
            self.doorbell.close()

    def begin_at(self, seq: int, *, until: int | None = None) -> None:
        """Take the place after `seq`, which the caller knows to be one of this log. With `until`, end behind that
        seq."""
        self._until = until
        self._move(seq)

    async def begin(self, after: Cursor | None) -> Cursor | None:
        """Take the place that `after` stands for, or, for None, the log's end. Returns the place; None for a session
        that is not stored yet.

        A cursor that this log cannot go on from has a gap put before everything else. Raises StoreError. If cancelled,
        call it again.
        """
        await trio.lowlevel.checkpoint()
        place = self._begin_in_window(after)
        if place is None:
            place = self._begin_in_log(after, await _answered(self._topic.reader.extent(self.session_id)))
        return place

    def _begin_in_window(self, after: Cursor | None) -> Cursor | None:
        """Begin with what the window knows; None if that is not enough."""
        window = self._topic.window
        if window is None:
            return None
        if after is None:
            after = Cursor(window.epoch, window.head)
        elif after.epoch != window.epoch or after.seq > window.head:
            return None
        self.seq = after.seq
        return after

    def _begin_in_log(self, after: Cursor | None, extent: LogExtent | None) -> Cursor | None:
        window = self._topic.window
        if extent is None or self._topic.closed_seq is not None:
            # Not stored yet, or deleted meanwhile (and made again, maybe): there is no more of it than the window.
            if window is None:
                return None
            extent = LogExtent((EpochStart(window.epoch, window.epoch_first_seq),), 0, window.head)
        if after is None:
            self.seq = extent.head
            return Cursor(epoch_at(extent.epochs, extent.head), extent.head)
        head = extent.head
        if window is not None and window.epoch == extent.epochs[-1].epoch:
            head = max(head, window.head)
        self.seq, gap = resolve(self.session_id, after, extent.epochs, head, extent.floor)
        self._put_gap(gap)
        return after if gap is None else gap.cursor

    def take_nowait(self) -> list[Item] | None:
        """Everything that is there for this reader, possibly nothing; None if the store has to be read first
        (`fetch`).

        After a list, the doorbell rings as soon as there is a reason to call again.
        """
        items: list[Item] = []
        if self._urgent:
            self._take_urgent(items)
        if self.ended:
            return items
        topic = self._topic
        window = topic.window
        events = None if window is None else window.after(self.seq)
        if events is None:
            if window is None or topic.closed_seq is None:
                if self._idle_version == topic.version:
                    return items
                if items:
                    self.doorbell.ring()
                return items or None
            last = window.first_seq - 1
            items.append(Gap(self.session_id, self.seq + 1, last, "retention", Cursor(window.epoch, last)))
            events = window.after(last) or []
        if events:
            items += self._mine(events)
            self._move(events[-1].seq)
        if self.seq == topic.closed_seq:
            self.ended = True
        return items

    def _take_urgent(self, items: list[Item]) -> None:
        if self._gap is not None:
            items.append(self._gap)
        if self._outage is not None and not self.ended:
            items.append(self._outage)
        self._gap = self._outage = None
        self._urgent = False

    async def fetch(self) -> list[Item]:
        """What the store has for this reader, about READ_BYTES of it; possibly nothing. Raises StoreError, also for a
        store that gives no answer within READ_TIMEOUT_S: `take_nowait` then has the outage, unless that was told.

        To be followed by `take_nowait`, whatever becomes of it. Nothing is lost if it fails or is cancelled.
        """
        topic, place = self._topic, self.seq
        version, window = topic.version, topic.window
        if window is not None and place + 1 >= window.first_seq:
            await trio.lowlevel.checkpoint()  # the window was opened since: no need to read
            return []
        try:
            page = await _answered(topic.reader.read(self.session_id, place, max_bytes=READ_BYTES, run_id=self._run_id))
        except StoreError as error:
            self._turn_read_outage(Outage(self.session_id, error.message, error.retry_after_s))
            raise
        self._turn_read_outage(None)
        if self.seq != place or topic.closed_seq is not None:
            # Rewound or deleted meanwhile: what was read is of a place, or of a log, that is no more.
            return []
        if page is None:
            # Not stored yet, or just being deleted: either way a window will be opened or closed, and rings.
            self._idle_version = version
            return []
        items: list[Item] = []
        extent = page.extent
        if extent.floor > self.seq:
            cursor = Cursor(epoch_at(extent.epochs, extent.floor), extent.floor)
            items.append(Gap(self.session_id, self.seq + 1, extent.floor, "retention", cursor))
            self._move(extent.floor)
        if page.through > self.seq:
            items += self._mine(page.events)
            self._move(page.through)
        elif self.seq >= extent.head:
            self._idle_version = version
        return items

    async def receive(self) -> list[Item]:
        """Wait until there is something, and take all of it. Empty at the end, and only there. Raises StoreError.

        Always a checkpoint. If cancelled, nothing was taken. Only for a subscription with a doorbell of its own.
        """
        assert self._own_doorbell, "a ring of a shared doorbell is for all of its subscriptions"
        await trio.lowlevel.checkpoint_if_cancelled()
        rested = False
        while True:
            items = self.take_nowait()
            if items is None:
                items = await self.fetch()
                rested = True
                if not items:
                    continue
            if items or self.ended:
                if not rested:
                    await trio.lowlevel.cancel_shielded_checkpoint()
                return items
            await self.doorbell.wait()
            rested = True

    def rewind(self, epoch: Epoch, head: int) -> None:
        """What a new window means for this reader: the store answers, and the log goes on behind `head`, in `epoch`.
        Whoever has seen more gets a gap."""
        self._turn_read_outage(None)
        if self.seq > head and not self.ended:
            last = self.seq
            if self._gap is not None and self._gap.to_seq is not None:
                last = max(last, self._gap.to_seq)  # not handed out yet: one gap tells of both
            self._put_gap(Gap(self.session_id, head + 1, last, "crash", Cursor(epoch, head)))
            self.seq = head

    def outage_turned(self) -> None:
        """The topic's outage, or that of the reads here, has begun or is over: what there is to tell."""
        outage = self._topic.outage or self._read_outage
        if outage is None:
            self._told = False
            self._outage = None
        elif not self._told:
            self._told = self._urgent = True
            self._outage = outage

    def _turn_read_outage(self, outage: Outage | None) -> None:
        if outage is not self._read_outage:
            self._read_outage = outage
            self.outage_turned()

    def _put_gap(self, gap: Gap | None) -> None:
        self._gap = gap
        self._urgent = gap is not None or self._outage is not None

    def _move(self, seq: int) -> None:
        self.seq = seq
        if self._until is not None and seq >= self._until:
            self.ended = True

    def _mine(self, events: Sequence[Event]) -> Sequence[Event]:
        """Those of the log's next events that are for this reader."""
        until = self._until
        if until is not None and events and events[-1].seq > until:
            events = [event for event in events if event.seq <= until]
        run_id = self._run_id
        if run_id is None:
            return events
        mine = [event for event in events if event.run_id == run_id]
        if mine and isinstance(mine[-1].body, Terminal):
            self.ended = True
        return mine


async def _answered(reading: Awaitable[T]) -> T:
    """What the store answers. Raises StoreError, also if it does not in time."""
    with trio.move_on_after(READ_TIMEOUT_S):
        return await reading
    raise StoreError("the store did not answer in time")
