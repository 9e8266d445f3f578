"""Nothing that a client sends grows on the HTTP server without a bound."""

from contextlib import suppress

import pytest
import trio
import trio.testing

from bamboo.config import ServerConfig
from bamboo.web.http1 import MAX_HEADERS
from tests.support.http_client import Answer, HttpConnection, request_bytes
from tests.support.web import open_web_world, web_config

LIMIT = 4096
FLOOD_BYTES = 64 * 1024 * 1024
"""Far more than the kernel holds between a client that sends and a server that does not read."""


def small_heads() -> ServerConfig:
    return ServerConfig(port=0, max_header_bytes=LIMIT)


def head_of(size: int) -> bytes:
    """A whole request of so many bytes, all of it head."""
    padding = size - len(request_bytes("GET", "/healthz", headers={"X-Padding": ""}))
    head = request_bytes("GET", "/healthz", headers={"X-Padding": "x" * padding})
    assert len(head) == size
    return head


def assert_refused(answer: Answer, status: int) -> None:
    assert answer.status == status
    assert answer.error["code"] == "invalid_request"
    assert not answer.error["retryable"]
    assert answer.headers["connection"] == "close"


# Heads.


@pytest.mark.parametrize("step", [1, 100, None])
async def test_a_head_has_a_size_however_it_comes(step: int | None) -> None:
    async with open_web_world(web_config(small_heads())) as web:
        async with web.connect() as connection:
            await connection.send(head_of(LIMIT - 100), step=step)
            assert (await connection.read_answer()).status == 200
        async with web.connect() as connection:
            await send_what_is_taken(connection, head_of(LIMIT + 100), step)
            assert_refused(await connection.read_answer(), 431)
            assert await connection.wait_closed() == b""


async def send_what_is_taken(connection: HttpConnection, data: bytes, step: int | None) -> None:
    with suppress(trio.BrokenResourceError):  # the server may have seen enough
        await connection.send(data, step=step)


@pytest.mark.parametrize(
    "start",
    [
        b"GET /" + b"x" * LIMIT,
        b"GET / HTTP/1.1\r\nX: " + b"x" * LIMIT,
        b"GET / HTTP/1.1\r\n" + b"X: x\r\n" * LIMIT,
        b"X" * 2 * LIMIT,
    ],
)
async def test_a_head_without_an_end_is_not_waited_for(start: bytes) -> None:
    async with open_web_world(web_config(small_heads())) as web, web.connect() as connection:
        await connection.send(start)
        answer = await connection.read_answer()
        assert_refused(answer, answer.status)
        assert answer.status in (400, 431)
        assert await connection.wait_closed() == b""


async def test_a_request_has_so_many_headers() -> None:
    async with open_web_world() as web:
        for count, status in ((MAX_HEADERS - 1, 200), (MAX_HEADERS, 431)):  # and Host
            async with web.connect() as connection:
                await connection.send(request_bytes("GET", "/healthz", headers=[("X", "x")] * count))
                assert (await connection.read_answer()).status == status


async def test_a_head_request_is_refused_without_a_body() -> None:
    async with open_web_world(web_config(small_heads())) as web, web.connect() as connection:
        await connection.send(request_bytes("HEAD", "/healthz", headers={"X": "x" * LIMIT}))
        assert (await connection.read_head("HEAD")).status == 431
        assert await connection.read_piece() == b""
        assert await connection.wait_closed() == b""


@pytest.mark.parametrize(
    ("request_head", "status"),
    [
        (b"nonsense\r\n\r\n", 400),
        (b"GET / HTTP/1.1\r\n\r\n", 400),  # no Host
        (b"GET / HTTP/1.1\r\nHost: a\r\nHost: b\r\n\r\n", 400),
        (b"GET / HTTP/1.1\r\nHost: localhost\r\nContent-Length: x\r\n\r\n", 400),
        (b"POST / HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: gzip, chunked\r\n\r\n", 501),
        (b"GET / HTTP/1.2\r\nHost: localhost\r\n\r\n", 505),
    ],
)
async def test_what_is_no_request_of_ours_is_told_so_in_the_form_of_every_error(
    request_head: bytes, status: int
) -> None:
    async with open_web_world() as web, web.connect() as connection:
        await connection.send(request_head)
        assert_refused(await connection.read_answer(), status)
        assert await connection.wait_closed() == b""


