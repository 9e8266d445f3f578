"""OpenAI's provider against an upstream on a real socket: what can come over it, and what can go wrong."""

import gc
import socket
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest
import trio

from bamboo.core.types import (
    FinishDelta,
    Message,
    MessageId,
    ModelCall,
    ProviderDelta,
    ReasoningDelta,
    RunId,
    TextDelta,
    ToolCallDelta,
    Usage,
    UsageDelta,
    text_content,
)
from bamboo.errors import ErrorCode, UpstreamError
from bamboo.llm.openai import OpenAIProvider, open_openai
from tests.support.upstream import (
    Answer,
    FakeToolCall,
    Upstream,
    error_answer,
    json_answer,
    open_dead_address,
    open_upstream,
)

DEADLINE_S = 20
KEY = "sk-secret-1"
CALL = ModelCall("m1", (Message(MessageId("m"), RunId("r"), "user", text_content("grüße 竹"), 0),))
TEXTS = ["Grü", "ße", " 竹", "🎋", " \n\n", "data: {}", "\r\n"]
USAGE = UsageDelta(Usage(5, 7, 12))


@asynccontextmanager
async def open_provider(
    base_url: str, *, api_key: str | None = KEY, connect_timeout_s: float = DEADLINE_S
) -> AsyncIterator[OpenAIProvider]:
    async with open_openai(
        "p", base_url=base_url, default_model="m", api_key=api_key, connect_timeout_s=connect_timeout_s
    ) as provider:
        yield provider


@pytest.fixture
async def upstream() -> AsyncIterator[Upstream]:
    async with open_upstream() as upstream:
        yield upstream


@pytest.fixture
async def provider(upstream: Upstream) -> AsyncIterator[OpenAIProvider]:
    async with open_provider(upstream.base_url) as provider:
        yield provider


async def ask(provider: OpenAIProvider, into: list[ProviderDelta] | None = None) -> list[ProviderDelta]:
    deltas = [] if into is None else into
    with trio.fail_after(DEADLINE_S):
        async with provider.stream(CALL) as stream:
            while received := await stream.receive():
                deltas += received
    return deltas


async def failure(provider: OpenAIProvider) -> tuple[UpstreamError, list[ProviderDelta]]:
    """What it fails with, and the deltas before."""
    deltas: list[ProviderDelta] = []
    with pytest.raises(UpstreamError) as failed:
        await ask(provider, deltas)
    return failed.value, deltas


async def test_the_request_is_what_openai_asks_for(upstream: Upstream, provider: OpenAIProvider) -> None:
    await ask(provider)

    (request,) = upstream.requests
    assert (request.method, request.path) == ("POST", "/v1/chat/completions")
    assert request.headers["authorization"] == f"Bearer {KEY}"
    assert request.headers["content-type"] == "application/json"
    assert request.headers["accept-encoding"] == "identity"
    assert request.json["messages"] == [{"role": "user", "content": "grüße 竹"}]


async def test_without_a_key_no_authorization_is_sent(upstream: Upstream) -> None:
    async with open_provider(upstream.base_url + "/", api_key=None) as provider:
        await ask(provider)

    assert "authorization" not in upstream.requests[0].headers


@pytest.mark.parametrize("line_end", ["\n", "\r\n"])
@pytest.mark.parametrize("split", [None, 1, 2, 3, 7, 64])
async def test_any_split_of_the_answer_gives_the_same_deltas(
    upstream: Upstream, provider: OpenAIProvider, split: int | None, line_end: str
) -> None:
    calls = [FakeToolCall("get_time", ['{"zone"', ': "竹"}']), FakeToolCall("list", call_id="call_2")]
    upstream.answer(Answer(tokens=TEXTS, reasoning=["hm", "!"], tool_calls=calls, split=split, line_end=line_end))

    assert await ask(provider) == [
        ReasoningDelta("hm"),
        ReasoningDelta("!"),
        *map(TextDelta, TEXTS),
        ToolCallDelta(0, "call_1", "get_time", ""),
        ToolCallDelta(0, None, None, '{"zone"'),
        ToolCallDelta(0, None, None, ': "竹"}'),
        ToolCallDelta(1, "call_2", "list", ""),
        ToolCallDelta(1, None, None, "{}"),
        FinishDelta("tool_calls"),
        USAGE,
    ]


