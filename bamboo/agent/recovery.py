"""How a run that its process, or its runner, did not survive is settled: from its durable events, with one terminal
event."""

from collections.abc import Callable

from bamboo.agent.execution import new_message_id
from bamboo.core.events import AgentError, AgentMessage, AgentRetry, AgentStopped, EventBody, RunStarted
from bamboo.core.history import OpenStep
from bamboo.errors import RETRYABLE, ErrorCode
from bamboo.store.base import Run, Store

_READ_BYTES = 1024 * 1024

_MESSAGES = {
    ErrorCode.INTERRUPTED: "the server stopped before the run was done; its partial answer is kept",
    ErrorCode.INTERNAL: "the run hit a bug in the server; its log says what",
    ErrorCode.STORE_UNAVAILABLE: "the database gave no answer in time; the run's partial answer is kept",
}

CutShort = AgentError | AgentStopped
"""The terminal event of a run that did not come to its own end."""


def cut_short(code: ErrorCode) -> AgentError:
    """The terminal event of a run that nothing drives any more, for one of the reasons that this module knows."""
    return AgentError(code, _MESSAGES[code], code in RETRYABLE)


async def closing_of(
    run: Run, end: CutShort, store: Store, default_model: Callable[[str], str]
) -> tuple[EventBody, ...]:
    """What ends a run that nothing drives any more; the last body is `end`.

    The text of a step that was not finished becomes a partial message; a tool call whose intent is in the log without a
    result is `uncertain`, because it may have taken effect. `default_model` tells that of a provider: what a fallback
    is asked for. Raises StoreError.
    """
    assert run.first_cursor is not None
    step = OpenStep()
    provider = model = ""
    seq = run.first_cursor.seq
    while (page := await store.read(run.session_id, seq, max_bytes=_READ_BYTES, run_id=run.run_id)) is not None:
        for event in page.events:
            body = event.body
            step.apply(body)
            if isinstance(body, RunStarted | AgentMessage):
                provider, model = body.provider, body.model
            elif isinstance(body, AgentRetry) and body.provider != provider:
                provider, model = body.provider, default_model(body.provider)
        if page.through >= page.extent.head:
            break
        seq = page.through
    return (*step.close(provider, model, "uncertain", new_message_id), end)
