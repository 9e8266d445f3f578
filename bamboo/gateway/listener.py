"""The gateway's listening socket: who is let in, how many at once, and how all of them are seen off."""

import ssl
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager, suppress
from math import ceil
from secrets import token_hex
from typing import Final

import structlog
import trio
from trio_websocket import ConnectionClosed, WebSocketRequest, wrap_server_stream
from wsproto.utilities import LocalProtocolError

from bamboo.bus.event_bus import EventBus
from bamboo.config import Config
from bamboo.errors import ClientError, ErrorCode, StartError
from bamboo.gateway.admission import Admission, NoRoomError, Visitor
from bamboo.gateway.connection import Connection
from bamboo.gateway.door import Door, error_body, peer_of, refusal, refuse_nowait
from bamboo.gateway.requests import Agents, Services
from bamboo.gateway.stream import ClientStream
from bamboo.store.base import Store
from bamboo.tls import server_context
from bamboo.wire.addresses import AddressLimits
from bamboo.wire.encode import HTTP_STATUS, CloseCode

log = structlog.get_logger("bamboo.gateway")

GOODBYE_S: Final = 2.0
"""How long all clients together may take to be told that the server goes away; then their sockets are dropped."""

MAX_TICK_S: Final = 1.0
"""How late a heartbeat may be."""

_INBOUND_MESSAGES: Final = 4  # read ahead of the one in work, so that pongs and pings are seen behind them
_RECEIVE_BYTES: Final = 4096
_BACKLOG: Final = 1024  # connections that the kernel holds until we accept them; the system may allow fewer
_REACHED_AT: Final = {"0.0.0.0": "127.0.0.1", "::": "::1"}  # noqa: S104 - compared with, not bound


