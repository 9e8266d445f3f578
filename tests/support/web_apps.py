"""The production app with further views, and clients that do what the usual ones do not."""

from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager

import trio
from quart import Response
from quart_trio import QuartTrio

from bamboo.config import ServerConfig
from bamboo.web.app import Web, create_app, open_http
from bamboo.web.readiness import StoreProbe
from bamboo.web.services import Services
from bamboo.web.stream import OpenStreams
from bamboo.wire.addresses import AddressLimits
from tests.support.http_client import Cut, HttpConnection, ask, request_bytes
from tests.support.web import open_web_world, web_config


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
            probe := StoreProbe(inner.store),
        )
        nursery.start_soon(probe.run)
        app = create_app(services)
        for name, view in views.items():
            app.add_url_rule(f"/test/{name}", name, view, methods=["GET", "POST"])
        addresses = AddressLimits.of(settings.server)
        async with open_http(app, settings, nursery, addresses=addresses, on_closing=streams.end_all) as web:
            yield web, app, nursery
        probe.close()


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


async def served(url: str) -> None:
    """Return when the server has room for one more connection."""
    while True:
        try:
            if (await ask(url, "GET", "/healthz")).status == 200:
                return
        except (trio.BrokenResourceError, Cut):
            continue


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
