# SPDX-License-Identifier: Apache-2.0
"""Sequence: a prompt, its answer, and how much of both is computed. Whatever goes through the layers is part of one."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch

from .config import ModelConfig
from .sampling import Sampler


@dataclass(frozen=True)
class KVCache:
    """Keys and values of one sequence for all layers: [layers, key/value heads, positions, head_dim]."""

    keys_LGSD: torch.Tensor
    values_LGSD: torch.Tensor

    @classmethod
    def allocate(cls, config: ModelConfig, num_positions: int, dtype: torch.dtype, device: str = "cpu") -> KVCache:
        """Once for all positions that the sequence may ever have."""
        shape = (config.num_layers, config.num_kv_heads, num_positions, config.head_dim)
        return cls(torch.empty(shape, dtype=dtype, device=device), torch.empty(shape, dtype=dtype, device=device))


@dataclass
class Sequence:
    """One prompt and its answer.

    Of both, num_computed tokens have their keys and values in the cache. The step that it is in computes the next
    num_scheduled; it is in one step at a time.
    """

    idx: int
    prompt_ids: list[int]
    max_new_tokens: int = 0
    sampler: Sampler | None = None
    output_ids: list[int] = field(default_factory=list)
    num_computed: int = 0
    num_scheduled: int = 0
    cache: KVCache | None = None

    @property
    def token_ids(self) -> list[int]:
        return self.prompt_ids + self.output_ids

    @property
    def num_pending(self) -> int:
        """Tokens that wait to be computed: the rest of the prompt, or the newest token."""
        return len(self.prompt_ids) + len(self.output_ids) - self.num_computed

    @property
    def scheduled_ids(self) -> list[int]:
        """The tokens that its step computes."""
        return self.token_ids[self.num_computed : self.num_computed + self.num_scheduled]

    @property
    def scheduled_positions(self) -> range:
        return range(self.num_computed, self.num_computed + self.num_scheduled)

    @property
    def completes(self) -> bool:
        """Does its step reach the last token, so that the next one can be drawn?"""
        return self.num_scheduled == self.num_pending

    def advance(self) -> None:
        """Its step has ended."""
        self.num_computed += self.num_scheduled
        self.num_scheduled = 0
