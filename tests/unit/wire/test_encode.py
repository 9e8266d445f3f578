"""The wire's JSON, against the tables that clients read."""

import datetime as dt
import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

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
    Gap,
    Outage,
    RunQueued,
    RunStarted,
    SessionClosed,
    SessionCreated,
    UserMessage,
)
from bamboo.core.types import (
    Accepted,
    Content,
    Cursor,
    Epoch,
    ImagePart,
    MessageId,
    RunId,
    RunStats,
    RunStatus,
    SessionId,
    StopReceipt,
    TextPart,
    ToolCall,
    ToolCallId,
    Usage,
    text_content,
)
from bamboo.errors import RETRYABLE, BambooError, ClientError, ErrorCode, StoreError, UpstreamError
from bamboo.wire.encode import (
    HTTP_STATUS,
    CloseCode,
    accepted_fields,
    content_json,
    dumps,
    error_fields,
    event_json,
    gap_fields,
    item_json,
    public_error,
    receipt_fields,
    timestamp,
)

MESSAGE, CALL = MessageId("msg_1"), ToolCallId("call_1")
HELLO = text_content("hello")
PARTS = (
    TextPart("what is this?"),
    ImagePart("https://example.org/x.png", "low"),
    ImagePart("data:image/png;base64,AA"),
)
PARTS_JSON = [
    {"type": "text", "text": "what is this?"},
    {"type": "image_url", "image_url": {"url": "https://example.org/x.png", "detail": "low"}},
    {"type": "image_url", "image_url": {"url": "data:image/png;base64,AA"}},
]


def result(**more: Any) -> AgentToolComplete:
    return AgentToolComplete(MESSAGE, CALL, "look", ok=True, result="ok", elapsed_ms=7, **more)


RESULT_JSON = {"tool_call_id": "call_1", "tool": "look", "ok": True, "result": "ok", "elapsed_ms": 7}

GOLDEN: list[tuple[EventBody, dict[str, Any]]] = [
    (SessionCreated(), {}),
    (SessionCreated("a title"), {"title": "a title"}),
    (UserMessage(MESSAGE, HELLO), {"message_id": "msg_1", "content": "hello"}),
    (
        UserMessage(MESSAGE, PARTS, "mine"),
        {"message_id": "msg_1", "content": PARTS_JSON, "client_message_id": "mine"},
    ),
    (RunQueued(2), {"position": 2}),
    (RunStarted("openai", "gpt", 3), {"provider": "openai", "model": "gpt", "skills_revision": 3}),
    (AgentToken(" Hé\n"), {"token": " Hé\n"}),
    (AgentReasoning("hm"), {"token": "hm"}),
    (
        AgentRetry(1, "openai", "provider_error", 250),
        {"attempt": 1, "provider": "openai", "code": "provider_error", "delay_ms": 250},
    ),
    (
        AgentMessage(MESSAGE, HELLO, "openai", "gpt"),
        {"message_id": "msg_1", "content": "hello", "provider": "openai", "model": "gpt"},
    ),
    (
        AgentMessage(MESSAGE, text_content(""), "openai", "gpt", (ToolCall(CALL, "look", '{"x":'),), partial=True),
        {
            "message_id": "msg_1",
            "content": "",
            "tool_calls": [{"tool_call_id": "call_1", "tool": "look", "arguments": '{"x":'}],
            "provider": "openai",
            "model": "gpt",
            "partial": True,
        },
    ),
    (AgentToolStart(CALL, "look", {"x": [1]}), {"tool_call_id": "call_1", "tool": "look", "arguments": {"x": [1]}}),
    (result(), RESULT_JSON),
    (result(truncated=True), RESULT_JSON | {"truncated": True}),
    (result(status="stopped"), RESULT_JSON | {"status": "stopped"}),
    (result(status="uncertain"), RESULT_JSON | {"status": "uncertain"}),
    (result(status="denied"), RESULT_JSON | {"status": "denied"}),
    (
        ApprovalRequired("ap_1", CALL, "write", {"path": "x"}, 1_000),
        {
            "approval_id": "ap_1",
            "tool_call_id": "call_1",
            "tool": "write",
            "arguments": {"path": "x"},
            "expires_at": "1970-01-01T00:00:01.000Z",
        },
    ),
    (ApprovalResolved("ap_1", "expired"), {"approval_id": "ap_1", "decision": "expired"}),
    (
        AgentComplete("stop", Usage(3, 4, 7), RunStats(1, 2, 3)),
        {
            "finish_reason": "stop",
            "usage": {"prompt_tokens": 3, "completion_tokens": 4, "total_tokens": 7},
            "stats": {"queue_ms": 1, "ttft_ms": 2, "elapsed_ms": 3},
        },
    ),
    (
        AgentComplete("stop", None, RunStats(0, None, 3)),
        {"finish_reason": "stop", "usage": None, "stats": {"queue_ms": 0, "ttft_ms": None, "elapsed_ms": 3}},
    ),
    (
        AgentError(ErrorCode.IDLE_TIMEOUT, "silent", retryable=True),
        {"code": "idle_timeout", "message": "silent", "retryable": True},
    ),
    (AgentStopped("superseded"), {"reason": "superseded"}),
    (SessionClosed(), {}),
]


