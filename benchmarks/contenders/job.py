# SPDX-License-Identifier: Apache-2.0
"""What a process at the Python boundary knows of its run: the counterpart of native/job.h."""

from __future__ import annotations

import dataclasses
from functools import cached_property
from pathlib import Path

import numpy as np

_NUMPY_DTYPES = {"float32": np.float32, "float16": np.float16, "bfloat16": np.uint16}  # numpy has bits only


@dataclasses.dataclass(frozen=True)
class Job:
    """What one process knows of the run; see `read_case` in native/job.cc."""

    folder: Path
    process: int
    values: dict[str, str]

    def __getattr__(self, name: str) -> int:
        """m, n, tokens, x_stride_rows, hidden, top_k, experts."""
        try:
            return int(self.values[name])
        except KeyError:
            raise AttributeError(name) from None

    @property
    def is_attention(self) -> bool:
        """Processes 0 to M - 1."""
        return self.process < self.m

    @property
    def rank(self) -> int:
        """On its side."""
        return self.process if self.is_attention else self.process - self.m

    @property
    def dtype(self) -> str:
        """Of the rows, both ways."""
        return self.values["dtype"]

    @property
    def is_reduced(self) -> bool:
        """reduce_at=expert: one reply row per row."""
        return self.values["reduce_at"] == "expert"

    @property
    def links(self) -> list[tuple[int, int, int]]:
        """Of this rank, by peer: (the peer's process, attention rank, expert rank)."""
        if self.is_attention:
            return [(self.m + peer, self.rank, peer) for peer in range(self.n)]
        return [(peer, peer, self.rank) for peer in range(self.m)]

    @cached_property
    def topk_ids(self) -> np.ndarray:
        """int32 [M, T, top_k]."""
        return np.fromfile(self.folder / "topk.i32", np.int32).reshape(self.m, self.tokens, self.top_k)

    def rank_of_pair(self, attention_rank: int) -> np.ndarray:
        """[T, top_k]: the expert rank of each pair, -1 for none."""
        ids = self.topk_ids[attention_rank]
        return np.where(ids < 0, -1, ids // (self.experts // self.n))

    def rows_between(self, attention_rank: int, expert_rank: int) -> np.ndarray:
        """The tokens of the rows from one to the other, ascending."""
        return np.flatnonzero((self.rank_of_pair(attention_rank) == expert_rank).any(-1))

    def replies_between(self, attention_rank: int, expert_rank: int) -> np.ndarray:
        """The tokens that the reply rows belong to."""
        if self.is_reduced:
            return self.rows_between(attention_rank, expert_rank)
        return np.nonzero(self.rank_of_pair(attention_rank) == expert_rank)[0]


def read_job(folder: str, process: int) -> Job:
    """Reads case.txt."""
    lines = (Path(folder) / "case.txt").read_text(encoding="utf-8").splitlines()
    return Job(Path(folder), process, {key: value for key, _, value in (line.partition(" ") for line in lines)})


def encode(values: np.ndarray, dtype: str) -> np.ndarray:
    """float32 values as numpy holds them; bfloat16 as its bits (exact for small whole numbers)."""
    if dtype == "bfloat16":
        return (values.astype(np.float32).view(np.uint32) >> 16).astype(np.uint16)
    return values.astype(_NUMPY_DTYPES[dtype])


def read_lines(rows: np.ndarray) -> int:
    """Touches every line of contiguous rows."""
    return int(rows.reshape(-1).view(np.uint8)[::64].sum())