# Requests behind one that is being answered.


async def test_requests_behind_a_stream_are_not_read() -> None:
    async with open_web_world() as web, web.connect() as connection:
        accepted = await web.chat("hello")
        await connection.send(request_bytes("GET", accepted["stream_url"]))
        await connection.read_head()
        assert await taken_of_a_flood(connection, request_bytes("GET", "/healthz")) < FLOOD_BYTES


async def taken_of_a_flood(connection: HttpConnection, data: bytes) -> int:
    """How much the other side takes until it takes no more, at most FLOOD_BYTES."""
    block, taken = memoryview(data * (1_000_000 // len(data))), 0
    raw = connection.stream.socket
    while taken < FLOOD_BYTES:
        with trio.move_on_after(0):  # what the kernel takes at once
            while taken < FLOOD_BYTES:
                taken += await raw.send(block[taken % len(data) :])
        before = taken
        await trio.testing.wait_all_tasks_blocked(0.05)
        with trio.move_on_after(0):
            taken += await raw.send(block[taken % len(data) :])
        if taken == before:
            return taken
    return taken


@pytest.mark.parametrize(("headers", "version"), [({"Connection": "close"}, "1.1"), ({}, "1.0")])
@pytest.mark.parametrize("behind", [b"\r\n", b"nonsense", request_bytes("GET", "/nothing")])
async def test_what_stands_behind_the_last_request_of_a_connection_is_ignored(
    headers: dict[str, str], version: str, behind: bytes
) -> None:
    json = {**headers, "Content-Type": "application/json"}
    last = request_bytes("POST", "/api/v1/chat", headers=json, body=b'{"message": "hi"}', version=version)
    async with open_web_world() as web, web.connect() as connection:
        await connection.send(last + behind)
        assert (await connection.read_answer("POST")).status == 201
        assert await connection.wait_closed() == b""


async def test_requests_behind_the_thousandth_do_not_hold_its_connection() -> None:
    """hypercorn says `Connection: close` with that one."""
    async with open_web_world() as web, web.connect() as connection, trio.open_nursery() as nursery:
        nursery.start_soon(send_what_is_taken, connection, request_bytes("GET", "/healthz") * 1100, None)
        for _ in range(1000):
            answer = await connection.read_answer()
            assert answer.status == 200
        while "connection" not in answer.headers:
            answer = await connection.read_answer()
        while web.web.server.connections:
            await trio.testing.wait_all_tasks_blocked(0.001)


# Bodies.


async def test_a_body_that_nobody_wants_is_not_waited_for() -> None:
    """The answer is there at once, and the rest of the body has LINGER_S to come."""
    async with open_web_world() as web, web.connect() as connection:
        head = request_bytes("POST", "/nothing", headers={"Content-Length": "1000000"})
        await connection.send(head + b"x")
        assert (await connection.read_answer("POST")).status == 404
        assert await connection.wait_closed() == b""


@pytest.mark.parametrize("end", [b"", b"x" * 100_000])
async def test_a_chunk_without_an_end_of_its_head_is_not_waited_for(end: bytes) -> None:
    async with open_web_world(web_config(small_heads())) as web, web.connect() as connection:
        headers = {"Content-Type": "application/json", "Transfer-Encoding": "chunked"}
        await connection.send(request_bytes("POST", "/api/v1/chat", headers=headers))
        await send_what_is_taken(connection, b"1;" + b"x" * 2 * LIMIT + end, None)
        answer = await connection.read_answer("POST")
        assert_refused(answer, answer.status)
        assert answer.status in (400, 431)