def at_place(body: EventBody, run_id: str | None = "run_1") -> Event:
    run = None if run_id is None else RunId(run_id)
    return Event(SessionId("ses_1"), Epoch("ep"), 12, 1_700_000_000_005, run, body)


ENVELOPE = {
    "session_id": "ses_1",
    "seq": 12,
    "cursor": "ep.12",
    "time": "2023-11-14T22:13:20.005Z",
    "run_id": "run_1",
}


@pytest.mark.parametrize(("body", "fields"), GOLDEN, ids=[body.type for body, _ in GOLDEN])
def test_event_has_its_envelope_and_exactly_the_fields_of_its_row(body: EventBody, fields: dict[str, Any]) -> None:
    assert json.loads(event_json(at_place(body))) == ENVELOPE | fields | {"type": body.type}


def test_every_event_type_has_a_row() -> None:
    rows = (
        "session_created user_message run_queued run_started agent_token agent_reasoning agent_retry agent_message "
        "agent_tool_start agent_tool_complete approval_required approval_resolved agent_complete agent_error "
        "agent_stopped session_closed"
    )
    assert {body.type for body, _ in GOLDEN} == set(rows.split())
    assert {type(body) for body, _ in GOLDEN} == set(EventBody.__args__)


def test_event_of_no_run_names_none() -> None:
    fields = json.loads(event_json(at_place(SessionClosed(), None)))
    assert fields == {key: value for key, value in ENVELOPE.items() if key != "run_id"} | {"type": "session_closed"}


def test_event_is_encoded_once_however_often_it_is_asked_for() -> None:
    event = at_place(AgentToken("x"))
    assert event.encoded is None
    first = event_json(event)
    assert event_json(event) is first
    assert item_json(event) is first
    assert event.encoded is first


def test_event_read_later_is_the_same_bytes_as_live() -> None:
    for body, _ in GOLDEN:
        assert event_json(at_place(body)) == event_json(at_place(body))


def test_json_is_one_line_of_utf8() -> None:
    encoded = event_json(at_place(AgentToken("a\r\nb\u2028é😀")))
    assert b"\n" not in encoded
    assert b"\r" not in encoded
    assert "é😀".encode() in encoded


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (HELLO, "hello"),
        (text_content(""), ""),
        (PARTS, PARTS_JSON),
        ((TextPart("a"), TextPart("b")), [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]),
        (PARTS[2:], PARTS_JSON[2:]),
    ],
)
def test_content_is_a_string_where_it_is_one_text_else_a_list(content: Content, expected: object) -> None:
    assert content_json(content) == expected


