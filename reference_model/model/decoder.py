# SPDX-License-Identifier: Apache-2.0
"""Decoder: the model but for its experts, in plain PyTorch: embedding, attention, norms, router, head.

Shape suffixes: T tokens of a microbatch, t tokens of one sequence in it, S positions held by its cache,
H hidden, V vocabulary, L layers, N query heads, G key/value heads, D head_dim, K experts per token (top_k),
E experts, B sequences.
"""

from __future__ import annotations

import itertools
from abc import ABC, abstractmethod
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F

from .checkpoint import HEAD, Checkpoint, ExpertNames
from .config import ModelConfig
from .sequence import Sequence


@dataclass
class Microbatch(ABC):
    """Tokens of several sequences on their way through the layers: what those have scheduled, one after the other."""

    sequences: list[Sequence]
    x_TH: torch.Tensor
    cos_TD: torch.Tensor
    sin_TD: torch.Tensor
    last_B: torch.Tensor  # int64: the tokens after which logits are wanted
    expert_in_TH: torch.Tensor = field(default_factory=lambda: torch.empty(0), kw_only=True)
    route: Any = field(default=None, kw_only=True)  # of the layer it is in
    reply_bytes: int = field(default=0, kw_only=True)  # that the experts will send for it

    @property
    def num_tokens(self) -> int:
        return self.x_TH.shape[0]

    @property
    def route_options(self) -> dict[str, Any]:
        """More for the route of a layer than ids and weights."""
        return {}

    @abstractmethod
    def attend(
        self, config: ModelConfig, layer: int, q_TND: torch.Tensor, k_TGD: torch.Tensor, v_TGD: torch.Tensor
    ) -> torch.Tensor:
        """Keep the keys and values of these tokens and look at those of their sequences: [T, N * D]."""


@dataclass
class RaggedMicrobatch(Microbatch):
    """Of each sequence as many tokens as it has scheduled."""

    masks: list[torch.Tensor | None]

    def attend(
        self, config: ModelConfig, layer: int, q_TND: torch.Tensor, k_TGD: torch.Tensor, v_TGD: torch.Tensor
    ) -> torch.Tensor:
        outputs, first = [], 0
        for sequence, mask in zip(self.sequences, self.masks):
            last = first + sequence.num_scheduled
            q, k, v = (part[first:last] for part in (q_TND, k_TGD, v_TGD))
            outputs.append(_attend_sequence(config, layer, sequence, mask, q, k, v))
            first = last
        return torch.cat(outputs)


def _attend_sequence(
    config: ModelConfig,
    layer: int,
    sequence: Sequence,
    mask: torch.Tensor | None,
    q_tND: torch.Tensor,
    k_tGD: torch.Tensor,
    v_tGD: torch.Tensor,
) -> torch.Tensor:
    assert sequence.cache is not None
    num_tokens, start = q_tND.shape[0], sequence.num_computed
    end = start + num_tokens
    first = visible_from(config, start)
    keys_GSD, values_GSD = sequence.cache.keys_LGSD[layer], sequence.cache.values_LGSD[layer]
    keys_GSD[:, start:end] = k_tGD.transpose(0, 1)
    values_GSD[:, start:end] = v_tGD.transpose(0, 1)
    # The query heads that share a key head are laid behind each other, so that no key is copied.
    group = config.num_heads // config.num_kv_heads
    q_GtD = q_tND.view(num_tokens, config.num_kv_heads, group, -1).permute(1, 2, 0, 3)
    q_GtD = q_GtD.reshape(config.num_kv_heads, group * num_tokens, -1)
    grouped_mask = None if mask is None else mask.repeat(group, 1)
    out = F.scaled_dot_product_attention(
        q_GtD[None], keys_GSD[None, :, first:end], values_GSD[None, :, first:end], attn_mask=grouped_mask
    )
    out = out[0].view(config.num_kv_heads, group, num_tokens, -1).permute(2, 0, 1, 3)
    return out.reshape(num_tokens, -1)


def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """Root-mean-square norm over the last dimension, computed in float32."""
    x32 = x.to(torch.float32)
    x32 = x32 * torch.rsqrt(x32.pow(2).mean(-1, keepdim=True) + eps)
    return weight * x32.to(x.dtype)


def rotate(x_TND: torch.Tensor, cos_TD: torch.Tensor, sin_TD: torch.Tensor) -> torch.Tensor:
    """Turn each pair (i, i + D/2) of every head by its position's angle."""
    low, high = x_TND.chunk(2, dim=-1)
    return x_TND * cos_TD[:, None] + torch.cat((-high, low), dim=-1) * sin_TD[:, None]


