"""What OpenAI's provider sends, and how long it waits, over a transport in memory."""

import json
from collections.abc import AsyncIterator
from typing import Any

import httpx
import pytest
import trio
from trio.testing import MockClock

from bamboo.core.types import (
    Content,
    FinishDelta,
    ImagePart,
    Message,
    MessageId,
    ModelCall,
    ProviderDelta,
    Role,
    RunId,
    TextDelta,
    TextPart,
    ToolCall,
    ToolCallId,
    ToolSpec,
    Usage,
    UsageDelta,
    text_content,
)
from bamboo.errors import ErrorCode, UpstreamError
from bamboo.llm.openai import (
    AFTER_DONE_S,
    AFTER_FINISH_S,
    ERROR_BODY_S,
    MAX_EVENT_BYTES,
    OpenAIProvider,
    request_fields,
)

TEXT = b'data: {"choices": [{"delta": {"content": "a"}}]}\n\n'
FINISH = b'data: {"choices": [{"delta": {}, "finish_reason": "stop"}]}\n\n'
USAGE = b'data: {"choices": [], "usage": {"prompt_tokens": 1, "completion_tokens": 2, "total_tokens": 3}}\n\n'
DONE = b"data: [DONE]\n\n"


class MemoryTransport(httpx.AsyncBaseTransport):
    """Answers each request with the next of `answers`: status, headers and body pieces; a float is a wait (s)."""

    def __init__(self, *answers: tuple[int, dict[str, str], list[bytes | float]]) -> None:
        self._answers = list(answers)
        self.requests: list[dict[str, Any]] = []

    async def handle_async_request(self, request: httpx.Request) -> httpx.Response:
        content = b"".join([piece async for piece in request.stream])  # type: ignore[union-attr] # an async one
        self.requests.append(json.loads(content))
        await trio.lowlevel.checkpoint()
        status, headers, pieces = self._answers.pop(0)
        return httpx.Response(status, headers=headers, stream=MemoryBody(pieces))


class MemoryBody(httpx.AsyncByteStream):
    def __init__(self, pieces: list[bytes | float]) -> None:
        self._pieces = pieces

    async def __aiter__(self) -> AsyncIterator[bytes]:
        for piece in self._pieces:
            if isinstance(piece, float):
                await trio.sleep(piece)
            else:
                yield piece


def streamed(*pieces: bytes | float) -> tuple[int, dict[str, str], list[bytes | float]]:
    return 200, {"content-type": "text/event-stream"}, list(pieces)


def refusal(status: int, *pieces: bytes | float) -> tuple[int, dict[str, str], list[bytes | float]]:
    return status, {"content-type": "application/json"}, list(pieces)


def message(
    content: str | Content, role: Role = "user", calls: tuple[ToolCall, ...] = (), answers: str | None = None
) -> Message:
    parts = text_content(content) if isinstance(content, str) else content
    answered = None if answers is None else ToolCallId(answers)
    return Message(MessageId("m"), RunId("r"), role, parts, 0, tool_calls=calls, tool_call_id=answered)


CALL = ModelCall("m1", (message("hi"),))


def sent(*messages: Message, **fields: Any) -> dict[str, Any]:
    return request_fields(ModelCall("m1", messages, **fields), asks_usage=True)


async def ask(transport: MemoryTransport, into: list[ProviderDelta] | None = None) -> list[ProviderDelta]:
    deltas = [] if into is None else into
    async with httpx.AsyncClient(transport=transport) as client:
        provider = OpenAIProvider("p", client, base_url="http://x/v1/", default_model="m", api_key=None)
        async with provider.stream(CALL) as stream:
            while received := await stream.receive():
                deltas += received
    return deltas


def test_a_request_asks_for_a_stream_with_usage_and_no_more_than_was_given() -> None:
    assert sent(message("hi")) == {
        "model": "m1",
        "messages": [{"role": "user", "content": "hi"}],
        "stream": True,
        "stream_options": {"include_usage": True},
    }


def test_the_system_prompt_comes_first() -> None:
    messages = sent(message("hi"), system_prompt="Be kind.")["messages"]

    assert messages == [{"role": "system", "content": "Be kind."}, {"role": "user", "content": "hi"}]


def test_texts_and_images_are_sent_as_parts() -> None:
    content = (TextPart("what is this?"), ImagePart("https://x/i.png", "low"), ImagePart("data:image/png;base64,AA"))

    assert sent(message(content))["messages"][0]["content"] == [
        {"type": "text", "text": "what is this?"},
        {"type": "image_url", "image_url": {"url": "https://x/i.png", "detail": "low"}},
        {"type": "image_url", "image_url": {"url": "data:image/png;base64,AA"}},
    ]


