"""The sharp edges of hypercorn and quart-trio, and what we lean on in them: each test fails if an upgrade changes its
subject."""

import errno
import os
import re
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from importlib.metadata import version

import pytest
import trio
import trio.testing
from hypercorn.trio.tcp_server import TCPServer
from hypercorn.typing import ASGIReceiveCallable, ASGISendCallable, Scope
from quart import Response, request
from quart_trio import QuartTrio

from bamboo.config import ServerConfig, StreamConfig
from bamboo.errors import StartError
from bamboo.web.app import Web, create_app, open_http, open_web
from bamboo.web.services import Services
from bamboo.web.serving import CONNECTION, ConnectionStream, HttpServer, open_listeners
from bamboo.web.stream import OpenStreams
from tests.support.http_client import Cut, HttpConnection, ask, connect, request_bytes
from tests.support.web import open_web_world, web_config

SESSION = "/api/v1/stream/s1"


@asynccontextmanager
async def open_app(
    config: ServerConfig | None = None, **views: Callable[[], Awaitable[Response]]
) -> AsyncIterator[tuple[Web, QuartTrio, trio.Nursery]]:
    """The production app with further views at `/test/<name>`."""
    settings = web_config(config)
    async with open_web_world(settings) as world, trio.open_nursery() as nursery:
        streams = OpenStreams()
        inner = world.world
        services = Services(
            settings,
            inner.agents,
            inner.bus,
            inner.store,
            inner.agents._around.providers,
            None,
            lambda: True,
            streams,
        )
        app = create_app(services)
        for name, view in views.items():
            app.add_url_rule(f"/test/{name}", name, view, methods=["GET", "POST"])
        async with open_http(app, settings, nursery, on_closing=streams.end_all) as web:
            yield web, app, nursery


async def flood() -> Response:
    """An endless answer."""

    async def pieces() -> AsyncIterator[bytes]:
        while True:
            yield b"x" * 65536

    response = Response(pieces())
    response.timeout = None
    return response


async def fill(connection: trio.SocketStream) -> None:
    """Ask for the flood and read none of it but its first bytes: from then on the server's write is stuck, or soon will
    be."""
    await connection.send_all(request_bytes("GET", "/test/flood"))
    await connection.receive_some(1)


async def read_all(connection: trio.SocketStream) -> None:
    while await connection.receive_some(65536):
        pass


async def read_body(connection: HttpConnection) -> bytes:
    body = b""
    while piece := await connection.read_piece():
        body += piece
    return body


# Finished connections are closed.


@pytest.mark.parametrize(
    ("http_version", "headers"), [("1.0", {}), ("1.1", {"Connection": "close"}), ("1.0", {"Connection": "close"})]
)
async def test_a_client_that_keeps_no_connection_alive_sees_the_end(http_version: str, headers: dict[str, str]) -> None:
    async with open_web_world() as web, web.connect() as connection:
        answer = await connection.request("GET", "/healthz", headers=headers, version=http_version)
        assert answer.status == 200
        assert await connection.wait_closed() == b""


@pytest.mark.parametrize(("http_version", "headers"), [("1.0", {}), ("1.1", {"Connection": "close"})])
async def test_a_client_that_keeps_no_connection_alive_sees_the_end_of_a_stream(
    http_version: str, headers: dict[str, str]
) -> None:
    async with open_web_world() as web:
        accepted = await web.finished_run("one", "two")
        async with web.connect() as connection:
            await connection.send(request_bytes("GET", accepted["stream_url"], headers=headers, version=http_version))
            head = await connection.read_head()
            assert ("transfer-encoding" in head.headers) == (http_version == "1.1")
            body = await read_body(connection)
            assert body.startswith(b"retry: 1000\nid: ")
            assert b'"type":"agent_complete"' in body
            assert await connection.wait_closed() == b""


async def test_an_idle_connection_is_closed_whether_it_was_used_or_not() -> None:
    config = web_config(ServerConfig(port=0, keep_alive_s=0.05))
    async with open_web_world(config) as web:
        async with web.connect() as connection:
            assert (await connection.request("GET", "/healthz")).status == 200
            assert await connection.wait_closed() == b""
        async with web.connect() as connection:
            assert await connection.wait_closed() == b""
        async with web.connect() as connection:
            await connection.send(b"GET /healthz HTTP/1.1\r\nHost:")  # a head that is never finished
            assert await connection.wait_closed() == b""
        accepted = await web.finished_run("one")
        async with web.connect() as connection:
            reader = await connection.open_sse("GET", accepted["stream_url"])
            assert await reader.rest()
            assert await connection.wait_closed() == b""