async def test_an_answer_in_one_piece_is_one_list(upstream: Upstream, provider: OpenAIProvider) -> None:
    upstream.answer(Answer(tokens=["a", "b"], joined=True))

    with trio.fail_after(DEADLINE_S):
        async with provider.stream(CALL) as stream:
            assert await stream.receive() == [TextDelta("a"), TextDelta("b"), FinishDelta("stop"), USAGE]
            assert await stream.receive() == []


async def test_every_text_is_received_when_it_comes(upstream: Upstream, provider: OpenAIProvider) -> None:
    reply = upstream.answer(Answer(tokens=["a", "b", "c"], gated=True))

    with trio.fail_after(DEADLINE_S):
        async with provider.stream(CALL) as stream:
            for text in "abc":
                reply.release()
                assert await stream.receive() == [TextDelta(text)]
        assert reply.texts_sent == 3


@pytest.mark.parametrize(
    ("answer", "end"),
    [
        (Answer(tokens=["a"], usage="never"), [FinishDelta("stop")]),
        (Answer(tokens=["a"], done=False), [FinishDelta("stop"), USAGE]),
        (Answer(tokens=["a"], finish_reason=None), [FinishDelta("stop"), USAGE]),
        (Answer(tokens=["a"], finish_reason="length"), [FinishDelta("length"), USAGE]),
    ],
    ids=["no usage", "no [DONE]", "no finish reason", "length"],
)
async def test_a_whole_answer_may_lack_usage_done_or_finish_reason(
    upstream: Upstream, provider: OpenAIProvider, answer: Answer, end: list[ProviderDelta]
) -> None:
    upstream.answer(answer)

    assert await ask(provider) == [TextDelta("a"), *end]


async def test_a_whole_tool_call_in_one_delta_without_index(upstream: Upstream, provider: OpenAIProvider) -> None:
    calls = [FakeToolCall("a", whole=True), FakeToolCall("b", call_id="call_2", whole=True)]
    upstream.answer(Answer(tokens=[], tool_calls=calls))

    assert (await ask(provider))[:2] == [ToolCallDelta(0, "call_1", "a", "{}"), ToolCallDelta(1, "call_2", "b", "{}")]


async def test_answers_that_were_read_to_their_end_share_a_connection(
    upstream: Upstream, provider: OpenAIProvider
) -> None:
    upstream.answer(Answer())
    upstream.answer(error_answer(500))
    upstream.answer(json_answer(200, {"choices": [{"message": {"content": "a"}, "finish_reason": "stop"}]}))

    await ask(provider)
    await failure(provider)
    await ask(provider)
    await ask(provider)

    assert [request.connection for request in upstream.requests] == [1, 1, 1, 1]


REFUSALS = [
    (error_answer(401, f"Incorrect API key provided: {KEY}"), ErrorCode.PROVIDER_AUTH),
    (error_answer(403, "no"), ErrorCode.PROVIDER_AUTH),
    (error_answer(400, "bad"), ErrorCode.PROVIDER_REJECTED),
    (error_answer(404, "The model does not exist"), ErrorCode.PROVIDER_REJECTED),
    (error_answer(429, "slow down"), ErrorCode.PROVIDER_RATE_LIMITED),
    (error_answer(500, "oops"), ErrorCode.PROVIDER_ERROR),
    (error_answer(301, "moved", headers={"location": "http://127.0.0.1:1/"}), ErrorCode.PROVIDER_REJECTED),
    (Answer(content_type="text/html"), ErrorCode.PROVIDER_PROTOCOL),
    (Answer(status=502, body=b"<html>Bad Gateway", content_type="text/html"), ErrorCode.PROVIDER_ERROR),
    (Answer(status=503, body=b"\xff\xfe", content_type="application/json"), ErrorCode.PROVIDER_ERROR),
    (Answer(fault="reset", fault_after=None), ErrorCode.PROVIDER_UNREACHABLE),
    (Answer(fault="close", fault_after=None), ErrorCode.PROVIDER_UNREACHABLE),
    (Answer(fault="bad_http", fault_after=None), ErrorCode.PROVIDER_PROTOCOL),
    (Answer(fault="reset", fault_after=0), ErrorCode.PROVIDER_UNREACHABLE),
    (Answer(fault="close", fault_after=0), ErrorCode.PROVIDER_UNREACHABLE),
    (Answer(fault="half_chunk", fault_after=0), ErrorCode.PROVIDER_UNREACHABLE),
    (Answer(fault="bad_http", fault_after=0), ErrorCode.PROVIDER_PROTOCOL),
    (Answer(fault="garbage", fault_after=0), ErrorCode.PROVIDER_PROTOCOL),
    (Answer(tokens=[], finish_reason=None, done=False), ErrorCode.PROVIDER_PROTOCOL),
]


