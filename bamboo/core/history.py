"""The one fold from events to the history: what the model sees, what a snapshot shows, what is left of a run that was
cut."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Literal

from bamboo.core.events import (
    AgentMessage,
    AgentReasoning,
    AgentToken,
    AgentToolComplete,
    AgentToolStart,
    Event,
    EventBody,
    RunStarted,
)
from bamboo.core.types import Content, Message, MessageId, RunId, ToolCall, ToolCallId, text_content


@dataclass(frozen=True, slots=True)
class Opening:
    """A run's user message, waiting for its run to start. `time_ms` is when it was accepted."""

    message_id: MessageId
    content: Content
    time_ms: int


def message_of(event: Event, opening: Opening | None) -> Message | None:
    """The history entry that this event makes, if it makes one. `opening` is its run's; only `run_started` needs it."""
    if event.run_id is None:
        return None
    return message_of_body(event.body, event.run_id, event.time_ms, opening)


def message_of_body(body: EventBody, run_id: RunId, time_ms: int, opening: Opening | None = None) -> Message | None:
    """The same for a body that has no place in a log yet.

    A user message takes its place in the history when its run starts, not when it is accepted, so that runs may
    interleave in the log while the history stays valid for a provider.
    """
    if isinstance(body, RunStarted):
        assert opening is not None, "a run starts with the message that it was accepted with"
        return Message(opening.message_id, run_id, "user", opening.content, opening.time_ms)
    if isinstance(body, AgentMessage):
        return Message(
            body.message_id,
            run_id,
            "assistant",
            body.content,
            time_ms,
            tool_calls=body.tool_calls,
            partial=body.partial,
        )
    if isinstance(body, AgentToolComplete):
        return Message(
            body.message_id, run_id, "tool", text_content(body.result), time_ms, tool_call_id=body.tool_call_id
        )
    return None


class OpenStep:
    """What a run has begun and not ended: the text since its last `agent_message`, the tool calls without a result.

    Fed with every event body of one run in order, it says at any point what has to be written so that the history is
    valid if the run ends there.
    """

    __slots__ = ("calls", "reasoning", "started", "text")

    def __init__(self) -> None:
        self.text: list[str] = []
        self.reasoning: list[str] = []
        self.calls: dict[ToolCallId, ToolCall] = {}
        """Calls that were asked for and have no result, in the model's order."""
        self.started: set[ToolCallId] = set()
        """Those among them whose intent was written: the tool may have done something."""

    def apply(self, body: EventBody) -> None:
        if isinstance(body, AgentToken):
            self.text.append(body.token)
        elif isinstance(body, AgentReasoning):
            self.reasoning.append(body.token)
        elif isinstance(body, AgentMessage):
            self.text.clear()
            self.reasoning.clear()
            self.calls = {call.tool_call_id: call for call in body.tool_calls}
        elif isinstance(body, AgentToolStart):
            self.started.add(body.tool_call_id)
        elif isinstance(body, AgentToolComplete):
            self.calls.pop(body.tool_call_id, None)
            self.started.discard(body.tool_call_id)

    def close(
        self,
        provider: str,
        model: str,
        started_calls_are: Literal["stopped", "uncertain"],
        new_message_id: Callable[[], MessageId],
    ) -> list[EventBody]:
        """What has to come before the terminal event of a run that is cut here.

        A step with text gets its `agent_message` (`partial`), every call without a result its `agent_tool_complete`:
        `stopped`, but for the calls whose tool may have run unseen, if the caller says `uncertain`.
        """
        bodies: list[EventBody] = []
        if self.text:
            content = text_content("".join(self.text))
            bodies.append(AgentMessage(new_message_id(), content, provider, model, partial=True))
        for call in self.calls.values():
            status = started_calls_are if call.tool_call_id in self.started else "stopped"
            result = _CUT_RESULTS[status]
            bodies.append(
                AgentToolComplete(
                    new_message_id(), call.tool_call_id, call.tool, ok=False, result=result, elapsed_ms=0, status=status
                )
            )
        return bodies


_CUT_RESULTS = {
    "stopped": "The call was stopped before it gave a result.",
    "uncertain": "The server stopped while this call ran: whether it took effect is not known.",
}


@dataclass(frozen=True, slots=True)
class StepText:
    """What the model has said in a step that has no `agent_message` yet."""

    text: str
    reasoning: str


def fold_step(bodies: Iterable[EventBody]) -> StepText:
    """The text of the last step among a run's events, in order: everything after the newest `agent_message`."""
    step = OpenStep()
    for body in bodies:
        step.apply(body)
    return StepText("".join(step.text), "".join(step.reasoning))