async def test_a_connection_is_kept_alive_over_many_requests_and_streams() -> None:
    async with open_web_world() as web:
        accepted = await web.finished_run("one")
        async with web.connect() as connection:
            for _ in range(3):
                reader = await connection.open_sse("GET", accepted["stream_url"])
                assert (await reader.rest())[-1].data["type"] == "agent_complete"
                assert (await connection.request("GET", "/healthz")).status == 200
                assert (await connection.request("GET", "/nothing")).status == 404
                assert (await connection.request("POST", "/healthz", headers={"Origin": "http://x"})).status == 403
        assert web.web.server.connections <= 1


async def served(url: str) -> None:
    """Return when the server has room for one more connection."""
    while True:
        try:
            if (await ask(url, "GET", "/healthz")).status == 200:
                return
        except (trio.BrokenResourceError, Cut):
            continue


@pytest.mark.parametrize("requests", [0, 1, 2])
async def test_a_client_that_leaves_frees_its_place_at_once(requests: int) -> None:
    """And not when its idle timer ends."""
    async with open_web_world(web_config(ServerConfig(port=0, max_connections=1))) as web:
        async with web.connect() as connection:
            for _ in range(requests):
                assert (await connection.request("GET", "/healthz")).status == 200
            await trio.testing.wait_all_tasks_blocked(0.01)  # it is idle now
        await served(web.url)


async def test_a_client_that_leaves_with_input_behind_its_stream_frees_its_place() -> None:
    """hypercorn stops reading behind a request that is being answered, and so does not see its client leave."""
    config = web_config(ServerConfig(port=0, max_connections=1), stream=StreamConfig(keep_alive_s=0.05))
    async with open_web_world(config) as web:
        async with web.connect() as connection:
            accepted = (await connection.request("POST", "/api/v1/chat", json={"message": "hi"})).json()
            reader = await connection.open_sse("GET", accepted["stream_url"])
            await reader.take(1)
            await connection.send(request_bytes("GET", "/healthz"))
        await served(web.url)
        await web.nobody_subscribed()


# Clients that stop reading.


async def test_a_stalled_reader_does_not_keep_the_server_from_stopping() -> None:
    async with connect_later() as later:
        with trio.fail_after(5):
            async with open_app(flood=flood) as (web, _, _):
                connection = await later(web.url)
                await fill(connection)


@asynccontextmanager
async def connect_later() -> AsyncIterator[Callable[[str], Awaitable[trio.SocketStream]]]:
    """Connections that outlive the server."""
    streams = []

    async def open_one(url: str) -> trio.SocketStream:
        host, _, port = url.removeprefix("http://").partition(":")
        streams.append(await trio.open_tcp_stream(host, int(port)))
        return streams[-1]

    try:
        yield open_one
    finally:
        for stream in streams:
            stream.socket.close()


async def test_a_server_that_is_cancelled_waits_for_no_reader() -> None:
    async with connect_later() as later:
        with trio.fail_after(2):
            async with open_app(flood=flood) as (web, _, nursery):
                connection = await later(web.url)
                await fill(connection)
                nursery.cancel_scope.cancel()


async def test_a_reader_that_takes_nothing_for_the_write_timeout_is_cut() -> None:
    config = ServerConfig(port=0, write_timeout_s=0.1, max_connections=1)
    async with connect_later() as later, open_app(config, flood=flood) as (web, _, _):
        connection = await later(web.url)
        await fill(connection)
        await served(web.url)
        with pytest.raises(trio.BrokenResourceError):
            await read_all(connection)


async def test_a_write_may_take_for_ever_as_long_as_the_reader_takes_something_in_time(
    mock_clock: trio.testing.MockClock,
) -> None:
    ours, theirs = trio.socket.socketpair()
    stream, reader = ConnectionStream(trio.SocketStream(ours), 30), trio.SocketStream(theirs)
    size, received, pauses = 4 * 1024 * 1024, 0, 0
    async with stream, reader, trio.open_nursery() as nursery:
        nursery.start_soon(stream.send_all, b"x" * size)
        while received < size:
            await trio.testing.wait_all_tasks_blocked(0.01)
            mock_clock.jump(25)
            await trio.testing.wait_all_tasks_blocked(0.01)
            pauses += 1
            received += drained(theirs)
        assert pauses > 2, "the write never waited"


