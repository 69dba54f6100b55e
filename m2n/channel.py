# SPDX-License-Identifier: Apache-2.0
"""Control connections: messages of JSON, at most 64 KiB, between two ranks that meet.

On one host over a Unix socket, with file descriptors beside the text, between processes of one user. Between hosts over
TCP, where each message is signed: both ends send a nonce, and what follows carries an HMAC-SHA256 by the job's key of
both nonces, the direction, a count and the text. So nobody without the key can join, repeat what was said in another
session, or change what is said. Nothing is encrypted. Nothing is unpickled.
"""

from __future__ import annotations

import hashlib
import hmac
import json
import os
import secrets
import socket
import struct
from abc import ABC, abstractmethod
from typing import Any

from ._C import SetupError

PROTOCOL_VERSION = 3
MAX_MESSAGE_BYTES = 64 * 1024
MAX_DESCRIPTORS = 3
HANDSHAKE_TIMEOUT_S = 10.0
_NONCE_BYTES = 32
_MAC_BYTES = hashlib.sha256().digest_size


class Refused(SetupError):
    """The peer answered the handshake with an error; trying again cannot help."""


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
    """A connected socket and how messages go over it. It closes the socket, unless that was detached."""

    is_local: bool  # the peer is on this host, and of this user

    def __init__(self, connection: socket.socket) -> None:
        self.connection = connection
        connection.settimeout(HANDSHAKE_TIMEOUT_S)

    @abstractmethod
    def send(self, message: dict[str, Any], fds: list[int]) -> None:
        """One message, and descriptors where the channel is local. Raises OSError."""

    @abstractmethod
    def receive(self) -> tuple[dict[str, Any], list[int]]:
        """One message and its descriptors. Raises SetupError when it is none of ours, and OSError."""

    @property
    @abstractmethod
    def is_of_this_process(self) -> bool:
        """Are both ends of one process?"""

    @abstractmethod
    def pidfd(self) -> int:
        """A descriptor that tells of the peer's death; -1 where there is none."""

    def __enter__(self) -> Channel:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.connection.close()


class UnixChannel(Channel):
    """A SOCK_SEQPACKET connection of one host."""

    is_local = True

    def __init__(self, connection: socket.socket) -> None:
        super().__init__(connection)
        data = connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, struct.calcsize("3i"))
        self._pid, uid, _ = struct.unpack("3i", data)
        if uid != os.geteuid():
            raise SetupError(
                f"handshake: the peer runs as user {uid}, this process as {os.geteuid()}; they must be equal"
            )

    def send(self, message: dict[str, Any], fds: list[int]) -> None:
        socket.send_fds(self.connection, [json.dumps(message).encode()], fds)

    def receive(self) -> tuple[dict[str, Any], list[int]]:
        data, fds, flags, _ = socket.recv_fds(
            self.connection, MAX_MESSAGE_BYTES, MAX_DESCRIPTORS, socket.MSG_CMSG_CLOEXEC
        )
        try:
            if flags & (socket.MSG_TRUNC | socket.MSG_CTRUNC):
                raise ValueError("too long")
            if not data:
                raise ValueError("the connection was closed")
            return parse(data), fds
        except ValueError as error:
            close_all(fds)
            raise SetupError(f"handshake: not a message of m2n: {error}") from error

    @property
    def is_of_this_process(self) -> bool:
        return int(self._pid) == os.getpid()

    def pidfd(self) -> int:
        if self._pid in (0, os.getpid()):  # 0: in another pid namespace
            return -1
        try:
            return os.pidfd_open(self._pid)
        except OSError:
            return -1


