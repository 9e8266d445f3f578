"""A small world around the event bus: a log that is kept, its writer, and readers who check what they are given.

Nothing here runs by itself: a test composes a `World` from the bus that it wants to try, a `Writer` that follows the
rules of a session's writer, and `Reader`s. A reader's own fold of what it got is compared with the log that is kept.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import trio

from bamboo.bus.event_bus import EventBus
from bamboo.bus.log_reader import LogExtent, LogPage, LogReader
from bamboo.bus.subscription import Subscription
from bamboo.bus.topic import Doorbell, Window
from bamboo.core.events import (
    AgentComplete,
    AgentToken,
    Event,
    EventBody,
    Gap,
    Item,
    Outage,
    RunStarted,
    SessionClosed,
)
from bamboo.core.types import Cursor, Epoch, EpochStart, RunId, RunStats, SessionId
from bamboo.errors import StoreError

SESSION = SessionId("session")
OTHER = SessionId("other")
RUN = RunId("run")

TINY_WINDOW = 1
"""Bytes: only what is not durable, and the newest event, stay in the window."""

WIDE_WINDOW = 1_000_000
"""Bytes: everything stays."""


def real_bus(reader: LogReader, window_bytes: int) -> EventBus:
    return EventBus(reader, window_bytes=window_bytes)


@dataclass(frozen=True, slots=True)
class Kit:
    """What a world is made with: the real things, or mutants of them."""

    make_bus: Callable[[LogReader, int], EventBus] = real_bus
    make_doorbell: Callable[[], Doorbell] = Doorbell


REAL = Kit()


def token(text: str = "token") -> AgentToken:
    return AgentToken(text)


def started() -> RunStarted:
    return RunStarted("scripted", "model", 1)


def complete() -> AgentComplete:
    return AgentComplete("stop", None, RunStats(0, None, 0))


@dataclass(slots=True)
class KeptLog:
    """One session's log as the store has it."""

    epochs: list[EpochStart]
    events: list[Event] = field(default_factory=list)
    trimmed: list[Event] = field(default_factory=list)
    """What retention removed."""
    floor: int = 0
    head: int = 0

    @property
    def extent(self) -> LogExtent:
        return LogExtent(tuple(self.epochs), self.floor, self.head)


class KeptLogs:
    """A `LogReader` over lists. A read takes its snapshot at one point between two pauses; a page has at most
    `page_events`."""

    def __init__(self, *, page_events: int = 2, pauses: int = 1) -> None:
        self.logs: dict[SessionId, KeptLog] = {}
        self.reads = 0
        self.failures = 0
        """So many of the next reads fail."""
        self.failing = False
        """And all of them while this is set."""
        self.hold: trio.Event | None = None
        """Reads look only when this is set."""
        self._page_events = page_events
        self._pauses = pauses

    async def pause(self, times: int = 1) -> None:
        """Let the others run, as a wait for a disk or a client does."""
        for _ in range(times * self._pauses):
            await trio.lowlevel.checkpoint()

    async def extent(self, session_id: SessionId) -> LogExtent | None:
        await self._read()
        log = self.logs.get(session_id)
        extent = None if log is None else log.extent
        await self.pause()
        return extent

    async def read(
        self,
        session_id: SessionId,
        after_seq: int,
        *,
        max_bytes: int,  # noqa: ARG002 - the page is bounded in events
        run_id: RunId | None = None,
    ) -> LogPage | None:
        await self._read()
        log = self.logs.get(session_id)
        page = None if log is None else self._page(log, after_seq, run_id)
        await self.pause()
        return page

    def _page(self, log: KeptLog, after_seq: int, run_id: RunId | None) -> LogPage:
        wanted = [event for event in log.events if event.seq > after_seq and run_id in (None, event.run_id)]
        events = wanted[: self._page_events]
        through = max(after_seq, log.head) if len(events) == len(wanted) else events[-1].seq
        return LogPage(log.extent, events, through)

    async def _read(self) -> None:
        self.reads += 1
        await self.pause()
        if self.hold is not None:
            await self.hold.wait()
        if self.failing or self.failures:
            self.failures -= not self.failing
            raise StoreError("the disk is on fire")


