"""What holds of every log and every history, whatever happened: asserted by the sweeps and by the random worlds."""

from collections.abc import Iterable, Sequence
from itertools import groupby
from typing import Final

from bamboo.core.events import (
    AgentComplete,
    AgentMessage,
    AgentRetry,
    AgentToken,
    AgentToolComplete,
    AgentToolStart,
    Event,
    EventBody,
    RunQueued,
    RunStarted,
    Terminal,
    UserMessage,
)
from bamboo.core.history import Opening, message_of
from bamboo.core.types import Message, RunId, content_text

_BEFORE_THE_START: Final = UserMessage | RunQueued


def check_log(events: Sequence[Event], *, ended: bool = True) -> None:
    """A whole log, from its first event: no hole, no disorder; every run is whole, they start in the order in which
    they were accepted, and one at a time. With `ended` none is unfinished."""
    assert [event.seq for event in events] == list(range(1, len(events) + 1))
    assert len({event.session_id for event in events}) <= 1
    runs = runs_of(events)
    for run_id, bodies in runs.items():
        _check_run(run_id, bodies, ended=ended)
    _check_order(events, list(runs))


def runs_of(events: Iterable[Event]) -> dict[RunId, list[EventBody]]:
    """Each run's bodies; the runs in the order of their acceptance."""
    runs: dict[RunId, list[EventBody]] = {}
    for event in events:
        if event.run_id is not None:
            runs.setdefault(event.run_id, []).append(event.body)
    return runs


def _check_run(run_id: RunId, bodies: Sequence[EventBody], *, ended: bool) -> None:
    """Its message first, exactly one end and nothing behind it, and nothing before its start but what waits for it."""
    types = [body.type for body in bodies]
    assert types[0] == "user_message", f"{run_id}: {types}"
    assert types.count("user_message") == 1, f"{run_id}: {types}"
    ends = [isinstance(body, Terminal) for body in bodies]
    assert ends.count(True) == 1 if ended else ends.count(True) <= 1, f"{run_id}: {types}"
    assert not any(ends[:-1]), f"{run_id} goes on behind its end: {types}"
    work = [body for body in bodies if not isinstance(body, _BEFORE_THE_START)]
    if any(not isinstance(body, Terminal) for body in work) or any(isinstance(body, AgentComplete) for body in work):
        assert types.count("run_started") == 1, f"{run_id}: {types}"
        assert isinstance(work[0], RunStarted), f"{run_id}: {types}"
    _check_steps(run_id, work)


def _check_steps(run_id: RunId, bodies: Sequence[EventBody]) -> None:
    """The tokens of a step are its message, its calls have one result each, and nothing is left open at the end."""
    said = ""
    waiting: set[str] = set()
    touched: set[str] = set()
    for body in bodies:
        where = f"{run_id} at its {body.type}"
        if isinstance(body, AgentToken):
            assert not waiting, f"{where}: the model goes on while {waiting} have no result"
            said += body.token
        elif isinstance(body, AgentRetry):
            assert said == "", f"{where}: tried again although {said!r} was shown"
        elif isinstance(body, AgentMessage):
            assert not waiting, f"{where}: {waiting} have no result"
            assert content_text(body.content) == said, f"{where}: {said!r} was shown"
            said = ""
            waiting = {call.tool_call_id for call in body.tool_calls}
        elif isinstance(body, AgentToolStart):
            assert body.tool_call_id in waiting - touched, f"{where}: {body.tool_call_id} starts"
            touched.add(body.tool_call_id)
        elif isinstance(body, AgentToolComplete):
            assert body.tool_call_id in waiting, f"{where}: {body.tool_call_id} was not asked for, or has a result"
            assert body.tool_call_id in touched or not body.ok, f"{where}: it never started"
            waiting.remove(body.tool_call_id)
            touched.discard(body.tool_call_id)
        elif isinstance(body, Terminal):
            assert said == "", f"{where}: {said!r} is in no message"
            assert not waiting, f"{where}: {waiting} have no result"


def _check_order(events: Sequence[Event], accepted: Sequence[RunId]) -> None:
    started = [event.run_id for event in events if isinstance(event.body, RunStarted)]
    assert started == [run_id for run_id in accepted if run_id in started], "they started out of order"
    running: RunId | None = None
    for event in events:
        if isinstance(event.body, RunStarted):
            assert running is None, f"{event.run_id} starts while {running} works"
            running = event.run_id
        elif isinstance(event.body, Terminal) and event.run_id == running:
            running = None


def check_history(messages: Sequence[Message]) -> None:
    """A history that providers take: it begins with what was asked; an assistant answers a user or a tool; no answer is
    empty; every call has exactly one result, before anything else comes; no result is without its call."""
    assert len({message.message_id for message in messages}) == len(messages)
    assert [message.role for message in messages[:1]] in ([], ["user"])
    waiting: set[str] = set()
    before = ""
    for message in messages:
        if message.role == "tool":
            assert message.tool_call_id in waiting, "a result without its call"
            waiting.remove(message.tool_call_id)
        else:
            assert not waiting, f"{message.role} before the results of {waiting}"
        if message.role == "assistant":
            assert before in ("user", "tool"), f"an assistant behind {before}"
            assert message.tool_calls or content_text(message.content), "an empty answer"
            waiting = {call.tool_call_id for call in message.tool_calls}
            assert len(waiting) == len(message.tool_calls), "two calls with one id"
        before = message.role
    assert not waiting, f"no result for {waiting}"
    by_run = [run_id for run_id, _ in groupby(message.run_id for message in messages)]
    assert len(set(by_run)) == len(by_run), "the runs are mixed up"


def history_of(events: Iterable[Event]) -> list[Message]:
    """The history that a whole log makes."""
    openings: dict[RunId, Opening] = {}
    messages: list[Message] = []
    for event in events:
        if isinstance(event.body, UserMessage) and event.run_id is not None:
            openings[event.run_id] = Opening(event.body.message_id, event.body.content, event.time_ms)
        message = message_of(event, None if event.run_id is None else openings.get(event.run_id))
        if message is not None:
            messages.append(message)
    return messages
