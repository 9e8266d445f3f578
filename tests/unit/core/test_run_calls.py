"""A run's tool calls: assembled from deltas, planned or refused, given their results, bounded by the budget."""

import random
from collections.abc import Sequence
from itertools import permutations

import orjson
import pytest

from bamboo.core.events import (
    AgentComplete,
    AgentError,
    AgentMessage,
    AgentToolComplete,
    AgentToolStart,
)
from bamboo.core.run import CallTools, RunMachine, RunState
from bamboo.core.tool_calls import decode_arguments
from bamboo.core.types import (
    MAX_JSON_DEPTH,
    FinishDelta,
    Message,
    MessageId,
    ProviderDelta,
    ToolCall,
    ToolCallDelta,
    ToolCallId,
    ToolResult,
    text_content,
)
from bamboo.errors import RETRYABLE, ErrorCode
from tests.support.machines import ASKED, RUN, begun, call, text


def asked_for(machine: RunMachine, deltas: Sequence[ProviderDelta]) -> CallTools:
    machine.feed(deltas, 1_600)
    step = machine.step_ended(1_700)
    assert step is not None
    assert machine.state is RunState.TOOLS
    return step


def calls_of(*deltas: ProviderDelta) -> tuple[ToolCall, ...]:
    return asked_for(begun(), deltas).message.tool_calls


def made(call_id: str, tool: str = "look", arguments: str = "{}") -> ToolCall:
    return ToolCall(ToolCallId(call_id), tool, arguments)


# Assembly

PIECES_OF_A = [call(0, "a", "look", ""), call(0, None, None, '{"x"'), call(0, None, None, ":1}")]
PIECES_OF_B = [call(1, "b", "write", '{"y'), call(1, "", "", '":2'), call(1, None, None, "}")]
BOTH = (made("a", "look", '{"x":1}'), made("b", "write", '{"y":2}'))


def interleavings() -> list[list[ToolCallDelta]]:
    orders = sorted(set(permutations("aaabbb")))
    mixed = []
    for order in orders:
        pieces = {"a": iter(PIECES_OF_A), "b": iter(PIECES_OF_B)}
        mixed.append([next(pieces[letter]) for letter in order])
    return mixed


def test_calls_are_put_together_by_index_in_any_interleaving() -> None:
    assert len(interleavings()) == 20
    for deltas in interleavings():
        assert calls_of(*deltas) == BOTH


def test_whole_call_in_one_delta() -> None:
    assert calls_of(call(0, "a", "look", '{"x":1}')) == (made("a", "look", '{"x":1}'),)


def test_calls_are_in_the_order_of_their_index_with_or_without_holes() -> None:
    shuffled = [call(index, f"c{index}") for index in (7, 0, 3, 12, 5)]
    random.Random(1).shuffle(shuffled)  # noqa: S311 - an order, not a secret
    assert [made.tool_call_id for made in calls_of(*shuffled)] == ["c0", "c3", "c5", "c7", "c12"]


def test_text_between_the_pieces_of_a_call_is_text() -> None:
    step = asked_for(begun(), [*text("I "), call(0, "a", "look", "{"), *text("look"), call(0, None, None, "}")])
    assert step.message == AgentMessage(MessageId("msg1"), text_content("I look"), "p", "m", (made("a"),))


@pytest.mark.parametrize("call_id", [None, ""])
def test_call_without_an_id_gets_one_of_ours(call_id: str | None) -> None:
    first, second = calls_of(call(0, call_id), call(1, call_id))
    assert first.tool_call_id.startswith("call_")
    assert second.tool_call_id.startswith("call_")
    assert first.tool_call_id != second.tool_call_id


def test_id_that_is_given_twice_is_kept_for_the_first_call_only() -> None:
    first, second, third = calls_of(call(0, "same"), call(1, "same", "write"), call(2, "other"))
    assert (first.tool_call_id, first.tool) == ("same", "look")
    assert second.tool_call_id not in {"same", "other"}
    assert second.tool == "write"
    assert third.tool_call_id == "other"


def test_calls_of_a_step_are_not_those_of_the_step_before() -> None:
    machine = begun()
    finish(machine, asked_for(machine, [call(0, "a"), call(1, "b")]))
    machine.next_call()
    assert asked_for(machine, [call(0, "c")]).message.tool_calls == (made("c"),)


# Plans and refusals


