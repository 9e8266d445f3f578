"""The HTTP/1 server under the app: our own accept loop and connection streams, hypercorn's protocol code in between.

hypercorn writes without a deadline, shielded, so that one client that stops reading would keep the server from
stopping; it keeps a connection's task for `keep_alive_timeout` after the client has left; and it speaks cleartext
HTTP/2, whose streams escape per-connection limits. So we accept connections ourselves and hand each to hypercorn's
`TCPServer` with a stream of ours. hypercorn promises nothing about these classes: its minor version is pinned, and
`tests/integration/test_web_serving.py` fails when a release changes what this leans on.
"""

import errno
import os
import socket
import struct
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import Any, Final

import h11
import structlog
import trio
from hypercorn.config import Config as HypercornConfig
from hypercorn.trio.tcp_server import TCPServer
from hypercorn.trio.worker_context import WorkerContext
from hypercorn.typing import AppWrapper, ASGIFramework, ConnectionState
from hypercorn.utils import wrap_app

from bamboo.config import ServerConfig
from bamboo.errors import ClientError, ErrorCode, StartError
from bamboo.web.bodies import error_answer

log = structlog.get_logger(__name__)

CONNECTION: Final = "connection"
"""The key of a request's `scope["state"]` under which its ConnectionStream is: where a response may write past
hypercorn."""

CLOSE_GRACE_S: Final = 2.0
"""How long answers under way may take once the server closes; what is stuck in a write then is aborted."""

ACCEPT_BACKOFF_S: Final = 0.1
"""How long to accept nothing when the process or the machine has no file descriptors or memory for it: some may be
freed meanwhile."""
_ACCEPT_BACKOFF_ERRNOS: Final = frozenset({errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.ENOBUFS})

REFUSE_S: Final = 1.0
"""How long a connection over the cap may take to read that it is refused."""
MAX_REFUSING: Final = 64
"""How many are told so at once; beyond that they are closed without a word, so that a flood of them costs nothing."""

_HTTP_VERSIONS: Final = frozenset({b"1.0", b"1.1"})
_LINGER_RESET: Final = struct.pack(
    "ii", 1, 0
)  # struct linger: closing resets the connection, nothing waits in the kernel


class ConnectionStream(trio.abc.HalfCloseableStream):
    """A TCP connection whose writes have a deadline and which can be aborted at any time, without waiting for anything.

    A write first tries what the kernel takes at once. After a write that failed or made no progress for
    `write_timeout_s` the connection is aborted: closed, and `life` cancelled, which everything that belongs to the
    connection runs in.
    """

    def __init__(self, inner: trio.SocketStream, write_timeout_s: float) -> None:
        self._inner = inner
        self._write_timeout_s = write_timeout_s
        self._sending = False
        self.socket = inner.socket
        """hypercorn reads the addresses from it."""
        self.life = trio.CancelScope()

    def write_nowait(self, data: bytes | memoryview) -> int:
        """Write as much of `data` as the kernel takes now; returns how many bytes that were, possibly 0.

        Raises BrokenResourceError (the connection is aborted) or ClosedResourceError.
        """
        descriptor = self.socket.fileno()
        if descriptor < 0:
            raise trio.ClosedResourceError("this connection was closed")
        try:
            return os.write(descriptor, data)
        except BlockingIOError:
            return 0
        except OSError as error:
            self.abort()
            raise trio.BrokenResourceError(f"the client is gone: {error}") from error

    async def send_all(self, data: bytes | bytearray | memoryview) -> None:
        """Write all of `data`. If cancelled, some of it may have been written.

        Raises BrokenResourceError if the client is gone or took nothing for `write_timeout_s` (the connection is
        aborted then), ClosedResourceError, and BusyResourceError if another task is writing.
        """
        if self._sending:
            raise trio.BusyResourceError("another task is writing to this connection")
        self._sending = True
        try:
            with memoryview(data) as view:
                sent = self.write_nowait(view)
                while sent < len(view):
                    await self._wait_writable()
                    sent += self.write_nowait(view[sent:])
            await trio.lowlevel.checkpoint()
        finally:
            self._sending = False

    async def _wait_writable(self) -> None:
        with trio.move_on_after(self._write_timeout_s) as patience:
            await self._inner.wait_send_all_might_not_block()
        if patience.cancelled_caught:
            self.abort()
            raise trio.BrokenResourceError(f"the client has read nothing for {self._write_timeout_s:g} s")

    async def wait_send_all_might_not_block(self) -> None:
        await self._inner.wait_send_all_might_not_block()

    async def receive_some(self, max_bytes: int | None = None) -> bytes | bytearray:
        return await self._inner.receive_some(max_bytes)

    async def send_eof(self) -> None:
        await self._inner.send_eof()

    async def aclose(self) -> None:
        await self._inner.aclose()

    def close_nowait(self) -> None:
        """Close. The kernel still delivers what was written. Idempotent."""
        self.socket.close()

    def abort(self) -> None:
        """Reset the connection and cancel all that belongs to it. Idempotent."""
        if self.socket.fileno() >= 0:
            with suppress(OSError):  # it may be reset already
                self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _LINGER_RESET)
            self.socket.close()
        self.life.cancel()


