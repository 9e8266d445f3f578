"""No split changes what the SSE decoder sees, and it sees what a literal reading of the specification sees."""

import re

from hypothesis import given
from hypothesis import strategies as st

from bamboo.wire import sse
from bamboo.wire.sse import ServerSentEvent, SseDecoder, SseTooLargeError

_PIECES = [b"data", b"data: ", b"id: ", b"id", b"event: ", b"retry: 5", b":", b" ", b"\n", b"\n\n", b"\r", b"\r\n",
           b"\r\r", b"\xef\xbb\xbf", "é竹".encode(), b"\xe7\xab", b"\0", b"x", b'data: {"a": 1}\n\n']  # fmt: skip

streams = st.lists(st.sampled_from(_PIECES) | st.binary(max_size=3), max_size=40).map(b"".join)


@st.composite
def split_streams(draw: st.DrawFn) -> list[bytes]:
    stream = draw(streams)
    cuts = sorted(draw(st.lists(st.integers(0, len(stream)), max_size=len(stream))))
    return [stream[start:end] for start, end in zip([0, *cuts], [*cuts, len(stream)], strict=True)]


def decode(pieces: list[bytes], max_event_bytes: int = 10_000) -> tuple[list[ServerSentEvent], bool]:
    """The events, and whether it was too large."""
    decoder = SseDecoder(max_event_bytes=max_event_bytes)
    events: list[ServerSentEvent] = []
    for piece in pieces:
        try:
            events += decoder.feed(piece)
        except SseTooLargeError as error:
            return events + error.events, True
    return events, False


def specification(stream: bytes) -> list[ServerSentEvent]:
    """WHATWG HTML, 9.2.5 and 9.2.6, to the letter and slowly."""
    text = stream.decode("utf-8", "replace").removeprefix("\ufeff")
    events: list[ServerSentEvent] = []
    data, event_type, event_id, retry = "", "", "", None
    for line in re.split(r"\r\n|\n|\r", text)[:-1]:
        if line == "":
            if data:
                events.append(ServerSentEvent(event_type or "message", data.removesuffix("\n"), event_id, retry))
            data, event_type = "", ""
        elif not line.startswith(":"):
            field, _, value = line.partition(":")
            value = value.removeprefix(" ")
            if field == "event":
                event_type = value
            elif field == "data":
                data += value + "\n"
            elif field == "id" and "\0" not in value:
                event_id = value
            elif field == "retry" and re.fullmatch("[0-9]+", value):
                retry = int(value)
    return events


@given(split_streams())
def test_any_split_of_a_stream_gives_the_events_of_the_specification(pieces: list[bytes]) -> None:
    assert decode(pieces) == (specification(b"".join(pieces)), False)


@given(split_streams(), st.integers(0, 30))
def test_any_split_of_a_stream_that_is_too_large_is_refused_at_the_same_place(pieces: list[bytes], most: int) -> None:
    assert decode(pieces, most) == decode([b"".join(pieces)], most)


@given(st.lists(st.text(st.characters(exclude_characters="\r\n", exclude_categories=["Cs"]))))
def test_what_we_encode_is_what_we_decode(texts: list[str]) -> None:
    stream = b"".join(sse.event(f"e.{number}", text.encode()) for number, text in enumerate(texts, 1))

    events, _ = decode([sse.PREAMBLE, stream, sse.KEEP_ALIVE])

    assert [(event.id, event.data) for event in events] == [
        (f"e.{number}", text) for number, text in enumerate(texts, 1)
    ]
