# SPDX-License-Identifier: Apache-2.0
"""The model that `train.py` trains: Mixtral's arithmetic for whole sequences, and its Hugging Face folder."""

from __future__ import annotations

import json
import math
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from . import corpus

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from tokenizers import Tokenizer


@dataclass(frozen=True)
class ModelConfig:
    """Shape of the model; the names are those of transformers' MixtralConfig."""

    vocab_size: int = 2048
    hidden_size: int = 256
    intermediate_size: int = 168
    num_hidden_layers: int = 4
    num_attention_heads: int = 4
    num_key_value_heads: int = 2
    num_local_experts: int = 8
    num_experts_per_tok: int = 2
    # No token sees further than this, so a long context never holds a distance that training did not show.
    sliding_window: int = 256
    max_position_embeddings: int = 32768
    rope_theta: float = 10000.0
    rms_norm_eps: float = 1e-5
    router_aux_loss_coef: float = 0.002

    @property
    def head_dim(self) -> int:
        return self.hidden_size // self.num_attention_heads


class RMSNorm(nn.Module):
    def __init__(self, hidden: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(hidden))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x, self.weight.shape, self.weight, self.eps)


class Attention(nn.Module):
    """Grouped-query attention with rotary positions, by blocks of queries that skip what the window hides."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.num_heads, self.num_kv_heads = config.num_attention_heads, config.num_key_value_heads
        self.head_dim = config.head_dim
        hidden, kv_size = config.hidden_size, config.num_key_value_heads * config.head_dim
        self.q_proj = nn.Linear(hidden, hidden, bias=False)
        self.k_proj = nn.Linear(hidden, kv_size, bias=False)
        self.v_proj = nn.Linear(hidden, kv_size, bias=False)
        self.o_proj = nn.Linear(hidden, hidden, bias=False)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, masks: list[Tensor]) -> Tensor:
        batch, seq, hidden = x.shape
        q = self.q_proj(x).view(batch, seq, self.num_heads, self.head_dim).transpose(1, 2)
        k = self.k_proj(x).view(batch, seq, self.num_kv_heads, self.head_dim).transpose(1, 2)
        v = self.v_proj(x).view(batch, seq, self.num_kv_heads, self.head_dim).transpose(1, 2)
        q, k = _rotate(q, cos, sin), _rotate(k, cos, sin)
        groups = self.num_heads // self.num_kv_heads
        k, v = k.repeat_interleave(groups, 1), v.repeat_interleave(groups, 1)
        parts, end = [], 0
        for mask in masks:
            start, end = end, end + mask.shape[0]
            rows, seen = slice(start, end), slice(end - mask.shape[1], end)
            block = (q[:, :, rows], k[:, :, seen], v[:, :, seen])
            parts.append(F.scaled_dot_product_attention(*block, attn_mask=mask))
        return self.o_proj(torch.cat(parts, 2).transpose(1, 2).reshape(batch, seq, hidden))


def window_masks(seq: int, window: int) -> list[Tensor]:
    """Per block of queries, 0 where a key up to the block's last position is seen, -inf where it is not."""
    masks = []
    for start in range(0, seq, 128):
        end = min(seq, start + 128)
        distance = torch.arange(start, end)[:, None] - torch.arange(max(0, start - window), end)
        hidden = (distance < 0) | (distance >= window)
        masks.append(torch.zeros(distance.shape).masked_fill(hidden, -math.inf))
    return masks


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    low, high = x.chunk(2, -1)
    return torch.cat((low * cos - high * sin, high * cos + low * sin), -1)


