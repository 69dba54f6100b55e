# SPDX-License-Identifier: Apache-2.0
"""What two ranks tell each other before they are linked, how each checks it, and the steps by which a link comes about.

    attention rank                              expert rank
    offer, introduction ─────────────────────►  checks it
    data connection  ◄──────────── token ────   (TCP between hosts only; data_connection.py)
                     ─────── proof, proof ───►  offer, attach
    attach           ◄──────── introduction ──
    "joined", watch  ─────────────────────────►  watch

An index is offered once the other side is known to be right, and withdrawn when what follows fails.
"""

from __future__ import annotations

import base64
import binascii
import dataclasses
import os
import secrets
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Protocol

from ._C import SetupError
from .channel import PROTOCOL_VERSION, Channel, Refused, close_all
from .notes import printable
from .shape import MAX_RANK, Shape

_MAX_DEVICE_CHARS = 64
_MAX_HOST_CHARS = 64
_MAX_STORE_CHARS = 1024
_NUM_OBJECTS = 3  # rows, small, wake
_MAX_ADDRESS_BYTES = 32 * 1024
_HEARTBEATS_TO_LOSS = 3
_LEAST_HEARTBEAT_S, _MOST_HEARTBEAT_S = 0.01, 3600.0
_MAX_DISPLACES_BYTES = 512
NETWORKS = ("tcp", "ucx")  # transports that need no common memory


class NativeComm(Protocol):
    """The native half of a comm, as far as the handshake needs it."""

    def offer(self, rank: int, life: int, is_over_network: bool, link: int) -> dict[str, Any]: ...
    def attach(
        self,
        peer_idx: int,
        objects: list[tuple[int, int]],
        process: int,
        device: str,
        wakes: bool,
        address: bytes,
        data_fd: int,
    ) -> None: ...
    def withdraw(self, peer_idx: int) -> None: ...
    def watch(
        self,
        peer_idx: int,
        connection_fd: int,
        pidfd: int,
        send_every_s: float,
        lost_after_s: float,
        displaces: str,
    ) -> None: ...


@dataclasses.dataclass(frozen=True)
class Identity:
    """Who a comm is, and how it may be reached. A restarted rank has another life."""

    job: str
    name: str
    role: str
    rank: int
    shape: Shape
    transport: str = "shm"
    heartbeat_s: float = 1.0
    job_key: str | None = dataclasses.field(default=None, repr=False)
    insecure: bool = False
    store: str = ""  # through which it is found, in words
    # Of each rank that has joined the last life, and what its process said about itself.
    met: dict[int, tuple[int, str]] = dataclasses.field(default_factory=dict, repr=False, compare=False)
    # Of each rank that was connected to the last life, and how many links with it were begun.
    begun: dict[int, tuple[int, int]] = dataclasses.field(default_factory=dict, repr=False, compare=False)
    life: int = dataclasses.field(default_factory=lambda: secrets.randbits(63) | 1)

    def store_key(self, role: str, rank: int) -> str:
        """The key under which a rank of this job and name publishes itself."""
        return f"m2n/{self.job}/{self.name}/{role}/{rank}"

    def next_link(self, rank: int, life: int) -> int:
        """The number of a link that is begun now: each has its own, also where it comes to nothing, for the other side
        may not know that yet."""
        last_life, number = self.begun.get(rank, (life, 0))
        self.begun[rank] = (life, number + 1 if life == last_life else 1)
        return self.begun[rank][1]

    def __str__(self) -> str:
        return f"{self.role} rank {self.rank}"


def whereabouts(identity: Identity) -> str:
    """This process, and the store through which it is found: what helps to tell why ranks do not meet."""
    return _whereabouts(os.getpid(), socket.gethostname(), identity.store)


def _whereabouts(pid: Any, host: Any, store: Any) -> str:
    return f"process {pid} on {printable(host, _MAX_HOST_CHARS)}, store {printable(store, 100) or 'unknown'}"


