# SPDX-License-Identifier: Apache-2.0
"""A Mixtral checkpoint of random weights, of any shape: for timing, not for text."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import save_file


@dataclass(frozen=True)
class ModelShape:
    """The shape of a model; inner: of each expert's feed-forward."""

    hidden: int
    inner: int
    num_layers: int
    num_experts: int
    top_k: int
    num_heads: int
    num_kv_heads: int
    vocab_size: int = 256
    context: int = 4096


def write_checkpoint(directory: Path, shape: ModelShape, seed: int = 0) -> Path:
    """Write config.json and float32 weights; no tokenizer. Returns the directory."""
    directory.mkdir(parents=True, exist_ok=True)
    config = {
        "model_type": "mixtral",
        "architectures": ["MixtralForCausalLM"],
        "vocab_size": shape.vocab_size,
        "hidden_size": shape.hidden,
        "intermediate_size": shape.inner,
        "num_hidden_layers": shape.num_layers,
        "num_attention_heads": shape.num_heads,
        "num_key_value_heads": shape.num_kv_heads,
        "num_local_experts": shape.num_experts,
        "num_experts_per_tok": shape.top_k,
        "max_position_embeddings": shape.context,
        "eos_token_id": None,
        "hidden_act": "silu",
    }
    (directory / "config.json").write_text(json.dumps(config))
    generator = torch.Generator().manual_seed(seed)

    def matrix(rows: int, columns: int) -> torch.Tensor:
        return torch.randn(rows, columns, generator=generator) / columns**0.5

    hidden, kv = shape.hidden, shape.hidden // shape.num_heads * shape.num_kv_heads
    tensors = {"model.embed_tokens.weight": matrix(shape.vocab_size, hidden), "model.norm.weight": torch.ones(hidden)}
    tensors["lm_head.weight"] = matrix(shape.vocab_size, hidden)
    for layer in range(shape.num_layers):
        base = f"model.layers.{layer}"
        tensors[f"{base}.input_layernorm.weight"] = torch.ones(hidden)
        tensors[f"{base}.post_attention_layernorm.weight"] = torch.ones(hidden)
        for name, rows in (("q", hidden), ("k", kv), ("v", kv), ("o", hidden)):
            tensors[f"{base}.self_attn.{name}_proj.weight"] = matrix(rows, hidden)
        tensors[f"{base}.block_sparse_moe.gate.weight"] = matrix(shape.num_experts, hidden)
        for expert in range(shape.num_experts):
            names = (("w1", shape.inner, hidden), ("w2", hidden, shape.inner), ("w3", shape.inner, hidden))
            for name, rows, columns in names:
                tensors[f"{base}.block_sparse_moe.experts.{expert}.{name}.weight"] = matrix(rows, columns)
    save_file(tensors, directory / "model.safetensors")
    return directory
