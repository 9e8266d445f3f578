from collections.abc import Callable, Sequence
from itertools import count

import pytest

from bamboo.core.events import (
    AgentComplete,
    AgentError,
    AgentMessage,
    AgentReasoning,
    AgentRetry,
    AgentStopped,
    AgentToken,
    AgentToolComplete,
    AgentToolStart,
    ApprovalRequired,
    ApprovalResolved,
    Event,
    EventBody,
    RunQueued,
    RunStarted,
    SessionClosed,
    SessionCreated,
    UserMessage,
)
from bamboo.core.history import Opening, OpenStep, StepText, fold_step, message_of, message_of_body
from bamboo.core.types import (
    Epoch,
    ImagePart,
    Message,
    MessageId,
    RunId,
    RunStats,
    SessionId,
    TextPart,
    ToolCall,
    ToolCallId,
    text_content,
)

A, B = RunId("a"), RunId("b")
STARTED = RunStarted("p", "m", 0)
DONE = AgentComplete("stop", None, RunStats(0, None, 1))


def message_ids() -> Callable[[], MessageId]:
    numbers = count(1)
    return lambda: MessageId(f"new{next(numbers)}")


def asked(message_id: str, text: str, time_ms: int) -> Opening:
    return Opening(MessageId(message_id), text_content(text), time_ms)


def said(message_id: str, text: str, *calls: ToolCall) -> AgentMessage:
    return AgentMessage(MessageId(message_id), text_content(text), "p", "m", calls)


def call(call_id: str, tool: str = "look") -> ToolCall:
    return ToolCall(ToolCallId(call_id), tool, "{}")


def begun(call_id: str, tool: str = "look") -> AgentToolStart:
    return AgentToolStart(ToolCallId(call_id), tool, {})


def result(message_id: str, call_id: str, text: str = "ok") -> AgentToolComplete:
    return AgentToolComplete(MessageId(message_id), ToolCallId(call_id), "look", ok=True, result=text, elapsed_ms=1)


def test_user_message_takes_its_place_when_its_run_starts_with_the_time_it_was_accepted() -> None:
    content = (TextPart("what is"), ImagePart("https://example.org/x.png"))
    opening = Opening(MessageId("u"), content, 7)
    assert message_of_body(UserMessage(MessageId("u"), content), A, 7) is None
    assert message_of_body(STARTED, A, 90, opening) == Message(MessageId("u"), A, "user", content, 7)


def test_start_without_the_message_that_it_was_accepted_with_is_a_bug() -> None:
    with pytest.raises(AssertionError):
        message_of_body(STARTED, A, 0)


def test_answer_keeps_its_calls_and_that_it_is_partial() -> None:
    calls = (call("c1"),)
    body = AgentMessage(MessageId("m"), text_content("hm"), "p", "m", calls, partial=True)
    expected = Message(MessageId("m"), A, "assistant", text_content("hm"), 5, calls, None, partial=True)
    assert message_of_body(body, A, 5) == expected


def test_result_of_a_call_is_a_tool_message() -> None:
    expected = Message(MessageId("t"), A, "tool", text_content("42"), 5, tool_call_id=ToolCallId("c1"))
    assert message_of_body(result("t", "c1", "42"), A, 5) == expected


@pytest.mark.parametrize(
    "body",
    [
        SessionCreated(),
        UserMessage(MessageId("u"), text_content("x")),
        RunQueued(1),
        AgentToken("x"),
        AgentReasoning("x"),
        AgentRetry(1, "p", "provider_error", 5),
        begun("c"),
        ApprovalRequired("ap", ToolCallId("c"), "look", {}, 5),
        ApprovalResolved("ap", "deny"),
        DONE,
        AgentError("internal", "x", retryable=False),
        AgentStopped("user"),
        SessionClosed(),
    ],
    ids=lambda body: str(body.type),
)
def test_other_events_make_no_entry(body: EventBody) -> None:
    assert message_of_body(body, A, 5, asked("u", "x", 1)) is None


def test_event_of_no_run_makes_no_entry() -> None:
    event = Event(SessionId("s"), Epoch("e"), 1, 5, None, SessionCreated("t"))
    assert message_of(event, None) is None


