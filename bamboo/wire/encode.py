"""Every byte that goes out: events, gaps, errors and receipts as JSON, and the numbers that error codes get on the
wire.

One encoder for every transport: an event is the same JSON object in an SSE `data:` line and in a WebSocket frame, live
or read later.
"""

from collections.abc import Mapping
from enum import IntEnum
from functools import lru_cache
from time import gmtime, strftime
from typing import Any, Final

import orjson

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
    Item,
    Outage,
    RunQueued,
    RunStarted,
    SessionCreated,
    UserMessage,
)
from bamboo.core.types import Accepted, Content, ImagePart, StopReceipt, TextPart, ToolCall, Usage
from bamboo.errors import BambooError, ErrorCode

HTTP_STATUS: Final[Mapping[ErrorCode, int]] = {
    ErrorCode.INVALID_REQUEST: 400,
    ErrorCode.INVALID_CURSOR: 400,
    ErrorCode.INVALID_MESSAGE: 400,
    ErrorCode.NOT_CONNECTED: 400,
    ErrorCode.UNKNOWN_COMMAND: 400,
    ErrorCode.UNAUTHORIZED: 401,
    ErrorCode.FORBIDDEN: 403,
    ErrorCode.NOT_FOUND: 404,
    ErrorCode.SESSION_NOT_FOUND: 404,
    ErrorCode.RUN_NOT_FOUND: 404,
    ErrorCode.APPROVAL_NOT_FOUND: 404,
    ErrorCode.MODEL_NOT_FOUND: 404,
    ErrorCode.METHOD_NOT_ALLOWED: 405,
    ErrorCode.BUSY: 409,
    ErrorCode.IDEMPOTENCY_CONFLICT: 409,
    ErrorCode.ALREADY_SUBSCRIBED: 409,
    ErrorCode.TOO_LARGE: 413,
    ErrorCode.UNSUPPORTED_MEDIA_TYPE: 415,
    ErrorCode.OVERLOADED: 429,
    ErrorCode.DRAINING: 503,
    ErrorCode.STARTING: 503,
    ErrorCode.STORE_UNAVAILABLE: 503,
    ErrorCode.PROVIDER_UNREACHABLE: 502,
    ErrorCode.PROVIDER_CONNECT_TIMEOUT: 502,
    ErrorCode.PROVIDER_AUTH: 502,
    ErrorCode.PROVIDER_REJECTED: 502,
    ErrorCode.PROVIDER_RATE_LIMITED: 502,
    ErrorCode.PROVIDER_ERROR: 502,
    ErrorCode.PROVIDER_PROTOCOL: 502,
    ErrorCode.FIRST_TOKEN_TIMEOUT: 504,
    ErrorCode.IDLE_TIMEOUT: 504,
    # These end a run and are told in its terminal event; as the answer to a request they would be our own fault.
    ErrorCode.RUN_TIMEOUT: 500,
    ErrorCode.QUEUE_TIMEOUT: 500,
    ErrorCode.BUDGET_EXCEEDED: 500,
    ErrorCode.LOOP_DETECTED: 500,
    ErrorCode.INTERRUPTED: 500,
    ErrorCode.INTERNAL: 500,
}


class CloseCode(IntEnum):
    """Why the gateway closed a connection (RFC 6455 section 7.4; 4000 and up are the application's)."""

    GOING_AWAY = 1001
    MESSAGE_TOO_BIG = 1009
    TRY_AGAIN_LATER = 1013
    UNAUTHORIZED = 4401
    CONNECT_TIMEOUT = 4408
    TOO_MANY_ERRORS = 4429
    INTERNAL = 4500
    HEARTBEAT_LOST = 4502


def dumps(value: Any) -> bytes:
    """JSON, UTF-8, compact. Raises TypeError for what JSON cannot hold."""
    return orjson.dumps(value)


@lru_cache(maxsize=64)
def _second(seconds: int) -> str:
    return strftime("%Y-%m-%dT%H:%M:%S", gmtime(seconds))


def timestamp(time_ms: int) -> str:
    """RFC 3339, UTC, milliseconds."""
    seconds, ms = divmod(time_ms, 1000)
    return f"{_second(seconds)}.{ms:03d}Z"


def event_json(event: Event) -> bytes:
    """The event's one JSON form; made when it is first asked for and kept with the event."""
    encoded = event.encoded
    if encoded is None:
        # Copied, because what orjson returns keeps the 4 KiB that it was written in; this is kept as long as its event.
        encoded = event.encoded = bytes(memoryview(orjson.dumps(event_fields(event))))
    return encoded


def event_fields(event: Event) -> dict[str, Any]:
    """The event as the object that clients see."""
    fields: dict[str, Any] = {
        "type": event.body.type,
        "session_id": event.session_id,
        "seq": event.seq,
        "cursor": f"{event.epoch}.{event.seq}",
        "time": timestamp(event.time_ms),
    }
    if event.run_id is not None:
        fields["run_id"] = event.run_id
    _add_body(fields, event.body)
    return fields


