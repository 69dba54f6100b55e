# SPDX-License-Identifier: Apache-2.0
"""How two ranks meet: the store gives an address, a Unix socket carries one handshake, and stays open for the watcher.

Attention ranks connect, expert ranks listen. The handshake is one message each way (JSON, at most 64 KiB) with the
file descriptors of the memory objects. Nothing is unpickled.
"""

from __future__ import annotations

import base64
import binascii
import dataclasses
import json
import os
import secrets
import socket
import struct
import sys
import threading
import time
from collections.abc import Callable
from typing import Any, Protocol

from ._C import SetupError
from .shape import Shape
from .store import Store, look_up

PROTOCOL_VERSION = 3
_MAX_MESSAGE_BYTES = 64 * 1024
_MAX_DEVICE_CHARS = 64
_NUM_OBJECTS = 3  # rows, small, wake
_MAX_DOOR_BYTES = 32 * 1024
_HANDSHAKE_TIMEOUT_S = 10.0
_FIRST_NOTE_S = 2.0
_NOTE_EVERY_S = 10.0


class NativeComm(Protocol):
    """The native half of a comm, as far as the handshake needs it."""

    def offer(self, rank: int, life: int) -> dict[str, Any]: ...
    def attach(
        self, peer_idx: int, objects: list[tuple[int, int]], process: int, device: str, wakes: bool, door: bytes
    ) -> None: ...
    def watch(self, peer_idx: int, connection_fd: int, pidfd: int) -> None: ...


@dataclasses.dataclass(frozen=True)
class Identity:
    """Who a comm is. A restarted rank has another life."""

    job: str
    name: str
    role: str
    rank: int
    shape: Shape
    transport: str = "shm"
    life: int = dataclasses.field(default_factory=lambda: secrets.randbits(63) | 1)

    def store_key(self, role: str, rank: int) -> str:
        """The key under which a rank of this job and name publishes itself."""
        return f"m2n/{self.job}/{self.name}/{role}/{rank}"

    def __str__(self) -> str:
        return f"{self.role} rank {self.rank}"


class Refused(SetupError):
    """The peer answered the handshake with an error; trying again cannot help."""


def _send(connection: socket.socket, message: dict[str, Any], fds: list[int]) -> None:
    socket.send_fds(connection, [json.dumps(message).encode()], fds)


def _receive(connection: socket.socket) -> tuple[dict[str, Any], list[int]]:
    """One message and its descriptors. Raises SetupError when it is none of ours."""
    data, fds, flags, _ = socket.recv_fds(connection, _MAX_MESSAGE_BYTES, _NUM_OBJECTS, socket.MSG_CMSG_CLOEXEC)
    try:
        if flags & (socket.MSG_TRUNC | socket.MSG_CTRUNC):
            raise ValueError("too long")
        if not data:
            raise ValueError("the connection was closed")
        message = json.loads(data)
        if not isinstance(message, dict):
            raise ValueError("not an object")
    except (ValueError, RecursionError) as error:
        _close_all(fds)
        raise SetupError(f"handshake: not a message of m2n: {error}") from error
    return message, fds


def _close_all(fds: list[int]) -> None:
    for fd in fds:
        os.close(fd)


def _credentials(connection: socket.socket) -> int:
    """The peer's pid (0: not in our pid namespace), after checking that it is our own user."""
    data = connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, struct.calcsize("3i"))
    pid, uid, _ = struct.unpack("3i", data)
    if uid != os.geteuid():
        raise SetupError(f"handshake: the peer runs as user {uid}, this process as {os.geteuid()}; they must be equal")
    return int(pid)


def _pidfd(pid: int) -> int:
    """A descriptor that tells of the peer's death; -1 where there is none: its connection's end has to do."""
    if pid in (0, os.getpid()):
        return -1
    try:
        return os.pidfd_open(pid)
    except OSError:
        return -1


def _introduction(identity: Identity, offer: dict[str, Any]) -> dict[str, Any]:
    return {
        "m2n": PROTOCOL_VERSION,
        "role": identity.role,
        "rank": identity.rank,
        "life": identity.life,
        "shape": dataclasses.asdict(identity.shape),
        "transport": identity.transport,
        "process": offer["process"],
        "device": offer["device"],
        "wakes": offer["wakes"],
        "objects": [object_id for _, object_id in offer["objects"]],
        "has_fd": [fd >= 0 for fd, _ in offer["objects"]],
        "door": base64.b64encode(offer["door"]).decode(),
    }


def _descriptors(offer: dict[str, Any]) -> list[int]:
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