def link_transport(identity: Identity, channel: Channel) -> str:
    """By what the rows of this link go. Raises Refused where this comm's transport does not reach so far."""
    if identity.transport == "auto":
        return "shm" if channel.is_local else "tcp"
    if not channel.is_local and identity.transport not in NETWORKS:
        raise Refused(
            f"handshake: the other rank is on another host or in another network namespace, and {identity} has the "
            f"transport {identity.transport!r}, which reaches only its own; use Config(transport='auto'), 'tcp' or "
            "'ucx', without faults"
        )
    return identity.transport


def introduction(
    identity: Identity, offer: dict[str, Any], transport: str, needs_heartbeats: bool = False
) -> dict[str, Any]:
    return {
        "m2n": PROTOCOL_VERSION,
        "role": identity.role,
        "rank": identity.rank,
        "life": identity.life,
        "link": offer["link"],
        "shape": dataclasses.asdict(identity.shape),
        "transport": transport,
        "heartbeat_s": identity.heartbeat_s,
        "needs_heartbeats": needs_heartbeats,
        "pid": os.getpid(),
        "host": socket.gethostname()[:_MAX_HOST_CHARS],
        "store": identity.store[:_MAX_STORE_CHARS],
        "process": offer["process"],
        "device": offer["device"],
        "wakes": offer["wakes"],
        "objects": [object_id for _, object_id in offer["objects"]],
        "has_fd": [fd >= 0 for fd, _ in offer["objects"]],
        "door": base64.b64encode(offer["address"]).decode(),
    }


def _address(message: dict[str, Any], theirs: str) -> bytes:
    """How the peer is reached over a network; empty where its memory is shared."""
    text = message.get("door")
    try:
        if not isinstance(text, str) or len(text) > _MAX_ADDRESS_BYTES // 3 * 4:
            raise ValueError
        return base64.b64decode(text, validate=True)
    except (ValueError, binascii.Error):
        raise SetupError(f"handshake: {theirs} does not say how it is reached") from None


def check_introduction(identity: Identity, message: dict[str, Any], num_fds: int, transport: str) -> None:
    """Both sides check the other's introduction. Raises SetupError with what differs."""
    theirs = printable(f"{message.get('role')} rank {message.get('rank')}", 60)
    if message.get("m2n") != PROTOCOL_VERSION:
        raise SetupError(
            f"handshake: {theirs} speaks version {printable(message.get('m2n'), 20)} of the protocol, {identity} "
            f"speaks {PROTOCOL_VERSION}; install the same m2n on both"
        )
    expected_role = {"attention": "expert", "expert": "attention"}[identity.role]
    if message.get("role") != expected_role:
        raise SetupError(f"handshake: {identity} links with {expected_role} ranks only, not with {theirs}")
    shape = message.get("shape")
    if not isinstance(shape, dict):
        raise SetupError(f"handshake: {theirs} sent no shape")
    for field, ours in dataclasses.asdict(identity.shape).items():
        if shape.get(field) != ours:
            raise SetupError(
                f"handshake: shapes differ in {field}: {theirs} has {printable(repr(shape.get(field)), 40)}, "
                f"{identity} has {ours!r}; "
                "all ranks of a comm need the same Shape"
            )
    if message.get("transport") != transport:
        raise SetupError(
            f"handshake: {theirs} uses the transport {str(message.get('transport'))[:40]!r} for this link, {identity} "
            f"{transport!r}; ranks of one host need the same, and a rank on a GPU links with ranks on CPUs when it has "
            "Config(transport='shm')"
        )
    objects, has_fd = message.get("objects"), message.get("has_fd")
    if not isinstance(objects, list) or len(objects) != _NUM_OBJECTS:
        raise SetupError(f"handshake: {theirs} sent no memory objects")
    if not isinstance(has_fd, list) or [type(flag) for flag in has_fd] != [bool] * _NUM_OBJECTS:
        raise SetupError(f"handshake: {theirs} does not say which memory objects have descriptors")
    if sum(has_fd) != num_fds:
        raise SetupError(f"handshake: expected {sum(has_fd)} file descriptors from {theirs}, got {num_fds}")
    device, wakes = message.get("device"), message.get("wakes")
    if not isinstance(device, str) or len(device) > _MAX_DEVICE_CHARS or not isinstance(wakes, bool):
        raise SetupError(f"handshake: {theirs} does not say where its memory lies")
    _address(message, theirs)
    _check_about(message, theirs)
    heartbeat_s: Any = message.get("heartbeat_s")
    if type(heartbeat_s) not in (int, float) or not _LEAST_HEARTBEAT_S <= heartbeat_s <= _MOST_HEARTBEAT_S:
        raise SetupError(f"handshake: {theirs} sends heartbeats every {printable(heartbeat_s, 40)!r} s")
    numbers = [(message.get("rank"), MAX_RANK), (message.get("link"), 2**32 - 1), (message.get("pid"), 2**31 - 1)]
    numbers += [(number, 2**64 - 1) for number in (message.get("life"), message.get("process"), *objects)]
    for number, most in numbers:
        if type(number) is not int or not 0 <= number <= most:
            raise SetupError(f"handshake: {theirs} sent a number that is none: {printable(number, 40)}")
    if message["link"] == 0:
        raise SetupError(f"handshake: {theirs} does not number this link")