class Writer:
    """One session's writer, with the rules of the real one: deltas go out at once and are durable later, all else is
    durable first; seqs have no hole."""

    def __init__(self, bus: EventBus, logs: KeptLogs, session_id: SessionId = SESSION) -> None:
        self._bus = bus
        self.logs = logs
        self._uncommitted: list[Event] = []
        self._epochs_drawn = 0
        self._window: Window | None = None
        self.session_id = session_id
        self.head = 0
        """The last seq that was published."""
        self.may_leave = trio.Event()
        """The readers have all they want: closing the window, which rings, wakes nobody any more who should have been
        awake long before."""
        self.erased: list[Event] = []
        """What the log was when it was deleted, `session_closed` with it."""

    @property
    def window(self) -> Window:
        assert self._window is not None
        return self._window

    @property
    def log(self) -> KeptLog:
        return self.logs.logs[self.session_id]

    async def open(self, *, new_epoch: bool = False) -> None:
        """Own the session, which need not be stored yet, and open its window."""
        await self.logs.pause()
        log = self.logs.logs.get(self.session_id)
        if log is None:
            self._window = self._bus.open_window(self.session_id, self._draw_epoch(), 0, first_seq=1)
            return
        if new_epoch:
            log.epochs.append(EpochStart(self._draw_epoch(), log.head + 1))
        newest = log.epochs[-1]
        self._window = self._bus.open_window(self.session_id, newest.epoch, log.head, first_seq=newest.first_seq)

    def _draw_epoch(self) -> Epoch:
        self._epochs_drawn += 1
        return Epoch(f"e{self._epochs_drawn}")

    def publish(self, *bodies: EventBody, run_id: RunId | None = RUN) -> None:
        """Deltas: published at once."""
        for body in bodies:
            event = self._event(self.head + 1, body, run_id)
            self._uncommitted.append(event)
            self._publish(event)

    async def commit(self, *bodies: EventBody, run_id: RunId | None = RUN) -> None:
        """Make durable what is not yet, and `bodies` with it; then publish those. Nothing else may be published
        meanwhile."""
        events = [self._event(self.head + 1 + index, body, run_id) for index, body in enumerate(bodies)]
        await self._store([*self._uncommitted, *events])
        for event in events:
            self._publish(event)
        self.window.mark_durable(self.head)

    async def flush(self) -> None:
        """Make durable what was published up to now. More may be published meanwhile."""
        if self._uncommitted:
            seq = self._uncommitted[-1].seq
            await self._store(list(self._uncommitted))
            self.window.mark_durable(seq)

    async def _store(self, events: list[Event]) -> None:
        window = self.window
        await self.logs.pause()
        log = self.logs.logs.get(self.session_id)
        if log is None:
            log = self.logs.logs[self.session_id] = KeptLog([EpochStart(window.epoch, window.epoch_first_seq)])
        log.events += events
        log.head = events[-1].seq
        self._uncommitted = [event for event in self._uncommitted if event.seq > log.head]
        await self.logs.pause()

    def _publish(self, event: Event) -> None:
        self.head = event.seq
        self.window.publish(event)

    def _event(self, seq: int, body: EventBody, run_id: RunId | None) -> Event:
        return Event(self.session_id, self.window.epoch, seq, 1_000 * seq, run_id, body)

    async def evict(self) -> None:
        """Leave an idle session."""
        await self.flush()
        self.window.close()
        self._window = None

    def give_up(self) -> None:
        """Leave without making durable what was published."""
        self._uncommitted.clear()
        self.head = self.log.head
        self.window.close()
        self._window = None

    async def replace(self) -> None:
        """Give up, and let the next writer begin at once."""
        self.give_up()
        await self.open(new_epoch=True)

    async def delete(self) -> None:
        """Erase the session: its log is gone from the store, then `session_closed` is published, then the window
        closes, each in a step of its own."""
        await self.logs.pause()
        closing = self._event(self.head + 1, SessionClosed(), None)
        self.erased = [*self.log.trimmed, *self.log.events, *self._uncommitted, closing]
        del self.logs.logs[self.session_id]
        self._uncommitted.clear()
        await self.logs.pause()
        self._publish(closing)
        self.window.mark_durable(closing.seq)
        await self.logs.pause()
        self.head = 0
        self.window.close_deleted()
        self._window = None

    def begin_outage(self) -> None:
        self.window.begin_outage(StoreError("the disk is full"))

    def end_outage(self) -> None:
        self.window.end_outage()

    def trim(self, floor: int) -> None:
        """Retention: remove everything up to `floor` from the kept log."""
        self.log.trimmed += [event for event in self.log.events if event.seq <= floor]
        self.log.events = [event for event in self.log.events if event.seq > floor]
        self.log.floor = max(self.log.floor, floor)


