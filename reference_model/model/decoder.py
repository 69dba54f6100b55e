# SPDX-License-Identifier: Apache-2.0
"""Decoder: the model but for its experts, in plain PyTorch: embedding, attention, norms, router, head.

Shape suffixes: T tokens of a microbatch, t tokens of one sequence in it, S positions held by its cache,
H hidden, V vocabulary, L layers, N query heads, G key/value heads, D head_dim, K experts per token (top_k),
E experts, B sequences.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F

from .checkpoint import HEAD, Checkpoint, ExpertNames
from .config import ModelConfig


@dataclass(frozen=True)
class KVCache:
    """Keys and values of one sequence for all layers."""

    keys_LGSD: torch.Tensor
    values_LGSD: torch.Tensor

    @classmethod
    def allocate(cls, config: ModelConfig, num_positions: int, dtype: torch.dtype, device: str = "cpu") -> KVCache:
        """Once for all positions that the sequence may ever have."""
        shape = (config.num_layers, config.num_kv_heads, num_positions, config.head_dim)
        return cls(torch.empty(shape, dtype=dtype, device=device), torch.empty(shape, dtype=dtype, device=device))


@dataclass
class Span:
    """Tokens [start, start + len(token_ids)) of one sequence, computed in one step."""

    cache: KVCache
    token_ids: list[int]
    start: int
    wants_logits: bool


@dataclass
class Microbatch(ABC):
    """Tokens of several sequences on their way through the layers."""

    x_TH: torch.Tensor
    cos_TD: torch.Tensor
    sin_TD: torch.Tensor
    last_B: torch.Tensor  # int64: the tokens after which logits are wanted
    expert_in_TH: torch.Tensor = field(default_factory=lambda: torch.empty(0), kw_only=True)

    @property
    def num_tokens(self) -> int:
        return self.x_TH.shape[0]

    @abstractmethod
    def attend(
        self, config: ModelConfig, layer: int, q_TND: torch.Tensor, k_TGD: torch.Tensor, v_TGD: torch.Tensor
    ) -> torch.Tensor:
        """Keep the keys and values of these tokens and look at those of their sequences: [T, N * D]."""


@dataclass
class SpanBatch(Microbatch):
    """Spans of any length, a sequence after another."""

    spans: list[Span]
    masks: list[torch.Tensor | None]

    def attend(
        self, config: ModelConfig, layer: int, q_TND: torch.Tensor, k_TGD: torch.Tensor, v_TGD: torch.Tensor
    ) -> torch.Tensor:
        outputs, first = [], 0
        for span, mask in zip(self.spans, self.masks):
            last = first + len(span.token_ids)
            q, k, v = (part[first:last] for part in (q_TND, k_TGD, v_TGD))
            outputs.append(_attend_span(config, layer, span, mask, q, k, v))
            first = last
        return torch.cat(outputs)


def _attend_span(
    config: ModelConfig,
    layer: int,
    span: Span,
    mask: torch.Tensor | None,
    q_tND: torch.Tensor,
    k_tGD: torch.Tensor,
    v_tGD: torch.Tensor,
) -> torch.Tensor:
    num_tokens = q_tND.shape[0]
    end = span.start + num_tokens
    first = visible_from(config, span.start)
    keys_GSD, values_GSD = span.cache.keys_LGSD[layer], span.cache.values_LGSD[layer]
    keys_GSD[:, span.start : end] = k_tGD.transpose(0, 1)
    values_GSD[:, span.start : end] = v_tGD.transpose(0, 1)
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

    def begin(self, spans: list[Span]) -> Microbatch:
        """Embed the tokens of a microbatch; there may be none."""
        token_ids = numbers_on(self.device, [token for span in spans for token in span.token_ids])
        spanned = [at for span in spans for at in range(span.start, span.start + len(span.token_ids))]
        cos_TD, sin_TD = self.angles(numbers_on(self.device, spanned))
        masks = [causal_mask(self.config, span.start, len(span.token_ids), self.device) for span in spans]
        last, end = [], 0
        for span in spans:
            end += len(span.token_ids)
            if span.wants_logits:
                last.append(end - 1)
        last_B = numbers_on(self.device, last)
        return SpanBatch(self.embedding[token_ids], cos_TD, sin_TD, last_B, spans, masks)

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

    def pass_through(self, batch: Microbatch, layers: Sequence[int] | None = None) -> torch.Tensor:
        """Logits of a step, or of these layers alone, with experts that answer what they get."""
        for layer in range(self.config.num_layers) if layers is None else layers:
            has_experts = self.config.moe_layers[layer]
            self.attend(layer, batch)
            if has_experts:
                self.route(layer, batch)
            self.finish(batch, batch.expert_in_TH if has_experts else self.dense_ffn(layer, batch))
        return self.logits(batch)

    def logits(self, batch: Microbatch) -> torch.Tensor:
        """Logits float32 [B, V] after the tokens that want them, in order."""
        x_BH = rms_norm(batch.x_TH[batch.last_B], self.final_norm, self.config.rms_norm_eps)
        return F.linear(x_BH, self.head).to(torch.float32)
