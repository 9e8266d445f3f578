"""The event bus with one fault each: what the sweep has to catch. Every one is a mistake that is easy to make.

Left out, because nobody can tell it from the real thing: ringing before appending (`publish` is one synchronous step,
whoever is rung runs after it). What that mistake would do is in "publish rings before it can be read".
"""

from collections.abc import Callable, Mapping
from typing import Final

import trio

from bamboo.bus.event_bus import EventBus
from bamboo.bus.log_reader import READ_BYTES, LogReader
from bamboo.bus.subscription import Subscription
from bamboo.bus.topic import Doorbell, Subscriber, Topic, Window
from bamboo.core.events import Event, Item, Outage
from bamboo.core.types import Cursor, Epoch, RunId, SessionId
from bamboo.errors import StoreError
from tests.support.bus_world import Kit


class _BusOfParts(EventBus):
    """An EventBus that is put together from other parts."""

    topic_type: type[Topic] = Topic
    window_type: type[Window] = Window
    subscription_type: type[Subscription] = Subscription
    doorbell_type: type[Doorbell] = Doorbell

    def open_window(self, session_id: SessionId, epoch: Epoch, head: int, *, first_seq: int) -> Window:
        topic = self._topic(session_id)
        window = self.window_type(topic, epoch, head, first_seq, self._window_bytes)
        topic.window_opened(window)
        return window

    def subscribe(
        self, session_id: SessionId, *, run_id: RunId | None = None, doorbell: Doorbell | None = None
    ) -> Subscription:
        topic = self._topic(session_id)
        subscription = self.subscription_type(topic, run_id, doorbell)
        if doorbell is None:
            subscription.doorbell = self.doorbell_type()
        self.register(topic, subscription)
        return subscription

    def register(self, topic: Topic, subscription: Subscription) -> None:
        topic.join(subscription)

    def _topic(self, session_id: SessionId) -> Topic:
        topic = self._topics.get(session_id)
        if topic is None:
            topic = self._topics[session_id] = self.topic_type(session_id, self._topics, self._reader)
        return topic


# Doorbells


class _ForgetsRingWhenCancelled(Doorbell):
    async def wait(self) -> None:
        await self._receive.receive()
        await trio.lowlevel.checkpoint()
        self.rung = False


class _HoldsNoRing(Doorbell):
    """Capacity 0: whoever is not waiting just now is not rung."""

    def __init__(self) -> None:
        super().__init__()
        self._send, self._receive = trio.open_memory_channel[None](0)

    def ring(self) -> None:
        try:
            self._send.send_nowait(None)
        except (trio.WouldBlock, trio.ClosedResourceError):
            return


# Topics


class _LeavesWithEverybody(Topic):
    """The first who leaves takes the session out of the bus."""

    def leave(self, subscription: Subscriber) -> None:
        super().leave(subscription)
        self._topics.pop(self.session_id, None)


class _KeepsEmptySessions(Topic):
    def _tidy(self) -> None:
        pass


class _TellsOfOutagesInSilence(Topic):
    """Whoever sleeps is not told until something else wakes it."""

    def begin_outage(self, error: StoreError) -> None:
        subscriptions = set(self.subscriptions)
        self.subscriptions.clear()
        super().begin_outage(error)
        self.subscriptions.update(subscriptions)
        for subscription in subscriptions:
            subscription.outage_turned()


class _TellsOnlyOneOfOutages(Topic):
    def begin_outage(self, error: StoreError) -> None:
        others = list(self.subscriptions)[1:]
        self.subscriptions.difference_update(others)
        super().begin_outage(error)
        self.subscriptions.update(others)


class _TellsNewcomersNothing(Topic):
    def join(self, subscription: Subscriber) -> None:
        outage, self.outage = self.outage, None
        super().join(subscription)
        self.outage = outage


class _ForgetsOutageWithItsWriter(Topic):
    """A writer that gives up takes the outage along."""

    def window_closed(self, window: Window) -> None:
        self.end_outage()
        super().window_closed(window)


class _NeverEndsAnOutage(Topic):
    def end_outage(self) -> None:
        pass


# Windows


class _DropsUncommitted(Window):
    def publish(self, event: Event) -> None:
        super().publish(event)
        while self._bytes > self._max_bytes and self._first < self.head:
            self._bytes -= self._sizes[0]
            self.pending_bytes -= self._sizes[0]
            self._first += 1
            self._durable = max(self._durable, self._first - 1)
            del self._events[0], self._sizes[0]

    def mark_durable(self, seq: int) -> None:
        super().mark_durable(max(seq, self._durable))


