# SPDX-License-Identifier: Apache-2.0
"""Handshakes by hand: comms that share no memory, somebody in between, and what goes over the wire."""

from __future__ import annotations

import contextlib
import dataclasses
import socket
import struct
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from bodies import SMALL
from waits import SOON_S

import m2n
from m2n import bootstrap
from m2n.bootstrap import Address
from m2n.channel import join_address, split_address
from m2n.deadline import Deadline
from m2n.handshake import Identity
from m2n.interfaces import host_name
from m2n.listener import Listener
from m2n.store import PathStore

KEY = "a key of sixteen characters"


class FakeNative:
    """A comm that shares no memory."""

    def __init__(self, is_over_network: bool = True) -> None:
        self.is_over_network = is_over_network
        self.offered: list[tuple[int, int]] = []
        self.watched: list[tuple[int, float, float]] = []
        self.withdrawn: list[int] = []
        self.displaces: list[str] = []
        self.cannot_attach = ""
        self.is_watched = threading.Event()

    def offer(self, rank: int, life: int, is_over_network: bool, link: int) -> dict[str, Any]:
        assert is_over_network == self.is_over_network
        self.offered.append((rank, life))
        return {
            "link": link,
            "peer_idx": 0,
            "process": 5,
            "device": "",
            "wakes": True,
            "objects": [(-1, 1), (-1, 2), (-1, 3)],
            "address": b"",
        }

    def attach(self, *about: Any) -> None:
        if self.cannot_attach:
            raise m2n.SetupError(self.cannot_attach)
        if about[-1] >= 0:
            self.data = socket.socket(fileno=about[-1])

    def withdraw(self, peer_idx: int) -> None:
        self.withdrawn.append(peer_idx)

    def watch(
        self, peer_idx: int, fd: int, pidfd: int, send_every_s: float, lost_after_s: float, displaces: str
    ) -> None:
        socket.socket(fileno=fd).close()
        self.displaces.append(displaces)
        self.watched.append((pidfd, send_every_s, lost_after_s))
        self.is_watched.set()


def identity(role: str, **about: Any) -> Identity:
    return Identity("default", "default", role, 0, SMALL, **{"transport": "auto", **about})


@contextlib.contextmanager
def listener(bind: str = "127.0.0.1", **about: Any) -> Iterator[tuple[Listener, FakeNative, Address]]:
    native, who = FakeNative(), identity("expert", **about)
    listening = Listener(native, who, bind)
    try:
        yield listening, native, Address(who.life, listening.address, "there", listening.network_address)
    finally:
        listening.close()


def greet(address: Address, **about: Any) -> FakeNative:
    native = FakeNative()
    bootstrap._greet(native, identity("attention", **about), address, 0, Deadline(SOON_S))
    return native


def read_frame(connection: socket.socket) -> bytes:
    (size,) = struct.unpack(">I", connection.recv(4, socket.MSG_WAITALL))
    return connection.recv(size, socket.MSG_WAITALL)


def frame(data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + data


NEAR_SPEAKS = (True, False, True, False, False, True)  # hello, hello, introduction, token, introduction, "joined"


@contextlib.contextmanager
def between(address: Address, change: Callable[[int, bytes], bytes]) -> Iterator[tuple[Address, list[bytes]]]:
    """Somebody on the way who passes on frames, changed by change(number, frame); the address to use, what was seen:
    those of NEAR_SPEAKS, then the hello of the data connection."""
    seen: list[bytes] = []
    there = split_address(address.network_address)

    def pass_on_data(near: socket.socket, far: socket.socket) -> bytes:
        hello = near.recv(52, socket.MSG_WAITALL)
        far.sendall(change(len(NEAR_SPEAKS), hello))
        near.sendall(far.recv(32, socket.MSG_WAITALL))
        return hello

    with socket.create_server(("127.0.0.1", 0)) as server:

        def pass_on() -> None:
            with server.accept()[0] as near, socket.create_connection(there) as far:
                hello = b""
                for number, near_speaks in enumerate(NEAR_SPEAKS):
                    source, to = (near, far) if near_speaks else (far, near)
                    seen.append(read_frame(source))
                    to.sendall(frame(change(number, seen[-1])))
                    if number == 3:
                        with server.accept()[0] as near_data, socket.create_connection(there) as far_data:
                            hello = pass_on_data(near_data, far_data)
                seen.append(hello)

        def run() -> None:
            with contextlib.suppress(OSError, struct.error):
                pass_on()

        thread = threading.Thread(target=run, daemon=True)
        thread.start()
        yield dataclasses.replace(address, network_address=join_address(*server.getsockname()[:2])), seen
        server.shutdown(socket.SHUT_RDWR)  # it may still wait for a data connection
        thread.join(SOON_S)


@contextlib.contextmanager
def in_this_host(transport: str = "tcp") -> Iterator[tuple[Listener, FakeNative, Address]]:
    native, who = FakeNative(), identity("expert", transport=transport)
    listening = Listener(native, who)
    try:
        yield listening, native, Address(who.life, listening.address, host_name(), "")
    finally:
        listening.close()


def published(store: Path) -> Address:
    key = identity("attention").store_key("expert", 0)
    return Address.parse(key, PathStore(store).get(key))
