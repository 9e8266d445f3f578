"""What comes in: strict, named where it is wrong, never echoed."""

import traceback
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

import orjson
import pytest
from hypothesis import given
from hypothesis import strategies as st

from bamboo.core.types import MAX_JSON_DEPTH, Chat, Content, Cursor, Epoch, ImagePart, SessionId, TextPart
from bamboo.errors import ClientError, ErrorCode
from bamboo.wire.schemas import (
    ChatRequest,
    Schema,
    SchemaT,
    SessionPatch,
    StopRequest,
    decode_object,
    parse_cursor,
    parse_run_id,
    parse_session_id,
    validate,
)

SECRET = "sk-SECRET"

T = TypeVar("T")


def refused(schema: type[Schema], value: Mapping[str, Any]) -> str:
    """The message of the refusal, which nowhere holds the secret."""
    with pytest.raises(ClientError) as caught:
        validate(schema, value)
    assert caught.value.code is ErrorCode.INVALID_REQUEST
    assert SECRET not in caught.value.message
    assert SECRET not in "".join(traceback.format_exception(caught.value)), "logged with its causes"
    return caught.value.message


def outcome(function: Callable[..., T], *arguments: object) -> T | ClientError:
    try:
        return function(*arguments)
    except ClientError as error:
        return error


def accepted(value: Mapping[str, Any]) -> Chat:
    request = validate(ChatRequest, {"message": "hello", **value})
    return request.chat(request.message)


def again(schema: type[SchemaT], value: Mapping[str, Any]) -> SchemaT:
    return validate(schema, orjson.loads(orjson.dumps(value)))


# Chat


def test_chat_that_says_only_its_message_leaves_the_rest_to_the_defaults() -> None:
    assert accepted({}) == Chat((TextPart("hello"),))


def test_chat_that_says_everything_is_taken_over_as_it_is() -> None:
    request = again(
        ChatRequest,
        {
            "message": [{"type": "text", "text": "hi"}, {"type": "image_url", "image_url": {"url": "https://e.org/x"}}],
            "session_id": "my:session",
            "model": "gpt",
            "provider": "openai",
            "on_busy": "interrupt",
            "on_disconnect": {"cancel_after_s": 2.5},
            "system_prompt": "be brief",
            "params": {"temperature": 0.5, "stop": ["x", None]},
            "client_message_id": "mine",
            "metadata": {"a": {"b": [1]}},
        },
    )
    assert request.chat(request.message) == Chat(
        (TextPart("hi"), ImagePart("https://e.org/x")),
        session_id=SessionId("my:session"),
        model="gpt",
        provider="openai",
        on_busy="interrupt",
        cancel_after_s=2.5,
        system_prompt="be brief",
        params={"temperature": 0.5, "stop": ["x", None]},
        client_message_id="mine",
        idempotency_key="mine",
        metadata={"a": {"b": [1]}},
    )


def test_null_is_the_same_as_not_said() -> None:
    names = ("session_id", "model", "provider", "system_prompt", "params", "client_message_id", "metadata")
    assert accepted(dict.fromkeys(names)) == accepted({})


def test_unknown_fields_are_ignored() -> None:
    assert accepted({"later": 1, "message_id": "x", "__class__": {}}) == accepted({})
    part = {"type": "text", "text": "x", "cache_control": {}}
    assert accepted({"message": [part]}).content == (TextPart("x"),)


def test_idempotency_key_of_the_header_wins_over_the_clients_message_id() -> None:
    request = validate(ChatRequest, {"message": "x", "client_message_id": "mine"})
    assert request.chat(request.message).idempotency_key == "mine"
    chat = request.chat(request.message, idempotency_key="header")
    assert (chat.idempotency_key, chat.client_message_id) == ("header", "mine")


@pytest.mark.parametrize(
    ("message", "content"),
    [
        ("x", (TextPart("x"),)),
        (" ", (TextPart(" "),)),
        ("é😀\u0000", (TextPart("é😀\u0000"),)),
        ([{"type": "text", "text": "a"}, {"type": "text", "text": "b"}], (TextPart("a"), TextPart("b"))),
        (
            [{"type": "image_url", "image_url": {"url": "data:image/png;base64,AA", "detail": "high"}}],
            (ImagePart("data:image/png;base64,AA", "high"),),
        ),
        ([{"type": "image_url", "image_url": {"url": "http://e.org", "detail": None}}], (ImagePart("http://e.org"),)),
    ],
)
def test_message_is_a_text_or_a_list_of_parts(message: object, content: Content) -> None:
    assert accepted({"message": message}).content == content


