"""One model call, attempt after attempt: the one retry policy, and who is asked when a provider has failed for good.

All of this is for a call of which nothing was seen yet. Behind its first delta a failure is the run's end, so that a
reader never gets a text twice.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Final

from bamboo.core.events import AgentRetry

RETRIED_CODES: Final = frozenset(
    {"provider_rate_limited", "provider_error", "provider_unreachable", "provider_connect_timeout"}
)
"""Failures that another attempt at the same provider may not meet. Not among them: what would be answered the same way
again (a refused key, a rejected request, an answer that makes no sense), and a first token that did not come, since
each attempt would be as long a silence again."""

BACKOFF_BASE_S: Final = 0.5
BACKOFF_CAP_S: Final = 30.0
"""Also the longest `Retry-After` that is waited for: a provider that asks for more has failed for good."""


@dataclass(frozen=True, slots=True)
class Candidate:
    """Who may answer: a provider, and the model that it is asked for."""

    provider: str
    model: str


@dataclass(frozen=True, slots=True)
class Failure:
    """What went wrong. `retry_after_s` is the provider's own wish. `of_request`: the provider would not take the
    request for what it holds, so asking another one is no remedy."""

    code: str
    message: str
    retryable: bool
    retry_after_s: float | None = None
    of_request: bool = False


@dataclass(frozen=True, slots=True)
class Retry:
    """Commit and publish `body`, wait `delay_s`, then make `next_call` again."""

    body: AgentRetry
    delay_s: float


class Attempts:
    """The attempts at the model calls of one run, one call at a time.

    A call is made of the current one of `candidates`, again up to `max_retries` times, and then of the next one, which
    has as many retries of its own. Nobody is gone back to: the candidate that answered stays for the rest of the run.
    `random` gives numbers in [0, 1) for the jitter.
    """

    def __init__(self, candidates: Sequence[Candidate], max_retries: int, random: Callable[[], float]) -> None:
        assert candidates
        self._candidates = candidates
        self._max_retries = max_retries
        self._random = random
        self._asked = 0  # the index of the current candidate
        self._retries = 0  # of it, for this call
        self._failures: list[Failure] = []  # what each candidate failed with for good, for this call
        self.made = 0
        """Failed attempts at this call, whoever was asked."""

    @property
    def candidate(self) -> Candidate:
        """Who is asked, or has answered."""
        return self._candidates[self._asked]

    def succeeded(self) -> None:
        """The call has its answer; the next one is another call."""
        self.made = self._retries = 0
        self._failures.clear()

    def failed(self, failure: Failure) -> Retry | Failure:
        """What follows from a failure before the first delta: another attempt, or the failure that the run ends
        with."""
        delay_s = self._pause_s(failure)
        if failure.code in RETRIED_CODES and self._retries < self._max_retries and delay_s <= BACKOFF_CAP_S:
            self._retries += 1
        else:
            self._failures.append(failure)
            if failure.of_request or self._asked + 1 == len(self._candidates):
                return told_as_one(self._failures)
            self._asked += 1
            self._retries = 0
            delay_s = 0.0  # the next one has not been asked yet: nothing is to be waited for
        self.made += 1
        body = AgentRetry(self.made, self.candidate.provider, failure.code, round(delay_s * 1000))
        return Retry(body, delay_s)

    def _pause_s(self, failure: Failure) -> float:
        if failure.retry_after_s is not None:
            return failure.retry_after_s
        # Full jitter would allow no wait at all; half keeps a floor (Exponential Backoff And Jitter, AWS, 2015: "equal
        # jitter").
        ceiling: float = min(BACKOFF_CAP_S, BACKOFF_BASE_S * 2.0**self._retries)
        return ceiling * (0.5 + self._random() / 2)


def told_as_one(failures: Sequence[Failure]) -> Failure:
    """What a run ends with when everybody who was asked has failed: every message, under the code of the last failure.

    But a `retryable` one goes before one that is not: if coming back later may help with one of the providers, then it
    may help with the run.
    """
    telling = next((failure for failure in reversed(failures) if failure.retryable), failures[-1])
    return replace(telling, message="; ".join(failure.message for failure in failures))
