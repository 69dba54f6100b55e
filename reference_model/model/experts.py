# SPDX-License-Identifier: Apache-2.0
"""The experts' weights and products, what an attention side asks of experts, and those of its own process."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any, Protocol

import torch
import torch.nn.functional as F

from .checkpoint import Checkpoint, ExpertNames
from .config import ModelConfig
from .decoder import activation, gated_ffn
from .precision import as_dispatched

# torch 2.10 and later.
grouped_mm: Any = getattr(F, "grouped_mm", None)


class Experts(Protocol):
    """What an attention side asks of its experts: a layer of a microbatch at a time, in any order."""

    def route(self, ids_TK: torch.Tensor, weights_TK: torch.Tensor, **options: Any) -> Any:
        """Where each token goes, from its experts' ids and weights; for `dispatch`. options: of the microbatch."""

    def dispatch(self, x_TH: torch.Tensor, route: Any, layer: int, microbatch: int) -> tuple[int, int]:
        """Hand over the tokens of a microbatch; the bytes that go to other ranks, and those that come back."""

    def ready(self, microbatches: Sequence[int]) -> int | None:
        """The first of these microbatches that can go on: with `combine`, or with `dispatch` if none is in flight."""

    def wait_ready(self, microbatches: Sequence[int]) -> int:
        """Sleep until one of these microbatches can go on, and say which."""

    def combine(self, microbatch: int) -> torch.Tensor:
        """The weighted sum over each token's experts [T, H]; frees the microbatch for its next dispatch."""

    def check(self) -> None:
        """Raise what has gone wrong where nobody was told; the host has just waited for all that was computed."""


