# SPDX-License-Identifier: Apache-2.0
"""Tokenizer: text to token ids and back, also piece by piece while a sequence grows."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from .errors import CheckpointError

# A byte-level tokenizer shows this for the bytes of a character that is not complete yet.
_INCOMPLETE = "\ufffd"
_NUM_CONTEXT = 6


class Tokenizer:
    """The tokenizer.json of a checkpoint."""

    def __init__(self, directory: str | Path) -> None:
        from tokenizers import Tokenizer as HuggingFaceTokenizer

        path = Path(directory) / "tokenizer.json"
        if not path.is_file():
            raise CheckpointError(f"no tokenizer: {path} does not exist")
        try:
            self._tokenizer: Any = HuggingFaceTokenizer.from_file(str(path))
        except Exception as error:  # the library raises bare Exception
            raise CheckpointError(f"cannot read the tokenizer {path}: {error}") from error

    def encode(self, text: str) -> list[int]:
        """Token ids, with the special tokens the checkpoint puts in front."""
        return list(self._tokenizer.encode(text).ids)

    def decode(self, token_ids: list[int]) -> str:
        return str(self._tokenizer.decode(token_ids, skip_special_tokens=True))

    def answer(self, prompt_ids: list[int], answer_ids: list[int]) -> str:
        """The text that the answer adds to the prompt, its leading space included."""
        before, whole = self.decode(prompt_ids), self.decode(prompt_ids + answer_ids)
        return whole[len(before) :] if whole.startswith(before) else self.decode(answer_ids)


class TextStream:
    """The text of one growing sequence: `add` returns what a token makes readable."""

    def __init__(self, tokenizer: Tokenizer, prompt_ids: list[int]) -> None:
        self._tokenizer = tokenizer
        # Some tokens before the new ones tell the decoder whether a space belongs in between.
        self._shown = prompt_ids[-_NUM_CONTEXT:]
        self._pending: list[int] = []

    def add(self, token_id: int) -> str:
        """New text, empty while a character is incomplete."""
        self._pending.append(token_id)
        new_text = self.rest()
        if not new_text or new_text.endswith(_INCOMPLETE):
            return ""
        self._shown = (self._shown + self._pending)[-_NUM_CONTEXT:]
        self._pending = []
        return new_text

    def rest(self) -> str:
        """What has been held back, however incomplete."""
        before = self._tokenizer.decode(self._shown)
        return self._tokenizer.decode(self._shown + self._pending)[len(before) :]
