"""The cancel-at-every-step harness: it cancels everywhere, tells what broke and where, and leaves trio as it was."""

import pytest
import trio
from trio._core import _run as trio_run

from tests.support.sweep import Check, Counted, Cut, Scenario, SweepFailed, run_once, scheduled_by, sweep


async def three_steps(cut: Cut) -> None:
    with cut:
        for _ in range(3):
            await trio.lowlevel.checkpoint()


def test_every_step_of_the_cut_is_cancelled_once_and_then_it_comes_through() -> None:
    reached: list[int] = []

    async def scenario(cut: Cut) -> Check:
        done = 0
        with cut:
            for _ in range(3):
                await trio.lowlevel.checkpoint()
                done += 1
        return lambda: reached.append(done)

    swept = sweep(scenario, seeds=[0], counted="task")

    assert reached == [0, 1, 2, 3]
    assert (swept.runs, swept.cancelled) == (4, 3)


def test_every_seed_begins_again_at_the_first_step() -> None:
    assert sweep(three_steps, seeds=range(5), counted="task").cancelled == 5 * 3


def test_cancellation_that_comes_too_late_is_reached_but_nothing_is_cancelled_by_it() -> None:
    seen: list[tuple[bool, bool]] = []

    async def scenario(cut: Cut) -> None:
        with cut:
            await trio.lowlevel.cancel_shielded_checkpoint()
        seen.append((cut.reached, cut.cancelled))

    sweep(scenario, seeds=[0])

    assert seen == [(True, False), (False, False)]


@pytest.mark.parametrize(("counted", "cancelled"), [("run", True), ("task", False)])
def test_sleeping_task_is_cancelled_in_its_sleep_only_if_the_steps_of_the_others_count(
    counted: Counted, *, cancelled: bool
) -> None:
    seen: list[bool] = []

    async def scenario(cut: Cut) -> None:
        bell = trio.Event()

        async def ring() -> None:
            await trio.lowlevel.checkpoint()
            bell.set()

        async with trio.open_nursery() as nursery:
            nursery.start_soon(ring)
            with cut:
                await bell.wait()
        seen.append(cut.cancelled)

    sweep(scenario, seeds=range(4), counted=counted)

    assert (True in seen) is cancelled


def test_failure_names_the_seed_and_the_step_that_show_it_again() -> None:
    async def scenario(cut: Cut) -> Check:
        done = 0
        with cut:
            await trio.lowlevel.checkpoint()
            done += 1
            await trio.lowlevel.checkpoint()

        def check() -> None:
            assert not cut.cancelled or done == 0, "broken"

        return check

    with pytest.raises(SweepFailed, match=r"(?s)AssertionError: broken.*\(seed 7, cancelled before step 2\)") as caught:
        sweep(scenario, seeds=range(7, 9), counted="task")

    assert (caught.value.seed, caught.value.step) == (7, 2)
    assert isinstance(caught.value.__cause__, AssertionError)
    with pytest.raises(SweepFailed, match="broken"):
        sweep(scenario, seeds=[7], steps=[2], counted="task")
    run_once(scenario, 7, 1, counted="task")


def test_error_raised_in_the_run_is_told() -> None:
    async def scenario(cut: Cut) -> None:
        with cut:
            await trio.lowlevel.checkpoint()
        if cut.cancelled:
            raise ValueError("lost")

    with pytest.raises(SweepFailed, match=r"ValueError: lost \(seed 0, cancelled before step 1\)"):
        sweep(scenario)


def test_scenario_that_sleeps_for_ever_is_found_at_once() -> None:
    async def scenario(cut: Cut) -> None:
        with cut:
            await trio.lowlevel.checkpoint()
        if cut.cancelled:
            await trio.sleep_forever()

    with pytest.raises(SweepFailed, match="TooSlowError"):
        sweep(scenario)


def test_scenario_that_runs_in_a_circle_is_found() -> None:
    async def scenario(cut: Cut) -> None:
        with cut:
            await trio.lowlevel.checkpoint()
        while cut.cancelled:
            await trio.lowlevel.checkpoint()

    with pytest.raises(SweepFailed, match="more than 500 task steps"):
        sweep(scenario, max_steps=500)


async def no_cut(cut: Cut) -> None:  # noqa: ARG001 - a Scenario
    await trio.lowlevel.checkpoint()


async def empty_cut(cut: Cut) -> None:
    with cut:
        pass


@pytest.mark.parametrize("scenario", [no_cut, empty_cut])
def test_sweep_that_cancels_nothing_fails(scenario: Scenario) -> None:
    with pytest.raises(SweepFailed, match="nothing was cancelled"):
        sweep(scenario, seeds=range(2))


def order_of_ten(seed: int) -> list[int]:
    order: list[int] = []

    async def scenario(cut: Cut) -> None:
        async def note(number: int) -> None:
            await trio.lowlevel.checkpoint()
            order.append(number)

        with cut:
            async with trio.open_nursery() as nursery:
                for number in range(10):
                    nursery.start_soon(note, number)

    run_once(scenario, seed, None)
    return order


def test_the_order_of_tasks_depends_on_the_seed_and_on_nothing_else() -> None:
    orders = [order_of_ten(seed) for seed in range(20)]

    assert orders == [order_of_ten(seed) for seed in range(20)]
    assert len({tuple(order) for order in orders}) > 15, "more than forwards and backwards"


def test_trio_is_left_as_it_was() -> None:
    state, settings = trio_run._r.getstate(), dict(vars(trio_run))

    with scheduled_by(1):
        assert trio_run._r.getstate() != state
    sweep(three_steps, seeds=range(2))

    assert trio_run._r.getstate() == state
    assert dict(vars(trio_run)) == settings


def test_real_time_passes_where_it_is_asked_for() -> None:
    async def scenario(cut: Cut) -> None:
        with cut:
            await trio.to_thread.run_sync(lambda: None)

    assert sweep(scenario, seeds=[0], virtual_time=False).cancelled > 0
