# SPDX-License-Identifier: Apache-2.0
"""A case of the transport benchmarks: who sends how much to whom, checked before anything is started."""

from __future__ import annotations

import dataclasses
import os
import shutil
from pathlib import Path
from typing import Any, Literal

import numpy as np

import m2n
from m2n.reference_model.errors import InputError

from .memory import link_bytes
from .plugins import native_transport
from .routing import ROUTINGS, make_topk, recorded_experts

DTYPE_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}
MAX_ROW_BYTES = 8192  # of rows whose size nobody asked for: Mixtral's hidden size, 4096, in bfloat16
SHARED_FOLDER = Path("/dev/shm")  # rows travel through memory; a disk would be measured else
_MAX_PROCESSES = 256


@dataclasses.dataclass(frozen=True)
class Case:
    """`num_bytes` from each of m attention ranks to each of n expert ranks, and as much back."""

    m: int
    n: int
    num_bytes: int
    row_bytes: int
    num_experts: int
    dtype: str = "bfloat16"
    top_k: int = 2
    reduce_at: Literal["expert", "attention"] = "expert"
    routing: str = "balanced"
    transport: str = "shm"
    cores: tuple[int, ...] = ()  # by process, attention ranks first; none: the scheduler decides, and yields are needed

    @property
    def num_processes(self) -> int:
        """M + N."""
        return self.m + self.n

    @property
    def hidden(self) -> int:
        """Elements of a row."""
        return self.row_bytes // DTYPE_BYTES[self.dtype]

    @property
    def x_stride_rows(self) -> int:
        """2 where every token goes to every expert rank: in a layer with more of them, others' rows lie in between."""
        return 2 if self.routing == "balanced" and self.top_k >= self.n else 1

    @property
    def deadline_s(self) -> float:
        """Of one wait: the first waits for windows, of which two busy cores make about 0.4 GiB a second."""
        return 20.0 + 8.0 * self.window_bytes / (1 << 30)

    @property
    def window_bytes(self) -> int:
        """Of m2n, all ranks together: every link has room for every token."""
        return self.m * self.n * link_bytes(self.shape())["total"]

    def shape(self) -> m2n.Shape:
        """As the ranks of m2n are given it."""
        num_tokens = -(-self.num_bytes // self.row_bytes * self.n // min(self.top_k, self.n))
        return m2n.Shape(
            hidden=self.hidden, num_experts=self.num_experts, top_k=self.top_k, max_tokens=num_tokens,
            dispatch_dtype=self.dtype, combine_dtype=self.dtype, reduce_at=self.reduce_at,
        )  # fmt: skip

    def topk_ids(self) -> np.ndarray:
        """int32 [M, T, top_k]."""
        rows = self.num_bytes // self.row_bytes
        return make_topk(self.routing, self.m, self.n, rows, self.num_experts, self.top_k)

    def write(self, folder: Path, contenders: list[str], seconds: float, max_rounds: int) -> None:
        """What the ranks read: `case.txt` and `topk.i32`."""
        ids = np.ascontiguousarray(self.topk_ids())
        ids.tofile(folder / "topk.i32")
        lines: dict[str, Any] = {
            "m": self.m, "n": self.n, "tokens": ids.shape[1], "x_stride_rows": self.x_stride_rows,
            "hidden": self.hidden, "top_k": self.top_k,
            "experts": self.num_experts, "dtype": self.dtype, "reduce_at": self.reduce_at,
            "transport": native_transport(self.transport), "ucx_transport": native_transport("ucx"),
            "seconds": seconds, "max_rounds": max_rounds,
            "deadline_s": self.deadline_s,
            "cores": " ".join(map(str, self.cores)),
        }  # fmt: skip
        items = [*lines.items(), *(("contender", name) for name in contenders)]
        (folder / "case.txt").write_text("".join(f"{key} {value}\n" for key, value in items), encoding="utf-8")

    def describe(self) -> dict[str, Any]:
        """The fields that a row of results repeats. `mean_bytes`: what a pair moves on average."""
        ids = self.topk_ids()
        ranks = np.where(ids < 0, -1, ids // (self.num_experts // self.n))
        sent = sum(int((ranks == rank).any(-1).sum()) for rank in range(self.n))
        return {
            "m": self.m, "n": self.n, "bytes": self.num_bytes,
            "mean_bytes": round(sent * self.row_bytes / (self.m * self.n)), "row_bytes": self.row_bytes,
            "dtype": self.dtype, "top_k": self.top_k, "num_experts": self.num_experts, "reduce_at": self.reduce_at,
            "routing": self.routing, "x_stride_rows": self.x_stride_rows, "transport": self.transport,
            "placement": "pinned" if self.cores else "oversubscribed",
        }  # fmt: skip


def make_case(m: int, n: int, num_bytes: int, args: Any) -> Case:
    """A case from the command line's options (see options.add_options).

    Raises:
        InputError: naming the option.
    """
    element = DTYPE_BYTES[args.dtype]
    row_bytes = args.hidden * element if args.hidden else min(num_bytes, MAX_ROW_BYTES)
    if num_bytes < 1 or num_bytes % row_bytes or row_bytes % element:
        raise InputError(
            f"--sizes: {num_bytes} bytes are no whole rows of {row_bytes} bytes ({args.dtype}, hidden "
            f"{row_bytes // element}); take a multiple, or give --hidden"
        )
    if m < 1 or n < 1 or m + n > _MAX_PROCESSES:
        raise InputError(f"ranks: expected at least 1 on each side and at most {_MAX_PROCESSES} in all, got {m} + {n}")
    num_experts, top_k = args.experts or n * max(1, -(-8 // n)), args.top_k
    if args.routing not in ROUTINGS:
        num_experts, top_k = recorded_experts(args.routing)
    if num_experts % n:
        raise InputError(f"--experts: {num_experts} experts do not spread evenly over {n} expert ranks")
    if not 1 <= top_k <= num_experts:
        raise InputError(f"--top-k: expected 1 to {num_experts} (the number of experts), got {top_k}")
    case = Case(
        m, n, num_bytes, row_bytes, num_experts, args.dtype, top_k, args.reduce_at, args.routing, args.transport,
        _cores(args.pin, m + n),
    )  # fmt: skip
    try:
        case.shape()
    except ValueError as error:
        raise InputError(f"--sizes, --hidden, --top-k or --experts: {error}") from error
    return case


def _cores(pin: str, num_processes: int) -> tuple[int, ...]:
    usable = sorted(os.sched_getaffinity(0))
    if pin == "none":
        return ()
    if pin == "auto":
        return tuple(usable[:num_processes]) if num_processes <= len(usable) else ()
    try:
        cores = tuple(int(text) for text in pin.split(","))
    except ValueError:
        raise InputError(f"--pin: expected auto, none or core numbers with commas, got {pin!r}") from None
    if len(cores) != num_processes or not set(cores) <= set(usable):
        raise InputError(f"--pin: expected {num_processes} of the cores {usable}, one per process, got {pin}")
    return cores


def require_memory(case: Case, num_contenders: int) -> None:
    """Refuses a case that this machine has no memory for.

    Raises:
        InputError: with both numbers.
    """
    payload = 2 * case.m * case.n * case.num_bytes  # there and back
    # x and y; for the others a landing place and a gathered copy.
    needed = payload * (2 * num_contenders - 1) + case.window_bytes
    available = shutil.disk_usage(SHARED_FOLDER).free
    for line in Path("/proc/meminfo").read_text(encoding="ascii").splitlines():
        if line.startswith("MemAvailable:"):
            available = min(available, int(line.split()[1]) * 1024)
    if needed > available:
        raise InputError(
            f"{case.m} + {case.n} ranks with {case.num_bytes} bytes a pair need about {needed >> 20} MiB for "
            f"{num_contenders} contenders; {available >> 20} MiB are free (memory, {SHARED_FOLDER})"
        )
