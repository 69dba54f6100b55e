# SPDX-License-Identifier: Apache-2.0
"""How many connections may be in a handshake at one time, and who goes first when there is no room for more."""

from __future__ import annotations

import contextlib
import socket
import threading
import time
from collections import Counter

from .deadline import Deadline

_MAX_UNPROVEN = 64
_MAX_PROVEN = 64
# So long nobody is dropped: proper peers show who they are in a fraction of it.
_GRACE_S = 0.5


class WaitingRoom:
    """Connections at one listening socket whose handshake goes on.

    Those that have not shown yet that they are right have room of their own. When it is full the next one waits until
    one has left; or else takes the place of the oldest of the source that has the most.
    """

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._unproven: dict[socket.socket, tuple[float, str]] = {}  # since when, from where; oldest first
        self._proven: set[socket.socket] = set()
        self._dropped: set[socket.socket] = set()  # their threads have not noticed yet
        self._is_closed = False

    def enter(self, connection: socket.socket, source: str) -> bool:
        """Waits for room; False: closed meanwhile."""
        with self._changed:
            while not self._is_closed and not self._has_room():
                self._changed.wait(self._make_room())
            if not self._is_closed:
                self._unproven[connection] = (time.monotonic(), source)
            return not self._is_closed

    def _has_room(self) -> bool:
        return len(self._unproven) < _MAX_UNPROVEN and len(self._proven) < _MAX_PROVEN

    def _make_room(self) -> float | None:
        """Drops one that has had its time; for how long to wait, None: until something changes."""
        if len(self._unproven) < _MAX_UNPROVEN:
            return None
        counts = Counter(source for _, source in self._unproven.values())
        most = max(counts, key=lambda source: counts[source])
        connection, since = next((at, since) for at, (since, source) in self._unproven.items() if source == most)
        wait_s = since + _GRACE_S - time.monotonic()
        if wait_s > 0:
            return wait_s
        del self._unproven[connection]
        self._dropped.add(connection)
        _end(connection, socket.SHUT_RDWR)
        return 0.0

    def prove(self, connection: socket.socket) -> None:
        """It has shown that it belongs to the job."""
        with self._changed:
            if self._unproven.pop(connection, None) is not None:
                self._proven.add(connection)
                self._changed.notify_all()

    def was_dropped(self, connection: socket.socket) -> bool:
        """Was it ended here to make room?"""
        with self._changed:
            return connection in self._dropped

    def leave(self, connection: socket.socket) -> None:
        """Its handshake is over; nothing here touches it any more."""
        with self._changed:
            self._unproven.pop(connection, None)
            self._proven.discard(connection)
            self._dropped.discard(connection)
            self._changed.notify_all()

    def close(self) -> None:
        """Ends all that are here, and whoever waits."""
        with self._changed:
            self._is_closed = True
            for connection in (*self._unproven, *self._proven):
                _end(connection, socket.SHUT_RD)  # a goodbye can still be said
            self._changed.notify_all()

    def wait_empty(self, deadline: Deadline) -> None:
        """Until all have noticed."""
        with self._changed:
            self._changed.wait_for(lambda: not (self._unproven or self._proven or self._dropped), deadline.remaining())


def _end(connection: socket.socket, how: int) -> None:
    """Wakes the thread that reads from it."""
    with contextlib.suppress(OSError):
        connection.shutdown(how)
