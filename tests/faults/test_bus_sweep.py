"""The event bus, with a subscriber cancelled at every step: it gets every event exactly once and in order all the same,
nobody else notices, and nothing is left behind.

The second half turns the question round: every mutant of the bus is caught by the very scenarios that the real one
passes.
"""

from collections.abc import Awaitable, Callable, Mapping
from typing import Final

import pytest
import trio

from bamboo.bus.event_bus import EventBus
from bamboo.bus.subscription import Subscription
from bamboo.core.types import Cursor, Epoch, RunId
from tests.support.bus_lives import (
    Write,
    deleted,
    evicted,
    failing,
    failing_to_read_too,
    gave_up,
    gave_up_in_an_outage,
    live,
    often_durable,
    stored_late,
    two_runs,
)
from tests.support.bus_mutants import MUTANTS, UNCHANGED
from tests.support.bus_world import (
    OTHER,
    REAL,
    SESSION,
    TINY_WINDOW,
    WIDE_WINDOW,
    Kit,
    Reader,
    Until,
    World,
    Writer,
    complete,
    never,
    run_complete,
    started,
    token,
)
from tests.support.sweep import Check, Cut, Scenario, SweepFailed, sweep

START: Final = Cursor(Epoch("e1"), 0)
RUN: Final = RunId("run")

# How a reader that is cancelled goes on.

GoOn = Callable[[Cut, Reader, EventBus, Cursor | None], Awaitable[None]]


async def reconnecting(cut: Cut, reader: Reader, bus: EventBus, after: Cursor | None) -> None:  # noqa: ARG001
    """As a client does: with a new subscription, from its last cursor."""
    with cut:
        await reader.follow(after)
    await reader.resume()


async def retrying(cut: Cut, reader: Reader, bus: EventBus, after: Cursor | None) -> None:
    """As a caller with a deadline does: the cancelled call again, on the same subscription."""
    reader.start(after)
    with bus.subscribe(reader.session_id, run_id=reader.run_id) as subscription:
        begun = False
        with cut:
            await reader.begin(subscription)
            begun = True
            await reader.read(subscription)
        if not begun:
            await reader.begin(subscription)
        await reader.read(subscription)


ScenarioOf = Callable[[Kit], Scenario]


def watched(
    write: Write,
    *,
    window_bytes: int = WIDE_WINDOW,
    go_on: GoOn = reconnecting,
    after: Cursor | None = START,
    run_id: RunId | None = None,
    until: Until = run_complete,
    last: int | None = None,
    may_be_refused: bool = False,
    outages: int = 0,
) -> ScenarioOf:
    """`write` goes on while one reader is cancelled, and another reads the same in peace. Each is told of so many
    outages, once; a subscription that comes in the middle of one is told of it anew."""

    def with_kit(kit: Kit) -> Scenario:
        async def scenario(cut: Cut) -> Check:
            world = World(kit, window_bytes=window_bytes)
            victim = Reader(world.bus, run_id=run_id, until=until, last=last)
            bystander = Reader(world.bus, run_id=run_id, until=until, last=last)
            if after is not None:
                await world.writer.open()
                await world.writer.commit(started())
            async with trio.open_nursery() as nursery:
                nursery.start_soon(write, world.writer)
                async with trio.open_nursery() as readers:
                    readers.start_soon(bystander.follow, after)
                    await go_on(cut, victim, world.bus, after)
                world.writer.may_leave.set()

            def check() -> None:
                log = world.writer.erased or world.writer.log.events
                assert not bystander.refused
                assert may_be_refused or not victim.refused
                bystander.check(log)
                victim.check(log)
                assert bystander.outages == outages
                assert outages <= victim.outages <= outages + (outages > 0 and go_on is reconnecting)
                world.check_empty()

            return check

        return scenario

    return with_kit


def from_now(kit: Kit) -> Scenario:
    """What comes from now on is everything that comes after one moment between the question and its answer."""

    async def write(writer: Writer) -> None:
        writer.publish(token("one"), token("two"))
        await writer.evict()
        await writer.open()
        writer.publish(token("three"))
        await writer.commit(complete())
        await writer.evict()

    async def follow(world: World, reader: Reader) -> None:
        if reader.cursor is not None:
            await reader.resume()
            return
        with world.bus.subscribe(SESSION) as subscription:
            durable = world.writer.log.head
            await reader.begin(subscription)
            assert durable <= reader.first <= world.writer.head
            await reader.read(subscription)

    async def scenario(cut: Cut) -> Check:
        world = World(kit)
        await world.writer.open()
        await world.writer.commit(started())
        await world.writer.evict()
        await world.writer.open()
        reader = Reader(world.bus, last=5)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(write, world.writer)
            with cut:
                await follow(world, reader)
            await follow(world, reader)

        def check() -> None:
            reader.check(world.writer.log.events)
            world.check_empty()

        return check

    return scenario


