# SPDX-License-Identifier: Apache-2.0
"""Small tokenizers of the kinds that checkpoints have."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import tokenizers
from tokenizers import decoders, models, normalizers, pre_tokenizers, processors


def byte_fallback() -> Any:
    """As sentencepiece models are converted: ▁ for spaces, single bytes for what is not in the vocabulary."""
    pieces = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), "▁", *"Helowrdnatsp end"]
    vocabulary = {piece: idx for idx, piece in enumerate(dict.fromkeys(pieces))}
    tokenizer = tokenizers.Tokenizer(models.BPE(vocabulary, [], unk_token="<unk>", byte_fallback=True))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    parts = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    tokenizer.decoder = decoders.Sequence(parts)
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    tokenizer.add_special_tokens(["<s>", "</s>"])
    return tokenizer


def byte_level() -> Any:
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {piece: idx for idx, piece in enumerate([*alphabet, "He", "ll", "Ġw"])}
    tokenizer = tokenizers.Tokenizer(models.BPE(vocabulary, [("H", "e"), ("l", "l"), ("Ġ", "w")]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def word_piece() -> Any:
    pieces = ["[UNK]", "[SEP]", *"abcdefghijklmnop", *(f"##{letter}" for letter in "abcdefghijklmnop"), "hello", "##lo"]
    tokenizer = tokenizers.Tokenizer(models.WordPiece({p: i for i, p in enumerate(pieces)}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.decoder = decoders.WordPiece(cleanup=False)
    return tokenizer


KINDS = {"byte_fallback": byte_fallback, "byte_level": byte_level, "word_piece": word_piece}


def save(tokenizer: Any, directory: Path, **config: Any) -> Path:
    tokenizer.save(str(directory / "tokenizer.json"))
    about = {"tokenizer_class": "PreTrainedTokenizerFast", **config}
    (directory / "tokenizer_config.json").write_text(json.dumps(about))
    return directory


def as_dict(content: str, special: bool, **more: str) -> dict[str, Any]:
    """An added token as tokenizer_config.json spells it."""
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    return {**more, "content": content, **flags, "special": special}
