"""What stands between the connections and the app: who may come in, and what the app is spared.

The checks come in the contract's order. The guard's: Host and Origin (403), token (401). Then the app's: route (404),
method (405), content type (415), size (413), body (400).
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

from bamboo.config import ServerConfig
from bamboo.errors import ClientError, ErrorCode
from bamboo.web.bodies import Answer, error_answer
from bamboo.web.guard import Guard, Head
from bamboo.web.http1 import CONNECTION
from bamboo.wire.addresses import AddressLimits
from bamboo.wire.encode import public_error

log = structlog.get_logger(__name__)

EXCHANGE: Final = "exchange"
"""The key of a request's `scope["state"]` under which its Exchange is."""

BODY_METHODS: Final = frozenset({"POST", "PUT", "PATCH"})
"""Those whose body the app is given. That of others is thrown away as it comes: else it would be held for as long as a
stream lasts."""

LINGER_S: Final = 2.0
"""How long a client that is still sending its body may take to read an answer that came before: closing on unread input
would take it back."""


class BodyTimeoutError(Exception):
    """The request's body did not arrive whole within `server.body_timeout_s`."""


class Exchange:
    """One request and its answer, between hypercorn and the app.

    `resources` lives as long as both: what a handler opens for its response's body goes in there, since a handler that
    is cancelled between its return and the body's start would leave it open.
    """

    def __init__(
        self,
        scope: HTTPScope,
        receive: ASGIReceiveCallable,
        send: ASGISendCallable,
        guard: Guard,
        *,
        body_timeout_s: float,
    ) -> None:
        self.head = Head.of(scope)
        self._receive = receive
        self._send = send
        self._guard = guard
        self._body_deadline = trio.current_time() + body_timeout_s
        self._body_is_withheld = scope["method"] not in BODY_METHODS
        self._request_begun = False
        self._request_over = trio.Event()
        self._answered = False
        self.status: int | None = None
        """Of the answer; None until it was begun."""
        self.resources = ExitStack()

    async def receive(self) -> ASGIReceiveEvent:
        """What the app gets of the request. Raises BodyTimeoutError."""
        if self._body_is_withheld and not self._request_begun:
            self._request_begun = True
            return {"type": "http.request", "body": b"", "more_body": False}
        while True:
            message = await self._next_in_time()
            if message["type"] != "http.request" or not self._body_is_withheld:
                return message

    async def _next_in_time(self) -> ASGIReceiveEvent:
        if self._request_over.is_set():
            return await self._next()
        with trio.move_on_at(self._body_deadline):
            return await self._next()
        raise BodyTimeoutError

    async def _next(self) -> ASGIReceiveEvent:
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
            headers = [*message["headers"]]
            message["headers"] = [*headers, *self._guard.cors_headers(self.head, headers)]
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
        while (await self._next())["type"] != "http.disconnect":
            pass


class Edge:
    """The ASGI app that hypercorn calls: checks, containment and access log around the real one."""

    def __init__(self, app: ASGIFramework, config: ServerConfig, addresses: AddressLimits) -> None:
        self._app = app
        self._guard = Guard(config, addresses)
        self._body_timeout_s = config.body_timeout_s

    async def __call__(self, scope: Scope, receive: ASGIReceiveCallable, send: ASGISendCallable) -> None:
        assert scope["type"] == "http", "upgrades are taken off before, and there is no lifespan"
        exchange = Exchange(scope, receive, send, self._guard, body_timeout_s=self._body_timeout_s)
        begun = trio.current_time()
        try:
            with exchange.resources:
                await self._answer(scope, exchange)
        finally:
            log.debug(
                "request",
                method=scope["method"],
                path=_path(scope),
                status=exchange.status,
                elapsed_ms=round((trio.current_time() - begun) * 1000),
            )

    async def _answer(self, scope: HTTPScope, exchange: Exchange) -> None:
        answer = self._guard.answer(scope, exchange.head, trio.current_time())
        if answer is not None:
            await exchange.answer(answer)
            return
        inner = scope.copy()
        # Host was checked; what is left of it are ways for the router to stumble over a strange one.
        headers = [(name, value) for name, value in scope["headers"] if name != b"host"]
        inner["headers"] = [*headers, (b"host", b"localhost")]
        inner["state"] = ConnectionState({**scope["state"], EXCHANGE: exchange})
        try:
            await self._app(inner, exchange.receive, exchange.send)
        except* BodyTimeoutError:
            await self._fail(scope, exchange, _body_timeout_answer())
        except* Exception as group:
            log.exception("request_failed", method=scope["method"], path=_path(scope))
            await self._fail(scope, exchange, error_answer(public_error(cast(Exception, group))))

    async def _fail(self, scope: HTTPScope, exchange: Exchange, answer: Answer) -> None:
        if exchange.status is None:
            await exchange.answer(answer)
        else:
            scope["state"][CONNECTION].abort()  # the client must not take half an answer for a whole one


def _body_timeout_answer() -> Answer:
    """408 has no code of its own: who has to change something is the client, and sending the same again would not help
    it."""
    answer = error_answer(
        ClientError(ErrorCode.INVALID_REQUEST, "the request's body took longer than server.body_timeout_s")
    )
    return Answer(408, [*answer.headers, (b"Connection", b"close")], answer.body)


def _path(scope: HTTPScope) -> str:
    """For the log: without the query, and without what a target that is a whole URL may have before its path."""
    path = scope["path"]
    return path if path.startswith("/") else "?"
