"""One probe for everybody who asks: cheap against a flood, and never an answer that is too old."""

import trio
import trio.testing
from trio.testing import MockClock

from bamboo.store import wall_clock_ms
from bamboo.store.memory import MemoryStore
from bamboo.web.readiness import PROBE_S, StoreProbe


class Probed(MemoryStore):
    """A store whose health is what the test says, after `delay_s`."""

    def __init__(self) -> None:
        super().__init__(wall_clock_ms)
        self.well = True
        self.delay_s = 0.0
        self.probes: list[float] = []
        self.at_once = 0

    async def healthy(self) -> bool:
        self.probes.append(trio.current_time())
        self.at_once += 1
        assert self.at_once == 1, "one probe at a time"
        await trio.sleep(self.delay_s)
        self.at_once -= 1
        return self.well


async def test_a_flood_of_questions_is_one_probe_a_second(autojump_clock: MockClock) -> None:
    store = Probed()
    probe = StoreProbe(store)
    answers = 0

    async def ask() -> None:
        nonlocal answers
        while trio.current_time() < 10:
            assert await probe.healthy()
            answers += 1
            await trio.sleep(0.01)

    async with trio.open_nursery() as nursery:
        nursery.start_soon(probe.run)
        async with trio.open_nursery() as flood:
            for _ in range(20):
                flood.start_soon(ask)
        probe.close()
    assert answers >= 20_000
    assert 9 <= len(store.probes) <= 11
    assert all(later - sooner >= PROBE_S for sooner, later in zip(store.probes, store.probes[1:], strict=False))
    assert autojump_clock.current_time() >= 10


async def test_nobody_asks_and_nothing_is_probed(autojump_clock: MockClock) -> None:
    store = Probed()
    probe = StoreProbe(store)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(probe.run)
        await trio.sleep(100)
        assert await probe.healthy()
        await trio.sleep(100)
        probe.close()
    assert store.probes == [100]
    assert autojump_clock.autojump_threshold == 0


async def test_no_answer_is_older_than_a_second(autojump_clock: MockClock) -> None:
    store = Probed()
    probe = StoreProbe(store)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(probe.run)
        for well in (True, False, True):
            store.well = well
            assert await probe.healthy() is well
            store.well = not well
            await trio.sleep(PROBE_S - 0.01)
            assert await probe.healthy() is well
            await trio.sleep(0.01)
            assert await probe.healthy() is not well
            await trio.sleep(PROBE_S)
        probe.close()
    assert autojump_clock.autojump_threshold == 0


async def test_who_asks_while_the_store_is_slow_shares_its_answer_and_who_leaves_takes_nothing_along(
    autojump_clock: MockClock,
) -> None:
    store = Probed()
    store.delay_s = 5
    probe = StoreProbe(store)
    answered: list[float] = []

    async def ask(after_s: float) -> None:
        await trio.sleep(after_s)
        assert await probe.healthy()
        answered.append(trio.current_time())

    async with trio.open_nursery() as nursery:
        nursery.start_soon(probe.run)
        with trio.move_on_after(0.5) as patience:
            await probe.healthy()  # the one that began it all
        assert patience.cancelled_caught
        async with trio.open_nursery() as askers:
            for after_s in range(4):
                askers.start_soon(ask, after_s)
        assert answered == [5] * 4
        assert store.probes == [0]
        await probe.healthy()  # the answer of the first one is of its beginning: too old
        assert store.probes == [0, 5]
        probe.close()
    assert autojump_clock.autojump_threshold == 0


async def test_a_store_that_never_answers_holds_one_probe_however_many_ask(autojump_clock: MockClock) -> None:
    store = Probed()
    store.delay_s = 10_000
    probe = StoreProbe(store)

    async def ask() -> None:
        for _ in range(10):
            with trio.move_on_after(2) as patience:
                await probe.healthy()
            assert patience.cancelled_caught

    async with trio.open_nursery() as nursery:
        nursery.start_soon(probe.run)
        async with trio.open_nursery() as flood:
            for _ in range(50):
                flood.start_soon(ask)
        assert store.probes == [0]
        probe.close()
    assert autojump_clock.autojump_threshold == 0


async def test_closing_before_the_task_runs_ends_it_too() -> None:
    probe = StoreProbe(Probed())
    with trio.fail_after(5):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(probe.run)
            probe.close()
