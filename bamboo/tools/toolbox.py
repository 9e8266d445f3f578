"""What a run can call. Tools themselves come with skills and MCP; a server without any has the empty toolbox."""

from collections.abc import Sequence
from typing import Protocol

from bamboo.core.types import JsonObject, ToolCallId, ToolResult, ToolSpec


class Toolbox(Protocol):
    """The tools of one run, pinned when it starts."""

    @property
    def revision(self) -> int:
        """Of the skills that it was made from."""

    @property
    def specs(self) -> Sequence[ToolSpec]: ...

    async def call(self, tool_call_id: ToolCallId, tool: str, arguments: JsonObject) -> ToolResult:
        """Run one tool of `specs` to its end. What goes wrong in a tool is a result with `ok=False`, never an
        exception.

        If cancelled, nothing of the call is alive when this is left.
        """


class EmptyToolbox:
    """No tools."""

    revision = 0
    specs: Sequence[ToolSpec] = ()

    async def call(self, tool_call_id: ToolCallId, tool: str, arguments: JsonObject) -> ToolResult:  # noqa: ARG002
        raise AssertionError(f"a toolbox without tools was asked for {tool!r}")