@pytest.mark.parametrize(("answer", "code"), REFUSALS)
async def test_every_failure_before_a_delta_has_its_code_and_the_provider_stays_usable(
    upstream: Upstream, provider: OpenAIProvider, answer: Answer, code: ErrorCode
) -> None:
    upstream.answer(answer)

    error, deltas = await failure(provider)

    assert error.code is code
    assert deltas == []
    assert KEY not in error.message
    assert len(await ask(provider)) == 6


BREAKS = [
    (Answer(fault="reset", fault_after=2), ErrorCode.PROVIDER_PROTOCOL),
    (Answer(fault="close", fault_after=2), ErrorCode.PROVIDER_PROTOCOL),
    (Answer(fault="half_chunk", fault_after=2), ErrorCode.PROVIDER_PROTOCOL),
    (Answer(fault="bad_http", fault_after=2), ErrorCode.PROVIDER_PROTOCOL),
    (Answer(fault="garbage", fault_after=2), ErrorCode.PROVIDER_PROTOCOL),
    (Answer(fault="garbage", fault_after=2, joined=True), ErrorCode.PROVIDER_PROTOCOL),
    (Answer(fault="huge_line", fault_after=2), ErrorCode.PROVIDER_PROTOCOL),
    (Answer(tokens=["Hello", ","], finish_reason=None, done=False), ErrorCode.PROVIDER_PROTOCOL),
    (Answer(fault="error", fault_after=2, error={"message": "overloaded"}), ErrorCode.PROVIDER_ERROR),
    (Answer(fault="error", fault_after=2, error={"code": "rate_limit_exceeded"}), ErrorCode.PROVIDER_RATE_LIMITED),
]


@pytest.mark.parametrize(("answer", "code"), BREAKS)
async def test_every_failure_in_the_middle_has_its_code_and_comes_after_every_delta(
    upstream: Upstream, provider: OpenAIProvider, answer: Answer, code: ErrorCode
) -> None:
    upstream.answer(answer)

    error, deltas = await failure(provider)

    # A reset may throw away what the kernel had and nobody has read yet.
    assert deltas == [TextDelta("Hello"), TextDelta(",")] or (answer.fault == "reset" and len(deltas) < 2)
    assert error.code is code or (answer.fault == "reset" and not deltas)
    assert len(await ask(provider)) == 6


async def test_a_connection_that_breaks_behind_the_finish_reason_has_broken_nothing(
    upstream: Upstream, provider: OpenAIProvider
) -> None:
    upstream.answer(Answer(tokens=["a"], usage="never", done=False, fault="half_chunk", fault_after="end"))

    assert await ask(provider) == [TextDelta("a"), FinishDelta("stop")]


async def test_a_rate_limit_says_when_to_come_back(upstream: Upstream, provider: OpenAIProvider) -> None:
    upstream.answer(error_answer(429, "slow down", headers={"retry-after": "7"}))
    upstream.answer(error_answer(429, "slow down"))

    assert [(await failure(provider))[0].retry_after_s for _ in range(2)] == [7.0, None]


async def test_the_providers_own_words_are_quoted(upstream: Upstream, provider: OpenAIProvider) -> None:
    upstream.answer(error_answer(400, "max_tokens is too\n large"))
    upstream.answer(error_answer(404, "no such model"))

    assert "max_tokens is too large" in (await failure(provider))[0].message
    missing = (await failure(provider))[0].message
    assert "'m1'" in missing
    assert f"{upstream.base_url}/chat/completions" in missing


