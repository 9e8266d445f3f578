"""The SSE codec, against the examples and rules of WHATWG HTML, 9.2."""

import pytest

from bamboo.core.types import Cursor, Epoch
from bamboo.wire import sse
from bamboo.wire.sse import ServerSentEvent, SseDecoder, SseTooLargeError

LIMIT = 1000


def decode(*pieces: bytes) -> list[ServerSentEvent]:
    decoder = SseDecoder(max_event_bytes=LIMIT)
    return [event for piece in pieces for event in decoder.feed(piece)]


def message(data: str, id: str = "", retry: int | None = None) -> ServerSentEvent:  # noqa: A002 - the field's name
    return ServerSentEvent("message", data, id, retry)


def test_an_event_carries_its_cursor_and_one_line_of_data() -> None:
    assert sse.event(Cursor(Epoch("e1"), 7), b'{"a":1}') == b'id: e1.7\ndata: {"a":1}\n\n'


def test_a_frame_has_no_id_so_that_it_moves_no_reader() -> None:
    frames = sse.event("e.1", b"first") + sse.frame(b"{}")

    assert decode(frames) == [message("first", "e.1"), message("{}", "e.1")]
    assert sse.frame(b"{}") == b"data: {}\n\n"


def test_preamble_and_keep_alive_are_no_events() -> None:
    decoder = SseDecoder(max_event_bytes=LIMIT)

    assert decoder.feed(sse.PREAMBLE + sse.KEEP_ALIVE + sse.KEEP_ALIVE) == []
    assert decoder.retry_ms == 1000


@pytest.mark.parametrize(
    ("stream", "expected"),
    [
        (b"data: YHOO\ndata: +2\ndata: 10\n\n", ["YHOO\n+2\n10"]),
        (b": test stream\n\ndata: first event\nid: 1\n\ndata:second event\nid\n\ndata:  third event\n\n",
         ["first event", "second event", " third event"]),
        (b"data\n\ndata\ndata\n\ndata:", ["", "\n"]),
        (b"data:test\n\ndata: test\n\n", ["test", "test"]),
    ],
)  # fmt: skip
def test_the_examples_of_the_specification(stream: bytes, expected: list[str]) -> None:
    assert [event.data for event in decode(stream)] == expected


@pytest.mark.parametrize("end", [b"\n", b"\r\n", b"\r"])
def test_lines_end_in_lf_crlf_or_cr(end: bytes) -> None:
    stream = end.join([b"id: 4", b"data: a", b"data: b", b"", b"data: c", b"", b""])

    assert decode(stream) == [message("a\nb", "4"), message("c", "4")]


def test_a_crlf_that_a_split_parts_is_one_line_end() -> None:
    assert decode(b"data: a\r", b"\ndata: b\r", b"", b"\n\r", b"\n", b"data: c\n\n") == [message("a\nb"), message("c")]


def test_an_event_that_ends_in_cr_does_not_wait_for_what_may_follow() -> None:
    assert decode(b"data: a\r\r") == [message("a")]


def test_a_byte_order_mark_is_dropped_at_the_start_and_only_there() -> None:
    mark = b"\xef\xbb\xbf"

    assert decode(mark + b"data: a\n\n") == [message("a")]
    assert decode(mark[:1], mark[1:] + b"da", b"ta: a\n\n") == [message("a")]
    assert decode(b"\n" + mark + b"data: a\n\n") == []
    assert decode(b"data: a\n\n", mark + b"data: b\n\n") == [message("a")]


def test_a_character_that_a_split_parts_is_whole() -> None:
    stream = "data: 竹🎋\n\n".encode()

    assert decode(*(stream[index : index + 1] for index in range(len(stream)))) == [message("竹🎋")]


def test_what_is_no_utf_8_becomes_the_replacement_character() -> None:
    assert decode(b"data: a\xffb\n\n", b"data: \xe2\x82\n\n") == [message("a\ufffdb"), message("\ufffd")]


