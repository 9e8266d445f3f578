"""One WebSocket connection: a reader that takes its frames one by one, a writer that sends its outbox in batches and
keeps the heartbeat.
"""

from math import inf
from typing import Final

import trio
from trio_websocket import ConnectionClosed, WebSocketConnection

from bamboo.config import Config
from bamboo.errors import BambooError, ErrorCode
from bamboo.gateway.admission import Visitor
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

MAX_CONNECT_BYTES: Final = 32 * 1024
"""Of a frame before the connection is connected: `connect` is small, and whoever sends it may be anybody."""

READ_AHEAD_BYTES: Final = 64 * 1024
"""Read from a client while a frame of it is in work: enough that pings and pongs behind it are seen, so little that
frames which wait cost no memory. Before the connection is connected it is all that is read without there being a frame.
"""

_MAX_PIECES: Final = 1024
_PIECE_BYTES: Final = 256
"""A frame may come in _MAX_PIECES pieces (fragments, or reads of the socket), and in one more for each _PIECE_BYTES of
`gateway.max_message_bytes`: trio-websocket keeps each piece as an object of its own, empty ones too.
"""

_PROTOCOL_FAILURES: Final = (1002, 1007)  # RFC 6455: protocol error, invalid UTF-8
_BAD_FRAME: Final = frozenset({ErrorCode.INVALID_MESSAGE, ErrorCode.NOT_CONNECTED, ErrorCode.UNKNOWN_COMMAND})


class Connection:
    """A connection after its upgrade. `run` is its life, `close` says goodbye; both are its owner's to call.

    Frames are read one at a time and answered in order, so at most one is in work (stops, a few, go on by themselves),
    and none is read while too many answers wait to be written. What a client sends meanwhile stays in the kernel, all
    but READ_AHEAD_BYTES. Leaving `run` leaves nothing behind in the bus; what the agents accepted goes on without it.
    """

    def __init__(
        self,
        connection_id: str,
        config: Config,
        services: Services,
        stream: ClientStream,
        websocket: WebSocketConnection,
        visitor: Visitor,
    ) -> None:
        self.connection_id = connection_id
        self._gateway = config.gateway
        self._stream = stream
        self._websocket = websocket
        self._outbox = Outbox()
        self._requests = Requests(connection_id, services, self._outbox, visitor)
        self._reading = trio.CancelScope()
        self._receiving = False
        self._taken_at = stream.received
        self._wanted: trio.Event | None = None
        self._ended = False
        self._too_much = False
        self._close_code: int | None = None
        self._bad_frames = 0
        self._ping_at = inf
        self._pong_due = inf
        stream.failure_code = self._failure_code
        stream.on_end = self._client_gone
        stream.before_receive = self._before_receive

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
            self._ended = True  # what still comes is dropped, but for the answer to our close frame
            self._want()
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
        self._receiving = True
        self._want()
        try:
            message = await self._websocket.get_message()
        except ConnectionClosed:
            return False
        finally:
            self._receiving = False
            self._taken_at = self._stream.received
        began = trio.current_time()
        await self._handle(message, nursery)
        del message
        await self._outbox.wait_room()
        self._pong_due += trio.current_time() - began
        return True

    def _want(self) -> None:
        """More may be read from the client."""
        if self._wanted is not None:
            self._wanted.set()
            self._wanted = None

    async def _before_receive(self) -> None:
        """trio-websocket is about to read. Waits while enough was read ahead of the frame in work. Raises
        ClosedResourceError for a client that has sent too much for one frame; `_failure_code` says so.
        """
        if len(self._websocket._message_parts) > _MAX_PIECES + self._gateway.max_message_bytes // _PIECE_BYTES:
            self._too_much = True
        while self._stream.received - self._taken_at > READ_AHEAD_BYTES and not (self._too_much or self._ended):
            if self._receiving:
                self._too_much = self._requests.session_id is None
                break
            if self._wanted is None:
                self._wanted = trio.Event()
            await self._wanted.wait()
        if self._too_much:
            raise trio.ClosedResourceError

    async def _handle(self, message: str | bytes, nursery: trio.Nursery) -> None:
        max_bytes = self._gateway.max_message_bytes
        if self._requests.session_id is None:
            max_bytes = min(max_bytes, MAX_CONNECT_BYTES)
        if len(message) * 4 > max_bytes and _size(message) > max_bytes:
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

    def _refuse(self, error: BambooError, ref: Ref | None) -> None:
        self._outbox.put(error_frame(error, ref))
        self._bad_frames = self._bad_frames + 1 if error.code in _BAD_FRAME else 0
        if error.code == ErrorCode.UNAUTHORIZED:
            self.finish(CloseCode.UNAUTHORIZED)
        elif error.code == ErrorCode.OVERLOADED and not self._requests.admitted:
            self.finish(CloseCode.TRY_AGAIN_LATER)
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
        """What the client is told when its frames broke the protocol or were too much: trio-websocket closes without a
        word.
        """
        if self._too_much:
            return CloseCode.MESSAGE_TOO_BIG
        closed = self._websocket.closed
        return closed.code if closed is not None and closed.code in _PROTOCOL_FAILURES else None


def _size(message: str | bytes) -> int:
    """trio-websocket counts characters; the limits are in bytes."""
    return len(message.encode() if isinstance(message, str) else message)
