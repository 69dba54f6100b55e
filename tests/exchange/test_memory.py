# SPDX-License-Identifier: Apache-2.0
"""m2n.benchmarks.harness.memory against what the kernel says of real processes."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest

import m2n
from m2n.benchmarks.harness.memory import link_bytes, rank_bytes
from m2n.ranks import run_ranks

SHAPES = [
    m2n.Shape(hidden=512, num_experts=4, top_k=2, max_tokens=64, dispatch_dtype="float32", combine_dtype="float32"),
    m2n.Shape(
        hidden=300, num_experts=4, top_k=3, max_tokens=50, microbatches=3, dispatch_dtype="float16",
        combine_dtype="float32", reduce_at="attention",
    ),
    m2n.Shape(hidden=300, num_experts=4, top_k=2, max_tokens=50, dispatch_dtype="float8_e4m3fn"),
]  # fmt: skip
M, N, ROUNDS, MAX_PEERS = 2, 2, 4, 5


class Mapping(NamedTuple):
    """One line of /proc/self/smaps with what follows it; bytes."""

    begin: int
    end: int
    inode: int
    name: str
    resident: int


def mappings() -> Iterator[Mapping]:
    head = re.compile(r"([0-9a-f]+)-([0-9a-f]+) \S+ \S+ \S+ (\d+) *(.*)")
    found: re.Match[str] | None = None
    for line in Path("/proc/self/smaps").read_text().splitlines():
        if match := head.fullmatch(line):
            found = match
        elif found is not None and line.startswith("Rss:"):
            begin, end = (int(found[i], 16) for i in (1, 2))
            yield Mapping(begin, end, int(found[3]), found[4], int(line.split()[1]) * 1024)


def measure(comm: m2n.AttentionComm | m2n.ExpertComm) -> dict[str, object]:
    """Which m2n objects this process maps, and the addresses around its window (an expert rank's is known)."""
    objects = [mapping for mapping in mappings() if "memfd:m2n" in mapping.name]
    window = getattr(comm, "_window", None)
    around = num_bytes = 0
    if window is not None:
        num_bytes = len(window) * window.strides[0]  # scales lie between rows
        begin, end = window.ctypes.data, window.ctypes.data + num_bytes
        around = sum(
            min(end, one.end) - max(begin, one.begin) for one in mappings() if one.begin < end > begin < one.end
        )
    return {
        "objects": {mapping.inode: mapping.end - mapping.begin for mapping in objects},
        "resident": sum(mapping.resident for mapping in objects),
        "window": num_bytes,
        "window_mapped": around,
    }


def attention(comm: m2n.AttentionComm) -> dict[str, object]:
    shape = comm.shape
    is_float8 = shape.dispatch_dtype == "float8_e4m3fn"
    x = np.ones((shape.max_tokens, shape.hidden), "float32" if is_float8 else shape.dispatch_dtype)
    ids = (np.arange(shape.max_tokens)[:, None] + np.arange(shape.top_k)) % shape.num_experts
    route = comm.route(ids, np.ones(ids.shape, np.float32))
    for turn in range(ROUNDS * shape.microbatches):
        comm.dispatch_send(x, route, microbatch=turn % shape.microbatches, layer=turn)
        comm.combine_recv(microbatch=turn % shape.microbatches)
    return measure(comm)


def expert(comm: m2n.ExpertComm) -> dict[str, object]:
    for _ in range(ROUNDS * comm.shape.microbatches):
        batch = comm.dispatch_recv(linger_us=None, attention_ranks=range(M), timeout=20)
        assert batch is not None
        comm.combine_send(batch, batch.gather().astype("float32"))
    return measure(comm)


@pytest.mark.parametrize("shape", SHAPES, ids=["reduced", "paired", "float8"])
def test_the_kernel_counts_what_the_shape_says(shape: m2n.Shape) -> None:
    found = run_ranks((attention, expert), M, N, shape=shape, processes=True, max_peers=MAX_PEERS)
    owned = {
        "attention": rank_bytes(shape, "attention", N, MAX_PEERS),
        "expert": rank_bytes(shape, "expert", M, MAX_PEERS),
    }
    for (role, _), seen in found.items():
        expected = owned[role]
        assert sum(seen["objects"].values()) == expected["owned"] + expected["mapped"]
        assert seen["resident"] == expected["owned"] + expected["mapped"]
    everything = {inode: size for seen in found.values() for inode, size in seen["objects"].items()}
    assert sum(everything.values()) == M * owned["attention"]["owned"] + N * owned["expert"]["owned"]
    wakes = (M + N) * 4096
    assert sum(everything.values()) == M * N * link_bytes(shape)["total"] + wakes
    window = found["expert", 0]["window"]
    assert found["expert", 0]["window_mapped"] == window
    small = MAX_PEERS * link_bytes(shape)["dispatch_meta"] + 4096
    assert window + small == owned["expert"]["addresses"]


def test_memory_of_a_rank_that_cannot_be() -> None:
    with pytest.raises(ValueError, match="role"):
        rank_bytes(SHAPES[0], "both", 1)
    with pytest.raises(ValueError, match="peers: expected 0 to max_peers=64, got 65"):
        rank_bytes(SHAPES[0], "expert", 65)
