"""What the store writes comes back equal, and deltas take the room that they were promised."""

from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bamboo.core.events import AgentReasoning, AgentToken, AgentToolStart, Event, EventBody, RunQueued
from bamboo.core.types import Epoch, RunId, SessionId, ToolCallId
from bamboo.store.codec import (
    CHUNK_BYTES,
    KINDS,
    decode_row,
    encode_events,
)

SESSION = SessionId("s")
EPOCH = Epoch("e")
START_MS = 1_700_000_000_000

any_text = st.text(st.characters(exclude_categories=()))


def events_of(said: list[tuple[str, EventBody, int]]) -> list[Event]:
    return [
        Event(SESSION, EPOCH, seq, time_ms, RunId(run_id), body)
        for seq, (run_id, body, time_ms) in enumerate(said, start=11)
    ]


bodies = st.one_of(
    st.builds(AgentToken, any_text),
    st.builds(AgentToken, st.just("x" * 1500)),
    st.builds(AgentReasoning, any_text),
    st.builds(RunQueued, st.integers(1, 5)),
)
times = st.one_of(st.integers(0, 5000), st.integers(-(2**40), 2**40)).map(lambda offset: START_MS + offset)


@given(st.lists(st.tuples(st.sampled_from("ab"), bodies, times), max_size=40))
def test_rows_give_back_the_events_they_were_made_of(said: list[tuple[str, EventBody, int]]) -> None:
    events = events_of(said)
    rows = encode_events(events)
    assert [event for row in rows for event in decode_row(row, SESSION, EPOCH)] == events
    for row in rows:
        inside = decode_row(row, SESSION, EPOCH)
        assert row.time_ms == max(event.time_ms for event in inside)
        assert len(row.data) <= CHUNK_BYTES + 3 or len(inside) == 1 or max(e.time_ms for e in inside) - START_MS > 9999


def test_thousand_tokens_in_chunks_of_100_ms_take_about_eleven_kib() -> None:
    data = 0
    for chunk in range(200):
        said: list[tuple[str, EventBody, int]] = [
            ("r", AgentToken("tokn"), START_MS + chunk * 100 + index * 20) for index in range(5)
        ]
        (row,) = encode_events(events_of(said))
        data += len(row.data) + 20  # what SQLite's cell and the row's other columns take
    assert data <= 11.5 * 1024


def test_deltas_are_cut_into_rows_of_at_most_4_kib() -> None:
    said: list[tuple[str, EventBody, int]] = [("r", AgentToken("ä" * 10), START_MS + index) for index in range(3000)]
    rows = encode_events(events_of(said))
    assert max(len(row.data) for row in rows) <= 4096
    assert len(rows) < 3000 * 30 / 4000 * 1.2
    assert [after.last_seq > before.last_seq for before, after in pairwise(rows)] == [True] * (len(rows) - 1)


@pytest.mark.parametrize("other", [AgentReasoning("b"), AgentToken("b"), RunQueued(1)])
def test_row_holds_one_run_and_one_kind(other: EventBody) -> None:
    run_id = "other" if isinstance(other, AgentToken) else "r"
    said = [("r", AgentToken("a"), START_MS), (run_id, other, START_MS), ("r", AgentToken("c"), START_MS)]
    assert [row.last_seq for row in encode_events(events_of(said))] == [11, 12, 13]


def test_arguments_may_be_any_mapping_and_hold_any_json() -> None:
    arguments = {"big": 2**100, "float": 0.1, "deep": {"list": [None, True, "\udfff"]}}
    said: list[tuple[str, EventBody, int]] = [("r", AgentToolStart(ToolCallId("c"), "t", arguments), START_MS)]
    events = events_of(said)
    (row,) = encode_events(events)
    assert decode_row(row, SESSION, EPOCH) == events


def test_row_counts_for_what_it_does_in_the_sums_of_existing_databases() -> None:
    (row,) = encode_events(events_of([("r", AgentToken("tokn"), START_MS)]))
    assert row.size_bytes == len(row.data) + 20


def test_numbers_of_kinds_are_those_in_existing_databases() -> None:
    assert {body_type.type: number for body_type, number in KINDS.items()} == {
        "session_created": 1,
        "user_message": 2,
        "run_queued": 3,
        "run_started": 4,
        "agent_token": 5,
        "agent_reasoning": 6,
        "agent_retry": 7,
        "agent_message": 8,
        "agent_tool_start": 9,
        "agent_tool_complete": 10,
        "approval_required": 11,
        "approval_resolved": 12,
        "agent_complete": 13,
        "agent_error": 14,
        "agent_stopped": 15,
        "session_closed": 16,
    }
