# SPDX-License-Identifier: Apache-2.0
"""How two ranks meet: the store gives an address, a control connection (channel.py) carries one handshake, and stays
open for the watcher.

Attention ranks connect, expert ranks listen: on a Unix socket, and on a network address where `Config.bind` names one.
The handshake is one message each way, with the file descriptors of the memory objects on one host.
"""

from __future__ import annotations

import base64
import binascii
import dataclasses
import errno
import json
import secrets
import socket
import sys
import time
from collections.abc import Callable, Collection
from typing import Any, Protocol

from ._C import SetupError
from .channel import PROTOCOL_VERSION, Channel, Refused, TcpChannel, UnixChannel, close_all, split_address
from .interfaces import host_name
from .shape import Shape
from .store import Store, look_up

_MAX_DEVICE_CHARS = 64
_NUM_OBJECTS = 3  # rows, small, wake
_MAX_DOOR_BYTES = 32 * 1024
# How long an address may be out of reach before it is taken for a wrong one.
_UNREACHABLE_S = 4.0
_FIRST_NOTE_S = 2.0
_NOTE_EVERY_S = 10.0
_HEARTBEATS_TO_LOSS = 3
_LEAST_HEARTBEAT_S, _MOST_HEARTBEAT_S = 0.01, 3600.0


