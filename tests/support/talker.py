"""A model that talks by itself, from a script, and looks at what it is sent."""

from collections import deque
from collections.abc import AsyncIterator, Callable, Iterable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Final

import trio

from bamboo.core.types import FinishDelta, ModelCall, ProviderDelta, RunId, TextDelta, ToolCallDelta
from bamboo.errors import ErrorCode, UpstreamError
from tests.support.bugs import InjectedBug
from tests.support.model import PlayedCall, PlayedModel


@dataclass(frozen=True, slots=True)
class Silence:
    seconds: float


@dataclass(frozen=True, slots=True)
class Failure:
    """The provider fails with this code; None is a bug of ours in the adapter."""

    code: ErrorCode | None
    retry_after_s: float | None = 0.01
    """Always told, so that no jitter is drawn."""


Piece = Sequence[ProviderDelta] | Silence | Failure
"""What happens next in an answer; deltas are one network read."""

Answer = Sequence[Piece]
"""A failure that comes first refuses the call; after the last piece the answer is whole."""


def say(*texts: str) -> Piece:
    return tuple(TextDelta(text) for text in texts)


def ask(tool: str, tool_call_id: str, *, index: int = 0, arguments: str = "{}") -> Piece:
    return (ToolCallDelta(index, tool_call_id, tool, arguments),)


END: Final = (FinishDelta("stop"),)

SHORT: Final[Answer] = (say("one "), say("two ", "three"), END)


class SpokenCall(PlayedCall):
    def __init__(self, call: ModelCall, answer: Iterable[Piece], scale: float) -> None:
        super().__init__(call)
        self._scale = scale
        self._pieces = deque(answer)

    @property
    def run_id(self) -> RunId:
        return self.call.messages[-1].run_id

    async def receive(self) -> Sequence[ProviderDelta]:
        """What has come is handed out even if the run is cancelled in that moment, as a socket does it."""
        await trio.lowlevel.checkpoint_if_cancelled()
        while self._pieces:
            piece = self._pieces.popleft()
            if isinstance(piece, Silence):
                await trio.sleep(piece.seconds * self._scale)
            elif isinstance(piece, Failure):
                _fail(piece)
            else:
                await trio.lowlevel.cancel_shielded_checkpoint()
                return piece
        await trio.lowlevel.cancel_shielded_checkpoint()
        return ()


class Talker(PlayedModel):
    """Gives `answers` in turn, then `usually` for good. `hear` is called with every call, before anything is awaited.
    Silences are in seconds times `scale`."""

    def __init__(
        self,
        answers: Iterable[Answer] = (),
        *,
        usually: Answer = SHORT,
        hear: Callable[[ModelCall], None] | None = None,
        scale: float = 1.0,
    ) -> None:
        super().__init__()
        self._answers = deque(answers)
        self._usually = usually
        self._hear = hear
        self._scale = scale
        self.speaking: list[SpokenCall] = []
        """The answers that are under way."""

    @asynccontextmanager
    async def stream(self, call: ModelCall) -> AsyncIterator[PlayedCall]:
        if self._hear is not None:
            self._hear(call)
        answer = self._answers.popleft() if self._answers else self._usually
        spoken = SpokenCall(call, answer, self._scale)
        self.speaking.append(spoken)
        try:
            await trio.lowlevel.checkpoint()
            if answer and isinstance(answer[0], Failure):
                _fail(answer[0])
            yield spoken
        finally:
            self.speaking.remove(spoken)
            spoken.close()

    def speaks_for(self, run_id: RunId) -> bool:
        return any(spoken.run_id == run_id for spoken in self.speaking)


def _fail(failure: Failure) -> None:
    if failure.code is None:
        raise InjectedBug
    raise UpstreamError(failure.code, "the model fails", retry_after_s=failure.retry_after_s)
