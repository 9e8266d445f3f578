"""Who comes in: Host and Origin first, then the token."""

import pytest

from bamboo.config import Config, GatewayConfig, ServerConfig
from bamboo.errors import ClientError, ErrorCode
from bamboo.gateway.admission import Admission


def admission(
    bind: str = "127.0.0.1:0", token: str | None = None, server_token: str | None = None, **server: object
) -> Admission:
    config = Config(
        server=ServerConfig.model_validate({"auth_token": server_token, **server}),
        gateway=GatewayConfig.model_validate(
            {"bind": bind, "auth_token": token, "allowed_origins": ("https://a.example",)}
        ),
    )
    return Admission.of(config, lambda: ("http://127.0.0.1:8081", "http://localhost:8081"))


def code(rules: Admission, host: str | None, *headers: tuple[bytes, bytes]) -> ErrorCode | bool:
    try:
        return rules.admit(host, headers)
    except ClientError as error:
        return error.code


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