class Gateway:
    """The running gateway. `port` and `url` are where it really listens."""

    def __init__(
        self,
        config: Config,
        services: Services,
        admission: Admission,
        listeners: Sequence[trio.SocketListener],
        tls: ssl.SSLContext | None,
    ) -> None:
        self._config = config
        self._services = services
        self._admission = admission
        self._listeners = listeners
        self._tls = tls
        self._door = Door()
        self._connections: set[Connection] = set()
        self._taken = 0
        self._tasks = trio.CancelScope(shield=True)
        self._closing = False
        self._ended = trio.Event()
        self._empty = trio.Event()
        self._drained_at: float | None = None
        self.port: int = listeners[0].socket.getsockname()[1]
        host = _REACHED_AT.get(config.gateway.host, config.gateway.host)
        scheme = "ws" if tls is None else "wss"
        self.url = f"{scheme}://[{host}]:{self.port}/" if ":" in host else f"{scheme}://{host}:{self.port}/"

    def __repr__(self) -> str:
        return f"<Gateway {self.url} {len(self._connections)} connections>"

    @property
    def connections(self) -> int:
        """Connections that were upgraded and are not gone."""
        return len(self._connections)

    @property
    def waiting(self) -> int:
        """Connections that are on their way in, or being refused."""
        return self._door.waiting

    def draining(self, grace_s: float) -> None:
        """Tell every client, and those that still come, that the server stops in `grace_s` seconds. Subscriptions
        stay.
        """
        self._drained_at = trio.current_time() + grace_s
        for connection in self._connections:
            connection.draining(grace_s)

    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Accept and serve until `close`. A failure to accept is raised; what goes wrong in a connection is not.

        Shielded: cancelled from outside, connections would be cut without a word. Whoever cancels leaves the block of
        `open_gateway`, and that closes them within GOODBYE_S.
        """
        try:
            with self._tasks:
                async with trio.open_nursery() as nursery:
                    for listener in self._listeners:
                        nursery.start_soon(self._accept, listener, nursery)
                    nursery.start_soon(self._tick)
                    task_status.started()
        finally:
            self._stop_listening()
            self._ended.set()

    async def close(self) -> None:
        """Stop accepting, say 1001 to all at once, and drop who has not gone within GOODBYE_S. Bounded, whatever the
        clients do.
        """
        self._closing = True
        self._stop_listening()
        for connection in self._connections:
            connection.finish(CloseCode.GOING_AWAY)
        with trio.move_on_after(GOODBYE_S, shield=True) as patience:
            while self._connections:
                self._empty = trio.Event()
                await self._empty.wait()
        if patience.cancelled_caught:
            log.warning("connections_dropped", connections=len(self._connections))
        for connection in list(self._connections):
            connection.abort()
        self._tasks.cancel()
        with trio.move_on_after(GOODBYE_S, shield=True):
            await self._ended.wait()

    def _stop_listening(self) -> None:
        for listener in self._listeners:
            listener.socket.close()

    async def _accept(self, listener: trio.SocketListener, nursery: trio.Nursery) -> None:
        while True:
            try:
                accepted = await self._door.accept(listener)
            except trio.ClosedResourceError:
                if self._closing:
                    return
                raise
            try:
                visitor = Visitor(self._admission, peer_of(accepted))
            except OSError:
                accepted.socket.close()  # it is gone already
            except NoRoomError as error:
                log.debug("connection_refused", code=error.code)
                refuse_nowait(accepted, refusal(error) if self._tls is None else b"")
            else:
                stream = ClientStream(accepted, write_timeout_s=self._config.server.write_timeout_s, tls=self._tls)
                self._door.enter(stream)
                nursery.start_soon(self._serve, stream, visitor)

    async def _tick(self) -> None:
        """The clock of all heartbeats: a deadline for each wait would cost a connection a third of its wake-ups."""
        gateway = self._config.gateway
        interval_s = min(MAX_TICK_S, gateway.heartbeat_interval_secs / 4, gateway.heartbeat_timeout_secs / 4)
        while True:
            await trio.sleep(interval_s)
            now = trio.current_time()
            for connection in self._connections:
                connection.tick(now)

    async def _serve(self, stream: ClientStream, visitor: Visitor) -> None:
        """One TCP connection, from its handshake to its end. The one place where what goes wrong in a connection is
        caught.
        """
        connection_id = token_hex(8)
        request = None
        try:
            try:
                async with trio.open_nursery() as nursery:  # of trio-websocket's reader
                    request = await self._handshake(stream, nursery)
                    if request is not None:
                        await self._converse(connection_id, stream, request, visitor)
                    nursery.cancel_scope.cancel()
            except Exception as error:
                if request is None:  # only the peer's bytes and the libraries' parsers were at work
                    log.debug("handshake_failed", connection_id=connection_id, error=repr(error))
                elif not _is_late(error):
                    log.exception("connection_failed", connection_id=connection_id)
            await stream.aclose()
            await stream.linger()
        finally:
            stream.close()
            visitor.leave()
            self._door.leave(stream)

    async def _handshake(self, stream: ClientStream, nursery: trio.Nursery) -> WebSocketRequest | None:
        """What the client asks for. None: it is no WebSocket client (and was told 400), or too slow, or gone, or there
        is no room for it (and it was told 503).
        """
        with trio.move_on_after(self._config.gateway.connect_timeout_s) as patience:
            if self._tls is None and self._taken >= self._config.gateway.max_connections:
                await stream.send_all(refusal(_full()))
                return None
            await stream.handshake()
            stream.on_end = patience.cancel
            request = await wrap_server_stream(
                nursery,
                stream,
                message_queue_size=_INBOUND_MESSAGES,
                max_message_size=self._config.gateway.max_message_bytes,
                receive_buffer_size=min(_RECEIVE_BYTES, self._config.gateway.max_message_bytes),
            )
            stream.on_end = None
            return request
        return None

    async def _converse(
        self, connection_id: str, stream: ClientStream, request: WebSocketRequest, visitor: Visitor
    ) -> None:
        """Let the client in, or refuse it, and serve it until it has been seen off."""
        try:
            visitor.check(stream.take_host(), request.headers, trio.current_time())
            if self._taken >= self._config.gateway.max_connections:
                raise _full()
        except ClientError as error:
            log.debug("connection_refused", connection_id=connection_id, code=error.code)
            await _reject(request, error)
            return
        self._taken += 1
        try:
            websocket = await request.accept()
            self._door.leave(stream)
            connection = Connection(connection_id, self._config, self._services, stream, websocket, visitor)
            await self._attend(connection)
        except ConnectionClosed:
            return  # it left before it was in
        finally:
            self._taken -= 1

    async def _attend(self, connection: Connection) -> None:
        self._connections.add(connection)
        if self._drained_at is not None:
            connection.draining(max(0.0, self._drained_at - trio.current_time()))
        if self._closing:
            connection.finish(CloseCode.GOING_AWAY)
        try:
            try:
                await connection.run()
            except Exception:
                await connection.close(CloseCode.INTERNAL)
                raise
            await connection.close()
        finally:
            self._connections.discard(connection)
            if not self._connections:
                self._empty.set()


def _is_late(error: Exception) -> bool:
    """It is trio-websocket's reader, which wanted to answer a ping though our close frame is out."""
    return isinstance(error, ExceptionGroup) and error.split(LocalProtocolError)[1] is None