def test_tool_calls_and_their_results_keep_their_ids() -> None:
    calls = (ToolCall(ToolCallId("c1"), "get_time", '{"zone": "UTC"}'), ToolCall(ToolCallId("c2"), "list", ""))

    messages = sent(message("", "assistant", calls), message("12:00", "tool", answers="c1"))["messages"]

    assert messages == [
        {
            "role": "assistant",
            "content": None,
            "tool_calls": [
                {"id": "c1", "type": "function", "function": {"name": "get_time", "arguments": '{"zone": "UTC"}'}},
                {"id": "c2", "type": "function", "function": {"name": "list", "arguments": "{}"}},
            ],
        },
        {"role": "tool", "tool_call_id": "c1", "content": "12:00"},
    ]


@pytest.mark.parametrize("botched", ['{"zone', "[1]", "UTC"])
def test_arguments_that_the_model_botched_are_sent_as_an_object_all_the_same(botched: str) -> None:
    calls = (ToolCall(ToolCallId("c1"), "get_time", botched),)

    function = sent(message("", "assistant", calls))["messages"][0]["tool_calls"][0]["function"]

    assert json.loads(function["arguments"]) == {"invalid_arguments": botched}


@pytest.mark.parametrize(
    ("called", "told"),
    [("", "unknown"), ("get time!", "get_time_"), ("x" * 65, "x" * 64), ("get-time_2", "get-time_2")],
)
def test_a_name_that_no_tool_can_have_is_sent_as_one_that_the_api_takes(called: str, told: str) -> None:
    calls = (ToolCall(ToolCallId("c1"), called, "{}"),)

    function = sent(message("", "assistant", calls))["messages"][0]["tool_calls"][0]["function"]

    assert function["name"] == told


def test_tools_are_sent_as_functions() -> None:
    schema = {"type": "object", "properties": {}}

    assert sent(message("hi"), tools=(ToolSpec("t", "does", schema),))["tools"] == [
        {"type": "function", "function": {"name": "t", "description": "does", "parameters": schema}}
    ]


def test_params_go_in_but_do_not_decide_what_is_the_runs_to_decide() -> None:
    params = {"temperature": 0.1, "stream": False, "model": "other", "messages": [], "stream_options": None,
              "tools": [1], "n": 3}  # fmt: skip

    fields = sent(message("hi"), params=params)

    assert fields == sent(message("hi")) | {"temperature": 0.1}


async def test_everything_of_one_read_is_one_list() -> None:
    transport = MemoryTransport(streamed(TEXT + TEXT + FINISH + USAGE, DONE))
    async with httpx.AsyncClient(transport=transport) as client:
        provider = OpenAIProvider("p", client, base_url="http://x/v1", default_model="m", api_key=None)
        async with provider.stream(CALL) as stream:
            assert await stream.receive() == [TextDelta("a"), TextDelta("a"), FinishDelta("stop")]
            assert await stream.receive() == [UsageDelta(Usage(1, 2, 3))]
            assert await stream.receive() == []


async def test_a_server_that_does_not_know_stream_options_is_asked_without_from_then_on() -> None:
    refused = refusal(422, b'{"detail": "Extra inputs are not permitted: stream_options"}')
    transport = MemoryTransport(refused, streamed(TEXT, DONE), streamed(TEXT, DONE))
    async with httpx.AsyncClient(transport=transport) as client:
        provider = OpenAIProvider("p", client, base_url="http://x/v1", default_model="m", api_key=None)
        for _ in range(2):
            async with provider.stream(CALL) as stream:
                assert await stream.receive() == [TextDelta("a")]

    assert ["stream_options" in request for request in transport.requests] == [True, False, False]


async def test_another_refusal_is_not_asked_again() -> None:
    transport = MemoryTransport(refusal(422, b'{"detail": "no"}'))

    with pytest.raises(UpstreamError) as failed:
        await ask(transport)

    assert failed.value.code is ErrorCode.PROVIDER_REJECTED
    assert len(transport.requests) == 1


async def test_an_answer_is_whole_5_s_after_its_finish_reason_even_if_nothing_follows(
    autojump_clock: MockClock,
) -> None:
    start = autojump_clock.current_time()

    deltas = await ask(MemoryTransport(streamed(TEXT + FINISH, b": still here\n\n", 3600.0, USAGE)))

    assert deltas == [TextDelta("a"), FinishDelta("stop")]
    assert autojump_clock.current_time() - start == pytest.approx(AFTER_FINISH_S + AFTER_DONE_S, abs=AFTER_DONE_S)