class World:
    """A bus over kept logs."""

    def __init__(self, kit: Kit = REAL, *, window_bytes: int = WIDE_WINDOW, page_events: int = 2) -> None:
        self.logs = KeptLogs(page_events=page_events)
        self.bus = kit.make_bus(self.logs, window_bytes)
        self.writer = Writer(self.bus, self.logs)

    def check_empty(self) -> None:
        """Nobody is left, and so is nothing."""
        assert self.bus.sessions == 0, f"{self.bus!r} after everybody left"
        assert self.bus.subscriptions == 0, f"{self.bus!r} after everybody left"


Until = Callable[[Event], bool]


def run_complete(event: Event) -> bool:
    return isinstance(event.body, AgentComplete)


def never(event: Event) -> bool:  # noqa: ARG001 - an `Until`
    """Only the bus says when it is over."""
    return False


class Reader:
    """Follows one session and folds what it is given, checking every item's place: no hole, nothing twice, no disorder.

    `kept` is what it believes the log to be, from its first place on. What a `crash` gap names is taken back; what a
    `retention` gap names is noted in `missing`; an `epoch` gap begins anew.

    It reads until `until` says so of an event, or the bus does; and has nothing to read at all from `last` on.
    """

    def __init__(
        self,
        bus: EventBus,
        session_id: SessionId = SESSION,
        *,
        run_id: RunId | None = None,
        until: Until = run_complete,
        last: int | None = None,
    ) -> None:
        self._bus = bus
        self._last = last
        self.until = until
        self.session_id = session_id
        self.run_id = run_id
        self.cursor: Cursor | None = None
        self.first = 0
        """What comes after this seq is its own."""
        self.kept: list[Event] = []
        self.gaps: list[Gap] = []
        self.outages = 0
        """So many it was told of."""
        self.missing: set[int] = set()
        self.done = False
        self.refused = False
        """It came back with a cursor, and there was no such session (any more)."""

    @property
    def seqs(self) -> list[int]:
        return [event.seq for event in self.kept]

    async def follow(self, after: Cursor | None) -> None:
        """Read with a subscription of its own, from `after`, until the reader's end."""
        self.start(after)
        await self.resume()

    def start(self, after: Cursor | None) -> None:
        self.cursor = after
        self.first = 0 if after is None else after.seq

    async def resume(self) -> None:
        """Go on behind the last item with a new subscription, as a client that connects again."""
        if self.done:
            return
        with self._bus.subscribe(self.session_id, run_id=self.run_id) as subscription:
            await self.begin(subscription)
            await self.read(subscription)

    async def begin(self, subscription: Subscription) -> None:
        """Take the place. May be cancelled, and called again."""
        place = await subscription.begin(self.cursor)
        if self.cursor is None:
            self.cursor = place
            self.first = 0 if place is None else place.seq
        elif place is None:
            self.refused = self.done = True
        if self.cursor is not None and self.cursor.seq == self._last:
            self.done = True

    async def read(self, subscription: Subscription) -> None:
        """Read until the reader's end. May be cancelled, and called again with the same subscription."""
        while not self.done:
            try:
                items = await subscription.receive()
            except StoreError:
                await trio.lowlevel.checkpoint()
                continue
            self.note(items)
            if not items:
                self.done = True

    def note(self, items: Sequence[Item]) -> None:
        for item in items:
            if isinstance(item, Gap):
                self._note_gap(item)
            elif isinstance(item, Outage):
                assert not self.done, "an outage after the end"
                self.outages += 1
            else:
                self._note_event(item)

    @property
    def _place(self) -> int:
        return 0 if self.cursor is None else self.cursor.seq

    def _note_event(self, event: Event) -> None:
        assert not self.done, f"{event!r} after the end"
        assert event.seq > self._place, f"{event!r} after {self._place}"
        if self.run_id is None:
            assert event.seq == self._place + 1, f"{event!r} after {self._place}"
        else:
            assert event.run_id == self.run_id, f"{event!r} is of another run"
        self.kept.append(event)
        self.cursor = event.cursor
        self.done = self.until(event)

    def _note_gap(self, gap: Gap) -> None:
        self.gaps.append(gap)
        if gap.reason == "epoch":
            assert (gap.from_seq, gap.to_seq) == (None, None)
            self.kept.clear()
            self.missing.clear()
            self.first = gap.cursor.seq
        elif gap.reason == "crash":
            assert gap.from_seq is not None
            assert gap.to_seq is not None
            assert gap.cursor.seq + 1 == gap.from_seq <= gap.to_seq, repr(gap)
            # A reader of one run was taken past the others' events without being told.
            assert gap.to_seq == self._place or self.run_id is not None, f"{gap!r} for a reader at {self._place}"
            self.kept = [event for event in self.kept if event.seq < gap.from_seq]
            self.first = min(self.first, gap.cursor.seq)  # it may have come in among what is lost
        else:
            assert gap.from_seq is not None
            assert gap.to_seq is not None
            assert self._place < gap.from_seq <= gap.to_seq == gap.cursor.seq, f"{gap!r} for a reader at {self._place}"
            assert gap.from_seq == self._place + 1 or self.run_id is not None, f"{gap!r} for a reader at {self._place}"
            self.missing.update(range(gap.from_seq, gap.to_seq + 1))
        self.cursor = gap.cursor

    def check(self, log: Sequence[Event]) -> None:
        """What it has is `log` behind its first place, every event once and in order, but for what it was told that it
        would not get; of a log that was gone when it came back, what it had by then."""
        assert self.done, f"the reader is still at {self.cursor}"
        if self.refused:
            log = [event for event in log if event.seq <= self._place]
        mine = [
            event
            for event in log
            if event.seq > self.first and self.run_id in (None, event.run_id) and event.seq not in self.missing
        ]
        assert self.kept == mine, f"the reader has {self.seqs}, the log {[event.seq for event in mine]}"


