"""The gateway's frames: what a client may send (checked here, pydantic), what it is sent, and the bytes around both.

A frame is one JSON object in one WebSocket text message. `docs/websocket.md` has the tables for clients.
"""

import time
from collections.abc import Iterable, Mapping
from typing import Annotated, Any, Final, Literal

import orjson
from pydantic import Field, SecretStr, StringConstraints

from bamboo.core.types import Accepted, Cursor, SessionId, StopReceipt
from bamboo.errors import BambooError, ClientError, ErrorCode
from bamboo.wire.encode import CloseCode, accepted_fields, dumps, error_fields, receipt_fields
from bamboo.wire.schemas import (
    DEFAULT_PAGE,
    MAX_PAGE,
    ChatOptions,
    ContentSchema,
    Name,
    Schema,
    SchemaT,
    SessionIdText,
    validate,
)

PROTOCOL_VERSION: Final = 1

Ref = str | int
"""What a client marks a frame with, to find its answer."""

_RefField = Annotated[str, StringConstraints(max_length=256)] | Annotated[int, Field(ge=-(2**53), le=2**53)]

CLOSE_REASONS: Final[Mapping[int, str]] = {
    CloseCode.GOING_AWAY: "the server is going away",
    CloseCode.MESSAGE_TOO_BIG: "frame too big",
    CloseCode.TRY_AGAIN_LATER: "try again later",
    CloseCode.UNAUTHORIZED: "unauthorized",
    CloseCode.CONNECT_TIMEOUT: "connect_timeout",
    CloseCode.TOO_MANY_ERRORS: "too_many_errors",
    CloseCode.INTERNAL: "internal",
    CloseCode.HEARTBEAT_LOST: "heartbeat_lost",
}
"""What is said beside a close code."""


class Frame(Schema):
    """What every frame of a client may carry."""

    ref: _RefField | None = None


class ConnectFrame(Frame):
    auth: SecretStr | None = None
    session_id: SessionIdText | None = None
    after: str | None = None
    protocol: Literal[1] = PROTOCOL_VERSION


class ChatFrame(Frame, ChatOptions):
    content: ContentSchema


class SubscribeFrame(Frame):
    session_id: SessionIdText
    after: str | None = None


class UnsubscribeFrame(Frame):
    session_id: SessionIdText


class StopFrame(Frame):
    session_id: SessionIdText
    run_id: Name | None = None


class ApproveFrame(Frame):
    approval_id: Name
    decision: Literal["approve", "deny"]


class HistoryFrame(Frame):
    session_id: SessionIdText
    before: Name | None = None
    limit: Annotated[int, Field(ge=1, le=MAX_PAGE)] = DEFAULT_PAGE


class CommandFrame(Frame):
    name: str
    args: dict[str, Any] | None = None


class PingFrame(Frame):
    timestamp: int | float | str | None = None


class StopArguments(Schema):
    """The `args` of the command `stop`: the connection's session if none is named."""

    session_id: SessionIdText | None = None
    run_id: Name | None = None


_FRAMES: Final[Mapping[str, type[Frame]]] = {
    "connect": ConnectFrame,
    "chat": ChatFrame,
    "subscribe": SubscribeFrame,
    "unsubscribe": UnsubscribeFrame,
    "stop": StopFrame,
    "approve": ApproveFrame,
    "history": HistoryFrame,
    "command": CommandFrame,
    "ping": PingFrame,
}


class FrameError(ClientError):
    """A message that is no frame of ours. `ref` is the message's own, where it has one that can be echoed."""

    def __init__(self, message: str, ref: Ref | None = None) -> None:
        super().__init__(ErrorCode.INVALID_MESSAGE, message)
        self.ref = ref


def parse_frame(message: str | bytes) -> Frame:
    """The frame that a text message is. Raises FrameError (`invalid_message`), which names the field and echoes nothing
    but `ref`.
    """
    if isinstance(message, bytes):
        raise FrameError("a frame is a text message")
    try:
        value = orjson.loads(message)
    except orjson.JSONDecodeError as error:
        raise FrameError(f"the frame is not JSON: {error.msg} at character {error.pos}") from error
    if not isinstance(value, dict):
        raise FrameError("a frame is a JSON object")
    ref = _ref_of(value)
    name = value.get("type")
    if not isinstance(name, str):
        raise FrameError("type: a frame names its type", ref)
    schema = _FRAMES.get(name)
    if schema is None:
        raise FrameError("type: there is no frame of this type", ref)
    return _validated(schema, value, ref)


