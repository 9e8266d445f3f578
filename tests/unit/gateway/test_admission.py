"""Who comes in: Host and Origin first, then the address, then the token; and what counts against an address."""

from typing import Any

import pytest
import structlog.testing

from bamboo.config import Config, GatewayConfig, ServerConfig
from bamboo.errors import ClientError, ErrorCode
from bamboo.gateway.admission import Admission, NoRoomError, Visitor
from bamboo.wire.addresses import AddressLimits


def admission(
    bind: str = "127.0.0.1:0", token: str | None = None, server_token: str | None = None, **server: object
) -> Admission:
    config = Config(
        server=ServerConfig.model_validate({"auth_token": server_token, **server}),
        gateway=GatewayConfig.model_validate(
            {"bind": bind, "auth_token": token, "allowed_origins": ("https://a.example",)}
        ),
    )
    pages = ("http://127.0.0.1:8081", "http://localhost:8081")
    return Admission.of(config, lambda: pages, AddressLimits.of(config.server))


def code(rules: Admission, host: str | None, *headers: tuple[bytes, bytes]) -> ErrorCode | bool:
    """Why a handshake is refused, or whether the connection is in with it."""
    visitor = Visitor(rules, "192.0.2.1")
    try:
        visitor.check(host, headers, 0.0)
    except ClientError as error:
        return error.code
    finally:
        visitor.leave()
    return visitor.admitted


def test_on_loopback_only_loopback_names_and_allowed_hosts_are_served() -> None:
    rules = admission(allowed_hosts=("bamboo.example",))
    assert [code(rules, host) for host in ("127.0.0.1:1", "localhost", "[::1]:1", "bamboo.example")] == [True] * 4
    assert [code(rules, host) for host in ("evil.example", "localhost.evil.example", "", None)] == [
        ErrorCode.FORBIDDEN
    ] * 4


def test_elsewhere_any_host_is_served() -> None:
    rules = admission("0.0.0.0:0", token="t" * 8)
    assert code(rules, "any.example", (b"authorization", b"Bearer " + b"t" * 8)) is True


def test_every_origin_has_to_be_known_and_none_is_fine() -> None:
    rules = admission()
    good, bad = (b"origin", b"https://a.example"), (b"origin", b"https://b.example")
    assert code(rules, "localhost") is True
    assert code(rules, "localhost", good) is True
    assert code(rules, "localhost", (b"origin", b"HTTP://LOCALHOST:8081")) is True
    assert code(rules, "localhost", bad) == ErrorCode.FORBIDDEN
    assert code(rules, "localhost", good, bad) == ErrorCode.FORBIDDEN
    assert code(rules, "localhost", (b"origin", b"null")) == ErrorCode.FORBIDDEN


def test_host_and_origin_come_before_the_token() -> None:
    rules = admission(token="secret")
    wrong = (b"authorization", b"Bearer wrong")
    assert code(rules, "evil.example", wrong) == ErrorCode.FORBIDDEN
    assert code(rules, "localhost", wrong, (b"origin", b"https://b.example")) == ErrorCode.FORBIDDEN
    assert code(rules, "localhost", wrong) == ErrorCode.UNAUTHORIZED


@pytest.mark.parametrize(("own", "servers", "right"), [("mine", "theirs", "mine"), (None, "theirs", "theirs")])
def test_the_token_is_the_gateways_or_else_the_servers(own: str | None, servers: str, right: str) -> None:
    rules = admission(token=own, server_token=servers)
    assert rules.token_is(right)
    assert not rules.token_is("theirs" if own else "mine")
    assert code(rules, "localhost", (b"authorization", f"bearer {right}".encode())) is True
    assert code(rules, "localhost", (b"authorization", b"Bearer wrong")) == ErrorCode.UNAUTHORIZED
    two = (b"authorization", f"Bearer {right}".encode()), (b"authorization", b"Bearer wrong")
    assert code(rules, "localhost", *two) == ErrorCode.UNAUTHORIZED
    assert code(rules, "localhost") is False


def test_without_a_token_nobody_needs_one() -> None:
    rules = admission()
    assert code(rules, "localhost") is True
    assert code(rules, "localhost", (b"authorization", b"Bearer anything")) is True
    assert not rules.token_is("")


# Addresses

TOKEN = "right-token"
RIGHT = (b"authorization", f"Bearer {TOKEN}".encode())
WRONG = (b"authorization", b"Bearer wrong")


def limited(**server: Any) -> Admission:
    return admission(token=TOKEN, **{"max_unauthenticated_per_address": 2, "max_failed_auth_per_minute": 2, **server})


def refused(rules: Admission, peer: str, *headers: tuple[bytes, bytes], now: float = 0.0) -> ClientError:
    """Why this handshake from `peer` is refused."""
    visitor = Visitor(rules, peer)
    try:
        with pytest.raises(ClientError) as caught:
            visitor.check("localhost", headers, now)
        return caught.value
    finally:
        visitor.leave()


def test_connections_without_the_token_count_against_their_address_from_accept_on() -> None:
    rules = limited()
    first, _ = Visitor(rules, "192.0.2.1"), Visitor(rules, "192.0.2.1")
    with pytest.raises(NoRoomError) as caught:
        Visitor(rules, "192.0.2.1")
    assert (caught.value.code, caught.value.retry_after_s) == (ErrorCode.OVERLOADED, 5)
    Visitor(rules, "192.0.2.2")
    first.leave()
    first.leave()
    Visitor(rules, "192.0.2.1")
    with pytest.raises(NoRoomError):
        Visitor(rules, "192.0.2.1")


