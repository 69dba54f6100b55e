# SPDX-License-Identifier: Apache-2.0
"""ModelConfig: what a config.json of Mixtral, Qwen3-MoE or OLMoE means; options are understood or refused."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import CheckpointError, ConfigError, brief
from .generation import OPTIONS as GENERATION_OPTIONS
from .generation import GenerationRules
from .options import DEFAULTS, is_understood, is_without_effect
from .rope import RopeConfig

FAMILIES: dict[str, str] = {
    "mixtral": "MixtralForCausalLM",
    "qwen3_moe": "Qwen3MoeForCausalLM",
    "olmoe": "OlmoeForCausalLM",
}

ACTIVATIONS = ("silu", "swish", "gelu", "gelu_pytorch_tanh", "relu")


@dataclass(frozen=True)
class ModelConfig:
    """The numbers of a decoder with mixture-of-experts layers, independent of who wrote the file."""

    family: str
    vocab_size: int
    hidden: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    context: int  # most positions of a sequence
    rms_norm_eps: float
    rope: RopeConfig
    hidden_act: str
    num_experts: int
    top_k: int
    expert_hidden: int  # inner width of one expert
    dense_hidden: int  # inner width of the layers without experts
    moe_layers: tuple[bool, ...]  # per layer: are there experts?
    qk_norm: str  # "none", "head" (per head) or "full" (over all heads)
    norm_topk_prob: bool
    router_weights_in_model_dtype: bool
    attention_bias: bool
    clip_qkv: float | None
    sliding_window: int | None  # keys a query sees, itself included
    tie_word_embeddings: bool  # where the checkpoint has no head of its own
    eos_token_ids: frozenset[int]
    generation: GenerationRules

    @classmethod
    def from_directory(cls, directory: str | Path) -> ModelConfig:
        """Read DIR/config.json and DIR/generation_config.json. Where the second exists it alone says what ends a text
        and which rules its tokens follow, as in transformers; else the first does.

        Raises CheckpointError for a file that cannot be read, ConfigError for what this model does not run.
        """
        if not Path(directory).is_dir():
            raise CheckpointError(_no_directory(str(directory)))
        raw = _read_json(Path(directory) / "config.json")
        generation_path = Path(directory) / "generation_config.json"
        return cls.from_dict(raw, _read_json(generation_path) if generation_path.exists() else None)

    @classmethod
    def from_dict(cls, raw: Mapping[str, Any], generation: Mapping[str, Any] | None = None) -> ModelConfig:
        """Make a ModelConfig of the contents of a config.json, and of a generation_config.json where there is one;
        raises ConfigError naming the option."""
        family = _family(raw)
        _refuse_unknown(raw, family)
        read = _Reader(raw, DEFAULTS[family])
        hidden, num_heads = read.count("hidden_size"), read.count("num_attention_heads")
        num_kv_heads = read.count("num_key_value_heads", default=num_heads)
        if raw.get("head_dim") is None and hidden % num_heads:
            raise ConfigError(f"hidden_size {hidden} is not a multiple of num_attention_heads {num_heads}")
        head_dim = read.count("head_dim", default=hidden // num_heads)
        num_layers, num_experts = read.count("num_hidden_layers"), _num_experts(raw, family)
        top_k, context = read.count("num_experts_per_tok"), read.count("max_position_embeddings")
        _check_heads(family, hidden, num_heads, num_kv_heads, head_dim)
        if top_k > num_experts:
            raise ConfigError(f"num_experts_per_tok {top_k} is more than the number of experts {num_experts}")
        intermediate, vocab_size = read.count("intermediate_size"), read.count("vocab_size")
        rope = RopeConfig.from_dict(raw, read.number("rope_theta"), head_dim, context)
        rules = raw if generation is None else generation
        return cls(
            family=family,
            vocab_size=vocab_size,
            hidden=hidden,
            num_layers=num_layers,
            num_heads=num_heads,
            num_kv_heads=num_kv_heads,
            head_dim=head_dim,
            context=rope.context,
            rms_norm_eps=read.number("rms_norm_eps"),
            rope=rope,
            hidden_act=_activation(raw.get("hidden_act", "silu")),
            num_experts=num_experts,
            top_k=top_k,
            expert_hidden=read.count("moe_intermediate_size") if family == "qwen3_moe" else intermediate,
            dense_hidden=intermediate,
            moe_layers=_moe_layers(raw, num_layers),
            qk_norm={"mixtral": "none", "qwen3_moe": "head", "olmoe": "full"}[family],
            norm_topk_prob=family == "mixtral" or read.flag("norm_topk_prob"),
            router_weights_in_model_dtype=family != "mixtral",
            attention_bias=read.flag("attention_bias"),
            clip_qkv=None if raw.get("clip_qkv") is None else read.number("clip_qkv"),
            sliding_window=_sliding_window(raw, family, num_layers),
            tie_word_embeddings=read.flag("tie_word_embeddings"),
            eos_token_ids=_eos_token_ids(rules),
            generation=GenerationRules.from_dict(rules, vocab_size),
        )


class _Reader:
    """Typed look-ups in a config.json with the family's defaults."""

    def __init__(self, raw: Mapping[str, Any], defaults: Mapping[str, Any]) -> None:
        self.raw, self.defaults = raw, defaults

    def _value(self, name: str, default: Any) -> Any:
        value = self.raw.get(name)
        if value is None:
            value = default if default is not None else self.defaults.get(name)
        return value

    def count(self, name: str, default: int | None = None) -> int:
        value = self._value(name, default)
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise ConfigError(f"{name} must be a positive integer, not {brief(value)}")
        return value

    def number(self, name: str) -> float:
        value = self._value(name, None)
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not value > 0:
            raise ConfigError(f"{name} must be a positive number, not {brief(value)}")
        return float(value)

    def flag(self, name: str) -> bool:
        value = self.raw.get(name) or False
        if not isinstance(value, bool):
            raise ConfigError(f"{name} must be true or false, not {brief(value)}")
        return value


