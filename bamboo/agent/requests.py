"""What a session's runner can be asked through its inbox. Each request carries its own reply channel."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Generic, TypeVar

import trio

from bamboo.core.types import Accepted, Chat, RunId, StopReceipt
from bamboo.errors import BambooError, ClientError, ErrorCode
from bamboo.store.base import IdempotencyKey, KeyHolder, Session

T = TypeVar("T")


class Reply(Generic[T]):
    """A reply channel for one answer: a trio memory channel of capacity 1.

    The runner answers exactly once and never waits; a caller that has gone is no concern of it. The caller waits once.
    """

    def __init__(self) -> None:
        self._send, self._receive = trio.open_memory_channel[T | BambooError](1)
        self._answered = False

    def answer(self, value: T) -> None:
        self._put(value)

    def fail(self, error: BambooError) -> None:
        self._put(error)

    def _put(self, item: T | BambooError) -> None:
        self._answered = True
        with self._send:
            try:
                self._send.send_nowait(item)
            except trio.BrokenResourceError:
                return  # the caller has left; what was done for it stays done

    def close(self, unanswered: BambooError | None = None) -> None:
        """The runner is done with the request. If it was not answered, the caller is told `unanswered`, else
        `internal`. Idempotent."""
        if unanswered is not None and not self._answered:
            self._put(unanswered)
        self._send.close()

    def drop(self) -> None:
        """The request goes nowhere: nobody will answer, nobody will wait."""
        self._send.close()
        self._receive.close()

    async def wait(self) -> T:
        """The answer. Raises the BambooError that was given instead. If cancelled, nothing of the request is undone."""
        with self._receive:
            try:
                item = await self._receive.receive()
            except trio.EndOfChannel:
                raise BambooError(ErrorCode.INTERNAL, "the session's runner ended before it answered") from None
        if isinstance(item, BambooError):
            raise item
        return item


@dataclass(frozen=True, slots=True)
class ChatRequest:
    chat: Chat
    key: IdempotencyKey | None
    reply: Reply[Accepted] = field(default_factory=Reply)


@dataclass(frozen=True, slots=True)
class StopRequest:
    """`run_id` None: the running run and all queued ones."""

    run_id: RunId | None
    reply: Reply[StopReceipt] = field(default_factory=Reply)


@dataclass(frozen=True, slots=True)
class UpdateRequest:
    """Replace the named settings of the session."""

    changes: Mapping[str, Any]
    reply: Reply[Session] = field(default_factory=Reply)


@dataclass(frozen=True, slots=True)
class DeleteRequest:
    """With `unused_since_ms` only if nothing was committed to the session from then on, and no run is unfinished."""

    unused_since_ms: int | None = None
    reply: Reply[None] = field(default_factory=Reply)


Request = ChatRequest | StopRequest | UpdateRequest | DeleteRequest


def refuse_all(inbox: trio.MemoryReceiveChannel[Request], error: BambooError) -> None:
    """Answer every request that waits in a closed inbox: who closes an inbox leaves nobody hanging."""
    while True:
        try:
            request = inbox.receive_nowait()
        except (trio.WouldBlock, trio.EndOfChannel):
            return
        request.reply.fail(error)


def duplicate_of(holder: KeyHolder, key: IdempotencyKey) -> Accepted:
    """The answer to a chat whose key stands for a run already. Raises ClientError `idempotency_conflict` if it was
    another chat."""
    run = holder.run
    if holder.fingerprint != key.fingerprint:
        raise ClientError(
            ErrorCode.IDEMPOTENCY_CONFLICT,
            "this idempotency key was used with another message, session, model or provider",
            session_id=run.session_id,
            run_id=run.run_id,
        )
    assert run.first_cursor is not None
    return Accepted(run.session_id, run.run_id, run.message_id, run.status, "duplicate", run.first_cursor)
