"""What the kernel knows of TCP connections on this machine, from /proc/net/tcp (proc(5)): Linux only."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Final

_ESTABLISHED: Final = "01"


@dataclass(frozen=True, slots=True)
class Socket:
    """One end of a connection. `queued` is what this end has written and the other has not read yet, plus what has come
    and this end has not read."""

    port: int
    peer_port: int
    established: bool
    queued: int


def sockets() -> Iterator[Socket]:
    """Every IPv4 socket that has not been forgotten."""
    for line in Path("/proc/net/tcp").read_text().splitlines()[1:]:
        _, local, peer, state, queues, *_ = line.split()
        port, peer_port = (int(address.rpartition(":")[2], 16) for address in (local, peer))
        yield Socket(port, peer_port, state == _ESTABLISHED, sum(int(queue, 16) for queue in queues.split(":")))


def clients_of(port: int) -> int:
    """How many connections to a listener on this port are open at the client's end."""
    return sum(one.peer_port == port and one.established for one in sockets())
