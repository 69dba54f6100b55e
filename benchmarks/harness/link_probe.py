# SPDX-License-Identifier: Apache-2.0
"""What a link gives to plain TCP sockets, beside which m2n's figures stand: two jobs, one at each end."""

from __future__ import annotations

import socket
import statistics
import time
from typing import Any

_PORT = 4783
_TIMEOUT_S = 30.0
_ROUND_TRIPS = 60
_BULK_BYTES = 1 << 20  # of one call


def _receive(connection: socket.socket, num_bytes: int) -> None:
    into = memoryview(bytearray(num_bytes))
    while into:
        count = connection.recv_into(into)
        if not count:
            raise ConnectionError("the other end of the link has gone")
        into = into[count:]


def _set_up(connection: socket.socket) -> None:
    connection.settimeout(_TIMEOUT_S)
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)


def _connect(address: str) -> socket.socket:
    """To the other end as soon as it listens."""
    until = time.monotonic() + _TIMEOUT_S
    while True:
        try:
            return socket.create_connection((address, _PORT), timeout=_TIMEOUT_S)
        except ConnectionRefusedError:
            if time.monotonic() > until:
                raise
            time.sleep(0.01)


def answer(kept: dict[Any, Any], address: str, num_bytes: int) -> float:
    """The far end. Returns how much came in bulk, Gbit/s, the first half of the time left out: TCP begins slowly."""
    with socket.create_server((address, _PORT)) as listener:
        listener.settimeout(_TIMEOUT_S)
        connection, _ = listener.accept()
    with connection:
        _set_up(connection)
        for size in [1] * _ROUND_TRIPS + [num_bytes] * _ROUND_TRIPS:
            _receive(connection, size)
            connection.sendall(b"!")
        into, came = bytearray(_BULK_BYTES), [(time.perf_counter(), 0)]
        while count := connection.recv_into(into):
            came.append((time.perf_counter(), came[-1][1] + count))
    middle_s = (came[0][0] + came[-1][0]) / 2
    begin_s, begin = next(each for each in came if each[0] >= middle_s)
    end_s, end = came[-1]
    return (end - begin) * 8e-9 / (end_s - begin_s)


def ask(kept: dict[Any, Any], address: str, num_bytes: int, bulk_s: float) -> dict[str, float]:
    """The near end. Returns, in milliseconds and medians: a round trip of one byte, and `num_bytes` one way: the time
    until a byte comes back, less half a round trip."""
    times_ms: dict[int, list[float]] = {1: [], num_bytes: []}
    with _connect(address) as connection:
        _set_up(connection)
        for size, times in times_ms.items():
            for _ in range(_ROUND_TRIPS):
                began = time.perf_counter()
                connection.sendall(bytes(size))
                _receive(connection, 1)
                times.append((time.perf_counter() - began) * 1e3)
        until, data = time.perf_counter() + bulk_s, bytes(_BULK_BYTES)
        while time.perf_counter() < until:
            connection.sendall(data)
    round_trip_ms, there_and_back_ms = (statistics.median(times) for times in times_ms.values())
    return {"round_trip_ms": round_trip_ms, "message_ms": there_and_back_ms - round_trip_ms / 2}
