"""A provider that a test plays by hand: every model call waits for the test to say what the model says."""

from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field

import trio

from bamboo.core.types import FinishDelta, ModelCall, ProviderDelta, TextDelta, ToolCallDelta
from bamboo.errors import BambooError, UpstreamError

_Answer = Sequence[ProviderDelta] | BaseException


class PlayedCall:
    """One model call that the server made. `closed` is set when the server has let go of it."""

    def __init__(self, call: ModelCall) -> None:
        self.call = call
        self.closed = trio.Event()
        self._send, self._receive = trio.open_memory_channel[_Answer](1000)

    def say(self, *texts: str) -> None:
        """One network read that brings these text deltas."""
        self.send(*(TextDelta(text) for text in texts))

    def send(self, *deltas: ProviderDelta) -> None:
        self._send.send_nowait(deltas)

    def ask(self, tool: str, arguments: str = "{}", *, tool_call_id: str = "call_1", index: int = 0) -> None:
        self.send(ToolCallDelta(index, tool_call_id, tool, arguments))

    def end(self, reason: str = "stop") -> None:
        self._send.send_nowait((FinishDelta(reason),))
        self._send.send_nowait(())

    def fail(self, error: UpstreamError | Exception) -> None:
        self._send.send_nowait(error)

    async def receive(self) -> Sequence[ProviderDelta]:
        answer = await self._receive.receive()
        if isinstance(answer, BaseException):
            raise answer
        return answer

    @property
    def unread(self) -> int:
        """Reads that the server has not made yet."""
        return self._receive.statistics().current_buffer_used

    def close(self) -> None:
        self._send.close()
        self._receive.close()
        self.closed.set()


@dataclass
class PlayedModel:
    """Satisfies `llm.base.Provider`. `refusals` fail the next calls on entering, one each."""

    name: str = "played"
    kind: str = "scripted"
    default_model: str = "played-1"
    demo: bool = False
    refusals: list[BambooError] = field(default_factory=list)
    calls: list[PlayedCall] = field(default_factory=list)

    def __post_init__(self) -> None:
        self._called = trio.Event()
        self._taken = 0

    @asynccontextmanager
    async def stream(self, call: ModelCall) -> AsyncIterator[PlayedCall]:
        await trio.lowlevel.checkpoint()
        if self.refusals:
            raise self.refusals.pop(0)
        played = PlayedCall(call)
        self.calls.append(played)
        self._called.set()
        self._called = trio.Event()
        try:
            yield played
        finally:
            played.close()

    async def next_call(self) -> PlayedCall:
        """The next call that the server makes, in order."""
        while len(self.calls) <= self._taken:
            await self._called.wait()
        self._taken += 1
        return self.calls[self._taken - 1]
