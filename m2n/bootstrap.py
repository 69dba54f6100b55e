# SPDX-License-Identifier: Apache-2.0
"""How two ranks find each other: the store gives an address, a control connection (channel.py) carries one handshake
(handshake.py), and stays open for the watcher.

Attention ranks connect, expert ranks listen: on a Unix socket, and on a network address where `Config.bind` names one.
What fails here is raised at once; what fails at the other side, or on the way there, is looked up again.
"""

from __future__ import annotations

import contextlib
import dataclasses
import ipaddress
import json
import re
import socket
from collections.abc import Collection, Iterator
from typing import Any

from . import data_connection
from ._C import SetupError
from .channel import (
    HANDSHAKE_TIMEOUT_S,
    MAX_ERROR_CHARS,
    Again,
    Channel,
    Late,
    NotNow,
    OutOfReach,
    Refused,
    TcpChannel,
    UnixChannel,
    close_all,
    speaking,
    split_address,
)
from .deadline import Deadline
from .handshake import (
    Identity,
    NativeComm,
    attach,
    check_introduction,
    descriptors,
    go_live,
    introduction,
    link_transport,
    offered,
    whereabouts,
)
from .interfaces import host_name
from .notes import printable, say
from .store import Store, look_up

<<<<<<< HEAD
=======
# Transports whose links go over a network.
NETWORKS = ("tcp", "ucx")
_MAX_DEVICE_CHARS = 64
_NUM_OBJECTS = 3  # rows, small, wake
_MAX_DOOR_BYTES = 32 * 1024
>>>>>>> 3236657 (A transport over connected sockets, tcp; what networks share is theirs no longer UCX's)
# How long an address may be out of reach before it is taken for a wrong one.
_UNREACHABLE_S = 4.0
_FIRST_NOTE_S = 2.0
_NOTE_EVERY_S = 10.0
<<<<<<< HEAD
_PAUSE_S = 0.02
_MAX_ENTRY_BYTES = 4096
=======
_HEARTBEATS_TO_LOSS = 3
_LEAST_HEARTBEAT_S, _MOST_HEARTBEAT_S = 0.01, 3600.0


class NativeComm(Protocol):
    """The native half of a comm, as far as the handshake needs it."""

    def offer(self, rank: int, life: int, is_over_network: bool) -> dict[str, Any]: ...
    def attach(
        self,
        peer_idx: int,
        objects: list[tuple[int, int]],
        process: int,
        device: str,
        wakes: bool,
        door: bytes,
        data_fd: int = -1,
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
        return "shm" if channel.is_local else "tcp"
    if not channel.is_local and identity.transport not in NETWORKS:
        raise Refused(
            f"handshake: the other rank is on another host or in another network namespace, and {identity} has the "
            f"transport {identity.transport!r}, which reaches only its own; use Config(transport='auto'), 'tcp' or "
            "'ucx', without faults"
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
    native: NativeComm,
    identity: Identity,
    peer_idx: int,
    message: dict[str, Any],
    fds: list[int],
    channel: Channel,
    data_fd: int = -1,
) -> Callable[[], None]:
    """Maps the peer's memory; the returned call makes the link live and hands the connection to the watcher."""
    remaining = iter(fds)
    each = [next(remaining) if sent else -1 for sent in message["has_fd"]]
    objects = list(zip(each, message["objects"]))
    native.attach(
        peer_idx, objects, message["process"], message["device"], message["wakes"], _door(message, "the peer"), data_fd
    )

    def go_live() -> None:
        pidfd = channel.pidfd()
        # The system tells of the end of a process that it knows, and this one's is its own.
        needs_heartbeats = pidfd < 0 and not channel.is_of_this_process
        send_every_s = identity.heartbeat_s if needs_heartbeats else 0.0
        lost_after_s = _HEARTBEATS_TO_LOSS * message["heartbeat_s"] if needs_heartbeats else 0.0
        native.watch(peer_idx, channel.connection.detach(), pidfd, send_every_s, lost_after_s)

    return go_live
>>>>>>> 3236657 (A transport over connected sockets, tcp; what networks share is theirs no longer UCX's)


@dataclasses.dataclass(frozen=True)
class Address:
    """Where an expert rank listens, as it publishes it."""

    life: int
    address: str  # of its Unix socket
    host: str  # host_name() where that socket is
    network_address: str  # host:port, or "": none

    @classmethod
    def parse(cls, key: str, value: bytes) -> Address:
        """What a store holds, by whomever it was written. Raises Again: it is none."""
        try:
            if len(value) > _MAX_ENTRY_BYTES:
                raise ValueError
            entry = json.loads(value)
            address = cls(*(entry[field.name] for field in dataclasses.fields(cls)))
            address._check()
            return address
        except (ValueError, KeyError, TypeError, RecursionError) as error:
            raise Again(
                f"store: the value of {key!r} is not an address of m2n: {printable(repr(bytes(value[:100])), 120)}"
            ) from error

    def _check(self) -> None:
        """Raises ValueError where a field is none."""
        if type(self.life) is not int or not 0 <= self.life < 2**64:
            raise ValueError("life")
        for text, most in ((self.address, 100), (self.host, 200), (self.network_address, 100)):
            if not isinstance(text, str) or not re.fullmatch(rf"[!-~]{{0,{most}}}", text):
                raise ValueError("text")
        if self.network_address:  # never a name: nobody is asked what it stands for
            host, port = split_address(self.network_address)
            ipaddress.ip_address(host)
            if port == 0:
                raise ValueError("port")

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
    deadline: Deadline,
    ended: Collection[int] = (),
) -> None:
    """Joins one expert rank: looks its address up, again if it is stale, until the deadline.

    ended: lives that have left, which is final.

    Raises:
        SetupError: it did not appear in time, cannot be reached, or refused; or this process is short of something.
    """
    began = deadline.passed
    note_at, lost_from = began + _FIRST_NOTE_S, None
    problem = "it has not published its address"
    key = identity.store_key("expert", expert_rank)
    while True:
        waited_s = deadline.passed - began
        if deadline.has_expired:
            raise SetupError(
                f"{identity}: expert rank {expert_rank} could not be joined within {waited_s:.1f} s: {problem}; is it "
                f"running, with the same store, job {identity.job!r} and name {identity.name!r}? This is "
                f"{whereabouts(identity)}"
            )
        if deadline.passed >= note_at:
            say(
                f"{identity} waits for expert rank {expert_rank}, {waited_s:.0f} s so far: {problem} (job "
                f"{identity.job!r}, name {identity.name!r}, {whereabouts(identity)})",
                is_always=True,
            )
            note_at = deadline.passed + _NOTE_EVERY_S
        try:
            address = _find(store, key, deadline.cut(1.0), ended)
            if address is None:
                continue
            _greet(native, identity, address, expert_rank, deadline.cut(HANDSHAKE_TIMEOUT_S))
            return
        except OutOfReach as error:
            # No way to there at all: that does not mend itself, but for an interface that is coming up.
            problem, lost_from = str(error), lost_from or deadline.passed
            if deadline.passed - lost_from >= _UNREACHABLE_S:
                raise SetupError(
                    f"{identity}: expert rank {expert_rank} listens at {address}, which cannot be reached from here: "
                    f"{error}; is its Config.bind (M2N_BIND) an address of the right network, and the port open?"
                ) from error
        except Again as error:
            problem, lost_from = str(error), None
        deadline.sleep(_PAUSE_S)


def _find(store: Store, key: str, deadline: Deadline, ended: Collection[int]) -> Address | None:
    """What is published; None: nothing by the deadline. Raises Again: nothing that can be joined."""
    value = look_up(store, key, deadline)
    if value is None:
        return None
    address = Address.parse(key, value)
    if address.life in ended:
        raise Again("the life that it has published has left, and no other one has come")
    return address


@contextlib.contextmanager
def _at(address: Address) -> Iterator[None]:
    """Says of what is wrong at an address that it is there: a new life may be on its way."""
    try:
        yield
    except (OutOfReach, NotNow):
        raise
    except Late as error:
        raise Again(f"at {address} it accepted but did not answer in time") from error
    except Again as error:
        raise Again(f"its address {address} is stale ({error})") from error


def _open_channel(identity: Identity, address: Address, expert_rank: int, deadline: Deadline) -> Channel:
    if address.host == host_name():
        with speaking("its Unix socket"):
            connection = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        try:
            with speaking("its Unix socket", connection, deadline):
                connection.connect("\0" + address.address)
            return UnixChannel(connection, deadline)
        except BaseException:
            connection.close()
            raise
    if not address.network_address:
        raise NotNow(
            f"expert rank {expert_rank} runs on another host or in another network namespace, and listens on no "
            "network address; give it Config(bind=...) or M2N_BIND, an address, an interface or a network of its host"
        )
    if identity.job_key is None and not identity.insecure:
        raise Refused(
            f"{identity}: expert rank {expert_rank} runs on another host, at {address}: all ranks need the same "
            "Config(job_key=...) or M2N_JOB_KEY, or Config(insecure=True) where the network is yours alone"
        )
    connection = _reach(address.network_address, deadline.cut(_UNREACHABLE_S / 2))
    try:
        return TcpChannel(connection, identity.job_key, is_listener=False, deadline=deadline)
    except BaseException:
        connection.close()
        raise


def _reach(network_address: str, deadline: Deadline) -> socket.socket:
    """Connects. Raises OutOfReach, and Again where only nobody listens."""
    try:
        with speaking(network_address):
            return socket.create_connection(split_address(network_address), timeout=deadline.remaining())
    except Again as error:
        if isinstance(error.__cause__, ConnectionRefusedError):
            raise
        raise OutOfReach(f"{network_address} cannot be reached: {error.__cause__}") from error


def _greet(native: NativeComm, identity: Identity, address: Address, expert_rank: int, deadline: Deadline) -> None:
    with _at(address), _open_channel(identity, address, expert_rank, deadline) as channel:
        transport = link_transport(identity, channel)
<<<<<<< HEAD
        with offered(native, expert_rank, address.life, transport, 0) as offer:
            about = introduction(identity, offer, transport, channel.needs_heartbeats)
            channel.send({**about, "to_life": address.life}, descriptors(offer))
            with contextlib.ExitStack() as stack:
                data = None
                if transport == "tcp" and not channel.is_local:
                    data = stack.enter_context(_data_connection(identity, channel, expert_rank))
                message, fds = _answer(identity, channel, expert_rank)
                stack.callback(close_all, fds)
                if transport == "tcp" and channel.is_local:
                    data = stack.enter_context(data_connection.received(fds))
                _check(identity, message, len(fds), transport, offer)
                with _telling(channel):
                    attach(native, offer["peer_idx"], message, fds, data)
            channel.send({"joined": True}, [])
            go_live(native, identity, offer["peer_idx"], message, channel)


@contextlib.contextmanager
def _telling(channel: Channel) -> Iterator[None]:
    """What fails here is told to the other side, which waits; unless that is why it failed."""
    try:
        yield
    except SetupError as error:
        if channel.has_ended():
            raise Again(f"it has ended meanwhile: {error}") from error
        with contextlib.suppress(SetupError):
            channel.send({"error": printable(error, MAX_ERROR_CHARS)}, [])
        raise


def _answer(identity: Identity, channel: Channel, expert_rank: int) -> tuple[dict[str, Any], list[int]]:
    """The expert rank's next message. Raises Refused, and Again where that is what it says."""
    message, fds = channel.receive()
    if "error" not in message:
        return message, fds
    close_all(fds)
    error = printable(message["error"], MAX_ERROR_CHARS)
    if message.get("again") is True:
        raise NotNow(f"it says: {error}")
    raise Refused(f"{identity} was refused by expert rank {expert_rank}: {error}")


def _check(identity: Identity, message: dict[str, Any], num_fds: int, transport: str, offer: dict[str, Any]) -> None:
    try:
        check_introduction(identity, message, num_fds, transport)
        if message["link"] != offer["link"]:
            raise SetupError(f"handshake: it numbers this link {message['link']}, {identity} {offer['link']}")
    except SetupError as error:
        raise Refused(str(error)) from error


def _data_connection(identity: Identity, channel: Channel, expert_rank: int) -> socket.socket:
    """To the same address, by the token that the expert rank tells. Raises Refused, Again, Shortage."""
    message, fds = _answer(identity, channel, expert_rank)
    close_all(fds)
    try:
        token = bytes.fromhex(message["token"])
        if len(token) != data_connection.TOKEN_BYTES:
            raise ValueError
    except (KeyError, TypeError, ValueError) as error:
        raise Refused(f"handshake: expert rank {expert_rank} told no token for the data connection") from error
    return data_connection.connect(channel.connection, channel.session, token, channel.deadline)
=======
        offer = native.offer(expert_rank, address.life, transport in NETWORKS)
        offered = descriptors(offer)
        try:
            channel.send({**introduction(identity, offer, transport), "to_life": address.life}, offered)
        finally:
            close_all(offered)
        message, fds = channel.receive()
        if "error" in message:
            close_all(fds)
            raise Refused(f"{identity} was refused by expert rank {expert_rank}: {message['error']}")
        data_fd = fds.pop() if transport == "tcp" and fds else -1
        try:
            check_introduction(identity, message, len(fds), transport)
        except SetupError as error:
            close_all([*fds, *([data_fd] if data_fd >= 0 else [])])
            raise Refused(str(error)) from error
        join(native, identity, offer["peer_idx"], message, fds, channel, data_fd)()
>>>>>>> 3236657 (A transport over connected sockets, tcp; what networks share is theirs no longer UCX's)
