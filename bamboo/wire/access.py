"""Who may talk to a listener: the `Host`, `Origin` and `Authorization` headers of a request, on either listener.

`Host` keeps out DNS rebinding (a page of evil.example whose name suddenly resolves to 127.0.0.1 is, for the browser,
talking to its own origin), `Origin` keeps out cross-site requests, the bearer token keeps out everybody else.
"""

import hmac
from collections.abc import Collection

from bamboo.config_types import is_loopback

_DEFAULT_PORTS = {"http": "80", "ws": "80", "https": "443", "wss": "443"}


def host_is_known(host: str, allowed_hosts: Collection[str]) -> bool:
    """Whether a `Host` header names this machine by loopback, or by one of `allowed_hosts` (names, the port does not
    matter)."""
    name, _ = _split_host(host)
    return bool(name) and (is_loopback(name) or name in {allowed.lower().rstrip(".") for allowed in allowed_hosts})


def origin_is_own(origin: str, host: str | None) -> bool:
    """Whether an `Origin` header is that of a page which this listener itself served: the same host and port as in
    `Host`.

    The scheme does not count, because a proxy in front may have taken TLS off. `null` and anything that is no origin is
    not our own.
    """
    scheme, separator, authority = origin.strip().lower().partition("://")
    port = _DEFAULT_PORTS.get(scheme)
    if not separator or port is None or host is None:
        return False
    name, own_port = _split_host(authority)
    host_name, host_port = _split_host(host)
    return bool(name) and (name, own_port or port) == (host_name, host_port or port)


def bearer_is(authorization: str | None, token: str) -> bool:
    """Whether an `Authorization` header carries this token. The time that it takes says nothing of the token."""
    scheme, _, given = (authorization or "").partition(" ")
    return scheme.lower() == "bearer" and hmac.compare_digest(given.strip().encode(), token.encode())


def _split_host(host: str) -> tuple[str, str]:
    """`name[:port]` or `[v6][:port]`, lower case: the name without brackets and root dot, and the port ("" if there is
    none)."""
    host = host.strip().lower()
    if host.startswith("["):
        name, bracket, rest = host[1:].partition("]")
        return (name, rest.removeprefix(":")) if bracket and (not rest or rest.startswith(":")) else ("", "")
    name, _, port = host.partition(":")
    return name.rstrip("."), port
