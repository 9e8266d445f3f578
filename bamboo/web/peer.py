"""Who is at the other end of a connection, and whether it has shown the token."""

from typing import Final

from bamboo.wire.addresses import AddressLimits

PEER: Final = "peer"
"""The key of a request's `scope["state"]` under which its connection's Peer is."""


class Peer:
    """The other end of one connection. With `limits` it is one of its address's connections without the token, from
    `try_enter` until it has shown it (`shown`) or is gone (`leave`, which the owner of the connection calls).

    `limits` None: no token is needed, and nothing is counted.
    """

    def __init__(self, host: str, limits: AddressLimits | None) -> None:
        self.host = host
        self._limits = limits
        self._entered = False
        self.is_proxy = limits is not None and limits.trusts(host)
        """Many clients may share this connection: what one of them has shown says nothing of the next."""
        self.address = host if limits is None else limits.client_address(host, ())
        self.has_shown_token = False

    def try_enter(self) -> bool:
        """Whether the address may have one more connection."""
        self._entered = self._limits is None or self._limits.try_enter(self.address)
        return self._entered

    def shown(self) -> None:
        """The right token came. Idempotent."""
        if not self.is_proxy:
            self.has_shown_token = True
            self.leave()

    def leave(self) -> None:
        """Count this connection no longer. Idempotent."""
        if self._entered and self._limits is not None:
            self._limits.leave(self.address)
        self._entered = False
