"""The way into the bus: windows for those who write, subscriptions for those who read."""

from bamboo.bus.log_reader import LogReader
from bamboo.bus.subscription import Subscription
from bamboo.bus.topic import Doorbell, Topic, Window
from bamboo.core.types import Epoch, RunId, SessionId
from bamboo.errors import StoreError


class EventBus:
    """The sessions that are being written or read right now."""

    def __init__(self, reader: LogReader, *, window_bytes: int) -> None:
        self._reader = reader
        self._window_bytes = window_bytes
        self._topics: dict[SessionId, Topic] = {}

    def __repr__(self) -> str:
        subscriptions = sum(len(topic.subscriptions) for topic in self._topics.values())
        return f"<EventBus {len(self._topics)} sessions, {subscriptions} subscriptions>"

    @property
    def sessions(self) -> int:
        return len(self._topics)

    @property
    def subscriptions(self) -> int:
        return sum(len(topic.subscriptions) for topic in self._topics.values())

    def open_window(self, session_id: SessionId, epoch: Epoch, head: int, *, first_seq: int) -> Window:
        """The window of a session whose log ends, durably, at `head`. `first_seq` is the first of this epoch.

        A subscription that has seen more than `head` (events that died with a writer that gave up) is told so with a
        gap.
        """
        topic = self._topic(session_id)
        window = Window(topic, epoch, head, first_seq, self._window_bytes)
        topic.window_opened(window)
        return window

    def subscribe(
        self, session_id: SessionId, *, run_id: RunId | None = None, doorbell: Doorbell | None = None
    ) -> Subscription:
        """A new subscription, registered at once: whatever is published from now on rings its doorbell. `begin` gives
        it its place.

        With `run_id` it sees only that run's events and ends after the terminal one. A `doorbell` may be shared by
        several subscriptions of one reader, who waits for it, reads them with `take_nowait` and `fetch`, and closes it
        in the end; without one the subscription has its own, and `receive` does all that.
        """
        topic = self._topic(session_id)
        subscription = Subscription(topic, run_id, doorbell)
        topic.join(subscription)
        return subscription

    def begin_outage(self, session_id: SessionId, error: StoreError) -> None:
        """The store fails where a session without a window is to be written: tell whoever reads it, once.

        Opening a window ends it. Does nothing if nobody reads the session.
        """
        topic = self._topics.get(session_id)
        if topic is not None:
            topic.begin_outage(error)

    def _topic(self, session_id: SessionId) -> Topic:
        topic = self._topics.get(session_id)
        if topic is None:
            topic = self._topics[session_id] = Topic(session_id, self._topics, self._reader)
        return topic
