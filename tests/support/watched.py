# SPDX-License-Identifier: Apache-2.0
"""A comm that the native watcher watches, with one link, of which the test holds the other end."""

from __future__ import annotations

import socket
import struct
import time
from typing import Any

from bodies import SMALL

from m2n import _C
from m2n.channel import close_all

HEARTBEAT_S = 0.05
LOST_AFTER_S = 3 * HEARTBEAT_S
PATIENCE_S = 10.0
SIZE = 25


class Watched:
    """The comm, the end, and what goes over it."""

    def __init__(
        self, send_every_s: float = HEARTBEAT_S, lost_after_s: float = LOST_AFTER_S, stream: bool = True
    ) -> None:
        self.native: Any = _C.AttentionComm(SMALL._native(), 0, 1, "shm")
        offer = self.native.offer(0, 1)
        close_all([fd for fd, _ in offer["objects"]])
        kind = socket.SOCK_STREAM if stream else socket.SOCK_SEQPACKET
        ours, self.end = socket.socketpair(socket.AF_UNIX, kind)
        self.end.settimeout(PATIENCE_S)
        self.native.watch(offer["peer_idx"], ours.detach(), -1, send_every_s, lost_after_s)

    @property
    def peer(self) -> tuple[str, str]:
        ((_, state, _, cause),) = self.native.peers()
        return state, cause

    def read(self) -> tuple[int, int, int]:
        """The next heartbeat: when it was sent, the echo, how long that was held."""
        data = b""
        while len(data) < SIZE:
            data += self.end.recv(SIZE - len(data))
        assert data[:1] == b"H"
        return struct.unpack("<3q", data[1:])  # type: ignore[return-value]

    def beat(self, sent_ns: int = 1, echo_ns: int = 1, held_ns: int = 0) -> bytes:
        return b"H" + struct.pack("<3q", sent_ns, echo_ns, held_ns)

    def wait_end(self) -> tuple[str, str]:
        deadline = time.monotonic() + PATIENCE_S
        while self.peer[0] == "live":
            assert time.monotonic() < deadline
            time.sleep(0.002)
        return self.peer
