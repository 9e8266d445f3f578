"""h11 as the HTTP server uses it: what it hands out, and what it keeps."""

import h11
import pytest

from bamboo.web.http1 import MAX_HEADERS, RequestParser

LIMIT = 4096


def request_in(parser: RequestParser, data: bytes) -> h11.Request:
    parser.receive_data(data)
    event = parser.next_event()
    assert isinstance(event, h11.Request)
    return event


@pytest.mark.parametrize("head", [b"GET / HTTP/1.0\r\n\r\n", b"GET / HTTP/1.1\r\nHost: a\r\nConnection: close\r\n\r\n"])
def test_what_comes_behind_the_last_request_is_not_kept(head: bytes) -> None:
    """It may come for as long as that request's answer is a stream."""
    parser = RequestParser(LIMIT)
    request_in(parser, head)
    assert isinstance(parser.next_event(), h11.EndOfMessage)

    for _ in range(100):
        parser.receive_data(b"x" * 65536)
        assert parser.next_event() is h11.NEED_DATA

    assert not parser.has_input


def test_what_comes_behind_another_request_is_kept_for_its_turn() -> None:
    parser = RequestParser(LIMIT)
    request_in(parser, b"GET /1 HTTP/1.1\r\nHost: a\r\n\r\nGET /2 HTT")
    assert isinstance(parser.next_event(), h11.EndOfMessage)
    assert parser.next_event() is h11.PAUSED
    parser.send(h11.Response(status_code=204, headers=[]))
    parser.send(h11.EndOfMessage())
    parser.start_next_cycle()
    assert parser.next_event() is h11.NEED_DATA
    assert parser.has_input

    assert request_in(parser, b"P/1.1\r\nHost: a\r\n\r\n").target == b"/2"


def test_an_upgrade_is_not_handed_out_and_nothing_else_is_changed() -> None:
    request = request_in(
        RequestParser(LIMIT),
        b"GET /a?b HTTP/1.1\r\nHost: a\r\nUpgrade: h2c\r\nX-One: 1\r\nUpgrade: websocket\r\nX-Two: 2\r\n\r\n",
    )

    assert list(request.headers) == [(b"host", b"a"), (b"x-one", b"1"), (b"x-two", b"2")]
    assert (request.method, request.target, request.http_version) == (b"GET", b"/a?b", b"1.1")


@pytest.mark.parametrize(
    ("data", "status"),
    [
        (b"GET / HTTP/2.0\r\nHost: a\r\n\r\n", 505),
        (b"GET / HTTP/1.1\r\nHost: a\r\nX: " + b"x" * LIMIT + b"\r\n\r\n", 431),
        (b"GET /" + b"x" * LIMIT + b" HTTP/1.1\r\nHost: a\r\n\r\n", 431),
        (b"GET / HTTP/1.1\r\nHost: a\r\n" + b"X:\r\n" * MAX_HEADERS + b"\r\n", 431),
        (b"GET / HTTP/1.1\r\nX: " + b"x" * LIMIT, 431),
        (b"\r\n", 400),
    ],
)
def test_what_is_beyond_the_limits_is_an_error_with_its_status(data: bytes, status: int) -> None:
    parser = RequestParser(LIMIT)
    parser.receive_data(data)

    with pytest.raises(h11.RemoteProtocolError) as caught:
        parser.next_event()
    assert caught.value.error_status_hint == status