@pytest.mark.parametrize("shown", ["in the handshake", "in connect"])
def test_who_has_shown_the_token_counts_no_more(shown: str) -> None:
    rules = limited()
    for _ in range(10):
        visitor = Visitor(rules, "192.0.2.1")
        if shown == "in connect":
            visitor.check("localhost", (), 0.0)
            assert not visitor.admitted
            visitor.show(TOKEN, 0.0)
        else:
            visitor.check("localhost", [RIGHT], 0.0)
        assert visitor.admitted
    assert repr(rules.addresses) == "<AddressLimits 0 with connections, 0 with wrong tokens>"


def test_without_a_token_nothing_is_counted() -> None:
    rules = admission(max_unauthenticated_per_address=1, max_failed_auth_per_minute=1)
    for _ in range(10):
        visitor = Visitor(rules, "192.0.2.1")
        visitor.check("localhost", [WRONG], 0.0)
        visitor.show("anything", 0.0)
        visitor.show(None, 0.0)
        assert visitor.admitted
    assert repr(rules.addresses) == "<AddressLimits 0 with connections, 0 with wrong tokens>"


def test_wrong_tokens_of_both_kinds_count_together_and_then_even_the_right_one_is_refused() -> None:
    rules = limited()
    assert refused(rules, "192.0.2.1", WRONG).code == ErrorCode.UNAUTHORIZED
    late, visitor = Visitor(rules, "192.0.2.1"), Visitor(rules, "192.0.2.1")
    visitor.check("localhost", (), 0.0)
    with pytest.raises(ClientError) as caught:
        visitor.show("wrong", 20.0)
    assert caught.value.code == ErrorCode.UNAUTHORIZED
    visitor.leave()

    for headers in ((RIGHT,), (WRONG,), ()):
        error = refused(rules, "192.0.2.1", *headers, now=20.0)
        assert (error.code, error.retry_after_s) == (ErrorCode.OVERLOADED, 40.0)
        assert not isinstance(error, NoRoomError)
    with pytest.raises(ClientError) as caught:
        late.show(TOKEN, 30.0)
    assert (caught.value.code, caught.value.retry_after_s) == (ErrorCode.OVERLOADED, 30.0)
    late.leave()

    assert code(rules, "localhost", RIGHT) == ErrorCode.OVERLOADED
    other = Visitor(rules, "192.0.2.2")
    other.check("localhost", [RIGHT], 20.0)
    assert other.admitted
    again = Visitor(rules, "192.0.2.1")
    again.check("localhost", [RIGHT], 61.0)
    assert again.admitted


def test_a_token_that_is_missing_is_no_wrong_token() -> None:
    rules = limited()
    for _ in range(5):
        visitor = Visitor(rules, "192.0.2.1")
        with pytest.raises(ClientError) as caught:
            visitor.show(None, 0.0)
        assert caught.value.code == ErrorCode.UNAUTHORIZED
        visitor.leave()


def test_a_foreign_page_cannot_use_up_its_readers_attempts() -> None:
    rules = limited()
    for _ in range(5):
        assert refused(rules, "192.0.2.1", WRONG, (b"origin", b"https://evil.example")).code == ErrorCode.FORBIDDEN
    assert code(rules, "localhost", RIGHT) is True


def test_behind_a_trusted_proxy_it_is_the_clients_address_that_counts() -> None:
    rules = limited(trusted_proxies=("10.0.0.0/8",))

    def from_client(address: str) -> Visitor:
        visitor = Visitor(rules, "10.0.0.1")
        visitor.check("localhost", [(b"x-forwarded-for", b"1.2.3.4"), (b"x-forwarded-for", address.encode())], 0.0)
        return visitor

    proxied = [Visitor(rules, "10.0.0.1") for _ in range(20)]
    inside = [from_client("192.0.2.1"), from_client("192.0.2.1")]
    with pytest.raises(NoRoomError):
        from_client("192.0.2.1")
    from_client("192.0.2.2").leave()
    for visitor in [*inside, *proxied]:
        visitor.leave()
    assert repr(rules.addresses) == "<AddressLimits 0 with connections, 0 with wrong tokens>"
    for _ in range(2):
        assert refused(rules, "10.0.0.1", WRONG, (b"x-forwarded-for", b"192.0.2.1")).code == ErrorCode.UNAUTHORIZED
    assert refused(rules, "10.0.0.1", RIGHT, (b"x-forwarded-for", b"192.0.2.1")).code == ErrorCode.OVERLOADED
    assert refused(rules, "10.0.0.1", WRONG, (b"x-forwarded-for", b"192.0.2.2")).code == ErrorCode.UNAUTHORIZED


def test_nobody_else_is_believed_what_address_it_is_forwarded_for() -> None:
    rules = limited()
    for n in range(2):
        forged = (b"x-forwarded-for", f"192.0.2.{n}".encode())
        assert refused(rules, "198.51.100.1", WRONG, forged).code == ErrorCode.UNAUTHORIZED
    assert refused(rules, "198.51.100.1", RIGHT, (b"x-forwarded-for", b"192.0.2.9")).code == ErrorCode.OVERLOADED


def test_the_address_with_too_many_wrong_tokens_is_logged_once() -> None:
    rules = limited()
    with structlog.testing.capture_logs() as logs:
        for _ in range(5):
            refused(rules, "192.0.2.1", WRONG)
    assert logs == [{"event": "too_many_wrong_tokens", "address": "192.0.2.1", "log_level": "warning"}]
