"""One connection among its address's connections that have not shown the token."""

from bamboo.web.peer import Peer
from bamboo.wire.addresses import AddressLimits


def limits(unauthenticated: int) -> AddressLimits:
    return AddressLimits(max_unauthenticated=unauthenticated, max_failures_per_minute=1, trusted_proxies=("192.0.2.9",))


def room(addresses: AddressLimits, host: str = "192.0.2.1") -> int:
    """How many more connections this address may have."""
    peers = [Peer(host, addresses) for _ in range(10)]
    entered = [peer for peer in peers if peer.try_enter()]
    for peer in entered:
        peer.leave()
    return len(entered)


def test_a_connection_gives_its_place_back_once_whatever_it_does() -> None:
    addresses = limits(3)
    other, peer = Peer("192.0.2.1", addresses), Peer("192.0.2.1", addresses)
    assert other.try_enter()
    assert peer.try_enter()
    assert room(addresses) == 1

    for _ in range(3):
        peer.shown()
    peer.leave()
    peer.leave()

    assert peer.has_shown_token
    assert room(addresses) == 2


def test_a_connection_that_was_refused_has_no_place_to_give_back() -> None:
    addresses = limits(1)
    peer, refused = Peer("192.0.2.1", addresses), Peer("192.0.2.1", addresses)
    assert peer.try_enter()
    assert not refused.try_enter()

    refused.leave()

    assert room(addresses) == 0


def test_connections_of_one_ipv6_network_are_of_one_client() -> None:
    addresses = limits(1)
    assert Peer("2001:db8:1:2::1", addresses).try_enter()

    assert not Peer("2001:db8:1:2:ffff::1", addresses).try_enter()
    assert Peer("2001:db8:1:3::1", addresses).try_enter()


def test_what_one_client_of_a_proxy_has_shown_says_nothing_of_the_next() -> None:
    peer = Peer("192.0.2.9", limits(1))
    assert peer.try_enter()

    peer.shown()

    assert peer.is_proxy
    assert not peer.has_shown_token


def test_without_a_token_to_show_nothing_is_counted() -> None:
    peers = [Peer("192.0.2.1", None) for _ in range(3)]

    assert all(peer.try_enter() for peer in peers)
    for peer in peers:
        peer.leave()
