# SPDX-License-Identifier: Apache-2.0
"""The rank processes of `m2n-bench copies`:
python -m m2n.benchmarks.exchange.copies_ranks FOLDER ROLE RANK. Needs numpy only.

One attention rank, and expert ranks, first with m2n, then over Unix sockets. Each verb is made between the two marks of
native/count_copies.c, where that is loaded. Results go to FOLDER/ROLE.RANK.json: a list of {contender, verb, ...}.
"""

from __future__ import annotations

import ctypes
import json
import socket
import sys
import time
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

import m2n

_WARM_UP = 3
_TIMEOUT_S = 20.0

Counts = dict[str, int]


class Counter:
    """Counts by (contender, verb), once the first rounds are over."""

    def __init__(self, least: int) -> None:
        self.counts: dict[tuple[str, str], Counts] = defaultdict(lambda: defaultdict(int))
        self.is_warm = False
        self._least = ctypes.c_uint64(least)
        self._found = (ctypes.c_uint64 * 2)()
        self._library = ctypes.CDLL(None)
        self.is_loaded = hasattr(self._library, "m2n_copies_begin")

    def count(self, contender: str, verb: str, call: Callable[..., Any], *arguments: Any) -> Any:
        """Makes the call between the marks."""
        if self.is_loaded:
            self._library.m2n_copies_begin(self._least)
        result = call(*arguments)
        if self.is_loaded:
            self._library.m2n_copies_end(self._found)
        self.add(contender, verb, memcpy_bytes=self._found[0], kernel_bytes=self._found[1])
        return result

    def add(self, contender: str, verb: str, **values: int) -> None:
        """Adds what is known otherwise."""
        for name, value in values.items() if self.is_warm else ():
            self.counts[contender, verb][name] += value

    def write(self, path: Path) -> None:
        """All rows; memcpy and kernel bytes only where the library is loaded."""
        rows = [{"contender": key[0], "verb": key[1], **values} for key, values in self.counts.items()]
        if not self.is_loaded:
            rows = [{name: row[name] for name in row if name not in ("memcpy_bytes", "kernel_bytes")} for row in rows]
        path.write_text(json.dumps(rows), encoding="utf-8")


class Case:
    """What all ranks know: case.json and topk.npy of the folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.ids = np.load(folder / "topk.npy")
        about = json.loads((folder / "case.json").read_text(encoding="utf-8"))
        self.rounds, self.n, self.row_bytes, self.extra_copy = (
            about[name] for name in ("rounds", "n", "row_bytes", "extra_copy")
        )
        self.num_experts = about["num_experts"]
        self.placement = m2n.Placement.block(self.num_experts, self.n)
        self.shape = m2n.Shape(
            self.row_bytes // 4, self.num_experts, self.ids.shape[1], len(self.ids), dispatch_dtype="float32",
            combine_dtype="float32",
        )  # fmt: skip
        self.common = {"shape": self.shape, "placement": self.placement, "store": str(folder)}

    def tokens_of(self, rank: int) -> np.ndarray:
        """Tokens with experts on this rank."""
        owners = np.where(self.ids < 0, -1, self.ids // (self.num_experts // self.n))
        return np.flatnonzero((owners == rank).any(-1))


def is_reduced(turn: int) -> bool:
    """Expert ranks take turns: rows that are reduced already, and rows that combine_send has to sum."""
    return turn % 2 == 1


def combine_verb(turn: int) -> str:
    """The name its counts go by."""
    return "combine_send, reduced" if is_reduced(turn) else "combine_send, sums"


def run_attention(case: Case, counter: Counter) -> None:
    """Dispatches and combines."""
    with m2n.AttentionComm(0, **case.common) as comm:
        x = np.ones((len(case.ids), case.shape.hidden), np.float32)
        y = np.empty_like(x)
        route = comm.route(case.ids, np.full(case.ids.shape, 0.5, np.float32))

        def send() -> None:
            comm.dispatch_send(x.copy() if case.extra_copy == "attention" else x, route)

        for turn in range(case.rounds + _WARM_UP):
            counter.is_warm = turn >= _WARM_UP
            before = comm.stats()
            counter.count("m2n", "dispatch_send", send)
            sent = comm.stats()
            add_sent(counter, "dispatch_send", before, sent, case.row_bytes)
            counter.count("m2n", "combine_recv", comm.combine_recv, 0, y)
            payload = int(comm.stats()["rows_received"] - sent["rows_received"]) * case.row_bytes
            counter.add("m2n", "combine_recv", payload_bytes=payload, counted_bytes=y.nbytes, summed_bytes=y.nbytes)


def add_sent(counter: Counter, verb: str, before: dict[str, Any], after: dict[str, Any], row_bytes: int) -> None:
    """What the comm itself has counted between two readings."""
    change = {name: int(after[name] - before[name]) for name in ("rows_sent", "bytes_sent")}
    payload = change["rows_sent"] * row_bytes
    beside = change["bytes_sent"] - payload
    counter.add("m2n", verb, payload_bytes=payload, counted_bytes=payload, beside_bytes=beside)
    counter.add("m2n", verb, summed_bytes=payload if verb == combine_verb(0) else 0)


def run_expert(case: Case, counter: Counter, rank: int) -> None:
    """Receives and answers."""
    with m2n.ExpertComm(rank, **case.common) as comm:

        def receive() -> m2n.Batch:
            batch = comm.dispatch_recv(linger_us=0, timeout=_TIMEOUT_S)
            if batch is None:
                raise TimeoutError("no batch")
            if case.extra_copy == "expert":
                batch.x[: batch.num_rows].copy()
            return batch

        for turn in range(case.rounds + _WARM_UP):
            counter.is_warm = turn >= _WARM_UP
            batch = counter.count("m2n", "dispatch_recv", receive)
            counter.add("m2n", "dispatch_recv", payload_bytes=batch.num_rows * case.row_bytes, counted_bytes=0)
            counter.add("m2n", "dispatch_recv", outside_window=count_outside_window(batch, case.row_bytes))
            y = np.ones((batch.num_rows if is_reduced(turn) else batch.num_pairs, case.shape.hidden), np.float32)
            before = comm.stats()
            counter.count("m2n", combine_verb(turn), comm.combine_send, batch, y, is_reduced(turn))
            add_sent(counter, combine_verb(turn), before, comm.stats(), case.row_bytes)


def count_outside_window(batch: m2n.Batch, row_bytes: int) -> int:
    """Rows of a batch that do not lie in memory that the peer can write: m2n's shared objects."""
    shared = []
    for line in Path("/proc/self/maps").read_text(encoding="ascii", errors="replace").splitlines():
        if "memfd:m2n" in line:
            shared.append([int(address, 16) for address in line.split()[0].split("-")])
    outside = 0
    for row in np.unique(batch.row_index_by_expert):
        begin = batch.x.ctypes.data + int(row) * row_bytes
        outside += not any(first <= begin and begin + row_bytes <= end for first, end in shared)
    return outside


