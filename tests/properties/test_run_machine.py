"""Whatever happens to a run, in whatever order its state allows: its log and its history stay what they promise."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import count

import orjson
from hypothesis import given, settings
from hypothesis import strategies as st

from bamboo.core.attempts import BACKOFF_CAP_S, RETRIED_CODES, Candidate, Failure
from bamboo.core.events import (
    AgentComplete,
    AgentError,
    AgentMessage,
    AgentReasoning,
    AgentRetry,
    AgentStopped,
    AgentToken,
    AgentToolComplete,
    AgentToolStart,
    Event,
    EventBody,
    RunStarted,
    Terminal,
)
from bamboo.core.history import Opening, fold_step, message_of_body
from bamboo.core.run import RunLimits, RunMachine, RunSettings, RunState
from bamboo.core.tool_calls import PlannedCall
from bamboo.core.types import (
    Epoch,
    FinishDelta,
    Message,
    MessageId,
    ModelCall,
    ProviderDelta,
    ReasoningDelta,
    RunId,
    SessionId,
    StopReason,
    TextDelta,
    ToolCallDelta,
    ToolResult,
    ToolSpec,
    Usage,
    UsageDelta,
    content_text,
    text_content,
)
from bamboo.wire.encode import event_json
from tests.support.hypothesis import examples

RUN = RunId("run")
TOOLS = [ToolSpec("look", "", {}), ToolSpec("write", "", {})]
CANDIDATES = [Candidate("p", "m"), Candidate("p2", "m2"), Candidate("p3", "m")]
OPENING = Opening(MessageId("asked"), text_content("hello"), 1_000)

texts = st.text(st.characters(exclude_categories=["Cs"]), max_size=4)
call_deltas = st.builds(
    ToolCallDelta,
    index=st.integers(0, 3),
    tool_call_id=st.sampled_from([None, "", "a", "b", "call_msg1"]),
    tool=st.sampled_from([None, "", "look", "write", "nonsense"]),
    arguments=st.sampled_from(["", "{", "}", "{}", '{"x":1}', "[]", "1e999", '"\\ud800"', '{"a":' * 300]),
)
deltas = st.one_of(
    st.builds(TextDelta, texts),
    st.builds(ReasoningDelta, texts),
    call_deltas,
    call_deltas,  # twice as often as others: without a call there is no second step
    st.builds(FinishDelta, st.sampled_from(["stop", "length", "tool_calls"])),
    st.just(UsageDelta(Usage(1, 2, 3))),
)
failures = st.builds(
    Failure,
    code=st.sampled_from(["provider_rate_limited", "provider_error", "provider_protocol", "idle_timeout"]),
    message=st.sampled_from(["why", "because"]),
    retryable=st.booleans(),
    retry_after_s=st.sampled_from([None, None, 0.0, 7.5, 30.0, 31.0]),
    of_request=st.sampled_from([False, False, False, True]),
)
results = st.builds(
    ToolResult,
    text=texts,
    ok=st.booleans(),
    truncated=st.booleans(),
    status=st.sampled_from([None, "denied"]),
)
reasons: st.SearchStrategy[StopReason] = st.sampled_from(["user", "superseded", "abandoned", "deleted"])


def assert_valid_for_a_provider(history: Sequence[Message]) -> None:
    """Every call of an answer has exactly one tool message, before anything else comes; no tool message is without its
    call; no answer is empty; it begins with what was asked."""
    assert [message.role for message in history[:1]] == ["user"]
    assert len({message.message_id for message in history}) == len(history)
    waiting: set[str] = set()
    for message in history:
        if message.role == "tool":
            assert message.tool_call_id in waiting, "a result without its call"
            waiting.remove(message.tool_call_id)
            continue
        assert not waiting, f"{message.role} before the results of {waiting}"
        if message.role == "assistant":
            assert message.tool_calls or content_text(message.content), "an empty answer"
            waiting = {call.tool_call_id for call in message.tool_calls}
            assert len(waiting) == len(message.tool_calls), "two calls with one id"
            assert "" not in waiting
    assert not waiting, f"no result for {waiting}"


@dataclass(frozen=True)
class Turn:
    """What happens next, as far as the run's state allows it. `choice` decides between what it allows."""

    choice: int
    came: Sequence[ProviderDelta]
    failure: Failure
    result: ToolResult


turns = st.builds(Turn, st.integers(0, 9), st.lists(deltas, min_size=1, max_size=4), failures, results)


# Without a length of its own, a list has five turns on average: too few for a second step.
lives = st.integers(0, 40).flatmap(lambda length: st.lists(turns, min_size=length, max_size=length))