class _Http1(h11.Connection):
    """h11 that hands out HTTP/1.0 and 1.1 requests only, and none that wants another protocol.

    An upgrade may be ignored (RFC 9110 section 7.8), so `Upgrade: h2c` and `websocket` get the plain answer. An HTTP/2
    preface ends the connection.
    """

    def next_event(self) -> Any:
        event = super().next_event()
        if not isinstance(event, h11.Request):
            return event
        if event.http_version not in _HTTP_VERSIONS:
            raise h11.RemoteProtocolError("only HTTP/1.0 and HTTP/1.1 are spoken here", error_status_hint=505)
        headers = [(name, value) for name, value in event.headers if name != b"upgrade"]
        if len(headers) == len(event.headers):
            return event
        return h11.Request(method=event.method, target=event.target, headers=headers, http_version=event.http_version)


class _Connection(TCPServer):
    """hypercorn's server of one connection, kept to HTTP/1, and over when the client has left."""

    def __init__(
        self, app: AppWrapper, config: HypercornConfig, context: WorkerContext, stream: ConnectionStream
    ) -> None:
        # It is declared for TLS streams, but meant for plain ones too: it asks what it got.
        super().__init__(app, config, context, ConnectionState({CONNECTION: stream}), stream)  # type: ignore[arg-type]
        self._life = stream.life

    async def _read_data(self) -> None:
        """Called once, before the first byte is read; reads until the client leaves or the connection is closed."""
        protocol: Any = self.protocol.protocol  # of HTTP/1, since this is no TLS connection and nothing was read yet
        protocol.connection = _Http1(h11.SERVER, max_incomplete_event_size=self.config.h11_max_incomplete_size)
        await super()._read_data()
        # Whoever is still at work for this connection works for nobody; the idle timer would hold it for keep_alive_s.
        self._life.cancel()


class HttpServer:
    """Accepts connections for an ASGI app and serves each until its client leaves, it is idle for too long, or the
    server closes.

    `on_closing` is called once, when nothing is accepted any more: whoever has an endless answer ends it then.
    """

    def __init__(
        self,
        app: ASGIFramework,
        listeners: "Sequence[trio.abc.Listener[trio.SocketStream]]",
        config: ServerConfig,
        *,
        on_closing: Callable[[], None],
    ) -> None:
        self._app = wrap_app(app, 0, "asgi")  # 0: a limit for WSGI apps
        self._listeners = listeners
        self._config = config
        self._on_closing = on_closing
        self._hypercorn = _hypercorn_config(config)
        self._context = WorkerContext(None)
        self._streams: set[ConnectionStream] = set()
        self._refusing = 0
        self._accepting = trio.CancelScope()
        self._finished = trio.Event()

    def __repr__(self) -> str:
        return f"<HttpServer {self.connections} connections>"

    @property
    def connections(self) -> int:
        return len(self._streams)

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
                    await self._context.terminated.set()  # idle connections close now, the others with their answer
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
            if self._streams:
                log.warning("connections_aborted", connections=len(self._streams))
            for stream in list(self._streams):
                stream.abort()

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
            if len(self._streams) < self._config.max_connections:
                stream = ConnectionStream(inner, self._config.write_timeout_s)
                self._streams.add(stream)
                connections.start_soon(self._serve, stream)
            elif self._refusing < MAX_REFUSING:
                self._refusing += 1
                connections.start_soon(self._refuse, inner)
            else:
                inner.socket.close()

    async def _serve(self, stream: ConnectionStream) -> None:
        try:
            with stream.life:
                await _Connection(self._app, self._hypercorn, self._context, stream).run()
        except* Exception:
            log.exception("connection_failed")
        finally:
            stream.close_nowait()
            self._streams.discard(stream)

    async def _refuse(self, inner: trio.SocketStream) -> None:
        """Say that there are too many connections, and wait until that was read: closing on unread input would take it
        back."""
        try:
            with trio.move_on_after(REFUSE_S), suppress(trio.BrokenResourceError):
                await inner.send_all(_refusal(self._config.max_connections))
                await inner.send_eof()
                while await inner.receive_some():
                    pass
        finally:
            inner.socket.close()
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


def _hypercorn_config(config: ServerConfig) -> HypercornConfig:
    hypercorn = HypercornConfig()
    hypercorn.accesslog = None  # the middleware logs, without query strings
    hypercorn.errorlog = None  # and hears of every exception first
    hypercorn.include_server_header = False
    hypercorn.alpn_protocols = ["http/1.1"]
    hypercorn.keep_alive_timeout = config.keep_alive_s
    return hypercorn


def _refusal(max_connections: int) -> bytes:
    error = ClientError(
        ErrorCode.OVERLOADED, f"the server has its {max_connections} connections; try again later", retry_after_s=1
    )
    answer = error_answer(error)
    head = b"".join(b"%b: %b\r\n" % header for header in (*answer.headers, (b"Connection", b"close")))
    # 503, as every proxy knows it, and not the code's own 429: nothing is said about this client or what it asked for.
    return b"HTTP/1.1 503 Service Unavailable\r\n%b\r\n%b" % (head, answer.body)