def test_type_id_and_retry_as_the_specification_has_them() -> None:
    decoder = SseDecoder(max_event_bytes=LIMIT)

    assert decoder.feed(b"event: add\nid: 1\nretry: 250\ndata: a\n\n") == [ServerSentEvent("add", "a", "1", 250)]
    assert decoder.feed(b"data: b\n\n") == [ServerSentEvent("message", "b", "1", 250)]
    assert decoder.feed(b"id: 2\nevent: lost\n\n") == []  # no data: no event, but the id holds
    assert (decoder.last_event_id, decoder.retry_ms) == ("2", 250)
    assert decoder.feed(b"id: 3\0\nretry: soon\nretry: -1\nretry: 12345678901234567890\nother: x\ndata: c\n\n") == [
        ServerSentEvent("message", "c", "2", 250)
    ]
    assert decoder.feed(b"id\ndata: d\n\n") == [ServerSentEvent("message", "d", "", 250)]


def test_an_id_counts_only_once_its_event_is_whole() -> None:
    decoder = SseDecoder(max_event_bytes=LIMIT)

    assert decoder.feed(b"id: 9\n") == []
    assert decoder.last_event_id == ""
    assert decoder.feed(b"data: a\n\n") == [message("a", "9")]


def test_an_event_that_the_end_cuts_is_never_seen() -> None:
    assert decode(b"data: a\n\ndata: b\n") == [message("a")]


@pytest.mark.parametrize(
    "stream",
    [
        b"data: " + b"x" * LIMIT + b"\n\n",
        b"data: " + b"x" * LIMIT,
        b":" + b"x" * LIMIT,
        b"data: " + b"x" * (LIMIT // 2) + b"\ndata: " + b"x" * (LIMIT // 2) + b"\n\n",
        b"data\n" * (LIMIT // 4 + 1),
    ],
    ids=["line", "line without end", "comment", "lines of one event", "many empty lines"],
)
@pytest.mark.parametrize("size", [1, 7, 10_000])
def test_what_is_too_large_is_refused_however_it_comes(stream: bytes, size: int) -> None:
    whole = b"data: before\n\n" + stream
    events: list[ServerSentEvent] = []
    decoder = SseDecoder(max_event_bytes=LIMIT)

    with pytest.raises(SseTooLargeError) as refused:  # noqa: PT012 - which feed refuses depends on the size
        for start in range(0, len(whole), size):
            events += decoder.feed(whole[start : start + size])

    assert events + refused.value.events == [message("before")]


@pytest.mark.parametrize("before", [b"", b"data: before\n\n"], ids=["first", "later"])
def test_an_event_that_is_too_large_is_refused_when_it_comes_alone(before: bytes) -> None:
    decoder = SseDecoder(max_event_bytes=LIMIT)
    decoder.feed(before)

    with pytest.raises(SseTooLargeError):
        decoder.feed(b"data: " + b"x" * LIMIT + b"\n\n")


def test_a_mark_at_the_start_is_not_counted_while_its_line_has_no_end() -> None:
    line = b"data: " + b"x" * (LIMIT - len("data: "))

    assert decode(b"\xef\xbb\xbf" + line, b"\n\n") == [message("x" * (LIMIT - len("data: ")))]


@pytest.mark.parametrize(
    ("pieces", "expected"),
    [
        ([b"data: a\rdata: b\n\n"], message("a\nb")),
        ([b"data: a\rb\n\n"], message("a")),
        ([b"event: add\n", b"data: a\n\n"], ServerSentEvent("add", "a", "", None)),
        ([b"data: a\n", b"data: b\n\n"], message("a\nb")),
        ([b"data: ", b"data: b\n\n"], message("data: b")),
    ],
)
def test_what_only_looks_like_one_whole_event_is_not_taken_for_one(
    pieces: list[bytes], expected: ServerSentEvent
) -> None:
    assert decode(*pieces) == [expected]


def test_the_largest_event_that_is_allowed_is_taken() -> None:
    text = "x" * (LIMIT - len("data: "))
    event = f"data: {text}\n\n".encode()

    assert decode(event, b"\xef", b"") == [message(text)]
    assert decode(b"\xef\xbb\xbf" + event) == [message(text)]
    assert decode(*(event[index : index + 1] for index in range(len(event)))) == [message(text)]
