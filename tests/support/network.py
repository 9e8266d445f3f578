"""A network that is not there: sockets that a test plays, below trio's streams, so that everything above them is real
and time is still the mock clock's."""

import math
import socket
from typing import Any

import trio


class MuteSocket(trio.socket.SocketType):
    """Connects after `connect_s` (inf: never), takes whatever is sent, and never says anything."""

    def __init__(self, connect_s: float) -> None:
        super().__init__()
        self._connect_s = connect_s
        self.closed = False

    @property
    def type(self) -> socket.SocketKind:
        return socket.SOCK_STREAM

    @property
    def did_shutdown_SHUT_WR(self) -> bool:  # noqa: N802 - trio's name
        return False

    def setsockopt(self, *_option: Any) -> None:
        pass

    async def connect(self, _address: Any) -> None:
        await trio.sleep(self._connect_s)

    async def send(self, data: Any, _flags: int = 0) -> int:
        await trio.lowlevel.checkpoint()
        return len(data)

    async def recv(self, _size: int, _flags: int = 0) -> bytes:
        await trio.sleep_forever()
        raise AssertionError

    def close(self) -> None:
        self.closed = True


class MuteNetwork(trio.abc.SocketFactory):
    """Every socket that trio makes while this is its factory is a mute one, kept in `sockets`.

    `trio.socket.set_custom_socket_factory` holds for one run of the loop, hence for one test.
    """

    def __init__(self, connect_s: float = math.inf) -> None:
        self._connect_s = connect_s
        self.sockets: list[MuteSocket] = []

    def socket(self, family: Any = None, type: Any = None, proto: Any = None) -> trio.socket.SocketType:  # noqa: A002, ARG002
        made = MuteSocket(self._connect_s)
        self.sockets.append(made)
        return made
