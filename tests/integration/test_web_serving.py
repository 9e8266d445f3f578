"""The HTTP server's connections: finished, stalled, too many, and all of them when it closes."""

import errno
import os
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack

import pytest
import trio
import trio.testing
from hypercorn.typing import ASGIReceiveCallable, ASGISendCallable, Scope
from quart import Response

from bamboo.config import ServerConfig, StreamConfig
from bamboo.errors import StartError
from bamboo.web.app import open_web
from bamboo.web.connections import PlainStream
from bamboo.web.serving import HttpServer, open_listeners
from bamboo.wire.addresses import AddressLimits
from tests.support.http_client import Cut, ask, connect, request_bytes
from tests.support.web import open_web_world, web_config
from tests.support.web_apps import connect_later, fill, flood, open_app, read_all, read_body, served

SESSION = "/api/v1/stream/s1"

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


async def test_an_idle_connection_is_closed() -> None:
    config = web_config(ServerConfig(port=0, keep_alive_s=0.05))
    async with open_web_world(config) as web:
        async with web.connect() as connection:
            assert (await connection.request("GET", "/healthz")).status == 200
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
    stream, reader = PlainStream(trio.SocketStream(ours), 30), trio.SocketStream(theirs)
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
    stream, reader = PlainStream(trio.SocketStream(ours), 30), trio.SocketStream(theirs)
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
    server = HttpServer(app_hello, [exhausted], config, addresses=AddressLimits.of(config), on_closing=lambda: None)
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
        failing = ExhaustedListener(listener, [errno.ENOTSOCK])
        server = HttpServer(app_hello, [failing], config, addresses=AddressLimits.of(config), on_closing=lambda: None)
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
                addresses=AddressLimits.of(config.server),
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
