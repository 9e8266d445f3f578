"""Every script of the scripted provider: what it answers, always the same."""

import pytest
import trio
from trio.testing import MockClock

from bamboo.core.types import (
    FinishDelta,
    Message,
    MessageId,
    ModelCall,
    ProviderDelta,
    ReasoningDelta,
    Role,
    RunId,
    TextDelta,
    ToolCallDelta,
    ToolSpec,
    Usage,
    UsageDelta,
    text_content,
)
from bamboo.errors import ErrorCode, UpstreamError
from bamboo.llm.scripted import UPSTREAM_CODES, ScriptedProvider


def message(text: str, role: Role = "user") -> Message:
    return Message(MessageId("m"), RunId("r"), role, text_content(text), 0)


def call(*messages: Message, model: str = "any", **fields: object) -> ModelCall:
    return ModelCall(model, messages or (message("hello big world"),), **fields)  # type: ignore[arg-type] # test data


async def answer(provider: ScriptedProvider, call: ModelCall) -> list[ProviderDelta]:
    deltas: list[ProviderDelta] = []
    async with provider.stream(call) as stream:
        while received := await stream.receive():
            deltas += received
        assert await stream.receive() == ()
    return deltas


def text(deltas: list[ProviderDelta]) -> str:
    return "".join(delta.text for delta in deltas if isinstance(delta, TextDelta))


async def test_echo_gives_the_last_user_text_word_by_word_with_usage() -> None:
    deltas = await answer(ScriptedProvider("p", script="echo"), call(message("old one"), message("hello big world")))

    assert deltas == [
        TextDelta("hello"),
        TextDelta(" big"),
        TextDelta(" world"),
        FinishDelta("stop"),
        UsageDelta(Usage(5, 3, 8)),
    ]


@pytest.mark.parametrize("said", ["", "  a \n\n b  ", "one"])
async def test_echo_keeps_every_character(said: str) -> None:
    assert text(await answer(ScriptedProvider("p", script="echo"), call(message(said)))) == said


async def test_a_model_that_names_a_script_chooses_it() -> None:
    deltas = await answer(ScriptedProvider("p", script="echo"), call(model="reasoning"))

    assert sum(isinstance(delta, ReasoningDelta) for delta in deltas) == 3
    assert text(deltas) == "hello big world"


async def test_demo_says_what_it_is_what_to_set_and_what_it_heard(autojump_clock: MockClock) -> None:  # noqa: ARG001 - sets the clock
    deltas = await answer(ScriptedProvider("p", key_env="MY_KEY"), call())

    said = text(deltas)
    assert "demo model" in said
    assert "set MY_KEY" in said
    assert "base_url in bamboo.toml" in said
    assert said.endswith("You said: hello big world")
    assert len(deltas) > 40


async def test_demo_takes_15_ms_for_a_word(autojump_clock: MockClock) -> None:
    start = autojump_clock.current_time()

    deltas = await answer(ScriptedProvider("p"), call())

    words = sum(isinstance(delta, TextDelta) for delta in deltas)
    assert autojump_clock.current_time() - start == pytest.approx(words * 0.015)


async def test_demo_echoes_a_long_text_in_part(autojump_clock: MockClock) -> None:  # noqa: ARG001 - sets the clock
    said = text(await answer(ScriptedProvider("p"), call(message("x" * 5000))))

    assert said.endswith("x…")
    assert len(said) < 1000


async def test_tool_calls_the_tool_in_pieces_then_tells_its_result() -> None:
    provider = ScriptedProvider("p", script="tool")
    tools = (ToolSpec("search", "", {}), ToolSpec("get_time", "", {}))

    first = await answer(provider, call(tools=tools))
    second = await answer(provider, call(message("what time?"), message("", "assistant"), message("12:00", "tool")))

    pieces = [delta for delta in first if isinstance(delta, ToolCallDelta)]
    assert (pieces[0].tool_call_id, pieces[0].tool) == ("call_1", "get_time")
    assert "".join(piece.arguments for piece in pieces) == '{"timezone": "UTC"}'
    assert len(pieces) == 4
    assert first[-2] == FinishDelta("tool_calls")
    assert text(second) == "The tool says: 12:00"
    assert second[-2] == FinishDelta("stop")


async def test_tool_takes_the_first_tool_where_there_is_no_get_time() -> None:
    deltas = await answer(ScriptedProvider("p", script="tool"), call(tools=(ToolSpec("search", "", {}),)))

    assert next(delta.tool for delta in deltas if isinstance(delta, ToolCallDelta)) == "search"


async def test_long_streams_as_many_texts_as_asked_for_at_their_pace(autojump_clock: MockClock) -> None:
    start = autojump_clock.current_time()

    deltas = await answer(ScriptedProvider("p", script="long"), call(params={"tokens": 50, "delay_ms": 20}))

    assert [delta.text for delta in deltas if isinstance(delta, TextDelta)] == [f"word{n} " for n in range(1, 51)]
    assert autojump_clock.current_time() - start == pytest.approx(1.0)
    assert len(await answer(ScriptedProvider("p", script="long"), call())) == 1002


@pytest.mark.parametrize("params", [{"tokens": 100_001}, {"tokens": -1}, {"tokens": "9"}, {"delay_ms": True}])
async def test_long_rejects_params_out_of_bounds(params: dict[str, object]) -> None:
    with pytest.raises(UpstreamError) as failed:
        async with ScriptedProvider("p", script="long").stream(call(params=params)):
            pass

    assert failed.value.code is ErrorCode.PROVIDER_REJECTED


@pytest.mark.parametrize(("script", "texts"), [("silent", 0), ("stall", 3)])
async def test_silent_and_stall_never_end(script: str, texts: int, autojump_clock: MockClock) -> None:  # noqa: ARG001 - sets the clock
    deltas: list[ProviderDelta] = []

    with trio.move_on_after(3600) as scope:
        async with ScriptedProvider("p", script=script).stream(call()) as stream:
            while True:
                deltas += await stream.receive()

    assert scope.cancelled_caught
    assert len(deltas) == texts


@pytest.mark.parametrize("code", UPSTREAM_CODES)
async def test_error_fails_before_any_delta(code: ErrorCode) -> None:
    with pytest.raises(UpstreamError) as failed:
        async with ScriptedProvider("p").stream(call(model=f"error:{code}")):
            pass

    assert failed.value.code is code
    assert (failed.value.retry_after_s is not None) == (code is ErrorCode.PROVIDER_RATE_LIMITED)


@pytest.mark.parametrize("code", UPSTREAM_CODES)
async def test_break_fails_after_three_texts(code: ErrorCode) -> None:
    deltas: list[ProviderDelta] = []

    async with ScriptedProvider("p").stream(call(model=f"break:{code}")) as stream:
        with pytest.raises(UpstreamError) as failed:  # noqa: PT012 - the first three calls are good
            while True:
                deltas += await stream.receive()
        with pytest.raises(UpstreamError):
            await stream.receive()

    assert failed.value.code is code
    assert len(deltas) == 3


def test_an_unknown_script_is_refused_with_those_that_there_are() -> None:
    with pytest.raises(ValueError, match=r"no script 'demos': demo, echo"):
        ScriptedProvider("p", script="demos")
