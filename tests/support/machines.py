"""A run's state machine with everything about it known: ids count up, the jitter is what the test says."""

from collections.abc import Callable, Sequence
from itertools import count

from bamboo.core.attempts import Candidate, Failure, Retry
from bamboo.core.events import AgentMessage
from bamboo.core.run import CallTools, RunLimits, RunMachine, RunSettings
from bamboo.core.types import (
    JsonObject,
    Message,
    MessageId,
    ModelCall,
    ProviderDelta,
    RunId,
    TextDelta,
    ToolCallDelta,
    ToolResult,
    ToolSpec,
    text_content,
)

RUN = RunId("run")
ASKED = Message(MessageId("asked"), RUN, "user", text_content("hello"), 1_000)
LOOK = ToolSpec("look", "Looks.", {"type": "object"})
WRITE = ToolSpec("write", "Writes.", {"type": "object"})

FIRST = Candidate("p", "m")
SECOND = Candidate("p2", "m2")
THIRD = Candidate("p3", "m3")

BUSY = Failure("provider_rate_limited", "slow down", retryable=True)
BROKEN = Failure("provider_protocol", "garbage", retryable=True)


def new_machine(
    *candidates: Candidate,
    max_steps: int = 10,
    max_retries: int = 2,
    random: Callable[[], float] = lambda: 0.5,
    system_prompt: str | None = None,
    params: JsonObject | None = None,
) -> RunMachine:
    numbers = count(1)
    settings = RunSettings(
        run_id=RUN,
        candidates=candidates or [FIRST],
        system_prompt=system_prompt,
        params=params,
        tools=[LOOK, WRITE],
        limits=RunLimits(max_steps, max_retries),
    )
    return RunMachine(settings, new_message_id=lambda: MessageId(f"msg{next(numbers)}"), random=random)


def begin(machine: RunMachine, history: Sequence[Message] = (ASKED,)) -> ModelCall:
    """Accepted at 1,000 ms, started at 1,500; the first model call is under way."""
    machine.begin(history, accepted_ms=1_000, now_ms=1_500)
    return machine.next_call()


def begun(
    *candidates: Candidate, max_steps: int = 10, max_retries: int = 2, random: Callable[[], float] = lambda: 0.5
) -> RunMachine:
    machine = new_machine(*candidates, max_steps=max_steps, max_retries=max_retries, random=random)
    begin(machine)
    return machine


def text(*tokens: str) -> list[TextDelta]:
    return [TextDelta(token) for token in tokens]


def call(index: int, call_id: str | None, tool: str | None = "look", arguments: str = "{}") -> ToolCallDelta:
    return ToolCallDelta(index, call_id, tool, arguments)


def partial(message_id: str, said: str) -> AgentMessage:
    return AgentMessage(MessageId(message_id), text_content(said), "p", "m", partial=True)


def tools_due(machine: RunMachine, *deltas: ProviderDelta) -> CallTools:
    machine.feed(deltas or [call(0, "c1")], 1_600)
    step = machine.step_ended(1_700)
    assert step is not None
    return step


def run_tools(machine: RunMachine, step: CallTools) -> None:
    for planned in step.calls:
        machine.tool_started(planned)
        machine.tool_finished(planned, ToolResult("ok"), elapsed_ms=1, now_ms=1_800)


def retry_of(machine: RunMachine, failure: Failure = BUSY) -> Retry:
    retry = machine.failed(failure)
    assert retry is not None
    return retry
