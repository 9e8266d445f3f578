"""One session in the bus: the window that its writer has, and whom an event rings."""

from typing import Protocol

import trio

from bamboo.bus.log_reader import LogReader
from bamboo.core.events import Event, Outage, event_bytes
from bamboo.core.types import Epoch, SessionId
from bamboo.errors import StoreError


class Doorbell:
    """Says "there is more" to one waiting task: a trio memory channel of capacity 1 that holds at most one ring."""

    __slots__ = ("_receive", "_send", "rung")

    def __init__(self) -> None:
        self._send, self._receive = trio.open_memory_channel[None](1)
        self.rung = False
        """A ring is on its way to the waiting task, or nobody is to be rung any more: another ring does nothing."""

    def ring(self) -> None:
        if not self.rung:
            self.rung = True
            self._send.send_nowait(None)

    async def wait(self) -> None:
        """Return at the next ring, or at once after one that nobody has waited for yet. Atomic with respect to
        cancellation."""
        await self._receive.receive()
        self.rung = False

    def close(self) -> None:
        """Idempotent; rings do nothing from now on. Not while a task waits."""
        self.rung = True
        self._send.close()
        self._receive.close()


class Subscriber(Protocol):
    """What a topic knows of a subscription."""

    doorbell: Doorbell

    def rewind(self, epoch: Epoch, head: int) -> None:
        """The store answers, and the log goes on behind `head`, in `epoch`: whoever has seen more is told so with a
        gap."""

    def outage_turned(self) -> None:
        """The topic's outage has begun, or is over."""


class Topic:
    """One session in the bus: its window, if its runner lives, and its subscriptions."""

    __slots__ = (
        "_topics",
        "attendance",
        "closed_seq",
        "outage",
        "reader",
        "session_id",
        "subscriptions",
        "version",
        "window",
    )

    def __init__(self, session_id: SessionId, topics: dict[SessionId, "Topic"], reader: LogReader) -> None:
        self.session_id = session_id
        self._topics = topics
        """The sessions in the bus: the topic takes itself out as soon as it has neither window nor subscription."""
        self.reader = reader
        self.window: Window | None = None
        self.subscriptions: set[Subscriber] = set()
        self.version = 0
        """Counts windows opened and closed: a reader for whom the store had nothing more at this version need not look
        again before the next."""
        self.outage: Outage | None = None
        """The session cannot be written just now. It outlives the window of a writer that gave up."""
        self.closed_seq: int | None = None
        """The seq of `session_closed`: the log goes no further, and only what the last window holds is left of it."""
        self.attendance = trio.Event()
        """Set, and replaced, whenever the first subscription comes or the last one goes."""

    def window_opened(self, window: "Window") -> None:
        """The session's writer has come: the store answers. Nothing is published in the window yet."""
        assert self.window is None, f"session {self.session_id} has a window already"
        self.window = window
        self.end_outage()
        for subscription in self.subscriptions:
            subscription.rewind(window.epoch, window.head)
        self._turn()

    def window_closed(self, window: "Window") -> None:
        """The writer has left; with `closed_seq` set, for good."""
        assert self.window is window, f"{window!r} was closed before"
        if self.closed_seq is None:
            self.window = None
        else:
            # A deleted session's topic lives on for its readers only; a new session of the same id gets a new one.
            self._leave_bus()
        self._turn()
        self._tidy()

    def begin_outage(self, error: StoreError) -> None:
        """The store refuses the session's writer, or does not answer it: each subscription, those that come later too,
        hands that out once while it lasts. Does nothing while an outage is going on."""
        if self.outage is None:
            self.outage = Outage(self.session_id, error.message, error.retry_after_s)
            for subscription in self.subscriptions:
                subscription.outage_turned()
                subscription.doorbell.ring()

    def end_outage(self) -> None:
        """The store takes the session's writes again. Whoever was not told is not told any more. Idempotent."""
        if self.outage is not None:
            self.outage = None
            for subscription in self.subscriptions:
                subscription.outage_turned()

    def join(self, subscription: Subscriber) -> None:
        self.subscriptions.add(subscription)
        if self.outage is not None:
            subscription.outage_turned()
        if len(self.subscriptions) == 1:
            self._attendance_turned()

    def leave(self, subscription: Subscriber) -> None:
        """Idempotent."""
        if subscription not in self.subscriptions:
            return
        self.subscriptions.remove(subscription)
        if not self.subscriptions:
            self._attendance_turned()
        self._tidy()

    def _turn(self) -> None:
        self.version += 1
        for subscription in self.subscriptions:
            subscription.doorbell.ring()

    def _attendance_turned(self) -> None:
        self.attendance.set()
        self.attendance = trio.Event()

    def _tidy(self) -> None:
        if self.window is None and not self.subscriptions:
            self._leave_bus()

    def _leave_bus(self) -> None:
        if self._topics.get(self.session_id) is self:
            del self._topics[self.session_id]


