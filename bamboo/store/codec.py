"""How the store keeps values: the one encoding of everything that it writes. Private to the store: no client ever
sees it.

JSON, compact, UTF-8 with lone surrogates let through, so that every value comes back equal to what it was. Deltas are
the exception: consecutive ones of a run share a row, a chunk, that keeps each delta and its time in about two bytes
each besides the text.
"""

import json
import struct
from collections.abc import Callable, Mapping, Sequence
from dataclasses import MISSING, fields
from itertools import accumulate, pairwise
from typing import Any, Final, NamedTuple

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
    RunQueued,
    RunStarted,
    SessionClosed,
    SessionCreated,
    UserMessage,
)
from bamboo.core.types import (
    Content,
    Cursor,
    Epoch,
    ImagePart,
    Message,
    MessageId,
    Part,
    RunId,
    RunStats,
    RunStatus,
    SessionId,
    TextPart,
    ToolCall,
    Usage,
)
from bamboo.store.base import Run, Session

CHUNK_BYTES: Final = 4000
"""The most that a chunk takes, unless one delta alone is longer: with its row's header it still fits a database page
of 4 KiB.
"""

_CHUNK_COUNT: Final = 0xFFFF
"""The most deltas of a chunk: what its count can say."""

KINDS: Final[Mapping[type[EventBody], int]] = {
    SessionCreated: 1,
    UserMessage: 2,
    RunQueued: 3,
    RunStarted: 4,
    AgentToken: 5,
    AgentReasoning: 6,
    AgentRetry: 7,
    AgentMessage: 8,
    AgentToolStart: 9,
    AgentToolComplete: 10,
    ApprovalRequired: 11,
    ApprovalResolved: 12,
    AgentComplete: 13,
    AgentError: 14,
    AgentStopped: 15,
    SessionClosed: 16,
}
"""What a row holds. These numbers are in databases: never change or reuse one."""

_TYPES: Final = {kind: body_type for body_type, kind in KINDS.items()}
_DELTAS: Final = frozenset({AgentToken, AgentReasoning})


ROW_BYTES: Final = 20
"""What a row counts for besides its data: about what SQLite's cell and the other columns take. Sums of it are in
databases: never change it.
"""


class Row(NamedTuple):
    """One row of a log: an event, or a chunk of deltas whose last one is `last_seq`. `time_ms` is the time of the
    newest event in it.
    """

    last_seq: int
    run_id: RunId | None
    kind: int
    time_ms: int
    data: bytes

    @property
    def size_bytes(self) -> int:
        """What the row counts for where the bytes of a log are bounded."""
        return ROW_BYTES + len(self.data)


def encode_events(events: Sequence[Event]) -> list[Row]:
    """Events that follow each other, as rows: consecutive deltas of the same run and type together, everything else
    one row each.
    """
    rows: list[Row] = []
    start, count = 0, len(events)
    while start < count:
        event = events[start]
        body_type = type(event.body)
        if body_type in _DELTAS:
            end = _chunk_end(events, start)
            rows.append(_encode_chunk(events[start:end]))
            start = end
        else:
            rows.append(Row(event.seq, event.run_id, KINDS[body_type], event.time_ms, encode_body(event.body)))
            start += 1
    return rows


def decode_row(row: Row, session_id: SessionId, epoch: Epoch) -> list[Event]:
    """The events of a row, in order; the inverse of `encode_events`. A row is all of one epoch."""
    body_type = _TYPES[row.kind]
    if body_type is not AgentToken and body_type is not AgentReasoning:
        body = decode_body(row.kind, row.data)
        return [Event(session_id, epoch, row.last_seq, row.time_ms, row.run_id, body)]
    lengths, offsets, text = _unpack_chunk(row.data)
    # The first offset goes back from the newest time, each other one goes on from the time before it.
    times = accumulate(offsets[1:], initial=row.time_ms - offsets[0])
    ends = accumulate(lengths)
    first_seq = row.last_seq - len(lengths) + 1
    return [
        Event(session_id, epoch, seq, time_ms, row.run_id, body_type(text[end - length : end]))
        for seq, (time_ms, length, end) in enumerate(zip(times, lengths, ends, strict=True), first_seq)
    ]


