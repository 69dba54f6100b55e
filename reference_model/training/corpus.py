# SPDX-License-Identifier: Apache-2.0
"""Public-domain English for the shipped checkpoint: text from a Debian package, cleaned, split, tokenised."""

from __future__ import annotations

import re
import shutil
import subprocess
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from tokenizers import Tokenizer

PACKAGES = ("bible-kjv", "bible-kjv-text")
APT_LINE = "apt-get install -y --no-install-recommends " + " ".join(PACKAGES)
WHOLE_TEXT = "Gen1:1-Rev22:21"
NUM_CHAPTERS = 1189
END_TOKEN = "<|end|>"
END_TOKEN_ID = 0
# Every HELD_OUT_EVERY-th chapter, counted over the whole book, is never trained on.
HELD_OUT_EVERY = 20
HELD_OUT_PHASE = 11

_VERSE = re.compile(r"^(?P<book>[1-3]?[A-Za-z]+)(?P<chapter>\d+):(?P<verse>\d+) (?P<text>.*)$")


class CorpusError(Exception):
    """The text cannot be had on this machine, or is not what it should be."""


def read_verses(program: str = "bible") -> list[str]:
    """Lines `Ge1:1 In the beginning ...`, one per verse, from the program of the Debian package.

    Raises CorpusError with the apt line when the package is missing or prints something else.
    """
    path = shutil.which(program)
    if path is None:
        raise CorpusError(f"the program {program!r} is not installed; on Debian or Ubuntu: {APT_LINE}")
    # -f turns pretty-printing (headings, broken lines) off, so that each verse is one line.
    result = subprocess.run(
        [path, "-f", WHOLE_TEXT], stdin=subprocess.DEVNULL, capture_output=True, text=True, encoding="ascii"
    )
    if result.returncode != 0 or not result.stdout:
        raise CorpusError(
            f"{program} -f {WHOLE_TEXT} gave no text (exit status {result.returncode}): "
            f"{result.stderr.strip() or 'no message'}; is its data installed? {APT_LINE}"
        )
    return result.stdout.splitlines()


def chapters_of(verses: Iterable[str]) -> list[str]:
    """Chapters as running prose, in book order: verse numbers dropped, verses joined by a space."""
    chapters: list[str] = []
    parts: list[str] = []
    current: tuple[str, str] | None = None
    for line in verses:
        match = _VERSE.match(line)
        if match is None:
            raise CorpusError(f"not a verse: {line!r}")
        key = (match["book"], match["chapter"])
        if key != current and parts:
            chapters.append(" ".join(parts))
            parts = []
        current = key
        parts.append(" ".join(match["text"].split()))
    if parts:
        chapters.append(" ".join(parts))
    return chapters


def load_chapters() -> list[str]:
    """All 1189 chapters. Raises CorpusError when they are not to be had."""
    chapters = chapters_of(read_verses())
    if len(chapters) != NUM_CHAPTERS:
        raise CorpusError(f"{len(chapters)} chapters, expected {NUM_CHAPTERS}")
    return chapters


def split(chapters: Sequence[str]) -> tuple[list[str], list[str]]:
    """(training chapters, held-out chapters): every HELD_OUT_EVERY-th is held out."""
    train = [text for idx, text in enumerate(chapters) if idx % HELD_OUT_EVERY != HELD_OUT_PHASE]
    held_out = [text for idx, text in enumerate(chapters) if idx % HELD_OUT_EVERY == HELD_OUT_PHASE]
    return train, held_out


def train_tokenizer(texts: Iterable[str], vocab_size: int) -> Tokenizer:
    """Byte-level BPE over all 256 bytes, so that any prompt can be encoded.

    END_TOKEN stands before each text (the post-processor adds it) and is what the model says at its end.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END_TOKEN],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{END_TOKEN} $A",
        pair=f"{END_TOKEN} $A {END_TOKEN} $B",
        special_tokens=[(END_TOKEN, END_TOKEN_ID)],
    )
    if tokenizer.token_to_id(END_TOKEN) != END_TOKEN_ID:
        raise CorpusError(f"{END_TOKEN} is token {tokenizer.token_to_id(END_TOKEN)}, expected {END_TOKEN_ID}")
    return tokenizer


def encode(tokenizer: Tokenizer, texts: Sequence[str]) -> list[list[int]]:
    """Token ids of each text, with the end token before it and none after it."""
    return [encoding.ids for encoding in tokenizer.encode_batch(list(texts))]
