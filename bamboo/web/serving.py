"""The HTTP/1 server under the app: who is let in as far as the socket, and how all of them are seen off.

hypercorn writes without a deadline, shielded, so that one client that stops reading would keep the server from
stopping; it keeps a connection's task for `keep_alive_timeout` after the client has left; and it speaks cleartext
HTTP/2, whose streams escape per-connection limits. So we accept connections ourselves, and of hypercorn only the
protocol code is left, in `http1.py`.
"""

import errno
import os
import socket
import ssl
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import Final

import structlog
import trio
from hypercorn.config import Config as HypercornConfig
from hypercorn.trio.worker_context import WorkerContext
from hypercorn.typing import ASGIFramework
from hypercorn.utils import wrap_app

from bamboo.config import ServerConfig
from bamboo.errors import ClientError, ErrorCode, StartError
from bamboo.tls import server_context
from bamboo.web.bodies import error_answer
from bamboo.web.connections import ConnectionStream, PlainStream, TlsStream
from bamboo.web.http1 import HttpConnection
from bamboo.web.peer import Peer
from bamboo.wire.addresses import AddressLimits

log = structlog.get_logger(__name__)

CLOSE_GRACE_S: Final = 2.0
"""How long answers under way may take once the server closes; what is stuck in a write then is aborted."""

ACCEPT_BACKOFF_S: Final = 0.1
"""How long to accept nothing when the process or the machine has no file descriptors or memory for it: some may be
freed meanwhile."""
_ACCEPT_BACKOFF_ERRNOS: Final = frozenset({errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.ENOBUFS})

REFUSE_S: Final = 1.0
"""How long a connection over a cap may take to read that it is refused."""
MAX_REFUSING: Final = 64
"""How many are told so at once; beyond that they are closed without a word, so that a flood of them costs nothing."""