@pytest.mark.parametrize(
    ("time_ms", "expected"),
    [
        (0, "1970-01-01T00:00:00.000Z"),
        (7, "1970-01-01T00:00:00.007Z"),
        (999, "1970-01-01T00:00:00.999Z"),
        (1_000, "1970-01-01T00:00:01.000Z"),
        (1_709_251_199_999, "2024-02-29T23:59:59.999Z"),
        (4_102_444_800_010, "2100-01-01T00:00:00.010Z"),
    ],
)
def test_time_is_rfc_3339_in_utc_with_milliseconds(time_ms: int, expected: str) -> None:
    assert timestamp(time_ms) == expected


@given(st.integers(0, 253_402_300_799_999))
def test_time_comes_back_from_its_text(time_ms: int) -> None:
    text = timestamp(time_ms)
    assert len(text) == len("2024-02-29T23:59:59.999Z")
    epoch = dt.datetime(1970, 1, 1, tzinfo=dt.UTC)
    assert dt.datetime.fromisoformat(text) - epoch == dt.timedelta(milliseconds=time_ms)


def test_gap_names_what_is_missing_and_where_it_goes_on() -> None:
    gap = Gap(SessionId("ses_1"), 4, 9, "crash", Cursor(Epoch("ep"), 3))
    expected = {
        "type": "gap",
        "session_id": "ses_1",
        "from_seq": 4,
        "to_seq": 9,
        "reason": "crash",
        "cursor": "ep.3",
    }
    assert gap_fields(gap) == expected
    assert json.loads(item_json(gap)) == expected
    unknown = Gap(SessionId("ses_1"), None, None, "epoch", Cursor(Epoch("ep"), 0))
    assert json.loads(item_json(unknown)) == expected | {
        "from_seq": None,
        "to_seq": None,
        "reason": "epoch",
        "cursor": "ep.0",
    }


@pytest.mark.parametrize("retry_after_s", [1.5, None])
def test_outage_is_an_error_frame_that_names_its_session_and_no_place(retry_after_s: float | None) -> None:
    told = json.loads(item_json(Outage(SessionId("ses_1"), "the disk is full", retry_after_s)))
    expected = {
        "type": "error",
        "code": "store_unavailable",
        "message": "the disk is full",
        "retryable": True,
        "session_id": "ses_1",
    }
    assert told == expected | ({} if retry_after_s is None else {"retry_after_ms": 1500})


def test_acceptance_has_the_fields_of_its_row() -> None:
    accepted = Accepted(SessionId("ses_1"), RunId("run_1"), MESSAGE, RunStatus.QUEUED, "queued", Cursor(Epoch("ep"), 0))
    assert json.loads(dumps(accepted_fields(accepted))) == {
        "session_id": "ses_1",
        "run_id": "run_1",
        "message_id": "msg_1",
        "status": "queued",
        "accepted_as": "queued",
        "cursor": "ep.0",
    }


def test_receipt_of_a_stop_has_the_fields_of_its_row() -> None:
    receipt = StopReceipt((RunId("run_1"), RunId("run_2")), 3, 12, Cursor(Epoch("ep"), 9))
    assert json.loads(dumps(receipt_fields(receipt))) == {
        "stopped": ["run_1", "run_2"],
        "tools_stopped": 3,
        "elapsed_ms": 12,
    }


# Errors

# Code → HTTP status (None: it only ever ends a run), retryable; as the table for clients has them.
ERROR_TABLE: dict[str, tuple[int | None, bool]] = {
    "invalid_request": (400, False),
    "invalid_cursor": (400, False),
    "unauthorized": (401, False),
    "forbidden": (403, False),
    "not_found": (404, False),
    "session_not_found": (404, False),
    "run_not_found": (404, False),
    "approval_not_found": (404, False),
    "model_not_found": (404, False),
    "method_not_allowed": (405, False),
    "too_large": (413, False),
    "unsupported_media_type": (415, False),
    "busy": (409, False),
    "idempotency_conflict": (409, False),
    "already_subscribed": (409, False),
    "overloaded": (429, True),
    "draining": (503, True),
    "starting": (503, True),
    "store_unavailable": (503, True),
    "provider_unreachable": (502, True),
    "provider_connect_timeout": (502, True),
    "provider_auth": (502, False),
    "provider_rejected": (502, False),
    "provider_rate_limited": (502, True),
    "provider_error": (502, True),
    "provider_protocol": (502, True),
    "first_token_timeout": (504, True),
    "idle_timeout": (504, True),
    "run_timeout": (None, False),
    "queue_timeout": (None, False),
    "budget_exceeded": (None, False),
    "loop_detected": (None, False),
    "interrupted": (None, True),
    "internal": (500, False),
    # The gateway's own: errors of a client's frame.
    "invalid_message": (400, False),
    "not_connected": (400, False),
    "unknown_command": (400, False),
}


