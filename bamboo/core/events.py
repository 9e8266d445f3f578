"""The one vocabulary: every event that a log can hold. `docs/http.md` has the table for clients.

A body says what happened; an `Event` is a body with its place in a log. Bodies know nothing of JSON:
`bamboo.wire.encode` has the one encoding.
"""

from dataclasses import dataclass
from typing import ClassVar, Final, Literal

from bamboo.core.types import (
    Content,
    Cursor,
    Epoch,
    ImagePart,
    JsonObject,
    MessageId,
    RunId,
    RunStats,
    RunStatus,
    SessionId,
    StopReason,
    ToolCall,
    ToolCallId,
    Usage,
)


@dataclass(frozen=True, slots=True)
class SessionCreated:
    type: ClassVar = "session_created"
    title: str | None = None


@dataclass(frozen=True, slots=True)
class UserMessage:
    type: ClassVar = "user_message"
    message_id: MessageId
    content: Content
    client_message_id: str | None = None


@dataclass(frozen=True, slots=True)
class RunQueued:
    type: ClassVar = "run_queued"
    position: int


@dataclass(frozen=True, slots=True)
class RunStarted:
    type: ClassVar = "run_started"
    provider: str
    model: str
    skills_revision: int


@dataclass(frozen=True, slots=True)
class AgentToken:
    type: ClassVar = "agent_token"
    token: str


@dataclass(frozen=True, slots=True)
class AgentReasoning:
    type: ClassVar = "agent_reasoning"
    token: str


@dataclass(frozen=True, slots=True)
class AgentRetry:
    type: ClassVar = "agent_retry"
    attempt: int
    provider: str
    code: str
    delay_ms: int


@dataclass(frozen=True, slots=True)
class AgentMessage:
    """The whole text of one step; `tool_calls` are started after it."""

    type: ClassVar = "agent_message"
    message_id: MessageId
    content: Content
    provider: str
    model: str
    tool_calls: tuple[ToolCall, ...] = ()
    partial: bool = False


@dataclass(frozen=True, slots=True)
class AgentToolStart:
    """A call's intent: committed before the tool is touched. `arguments` is the decoded object ({} where the model
    wrote none)."""

    type: ClassVar = "agent_tool_start"
    tool_call_id: ToolCallId
    tool: str
    arguments: JsonObject


@dataclass(frozen=True, slots=True)
class AgentToolComplete:
    """A call's result. `message_id` names the tool message that it puts into the history; it is not sent to clients."""

    type: ClassVar = "agent_tool_complete"
    message_id: MessageId
    tool_call_id: ToolCallId
    tool: str
    ok: bool
    result: str
    elapsed_ms: int
    truncated: bool = False
    status: Literal["stopped", "uncertain", "denied"] | None = None


@dataclass(frozen=True, slots=True)
class ApprovalRequired:
    type: ClassVar = "approval_required"
    approval_id: str
    tool_call_id: ToolCallId
    tool: str
    arguments: JsonObject
    expires_at_ms: int


@dataclass(frozen=True, slots=True)
class ApprovalResolved:
    type: ClassVar = "approval_resolved"
    approval_id: str
    decision: Literal["approve", "deny", "expired", "cancelled"]


@dataclass(frozen=True, slots=True)
class AgentComplete:
    type: ClassVar = "agent_complete"
    finish_reason: str
    usage: Usage | None
    stats: RunStats


@dataclass(frozen=True, slots=True)
class AgentError:
    type: ClassVar = "agent_error"
    code: str
    message: str
    retryable: bool


@dataclass(frozen=True, slots=True)
class AgentStopped:
    type: ClassVar = "agent_stopped"
    reason: StopReason


@dataclass(frozen=True, slots=True)
class SessionClosed:
    type: ClassVar = "session_closed"


Delta = AgentToken | AgentReasoning
Terminal = AgentComplete | AgentError | AgentStopped
EventBody = (
    SessionCreated
    | UserMessage
    | RunQueued
    | RunStarted
    | Delta
    | AgentRetry
    | AgentMessage
    | AgentToolStart
    | AgentToolComplete
    | ApprovalRequired
    | ApprovalResolved
    | Terminal
    | SessionClosed
)


def terminal_status(body: Terminal) -> RunStatus:
    """The state that a run with this terminal event is in for good."""
    if isinstance(body, AgentComplete):
        return RunStatus.COMPLETED
    if isinstance(body, AgentStopped):
        return RunStatus.STOPPED
    return RunStatus.INTERRUPTED if body.code == "interrupted" else RunStatus.FAILED


class Event:
    """A body at its place in a log. Immutable, but for `encoded`.

    `encoded` is the event's JSON, filled in by `bamboo.wire.encode` when the first reader needs it: one encoding per
    event, however many readers there are, and none if there is none. Slots and a plain `__init__`, because one is made
    for every token.
    """

    __slots__ = ("body", "encoded", "epoch", "run_id", "seq", "session_id", "time_ms")

    def __init__(
        self, session_id: SessionId, epoch: Epoch, seq: int, time_ms: int, run_id: RunId | None, body: EventBody
    ) -> None:
        self.session_id = session_id
        self.epoch = epoch
        self.seq = seq
        self.time_ms = time_ms
        self.run_id = run_id
        self.body = body
        self.encoded: bytes | None = None

    @property
    def cursor(self) -> Cursor:
        return Cursor(self.epoch, self.seq)

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Event):
            return NotImplemented
        return (
            self.seq == other.seq
            and self.body == other.body
            and self.epoch == other.epoch
            and self.session_id == other.session_id
            and self.time_ms == other.time_ms
            and self.run_id == other.run_id
        )

    __hash__ = None  # type: ignore[assignment]

    def __repr__(self) -> str:
        return f"<Event {self.session_id} {self.epoch}.{self.seq} {self.body!r}>"


@dataclass(frozen=True, slots=True)
class Gap:
    """What a reader will not get as it knew it: `from_seq` to `to_seq`, both included (None for `epoch`). The stream
    goes on behind `cursor`."""

    session_id: SessionId
    from_seq: int | None
    to_seq: int | None
    reason: Literal["crash", "retention", "epoch"]
    cursor: Cursor


@dataclass(frozen=True, slots=True)
class Outage:
    """The store does not work just now, and what comes next in this session waits for it. It has no place in a log.

    The stream goes on by itself; `retry_after_s` is for requests.
    """

    session_id: SessionId
    message: str
    retry_after_s: float | None


Item = Event | Gap | Outage
"""What a subscription hands out."""


_EVENT_BYTES: Final = 300
"""What an event costs in memory besides its text."""


def event_bytes(body: EventBody) -> int:
    """About how much memory an event takes: what windows and pages are bounded by."""
    if isinstance(body, Delta):
        return _EVENT_BYTES + len(body.token)
    if isinstance(body, UserMessage | AgentMessage):
        size = _EVENT_BYTES + _content_bytes(body.content)
        if isinstance(body, AgentMessage):
            size += sum(_EVENT_BYTES + len(call.arguments) for call in body.tool_calls)
        return size
    if isinstance(body, AgentToolComplete):
        return _EVENT_BYTES + len(body.result)
    return 2 * _EVENT_BYTES


def _content_bytes(content: Content) -> int:
    return sum(len(part.url) if isinstance(part, ImagePart) else len(part.text) for part in content)
