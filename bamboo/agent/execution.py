"""One run, driven: the state machine of `core.run` joined to a provider and a toolbox, inside the run's one cancel
scope."""

import math
import random
import secrets
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Final

import structlog
import trio

from bamboo.agent.writer import Entry, LogWriter
from bamboo.config import AgentConfig
from bamboo.core.attempts import Candidate, Failure
from bamboo.core.events import EventBody, RunStarted, Terminal
from bamboo.core.run import CallTools, RunLimits, RunMachine, RunSettings
from bamboo.core.tool_calls import PlannedCall
from bamboo.core.types import JsonObject, MessageId, ModelCall, RunId, StopReason, ToolResult
from bamboo.errors import ErrorCode, StoreError, UpstreamError
from bamboo.llm.base import Provider, RequestRejectedError
from bamboo.store.base import Run, Store
from bamboo.tools.toolbox import Toolbox

log = structlog.get_logger("bamboo.agent")

_RANDOM: Final = random.Random()  # noqa: S311 - jitter, not a secret


def new_message_id() -> MessageId:
    return MessageId(f"msg_{secrets.token_urlsafe(16)}")


@dataclass(frozen=True, slots=True)
class RunDeadlines:
    """Seconds; each ends the run with a code of its own. `run_s` counts from the run's start."""

    run_s: float
    first_token_s: float
    idle_s: float
    tool_s: float


@dataclass(frozen=True, slots=True)
class RunMaterials:
    """What a run is made of, fixed when it starts. `candidates`, each with its model, are asked one after the other."""

    candidates: Sequence[tuple[Provider, str]]
    system_prompt: str | None
    params: JsonObject | None
    toolbox: Toolbox
    config: AgentConfig
    max_retries: int

    @property
    def started(self) -> RunStarted:
        provider, model = self.candidates[0]
        return RunStarted(provider.name, model, self.toolbox.revision)


class ActiveRun:
    """A run that has its slot, until its terminal event.

    `stop` and `fail` may come from any task at any time; they seal the machine synchronously, and `execute` then
    winds up what is still open.
    """

    def __init__(self, record: Run, made_of: "RunMaterials") -> None:
        self.record = record
        self.started = made_of.started
        self._providers = {provider.name: provider for provider, _ in made_of.candidates}
        self.toolbox = made_of.toolbox
        config = made_of.config
        self.machine = RunMachine(
            RunSettings(
                run_id=record.run_id,
                candidates=[Candidate(provider.name, model) for provider, model in made_of.candidates],
                system_prompt=made_of.system_prompt,
                params=made_of.params,
                tools=made_of.toolbox.specs,
                limits=RunLimits(config.max_steps, made_of.max_retries),
            ),
            new_message_id=new_message_id,
            random=_RANDOM.random,
        )
        self.deadlines = RunDeadlines(
            config.run_timeout_s, config.first_token_timeout_s, config.idle_timeout_s, config.tool_timeout_s
        )
        self.scope = trio.CancelScope()
        self.tools_stopped = 0

    def __repr__(self) -> str:
        return f"<ActiveRun {self.machine!r}>"

    @property
    def run_id(self) -> RunId:
        return self.record.run_id

    @property
    def provider(self) -> Provider:
        """The one that is asked now."""
        return self._providers[self.machine.candidate.provider]

    def stop(self, reason: StopReason) -> bool:
        """Seal the run as stopped and cancel what it does. False: it was sealed already, and ends as it was."""
        if not self.machine.stop(reason):
            return False
        self.scope.cancel()
        return True

    def fail(self, code: ErrorCode, message: str, *, retryable: bool) -> bool:
        """Seal the run as failed and cancel what it does. False: it was sealed already, and ends as it was."""
        if not self.machine.fail(Failure(code, message, retryable)):
            return False
        self.scope.cancel()
        return True


async def execute(run: ActiveRun, store: Store, writer: LogWriter, now_ms: Callable[[], int]) -> Terminal:
    """Drive a run that has its slot and whose `run_started` was handed over, to its committed terminal event.

    When it returns, nothing of the run is alive. An exception other than a provider's or a tool's own failure is a bug
    and leaves the run unfinished.
    """
    machine = run.machine
    with run.scope:
        run.scope.deadline = trio.current_time() + run.deadlines.run_s
        try:
            history = await store.messages(run.record.session_id)
        except StoreError as error:
            machine.fail(Failure(error.code, error.message, error.retryable))
        else:
            machine.begin(history, accepted_ms=run.record.accepted_ms, now_ms=now_ms())
        while not machine.sealed:
            await _step(run, writer, now_ms)
    # The scope is left: whatever cancels from here on comes too late. Not sealed means that its own deadline ended it.
    if not machine.sealed:
        message = f"the run took longer than {run.deadlines.run_s:g} s"
        machine.fail(Failure(ErrorCode.RUN_TIMEOUT, message, retryable=False))
    await writer.submit(Entry([(run.run_id, body) for body in machine.closing])).wait()
    return machine.terminal


