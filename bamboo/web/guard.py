"""Who may come in: the checks of a request's head, in the contract's order, and what pages of other sites are told.

Host and Origin (403), then the token (401, or 429 for an address that has shown too many wrong ones).
"""

from dataclasses import dataclass, field
from typing import Final

import structlog
from hypercorn.typing import HTTPScope

from bamboo.config import ServerConfig
from bamboo.config_types import is_loopback
from bamboo.errors import BambooError, ClientError, ErrorCode
from bamboo.web.bodies import Answer, error_answer
from bamboo.web.peer import PEER, Peer
from bamboo.wire.access import bearer_is, host_is_known, origin_is_own
from bamboo.wire.addresses import AddressLimits

log = structlog.get_logger(__name__)

OPEN_PATHS: Final = frozenset({"/healthz", "/health", "/readyz"})
"""What may be asked without the token: they tell nothing, and those who ask have none."""

CORS_METHODS: Final = b"GET, POST, PATCH, DELETE"
CORS_HEADERS: Final = b"Authorization, Content-Type, Idempotency-Key, Last-Event-ID"
CORS_MAX_AGE_S: Final = 600
"""How long a browser may keep the answer to a preflight: as long as a changed `server.cors_origins` may go unseen."""

_VARY: Final = (b"Vary", b"Origin")


@dataclass(slots=True)
class Head:
    """The headers of a request that are looked at, in their order, without white space around them."""

    hosts: list[str] = field(default_factory=list)
    origins: list[str] = field(default_factory=list)
    authorizations: list[str] = field(default_factory=list)
    forwarded_for: list[str] = field(default_factory=list)
    is_preflight: bool = False

    @classmethod
    def of(cls, scope: HTTPScope) -> "Head":
        head = cls()
        for name, value in scope["headers"]:
            match name:
                case b"host":
                    head.hosts.append(value.decode("latin-1"))
                case b"origin":
                    head.origins.append(value.decode("latin-1"))
                case b"authorization":
                    head.authorizations.append(value.decode("latin-1"))
                case b"x-forwarded-for":
                    head.forwarded_for.append(value.decode("latin-1"))
                case b"access-control-request-method":
                    head.is_preflight = scope["method"] == "OPTIONS"
        return head


class Guard:
    """Who may come in. `addresses` are asked only if there is a token to show."""

    def __init__(self, config: ServerConfig, addresses: AddressLimits) -> None:
        self._check_host = is_loopback(config.host)
        self._allowed_hosts = config.allowed_hosts
        self._cors_origins = frozenset(config.cors_origins)
        self._token = None if config.auth_token is None else config.auth_token.get_secret_value()
        self._addresses = addresses

    def answer(self, scope: HTTPScope, head: Head, now: float) -> Answer | None:
        """What this request gets instead of the app's answer, or None. `now` is in seconds, of the clock that every
        caller of `addresses` uses."""
        # No Host at all is HTTP/1.0, which no browser speaks.
        if self._check_host and not all(host_is_known(host, self._allowed_hosts) for host in head.hosts):
            return _refusal(
                ErrorCode.FORBIDDEN, "Host: this server answers to loopback names and server.allowed_hosts only"
            )
        if scope["method"] != "GET" and not all(self._origin_is_welcome(origin, head) for origin in head.origins):
            return _refusal(ErrorCode.FORBIDDEN, "Origin: requests from pages of other sites are not taken")
        if head.is_preflight and self._cors_origin(head) is not None:
            return _preflight_answer()
        if scope["path"] not in OPEN_PATHS:
            error = self._token_error(scope["state"][PEER], head, now)
            if error is not None:
                return error_answer(error)
        if not scope["path"].startswith("/"):
            return _refusal(ErrorCode.NOT_FOUND, "there is nothing here")
        return None

    def cors_headers(self, head: Head, answer: list[tuple[bytes, bytes]]) -> list[tuple[bytes, bytes]]:
        """What an answer with the headers `answer` needs besides, so that the pages of `server.cors_origins` may read
        it. Nothing unless that is set."""
        if not self._cors_origins:
            return []
        origin = self._cors_origin(head)
        if origin is None:
            return [_VARY]
        exposed = [name for name, _ in answer if name.lower().startswith(b"x-bamboo-")]
        return [
            _VARY,
            (b"Access-Control-Allow-Origin", origin.encode("latin-1")),
            (b"Access-Control-Expose-Headers", b", ".join([*exposed, b"Retry-After"])),
        ]

    def _origin_is_welcome(self, origin: str, head: Head) -> bool:
        return origin_is_own(origin, head.hosts[0] if head.hosts else None) or origin.lower() in self._cors_origins

    def _cors_origin(self, head: Head) -> str | None:
        """The Origin as it was sent, if it is one of `server.cors_origins`."""
        if len(head.origins) == 1 and head.origins[0].lower() in self._cors_origins:
            return head.origins[0]
        return None

    def _token_error(self, peer: Peer, head: Head, now: float) -> BambooError | None:
        if self._token is None:
            return None
        address = self._addresses.client_address(peer.host, head.forwarded_for) if peer.is_proxy else peer.address
        if not peer.has_shown_token:
            retry_after_s = self._addresses.retry_after_s(address, now)
            if retry_after_s is not None:
                return ClientError(
                    ErrorCode.OVERLOADED,
                    "too many wrong tokens came from this address; try again later",
                    retry_after_s=retry_after_s,
                )
        if not head.authorizations:
            return ClientError(ErrorCode.UNAUTHORIZED, "Authorization: Bearer with the server's token is needed")
        if all(bearer_is(authorization, self._token) for authorization in head.authorizations):
            peer.shown()
            return None
        self._addresses.failed(address, now)
        log.warning("wrong_token", address=address)
        if not peer.has_shown_token and self._addresses.retry_after_s(address, now) is not None:
            log.warning("too_many_wrong_tokens", address=address)
        return ClientError(ErrorCode.UNAUTHORIZED, "Authorization: the token is wrong")


def _refusal(code: ErrorCode, message: str) -> Answer:
    return error_answer(ClientError(code, message))


def _preflight_answer() -> Answer:
    return Answer(
        204,
        [
            (b"Access-Control-Allow-Methods", CORS_METHODS),
            (b"Access-Control-Allow-Headers", CORS_HEADERS),
            (b"Access-Control-Max-Age", b"%d" % CORS_MAX_AGE_S),
        ],
        b"",
    )
