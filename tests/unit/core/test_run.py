"""The way of a run that ends by itself, its usage and stats. Tool calls are in `test_run_calls.py`, retries and
fallbacks in `test_run_attempts.py`, the seal is in `test_run_seal.py`."""

from collections.abc import Sequence

import pytest

from bamboo.core.events import AgentComplete, AgentMessage, AgentReasoning, AgentToken
from bamboo.core.run import RunMachine, RunState
from bamboo.core.types import (
    FinishDelta,
    Message,
    MessageId,
    ModelCall,
    ProviderDelta,
    ReasoningDelta,
    RunId,
    RunStats,
    TextDelta,
    ToolCallDelta,
    Usage,
    UsageDelta,
    text_content,
)
from tests.support.machines import ASKED, LOOK, WRITE, begun, call, new_machine, run_tools, text, tools_due


def complete(machine: RunMachine) -> AgentComplete:
    assert isinstance(machine.terminal, AgentComplete)
    return machine.terminal


# The way of a run that ends by itself


def test_first_model_call_has_the_history_and_the_settings() -> None:
    earlier = Message(MessageId("old"), RunId("other"), "user", text_content("hi"), 5)
    machine = new_machine(system_prompt="be brief", params={"temperature": 0})
    machine.begin([earlier, ASKED], accepted_ms=1_000, now_ms=1_500)
    assert machine.next_call() == ModelCall("m", (earlier, ASKED), "be brief", (LOOK, WRITE), {"temperature": 0})
    assert machine.state is RunState.CALLING
    assert repr(machine) == "<RunMachine run calling step 1>"


def test_each_delta_of_text_or_reasoning_is_one_event_as_it_came() -> None:
    machine = begun()
    deltas: list[ProviderDelta] = [
        ReasoningDelta("hm"),
        TextDelta("Hel"),
        TextDelta("lo "),
        TextDelta("Hel"),
        ReasoningDelta("!"),
    ]
    expected = [
        AgentReasoning("hm"),
        AgentToken("Hel"),
        AgentToken("lo "),
        AgentToken("Hel"),
        AgentReasoning("!"),
    ]
    assert machine.feed(deltas, 1_600) == expected
    assert machine.feed(text("a", "b", "b"), 1_700) == [AgentToken("a"), AgentToken("b"), AgentToken("b")]
    assert machine.state is RunState.STREAMING


@pytest.mark.parametrize(
    ("delta", "shows_something"),
    [
        (TextDelta("x"), True),
        (ReasoningDelta("x"), True),
        (ToolCallDelta(0, "c", None, ""), True),
        (TextDelta(""), False),
        (ReasoningDelta(""), False),
        (FinishDelta("stop"), False),
        (UsageDelta(Usage(1, 1, 2)), False),
    ],
)
def test_first_token_is_waited_for_until_the_model_shows_something(delta: ProviderDelta, shows_something: bool) -> None:  # noqa: FBT001 - a table's column
    machine = begun()
    assert machine.waiting_for_first_delta
    machine.feed([delta], 1_600)
    assert machine.waiting_for_first_delta is not shows_something


def test_answer_without_calls_ends_the_run_with_its_message_and_one_terminal_event() -> None:
    machine = begun()
    machine.feed([*text("Hel", "lo"), FinishDelta("length")], 1_600)
    assert machine.step_ended(2_500) is None
    assert machine.state is RunState.SEALED
    assert machine.closing == (
        AgentMessage(MessageId("msg1"), text_content("Hello"), "p", "m"),
        AgentComplete("length", None, RunStats(queue_ms=500, ttft_ms=100, elapsed_ms=1_000)),
    )


@pytest.mark.parametrize("deltas", [[], [TextDelta("")], [ReasoningDelta("only thought")], [FinishDelta("stop")]])
def test_answer_that_says_nothing_makes_no_message(deltas: Sequence[ProviderDelta]) -> None:
    machine = begun()
    machine.feed(deltas, 1_600)
    assert machine.step_ended(1_700) is None
    [terminal] = machine.closing
    assert isinstance(terminal, AgentComplete)
    assert terminal.finish_reason == "stop"


def answers() -> list[list[ProviderDelta]]:
    usage = UsageDelta(Usage(3, 4, 7))
    return [
        [*text("a", "b", "c"), FinishDelta("stop"), usage],
        [ReasoningDelta("r"), *text("a"), call(0, "c1", "look", '{"a":'), call(0, None, None, "1}"), usage],
        [call(1, "c2"), *text("late"), call(0, "c1"), FinishDelta("tool_calls")],
        [FinishDelta("stop"), *text("after"), usage, usage],
        [],
    ]


@pytest.mark.parametrize("deltas", answers())
def test_one_delta_at_a_time_gives_the_same_as_all_at_once(deltas: Sequence[ProviderDelta]) -> None:
    whole, single = begun(), begun()
    events = whole.feed(deltas, 1_600)
    assert [body for delta in deltas for body in single.feed([delta], 1_600)] == events
    assert single.state is whole.state
    assert single.step_ended(1_700) == whole.step_ended(1_700)
    assert single.closing == whole.closing
    assert single.state is whole.state


# Usage and stats


def test_usage_is_summed_over_the_steps() -> None:
    machine = begun()
    run_tools(machine, tools_due(machine, call(0, "c1"), UsageDelta(Usage(10, 2, 12))))
    machine.next_call()
    machine.feed([*text("x"), UsageDelta(Usage(20, 3, 23))], 1_900)
    machine.step_ended(2_000)
    assert complete(machine).usage == Usage(30, 5, 35)


def test_finish_reason_is_the_last_steps_own() -> None:
    machine = begun()
    run_tools(machine, tools_due(machine, call(0, "c1"), FinishDelta("tool_calls")))
    machine.next_call()
    machine.feed(text("x"), 1_900)
    machine.step_ended(2_000)
    assert complete(machine).finish_reason == "stop"


def test_usage_is_none_where_no_provider_told_it() -> None:
    machine = begun()
    machine.feed(text("x"), 1_600)
    machine.step_ended(1_700)
    assert complete(machine).usage is None


def test_time_to_first_token_is_that_of_the_first_delta_of_the_whole_run() -> None:
    machine = begun()
    machine.feed([ReasoningDelta("r")], 1_625)
    machine.feed(text("x"), 1_650)
    run_tools(machine, tools_due(machine))
    machine.next_call()
    machine.feed(text("y"), 5_000)
    machine.step_ended(6_000)
    assert complete(machine).stats == RunStats(queue_ms=500, ttft_ms=125, elapsed_ms=4_500)


def test_stats_are_never_negative_when_the_clock_was_set_back() -> None:
    machine = new_machine()
    machine.begin([ASKED], accepted_ms=9_000, now_ms=8_000)
    machine.next_call()
    machine.feed(text("x"), 7_000)
    machine.step_ended(6_000)
    assert complete(machine).stats == RunStats(queue_ms=0, ttft_ms=0, elapsed_ms=0)


def test_run_without_any_delta_has_no_time_to_first_token() -> None:
    machine = begun()
    machine.step_ended(1_700)
    assert complete(machine).stats == RunStats(queue_ms=500, ttft_ms=None, elapsed_ms=200)
