# SPDX-License-Identifier: Apache-2.0
"""Token ids as transformers' AutoTokenizer gives them, and a stream of text that is the text of the whole."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("tokenizers")
transformers = pytest.importorskip("transformers")

from hypothesis import given  # noqa: E402
from hypothesis import strategies as st  # noqa: E402
from tiny_tokenizers import KINDS, as_dict, byte_fallback, byte_level, save  # noqa: E402
from tokenizers import AddedToken  # noqa: E402

from m2n.reference_model.errors import CheckpointError  # noqa: E402
from m2n.reference_model.model.tokenizer import TextStream, Tokenizer  # noqa: E402

TEXTS = ["Hello world", " two  spaces", "a<sep>b<end>", "für 😀😀 end", "x" * 60, ""]


def same_as_transformers(directory: Path, texts: list[str] = TEXTS) -> None:
    ours, theirs = Tokenizer(directory), transformers.AutoTokenizer.from_pretrained(directory)
    for text in texts:
        ids = theirs(text)["input_ids"]
        assert ours.encode(text) == ids, text
        assert ours.decode(ids) == theirs.decode(ids, skip_special_tokens=True)


@pytest.mark.parametrize("kind", KINDS)
def test_how_a_training_run_cut_and_padded_is_ignored(kind: str, tmp_path: Path) -> None:
    tokenizer = KINDS[kind]()
    tokenizer.enable_truncation(max_length=16)
    tokenizer.enable_padding(length=16, pad_id=0)
    same_as_transformers(save(tokenizer, tmp_path))
    assert len(Tokenizer(tmp_path).encode("hello " * 40)) >= 40


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    "config",
    [
        {"added_tokens_decoder": {"500": as_dict("<end>", True), "499": as_dict("<sep>", False)}},
        {"eos_token": "<end>", "additional_special_tokens": ["<sep>"]},
        {"eos_token": as_dict("<end>", True, __type="AddedToken"), "sep_token": "<sep>", "bos_token": None},
        {"extra_special_tokens": ["<sep>", "<end>"], "add_bos_token": True},
        {"image_token": "<sep>"},
    ],
)
def test_tokens_that_only_the_config_names_are_tokens(kind: str, config: dict[str, Any], tmp_path: Path) -> None:
    same_as_transformers(save(KINDS[kind](), tmp_path, **config))


def test_the_files_of_old_name_tokens_too(tmp_path: Path) -> None:
    save(byte_level(), tmp_path)
    (tmp_path / "special_tokens_map.json").write_text(json.dumps({"eos_token": "<end>"}))
    (tmp_path / "added_tokens.json").write_text(json.dumps({"<sep>": 300, "<end>": 301}))
    same_as_transformers(tmp_path)


def test_a_token_of_the_file_that_the_config_calls_special_is(tmp_path: Path) -> None:
    tokenizer = byte_level()
    tokenizer.add_tokens([AddedToken("<end>", special=False)])
    same_as_transformers(save(tokenizer, tmp_path, eos_token="<end>"))


@pytest.mark.parametrize("text", ['{"added_tokens_decoder": 5}', "[]", "{", '{"extra_special_tokens": [7]}'])
def test_a_malformed_tokenizer_config_is_told_in_one_line(text: str, tmp_path: Path) -> None:
    byte_level().save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "tokenizer_config.json").write_text(text)
    with pytest.raises(CheckpointError) as told:
        Tokenizer(tmp_path)
    assert str(tmp_path) in str(told.value) and "\n" not in str(told.value)


def streamed(tokenizer: Tokenizer, prompt_ids: list[int], answer_ids: list[int]) -> str:
    stream = TextStream(tokenizer, prompt_ids)
    return "".join(stream.add(token_id) for token_id in answer_ids) + stream.rest()


def test_a_run_of_emoji_streams_whole(tmp_path: Path) -> None:
    tokenizer = Tokenizer(save(byte_fallback(), tmp_path))
    ids = tokenizer.encode("Hello 😀😀😀😀😀😀 end")
    stream = TextStream(tokenizer, ids[:3])
    parts = [part for token_id in ids[3:] if (part := stream.add(token_id))]
    assert "".join(parts) == tokenizer.answer(ids[:3], ids[3:])
    assert parts.count("😀") == 6, "each is shown as soon as it is complete"


@pytest.mark.parametrize("kind", KINDS)
@given(
    words=st.lists(st.sampled_from(["hello", "ll", "é", "😀", "\u3042", " ", "end", "\n"]), max_size=8),
    cut=st.integers(0, 9),
)
def test_the_stream_is_the_text_of_the_whole(kind: str, words: list[str], cut: int, tmp_path_factory: Any) -> None:
    directory = tmp_path_factory.getbasetemp() / f"tokenizer-{kind}"
    if not directory.exists():
        directory.mkdir()
        save(KINDS[kind](), directory)
    tokenizer = Tokenizer(directory)
    prompt_ids = tokenizer.encode("hello")
    whole_ids = tokenizer.encode("".join(words))
    ids = whole_ids[: max(0, len(whole_ids) - cut)]  # an answer may end in the middle of a character
    stream, whole = streamed(tokenizer, prompt_ids, ids), tokenizer.answer(prompt_ids, ids)
    if kind == "byte_fallback" and "\ufffd" in whole:
        # Of a run of bytes that ends in the middle of a character the library shows none; the stream has shown those
        # that were whole.
        assert tokenizer.answer(prompt_ids, whole_ids).startswith(stream.rstrip("\ufffd"))
    else:
        assert stream == whole