def _no_directory(name: str) -> str:
    text = f"there is no checkpoint directory {name}"
    if re.fullmatch(r"[\w.-]+/[\w.-]+", name) is None:
        return text
    return f"{text}; to take the model of that name from a hub: hf download {name} --local-dir DIR, and give DIR"


def _read_json(path: Path) -> dict[str, Any]:
    try:
        contents = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise CheckpointError(f"cannot read {path}: {error.strerror or error}") from error
    except ValueError as error:
        raise CheckpointError(f"{path} is not valid JSON: {error}") from error
    if not isinstance(contents, dict):
        raise CheckpointError(f"{path} does not hold a JSON object")
    return contents


def _family(raw: Mapping[str, Any]) -> str:
    known = f"supported are {', '.join(FAMILIES.values())}"
    architectures = raw.get("architectures") or []
    family = raw.get("model_type")
    if family is None:
        by_name = {architecture: name for name, architecture in FAMILIES.items()}
        family = next((by_name[name] for name in architectures if name in by_name), None)
    if family not in FAMILIES:
        name = architectures[0] if architectures else raw.get("model_type")
        raise ConfigError(f"unknown architecture {name!r} (model_type {raw.get('model_type')!r}); {known}")
    if architectures and FAMILIES[family] not in architectures:
        raise ConfigError(f"unknown architecture {architectures[0]!r} (model_type {family!r}); {known}")
    return family


def _refuse_unknown(raw: Mapping[str, Any], family: str) -> None:
    quantization = raw.get("quantization_config")
    if quantization:
        method = quantization.get("quant_method", "unknown") if isinstance(quantization, Mapping) else quantization
        raise ConfigError(
            f"quantization_config: weights quantised by {brief(method)} are not supported; take a checkpoint in "
            "bfloat16, float16 or float32"
        )
    for name, value in raw.items():
        is_known = is_understood(name, family) or name in GENERATION_OPTIONS
        if not is_known and not is_without_effect(name, value, family):
            raise ConfigError(f"option {name} = {brief(value)} of config.json is not supported for {family}")


