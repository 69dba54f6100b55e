# SPDX-License-Identifier: Apache-2.0
"""Control connections: messages of JSON, at most 64 KiB, between two ranks that meet.

On one host over a Unix socket, with file descriptors beside the text, between processes of one user. Between hosts over
TCP, where each message is signed: both ends send a nonce, and what follows carries an HMAC-SHA256 by the job's key of
both nonces, the direction, a count and the text. So nobody without the key can join, repeat what was said in another
session, or change what is said. Nothing is encrypted. Nothing is unpickled.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import hmac
import json
import os
import secrets
import socket
import struct
from abc import ABC, abstractmethod
from collections.abc import Iterator
from typing import Any

from ._C import SetupError
from .deadline import Deadline
from .notes import printable

PROTOCOL_VERSION = 4
MAX_MESSAGE_BYTES = 64 * 1024
MAX_DESCRIPTORS = 4
MAX_ERROR_CHARS = 600
HANDSHAKE_TIMEOUT_S = 10.0
_NONCE_BYTES = 32
_MAC_BYTES = hashlib.sha256().digest_size
# Beside descriptors, what this host is short of; whatever else a socket raises is the other side's, or the way's.
_SHORTAGES = (errno.ENOMEM, errno.ENOBUFS, errno.ETOOMANYREFS)


class Refused(SetupError):
    """The peer answered the handshake with an error; trying again cannot help."""


class Again(SetupError):
    """The other side is not there, not any more, or says nothing right; looking it up again may help."""


class OutOfReach(Again):
    """There is no way to the other side."""


class Late(Again):
    """The other side did not answer in time."""


class NotNow(Again):
    """The other side is the right one, and says that it cannot yet."""


class Shortage(SetupError):
    """This process has no descriptors or memory left for it."""


def shortage(error: OSError) -> Shortage | None:
    """What this process is short of, where that is what an error of the system says."""
    if error.errno in (errno.EMFILE, errno.ENFILE):
        return _no_descriptors()
    if error.errno not in _SHORTAGES:
        return None
    return Shortage(f"handshake: process {os.getpid()} is short of memory of the system: {error.strerror}")


def _no_descriptors() -> Shortage:
    return Shortage(f"handshake: process {os.getpid()} has no file descriptors left; raise its limit (`ulimit -n`)")


def has_descriptors() -> bool:
    """Could this process open a file now?"""
    try:
        os.close(os.open("/", os.O_PATH | os.O_CLOEXEC))
    except OSError:
        return False
    return True


@contextlib.contextmanager
def speaking(whom: str, connection: socket.socket | None = None, deadline: Deadline | None = None) -> Iterator[None]:
    """One call of `connection` in this block ends by the deadline; what it raises becomes Again or Shortage."""
    try:
        if connection is not None and deadline is not None:
            connection.settimeout(max(deadline.remaining(), 1e-3))
        yield
    except TimeoutError as error:
        raise Late(f"handshake: {whom} did not answer in time") from error
    except OSError as error:
        raise shortage(error) or Again(f"handshake: {whom}: {error}") from error


def read_exactly(connection: socket.socket, num_bytes: int, deadline: Deadline, whom: str) -> bytes:
    """So many bytes, by the deadline. Raises Again and Shortage."""
    data = b""
    while len(data) < num_bytes:
        if deadline.has_expired:
            raise Late(f"handshake: {whom} did not answer in time")
        with speaking(whom, connection, deadline):
            part = connection.recv(num_bytes - len(data))
        if not part:
            raise Again(f"handshake: {whom} closed the connection")
        data += part
    return data


def parse(data: bytes) -> dict[str, Any]:
    """One message. Raises ValueError when it is none of ours."""
    try:
        message = json.loads(data)
    except RecursionError as error:
        raise ValueError(str(error)) from error
    if not isinstance(message, dict):
        raise ValueError("not an object")
    return message


def close_all(fds: list[int]) -> None:
    for fd in fds:
        os.close(fd)


class Channel(ABC):
    """A connected socket and how messages go over it, all by one deadline. It closes the socket, unless that was taken.

    All it raises is Again (the other side is gone, late, or none of ours), Refused, and Shortage.
    """

    is_local: bool  # the peer is on this host, and of this user
    is_of_this_process = False  # both ends are
    session = b""  # a secret of both ends, where there is one
    pidfd = -1  # tells of the peer's death; -1: nothing does

    def __init__(self, connection: socket.socket, whom: str, deadline: Deadline) -> None:
        self.connection = connection
        self.whom = whom
        self.deadline = deadline

    @abstractmethod
    def send(self, message: dict[str, Any], fds: list[int]) -> None:
        """One message, and descriptors where the channel is local."""

    @abstractmethod
    def receive(self) -> tuple[dict[str, Any], list[int]]:
        """One message and its descriptors."""

    @property
    def needs_heartbeats(self) -> bool:
        """Does nothing but they tell this end of the other's death?"""
        return self.pidfd < 0 and not self.is_of_this_process

    def say_goodbye(self) -> None:
        """As the watcher would, to an end that may be live already."""
        with contextlib.suppress(OSError):
            self.connection.send(b"G", socket.MSG_DONTWAIT)

    def has_ended(self) -> bool:
        """Has the other end gone, or said goodbye?"""
        try:
            self.connection.setblocking(False)
            return self.connection.recv(1, socket.MSG_PEEK) in (b"", b"G")
        except BlockingIOError:
            return False
        except OSError:
            return True

    def take(self) -> tuple[int, int]:
        """Its descriptors, of the socket and of the peer's process, which are the caller's from now on."""
        pidfd, self.pidfd = self.pidfd, -1
        self.connection.settimeout(None)
        return self.connection.detach(), pidfd

    def __enter__(self) -> Channel:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.connection.close()
        if self.pidfd >= 0:
            os.close(self.pidfd)


