"""Who may open a connection: how many of an address's, the checks of a handshake, and the token."""

from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass
from hmac import compare_digest
from typing import Final

import structlog

from bamboo.config import Config
from bamboo.config_types import is_loopback
from bamboo.errors import ClientError, ErrorCode
from bamboo.wire.access import bearer_is, host_is_known
from bamboo.wire.addresses import AddressLimits

log = structlog.get_logger("bamboo.gateway")

RETRY_AFTER_S: Final = 5.0
"""When a client that was refused for a cap on connections may come back."""


class NoRoomError(ClientError):
    """There are as many connections as there may be: nothing is wrong with this one."""

    def __init__(self, message: str) -> None:
        super().__init__(ErrorCode.OVERLOADED, message, retry_after_s=RETRY_AFTER_S)


@dataclass(frozen=True, slots=True)
class Admission:
    """The rules, in the order in which they are asked: Host and Origin, then the address, then the token.

    `token` None: none is needed, and `addresses` counts nothing. `check_host`: the socket is bound to loopback.
    `page_origins()` are the origins of the HTTP server's own page; asked each time, for they may be known late.
    """

    token: str | None
    check_host: bool
    allowed_hosts: Collection[str]
    allowed_origins: Collection[str]
    page_origins: Callable[[], Collection[str]]
    addresses: AddressLimits

    @classmethod
    def of(cls, config: Config, page_origins: Callable[[], Collection[str]], addresses: AddressLimits) -> "Admission":
        token = config.gateway_token
        return cls(
            None if token is None else token.get_secret_value(),
            is_loopback(config.gateway.host),
            config.server.allowed_hosts,
            config.gateway.allowed_origins,
            page_origins,
            addresses,
        )

    def check_names(self, host: str | None, headers: Iterable[tuple[bytes, bytes]]) -> None:
        """Host and Origin. Raises ClientError `forbidden`."""
        if self.check_host and (host is None or not host_is_known(host, self.allowed_hosts)):
            raise ClientError(
                ErrorCode.FORBIDDEN, "Host: this gateway answers to loopback names and server.allowed_hosts only"
            )
        for name, value in headers:
            if name == b"origin" and not self._origin_allowed(value.decode("latin-1")):
                raise ClientError(
                    ErrorCode.FORBIDDEN, "Origin: pages of other sites may not connect; see gateway.allowed_origins"
                )

    def _origin_allowed(self, origin: str) -> bool:
        origin = origin.strip().lower()
        return origin in self.allowed_origins or origin in self.page_origins()

    def token_is(self, token: str) -> bool:
        """In constant time."""
        return self.token is not None and compare_digest(token.encode(), self.token.encode())


class Visitor:
    """A connection until it has shown the token. Until then it counts against its address, and so does each wrong token
    that it shows; who needs no token counts nowhere.

    Made at accept: raises NoRoomError if its address has too many of them already. Then `leave` is owed.
    """

    __slots__ = ("_address", "_admission", "_counted", "_peer", "admitted")

    def __init__(self, admission: Admission, peer: str) -> None:
        self._admission = admission
        self._peer = peer
        self._address = peer
        self._counted = False
        self.admitted = admission.token is None
        """It has shown the token, or needs none."""
        if not self.admitted:
            self._count(admission.addresses.client_address(peer, ()))

    def check(self, host: str | None, headers: Collection[tuple[bytes, bytes]], now: float) -> None:
        """The checks of the handshake, once. `headers` have lower-case names. A connection that shows no token here is
        not `admitted` by this; its `connect` has to show it.

        Raises ClientError: `forbidden`; `overloaded` for an address that has shown too many wrong tokens, and
        NoRoomError for a client behind a proxy that has too many connections; `unauthorized`.
        """
        self._admission.check_names(host, headers)
        if self.admitted:
            return
        forwarded_for = [value.decode("latin-1") for name, value in headers if name == b"x-forwarded-for"]
        client = self._admission.addresses.client_address(self._peer, forwarded_for)
        if client != self._address:
            self.leave()
            self._count(client)
        authorizations = [value.decode("latin-1") for name, value in headers if name == b"authorization"]
        self._check_address(now)
        if authorizations:
            token = self._admission.token
            assert token is not None, "else it was admitted from the start"
            right = all(bearer_is(authorization, token) for authorization in authorizations)
            self._judge(now, "Authorization: the token is wrong", right=right)

    def show(self, token: str | None, now: float) -> None:
        """The token of a `connect`; None: it has none. Raises ClientError `unauthorized` or `overloaded`."""
        if self.admitted:
            return
        self._check_address(now)
        if token is None:
            raise ClientError(ErrorCode.UNAUTHORIZED, "connect.auth: the token is missing")
        self._judge(now, "connect.auth: the token is wrong", right=self._admission.token_is(token))

    def leave(self) -> None:
        """Count this connection no longer. Idempotent."""
        if self._counted:
            self._counted = False
            self._admission.addresses.leave(self._address)

    def _count(self, address: str) -> None:
        self._address = address
        self._counted = self._admission.addresses.try_enter(address)
        if not self._counted:
            raise NoRoomError("this address has as many connections without the token as it may")

    def _check_address(self, now: float) -> None:
        retry_after_s = self._admission.addresses.retry_after_s(self._address, now)
        if retry_after_s is not None:
            raise ClientError(
                ErrorCode.OVERLOADED, "too many wrong tokens came from this address", retry_after_s=retry_after_s
            )

    def _judge(self, now: float, problem: str, *, right: bool) -> None:
        if right:
            self.admitted = True
            self.leave()
            return
        addresses = self._admission.addresses
        addresses.failed(self._address, now)
        if addresses.retry_after_s(self._address, now) is not None:
            log.warning(
                "too_many_wrong_tokens", address=self._address
            )  # once per minute: from now on none is looked at
        raise ClientError(ErrorCode.UNAUTHORIZED, problem)
