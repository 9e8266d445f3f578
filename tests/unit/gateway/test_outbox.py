"""The order of what a connection is sent: a window that the test publishes to, a store that can fail."""

from typing import Any

import orjson
import trio
import trio.testing
from trio.testing import MockClock

from bamboo.bus.event_bus import EventBus
from bamboo.bus.log_reader import LogExtent, LogPage
from bamboo.bus.subscription import READ_TIMEOUT_S, Subscription
from bamboo.bus.topic import Window
from bamboo.core.events import AgentToken, Event, SessionClosed
from bamboo.core.types import Epoch, EpochStart, RunId, SessionId
from bamboo.errors import StoreError
from bamboo.gateway.outbox import ANSWERS_BYTES, BATCH_BYTES, Outbox

A, B = SessionId("a"), SessionId("b")
EPOCH = Epoch("e")


class Log:
    """A LogReader over lists of events; a read fails with `failures` first, or waits at `gate`."""

    def __init__(self) -> None:
        self.events: dict[SessionId, list[Event]] = {}
        self.failures: list[StoreError] = []
        self.gate: trio.Event | None = None
        self.page = 3

    async def extent(self, session_id: SessionId) -> LogExtent | None:
        await trio.lowlevel.checkpoint()
        events = self.events.get(session_id)
        return None if events is None else LogExtent((EpochStart(EPOCH, 1),), 0, len(events))

    async def read(
        self, session_id: SessionId, after_seq: int, *, max_bytes: int, run_id: RunId | None = None
    ) -> LogPage | None:
        await trio.lowlevel.checkpoint()
        assert max_bytes
        assert run_id is None
        if self.gate is not None:
            await self.gate.wait()
        if self.failures:
            raise self.failures.pop(0)
        events = self.events[session_id]
        page = events[after_seq : after_seq + self.page]
        return LogPage(LogExtent((EpochStart(EPOCH, 1),), 0, len(events)), page, after_seq + len(page))


def token(session_id: SessionId, seq: int, text: str = "") -> Event:
    return Event(session_id, EPOCH, seq, 0, RunId("r"), AgentToken(text or f"{session_id}{seq}"))


class Desk:
    """A bus with the windows of two sessions, and an outbox."""

    def __init__(self) -> None:
        self.log = Log()
        self.bus = EventBus(self.log, window_bytes=1 << 30)
        self.outbox = Outbox()
        self.windows = {session: self.bus.open_window(session, EPOCH, 0, first_seq=1) for session in (A, B)}

    def subscription(self, session_id: SessionId, after: int = 0) -> Subscription:
        subscription = self.bus.subscribe(session_id, doorbell=self.outbox.doorbell)
        subscription.begin_at(after)
        return subscription

    def follow(self, session_id: SessionId, after: int = 0) -> None:
        self.outbox.follow(self.subscription(session_id, after))

    def publish(self, session_id: SessionId, count: int = 1, text: str = "") -> None:
        window: Window = self.windows[session_id]
        for _ in range(count):
            window.publish(token(session_id, window.head + 1, text))

    def gather(self, now: float = 0.0) -> list[str]:
        """What the next batch says: an event's token, or an answer's `type`."""
        batch = [orjson.loads(payload) for payload in self.outbox.gather(now)]
        self.outbox.gathered()
        return [said(frame) for frame in batch]


def said(frame: dict[str, Any]) -> str:
    return str(frame.get("token") or frame.get("code") or frame["type"])


def answer(name: str, size: int = 0) -> bytes:
    return orjson.dumps({"type": name, "padding": "x" * size})


async def test_answers_come_before_events_and_deferred_ones_behind_theirs() -> None:
    desk = Desk()
    desk.follow(A)
    desk.publish(A, 2)
    desk.outbox.put_after(A, 2, answer("stopped"))
    desk.outbox.put(answer("pong"))

    assert desk.gather() == ["pong", "a1", "a2", "stopped"]


async def test_a_deferred_answer_waits_for_events_that_are_not_there_yet() -> None:
    desk = Desk()
    desk.follow(A)
    desk.publish(A)
    desk.outbox.put_after(A, 2, answer("stopped"))

    assert desk.gather() == ["a1"]
    desk.publish(A)
    assert desk.gather() == ["a2", "stopped"]


async def test_a_deferred_answer_of_a_session_that_is_not_followed_comes_at_once() -> None:
    desk = Desk()
    desk.follow(B)
    desk.outbox.put_after(A, 99, answer("stopped"))

    assert desk.gather() == ["stopped"]


async def test_leaving_a_session_frees_its_deferred_answers_before_anything_later() -> None:
    desk = Desk()
    desk.follow(A)
    desk.publish(A)
    desk.outbox.put_after(A, 99, answer("stopped"))
    assert desk.gather() == ["a1"]
    desk.publish(A)
    desk.outbox.unfollow(A)
    desk.outbox.put(answer("unsubscribed"))

    assert desk.gather() == ["stopped", "unsubscribed"]
    assert desk.bus.subscriptions == 0


