"""Whatever a writer and its readers do, and in whatever order: every reader has a log without a hole, in order."""

from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass

import trio
import trio.testing
from hypothesis import given, settings
from hypothesis import strategies as st

from bamboo.core.events import AgentComplete, Event, SessionClosed
from bamboo.core.types import Cursor, Epoch, RunId
from bamboo.errors import StoreError
from tests.support.bus_world import RUN, Reader, World, complete, started, token
from tests.support.hypothesis import examples
from tests.support.sweep import scheduled_by

OTHER_RUN = RunId("other run")
READERS = 3


# What may happen. Everything of the writer's is done to its end before the next thing begins; readers go on all the
# time, at the pace that `Pass` and the writer's own waits give them.


@dataclass(frozen=True, slots=True)
class Publish:
    deltas: int
    run_id: RunId


@dataclass(frozen=True, slots=True)
class Commit:
    run_id: RunId


@dataclass(frozen=True, slots=True)
class MarkDurable:
    pass


@dataclass(frozen=True, slots=True)
class EvictAndReopen:
    away: int
    """So many steps the session has no window."""


@dataclass(frozen=True, slots=True)
class GiveUp:
    lost: int
    """So many deltas go out, may be seen, and are given up."""
    seen: int
    away: int


@dataclass(frozen=True, slots=True)
class Outage:
    """The store fails for so many steps; reading it too, if `unreadable`."""

    steps: int
    unreadable: bool


@dataclass(frozen=True, slots=True)
class Trim:
    spared: int
    """So many durable events stay."""


@dataclass(frozen=True, slots=True)
class Subscribe:
    """A reader comes, or comes back."""

    reader: int


@dataclass(frozen=True, slots=True)
class Close:
    """A reader is cancelled wherever it is."""

    reader: int


@dataclass(frozen=True, slots=True)
class Pass:
    steps: int


Action = Publish | Commit | MarkDurable | EvictAndReopen | GiveUp | Outage | Trim | Subscribe | Close | Pass

some_reader = st.integers(0, READERS - 1)
some_steps = st.integers(0, 4)
some_run = st.sampled_from([RUN, OTHER_RUN])
actions = st.lists(
    st.one_of(
        st.builds(Publish, st.integers(1, 3), some_run),
        st.builds(Commit, some_run),
        st.just(MarkDurable()),
        st.builds(EvictAndReopen, some_steps),
        st.builds(GiveUp, st.integers(0, 3), some_steps, some_steps),
        st.builds(Outage, some_steps, st.booleans()),
        st.builds(Trim, st.integers(0, 3)),
        st.builds(Subscribe, some_reader),
        st.builds(Close, some_reader),
        st.builds(Pass, some_steps),
    ),
    max_size=40,
)


def the_end(event: Event) -> bool:
    return isinstance(event.body, AgentComplete | SessionClosed)


class Play:
    """The world, its readers, and what has been asked of them."""

    def __init__(self, world: World, nursery: trio.Nursery) -> None:
        self._nursery = nursery
        self._world = world
        self._reading: dict[int, trio.CancelScope] = {}
        self.outages = 0
        self.subscribed = [0] * READERS
        """How often."""
        # One from the start, one from wherever it comes in, one for a run.
        self.readers = [
            Reader(world.bus, until=the_end),
            Reader(world.bus, until=the_end),
            Reader(world.bus, run_id=RUN, until=the_end),
        ]
        for reader in self.readers[0], self.readers[2]:
            reader.start(Cursor(Epoch("e1"), 0))

    async def do(self, action: Action) -> None:
        writer = self._world.writer
        match action:
            case Publish():
                writer.publish(*[token(str(writer.head))] * action.deltas, run_id=action.run_id)
            case Commit():
                await writer.commit(started(), run_id=action.run_id)
            case MarkDurable():
                await writer.flush()
            case EvictAndReopen():
                await writer.evict()
                await self._world.logs.pause(action.away)
                await writer.open()
            case GiveUp():
                writer.publish(*[token("lost")] * action.lost)
                await self._world.logs.pause(action.seen)
                writer.give_up()
                await self._world.logs.pause(action.away)
                await writer.open(new_epoch=True)
            case Outage():
                self.outages += 1
                writer.begin_outage()
                self._world.logs.failing = action.unreadable
                await self._world.logs.pause(action.steps)
                self._world.logs.failing = False
                writer.end_outage()
            case Trim():
                writer.trim(max(0, writer.log.head - action.spared))
            case Subscribe():
                self.subscribe(action.reader)
            case Close():
                if action.reader in self._reading:
                    self._reading[action.reader].cancel()
            case Pass():
                await self._world.logs.pause(action.steps)

    def subscribe(self, number: int) -> None:
        if number not in self._reading:
            self._reading[number] = trio.CancelScope()
            self._nursery.start_soon(self._read, number)

    async def _read(self, number: int) -> None:
        with self._reading[number]:
            while True:
                self.subscribed[number] += 1
                with suppress(StoreError):
                    await self.readers[number].resume()
                    break
                await trio.lowlevel.checkpoint()  # a client is refused, and asks again
        del self._reading[number]


async def play(world: World, done: Sequence[Action], *, deleted: bool) -> Play:
    with trio.fail_after(10):
        await world.writer.open()
        await world.writer.commit(started())
        async with trio.open_nursery() as nursery:
            acts = Play(world, nursery)
            for action in done:
                await acts.do(action)
            # Everybody comes back, and has a place, before the end.
            await trio.testing.wait_all_tasks_blocked()
            for number in range(READERS):
                acts.subscribe(number)
            await trio.testing.wait_all_tasks_blocked()
            if deleted:
                await world.writer.delete()
            else:
                await world.writer.commit(complete())
        if not deleted:
            await world.writer.evict()
    return acts


@given(
    done=actions,
    deleted=st.booleans(),
    window_events=st.integers(0, 4),
    page_events=st.integers(1, 3),
    seed=st.integers(0, 2**32),
)
@settings(max_examples=examples(300))
def test_every_reader_has_the_log_without_a_hole_and_in_order(
    done: Sequence[Action], *, deleted: bool, window_events: int, page_events: int, seed: int
) -> None:
    world = World(window_bytes=1 + 310 * window_events, page_events=page_events)
    with scheduled_by(seed):
        acts = trio.run(lambda: play(world, done, deleted=deleted), clock=trio.testing.MockClock(autojump_threshold=0))

    if deleted:
        log = world.writer.erased
        removed = len(log) - 1  # all but `session_closed`, for who was behind the window
    else:
        kept = world.writer.log
        log = [*kept.trimmed, *kept.events]
        removed = kept.floor
    assert [event.seq for event in log] == list(range(1, len(log) + 1))
    for reader, subscribed in zip(acts.readers, acts.subscribed, strict=True):
        reader.check(log)
        # Once per outage, and once more for each subscription that came in the middle of one.
        assert reader.outages <= acts.outages + subscribed
        assert all(seq <= removed for seq in reader.missing), "it misses only what was removed"
    world.check_empty()
