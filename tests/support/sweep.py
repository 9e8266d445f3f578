"""Cancel a scenario at every step: the harness of the tests that ask "and if it is cancelled just there?".

A scenario is an async function that gets a `Cut`. It puts `with cut:` around what is to be cancelled, does whatever has
to work all the same afterwards, and may return a check, which is called once everything is over. `sweep` runs it again
and again, each time on a fresh loop: the first run is cancelled before the first task step inside the cut, the second
before the second, and so on until one run comes through uncancelled; and all that for many seeds of trio's scheduler.

    async def scenario(cut: Cut) -> Callable[[], None]:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(somebody_else)
            with cut:
                await what_may_be_cancelled()
            await what_must_work_afterwards()
        return check_that_nothing_is_left

    sweep(scenario, seeds=range(60))

Time is virtual (trio's MockClock, jumping as soon as every task sleeps), so a scenario that hangs is found at once. A
scenario with threads or sockets needs `virtual_time=False`. Whatever goes wrong is told as `SweepFailed` with the seed
and the step; `seeds=[seed], steps=[step]` runs just that again.

BAMBOO_SWEEP_SEEDS is how many seeds a sweep has at least that takes them from `usual_seeds`.
"""

import os
from collections.abc import Awaitable, Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import count
from random import Random
from types import TracebackType
from typing import Final, Literal, Self

import trio
import trio.testing
from trio._core import _run as trio_run

from tests.support.bugs import leaves

DEADLINE_S: Final = 5.0
"""Virtual or real: a scenario of this kind that takes longer hangs."""

MAX_STEPS: Final = 20_000
"""Task steps of one run: a scenario that takes more runs in a circle (in virtual time no deadline would tell)."""

Counted = Literal["run", "task"]
Check = Callable[[], None]


def usual_seeds(usual: int) -> range:
    """So many seeds, or as many as BAMBOO_SWEEP_SEEDS says, if that is more."""
    return range(max(usual, int(os.environ.get("BAMBOO_SWEEP_SEEDS", "0"))))


class SweepFailed(AssertionError):  # noqa: N818 - it reads as what it is
    """A run broke its scenario's promise; `seed` and `step` say which run (`step` None: one that was not cancelled)."""

    def __init__(self, what: str, seed: int, step: int | None) -> None:
        where = "not cancelled" if step is None else f"cancelled before step {step}"
        super().__init__(f"{what} (seed {seed}, {where})")
        self.seed = seed
        self.step = step


@dataclass(frozen=True, slots=True)
class Swept:
    """What a sweep did. `runs` counts those that came through uncancelled too; `longest` is the most steps that a cut
    took."""

    runs: int
    cancelled: int
    longest: int


class Cut:
    """The part of a scenario that is cancelled, as a `with` block to be entered once.

    `reached` says that the step came while the part was going on. As with any cancel scope it may have been too late to
    matter: `cancelled` says that the block was really left by it.
    """

    def __init__(self, step: int | None) -> None:
        self._step = step
        self._scope = trio.CancelScope()
        self._open = False
        self._task: trio.lowlevel.Task | None = None
        self.at_once: Callable[[], None] = _nothing
        """What else happens in the instant of the cancellation, before any task runs again."""
        self.steps = 0
        self.reached = False

    def __repr__(self) -> str:
        return f"<Cut at {self._step}, {self.steps} steps{', reached' if self.reached else ''}>"

    @property
    def entered(self) -> bool:
        return self._task is not None

    @property
    def cancelled(self) -> bool:
        return self._scope.cancelled_caught

    def __enter__(self) -> Self:
        assert not self.entered, "a cut is entered once"
        self._task = trio.lowlevel.current_task()
        self._scope.__enter__()
        self._open = True
        return self

    def __exit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, traceback: TracebackType | None
    ) -> bool | None:
        self._open = False
        return self._scope.__exit__(exc_type, exc, traceback)

    def on_step(self, task: trio.lowlevel.Task, counted: Counted) -> None:
        """A task is about to run."""
        if self._open and (counted == "run" or task is self._task):
            self.steps += 1
            if self.steps == self._step:
                self.reached = True
                self._scope.cancel()
                self.at_once()


def _nothing() -> None:
    pass


