"""JSON that is meant to hurt: deep, wide, huge, doubled. It is refused, or taken and can be sent again."""

from typing import Any

import orjson
import pytest

from bamboo.errors import ClientError
from bamboo.wire.frames import ChatFrame, FrameError, PingFrame, parse_frame, pong_frame
from bamboo.wire.schemas import MAX_JSON_VALUES, ChatRequest, Schema, SessionPatch, validate

MEGABYTE = 1 << 20


def filled(before: str, item: str, after: str) -> str:
    """About a megabyte of items in a list."""
    return before + ",".join([item] * (MEGABYTE // (len(item) + 1))) + after


@pytest.mark.parametrize(
    "text",
    [
        "[" * MEGABYTE,
        "[" * (MEGABYTE // 2) + "]" * (MEGABYTE // 2),
        '{"a":' * (MEGABYTE // 5),
        '{"type":"ping","x":' + "[" * 2000 + "]" * 2000 + "}",
        '{"type":"chat","content":' + "[" * 900 + "]" * 900 + "}",
        '{"type":"ping","timestamp":' + "9" * MEGABYTE + "}",
        '{"type":"ping","timestamp":1e400}',
        '{"type":"ping","timestamp":-1e400}',
        '{"type":"ping","timestamp":Infinity}',
        '{"type":"ping","ref":' + "9" * 400 + "}",
        '{"type":"ping","ref":1e2}',
        '{"type":"ping","ref":9007199254740993}',
        '{"type":"ping","ref":"' + "x" * 257 + '"}',
        '{"type":"subscribe","session_id":"s\\u0000"}',
        '{"type":"subscribe","session_id":"s\\n"}',
        '{"type":"chat","content":"\\ud800"}',
        '{"type":"chat","content":"x","metadata":{"\\udfff":1}}',
        '{"type":"chat","content":"x","client_message_id":"' + "x" * 257 + '"}',
        '{"type":"ping"',
        '{"type":"ping"}{"type":"ping"}',
        '{"type":"ping",}',
        '\ufeff{"type":"ping"}',
        filled('{"type":"chat","content":[', "{}", "]}"),
        filled('{"type":"chat","content":[', '"x"', "]}"),
        filled('{"type":"chat","content":"x","metadata":{"x":[', "[]", "]}}"),
    ],
    ids=lambda text: f"{text[:40]} {len(text)}",
)
def test_what_is_no_frame_is_refused_in_a_short_sentence(text: str) -> None:
    with pytest.raises(FrameError) as caught:
        parse_frame(text)
    assert len(caught.value.message) < 500


@pytest.mark.parametrize(
    ("text", "timestamp"),
    [
        ('{"type":"ping","timestamp":18446744073709551616}', 2.0**64),
        ('{"type":"ping","timestamp":1e308}', 1e308),
        ('{"type":"ping","timestamp":5e-324}', 5e-324),
        ('{"type":"ping","timestamp":1,"timestamp":2}', 2),
        ('{"type":"chat","type":"ping","timestamp":"\\u0000"}', "\0"),
        ('{"type":"ping","timestamp":"\\ud83d\\ude00"}', "\U0001f600"),
        (filled('{"type":"ping","timestamp":1,"x":[', "[]", "]}"), 1),
        (filled('{"type":"ping","timestamp":1,"x":[', '{"a":1}', "]}"), 1),
        (" " * MEGABYTE + '{"type":"ping","timestamp":1}', 1),
    ],
    ids=lambda value: str(value)[:40],
)
def test_what_is_odd_but_a_frame_is_taken_and_echoed(text: str, timestamp: object) -> None:
    frame = parse_frame(text)
    assert isinstance(frame, PingFrame)
    assert orjson.loads(pong_frame(frame.timestamp, frame.ref))["timestamp"] == timestamp


def test_a_nul_in_a_text_is_a_character() -> None:
    frame = parse_frame('{"type":"chat","content":"a\\u0000b","metadata":{"\\u0000":"\\u0000"}}')
    assert isinstance(frame, ChatFrame)
    assert (frame.content, frame.metadata) == ("a\0b", {"\0": "\0"})


def with_values(count: int, shape: str) -> dict[str, Any]:
    """An object of `count` values, all told."""
    if shape == "keys":
        return {str(n): n for n in range(count)}
    if shape == "a list":
        return {"x": [1] * (count - 1)}
    return {"x": [[[]]] * ((count - 1) // 2), **({} if count % 2 else {"y": 0})}


@pytest.mark.parametrize("shape", ["keys", "a list", "lists in a list"])
@pytest.mark.parametrize("field", ["params", "metadata"])
@pytest.mark.parametrize("schema", [ChatRequest, SessionPatch])
def test_an_object_that_is_kept_has_so_many_values_at_most(schema: type[Schema], field: str, shape: str) -> None:
    most = with_values(MAX_JSON_VALUES, shape)
    assert getattr(validate(schema, {"message": "x", field: most}), field) == most
    with pytest.raises(ClientError) as caught:
        validate(schema, {"message": "x", field: with_values(MAX_JSON_VALUES + 1, shape)})
    assert caught.value.message == f"{field}: Input should not have more than {MAX_JSON_VALUES} values"
