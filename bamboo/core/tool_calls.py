"""Tool calls as models make them: assembled from deltas, checked against the tools that there are."""

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from bamboo.core.types import (
    JsonObject,
    MessageId,
    ToolCall,
    ToolCallDelta,
    ToolCallId,
    ToolResult,
    ToolSpec,
    is_too_deep,
)


@dataclass(slots=True)
class _ToolCallParts:
    tool_call_id: str | None = None
    tool: str = ""
    arguments: list[str] = field(default_factory=list)


class ToolCallAssembler:
    """The calls of one step, from their deltas. `new_id` names a call that the model gave no id, or one given twice."""

    __slots__ = ("_new_id", "_parts")

    def __init__(self, new_id: Callable[[], MessageId]) -> None:
        self._new_id = new_id
        self._parts: dict[int, _ToolCallParts] = {}

    def clear(self) -> None:
        """The next step begins."""
        self._parts.clear()

    def feed(self, delta: ToolCallDelta) -> None:
        parts = self._parts.setdefault(delta.index, _ToolCallParts())
        if delta.tool_call_id:
            parts.tool_call_id = delta.tool_call_id
        if delta.tool:
            parts.tool = delta.tool
        parts.arguments.append(delta.arguments)

    def assembled(self) -> tuple[ToolCall, ...]:
        """The calls, in the order of their index."""
        calls: dict[ToolCallId, ToolCall] = {}
        for _, parts in sorted(self._parts.items()):
            call_id = ToolCallId(parts.tool_call_id or "")
            if not call_id or call_id in calls:
                call_id = ToolCallId(f"call_{self._new_id()}")
            calls[call_id] = ToolCall(call_id, parts.tool, "".join(parts.arguments))
        return tuple(calls.values())


@dataclass(frozen=True, slots=True)
class PlannedCall:
    """One tool call of a step. `refusal` is its result where there is nothing to run: unknown tool, arguments that are
    no object."""

    call: ToolCall
    arguments: JsonObject
    refusal: ToolResult | None


def plan_call(call: ToolCall, tools: Sequence[ToolSpec]) -> PlannedCall:
    """What is to be done for a call that the model made: run a tool of `tools`, or refuse it, so that the model hears
    why."""
    if not any(spec.name == call.tool for spec in tools):
        return PlannedCall(call, {}, ToolResult(f"There is no tool named {call.tool!r}.", ok=False))
    try:
        return PlannedCall(call, decode_arguments(call.arguments), None)
    except ValueError as error:
        return PlannedCall(call, {}, ToolResult(f"The arguments are no JSON object: {error}", ok=False))


def decode_arguments(text: str) -> JsonObject:
    """A call's arguments as an object; nothing at all means {}. Raises ValueError for whatever not every JSON decoder
    could take back.

    That is more than bad syntax: NaN, numbers beyond 64 bits, lone surrogates and endless nesting come from models too,
    and would break the log that they are written to.
    """
    try:
        arguments = json.loads(text or "{}", parse_int=_int64)
        if is_too_deep(arguments):
            raise ValueError("it is nested too deeply")
        json.dumps(arguments, ensure_ascii=False, allow_nan=False).encode()  # 1e999 is an infinity
    except RecursionError:
        raise ValueError("it is nested too deeply") from None
    if not isinstance(arguments, dict):
        raise ValueError(f"it is a {type(arguments).__name__}")  # noqa: TRY004 - what was written is wrong, not its type
    return arguments


def _int64(digits: str) -> int:
    number = int(digits)
    if not -(2**63) <= number < 2**63:
        raise ValueError("an integer has more than 64 bits")
    return number
