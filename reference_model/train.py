# SPDX-License-Identifier: Apache-2.0
"""Trains the shipped checkpoint: a small Mixtral-format MoE on public-domain text in less than an hour.

`python -m m2n.reference_model.train --output DIR --minutes 50` trains and writes a Hugging Face folder;
`--evaluate DIR` prints the held-out loss and the expert load of such a folder.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import time
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

if __package__:
    from . import corpus
    from .train_model import Model, ModelConfig, MoE, load_folder, save_folder
else:  # run as a plain file
    import corpus
    from train_model import Model, ModelConfig, MoE, load_folder, save_folder

if TYPE_CHECKING:
    from collections.abc import Iterator

    from tokenizers import Tokenizer


LOOP_WEIGHT = 0.5


@dataclass(frozen=True)
class TrainConfig:
    """How to train, and how long: minutes of wall time or steps, whichever ends first."""

    minutes: float = 50.0
    steps: int = 1_000_000
    batch: int = 8
    seq: int = 512
    learning_rate: float = 3e-3
    warmup_steps: int = 50
    weight_decay: float = 0.1
    seed: int = 0
    threads: int = 2
    save_minutes: float = 10.0
    log_every: int = 50
    # Rows per step that hold a phrase over and over, from which the model learns not to go on with a loop.
    loop_rows: int = 0
    loop_seq: int = 192


def batches(documents: list[list[int]], batch: int, seq: int, seed: int) -> Iterator[Tensor]:
    """Endless int64 [batch, seq + 1]: per epoch, the documents in a new order end to end, cut into rows."""
    generator = torch.Generator().manual_seed(seed)
    rest: list[int] = []
    size = batch * (seq + 1)
    while True:
        for idx in torch.randperm(len(documents), generator=generator).tolist():
            rest.extend(documents[idx])
            while len(rest) >= size:
                yield torch.tensor(rest[:size]).view(batch, seq + 1)
                del rest[:size]


def loops(documents: list[list[int]], rows: int, seq: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Text that falls into a loop, as greedy decoding does: a real prefix, then its last phrase over and over.

    A phrase runs from one token to the next equal one (", and the drink offering" up to the next comma), so that
    repeating it is locally plausible. Returns ids int64 [rows, seq + 1], and bool [rows, seq]: which targets repeat.
    """

    def draw(low: int, high: int) -> int:
        return int(torch.randint(low, high, (1,), generator=generator))

    ids, repeats = torch.zeros(rows, seq + 1, dtype=torch.int64), torch.zeros(rows, seq, dtype=torch.bool)
    for row in range(rows):
        phrase: list[int] = []
        while not phrase:
            document = documents[draw(0, len(documents))]
            end = draw(min(24, len(document) - 1), len(document))
            text = document[max(0, end - draw(24, 97)) : end]
            starts = [idx for idx in range(max(0, len(text) - 16), len(text) - 3) if text[idx] == text[-1]]
            phrase = text[starts[-1] + 1 :] if starts else []
        whole = (text + phrase * (seq // len(phrase) + 1))[: seq + 1]
        ids[row] = torch.tensor(whole)
        # Its first two tokens may well follow once more; from then on it is a loop.
        repeats[row, len(text) + 1 :] = True
    return ids, repeats


def _loop_loss(model: Model, ids: Tensor, repeats: Tensor) -> Tensor:
    """Mean of -log(1 - p) over the repeated tokens (unlikelihood; Welleck et al. 2019, data as in Xu et al. 2022)."""
    log_probs = torch.log_softmax(model(ids[:, :-1])[0][repeats], -1)
    repeated = log_probs.gather(1, ids[:, 1:][repeats].unsqueeze(1)).squeeze(1)
    return -torch.log1p(-repeated.exp().clamp(max=1 - 1e-5)).mean()


def _optimizer(model: Model, config: TrainConfig) -> torch.optim.AdamW:
    matrices = [parameter for parameter in model.parameters() if parameter.dim() > 1]
    vectors = [parameter for parameter in model.parameters() if parameter.dim() <= 1]
    groups = [
        {"params": matrices, "weight_decay": config.weight_decay},
        {"params": vectors, "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=config.learning_rate, betas=(0.9, 0.95), fused=True)


def train(
    model: Model, documents: list[list[int]], config: TrainConfig, save: Any = None, log: Any = print
) -> list[tuple[int, float, float]]:
    """Trains in place; returns (step, seconds, mean training loss in nats per token) at each log line.

    save(history so far) is called every save_minutes. AdamW; the learning rate warms up linearly and then
    follows a cosine over the time or the steps, down to 5 %.
    """
    optimizer = _optimizer(model, config)
    source = batches(documents, config.batch, config.seq, config.seed)
    generator = torch.Generator().manual_seed(config.seed)
    tokens_per_epoch = sum(map(len, documents))
    start = saved = time.monotonic()
    history: list[tuple[int, float, float]] = []
    recent: list[float] = []
    progress, step = 0.0, 0
    while progress < 1.0:
        seconds = time.monotonic() - start
        progress = max(seconds / (60 * config.minutes), (step + 1) / config.steps)
        rate = 0.05 + 0.95 * 0.5 * (1 + math.cos(math.pi * min(progress, 1.0)))
        for group in optimizer.param_groups:
            group["lr"] = config.learning_rate * rate * min(1.0, (step + 1) / config.warmup_steps)
        rows = next(source)
        logits, balance, counts = model(rows[:, :-1])
        loss = F.cross_entropy(logits.flatten(0, 1), rows[:, 1:].flatten())
        total = loss + model.config.router_aux_loss_coef * balance
        if config.loop_rows:
            total = total + LOOP_WEIGHT * _loop_loss(
                model, *loops(documents, config.loop_rows, config.loop_seq, generator)
            )
        optimizer.zero_grad(set_to_none=True)
        total.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        recent.append(loss.item())
        step += 1
        if step % config.log_every == 0 or progress >= 1.0:
            seconds = time.monotonic() - start
            history.append((step, round(seconds, 1), round(sum(recent) / len(recent), 4)))
            epochs = step * config.batch * config.seq / tokens_per_epoch
            skew = (counts.amax(1) / counts.float().mean(1)).tolist()
            log(
                f"step {step} {seconds / 60:.1f} min epoch {epochs:.2f} loss {history[-1][2]:.3f} "
                f"tokens/s {step * config.batch * config.seq / seconds:.0f} "
                f"load max/mean {' '.join(f'{value:.2f}' for value in skew)}"
            )
            recent = []
        if save is not None and time.monotonic() - saved > 60 * config.save_minutes:
            save(history)
            saved = time.monotonic()
    return history


@torch.inference_mode()
def evaluate(model: Model, tokenizer: Tokenizer, texts: list[str]) -> dict[str, Any]:
    """Loss on whole texts, each by itself with its end token, and the share of rows that each expert gets.

    Returns nats_per_token, nats_per_byte, num_tokens, num_bytes and load [layers][experts]: 1 is the mean.
    """
    total, num_tokens, rows = 0.0, 0, torch.zeros(1, 1)
    for ids in corpus.encode(tokenizer, texts):
        logits, _, counts = model(torch.tensor([ids]))
        target = torch.tensor(ids[1:] + [corpus.END_TOKEN_ID])
        total += F.cross_entropy(logits[0], target, reduction="sum").item()
        num_tokens += len(target)
        rows = rows + counts
    num_bytes = sum(len(text.encode()) for text in texts)
    load = rows / rows.mean(1, keepdim=True)
    return {
        "num_texts": len(texts),
        "num_tokens": num_tokens,
        "num_bytes": num_bytes,
        "nats_per_token": round(total / num_tokens, 4),
        "nats_per_byte": round(total / num_bytes, 4),
        "load": [[round(value, 3) for value in layer] for layer in load.tolist()],
        "load_max_over_mean": [round(value, 3) for value in load.amax(1).tolist()],
        "load_min_over_mean": [round(value, 3) for value in load.amin(1).tolist()],
    }


def _parse(arguments: list[str] | None) -> argparse.Namespace:
    defaults = TrainConfig()
    parser = argparse.ArgumentParser(prog="python -m m2n.reference_model.train", description=__doc__)
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--output", type=Path, metavar="DIR", help="train, and write the checkpoint here")
    what.add_argument("--evaluate", type=Path, metavar="DIR", help="print the held-out loss and expert load")
    parser.add_argument(
        "--dispatch-dtype", choices=("bfloat16", "float16", "float8_e4m3fn"),
        help="with --evaluate: rows reach the experts as if dispatched so",
    )  # fmt: skip
    for name, value in asdict(defaults).items():
        flag = "--" + name.replace("_", "-")
        parser.add_argument(flag, type=type(value), default=value, help=f"default {value}")
    parser.add_argument("--init", type=Path, metavar="DIR", help="go on from this checkpoint")
    coefficient = ModelConfig.router_aux_loss_coef
    what_for = f"weight of the load-balancing loss, default {coefficient}"
    parser.add_argument("--balance", type=float, default=coefficient, help=what_for)
    return parser.parse_args(arguments)


def _load(folder: Path) -> tuple[Model, Tokenizer]:
    from tokenizers import Tokenizer

    return load_folder(folder), Tokenizer.from_file(str(folder / "tokenizer.json"))


def _dispatch_as(model: Model, dtype: str) -> None:
    from m2n.reference_model.precision import as_dispatched

    for module in model.modules():
        if isinstance(module, MoE):
            module.dispatch = partial(as_dispatched, dispatch_dtype=dtype)


def main(arguments: list[str] | None = None) -> int:
    """The command. Returns the exit status: 1 when the text is not to be had."""
    options = _parse(arguments)
    torch.set_num_threads(options.threads)
    try:
        train_texts, held_out = corpus.split(corpus.load_chapters())
    except corpus.CorpusError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    if options.evaluate is not None:
        model, tokenizer = _load(options.evaluate)
        if options.dispatch_dtype is not None:
            _dispatch_as(model, options.dispatch_dtype)
        print(json.dumps(evaluate(model, tokenizer, held_out), indent=2))
        return 0
    options.output.mkdir(parents=True, exist_ok=True)  # what cannot be written is said now, not in an hour
    config = TrainConfig(**{name: getattr(options, name) for name in asdict(TrainConfig())})
    if options.init is not None:
        model, tokenizer = _load(options.init)
        model.config = replace(model.config, router_aux_loss_coef=options.balance)
    else:
        tokenizer = corpus.train_tokenizer(train_texts, ModelConfig.vocab_size)
        model = Model(ModelConfig(router_aux_loss_coef=options.balance), config.seed)
    print(f"{sum(parameter.numel() for parameter in model.parameters())} parameters", flush=True)
    record: dict[str, Any] = {"train": asdict(config), "torch": torch.__version__}
    if options.init is not None:
        record["init"] = json.loads((options.init / "training.json").read_text(encoding="utf-8"))

    def save(history: list[tuple[int, float, float]]) -> None:
        record["history"] = history[:: max(1, len(history) // 40)]
        save_folder(options.output, model, tokenizer, record)

    def checkpoint(history: list[tuple[int, float, float]]) -> None:
        save(history)
        now = evaluate(model, tokenizer, held_out)
        print(f"saved; held-out loss {now['nats_per_token']} nats per token", flush=True)

    documents = corpus.encode(tokenizer, train_texts)
    start, cpu_start = time.monotonic(), time.process_time()
    history = train(model, documents, config, checkpoint, lambda line: print(line, flush=True))
    record |= {
        "num_steps": history[-1][0],
        "num_tokens": history[-1][0] * config.batch * config.seq,
        "wall_seconds": round(time.monotonic() - start, 1),
        "cpu_seconds": round(time.process_time() - cpu_start, 1),
    }
    save(history)
    record["held_out"] = evaluate(load_folder(options.output), tokenizer, held_out)
    save(history)
    print(json.dumps({name: value for name, value in record.items() if name not in ("history", "init")}, indent=2))
    return 0


if __name__ == "__main__":
    if __package__:
        from .command import run_command

        sys.exit(run_command("train", main))
    sys.exit(main())
