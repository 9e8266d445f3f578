"""What raises, as often as a test says, what nothing of the kind may raise: a bug of ours, for all that the server
knows."""

import trio

from bamboo.bus.log_reader import LogPage
from bamboo.core.types import JsonObject, RunId, SessionId, ToolCallId, ToolResult
from bamboo.store.base import Run
from tests.support.bugs import InjectedBug
from tests.support.stores import GatedStore


class FragileStore(GatedStore):
    """Looking for a run, and reading one run's log, raise what no store may, as often as `bad_lookups` and `bad_reads`
    say. Readers of whole sessions are spared."""

    bad_lookups = 0
    bad_reads = 0

    async def run(self, run_id: RunId) -> Run | None:
        if self.bad_lookups:
            self.bad_lookups -= 1
            await trio.lowlevel.checkpoint()
            raise InjectedBug
        return await super().run(run_id)

    async def read(
        self, session_id: SessionId, after_seq: int, *, max_bytes: int, run_id: RunId | None = None
    ) -> LogPage | None:
        if self.bad_reads and run_id is not None:
            self.bad_reads -= 1
            await trio.lowlevel.checkpoint()
            raise InjectedBug
        return await super().read(session_id, after_seq, max_bytes=max_bytes, run_id=run_id)


class FragileToolbox:
    """No tools; the next `bad` runs cannot even have that."""

    revision = 0
    specs = ()

    def __init__(self) -> None:
        self.bad = 0

    def __call__(self) -> "FragileToolbox":
        if self.bad:
            self.bad -= 1
            raise InjectedBug
        return self

    async def call(self, tool_call_id: ToolCallId, tool: str, arguments: JsonObject) -> ToolResult:  # noqa: ARG002
        raise AssertionError
