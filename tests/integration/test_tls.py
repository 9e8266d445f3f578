"""HTTPS: everything that holds for plain connections, over TLS."""

import re
import ssl
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest
import trio
import trio.testing

from bamboo.config import ServerConfig
from bamboo.errors import StartError
from bamboo.tls import server_context
from bamboo.web.serving import open_tls
from tests.support.http_client import Cut, HttpConnection, connect, request_bytes
from tests.support.server import DEADLINE_S, running, server_config
from tests.support.tls import Authority, connect_tls
from tests.support.web import WebWorld, open_web_world, web_config
from tests.support.web_apps import flood, open_app, read_body


@pytest.fixture(scope="module")
def authority(tmp_path_factory: pytest.TempPathFactory) -> Authority:
    return Authority(tmp_path_factory.mktemp("authority"))


def config(authority: Authority, **server: Any) -> ServerConfig:
    return ServerConfig(**{"port": 0, **authority.files, **server})


@asynccontextmanager
async def open_world(authority: Authority, **server: Any) -> AsyncIterator[WebWorld]:
    async with open_web_world(web_config(config(authority, **server))) as web:
        yield web


def plain_url(web: WebWorld) -> str:
    assert web.url.startswith("https://")
    return web.url.replace("https", "http")


async def tls_answered(web: WebWorld, authority: Authority) -> None:
    """Return when the server has room for one more connection."""
    while True:
        try:
            async with connect_tls(web.url, authority.client_context()) as connection:
                if (await connection.request("GET", "/healthz")).status == 200:
                    return
        except (trio.BrokenResourceError, Cut):
            continue


# What a client gets.


async def test_the_whole_server_speaks_https(authority: Authority, tmp_path: Path) -> None:
    with trio.fail_after(DEADLINE_S):
        async with running(server_config(tmp_path, server=authority.files)) as server:
            assert re.fullmatch(r"https://127\.0\.0\.1:\d+", server.http_url)
            async with connect_tls(server.http_url, authority.client_context()) as connection:
                for _ in range(3):
                    assert (await connection.request("GET", "/healthz")).status == 200
                chat = await connection.request("POST", "/api/v1/chat", json={"message": "hello"})
                reader = await connection.open_sse("GET", chat.json()["stream_url"])
                assert (await reader.rest())[-1].data["type"] == "agent_complete"
                assert (await connection.request("GET", "/nothing")).status == 404


async def test_a_stream_that_ends_with_its_connection_ends_properly(authority: Authority) -> None:
    """HTTP/1.0 has no other end: what was cut on the way must not look the same."""
    async with open_world(authority) as web, connect_tls(web.url, authority.client_context()) as connection:
        accepted = (await connection.request("POST", "/api/v1/chat", json={"message": "hi"})).json()
        call = await web.next_call()
        call.say("over TLS")
        call.end()
        await connection.send(request_bytes("GET", accepted["stream_url"], version="1.0"))
        assert "transfer-encoding" not in (await connection.read_head()).headers
        body = await read_body(connection)
        assert b"over TLS" in body
        assert b'"type":"agent_complete"' in body


async def test_a_large_body_and_a_large_answer_come_whole(authority: Authority) -> None:
    async with open_world(authority) as web, connect_tls(web.url, authority.client_context()) as connection:
        text = "x" * 1_000_000
        await connection.request("POST", "/api/v1/chat", json={"message": text, "session_id": "s1"})
        history = await connection.request("GET", "/api/v1/history/s1")
        (await web.next_call()).end()
        assert text in history.body.decode()


@pytest.mark.parametrize(
    ("offered", "chosen"), [((), None), (("http/1.1",), "http/1.1"), (("h2", "http/1.1"), "http/1.1"), (("h2",), None)]
)
async def test_only_http1_is_offered(authority: Authority, offered: tuple[str, ...], chosen: str | None) -> None:
    async with open_world(authority) as web, connect_tls(web.url, authority.client_context(*offered)) as connection:
        tls: Any = connection.stream
        assert tls.selected_alpn_protocol() == chosen
        assert (await connection.request("GET", "/healthz")).status == 200