class _RingsBeforeItCanBeRead(Window):
    """What was published is seen one pass of the loop later, and that does not ring."""

    __slots__ = ("hidden",)

    def publish(self, event: Event) -> None:
        self.hidden = getattr(self, "hidden", 0) + 1
        super().publish(event)
        trio.lowlevel.current_trio_token().run_sync_soon(self._show)

    def _show(self) -> None:
        self.hidden -= 1

    def after(self, seq: int) -> list[Event] | None:
        events = super().after(seq)
        return events and events[: len(events) - getattr(self, "hidden", 0)]


class _RingsOnlyOne(Window):
    def publish(self, event: Event) -> None:
        others = list(self._topic.subscriptions)[1:]
        self._topic.subscriptions.difference_update(others)
        super().publish(event)
        self._topic.subscriptions.update(others)


class _ClosesInSilence(Window):
    """Whoever sleeps is not told that the window went; a deleted session's readers wait for ever."""

    def close_deleted(self) -> None:
        subscriptions = set(self._topic.subscriptions)
        self._topic.subscriptions.clear()
        super().close_deleted()
        self._topic.subscriptions.update(subscriptions)


class _HasOneTooMany(Window):
    """Hands the reader's last event out again."""

    def after(self, seq: int) -> list[Event] | None:
        return super().after(max(seq - 1, self._first - 1)) if seq + 1 >= self._first else None


# Subscriptions


class _MovesBeforeItAwaits(Subscription):
    async def receive(self) -> list[Item]:
        while True:
            items = self.take_nowait()
            if items is None:
                items = await self.fetch()
            elif not items and not self.ended:
                await self.doorbell.wait()
            if items or self.ended:
                await trio.lowlevel.checkpoint()
                return items


class _MovesBeforeItReads(Subscription):
    async def fetch(self) -> list[Item]:
        log = await self._topic.reader.extent(self.session_id)
        place = self.seq
        if log is not None:
            self.seq = log.head
        page = await self._topic.reader.read(self.session_id, place, max_bytes=READ_BYTES, run_id=self._run_id)
        return [] if page is None else list(self._mine(page.events))


class _MovesToTheHead(Subscription):
    """Takes a page for the whole log."""

    async def fetch(self) -> list[Item]:
        items = await super().fetch()
        extent = await self._topic.reader.extent(self.session_id)
        if items and extent is not None:
            self.seq = max(self.seq, extent.head)
        return items


class _ForgetsToUnsubscribe(Subscription):
    def close(self) -> None:
        self.ended = True
        if self._own_doorbell:
            self.doorbell.close()


class _IsNotRewound(Subscription):
    def rewind(self, epoch: Epoch, head: int) -> None:
        pass


class _BelievesOldPages(Subscription):
    """Goes on behind a page that it was rewound, or that its session was deleted, while it was read."""

    async def fetch(self) -> list[Item]:
        version = self._topic.version
        page = await self._topic.reader.read(self.session_id, self.seq, max_bytes=READ_BYTES, run_id=self._run_id)
        if page is None:
            self._idle_version = version
            return []
        items = [event for event in self._mine(page.events) if event.seq > self.seq]
        if page.through > self.seq:
            self.seq = page.through
        else:
            self._idle_version = version
        return [*items]


class _LooksAwayForGood(Subscription):
    """Having met the end of the stored log once, it never looks there again."""

    def take_nowait(self) -> list[Item] | None:
        if self._idle_version >= 0:
            self._idle_version = self._topic.version
        return super().take_nowait()


class _GoesOnAfterTheEnd(Subscription):
    """Follows the session instead of the run to its end."""

    def take_nowait(self) -> list[Item] | None:
        items = super().take_nowait()
        self.ended = self.seq == self._topic.closed_seq
        return items


class _LosesItsGap(Subscription):
    """Puts the gap away before it has something to say besides."""

    def take_nowait(self) -> list[Item] | None:
        self._gap = None
        return super().take_nowait()


class _TellsOfAnOutageAtEachLook(Subscription):
    def _take_urgent(self, items: list[Item]) -> None:
        outage = self._outage
        super()._take_urgent(items)
        self._outage, self._urgent = outage, outage is not None


class _TellsOfEachFailure(Subscription):
    """Of the writer's and of each read of its own, be it one outage or not."""

    def outage_turned(self) -> None:
        self._told = False
        super().outage_turned()


class _TellsOfReadsApart(Subscription):
    """Once of the writer's failure, and once more of its own."""

    def _turn_read_outage(self, outage: Outage | None) -> None:
        if outage is not None and self._read_outage is None:
            self._told = False
        super()._turn_read_outage(outage)