def refusal_of(tool: str, arguments: str) -> ToolResult | None:
    [planned] = asked_for(begun(), [call(0, "a", tool, arguments)]).calls
    if planned.refusal is not None:
        assert planned.arguments == {}
        assert not planned.refusal.ok
        assert planned.refusal.status is None
    assert planned.call.arguments == arguments, "the message keeps what the model wrote"
    return planned.refusal


@pytest.mark.parametrize(
    ("arguments", "decoded"),
    [
        ("", {}),
        ("{}", {}),
        (' {"a": [1, -2.5e3, true, null, "é😀", {}]} ', {"a": [1, -2500.0, True, None, "é😀", {}]}),
        ('{"a": 9223372036854775807, "b": -9223372036854775808}', {"a": 2**63 - 1, "b": -(2**63)}),
        ('{"a": "\\ud83d\\ude00"}', {"a": "😀"}),
        ('{"a":' * (MAX_JSON_DEPTH - 1) + "{}" + "}" * (MAX_JSON_DEPTH - 1), None),
    ],
)
def test_arguments_that_are_an_object_are_planned(arguments: str, decoded: dict[str, object] | None) -> None:
    [planned] = asked_for(begun(), [call(0, "a", "look", arguments)]).calls
    assert planned.refusal is None
    assert planned.arguments == (decode_arguments(arguments) if decoded is None else decoded)
    assert orjson.loads(orjson.dumps({"arguments": planned.arguments})) == {"arguments": planned.arguments}


REFUSED = [
    ("{", "not JSON"),
    ("look at it", "not JSON"),
    ('{"a": 1} and more', "not JSON"),
    ("\ufeff{}", "a byte order mark"),
    ("[]", "a list"),
    ('"text"', "a text"),
    ("null", "null"),
    ("3", "a number"),
    ('{"a": NaN}', "NaN"),
    ('{"a": -Infinity}', "infinity"),
    ('{"a": 1e999}', "a float that is read as infinity"),
    ('{"a": 9223372036854775808}', "65 bits"),
    ('{"a": -9223372036854775809}', "65 bits, negative"),
    ('{"a": ' + "9" * 5000 + "}", "more digits than Python converts"),
    ('{"a": "\\ud800"}', "a lone surrogate"),
    ('{"\\udc00": 1}', "a lone surrogate in a key"),
    ('{"a": "\ud800"}', "a lone surrogate, not escaped"),
    ('{"a":' + "[" * 100_000 + "]" * 100_000 + "}", "deeper than the decoder goes"),
    ('{"a":' + "[" * 300 + "]" * 300 + "}", "deeper than the encoder goes"),
    ('{"a":' * MAX_JSON_DEPTH + "{}" + "}" * MAX_JSON_DEPTH, "one level too deep"),
]


@pytest.mark.parametrize("arguments", [arguments for arguments, _ in REFUSED], ids=[name for _, name in REFUSED])
def test_arguments_that_are_no_object_for_every_decoder_are_refused(arguments: str) -> None:
    refusal = refusal_of("look", arguments)
    assert refusal is not None
    assert refusal.text.startswith("The arguments are no JSON object: ")
    assert len(refusal.text) < 200
    orjson.dumps(refusal.text)


@pytest.mark.parametrize("tool", ["", "Look", "rm"])
def test_unknown_tool_is_refused_before_its_arguments_are_looked_at(tool: str) -> None:
    refusal = refusal_of(tool, "{")
    assert refusal is not None
    assert refusal.text == f"There is no tool named {tool!r}."
    orjson.dumps(refusal.text)


def test_refused_call_goes_the_way_of_every_other_and_the_model_is_told() -> None:
    machine = begun()
    step = asked_for(machine, [call(0, "a", "nonsense", "{"), call(1, "b", "look", '{"x":1}')])
    refused, good = step.calls
    assert refused.refusal is not None
    assert machine.tool_started(refused) == AgentToolStart(ToolCallId("a"), "nonsense", {})
    body = machine.tool_finished(refused, refused.refusal, elapsed_ms=0, now_ms=1_750)
    assert body is not None
    assert not body.ok
    assert machine.state is RunState.TOOLS
    assert machine.tool_started(good) == AgentToolStart(ToolCallId("b"), "look", {"x": 1})
    machine.tool_finished(good, ToolResult("seen"), elapsed_ms=5, now_ms=1_800)
    assert [text_of(message) for message in machine.next_call().messages[2:]] == [refused.refusal.text, "seen"]


def text_of(message: Message) -> str:
    [part] = message.content
    return getattr(part, "text", "")


