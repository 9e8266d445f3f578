"""What a provider is to Bamboo: one open stream of deltas for one model call."""

from collections.abc import Mapping, Sequence
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass
from typing import Protocol

from bamboo.core.types import ModelCall, ProviderDelta
from bamboo.errors import ClientError, ErrorCode, UpstreamError


class RequestRejectedError(UpstreamError):
    """`provider_rejected`, for what the request holds: it is too long, against the provider's policy, has a field that
    it does not know.

    Such a request is not taken to a fallback. Whoever asked has to hear of it and can mend it; another provider's
    longer memory or laxer policy would hide it, and let a conversation go where it would not have gone. Any other
    `provider_rejected` is about how the provider is set up here: no such model, nothing at its address, no credit left.
    """

    def __init__(self, message: str) -> None:
        super().__init__(ErrorCode.PROVIDER_REJECTED, message)


class ProviderStream(Protocol):
    """The answer to one model call, as it comes."""

    async def receive(self) -> Sequence[ProviderDelta]:
        """The deltas that have come since the last call, at least one; empty at the end of a whole answer, and only
        there.

        Raises UpstreamError: `provider_protocol` for garbage or an answer that was cut, `provider_error` for an error
        told in the stream, `provider_unreachable` for a connection that broke before any delta. If cancelled, the
        stream is of no more use; leaving its block closes the connection. Not for two tasks at once.
        """


class Provider(Protocol):
    """An LLM API at one address, with one key. Shared by all runs; holds no state of any of them."""

    name: str
    """Its name in the configuration."""
    kind: str
    default_model: str
    demo: bool
    """It stands in for a provider that has no key."""

    def stream(self, call: ModelCall) -> AbstractAsyncContextManager[ProviderStream]:
        """Ask the model. Entering sends the request and waits for the answer's head; leaving closes what is still open,
        at once.

        Raises UpstreamError on entering: `provider_connect_timeout`, `provider_unreachable`, `provider_auth` (401,
        403), `provider_rejected` (other 4xx, as RequestRejectedError where the request is at fault),
        `provider_rate_limited` (429, with `retry_after_s` where told), `provider_error` (5xx), `provider_protocol` (not
        the answer asked for). The first-token and idle deadlines are the caller's: it cancels.
        """


@dataclass(frozen=True, slots=True)
class Providers:
    """The configured providers by name, and which of them answer a chat that names none: `default`, and where that
    fails, each of `fallback`."""

    by_name: Mapping[str, Provider]
    default: str
    fallback: Sequence[str] = ()

    def in_turn(self) -> list[tuple[Provider, str]]:
        """Who is asked for a chat that names neither provider nor model, one after the other, each with its own default
        model.

        Each provider once, however often it is named. A demo that stands in for a provider without a key takes nobody's
        place: its text for an answer would be worse than the error.
        """
        fallback = [self.by_name[name] for name in dict.fromkeys(self.fallback) if name != self.default]
        asked = [self.by_name[self.default], *(provider for provider in fallback if not provider.demo)]
        return [(provider, provider.default_model) for provider in asked]

    def default_model(self, name: str) -> str:
        """That of the provider of this name; "" if there is none of that name any more."""
        provider = self.by_name.get(name)
        return "" if provider is None else provider.default_model

    def resolve(self, provider: str | None, model: str | None) -> tuple[Provider, str]:
        """The provider and the model for a call. Raises ClientError `invalid_request` for a provider that is not
        configured.
        """
        name = provider if provider is not None else self.default
        found = self.by_name.get(name)
        if found is None:
            raise ClientError(
                ErrorCode.INVALID_REQUEST, f"provider: there is no provider named {name!r} in the configuration"
            )
        return found, model if model is not None else found.default_model