def test_runs_that_interleave_in_the_log_do_not_in_the_history() -> None:
    openings = {A: asked("ua", "first", 1), B: asked("ub", "second", 4)}
    bodies: Sequence[tuple[RunId, EventBody]] = [
        (A, UserMessage(MessageId("ua"), text_content("first"))),
        (A, STARTED),
        (A, AgentToken("on")),
        (B, UserMessage(MessageId("ub"), text_content("second"))),
        (B, RunQueued(1)),
        (A, AgentToken("e")),
        (A, said("ma", "one")),
        (A, DONE),
        (B, STARTED),
        (B, said("mb", "two")),
        (B, DONE),
    ]
    events = [
        Event(SessionId("s"), Epoch("e"), seq, seq * 10, run_id, body)
        for seq, (run_id, body) in enumerate(bodies, start=1)
    ]
    history = [message for event in events if (message := message_of(event, openings.get(event.run_id or A)))]
    assert [(entry.message_id, entry.role, entry.run_id, entry.time_ms) for entry in history] == [
        ("ua", "user", A, 1),
        ("ma", "assistant", A, 70),
        ("ub", "user", B, 4),
        ("mb", "assistant", B, 100),
    ]


def test_run_that_never_started_is_not_in_the_history() -> None:
    bodies: Sequence[EventBody] = [UserMessage(MessageId("u"), text_content("x")), RunQueued(1), AgentStopped("user")]
    assert [message_of_body(body, A, 0, asked("u", "x", 0)) for body in bodies] == [None, None, None]


def step_of(*bodies: EventBody) -> OpenStep:
    step = OpenStep()
    for body in bodies:
        step.apply(body)
    return step


def test_step_that_was_cut_before_it_said_anything_leaves_nothing_to_write() -> None:
    assert step_of(STARTED, AgentReasoning("hm")).close("p", "m", "stopped", message_ids()) == []
    assert step_of(AgentToken("x"), said("m1", "x")).close("p", "m", "uncertain", message_ids()) == []


def test_text_of_a_step_that_was_cut_becomes_a_partial_message() -> None:
    closing = step_of(AgentToken("one"), said("m1", "one"), AgentToken("tw"), AgentReasoning("?"), AgentToken("o"))
    assert closing.close("p", "m", "stopped", message_ids()) == [
        AgentMessage(MessageId("new1"), text_content("two"), "p", "m", partial=True)
    ]


@pytest.mark.parametrize("cut", ["stopped", "uncertain"])
def test_every_open_call_gets_one_result_and_only_started_ones_can_be_uncertain(cut: str) -> None:
    step = step_of(
        said("m1", "", call("done"), call("running"), call("waiting", "write")),
        begun("done"),
        result("t1", "done"),
        begun("running"),
    )
    closing = step.close("p", "m", "uncertain" if cut == "uncertain" else "stopped", message_ids())
    told = [
        (body.message_id, body.tool_call_id, body.tool, body.ok, body.elapsed_ms, body.status)
        for body in closing
        if isinstance(body, AgentToolComplete)
    ]
    assert len(told) == len(closing)
    assert told == [
        ("new1", "running", "look", False, 0, cut),
        ("new2", "waiting", "write", False, 0, "stopped"),
    ]
    assert all(isinstance(body, AgentToolComplete) and body.result for body in closing)


def test_results_of_calls_may_come_in_any_order() -> None:
    step = step_of(said("m1", "", call("a"), call("b")), begun("a"), begun("b"), result("t1", "b"), result("t2", "a"))
    assert step.close("p", "m", "uncertain", message_ids()) == []
    assert not step.started


def test_call_of_an_earlier_step_does_not_make_a_later_one_of_the_same_id_uncertain() -> None:
    step = step_of(said("m1", "", call("c")), begun("c"), result("t1", "c"), said("m2", "", call("c")))
    [body] = step.close("p", "m", "uncertain", message_ids())
    assert isinstance(body, AgentToolComplete)
    assert body.status == "stopped"


def test_live_text_is_that_of_the_step_without_a_message() -> None:
    events: list[EventBody] = [STARTED, AgentReasoning("mm"), AgentToken("Hel"), AgentToken("lo")]
    assert fold_step(events) == StepText("Hello", "mm")
    events += [said("m1", "Hello", call("c")), begun("c"), result("t", "c")]
    assert fold_step(events) == StepText("", "")
    events += [AgentReasoning("so"), AgentToken("Bye")]
    assert fold_step(events) == StepText("Bye", "so")
    assert fold_step([]) == StepText("", "")
