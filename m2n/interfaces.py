# SPDX-License-Identifier: Apache-2.0
"""This host and its addresses: what a rank tells others, so that they know how to reach it."""

from __future__ import annotations

import fcntl
import ipaddress
import os
import socket
import struct
from pathlib import Path

from ._C import SetupError

_SIOCGIFADDR = 0x8915
_LINK = "20"  # the scope of an IPv6 address, as the kernel prints it


def host_name() -> str:
    """Equal for processes that can meet over a Unix socket: of one running kernel, in one network namespace."""
    boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    return f"{boot}/{os.stat('/proc/self/ns/net').st_ino}"


def addresses() -> dict[str, list[str]]:
    """The addresses of each network interface that has any: the IPv4 one first, then those of IPv6 that others can
    connect to (not those of a link, fe80::, which name no interface)."""
    found: dict[str, list[str]] = {}
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as any_socket:
        for _, name in socket.if_nameindex():
            try:
                answer = fcntl.ioctl(any_socket, _SIOCGIFADDR, struct.pack("256s", name.encode()))
            except OSError:  # it has none
                continue
            found[name] = [socket.inet_ntoa(answer[20:24])]
    try:
        lines = Path("/proc/net/if_inet6").read_text().splitlines()
    except OSError:  # a kernel without IPv6
        return found
    for number, _, _, scope, _, name in (line.split() for line in lines):
        if scope != _LINK:
            found.setdefault(name, []).append(str(ipaddress.IPv6Address(bytes.fromhex(number))))
    return found


def describe_addresses() -> str:
    """In words, as "eth0 (10.0.0.5, fd01::5), lo (127.0.0.1)"."""
    return ", ".join(f"{name} ({', '.join(own)})" for name, own in addresses().items()) or "none"


def resolve_bind(bind: str) -> tuple[str, int]:
    """The address and port (0: any) that `Config.bind` names: an address, an interface, or a network (10.1.0.0/16,
    fd01::/64), each with or without :port; one of IPv6 with a port stands in brackets.

    Raises:
        SetupError: this host has no such interface, or no address in that network. ValueError: it names none.
    """
    name, port = _split_port(bind)
    own = addresses()
    have = f"this host has {describe_addresses()}"
    if name in own:
        return own[name][0], port
    if "/" in name:
        try:
            network = ipaddress.ip_network(name)
        except ValueError as error:
            raise ValueError(f"bind: {error}") from None
        inside = [address for each in own.values() for address in each if ipaddress.ip_address(address) in network]
        if not inside:
            raise SetupError(f"bind: no address of this host is in the network {name}; {have}")
        return inside[0], port
    try:
        address = ipaddress.ip_address(name)
    except ValueError:
        raise SetupError(f"bind: there is no network interface {name!r} with an address; {have}") from None
    if address.is_unspecified:
        raise ValueError(f"bind: {name} stands for all interfaces, and nobody can connect to that; {have}")
    return name, port


def _split_port(bind: str) -> tuple[str, int]:
    if bind.count(":") == 1 or "]:" in bind:
        name, _, port = bind.rpartition(":")
    else:
        name, port = bind, "0"
    name = name.removeprefix("[").removesuffix("]")
    if not name or not port.isdecimal() or int(port) > 65535:
        raise ValueError(f"bind: expected an address, an interface or a network, with or without :port, got {bind!r}")
    return name, int(port)
