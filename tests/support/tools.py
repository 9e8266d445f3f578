"""A toolbox that a test plays by hand."""

from collections.abc import Awaitable, Callable

import trio

from bamboo.core.types import JsonObject, ToolCallId, ToolResult, ToolSpec


class FakeToolbox:
    """Tools that are functions of the test. `running` are the calls that have begun and not ended."""

    revision = 7

    def __init__(self, **tools: Callable[[JsonObject], Awaitable[ToolResult]]) -> None:
        self._tools = tools
        self.specs = tuple(ToolSpec(name, f"Does {name}.", {"type": "object", "properties": {}}) for name in tools)
        self.running: set[ToolCallId] = set()
        self.called = trio.Event()

    async def call(self, tool_call_id: ToolCallId, tool: str, arguments: JsonObject) -> ToolResult:
        self.running.add(tool_call_id)
        self.called.set()
        try:
            return await self._tools[tool](arguments)
        finally:
            self.running.discard(tool_call_id)
