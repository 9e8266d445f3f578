"""Who a connection comes from, and what one address may do before it has shown the token; for both listeners together.

An address here is text: an IPv4 address, the /64 network of an IPv6 client (which has all of it to draw addresses
from), or a trusted proxy's own address. `client_address` makes it, every other method takes it.
"""

from collections import OrderedDict
from collections.abc import Collection, Iterable, Iterator
from ipaddress import IPv4Address, IPv4Network, IPv6Address, IPv6Network, ip_address, ip_network
from itertools import islice
from typing import Final, NamedTuple

from bamboo.config import ServerConfig

WINDOW_S: Final = 60.0
"""What "per minute" means: it begins with an address's first wrong token."""

MAX_ADDRESSES: Final = 16384
"""How many addresses each table holds, about 6 MiB in all. What happens above is harmless (see AddressLimits), so
nobody needs to configure it."""

_IPV6_CLIENT_PREFIX: Final = 64  # what an access line or a virtual machine is given; fewer bits are the network's
_MAX_HOPS: Final = 32  # proxies behind each other that are believed; further ones are one too many for any network
_MAX_ADDRESS_CHARS: Final = 64  # "[" + the longest IPv6 address + "]:65535"; what is longer is not even parsed
_MAPPED: Final = IPv6Network("::ffff:0:0/96")  # IPv4 over an IPv6 socket, RFC 4291 section 2.5.5.2

_Address = IPv4Address | IPv6Address


class _Failures(NamedTuple):
    since: float
    times: int


class AddressLimits:
    """Counts, per client address, connections that have not shown the token and tokens that were wrong.

    It is used only where a token is set. Every method is synchronous, and `now` is seconds of any clock that does not
    go back.

    Both tables are bounded by MAX_ADDRESSES, whatever comes:

    - Connections: an address that finds the table full enters uncounted. The listeners' own caps still hold, and it
      takes as many open connections from as many addresses to get there.
    - Wrong tokens: the address whose minute ends first is forgotten, and may fail `max_failures_per_minute` times more.
      Whoever can fail from so many addresses within a minute gains nothing by it: each of them has as many attempts of
      its own.
    """

    def __init__(
        self, *, max_unauthenticated: int, max_failures_per_minute: int, trusted_proxies: Collection[str]
    ) -> None:
        self._max_unauthenticated = max_unauthenticated
        self._max_failures = max_failures_per_minute
        self._proxies = [_network(text) for text in trusted_proxies]
        self._entered: dict[str, int] = {}
        self._failures: OrderedDict[str, _Failures] = OrderedDict()  # by the beginnings of their minutes

    @classmethod
    def of(cls, config: ServerConfig) -> "AddressLimits":
        return cls(
            max_unauthenticated=config.max_unauthenticated_per_address,
            max_failures_per_minute=config.max_failed_auth_per_minute,
            trusted_proxies=config.trusted_proxies,
        )

    def __repr__(self) -> str:
        return f"<AddressLimits {len(self._entered)} with connections, {len(self._failures)} with wrong tokens>"

    def client_address(self, peer: str, forwarded_for: Iterable[str]) -> str:
        """The address of the client behind a connection from `peer`.

        `forwarded_for` are the values of the X-Forwarded-For headers, in order. They are believed only if `peer` is a
        trusted proxy: then it is the last entry that is not a trusted proxy's. What stands before an entry that is no
        address was not said by a proxy of ours: the last one that is known counts.
        """
        address = _parse(peer)
        if address is None:
            return peer  # from the kernel, as it names whatever this is
        if not self._is_proxy(address):
            return _client(address)
        for entry in islice(_from_the_last(forwarded_for), _MAX_HOPS):
            if not entry:
                continue
            behind = _parse(_without_port(entry))
            if behind is None:
                break
            if not self._is_proxy(behind):
                return _client(behind)
            address = behind
        return str(address)

    def trusts(self, peer: str) -> bool:
        """Whether this is the address of a trusted proxy."""
        if not self._proxies:
            return False
        address = _parse(peer)
        return address is not None and self._is_proxy(address)

    def try_enter(self, address: str) -> bool:
        """One more connection that has not shown the token; False: it is one too many, and nothing was counted.

        True means that `leave` is owed once. A trusted proxy's own address is not counted: it limits its clients.
        """
        if self.trusts(address):
            return True
        count = self._entered.get(address, 0)
        if count >= self._max_unauthenticated:
            return False
        if count or len(self._entered) < MAX_ADDRESSES:
            self._entered[address] = count + 1
        return True

    def leave(self, address: str) -> None:
        """A connection that entered has shown the token, or is gone."""
        count = self._entered.get(address, 0)
        if count > 1:
            self._entered[address] = count - 1
        else:
            self._entered.pop(address, None)  # it may have entered uncounted

    def retry_after_s(self, address: str, now: float) -> float | None:
        """How long an address that has shown too many wrong tokens is refused, whatever it shows; None: it is not."""
        failures = self._failures.get(address)
        if failures is None or failures.times < self._max_failures:
            return None
        rest_s = failures.since + WINDOW_S - now
        return rest_s if rest_s > 0 else None

    def failed(self, address: str, now: float) -> None:
        """The address has shown a wrong token."""
        failures = self._failures.get(address)
        if failures is not None and now < failures.since + WINDOW_S:
            self._failures[address] = failures._replace(times=failures.times + 1)
            return
        self._failures.pop(address, None)
        if len(self._failures) >= MAX_ADDRESSES:
            self._failures.popitem(last=False)
        self._failures[address] = _Failures(now, 1)

    def _is_proxy(self, address: _Address) -> bool:
        return any(address in network for network in self._proxies)


def _network(text: str) -> IPv4Network | IPv6Network:
    network = ip_network(text)
    if isinstance(network, IPv6Network) and network.subnet_of(_MAPPED):
        plain = network.network_address.ipv4_mapped
        assert plain is not None, "of a network inside of the mapped ones"
        return IPv4Network((plain, network.prefixlen - _MAPPED.prefixlen))
    return network


def _parse(text: str) -> _Address | None:
    """None: it is no address."""
    if len(text) > _MAX_ADDRESS_CHARS:
        return None
    try:
        address = ip_address(text.partition("%")[0])  # without the zone, which is this machine's name for an interface
    except ValueError:
        return None
    if isinstance(address, IPv6Address) and address.ipv4_mapped is not None:
        return address.ipv4_mapped
    return address


def _client(address: _Address) -> str:
    if isinstance(address, IPv4Address):
        return str(address)
    return str(IPv6Network((address, _IPV6_CLIENT_PREFIX), strict=False))


def _from_the_last(values: Iterable[str]) -> Iterator[str]:
    """The entries of a header that is a list (RFC 9110 section 5.6.1), the last one first, and possibly an empty one
    between two commas. It looks at no more than is asked for."""
    for value in reversed(list(values)):
        rest, comma = value, ","
        while comma:
            rest, comma, entry = rest.rpartition(",")
            yield entry.strip()


def _without_port(entry: str) -> str:
    """Some proxies add the port: `192.0.2.1:4711`, `[2001:db8::1]:4711`."""
    if entry.startswith("["):
        return entry[1:].partition("]")[0]
    name, colon, rest = entry.partition(":")
    return name if colon and ":" not in rest else entry
