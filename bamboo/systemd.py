"""Telling systemd how the service stands, for units of `Type=notify`: the protocol of sd_notify(3)."""

import socket
from collections.abc import Mapping
from typing import Final

import structlog

log = structlog.get_logger("bamboo.systemd")

READY: Final = "READY=1"
STOPPING: Final = "STOPPING=1"


def extend_timeout(seconds: float) -> str:
    """The service needs `seconds` from now on for what it is doing: systemd's own timeout does not cut it before."""
    return f"EXTEND_TIMEOUT_USEC={round(seconds * 1_000_000)}"


def notify(environ: Mapping[str, str], *assignments: str) -> None:
    """Send the assignments in one datagram to `NOTIFY_SOCKET`; without that variable nothing is sent.

    Never waits. A failure is logged and changes nothing else: the server works without its supervisor hearing of it.
    """
    address = environ.get("NOTIFY_SOCKET", "")
    if not address:
        return
    if address.startswith("@"):
        address = "\0" + address[1:]  # Linux's abstract namespace
    try:
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_NONBLOCK | socket.SOCK_CLOEXEC) as sender:
            sender.sendto("\n".join(assignments).encode(), address)
    except (OSError, ValueError) as error:
        log.warning("systemd_not_told", assignments=assignments, error=str(error))