async def test_a_write_that_makes_no_progress_aborts_its_connection(mock_clock: trio.testing.MockClock) -> None:
    ours, theirs = trio.socket.socketpair()
    stream, reader = ConnectionStream(trio.SocketStream(ours), 30), trio.SocketStream(theirs)
    async with stream, reader, trio.open_nursery() as nursery:

        async def write() -> None:
            with pytest.raises(trio.BrokenResourceError, match="nothing for 30 s"):
                await stream.send_all(b"x" * 4 * 1024 * 1024)

        nursery.start_soon(write)
        await trio.testing.wait_all_tasks_blocked(0.01)
        with pytest.raises(trio.BusyResourceError):
            await stream.send_all(b"y")
        mock_clock.jump(29)
        await trio.testing.wait_all_tasks_blocked(0.01)
        assert stream.socket.fileno() >= 0
        with stream.life:
            mock_clock.jump(2)
            await trio.sleep_forever()
        with pytest.raises(trio.ClosedResourceError):
            await stream.send_all(b"y")


def drained(sock: trio.socket.SocketType) -> int:
    """Take everything that is in the socket's buffer, without waiting; returns how many bytes that was."""
    taken = 0
    while True:
        try:
            taken += len(os.read(sock.fileno(), 1 << 20))
        except BlockingIOError:
            return taken


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


# The accept loop.


async def test_a_connection_over_the_cap_is_refused_and_told_when_to_come_back() -> None:
    async with open_web_world(web_config(ServerConfig(port=0, max_connections=2))) as web:
        async with web.connect() as one, web.connect() as two:
            assert (await one.request("GET", "/healthz")).status == 200
            assert (await two.request("GET", "/healthz")).status == 200
            async with web.connect() as three:
                answer = await three.request("GET", "/healthz")
                assert answer.status == 503
                assert answer.headers["retry-after"] == "1"
                assert answer.error["code"] == "overloaded"
                assert answer.error["retryable"]
                assert await three.wait_closed() == b""
            assert (await one.request("GET", "/healthz")).status == 200
        await served(web.url)


async def test_a_refused_client_that_is_still_sending_reads_why() -> None:
    async with open_web_world(web_config(ServerConfig(port=0, max_connections=1))) as web, web.connect() as one:
        assert (await one.request("GET", "/healthz")).status == 200
        async with web.connect() as two:
            for _ in range(20):
                await two.send(b"x" * 50_000)
                await trio.testing.wait_all_tasks_blocked(0.001)
            assert (await two.read_answer()).error["code"] == "overloaded"


class ExhaustedListener(trio.abc.Listener[trio.SocketStream]):
    """A listener whose first accepts fail as they do when the process has no file descriptor left."""

    def __init__(self, inner: trio.SocketListener, failures: list[int]) -> None:
        self.inner = inner
        self.failures = failures

    async def accept(self) -> trio.SocketStream:
        if self.failures:
            await trio.lowlevel.checkpoint()
            raise OSError(self.failures.pop(), "told by the test")
        return await self.inner.accept()

    async def aclose(self) -> None:
        await self.inner.aclose()


async def app_hello(_scope: Scope, _receive: ASGIReceiveCallable, send: ASGISendCallable) -> None:
    await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"2")]})
    await send({"type": "http.response.body", "body": b"hi", "more_body": False})


async def test_running_out_of_file_descriptors_is_waited_out() -> None:
    config = ServerConfig(port=0)
    (listener,) = await open_listeners(config)
    exhausted = ExhaustedListener(listener, [errno.EMFILE, errno.ENFILE])
    server = HttpServer(app_hello, [exhausted], config, on_closing=lambda: None)
    async with trio.open_nursery() as nursery:
        await nursery.start(server.run)
        port = listener.socket.getsockname()[1]
        assert (await ask(f"http://127.0.0.1:{port}", "GET", "/")).body == b"hi"
        assert not exhausted.failures
        await server.close()


async def test_a_listener_that_fails_ends_the_server() -> None:
    config = ServerConfig(port=0)
    (listener,) = await open_listeners(config)
    async with listener:
        server = HttpServer(app_hello, [ExhaustedListener(listener, [errno.ENOTSOCK])], config, on_closing=lambda: None)
        with pytest.raises(ExceptionGroup) as caught:
            await server.run()
        assert caught.group_contains(OSError)


