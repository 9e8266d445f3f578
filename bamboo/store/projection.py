"""What a commit means: the run states and the history that follow from its events, and the rules that every log keeps.

Pure, and used by every store, inside the transaction that writes the events.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

from bamboo.core.events import (
    AgentComplete,
    AgentError,
    AgentMessage,
    AgentStopped,
    ApprovalRequired,
    ApprovalResolved,
    Delta,
    Event,
    RunStarted,
    UserMessage,
    event_bytes,
    terminal_status,
)
from bamboo.core.history import Opening, message_of
from bamboo.core.types import Cursor, Epoch, Message, RunId, RunStatus, SessionId
from bamboo.store.base import Commit, QueuedRun, Run


def project_run(run: Run, event: Event) -> Run:
    """The run's state after this event of its own. AssertionError for an event behind the run's terminal event.

    A run that waits for approvals runs again with the first event that is not about an approval: several may be
    pending, and all of them are resolved before any call starts.
    """
    assert event.run_id == run.run_id
    assert not run.status.finished, f"{event.body.type} behind the terminal event of run {run.run_id}"
    body = event.body
    match body:
        case UserMessage():
            return replace(run, first_cursor=Cursor(event.epoch, event.seq - 1))
        case RunStarted():
            assert run.status is RunStatus.QUEUED, f"run {run.run_id} starts twice"
            return replace(
                run,
                status=RunStatus.RUNNING,
                started_ms=event.time_ms,
                used_provider=body.provider,
                used_model=body.model,
            )
        case ApprovalRequired():
            return replace(run, status=RunStatus.AWAITING_APPROVAL)
        case ApprovalResolved():
            return run
        case AgentComplete() | AgentError() | AgentStopped():
            return _ended(run, event, body)
    if run.status is RunStatus.AWAITING_APPROVAL:
        run = replace(run, status=RunStatus.RUNNING)
    if isinstance(body, AgentMessage) and (body.provider, body.model) != (run.used_provider, run.used_model):
        run = replace(run, used_provider=body.provider, used_model=body.model)
    return run


def _ended(run: Run, event: Event, body: AgentComplete | AgentError | AgentStopped) -> Run:
    run = replace(run, status=terminal_status(body), last_seq=event.seq, finished_ms=event.time_ms)
    match body:
        case AgentComplete():
            return replace(run, finish_reason=body.finish_reason, usage=body.usage, stats=body.stats)
        case AgentError():
            return replace(run, error_code=body.code, error_message=body.message)
        case AgentStopped():
            return replace(run, stop_reason=body.reason)


def accepted(run: Run) -> Run:
    """The run as it is accepted: queued, and nothing of it has happened."""
    return Run(
        run_id=run.run_id,
        session_id=run.session_id,
        message_id=run.message_id,
        content=run.content,
        accepted_ms=run.accepted_ms,
        provider=run.provider,
        model=run.model,
        system_prompt=run.system_prompt,
        params=run.params,
        metadata=run.metadata,
        client_message_id=run.client_message_id,
        cancel_after_s=run.cancel_after_s,
    )


@dataclass(frozen=True, slots=True)
class Projected:
    """What a commit does besides adding its events. `messages` come with the seq of the event that makes them."""

    head: int
    changed: Sequence[Run]
    unfinished: Mapping[RunId, Run]
    messages: Sequence[tuple[int, Message]]


def project_commit(
    commit: Commit, *, session_id: SessionId, epoch: Epoch, head: int, stored: bool, unfinished: Mapping[RunId, Run]
) -> Projected:
    """What `commit` does to a log with this head and these unfinished runs. AssertionError for a commit that breaks a
    rule of the log.
    """
    _check(commit, session_id, stored=stored)
    runs = dict(unfinished)
    if commit.accept is not None:
        assert commit.accept.run_id not in runs, f"run {commit.accept.run_id} is accepted twice"
        runs[commit.accept.run_id] = accepted(commit.accept)
    changed: dict[RunId, Run] = {}
    messages: list[tuple[int, Message]] = []
    quiet: RunId | None = None  # a delta of this run was just seen: the next one changes nothing
    for event in commit.events:
        head += 1
        assert event.seq == head, f"event {event.seq} committed where {head} is next"
        assert event.epoch == epoch, f"event {event.seq} of another epoch"
        assert event.session_id == session_id, f"event {event.seq} of another session"
        run_id = event.run_id
        if run_id is None:
            continue
        if isinstance(event.body, Delta):
            if run_id == quiet:
                continue
            quiet = run_id
        else:
            quiet = None
        run = runs.get(run_id)
        assert run is not None, f"{event.body.type} of run {run_id}, which is not an unfinished run of this session"
        after = project_run(run, event)
        if after is not run:
            runs[run_id] = changed[run_id] = after
        message = message_of(event, Opening(run.message_id, run.content, run.accepted_ms))
        if message is not None:
            messages.append((head, message))
    if commit.accept is not None:
        started = changed.get(commit.accept.run_id, commit.accept)
        assert started.first_cursor is not None, "a run is accepted with its user message"
    left = {run_id: run for run_id, run in runs.items() if not run.status.finished}
    return Projected(head, tuple(changed.values()), left, messages)


def _check(commit: Commit, session_id: SessionId, *, stored: bool) -> None:
    assert stored or commit.session is not None, "the first commit of a session carries its settings"
    assert commit.session is None or commit.session.session_id == session_id, "the settings of another session"
    assert commit.accept is None or commit.accept.session_id == session_id, "a run of another session"
    assert commit.key is None or commit.accept is not None, "an idempotency key without its run"
    assert not commit.delete or (stored and commit.accept is None), (
        "only what is stored is deleted, and nothing with it accepted"
    )


def queue_of(unfinished: Iterable[Run]) -> tuple[QueuedRun, ...]:
    """The queued ones of a session's unfinished runs, which come in the order of their acceptance."""
    queued = (run for run in unfinished if run.status is RunStatus.QUEUED)
    return tuple(
        QueuedRun(run.run_id, run.message_id, run.content, position) for position, run in enumerate(queued, start=1)
    )


def running_of(unfinished: Iterable[Run]) -> Run | None:
    """The one of a session's unfinished runs that has started."""
    return next((run for run in unfinished if run.status is not RunStatus.QUEUED), None)


def fill_page(events: Iterable[Event], *, max_bytes: int) -> tuple[list[Event], bool]:
    """As many of `events` as `max_bytes` allow, at least one if there is one; and whether these are all."""
    page: list[Event] = []
    size = 0
    for event in events:
        size += event_bytes(event.body)
        if page and size > max_bytes:
            return page, False
        page.append(event)
    return page, True
