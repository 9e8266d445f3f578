"""Headers that say who asks, as text."""

import pytest

from bamboo.wire.access import bearer_is, host_is_known, origin_is_own


@pytest.mark.parametrize(
    "host", ["localhost", "LOCALHOST:80", "localhost.", "127.0.0.1:1", "127.1.2.3", "[::1]", "[::1]:9"]
)
def test_loopback_is_known_by_every_name(host: str) -> None:
    assert host_is_known(host, ())


@pytest.mark.parametrize(
    "host", ["", ":80", ".", "[]", "[", "[::1", "[::1]80", "::1", "a", "127.0.0.1.a", "localhost.a", "x@localhost", "0"]
)
def test_nothing_else_is(host: str) -> None:
    assert not host_is_known(host, ())


def test_allowed_hosts_are_compared_as_names() -> None:
    assert host_is_known("Bamboo.Example:8443", ("bamboo.example",))
    assert host_is_known("bamboo.example", ("BAMBOO.example.",))
    assert not host_is_known("a.bamboo.example", ("bamboo.example",))


@pytest.mark.parametrize(
    ("origin", "host"),
    [
        ("http://a:1", "a:1"),
        ("HTTP://A", "a:80"),
        ("https://a", "a"),
        ("https://a:443", "a"),
        ("http://[::1]:2", "[::1]:2"),
    ],
)
def test_an_origin_is_own_if_host_and_port_are_the_same(origin: str, host: str) -> None:
    assert origin_is_own(origin, host)


@pytest.mark.parametrize(
    ("origin", "host"),
    [("http://a:1", "a:2"), ("http://a", "b"), ("null", "a"), ("", ""), ("http://", ""), ("a", "a"), ("ftp://a", "a")],
)
def test_any_other_origin_is_foreign(origin: str, host: str) -> None:
    assert not origin_is_own(origin, host)
    assert not origin_is_own(origin, None)


def test_a_token_comes_as_bearer_and_in_no_other_way() -> None:
    assert bearer_is("Bearer abc", "abc")
    assert bearer_is("bEaReR   abc ", "abc")
    for wrong in (None, "", "abc", "Bearer", "Bearer ab", "Bearer abcd", "Basic abc", "Bearer abc abc", "Bearer\tabc"):
        assert not bearer_is(wrong, "abc"), wrong
