"""Which network interface this process uses: that of the route to the rendezvous host, unless one is asked for.

The route is asked for with a UDP socket: to connect it sends nothing, but lets the system choose the local address.
"""

from __future__ import annotations

import ctypes
import ipaddress
import socket
import sys
from collections.abc import Iterator
from typing import NamedTuple

from ..errors import CannotJoin, InvalidChoice

_UP = 1  # IFF_UP
_ANY_PORT = 9  # nothing is sent to it


class Interface(NamedTuple):
    """A network interface by name and one of its addresses (IPv4 or IPv6), e.g. `eth0` and `192.0.2.2`."""

    name: str
    address: str

    @property
    def loopback(self) -> bool:
        """Whether only this machine can be reached through it."""
        return _plain(self.address).is_loopback

    def __str__(self) -> str:
        return f"{self.name} ({self.address})"


def interface_to(host: str, override: str | None = None) -> Interface:
    """The interface of the route to `host`, or the one named by `override`.

    Args:
        host: name or address of the rendezvous host. One that is this machine's loopback gives the loopback interface; one
            that is this machine by an address others can reach gives the interface with that address.
        override: name of an interface, or an address of one.

    Raises CannotJoin: the host's name is unknown, or no route leads to it. InvalidChoice: there is no such interface.
    """
    there_are = interfaces()
    if override is not None:
        return _asked_for(override, there_are)
    address = _local_address(host)
    for interface in there_are:
        if _plain(interface.address) == _plain(address):
            return interface
    return Interface("unknown", address)


def interfaces() -> list[Interface]:
    """All addresses of the interfaces that are up: by interface, IPv4 first, addresses of one link (fe80::) last."""
    found = [(name, address) for name, address in _listed() if address is not None]
    order = list(dict.fromkeys(name for name, _ in found))
    found.sort(key=lambda row: (order.index(row[0]), _plain(row[1]).version, _plain(row[1]).is_link_local))
    return [Interface(name, address) for name, address in found]


def _asked_for(override: str, there_are: list[Interface]) -> Interface:
    for interface in there_are:
        if override == interface.name or _same(override, interface.address):
            return interface
    raise InvalidChoice(
        f"There is no network interface {override!r} with an address on {socket.gethostname()}; "
        f"there are: {', '.join(map(str, there_are)) or 'none'}. Give a name or an address of these."
    )


def _local_address(host: str) -> str:
    """The address this machine would use towards `host`."""
    try:
        targets = socket.getaddrinfo(host, _ANY_PORT, type=socket.SOCK_DGRAM)
    except (OSError, UnicodeError) as error:
        raise CannotJoin(
            f"The rendezvous host {host!r} is unknown on {socket.gethostname()} ({_reason(error)}); give a name that "
            "resolves there, or an address."
        ) from error
    why: OSError | None = None
    for family, kind, protocol, _, target in targets:
        try:
            with socket.socket(family, kind, protocol) as probe:
                probe.connect(target)
                return str(probe.getsockname()[0])
        except OSError as error:
            why = error
    raise CannotJoin(
        f"No route leads from {socket.gethostname()} to the rendezvous host {host!r} ({_reason(why)}); its interfaces are: "
        f"{', '.join(map(str, interfaces())) or 'none'}. Check the address and the network."
    )


def _reason(error: BaseException | None) -> str:
    return str(getattr(error, "strerror", None) or error)


def _plain(address: str) -> ipaddress.IPv4Address | ipaddress.IPv6Address:
    return ipaddress.ip_address(address.partition("%")[0])


def _same(given: str, address: str) -> bool:
    try:
        return _plain(given) == _plain(address)
    except ValueError:  # a name, not an address
        return False


class _Row(ctypes.Structure):
    """`struct ifaddrs` of the C library, as far as it is read here."""


_Row._fields_ = [
    ("next", ctypes.POINTER(_Row)),
    ("name", ctypes.c_char_p),
    ("flags", ctypes.c_uint),
    ("address", ctypes.c_void_p),
]


def _listed() -> Iterator[tuple[str, str | None]]:
    """(name, address) of every interface that is up, by getifaddrs; None for an address of neither IP."""
    library, first = ctypes.CDLL(None, use_errno=True), ctypes.POINTER(_Row)()
    if library.getifaddrs(ctypes.byref(first)) != 0:
        raise OSError(ctypes.get_errno(), "the network interfaces cannot be listed")
    try:
        row = first
        while row:
            if row.contents.flags & _UP and row.contents.address:
                yield row.contents.name.decode(), _address(row.contents.address, row.contents.name.decode())
            row = row.contents.next
    finally:
        library.freeifaddrs(first)


def _address(place: int, name: str) -> str | None:
    """The IP address in the `struct sockaddr` at that place in memory."""
    head = ctypes.string_at(place, 2)
    family = head[1] if sys.platform == "darwin" else int.from_bytes(head, sys.byteorder)  # BSD: length, family
    if family == socket.AF_INET:
        return socket.inet_ntop(family, ctypes.string_at(place + 4, 4))
    if family == socket.AF_INET6:
        address = socket.inet_ntop(family, ctypes.string_at(place + 8, 16))
        return f"{address}%{name}" if address.startswith("fe80:") else address
    return None