class ExpertWeights:
    """The weights of some experts for all layers; expert_ids are global, in the order of the outputs."""

    def __init__(
        self,
        config: ModelConfig,
        checkpoint: Checkpoint,
        names: ExpertNames,
        expert_ids: Sequence[int],
        dtype: torch.dtype,
    ) -> None:
        self.config, self.dtype, self.device, self.expert_ids = config, dtype, checkpoint.device, list(expert_ids)
        # By layer, of all experts: gate and up [E, 2 * inner, H], down [E, H, inner].
        self._by_layer: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}
        for layer, has_experts in enumerate(config.moe_layers):
            if has_experts:
                each = (_load(checkpoint, names, layer, e, dtype) for e in self.expert_ids)
                gate_up, down = (torch.stack(parts) for parts in zip(*each))
                self._by_layer[layer] = gate_up, down

    def run(self, layer: int, local_idx: int, x_TH: torch.Tensor) -> torch.Tensor:
        """Output of one expert, given by its place in expert_ids, for the rows x [T, H]."""
        gate_up, down = self._by_layer[layer]
        return gated_ffn(x_TH, gate_up[local_idx], down[local_idx], self.config.hidden_act)

    def outputs(
        self, layer: int, x: torch.Tensor, offsets: Sequence[int], rows_P: torch.Tensor | None = None
    ) -> torch.Tensor:
        """One output row per (row, expert) [P, H], expert-major: offsets[i] : offsets[i + 1] is expert i.

        x: [P, H], gathered in that order; or with rows_P rows [R, H] anywhere, of which it names those to take.
        """
        y_PH = torch.empty((offsets[-1], self.config.hidden), dtype=self.dtype, device=self.device)
        for local_idx in range(len(self.expert_ids)):
            first, last = offsets[local_idx], offsets[local_idx + 1]
            if first < last:
                mine = x[first:last] if rows_P is None else x[rows_P[first:last]]
                y_PH[first:last] = self.run(layer, local_idx, mine)
        return y_PH

    def outputs_at(self, layer: int, x_PH: torch.Tensor, offsets: torch.Tensor) -> torch.Tensor:
        """The same where offsets, int32 [E + 1], are known to the device only: one product for all experts.

        Rows behind the last offset are computed or not; they mean nothing.
        """
        gate_up, down = self._by_layer[layer]
        if self.can_group:
            multiply = functools.partial(grouped_mm, offs=offsets[1:])
        else:
            at_ER, place_P = places(offsets, len(x_PH), len(x_PH) // min(self.config.top_k, len(self.expert_ids)))
            x_PH, multiply = x_PH[at_ER], torch.bmm
        gate, up = multiply(x_PH, gate_up.transpose(1, 2)).chunk(2, dim=-1)
        y = multiply(activation(self.config.hidden_act, gate) * up, down.transpose(1, 2))
        return y if self.can_group else y.flatten(0, 1)[place_P]

    @property
    def can_group(self) -> bool:
        """Can torch multiply the rows of all experts at once, each with its own matrix?"""
        gate_up, down = next(iter(self._by_layer.values()))
        is_aligned = all(size * gate_up.element_size() % 16 == 0 for size in (gate_up.shape[2], down.shape[2]))
        has_device = not gate_up.is_cuda or torch.cuda.get_device_capability(gate_up.device) >= (8, 0)
        return grouped_mm is not None and self.dtype == torch.bfloat16 and is_aligned and has_device


def places(offsets: torch.Tensor, num_pairs: int, max_rows: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Rows laid out in a block of max_rows for each expert: which pair each row of the blocks is [E, max_rows], and in
    which row each pair lies [num_pairs], counted through all blocks; clamped where there is none."""
    device = offsets.device
    at_ER = offsets[:-1, None] + torch.arange(max_rows, dtype=offsets.dtype, device=device)
    pair_P = torch.arange(num_pairs, dtype=offsets.dtype, device=device)
    expert_P = torch.searchsorted(offsets[1:], pair_P, right=True).clamp(max=len(offsets) - 2)
    place_P = expert_P * max_rows + (pair_P - offsets[expert_P]).clamp(max=max_rows - 1)
    return at_ER.clamp(max=num_pairs - 1), place_P


def _load(
    checkpoint: Checkpoint, names: ExpertNames, layer: int, expert_id: int, dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor]:
    if names.is_fused:
        gate_up = checkpoint.part(names.fused(layer, names.gate), expert_id, dtype)
        return gate_up, checkpoint.part(names.fused(layer, names.down), expert_id, dtype)
    gate = checkpoint.tensor(names.expert(layer, expert_id, names.gate), dtype)
    up = checkpoint.tensor(names.expert(layer, expert_id, names.up), dtype)
    return torch.cat((gate, up)), checkpoint.tensor(names.expert(layer, expert_id, names.down), dtype)


class EchoExperts:
    """Experts of this process that answer at once: with what they get."""

    def __init__(self) -> None:
        self._answers: dict[int, torch.Tensor] = {}  # by microbatch

    def route(self, ids_TK: torch.Tensor, weights_TK: torch.Tensor, **options: Any) -> Any:
        return ids_TK, weights_TK

    def dispatch(self, x_TH: torch.Tensor, route: Any, layer: int, microbatch: int) -> tuple[int, int]:
        self._answers[microbatch] = x_TH
        return 0, 0

    def ready(self, microbatches: Sequence[int]) -> int | None:
        return microbatches[0]

    def wait_ready(self, microbatches: Sequence[int]) -> int:
        return microbatches[0]

    def combine(self, microbatch: int) -> torch.Tensor:
        return self._answers.pop(microbatch)

    def check(self) -> None:
        pass


class LocalExperts(EchoExperts):
    """All experts in this process, combined by the arithmetic of m2n for the given groups of experts.

    The sum is in float32 in ascending expert id within a group (an expert rank), rounded once to dtype, then
    summed over groups; with reduce_at="attention" every expert's output is summed in top-k order. Experts get rows
    as if they had been dispatched as dispatch_dtype (None: as they are).
    """

    def __init__(
        self,
        weights: ExpertWeights,
        groups: Sequence[Sequence[int]] | None = None,
        reduce_at: str = "expert",
        dispatch_dtype: str | None = None,
    ) -> None:
        super().__init__()
        self.weights, self.reduce_at, self.dispatch_dtype = weights, reduce_at, dispatch_dtype
        self.groups = [list(group) for group in groups] if groups else [weights.expert_ids]

    def dispatch(
        self, x_TH: torch.Tensor, route: tuple[torch.Tensor, torch.Tensor], layer: int, microbatch: int
    ) -> tuple[int, int]:
        combine = self._per_expert if self.reduce_at == "expert" else self._per_pair
        if self.dispatch_dtype is not None:
            x_TH = as_dispatched(x_TH, self.dispatch_dtype)
        self._answers[microbatch] = combine(x_TH, *route, layer)
        return 0, 0

    def _run(self, layer: int, expert_id: int, x_RH: torch.Tensor) -> torch.Tensor:
        """There and back, where the experts' weights lie on another device."""
        local_idx = self.weights.expert_ids.index(expert_id)
        return self.weights.run(layer, local_idx, x_RH.to(self.weights.device)).to(x_RH.device)

    def _per_expert(
        self, x_TH: torch.Tensor, ids_TK: torch.Tensor, weights_TK: torch.Tensor, layer: int
    ) -> torch.Tensor:
        total_TH = torch.zeros_like(x_TH, dtype=torch.float32)
        for group in self.groups:
            partial_TH = torch.zeros_like(x_TH, dtype=torch.float32)
            for expert_id in group:
                rows, k_idx = torch.where(ids_TK == expert_id)
                if rows.numel():
                    y = self._run(layer, expert_id, x_TH[rows])
                    partial_TH[rows] += weights_TK[rows, k_idx, None] * y.to(torch.float32)
            total_TH += partial_TH.to(x_TH.dtype).to(torch.float32)
        return total_TH.to(x_TH.dtype)

    def _per_pair(self, x_TH: torch.Tensor, ids_TK: torch.Tensor, weights_TK: torch.Tensor, layer: int) -> torch.Tensor:
        y_TKH = x_TH.new_zeros((*ids_TK.shape, x_TH.shape[1]))
        for expert_id in self.weights.expert_ids:
            rows, k_idx = torch.where(ids_TK == expert_id)
            if rows.numel():
                y_TKH[rows, k_idx] = self._run(layer, expert_id, x_TH[rows])
        total_TH = torch.zeros_like(x_TH, dtype=torch.float32)
        for k in range(ids_TK.shape[1]):
            total_TH += weights_TK[:, k, None] * y_TKH[:, k].to(torch.float32)
        return total_TH.to(x_TH.dtype)
