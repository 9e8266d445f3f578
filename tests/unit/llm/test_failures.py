"""What a provider's failure is called."""

import json
from collections.abc import Mapping
from typing import Any

import httpx
import pytest

from bamboo.errors import ErrorCode
from bamboo.llm.base import RequestRejectedError
from bamboo.llm.failures import Redactor, body_text, connect_error, retry_after_s, status_error, told_error

NOW_S = 1_700_000_000.0  # Tue, 14 Nov 2023 22:13:20 GMT


@pytest.mark.parametrize(
    ("status", "code"),
    [
        (401, ErrorCode.PROVIDER_AUTH),
        (403, ErrorCode.PROVIDER_AUTH),
        (400, ErrorCode.PROVIDER_REJECTED),
        (404, ErrorCode.PROVIDER_REJECTED),
        (422, ErrorCode.PROVIDER_REJECTED),
        (429, ErrorCode.PROVIDER_RATE_LIMITED),
        (500, ErrorCode.PROVIDER_ERROR),
        (503, ErrorCode.PROVIDER_ERROR),
        (307, ErrorCode.PROVIDER_REJECTED),
        (204, ErrorCode.PROVIDER_PROTOCOL),
    ],
)
def test_every_status_has_its_code(status: int, code: ErrorCode) -> None:
    assert status_error("p", status, "", where="http://x", model="m").code is code


@pytest.mark.parametrize("said", ["", "maximum context length is 8192 tokens", "messages[1].role: invalid value"])
@pytest.mark.parametrize("status", [400, 413, 422])
def test_what_the_request_holds_is_its_own_fault(status: int, said: str) -> None:
    error = status_error("p", status, said, where="http://x", model="m")

    assert isinstance(error, RequestRejectedError)
    assert error.code is ErrorCode.PROVIDER_REJECTED


@pytest.mark.parametrize(
    ("status", "said"),
    [
        (404, "no such model"),
        (402, "Insufficient Balance"),
        (405, ""),
        (410, ""),
        (301, "http://elsewhere"),
        # As Gemini, OpenRouter, DeepSeek and others answer.
        (400, "API key not valid. Please pass a valid API key."),
        (400, "gpt-9 is not a valid model ID"),
        (400, "Model Not Exist"),
        (400, "Invalid model. Please select a different model to continue."),
        (422, "model does not exist"),
    ],
)
def test_a_rejection_for_the_address_the_model_or_the_account_is_no_fault_of_the_request(
    status: int, said: str
) -> None:
    error = status_error("p", status, said, where="http://x", model="m")

    assert error.code is ErrorCode.PROVIDER_REJECTED
    assert not isinstance(error, RequestRejectedError)


@pytest.mark.parametrize(
    ("error", "of_request"),
    [
        ({"code": 400, "message": "too long"}, True),
        ({"code": "context_length_exceeded", "type": "invalid_request_error"}, True),
        ({"type": "content_filter", "message": "m"}, True),
        ({"code": 404, "message": "m"}, False),
        ({"code": 402, "message": "m"}, False),
        ({"code": "model_not_found", "type": "invalid_request_error", "message": "m"}, False),
        ({"code": "invalid_request_error", "message": "Model Not Exist"}, False),
    ],
)
def test_a_rejection_in_a_stream_is_told_apart_in_the_same_way(error: Any, *, of_request: bool) -> None:
    told = told_error("p", error, Redactor(None))

    assert told.code is ErrorCode.PROVIDER_REJECTED
    assert isinstance(told, RequestRejectedError) is of_request


def test_a_missing_model_is_told_with_its_name_and_where() -> None:
    error = status_error("p", 404, "no such model", where="http://x/v1/chat/completions", model="gpt-9")

    assert "gpt-9" in error.message
    assert "http://x/v1/chat/completions" in error.message
    assert "no such model" in error.message