def _check_introduction(identity: Identity, message: dict[str, Any], num_fds: int) -> None:
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
    if message.get("transport") != identity.transport:
        raise SetupError(
            f"handshake: {theirs} uses the transport {str(message.get('transport'))[:40]!r}, {identity} uses "
            f"{identity.transport!r}; a rank on a GPU links with ranks on CPUs when it has Config(transport='shm')"
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
    numbers = [(message.get("rank"), 32)]
    numbers += [(number, 64) for number in (message.get("life"), message.get("process"), *objects)]
    for number, bits in numbers:
        if type(number) is not int or not 0 <= number < 2**bits:
            raise SetupError(f"handshake: {theirs} sent a number that is none: {str(number)[:40]}")


def _join(
    native: NativeComm, peer_idx: int, message: dict[str, Any], fds: list[int], connection: socket.socket
) -> Callable[[], None]:
    """Maps the peer's memory; the returned call makes the link live and hands the connection to the watcher."""
    remaining = iter(fds)
    each = [next(remaining) if sent else -1 for sent in message["has_fd"]]
    objects = list(zip(each, message["objects"]))
    door = _door(message, "the peer")
    native.attach(peer_idx, objects, message["process"], message["device"], message["wakes"], door)
    pid = _credentials(connection)
    return lambda: native.watch(peer_idx, connection.detach(), _pidfd(pid))


class Listener:
    """The expert rank's side: an address of its own, and a thread that answers handshakes until closed."""

    def __init__(self, native: NativeComm, identity: Identity) -> None:
        self._native = native
        self._identity = identity
        self._pid = os.getpid()
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        # The abstract namespace: nothing in the file system, gone with the process.
        self.address = "m2n-" + secrets.token_hex(16)
        self._socket.bind("\0" + self.address)
        self._socket.listen(128)
        self._thread = threading.Thread(target=self._serve, name="m2n-listener", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Ends the thread and frees the address. In a forked child only this process's descriptor goes."""
        if os.getpid() != self._pid:
            self._socket.close()
            return
        try:
            self._socket.shutdown(socket.SHUT_RDWR)  # wakes accept(), which close() alone would not
        except OSError:
            pass
        if self._thread is not threading.current_thread():
            self._thread.join(timeout=_HANDSHAKE_TIMEOUT_S)
        self._socket.close()

    def _serve(self) -> None:
        while True:
            try:
                connection, _ = self._socket.accept()
            except OSError:
                return
            # One thread each: a joiner that is slow or stuck must not keep the others out.
            threading.Thread(target=self._answer, args=(connection,), name="m2n-handshake", daemon=True).start()

    def _answer(self, connection: socket.socket) -> None:
        with connection:
            connection.settimeout(_HANDSHAKE_TIMEOUT_S)
            try:
                self._welcome(connection)
            except (SetupError, ValueError, OSError, RuntimeError) as error:
                # The joiner raises it; here it is nobody's call that fails, so it is said on stderr.
                print(f"m2n: {self._identity}: a peer could not join: {error}", file=sys.stderr, flush=True)
                try:
                    _send(connection, {"error": str(error)}, [])
                except OSError:
                    pass

    def _welcome(self, connection: socket.socket) -> None:
        _credentials(connection)
        message, fds = _receive(connection)
        try:
            _check_introduction(self._identity, message, len(fds))
            if message.get("to_life") != self._identity.life:
                raise SetupError(f"handshake: {self._identity} has another life than the one that was looked up")
            offer = self._native.offer(message["rank"], message["life"])
        except BaseException:
            _close_all(fds)
            raise
        offered = _descriptors(offer)
        try:
            go_live = _join(self._native, offer["peer_idx"], message, fds, connection)
            _send(connection, _introduction(self._identity, offer), offered)
        finally:
            _close_all(offered)
        go_live()


def publish(store: Store, identity: Identity, address: str | None) -> None:
    """Makes a rank findable; the last life published wins."""
    value = json.dumps({"life": identity.life, "address": address})
    try:
        store.set(identity.store_key(identity.role, identity.rank), value)
    except SetupError:
        raise
    except Exception as error:
        raise SetupError(f"store: cannot be written: {error}") from error


def connect(native: NativeComm, identity: Identity, store: Store, expert_rank: int, deadline: float) -> None:
    """Joins one expert rank: looks its address up, again if it is stale, until the deadline (time.monotonic()).

    Raises:
        SetupError: it did not appear in time, or refused.
    """
    began = time.monotonic()
    note_at = began + _FIRST_NOTE_S
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
        try:
            entry = json.loads(value)
            address, life = str(entry["address"]), int(entry["life"])
        except (ValueError, KeyError, TypeError) as error:
            raise SetupError(f"store: the value of {key!r} is not an address of m2n: {value[:100]!r}") from error
        try:
            _greet(native, identity, address, life, expert_rank)
            return
        except Refused:
            raise
        except (OSError, SetupError) as error:
            problem = f"its address is stale ({error})"
            time.sleep(0.02)


def _greet(native: NativeComm, identity: Identity, address: str, life: int, expert_rank: int) -> None:
    connection = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with connection:
        connection.settimeout(_HANDSHAKE_TIMEOUT_S)
        connection.connect("\0" + address)
        offer = native.offer(expert_rank, life)
        offered = _descriptors(offer)
        try:
            introduction = {**_introduction(identity, offer), "to_life": life}
            _send(connection, introduction, offered)
        finally:
            _close_all(offered)
        message, fds = _receive(connection)
        if "error" in message:
            _close_all(fds)
            raise Refused(f"{identity} was refused by expert rank {expert_rank}: {message['error']}")
        try:
            _check_introduction(identity, message, len(fds))
        except SetupError as error:
            _close_all(fds)
            raise Refused(str(error)) from error
        _join(native, offer["peer_idx"], message, fds, connection)()