TEXT = {"type": "text", "text": "x"}


@pytest.mark.parametrize(
    ("message", "field"),
    [
        (None, "message"),
        (5, "message"),
        (True, "message"),
        ("", "message"),
        ([], "message"),
        ([TEXT] * 257, "message"),
        ({"type": "text", "text": SECRET}, "message"),
        ([SECRET], "message.0"),
        ([TEXT, {}], "message.1"),
        ([{"type": SECRET}], "message.0"),
        ([{"type": 5, "text": SECRET}], "message.0"),
        ([{"type": [SECRET]}], "message.0"),
        ([{"type": "text"}], "message.0.text"),
        ([{"type": "text", "text": ""}], "message.0.text"),
        ([{"type": "text", "text": [SECRET]}], "message.0.text"),
        ([TEXT, {"type": "image_url"}], "message.1.image_url"),
        ([{"type": "image_url", "image_url": SECRET}], "message.0.image_url"),
        ([{"type": "image_url", "image_url": {}}], "message.0.image_url.url"),
        ([{"type": "image_url", "image_url": {"url": "file:///" + SECRET}}], "message.0.image_url.url"),
        ([{"type": "image_url", "image_url": {"url": "javascript:" + SECRET}}], "message.0.image_url.url"),
        ([{"type": "image_url", "image_url": {"url": "data:text/html," + SECRET}}], "message.0.image_url.url"),
        ([{"type": "image_url", "image_url": {"url": "\nhttps://" + SECRET}}], "message.0.image_url.url"),
        (
            [{"type": "image_url", "image_url": {"url": "https://e.org", "detail": SECRET}}],
            "message.0.image_url.detail",
        ),
    ],
)
def test_message_of_another_form_is_refused_by_its_path(message: object, field: str) -> None:
    problems = refused(ChatRequest, {"message": message}).split("; ")
    assert {problem.partition(": ")[0] for problem in problems} == {field}


def test_message_that_is_missing_is_named() -> None:
    assert refused(ChatRequest, {"text": SECRET}) == "message: Field required"


@pytest.mark.parametrize(
    ("given", "cancel_after_s"),
    [
        ("continue", None),
        ({"cancel_after_s": 0}, 0.0),
        ({"cancel_after_s": 30}, 30.0),
        ({"cancel_after_s": 0.25}, 0.25),
        ({"cancel_after_s": 604_800, "later": 1}, 604_800.0),
    ],
)
def test_on_disconnect_is_continue_or_a_number_of_seconds(given: object, cancel_after_s: float | None) -> None:
    assert accepted({"on_disconnect": given}).cancel_after_s == cancel_after_s


@pytest.mark.parametrize(
    ("given", "field"),
    [
        (SECRET, "on_disconnect"),
        ("CONTINUE", "on_disconnect"),
        (None, "on_disconnect"),
        (5, "on_disconnect"),
        ([], "on_disconnect"),
        ({}, "on_disconnect.cancel_after_s"),
        ({"cancel_after_s": None}, "on_disconnect.cancel_after_s"),
        ({"cancel_after_s": SECRET}, "on_disconnect.cancel_after_s"),
        ({"cancel_after_s": "5"}, "on_disconnect.cancel_after_s"),
        ({"cancel_after_s": True}, "on_disconnect.cancel_after_s"),
        ({"cancel_after_s": -0.001}, "on_disconnect.cancel_after_s"),
        ({"cancel_after_s": 604_801}, "on_disconnect.cancel_after_s"),
        ({"cancel_after_s": float("nan")}, "on_disconnect.cancel_after_s"),
        ({"cancel_after_s": float("inf")}, "on_disconnect.cancel_after_s"),
    ],
)
def test_on_disconnect_of_another_form_is_refused(given: object, field: str) -> None:
    problems = refused(ChatRequest, {"message": "x", "on_disconnect": given}).split("; ")
    assert {problem.partition(": ")[0] for problem in problems} == {field}


