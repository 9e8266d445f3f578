"""Chunks of chat completions as OpenAI and those that nearly speak its API send them."""

import json
from typing import Any

import pytest

from bamboo.core.types import (
    FinishDelta,
    ProviderDelta,
    ReasoningDelta,
    TextDelta,
    ToolCallDelta,
    Usage,
    UsageDelta,
)
from bamboo.llm.openai_chunks import ChunkDecoder, ChunkError, ToldError


def decode(*chunks: Any) -> list[ProviderDelta]:
    decoder = ChunkDecoder()
    deltas: list[ProviderDelta] = []
    for chunk in chunks:
        decoder.decode(chunk if isinstance(chunk, str) else json.dumps(chunk), deltas)
    decoder.end(deltas)
    return deltas


def chunk(delta: Any = None, finish_reason: Any = None, **fields: Any) -> dict[str, Any]:
    choice = {"index": 0, "delta": {} if delta is None else delta, "finish_reason": finish_reason}
    return {"object": "chat.completion.chunk", "choices": [choice], **fields}


def calls(*pieces: Any) -> dict[str, Any]:
    return chunk({"tool_calls": list(pieces)})


def piece(index: int | None, call_id: str | None, name: str | None, arguments: Any) -> dict[str, Any]:
    function = {"name": name, "arguments": arguments}
    return {
        key: value for key, value in {"index": index, "id": call_id, "function": function}.items() if value is not None
    }


def test_texts_come_as_they_are_and_empty_ones_are_none() -> None:
    deltas = decode(chunk({"role": "assistant", "content": ""}), chunk({"content": "a"}), chunk({"content": None}),
                    chunk({"content": " b"}), chunk(finish_reason="stop"))  # fmt: skip

    assert deltas == [TextDelta("a"), TextDelta(" b"), FinishDelta("stop")]


def test_text_and_finish_reason_may_share_a_chunk() -> None:
    assert decode(chunk({"content": "a"}, "length")) == [TextDelta("a"), FinishDelta("length")]


def test_a_refusal_is_the_text() -> None:
    assert decode(chunk({"content": None, "refusal": "no"}, "stop")) == [TextDelta("no"), FinishDelta("stop")]


def test_content_in_parts_gives_its_text() -> None:
    parts = [{"type": "text", "text": "a"}, {"type": "thinking", "thinking": []}, {"type": "text", "text": "b"}]

    assert decode(chunk({"content": parts}, "stop")) == [TextDelta("ab"), FinishDelta("stop")]


@pytest.mark.parametrize("field", ["reasoning_content", "reasoning"])
def test_reasoning_comes_under_either_name_and_before_the_text(field: str) -> None:
    assert decode(chunk({field: "hm", "content": "a"}, "stop"))[:2] == [ReasoningDelta("hm"), TextDelta("a")]


def test_reasoning_under_both_names_is_one_delta() -> None:
    assert decode(chunk({"reasoning": "hm", "reasoning_content": "hm"}, "stop"))[:-1] == [ReasoningDelta("hm")]


def test_other_choices_are_not_looked_at() -> None:
    both = {"choices": [{"index": 1, "delta": {"content": "x"}}, {"index": 0, "delta": {"content": "a"}}]}

    assert decode(both, chunk(finish_reason="stop")) == [TextDelta("a"), FinishDelta("stop")]


def test_there_is_one_finish_reason_and_one_usage_the_last() -> None:
    growing = [chunk({"content": "a"}, usage={"prompt_tokens": 1, "completion_tokens": n}) for n in (1, 2)]

    deltas = decode(*growing, chunk(finish_reason="stop"), chunk(finish_reason="stop"), {"choices": [], "usage": None})

    assert deltas[2:] == [FinishDelta("stop"), UsageDelta(Usage(1, 2, 3))]


@pytest.mark.parametrize("usage", [{"prompt_tokens": "many"}, {"prompt_tokens": 1, "total_tokens": 1.5}, "free", [1]])
def test_a_usage_that_makes_no_sense_is_left_out(usage: Any) -> None:
    assert decode(chunk({"content": "a"}, "stop"), {"choices": [], "usage": usage}) == [
        TextDelta("a"),
        FinishDelta("stop"),
    ]


def test_an_answer_without_a_finish_reason_gets_one_at_its_end() -> None:
    assert decode(chunk({"content": "a"})) == [TextDelta("a"), FinishDelta("stop")]
    assert decode(calls(piece(0, "c", "t", "{}")))[-1] == FinishDelta("tool_calls")


def test_a_whole_answer_that_was_not_streamed_is_understood() -> None:
    message = {"role": "assistant", "content": "a", "tool_calls": [piece(None, "c1", "t", '{"x":1}')]}

    deltas = decode({"choices": [{"message": message, "finish_reason": "tool_calls"}]})

    assert deltas == [TextDelta("a"), ToolCallDelta(0, "c1", "t", '{"x":1}'), FinishDelta("tool_calls")]


