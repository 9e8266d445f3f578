from collections.abc import Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bamboo.core.cursors import epoch_at, resolve
from bamboo.core.events import Gap
from bamboo.core.types import Cursor, Epoch, EpochStart, SessionId

SESSION = SessionId("s")
A, B, C = Epoch("aaa"), Epoch("bbb"), Epoch("ccc")
# Three lives: 1..5, 6..9, and 10 to the head, 14.
LIVES = (EpochStart(A, 1), EpochStart(B, 6), EpochStart(C, 10))
HEAD = 14


def crash(epoch: Epoch, last: int, seen: int) -> tuple[int, Gap]:
    return last, Gap(SESSION, last + 1, seen, "crash", Cursor(epoch, last))


@pytest.mark.parametrize(
    ("epoch", "seq"), [(A, 0), (A, 1), (A, 5), (B, 5), (B, 6), (B, 9), (C, 9), (C, 10), (C, HEAD), (B, 2)]
)
def test_cursor_up_to_the_end_of_its_life_goes_on_without_a_gap(epoch: Epoch, seq: int) -> None:
    assert resolve(SESSION, Cursor(epoch, seq), LIVES, HEAD, 0) == (seq, None)


@pytest.mark.parametrize(("epoch", "seq", "last"), [(A, 6, 5), (A, 14, 5), (B, 10, 9), (B, 99, 9), (C, 15, 14)])
def test_cursor_beyond_its_life_is_told_exactly_what_died_with_the_process(epoch: Epoch, seq: int, last: int) -> None:
    assert resolve(SESSION, Cursor(epoch, seq), LIVES, HEAD, 0) == crash(epoch, last, seq)


def test_newest_life_that_has_no_event_yet_ends_at_the_head() -> None:
    lives = (EpochStart(A, 1), EpochStart(B, 4))
    assert resolve(SESSION, Cursor(B, 3), lives, 3, 0) == (3, None)
    assert resolve(SESSION, Cursor(B, 4), lives, 3, 0) == crash(B, 3, 4)
    assert resolve(SESSION, Cursor(A, 4), lives, 3, 0) == crash(A, 3, 4)


def test_life_that_never_had_an_event_hands_over_at_the_next_ones_start() -> None:
    lives = (EpochStart(A, 1), EpochStart(B, 1), EpochStart(C, 1))
    assert resolve(SESSION, Cursor(A, 0), lives, 8, 0) == (0, None)
    assert resolve(SESSION, Cursor(A, 3), lives, 8, 0) == crash(A, 0, 3)
    assert resolve(SESSION, Cursor(C, 8), lives, 8, 0) == (8, None)


def test_unknown_epoch_starts_over_from_the_oldest_event_there_is() -> None:
    gap = Gap(SESSION, None, None, "epoch", Cursor(A, 0))
    assert resolve(SESSION, Cursor(Epoch("other"), 3), LIVES, HEAD, 0) == (0, gap)


@pytest.mark.parametrize(("floor", "epoch"), [(4, A), (5, A), (6, B), (9, B), (10, C), (14, C)])
def test_unknown_epoch_starts_behind_what_retention_removed(floor: int, epoch: Epoch) -> None:
    gap = Gap(SESSION, None, None, "epoch", Cursor(epoch, floor))
    assert resolve(SESSION, Cursor(Epoch("other"), 3), LIVES, HEAD, floor) == (floor, gap)


def test_place_below_the_floor_is_kept_for_the_reader_to_meet_the_floor_itself() -> None:
    assert resolve(SESSION, Cursor(A, 2), LIVES, HEAD, 8) == (2, None)
    assert resolve(SESSION, Cursor(A, 7), LIVES, HEAD, 8) == crash(A, 5, 7)


@pytest.mark.parametrize(("seq", "epoch"), [(0, A), (1, A), (5, A), (6, B), (9, B), (10, C), (HEAD, C), (HEAD + 1, C)])
def test_epoch_of_a_seq_is_the_life_it_was_written_in(seq: int, epoch: Epoch) -> None:
    assert epoch_at(LIVES, seq) == epoch


def test_epoch_of_a_seq_skips_lives_that_wrote_nothing() -> None:
    lives = (EpochStart(A, 1), EpochStart(B, 4), EpochStart(C, 4))
    assert [epoch_at(lives, seq) for seq in (0, 3, 4)] == [A, A, C]


@st.composite
def logs(draw: st.DrawFn) -> tuple[Sequence[EpochStart], int, int]:
    lengths = draw(st.lists(st.integers(0, 6), min_size=1, max_size=5))
    first, lives = 1, []
    for number, length in enumerate(lengths):
        lives.append(EpochStart(Epoch(f"e{number}"), first))
        first += length
    head = first - 1
    return lives, head, draw(st.integers(0, head))


@given(logs(), st.integers(0, 5), st.integers(0, 40))
def test_place_that_is_given_back_is_one_that_needs_no_further_gap(
    log: tuple[Sequence[EpochStart], int, int], life: int, seq: int
) -> None:
    lives, head, floor = log
    cursor = Cursor(Epoch(f"e{life}"), seq)
    place, gap = resolve(SESSION, cursor, lives, head, floor)
    assert 0 <= place <= head
    if gap is None:
        assert place == seq
        return
    assert gap.cursor.seq == place
    assert resolve(SESSION, gap.cursor, lives, head, floor) == (place, None)
    if gap.reason == "crash":
        assert (gap.from_seq, gap.to_seq) == (place + 1, seq)
        assert place < seq
    else:
        assert place == floor
        assert all(start.epoch != cursor.epoch for start in lives)


@given(logs())
def test_every_event_of_a_log_is_a_cursor_that_its_log_goes_on_from(
    log: tuple[Sequence[EpochStart], int, int],
) -> None:
    lives, head, floor = log
    for seq in range(head + 1):
        assert resolve(SESSION, Cursor(epoch_at(lives, seq), seq), lives, head, floor) == (seq, None)