def _add_body(fields: dict[str, Any], body: EventBody) -> None:
    match body:
        case AgentToken() | AgentReasoning():
            fields["token"] = body.token
        case SessionCreated():
            _add_given(fields, title=body.title)
        case UserMessage():
            fields["message_id"] = body.message_id
            fields["content"] = content_json(body.content)
            _add_given(fields, client_message_id=body.client_message_id)
        case RunQueued():
            fields["position"] = body.position
        case RunStarted():
            fields |= {"provider": body.provider, "model": body.model, "skills_revision": body.skills_revision}
        case AgentRetry():
            fields |= {"attempt": body.attempt, "provider": body.provider, "code": body.code, "delay_ms": body.delay_ms}
        case AgentMessage():
            fields |= {"message_id": body.message_id, "content": content_json(body.content)}
            if body.tool_calls:
                fields["tool_calls"] = [tool_call_json(call) for call in body.tool_calls]
            fields |= {"provider": body.provider, "model": body.model}
            if body.partial:
                fields["partial"] = True
        case AgentToolStart():
            fields |= {"tool_call_id": body.tool_call_id, "tool": body.tool, "arguments": body.arguments}
        case AgentToolComplete():
            fields |= {"tool_call_id": body.tool_call_id, "tool": body.tool, "ok": body.ok, "result": body.result}
            if body.truncated:
                fields["truncated"] = True
            _add_given(fields, status=body.status)
            fields["elapsed_ms"] = body.elapsed_ms
        case ApprovalRequired():
            fields |= {
                "approval_id": body.approval_id,
                "tool_call_id": body.tool_call_id,
                "tool": body.tool,
                "arguments": body.arguments,
                "expires_at": timestamp(body.expires_at_ms),
            }
        case ApprovalResolved():
            fields |= {"approval_id": body.approval_id, "decision": body.decision}
        case AgentComplete():
            stats = body.stats
            fields["finish_reason"] = body.finish_reason
            fields["usage"] = None if body.usage is None else usage_json(body.usage)
            fields["stats"] = {"queue_ms": stats.queue_ms, "ttft_ms": stats.ttft_ms, "elapsed_ms": stats.elapsed_ms}
        case AgentError():
            fields |= {"code": body.code, "message": body.message, "retryable": body.retryable}
        case AgentStopped():
            fields["reason"] = body.reason
        case _:  # session_closed says all by its type
            pass


def _add_given(fields: dict[str, Any], **optional: Any) -> None:
    fields.update((name, value) for name, value in optional.items() if value is not None)


def content_json(content: Content) -> str | list[dict[str, Any]]:
    """A string where a message is one text, else OpenAI's list of parts."""
    if len(content) == 1 and isinstance(content[0], TextPart):
        return content[0].text
    return [_part_json(part) for part in content]


def _part_json(part: TextPart | ImagePart) -> dict[str, Any]:
    if isinstance(part, TextPart):
        return {"type": "text", "text": part.text}
    image: dict[str, Any] = {"url": part.url}
    _add_given(image, detail=part.detail)
    return {"type": "image_url", "image_url": image}


def tool_call_json(call: ToolCall) -> dict[str, Any]:
    """`arguments` is the text that the model wrote."""
    return {"tool_call_id": call.tool_call_id, "tool": call.tool, "arguments": call.arguments}


def usage_json(usage: Usage) -> dict[str, int]:
    return {
        "prompt_tokens": usage.prompt_tokens,
        "completion_tokens": usage.completion_tokens,
        "total_tokens": usage.total_tokens,
    }


def gap_fields(gap: Gap) -> dict[str, Any]:
    return {
        "type": "gap",
        "session_id": gap.session_id,
        "from_seq": gap.from_seq,
        "to_seq": gap.to_seq,
        "reason": gap.reason,
        "cursor": str(gap.cursor),
    }


def outage_fields(outage: Outage) -> dict[str, Any]:
    """The `error` frame that tells of it; it has neither `seq` nor `cursor`."""
    code, wait_s = ErrorCode.STORE_UNAVAILABLE, outage.retry_after_s
    error = BambooError(code, outage.message, retry_after_s=wait_s, session_id=outage.session_id)
    return {"type": "error", **error_fields(error)}


def item_json(item: Item) -> bytes:
    """What a subscription hands out, as JSON."""
    if isinstance(item, Event):
        return event_json(item)
    return orjson.dumps(gap_fields(item) if isinstance(item, Gap) else outage_fields(item))


def accepted_fields(accepted: Accepted) -> dict[str, Any]:
    return {
        "session_id": accepted.session_id,
        "run_id": accepted.run_id,
        "message_id": accepted.message_id,
        "status": accepted.status,
        "accepted_as": accepted.accepted_as,
        "cursor": str(accepted.cursor),
    }


def receipt_fields(receipt: StopReceipt) -> dict[str, Any]:
    return {
        "stopped": list(receipt.stopped),
        "tools_stopped": receipt.tools_stopped,
        "elapsed_ms": receipt.elapsed_ms,
    }


def error_fields(error: BambooError) -> dict[str, Any]:
    """An error as every transport tells it: the value of `error` over HTTP, the fields of an `error` frame."""
    fields: dict[str, Any] = {"code": error.code, "message": error.message, "retryable": error.retryable}
    if error.retry_after_s is not None:
        fields["retry_after_ms"] = round(error.retry_after_s * 1000)
    _add_given(fields, session_id=error.session_id, run_id=error.run_id)
    return fields


def public_error(error: Exception) -> BambooError:
    """The error that a client may be told: its own if it is one of ours, else `internal`, with nothing of what happened
    inside."""
    if isinstance(error, BambooError):
        return error
    return BambooError(ErrorCode.INTERNAL, "something went wrong inside the server; its log says what")