def shared_doorbell(kit: Kit) -> Scenario:
    """One reader follows two sessions with one doorbell, and writes between two looks: what rings while it writes must
    not be lost."""

    async def follow(world: World, readers: list[Reader]) -> None:
        doorbell = kit.make_doorbell()
        first = world.bus.subscribe(SESSION, doorbell=doorbell)
        second = world.bus.subscribe(OTHER, doorbell=doorbell)
        with first, second:
            feeds = list(zip([first, second], readers, strict=True))
            for subscription, reader in feeds:
                await reader.begin(subscription)
            while True:
                for subscription, reader in feeds:
                    await take(subscription, reader)
                await world.logs.pause(4)  # the write
                if all(reader.done for reader in readers):
                    break
                await doorbell.wait()
        doorbell.close()

    async def take(subscription: Subscription, reader: Reader) -> None:
        while not reader.done:
            items = subscription.take_nowait()
            if items is None:
                reader.note(await subscription.fetch())
            else:
                reader.note(items)
                return

    async def scenario(cut: Cut) -> Check:
        world = World(kit, window_bytes=TINY_WINDOW)
        writers = [world.writer, Writer(world.bus, world.logs, OTHER)]
        readers = [Reader(world.bus, writer.session_id) for writer in writers]
        async with trio.open_nursery() as nursery:
            for write, writer, reader in zip([live, evicted], writers, readers, strict=True):
                reader.start(START)
                await writer.open()
                await writer.commit(started())
                nursery.start_soon(write, writer)
            with cut:
                await follow(world, readers)
            await follow(world, readers)
            world.writer.may_leave.set()

        def check() -> None:
            for writer, reader in zip(writers, readers, strict=True):
                reader.check(writer.log.events)
            world.check_empty()

        return check

    return scenario


def made_again(kit: Kit) -> Scenario:
    """A session is deleted, and a new one gets its id: a reader has the one to its end, or the other from its start."""

    async def write(writer: Writer) -> None:
        await deleted(writer)
        await writer.open()
        await writer.commit(started())
        await writer.commit(complete())
        await writer.evict()

    async def scenario(cut: Cut) -> Check:
        world = World(kit, window_bytes=TINY_WINDOW)
        victim, bystander = Reader(world.bus, until=never), Reader(world.bus, until=never)
        await world.writer.open()
        await world.writer.commit(started())
        async with trio.open_nursery() as nursery:
            nursery.start_soon(write, world.writer)
            nursery.start_soon(bystander.follow, START)
            with cut:
                await victim.follow(START)
            victim.until = run_complete
            await victim.resume()

        def check() -> None:
            bystander.check(world.writer.erased)
            new = any(event.epoch != START.epoch for event in victim.kept)
            victim.check(world.writer.log.events if new else world.writer.erased)
            world.check_empty()

        return check

    return scenario


SCENARIOS: Final[Mapping[str, ScenarioOf]] = {
    "a shared doorbell": shared_doorbell,
    "live": watched(live),
    "live, retried": watched(live, go_on=retrying),
    "live, in a tiny window": watched(live, window_bytes=TINY_WINDOW),
    "behind a tiny window": watched(often_durable, window_bytes=TINY_WINDOW),
    "behind a tiny window, retried": watched(often_durable, window_bytes=TINY_WINDOW, go_on=retrying),
    "evicted in mid-stream": watched(evicted),
    "evicted in mid-stream, retried": watched(evicted, go_on=retrying),
    "a writer gave up": watched(gave_up),
    "a writer gave up, retried": watched(gave_up, window_bytes=TINY_WINDOW, go_on=retrying),
    "deleted": watched(deleted, until=never, may_be_refused=True),
    "deleted, behind a tiny window": watched(deleted, window_bytes=TINY_WINDOW, until=never, may_be_refused=True),
    "deleted, retried": watched(deleted, window_bytes=TINY_WINDOW, go_on=retrying, until=never),
    "one run of two": watched(two_runs, run_id=RUN, until=never, last=5),
    "one run of two, behind a tiny window": watched(
        two_runs, window_bytes=TINY_WINDOW, go_on=retrying, run_id=RUN, until=never
    ),
    "stored late": watched(stored_late, after=None, last=3, may_be_refused=True),
    "an outage": watched(failing, outages=2),
    "an outage, retried": watched(failing, go_on=retrying, outages=2),
    "an outage, behind a tiny window": watched(
        failing_to_read_too, window_bytes=TINY_WINDOW, go_on=retrying, outages=2
    ),
    "a writer gave up in an outage": watched(gave_up_in_an_outage, outages=1),
    "from now": from_now,
    "deleted and made again": made_again,
}


def sweep_all(kit: Kit) -> None:
    for seeds in (range(3), range(3, 30)):  # most mutants are caught at once, wherever that is
        for scenario_of in SCENARIOS.values():
            sweep(scenario_of(kit), seeds=seeds)


@pytest.mark.parametrize("name", SCENARIOS)
def test_subscriber_that_is_cancelled_at_any_step_gets_every_event_once_and_in_order(name: str) -> None:
    sweep(SCENARIOS[name](REAL))


@pytest.mark.parametrize("name", MUTANTS)
def test_every_mutant_of_the_bus_is_caught_by_the_same_scenarios(name: str) -> None:
    with pytest.raises(SweepFailed):
        sweep_all(MUTANTS[name])


def test_the_bus_that_the_mutants_are_made_of_passes_while_nothing_is_mutated() -> None:
    for scenario_of in SCENARIOS.values():
        sweep(scenario_of(UNCHANGED), seeds=range(2))
