import pytest
from hypothesis import given
from hypothesis import strategies as st

from bamboo.core.events import AgentComplete, AgentError, AgentStopped, AgentToken, Event, Terminal, terminal_status
from bamboo.core.types import (
    MAX_JSON_DEPTH,
    SESSION_ID_PATTERN,
    Cursor,
    Epoch,
    ImagePart,
    RunId,
    RunStats,
    RunStatus,
    SessionId,
    TextPart,
    Usage,
    content_text,
    is_too_deep,
    text_content,
)

_EPOCH_CHARS = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789_-"


@given(st.text(_EPOCH_CHARS, min_size=1, max_size=32), st.integers(0, 10**18 - 1))
def test_cursor_comes_back_from_its_text(epoch: str, seq: int) -> None:
    cursor = Cursor(Epoch(epoch), seq)
    assert Cursor.parse(str(cursor)) == cursor


@pytest.mark.parametrize(
    "text",
    [
        "",
        ".",
        "e",
        "e.",
        ".1",
        "e.-1",
        "e.+1",
        "e.01",
        "e.1.2",
        "e.1 ",
        " e.1",
        "e.1\n",
        "e.1_0",
        "e.٣",
        "é.1",
        "e.0x1",
        "e.1e3",
        "e" * 33 + ".1",
        "e.1" + "0" * 18,
        "e/x.1",
    ],
)
def test_anything_else_is_no_cursor(text: str) -> None:
    with pytest.raises(ValueError, match=r"^a cursor looks like <epoch>\.<seq>$"):
        Cursor.parse(text)


@given(st.text(max_size=40))
def test_cursor_parser_raises_valueerror_or_gives_the_text_back(text: str) -> None:
    try:
        cursor = Cursor.parse(text)
    except ValueError:
        return
    assert str(cursor) == text


@pytest.mark.parametrize("text", ["a", "A-z_0.9:x", "x" * 128])
def test_session_id_has_url_safe_characters(text: str) -> None:
    assert SESSION_ID_PATTERN.fullmatch(text)


@pytest.mark.parametrize("text", ["", "x" * 129, "a b", "a/b", "a\n", "é", "a\x00", "%41"])
def test_session_id_has_no_others(text: str) -> None:
    assert SESSION_ID_PATTERN.fullmatch(text) is None


def test_text_of_a_message_leaves_its_images_out() -> None:
    assert content_text(text_content("hi")) == "hi"
    assert content_text((TextPart("a"), ImagePart("https://example.org/x.png"), TextPart("b"))) == "ab"


def test_usage_adds_up_field_by_field() -> None:
    assert Usage(1, 2, 3) + Usage(10, 20, 30) == Usage(11, 22, 33)


def test_finished_states_are_those_that_a_terminal_event_leaves() -> None:
    finished = {status.value for status in RunStatus if status.finished}
    assert finished == {"completed", "failed", "stopped", "interrupted"}


@pytest.mark.parametrize(
    ("body", "status"),
    [
        (AgentComplete("stop", None, RunStats(0, None, 1)), RunStatus.COMPLETED),
        (AgentStopped("user"), RunStatus.STOPPED),
        (AgentError("provider_error", "x", retryable=True), RunStatus.FAILED),
        (AgentError("interrupted", "x", retryable=True), RunStatus.INTERRUPTED),
    ],
)
def test_terminal_event_says_the_state_of_its_run(body: Terminal, status: RunStatus) -> None:
    assert terminal_status(body) is status
    assert status.finished


def test_event_is_its_place_and_body_whether_it_was_encoded_or_not() -> None:
    def event(seq: int = 3, text: str = "x", run_id: str | None = "r") -> Event:
        run = None if run_id is None else RunId(run_id)
        return Event(SessionId("s"), Epoch("e"), seq, 5, run, AgentToken(text))

    encoded = event()
    encoded.encoded = b"{}"
    assert encoded == event()
    assert event() != event(seq=4)
    assert event() != event(text="y")
    assert event() != event(run_id=None)
    assert event() != "event"
    assert event().cursor == Cursor(Epoch("e"), 3)
    assert "e.3" in repr(event())


def nested(depth: int, *, of: str) -> object:
    value: object = 1
    for _ in range(depth):
        value = [value] if of == "lists" else {"a": 0, "b": value}
    return value


@pytest.mark.parametrize("of", ["lists", "objects"])
def test_depth_counts_lists_and_objects_inside_each_other(of: str) -> None:
    assert not is_too_deep(nested(0, of=of))
    assert not is_too_deep(nested(1, of=of))
    assert not is_too_deep(nested(MAX_JSON_DEPTH, of=of))
    assert is_too_deep(nested(MAX_JSON_DEPTH + 1, of=of))
    assert is_too_deep([1, {"x": nested(MAX_JSON_DEPTH, of=of)}, 2])


def test_depth_is_not_width() -> None:
    assert not is_too_deep({"items": [{"x": [index]} for index in range(10_000)]})
