"""Clients' connections as streams: plain or TLS, with a deadline on every write, and an end that waits for nobody."""

import os
import socket
import ssl
import struct
from contextlib import suppress
from typing import Final

import trio

FAREWELL_S: Final = 1.0
"""How long a TLS client may take to take in that its connection is closed properly. What it says to that is not waited
for."""

_LINGER_RESET: Final = struct.pack("ii", 1, 0)  # struct linger: closing resets, nothing waits in the kernel
_DISCARD_BYTES: Final = 65536


class ConnectionStream(trio.abc.Stream):
    """A client's connection. A write that failed, or made no progress for the write timeout, aborts it: closed, and
    `life` cancelled, which everything that belongs to the connection runs in.

    `send_all` raises BrokenResourceError if the client is gone or took nothing for the write timeout (the connection is
    aborted then), ClosedResourceError, and BusyResourceError if another task is writing. If cancelled, some of the data
    may have been written. `receive_some` gives b"" when the client has properly said that it sends nothing more.

    `socket` is the TCP connection's: for its addresses.
    """

    encrypted: bool

    def __init__(self, sock: trio.socket.SocketType, life: trio.CancelScope) -> None:
        self.socket = sock
        self.life = life

    async def handshake(self) -> None:
        """Do what comes before the first byte of HTTP. Raises BrokenResourceError."""
        await trio.lowlevel.checkpoint()

    async def linger(self) -> None:
        """Say that nothing more comes, and throw away what the client still sends, until it has gone.

        Closing on unread input would take back what was written last. Raises BrokenResourceError; the caller has a
        deadline.
        """
        raise NotImplementedError

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


class PlainStream(ConnectionStream):
    """TCP without TLS. A write first tries what the kernel takes at once."""

    encrypted = False

    def __init__(self, inner: trio.SocketStream, write_timeout_s: float) -> None:
        super().__init__(inner.socket, trio.CancelScope())
        self._inner = inner
        self._write_timeout_s = write_timeout_s
        self._sending = False

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

    async def linger(self) -> None:
        await self._inner.send_eof()
        while await self._inner.receive_some(_DISCARD_BYTES):
            pass

    async def aclose(self) -> None:
        await self._inner.aclose()


class TlsStream(ConnectionStream):
    """TLS over a PlainStream, whose deadline and abort it shares.

    A client that goes without saying so in TLS (RFC 8446 section 6.1) is BrokenResourceError in `receive_some`: anybody
    on the way could have cut it.
    """

    encrypted = True

    def __init__(self, plain: PlainStream, context: ssl.SSLContext) -> None:
        super().__init__(plain.socket, plain.life)
        self._plain = plain
        self._tls = trio.SSLStream(plain, context, server_side=True)

    async def handshake(self) -> None:
        await self._tls.do_handshake()

    async def send_all(self, data: bytes | bytearray | memoryview) -> None:
        await self._tls.send_all(data)

    async def wait_send_all_might_not_block(self) -> None:
        await self._tls.wait_send_all_might_not_block()

    async def receive_some(self, max_bytes: int | None = None) -> bytes | bytearray:
        return await self._tls.receive_some(max_bytes)

    async def linger(self) -> None:
        await self._plain.linger()  # without a word in TLS: whoever lingers has sent an answer whose length is known

    async def aclose(self) -> None:
        """Say so in TLS, for at most FAREWELL_S, and close."""
        with trio.move_on_after(FAREWELL_S):
            await self._tls.aclose()