async def test_a_held_session_waits_for_its_answer_and_others_do_not() -> None:
    desk = Desk()
    desk.follow(A)
    desk.follow(B)
    desk.outbox.hold(A)
    desk.publish(A)
    desk.publish(B)

    assert desk.gather() == ["b1"]
    desk.outbox.put(answer("accepted"))
    desk.outbox.release()
    assert desk.gather() == ["accepted", "a1"]


async def test_what_was_read_for_a_session_before_it_was_held_waits_too() -> None:
    desk = Desk()
    desk.windows[A].close()
    desk.log.events[A] = [token(A, 1), token(A, 2)]
    desk.follow(A)
    with trio.fail_after(5):
        assert desk.gather() == []
        assert desk.outbox.lagging
        await desk.outbox.fetch()
        desk.outbox.hold(A)
        assert desk.gather() == []
        desk.outbox.put(answer("accepted"))
        desk.outbox.release()
        assert desk.gather() == ["accepted", "a1", "a2"]


async def test_a_deferred_answer_waits_for_what_was_read_and_not_gathered() -> None:
    desk = Desk()
    desk.windows[A].close()
    desk.log.events[A] = [token(A, 1), token(A, 2)]
    desk.follow(A)
    with trio.fail_after(5):
        assert desk.gather() == []
        await desk.outbox.fetch()
        desk.outbox.hold(A)
        desk.outbox.put_after(A, 2, answer("stopped"))
        assert desk.gather() == []
        desk.outbox.release()
        assert desk.gather() == ["a1", "a2", "stopped"]


async def test_a_lagging_session_is_read_for_until_it_has_caught_up() -> None:
    desk = Desk()
    desk.windows[A].close()
    desk.log.events[A] = [token(A, seq) for seq in range(1, 8)]
    desk.follow(A)
    seen: list[str] = []
    with trio.fail_after(5):
        while True:
            seen += desk.gather()
            if not desk.outbox.lagging:
                break
            await desk.outbox.fetch()
    assert seen == [f"a{seq}" for seq in range(1, 8)]


async def test_what_comes_from_the_store_after_its_session_was_left_is_dropped() -> None:
    desk = Desk()
    desk.windows[A].close()
    desk.log.events[A] = [token(A, 1)]
    desk.follow(A)
    assert desk.gather() == []
    desk.log.gate = trio.Event()
    with trio.fail_after(5):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(desk.outbox.fetch)
            await trio.testing.wait_all_tasks_blocked()
            desk.outbox.unfollow(A)
            desk.outbox.put(answer("unsubscribed"))
            desk.follow(A, 1)  # and followed anew, from elsewhere
            desk.log.gate.set()
    assert desk.gather() == ["unsubscribed"]


async def test_an_ended_session_is_left_by_itself() -> None:
    desk = Desk()
    desk.follow(A)
    window = desk.windows[A]
    window.publish(Event(A, EPOCH, 1, 0, None, SessionClosed()))
    window.close_deleted()

    assert desk.gather() == ["session_closed"]
    assert not desk.outbox.follows(A)
    assert desk.bus.sessions == 1  # that of B


async def test_sessions_take_turns_when_batches_are_full() -> None:
    desk = Desk()
    desk.follow(A)
    desk.follow(B)
    desk.publish(A, 1, "x" * BATCH_BYTES)
    desk.publish(B)

    first, *rest = desk.gather()
    assert (first[0], rest) == ("x", [])
    desk.publish(A, 1, "y" * BATCH_BYTES)
    assert desk.outbox.doorbell.rung
    second = desk.gather()
    assert (second[0], second[1][0]) == ("b1", "y")


async def test_a_store_that_fails_is_told_once_and_tried_again_later(autojump_clock: MockClock) -> None:
    assert autojump_clock.autojump_threshold == 0
    desk = Desk()
    desk.windows[A].close()
    desk.log.events[A] = [token(A, 1)]
    desk.log.failures = [StoreError("disk full"), StoreError("disk full")]
    desk.follow(A)
    desk.follow(B)
    began = trio.current_time()

    told: list[str] = []
    while "a1" not in told:
        now = trio.current_time()
        desk.publish(B)
        told += [text for text in desk.gather(now) if not text.startswith("b")]
        if desk.outbox.lagging:
            await desk.outbox.fetch()
        else:
            assert desk.outbox.retry_at > now
            await trio.sleep_until(min(desk.outbox.retry_at, now + 100))

    assert told == ["store_unavailable", "a1"]
    assert trio.current_time() - began == 1 + 2
    assert desk.outbox.retry_at == float("inf")


