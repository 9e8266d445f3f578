"""One WebSocket connection: a reader that takes its frames one by one, a writer that sends its outbox in batches and
keeps the heartbeat.
"""

from math import inf
from typing import Final

import trio
from trio_websocket import ConnectionClosed, WebSocketConnection

from bamboo.config import Config
from bamboo.errors import BambooError, ErrorCode
from bamboo.gateway.outbox import Outbox
from bamboo.gateway.requests import Requests, Services
from bamboo.gateway.stream import ClientStream
from bamboo.wire.encode import CloseCode
from bamboo.wire.frames import CLOSE_REASONS, FrameError, Ref, draining_frame, error_frame, parse_frame, text_messages

MAX_BAD_FRAMES: Final = 20
"""In a row; then the client is not going to get it right."""

CLOSE_S: Final = 2.0
"""How long a client may take to answer our close frame."""

HANDOVER_S: Final = 1.0
"""How long the frames of a client that has left may still take: its last words count, its waiting does not."""

_PROTOCOL_FAILURES: Final = (1002, 1007)  # RFC 6455: protocol error, invalid UTF-8
_BAD_FRAME: Final = frozenset({ErrorCode.INVALID_MESSAGE, ErrorCode.NOT_CONNECTED, ErrorCode.UNKNOWN_COMMAND})


