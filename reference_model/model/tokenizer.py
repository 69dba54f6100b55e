# SPDX-License-Identifier: Apache-2.0
"""Tokenizer: text to token ids and back, also piece by piece while a sequence grows."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ..errors import CheckpointError, brief

# A tokenizer shows this for the bytes of a character that is not complete yet.
_INCOMPLETE = "\ufffd"
_NAMED = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")


class Tokenizer:
    """The tokenizer.json of a checkpoint, with the tokens that files beside it add, as transformers' AutoTokenizer has
    it. How a training run cut and padded its texts, which the file may hold too, is nobody's business here.

    Raises CheckpointError, naming the file.
    """

    def __init__(self, directory: str | Path) -> None:
        from tokenizers import Tokenizer as HuggingFaceTokenizer

        path = Path(directory) / "tokenizer.json"
        if not path.is_file():
            raise CheckpointError(f"no tokenizer: {path} does not exist")
        try:
            self._tokenizer: Any = HuggingFaceTokenizer.from_file(str(path))
        except Exception as error:  # the library raises bare Exception
            raise CheckpointError(f"cannot read the tokenizer {path}: {brief(error)}") from error
        padding = self._tokenizer.padding or {}
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        try:
            added = list(_added_tokens(Path(directory), padding.get("pad_token")))
        except (TypeError, KeyError, ValueError, AttributeError) as error:
            if isinstance(error, CheckpointError):
                raise
            raise CheckpointError(f"the tokens that files beside {path} add are malformed: {brief(error)}") from error
        for token in added:  # those that are there already stay as they are, but may become special
            (self._tokenizer.add_special_tokens if token.special else self._tokenizer.add_tokens)([token])

    def encode(self, text: str) -> list[int]:
        """Token ids, with the special tokens the checkpoint puts in front."""
        return list(self._tokenizer.encode(text).ids)

    def decode(self, token_ids: list[int]) -> str:
        return str(self._tokenizer.decode(token_ids, skip_special_tokens=True))

    def answer(self, prompt_ids: list[int], answer_ids: list[int]) -> str:
        """The text that the answer adds to the prompt, its leading space included."""
        before, whole = self.decode(prompt_ids), self.decode(prompt_ids + answer_ids)
        return whole[len(before) :] if whole.startswith(before) else self.decode(answer_ids)


def _added_tokens(directory: Path, pad_token: str | None) -> Iterator[Any]:
    """Tokens that tokenizer_config.json, special_tokens_map.json and added_tokens.json name, in the order of their ids
    where they have one. `pad_token`: what the training run padded with; it is a token unless the config has another."""
    config = _read(directory / "tokenizer_config.json")
    if "added_tokens_decoder" in config:
        numbered = {int(idx): token for idx, token in config["added_tokens_decoder"].items()}
    else:
        config = {**config, **_read(directory / "special_tokens_map.json")}
        numbered = {idx: token for token, idx in _read(directory / "added_tokens.json").items()}
    config = {"pad_token": pad_token, **config}
    extra = config.get("extra_special_tokens") or config.get("additional_special_tokens") or []
    names = (*_NAMED, *(name for name in config if name.endswith("_token") and name not in _NAMED))
    own = [config[name] for name in names if isinstance(config.get(name), (str, dict))]
    special = [token for token in (*own, *(extra.values() if isinstance(extra, dict) else extra)) if token]
    contents = {token if isinstance(token, str) else token["content"] for token in special}
    for _, token in sorted(numbered.items()):
        yield _as_token(token, isinstance(token, str) and token in contents)
    for token in special:
        yield _as_token(token, True)


def _as_token(token: str | dict[str, Any], is_special: bool) -> Any:
    from tokenizers import AddedToken

    if isinstance(token, str):
        return AddedToken(token, special=is_special, normalized=not is_special)
    known = ("content", "single_word", "lstrip", "rstrip", "normalized", "special")
    about = {name: token[name] for name in known if name in token}
    return AddedToken(**{**about, "special": is_special or about.get("special", False)})


def _read(path: Path) -> dict[str, Any]:
    """The contents of a JSON file beside the tokenizer; nothing where there is none."""
    try:
        contents = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as error:
        raise CheckpointError(f"cannot read {path}: {brief(error)}") from error
    if not isinstance(contents, dict):
        raise CheckpointError(f"{path} does not hold a JSON object")
    return contents


class TextStream:
    """The text of one growing sequence: `add` returns what a token makes readable.

    What it decodes begins where a character begins: at the prompt, then at the text that came last. So it tells whether
    a space belongs in between, and no run of bytes is cut.
    """

    def __init__(self, tokenizer: Tokenizer, prompt_ids: list[int]) -> None:
        self._tokenizer = tokenizer
        self._shown = list(prompt_ids)
        self._pending: list[int] = []

    def add(self, token_id: int) -> str:
        """New text, empty while a character is incomplete."""
        self._pending.append(token_id)
        new_text = self.rest()
        if not new_text or new_text.endswith(_INCOMPLETE):
            return ""
        self._shown, self._pending = self._pending, []
        return new_text

    def rest(self) -> str:
        """What has been held back, however incomplete."""
        before = self._tokenizer.decode(self._shown)
        return self._tokenizer.decode(self._shown + self._pending)[len(before) :]