def parse_arguments(frame: CommandFrame) -> StopArguments:
    """Raises FrameError for arguments that the command `stop` does not take."""
    return _validated(StopArguments, frame.args or {}, frame.ref)


def _validated(schema: type[SchemaT], value: Mapping[str, Any], ref: Ref | None) -> SchemaT:
    try:
        return validate(schema, value)
    except ClientError as error:
        raise FrameError(error.message, ref) from error


def _ref_of(value: Mapping[str, Any]) -> Ref | None:
    try:
        return Frame.model_validate({"ref": value.get("ref")}).ref
    except ValueError:
        return None


# What the server sends. Each returns the frame's JSON.


def _frame(kind: str, ref: Ref | None, fields: Mapping[str, Any]) -> bytes:
    frame: dict[str, Any] = {"type": kind, **fields}
    if ref is not None:
        frame["ref"] = ref
    return dumps(frame)


def error_frame(error: BambooError, ref: Ref | None = None) -> bytes:
    return _frame("error", ref, error_fields(error))


def connected_frame(
    *,
    connection_id: str,
    session_id: SessionId,
    cursor: Cursor | None,
    heartbeat_interval_s: float,
    limits: Mapping[str, int | float],
    ref: Ref | None,
) -> bytes:
    return _frame(
        "connected",
        ref,
        {
            "connection_id": connection_id,
            "session_id": session_id,
            "cursor": None if cursor is None else str(cursor),
            "protocol": PROTOCOL_VERSION,
            "heartbeat_interval_s": heartbeat_interval_s,
            "limits": limits,
        },
    )


def accepted_frame(accepted: Accepted, ref: Ref | None) -> bytes:
    return _frame("accepted", ref, accepted_fields(accepted))


def subscribed_frame(session_id: SessionId, cursor: Cursor, ref: Ref | None) -> bytes:
    return _frame("subscribed", ref, {"session_id": session_id, "cursor": str(cursor)})


def unsubscribed_frame(session_id: SessionId, ref: Ref | None) -> bytes:
    return _frame("unsubscribed", ref, {"session_id": session_id})


def stopped_frame(session_id: SessionId, receipt: StopReceipt, ref: Ref | None) -> bytes:
    return _frame("stopped", ref, {"session_id": session_id, **receipt_fields(receipt)})


def stop_result_frame(session_id: SessionId, receipt: StopReceipt, ref: Ref | None) -> bytes:
    """The answer to the command `stop`."""
    return command_result_frame("stop", {"session_id": session_id, **receipt_fields(receipt)}, ref)


def history_frame(snapshot: Mapping[str, Any], ref: Ref | None) -> bytes:
    """`snapshot` is a history as every transport tells it."""
    return _frame("history", ref, snapshot)


def command_result_frame(name: str, result: Mapping[str, Any], ref: Ref | None) -> bytes:
    return _frame("command_result", ref, {"name": name, "result": result})


def pong_frame(timestamp: float | str | None, ref: Ref | None) -> bytes:
    """`timestamp` is the ping's; where it had none, the server's clock in milliseconds since the Unix epoch."""
    return _frame("pong", ref, {"timestamp": time.time_ns() // 1_000_000 if timestamp is None else timestamp})


def draining_frame(grace_s: float) -> bytes:
    return _frame("draining", None, {"grace_s": grace_s})


# The bytes around a frame's JSON (RFC 6455 section 5.2): a server's frames are not masked, so they are the same for
# every reader.

_TEXT: Final = 0x81  # FIN, opcode 1
_CLOSE: Final = 0x88  # FIN, opcode 8
_SHORT_HEADERS: Final = tuple(bytes((_TEXT, length)) for length in range(126))


def text_messages(payloads: Iterable[bytes]) -> bytes:
    """Each payload (UTF-8) as one unfragmented text message, all in one piece for one write."""
    pieces: list[bytes] = []
    for payload in payloads:
        length = len(payload)
        if length < 126:
            pieces.append(_SHORT_HEADERS[length])
        elif length < 1 << 16:
            pieces.append(b"\x81\x7e" + length.to_bytes(2))
        else:
            pieces.append(b"\x81\x7f" + length.to_bytes(8))
        pieces.append(payload)
    return b"".join(pieces)


def close_message(code: int) -> bytes:
    """A close frame that says this and no more."""
    return bytes((_CLOSE, 2)) + code.to_bytes(2)


def is_close_message(data: bytes | bytearray | memoryview) -> bool:
    """The WebSocket frame at the beginning of `data` is a close frame."""
    return bool(data) and data[0] == _CLOSE
