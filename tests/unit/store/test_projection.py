"""What events make of runs, and how pages are filled. What commits refuse is in the contract suite."""

from dataclasses import replace

import pytest

from bamboo.core.events import AgentComplete, AgentToken, Event, EventBody, RunStarted, UserMessage, event_bytes
from bamboo.core.types import Cursor, Epoch, MessageId, RunId, RunStats, RunStatus, SessionId, text_content
from bamboo.store.base import Run
from bamboo.store.projection import fill_page, project_run, queue_of, running_of

CONTENT = text_content("hi")
RUN = Run(RunId("r"), SessionId("s"), MessageId("m"), CONTENT, 5)
COMPLETE = AgentComplete("stop", None, RunStats(0, None, 0))


def event(body: EventBody, seq: int = 7, run_id: str = "r") -> Event:
    return Event(SessionId("s"), Epoch("e"), seq, 50, RunId(run_id), body)


def test_user_message_gives_the_run_its_place_in_the_log() -> None:
    assert project_run(RUN, event(UserMessage(MessageId("m"), CONTENT))) == replace(
        RUN, first_cursor=Cursor(Epoch("e"), 6)
    )


def test_deltas_change_nothing() -> None:
    running = project_run(RUN, event(RunStarted("p", "m", 1)))
    assert project_run(running, event(AgentToken("x"))) is running


def test_nothing_follows_the_terminal_event() -> None:
    ended = project_run(RUN, event(COMPLETE))
    assert (ended.status, ended.last_seq, ended.finished_ms) == (RunStatus.COMPLETED, 7, 50)
    for body in (COMPLETE, AgentToken("x"), RunStarted("p", "m", 1)):
        with pytest.raises(AssertionError):
            project_run(ended, event(body))


def test_event_of_another_run_is_a_bug() -> None:
    with pytest.raises(AssertionError):
        project_run(RUN, event(COMPLETE, run_id="other"))


def test_queue_counts_queued_runs_only_and_running_is_the_other_one() -> None:
    running = replace(RUN, run_id=RunId("a"), status=RunStatus.AWAITING_APPROVAL)
    queued = [replace(RUN, run_id=RunId(name)) for name in ("b", "c")]
    assert [(entry.run_id, entry.position) for entry in queue_of([running, *queued])] == [("b", 1), ("c", 2)]
    assert running_of([*queued, running]) is running
    assert running_of(queued) is None


def test_page_takes_the_first_event_whatever_its_size() -> None:
    events = [event(AgentToken("x" * 1000), seq) for seq in (1, 2, 3)]
    size = event_bytes(events[0].body)
    assert fill_page(events, max_bytes=1) == (events[:1], False)
    assert fill_page(events, max_bytes=2 * size) == (events[:2], False)
    assert fill_page(events, max_bytes=2 * size - 1) == (events[:1], False)
    assert fill_page(events, max_bytes=3 * size) == (events, True)
    assert fill_page([], max_bytes=1) == ([], True)
