# SPDX-License-Identifier: Apache-2.0
"""Decode steps of one form: a token for each of B places, at fixed addresses, so that a CUDA graph can repeat them.

Caches lie side by side in one tensor, of which the last holds nothing: places without a sequence write there.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F

from ..model.config import ModelConfig
from ..model.decoder import Decoder, Microbatch, numbers_on
from ..model.sequence import KVCache, Sequence


class CachePool:
    """The caches of all sequences at work on an attention rank, by number."""

    def __init__(self, decoder: Decoder, num_caches: int, num_positions: int) -> None:
        config = decoder.config
        shape = (num_caches + 1, config.num_layers, config.num_kv_heads, num_positions, config.head_dim)
        # Zeros: what no sequence has written yet is masked, which makes nothing of a number, but NaN of a NaN.
        self.keys_CLGSD = torch.zeros(shape, dtype=decoder.dtype, device=decoder.device)
        self.values_CLGSD = torch.zeros_like(self.keys_CLGSD)
        self._free = list(range(num_caches))
        self._idx_of: dict[int, int] = {}  # by identity of a cache

    @property
    def num_positions(self) -> int:
        return self.keys_CLGSD.shape[3]

    @property
    def unused(self) -> int:
        """The number of the cache that holds nothing."""
        return self.keys_CLGSD.shape[0] - 1

    def take(self) -> KVCache:
        idx = self._free.pop()
        cache = KVCache(self.keys_CLGSD[idx], self.values_CLGSD[idx])
        self._idx_of[id(cache)] = idx
        return cache

    def give_back(self, cache: KVCache) -> None:
        self._free.append(self._idx_of.pop(id(cache)))

    def number(self, cache: KVCache | None) -> int:
        return self._idx_of[id(cache)]


@dataclass
class DecodeBatch(Microbatch):
    """A token of each of up to B sequences. Inputs lie at fixed addresses; what is computed from them need not."""

    pool: CachePool
    inputs_3B: torch.Tensor  # int64: token, position, number of the cache
    num_used: torch.Tensor  # int64 [1]: places with a sequence come first
    mask_BS: torch.Tensor
    logits_BV: torch.Tensor

    @classmethod
    def allocate(cls, decoder: Decoder, pool: CachePool, num_places: int) -> DecodeBatch:
        device, nothing = decoder.device, torch.empty(0)
        inputs_3B = torch.zeros((3, num_places), dtype=torch.int64, device=device)
        inputs_3B[2] = pool.unused
        num_used, last_B = torch.zeros(1, dtype=torch.int64, device=device), torch.arange(num_places, device=device)
        return cls([], nothing, nothing, nothing, last_B, pool, inputs_3B, num_used, nothing, nothing)

    @property
    def route_options(self) -> dict[str, Any]:
        """Into the memory that the graph knows; of its tokens the first num_used count."""
        return {} if self.route is None else {"out": self.route, "num_tokens": self.num_used}

    def fill(self, sequences: list[Sequence]) -> None:
        """The next step's tokens: each sequence has scheduled one."""
        num_empty = self.inputs_3B.shape[1] - len(sequences)
        tokens = [sequence.scheduled_ids[0] for sequence in sequences] + [0] * num_empty
        positions = [sequence.num_computed for sequence in sequences] + [0] * num_empty
        caches = [self.pool.number(sequence.cache) for sequence in sequences] + [self.pool.unused] * num_empty
        device = str(self.inputs_3B.device)
        self.inputs_3B.copy_(numbers_on(device, tokens + positions + caches).view_as(self.inputs_3B))
        self.num_used.copy_(numbers_on(device, [len(sequences)]))
        self.sequences = sequences

    def begin(self, decoder: Decoder) -> None:
        """Embed the tokens that were filled in."""
        token_B, position_B, _ = self.inputs_3B
        self.x_TH = decoder.embedding[token_B]
        self.cos_TD, self.sin_TD = decoder.angles(position_B)
        at_S = torch.arange(self.pool.num_positions, device=position_B.device)
        self.mask_BS = at_S <= position_B[:, None]
        if decoder.config.sliding_window is not None:
            self.mask_BS &= at_S > position_B[:, None] - decoder.config.sliding_window

    def attend(
        self, config: ModelConfig, layer: int, q_TND: torch.Tensor, k_TGD: torch.Tensor, v_TGD: torch.Tensor
    ) -> torch.Tensor:
        _, position_B, cache_B = self.inputs_3B
        keys_CGSD, values_CGSD = self.pool.keys_CLGSD[:, layer], self.pool.values_CLGSD[:, layer]
        keys_CGSD[cache_B, :, position_B] = k_TGD
        values_CGSD[cache_B, :, position_B] = v_TGD
        # All positions of the caches are copied, and looked at behind a mask: their number may not change.
        num_places, group = len(cache_B), config.num_heads // config.num_kv_heads
        q_BGgD = q_TND.view(num_places, config.num_kv_heads, group, -1)
        mask = self.mask_BS[:, None, None]
        out = F.scaled_dot_product_attention(q_BGgD, keys_CGSD[cache_B], values_CGSD[cache_B], attn_mask=mask)
        return out.reshape(num_places, -1)
