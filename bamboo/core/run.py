"""The agent loop as a state machine: it is fed what happened and says what to do next. No I/O, no clock, no tasks.

```
            ┌──────────── tool_finished (last one) ───────────┐
            ▼                                                 │
  begin → CALLING ── feed ──→ STREAMING ── step_ended ──→ TOOLS
            ▲  │                  │   │                       │
     next_call │ failed           │   └─ step_ended ──┐       │
            │  ▼                  │ failed            ▼       │
         BACKOFF                  └──────────────→ SEALED ←───┴── stop, fail (from any state)
```

A call that failed in CALLING is made again, of the same provider or of the next one: `bamboo.core.attempts` decides.

SEALED is entered exactly once, synchronously, by whoever comes first; what has to be committed then is `closing`, and
its last body is the run's one terminal event. After that every input is ignored, or refused with False or None, as its
docstring says; only `next_call` may not come any more.

Deadlines are named here and kept by the runner, which owns the cancel scopes.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from enum import Enum

from bamboo.core.attempts import Attempts, Candidate, Failure, Retry
from bamboo.core.events import (
    AgentComplete,
    AgentError,
    AgentMessage,
    AgentReasoning,
    AgentStopped,
    AgentToken,
    AgentToolComplete,
    AgentToolStart,
    Delta,
    EventBody,
    Terminal,
)
from bamboo.core.history import OpenStep, message_of_body
from bamboo.core.tool_calls import PlannedCall, ToolCallAssembler, plan_call
from bamboo.core.types import (
    FinishDelta,
    JsonObject,
    Message,
    MessageId,
    ModelCall,
    ProviderDelta,
    ReasoningDelta,
    RunId,
    RunStats,
    StopReason,
    TextDelta,
    ToolCallDelta,
    ToolResult,
    ToolSpec,
    Usage,
    UsageDelta,
    text_content,
)


@dataclass(frozen=True, slots=True)
class RunLimits:
    max_steps: int
    """Model calls."""
    max_retries: int
    """Of one model call, at each provider."""


@dataclass(frozen=True, slots=True)
class RunSettings:
    """What a run is made with; fixed from its start to its end."""

    run_id: RunId
    candidates: Sequence[Candidate]
    """The first one is asked, each further one when the one before it has failed for good."""
    system_prompt: str | None
    params: JsonObject | None
    tools: Sequence[ToolSpec]
    limits: RunLimits


@dataclass(frozen=True, slots=True)
class CallTools:
    """Commit `message`, then for each call, in order: `tool_started`, run it, `tool_finished`; then make
    `next_call`."""

    message: AgentMessage
    calls: tuple[PlannedCall, ...]


class RunState(Enum):
    NEW = "new"
    CALLING = "calling"
    STREAMING = "streaming"
    BACKOFF = "backoff"
    TOOLS = "tools"
    SEALED = "sealed"


class RunMachine:
    """One run. `random` gives numbers in [0, 1) for the jitter of retries; `new_message_id` names the messages that it
    makes."""

    def __init__(
        self, settings: RunSettings, *, new_message_id: Callable[[], MessageId], random: Callable[[], float]
    ) -> None:
        self.settings = settings
        self.state = RunState.NEW
        self.closing: tuple[EventBody, ...] = ()
        """Once sealed: what ends the run, to be committed as one; the last is the terminal event."""
        self._new_message_id = new_message_id
        self._attempts = Attempts(settings.candidates, settings.limits.max_retries, random)
        self._messages: list[Message] = []
        self._step = OpenStep()
        self._calls = ToolCallAssembler(new_message_id)
        self._steps = 0
        self._finish_reason: str | None = None
        self._usage: Usage | None = None
        self._started_ms = 0
        self._queue_ms = 0
        self._first_delta_ms: int | None = None

    def __repr__(self) -> str:
        return f"<RunMachine {self.settings.run_id} {self.state.value} step {self._steps}>"

    @property
    def sealed(self) -> bool:
        return self.state is RunState.SEALED

    @property
    def candidate(self) -> Candidate:
        """Who the model call is made of, or, between two, who has answered."""
        return self._attempts.candidate

    @property
    def terminal(self) -> Terminal:
        """The terminal event of a sealed run."""
        body = self.closing[-1]
        assert isinstance(body, Terminal)
        return body

    def begin(self, history: Sequence[Message], *, accepted_ms: int, now_ms: int) -> None:
        """The run has its slot and its `run_started`. `history` ends with the run's own user message. Ignored once
        sealed."""
        if self.sealed:
            return
        assert self.state is RunState.NEW
        self._messages = list(history)
        self._started_ms = now_ms
        self._queue_ms = max(0, now_ms - accepted_ms)
        self.state = RunState.CALLING

    def next_call(self) -> ModelCall:
        """The model call to make now, of `candidate`; counts as one of the run's steps unless it repeats a failed one.
        Not once sealed."""
        if self.state is RunState.BACKOFF:
            self.state = RunState.CALLING
        assert self.state is RunState.CALLING, f"a model call in state {self.state.value}"
        if not self._attempts.made:
            self._steps += 1
        self._calls.clear()
        self._finish_reason = None
        settings = self.settings
        return ModelCall(
            model=self.candidate.model,
            messages=tuple(self._messages),
            system_prompt=settings.system_prompt,
            tools=tuple(settings.tools),
            params=settings.params,
        )

    @property
    def waiting_for_first_delta(self) -> bool:
        """The model call that is under way has shown nothing yet: the first-token deadline runs, and it may be
        retried."""
        return self.state is RunState.CALLING

    def feed(self, deltas: Sequence[ProviderDelta], now_ms: int) -> list[Delta]:
        """What the provider sent, and what of it is to be published, one event per delta of text. Nothing once
        sealed."""
        if self.state is RunState.SEALED:
            return []
        assert self.state in (RunState.CALLING, RunState.STREAMING), f"deltas in state {self.state.value}"
        bodies: list[Delta] = []
        for delta in deltas:
            if isinstance(delta, TextDelta):
                if delta.text:
                    bodies.append(AgentToken(delta.text))
            elif isinstance(delta, ReasoningDelta):
                if delta.text:
                    bodies.append(AgentReasoning(delta.text))
            elif isinstance(delta, ToolCallDelta):
                self._calls.feed(delta)
                self.state = RunState.STREAMING
            elif isinstance(delta, FinishDelta):
                self._finish_reason = delta.reason
            elif isinstance(delta, UsageDelta):
                self._usage = delta.usage if self._usage is None else self._usage + delta.usage
        if bodies:
            self.state = RunState.STREAMING
            if self._first_delta_ms is None:
                self._first_delta_ms = now_ms
            for body in bodies:
                self._step.apply(body)
        return bodies

    def step_ended(self, now_ms: int) -> CallTools | None:
        """The provider's answer came to its end. None: the run is sealed, now or before."""
        if self.sealed:
            return None
        assert self.state in (RunState.CALLING, RunState.STREAMING)
        self._attempts.succeeded()
        text = "".join(self._step.text)
        calls = self._calls.assembled()
        if calls or text:
            said_by = self.candidate
            message = AgentMessage(self._new_message_id(), text_content(text), said_by.provider, said_by.model, calls)
        else:
            message = None  # an empty answer makes no entry: providers refuse empty assistant messages
        if message is None or not calls:
            stats = RunStats(
                queue_ms=self._queue_ms,
                ttft_ms=None if self._first_delta_ms is None else max(0, self._first_delta_ms - self._started_ms),
                elapsed_ms=max(0, now_ms - self._started_ms),
            )
            terminal = AgentComplete(self._finish_reason or "stop", self._usage, stats)
            self._seal(() if message is None else (message,), terminal)
            return None
        self._record(message, now_ms)
        if self._steps >= self.settings.limits.max_steps:
            # The message is kept, so its calls need results: cutting the step here gives them.
            error = AgentError("budget_exceeded", f"the run needs more than {self._steps} model calls", retryable=False)
            self._seal((message, *self._cut()), error)
            return None
        self.state = RunState.TOOLS
        return CallTools(message, tuple(plan_call(call, self.settings.tools) for call in calls))

    def tool_started(self, planned: PlannedCall) -> AgentToolStart | None:
        """The call's intent: to be durable before the tool is touched. None once sealed."""
        if self.sealed:
            return None
        assert self.state is RunState.TOOLS
        assert planned.call.tool_call_id in self._step.calls, "a call that has its result starts again"
        body = AgentToolStart(planned.call.tool_call_id, planned.call.tool, planned.arguments)
        self._step.apply(body)
        return body

    def tool_finished(
        self, planned: PlannedCall, result: ToolResult, *, elapsed_ms: int, now_ms: int
    ) -> AgentToolComplete | None:
        """The call's result, to be committed. After the last one of the step the next model call is due. None once
        sealed."""
        if self.sealed:
            return None
        assert self.state is RunState.TOOLS
        assert planned.call.tool_call_id in self._step.calls, "a call has one result"
        body = AgentToolComplete(
            self._new_message_id(),
            planned.call.tool_call_id,
            planned.call.tool,
            ok=result.ok,
            result=result.text,
            elapsed_ms=elapsed_ms,
            truncated=result.truncated,
            status=result.status,
        )
        self._record(body, now_ms)
        if not self._step.calls:
            self.state = RunState.CALLING
        return body

    def failed(self, failure: Failure) -> Retry | None:
        """The model call failed. None: the run is sealed with that failure, or was before.

        Tried again only if nothing of this step was seen, so that a reader never gets a text twice.
        """
        if self.sealed:
            return None
        after = self._attempts.failed(failure) if self.state is RunState.CALLING else failure
        if isinstance(after, Failure):
            self.fail(after)
            return None
        self.state = RunState.BACKOFF
        return after

    def fail(self, failure: Failure) -> bool:
        """End the run with an `agent_error`, from any state. False: it was sealed already, and stays as it is."""
        return self._end(AgentError(failure.code, failure.message, failure.retryable))

    def stop(self, reason: StopReason) -> bool:
        """End the run with an `agent_stopped`, from any state. False: it was sealed already, and stays as it is."""
        return self._end(AgentStopped(reason))

    def _end(self, terminal: AgentError | AgentStopped) -> bool:
        if self.sealed:
            return False
        self._seal(tuple(self._cut()), terminal)
        return True

    def _seal(self, before: tuple[EventBody, ...], terminal: Terminal) -> None:
        assert not self.sealed
        self.state = RunState.SEALED
        self.closing = (*before, terminal)

    def _cut(self) -> list[EventBody]:
        said_by = self.candidate
        return self._step.close(said_by.provider, said_by.model, "stopped", self._new_message_id)

    def _record(self, body: AgentMessage | AgentToolComplete, now_ms: int) -> None:
        self._step.apply(body)
        message = message_of_body(body, self.settings.run_id, now_ms)
        assert message is not None
        self._messages.append(message)
