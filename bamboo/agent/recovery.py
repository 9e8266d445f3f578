"""How a run that its process, or its runner, did not survive is settled: from its durable events, with one terminal
event."""

from bamboo.agent.execution import new_message_id
from bamboo.core.events import AgentError, EventBody, RunStarted
from bamboo.core.history import OpenStep
from bamboo.errors import RETRYABLE, ErrorCode
from bamboo.store.base import Run, Store

_READ_BYTES = 1024 * 1024

_MESSAGES = {
    ErrorCode.INTERRUPTED: "the server stopped before the run was done; its partial answer is kept",
    ErrorCode.INTERNAL: "the run hit a bug in the server; its log says what",
}


async def closing_of(run: Run, store: Store, code: ErrorCode) -> list[EventBody]:
    """What ends a run that was running and that nothing drives any more. The last body is its terminal event.

    The text of a step that was not finished becomes a partial message; a tool call whose intent is in the log without a
    result is `uncertain`, because it may have taken effect. Raises StoreError.
    """
    assert run.first_cursor is not None
    step = OpenStep()
    provider = model = ""
    seq = run.first_cursor.seq
    while (page := await store.read(run.session_id, seq, max_bytes=_READ_BYTES, run_id=run.run_id)) is not None:
        for event in page.events:
            step.apply(event.body)
            if isinstance(event.body, RunStarted):
                provider, model = event.body.provider, event.body.model
        if page.through >= page.extent.head:
            break
        seq = page.through
    closing = step.close(provider, model, "uncertain", new_message_id)
    return [*closing, AgentError(code, _MESSAGES[code], code in RETRYABLE)]