async def test_nobody_there_is_unreachable() -> None:
    async with open_dead_address() as base_url, open_provider(base_url) as provider:
        error, _ = await failure(provider)

    assert error.code is ErrorCode.PROVIDER_UNREACHABLE
    assert "refused" in error.message.lower()


async def test_a_name_that_is_not_known_is_unreachable() -> None:
    async with open_provider("http://no-such-host.invalid/v1") as provider:
        error, _ = await failure(provider)

    assert error.code is ErrorCode.PROVIDER_UNREACHABLE


async def test_a_server_that_does_not_take_connections_is_a_connect_timeout() -> None:
    with socket.socket() as listener, socket.socket() as first, socket.socket() as second:
        listener.bind(("127.0.0.1", 0))
        listener.listen(0)
        for waiting in (first, second):  # the backlog is full: the kernel drops what else comes
            waiting.setblocking(False)  # noqa: FBT003 - the socket module's way
            waiting.connect_ex(listener.getsockname())
        async with open_provider(
            f"http://127.0.0.1:{listener.getsockname()[1]}/v1", connect_timeout_s=0.05
        ) as provider:
            error, _ = await failure(provider)

    assert error.code is ErrorCode.PROVIDER_CONNECT_TIMEOUT


async def test_the_upstream_sees_that_a_cancelled_caller_left(upstream: Upstream, provider: OpenAIProvider) -> None:
    reply = upstream.answer(Answer(tokens=["a"] * 100, gated=True))
    reply.release(2)

    with trio.fail_after(DEADLINE_S):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(ask, provider)
            await reply.wait_sent(2)
            nursery.cancel_scope.cancel()
        await reply.wait_client_left()
        await upstream.wait_connections(0)

    assert reply.texts_sent == 2


async def test_a_large_request_that_is_cancelled_while_it_is_sent_leaves_nothing() -> None:
    with trio.fail_after(DEADLINE_S):
        (listener,) = await trio.open_tcp_listeners(0, host="127.0.0.1")
        huge = Message(MessageId("m"), RunId("r"), "user", text_content("x" * 50_000_000), 0)
        async with (
            listener,
            open_provider(f"http://127.0.0.1:{listener.socket.getsockname()[1]}/v1") as provider,
            trio.open_nursery() as nursery,
        ):
            nursery.start_soon(stream_nothing, provider, ModelCall("m", (huge,)))
            async with await listener.accept() as connection:
                assert await connection.receive_some()
                nursery.cancel_scope.cancel()
        gc.collect()


async def stream_nothing(provider: OpenAIProvider, call: ModelCall) -> None:
    async with provider.stream(call):
        raise AssertionError("nobody answers")


async def test_two_hundred_answers_at_once_are_each_whole(upstream: Upstream, provider: OpenAIProvider) -> None:
    answers: list[list[ProviderDelta]] = [[] for _ in range(200)]

    async with trio.open_nursery() as nursery:
        for deltas in answers:
            nursery.start_soon(ask, provider, deltas)

    assert all(len(deltas) == 6 for deltas in answers)
    assert len(upstream.requests) == 200


@pytest.fixture
def dead_proxy(monkeypatch: pytest.MonkeyPatch) -> None:
    for variable in ("HTTP_PROXY", "ALL_PROXY"):
        monkeypatch.setenv(variable, "http://127.0.0.1:1")


@pytest.mark.usefixtures("dead_proxy")
async def test_a_proxy_of_the_environment_is_not_asked_for_this_machine(upstream: Upstream) -> None:
    async with open_provider(upstream.base_url) as provider:
        assert len(await ask(provider)) == 6


@pytest.mark.usefixtures("dead_proxy")
async def test_a_proxy_of_the_environment_is_asked_for_other_machines() -> None:
    async with open_provider("http://bamboo.invalid/v1") as provider:
        error, _ = await failure(provider)

    assert "refused" in error.message.lower()  # by the proxy: the name was not looked up
