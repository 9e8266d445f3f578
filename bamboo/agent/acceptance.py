"""What a chat becomes when it is accepted: its run, and the one transaction that makes it so."""

from typing import Final

from bamboo.agent.execution import RunMaterials, new_message_id
from bamboo.agent.surroundings import Home, Surroundings
from bamboo.agent.writer import Entry
from bamboo.config import Config
from bamboo.core.events import EventBody, RunQueued, SessionCreated, UserMessage
from bamboo.core.types import Chat, RunId, SessionId, content_text
from bamboo.errors import ClientError, ErrorCode, StoreError
from bamboo.store.base import IdempotencyKey, Run, Session

TITLE_CHARACTERS: Final = 80
"""A session's first title is the beginning of its first message."""

RETRY_AFTER_S: Final = 2.0
"""When a chat that was refused for want of room may be tried again: about a short run's length."""


def record_of(chat: Chat, session_id: SessionId, around: Surroundings) -> Run:
    """The run of a chat that is about to be accepted."""
    return Run(
        run_id=around.new_run_id(),
        session_id=session_id,
        message_id=new_message_id(),
        content=chat.content,
        accepted_ms=around.now_ms(),
        provider=chat.provider,
        model=chat.model,
        system_prompt=chat.system_prompt,
        params=chat.params,
        metadata=chat.metadata,
        client_message_id=chat.client_message_id,
        cancel_after_s=chat.cancel_after_s,
    )


def acceptance(
    record: Run, key: IdempotencyKey | None, *, new_session: bool, starting: RunMaterials | None, position: int
) -> Entry:
    """The one transaction that accepts a chat: session if it is new, message, run, key, and the start if there is a
    slot; else its `position` in the session's queue."""
    run_id = record.run_id
    bodies: list[tuple[RunId | None, EventBody]] = []
    session = None
    if new_session:
        title = " ".join(content_text(record.content)[: 4 * TITLE_CHARACTERS].split())[:TITLE_CHARACTERS] or None
        session = Session(record.session_id, record.accepted_ms, record.accepted_ms, title=title)
        bodies.append((None, SessionCreated(title)))
    bodies.append((run_id, UserMessage(record.message_id, record.content, record.client_message_id)))
    bodies.append((run_id, RunQueued(position) if starting is None else starting.started))
    return Entry(bodies, session=session, accept=record, key=key, retried=False)


def no_room_to_queue(around: Surroundings, home: Home) -> ClientError | None:
    """Why no further run can be queued, in whatever session; None while one can."""
    if home.queued_runs < around.config.agent.max_queued_runs:
        return None
    message = f"the server has {home.queued_runs} queued runs (agent.max_queued_runs)"
    return ClientError(ErrorCode.OVERLOADED, message, retry_after_s=RETRY_AFTER_S)


def draining(config: Config) -> ClientError:
    return ClientError(ErrorCode.DRAINING, "the server is shutting down", retry_after_s=max(1.0, config.server.drain_s))


def not_writable() -> StoreError:
    return StoreError("the store does not take writes just now")