async def _step(run: ActiveRun, writer: LogWriter, now_ms: Callable[[], int]) -> None:
    """One model call, with what follows from it: its tools, or the pause before it is tried again."""
    machine = run.machine
    try:
        await _call_model(run, machine.next_call(), writer, now_ms)
    except UpstreamError as error:
        failed = run.provider.name
        retry = machine.failed(_failure(error))
        then = "the run has failed" if retry is None else f"{retry.body.provider} in {retry.body.delay_ms} ms"
        log.warning(
            "provider_failed", run_id=run.run_id, provider=failed, code=error.code, error=error.message, next=then
        )
        if retry is not None:
            await _commit(writer, run.run_id, retry.body)
            await trio.sleep(retry.delay_s)
        return
    step = machine.step_ended(now_ms())
    if step is not None:
        await _call_tools(run, step, writer, now_ms)


def _failure(error: UpstreamError) -> Failure:
    of_request = isinstance(error, RequestRejectedError)
    return Failure(error.code, error.message, error.retryable, error.retry_after_s, of_request)


async def _call_model(run: ActiveRun, call: ModelCall, writer: LogWriter, now_ms: Callable[[], int]) -> None:
    """Stream one answer into the log. Raises UpstreamError, also for the first-token and the idle deadline."""
    machine, deadlines = run.machine, run.deadlines
    waiting = True
    with trio.CancelScope(deadline=trio.current_time() + deadlines.first_token_s) as patience:
        async with run.provider.stream(call) as stream:
            while deltas := await stream.receive():
                for body in machine.feed(deltas, now_ms()):
                    writer.append_delta(run.run_id, body)
                if waiting:
                    waiting = machine.waiting_for_first_delta
                if not waiting:
                    patience.deadline = trio.current_time() + deadlines.idle_s
                if not writer.has_room:
                    await _wait_for_the_store(writer, patience)
    if patience.cancelled_caught:
        if waiting:
            message = f"{run.provider.name} sent nothing within {deadlines.first_token_s:g} s"
            raise UpstreamError(ErrorCode.FIRST_TOKEN_TIMEOUT, message)
        raise UpstreamError(ErrorCode.IDLE_TIMEOUT, f"{run.provider.name} fell silent for {deadlines.idle_s:g} s")


async def _wait_for_the_store(writer: LogWriter, patience: trio.CancelScope) -> None:
    """The store is behind, not the provider: the provider's time stands still."""
    left_s = patience.deadline - trio.current_time()
    patience.deadline = math.inf
    await writer.wait_room()
    patience.deadline = trio.current_time() + left_s


async def _call_tools(run: ActiveRun, step: CallTools, writer: LogWriter, now_ms: Callable[[], int]) -> None:
    """The calls of one step, one after another. A call's intent is durable before its tool is touched."""
    machine = run.machine
    await _commit(writer, run.run_id, step.message)
    for planned in step.calls:
        intent = machine.tool_started(planned)
        if intent is None:
            return
        await _commit(writer, run.run_id, intent)
        started = trio.current_time()
        result = planned.refusal
        if result is None:
            result = await _call_tool(run, planned)
        elapsed_ms = round((trio.current_time() - started) * 1000)
        complete = machine.tool_finished(planned, result, elapsed_ms=elapsed_ms, now_ms=now_ms())
        if complete is None:
            return
        await _commit(writer, run.run_id, complete)


async def _call_tool(run: ActiveRun, planned: PlannedCall) -> ToolResult:
    call = planned.call
    finished = False
    try:
        with trio.move_on_after(run.deadlines.tool_s) as patience:
            result = await run.toolbox.call(call.tool_call_id, call.tool, planned.arguments)
            finished = True
    finally:
        if not finished and not patience.cancelled_caught:
            run.tools_stopped += 1
    if patience.cancelled_caught:
        return ToolResult(f"The tool took longer than {run.deadlines.tool_s:g} s and was stopped.", ok=False)
    return result


async def _commit(writer: LogWriter, run_id: RunId, body: EventBody) -> None:
    await writer.submit(Entry([(run_id, body)])).wait()