def open_pidfd(pid: int) -> int:
    """-1 where the process is in another pid namespace, or nobody may watch it."""
    try:
        return os.pidfd_open(pid) if pid != 0 else -1
    except OSError:
        return -1


class UnixChannel(Channel):
    """A SOCK_SEQPACKET connection of one host."""

    is_local = True

    def __init__(self, connection: socket.socket, deadline: Deadline) -> None:
        data = connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, struct.calcsize("3i"))
        pid, uid, _ = struct.unpack("3i", data)
        super().__init__(connection, f"process {pid}", deadline)
        if uid != os.geteuid():
            raise Refused(f"handshake: the peer runs as user {uid}, this process as {os.geteuid()}; they must be equal")
        self.is_of_this_process = pid == os.getpid()
        self.pidfd = -1 if self.is_of_this_process else open_pidfd(pid)

    def send(self, message: dict[str, Any], fds: list[int]) -> None:
        with speaking(self.whom, self.connection, self.deadline):
            socket.send_fds(self.connection, [json.dumps(message).encode()], fds)

    def receive(self) -> tuple[dict[str, Any], list[int]]:
        with speaking(self.whom, self.connection, self.deadline):
            data, fds, flags, _ = socket.recv_fds(
                self.connection, MAX_MESSAGE_BYTES, MAX_DESCRIPTORS, socket.MSG_CMSG_CLOEXEC
            )
        try:
            if flags & socket.MSG_CTRUNC and len(fds) < MAX_DESCRIPTORS:  # there was room for one more to come
                raise _no_descriptors()
            if flags & (socket.MSG_TRUNC | socket.MSG_CTRUNC):
                raise ValueError("too long")
            if not data:
                raise Again(f"handshake: {self.whom} closed the connection")
            return parse(data), fds
        except ValueError as error:
            close_all(fds)
            raise Again(f"handshake: not a message of m2n: {error}") from error
        except SetupError:
            close_all(fds)
            raise