STRICT: list[tuple[str, object]] = [
    ("session_id", 5),
    ("session_id", ""),
    ("session_id", "a b"),
    ("session_id", "../" + SECRET),
    ("session_id", SECRET + "\n"),
    ("session_id", "x" * 129),
    ("session_id", "é"),
    ("model", ""),
    ("model", 5),
    ("model", "x" * 257),
    ("model", [SECRET]),
    ("provider", ""),
    ("provider", {"name": SECRET}),
    ("on_busy", None),
    ("on_busy", SECRET),
    ("on_busy", True),
    ("system_prompt", 5),
    ("system_prompt", [SECRET]),
    ("params", SECRET),
    ("params", [SECRET]),
    ("params", 1),
    ("metadata", SECRET),
    ("metadata", [[SECRET]]),
    ("client_message_id", ""),
    ("client_message_id", 7),
    ("client_message_id", SECRET * 100),
]


@pytest.mark.parametrize(("field", "given"), STRICT)
def test_field_of_the_wrong_kind_is_refused_by_name(field: str, given: object) -> None:
    message = refused(ChatRequest, {"message": "x", field: given})
    assert message.startswith(f"{field}: ")
    assert ";" not in message


def test_few_problems_are_told_however_many_there_are() -> None:
    message = refused(ChatRequest, {"message": "x", "model": 1, "provider": 1, "session_id": 1, "params": 1})
    assert len(message.split("; ")) == 3
    parts = refused(ChatRequest, {"message": [{"type": "text", "text": SECRET * 3, "x": 1}] + [{"type": SECRET}] * 99})
    assert len(parts) < 400


def nested(depth: int) -> dict[str, Any]:
    value: dict[str, Any] = {}
    for _ in range(depth - 1):
        value = {"a": value}
    return value


@pytest.mark.parametrize("field", ["params", "metadata"])
@pytest.mark.parametrize("schema", [ChatRequest, SessionPatch])
def test_object_that_is_kept_can_be_sent_again_or_is_refused(schema: type[Schema], field: str) -> None:
    kept = again(schema, {"message": "x", field: nested(MAX_JSON_DEPTH)}).model_dump()[field]
    assert orjson.loads(orjson.dumps({"sessions": [{field: kept}]})) == {"sessions": [{field: nested(MAX_JSON_DEPTH)}]}
    message = refused(schema, {"message": "x", field: nested(MAX_JSON_DEPTH + 1)})
    assert message == f"{field}: Input should not be nested deeper than {MAX_JSON_DEPTH} levels"


ANYTHING = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**63), 2**63 - 1) | st.floats(allow_nan=False) | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=8,
)
FIELDS = [*ChatRequest.model_fields, "title", "run_id"]
PARTS = st.lists(
    st.fixed_dictionaries(
        {}, optional={"type": st.sampled_from(["text", "image_url"]), "text": ANYTHING, "image_url": ANYTHING}
    ),
    max_size=3,
)


@given(
    st.sampled_from([ChatRequest, SessionPatch, StopRequest]),
    st.dictionaries(st.sampled_from(FIELDS), ANYTHING | PARTS, max_size=4),
)
def test_any_object_is_taken_or_refused_and_never_breaks(schema: type[Schema], value: dict[str, Any]) -> None:
    taken = outcome(validate, schema, value)
    if isinstance(taken, ClientError):
        assert taken.code is ErrorCode.INVALID_REQUEST
        field = taken.message.partition(":")[0]
        assert field == "body" or field.split(".")[0] in schema.model_fields
    else:
        assert isinstance(taken, schema)


# The other requests


def test_stop_names_a_run_or_none() -> None:
    assert validate(StopRequest, {}).run_id is None
    assert validate(StopRequest, {"run_id": "run_1"}).run_id == "run_1"
    assert refused(StopRequest, {"run_id": 5}).startswith("run_id: ")
    assert refused(StopRequest, {"run_id": ""}).startswith("run_id: ")


def test_patch_changes_what_is_said_and_unsets_what_is_null() -> None:
    assert validate(SessionPatch, {"title": "new", "model": None}).changes() == {"title": "new", "model": None}
    assert validate(SessionPatch, {"params": {"a": 1}}).changes() == {"params": {"a": 1}}


@pytest.mark.parametrize("value", [{}, {"later": SECRET}])
def test_patch_that_changes_nothing_is_refused(value: dict[str, Any]) -> None:
    message = refused(SessionPatch, value)
    assert message == (
        "body: nothing to change: give at least one of title, model, provider, system_prompt, params, metadata"
    )


