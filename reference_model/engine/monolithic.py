# SPDX-License-Identifier: Apache-2.0
"""MonolithicModel: attention and all experts in one process, by the same code as the disaggregated run."""

from __future__ import annotations

from collections.abc import Sequence as SequenceOf
from pathlib import Path

import torch

from ..model.checkpoint import Checkpoint, check
from ..model.config import ModelConfig
from ..model.decoder import Decoder
from ..model.experts import ExpertWeights, LocalExperts
from ..model.sampling import SamplingConfig
from ..model.sequence import KVCache, Sequence
from .attention import AttentionEngine
from .batching import Scheduler
from .layers import Layers


class MonolithicModel:
    """A whole checkpoint in this process; attention and experts may lie on two devices."""

    def __init__(
        self,
        directory: str | Path,
        dtype: torch.dtype = torch.float32,
        attention_device: str = "cpu",
        expert_device: str = "cpu",
    ) -> None:
        self.config = ModelConfig.from_directory(directory)
        checkpoint = Checkpoint(directory, attention_device)
        names = check(checkpoint, self.config)
        self.decoder = Decoder(self.config, checkpoint, names, dtype)
        of_experts, expert_ids = Checkpoint(directory, expert_device), range(self.config.num_experts)
        self.weights = ExpertWeights(self.config, of_experts, names, expert_ids, dtype)

    def generate(
        self,
        prompts: SequenceOf[SequenceOf[int]],
        max_new_tokens: int,
        sampling: SamplingConfig | None = None,
        *,
        max_batch: int = 8,
        max_tokens: int = 256,
        microbatches: int = 1,
        groups: SequenceOf[SequenceOf[int]] | None = None,
        reduce_at: str = "expert",
        dispatch_dtype: str | None = None,
        ignore_eos: bool = False,
    ) -> list[list[int]]:
        """Token ids of the answers, in the order of the prompts.

        groups: the experts of each expert rank that the arithmetic imitates (None: one rank holds them all).
        dispatch_dtype: of rows on their way to experts, imitated likewise (None: as they are).
        """
        experts = LocalExperts(self.weights, groups, reduce_at, dispatch_dtype)
        scheduler = Scheduler(max_batch, max_tokens, microbatches)
        engine = AttentionEngine(self.decoder, experts, scheduler, sampling or SamplingConfig(), ignore_eos)
        sequences = [Sequence(idx, list(ids), max_new_tokens) for idx, ids in enumerate(prompts)]
        for _ in engine.run(sequences):
            pass
        return [sequence.output_ids for sequence in sequences]

    def logits(
        self, token_ids: SequenceOf[int], max_tokens: int = 256, dispatch_dtype: str | None = None
    ) -> torch.Tensor:
        """Logits float32 [V] after the last of these tokens."""
        cache = KVCache.allocate(self.config, len(token_ids), self.decoder.dtype, self.decoder.device)
        layers = Layers(self.decoder, LocalExperts(self.weights, dispatch_dtype=dispatch_dtype))
        sequence = Sequence(0, list(token_ids), cache=cache)
        while sequence.num_pending:
            sequence.num_scheduled = min(sequence.num_pending, max_tokens)
            logits = layers.step(self.decoder.begin([sequence]))
            sequence.advance()
        return logits[0]