class TcpChannel(Channel):
    """A TCP connection between hosts.

    Args:
        job_key: that of all ranks of the job; None: both ends do without (insecure).
        first: what was read of it already.

    Raises:
        Again: the other end is none of ours. Refused: it has another version, or a key where this end has none.
    """

    is_local = False

    def __init__(
        self,
        connection: socket.socket,
        job_key: str | None,
        is_listener: bool,
        deadline: Deadline,
        first: bytes = b"",
    ) -> None:
        super().__init__(connection, peer_name(connection), deadline)
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._first = first
        self._counts = {True: 0, False: 0}  # messages so far, by whether the listener sent them
        self._is_listener = is_listener
        nonce, is_keyed = secrets.token_bytes(_NONCE_BYTES), job_key is not None
        hello = {"m2n": PROTOCOL_VERSION, "nonce": nonce.hex(), "is_keyed": is_keyed}
        # Who connects speaks first: a listener says nothing to what does not.
        data = self._read() if is_listener else b""
        self._write(json.dumps(hello).encode())
        theirs = self._check_hello(data or self._read(), is_keyed)
        both = theirs + nonce if is_listener else nonce + theirs
        self.session = hmac.digest((job_key or "").encode(), b"m2n" + both, "sha256")

    def _check_hello(self, data: bytes, is_keyed: bool) -> bytes:
        """The other end's nonce."""
        try:
            hello = parse(data)
            nonce = bytes.fromhex(hello["nonce"])
            version, theirs = hello["m2n"], hello["is_keyed"]
            if len(nonce) != _NONCE_BYTES or not isinstance(theirs, bool):
                raise ValueError("not a hello")
        except (ValueError, KeyError, TypeError) as error:
            raise Again(f"handshake: {self.whom} does not speak m2n: {printable(error, 80)}") from error
        if version != PROTOCOL_VERSION:
            raise Refused(
                f"handshake: {self.whom} speaks version {printable(version, 20)} of the protocol, this process "
                f"{PROTOCOL_VERSION}; install the same m2n on both"
            )
        if theirs != is_keyed:
            with_key, without = ("it", "this process") if theirs else ("this process", "it")
            raise Refused(
                f"handshake with {self.whom}: {with_key} has a job key and {without} is insecure; "
                "give all ranks the same Config(job_key=...) or M2N_JOB_KEY"
            )
        return nonce

    def _mac(self, is_by_listener: bool, data: bytes) -> bytes:
        about = struct.pack(">?Q", is_by_listener, self._counts[is_by_listener])
        self._counts[is_by_listener] += 1
        return hmac.digest(self.session, about + data, "sha256")

    def send(self, message: dict[str, Any], fds: list[int]) -> None:
        assert not fds  # link_transport() has seen to it
        data = json.dumps(message).encode()
        self._write(self._mac(self._is_listener, data) + data)

    def receive(self) -> tuple[dict[str, Any], list[int]]:
        signed = self._read()
        mac, data = signed[:_MAC_BYTES], signed[_MAC_BYTES:]
        if not hmac.compare_digest(mac, self._mac(not self._is_listener, data)):
            raise Refused(
                f"handshake: {self.whom} does not sign with this job's key; all ranks need the same "
                "Config(job_key=...) or M2N_JOB_KEY"
            )
        try:
            return parse(data), []
        except ValueError as error:
            raise Again(f"handshake: not a message of m2n: {error}") from error

    def _write(self, data: bytes) -> None:
        with speaking(self.whom, self.connection, self.deadline):
            self.connection.sendall(struct.pack(">I", len(data)) + data)

    def _read(self) -> bytes:
        (num_bytes,) = struct.unpack(">I", self._read_exactly(4))
        if num_bytes > MAX_MESSAGE_BYTES + _MAC_BYTES:
            raise Again(f"handshake: {self.whom} does not speak m2n: a message of {num_bytes} bytes")
        return self._read_exactly(num_bytes)

    def _read_exactly(self, num_bytes: int) -> bytes:
        first, self._first = self._first[:num_bytes], self._first[num_bytes:]
        return first + read_exactly(self.connection, num_bytes - len(first), self.deadline, self.whom)


def peer_name(connection: socket.socket) -> str:
    """host:port of the other end. Raises Again."""
    with speaking("who connected"):  # and has gone since
        return join_address(*connection.getpeername()[:2])


def join_address(host: str, port: int) -> str:
    """host:port, or [host]:port for IPv6."""
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def split_address(address: str) -> tuple[str, int]:
    """host and port of host:port. Raises ValueError."""
    host, colon, port = address.rpartition(":")
    if not colon or not host or not port.isdecimal() or not port.isascii() or len(port) > 5 or int(port) > 65535:
        raise ValueError(f"expected host:port, got {printable(address)!r}")
    return host.removeprefix("[").removesuffix("]"), int(port)