def test_a_call_comes_in_pieces_by_index_with_id_and_name_once() -> None:
    deltas = decode(
        calls(piece(0, "c1", "a", "")),
        calls(piece(1, "c2", "b", "")),
        calls(piece(0, None, None, '{"x"')),
        calls(piece(1, "c2", "b", "{}"), piece(0, "c1", None, ":1}")),
    )

    assert deltas[:-1] == [
        ToolCallDelta(0, "c1", "a", ""),
        ToolCallDelta(1, "c2", "b", ""),
        ToolCallDelta(0, None, None, '{"x"'),
        ToolCallDelta(1, None, None, "{}"),
        ToolCallDelta(0, None, None, ":1}"),
    ]


def test_whole_calls_without_an_index_are_told_apart() -> None:
    deltas = decode(
        calls(piece(None, "c1", "a", "{}"), piece(None, "c2", "b", "{}")), calls(piece(None, "c3", "a", "{}"))
    )

    assert deltas[:-1] == [
        ToolCallDelta(0, "c1", "a", "{}"),
        ToolCallDelta(1, "c2", "b", "{}"),
        ToolCallDelta(2, "c3", "a", "{}"),
    ]


def test_pieces_without_an_index_belong_to_the_call_before() -> None:
    deltas = decode(
        calls(piece(None, "c1", "a", "")), calls(piece(None, None, None, "{")), calls(piece(None, "c1", None, "}"))
    )

    assert deltas[:-1] == [
        ToolCallDelta(0, "c1", "a", ""),
        ToolCallDelta(0, None, None, "{"),
        ToolCallDelta(0, None, None, "}"),
    ]


def test_calls_that_all_have_index_0_are_told_apart_by_id_and_name() -> None:
    deltas = decode(calls(piece(0, "c1", "a", "{}")), calls(piece(0, "c2", "b", "{")), calls(piece(0, None, None, "}")),
                    calls(piece(0, "c3", "c", "{}")))  # fmt: skip

    assert [delta.index for delta in deltas if isinstance(delta, ToolCallDelta)] == [0, 1, 1, 2]


def test_a_new_id_in_every_piece_does_not_begin_a_call() -> None:
    deltas = decode(calls(piece(0, "r1", "a", "")), calls(piece(0, "r2", None, "{")), calls(piece(0, "r3", None, "}")))

    assert deltas[:-1] == [
        ToolCallDelta(0, "r1", "a", ""),
        ToolCallDelta(0, None, None, "{"),
        ToolCallDelta(0, None, None, "}"),
    ]


def test_a_call_without_an_id_gets_one_of_its_own() -> None:
    first, second, _ = decode(calls(piece(None, None, "a", "{}"), piece(None, "", "a", "{}")))

    assert isinstance(first, ToolCallDelta)
    assert isinstance(second, ToolCallDelta)
    assert first.tool_call_id
    assert second.tool_call_id
    assert first.tool_call_id != second.tool_call_id
    assert (first.index, second.index) == (0, 1)


def test_arguments_may_come_as_an_object_or_not_at_all() -> None:
    deltas = decode(calls(piece(0, "c1", "a", {"x": 1}), piece(1, "c2", "b", None)))

    assert deltas[:-1] == [ToolCallDelta(0, "c1", "a", '{"x":1}'), ToolCallDelta(1, "c2", "b", "")]


@pytest.mark.parametrize(
    "garbage",
    [
        "<html>", "[]", "1", '"x"', "null", '{"choices": 1}', '{"choices": [1]}', '{"choices": [{"delta": 1}]}',
        '{"choices": [{"delta": {"content": 1}}]}', '{"choices": [{"delta": {"content": {"a": 1}}}]}',
        '{"choices": [{"delta": {"tool_calls": 1}}]}', '{"choices": [{"delta": {"tool_calls": [1]}}]}',
        '{"choices": [{"delta": {"tool_calls": [{"function": 1}]}}]}',
        '{"choices": [{"delta": {"tool_calls": [{"id": 1}]}}]}', '{"choices": [{"finish_reason": {"a": 1}}]}',
    ],
)  # fmt: skip
def test_garbage_is_refused(garbage: str) -> None:
    with pytest.raises(ChunkError):
        decode(garbage)


@pytest.mark.parametrize(
    "told",
    [
        {"error": {"message": "no"}},
        {"error": "no"},
        {"object": "error", "message": "no"},
        chunk({"content": ""}, "error") | {"error": {"code": 502, "message": "no"}},
    ],
)
def test_an_error_object_is_told(told: Any) -> None:
    with pytest.raises(ToldError):
        decode(told)


def test_an_event_of_type_error_is_an_error_whatever_it_looks_like() -> None:
    with pytest.raises(ToldError) as told:
        ChunkDecoder().decode('{"message": "no"}', [], is_error=True)

    assert told.value.error == {"message": "no"}


def test_an_error_that_is_null_is_none() -> None:
    assert decode(chunk({"content": "a"}, "stop", error=None))[0] == TextDelta("a")