@pytest.mark.parametrize(
    ("headers", "expected"),
    [
        ({"retry-after": "7"}, 7.0),
        ({"retry-after": "0.5"}, 0.5),
        ({"retry-after": "-3"}, 0.0),
        ({"retry-after-ms": "1500", "retry-after": "2"}, 1.5),
        ({"retry-after": "Tue, 14 Nov 2023 22:13:50 GMT"}, 30.0),
        ({"retry-after": "Tue, 14 Nov 2023 22:13:00 GMT"}, 0.0),
        ({"retry-after": "soon"}, None),
        ({"retry-after": "inf"}, None),
        ({"retry-after": "nan"}, None),
        ({"retry-after": ""}, None),
        ({}, None),
    ],
)
def test_retry_after_in_seconds_milliseconds_and_as_a_date(headers: Mapping[str, str], expected: float | None) -> None:
    assert retry_after_s(headers, NOW_S) == expected


@pytest.mark.parametrize(
    ("body", "expected"),
    [
        ({"error": {"message": "why", "type": "x"}}, "why"),
        ({"error": "why"}, "why"),
        ({"message": "why"}, "why"),
        ({"detail": "why"}, "why"),
        ({"detail": [{"loc": ["body"], "message": "why"}]}, "why"),
        ({"error": {"odd": 1}}, '{"odd":1}'),
        ("why", "why"),
        ({"x": 1}, ""),
        ([], ""),
    ],
)
def test_a_providers_own_words_are_found_in_the_shapes_that_are_around(body: Any, expected: str) -> None:
    assert body_text("application/json", json.dumps(body).encode()) == expected


def test_plain_text_is_quoted_and_a_page_is_not() -> None:
    assert body_text("text/plain", b"model not found") == "model not found"
    assert body_text("text/html", b"<html>Bad Gateway") == ""


def test_what_is_quoted_is_one_line_short_and_without_a_key() -> None:
    redactor = Redactor("my-secret")

    quoted = redactor.quote("my-secret is\n wrong, so is sk-proj-ab***yz and Bearer tok_1 " + "x" * 1000)

    assert quoted.startswith("[key] is wrong, so is [key] and Bearer [key] xxx")
    assert len(quoted) == 300
    assert "my-secret" not in repr(redactor)


@pytest.mark.parametrize(
    ("error", "code"),
    [
        ({"code": 429, "message": "m"}, ErrorCode.PROVIDER_RATE_LIMITED),
        ({"code": "401", "message": "m"}, ErrorCode.PROVIDER_AUTH),
        ({"code": 502, "message": "m"}, ErrorCode.PROVIDER_ERROR),
        ({"status": 400, "message": "m"}, ErrorCode.PROVIDER_REJECTED),
        ({"code": "rate_limit_exceeded", "message": "m"}, ErrorCode.PROVIDER_RATE_LIMITED),
        ({"type": "insufficient_quota", "message": "m"}, ErrorCode.PROVIDER_RATE_LIMITED),
        ({"type": "authentication_error", "message": "m"}, ErrorCode.PROVIDER_AUTH),
        ({"code": "context_length_exceeded", "type": "invalid_request_error"}, ErrorCode.PROVIDER_REJECTED),
        ({"type": "server_error", "message": "m"}, ErrorCode.PROVIDER_ERROR),
        ({"code": 7, "message": "m"}, ErrorCode.PROVIDER_ERROR),
        ({"code": "200", "message": "m"}, ErrorCode.PROVIDER_ERROR),
        ("m", ErrorCode.PROVIDER_ERROR),
    ],
)
def test_an_error_in_a_stream_is_called_by_its_code_and_type(error: Any, code: ErrorCode) -> None:
    assert told_error("p", error, Redactor(None)).code is code


def test_an_error_in_a_stream_quotes_the_provider_without_the_key() -> None:
    assert told_error("p", {"message": "k123 is over"}, Redactor("k123")).message.endswith("[key] is over")


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (httpx.ConnectTimeout(""), ErrorCode.PROVIDER_CONNECT_TIMEOUT),
        (httpx.ConnectError("refused"), ErrorCode.PROVIDER_UNREACHABLE),
        (httpx.ReadError(""), ErrorCode.PROVIDER_UNREACHABLE),
        (httpx.WriteError(""), ErrorCode.PROVIDER_UNREACHABLE),
        (httpx.ProxyError("no"), ErrorCode.PROVIDER_UNREACHABLE),
        (httpx.RemoteProtocolError("illegal status line"), ErrorCode.PROVIDER_PROTOCOL),
    ],
)
def test_no_answer_at_all_has_its_code(error: httpx.TransportError, code: ErrorCode) -> None:
    assert connect_error("p", "http://x", error).code is code
