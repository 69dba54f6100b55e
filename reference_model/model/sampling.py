# SPDX-License-Identifier: Apache-2.0
"""Sampler: the next token of one sequence, greedy or by temperature and top-p, from its own generator."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from ..errors import InputError


@dataclass(frozen=True)
class SamplingConfig:
    """temperature 0 is greedy; top_p keeps the likeliest tokens whose probabilities reach it together."""

    temperature: float = 0.0
    top_p: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        if not 0 <= self.temperature < float("inf"):
            raise InputError(f"temperature must be a number from 0 up, not {self.temperature}")
        if not 0 < self.top_p <= 1:
            raise InputError(f"top-p must be above 0 and at most 1, not {self.top_p}")
        if not 0 <= self.seed < 2**32:
            raise InputError(f"seed must be from 0 to 2**32 - 1, not {self.seed}")

    @property
    def is_greedy(self) -> bool:
        return self.temperature == 0


class Sampler:
    """Draws the tokens of one sequence.

    Its random numbers depend on the seed and the sequence's number alone, so the text does not depend on
    which sequences share its batches or its rank.
    """

    def __init__(self, config: SamplingConfig, sequence_idx: int) -> None:
        self.config = config
        self._generator = torch.Generator().manual_seed(config.seed * 2**24 + sequence_idx)

    def next_token(self, logits_V: torch.Tensor) -> int:
        """The next token of float32 logits [V]."""
        if self.config.is_greedy:
            return int(logits_V.argmax())
        # Less the largest, so that whatever temperature divides gives 0 there, and no infinity above.
        scaled_V = (logits_V.double() - logits_V.max().double()) / self.config.temperature
        probabilities, order = torch.softmax(scaled_V, dim=-1).sort(descending=True, stable=True)
        cumulative = probabilities.cumsum(0)
        # A token stays while the likelier ones have not reached top_p; the likeliest always stays.
        num_kept = max(1, int((cumulative - probabilities < self.config.top_p).sum()))
        threshold = torch.rand((), generator=self._generator, dtype=torch.float64) * cumulative[num_kept - 1]
        place = int(torch.searchsorted(cumulative[:num_kept], threshold, right=True))
        return int(order[min(place, num_kept - 1)])


def draw(samplers: Sequence[Sampler], logits_BV: torch.Tensor) -> list[int]:
    """A token for each row, by its sampler; all samplers have one config. A device is read once for all of them."""
    if logits_BV.is_cuda:
        # Ranks may be threads of one process. A copy to pageable memory that has to wait for its stream may keep the
        # copies of other threads waiting, and this stream may be waiting for those: so first wait, then copy.
        torch.cuda.current_stream(logits_BV.device).synchronize()
    if samplers[0].config.is_greedy:
        return [int(token_id) for token_id in logits_BV.argmax(dim=-1).tolist()]
    return [sampler.next_token(logits_V) for sampler, logits_V in zip(samplers, logits_BV.cpu())]
