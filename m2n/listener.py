# SPDX-License-Identifier: Apache-2.0
"""Where an expert rank listens for attention ranks that join."""

from __future__ import annotations

import contextlib
import errno
import os
import secrets
import socket
import threading

from . import data_connection
from ._C import SetupError
from .channel import (
    HANDSHAKE_TIMEOUT_S,
    MAX_ERROR_CHARS,
    Again,
    Channel,
    Shortage,
    TcpChannel,
    UnixChannel,
    close_all,
    has_descriptors,
    join_address,
    read_exactly,
    shortage,
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
)
from .interfaces import resolve_bind
from .notes import printable, say
from .waiting_room import WaitingRoom

# Between looks where the system has nothing left for a moment.
_PAUSE_S = 0.1
_CLOSE_S = 2.0


class Listener:
    """The expert rank's side: addresses of its own, and threads that answer handshakes until closed.

    Args:
        bind: as `Config.bind`; "": no network address.

    Raises:
        SetupError: the address is taken, or not of this host.
    """

    def __init__(self, native: NativeComm, identity: Identity, bind: str = "") -> None:
        self._native = native
        self._identity = identity
        self._pid = os.getpid()
        self._is_closed = threading.Event()
        self._data = data_connection.Expected()
        # The abstract namespace: nothing in the file system, gone with the process.
        local = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self.address, self.network_address = "m2n-" + secrets.token_hex(16), ""
        local.bind("\0" + self.address)
        self._sockets = [local]
        if bind:
            try:
                self._sockets.append(self._bind(bind))
            except BaseException:
                local.close()
                raise
        self._threads: list[threading.Thread] = []
        # Rooms of their own: whoever crowds the network keeps no rank of this host out.
        self._rooms = [WaitingRoom() for _ in self._sockets]
        for listening, room in zip(self._sockets, self._rooms):
            listening.listen(128)
            self._threads.append(
                threading.Thread(target=self._serve, args=(listening, room), name="m2n-listener", daemon=True)
            )
        try:
            for thread in self._threads:
                thread.start()
        except RuntimeError as error:
            self.close()
            raise SetupError(f"{identity} cannot start a thread to listen: {error}") from error

    def _bind(self, bind: str) -> socket.socket:
        if self._identity.job_key is None and not self._identity.insecure:
            raise SetupError(
                f"bind: at {bind!r} anybody could join {self._identity}: give all ranks the same Config(job_key=...) "
                "or M2N_JOB_KEY, or Config(insecure=True) where the network is yours alone"
            )
        host, port = resolve_bind(bind)
        listening = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET, socket.SOCK_STREAM)
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            listening.bind((host, port))
        except OSError as error:
            listening.close()
            why = "is no address of this host" if error.errno == errno.EADDRNOTAVAIL else f"cannot be used: {error}"
            raise SetupError(f"bind: {join_address(host, port)} {why} (Config.bind is {bind!r})") from error
        self.network_address = join_address(*listening.getsockname()[:2])
        return listening

    def close(self) -> None:
        """Ends the threads, what is in a handshake, and frees the addresses. In a forked child only this process's
        descriptors go."""
        if os.getpid() == self._pid:
            self._is_closed.set()
            for listening, room in zip(self._sockets, self._rooms):
                with contextlib.suppress(OSError):
                    listening.shutdown(socket.SHUT_RDWR)  # wakes accept(), which close() alone would not
                room.close()
            deadline = Deadline(_CLOSE_S)
            for thread in self._threads:
                if thread.ident is not None and thread is not threading.current_thread():
                    thread.join(deadline.remaining())
            for room in self._rooms:
                room.wait_empty(deadline)
        for listening in self._sockets:
            listening.close()

    def _serve(self, listening: socket.socket, room: WaitingRoom) -> None:
        """Outlives whatever passes, as a moment without descriptors, threads or memory: only close() ends it."""
        while not self._is_closed.is_set():
            try:
                self._take_one(listening, room)
            except Exception as error:
                if self._is_closed.is_set():
                    return
                why = isinstance(error, OSError) and shortage(error) or error
                say(f"{self._identity} cannot answer a peer that joins, which tries again: {why}")
                self._is_closed.wait(_PAUSE_S)

    def _take_one(self, listening: socket.socket, room: WaitingRoom) -> None:
        connection, address = listening.accept()
        source = "" if connection.family == socket.AF_UNIX else address[0]
        try:
            if not room.enter(connection, source):
                raise ConnectionAbortedError("closed")
            # One thread each: a joiner that is slow or stuck must not keep the others out.
            about = (connection, room, source)
            threading.Thread(target=self._answer, args=about, name="m2n-handshake", daemon=True).start()
        except BaseException:
            room.leave(connection)
            connection.close()
            raise

    def _answer(self, connection: socket.socket, room: WaitingRoom, source: str) -> None:
        try:
            channel = self._channel(connection, room)
            if channel is None:
                return None
            with channel:
                try:
                    self._welcome(channel, room)
                except Exception as error:
                    if self._is_closed.is_set():
                        return channel.say_goodbye()
                    self._say(error, connection, room, source)
                    passes = isinstance(error, (Again, Shortage)) or not has_descriptors()
                    with contextlib.suppress(SetupError):
                        channel.send({"error": printable(error, MAX_ERROR_CHARS), "again": passes}, [])
        except Exception as error:
            self._say(error, connection, room, source)
        finally:
            room.leave(connection)

    def _say(self, error: Exception, connection: socket.socket, room: WaitingRoom, source: str) -> None:
        """The joiner raises it; here it is nobody's call that fails, so it is said on stderr."""
        if not self._is_closed.is_set():
            why = "others waited while it said nothing right" if room.was_dropped(connection) else error
            say(f"{self._identity}: a peer could not join: {why}", source)

    def _channel(self, connection: socket.socket, room: WaitingRoom) -> Channel | None:
        """None: it was a data connection, and is where it belongs. What fails is closed."""
        deadline = Deadline(HANDSHAKE_TIMEOUT_S)
        try:
            if connection.family == socket.AF_UNIX:
                return UnixChannel(connection, deadline)
            first = read_exactly(connection, len(data_connection.MAGIC), deadline, "who connected")
            if first != data_connection.MAGIC:
                return TcpChannel(connection, self._identity.job_key, True, deadline, first)
            self._data.welcome(connection, deadline, room.prove)
            return None
        except BaseException:
            connection.close()
            raise

    def _welcome(self, channel: Channel, room: WaitingRoom) -> None:
        message, fds = channel.receive()
        with contextlib.ExitStack() as stack:
            stack.callback(close_all, fds)
            transport = link_transport(self._identity, channel)
            check_introduction(self._identity, message, len(fds), transport)
            if message.get("to_life") != self._identity.life:
                raise Again(f"handshake: {self._identity} has another life than the one that was looked up")
            room.prove(channel.connection)
            data, theirs = self._data_connection(transport, channel, stack)
            offer = stack.enter_context(
                offered(self._native, message["rank"], message["life"], transport, message["link"])
            )
            attach(self._native, offer["peer_idx"], message, fds, data)
            reply = introduction(self._identity, offer, transport, channel.needs_heartbeats)
            channel.send(reply, [*descriptors(offer), *theirs])
            answer, _ = channel.receive()
            if answer.get("joined") is not True:
                raise SetupError(f"it says: {printable(answer.get('error', 'nothing'), MAX_ERROR_CHARS)}")
            room.leave(channel.connection)
            if self._is_closed.is_set():  # the connection may be ended already
                raise Again(f"handshake: {self._identity} is closing")
            go_live(self._native, self._identity, offer["peer_idx"], message, channel)

    def _data_connection(
        self, transport: str, channel: Channel, stack: contextlib.ExitStack
    ) -> tuple[socket.socket | None, list[int]]:
        """Where rows go over TCP, this side's end, and the descriptor of the other where it goes with the reply."""
        if transport != "tcp":
            return None, []
        if channel.is_local:
            ours, theirs = data_connection.pair(channel.deadline)
            stack.enter_context(theirs)
            return stack.enter_context(ours), [theirs.fileno()]
        awaited = stack.enter_context(self._data.one(channel.session))
        channel.send({"token": awaited.token.hex()}, [])
        return stack.enter_context(awaited.wait(channel)), []
