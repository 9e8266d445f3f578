"""What every provider promises (`bamboo.llm.base`), asked of each: OpenAI's API over a real socket, and the scripts."""

import gc
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager, suppress
from functools import partial
from typing import Final

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
    UsageDelta,
    text_content,
)
from bamboo.errors import ErrorCode, UpstreamError
from bamboo.llm.base import Provider
from bamboo.llm.openai import open_openai
from bamboo.llm.scripted import ScriptedProvider
from tests.support.upstream import Answer, FakeToolCall, Upstream, error_answer, open_upstream

DEADLINE_S = 20

ARGUMENTS = ('{"time', 'zone": "U', 'TC"}')

OPENAI_ANSWERS: Final = {
    "echo": Answer(tokens=["Hello", " big", " world"]),
    "reasoning": Answer(tokens=["Hello", " big", " world"], reasoning=["The user ", "wants ", "an echo."]),
    "tool": Answer(tokens=["Let me look. "], tool_calls=[FakeToolCall("get_time", ARGUMENTS)]),
    "silent": Answer(fault="stall"),
    "stall": Answer(fault="stall", fault_after=3),
    "error:provider_auth": error_answer(401),
    "error:provider_rejected": error_answer(400),
    "error:provider_rate_limited": error_answer(429, headers={"retry-after": "1"}),
    "error:provider_error": error_answer(500),
    "error:provider_unreachable": Answer(fault="close", fault_after=None),
    "error:provider_protocol": Answer(content_type="text/html"),
    "break:provider_rejected": Answer(fault="error", fault_after=3, error={"code": 400, "message": "no"}),
    "break:provider_rate_limited": Answer(fault="error", fault_after=3, error={"code": 429, "message": "no"}),
    "break:provider_error": Answer(fault="error", fault_after=3, error={"code": 500, "message": "no"}),
    "break:provider_protocol": Answer(fault="half_chunk", fault_after=3),
}
"""What the fake upstream answers to be like the script of that name."""


class Subject:
    """A provider, and how to make it answer like a script."""

    def __init__(self, provider: Provider, upstream: Upstream | None) -> None:
        self.provider = provider
        self._upstream = upstream

    def call(self, script: str) -> ModelCall:
        """A call that is answered as the script does. To be made before another is asked for."""
        if self._upstream is not None:
            self._upstream.answer(OPENAI_ANSWERS[script])
        message = Message(MessageId("m"), RunId("r"), "user", text_content("Hello big world"), 0)
        return ModelCall(script, (message,))

    def forget(self) -> None:
        """Drop what was to be answered to calls that were never asked."""
        if self._upstream is not None:
            self._upstream.forget()

    async def wait_closed(self) -> None:
        """Return when nothing of what was left is open. What was never freed makes a warning, hence an error."""
        if self._upstream is not None:
            await self._upstream.wait_connections(0)
        gc.collect()


@asynccontextmanager
async def open_openai_subject() -> AsyncIterator[Subject]:
    async with (
        open_upstream() as upstream,
        open_openai(
            "p", base_url=upstream.base_url, default_model="m", api_key="sk-1", connect_timeout_s=DEADLINE_S
        ) as provider,
    ):
        yield Subject(provider, upstream)


@asynccontextmanager
async def open_scripted_subject() -> AsyncIterator[Subject]:
    yield Subject(ScriptedProvider("p"), None)


OpenSubject = Callable[[], AbstractAsyncContextManager[Subject]]


@pytest.fixture(params=[open_openai_subject, open_scripted_subject], ids=["openai", "scripted"])
def open_subject(request: pytest.FixtureRequest) -> OpenSubject:
    opener: OpenSubject = request.param
    return opener


@pytest.fixture
async def subject(open_subject: OpenSubject) -> AsyncIterator[Subject]:
    async with open_subject() as subject:
        yield subject


async def whole_answer(provider: Provider, call: ModelCall) -> list[ProviderDelta]:
    deltas: list[ProviderDelta] = []
    with trio.fail_after(DEADLINE_S):
        async with provider.stream(call) as stream:
            while received := await stream.receive():
                deltas += received
    return deltas


async def cancelled_at_step(step: int, act: Callable[[], Awaitable[object]]) -> bool:
    """Do `act`, cancelling it at that step of this task. Whether it was still at it by then."""

    class Canceller(trio.abc.Instrument):
        steps = 0

        def before_task_step(self, task: trio.lowlevel.Task) -> None:
            if task is here:
                self.steps += 1
                if self.steps == step:
                    scope.cancel()

    here = trio.lowlevel.current_task()
    canceller = Canceller()
    with trio.CancelScope() as scope:
        trio.lowlevel.add_instrument(canceller)
        try:
            await act()
        finally:
            trio.lowlevel.remove_instrument(canceller)
    return scope.cancel_called


async def test_a_whole_answer_is_texts_one_finish_reason_and_usage(subject: Subject) -> None:
    deltas = await whole_answer(subject.provider, subject.call("echo"))

    assert deltas[:3] == [TextDelta("Hello"), TextDelta(" big"), TextDelta(" world")]
    assert deltas[3] == FinishDelta("stop")
    assert isinstance(deltas[4], UsageDelta)
    assert len(deltas) == 5


async def test_the_end_is_said_again_to_who_asks_again(subject: Subject) -> None:
    with trio.fail_after(DEADLINE_S):
        async with subject.provider.stream(subject.call("echo")) as stream:
            while await stream.receive():
                pass
            assert not await stream.receive()