class _TellsOfWhatIsOver(Subscription):
    def outage_turned(self) -> None:
        outage, urgent = self._outage, self._urgent
        super().outage_turned()
        if outage is not None:
            self._outage, self._urgent = outage, urgent


class _LosesItsOutage(Subscription):
    """Puts the outage away when it has to read the store first."""

    async def fetch(self) -> list[Item]:
        self._outage = None
        return await super().fetch()

    def take_nowait(self) -> list[Item] | None:
        outage, self._outage = self._outage, None
        items = super().take_nowait()
        if items is not None and outage is not None:
            items.append(outage)
        return items


class _SkipsWhatWasReadMeanwhile(Subscription):
    """Reads the log's end, and takes whatever it is when the answer has come for its place."""

    async def begin(self, after: Cursor | None) -> Cursor | None:
        place = await super().begin(after)
        await trio.lowlevel.checkpoint()
        if after is None and self._topic.window is not None:
            self.seq = self._topic.window.head
        return place


class _SubscribesLate(_BusOfParts):
    """Has its place before it is registered."""

    class Late(Subscription):
        async def begin(self, after: Cursor | None) -> Cursor | None:
            place = await super().begin(after)
            self._topic.join(self)
            return place

    subscription_type = Late

    def register(self, topic: Topic, subscription: Subscription) -> None:
        pass


def _kit(
    *,
    bus: type[_BusOfParts] = _BusOfParts,
    topic: type[Topic] = Topic,
    window: type[Window] = Window,
    subscription: type[Subscription] | None = None,
    doorbell: type[Doorbell] = Doorbell,
) -> Kit:
    def make_bus(reader: LogReader, window_bytes: int) -> EventBus:
        made = bus(reader, window_bytes=window_bytes)
        made.topic_type = topic
        made.window_type = window
        made.subscription_type = subscription or bus.subscription_type
        made.doorbell_type = doorbell
        return made

    make_doorbell: Callable[[], Doorbell] = doorbell
    return Kit(make_bus, make_doorbell)


UNCHANGED: Final = _kit()

MUTANTS: Final[Mapping[str, Kit]] = {
    "a doorbell loses its ring when cancelled": _kit(doorbell=_ForgetsRingWhenCancelled),
    "a doorbell of capacity 0": _kit(doorbell=_HoldsNoRing),
    "the window drops what is not durable": _kit(window=_DropsUncommitted),
    "publish rings before it can be read": _kit(window=_RingsBeforeItCanBeRead),
    "publish rings only one": _kit(window=_RingsOnlyOne),
    "a deleted session's window closes in silence": _kit(window=_ClosesInSilence),
    "the window hands one out twice": _kit(window=_HasOneTooMany),
    "receive moves before it awaits": _kit(subscription=_MovesBeforeItAwaits),
    "fetch moves before it reads": _kit(subscription=_MovesBeforeItReads),
    "fetch takes a page for the whole log": _kit(subscription=_MovesToTheHead),
    "fetch believes a page that was overtaken": _kit(subscription=_BelievesOldPages),
    "close forgets to unsubscribe": _kit(subscription=_ForgetsToUnsubscribe),
    "a reader is not rewound": _kit(subscription=_IsNotRewound),
    "a reader looks away for good": _kit(subscription=_LooksAwayForGood),
    "a reader goes on after the end": _kit(subscription=_GoesOnAfterTheEnd),
    "a reader loses its gap": _kit(subscription=_LosesItsGap),
    "an outage does not ring": _kit(topic=_TellsOfOutagesInSilence),
    "an outage is told to one": _kit(topic=_TellsOnlyOneOfOutages),
    "an outage is not told to who comes later": _kit(topic=_TellsNewcomersNothing),
    "an outage ends with its writer": _kit(topic=_ForgetsOutageWithItsWriter),
    "an outage does not end": _kit(topic=_NeverEndsAnOutage),
    "an outage is told at each look": _kit(subscription=_TellsOfAnOutageAtEachLook),
    "an outage is told at each failure": _kit(subscription=_TellsOfEachFailure),
    "an outage is told once for writing and once for reading": _kit(subscription=_TellsOfReadsApart),
    "an outage that is over is told": _kit(subscription=_TellsOfWhatIsOver),
    "a reader loses its outage": _kit(subscription=_LosesItsOutage),
    "begin reads the head first and moves later": _kit(subscription=_SkipsWhatWasReadMeanwhile),
    "begin reads the head before it subscribes": _kit(bus=_SubscribesLate),
    "the first who leaves takes the session along": _kit(topic=_LeavesWithEverybody),
    "an empty session stays": _kit(topic=_KeepsEmptySessions),
}
