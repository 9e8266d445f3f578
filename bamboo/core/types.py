"""The values that every part of Bamboo shares: ids, cursors, messages, tool calls, what a provider streams.

Standard library only, no I/O, no clock: times come in as milliseconds since the Unix epoch.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum
from typing import Any, Final, Literal, NewType

SessionId = NewType("SessionId", str)
RunId = NewType("RunId", str)
MessageId = NewType("MessageId", str)
ToolCallId = NewType("ToolCallId", str)
Epoch = NewType("Epoch", str)

JsonObject = Mapping[str, Any]
"""A decoded JSON object. Values are whatever JSON can hold, not nested deeper than `MAX_JSON_DEPTH`; nothing of ours
looks deeper than it says."""

MAX_JSON_DEPTH: Final = 100
"""Objects and lists inside each other, the outermost counted: far above what any use needs, and far enough below the
254 of our encoder (orjson) that there is room for the envelope that a value is sent in."""

SESSION_ID_PATTERN: Final = re.compile(r"[A-Za-z0-9._:-]{1,128}")
_CURSOR_PATTERN: Final = re.compile(r"([A-Za-z0-9_-]{1,32})\.(0|[1-9][0-9]{0,17})")


def is_too_deep(value: object) -> bool:
    """A decoded JSON value is nested deeper than `MAX_JSON_DEPTH`: what we decode at that depth we may not be able to
    encode."""
    level = [value] if isinstance(value, dict | list) else []
    for _ in range(MAX_JSON_DEPTH):
        children = (child for item in level for child in (item.values() if isinstance(item, dict) else item))
        level = [child for child in children if isinstance(child, dict | list)]
        if not level:
            return False
    return True


@dataclass(frozen=True, slots=True)
class Cursor:
    """A place in a log: everything up to and including `seq` of this epoch's log was seen. `seq` 0 is the place before
    the first event."""

    epoch: Epoch
    seq: int

    def __str__(self) -> str:
        return f"{self.epoch}.{self.seq}"

    @classmethod
    def parse(cls, text: str) -> "Cursor":
        """The inverse of `str`. Raises ValueError for anything that is not a cursor of ours."""
        match = _CURSOR_PATTERN.fullmatch(text)
        if match is None:
            raise ValueError("a cursor looks like <epoch>.<seq>")
        return cls(Epoch(match[1]), int(match[2]))


@dataclass(frozen=True, slots=True)
class EpochStart:
    """One unbroken life of a log: it begins with `first_seq`."""

    epoch: Epoch
    first_seq: int


@dataclass(frozen=True, slots=True)
class TextPart:
    text: str


@dataclass(frozen=True, slots=True)
class ImagePart:
    """An image by URL, as OpenAI's `image_url` part has it (https: or data:)."""

    url: str
    detail: Literal["auto", "low", "high"] | None = None


Part = TextPart | ImagePart
Content = tuple[Part, ...]


def text_content(text: str) -> Content:
    return (TextPart(text),)


def content_text(content: Content) -> str:
    """All text of a message, its other parts left out."""
    return "".join(part.text for part in content if isinstance(part, TextPart))


@dataclass(frozen=True, slots=True)
class ToolCall:
    """A call that the model made. `arguments` is the JSON text exactly as the model wrote it: it may be no JSON at
    all."""

    tool_call_id: ToolCallId
    tool: str
    arguments: str


@dataclass(frozen=True, slots=True)
class ToolResult:
    """What a call gave. `text` is what the model is shown."""

    text: str
    ok: bool = True
    truncated: bool = False
    status: Literal["stopped", "uncertain", "denied"] | None = None


@dataclass(frozen=True, slots=True)
class ToolSpec:
    """What the model is told of a tool. `parameters` is a JSON Schema of an object."""

    name: str
    description: str
    parameters: JsonObject


Role = Literal["system", "user", "assistant", "tool"]


@dataclass(frozen=True, slots=True)
class Message:
    """One entry of the history that the model sees."""

    message_id: MessageId
    run_id: RunId
    role: Role
    content: Content
    time_ms: int
    tool_calls: tuple[ToolCall, ...] = ()
    tool_call_id: ToolCallId | None = None
    partial: bool = False


