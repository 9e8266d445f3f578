"""What a provider's failure is called: from a status, an error object or a broken connection to an `UpstreamError`.

Pure: values in, an error out, for the caller to raise. Messages quote the provider shortly, and never a key.
"""

import math
import re
import ssl
from collections.abc import Iterator, Mapping
from email.utils import parsedate_to_datetime
from typing import Any, Final

import httpx
import orjson

from bamboo.errors import ErrorCode, UpstreamError
from bamboo.llm.base import RequestRejectedError

_MAX_QUOTE_CHARS: Final = 300
"""Of a provider's own words: enough to say what is wrong, too little to flood a log or a page."""

_SECRET: Final = re.compile(r"\bsk-[\w*.\-]+|\b(?<=[Bb]earer )\S+")
"""Keys as providers echo them, masked or not."""

_AUTH_WORDS: Final = ("authentication", "invalid_api_key", "permission", "unauthorized", "forbidden")
_LIMIT_WORDS: Final = ("rate_limit", "rate limit", "ratelimit", "too_many_requests", "insufficient_quota")
_REQUEST_WORDS: Final = (
    "invalid_request",
    "badrequest",
    "bad_request",
    "context_length",
    "content_filter",
    "content_policy",
)
_NOT_FOUND_WORDS: Final = ("not_found", "notfound")

_OF_REQUEST: Final = frozenset({400, 413, 422})
"""Statuses that are about what the request holds; the other 4xx are about the provider's address, model or account."""

_OF_SETUP: Final = re.compile(
    r"\bapi[ _-]?key\b|\bmodel[ _](not|does not|doesn't)[ _](found|exist)|\b(invalid|unknown|not a valid)[ _]model",
    re.IGNORECASE,
)
"""But some providers answer 400 for a key or a model that they do not know too, and only their words tell."""


class Redactor:
    """Takes the key out of what is quoted. Its repr does not show it."""

    __slots__ = ("_key",)

    def __init__(self, key: str | None) -> None:
        self._key = key

    def __repr__(self) -> str:
        return "<Redactor>"

    def quote(self, text: str) -> str:
        """`text` on one line, without keys, shortened."""
        if self._key:
            text = text.replace(self._key, "[key]")
        text = _SECRET.sub("[key]", " ".join(text.split()))
        return text if len(text) <= _MAX_QUOTE_CHARS else text[: _MAX_QUOTE_CHARS - 1] + "…"


def status_error(
    name: str, status: int, said: str, *, where: str, model: str, retry_after_s: float | None = None
) -> UpstreamError:
    """What an answer with this status means. `said` is what the provider said, quoted; `where` its URL."""
    tail = f": {said}" if said else ""
    if status in (401, 403):
        return UpstreamError(ErrorCode.PROVIDER_AUTH, f"provider {name} refused its key (HTTP {status}){tail}")
    if status == 429:
        return UpstreamError(
            ErrorCode.PROVIDER_RATE_LIMITED,
            f"provider {name} limits its rate (HTTP 429){tail}",
            retry_after_s=retry_after_s,
        )
    if status == 404:
        return UpstreamError(
            ErrorCode.PROVIDER_REJECTED,
            f"provider {name} has no model {model!r}, or nothing at {where} (HTTP 404){tail}",
        )
    if 400 <= status < 500:
        return _rejection(f"provider {name} rejected the request (HTTP {status}){tail}", status, said)
    if 500 <= status < 600:
        return UpstreamError(
            ErrorCode.PROVIDER_ERROR, f"provider {name} failed (HTTP {status}){tail}", retry_after_s=retry_after_s
        )
    if 300 <= status < 400:
        return UpstreamError(
            ErrorCode.PROVIDER_REJECTED,
            f"provider {name} answered with a redirect (HTTP {status}), which is not followed: check base_url{tail}",
        )
    return UpstreamError(ErrorCode.PROVIDER_PROTOCOL, f"provider {name} answered HTTP {status} where 200 was expected")


