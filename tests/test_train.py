# SPDX-License-Identifier: Apache-2.0
"""The training script in miniature, and what the shipped checkpoint must be."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("tokenizers")
pytest.importorskip("safetensors")

from m2n.reference_model import corpus, train, train_model  # noqa: E402

SHIPPED = Path(train.__file__).parent / "checkpoints" / "kjv-moe"
VERSES = [
    "Ge1:1 In the beginning God created  the heaven and the earth.",
    "Ge1:2 And the earth was without form, and void.",
    "Ge2:1 Thus the heavens and the earth were finished.",
    "1Sa2:1 And Hannah prayed, and said.",
]
TEXTS = ["the quick brown fox jumps over the lazy dog, and the dog sleeps on. " * 6] * 8
SMALL = train_model.ModelConfig(
    vocab_size=300,
    hidden_size=32,
    intermediate_size=24,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_local_experts=4,
    sliding_window=16,
    max_position_embeddings=256,
)


@pytest.fixture(autouse=True)
def one_thread() -> Any:
    num_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(num_threads)


def test_verses_become_chapters() -> None:
    chapters = corpus.chapters_of(VERSES)
    assert chapters[0] == (
        "In the beginning God created the heaven and the earth. And the earth was without form, and void."
    )
    assert len(chapters) == 3
    with pytest.raises(corpus.CorpusError, match="not a verse"):
        corpus.chapters_of(["Genesis 1"])


def test_held_out_chapters_are_not_trained_on() -> None:
    chapters = [str(idx) for idx in range(corpus.NUM_CHAPTERS)]
    trained, held_out = corpus.split(chapters)
    assert set(trained) | set(held_out) == set(chapters)
    assert not set(trained) & set(held_out)
    assert 0.04 < len(held_out) / len(chapters) < 0.06


def test_a_folder_that_cannot_be_written_is_refused_before_anything_is_trained(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(corpus, "load_chapters", lambda: TEXTS)
    monkeypatch.setattr(corpus, "split", lambda chapters: (chapters, chapters))
    monkeypatch.setattr(corpus, "train_tokenizer", lambda texts, size: pytest.fail("it goes on"))
    (tmp_path / "file").touch()
    with pytest.raises(FileExistsError, match="file"):
        train.main(["--output", str(tmp_path / "file"), "--threads", "1"])


def test_missing_package_names_the_apt_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    assert train.main(["--output", str(tmp_path / "out"), "--threads", "1"]) == 1
    assert "apt-get install -y --no-install-recommends bible-kjv bible-kjv-text" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_any_bytes_survive_the_tokenizer() -> None:
    tokenizer = corpus.train_tokenizer(TEXTS, SMALL.vocab_size)
    for text in ("the dog", " leading space", "naïve 日本 \n\t"):
        assert tokenizer.decode(tokenizer.encode(text).ids) == text
    assert corpus.encode(tokenizer, ["dog"])[0][0] == corpus.END_TOKEN_ID


def test_few_steps_lower_the_loss_and_the_folder_loads(tmp_path: Path) -> None:
    tokenizer = corpus.train_tokenizer(TEXTS, SMALL.vocab_size)
    model = train_model.Model(SMALL)
    config = train.TrainConfig(minutes=1.0, steps=40, batch=4, seq=48, warmup_steps=4, learning_rate=1e-2, log_every=10)
    saved: list[int] = []
    history = train.train(
        model,
        corpus.encode(tokenizer, TEXTS),
        config,
        lambda so_far: saved.append(len(so_far)),
        lambda line: None,
    )
    assert [step for step, _, _ in history] == [10, 20, 30, 40]
    assert history[-1][2] < 0.6 * history[0][2]
    assert saved == []  # nothing is saved before save_minutes have passed

    train_model.save_folder(tmp_path, model, tokenizer, {"history": history})
    loaded = train_model.load_folder(tmp_path)
    report = train.evaluate(loaded, tokenizer, TEXTS[:1])
    assert report["nats_per_token"] < history[0][2]
    assert len(report["load"]) == SMALL.num_hidden_layers
    for layer in report["load"]:
        assert sum(layer) == pytest.approx(SMALL.num_local_experts, abs=0.01)

    transformers = pytest.importorskip("transformers")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32).eval()
    ids = torch.randint(0, SMALL.vocab_size, (2, 150), generator=torch.Generator().manual_seed(1))
    with torch.inference_mode():
        # Longer than the window and than one block of queries, so that both count.
        torch.testing.assert_close(theirs(ids).logits, loaded(ids)[0], rtol=1e-4, atol=1e-4)
    their_tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path)
    assert their_tokenizer("the lazy dog").input_ids == tokenizer.encode("the lazy dog").ids


def test_made_up_loops_repeat_from_where_they_say() -> None:
    tokenizer = corpus.train_tokenizer(TEXTS, SMALL.vocab_size)
    documents = corpus.encode(tokenizer, TEXTS)
    ids, repeats = train.loops(documents, 6, 100, torch.Generator().manual_seed(0))
    assert ids.shape == (6, 101) and repeats.shape == (6, 100)
    for row, marks in zip(ids.tolist(), repeats, strict=True):
        first = int(marks.int().argmax())
        assert marks[first:].all() and not marks[:first].any()
        assert 0 < first < 99
        # The text ends before first - 1; from there each token is the one a period before, three tokens or more.
        assert any(all(row[idx] == row[idx - period] for idx in range(first - 1, 101)) for period in range(3, 17))


def test_training_on_loops_makes_repeated_tokens_unlikely() -> None:
    tokenizer = corpus.train_tokenizer(TEXTS, SMALL.vocab_size)
    documents = corpus.encode(tokenizer, TEXTS)
    model = train_model.Model(SMALL)
    ids, repeats = train.loops(documents, 8, 64, torch.Generator().manual_seed(5))

    def repeated() -> float:
        with torch.inference_mode():
            probs = model(ids[:, :-1])[0].softmax(-1).gather(2, ids[:, 1:, None])[..., 0]
        return float(probs[repeats].mean())

    config = train.TrainConfig(steps=30, batch=4, seq=48, warmup_steps=4, learning_rate=1e-2)
    train.train(model, documents, config, log=lambda line: None)
    before = repeated()
    config = train.TrainConfig(steps=10, batch=4, seq=48, warmup_steps=2, learning_rate=3e-3, loop_rows=8, loop_seq=64)
    train.train(model, documents, config, log=lambda line: None)
    assert repeated() < 0.7 * before


def test_window_masks_say_what_a_full_mask_says() -> None:
    for seq, window in ((1, 4), (128, 128), (300, 256), (400, 16)):
        position = torch.arange(seq)
        distance = position[:, None] - position
        full = (distance >= 0) & (distance < window)
        built = torch.zeros(seq, seq, dtype=torch.bool)
        end = 0
        for mask in train_model.window_masks(seq, window):
            start, end = end, end + mask.shape[0]
            built[start:end, end - mask.shape[1] : end] = mask == 0
        assert end == seq
        assert torch.equal(built, full)


def test_shipped_checkpoint_is_small_licensed_and_sparse() -> None:
    config = json.loads((SHIPPED / "config.json").read_text(encoding="utf-8"))
    assert config["architectures"] == ["MixtralForCausalLM"]
    assert config["num_local_experts"] >= 8
    assert config["num_experts_per_tok"] == 2
    assert config["num_hidden_layers"] == 4
    assert config["max_position_embeddings"] >= 8192
    for name in ("model.safetensors", "tokenizer.json", "tokenizer_config.json", "README.md", "LICENSE"):
        assert (SHIPPED / name).stat().st_size > 0, name
    assert sum(file.stat().st_size for file in SHIPPED.iterdir()) <= 12_000_000
    readme = (SHIPPED / "README.md").read_text(encoding="utf-8")
    assert "m2n.reference_model.train --output" in readme
    assert "bible-kjv-text" in readme


def test_float8_on_the_way_to_experts_changes_the_loss_a_little(capsys: pytest.CaptureFixture[str]) -> None:
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(SHIPPED / "tokenizer.json"))
    losses = []
    for dtype in (None, "bfloat16", "float8_e4m3fn"):
        model = train_model.load_folder(SHIPPED)
        if dtype is not None:
            train._dispatch_as(model, dtype)
        losses.append(train.evaluate(model, tokenizer, TEXTS)["nats_per_token"])
    assert len(set(losses)) == 3 and max(losses) - min(losses) < 0.1, losses


def test_shipped_checkpoint_loads_and_knows_its_text() -> None:
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(SHIPPED / "tokenizer.json"))
    model = train_model.load_folder(SHIPPED)
    report = train.evaluate(model, tokenizer, ["And the LORD spake unto Moses, saying,"])
    assert report["nats_per_byte"] < 1.0
    assert model.embed_tokens.weight.shape[0] == tokenizer.get_vocab_size()
