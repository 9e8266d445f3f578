"""A model call that fails: tried again, taken to the next provider, or the end of the run."""

from collections.abc import Sequence
from dataclasses import replace

import pytest

from bamboo.core.attempts import BACKOFF_BASE_S, BACKOFF_CAP_S, RETRIED_CODES, Candidate, Failure, told_as_one
from bamboo.core.events import AgentError, AgentMessage, AgentRetry, EventBody, terminal_status
from bamboo.core.run import RunMachine, RunState
from bamboo.core.types import (
    FinishDelta,
    MessageId,
    ProviderDelta,
    ReasoningDelta,
    RunStatus,
    TextDelta,
    ToolCallDelta,
    Usage,
    UsageDelta,
    text_content,
)
from bamboo.errors import RETRYABLE, ErrorCode
from tests.support.machines import (
    ASKED,
    BROKEN,
    BUSY,
    FIRST,
    SECOND,
    THIRD,
    begun,
    partial,
    retry_of,
    run_tools,
    text,
    tools_due,
)

AUTH = Failure("provider_auth", "refused its key", retryable=False)
TOO_LONG = Failure("provider_rejected", "too long", retryable=False, of_request=True)
NO_MODEL = Failure("provider_rejected", "no such model", retryable=False)


def end_with_text(machine: RunMachine, said: str = "x") -> None:
    machine.feed(text(said), 1_900)
    machine.step_ended(2_000)


# The same provider again


def test_codes_that_are_retried_are_error_codes_that_are_retryable() -> None:
    assert {ErrorCode(code) for code in RETRIED_CODES} <= RETRYABLE


@pytest.mark.parametrize("code", sorted(RETRIED_CODES))
def test_failure_before_the_first_delta_is_tried_again(code: str) -> None:
    machine = begun()
    retry = retry_of(machine, Failure(code, "x", retryable=True))
    assert retry.body == AgentRetry(1, "p", code, round(retry.delay_s * 1000))
    assert machine.next_call().messages == (ASKED,)
    assert machine.state is RunState.CALLING
    end_with_text(machine)
    assert terminal_status(machine.terminal) is RunStatus.COMPLETED


@pytest.mark.parametrize("code", sorted({code.value for code in ErrorCode} - RETRIED_CODES))
def test_other_failures_end_the_run_at_once(code: str) -> None:
    machine = begun()
    assert machine.failed(Failure(code, "why", retryable=False)) is None
    assert machine.closing == (AgentError(code, "why", retryable=False),)


@pytest.mark.parametrize(
    ("delta", "kept"),
    [(TextDelta("x"), [partial("msg1", "x")]), (ReasoningDelta("r"), []), (ToolCallDelta(0, None, None, "{"), [])],
)
@pytest.mark.parametrize("further", [[], [SECOND]])
def test_failure_after_the_first_delta_ends_the_run_and_keeps_the_text(
    delta: ProviderDelta, kept: list[EventBody], further: list[Candidate]
) -> None:
    machine = begun(FIRST, *further)
    machine.feed([delta], 1_600)
    assert machine.failed(BUSY) is None
    assert machine.closing == (*kept, AgentError(BUSY.code, BUSY.message, retryable=True))


@pytest.mark.parametrize("delta", [TextDelta(""), FinishDelta("stop"), UsageDelta(Usage(1, 0, 1))])
def test_what_shows_nothing_does_not_stand_in_the_way_of_a_retry(delta: ProviderDelta) -> None:
    machine = begun()
    machine.feed([delta], 1_600)
    assert machine.failed(BUSY) is not None


def test_attempts_are_bounded_and_then_the_failure_ends_the_run() -> None:
    machine = begun(max_retries=2)
    attempts = []
    while (retry := machine.failed(BUSY)) is not None:
        attempts.append(retry.body.attempt)
        machine.next_call()
    assert attempts == [1, 2]
    assert machine.closing == (AgentError(BUSY.code, BUSY.message, retryable=True),)


def test_no_retries_means_none() -> None:
    machine = begun(max_retries=0)
    assert machine.failed(BUSY) is None
    assert machine.sealed


def test_attempts_are_counted_per_step() -> None:
    machine = begun(max_retries=1)
    assert retry_of(machine).body.attempt == 1
    machine.next_call()
    run_tools(machine, tools_due(machine))
    machine.next_call()
    assert retry_of(machine).body.attempt == 1
    machine.next_call()
    assert machine.failed(BUSY) is None


def test_repeating_a_failed_call_takes_no_step_from_the_budget() -> None:
    machine = begun(FIRST, SECOND, max_steps=2, max_retries=5)
    for _ in range(8):
        retry_of(machine)
        machine.next_call()
    run_tools(machine, tools_due(machine))
    machine.next_call()
    end_with_text(machine)
    assert terminal_status(machine.terminal) is RunStatus.COMPLETED


@pytest.mark.parametrize("wish", [0.0, 0.25, BACKOFF_CAP_S])
def test_retry_after_is_obeyed_exactly(wish: float) -> None:
    retry = retry_of(begun(random=lambda: 0.99), replace(BUSY, retry_after_s=wish))
    assert retry.delay_s == wish
    assert retry.body.delay_ms == round(wish * 1000)


def test_retry_after_beyond_the_cap_ends_the_run() -> None:
    machine = begun()
    assert machine.failed(replace(BUSY, retry_after_s=BACKOFF_CAP_S + 0.001)) is None
    assert machine.closing == (AgentError(BUSY.code, BUSY.message, retryable=True),)