async def test_reasoning_comes_apart_from_text(subject: Subject) -> None:
    deltas = await whole_answer(subject.provider, subject.call("reasoning"))

    assert [type(delta) for delta in deltas[:4]] == [ReasoningDelta] * 3 + [TextDelta]


async def test_a_tool_call_comes_in_pieces_with_id_and_name_once(subject: Subject) -> None:
    deltas = await whole_answer(subject.provider, subject.call("tool"))

    first, *rest = [delta for delta in deltas if isinstance(delta, ToolCallDelta)]
    assert (first.index, first.tool_call_id, first.tool) == (0, "call_1", "get_time")
    assert rest == [ToolCallDelta(0, None, None, piece) for piece in ARGUMENTS]
    assert FinishDelta("tool_calls") in deltas


@pytest.mark.parametrize("script", [script for script in OPENAI_ANSWERS if script.startswith("error:")])
async def test_a_failure_before_any_delta_has_its_code(subject: Subject, script: str) -> None:
    with pytest.raises(UpstreamError) as failed:
        await whole_answer(subject.provider, subject.call(script))

    assert failed.value.code == script.removeprefix("error:")
    assert failed.value.retry_after_s == (1.0 if failed.value.code is ErrorCode.PROVIDER_RATE_LIMITED else None)


@pytest.mark.parametrize("script", [script for script in OPENAI_ANSWERS if script.startswith("break:")])
async def test_a_failure_in_the_middle_has_its_code_and_comes_after_every_delta(subject: Subject, script: str) -> None:
    deltas: list[ProviderDelta] = []

    with trio.fail_after(DEADLINE_S):
        async with subject.provider.stream(subject.call(script)) as stream:
            with pytest.raises(UpstreamError) as failed:  # noqa: PT012 - how many calls it takes is the network's choice
                while received := await stream.receive():
                    deltas += received
            with pytest.raises(UpstreamError):
                await stream.receive()

    assert failed.value.code == script.removeprefix("break:")
    assert [type(delta) for delta in deltas] == [TextDelta] * 3


async def test_a_failure_leaves_the_provider_usable(subject: Subject) -> None:
    for script in ("break:provider_protocol", "error:provider_unreachable"):
        with pytest.raises(UpstreamError):
            await whole_answer(subject.provider, subject.call(script))

    assert len(await whole_answer(subject.provider, subject.call("echo"))) == 5


async def test_answers_of_one_provider_do_not_meet(subject: Subject) -> None:
    with trio.fail_after(DEADLINE_S):
        async with (
            subject.provider.stream(subject.call("stall")) as first,
            subject.provider.stream(subject.call("echo")) as second,
        ):
            assert await first.receive()
            deltas: list[ProviderDelta] = []
            while received := await second.receive():
                deltas += received

    assert deltas[:4] == [TextDelta("Hello"), TextDelta(" big"), TextDelta(" world"), FinishDelta("stop")]


@pytest.mark.parametrize("script", ["silent", "stall"])
async def test_a_caller_that_waits_no_longer_cancels_and_leaves_nothing(subject: Subject, script: str) -> None:
    texts = 0

    with trio.fail_after(DEADLINE_S):
        async with subject.provider.stream(subject.call(script)) as stream:
            with trio.move_on_after(0.05):
                while True:
                    texts += len(await stream.receive())
        await subject.wait_closed()

    assert texts == (3 if script == "stall" else 0)


@pytest.mark.parametrize("taken", [0, 1, 2])
async def test_leaving_an_answer_early_leaves_nothing(subject: Subject, taken: int) -> None:
    with trio.fail_after(DEADLINE_S):
        async with subject.provider.stream(subject.call("stall")) as stream:
            for _ in range(taken):
                assert await stream.receive()
        await subject.wait_closed()


async def failing(subject: Subject) -> None:
    async with subject.provider.stream(subject.call("stall")) as stream:
        await stream.receive()
        raise ZeroDivisionError


async def test_an_exception_in_the_block_leaves_nothing(subject: Subject) -> None:
    with trio.fail_after(DEADLINE_S):
        with pytest.raises(ZeroDivisionError):
            await failing(subject)
        await subject.wait_closed()


async def three_texts(provider: Provider, call: ModelCall) -> None:
    """Take what `stall` has to say, and leave it."""
    texts = 0
    async with provider.stream(call) as stream:
        while texts < 3:
            texts += len(await stream.receive())


async def test_left_or_cancelled_at_any_step_it_leaves_nothing(open_subject: OpenSubject) -> None:
    step = 0
    cancelled = True
    while cancelled:
        step += 1
        with trio.fail_after(DEADLINE_S):
            async with open_subject() as subject:
                act = partial(three_texts, subject.provider, subject.call("stall"))
                cancelled = await cancelled_at_step(step, act)
                await subject.wait_closed()

    assert step > 4


@pytest.mark.parametrize("script", ["echo", "error:provider_error", "break:provider_protocol"])
async def test_cancelled_at_any_step_the_provider_stays_usable(open_subject: OpenSubject, script: str) -> None:
    async def act() -> None:
        with suppress(UpstreamError):
            await whole_answer(subject.provider, call)

    step = 0
    cancelled = True
    while cancelled:
        step += 1
        async with open_subject() as subject:
            call = subject.call(script)
            cancelled = await cancelled_at_step(step, act)
            gc.collect()
            subject.forget()
            assert len(await whole_answer(subject.provider, subject.call("echo"))) == 5

    assert step > 1