class MoE(nn.Module):
    """Top-k SwiGLU experts.

    w13 [experts, 2 * intermediate, hidden] is w1 above w3; w2 is [experts, hidden, intermediate].
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        experts, hidden, inner = config.num_local_experts, config.hidden_size, config.intermediate_size
        self.top_k = config.num_experts_per_tok
        self.gate = nn.Linear(hidden, experts, bias=False)
        self.w13 = nn.Parameter(torch.empty(experts, 2 * inner, hidden))
        self.w2 = nn.Parameter(torch.empty(experts, hidden, inner))
        self.dispatch: Callable[[Tensor], Tensor] | None = None  # what becomes of x on its way to the experts

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """x [tokens, hidden] -> (y of the same shape, load-balancing loss, rows per expert).

        The loss is experts * sum(share * mean probability), at least top_k (Switch Transformers, eq. 4-6).
        """
        num_experts = self.w13.shape[0]
        probs = torch.softmax(self.gate(x), -1)
        weights, ids = torch.topk(probs, self.top_k, -1)
        weights = weights / weights.sum(-1, keepdim=True)
        # Rows sorted by expert, so that each expert is two plain matrix products.
        order = torch.argsort(ids.flatten(), stable=True)
        counts = torch.bincount(ids.flatten(), minlength=num_experts)
        token = order // self.top_k
        rows_TH = x if self.dispatch is None else self.dispatch(x)
        sorted_rows = rows_TH.index_select(0, token).split(counts.tolist())
        parts = []
        for rows, w13, w2 in zip(sorted_rows, self.w13, self.w2, strict=True):
            gate, up = F.linear(rows, w13).chunk(2, -1)
            parts.append(F.linear(F.silu(gate) * up, w2))
        y = torch.cat(parts) * weights.flatten().index_select(0, order).unsqueeze(1)
        out = torch.zeros_like(x).index_add(0, token, y)
        balance = num_experts * (counts / x.shape[0] * probs.mean(0)).sum()
        return out, balance, counts


class Block(nn.Module):
    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.self_attn = Attention(config)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.block_sparse_moe = MoE(config)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, masks: list[Tensor]) -> tuple[Tensor, Tensor, Tensor]:
        x = x + self.self_attn(self.input_layernorm(x), cos, sin, masks)
        y, balance, counts = self.block_sparse_moe(self.post_attention_layernorm(x).flatten(0, 1))
        return x + y.view_as(x), balance, counts


class Model(nn.Module):
    """Decoder with tied embeddings, for training only: no KV cache."""

    def __init__(self, config: ModelConfig, seed: int = 0) -> None:
        super().__init__()
        self.config = config
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(Block(config) for _ in range(config.num_hidden_layers))
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        generator = torch.Generator().manual_seed(seed)
        for name, parameter in self.named_parameters():
            if parameter.dim() > 1:
                # What is added to the residual stream starts smaller, the deeper the model (as in GPT-2).
                last = name.endswith(("o_proj.weight", "w2"))
                std = 0.04 / math.sqrt(2 * config.num_hidden_layers) if last else 0.04
                nn.init.normal_(parameter, std=std, generator=generator)

    def forward(self, ids: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """ids int64 [batch, seq] -> (logits [batch, seq, vocab], balance loss, rows [layers, experts])."""
        config, seq = self.config, ids.shape[1]
        position = torch.arange(seq)
        inverse = config.rope_theta ** -(torch.arange(0, config.head_dim, 2) / config.head_dim)
        angle = position[:, None] * inverse
        masks = window_masks(seq, config.sliding_window)
        x = self.embed_tokens(ids)
        balances, counts = [], []
        for block in self.layers:
            x, balance, count = block(x, angle.cos(), angle.sin(), masks)
            balances.append(balance)
            counts.append(count)
        logits = F.linear(self.norm(x), self.embed_tokens.weight)
        return logits, torch.stack(balances).mean(), torch.stack(counts)


def state_to_hf(model: Model) -> dict[str, Tensor]:
    """The weights under Mixtral's classic names, one matrix per expert.

    The LM head is the embedding and is not repeated.
    """
    inner = model.config.intermediate_size
    out: dict[str, Tensor] = {}
    for name, tensor in model.state_dict().items():
        prefix, _, last = name.rpartition(".")
        if last == "w13":
            for expert, matrix in enumerate(tensor):
                out[f"model.{prefix}.experts.{expert}.w1.weight"] = matrix[:inner]
                out[f"model.{prefix}.experts.{expert}.w3.weight"] = matrix[inner:]
        elif last == "w2":
            for expert, matrix in enumerate(tensor):
                out[f"model.{prefix}.experts.{expert}.w2.weight"] = matrix
        else:
            out[f"model.{name}"] = tensor
    return out


def state_from_hf(tensors: dict[str, Tensor], config: ModelConfig) -> dict[str, Tensor]:
    """The inverse of state_to_hf, in float32."""
    out: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        if ".experts." not in name:
            out[name.removeprefix("model.")] = tensor.float()
    for layer in range(config.num_hidden_layers):
        moe = f"layers.{layer}.block_sparse_moe"
        experts = [f"model.{moe}.experts.{expert}" for expert in range(config.num_local_experts)]
        w1, w2, w3 = (torch.stack([tensors[f"{expert}.w{i}.weight"] for expert in experts]) for i in (1, 2, 3))
        out[f"{moe}.w13"], out[f"{moe}.w2"] = torch.cat((w1, w3), 1).float(), w2.float()
    return out


def save_folder(output: Path, model: Model, tokenizer: Tokenizer, record: dict[str, Any]) -> None:
    """Writes a Hugging Face folder: bfloat16 weights, configuration, tokenizer, and how it was made."""
    from safetensors.torch import save_file

    output.mkdir(parents=True, exist_ok=True)
    tensors = {name: tensor.to(torch.bfloat16).contiguous() for name, tensor in state_to_hf(model).items()}
    save_file(tensors, output / "model.safetensors", metadata={"format": "pt"})
    (output / "model.safetensors").chmod(0o644)  # safetensors lets only the owner read
    tokenizer.save(str(output / "tokenizer.json"))
    end = {"bos_token_id": corpus.END_TOKEN_ID, "eos_token_id": corpus.END_TOKEN_ID}
    config = {
        "architectures": ["MixtralForCausalLM"],
        "model_type": "mixtral",
        **asdict(model.config),
        **end,
        "attention_dropout": 0.0,
        "hidden_act": "silu",
        "initializer_range": 0.04,
        "router_jitter_noise": 0.0,
        "tie_word_embeddings": True,
        "torch_dtype": "bfloat16",
        "use_cache": True,
    }
    words = {"bos_token": corpus.END_TOKEN, "eos_token": corpus.END_TOKEN}
    tokenizer_config = {
        **words,
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": model.config.max_position_embeddings,
        "clean_up_tokenization_spaces": False,
    }
    files = {
        "config.json": config,
        "tokenizer_config.json": tokenizer_config,
        "generation_config.json": {**end, "do_sample": False},
        "training.json": record,
    }
    for name, content in files.items():
        (output / name).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def load_folder(folder: Path) -> Model:
    """A folder of save_folder back as a training model, float32."""
    from safetensors.torch import load_file

    written = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    config = ModelConfig(**{name: written[name] for name in asdict(ModelConfig())})
    model = Model(config)
    model.load_state_dict(state_from_hf(load_file(folder / "model.safetensors"), config))
    return model.eval()