async def test_a_port_that_is_taken_is_told_in_one_line() -> None:
    async with open_web_world() as web:
        config = web_config(ServerConfig(port=web.web.port))
        inner = web.world
        with pytest.raises(StartError, match=rf"127\.0\.0\.1 port {web.web.port}: .*in use") as caught:
            async with open_web(
                config,
                web.nursery,
                agents=inner.agents,
                bus=inner.bus,
                store=inner.store,
                providers=inner.agents._around.providers,
                gateway_url=None,
                ready=lambda: True,
            ):
                pass
        assert "\n" not in str(caught.value)


# Closing.


async def test_closing_ends_streams_properly_and_idle_connections_at_once() -> None:
    async with open_web_world() as web, AsyncExitStack() as stack:
        idle, used, follower, whole = [await stack.enter_async_context(web.connect()) for _ in range(4)]
        assert (await used.request("GET", "/healthz")).status == 200
        accepted = await web.chat("hi", "s1")
        call = await web.next_call()
        by_run = await follower.open_sse("GET", accepted["stream_url"])
        by_session = await whole.open_sse("GET", f"{SESSION}?after={accepted['cursor']}")
        await by_run.until("run_started")
        await by_session.until("run_started")
        call.say("last", "words")
        await by_session.until("agent_token")
        web.nursery.start_soon(web.web.server.close)
        assert [item.data["token"] for item in await by_run.take(2)] == ["last", "words"]
        assert await by_run.next_item() is None
        assert [item.data["token"] for item in await by_session.take(1)] == ["words"]
        assert await by_session.next_item() is None
        for connection in (idle, used, follower, whole):
            assert await connection.wait_closed() == b""
        with pytest.raises(OSError, match="attempts to connect"):
            await web.ask("GET", "/healthz")
        assert web.world.bus.subscriptions == 0


async def test_a_server_without_runs_closes_within_a_second() -> None:
    async with connect_later() as later, open_web_world() as web:
        await later(web.url)
        idle = await later(web.url)
        await idle.send_all(request_bytes("GET", "/healthz"))
        await idle.receive_some(1)
        async with web.connect() as connection:
            accepted = await web.finished_run("one")
            reader = await connection.open_sse("GET", f"/api/v1/stream/{accepted['session_id']}")
            assert (await reader.next_item()) is not None
            with trio.fail_after(1):
                await web.web.server.close()
            assert await reader.next_item() is None


# Bugs.


async def test_a_bug_in_a_view_is_told_as_internal_and_nothing_more() -> None:
    async def broken() -> Response:
        raise ValueError("a secret")

    async with open_app(broken=broken) as (web, _, _), connect(web.url) as connection:
        answer = await connection.request("GET", "/test/broken")
        assert (answer.status, answer.error["code"]) == (500, "internal")
        assert b"secret" not in answer.body
        assert (await connection.request("HEAD", "/test/broken")).status == 500
        assert (await connection.request("GET", "/healthz")).status == 200


async def test_a_bug_in_the_middle_of_an_answer_cuts_the_connection_and_nothing_else() -> None:
    async def broken() -> Response:
        async def pieces() -> AsyncIterator[bytes]:
            yield b"half of it"
            raise ValueError("a bug")

        return Response(pieces())

    async with open_app(broken=broken) as (web, _, _), connect(web.url) as connection:
        await connection.send(request_bytes("GET", "/test/broken"))
        with pytest.raises(Cut):
            await connection.read_answer()
        async with connect(web.url) as other:
            await other.send(request_bytes("GET", "/test/broken", version="1.0"))
            with pytest.raises(Cut):
                await other.read_answer()
        assert (await ask(web.url, "GET", "/healthz")).status == 200


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
    assert version("hypercorn").startswith("0.18."), "read serving.py beside the new release, then change this"
    assert "_read_data" in vars(TCPServer)


async def test_a_handler_can_write_past_hypercorn_to_its_own_connection() -> None:
    async def seam() -> Response:
        stream = request.scope["state"][CONNECTION]
        assert isinstance(stream, ConnectionStream)

        async def pieces() -> AsyncIterator[bytes]:
            yield b"through, "  # the head is out with this
            await stream.send_all(b"6\r\npast, \r\n")
            yield b"through"

        return Response(pieces())

    async with open_app(seam=seam) as (web, _, _), connect(web.url) as connection:
        for _ in range(2):
            assert (await connection.request("GET", "/test/seam")).body == b"through, past, through"
