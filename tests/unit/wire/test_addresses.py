"""Who a connection comes from, and what one address may do."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bamboo.config import ServerConfig
from bamboo.wire.addresses import MAX_ADDRESSES, WINDOW_S, AddressLimits

PROXIES = ("10.0.0.0/8", "2001:db8:ffff::/48", "192.0.2.7")


def limits(*, unauthenticated: int = 2, failures: int = 3, proxies: tuple[str, ...] = PROXIES) -> AddressLimits:
    return AddressLimits(max_unauthenticated=unauthenticated, max_failures_per_minute=failures, trusted_proxies=proxies)


# Who it is.


@pytest.mark.parametrize(
    ("peer", "address"),
    [
        ("203.0.113.9", "203.0.113.9"),
        ("::ffff:203.0.113.9", "203.0.113.9"),
        ("::FFFF:CB00:7109", "203.0.113.9"),
        ("2001:db8:1:2:3:4:5:6", "2001:db8:1:2::/64"),
        ("2001:db8:1:2::", "2001:db8:1:2::/64"),
        ("fe80::1%eth0", "fe80::/64"),
        ("::1", "::/64"),
        ("", ""),
        ("/run/socket", "/run/socket"),
    ],
)
def test_a_client_is_its_address_and_over_ipv6_its_network(peer: str, address: str) -> None:
    assert limits().client_address(peer, ()) == address


@pytest.mark.parametrize("forwarded_for", [["203.0.113.9"], ["10.0.0.1"], ["203.0.113.9, 10.0.0.1"]])
def test_what_a_stranger_says_of_others_is_not_believed(forwarded_for: list[str]) -> None:
    assert limits().client_address("198.51.100.1", forwarded_for) == "198.51.100.1"


@pytest.mark.parametrize(
    ("forwarded_for", "address"),
    [
        (["203.0.113.9"], "203.0.113.9"),
        (["198.51.100.1, 203.0.113.9"], "203.0.113.9"),  # what the client itself sent stands before
        (["198.51.100.1", "203.0.113.9"], "203.0.113.9"),
        (["198.51.100.1,203.0.113.9,10.1.1.1", "192.0.2.7"], "203.0.113.9"),
        (["::ffff:203.0.113.9"], "203.0.113.9"),
        (["2001:db8:1:2:3::9"], "2001:db8:1:2::/64"),
        (["2001:db8:1:2:3::9, 2001:db8:ffff::1"], "2001:db8:1:2::/64"),
        (["203.0.113.9:4711"], "203.0.113.9"),
        (["[2001:db8:1:2::9]:4711"], "2001:db8:1:2::/64"),
        (["[2001:db8:1:2::9]"], "2001:db8:1:2::/64"),
        ([" 203.0.113.9 , "], "203.0.113.9"),
        (["203.0.113.9", ""], "203.0.113.9"),
        ([",,203.0.113.9,,"], "203.0.113.9"),
    ],
)
def test_behind_a_trusted_proxy_a_client_is_the_last_that_is_no_proxy(forwarded_for: list[str], address: str) -> None:
    for proxy in ("10.0.0.1", "::ffff:10.0.0.1", "2001:db8:ffff::1", "192.0.2.7"):
        assert limits().client_address(proxy, forwarded_for) == address, proxy


@pytest.mark.parametrize(
    ("forwarded_for", "address"),
    [
        ([], "10.0.0.1"),
        ([""], "10.0.0.1"),
        (["unknown"], "10.0.0.1"),
        (["203.0.113.9, unknown"], "10.0.0.1"),
        (["203.0.113.9, unknown, 10.0.0.2"], "10.0.0.2"),
        (["10.0.0.3, 10.0.0.2"], "10.0.0.3"),
        (["203.0.113.9, " + "9" * 65], "10.0.0.1"),
        (["[203.0.113.9"], "203.0.113.9"),
        (["2001:db8:ffff::9"], "2001:db8:ffff::9"),
    ],
)
def test_without_a_client_it_is_the_last_proxy_that_is_known(forwarded_for: list[str], address: str) -> None:
    assert limits().client_address("10.0.0.1", forwarded_for) == address


def test_proxies_without_end_are_not_looked_at() -> None:
    endless = ", ".join(["203.0.113.9", *["10.0.0.2"] * 5000])

    assert limits().client_address("10.0.0.1", [endless]) == "10.0.0.2"


def test_a_network_of_mapped_addresses_is_one_of_ipv4() -> None:
    mapped = limits(proxies=("::ffff:10.0.0.0/104",))

    assert mapped.trusts("10.1.2.3")
    assert mapped.trusts("::ffff:10.1.2.3")
    assert not mapped.trusts("11.0.0.0")
    assert not mapped.trusts("::1")


@given(st.lists(st.text(max_size=80), max_size=5))
def test_whatever_a_header_has_an_address_comes_of_it(forwarded_for: list[str]) -> None:
    address = limits().client_address("10.0.0.1", forwarded_for)

    assert len(address) < 64
    assert address.isascii()


# Connections that have not shown the token.


def test_an_address_has_so_many_connections_and_no_more() -> None:
    counted = limits(unauthenticated=2)

    assert [counted.try_enter("a") for _ in range(3)] == [True, True, False]
    assert counted.try_enter("b")
    counted.leave("a")
    assert [counted.try_enter("a") for _ in range(2)] == [True, False]


def test_an_address_that_was_refused_owes_nothing() -> None:
    counted = limits(unauthenticated=1)
    assert counted.try_enter("a")

    for _ in range(5):
        assert not counted.try_enter("a")
    counted.leave("a")

    assert counted.try_enter("a")


def test_a_proxy_may_have_any_number() -> None:
    counted = limits(unauthenticated=1)
    proxy = counted.client_address("2001:db8:ffff::1", ())

    assert all(counted.try_enter(address) for address in ("10.0.0.1", proxy) for _ in range(10))
    counted.leave(proxy)


# Wrong tokens.


def test_an_address_may_be_wrong_so_often_within_a_minute() -> None:
    counted = limits(failures=3)

    for second in (0, 10, 20):
        assert counted.retry_after_s("a", second) is None
        counted.failed("a", second)

    assert counted.retry_after_s("a", 20) == WINDOW_S - 20
    assert counted.retry_after_s("a", 59.5) == 0.5
    assert counted.retry_after_s("b", 20) is None


def test_the_next_minute_begins_with_the_next_wrong_token() -> None:
    counted = limits(failures=2)
    for second in (0, 1):
        counted.failed("a", second)
    assert counted.retry_after_s("a", WINDOW_S) is None

    counted.failed("a", 100)
    assert counted.retry_after_s("a", 100) is None
    counted.failed("a", 130)

    assert counted.retry_after_s("a", 130) == 30


def test_one_more_wrong_token_while_refused_does_not_prolong_it() -> None:
    counted = limits(failures=1)
    for second in (0, 30):
        counted.failed("a", second)

    assert counted.retry_after_s("a", 30) == 30
    assert counted.retry_after_s("a", WINDOW_S) is None


# Bounds.


def test_a_million_addresses_take_no_more_room_than_the_tables_have() -> None:
    counted = limits(proxies=())

    for number in range(1_000_000):
        assert counted.try_enter(f"address {number}")
        counted.failed(f"address {number}", number / 1e6)

    assert len(counted._entered) == MAX_ADDRESSES
    assert len(counted._failures) == MAX_ADDRESSES


def test_the_address_that_is_forgotten_is_the_one_whose_minute_ends_first() -> None:
    counted = limits(failures=2)
    for name in ("old", "young"):
        counted.failed(name, 0)
    counted.failed("old", 70)  # its second minute
    for second in (70, 71):
        counted.failed("refused", second)

    for number in range(MAX_ADDRESSES - 2):
        counted.failed(f"address {number}", 72)

    assert "young" not in counted._failures
    assert "old" in counted._failures
    assert counted.retry_after_s("refused", 72) == 58
    assert counted.retry_after_s("address 0", 72) is None


def test_an_address_that_entered_uncounted_takes_nobodys_place_when_it_leaves() -> None:
    counted = limits(unauthenticated=1)
    for number in range(MAX_ADDRESSES):
        assert counted.try_enter(f"address {number}")

    assert all(counted.try_enter("uncounted") for _ in range(3))
    for _ in range(3):
        counted.leave("uncounted")

    assert not counted.try_enter("address 0")
    counted.leave("address 0")
    assert [counted.try_enter("uncounted") for _ in range(2)] == [True, False]


def test_the_limits_are_those_of_the_configuration() -> None:
    config = ServerConfig(
        max_unauthenticated_per_address=1, max_failed_auth_per_minute=1, trusted_proxies=("192.0.2.1",)
    )
    counted = AddressLimits.of(config)

    assert [counted.try_enter("a") for _ in range(2)] == [True, False]
    counted.failed("a", 0)
    assert counted.retry_after_s("a", 0) is not None
    assert counted.trusts("192.0.2.1")
