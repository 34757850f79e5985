"""Which addresses a download may reach: public ones, and those that the user allows."""

import ipaddress
import socket
from collections.abc import Iterable
from functools import lru_cache

__all__ = ["Address", "Network", "RefusedError", "is_allowed", "parse_network", "resolve"]

Address = ipaddress.IPv4Address | ipaddress.IPv6Address
Network = ipaddress.IPv4Network | ipaddress.IPv6Network

#: RFC 6052: the last 32 bits are an IPv4 address that a gateway will reach.
_NAT64 = ipaddress.IPv6Network("64:ff9b::/96")
#: RFC 8215: the same for one's own network, at no fixed place in the address.
_LOCAL_NAT64 = ipaddress.IPv6Network("64:ff9b:1::/48")


class RefusedError(Exception):
    """A URL that must not be asked for, or an address that must not be reached."""


def parse_network(text: str) -> Network:
    """Return the network that an address or a CIDR range names.

    Raises
    ------
    ValueError
    """
    return ipaddress.ip_network(text.strip(), strict=False)


@lru_cache(maxsize=16)
def _networks(allowed: tuple[str, ...]) -> tuple[Network, ...]:
    return tuple(map(parse_network, allowed))


def _embedded(address: Address) -> Address:
    """Return the IPv4 address that an IPv6 one stands for; the address itself where there is none.

    Examples
    --------
    >>> _embedded(ipaddress.ip_address("::ffff:10.0.0.1"))
    IPv4Address('10.0.0.1')
    """
    if isinstance(address, ipaddress.IPv4Address):
        return address
    if address in _NAT64:
        return ipaddress.IPv4Address(int(address) & 0xFFFFFFFF)
    return address.ipv4_mapped or address.sixtofour or address


def is_allowed(address: Address, allowed: tuple[str, ...] = ()) -> bool:
    """Tell whether a download may connect to an address.

    Parameters
    ----------
    address : IPv4Address or IPv6Address
    allowed : tuple of str
        Addresses and CIDR ranges that may be reached although they are not public.

    Notes
    -----
    IPv6 addresses that carry an IPv4 one (mapped, 6to4, NAT64) are judged by that.
    """
    found = _embedded(address)
    if any(found in network for network in _networks(allowed)):
        return True
    is_local = found in _LOCAL_NAT64 or (
        isinstance(found, ipaddress.IPv6Address) and found.is_site_local
    )
    return found.is_global and not (found.is_multicast or found.is_reserved or is_local)


def resolve(host: str, port: int, allowed: tuple[str, ...]) -> list[tuple[int, tuple[str, int]]]:
    """Return family and address of a host, each of which may be connected to as it stands.

    Numbers in any form that the system takes for an address (`0x7f.1`, `2130706433`) are judged by
    the address that they become.

    Raises
    ------
    RefusedError
        If one of its addresses is not allowed, even if others are: public names have none.
    OSError
        If it has none.
    """
    found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    places = [(int(family), (str(place[0]), port)) for family, _, _, _, place in found]
    refused = _first_refused((place[0] for _, place in places), allowed)
    if refused is not None:
        raise RefusedError(f"address {refused} is not public")
    return list(dict.fromkeys(places))


def _first_refused(texts: Iterable[str], allowed: tuple[str, ...]) -> str | None:
    return next((t for t in texts if not is_allowed(ipaddress.ip_address(t), allowed)), None)