class HttpServer:
    """Accepts connections for an ASGI app and serves each until its client leaves, it is idle for too long, or the
    server closes. With `tls` it speaks HTTPS.

    `on_closing` is called once, when nothing is accepted any more: whoever has an endless answer ends it then.
    """

    def __init__(
        self,
        app: ASGIFramework,
        listeners: "Sequence[trio.abc.Listener[trio.SocketStream]]",
        config: ServerConfig,
        *,
        addresses: AddressLimits,
        tls: ssl.SSLContext | None = None,
        on_closing: Callable[[], None],
    ) -> None:
        self._app = wrap_app(app, 0, "asgi")  # 0: a limit for WSGI apps
        self._listeners = listeners
        self._config = config
        self._addresses = None if config.auth_token is None else addresses
        self._tls = tls
        self._on_closing = on_closing
        self._hypercorn = _hypercorn_config()
        self._context = WorkerContext(None)
        self._connections: set[HttpConnection] = set()
        self._refusing = 0
        self._accepting = trio.CancelScope()
        self._finished = trio.Event()

    def __repr__(self) -> str:
        return f"<HttpServer {self.connections} connections>"

    @property
    def connections(self) -> int:
        return len(self._connections)

    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Serve until `close`. If cancelled, every connection is aborted at once."""
        try:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(self._abort_when_cancelled)
                async with trio.open_nursery() as connections:
                    with self._accepting:
                        async with trio.open_nursery() as acceptors:
                            for listener in self._listeners:
                                acceptors.start_soon(self._accept, listener, connections)
                            task_status.started()
                    for listener in self._listeners:
                        await listener.aclose()
                    await self._context.terminated.set()  # connections close with their answer
                    for connection in self._connections:
                        connection.stop_when_idle()
                    self._on_closing()
                    nursery.cancel_scope.deadline = trio.current_time() + CLOSE_GRACE_S
                nursery.cancel_scope.cancel()
        finally:
            self._finished.set()

    async def close(self) -> None:
        """Stop accepting, let answers under way end for `CLOSE_GRACE_S`, abort the rest. Returns when no connection is
        left."""
        self._accepting.cancel()
        await self._finished.wait()

    async def _abort_when_cancelled(self) -> None:
        try:
            await trio.sleep_forever()
        finally:
            if self._connections:
                log.warning("connections_aborted", connections=len(self._connections))
            for connection in list(self._connections):
                connection.stream.abort()

    async def _accept(self, listener: "trio.abc.Listener[trio.SocketStream]", connections: trio.Nursery) -> None:
        while True:
            try:
                inner = await listener.accept()
            except OSError as error:
                if error.errno not in _ACCEPT_BACKOFF_ERRNOS:
                    raise
                log.warning("accept_failed", error=os.strerror(error.errno or 0), backoff_s=ACCEPT_BACKOFF_S)
                await trio.sleep(ACCEPT_BACKOFF_S)
                continue
            self._take(inner, connections)

    def _take(self, inner: trio.SocketStream, nursery: trio.Nursery) -> None:
        """Serve a new connection, or refuse it, in a task of `nursery`."""
        try:
            peer = Peer(inner.socket.getpeername()[0], self._addresses)
        except OSError:  # it has gone already
            inner.socket.close()
            return
        if len(self._connections) >= self._config.max_connections:
            reason = f"the server has its {self._config.max_connections} connections; try again later"
        elif not peer.try_enter():
            reason = "too many connections from this address have not shown the token; try again later"
            log.debug("connection_refused", address=peer.address, reason="unauthenticated connections")
        else:
            connection = HttpConnection(
                self._app, self._config, self._hypercorn, self._context, self._stream(inner), peer
            )
            self._connections.add(connection)
            nursery.start_soon(self._serve, connection)
            return
        if self._refusing < MAX_REFUSING:
            self._refusing += 1
            nursery.start_soon(self._refuse, self._stream(inner), reason)
        else:
            inner.socket.close()

    def _stream(self, inner: trio.SocketStream) -> ConnectionStream:
        plain = PlainStream(inner, self._config.write_timeout_s)
        return plain if self._tls is None else TlsStream(plain, self._tls)

    async def _serve(self, connection: HttpConnection) -> None:
        try:
            with connection.stream.life:
                await connection.run()
        except* Exception:
            log.exception("connection_failed")
        finally:
            connection.stream.close_nowait()
            connection.peer.leave()
            self._connections.discard(connection)

    async def _refuse(self, stream: ConnectionStream, reason: str) -> None:
        """Say why, and wait until that was read."""
        try:
            with stream.life, trio.move_on_after(REFUSE_S), suppress(trio.BrokenResourceError):
                await stream.handshake()
                await stream.send_all(_refusal(reason))
                await stream.linger()
        finally:
            stream.close_nowait()
            self._refusing -= 1


async def open_listeners(config: ServerConfig) -> list[trio.SocketListener]:
    """Listening sockets for every address of `server.host`; the caller closes them. Raises StartError."""
    try:
        listeners = await trio.open_tcp_listeners(config.port, host=config.host)
    except OSError as error:
        reason = error.strerror or str(error)
        raise StartError(
            f"the HTTP server cannot listen on {config.host} port {config.port}: {reason} (server.host, server.port)"
        ) from error
    if hasattr(socket, "TCP_USER_TIMEOUT"):
        # A peer that vanished without a word leaves small writes unacknowledged, but never blocks one. Accepted sockets
        # inherit it.
        for listener in listeners:
            listener.socket.setsockopt(
                socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, round(config.write_timeout_s * 1000)
            )
    return listeners


def open_tls(config: ServerConfig) -> ssl.SSLContext | None:
    """What the server speaks TLS with; None: it speaks plain HTTP. Raises StartError."""
    if config.certfile is None or config.keyfile is None:
        return None
    return server_context(config.certfile, config.keyfile, alpn=["http/1.1"])


def _hypercorn_config() -> HypercornConfig:
    hypercorn = HypercornConfig()
    hypercorn.accesslog = None  # the middleware logs, without query strings
    hypercorn.errorlog = None  # and hears of every exception first
    hypercorn.include_server_header = False
    return hypercorn


def _refusal(reason: str) -> bytes:
    answer = error_answer(ClientError(ErrorCode.OVERLOADED, reason, retry_after_s=1))
    head = b"".join(b"%b: %b\r\n" % header for header in (*answer.headers, (b"Connection", b"close")))
    # 503, as every proxy knows it, and not the code's own 429: nothing is said about what was asked for.
    return b"HTTP/1.1 503 Service Unavailable\r\n%b\r\n%b" % (head, answer.body)