def run_socket_attention(case: Case, counter: Counter) -> None:
    """The same rows over stream sockets: gathered by destination, written, and what comes back read and summed."""
    x = np.ones((len(case.ids), case.shape.hidden), np.float32)
    y = np.empty_like(x)
    tokens = [case.tokens_of(rank) for rank in range(case.n)]
    packed = [np.empty((len(part), case.shape.hidden), np.float32) for part in tokens]
    links = [connect(case.folder / f"socket{rank}") for rank in range(case.n)]
    payload = sum(rows.nbytes for rows in packed)

    def send() -> None:
        for link, part, rows in zip(links, tokens, packed):
            np.take(x, part, axis=0, out=rows, mode="clip")  # "raise" copies once more
            link.sendall(rows)

    def receive() -> None:
        y.fill(0)
        for link, part, rows in zip(links, tokens, packed):
            receive_all(link, rows)
            np.add.at(y, part, rows)

    for turn in range(case.rounds + _WARM_UP):
        counter.is_warm = turn >= _WARM_UP
        counter.count("unix-socket", "dispatch_send", send)
        counter.add("unix-socket", "dispatch_send", payload_bytes=payload)
        counter.count("unix-socket", "combine_recv", receive)
        counter.add("unix-socket", "combine_recv", payload_bytes=payload, summed_bytes=y.nbytes)
    for link in links:
        link.close()


def run_socket_expert(case: Case, counter: Counter, rank: int) -> None:
    """Reads rows, and writes as many back."""
    rows = np.empty((len(case.tokens_of(rank)), case.shape.hidden), np.float32)
    path = case.folder / f"socket{rank}"
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(path))
        listener.settimeout(_TIMEOUT_S)
        listener.listen()
        link = listener.accept()[0]
    with link:
        for turn in range(case.rounds + _WARM_UP):
            counter.is_warm = turn >= _WARM_UP
            counter.count("unix-socket", "dispatch_recv", receive_all, link, rows)
            counter.add("unix-socket", "dispatch_recv", payload_bytes=rows.nbytes)
            counter.count("unix-socket", "combine_send", link.sendall, rows)
            counter.add("unix-socket", "combine_send", payload_bytes=rows.nbytes)


def connect(path: Path) -> socket.socket:
    """A link to who listens there, or soon will."""
    link = socket.socket(socket.AF_UNIX)
    until = time.monotonic() + _TIMEOUT_S
    while True:
        try:
            link.connect(str(path))
            return link
        except (FileNotFoundError, ConnectionRefusedError):
            if time.monotonic() > until:
                raise
            time.sleep(0.01)


def receive_all(link: socket.socket, rows: np.ndarray) -> None:
    """Fills `rows`."""
    view = memoryview(rows).cast("B")
    while len(view):
        count = link.recv_into(view)
        if count == 0:
            raise ConnectionError("the peer has gone")
        view = view[count:]


def main(folder: str, role: str, rank: str) -> None:
    """One rank."""
    case = Case(Path(folder))
    counter = Counter(case.row_bytes)
    if role == "attention":
        run_attention(case, counter)
        run_socket_attention(case, counter)
    else:
        run_expert(case, counter, int(rank))
        run_socket_expert(case, counter, int(rank))
    counter.write(case.folder / f"{role}.{rank}.json")


if __name__ == "__main__":
    main(*sys.argv[1:])