@pytest.mark.parametrize("jitter", [0.0, 0.5, 0.999_999])
def test_pause_doubles_up_to_the_cap_with_jitter_in_its_upper_half(jitter: float) -> None:
    machine = begun(max_retries=20, random=lambda: jitter)
    delays = []
    while (retry := machine.failed(BUSY)) is not None:
        delays.append(retry.delay_s)
        machine.next_call()
    ceilings = [min(BACKOFF_CAP_S, BACKOFF_BASE_S * 2**attempt) for attempt in range(20)]
    assert delays == [pytest.approx(ceiling * (1 + jitter) / 2) for ceiling in ceilings]
    assert all(ceiling / 2 <= delay < ceiling for delay, ceiling in zip(delays, ceilings, strict=True))


# The next provider


def test_next_provider_is_asked_for_its_own_model_when_the_retries_of_the_first_are_used_up() -> None:
    machine = begun(FIRST, SECOND, max_retries=1)
    assert retry_of(machine).body.provider == "p"
    machine.next_call()
    fallback = retry_of(machine)
    assert (fallback.body, fallback.delay_s) == (AgentRetry(2, "p2", BUSY.code, 0), 0.0)
    call = machine.next_call()
    assert (call.model, call.messages) == ("m2", (ASKED,))
    end_with_text(machine)
    [message, _] = machine.closing
    assert isinstance(message, AgentMessage)
    assert (message.provider, message.model) == ("p2", "m2")


@pytest.mark.parametrize(
    "failure",
    [
        AUTH,
        NO_MODEL,
        BROKEN,
        Failure("first_token_timeout", "nothing came", retryable=True),
        replace(BUSY, retry_after_s=BACKOFF_CAP_S + 1),
    ],
    ids=["auth", "no such model", "protocol", "first token", "come back tomorrow"],
)
def test_next_provider_is_asked_at_once_after_a_failure_that_no_retry_helps(failure: Failure) -> None:
    machine = begun(FIRST, SECOND, max_retries=5)
    assert retry_of(machine, failure).body == AgentRetry(1, "p2", failure.code, 0)


def test_request_that_is_rejected_for_what_it_holds_goes_to_nobody_else() -> None:
    machine = begun(FIRST, SECOND)
    assert machine.failed(TOO_LONG) is None
    assert machine.closing == (AgentError("provider_rejected", "too long", retryable=False),)


def test_each_provider_has_retries_and_a_backoff_of_its_own_and_attempts_count_on() -> None:
    machine = begun(FIRST, SECOND, THIRD, max_retries=2, random=lambda: 0.0)
    told = []
    while (retry := machine.failed(BUSY)) is not None:
        told.append((retry.body.attempt, retry.body.provider, retry.body.delay_ms))
        machine.next_call()
    assert told == [
        *[(1, "p", 250), (2, "p", 500), (3, "p2", 0)],
        *[(4, "p2", 250), (5, "p2", 500), (6, "p3", 0)],
        *[(7, "p3", 250), (8, "p3", 500)],
    ]


def test_later_steps_stay_with_the_provider_that_answered() -> None:
    machine = begun(FIRST, SECOND)
    retry_of(machine, AUTH)
    machine.next_call()
    step = tools_due(machine)
    assert (step.message.provider, step.message.model) == ("p2", "m2")
    run_tools(machine, step)
    assert machine.next_call().model == "m2"
    assert retry_of(machine).body.provider == "p2"
    machine.next_call()
    assert machine.failed(AUTH) is None
    assert machine.terminal == AgentError(AUTH.code, AUTH.message, AUTH.retryable)


def test_partial_text_is_that_of_the_provider_that_said_it() -> None:
    machine = begun(FIRST, SECOND)
    retry_of(machine, AUTH)
    machine.next_call()
    machine.feed(text("half"), 1_600)
    machine.failed(BROKEN)
    assert machine.closing[0] == AgentMessage(MessageId("msg1"), text_content("half"), "p2", "m2", partial=True)
    assert machine.terminal == AgentError(BROKEN.code, BROKEN.message, retryable=True)


@pytest.mark.parametrize(
    ("failures", "code"),
    [
        ([AUTH], AUTH.code),
        ([BROKEN, BUSY], BUSY.code),
        ([BUSY, BROKEN], BROKEN.code),
        ([BUSY, AUTH], BUSY.code),
        ([AUTH, BUSY, NO_MODEL], BUSY.code),
        ([AUTH, NO_MODEL], NO_MODEL.code),
        ([BUSY, TOO_LONG], BUSY.code),
    ],
)
def test_last_failure_is_told_but_one_that_may_pass_goes_before(failures: Sequence[Failure], code: str) -> None:
    told = told_as_one(failures)
    assert told.code == code
    assert told.retryable is any(failure.retryable for failure in failures)
    assert told.message == "; ".join(failure.message for failure in failures)


def test_when_everybody_has_failed_the_run_says_what_each_of_them_said() -> None:
    machine = begun(FIRST, SECOND, max_retries=0)
    retry_of(machine)
    machine.next_call()
    assert machine.failed(AUTH) is None
    assert machine.closing == (AgentError(BUSY.code, f"{BUSY.message}; {AUTH.message}", retryable=True),)


def test_what_failed_in_an_earlier_step_is_no_part_of_a_later_failure() -> None:
    machine = begun(FIRST, SECOND, max_retries=0)
    retry_of(machine)
    machine.next_call()
    run_tools(machine, tools_due(machine))
    machine.next_call()
    assert machine.failed(TOO_LONG) is None
    assert machine.terminal == AgentError(TOO_LONG.code, TOO_LONG.message, retryable=False)


def test_stop_in_the_middle_of_a_fallback_ends_the_run() -> None:
    machine = begun(FIRST, SECOND)
    retry_of(machine, AUTH)
    assert machine.stop("user")
    assert len(machine.closing) == 1
