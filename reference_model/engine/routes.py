# SPDX-License-Identifier: Apache-2.0
"""RouteRecorder: the routes of a run, kept as arrays and written to one .npz file.

One row per (token, layer), R rows sorted by sequence, position and layer. Arrays of the file:

    sequence         int32 [R]     number of the prompt, from 0
    position         int32 [R]     place of the token in prompt + answer, from 0
    layer            int32 [R]     layer of the model; layers without experts do not occur
    attention_rank   int32 [R]     who computed the token
    step             int32 [R]     count of steps of the microbatch, from 0
    microbatch       int32 [R]     microbatch that computed it
    topk_ids         int32 [R, K]  global expert ids, likeliest first
    topk_weights     float32 [R, K]
    num_experts, top_k, num_layers, attention_ranks, expert_ranks, microbatches    int64 scalars

Rows with equal (attention_rank, step, layer, microbatch) were one dispatch.
"""

from __future__ import annotations

import base64
import io
from collections.abc import Iterable, Mapping
from pathlib import Path

import numpy as np
import torch

from ..model.sequence import Sequence

_KEYS = ("sequence", "position", "layer", "attention_rank", "step", "microbatch")


class RouteRecorder:
    """Collects the routes of one attention rank."""

    def __init__(self, attention_rank: int, top_k: int) -> None:
        self.attention_rank, self.top_k = attention_rank, top_k
        self._rows: list[dict[str, np.ndarray]] = []

    def record(
        self,
        step: int,
        layer: int,
        microbatch: int,
        sequences: list[Sequence],
        ids_TK: torch.Tensor,
        weights_TK: torch.Tensor,
    ) -> None:
        """Keep the routes of one dispatch, whose tokens are what these sequences have scheduled, in order."""
        num_tokens = ids_TK.shape[0]
        same = {"layer": layer, "attention_rank": self.attention_rank, "step": step, "microbatch": microbatch}
        rows = {name: np.full(num_tokens, value, np.int32) for name, value in same.items()}
        rows["sequence"] = np.concatenate([np.full(each.num_scheduled, each.idx, np.int32) for each in sequences])
        rows["position"] = np.concatenate([np.asarray(each.scheduled_positions, np.int32) for each in sequences])
        rows["topk_ids"] = ids_TK.cpu().numpy().astype(np.int32)
        rows["topk_weights"] = weights_TK.cpu().numpy().astype(np.float32)
        self._rows.append(rows)

    def encode(self) -> str:
        """All rows as text, to be sent to whoever writes the file."""
        file = io.BytesIO()
        np.savez_compressed(file, **self._arrays())
        return base64.b64encode(file.getvalue()).decode("ascii")

    def _arrays(self) -> dict[str, np.ndarray]:
        if self._rows:
            return {name: np.concatenate([rows[name] for rows in self._rows]) for name in self._rows[0]}
        arrays = {name: np.zeros(0, np.int32) for name in _KEYS}
        arrays["topk_ids"] = np.zeros((0, self.top_k), np.int32)
        arrays["topk_weights"] = np.zeros((0, self.top_k), np.float32)
        return arrays


def write_routes(path: str | Path, encoded_parts: Iterable[str], scalars: Mapping[str, int]) -> int:
    """Merge the encoded parts of all attention ranks into the file; return its number of rows."""
    parts = []
    for text in encoded_parts:
        with np.load(io.BytesIO(base64.b64decode(text)), allow_pickle=False) as part:
            parts.append({name: part[name] for name in part.files})
    arrays = {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
    order = np.lexsort((arrays["layer"], arrays["position"], arrays["sequence"]))
    arrays = {name: array[order] for name, array in arrays.items()}
    with Path(path).open("wb") as file:
        np.savez_compressed(file, **arrays, **{name: np.int64(value) for name, value in scalars.items()})
    return len(order)