def _num_experts(raw: Mapping[str, Any], family: str) -> int:
    names = ("num_experts", "num_local_experts")
    values = {raw[name] for name in names if raw.get(name) is not None} or {DEFAULTS[family]["num_experts"]}
    if len(values) > 1:
        raise ConfigError(f"num_experts {raw['num_experts']} and num_local_experts {raw['num_local_experts']} differ")
    return _Reader({"num_experts": values.pop()}, {}).count("num_experts")


def _check_heads(family: str, hidden: int, num_heads: int, num_kv_heads: int, head_dim: int) -> None:
    if num_heads % num_kv_heads:
        raise ConfigError(f"num_attention_heads {num_heads} is not a multiple of num_key_value_heads {num_kv_heads}")
    if head_dim % 2:
        raise ConfigError(f"head_dim {head_dim} must be even for rotary embeddings")
    if family == "olmoe" and head_dim * num_heads != hidden:
        raise ConfigError(f"head_dim {head_dim} is not supported for olmoe: its norms need hidden_size / heads")


def _activation(name: Any) -> str:
    if name not in ACTIVATIONS:
        raise ConfigError(f"hidden_act {name!r} is not supported; supported are {', '.join(ACTIVATIONS)}")
    return "silu" if name == "swish" else str(name)


def _moe_layers(raw: Mapping[str, Any], num_layers: int) -> tuple[bool, ...]:
    dense = raw.get("mlp_only_layers") or []
    if not isinstance(dense, list) or not all(isinstance(layer, int) for layer in dense):
        raise ConfigError(f"mlp_only_layers must be a list of layer numbers, not {brief(dense)}")
    sparse_step = _Reader(raw, {"decoder_sparse_step": 1}).count("decoder_sparse_step")
    return tuple(layer not in dense and (layer + 1) % sparse_step == 0 for layer in range(num_layers))


def _sliding_window(raw: Mapping[str, Any], family: str, num_layers: int) -> int | None:
    """Keys a query sees (None: all); options that would give layers of different kinds are refused."""
    size = raw.get("sliding_window", DEFAULTS[family]["sliding_window"])
    if family == "qwen3_moe" and not raw.get("use_sliding_window"):
        size = None
    if family == "olmoe" and size is not None:
        raise ConfigError(f"sliding_window = {size!r} is not supported for olmoe")
    if size is not None:
        size = _Reader({"sliding_window": size}, {}).count("sliding_window")
        if raw.get("max_window_layers") not in (None, 0):
            # Libraries disagree on which layers this means, so no answer would be right.
            raise ConfigError(
                f"max_window_layers = {raw['max_window_layers']!r} with use_sliding_window is not supported"
            )
    expected = "full_attention" if size is None else "sliding_attention"
    for layer_type in raw.get("layer_types") or []:
        if layer_type != expected:
            raise ConfigError(f"layer_types holds {layer_type!r} where sliding_window = {size!r} means {expected!r}")
    if raw.get("layer_types") and len(raw["layer_types"]) != num_layers:
        raise ConfigError(f"layer_types names {len(raw['layer_types'])} layers, num_hidden_layers is {num_layers}")
    return size


def _eos_token_ids(rules: Mapping[str, Any]) -> frozenset[int]:
    """Any of them ends a text. transformers knows no default of a family here, and neither do we."""
    value = rules.get("eos_token_id")
    values = [] if value is None else value if isinstance(value, list) else [value]
    if not all(type(token) is int for token in values):
        raise ConfigError(f"eos_token_id must be a token id or a list of them, not {brief(value)}")
    return frozenset(values)
