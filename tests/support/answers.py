"""What the fake upstream can answer: good answers, refusals, and every way in which one can be broken."""

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

Fault = Literal["reset", "close", "stall", "half_chunk", "garbage", "huge_line", "bad_http", "error"]
"""What happens after `fault_after` texts (0: right behind the head; "end": instead of the proper end; None: instead of
a head).

`reset`: RST. `close`: FIN. `stall`: silence until the client goes. `half_chunk`: the first half of an HTTP chunk, then
FIN. `garbage`: an event that is no JSON. `huge_line`: 10 MB without a line end. `bad_http`: bytes where HTTP was due.
`error`: `error` as an event of the stream, then the proper end.
"""


@dataclass(frozen=True, slots=True)
class FakeToolCall:
    """A tool call as deltas: the first has id and name, then one for each piece of the arguments. `whole`: all in one
    delta, without index.
    """

    tool: str
    arguments: Sequence[str] = ("{}",)
    call_id: str = "call_1"
    whole: bool = False


@dataclass(frozen=True, slots=True)
class Answer:
    """One answer. The default is a good one of four texts, with a finish reason, usage if it was asked for, and
    `[DONE]`.
    """

    tokens: Sequence[str] = ("Hello", ",", " world", "!")
    reasoning: Sequence[str] = ()
    reasoning_field: str = "reasoning_content"
    tool_calls: Sequence[FakeToolCall] = ()
    finish_reason: str | None = "stop"
    """`tool_calls` makes it that by itself; None sends none."""
    usage: Literal["asked", "always", "never"] = "asked"
    done: bool = True

    gated: bool = False
    """Each text (not reasoning, tool calls, end) waits for one `Reply.release()`; everything behind the last text goes
    with it.
    """
    delay_s: float = 0
    """Before each text; for benchmarks and demonstrations, not for tests."""
    split: int | None = None
    """Bytes in one write and one HTTP chunk; 1 is every byte by itself. None: an event at a time."""
    drip_s: float = 0
    """Between two writes of `split` bytes; like `delay_s`, not for tests that wait for it."""
    joined: bool = False
    """The whole answer in one write and one HTTP chunk."""
    line_end: str = "\n"

    fault: Fault | None = None
    fault_after: int | Literal["end"] | None = 0
    error: Any = None
    """For `fault="error"`: what the error object holds."""

    status: int = 200
    headers: Mapping[str, str] = field(default_factory=dict)
    body: bytes | None = None
    """Instead of a stream: sent with a Content-Length."""
    body_length: int | None = None
    """Of what Content-Length says, where that is not the body's: the rest never comes."""
    raw_events: Sequence[str] | None = None
    """Instead of chunks made of the above: the `data:` of each event, as it is."""
    content_type: str | None = "text/event-stream; charset=utf-8"


def json_answer(status: int, body: Any, headers: Mapping[str, str] | None = None) -> Answer:
    """An answer that is one JSON value."""
    return Answer(status=status, body=json.dumps(body).encode(), headers=headers or {}, content_type="application/json")


def error_answer(
    status: int, message: str = "no", code: str | None = None, headers: Mapping[str, str] | None = None
) -> Answer:
    """A refusal in OpenAI's shape."""
    return json_answer(status, {"error": {"message": message, "type": "some_error", "code": code}}, headers)


USAGE = {"prompt_tokens": 5, "completion_tokens": 7, "total_tokens": 12}


def events(answer: Answer, *, usage_asked: bool) -> Iterator[tuple[str, bool]]:
    """The `data` of each event of a streamed answer, and whether it carries a text."""
    if answer.raw_events is not None:
        yield from ((data, False) for data in answer.raw_events)
        return
    yield _chunk({"role": "assistant", "content": ""}), False
    for text in answer.reasoning:
        yield _chunk({answer.reasoning_field: text}), False
    for text in answer.tokens:
        yield _chunk({"content": text}), True
    for index, call in enumerate(answer.tool_calls):
        yield from ((_chunk({"tool_calls": [piece]}), False) for piece in _pieces(index, call))
    reason = "tool_calls" if answer.tool_calls and answer.finish_reason == "stop" else answer.finish_reason
    if reason is not None:
        yield _chunk({}, reason), False
    if answer.usage == "always" or (answer.usage == "asked" and usage_asked):
        yield json.dumps({"object": "chat.completion.chunk", "choices": [], "usage": USAGE}), False
    if answer.done:
        yield "[DONE]", False


def _chunk(delta: Mapping[str, Any], finish_reason: str | None = None) -> str:
    choice = {"index": 0, "delta": delta, "logprobs": None, "finish_reason": finish_reason}
    chunk = {
        "id": "chatcmpl-fake",
        "object": "chat.completion.chunk",
        "created": 1,
        "model": "fake-model",
        "choices": [choice],
    }
    return json.dumps(chunk, ensure_ascii=False)


def _pieces(index: int, call: FakeToolCall) -> Iterator[dict[str, Any]]:
    if call.whole:
        function = {"name": call.tool, "arguments": "".join(call.arguments)}
        yield {"id": call.call_id, "type": "function", "function": function}
        return
    yield {
        "index": index,
        "id": call.call_id,
        "type": "function",
        "function": {"name": call.tool, "arguments": ""},
    }
    for arguments in call.arguments:
        yield {"index": index, "function": {"arguments": arguments}}