class RunLife:
    """Drives a machine as its runner does, and keeps what a log would hold."""

    def __init__(self, max_steps: int, max_retries: int, candidates: int) -> None:
        ids = count(1)
        self.limits = RunLimits(max_steps, max_retries)
        self.left = CANDIDATES[:candidates]  # the first one is asked
        self.machine = RunMachine(
            RunSettings(RUN, self.left[:], None, None, TOOLS, self.limits),
            new_message_id=lambda: MessageId(f"msg{next(ids)}"),
            random=lambda: 0.5,
        )
        self.now_ms = 1_000
        self.log: list[EventBody] = []
        self.calling = False  # a model call is under way
        self.shown = False  # something of the step was seen
        self.calls = 0
        self.attempts = 0  # at this call
        self.retries = 0  # of them, at the provider that is asked now
        self.given_up: list[Failure] = []  # of this call, one for each provider that was left
        self.planned: list[PlannedCall] = []
        self.running: list[PlannedCall] = []
        self.usage = Usage(0, 0, 0)
        self.closing: tuple[EventBody, ...] | None = None

    # What the runner does

    def tick(self) -> int:
        self.now_ms += 5
        return self.now_ms

    def history(self) -> list[Message]:
        entries = (message_of_body(body, RUN, self.now_ms, OPENING) for body in self.log)
        return [entry for entry in entries if entry is not None]

    def sealed_now(self) -> None:
        """The machine has just been sealed: what it says goes into the log."""
        assert self.machine.sealed
        assert self.closing is None
        self.closing = self.machine.closing
        self.log += self.closing
        self.calling = False

    def is_in(self, *states: RunState) -> bool:
        return self.machine.state in states

    def live(self, turn: Turn) -> None:
        """One turn of a run that nobody interferes with."""
        if self.is_in(RunState.SEALED):
            self.something_comes_too_late(turn)
        elif self.is_in(RunState.NEW):
            self.starts(turn.choice - 5)
        elif self.is_in(RunState.TOOLS):
            if self.planned and (turn.choice < 5 or not self.running):
                self.tool_starts()
            else:
                self.tool_finishes(turn.result, turn.choice)
        elif not self.calling:
            self.calls_the_model()
        elif turn.choice < (5 if self.shown else 8):
            self.deltas_come(turn.came)
        elif turn.choice < 9:
            self.answer_ends()
        else:
            self.model_call_fails(turn.failure)

    def starts(self, waited_ms: int) -> None:
        self.log.append(RunStarted("p", "m", 0))
        self.machine.begin(self.history(), accepted_ms=self.now_ms - waited_ms, now_ms=self.now_ms)

    def calls_the_model(self) -> None:
        call = self.machine.next_call()
        assert isinstance(call, ModelCall)
        sent = [(message.message_id, message.role, message.content, message.tool_calls) for message in call.messages]
        told = [(entry.message_id, entry.role, entry.content, entry.tool_calls) for entry in self.history()]
        assert sent == told, "the model is sent what the log says"
        assert_valid_for_a_provider(call.messages)
        assert call.model == self.left[0].model
        self.calling, self.shown = True, False
        if self.attempts == 0:
            self.calls += 1
        assert self.calls <= self.limits.max_steps
        assert self.machine.waiting_for_first_delta

    def deltas_come(self, came: Sequence[ProviderDelta]) -> None:
        bodies = self.machine.feed(came, self.tick())
        spoken = [delta for delta in came if isinstance(delta, TextDelta | ReasoningDelta) and delta.text]
        assert [body.token for body in bodies] == [delta.text for delta in spoken]
        assert [type(body) is AgentToken for body in bodies] == [type(delta) is TextDelta for delta in spoken]
        self.log += bodies
        self.shown = self.shown or bool(spoken) or any(isinstance(delta, ToolCallDelta) for delta in came)
        for delta in came:
            if isinstance(delta, UsageDelta):
                self.usage += delta.usage
        assert self.machine.waiting_for_first_delta is not self.shown

    def answer_ends(self) -> None:
        said = fold_step(self.log).text
        step = self.machine.step_ended(self.tick())
        self.calling, self.attempts, self.retries, self.given_up = False, 0, 0, []
        if step is None:
            self.sealed_now()
            return
        assert self.is_in(RunState.TOOLS)
        assert content_text(step.message.content) == said
        assert tuple(planned.call for planned in step.calls) == step.message.tool_calls
        self.log.append(step.message)
        self.planned, self.running = list(step.calls), []

    def model_call_fails(self, failure: Failure) -> None:
        retry = self.machine.failed(failure)
        self.calling = False
        again = failure.code in RETRIED_CODES and self.retries < self.limits.max_retries
        again = again and (failure.retry_after_s or 0.0) <= BACKOFF_CAP_S
        if not again:
            self.given_up.append(failure)
        if self.shown or not (again or (len(self.left) > 1 and not failure.of_request)):
            assert retry is None
            self.sealed_now()
            self.the_error_tells_what_happened(failure)
            return
        assert retry is not None
        self.attempts += 1
        if again:
            self.retries += 1
            assert 0 <= retry.delay_s <= BACKOFF_CAP_S
            assert failure.retry_after_s is None or retry.delay_s == failure.retry_after_s
        else:
            del self.left[0]
            self.retries = 0
            assert retry.delay_s == 0
        assert self.machine.candidate == self.left[0]
        told = AgentRetry(self.attempts, self.left[0].provider, failure.code, round(retry.delay_s * 1000))
        assert retry.body == told
        self.log.append(retry.body)

    def the_error_tells_what_happened(self, failure: Failure) -> None:
        terminal = self.machine.terminal
        assert isinstance(terminal, AgentError)
        if self.shown:
            assert terminal == AgentError(failure.code, failure.message, failure.retryable)
            return
        assert terminal.message == "; ".join(one.message for one in self.given_up)
        assert terminal.retryable is any(one.retryable for one in self.given_up)
        assert (terminal.code, terminal.retryable) in [(one.code, one.retryable) for one in self.given_up]

    def tool_starts(self) -> None:
        planned = self.planned.pop(0)
        body = self.machine.tool_started(planned)
        assert isinstance(body, AgentToolStart)
        self.log.append(body)
        self.running.append(planned)

    def tool_finishes(self, result: ToolResult, which: int) -> None:
        planned = self.running.pop(which % len(self.running))
        given = planned.refusal or result
        body = self.machine.tool_finished(planned, given, elapsed_ms=1, now_ms=self.tick())
        assert isinstance(body, AgentToolComplete)
        assert (body.result, body.ok) == (given.text, given.ok)
        self.log.append(body)
        assert self.is_in(RunState.TOOLS) is bool(self.planned or self.running)

    # What others do, at any time

    def somebody_ends_it(self, ending: StopReason | Failure) -> None:
        was_sealed = self.machine.sealed
        if isinstance(ending, Failure):
            assert self.machine.fail(ending) is not was_sealed
            told: Terminal = AgentError(ending.code, ending.message, ending.retryable)
        else:
            assert self.machine.stop(ending) is not was_sealed
            told = AgentStopped(ending)
        if not was_sealed:
            self.sealed_now()
            assert self.machine.terminal == told

    def something_comes_too_late(self, turn: Turn) -> None:
        assert self.machine.feed(turn.came, self.tick()) == []
        assert self.machine.step_ended(self.tick()) is None
        assert self.machine.failed(turn.failure) is None
        for planned in (*self.planned, *self.running):
            assert self.machine.tool_started(planned) is None
            assert self.machine.tool_finished(planned, ToolResult("x"), elapsed_ms=1, now_ms=self.tick()) is None

    # What always holds

    def the_seal_stays_as_it_was(self) -> None:
        assert self.machine.sealed is (self.closing is not None)
        assert self.machine.closing == (self.closing or ())
        assert sum(isinstance(body, Terminal) for body in self.log) == (0 if self.closing is None else 1)

    def tokens_of_a_step_are_its_message(self) -> None:
        said, asked = "", "p"
        for body in self.log:
            if isinstance(body, AgentToken):
                said += body.token
            elif isinstance(body, AgentRetry):
                assert said == "", "tried again although a reader has seen something"
                asked = body.provider
            elif isinstance(body, AgentMessage):
                assert content_text(body.content) == said
                assert Candidate(body.provider, body.model) in CANDIDATES
                assert body.provider == asked, "said by a provider that was not asked"
                said = ""
            elif isinstance(body, Terminal):
                assert said == "", "text was streamed that no message keeps"

    def what_holds_at_the_end(self) -> None:
        self.the_seal_stays_as_it_was()
        self.tokens_of_a_step_are_its_message()
        assert isinstance(self.log[-1], Terminal)
        history = self.history()
        if history:
            assert_valid_for_a_provider(history)
            assert {message.run_id for message in history} == {RUN}
        else:
            assert self.log == [self.machine.terminal], "it never started"
        completes = [body for body in self.log if isinstance(body, AgentToolComplete)]
        starts = [body.tool_call_id for body in self.log if isinstance(body, AgentToolStart)]
        assert len(starts) <= len(completes)
        if isinstance(terminal := self.log[-1], AgentComplete):
            assert terminal.usage == (None if self.usage.total_tokens == 0 else self.usage)
            assert all(body.status is None or body.status == "denied" for body in completes)
            assert all(value is None or value >= 0 for value in (terminal.stats.queue_ms, terminal.stats.ttft_ms))
            spoken = any(isinstance(body, AgentToken | AgentReasoning) for body in self.log)
            assert (terminal.stats.ttft_ms is not None) is spoken
        for seq, body in enumerate(self.log, start=1):
            encoded = event_json(Event(SessionId("s"), Epoch("e"), seq, self.now_ms, RUN, body))
            assert orjson.loads(encoded)["type"] == body.type


@settings(max_examples=examples(400))
@given(
    st.sampled_from([1, 2, 5]),
    st.integers(0, 2),
    st.integers(1, 3),
    lives,
    st.lists(st.tuples(st.integers(0, 60), reasons | failures), max_size=2),
)
def test_log_and_history_of_a_run_hold_what_they_promise_whatever_happens(
    max_steps: int,
    max_retries: int,
    candidates: int,
    life: Sequence[Turn],
    endings: Sequence[tuple[int, StopReason | Failure]],
) -> None:
    run = RunLife(max_steps, max_retries, candidates)
    for number, turn in enumerate(life):
        for when, ending in endings:
            if when == number:
                run.somebody_ends_it(ending)
        run.live(turn)
        run.the_seal_stays_as_it_was()
        run.tokens_of_a_step_are_its_message()
    run.somebody_ends_it("user")
    run.what_holds_at_the_end()
