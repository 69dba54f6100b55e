# SPDX-License-Identifier: Apache-2.0
"""ModelConfig: what a config.json of Mixtral, Qwen3-MoE or OLMoE means; options are understood or refused."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .errors import CheckpointError, ConfigError
from .rope import RopeConfig

FAMILIES: dict[str, str] = {
    "mixtral": "MixtralForCausalLM",
    "qwen3_moe": "Qwen3MoeForCausalLM",
    "olmoe": "OlmoeForCausalLM",
}

# What transformers assumes when config.json does not say.
_DEFAULTS: dict[str, dict[str, Any]] = {
    "mixtral": {
        "vocab_size": 32000,
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "max_position_embeddings": 131072,
        "rms_norm_eps": 1e-5,
        "rope_theta": 1e6,
        "num_experts": 8,
        "num_experts_per_tok": 2,
        "sliding_window": None,
        "eos_token_id": 2,
    },
    "qwen3_moe": {
        "vocab_size": 151936,
        "hidden_size": 2048,
        "intermediate_size": 6144,
        "num_hidden_layers": 24,
        "num_attention_heads": 32,
        "num_key_value_heads": 4,
        "max_position_embeddings": 32768,
        "rms_norm_eps": 1e-6,
        "rope_theta": 1e4,
        "num_experts": 128,
        "num_experts_per_tok": 8,
        "sliding_window": 4096,
        "eos_token_id": None,
        "moe_intermediate_size": 768,
    },
    "olmoe": {
        "vocab_size": 50304,
        "hidden_size": 2048,
        "intermediate_size": 2048,
        "num_hidden_layers": 16,
        "num_attention_heads": 16,
        "num_key_value_heads": None,
        "max_position_embeddings": 4096,
        "rms_norm_eps": 1e-5,
        "rope_theta": 1e4,
        "num_experts": 64,
        "num_experts_per_tok": 8,
        "sliding_window": None,
        "eos_token_id": 50279,
    },
}

# Options that change training, bookkeeping or what a library returns, never the logits.
_WITHOUT_EFFECT = frozenset(
    [
        "_name_or_path",
        "architectures",
        "model_type",
        "transformers_version",
        "torch_dtype",
        "dtype",
        "use_cache",
        "initializer_range",
        "attention_dropout",
        "output_router_logits",
        "router_aux_loss_coef",
        "router_jitter_noise",
        "bos_token_id",
        "pad_token_id",
        "output_attentions",
        "output_hidden_states",
        "return_dict",
        "_attn_implementation_autoset",
        "tokenizer_class",
        "id2label",
        "label2id",
        "problem_type",
    ]
)
_UNDERSTOOD = frozenset(
    [
        "vocab_size",
        "hidden_size",
        "intermediate_size",
        "num_hidden_layers",
        "num_attention_heads",
        "num_key_value_heads",
        "head_dim",
        "hidden_act",
        "max_position_embeddings",
        "rms_norm_eps",
        "rope_parameters",
        "rope_scaling",
        "rope_theta",
        "partial_rotary_factor",
        "original_max_position_embeddings",
        "tie_word_embeddings",
        "eos_token_id",
        "num_experts",
        "num_local_experts",
        "num_experts_per_tok",
        "sliding_window",
        "layer_types",
    ]
)
_UNDERSTOOD_BY: dict[str, frozenset[str]] = {
    "mixtral": frozenset(),
    "qwen3_moe": frozenset(
        [
            "attention_bias",
            "use_sliding_window",
            "max_window_layers",
            "decoder_sparse_step",
            "moe_intermediate_size",
            "norm_topk_prob",
            "mlp_only_layers",
        ]
    ),
    "olmoe": frozenset(["attention_bias", "clip_qkv", "norm_topk_prob"]),
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
    tie_word_embeddings: bool
    eos_token_ids: frozenset[int]

    @classmethod
    def from_directory(cls, directory: str | Path) -> ModelConfig:
        """Read DIR/config.json, and the end tokens of DIR/generation_config.json where that exists.

        Raises CheckpointError for a file that cannot be read, ConfigError for what this model does not run.
        """
        raw = _read_json(Path(directory) / "config.json")
        generation_path = Path(directory) / "generation_config.json"
        if generation_path.exists():
            eos = _read_json(generation_path).get("eos_token_id")
            if eos is not None:
                raw["eos_token_id"] = eos
        return cls.from_dict(raw)

    @classmethod
    def from_dict(cls, raw: Mapping[str, Any]) -> ModelConfig:
        """Make a ModelConfig of the contents of a config.json; raises ConfigError naming the option."""
        family = _family(raw)
        _refuse_unknown(raw, family)
        read = _Reader(raw, _DEFAULTS[family])
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
        intermediate = read.count("intermediate_size")
        return cls(
            family=family,
            vocab_size=read.count("vocab_size"),
            hidden=hidden,
            num_layers=num_layers,
            num_heads=num_heads,
            num_kv_heads=num_kv_heads,
            head_dim=head_dim,
            context=context,
            rms_norm_eps=read.number("rms_norm_eps"),
            rope=RopeConfig.from_dict(raw, read.number("rope_theta"), head_dim, context),
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
            eos_token_ids=_eos_token_ids(raw, family),
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
            raise ConfigError(f"{name} must be a positive integer, not {value!r}")
        return value

    def number(self, name: str) -> float:
        value = self._value(name, None)
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not value > 0:
            raise ConfigError(f"{name} must be a positive number, not {value!r}")
        return float(value)

    def flag(self, name: str) -> bool:
        value = self.raw.get(name) or False
        if not isinstance(value, bool):
            raise ConfigError(f"{name} must be true or false, not {value!r}")
        return value


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
    known = _WITHOUT_EFFECT | _UNDERSTOOD | _UNDERSTOOD_BY[family]
    for name, value in raw.items():
        if name not in known and value not in (None, False):
            raise ConfigError(f"option {name} = {value!r} of config.json is not supported for {family}")


def _num_experts(raw: Mapping[str, Any], family: str) -> int:
    names = ("num_experts", "num_local_experts")
    values = {raw[name] for name in names if raw.get(name) is not None} or {_DEFAULTS[family]["num_experts"]}
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
        raise ConfigError(f"mlp_only_layers must be a list of layer numbers, not {dense!r}")
    sparse_step = _Reader(raw, {"decoder_sparse_step": 1}).count("decoder_sparse_step")
    return tuple(layer not in dense and (layer + 1) % sparse_step == 0 for layer in range(num_layers))


def _sliding_window(raw: Mapping[str, Any], family: str, num_layers: int) -> int | None:
    """Keys a query sees (None: all); options that would give layers of different kinds are refused."""
    size = raw.get("sliding_window", _DEFAULTS[family]["sliding_window"])
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


def _eos_token_ids(raw: Mapping[str, Any], family: str) -> frozenset[int]:
    value = raw.get("eos_token_id", _DEFAULTS[family]["eos_token_id"])
    values = [] if value is None else value if isinstance(value, list) else [value]
    if not all(isinstance(token, int) for token in values):
        raise ConfigError(f"eos_token_id must be a token id or a list of them, not {value!r}")
    return frozenset(values)