def told_error(name: str, error: object, redactor: Redactor) -> UpstreamError:
    """What an error object inside a stream means, by its `code` (a status, or a word) and its `type`."""
    said = redactor.quote(error_text({"error": error}) or "without saying why")
    message = f"provider {name} broke off: {said}"
    fields: Mapping[str, Any] = error if isinstance(error, dict) else {}
    status = _status_in(fields)
    if status is not None:
        code = status_error(name, status, "", where="", model="").code
        if code is ErrorCode.PROVIDER_REJECTED:
            return _rejection(message, status, said)
        return UpstreamError(ErrorCode.PROVIDER_ERROR if code is ErrorCode.PROVIDER_PROTOCOL else code, message)
    words = f"{fields.get('code')} {fields.get('type')}".lower()
    for signs, code in (
        (_LIMIT_WORDS, ErrorCode.PROVIDER_RATE_LIMITED),
        (_AUTH_WORDS, ErrorCode.PROVIDER_AUTH),
        (_NOT_FOUND_WORDS, ErrorCode.PROVIDER_REJECTED),
    ):
        if any(sign in words for sign in signs):
            return UpstreamError(code, message)
    if any(sign in words for sign in _REQUEST_WORDS):
        return _rejection(message, 400, said)
    return UpstreamError(ErrorCode.PROVIDER_ERROR, message)


def _rejection(message: str, status: int, said: str) -> UpstreamError:
    """A 4xx, by whose fault it is: what was asked, or how the provider is set up here."""
    if status in _OF_REQUEST and not _OF_SETUP.search(said):
        return RequestRejectedError(message)
    return UpstreamError(ErrorCode.PROVIDER_REJECTED, message)


def _status_in(fields: Mapping[str, Any]) -> int | None:
    for key in ("code", "status"):
        value = fields.get(key)
        if isinstance(value, str) and re.fullmatch(r"[1-5][0-9]{2}", value):
            return int(value)
        if type(value) is int and 400 <= value < 600:
            return value
    return None


def error_text(body: object) -> str:
    """A provider's own words out of a decoded error body, in the shapes that are around; "" if there are none."""
    if not isinstance(body, dict):
        return body if isinstance(body, str) else ""
    for key in ("error", "message", "detail"):
        value = body.get(key)
        if isinstance(value, str):
            return value
        if value:
            inner = value[0] if isinstance(value, list) else value
            return error_text(inner) or orjson.dumps(value).decode()
    return ""


def body_text(content_type: str, body: bytes) -> str:
    """A provider's own words out of an error answer. Pages (HTML) say nothing that helps."""
    try:
        return error_text(orjson.loads(body))
    except orjson.JSONDecodeError:
        return body.decode("utf-8", "replace") if content_type.startswith("text/plain") else ""


def retry_after_s(headers: Mapping[str, str], now_s: float) -> float | None:
    """When to come back: `Retry-After` in seconds or as a date (RFC 9110, 10.2.3; `now_s` is Unix time), or
    `retry-after-ms`. None: not told.
    """
    for key, unit_s in (("retry-after-ms", 0.001), ("retry-after", 1.0)):
        value = headers.get(key, "").strip()
        if not value:
            continue
        try:
            seconds = float(value) * unit_s
        except ValueError:
            seconds = _until(value, now_s)
        if math.isfinite(seconds):
            return max(0.0, seconds)
    return None


def _until(date: str, now_s: float) -> float:
    try:
        return parsedate_to_datetime(date).timestamp() - now_s
    except (ValueError, OverflowError):
        return math.nan


def connection_broke(error: httpx.TransportError) -> bool:
    """The connection ended, as against: what came over it made no sense."""
    if isinstance(error, httpx.RemoteProtocolError):
        return "disconnected" in str(error) or "closed connection" in str(error)
    return not isinstance(error, httpx.ProtocolError)


def connect_error(name: str, where: str, error: httpx.TransportError) -> UpstreamError:
    """What it means that there was no answer at all, not even a head."""
    if isinstance(error, httpx.ConnectTimeout):
        return UpstreamError(
            ErrorCode.PROVIDER_CONNECT_TIMEOUT, f"provider {name}: connecting to {where} took too long"
        )
    if connection_broke(error):
        return UpstreamError(
            ErrorCode.PROVIDER_UNREACHABLE, f"provider {name} cannot be reached at {where}: {_why(error)}"
        )
    return UpstreamError(ErrorCode.PROVIDER_PROTOCOL, f"provider {name}: what answers at {where} does not speak HTTP")


def _why(error: BaseException) -> str:
    """The deepest reason that says something: `connection refused` rather than `all attempts to connect failed`."""
    why = str(error)
    for cause in _causes(error):
        if isinstance(cause, ssl.SSLCertVerificationError):
            return f"its certificate is not trusted ({cause.verify_message})"
        if isinstance(cause, OSError) and cause.strerror:
            why = cause.strerror
    return why or "the connection broke"


def _causes(error: BaseException) -> Iterator[BaseException]:
    cause = error.__cause__ or error.__context__
    while cause is not None:
        yield cause
        if isinstance(cause, BaseExceptionGroup):
            yield from cause.exceptions
        cause = cause.__cause__ or cause.__context__