class NativeComm(Protocol):
    """The native half of a comm, as far as the handshake needs it."""

    def offer(self, rank: int, life: int, is_over_network: bool) -> dict[str, Any]: ...
    def attach(
        self, peer_idx: int, objects: list[tuple[int, int]], process: int, device: str, wakes: bool, door: bytes
    ) -> None: ...
    def watch(
        self, peer_idx: int, connection_fd: int, pidfd: int, send_every_s: float, lost_after_s: float
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
    life: int = dataclasses.field(default_factory=lambda: secrets.randbits(63) | 1)

    def store_key(self, role: str, rank: int) -> str:
        """The key under which a rank of this job and name publishes itself."""
        return f"m2n/{self.job}/{self.name}/{role}/{rank}"

    def __str__(self) -> str:
        return f"{self.role} rank {self.rank}"


def link_transport(identity: Identity, channel: Channel) -> str:
    """By what the rows of this link go. Raises Refused where this comm's transport does not reach so far."""
    if identity.transport == "auto":
        return "shm" if channel.is_local else "ucx"
    if not channel.is_local and identity.transport != "ucx":
        raise Refused(
            f"handshake: the other rank is on another host or in another network namespace, and {identity} has the "
            f"transport {identity.transport!r}, which reaches only its own; use Config(transport='auto') or 'ucx', "
            "without faults, on device='cpu'"
        )
    return identity.transport


def introduction(identity: Identity, offer: dict[str, Any], transport: str) -> dict[str, Any]:
    return {
        "m2n": PROTOCOL_VERSION,
        "role": identity.role,
        "rank": identity.rank,
        "life": identity.life,
        "shape": dataclasses.asdict(identity.shape),
        "transport": transport,
        "heartbeat_s": identity.heartbeat_s,
        "process": offer["process"],
        "device": offer["device"],
        "wakes": offer["wakes"],
        "objects": [object_id for _, object_id in offer["objects"]],
        "has_fd": [fd >= 0 for fd, _ in offer["objects"]],
        "door": base64.b64encode(offer["door"]).decode(),
    }


def descriptors(offer: dict[str, Any]) -> list[int]:
    return [fd for fd, _ in offer["objects"] if fd >= 0]


def _door(message: dict[str, Any], theirs: str) -> bytes:
    """How the peer is reached over a network; empty where its memory is shared."""
    text = message.get("door")
    try:
        if not isinstance(text, str) or len(text) > _MAX_DOOR_BYTES // 3 * 4:
            raise ValueError
        return base64.b64decode(text, validate=True)
    except (ValueError, binascii.Error):
        raise SetupError(f"handshake: {theirs} does not say how it is reached") from None


def check_introduction(identity: Identity, message: dict[str, Any], num_fds: int, transport: str) -> None:
    """Both sides check the other's introduction. Raises SetupError with what differs."""
    theirs = f"{message.get('role')} rank {message.get('rank')}"
    if message.get("m2n") != PROTOCOL_VERSION:
        raise SetupError(
            f"handshake: {theirs} speaks version {message.get('m2n')} of the protocol, {identity} speaks "
            f"{PROTOCOL_VERSION}; install the same m2n on both"
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
                f"handshake: shapes differ in {field}: {theirs} has {shape.get(field)!r}, {identity} has {ours!r}; "
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
    _door(message, theirs)
    heartbeat_s: Any = message.get("heartbeat_s")
    if type(heartbeat_s) not in (int, float) or not _LEAST_HEARTBEAT_S <= heartbeat_s <= _MOST_HEARTBEAT_S:
        raise SetupError(f"handshake: {theirs} sends heartbeats every {str(heartbeat_s)[:40]!r} s")
    numbers = [(message.get("rank"), 32)]
    numbers += [(number, 64) for number in (message.get("life"), message.get("process"), *objects)]
    for number, bits in numbers:
        if type(number) is not int or not 0 <= number < 2**bits:
            raise SetupError(f"handshake: {theirs} sent a number that is none: {str(number)[:40]}")


def join(
    native: NativeComm, identity: Identity, peer_idx: int, message: dict[str, Any], fds: list[int], channel: Channel
) -> Callable[[], None]:
    """Maps the peer's memory; the returned call makes the link live and hands the connection to the watcher."""
    remaining = iter(fds)
    each = [next(remaining) if sent else -1 for sent in message["has_fd"]]
    objects = list(zip(each, message["objects"]))
    native.attach(
        peer_idx, objects, message["process"], message["device"], message["wakes"], _door(message, "the peer")
    )

    def go_live() -> None:
        pidfd = channel.pidfd()
        # The system tells of the end of a process that it knows, and this one's is its own.
        needs_heartbeats = pidfd < 0 and not channel.is_of_this_process
        send_every_s = identity.heartbeat_s if needs_heartbeats else 0.0
        lost_after_s = _HEARTBEATS_TO_LOSS * message["heartbeat_s"] if needs_heartbeats else 0.0
        native.watch(peer_idx, channel.connection.detach(), pidfd, send_every_s, lost_after_s)

    return go_live


@dataclasses.dataclass(frozen=True)
class Address:
    """Where an expert rank listens, as it publishes it."""

    life: int
    address: str  # of its Unix socket
    host: str  # host_name() where that socket is
    network_address: str  # host:port, or "": none

    @classmethod
    def parse(cls, key: str, value: bytes) -> Address:
        """What a store holds. Raises SetupError."""
        try:
            entry = json.loads(value)
            texts = (str(entry[name]) for name in ("address", "host", "network_address"))
            return cls(int(entry["life"]), *texts)
        except (ValueError, KeyError, TypeError, RecursionError) as error:
            raise SetupError(f"store: the value of {key!r} is not an address of m2n: {value[:100]!r}") from error

    def __str__(self) -> str:
        return self.network_address or self.address


def publish(store: Store, identity: Identity, address: str = "", network_address: str = "") -> None:
    """Makes a rank findable, at a listener's addresses; the last life published wins."""
    entry = Address(identity.life, address, host_name(), network_address)
    try:
        store.set(identity.store_key(identity.role, identity.rank), json.dumps(dataclasses.asdict(entry)))
    except SetupError:
        raise
    except Exception as error:
        raise SetupError(f"store: cannot be written: {error}") from error


def connect(
    native: NativeComm,
    identity: Identity,
    store: Store,
    expert_rank: int,
    deadline: float,
    ended: Collection[int] = (),
) -> None:
    """Joins one expert rank: looks its address up, again if it is stale, until the deadline (time.monotonic()).

    ended: lives that were lost or have left, which is final.

    Raises:
        SetupError: it did not appear in time, cannot be reached, or refused.
    """
    began = time.monotonic()
    note_at, lost_from = began + _FIRST_NOTE_S, None
    problem = "it has not published its address"
    key = identity.store_key("expert", expert_rank)
    while True:
        now = time.monotonic()
        if now >= deadline:
            raise SetupError(
                f"{identity}: expert rank {expert_rank} could not be joined within {now - began:.1f} s: {problem}; "
                f"is it running, with the same store, job {identity.job!r} and name {identity.name!r}?"
            )
        if now >= note_at:
            print(
                f"m2n: {identity} waits for expert rank {expert_rank}, {now - began:.0f} s so far: {problem} "
                f"(job {identity.job!r}, name {identity.name!r})",
                file=sys.stderr,
                flush=True,
            )
            note_at = now + _NOTE_EVERY_S
        value = look_up(store, key, min(1.0, deadline - now))
        if value is None:
            continue
        address = Address.parse(key, value)
        if address.life in ended:
            problem = "the life that it has published is lost or has left, and no other one has come"
            time.sleep(0.02)
            continue
        try:
            _greet(native, identity, address, expert_rank)
            return
        except Refused:
            raise
        except (OSError, SetupError) as error:
            problem = f"its address {address} is stale ({error})"
            # Nobody listens there any more: a new life may be on its way. No way to there at all: that does not mend
            # itself, but for an interface that is coming up.
            is_out_of_reach = (
                isinstance(error, OSError) and error.errno != errno.ECONNREFUSED and address.network_address
            )
            lost_from = (lost_from or now) if is_out_of_reach else None
            if lost_from is not None and time.monotonic() - lost_from >= _UNREACHABLE_S:
                raise SetupError(
                    f"{identity}: expert rank {expert_rank} listens at {address}, which cannot be reached from here: "
                    f"{error}; is its Config.bind (M2N_BIND) an address of the right network, and the port open?"
                ) from error
            time.sleep(0.02)


def _open_channel(identity: Identity, address: Address, expert_rank: int) -> Channel:
    if address.host == host_name():
        connection = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        try:
            connection.connect("\0" + address.address)
            return UnixChannel(connection)
        except BaseException:
            connection.close()
            raise
    if not address.network_address:
        raise SetupError(
            f"expert rank {expert_rank} runs on another host or in another network namespace, and listens on no "
            "network address; give it Config(bind=...) or M2N_BIND, an address, an interface or a network of its host"
        )
    if identity.job_key is None and not identity.insecure:
        raise Refused(
            f"{identity}: expert rank {expert_rank} runs on another host, at {address}: all ranks need the same "
            "Config(job_key=...) or M2N_JOB_KEY, or Config(insecure=True) where the network is yours alone"
        )
    connection = socket.create_connection(split_address(address.network_address), timeout=_UNREACHABLE_S / 2)
    try:
        return TcpChannel(connection, identity.job_key, is_listener=False)
    except BaseException:
        connection.close()
        raise


def _greet(native: NativeComm, identity: Identity, address: Address, expert_rank: int) -> None:
    with _open_channel(identity, address, expert_rank) as channel:
        transport = link_transport(identity, channel)
        offer = native.offer(expert_rank, address.life, transport == "ucx")
        offered = descriptors(offer)
        try:
            channel.send({**introduction(identity, offer, transport), "to_life": address.life}, offered)
        finally:
            close_all(offered)
        message, fds = channel.receive()
        if "error" in message:
            close_all(fds)
            raise Refused(f"{identity} was refused by expert rank {expert_rank}: {message['error']}")
        try:
            check_introduction(identity, message, len(fds), transport)
        except SetupError as error:
            close_all(fds)
            raise Refused(str(error)) from error
        join(native, identity, offer["peer_idx"], message, fds, channel)()
