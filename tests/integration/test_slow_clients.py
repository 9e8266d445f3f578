"""Clients that take their time: each deadline over real sockets. A deadline that is not there makes its test run into
`DEADLINE_S`."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest
import trio
import trio.testing
from quart import Response, request

from bamboo.config import ServerConfig
from bamboo.web.http1 import HALF_CLOSED_S
from tests.support.http_client import Answer, Cut, HttpConnection, connect, request_bytes
from tests.support.web import open_web_world, web_config
from tests.support.web_apps import open_app, read_body

SOON_S = 0.1
"""A deadline that is waited for."""

POST_HEAD = request_bytes(
    "POST", "/api/v1/chat", headers={"Content-Type": "application/json", "Content-Length": "1000"}
)


def config(*, header_s: float = 60, body_s: float = 60, keep_alive_s: float = 60) -> ServerConfig:
    return ServerConfig(port=0, header_timeout_s=header_s, body_timeout_s=body_s, keep_alive_s=keep_alive_s)


@asynccontextmanager
async def dripping(connection: HttpConnection, drop: bytes = b"x") -> AsyncIterator[None]:
    """Meanwhile the client sends a byte now and then, for as long as there is somebody to send it to."""

    async def drip() -> None:
        try:
            while True:
                await connection.send(drop)
                await trio.sleep(SOON_S / 5)
        except (trio.BrokenResourceError, trio.ClosedResourceError):
            pass

    async with trio.open_nursery() as nursery:
        nursery.start_soon(drip)
        yield
        nursery.cancel_scope.cancel()


def assert_too_late(answer: Answer, key: str) -> None:
    assert answer.status == 408
    assert answer.error["code"] == "invalid_request"
    assert key in answer.error["message"]
    assert answer.headers["connection"] == "close"


# Heads.


@pytest.mark.parametrize("part", [b"G", b"GET /healthz HTTP/1.1\r\nHost: 127.0.0.1\r\nX:", POST_HEAD[:-2]])
async def test_a_head_that_does_not_come_whole_in_time_is_answered_with_408(part: bytes) -> None:
    async with open_web_world(web_config(config(header_s=SOON_S))) as web, web.connect() as connection:
        await connection.send(part)
        assert_too_late(await connection.read_answer(), "server.header_timeout_s")
        assert await connection.wait_closed() == b""


async def test_a_byte_now_and_then_does_not_make_a_head_last_longer() -> None:
    async with open_web_world(web_config(config(header_s=3 * SOON_S))) as web, web.connect() as connection:
        await connection.send(b"GET /healthz HTTP/1.1\r\nHost: ")
        async with dripping(connection):
            assert_too_late(await connection.read_answer(), "server.header_timeout_s")
            assert await connection.wait_closed() == b""


async def test_a_connection_on_which_nothing_comes_is_closed_without_a_word() -> None:
    async with open_web_world(web_config(config(header_s=SOON_S))) as web, web.connect() as connection:
        assert await connection.wait_closed() == b""


async def test_every_head_of_a_connection_has_its_deadline() -> None:
    async with open_web_world(web_config(config(header_s=3 * SOON_S))) as web, web.connect() as connection:
        assert (await connection.request("GET", "/healthz")).status == 200
        async with dripping(connection, b"X"):
            assert_too_late(await connection.read_answer(), "server.header_timeout_s")


async def test_a_head_that_begins_in_the_packet_of_another_request_has_its_deadline() -> None:
    async with open_web_world(web_config(config(header_s=SOON_S))) as web, web.connect() as connection:
        await connection.send(request_bytes("GET", "/healthz") + b"GET /healthz HT")
        assert (await connection.read_answer()).status == 200
        assert_too_late(await connection.read_answer(), "server.header_timeout_s")


async def test_a_head_has_its_whole_time_from_its_first_byte_on(mock_clock: trio.testing.MockClock) -> None:
    """And between two requests a connection has `keep_alive_s`, whatever a head may take."""
    settings = web_config(config(header_s=1, keep_alive_s=2))
    async with open_web_world(settings) as web, web.connect() as connection:
        head = request_bytes("GET", "/healthz")
        for _ in range(2):
            assert (await connection.request("GET", "/healthz")).status == 200
            await passed(mock_clock, 1.9)  # idle
            await connection.send(head[:20])
            await passed(mock_clock, 0.9)  # a head on its way, beyond the idle time
            await connection.send(head[20:])
            assert (await connection.read_answer()).status == 200
        await passed(mock_clock, 2.1)
        assert await connection.wait_closed() == b""


async def passed(clock: trio.testing.MockClock, seconds: float) -> None:
    """The server has seen what was sent; then so much time has passed, and it has done what it does about that."""
    await trio.testing.wait_all_tasks_blocked(0.02)
    clock.jump(seconds)
    await trio.testing.wait_all_tasks_blocked(0.02)


async def test_slow_heads_are_in_nobodys_way() -> None:
    async with open_web_world(web_config(config())) as web, web.connect() as slow, web.connect() as other:
        await slow.send(b"GET / HT")
        assert (await other.request("GET", "/healthz")).status == 200
        await slow.send(b"TP/1.1\r\nHost: localhost\r\n\r\n")
        assert (await slow.read_answer()).status == 404


async def test_a_server_that_closes_waits_for_no_head() -> None:
    async with open_web_world(web_config(config())) as web, web.connect() as connection, web.connect() as used:
        assert (await used.request("GET", "/healthz")).status == 200
        for slow in (connection, used):
            await slow.send(b"GET / HT")
        await trio.testing.wait_all_tasks_blocked(0.02)
        with trio.fail_after(1):
            await web.web.server.close()
            for slow in (connection, used):
                assert await slow.wait_closed() == b""


# Bodies.


async def test_a_body_that_does_not_come_whole_in_time_is_answered_with_408() -> None:
    async with open_web_world(web_config(config(body_s=SOON_S))) as web, web.connect() as connection:
        await connection.send(POST_HEAD + b'{"message": ')
        assert_too_late(await connection.read_answer("POST"), "server.body_timeout_s")
        assert await connection.wait_closed() == b""


async def test_a_byte_now_and_then_does_not_make_a_body_last_longer() -> None:
    async with open_web_world(web_config(config(body_s=3 * SOON_S))) as web, web.connect() as connection:
        await connection.send(POST_HEAD)
        async with dripping(connection):
            assert_too_late(await connection.read_answer("POST"), "server.body_timeout_s")


async def test_the_body_of_a_request_that_wants_none_has_its_deadline_too() -> None:
    """Here the answer is under way, and all that can be done is to cut it."""
    async with open_web_world(web_config(config(body_s=3 * SOON_S))) as web:
        accepted = await web.chat("hello")
        async with web.connect() as connection:
            await connection.send(request_bytes("GET", accepted["stream_url"], headers={"Content-Length": "1000"}))
            assert (await connection.read_head()).status == 200
            async with dripping(connection):
                with pytest.raises(Cut):
                    await read_body(connection)
        await web.nobody_subscribed()


async def test_an_answer_may_take_longer_than_any_request() -> None:
    settings = web_config(config(header_s=SOON_S, body_s=SOON_S, keep_alive_s=SOON_S))
    async with open_web_world(settings) as web, web.connect() as connection:
        accepted = (await connection.request("POST", "/api/v1/chat", json={"message": "hi"})).json()
        reader = await connection.open_sse("GET", accepted["stream_url"])
        await reader.until("run_started")
        for _ in range(2):  # so that every deadline has passed, twice
            async with web.connect() as idle:
                assert await idle.wait_closed() == b""
        (await web.next_call()).end()
        assert (await reader.rest())[-1].data["type"] == "agent_complete"


# Clients that send nothing more, and wait.


async def test_a_client_that_closes_its_side_gets_its_answers() -> None:
    async with open_web_world() as web:
        for count in (1, 3):
            async with web.connect() as connection:
                await connection.send(request_bytes("GET", "/healthz") * count)
                await connection.stream.send_eof()
                for _ in range(count):
                    assert (await connection.read_answer()).status == 200
                assert await connection.wait_closed() == b""
        async with web.connect() as connection:
            json = {"Content-Type": "application/json"}
            await connection.send(request_bytes("POST", "/api/v1/chat", headers=json, body=b'{"message":"x"}'))
            await connection.stream.send_eof()
            assert (await connection.read_answer("POST")).status == 201


async def test_a_client_that_closes_its_side_on_a_stream_is_gone() -> None:
    async with open_web_world() as web:
        accepted = await web.chat("hello")
        for with_head in (True, False):
            async with web.connect() as connection:
                await connection.send(request_bytes("GET", accepted["stream_url"]))
                if with_head:
                    await connection.read_head()
                await connection.stream.send_eof()
                with trio.fail_after(HALF_CLOSED_S / 2):  # it is not taken for one that waits
                    await web.nobody_subscribed()
                with pytest.raises((Cut, trio.BrokenResourceError)):
                    await connection.read_answer()


async def test_a_client_that_closes_its_side_in_a_request_is_told_that_it_is_none() -> None:
    async with open_web_world() as web:
        for part in (b"GET / HT", POST_HEAD + b"{"):
            async with web.connect() as connection:
                await connection.send(part)
                await connection.stream.send_eof()
                assert (await connection.read_answer()).status == 400
                assert await connection.wait_closed() == b""


async def test_a_client_that_closes_its_side_is_not_waited_for_without_end(mock_clock: trio.testing.MockClock) -> None:
    begun, left = trio.Event(), trio.Event()

    async def endless() -> Response:
        begun.set()
        try:
            await trio.sleep_forever()
        finally:
            left.set()
        raise AssertionError("that was for ever")

    async with open_app(endless=endless) as (web, _, _), connect(web.url) as connection:
        await connection.send(request_bytes("GET", "/test/endless"))
        await begun.wait()
        await connection.stream.send_eof()
        await passed(mock_clock, HALF_CLOSED_S * 0.9)
        assert not left.is_set()
        await passed(mock_clock, HALF_CLOSED_S * 0.2)
        await left.wait()
        with pytest.raises((Cut, trio.BrokenResourceError)):
            await connection.read_answer()


async def test_a_client_that_closes_its_side_may_read_slowly(mock_clock: trio.testing.MockClock) -> None:
    size = 8 * 1024 * 1024

    async def big() -> Response:
        return Response(b"x" * size)

    async with open_app(big=big) as (web, _, _), connect(web.url, receive_buffer_bytes=65536) as connection:
        await connection.send(request_bytes("GET", "/test/big"))
        assert (await connection.read_head()).status == 200
        await connection.stream.send_eof()
        await passed(mock_clock, HALF_CLOSED_S * 2)
        assert len(await read_body(connection)) == size
        assert await connection.wait_closed() == b""


async def test_the_app_sees_no_body_where_none_is_wanted() -> None:
    """It would hold it for as long as a stream lasts."""

    async def size() -> Response:
        return Response(str(len(await request.get_data())))

    async with open_app(size=size) as (web, _, _), connect(web.url) as connection:
        body = b"x" * 1_000_000
        assert (await connection.request("POST", "/test/size", body=body)).body == b"1000000"
        assert (await connection.request("GET", "/test/size", body=body)).body == b"0"
        chunked = b"3\r\nxxx\r\n0\r\n\r\n"
        await connection.send(request_bytes("GET", "/test/size", headers={"Transfer-Encoding": "chunked"}) + chunked)
        assert (await connection.read_answer()).body == b"0"
        assert (await connection.request("GET", "/healthz")).status == 200
