# SPDX-License-Identifier: Apache-2.0
"""The data connection of a link over TCP: a second connection beside the control connection, which carries rows.

Between hosts the attention rank makes it, to the address that it has joined at. It shows that it belongs to the
handshake under way: by a token, which the expert rank has told there, and an HMAC of the token by the session's secret.
A token works once, and only while its handshake goes on. Within a host the expert rank makes both ends.
"""

from __future__ import annotations

import hmac
import os
import secrets
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from .channel import Again, Channel, Refused, read_exactly, speaking
from .deadline import Deadline

# As the length of a message of a control connection this were a gigabyte: none begins so.
MAGIC = b"m2nD"
TOKEN_BYTES = 16
_MAC_BYTES = 32
_LOOK_S = 0.05


def _proof(session: bytes, what: bytes, token: bytes) -> bytes:
    return hmac.digest(session, what + token, "sha256")


class Awaited:
    """A data connection that one handshake waits for."""

    def __init__(self, session: bytes) -> None:
        self.token = secrets.token_bytes(TOKEN_BYTES)
        self._session = session
        self._has_come = threading.Event()
        self._connection: socket.socket | None = None

    def proof(self, what: bytes) -> bytes:
        """What shows that one belongs to this handshake."""
        return _proof(self._session, what, self.token)

    def bring(self, connection: socket.socket) -> None:
        """It has come."""
        self._connection = connection
        self._has_come.set()

    def wait(self, control: Channel) -> socket.socket:
        """The connection, which is the caller's. Raises Again when none comes by the deadline, or the peer goes."""
        while not self._has_come.wait(control.deadline.cut(_LOOK_S).seconds):
            if control.deadline.has_expired or control.has_ended():
                raise Again(f"handshake: {control.whom} made no data connection")
        assert self._connection is not None
        connection, self._connection = self._connection, None
        return connection

    def close(self) -> None:
        """Closes what came and was not taken."""
        if self._connection is not None:
            self._connection.close()


class Expected:
    """The expert side: the data connections that handshakes at one listener wait for."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._waiting: dict[bytes, Awaited] = {}  # by token

    @contextmanager
    def one(self, session: bytes) -> Iterator[Awaited]:
        """One data connection of this session may come until the block ends."""
        awaited = Awaited(session)
        with self._lock:
            self._waiting[awaited.token] = awaited
        try:
            yield awaited
        finally:
            with self._lock:
                self._waiting.pop(awaited.token, None)
            awaited.close()

    def welcome(self, connection: socket.socket, deadline: Deadline, prove: Callable[[socket.socket], None]) -> None:
        """Reads a hello behind its MAGIC, calls prove(connection), and hands the connection over to the handshake that
        waits for it.

        Raises:
            Again: none does; nothing is sent then.
        """
        whom = "a data connection"
        hello = read_exactly(connection, TOKEN_BYTES + _MAC_BYTES, deadline, whom)
        token, proof = hello[:TOKEN_BYTES], hello[TOKEN_BYTES:]
        with self._lock:
            awaited = self._waiting.get(token)
            if awaited is None or not hmac.compare_digest(proof, awaited.proof(b"data")):
                raise Again("handshake: a data connection belongs to no handshake that is under way")
            prove(connection)
            with speaking(whom, connection, deadline):
                connection.sendall(awaited.proof(b"data ok"))  # the first bytes of a connection: they fit
            _make_ready(connection)
            del self._waiting[token]
            awaited.bring(connection)


def connect(control: socket.socket, session: bytes, token: bytes, deadline: Deadline) -> socket.socket:
    """The attention side: a data connection to where `control` goes. Raises Again and Shortage."""
    whom = "the data connection"
    with speaking(whom):
        connection = socket.socket(control.family, socket.SOCK_STREAM)
    try:
        with speaking(whom, connection, deadline):
            connection.connect(control.getpeername())
        with speaking(whom, connection, deadline):
            connection.sendall(MAGIC + token + _proof(session, b"data", token))
        if not hmac.compare_digest(
            read_exactly(connection, _MAC_BYTES, deadline, whom), _proof(session, b"data ok", token)
        ):
            raise Again("handshake: who answered the data connection does not belong to this handshake")
        _make_ready(connection)
        return connection
    except BaseException:
        connection.close()
        raise


def pair(deadline: Deadline) -> tuple[socket.socket, socket.socket]:
    """Both ends of a TCP connection within this host, for the peer gets its end with the reply. Raises Shortage."""
    whom = "a data connection within this host"
    with speaking(whom), socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        listening.listen(8)
        ours = socket.socket()
        try:
            with speaking(whom, ours, deadline):
                ours.connect(listening.getsockname())
            while True:  # anybody on this host may connect too
                with speaking(whom, listening, deadline):
                    theirs, address = listening.accept()
                if address == ours.getsockname():
                    break
                theirs.close()
        except BaseException:
            ours.close()
            raise
    _make_ready(ours)
    _make_ready(theirs)
    return ours, theirs


def received(fds: list[int]) -> socket.socket:
    """The end of a pair() that the peer has sent behind its other descriptors; takes it. Raises Refused."""
    if fds:
        fd = fds.pop()
        try:
            connection = socket.socket(fileno=fd)
        except OSError:
            os.close(fd)
        else:
            if connection.type == socket.SOCK_STREAM and connection.family in (socket.AF_INET, socket.AF_INET6):
                return connection
            connection.close()
    raise Refused("handshake: the peer sent no data connection, which the transport 'tcp' needs")


def _make_ready(connection: socket.socket) -> None:
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    connection.settimeout(None)