async def test_comments_behind_the_finish_reason_do_not_hold_the_answer(autojump_clock: MockClock) -> None:
    start = autojump_clock.current_time()
    comments: list[bytes | float] = [1.0, b": still here\n\n"] * 3600

    assert await ask(MemoryTransport(streamed(FINISH, *comments))) == [FinishDelta("stop")]
    assert autojump_clock.current_time() - start < 2 * AFTER_FINISH_S


async def test_usage_that_takes_its_time_behind_the_finish_reason_still_counts(autojump_clock: MockClock) -> None:
    deltas = await ask(MemoryTransport(streamed(FINISH, AFTER_FINISH_S / 2, USAGE, DONE)))

    assert autojump_clock.current_time() > 0
    assert deltas == [FinishDelta("stop"), UsageDelta(Usage(1, 2, 3))]


async def test_a_connection_that_is_held_open_behind_done_holds_nothing(autojump_clock: MockClock) -> None:
    start = autojump_clock.current_time()

    await ask(MemoryTransport(streamed(TEXT + FINISH + DONE, 3600.0)))

    assert autojump_clock.current_time() - start == pytest.approx(AFTER_DONE_S)


async def test_what_follows_done_is_not_looked_at() -> None:
    assert await ask(MemoryTransport(streamed(TEXT + FINISH + DONE + b"data: <html>\n\n", b"data: <html>\n\n"))) == [
        TextDelta("a"),
        FinishDelta("stop"),
    ]


async def test_an_error_that_keeps_its_words_back_is_told_by_its_status(autojump_clock: MockClock) -> None:
    start = autojump_clock.current_time()

    with pytest.raises(UpstreamError) as failed:
        await ask(MemoryTransport(refusal(400, b'{"error": ', 3600.0)))

    assert failed.value.code is ErrorCode.PROVIDER_REJECTED
    assert autojump_clock.current_time() - start == pytest.approx(ERROR_BODY_S)


async def test_an_error_that_goes_on_for_ever_is_read_in_part() -> None:
    pieces: list[bytes | float] = [b"x" * 4096] * 10_000

    with pytest.raises(UpstreamError) as failed:
        await ask(MemoryTransport((500, {"content-type": "text/plain"}, pieces)))

    assert failed.value.code is ErrorCode.PROVIDER_ERROR
    assert len(failed.value.message) < 400


@pytest.mark.parametrize(
    "answer",
    [
        (200, {"content-type": "text/html"}, [b"<html>"]),
        (200, {"content-type": "text/event-stream", "content-encoding": "gzip"}, [b"\x1f\x8b"]),
        (200, {"content-type": "application/json"}, [b'{"ok": true}']),
        (200, {"content-type": "application/json"}, [b'{"choices": [']),
        streamed(DONE),
        streamed(b": nothing\n\n"),
        streamed(b"data: {}\n\n"),
        streamed(b'data: "x"\n\n'),
        (204, {}, []),
    ],
)
async def test_what_is_not_the_answer_that_was_asked_for_is_a_protocol_error(answer: Any) -> None:
    with pytest.raises(UpstreamError) as failed:
        await ask(MemoryTransport(answer))

    assert failed.value.code is ErrorCode.PROVIDER_PROTOCOL


async def test_an_answer_that_was_not_streamed_is_one_list_and_an_error_in_it_an_error() -> None:
    whole = b'{"choices": [{"message": {"content": "hello"}, "finish_reason": "stop"}], "usage": {"prompt_tokens": 1}}'

    assert await ask(MemoryTransport(refusal(200, whole[:20], whole[20:]))) == [
        TextDelta("hello"),
        FinishDelta("stop"),
        UsageDelta(Usage(1, 0, 1)),
    ]
    with pytest.raises(UpstreamError) as failed:
        await ask(MemoryTransport(refusal(200, b'{"error": {"code": 429}}')))
    assert failed.value.code is ErrorCode.PROVIDER_RATE_LIMITED


@pytest.mark.parametrize("bad", [b"data: <html>\n\n", b"data: " + b"x" * MAX_EVENT_BYTES, b'data: {"error": {}}\n\n'])
async def test_deltas_that_come_in_one_read_with_a_failure_come_first(bad: bytes) -> None:
    deltas: list[ProviderDelta] = []

    with pytest.raises(UpstreamError) as failed:
        await ask(MemoryTransport(streamed(TEXT + TEXT + bad)), deltas)

    assert failed.value.code is ErrorCode.PROVIDER_PROTOCOL
    assert deltas == [TextDelta("a"), TextDelta("a")]


async def test_a_stream_without_a_content_type_is_taken_for_one() -> None:
    assert await ask(MemoryTransport((200, {}, [TEXT, FINISH, DONE]))) == [TextDelta("a"), FinishDelta("stop")]
