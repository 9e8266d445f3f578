"""A run is sealed once, from any state, and takes nothing afterwards; what its state does not allow is a bug."""

from collections.abc import Callable, Sequence

import pytest

from bamboo.core.attempts import Failure
from bamboo.core.events import (
    AgentComplete,
    AgentError,
    AgentStopped,
    AgentToolComplete,
)
from bamboo.core.run import RunMachine, RunState
from bamboo.core.tool_calls import PlannedCall
from bamboo.core.types import (
    ToolResult,
    Usage,
    UsageDelta,
)
from tests.support.machines import (
    ASKED,
    BROKEN,
    BUSY,
    RUN,
    begin,
    begun,
    call,
    new_machine,
    partial,
    retry_of,
    run_tools,
    text,
    tools_due,
)

Way = Callable[[], RunMachine]


def streaming() -> RunMachine:
    machine = begun()
    machine.feed([*text("par", "tial"), call(0, "c1")], 1_600)
    return machine


def in_backoff() -> RunMachine:
    machine = begun()
    retry_of(machine)
    return machine


def in_tools() -> RunMachine:
    machine = begun()
    step = tools_due(machine, call(0, "c1"), call(1, "c2"))
    machine.tool_started(step.calls[0])
    return machine


def after_tools() -> RunMachine:
    machine = begun()
    run_tools(machine, tools_due(machine))
    return machine


EVERY_STATE: list[tuple[Way, RunState]] = [
    (new_machine, RunState.NEW),
    (begun, RunState.CALLING),
    (streaming, RunState.STREAMING),
    (in_backoff, RunState.BACKOFF),
    (in_tools, RunState.TOOLS),
    (after_tools, RunState.CALLING),
]


def results(machine: RunMachine) -> list[tuple[str, str | None]]:
    return [(body.tool_call_id, body.status) for body in machine.closing if isinstance(body, AgentToolComplete)]


@pytest.mark.parametrize(("way", "state"), EVERY_STATE)
def test_stop_ends_a_run_from_any_state(way: Way, state: RunState) -> None:
    machine = way()
    assert machine.state is state
    assert machine.stop("superseded")
    assert machine.sealed
    assert machine.terminal == AgentStopped("superseded")
    assert sum(isinstance(body, AgentComplete | AgentError | AgentStopped) for body in machine.closing) == 1


@pytest.mark.parametrize(("way", "state"), EVERY_STATE)
def test_fail_ends_a_run_from_any_state(way: Way, state: RunState) -> None:
    machine = way()
    assert machine.state is state
    assert machine.fail(BROKEN)
    assert machine.sealed
    assert machine.terminal == AgentError("provider_protocol", "garbage", retryable=True)


def test_cut_in_the_middle_of_an_answer_keeps_its_text_and_not_its_unfinished_calls() -> None:
    machine = streaming()
    machine.stop("user")
    assert machine.closing == (partial("msg1", "partial"), AgentStopped("user"))


def test_cut_among_the_tools_gives_every_open_call_its_result() -> None:
    machine = in_tools()
    machine.stop("user")
    assert results(machine) == [("c1", "stopped"), ("c2", "stopped")]
    assert len(machine.closing) == 3


def test_cut_after_the_tools_has_nothing_left_to_settle() -> None:
    machine = after_tools()
    machine.stop("user")
    assert machine.closing == (AgentStopped("user"),)


Ending = Callable[[RunMachine], object]


def stopped(machine: RunMachine) -> object:
    return machine.stop("user")


def failed_outside(machine: RunMachine) -> object:
    return machine.fail(Failure("run_timeout", "too long", retryable=False))


def completed(machine: RunMachine) -> object:
    return machine.step_ended(1_700)


def provider_failed(machine: RunMachine) -> object:
    return machine.failed(BROKEN)


ENDINGS: list[tuple[Ending, str]] = [
    (stopped, "agent_stopped"),
    (failed_outside, "agent_error"),
    (completed, "agent_complete"),
    (provider_failed, "agent_error"),
]


@pytest.mark.parametrize(("first", "kind"), ENDINGS)
@pytest.mark.parametrize(("second", "_"), ENDINGS)
def test_first_to_end_a_run_decides_and_nothing_changes_it(first: Ending, kind: str, second: Ending, _: str) -> None:
    machine = begun()
    machine.feed(text("x"), 1_600)
    first(machine)
    closing = machine.closing
    assert machine.terminal.type == kind
    assert not second(machine)
    assert machine.closing is closing
    assert machine.sealed


@pytest.mark.parametrize(("way", "_state"), EVERY_STATE)
def test_sealed_run_takes_nothing_more(way: Way, _state: RunState) -> None:
    machine = way()
    planned: Sequence[PlannedCall] = tools_due(begun()).calls
    machine.stop("user")
    closing = machine.closing
    machine.begin([ASKED], accepted_ms=0, now_ms=0)
    assert machine.feed([*text("late"), call(0, "c9"), UsageDelta(Usage(1, 1, 2))], 9_000) == []
    assert machine.step_ended(9_000) is None
    assert machine.tool_started(planned[0]) is None
    assert machine.tool_finished(planned[0], ToolResult("late"), elapsed_ms=1, now_ms=9_000) is None
    assert machine.failed(BUSY) is None
    assert machine.fail(BUSY) is False
    assert machine.stop("deleted") is False
    with pytest.raises(AssertionError):
        machine.next_call()
    assert machine.closing is closing
    assert machine.state is RunState.SEALED


def test_terminal_event_is_asked_of_sealed_runs_only() -> None:
    machine = begun()
    with pytest.raises((AssertionError, IndexError)):
        _ = machine.terminal


# What the runner must never do


def test_inputs_that_the_state_does_not_allow_are_bugs() -> None:
    with pytest.raises(AssertionError):
        new_machine().next_call()
    with pytest.raises(AssertionError):
        new_machine().feed(text("x"), 1)
    with pytest.raises(AssertionError):
        new_machine().step_ended(1)
    with pytest.raises(AssertionError):
        begin(begun())
    with pytest.raises(AssertionError):
        in_backoff().feed(text("x"), 1)
    with pytest.raises(AssertionError):
        in_backoff().step_ended(1)
    with pytest.raises(AssertionError):
        in_tools().feed(text("x"), 1)
    with pytest.raises(AssertionError):
        in_tools().next_call()
    with pytest.raises(AssertionError):
        streaming().next_call()


def test_messages_of_the_run_are_its_own() -> None:
    machine = begun()
    step = tools_due(machine)
    run_tools(machine, step)
    assert {message.run_id for message in machine.next_call().messages} == {RUN}
