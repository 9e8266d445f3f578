"""The sharp edges of hypercorn and quart-trio, and what we lean on in them: each test fails if an upgrade changes its
subject."""

import re
from collections.abc import AsyncIterator
from importlib.metadata import version

import pytest
import trio
import trio.testing
from hypercorn.protocol.h11 import H11Protocol
from quart import Response, request

from bamboo.config import ServerConfig
from bamboo.web.connections import PlainStream
from bamboo.web.http1 import CONNECTION
from tests.support.http_client import Cut, ask, connect, request_bytes
from tests.support.web import open_web_world, web_config
from tests.support.web_apps import open_app, read_body

# Streams longer than Quart's timeout.


async def test_a_stream_is_not_cut_where_another_answer_is() -> None:
    async def slow() -> Response:
        async def pieces() -> AsyncIterator[bytes]:
            yield b"begun"
            await trio.sleep_forever()

        return Response(pieces())

    async with open_app(slow=slow) as (web, app, _):
        app.config["RESPONSE_TIMEOUT"] = 0.05
        async with connect(web.url) as connection, connect(web.url) as other:
            accepted = (await connection.request("POST", "/api/v1/chat", json={"message": "hi"})).json()
            reader = await connection.open_sse("GET", accepted["stream_url"])
            await reader.take(1)
            await other.send(request_bytes("GET", "/test/slow"))
            await other.read_head()
            with pytest.raises(Cut):
                await read_body(other)
            await ask(web.url, "POST", f"/api/v1/stop/{accepted['session_id']}")
            assert (await reader.rest())[-1].data["type"] == "agent_stopped"


# HTTP/1 only.


async def test_an_upgrade_to_cleartext_http2_is_not_taken() -> None:
    headers = {
        "Connection": "Upgrade, HTTP2-Settings",
        "Upgrade": "h2c",
        "HTTP2-Settings": "AAMAAABkAARAAAAAAAIAAAAA",
    }
    async with open_web_world() as web, web.connect() as connection:
        for _ in range(2):
            answer = await connection.request("GET", "/healthz", headers=headers)
            assert (answer.status, answer.json()) == (200, {"status": "ok"})


async def test_an_upgrade_to_websocket_is_not_taken() -> None:
    headers = {
        "Connection": "Upgrade",
        "Upgrade": "websocket",
        "Sec-WebSocket-Version": "13",
        "Sec-WebSocket-Key": "dGhlIHNhbXBsZSBub25jZQ==",
    }
    async with open_web_world() as web:
        assert (await web.ask("GET", "/", headers=headers)).error["code"] == "not_found"
        assert (await web.ask("GET", "/healthz", headers=headers)).status == 200


async def test_an_http2_preface_is_not_taken() -> None:
    async with open_web_world() as web, web.connect() as connection:
        settings_frame = b"\x00\x00\x00\x04\x00\x00\x00\x00\x00"
        await connection.send(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + settings_frame)
        answer = await connection.wait_closed()
        assert re.match(rb"HTTP/1\.1 505 ", answer), answer


@pytest.mark.parametrize("http_version", ["2.0", "0.9", "1.2", "3.0"])
async def test_other_versions_of_http_are_not_taken(http_version: str) -> None:
    async with open_web_world() as web, web.connect() as connection:
        await connection.send(request_bytes("GET", "/healthz", version=http_version))
        assert (await connection.wait_closed()).startswith(b"HTTP/1.1 505 ")


async def test_bytes_that_are_not_http_get_400_and_the_end() -> None:
    async with open_web_world() as web:
        for garbage in (
            b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" * 20,
            b"GET /\r\n\r\n",
            b"\r\n" * 9000,
            b"A" * 70000,
        ):
            async with web.connect() as connection:
                await connection.send(garbage)
                answer = await connection.wait_closed()
                assert re.match(rb"HTTP/1\.1 4\d\d ", answer), (garbage[:20], answer)
        assert (await web.ask("GET", "/healthz")).status == 200


# Bodies that come in odd ways.


async def test_an_answer_that_comes_before_the_body_is_read_by_a_client_that_still_sends() -> None:
    async with open_web_world(web_config(ServerConfig(port=0, max_body_bytes=1024))) as web:
        for headers, code in (
            ({"Content-Type": "application/json"}, "too_large"),
            ({"Content-Type": "text/plain"}, "unsupported_media_type"),
            ({"Origin": "http://elsewhere.example"}, "forbidden"),
        ):
            async with web.connect() as connection:
                size = 4 * 1024 * 1024
                head = request_bytes("POST", "/api/v1/chat", headers={**headers, "Content-Length": str(size)})
                await connection.send(head)
                await connection.send(b"x" * size)
                assert (await connection.read_answer("POST")).error["code"] == code
                assert (await connection.request("GET", "/healthz")).status == 200


async def test_a_request_means_the_same_however_it_is_split() -> None:
    body = b'{"message": "h\xc3\xa9llo", "session_id": "split"}'
    headers = {"Content-Type": "application/json", "Accept": "text/event-stream"}
    whole = request_bytes("POST", "/api/v1/chat", headers=headers, body=body)
    async with open_web_world() as web:
        for step in (1, 7, 64):
            async with web.connect() as connection:
                await connection.send(whole, step=step)
                head = await connection.read_head("POST")
                assert head.status == 200
                call = await web.next_call()
                call.end()
                assert "héllo" in (await read_body(connection)).decode()


async def test_requests_that_come_in_one_packet_are_answered_in_their_order() -> None:
    async with open_web_world() as web, web.connect() as connection:
        json = {"Content-Type": "application/json"}
        chat = request_bytes("POST", "/api/v1/chat", headers=json, body=b'{"message":"x"}')
        await connection.send(request_bytes("GET", "/healthz") + chat + request_bytes("GET", "/nothing"))
        assert (await connection.read_answer()).status == 200
        assert (await connection.read_answer("POST")).status == 201
        assert (await connection.read_answer()).status == 404


async def test_a_client_may_ask_to_be_told_before_it_sends_its_body() -> None:
    async with open_web_world() as web, web.connect() as connection:
        headers = {"Content-Type": "application/json", "Expect": "100-continue", "Content-Length": "15"}
        await connection.send(request_bytes("POST", "/api/v1/chat", headers=headers))
        assert (await connection.stream.receive_some(100)).startswith(b"HTTP/1.1 100 ")
        await connection.send(b'{"message":"x"}')
        assert (await connection.read_answer("POST")).status == 201


# What we lean on in hypercorn.


def test_hypercorn_is_the_version_that_the_server_was_built_on() -> None:
    assert version("hypercorn").startswith("0.18."), "read http1.py beside the new release, then change this"
    assert {"stream_send", "_send_error_response", "_handle_events"} <= vars(H11Protocol).keys()


async def test_a_handler_can_write_past_hypercorn_to_its_own_connection() -> None:
    async def seam() -> Response:
        stream = request.scope["state"][CONNECTION]
        assert isinstance(stream, PlainStream)

        async def pieces() -> AsyncIterator[bytes]:
            yield b"through, "  # the head is out with this
            await stream.send_all(b"6\r\npast, \r\n")
            yield b"through"

        return Response(pieces())

    async with open_app(seam=seam) as (web, _, _), connect(web.url) as connection:
        for _ in range(2):
            assert (await connection.request("GET", "/test/seam")).body == b"through, past, through"
