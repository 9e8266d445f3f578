"""The byte stream under a WebSocket connection: one writer at a time, a deadline that follows progress, an end that
cannot hang.
"""

import os
import re
import socket
import ssl
import struct
from collections.abc import Awaitable, Callable
from contextlib import suppress
from typing import Final

import trio

from bamboo.wire.frames import close_message, is_close_message

LINGER_S: Final = 1.0
"""How long a closed connection is still read from, so that the peer gets our last bytes rather than a reset."""

LAST_WORDS_S: Final = 0.5
"""How long it may take to say the end of a TLS connection; a plain one's takes no time."""

_HEAD_BYTES: Final = 64 * 1024  # more than h11 takes for a request's head
_HEAD_END: Final = re.compile(rb"\r?\n\r?\n")
_HOST: Final = re.compile(rb"^host:[ \t]*([^\r\n]*)", re.IGNORECASE | re.MULTILINE)
_RESET_ON_CLOSE: Final = struct.pack("ii", 1, 0)  # struct linger: on, for 0 s
_NO_FD: Final = -1
_GONE: Final = (trio.BrokenResourceError, trio.ClosedResourceError)


class ClientStream(trio.abc.Stream):
    """A client's TCP connection, as trio-websocket reads and writes it, and as the connection's writer writes batches
    of frames past it. With `tls`, a server's context, everything goes through TLS, behind its `handshake`.

    Each `send_all` is of whole frames (or of the handshake's answer), one at a time and in the order of the calls;
    nothing follows a close frame. A peer that takes nothing for `write_timeout_s` is cut. `aclose` is what trio-
    websocket calls when it is done with the connection: it ends our direction only. Whoever owns the connection then
    calls `linger` and `close`, or `abort`.
    """

    def __init__(self, inner: trio.SocketStream, *, write_timeout_s: float, tls: ssl.SSLContext | None = None) -> None:
        self._inner = inner
        self._tls = None if tls is None else trio.SSLStream(_Transport(self), tls, server_side=True)
        self._secured = False
        self._fd = inner.socket.fileno()
        self._lock = trio.StrictFIFOLock()
        self._write_timeout_s = write_timeout_s
        self._head: bytearray | None = bytearray()
        self._done = False
        self._said_close = False
        self.stalled_s = 0.0
        """How long writes have waited for the peer, all told."""
        self.received = 0
        """Bytes, all told, without those of TLS."""
        self.on_end: Callable[[], None] | None = None
        """Called once, when no handshake can follow any more: the peer has ended its direction or is gone, or ours is
        ended.
        """
        self.before_receive: Callable[[], Awaitable[None]] | None = None
        """Awaited before more is read: it may wait, so that the peer has to, or raise ClosedResourceError."""
        self.failure_code: Callable[[], int | None] | None = None
        """Asked when trio-websocket is done without having said a close frame: the code that the peer is told, if it is
        to be told.
        """

    @property
    def writing(self) -> bool:
        """Something waits for the peer to take it."""
        return self._lock.locked()

    def take_host(self) -> str | None:
        """The handshake's Host header, which trio-websocket does not hand on. The captured head is forgotten with
        this.
        """
        head, self._head = self._head, None
        assert head is not None, "there is one handshake"
        end = _HEAD_END.search(head)
        found = _HOST.search(head, 0, len(head) if end is None else end.start())
        return None if found is None else found[1].decode("latin-1")

    async def handshake(self) -> None:
        """The TLS handshake; nothing without TLS. The caller bounds it. Raises BrokenResourceError for a peer that
        speaks no TLS or is gone, ClosedResourceError after `abort`.
        """
        if self._tls is not None:
            await self._tls.do_handshake()
            self._secured = True

    async def receive_some(self, max_bytes: int | None = None) -> bytes:
        """At most `max_bytes`, b"" at the end. Raises BrokenResourceError, and ClosedResourceError once trio-websocket
        is done.
        """
        if self.before_receive is not None:
            await self.before_receive()
        if self._done:
            raise trio.ClosedResourceError
        try:
            data = bytes(await (self._inner if self._tls is None else self._tls).receive_some(max_bytes))
        except _GONE:
            self._end()
            raise
        self.received += len(data)
        if not data:
            self._end()
        elif self._head is not None and len(self._head) < _HEAD_BYTES:
            self._head += data
        return data

    async def send_all(self, data: bytes | bytearray | memoryview) -> None:
        """Write whole frames. If cancelled in the middle of them the connection is aborted: nothing sensible can
        follow.

        Raises BrokenResourceError for a peer that is gone or has taken nothing for too long, ClosedResourceError after
        a close frame.
        """
        async with self._lock:
            if self._done or self._said_close:
                raise trio.ClosedResourceError
            self._said_close = is_close_message(data)
            if self._tls is not None:
                await self._send_tls(self._tls, data)
                return
            rest = memoryview(data)
            rest = rest[self._send(rest) :]
            if rest:
                await self._send_rest(rest)

    async def wait_send_all_might_not_block(self) -> None:
        await self._inner.wait_send_all_might_not_block()

    async def _send_tls(self, tls: "trio.SSLStream[_Transport]", data: bytes | bytearray | memoryview) -> None:
        complete = False
        try:
            await tls.send_all(data)
            complete = True
        finally:
            if not complete:
                self.abort()

    def _send(self, data: bytes | memoryview) -> int:
        """How much the kernel took right now: past trio's `send`, which costs a checkpoint per call."""
        try:
            return os.write(self._fd, data)
        except BlockingIOError:
            return 0
        except OSError as error:
            raise trio.BrokenResourceError from error

    async def _send_rest(self, rest: memoryview) -> None:
        complete = False
        try:
            while rest:
                await self._wait_writable()
                rest = rest[self._send(rest) :]
            complete = True
        finally:
            if not complete:
                self.abort()

    async def _wait_writable(self) -> None:
        began = trio.current_time()
        with trio.move_on_after(self._write_timeout_s) as patience:
            await trio.lowlevel.wait_writable(self._inner.socket)
        self.stalled_s += trio.current_time() - began
        if patience.cancelled_caught:
            raise trio.BrokenResourceError("the peer took nothing for write_timeout_s")

    async def aclose(self) -> None:
        """End our direction: what was written arrives, then the peer sees the end. At most LAST_WORDS_S. Idempotent."""
        if not self._done:
            code = None if self.failure_code is None or self._said_close else self.failure_code()
            last = b"" if code is None else close_message(code)
            self._done = True
            try:
                if not self._lock.locked():
                    await self._say(last)
            finally:
                with suppress(OSError):  # the peer may have reset the connection already
                    self._inner.socket.shutdown(socket.SHUT_WR)
                self._end()
        await trio.lowlevel.checkpoint()

    async def _say(self, last: bytes) -> None:
        """The last bytes of all, with what TLS adds to them, if the peer takes them."""
        with suppress(*_GONE, trio.BusyResourceError):
            if self._tls is None:
                self._send(last)
            elif self._secured:
                with trio.move_on_after(LAST_WORDS_S):
                    await self._tls.send_all(last)
                    await self._tls.aclose()

    async def linger(self) -> None:
        """Read and drop what the peer still sends until it closes too, for LINGER_S at most.

        Closing a socket that has unread bytes resets the connection, and the peer could lose our close frame.
        """
        with trio.move_on_after(LINGER_S), suppress(*_GONE):
            while await self._inner.receive_some(65536):
                pass

    def close(self) -> None:
        """Close the socket; what was written is still delivered. Idempotent."""
        self._done = True
        self._fd = _NO_FD  # the next connection may get its number
        self._inner.socket.close()
        self._end()

    def abort(self) -> None:
        """Drop the connection now, with what the peer has not taken. Whoever waits for it is woken. Idempotent."""
        if self._inner.socket.fileno() >= 0:
            with suppress(OSError):
                self._inner.socket.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _RESET_ON_CLOSE)
        self.close()

    def _end(self) -> None:
        on_end, self.on_end = self.on_end, None
        if on_end is not None:
            on_end()


class _Transport(trio.abc.Stream):
    """What TLS writes to and reads from: the bytes of a ClientStream as they are on the wire.

    TLS writes one piece at a time, and may do so to answer what it reads.
    """

    def __init__(self, client: ClientStream) -> None:
        self._client = client

    async def send_all(self, data: bytes | bytearray | memoryview) -> None:
        rest = memoryview(data)
        rest = rest[self._client._send(rest) :]
        if rest:
            await self._client._send_rest(rest)

    async def receive_some(self, max_bytes: int | None = None) -> bytes | bytearray:
        return await self._client._inner.receive_some(max_bytes)

    async def wait_send_all_might_not_block(self) -> None:
        await self._client.wait_send_all_might_not_block()

    async def aclose(self) -> None:
        """Ending the connection is the ClientStream's."""
        await trio.lowlevel.checkpoint()
