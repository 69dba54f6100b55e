# SPDX-License-Identifier: Apache-2.0
"""Where an expert rank listens for attention ranks that join."""

from __future__ import annotations

import errno
import os
import secrets
import socket
import sys
import threading

from ._C import SetupError
from .bootstrap import Identity, NativeComm, check_introduction, descriptors, introduction, join, link_transport
from .channel import HANDSHAKE_TIMEOUT_S, Channel, TcpChannel, UnixChannel, close_all, join_address
from .interfaces import resolve_bind

# Handshakes at one time: more connections wait in the listener's queue.
_MAX_HANDSHAKES = 64


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
        self._slots = threading.BoundedSemaphore(_MAX_HANDSHAKES)
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
        self._threads = []
        for listening in self._sockets:
            listening.listen(128)
            self._threads.append(
                threading.Thread(target=self._serve, args=(listening,), name="m2n-listener", daemon=True)
            )
            self._threads[-1].start()

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
        """Ends the threads and frees the addresses. In a forked child only this process's descriptors go."""
        if os.getpid() == self._pid:
            for listening in self._sockets:
                try:
                    listening.shutdown(socket.SHUT_RDWR)  # wakes accept(), which close() alone would not
                except OSError:
                    pass
            for thread in self._threads:
                if thread is not threading.current_thread():
                    thread.join(timeout=HANDSHAKE_TIMEOUT_S)
        for listening in self._sockets:
            listening.close()

    def _serve(self, listening: socket.socket) -> None:
        while True:
            try:
                connection, _ = listening.accept()
            except OSError:
                return
            # One thread each: a joiner that is slow or stuck must not keep the others out.
            self._slots.acquire()
            threading.Thread(target=self._answer, args=(connection,), name="m2n-handshake", daemon=True).start()

    def _answer(self, connection: socket.socket) -> None:
        channel: Channel | None = None
        with connection:
            try:
                channel = self._channel(connection)
                self._welcome(channel)
            except (SetupError, ValueError, OSError, RuntimeError) as error:
                # The joiner raises it; here it is nobody's call that fails, so it is said on stderr.
                print(f"m2n: {self._identity}: a peer could not join: {error}", file=sys.stderr, flush=True)
                try:
                    if channel is not None:
                        channel.send({"error": str(error)}, [])
                except OSError:
                    pass
            finally:
                self._slots.release()

    def _channel(self, connection: socket.socket) -> Channel:
        if connection.family == socket.AF_UNIX:
            return UnixChannel(connection)
        return TcpChannel(connection, self._identity.job_key, is_listener=True)

    def _welcome(self, channel: Channel) -> None:
        message, fds = channel.receive()
        try:
            transport = link_transport(self._identity, channel)
            check_introduction(self._identity, message, len(fds), transport)
            if message.get("to_life") != self._identity.life:
                raise SetupError(f"handshake: {self._identity} has another life than the one that was looked up")
            offer = self._native.offer(message["rank"], message["life"], transport == "ucx")
        except BaseException:
            close_all(fds)
            raise
        offered = descriptors(offer)
        try:
            go_live = join(self._native, self._identity, offer["peer_idx"], message, fds, channel)
            channel.send(introduction(self._identity, offer, transport), offered)
        finally:
            close_all(offered)
        go_live()