def _chunk_end(events: Sequence[Event], start: int) -> int:
    first = events[start]
    body_type, run_id = type(first.body), first.run_id
    size = 0
    for index in range(start, min(len(events), start + _CHUNK_COUNT)):
        event = events[index]
        body = event.body
        if type(body) is not body_type or event.run_id != run_id:
            return index
        token: str = body.token  # type: ignore[union-attr]  # the type is that of the first one, a delta
        # A length and an offset of at most two bytes each are the usual; longer ones make the row a little longer, no
        # more.
        size += (len(token) if token.isascii() else len(_utf8(token))) + 4
        if size > CHUNK_BYTES and index > start:
            return index
    return min(len(events), start + _CHUNK_COUNT)


def _encode_chunk(chunk: Sequence[Event]) -> Row:
    tokens: list[str] = [event.body.token for event in chunk]  # type: ignore[union-attr]  # all are deltas
    times = [event.time_ms for event in chunk]
    newest = max(times)
    offsets = [newest - times[0]]
    offsets += [after - before for before, after in pairwise(times)]
    length_width, packed_lengths = _pack([len(token) for token in tokens])
    offset_width, packed_offsets = _pack(offsets)
    header = struct.pack("<BH", length_width | offset_width << 4, len(chunk))
    last = chunk[-1]
    data = b"".join((header, packed_lengths, packed_offsets, _utf8("".join(tokens))))
    return Row(last.seq, last.run_id, KINDS[type(last.body)], newest, data)


def _unpack_chunk(data: bytes) -> tuple[tuple[int, ...], tuple[int, ...], str]:
    widths, count = struct.unpack_from("<BH", data)
    lengths, at = _unpack(data, 3, widths & 0xF, count)
    offsets, at = _unpack(data, at, widths >> 4, count)
    return lengths, offsets, data[at:].decode("utf-8", "surrogatepass")


_WIDTHS: Final = "BHIq"  # struct's codes; the last one is signed, for clocks that were set back
_LIMITS: Final = (0xFF, 0xFFFF, 0xFFFFFFFF)


def _pack(values: Sequence[int]) -> tuple[int, bytes]:
    if min(values) < 0:
        width = 3
    else:
        highest = max(values)
        width = next((width for width, limit in enumerate(_LIMITS) if highest <= limit), 3)
    return width, bytes(values) if width == 0 else struct.pack(f"<{len(values)}{_WIDTHS[width]}", *values)


def _unpack(data: bytes, at: int, width: int, count: int) -> tuple[tuple[int, ...], int]:
    layout = f"<{count}{_WIDTHS[width]}"
    return struct.unpack_from(layout, data, at), at + struct.calcsize(layout)


# JSON


_encode_json = json.JSONEncoder(ensure_ascii=False, separators=(",", ":")).encode


def _utf8(text: str) -> bytes:
    return text.encode("utf-8", "surrogatepass")


def _dump(value: Any) -> bytes:
    return _utf8(_encode_json(value))


def _load(data: bytes) -> Any:
    return json.loads(data.decode("utf-8", "surrogatepass"))


class _Form(NamedTuple):
    """How a field that JSON has no form for is written and read."""

    dump: Callable[[Any], Any]
    load: Callable[[Any], Any]


def _dump_part(part: Part) -> Any:
    if isinstance(part, TextPart):
        return part.text
    return {"url": part.url, "detail": part.detail} if part.detail is not None else {"url": part.url}


def _load_part(value: Any) -> Part:
    return TextPart(value) if isinstance(value, str) else ImagePart(value["url"], value.get("detail"))


def _dump_content(content: Content) -> Any:
    return [_dump_part(part) for part in content]


def _load_content(value: Any) -> Content:
    return tuple(_load_part(part) for part in value)


_CONTENT: Final = _Form(_dump_content, _load_content)
_TOOL_CALLS: Final = _Form(
    lambda calls: [[call.tool_call_id, call.tool, call.arguments] for call in calls],
    lambda value: tuple(ToolCall(*call) for call in value),
)
_OBJECT: Final = _Form(dict, lambda value: value)
_USAGE: Final = _Form(
    lambda usage: [usage.prompt_tokens, usage.completion_tokens, usage.total_tokens],
    lambda value: Usage(*value),
)
_STATS: Final = _Form(lambda stats: [stats.queue_ms, stats.ttft_ms, stats.elapsed_ms], lambda value: RunStats(*value))
_CURSOR: Final = _Form(lambda cursor: [cursor.epoch, cursor.seq], lambda value: Cursor(*value))
_STATUS: Final = _Form(str, RunStatus)