class TcpChannel(Channel):
    """A TCP connection between hosts.

    Args:
        job_key: that of all ranks of the job; None: both ends do without (insecure).

    Raises:
        SetupError: the other end is none of ours. Refused: it has another version, or a key where this end has none.
    """

    is_local = False

    def __init__(self, connection: socket.socket, job_key: str | None, is_listener: bool) -> None:
        super().__init__(connection)
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        host, port = connection.getpeername()[:2]
        self.peer_address = join_address(host, port)
        self._counts = {True: 0, False: 0}  # messages so far, by whether the listener sent them
        self._is_listener = is_listener
        nonce, is_keyed = secrets.token_bytes(_NONCE_BYTES), job_key is not None
        hello = {"m2n": PROTOCOL_VERSION, "nonce": nonce.hex(), "is_keyed": is_keyed}
        self._write(json.dumps(hello).encode())
        theirs = self._check_hello(self._read(), is_keyed)
        both = theirs + nonce if is_listener else nonce + theirs
        self._session = hmac.digest((job_key or "").encode(), b"m2n" + both, "sha256")

    def _check_hello(self, data: bytes, is_keyed: bool) -> bytes:
        """The other end's nonce."""
        try:
            hello = parse(data)
            nonce = bytes.fromhex(hello["nonce"])
            version, theirs = hello["m2n"], hello["is_keyed"]
            if len(nonce) != _NONCE_BYTES or not isinstance(theirs, bool):
                raise ValueError("not a hello")
        except (ValueError, KeyError, TypeError) as error:
            raise SetupError(f"handshake: {self.peer_address} does not speak m2n: {str(error)[:80]}") from error
        if version != PROTOCOL_VERSION:
            raise Refused(
                f"handshake: {self.peer_address} speaks version {str(version)[:20]} of the protocol, this process "
                f"{PROTOCOL_VERSION}; install the same m2n on both"
            )
        if theirs != is_keyed:
            with_key, without = ("it", "this process") if theirs else ("this process", "it")
            raise Refused(
                f"handshake with {self.peer_address}: {with_key} has a job key and {without} is insecure; "
                "give all ranks the same Config(job_key=...) or M2N_JOB_KEY"
            )
        return nonce

    def _mac(self, is_by_listener: bool, data: bytes) -> bytes:
        about = struct.pack(">?Q", is_by_listener, self._counts[is_by_listener])
        self._counts[is_by_listener] += 1
        return hmac.digest(self._session, about + data, "sha256")

    def send(self, message: dict[str, Any], fds: list[int]) -> None:
        assert not fds  # link_transport() has seen to it
        data = json.dumps(message).encode()
        self._write(self._mac(self._is_listener, data) + data)

    def receive(self) -> tuple[dict[str, Any], list[int]]:
        signed = self._read()
        mac, data = signed[:_MAC_BYTES], signed[_MAC_BYTES:]
        if not hmac.compare_digest(mac, self._mac(not self._is_listener, data)):
            raise Refused(
                f"handshake: {self.peer_address} does not sign with this job's key; all ranks need the same "
                "Config(job_key=...) or M2N_JOB_KEY"
            )
        try:
            return parse(data), []
        except ValueError as error:
            raise SetupError(f"handshake: not a message of m2n: {error}") from error

    def _write(self, data: bytes) -> None:
        self.connection.sendall(struct.pack(">I", len(data)) + data)

    def _read(self) -> bytes:
        (num_bytes,) = struct.unpack(">I", self._read_exactly(4))
        if num_bytes > MAX_MESSAGE_BYTES + _MAC_BYTES:
            raise SetupError(f"handshake: {self.peer_address} does not speak m2n: a message of {num_bytes} bytes")
        return self._read_exactly(num_bytes)

    def _read_exactly(self, num_bytes: int) -> bytes:
        data = b""
        while len(data) < num_bytes:
            part = self.connection.recv(num_bytes - len(data))
            if not part:
                raise SetupError(f"handshake: {self.peer_address} closed the connection")
            data += part
        return data

    @property
    def is_of_this_process(self) -> bool:
        return False

    def pidfd(self) -> int:
        return -1


def join_address(host: str, port: int) -> str:
    """host:port, or [host]:port for IPv6."""
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def split_address(address: str) -> tuple[str, int]:
    """host and port of host:port. Raises ValueError."""
    host, colon, port = address.rpartition(":")
    if not colon or not host or not port.isdecimal() or int(port) > 65535:
        raise ValueError(f"expected host:port, got {address!r}")
    return host.removeprefix("[").removesuffix("]"), int(port)