@pytest.mark.parametrize(
    ("field", "given"),
    [("title", "x" * 513), ("title", 5), ("model", ""), ("provider", 5), ("system_prompt", 5), ("params", [SECRET])],
)
def test_patch_is_as_strict_as_a_chat(field: str, given: object) -> None:
    assert refused(SessionPatch, {field: given}).startswith(f"{field}: ")


# Bodies


def test_body_is_a_json_object() -> None:
    assert decode_object(b'{"a": [1, "\xc3\xa9"]}') == {"a": [1, "é"]}
    assert decode_object('{"a": "\\ud83d\\ude00"}') == {"a": "😀"}


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b" ",
        b"{",
        b"[]",
        b"null",
        b"5",
        b'"' + SECRET.encode() + b'"',
        b"{'a': 1}",
        b'{"a": sk-SECRET}',
        b'{"sk-SECRET": tru}',
        b'{"a": 1} sk-SECRET',
        b'{"a": NaN}',
        b'{"a": Infinity}',
        b'{"a": 1e999}',
        b'{"a": "\\ud800"}',
        b'{"\\udfff": 1}',
        b"\xff\xfe{}",
        b"\xef\xbb\xbf{}",
        b'{"a": "\xed\xa0\x80"}',
        b'{"a": "sk-SECRET\xff"}',
        '{"a": "\ud800"}',
        b'{"a": "sk-SECRET',
        b'{"a":' + b"[" * 100_000 + b"]" * 100_000 + b"}",
    ],
)
def test_body_that_is_none_is_refused_without_an_echo(body: bytes | str) -> None:
    with pytest.raises(ClientError) as caught:
        decode_object(body)
    assert caught.value.code is ErrorCode.INVALID_REQUEST
    assert caught.value.message.startswith("the body ")
    assert SECRET not in caught.value.message
    assert SECRET not in "".join(traceback.format_exception(caught.value))
    orjson.dumps(caught.value.message)


@given(st.binary(max_size=60))
def test_any_bytes_are_an_object_or_an_invalid_request(body: bytes) -> None:
    decoded = outcome(decode_object, body)
    assert isinstance(decoded, dict) or decoded.code is ErrorCode.INVALID_REQUEST


# Ids and cursors


def test_cursor_is_taken_apart() -> None:
    assert parse_cursor("ep-0_Z.12") == Cursor(Epoch("ep-0_Z"), 12)
    assert parse_cursor("e.0").seq == 0


@given(st.text(max_size=60) | st.from_regex(r"[A-Za-z0-9_-]{0,40}\.[0-9]{0,40}"))
def test_any_text_is_a_cursor_or_an_invalid_cursor(text: str) -> None:
    cursor = outcome(parse_cursor, text)
    if isinstance(cursor, ClientError):
        assert cursor.code is ErrorCode.INVALID_CURSOR
        assert cursor.message == "a cursor looks like <epoch>.<seq>"
    else:
        assert str(cursor) == text
        assert 0 <= cursor.seq < 10**18
        assert 1 <= len(cursor.epoch) <= 32


@pytest.mark.parametrize("text", ["e.1\n", "e.٣", "e.-1", "e.9999999999999999999", "e. 1", SECRET, "0"])
def test_absurd_cursor_is_refused_without_an_echo(text: str) -> None:
    with pytest.raises(ClientError) as caught:
        parse_cursor(text)
    assert caught.value.code is ErrorCode.INVALID_CURSOR
    assert SECRET not in "".join(traceback.format_exception(caught.value))


def test_ids_of_a_path_have_the_form_of_ids() -> None:
    assert parse_session_id("a.b_c:d-9") == "a.b_c:d-9"
    assert parse_run_id("run_1") == "run_1"


@pytest.mark.parametrize("text", ["", "a b", "a/b", "a\n", "é", "x" * 129, "a\x00", SECRET + "?"])
def test_what_can_be_no_id_is_refused_as_the_call_says(text: str) -> None:
    with pytest.raises(ClientError) as session:
        parse_session_id(text)
    assert session.value.code is ErrorCode.INVALID_REQUEST
    assert session.value.message.startswith("session_id: ")
    with pytest.raises(ClientError) as run:
        parse_run_id(text)
    assert run.value.code is ErrorCode.RUN_NOT_FOUND
    assert SECRET not in session.value.message + run.value.message
