"""The store's records as JSON: sessions, runs, messages, the snapshot. The same objects over HTTP and in the gateway's
`history` frame."""

from collections.abc import Iterable
from typing import Any

from bamboo.core.types import Message, RunStats
from bamboo.store.base import LiveStep, QueuedRun, Run, Session, Snapshot
from bamboo.wire.encode import content_json, timestamp, tool_call_json, usage_json


def message_fields(message: Message) -> dict[str, Any]:
    fields: dict[str, Any] = {
        "message_id": message.message_id,
        "run_id": message.run_id,
        "role": message.role,
        "content": content_json(message.content),
    }
    if message.tool_calls:
        fields["tool_calls"] = [tool_call_json(call) for call in message.tool_calls]
    if message.tool_call_id is not None:
        fields["tool_call_id"] = message.tool_call_id
    if message.partial:
        fields["partial"] = True
    fields["time"] = timestamp(message.time_ms)
    return fields


def snapshot_fields(snapshot: Snapshot) -> dict[str, Any]:
    """A session's history at one moment. Reading this, then the log after `cursor`, shows everything exactly once."""
    return {
        "session_id": snapshot.session_id,
        **page_fields(snapshot),
        "cursor": str(snapshot.cursor),
        "seq": snapshot.cursor.seq,
        "live": None if snapshot.live is None else _live_fields(snapshot.live),
        "queue": [_queued_fields(run) for run in snapshot.queue],
        "approvals": [],
    }


def page_fields(snapshot: Snapshot) -> dict[str, Any]:
    """Only its messages: what an older page (`before`) is. `more` says that there are older ones still."""
    return {"messages": [message_fields(message) for message in snapshot.messages], "more": snapshot.more}


def _live_fields(live: LiveStep) -> dict[str, Any]:
    fields: dict[str, Any] = {"run_id": live.run_id, "status": live.status, "text": live.text}
    if live.reasoning:
        fields["reasoning"] = live.reasoning
    return fields


def _queued_fields(run: QueuedRun) -> dict[str, Any]:
    return {
        "run_id": run.run_id,
        "message_id": run.message_id,
        "content": content_json(run.content),
        "position": run.position,
    }


def session_fields(session: Session) -> dict[str, Any]:
    """A setting that is null is not set: the server's default holds."""
    return {
        "session_id": session.session_id,
        "title": session.title,
        "provider": session.provider,
        "model": session.model,
        "system_prompt": session.system_prompt,
        "params": session.params,
        "metadata": session.metadata,
        "created_at": timestamp(session.created_ms),
        "updated_at": timestamp(session.updated_ms),
    }


def sessions_fields(sessions: Iterable[Session], next_page: str | None) -> dict[str, Any]:
    """A page of sessions; `next` is the `before` of the page after it, null at the end."""
    return {"sessions": [session_fields(session) for session in sessions], "next": next_page}


def run_fields(run: Run) -> dict[str, Any]:
    """A run as far as its committed events say. What has not happened (yet) is null.

    `provider` and `model` are those that answer, before the run starts those that the chat named. `cursor` is the place
    just before the run's first event.
    """
    return {
        "run_id": run.run_id,
        "session_id": run.session_id,
        "message_id": run.message_id,
        "status": run.status,
        "content": content_json(run.content),
        "provider": run.used_provider or run.provider,
        "model": run.used_model or run.model,
        "client_message_id": run.client_message_id,
        "metadata": run.metadata,
        "cursor": None if run.first_cursor is None else str(run.first_cursor),
        "accepted_at": timestamp(run.accepted_ms),
        "started_at": _timestamp(run.started_ms),
        "finished_at": _timestamp(run.finished_ms),
        "finish_reason": run.finish_reason,
        "usage": None if run.usage is None else usage_json(run.usage),
        "stats": None if run.stats is None else _stats_fields(run.stats),
        "error": None if run.error_code is None else {"code": run.error_code, "message": run.error_message},
        "stop_reason": run.stop_reason,
    }


def _stats_fields(stats: RunStats) -> dict[str, Any]:
    return {"queue_ms": stats.queue_ms, "ttft_ms": stats.ttft_ms, "elapsed_ms": stats.elapsed_ms}


def _timestamp(time_ms: int | None) -> str | None:
    return None if time_ms is None else timestamp(time_ms)
