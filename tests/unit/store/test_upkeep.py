"""Counting, and waking who waits for the count."""

import trio
import trio.testing

from bamboo.store.upkeep import Tally


async def test_what_was_added_before_anybody_waited_counts() -> None:
    with trio.fail_after(5):
        tally = Tally()
        tally.add(3)
        await tally.wait(2)


async def test_a_waiter_is_woken_when_the_count_is_reached_and_the_next_one_begins_anew() -> None:
    tally, woken = Tally(), 0

    async def listen() -> None:
        nonlocal woken
        while True:
            await tally.wait(3)
            woken += 1

    with trio.fail_after(5):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(listen)
            for count in range(1, 10):
                tally.add(1)
                await trio.testing.wait_all_tasks_blocked()
                assert woken == count // 3
            nursery.cancel_scope.cancel()


async def test_a_wait_that_is_cancelled_forgets_nothing() -> None:
    tally = Tally()
    with trio.fail_after(5):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(tally.wait, 2)
            tally.add(1)
            await trio.testing.wait_all_tasks_blocked()
            nursery.cancel_scope.cancel()
        tally.add(1)
        await tally.wait(2)