@dataclass(frozen=True, slots=True)
class Usage:
    """Tokens, as the provider counted them."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int

    def __add__(self, other: "Usage") -> "Usage":
        return Usage(
            self.prompt_tokens + other.prompt_tokens,
            self.completion_tokens + other.completion_tokens,
            self.total_tokens + other.total_tokens,
        )


@dataclass(frozen=True, slots=True)
class RunStats:
    """Milliseconds: waiting for a slot, from run start to the first delta (None if there was none), from run start to
    the end."""

    queue_ms: int
    ttft_ms: int | None
    elapsed_ms: int


class RunStatus(StrEnum):
    QUEUED = "queued"
    RUNNING = "running"
    AWAITING_APPROVAL = "awaiting_approval"
    COMPLETED = "completed"
    FAILED = "failed"
    STOPPED = "stopped"
    INTERRUPTED = "interrupted"

    @property
    def finished(self) -> bool:
        return self in _FINISHED


_FINISHED: Final = frozenset({RunStatus.COMPLETED, RunStatus.FAILED, RunStatus.STOPPED, RunStatus.INTERRUPTED})

StopReason = Literal["user", "superseded", "abandoned", "deleted"]
OnBusy = Literal["enqueue", "reject", "interrupt"]
AcceptedAs = Literal["started", "queued", "duplicate"]


@dataclass(frozen=True, slots=True)
class Chat:
    """A chat as a client asked for it, on any transport. None means: not said, the session's or the server's default
    holds.

    `session_was_made` says that the client did not name the session, it was made for it: then the session does not
    count for what an idempotency key stands for. `idempotency_key` is the `Idempotency-Key` header, else
    `client_message_id`: one space of keys for the whole server. `cancel_after_s` None is `on_disconnect: "continue"`.
    """

    content: Content
    session_id: SessionId | None = None
    session_was_made: bool = False
    model: str | None = None
    provider: str | None = None
    on_busy: OnBusy = "enqueue"
    cancel_after_s: float | None = None
    system_prompt: str | None = None
    params: JsonObject | None = None
    client_message_id: str | None = None
    idempotency_key: str | None = None
    metadata: JsonObject | None = None


@dataclass(frozen=True, slots=True)
class Accepted:
    """A chat that is committed: it will not be lost. `cursor` is the place just before the run's first event."""

    session_id: SessionId
    run_id: RunId
    message_id: MessageId
    status: RunStatus
    accepted_as: AcceptedAs
    cursor: Cursor


@dataclass(frozen=True, slots=True)
class StopReceipt:
    """What a stop ended. When it is given, nothing of these runs is alive and their terminal events are committed and
    published.

    `cursor` is the log's end at that moment: every terminal event of `stopped` is at or before it.
    """

    stopped: tuple[RunId, ...]
    tools_stopped: int
    elapsed_ms: int
    cursor: Cursor


# What a provider streams. One object per delta that the provider sent: never merged, never split.


@dataclass(frozen=True, slots=True)
class TextDelta:
    text: str


@dataclass(frozen=True, slots=True)
class ReasoningDelta:
    text: str


@dataclass(frozen=True, slots=True)
class ToolCallDelta:
    """A piece of a tool call. `index` says which call of this step; id and name come once, arguments in pieces."""

    index: int
    tool_call_id: str | None
    tool: str | None
    arguments: str


@dataclass(frozen=True, slots=True)
class FinishDelta:
    """The provider's own word for why it ended: `stop`, `length`, `tool_calls`, `content_filter`, …"""

    reason: str


@dataclass(frozen=True, slots=True)
class UsageDelta:
    usage: Usage


ProviderDelta = TextDelta | ReasoningDelta | ToolCallDelta | FinishDelta | UsageDelta


@dataclass(frozen=True, slots=True)
class ModelCall:
    """One request to a provider: the whole history, system prompt first if there is one."""

    model: str
    messages: tuple[Message, ...]
    system_prompt: str | None = None
    tools: tuple[ToolSpec, ...] = ()
    params: JsonObject | None = None
