# SPDX-License-Identifier: Apache-2.0
"""Which options of a config.json are known, for each family, and at which values an option changes nothing."""

from __future__ import annotations

import re
from typing import Any

# What transformers assumes when config.json does not say.
DEFAULTS: dict[str, dict[str, Any]] = {
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
    },
}

# Options that change training, bookkeeping or what a library returns, never the logits.
_WITHOUT_EFFECT = re.compile(
    r"_.*|architectures|model_type|transformers_version|(torch_)?dtype|use_cache|(bos|pad|sep|cls)_token_id"
    r"|output_(attentions|hidden_states|router_logits)|return_dict|tokenizer_class|id2label|label2id|problem_type"
    r"|auto_map|chat_template|max_sequence_length|ep_size|use_bfloat16|torchscript|is_decoder|is_encoder_decoder"
    r"|.*dropout(_prob)?|.*_loss(_coef|_weight|_alpha)?|.*initializer(_range|_factor)?|.*init_std|router_jitter_noise"
    r"|gradient_checkpointing|seq_length|use_flash_attn|use_return_dict"
)
_UNDERSTOOD = frozenset(
    [
        *("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads"),
        *("num_key_value_heads", "head_dim", "hidden_act", "max_position_embeddings", "rms_norm_eps"),
        *("rope_parameters", "rope_scaling", "rope_theta", "partial_rotary_factor", "original_max_position_embeddings"),
        *("tie_word_embeddings", "num_experts", "num_local_experts", "num_experts_per_tok", "sliding_window"),
        "layer_types",
    ]
)
_UNDERSTOOD_BY: dict[str, frozenset[str]] = {
    "mixtral": frozenset(),
    "qwen3_moe": frozenset(
        [
            *("attention_bias", "use_sliding_window", "max_window_layers", "decoder_sparse_step"),
            *("moe_intermediate_size", "norm_topk_prob", "mlp_only_layers"),
        ]
    ),
    "olmoe": frozenset(["attention_bias", "clip_qkv", "norm_topk_prob"]),
}
# Of other families, or of other libraries for the same models: what these families do is what the values say.
_NEUTRAL: dict[str, tuple[Any, ...]] = {
    "pretraining_tp": (1,),
    "shared_expert_intermediate_size": (0,),
    "n_shared_experts": (0,),
    "num_shared_experts": (0,),
    "first_k_dense_replace": (0,),
    "moe_layer_freq": (1,),
    "num_nextn_predict_layers": (0,),
    "n_group": (1,),
    "topk_group": (1,),
    "topk_method": ("greedy",),
    "scoring_func": ("softmax",),
    "routed_scaling_factor": (1, 1.0),
    "rotary_pct": (1, 1.0),
    "add_cross_attention": (False,),
    "is_causal": (True,),
}
_NEUTRAL_BY: dict[str, dict[str, tuple[Any, ...]]] = {
    "mixtral": {"norm_topk_prob": (True,)},
    "qwen3_moe": {"use_qk_norm": (True,), "qk_norm": (True,)},
    "olmoe": {"use_qk_norm": (True,), "qk_norm": (True,)},
}


def is_without_effect(name: str, value: Any, family: str) -> bool:
    """Does an option that the model does not read leave the logits as they are, at this value?"""
    if value is None or value is False or value in ([], {}, ""):
        return True
    neutral = {**_NEUTRAL, **_NEUTRAL_BY[family]}.get(name, ())
    is_neutral = any(type(value) is type(same) and value == same for same in neutral)
    return is_neutral or _WITHOUT_EFFECT.fullmatch(name) is not None


def is_understood(name: str, family: str) -> bool:
    """Does the model read this option of the family?"""
    return name in _UNDERSTOOD or name in _UNDERSTOOD_BY[family]
