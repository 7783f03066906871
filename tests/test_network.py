"""The network interface towards a host."""

from __future__ import annotations

import socket

import pytest

from unlocked.cluster import network
from unlocked.cluster.network import Interface, interface_to, interfaces
from unlocked.errors import CannotJoin, InvalidChoice

HERE = [
    Interface("lo", "127.0.0.1"),
    Interface("lo", "::1"),
    Interface("eth7", "10.9.8.7"),
    Interface("eth7", "fe80::5%eth7"),
    Interface("ib0", "10.1.1.1"),
]


@pytest.fixture
def machine(monkeypatch):
    """A machine with those interfaces."""
    monkeypatch.setattr(network, "interfaces", lambda: list(HERE))


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost"])
def test_to_this_machine_it_is_the_loopback(host):
    found = interface_to(host)
    assert found.name.startswith("lo") and found.loopback


def test_every_address_of_this_machine_is_reached_through_the_interface_that_has_it():
    found = interfaces()
    assert found and all(name in dict(map(reversed, socket.if_nameindex())) for name, _ in found)
    for interface in found:
        if "%" not in interface.address:
            assert interface_to(interface.address) == interface


def test_an_address_on_the_route_gives_its_interface(machine, monkeypatch):
    monkeypatch.setattr(network, "_local_address", lambda host: {"far": "10.1.1.1", "near": "10.9.8.7"}[host])
    assert interface_to("far") == Interface("ib0", "10.1.1.1")
    assert interface_to("near").name == "eth7"
    assert not interface_to("near").loopback


@pytest.mark.parametrize(
    "asked, found",
    [
        ("eth7", HERE[2]),
        ("10.1.1.1", HERE[4]),
        ("::1", HERE[1]),
        ("0:0:0:0:0:0:0:1", HERE[1]),
        ("fe80::5", HERE[3]),
        ("fe80::5%eth7", HERE[3]),
    ],
)
def test_another_one_by_name_or_address(machine, asked, found):
    assert interface_to("no route is needed then", asked) == found


@pytest.mark.parametrize("asked", ["eth0", "10.1.1.2", "::2", ""])
def test_an_unknown_one_is_refused_and_those_there_are_listed(machine, asked):
    with pytest.raises(InvalidChoice) as caught:
        interface_to("127.0.0.1", asked)
    assert repr(asked) in str(caught.value)
    assert all(str(interface) in str(caught.value) for interface in HERE)


@pytest.mark.parametrize("host", ["no-such-host.invalid", "x" * 80])
def test_an_unknown_host_is_a_sentence(host):
    with pytest.raises(CannotJoin, match=f"rendezvous host '{host}' is unknown on .*give a name"):
        interface_to(host)


def test_no_route_is_a_sentence(monkeypatch):
    def unreachable(self: socket.socket, target: object) -> None:
        raise OSError(101, "Network is unreachable")

    monkeypatch.setattr(network.socket.socket, "connect", unreachable)
    with pytest.raises(
        CannotJoin, match=r"No route leads from .* to the rendezvous host '192.0.2.77'.*Network is unreach"
    ):
        interface_to("192.0.2.77")


def test_a_second_address_of_the_name_is_tried(monkeypatch):
    """localhost is often both ::1 and 127.0.0.1, and only one of them works."""
    targets = [
        (socket.AF_INET, socket.SOCK_DGRAM, 17, "", ("255.255.255.255", 9)),  # not without SO_BROADCAST
        (socket.AF_INET, socket.SOCK_DGRAM, 17, "", ("127.0.0.1", 9)),
    ]
    monkeypatch.setattr(network.socket, "getaddrinfo", lambda *given, **named: targets)
    assert interface_to("both").address == "127.0.0.1"