Scenario = Callable[[Cut], Awaitable[Check | None]]


class _Steps(trio.abc.Instrument):
    """Counts the task steps of one run, and ends a run that takes too many."""

    def __init__(self, cut: Cut, counted: Counted, max_steps: int, whole: trio.CancelScope) -> None:
        self._cut = cut
        self._counted = counted
        self._max_steps = max_steps
        self._whole = whole
        self._steps = 0
        self.endless = False

    def before_task_step(self, task: trio.lowlevel.Task) -> None:
        self._steps += 1
        if self._steps == self._max_steps:
            self.endless = True
            self._whole.cancel()
        self._cut.on_step(task, self._counted)


def sweep(
    scenario: Scenario,
    *,
    seeds: Iterable[int] = range(60),
    steps: Iterable[int] | None = None,
    every: int = 1,
    counted: Counted = "run",
    virtual_time: bool = True,
    deadline_s: float = DEADLINE_S,
    max_steps: int = MAX_STEPS,
) -> Swept:
    """Run `scenario` cancelled at step 1, 2, 3 … (or at `steps`) until it comes through, for each of `seeds`.

    With `every`, a seed cancels only at one step out of so many, the next seed at the next ones: as many orders of the
    tasks for a fraction of the time, and `every` seeds together leave no step out.

    `counted` says which steps count while the cut is open: those of every task of the "run" (so that the cancellation
    also comes between two steps of the task that is cancelled), or only those of the "task" that entered the cut.

    Raises SweepFailed, from what was raised, for the first run that raises, whose check raises, or that does not end;
    and for a sweep in which nothing could be cancelled.
    """
    runs = cancelled = longest = 0
    for number, seed in enumerate(seeds):
        for step in count(1 + number % every, every) if steps is None else steps:
            cut = run_once(
                scenario,
                seed,
                step,
                counted=counted,
                virtual_time=virtual_time,
                deadline_s=deadline_s,
                max_steps=max_steps,
            )
            runs += 1
            longest = max(longest, cut.steps)
            if not cut.reached:
                break
            cancelled += 1
    if not cancelled:
        raise SweepFailed("nothing was cancelled: the scenario has no step inside its cut", seed, None)
    return Swept(runs, cancelled, longest)


def run_once(
    scenario: Scenario,
    seed: int,
    step: int | None,
    *,
    counted: Counted = "run",
    virtual_time: bool = True,
    deadline_s: float = DEADLINE_S,
    max_steps: int = MAX_STEPS,
) -> Cut:
    """One run of a scenario, on a loop of its own, cancelled at `step` (None: not at all). Raises SweepFailed."""
    cut = Cut(step)
    whole = trio.CancelScope()
    instrument = _Steps(cut, counted, max_steps, whole)

    async def main() -> Check | None:
        with whole, trio.fail_after(deadline_s):
            return await scenario(cut)
        return None

    clock = trio.testing.MockClock(autojump_threshold=0) if virtual_time else None
    try:
        with scheduled_by(seed):
            check = trio.run(main, clock=clock, instruments=[instrument])
        if not instrument.endless and check is not None:
            check()
    except Exception as error:
        what = ", ".join(f"{type(leaf).__name__}: {leaf}" for leaf in leaves(error))
        raise SweepFailed(what, seed, step if cut.reached else None) from error
    if instrument.endless:
        raise SweepFailed(f"more than {max_steps} task steps", seed, step if cut.reached else None)
    return cut


@contextmanager
def scheduled_by(seed: int) -> Iterator[None]:
    """In this block trio runs each batch of runnable tasks in an order that depends on `seed` alone.

    trio has no public seam for that: this uses the one that it made for hypothesis (`_hypothesis_plugin_setup`), and
    puts everything back, so that neither hypothesis nor the next test sees it.
    """
    random: Random = trio_run._r
    state = random.getstate()
    settings = vars(trio_run)
    deterministic = settings[_DETERMINISTIC]
    random.seed(seed)
    settings[_DETERMINISTIC] = True
    try:
        yield
    finally:
        settings[_DETERMINISTIC] = deterministic
        random.setstate(state)


_DETERMINISTIC: Final = "_ALLOW_DETERMINISTIC_SCHEDULING"
