"""What stands between the connections and the app: who may come in, and what the app is spared.

The checks come in the contract's order: Host and Origin (403), token (401); then the app's: route (404), method (405),
content type (415), size (413), body (400).
"""

from contextlib import ExitStack
from typing import Final, cast

import structlog
import trio
from hypercorn.typing import (
    ASGIFramework,
    ASGIReceiveCallable,
    ASGIReceiveEvent,
    ASGISendCallable,
    ASGISendEvent,
    ConnectionState,
    HTTPScope,
    Scope,
)

from bamboo.config import ServerConfig, is_loopback
from bamboo.errors import BambooError, ClientError, ErrorCode
from bamboo.web.bodies import Answer, error_answer
from bamboo.wire.access import bearer_is, host_is_known, origin_is_own
from bamboo.wire.encode import public_error

log = structlog.get_logger(__name__)

EXCHANGE: Final = "exchange"
"""The key of a request's `scope["state"]` under which its Exchange is."""

OPEN_PATHS: Final = frozenset({"/healthz", "/health", "/readyz"})
"""What may be asked without the token: they tell nothing, and those who ask have none."""

LINGER_S: Final = 2.0
"""How long a client that is still sending its body may take to read an answer that came before: closing on unread input
would take it back."""


class Exchange:
    """One request and its answer, between hypercorn and the app.

    `resources` lives as long as both: what a handler opens for its response's body goes in there, since a handler that
    is cancelled between its return and the body's start would leave it open.
    """

    def __init__(self, receive: ASGIReceiveCallable, send: ASGISendCallable) -> None:
        self._receive = receive
        self._send = send
        self._request_over = trio.Event()
        self._answered = False
        self.status: int | None = None
        """Of the answer; None until it was begun."""
        self.resources = ExitStack()

    async def receive(self) -> ASGIReceiveEvent:
        message = await self._receive()
        if message["type"] == "http.disconnect":
            self._request_over.set()
            if self._answered:
                # hypercorn tells the app that the exchange is over while it is still inside the app's last send,
                # closing the connection or arming its idle timer. An app that heard of it would cancel just that, and
                # the connection would stay open for ever.
                await trio.sleep_forever()
        elif message["type"] == "http.request" and not message["more_body"]:
            self._request_over.set()
        return message

    async def send(self, message: ASGISendEvent) -> None:
        if message["type"] == "http.response.start":
            self.status = message["status"]
        elif message["type"] == "http.response.body" and not message["more_body"]:
            with trio.move_on_after(LINGER_S):
                await self._request_over.wait()
            self._answered = True
        await self._send(message)

    async def answer(self, answer: Answer) -> None:
        """Give an answer of our own to a request whose body nobody reads."""
        async with trio.open_nursery() as nursery:
            # Nobody else reads the request, and when hypercorn's queue of it is full the connection stands still.
            nursery.start_soon(self._discard_request)
            await self.send({"type": "http.response.start", "status": answer.status, "headers": answer.headers})
            await self.send({"type": "http.response.body", "body": answer.body, "more_body": True})
            await self.send({"type": "http.response.body", "body": b"", "more_body": False})
            nursery.cancel_scope.cancel()

    async def _discard_request(self) -> None:
        while (await self.receive())["type"] != "http.disconnect":
            pass


class Guard:
    """Who may come in."""

    def __init__(self, config: ServerConfig) -> None:
        self._check_host = is_loopback(config.host)
        self._allowed_hosts = config.allowed_hosts
        self._token = None if config.auth_token is None else config.auth_token.get_secret_value()

    def refusal(self, scope: HTTPScope) -> BambooError | None:
        """Why this request goes no further, or None."""
        hosts, origins, authorization = [], [], None
        for name, value in scope["headers"]:
            if name == b"host":
                hosts.append(value.decode("latin-1"))
            elif name == b"origin":
                origins.append(value.decode("latin-1"))
            elif name == b"authorization":
                authorization = value.decode("latin-1")
        # No Host at all is HTTP/1.0, which no browser speaks.
        if self._check_host and not all(host_is_known(host, self._allowed_hosts) for host in hosts):
            return ClientError(
                ErrorCode.FORBIDDEN, "Host: this server answers to loopback names and server.allowed_hosts only"
            )
        if scope["method"] != "GET" and not all(
            origin_is_own(origin, hosts[0] if hosts else None) for origin in origins
        ):
            return ClientError(ErrorCode.FORBIDDEN, "Origin: requests from pages of other sites are not taken")
        if self._token is not None and scope["path"] not in OPEN_PATHS and not bearer_is(authorization, self._token):
            return ClientError(ErrorCode.UNAUTHORIZED, "Authorization: Bearer with the server's token is needed")
        if not scope["path"].startswith("/"):
            return ClientError(ErrorCode.NOT_FOUND, "there is nothing here")
        return None


class Edge:
    """The ASGI app that hypercorn calls: checks, containment and access log around the real one."""

    def __init__(self, app: ASGIFramework, config: ServerConfig) -> None:
        self._app = app
        self._guard = Guard(config)

    async def __call__(self, scope: Scope, receive: ASGIReceiveCallable, send: ASGISendCallable) -> None:
        assert scope["type"] == "http", "upgrades are taken off before, and there is no lifespan"
        exchange = Exchange(receive, send)
        begun = trio.current_time()
        try:
            with exchange.resources:
                await self._answer(scope, exchange)
        finally:
            log.debug(
                "request",
                method=scope["method"],
                path=scope["path"],
                status=exchange.status,
                elapsed_ms=round((trio.current_time() - begun) * 1000),
            )

    async def _answer(self, scope: HTTPScope, exchange: Exchange) -> None:
        refusal = self._guard.refusal(scope)
        if refusal is not None:
            await exchange.answer(error_answer(refusal))
            return
        inner = scope.copy()
        # Host was checked; what is left of it are ways for the router to stumble over a strange one.
        headers = [(name, value) for name, value in scope["headers"] if name != b"host"]
        inner["headers"] = [*headers, (b"host", b"localhost")]
        inner["state"] = ConnectionState({**scope["state"], EXCHANGE: exchange})
        try:
            await self._app(inner, exchange.receive, exchange.send)
        except* Exception as group:
            log.exception("request_failed", method=scope["method"], path=scope["path"])
            if exchange.status is None:
                await exchange.answer(error_answer(public_error(cast(Exception, group))))
            else:
                scope["state"]["connection"].abort()  # the client must not take half an answer for a whole one
