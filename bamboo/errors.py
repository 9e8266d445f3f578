"""What can go wrong, whose doing it is, and whether trying again helps.

The codes are the contract of `docs/http.md`; the numbers that they get on the wire (HTTP status, WebSocket close code)
are `bamboo.wire.encode`'s business alone.
"""

from enum import StrEnum
from typing import Final, Literal

Blame = Literal["client", "upstream", "server"]
"""Who has to change something: the caller, the provider behind us, or whoever runs this server."""


class ErrorCode(StrEnum):
    """Every error code a client can see."""

    INVALID_REQUEST = "invalid_request"
    INVALID_CURSOR = "invalid_cursor"
    UNAUTHORIZED = "unauthorized"
    FORBIDDEN = "forbidden"
    NOT_FOUND = "not_found"
    SESSION_NOT_FOUND = "session_not_found"
    RUN_NOT_FOUND = "run_not_found"
    APPROVAL_NOT_FOUND = "approval_not_found"
    MODEL_NOT_FOUND = "model_not_found"
    METHOD_NOT_ALLOWED = "method_not_allowed"
    TOO_LARGE = "too_large"
    UNSUPPORTED_MEDIA_TYPE = "unsupported_media_type"
    BUSY = "busy"
    IDEMPOTENCY_CONFLICT = "idempotency_conflict"
    ALREADY_SUBSCRIBED = "already_subscribed"
    OVERLOADED = "overloaded"
    DRAINING = "draining"
    STARTING = "starting"
    STORE_UNAVAILABLE = "store_unavailable"
    PROVIDER_UNREACHABLE = "provider_unreachable"
    PROVIDER_CONNECT_TIMEOUT = "provider_connect_timeout"
    PROVIDER_AUTH = "provider_auth"
    PROVIDER_REJECTED = "provider_rejected"
    PROVIDER_RATE_LIMITED = "provider_rate_limited"
    PROVIDER_ERROR = "provider_error"
    PROVIDER_PROTOCOL = "provider_protocol"
    FIRST_TOKEN_TIMEOUT = "first_token_timeout"  # noqa: S105 - a token of text, no secret
    IDLE_TIMEOUT = "idle_timeout"
    RUN_TIMEOUT = "run_timeout"
    QUEUE_TIMEOUT = "queue_timeout"
    BUDGET_EXCEEDED = "budget_exceeded"
    LOOP_DETECTED = "loop_detected"
    INTERRUPTED = "interrupted"
    INTERNAL = "internal"
    # The gateway's own, for frames rather than requests.
    INVALID_MESSAGE = "invalid_message"
    NOT_CONNECTED = "not_connected"
    UNKNOWN_COMMAND = "unknown_command"


RETRYABLE: Final = frozenset(
    {
        ErrorCode.OVERLOADED,
        ErrorCode.DRAINING,
        ErrorCode.STARTING,
        ErrorCode.STORE_UNAVAILABLE,
        ErrorCode.PROVIDER_UNREACHABLE,
        ErrorCode.PROVIDER_CONNECT_TIMEOUT,
        ErrorCode.PROVIDER_RATE_LIMITED,
        ErrorCode.PROVIDER_ERROR,
        ErrorCode.PROVIDER_PROTOCOL,
        ErrorCode.FIRST_TOKEN_TIMEOUT,
        ErrorCode.IDLE_TIMEOUT,
        ErrorCode.INTERRUPTED,
    }
)
"""The same request, sent again later, may succeed."""


class BambooError(Exception):
    """An error with a code that a client may be told. Anything else that is raised is `internal` on the wire.

    `message` is for a person and carries no secret and no conversation text. `retry_after_s` says when trying again
    makes sense.
    """

    blame: Blame = "server"

    def __init__(
        self,
        code: ErrorCode,
        message: str,
        *,
        retry_after_s: float | None = None,
        session_id: str | None = None,
        run_id: str | None = None,
    ) -> None:
        super().__init__(message)
        self.code = code
        self.message = message
        self.retry_after_s = retry_after_s
        self.session_id = session_id
        self.run_id = run_id

    @property
    def retryable(self) -> bool:
        return self.code in RETRYABLE


class ClientError(BambooError):
    """The request is wrong, or comes at the wrong time; the caller has to change something or come back later."""

    blame = "client"


def session_not_found(session_id: str) -> ClientError:
    return ClientError(ErrorCode.SESSION_NOT_FOUND, "there is no such session", session_id=session_id)


def run_not_found(run_id: str | None = None) -> ClientError:
    """Without `run_id` for what can be no run's id: it is not repeated."""
    return ClientError(ErrorCode.RUN_NOT_FOUND, "there is no such run", run_id=run_id)


class UpstreamError(BambooError):
    """A provider failed: it could not be reached, refused, broke its protocol or took too long."""

    blame = "upstream"


class StoreError(BambooError):
    """The store could not do its work (disk full, database failing). Nothing of the refused write is kept."""

    def __init__(self, message: str, *, retry_after_s: float | None = 1.0) -> None:
        super().__init__(ErrorCode.STORE_UNAVAILABLE, message, retry_after_s=retry_after_s)


class StartError(Exception):
    """A component cannot start. `str(error)` is one line that tells the operator what to do."""


class ConfigError(Exception):
    """The configuration is refused. `str(error)` names the file, the key and what is wrong with it."""