async def test_tls_1_2_is_spoken_and_nothing_older(authority: Authority) -> None:
    context = server_context(authority.certfile, authority.keyfile, alpn=["http/1.1"])
    assert context.minimum_version == ssl.TLSVersion.TLSv1_2
    async with open_world(authority) as web:
        for version in (ssl.TLSVersion.TLSv1_2, ssl.TLSVersion.TLSv1_3):
            client = authority.client_context()
            client.minimum_version = client.maximum_version = version
            async with connect_tls(web.url, client) as connection:
                assert (await connection.request("GET", "/healthz")).status == 200


# Who comes with something else.


async def test_plain_http_is_closed(authority: Authority) -> None:
    async with open_world(authority) as web:
        async with connect(plain_url(web)) as connection:
            await connection.send(request_bytes("GET", "/healthz"))
            assert not (await until_closed(connection)).startswith(b"HTTP")
        async with connect_tls(web.url, authority.client_context()) as connection:
            assert (await connection.request("GET", "/healthz")).status == 200


async def until_closed(connection: HttpConnection) -> bytes:
    """What still came. A connection whose last bytes the server did not want is reset."""
    try:
        return await connection.wait_closed()
    except trio.BrokenResourceError:
        return b""


async def test_garbage_and_clients_that_leave_in_the_handshake_do_no_harm(authority: Authority) -> None:
    async with open_world(authority) as web:
        for rubbish in (b"", b"\x16", b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" * 20, b"\0" * 70000):
            async with connect(plain_url(web)) as connection:
                await connection.send(rubbish)
            await tls_answered(web, authority)


async def test_a_handshake_has_a_deadline_and_is_in_nobodys_way(authority: Authority) -> None:
    async with open_world(authority, header_timeout_s=0.5) as web, connect(plain_url(web)) as slow:
        await slow.send(b"\x16\x03\x01\x02\x00")  # the beginning of a ClientHello
        await tls_answered(web, authority)
        assert await slow.wait_closed() == b""


async def test_a_byte_now_and_then_does_not_make_a_handshake_last_longer(authority: Authority) -> None:
    async with open_world(authority, header_timeout_s=0.3) as web, connect(plain_url(web)) as slow:
        hello = client_hello(authority)

        async def drip() -> None:
            try:
                for byte in hello:
                    await slow.send(bytes([byte]))
                    await trio.sleep(0.05)
            except trio.BrokenResourceError:
                pass

        with trio.fail_after(len(hello) * 0.05 / 2):
            async with trio.open_nursery() as nursery:
                nursery.start_soon(drip)
                assert await until_closed(slow) == b""


def client_hello(authority: Authority) -> bytes:
    """The first flight of a handshake."""
    outgoing = ssl.MemoryBIO()
    client = authority.client_context().wrap_bio(ssl.MemoryBIO(), outgoing, server_hostname="127.0.0.1")
    with pytest.raises(ssl.SSLWantReadError):
        client.do_handshake()
    return outgoing.read()


async def test_a_head_over_tls_has_its_deadline(authority: Authority) -> None:
    async with (
        open_world(authority, header_timeout_s=0.3) as web,
        connect_tls(web.url, authority.client_context()) as connection,
    ):
        await connection.send(b"GET / HT")
        answer = await connection.read_answer()
        assert (answer.status, answer.error["code"]) == (408, "invalid_request")


async def test_an_idle_connection_is_closed_in_tls(authority: Authority) -> None:
    async with open_world(authority, keep_alive_s=0.05) as web:
        async with connect_tls(web.url, authority.client_context()) as connection:
            assert (await connection.request("GET", "/healthz")).status == 200
            assert await connection.wait_closed() == b""
        async with connect_tls(web.url, authority.client_context()) as connection:
            answer = await connection.request("GET", "/healthz", headers={"Connection": "close"})
            assert answer.status == 200
            assert await connection.wait_closed() == b""


async def test_a_connection_over_the_cap_is_told_so_in_tls(authority: Authority) -> None:
    async with (
        open_world(authority, max_connections=1) as web,
        connect_tls(web.url, authority.client_context()) as one,
    ):
        assert (await one.request("GET", "/healthz")).status == 200
        async with connect_tls(web.url, authority.client_context()) as two:
            answer = await two.request("GET", "/healthz")
            assert (answer.status, answer.error["code"]) == (503, "overloaded")
        assert (await one.request("GET", "/healthz")).status == 200


# Clients that stop reading or leave.


async def test_a_client_that_leaves_frees_its_place_at_once(authority: Authority) -> None:
    async with open_world(authority) as web:
        for requests in (0, 1):
            async with connect_tls(web.url, authority.client_context()) as connection:
                for _ in range(requests):
                    assert (await connection.request("GET", "/healthz")).status == 200
            await nobody_connected(web)
        async with connect_tls(web.url, authority.client_context()) as connection:
            accepted = (await connection.request("POST", "/api/v1/chat", json={"message": "hi"})).json()
            reader = await connection.open_sse("GET", accepted["stream_url"])
            await reader.take(1)
        await web.nobody_subscribed()
        await nobody_connected(web)


async def nobody_connected(web: WebWorld) -> None:
    while web.web.server.connections:
        await trio.testing.wait_all_tasks_blocked(0.001)


async def test_a_client_that_closes_its_side_in_tls_gets_its_answer(authority: Authority) -> None:
    context = authority.client_context()
    incoming, outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
    client = context.wrap_bio(incoming, outgoing, server_hostname="127.0.0.1")
    async with open_world(authority) as web:
        parts = urlsplit(web.url)
        async with await trio.open_tcp_stream("127.0.0.1", parts.port or 0) as tcp:

            async def until_done(step: Any) -> Any:
                while True:
                    try:
                        return step()
                    except ssl.SSLWantReadError:
                        if outgoing.pending:
                            await tcp.send_all(outgoing.read())
                        incoming.write(await tcp.receive_some())

            await until_done(client.do_handshake)
            client.write(request_bytes("GET", "/healthz"))
            with pytest.raises(ssl.SSLWantReadError):
                client.unwrap()  # it says that it sends nothing more, and waits for the server to say so too
            await tcp.send_all(outgoing.read())
            answer = b""
            while data := await tcp.receive_some():
                answer += data
            assert len(answer) > 200, "an answer, and not only the end"


async def test_a_reader_that_takes_nothing_for_the_write_timeout_is_cut(authority: Authority) -> None:
    async with (
        open_app(config(authority, write_timeout_s=0.2), flood=flood) as (web, _, _),
        connect_tls(web.url, authority.client_context()) as connection,
    ):
        await connection.send(request_bytes("GET", "/test/flood"))
        await connection.read_head()
        while web.server.connections:
            await trio.testing.wait_all_tasks_blocked(0.01)
        with pytest.raises((Cut, trio.BrokenResourceError)):
            await read_body(connection)


async def test_a_stalled_reader_and_a_handshake_do_not_keep_the_server_from_stopping(authority: Authority) -> None:
    async with trio.open_nursery() as nursery:
        release = trio.Event()

        async def stay(stack: Any, *, task_status: trio.TaskStatus[HttpConnection]) -> None:
            async with stack as connection:
                task_status.started(connection)
                await release.wait()

        with trio.fail_after(5):
            async with open_app(config(authority), flood=flood) as (web, _, _):
                await nursery.start(stay, connect(web.url.replace("https", "http")))
                stalled = await nursery.start(stay, connect_tls(web.url, authority.client_context()))
                await stalled.send(request_bytes("GET", "/test/flood"))
                await stalled.read_head()
        release.set()


async def test_a_handshake_does_not_make_the_server_wait_for_its_grace(authority: Authority) -> None:
    async with open_world(authority) as web, connect(plain_url(web)) as slow:
        await slow.send(b"\x16\x03\x01\x02\x00")
        await tls_answered(web, authority)
        with trio.fail_after(1):
            await web.web.server.close()
            assert await slow.wait_closed() == b""


# Files that are of no use.


def test_a_bad_file_is_told_before_the_server_listens(authority: Authority, tmp_path: Path) -> None:
    bad = tmp_path / "bad.pem"
    bad.write_text("nothing")

    with pytest.raises(StartError, match=r"^server\.certfile: .*bad\.pem has no certificate"):
        open_tls(ServerConfig(port=0, certfile=bad, keyfile=authority.keyfile))
    assert open_tls(ServerConfig(port=0)) is None
