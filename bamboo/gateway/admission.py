"""Who may open a connection: the checks of a handshake, before the upgrade."""

from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass
from hmac import compare_digest

from bamboo.config import Config, is_loopback
from bamboo.errors import ClientError, ErrorCode
from bamboo.wire.access import bearer_is, host_is_known


@dataclass(frozen=True, slots=True)
class Admission:
    """The rules, in the order in which they are asked: Host and Origin, then the token.

    `token` None: none is needed. `check_host`: the socket is bound to loopback. `page_origins()` are the origins of the
    HTTP server's own page; asked each time, for they may be known late.
    """

    token: str | None
    check_host: bool
    allowed_hosts: Collection[str]
    allowed_origins: Collection[str]
    page_origins: Callable[[], Collection[str]]

    @classmethod
    def of(cls, config: Config, page_origins: Callable[[], Collection[str]]) -> "Admission":
        token = config.gateway.auth_token or config.server.auth_token
        return cls(
            None if token is None else token.get_secret_value(),
            is_loopback(config.gateway.host),
            config.server.allowed_hosts,
            config.gateway.allowed_origins,
            page_origins,
        )

    def admit(self, host: str | None, headers: Iterable[tuple[bytes, bytes]]) -> bool:
        """Whether the connection has shown its token, or needs none; if not, its `connect` has to.

        `headers` have lower-case names. Raises ClientError `forbidden` or `unauthorized`.
        """
        if self.check_host and (host is None or not host_is_known(host, self.allowed_hosts)):
            raise ClientError(
                ErrorCode.FORBIDDEN, "Host: this gateway answers to loopback names and server.allowed_hosts only"
            )
        authorizations: list[str] = []
        for name, value in headers:
            if name == b"origin" and not self._origin_allowed(value.decode("latin-1")):
                raise ClientError(
                    ErrorCode.FORBIDDEN, "Origin: pages of other sites may not connect; see gateway.allowed_origins"
                )
            if name == b"authorization":
                authorizations.append(value.decode("latin-1"))
        if self.token is None:
            return True
        if not authorizations:
            return False
        if not all(bearer_is(authorization, self.token) for authorization in authorizations):
            raise ClientError(ErrorCode.UNAUTHORIZED, "Authorization: the token is wrong")
        return True

    def token_is(self, token: str) -> bool:
        """In constant time."""
        return self.token is not None and compare_digest(token.encode(), self.token.encode())

    def _origin_allowed(self, origin: str) -> bool:
        origin = origin.strip().lower()
        return origin in self.allowed_origins or origin in self.page_origins()