async def stored(world: World, tokens: int) -> None:
    """The session's log is `tokens` long and durable; no window is open."""
    await world.writer.open()
    world.writer.publish(*[token(str(seq)) for seq in range(1, tokens + 1)])
    await world.writer.evict()


async def take_all(subscription: Subscription) -> list[Event | Gap]:
    """What is there now, from the window and from the store, which works."""
    taken: list[Event | Gap] = []
    while True:
        items = subscription.take_nowait()
        if items is None:
            items = await subscription.fetch()
        elif not items:
            return taken
        for item in items:
            assert not isinstance(item, Outage), repr(item)
            taken.append(item)


def seqs(items: Sequence[Item] | None) -> list[int]:
    assert items is not None
    return [item.seq for item in items if isinstance(item, Event)]


async def gap_and_seqs(subscription: Subscription) -> tuple[Gap, list[int]]:
    gap, *events = await take_all(subscription)
    assert isinstance(gap, Gap)
    assert not any(isinstance(event, Gap) for event in events)
    return gap, seqs(events)


async def rung(doorbell: Doorbell) -> bool:
    """It has been rung since it was waited for last. Takes the ring."""
    await trio.lowlevel.checkpoint()
    ringing = doorbell.rung
    if ringing:
        await doorbell.wait()
    return ringing