def activation(name: str, x: torch.Tensor) -> torch.Tensor:
    """The gate's non-linearity, by the name config.json gives it."""
    if name == "gelu_pytorch_tanh":
        return F.gelu(x, approximate="tanh")
    return {"silu": F.silu, "gelu": F.gelu, "relu": F.relu}[name](x)


def gated_ffn(x_TH: torch.Tensor, gate_up: torch.Tensor, down: torch.Tensor, act: str) -> torch.Tensor:
    """SwiGLU (or its kin): down(act(gate(x)) * up(x)); gate_up [2 * inner, H] holds both."""
    gate, up = F.linear(x_TH, gate_up).chunk(2, dim=-1)
    return F.linear(activation(act, gate) * up, down)


class Attention:
    """Grouped-query attention of one layer over the caches of the sequences in a microbatch."""

    def __init__(self, config: ModelConfig, checkpoint: Checkpoint, layer: int, dtype: torch.dtype) -> None:
        self.config, self.layer = config, layer
        base = f"model.layers.{layer}.self_attn"

        def load(name: str) -> torch.Tensor:
            return checkpoint.tensor(f"{base}.{name}", dtype)

        self.qkv = torch.cat([load(f"{part}_proj.weight") for part in "qkv"])
        self.out = load("o_proj.weight")
        self.qkv_bias = torch.cat([load(f"{part}_proj.bias") for part in "qkv"]) if config.attention_bias else None
        self.out_bias = load("o_proj.bias") if config.attention_bias else None
        self.q_norm = load("q_norm.weight") if config.qk_norm != "none" else None
        self.k_norm = load("k_norm.weight") if config.qk_norm != "none" else None

    def __call__(self, x_TH: torch.Tensor, batch: Microbatch) -> torch.Tensor:
        q_TND, k_TGD, v_TGD = self._project(x_TH)
        q_TND = rotate(q_TND, batch.cos_TD, batch.sin_TD)
        k_TGD = rotate(k_TGD, batch.cos_TD, batch.sin_TD)
        out = batch.attend(self.config, self.layer, q_TND, k_TGD, v_TGD)
        return F.linear(out, self.out, self.out_bias)

    def _project(self, x_TH: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        config, num_tokens = self.config, x_TH.shape[0]
        widths = [heads * config.head_dim for heads in (config.num_heads, config.num_kv_heads, config.num_kv_heads)]
        q, k, v = F.linear(x_TH, self.qkv, self.qkv_bias).split(widths, dim=-1)
        if config.qk_norm == "full":
            q, k = self._norm(q, k)
        if config.clip_qkv is not None:
            q, k, v = (part.clamp(-config.clip_qkv, config.clip_qkv) for part in (q, k, v))
        q = q.reshape(num_tokens, config.num_heads, config.head_dim)
        k = k.reshape(num_tokens, config.num_kv_heads, config.head_dim)
        v = v.reshape(num_tokens, config.num_kv_heads, config.head_dim)
        if config.qk_norm == "head":
            q, k = self._norm(q, k)
        return q, k, v

    def _norm(self, q: torch.Tensor, k: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        assert self.q_norm is not None and self.k_norm is not None
        eps = self.config.rms_norm_eps
        return rms_norm(q, self.q_norm, eps), rms_norm(k, self.k_norm, eps)


def visible_from(config: ModelConfig, position: int) -> int:
    """First position that a query at `position` may look at."""
    return 0 if config.sliding_window is None else max(0, position + 1 - config.sliding_window)


def causal_mask(config: ModelConfig, start: int, num_tokens: int, device: str = "cpu") -> torch.Tensor | None:
    """True where query start + i may look at key visible_from(start) + j; None where it may look at all."""
    if num_tokens == 1:
        return None
    queries = torch.arange(start, start + num_tokens, device=device)[:, None]
    keys = torch.arange(visible_from(config, start), start + num_tokens, device=device)[None]
    mask = keys <= queries
    if config.sliding_window is not None:
        mask &= keys > queries - config.sliding_window
    return mask


def numbers_on(device: str, values: list[int]) -> torch.Tensor:
    """int64 [len(values)] on a device; the host does not wait until they are there."""
    numbers = torch.tensor(values, dtype=torch.int64, pin_memory=device != "cpu")
    return numbers.to(device, non_blocking=True)


class Decoder:
    """The attention side: it runs each layer up to its experts and goes on when their answer is there."""

    def __init__(self, config: ModelConfig, checkpoint: Checkpoint, names: ExpertNames, dtype: torch.dtype) -> None:
        self.config, self.dtype, self.device = config, dtype, checkpoint.device

        def load(name: str) -> torch.Tensor:
            return checkpoint.tensor(name, dtype)

        self.embedding = load("model.embed_tokens.weight")
        # A tied checkpoint may have a head of its own all the same: that one counts.
        self.head = load(HEAD) if HEAD in checkpoint.entries else self.embedding
        if torch.equal(self.head, self.embedding):
            self.head = self.embedding
        self.final_norm = load("model.norm.weight")
        layers = [f"model.layers.{layer}" for layer in range(config.num_layers)]
        self.attention = [Attention(config, checkpoint, layer, dtype) for layer in range(config.num_layers)]
        self.input_norm = [load(f"{base}.input_layernorm.weight") for base in layers]
        self.ffn_norm = [load(f"{base}.post_attention_layernorm.weight") for base in layers]
        self.router: dict[int, torch.Tensor] = {}
        self.dense: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}
        for layer, has_experts in enumerate(config.moe_layers):
            if has_experts:
                self.router[layer] = load(names.router(layer))
            else:
                gate, up, down = (load(f"{layers[layer]}.mlp.{part}_proj.weight") for part in ("gate", "up", "down"))
                self.dense[layer] = (torch.cat((gate, up)), down)
        inverse_frequency, self.rope_factor = config.rope.frequencies()
        self.inverse_frequency = inverse_frequency.to(self.device)

    def begin(self, sequences: list[Sequence]) -> Microbatch:
        """Embed what sequences have scheduled; there may be none."""
        token_ids = numbers_on(self.device, [token for each in sequences for token in each.scheduled_ids])
        positions = [at for each in sequences for at in each.scheduled_positions]
        cos_TD, sin_TD = self.angles(numbers_on(self.device, positions))
        masks = [causal_mask(self.config, each.num_computed, each.num_scheduled, self.device) for each in sequences]
        ends = itertools.accumulate(each.num_scheduled for each in sequences)
        last = [end - 1 for each, end in zip(sequences, ends) if each.completes]
        last_B = numbers_on(self.device, last)
        return RaggedMicrobatch(sequences, self.embedding[token_ids], cos_TD, sin_TD, last_B, masks)

    def angles(self, positions_T: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """By how much heads are turned at these positions: cosine and sine, [T, D] each."""
        angles = positions_T[:, None].to(torch.float32) * self.inverse_frequency
        angles = torch.cat((angles, angles), dim=-1)
        cos, sin = ((turn(angles) * self.rope_factor).to(self.dtype) for turn in (torch.cos, torch.sin))
        return cos, sin

    def attend(self, layer: int, batch: Microbatch) -> None:
        """Attention of one layer and the norm after it: batch.expert_in_TH is then what the experts see."""
        if batch.num_tokens == 0:
            batch.expert_in_TH = batch.x_TH
            return
        eps = self.config.rms_norm_eps
        batch.x_TH = batch.x_TH + self.attention[layer](rms_norm(batch.x_TH, self.input_norm[layer], eps), batch)
        batch.expert_in_TH = rms_norm(batch.x_TH, self.ffn_norm[layer], eps)

    def route(self, layer: int, batch: Microbatch) -> tuple[torch.Tensor, torch.Tensor]:
        """The experts of each token, ids int64 [T, K], and their weights float32 [T, K]."""
        logits_TE = F.linear(batch.expert_in_TH, self.router[layer])
        probabilities_TE = torch.softmax(logits_TE, dim=-1, dtype=torch.float32)
        weights_TK, ids_TK = torch.topk(probabilities_TE, self.config.top_k, dim=-1)
        if self.config.norm_topk_prob:
            weights_TK = weights_TK / weights_TK.sum(dim=-1, keepdim=True)
        if self.config.router_weights_in_model_dtype:
            weights_TK = weights_TK.to(self.dtype)
        return ids_TK, weights_TK.to(torch.float32)

    def dense_ffn(self, layer: int, batch: Microbatch) -> torch.Tensor:
        """The feed-forward of a layer that has no experts."""
        gate_up, down = self.dense[layer]
        return gated_ffn(batch.expert_in_TH, gate_up, down, self.config.hidden_act)

    def finish(self, batch: Microbatch, ffn_out_TH: torch.Tensor) -> None:
        """End of a layer: add what the experts (or the dense layer) answered."""
        batch.x_TH = batch.x_TH + ffn_out_TH

    def logits(self, batch: Microbatch) -> torch.Tensor:
        """Logits float32 [B, V] after the tokens that want them, in order."""
        x_BH = rms_norm(batch.x_TH[batch.last_B], self.final_norm, self.config.rms_norm_eps)
        return F.linear(x_BH, self.head).to(torch.float32)