class Connection:
    """A connection after its upgrade. `run` is its life, `close` says goodbye; both are its owner's to call.

    Frames are read one at a time and answered in order, so at most one is in work (stops, a few, go on by themselves),
    and none is read while too many answers wait to be written. Leaving `run` leaves nothing behind in the bus; what the
    agents accepted goes on without it.
    """

    def __init__(
        self,
        connection_id: str,
        config: Config,
        services: Services,
        stream: ClientStream,
        websocket: WebSocketConnection,
        *,
        admitted: bool,
    ) -> None:
        self.connection_id = connection_id
        self._gateway = config.gateway
        self._stream = stream
        self._websocket = websocket
        self._outbox = Outbox()
        self._requests = Requests(connection_id, services, self._outbox, admitted=admitted)
        self._reading = trio.CancelScope()
        self._receiving = False
        self._close_code: int | None = None
        self._bad_frames = 0
        self._ping_at = inf
        self._pong_due = inf
        stream.failure_code = self._failure_code
        stream.on_end = self._client_gone

    def __repr__(self) -> str:
        return f"<Connection {self.connection_id} {self._outbox!r}>"

    async def run(self) -> None:
        """Serve the connection until its client leaves or something calls `finish`. An exception is a bug."""
        try:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(self._write, nursery)
                with self._reading:
                    await self._read(nursery)
                if self._close_code is None:
                    nursery.cancel_scope.cancel()
        finally:
            self._outbox.close()

    def finish(self, code: int) -> None:
        """Begin the end: no further frame is read, answers (and, when the server goes away, events) that are there are
        still written.
        """
        if self._close_code is not None:
            return
        self._close_code = code
        if code != CloseCode.GOING_AWAY:
            self._outbox.unfollow_all()
        self._reading.cancel()
        self._outbox.doorbell.ring()

    def draining(self, grace_s: float) -> None:
        """Tell the client that the server is about to stop."""
        self._outbox.put(draining_frame(grace_s))

    async def close(self, code: int | None = None) -> None:
        """The closing handshake, for CLOSE_S at most. `code` counts where `finish` gave none."""
        code = self._close_code or code
        if code is None:
            return
        with trio.move_on_after(CLOSE_S):
            await self._websocket.aclose(code, CLOSE_REASONS[code])

    def abort(self) -> None:
        """Drop the connection now."""
        self._stream.abort()

    # Reading

    def _client_gone(self) -> None:
        """What is in work, and behind it, has a little time to be handed over; nobody waits for the answers."""
        self._reading.deadline = min(self._reading.deadline, trio.current_time() + HANDOVER_S)

    async def _read(self, nursery: trio.Nursery) -> None:
        with trio.move_on_after(self._gateway.connect_timeout_s) as patience:
            while self._requests.session_id is None:
                if not await self._read_one(nursery):
                    return
        if patience.cancelled_caught:
            self.finish(CloseCode.CONNECT_TIMEOUT)
            return
        while await self._read_one(nursery):
            pass

    async def _read_one(self, nursery: trio.Nursery) -> bool:
        """Do the next frame. False at the end of the connection. Of a frame nothing is kept while it waits."""
        await self._outbox.wait_room()
        self._receiving = True
        try:
            message = await self._websocket.get_message()
        except ConnectionClosed:
            return False
        finally:
            self._receiving = False
        began = trio.current_time()
        await self._handle(message, nursery)
        self._pong_due += trio.current_time() - began
        return True

    async def _handle(self, message: str | bytes, nursery: trio.Nursery) -> None:
        if len(message) * 4 > self._gateway.max_message_bytes and self._too_big(message):
            self.finish(CloseCode.MESSAGE_TOO_BIG)
            return
        ref: Ref | None = None
        try:
            frame = parse_frame(message)
            ref = frame.ref
            await self._requests.handle(frame, nursery)
        except FrameError as error:
            self._refuse(error, error.ref)
        except BambooError as error:
            self._refuse(error, ref)
        else:
            self._bad_frames = 0

    def _too_big(self, message: str | bytes) -> bool:
        """trio-websocket counts characters; the limit is in bytes."""
        return len(message.encode() if isinstance(message, str) else message) > self._gateway.max_message_bytes

    def _refuse(self, error: BambooError, ref: Ref | None) -> None:
        self._outbox.put(error_frame(error, ref))
        self._bad_frames = self._bad_frames + 1 if error.code in _BAD_FRAME else 0
        if error.code == ErrorCode.UNAUTHORIZED:
            self.finish(CloseCode.UNAUTHORIZED)
        elif self._bad_frames >= MAX_BAD_FRAMES:
            self.finish(CloseCode.TOO_MANY_ERRORS)

    # Writing

    async def _write(self, nursery: trio.Nursery) -> None:
        """Send what there is, in batches, each time the doorbell rings. Ends the connection, after `finish` or when the
        client is gone.
        """
        self._ping_at = trio.current_time() + self._gateway.heartbeat_interval_secs
        going_on = True
        while going_on:
            await self._outbox.doorbell.wait()
            now = trio.current_time()
            self._beat(now, nursery)
            going_on = await self._write_batch(now)
        nursery.cancel_scope.cancel()

    async def _write_batch(self, now: float) -> bool:
        """One batch, and one read from the store where that is needed. False: that was the last."""
        outbox = self._outbox
        batch = outbox.gather(now)
        if batch and not await self._send(batch):
            return False
        if outbox.lagging:
            await outbox.fetch()
        elif self._close_code is None:
            return True
        elif not batch:
            return False
        outbox.doorbell.ring()
        return True

    async def _send(self, batch: list[bytes]) -> bool:
        """False: the client is gone, or was cut."""
        stalled_s = self._stream.stalled_s
        try:
            await self._stream.send_all(text_messages(batch))
        except (trio.BrokenResourceError, trio.ClosedResourceError):
            return False
        self._pong_due += self._stream.stalled_s - stalled_s
        self._outbox.gathered()
        return True

    # Heartbeat. The gateway ticks for all connections, so that waiting needs no deadline of its own. The time for a
    # pong runs only while nothing waits to be written and we are reading: else its silence is not the client's.

    def tick(self, now: float) -> None:
        """Wake the writer if something of its is due."""
        if now >= min(self._ping_at, self._pong_due, self._outbox.retry_at):
            self._outbox.doorbell.ring()

    def _beat(self, now: float, nursery: trio.Nursery) -> None:
        """What is due of the heartbeat at `now`."""
        if now >= self._pong_due:
            if self._receiving and not self._stream.writing:
                self.finish(CloseCode.HEARTBEAT_LOST)
            self._pong_due = now + self._gateway.heartbeat_timeout_secs
        if now >= self._ping_at:
            self._ping_at = now + self._gateway.heartbeat_interval_secs
            if self._pong_due == inf:
                self._pong_due = now + self._gateway.heartbeat_timeout_secs
                nursery.start_soon(self._ping)

    async def _ping(self) -> None:
        """A task for as long as a pong takes, so that an idle connection has none for its heartbeat."""
        try:
            await self._websocket.ping()
        except ConnectionClosed:
            return
        self._pong_due = inf

    def _failure_code(self) -> int | None:
        """What the client is told when its frames broke the protocol: trio-websocket closes without a word."""
        closed = self._websocket.closed
        return closed.code if closed is not None and closed.code in _PROTOCOL_FAILURES else None
