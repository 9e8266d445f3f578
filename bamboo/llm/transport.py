"""How bytes get to a provider and back: the one seam between the providers and their HTTP client (httpx).

`open_client` decides what carries requests; `open_answer` asks and hands out the answer. Providers know nothing else of
connections.
"""

import ssl
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from functools import cache
from http.cookiejar import CookieJar, DefaultCookiePolicy
from typing import Final, Self

import httpx
import trio

_MAX_IDLE_CONNECTIONS: Final = 20
"""httpcore looks at every idle connection whenever a request starts or ends: with hundreds of them that is most of the
work.
"""

_IDLE_EXPIRY_S: Final = 5.0
"""Shorter than any server's own, so that a request hardly ever meets a connection that is being closed."""

_DIRECT: Final = ("all://localhost", "all://127.0.0.1", "all://[::1]")
"""Never through a proxy of the environment: a model server on this machine is nobody else's to reach."""


@cache
def _tls() -> ssl.SSLContext:
    """certifi's roots, or `SSL_CERT_FILE`'s. Made once: reading them takes tens of milliseconds."""
    return httpx.create_ssl_context()


@asynccontextmanager
async def open_client(*, connect_timeout_s: float) -> AsyncIterator[httpx.AsyncClient]:
    """An HTTP client for one provider; leaving closes its connections.

    Only connecting has a deadline of its own (TCP and TLS, each `connect_timeout_s`): how long an answer may take is
    the caller's business. Redirects are not followed, nothing is compressed, cookies are not kept. Proxies come from
    the environment (`HTTPS_PROXY`, `NO_PROXY`, …).
    """
    async with httpx.AsyncClient(
        verify=_tls(),
        timeout=httpx.Timeout(None, connect=connect_timeout_s),
        limits=httpx.Limits(
            max_connections=None,  # the server bounds its runs, and a pool that is full would only hide it
            max_keepalive_connections=_MAX_IDLE_CONNECTIONS,
            keepalive_expiry=_IDLE_EXPIRY_S,
        ),
        follow_redirects=False,
        headers={"accept-encoding": "identity", "user-agent": "bamboo"},
        cookies=CookieJar(DefaultCookiePolicy(allowed_domains=[])),
        mounts=dict.fromkeys(_DIRECT),
    ) as client:
        yield client


class _Whole(httpx.AsyncByteStream):
    """A request body in one piece. httpx' own is an async generator, and a request that is cancelled while it is being
    written leaves that unfinished.
    """

    def __init__(self, content: bytes) -> None:
        self._content = content

    def __aiter__(self) -> AsyncIterator[bytes]:
        return _Once(self._content)


class _Once(AsyncIterator[bytes]):
    def __init__(self, content: bytes) -> None:
        self._content: bytes | None = content

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> bytes:
        content, self._content = self._content, None
        if content is None:
            raise StopAsyncIteration
        return content


class Body:
    """The bytes of one answer as they come, undecoded. For one task at a time; `open_answer` makes and closes it."""

    __slots__ = ("_begun", "_ended", "_next", "_response")

    def __init__(self, response: httpx.Response) -> None:
        self._response = response
        self._next = response.aiter_raw().__anext__
        self._begun = False
        self._ended = False

    async def receive(self) -> bytes:
        """The next piece; b"" at the end, and only there. Raises httpx.TransportError when the connection breaks or
        what comes is not HTTP.

        A point of cancellation always, of scheduling when it waits for the network. Cancelled, it closes the
        connection.
        """
        await trio.lowlevel.checkpoint_if_cancelled()
        self._begun = True
        try:
            return await self._next()
        except StopAsyncIteration:
            self._ended = True
            return b""

    async def read(self, max_bytes: int) -> bytes:
        """All of it, cut after about `max_bytes`. Raises as `receive`."""
        pieces: list[bytes] = []
        size = 0
        while size < max_bytes and (piece := await self.receive()):
            pieces.append(piece)
            size += len(piece)
        return b"".join(pieces)[:max_bytes]

    async def aclose(self) -> None:
        """Close the connection, unless the answer was read to its end: then it waits for the next request. Waits for
        nothing outside.

        httpx reads through several async generators, one inside the other, and closing the outer one leaves the inner
        ones unfinished (trio warns of each). So an answer that is left early is read on under a cancelled scope: what
        is buffered comes out, then Cancelled ends every one of them.
        """
        try:
            if self._begun and not self._ended:
                with trio.CancelScope() as scope:
                    scope.cancel()
                    while not self._ended:
                        await self._drop()
        finally:
            await self._response.aclose()

    async def _drop(self) -> None:
        try:
            await self._next()
        except (StopAsyncIteration, httpx.TransportError):
            self._ended = True


@asynccontextmanager
async def open_answer(
    client: httpx.AsyncClient, url: str, content: bytes
) -> AsyncIterator[tuple[httpx.Response, Body]]:
    """POST JSON, wait for the answer's head; leaving the block closes what is still open, at once.

    Raises httpx.TransportError on entering. Cancelled at any step, it leaves no connection and no generator behind.
    """
    request = client.build_request("POST", url, content=content, headers={"content-type": "application/json"})
    request.stream = _Whole(content)
    response = await client.send(request, stream=True)
    body = Body(response)
    try:
        yield response, body
    finally:
        await body.aclose()