# Results and the next step


def finish(machine: RunMachine, step: CallTools) -> None:
    for planned in step.calls:
        assert machine.tool_started(planned) is not None
        assert machine.tool_finished(planned, ToolResult("ok"), elapsed_ms=1, now_ms=1_800) is not None


def test_result_is_told_as_the_tool_gave_it() -> None:
    machine = begun()
    [planned] = asked_for(machine, [call(0, "a")]).calls
    machine.tool_started(planned)
    given = ToolResult("cut", ok=False, truncated=True, status="denied")
    assert machine.tool_finished(planned, given, elapsed_ms=12, now_ms=1_800) == AgentToolComplete(
        MessageId("msg2"),
        ToolCallId("a"),
        "look",
        ok=False,
        result="cut",
        elapsed_ms=12,
        truncated=True,
        status="denied",
    )


def test_next_model_call_has_the_answer_and_its_results_in_the_order_they_came() -> None:
    machine = begun()
    step = asked_for(machine, [*text("let me"), call(0, "a"), call(1, "b", "write")])
    for planned in step.calls:
        machine.tool_started(planned)
    for planned in reversed(step.calls):
        assert machine.state is RunState.TOOLS
        machine.tool_finished(planned, ToolResult(planned.call.tool), elapsed_ms=1, now_ms=1_800)
    assert machine.state is RunState.CALLING
    calls = (made("a"), made("b", "write"))
    assert machine.next_call().messages == (
        ASKED,
        Message(MessageId("msg1"), RUN, "assistant", text_content("let me"), 1_700, calls),
        Message(MessageId("msg2"), RUN, "tool", text_content("write"), 1_800, tool_call_id=ToolCallId("b")),
        Message(MessageId("msg3"), RUN, "tool", text_content("look"), 1_800, tool_call_id=ToolCallId("a")),
    )


def test_calls_decide_about_the_next_step_whatever_the_finish_reason_says() -> None:
    assert asked_for(begun(), [call(0, "a"), FinishDelta("stop")]).calls
    machine = begun()
    machine.feed([*text("done"), FinishDelta("tool_calls")], 1_600)
    assert machine.step_ended(1_700) is None
    assert isinstance(machine.terminal, AgentComplete)


def test_call_has_one_result() -> None:
    machine = begun()
    first, _ = asked_for(machine, [call(0, "a"), call(1, "b")]).calls
    machine.tool_started(first)
    machine.tool_finished(first, ToolResult("ok"), elapsed_ms=1, now_ms=1_800)
    with pytest.raises(AssertionError):
        machine.tool_finished(first, ToolResult("again"), elapsed_ms=1, now_ms=1_800)
    with pytest.raises(AssertionError):
        machine.tool_started(first)


def test_call_of_another_step_is_a_bug() -> None:
    machine = begun()
    step = asked_for(machine, [call(0, "a")])
    [stranger] = asked_for(begun(), [call(0, "stranger")]).calls
    with pytest.raises(AssertionError):
        machine.tool_started(stranger)
    finish(machine, step)
    with pytest.raises(AssertionError):
        machine.tool_started(step.calls[0])


# The budget


def test_run_that_needs_more_model_calls_than_it_may_make_ends_with_its_calls_settled() -> None:
    machine = begun(max_steps=2)
    finish(machine, asked_for(machine, [call(0, "a")]))
    machine.next_call()
    machine.feed([*text("again"), call(0, "b"), call(1, "c", "write")], 1_900)
    assert machine.step_ended(2_000) is None
    message, *results, error = machine.closing
    calls = (made("b"), made("c", "write"))
    assert message == AgentMessage(MessageId("msg3"), text_content("again"), "p", "m", calls)
    told = [(body.tool_call_id, body.status) for body in results if isinstance(body, AgentToolComplete)]
    assert told == [("b", "stopped"), ("c", "stopped")]
    assert len(results) == 2
    assert isinstance(error, AgentError)
    assert error.code == ErrorCode.BUDGET_EXCEEDED
    assert error.retryable is (ErrorCode.BUDGET_EXCEEDED in RETRYABLE)
    assert "2 model calls" in error.message


def test_last_model_call_of_the_budget_may_answer() -> None:
    machine = begun(max_steps=2)
    finish(machine, asked_for(machine, [call(0, "a")]))
    machine.next_call()
    machine.feed(text("done"), 1_900)
    assert machine.step_ended(2_000) is None
    assert isinstance(machine.terminal, AgentComplete)