class Window:
    """The newest events of one session's log, in order and without a hole, and whatever of it is not durable yet.

    Only the session's writer has it. Bounded by `max_bytes`, but what is not durable is never dropped (the writer sees
    `pending_bytes` and stops producing), nor is the newest event: who is awake needs no store, however big the event.
    """

    __slots__ = (
        "_bytes",
        "_durable",
        "_events",
        "_first",
        "_max_bytes",
        "_sizes",
        "_topic",
        "epoch",
        "epoch_first_seq",
        "head",
        "pending_bytes",
    )

    def __init__(self, topic: Topic, epoch: Epoch, head: int, epoch_first_seq: int, max_bytes: int) -> None:
        self._topic = topic
        self.epoch = epoch
        self.epoch_first_seq = epoch_first_seq
        self.head = head
        self._max_bytes = max_bytes
        self._events: list[Event] = []
        self._sizes: list[int] = []
        self._first = head + 1  # seq of the first event held
        self._bytes = 0
        self._durable = head
        self.pending_bytes = 0

    def __repr__(self) -> str:
        return f"<Window {self._topic.session_id} {self.epoch} {self._first}..{self.head} durable {self._durable}>"

    @property
    def attended(self) -> bool:
        """Somebody is subscribed to the session."""
        return bool(self._topic.subscriptions)

    def begin_outage(self, error: StoreError) -> None:
        """What is pending cannot be made durable now: tell the readers, once. Idempotent while it lasts."""
        self._topic.begin_outage(error)

    def end_outage(self) -> None:
        """The store works again. Idempotent."""
        self._topic.end_outage()

    async def wait_attendance(self, *, attended: bool) -> None:
        """Return when `attended` is as asked for."""
        await trio.lowlevel.checkpoint()
        while self.attended is not attended:
            await self._topic.attendance.wait()

    def publish(self, event: Event) -> None:
        """Append the log's next event and ring every subscription. Events of one log come in seq order, without a
        hole."""
        assert event.seq == self.head + 1, f"event {event.seq} published behind {self.head}"
        size = event_bytes(event.body)
        self.head = event.seq
        self._events.append(event)
        self._sizes.append(size)
        self._bytes += size
        self.pending_bytes += size
        for subscription in self._topic.subscriptions:
            doorbell = subscription.doorbell
            if not doorbell.rung:  # looked at here too: most rings of a burst do nothing
                doorbell.ring()

    def mark_durable(self, seq: int) -> None:
        """Everything up to `seq` is in the store now and may be dropped."""
        assert self._durable <= seq <= self.head, f"{seq} is durable, in {self!r}"
        sizes = self._sizes
        self.pending_bytes -= sum(sizes[self._durable + 1 - self._first : seq + 1 - self._first])
        self._durable = seq
        drop = 0
        last = min(seq, self.head - 1)
        while self._bytes > self._max_bytes and self._first + drop <= last:
            self._bytes -= sizes[drop]
            drop += 1
        if drop:
            del self._events[:drop]
            del sizes[:drop]
            self._first += drop

    def close(self) -> None:
        """The writer leaves. Everything in the window must be durable, or given up by a writer that loads again."""
        self._topic.window_closed(self)

    def close_deleted(self) -> None:
        """The session is gone; its `session_closed` is the last event published. Readers that are further back than the
        window get a gap."""
        self._topic.closed_seq = self.head
        self._topic.window_closed(self)

    def after(self, seq: int) -> list[Event] | None:
        """Everything published after `seq`; None if the window no longer reaches back that far."""
        index = seq + 1 - self._first
        if index < 0:
            return None
        return self._events[index:]

    @property
    def first_seq(self) -> int:
        return self._first