def _full() -> NoRoomError:
    return NoRoomError("the gateway has as many connections as it may")


async def _reject(request: WebSocketRequest, error: ClientError) -> None:
    """Refuse the upgrade with the body that errors have over HTTP."""
    status = 503 if isinstance(error, NoRoomError) else HTTP_STATUS[error.code]
    headers = [(b"Content-Type", b"application/json"), (b"Connection", b"close")]
    if error.retry_after_s is not None:
        headers.append((b"Retry-After", str(ceil(error.retry_after_s)).encode()))
    if error.code == ErrorCode.UNAUTHORIZED:
        headers.append((b"WWW-Authenticate", b"Bearer"))
    with suppress(ConnectionClosed):
        await request.reject(status, extra_headers=headers, body=error_body(error))


def _tls(config: Config) -> ssl.SSLContext | None:
    """Raises StartError."""
    files = config.gateway_tls
    if files is None:
        return None
    section = "server" if config.gateway.certfile is None else "gateway"
    return server_context(*files, alpn=["http/1.1"], section=section)


async def _listen(config: Config) -> list[trio.SocketListener]:
    """Raises StartError."""
    gateway = config.gateway
    try:
        listeners = await trio.open_tcp_listeners(gateway.port, host=gateway.host, backlog=_BACKLOG)
    except OSError as error:
        reason = error.strerror or str(error)
        raise StartError(f"gateway.bind: cannot listen on {gateway.bind}: {reason}") from error
    if gateway.port == 0:
        # A name may stand for several addresses, and each would get a port of its own.
        for listener in listeners[1:]:
            listener.socket.close()
        del listeners[1:]
    return listeners


@asynccontextmanager
async def open_gateway(
    config: Config,
    nursery: trio.Nursery,
    *,
    agents: Agents,
    bus: EventBus,
    store: Store,
    page_origins: Callable[[], Sequence[str]],
    addresses: AddressLimits,
) -> AsyncIterator[Gateway]:
    """The gateway, listening when this is entered. Leaving the block closes every connection with 1001, within
    GOODBYE_S.

    Its tasks run in `nursery`, which the caller opens around this block: a failure of the accept loop ends it.
    `page_origins()` are the origins of the HTTP server's own page; asked at each handshake, for they may be known only
    later. `addresses` counts for the HTTP server too. Raises StartError.
    """
    services = Services(
        agents=agents,
        bus=bus,
        store=store,
        max_subscriptions=config.gateway.max_subscriptions,
        heartbeat_interval_s=config.gateway.heartbeat_interval_secs,
        limits=config.limits,
    )
    admission = Admission.of(config, page_origins, addresses)
    tls = _tls(config)
    gateway = Gateway(config, services, admission, await _listen(config), tls)
    await nursery.start(gateway.run)
    try:
        yield gateway
    finally:
        await gateway.close()
