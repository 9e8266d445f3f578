"""The HTTP server's app, and how the whole of it is opened and closed."""

from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Final

import structlog
import trio
from quart import Response
from quart_trio import QuartTrio
from werkzeug.exceptions import HTTPException, MethodNotAllowed, NotFound, RequestEntityTooLarge

from bamboo.agent.registry import Agents
from bamboo.bus.event_bus import EventBus
from bamboo.config import Config
from bamboo.errors import BambooError, ClientError, ErrorCode
from bamboo.llm.base import Providers
from bamboo.store.base import Store
from bamboo.web.bodies import error_response
from bamboo.web.middleware import Edge
from bamboo.web.readiness import StoreProbe
from bamboo.web.routes import add_routes
from bamboo.web.services import Services
from bamboo.web.serving import CLOSE_GRACE_S, HttpServer, open_listeners, open_tls
from bamboo.web.stream import OpenStreams
from bamboo.wire.addresses import AddressLimits
from bamboo.wire.encode import public_error

log = structlog.get_logger(__name__)

CLOSE_S: Final = CLOSE_GRACE_S + 1
"""When closing gives up: aborting takes no time, so that this is never reached unless something is broken."""


@dataclass(frozen=True, slots=True)
class Web:
    """The open HTTP server. `url` has no slash at its end."""

    url: str
    port: int
    server: HttpServer


@asynccontextmanager
async def open_web(
    config: Config,
    nursery: trio.Nursery,
    *,
    agents: Agents,
    bus: EventBus,
    store: Store,
    providers: Providers,
    addresses: AddressLimits,
    gateway_url: str | None,
    ready: Callable[[], bool],
) -> AsyncIterator[Web]:
    """Listen and answer. The listening socket is open when this is entered; what fails in its tasks fails `nursery`.
    `addresses` are those of both listeners.

    Leaving it stops accepting, closes idle connections at once, ends each SSE response after what is pending, and
    aborts what is not done 2 s later. If `nursery` is cancelled, every connection is aborted at once. Raises
    StartError.
    """
    streams = OpenStreams()
    probe = StoreProbe(store)
    services = Services(config, agents, bus, store, providers, gateway_url, ready, streams, probe)
    nursery.start_soon(probe.run)
    app = create_app(services)
    try:
        async with open_http(app, config, nursery, addresses=addresses, on_closing=streams.end_all) as web:
            yield web
    finally:
        probe.close()


@asynccontextmanager
async def open_http(
    app: QuartTrio,
    config: Config,
    nursery: trio.Nursery,
    *,
    addresses: AddressLimits,
    on_closing: Callable[[], None],
) -> AsyncIterator[Web]:
    """`open_web` for an app that was made already."""
    tls = open_tls(config.server)
    listeners = await open_listeners(config.server)
    try:
        port = listeners[0].socket.getsockname()[1]
        edge = Edge(app, config.server, addresses)
        server = HttpServer(edge, listeners, config.server, addresses=addresses, tls=tls, on_closing=on_closing)
        await nursery.start(server.run)
        try:
            yield Web(_url("http" if tls is None else "https", config.server.host, port), port, server)
        finally:
            with trio.move_on_after(CLOSE_S, shield=True) as patience:
                await server.close()
            if patience.cancelled_caught:
                log.error("http_server_stuck", connections=server.connections)
    finally:
        for listener in listeners:
            listener.socket.close()


def create_app(services: Services) -> QuartTrio:
    """The Quart app: routing, bodies and errors. It needs no lifespan."""
    app = QuartTrio("bamboo", static_folder=None)
    app.config["MAX_CONTENT_LENGTH"] = services.config.server.max_body_bytes
    app.config["BODY_TIMEOUT"] = None  # the middleware has the clock, also for a body that no handler waits for
    app.url_map.merge_slashes = False  # a redirect is HTML, and nothing of ours wants one
    app.register_error_handler(Exception, _on_error)
    add_routes(app, services)
    return app


async def _on_error(error: Exception) -> Response:
    if isinstance(error, HTTPException):
        return _on_http_exception(error)
    if not isinstance(error, BambooError):
        log.error("handler_failed", exc_info=error)
    return error_response(public_error(error))


def _on_http_exception(error: HTTPException) -> Response:
    """What Quart and werkzeug raise by themselves, as errors of ours."""
    if isinstance(error, NotFound):
        return error_response(ClientError(ErrorCode.NOT_FOUND, "there is nothing here"))
    if isinstance(error, MethodNotAllowed):
        allowed = sorted(error.valid_methods or ())
        response = error_response(ClientError(ErrorCode.METHOD_NOT_ALLOWED, f"this takes {', '.join(allowed)} only"))
        response.headers["Allow"] = ", ".join(allowed)
        return response
    if isinstance(error, RequestEntityTooLarge):
        return error_response(ClientError(ErrorCode.TOO_LARGE, "the body is larger than server.max_body_bytes"))
    return error_response(ClientError(ErrorCode.INVALID_REQUEST, f"the request cannot be understood: {error.name}"))


def _url(scheme: str, host: str, port: int) -> str:
    return f"{scheme}://[{host}]:{port}" if ":" in host else f"{scheme}://{host}:{port}"