async def test_a_store_that_does_not_answer_counts_as_failing(autojump_clock: MockClock) -> None:
    assert autojump_clock.autojump_threshold == 0
    desk = Desk()
    desk.windows[A].close()
    desk.log.events[A] = [token(A, 1)]
    desk.log.gate = trio.Event()
    desk.follow(A)
    assert desk.gather() == []
    began = trio.current_time()
    await desk.outbox.fetch()

    assert trio.current_time() - began == READ_TIMEOUT_S
    assert desk.gather() == ["store_unavailable"]


async def test_an_outage_of_a_sessions_writer_is_told_once_between_its_events_and_no_other_session_waits() -> None:
    desk = Desk()
    desk.follow(A)
    desk.follow(B)
    desk.publish(A)
    assert desk.gather() == ["a1"]
    desk.windows[A].begin_outage(StoreError("disk full"))
    desk.publish(A)
    desk.publish(B)
    frames = [orjson.loads(payload) for payload in desk.outbox.gather(0)]
    assert [said(frame) for frame in frames] == ["store_unavailable", "a2", "b1"]
    assert frames[0]["session_id"] == A
    assert not {"seq", "cursor"} & set(frames[0])
    assert desk.gather() == []
    desk.windows[A].end_outage()
    desk.windows[A].begin_outage(StoreError("disk full"))
    assert desk.gather() == ["store_unavailable"]


async def test_a_failed_read_in_an_outage_that_was_told_is_not_told(autojump_clock: MockClock) -> None:
    assert autojump_clock.autojump_threshold == 0
    desk = Desk()
    desk.windows[A].close()
    desk.log.events[A] = [token(A, 1)]
    window = desk.bus.open_window(A, EPOCH, 1, first_seq=1)
    desk.follow(A)
    window.begin_outage(StoreError("disk full"))
    assert desk.gather() == ["store_unavailable"]
    desk.log.failures = [StoreError("unreadable")] * 3
    told: list[str] = []
    while not told:
        now = trio.current_time()
        told = desk.gather(now)
        if desk.outbox.lagging:
            await desk.outbox.fetch()
        elif not told:
            await trio.sleep_until(desk.outbox.retry_at)
    assert told == ["a1"]
    assert desk.log.failures == []


async def test_what_a_window_has_does_not_wait_for_the_next_try_of_the_store(autojump_clock: MockClock) -> None:
    assert autojump_clock.autojump_threshold == 0
    desk = Desk()
    desk.windows[A].close()
    desk.log.events[A] = [token(A, 1)]
    desk.log.failures = [StoreError("unreadable")]
    desk.follow(A)
    assert desk.gather() == []
    await desk.outbox.fetch()
    assert desk.gather() == ["store_unavailable"]
    desk.windows[A] = desk.bus.open_window(A, EPOCH, 0, first_seq=1)
    desk.publish(A)
    assert desk.gather() == ["a1"]
    assert trio.current_time() == 0


async def test_with_too_many_answers_waiting_there_is_no_room_until_they_are_written() -> None:
    desk = Desk()
    with trio.fail_after(5):
        await desk.outbox.wait_room()
        desk.outbox.put(answer("history", ANSWERS_BYTES))
        async with trio.open_nursery() as nursery:
            entered = trio.Event()

            async def wait() -> None:
                await desk.outbox.wait_room()
                entered.set()

            nursery.start_soon(wait)
            await trio.testing.wait_all_tasks_blocked()
            desk.outbox.gather(0)  # taken, not written
            await trio.testing.wait_all_tasks_blocked()
            assert not entered.is_set()
            desk.outbox.gathered()
            await entered.wait()


async def test_deferred_answers_take_room_too() -> None:
    desk = Desk()
    desk.follow(A)
    desk.outbox.put_after(A, 5, answer("stopped", ANSWERS_BYTES))
    with trio.move_on_after(0.01) as patience:
        await desk.outbox.wait_room()
    assert patience.cancelled_caught
    desk.outbox.unfollow(A)
    assert desk.gather() == ["stopped"]
    with trio.fail_after(5):
        await desk.outbox.wait_room()


async def test_everything_that_gives_a_reason_to_gather_rings() -> None:
    desk = Desk()

    async def rung() -> bool:
        if not desk.outbox.doorbell.rung:
            return False
        await desk.outbox.doorbell.wait()
        return True

    assert not await rung()
    desk.outbox.put(answer("pong"))
    assert await rung()
    desk.outbox.put_after(A, 0, answer("stopped"))
    assert await rung()
    desk.publish(A)
    desk.follow(A)
    assert await rung()
    desk.publish(A)
    assert await rung()
    desk.outbox.hold(A)
    desk.outbox.release()
    assert await rung()
    desk.outbox.unfollow(A)
    assert await rung()
    assert not await rung()


async def test_closing_leaves_nothing_in_the_bus() -> None:
    desk = Desk()
    desk.follow(A)
    desk.follow(B)
    desk.outbox.close()
    desk.publish(A)

    assert desk.bus.subscriptions == 0