_FORMS: Final[Mapping[str, _Form]] = {
    "content": _CONTENT,
    "tool_calls": _TOOL_CALLS,
    "arguments": _OBJECT,
    "params": _OBJECT,
    "metadata": _OBJECT,
    "usage": _USAGE,
    "stats": _STATS,
    "first_cursor": _CURSOR,
    "status": _STATUS,
}
"""By the field's name, which means the same wherever it occurs; a tool result's `status` is plain text and has no
form in `_plan`.
"""


class _Slot(NamedTuple):
    name: str
    default: Any
    form: _Form | None


def _plan(record: type[Any], *, leave: frozenset[str] = frozenset()) -> tuple[_Slot, ...]:
    """The fields of a dataclass that are kept, and how. One that has its default is left out, so fields can be added
    with a default.
    """
    plain = {"status"} if record is AgentToolComplete else set()
    return tuple(
        _Slot(field.name, field.default, _FORMS.get(field.name) if field.name not in plain else None)
        for field in fields(record)
        if field.name not in leave
    )


def _record_fields(record: Any, plan: Sequence[_Slot]) -> dict[str, Any]:
    kept: dict[str, Any] = {}
    for name, default, form in plan:
        value = getattr(record, name)
        if default is not MISSING and value == default:
            continue
        kept[name] = value if form is None or value is None else form.dump(value)
    return kept


def _record_values(kept: Mapping[str, Any], plan: Sequence[_Slot]) -> dict[str, Any]:
    return {
        name: kept[name] if form is None or kept[name] is None else form.load(kept[name])
        for name, _, form in plan
        if name in kept
    }


_BODIES: Final = {body_type: _plan(body_type) for body_type in KINDS}


def encode_body(body: EventBody) -> bytes:
    return _dump(_record_fields(body, _BODIES[type(body)]))


def decode_body(kind: int, data: bytes) -> EventBody:
    body_type = _TYPES[kind]
    return body_type(**_record_values(_load(data), _BODIES[body_type]))


_MESSAGE: Final = _plan(Message, leave=frozenset({"message_id", "run_id"}))


def encode_message(message: Message) -> bytes:
    """All of a message but its ids."""
    return _dump(_record_fields(message, _MESSAGE))


def decode_message(message_id: MessageId, run_id: RunId, data: bytes) -> Message:
    return Message(message_id, run_id, **_record_values(_load(data), _MESSAGE))


_SESSION: Final = _plan(Session, leave=frozenset({"session_id", "created_ms", "updated_ms"}))


def encode_settings(session: Session) -> bytes:
    """All of a session but its id and times."""
    return _dump(_record_fields(session, _SESSION))


def decode_session(session_id: SessionId, created_ms: int, updated_ms: int, data: bytes) -> Session:
    return Session(session_id, created_ms, updated_ms, **_record_values(_load(data), _SESSION))


_ACCEPTED_NAMES: Final = frozenset(
    {
        "message_id",
        "content",
        "accepted_ms",
        "provider",
        "model",
        "system_prompt",
        "params",
        "metadata",
        "client_message_id",
        "cancel_after_s",
    }
)
_IDS: Final = frozenset({"run_id", "session_id"})
_STATE: Final = _plan(Run, leave=_ACCEPTED_NAMES | _IDS)
_ACCEPTED: Final = _plan(Run, leave=_IDS | {slot.name for slot in _STATE})


def encode_accepted(run: Run) -> bytes:
    """What a run was accepted with: it never changes."""
    return _dump(_record_fields(run, _ACCEPTED))


def encode_state(run: Run) -> bytes:
    """What became of a run so far."""
    return _dump(_record_fields(run, _STATE))


def moved_state(state: bytes, epoch: Epoch) -> bytes:
    """The state of a run whose log has only this epoch now."""
    kept = _load(state)
    if "first_cursor" in kept:
        kept["first_cursor"][0] = epoch
    return _dump(kept)


def decode_run(run_id: RunId, session_id: SessionId, accepted: bytes, state: bytes) -> Run:
    values = _record_values(_load(accepted), _ACCEPTED) | _record_values(_load(state), _STATE)
    return Run(run_id, session_id, **values)