def test_table_of_error_codes_is_whole() -> None:
    assert set(ERROR_TABLE) == {code.value for code in ErrorCode}
    assert set(HTTP_STATUS) == set(ErrorCode)


@pytest.mark.parametrize("code", list(ErrorCode))
def test_error_code_has_the_status_and_the_retryable_of_its_row(code: ErrorCode) -> None:
    status, retryable = ERROR_TABLE[code.value]
    assert HTTP_STATUS[code] == (500 if status is None else status)
    assert (code in RETRYABLE) is retryable
    assert BambooError(code, "x").retryable is retryable


def test_error_is_told_with_what_is_known_of_it_and_no_more() -> None:
    assert json.loads(dumps(error_fields(ClientError(ErrorCode.BUSY, "a run is running")))) == {
        "code": "busy",
        "message": "a run is running",
        "retryable": False,
    }
    full = ClientError(ErrorCode.OVERLOADED, "full", retry_after_s=1.25, session_id="ses_1", run_id="run_1")
    assert json.loads(dumps(error_fields(full))) == {
        "code": "overloaded",
        "message": "full",
        "retryable": True,
        "retry_after_ms": 1_250,
        "session_id": "ses_1",
        "run_id": "run_1",
    }


def test_time_to_come_back_may_be_at_once() -> None:
    assert error_fields(ClientError(ErrorCode.OVERLOADED, "x", retry_after_s=0.0))["retry_after_ms"] == 0


def test_store_error_says_when_to_come_back() -> None:
    error = StoreError("disk full")
    assert (error.code, error.retryable, error.blame) == (ErrorCode.STORE_UNAVAILABLE, True, "server")
    assert error_fields(error)["retry_after_ms"] == 1_000


def test_errors_say_whose_doing_it_is() -> None:
    assert ClientError(ErrorCode.BUSY, "x").blame == "client"
    assert UpstreamError(ErrorCode.PROVIDER_ERROR, "x").blame == "upstream"
    assert BambooError(ErrorCode.INTERNAL, "x").blame == "server"
    assert str(ClientError(ErrorCode.BUSY, "told")) == "told"


def test_error_of_ours_is_told_as_it_is() -> None:
    error = UpstreamError(ErrorCode.PROVIDER_AUTH, "the key was refused")
    assert public_error(error) is error


def test_any_other_exception_is_internal_and_says_nothing_of_the_inside() -> None:
    told = public_error(RuntimeError("SECRET"))
    assert (told.code, told.retryable) == (ErrorCode.INTERNAL, False)
    assert "SECRET" not in repr(error_fields(told))


def test_close_codes_are_those_of_the_table() -> None:
    codes = {name: code for name, code in vars(CloseCode).items() if not name.startswith("_")}
    assert codes == {
        "GOING_AWAY": 1001,
        "MESSAGE_TOO_BIG": 1009,
        "TRY_AGAIN_LATER": 1013,
        "UNAUTHORIZED": 4401,
        "CONNECT_TIMEOUT": 4408,
        "TOO_MANY_ERRORS": 4429,
        "INTERNAL": 4500,
        "HEARTBEAT_LOST": 4502,
    }


def test_what_json_cannot_hold_is_a_typeerror() -> None:
    with pytest.raises(TypeError):
        dumps({"x": object()})
    with pytest.raises(TypeError):
        dumps("\ud800")