def _check_about(message: dict[str, Any], theirs: str) -> None:
    """What the other process says about itself; it is printed, no more."""
    for field, most in (("host", _MAX_HOST_CHARS), ("store", _MAX_STORE_CHARS)):
        text = message.get(field)
        if not isinstance(text, str) or len(text) > most:
            raise SetupError(f"handshake: {theirs} does not say which {field} it has")
    if not isinstance(message.get("needs_heartbeats"), bool):
        raise SetupError(f"handshake: {theirs} does not say whether it needs heartbeats")


@contextmanager
def offered(native: NativeComm, rank: int, life: int, transport: str, link: int) -> Iterator[dict[str, Any]]:
    """An index and memory for a peer: withdrawn when the block fails. Its descriptors end with the block."""
    offer = native.offer(rank, life, transport in NETWORKS, link)
    try:
        yield offer
    except BaseException:
        native.withdraw(offer["peer_idx"])
        raise
    finally:
        close_all(descriptors(offer))


def descriptors(offer: dict[str, Any]) -> list[int]:
    return [fd for fd, _ in offer["objects"] if fd >= 0]


def attach(
    native: NativeComm, peer_idx: int, message: dict[str, Any], fds: list[int], data: socket.socket | None
) -> None:
    """Maps the memory of a peer that has introduced itself; takes `fds` and `data`. Raises SetupError."""
    remaining = iter(fds)
    objects = [(next(remaining) if has else -1, number) for has, number in zip(message["has_fd"], message["objects"])]
    fds.clear()
    about = (message["process"], message["device"], message["wakes"], _address(message, "the peer"))
    native.attach(peer_idx, objects, *about, -1 if data is None else data.detach())


def go_live(native: NativeComm, identity: Identity, peer_idx: int, message: dict[str, Any], channel: Channel) -> None:
    """Hands the connection over to the watcher: the link is live."""
    # Where one of the two sides is told of the other's end by the system alone, the other one still needs to hear it.
    has_heartbeats = channel.needs_heartbeats or message["needs_heartbeats"]
    send_every_s = identity.heartbeat_s if has_heartbeats else 0.0
    lost_after_s = _HEARTBEATS_TO_LOSS * message["heartbeat_s"] if has_heartbeats else 0.0
    displaces = _meet(identity, message)
    connection_fd, pidfd = channel.take()
    native.watch(peer_idx, connection_fd, pidfd, send_every_s, lost_after_s, displaces)


def _meet(identity: Identity, message: dict[str, Any]) -> str:
    """What the older life of this rank is told, which ends when this one has joined."""
    rank, life = message["rank"], message["life"]
    newer = _whereabouts(message["pid"], message["host"], message["store"])
    older_life, older = identity.met.get(rank, (0, "unknown"))
    identity.met[rank] = (life, newer)
    text = f"a newer process has taken the place of {message['role']} rank {rank}: {newer}; the older one: {older}"
    if life == older_life:
        text = f"{message['role']} rank {rank} has made this link anew"
    return text.encode()[:_MAX_DISPLACES_BYTES].decode(errors="ignore")
