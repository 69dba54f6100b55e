# SPDX-License-Identifier: Apache-2.0
"""m2n-generate: text from attention ranks and expert ranks, from the command line."""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .console.command import outlast_stdout, run_command
from .console.files import Files
from .errors import InputError, missing_packages

if TYPE_CHECKING:
    from .model.tokenizer import Tokenizer
    from .run.result import RunResult
    from .run_config import RunConfig

PROGRAM = "m2n-generate"
DEFAULT_CHECKPOINT = Path(__file__).parent / "checkpoints" / "kjv-moe"
EXTRAS = ("torch", "safetensors", "tokenizers", "rich", "numpy")

_DESCRIPTION = """Generate text with a mixture-of-experts model whose attention and experts run in different
processes and exchange their tokens through m2n. Exit status: 0 done, 1 a rank failed or --verify found a
difference, 2 bad input, 128 + n ended by signal n."""


def build_parser() -> argparse.ArgumentParser:
    """All options of the command."""
    parser = argparse.ArgumentParser(prog=PROGRAM, description=_DESCRIPTION)
    ranks = parser.add_argument_group("ranks")
    ranks.add_argument("--attention-ranks", type=int, default=1, metavar="M", help="default 1")
    ranks.add_argument("--expert-ranks", type=int, default=1, metavar="N", help="default 1")
    ranks.add_argument("--microbatches", type=int, default=2, help="in flight on each attention rank, default 2")
    ranks.add_argument(
        "--reduce-at", choices=("expert", "attention"), default="expert",
        help="who sums over a token's experts (default expert: fewest bytes)",
    )  # fmt: skip
    ranks.add_argument("--dispatch-dtype", help="of rows on their way to experts: float8_e4m3fn (default: --dtype)")
    ranks.add_argument(
        "--linger-us", type=float, default=50.0, metavar="US",
        help="how long an expert rank waits for other attention ranks after the first (default 50)",
    )  # fmt: skip
    ranks.add_argument(
        "--lockstep", action="store_true", help="an expert rank waits for all attention ranks, however long it takes"
    )
    ranks.add_argument(
        "--delay-us",
        type=float,
        default=0.0,
        metavar="US",
        help="imitate a slow network: hold every signal back so long",
    )
    ranks.add_argument("--jitter-us", type=float, default=0.0, metavar="US", help="and up to so much longer, by --seed")
    _add_devices(ranks)
    model = parser.add_argument_group("model and prompts")
    model.add_argument(
        "--checkpoint", type=Path, default=DEFAULT_CHECKPOINT, metavar="DIR",
        help="Hugging Face directory of a Mixtral, Qwen3-MoE or OLMoE (default: the small one that ships)",
    )  # fmt: skip
    model.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), default="float32")
    model.add_argument("--prompt", action="append", default=[], help="may be given several times")
    model.add_argument("--prompts", type=Path, metavar="FILE", help="one prompt per line; -: standard input")
    sampling = parser.add_argument_group("generation")
    sampling.add_argument("--max-new-tokens", type=int, default=64)
    sampling.add_argument("--ignore-eos", action="store_true", help="go on after an end token")
    sampling.add_argument(
        "--temperature", type=float, default=0.0, help="0: the likeliest (default), whatever the files say"
    )
    sampling.add_argument("--top-p", type=float, default=1.0)
    sampling.add_argument("--seed", type=int, default=0)
    sampling.add_argument(
        "--max-batch", type=int, default=8,
        help="sequences at work on one attention rank (default 8); more wait and enter as others leave",
    )  # fmt: skip
    sampling.add_argument(
        "--max-tokens", type=int, default=256,
        help="tokens of one microbatch (default 256); longer prompts are computed in pieces",
    )  # fmt: skip
    output = parser.add_argument_group("output")
    output.add_argument(
        "--verify", action="store_true", help="compare with the monolithic model, and with transformers where installed"
    )
    output.add_argument("--json", type=Path, metavar="FILE", help="write sequences and summary")
    output.add_argument(
        "--record-routes", type=Path, metavar="FILE", help="write every token's experts as .npz, described in routes.py"
    )
    output.add_argument(
        "--trace", type=Path, metavar="FILE", help="write what every rank did when, for ui.perfetto.dev"
    )
    output.add_argument(
        "--timeline", type=Path, metavar="FILE.png", help="draw a few layers of it (needs matplotlib: 'm2n[bench]')"
    )
    output.add_argument("--timeout", type=float, default=120.0, metavar="S", help="longest wait for a peer (120)")
    return parser


def _add_devices(ranks: Any) -> None:
    ranks.add_argument(
        "--device", default="cpu", metavar="DEVICE",
        help="cpu (default), cuda, cuda:N, or emulated: the launches of a GPU on CPU threads, to test without one",
    )  # fmt: skip
    for role in ("attention", "expert"):
        ranks.add_argument(f"--{role}-device", metavar="DEVICE", help=f"of {role} ranks (default: --device)")
        ranks.add_argument(
            f"--{role}-threads", type=int, metavar="T",
            help=f"torch's threads on each {role} rank (default: all ranks share the cores evenly)",
        )  # fmt: skip
    ranks.add_argument(
        "--cuda-graphs", action="store_true",
        help="on devices: microbatches step together, decode steps as one CUDA graph on each rank",
    )  # fmt: skip
    ranks.add_argument(
        "--one-process", action=argparse.BooleanOptionalAction,
        help="ranks are threads of one process (default: where all are on one GPU)",
    )  # fmt: skip


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point of m2n-generate; returns the exit status."""
    return run_command(PROGRAM, lambda: _run(build_parser().parse_args(argv)))


def _run(args: argparse.Namespace) -> int:
    missing = missing_packages(EXTRAS)
    if missing:
        raise InputError(f"needs {', '.join(missing)}: pip install 'm2n[model]'")
    from .run.launcher import Interrupted, RankFailed

    try:
        return _generate(args)
    except RankFailed as error:
        print(f"{PROGRAM}: {error}", file=sys.stderr)
        return 1
    except Interrupted as interrupted:
        print(f"{PROGRAM}: ended by {interrupted}", file=sys.stderr)
        return interrupted.exit_status


def _generate(args: argparse.Namespace) -> int:
    """Check the input, run, report."""
    from .console.files import check_matplotlib, check_writable
    from .model.checkpoint import Checkpoint, check
    from .model.config import ModelConfig
    from .model.tokenizer import Tokenizer
    from .run.torchrun import global_rank, is_torchrun, run_under_torchrun
    from .run_config import check_prompts

    run, texts = _run_config(args), _prompt_texts(args)
    for path in _files(args):
        if path is not None:
            check_writable(path)
    if args.timeline is not None:
        check_matplotlib()
    # Everything that can be wrong with the input is found here, before any rank is started.
    config = ModelConfig.from_directory(run.checkpoint)
    run.check_model(config)
    run.check_machine()
    check(Checkpoint(run.checkpoint), config)
    tokenizer = Tokenizer(run.checkpoint)
    prompts = [tokenizer.encode(text) for text in texts]
    check_prompts(prompts, config)
    if any(path is not None for path in _files(args)):
        outlast_stdout()
    if is_torchrun():
        result = run_under_torchrun(run, prompts)
        if result is None:
            return 0
        assert global_rank() == 0
        return _report(args, result, tokenizer, texts, is_shown=False)
    run.check_memory(config)
    return _report(args, _launch(run, tokenizer, texts, prompts), tokenizer, texts, is_shown=True)


def _files(args: argparse.Namespace) -> list[Path | None]:
    return [args.json, args.record_routes, args.trace, args.timeline]


def _launch(run: RunConfig, tokenizer: Tokenizer, texts: list[str], prompts: list[list[int]]) -> RunResult:
    from .run.display import Display
    from .run.launcher import Launcher

    launcher = Launcher(run, prompts)
    with Display(tokenizer, texts, prompts, run.max_new_tokens) as display:
        with contextlib.closing(launcher.events()) as events:
            for event in events:
                display.event(event)
    return launcher.result


def _run_config(args: argparse.Namespace) -> RunConfig:
    from .run_config import RunConfig

    num_ranks = max(1, args.attention_ranks + args.expert_ranks)
    share = max(1, len(os.sched_getaffinity(0)) // num_ranks)
    names = {field.name for field in dataclasses.fields(RunConfig)}
    others = {
        "checkpoint": str(args.checkpoint),
        "linger_us": None if args.lockstep else args.linger_us,
        "record_routes": args.record_routes is not None,
        "timeout_s": args.timeout,
    }
    for role in ("attention", "expert"):
        threads = getattr(args, f"{role}_threads")
        others[f"{role}_threads"] = share if threads is None else threads
        others[f"{role}_device"] = getattr(args, f"{role}_device") or args.device
    run = RunConfig(**{name: value for name, value in vars(args).items() if name in names} | others)
    _ = run.sampling  # refuses temperature, top-p and seed out of range
    return run


def _prompt_texts(args: argparse.Namespace) -> list[str]:
    """The texts of --prompt, then of the lines of --prompts: a line ends at a line feed, with or without a carriage
    return before it, and nowhere else."""
    texts = list(args.prompt)
    if args.prompts is not None:
        where = "standard input" if str(args.prompts) == "-" else str(args.prompts)
        try:
            data = sys.stdin.buffer.read() if str(args.prompts) == "-" else args.prompts.read_bytes()
            lines = data.decode("utf-8-sig").replace("\r\n", "\n").split("\n")
        except OSError as error:
            raise InputError(f"cannot read the prompts in {where}: {error.strerror or error}") from error
        except UnicodeDecodeError as error:
            wrong = f"byte 0x{error.object[error.start]:02x} at place {error.start}"
            raise InputError(f"the prompts in {where} are not UTF-8: {wrong}") from error
        texts += [line for line in lines if line.strip()]
    if not texts:
        raise InputError('nothing to generate from: give --prompt "..." or --prompts FILE')
    for idx, text in enumerate(texts):
        try:
            text.encode()
        except UnicodeEncodeError as error:  # an argument's bytes, as the system hands them on
            raise InputError(
                f"prompt {idx} is not UTF-8 at character {error.start}; the locale (LANG) must be that of the prompt"
            ) from error
    return texts


def _report(args: argparse.Namespace, result: RunResult, tokenizer: Tokenizer, texts: list[str], is_shown: bool) -> int:
    """Print the numbers, write the files, verify; returns the exit status."""
    from .model.config import ModelConfig
    from .report.timeline import draw_timeline, write_trace
    from .run.display import Display
    from .run.result import SETTINGS

    display, files = Display(tokenizer, texts, result.prompts, result.run.max_new_tokens), Files()
    answers = [tokenizer.answer(prompt, answer) for prompt, answer in zip(result.prompts, result.answers)]
    if not is_shown:
        for text, answer in zip(texts, answers):
            print(f"{text}{answer}\n")
    summary: dict[str, Any] = result.summary()
    display.summary(summary)
    config = ModelConfig.from_directory(result.run.checkpoint)
    if files.write(args.record_routes, lambda: result.write_routes(str(args.record_routes), config)):
        display.lines([f"routes written to {args.record_routes}"])
    settings = {name: summary[name] for name in SETTINGS}
    if files.write(args.trace, lambda: write_trace(args.trace, result.traces, settings)):
        display.lines([f"trace written to {args.trace}: open it in ui.perfetto.dev"])
    if files.write(args.timeline, lambda: draw_timeline(args.timeline, result.traces, result.run.microbatches)):
        display.lines([f"timeline drawn to {args.timeline}"])
    is_right = True
    if args.verify:
        from .run.against_transformers import compare
        from .run.verify import describe, verify

        summary["verify"] = verify(result)
        display.lines(describe(summary["verify"]))
        theirs = compare(result, texts)
        display.lines(theirs.lines())
        is_right = summary["verify"]["identical"] and not theirs.differences
        summary["verify"]["transformers"] = dataclasses.asdict(theirs)
    sequences = [
        {"prompt": text, "token_ids": answer_ids, "text": answer, "finish": finish}
        for text, answer_ids, answer, finish in zip(texts, result.answers, answers, result.finishes)
    ]
    written = json.dumps({"sequences": sequences, "summary": summary}, indent=1) + "\n"
    files.write(args.json, lambda: args.json.write_text(written, encoding="utf-8"))
    files.raise_faults()
    return 0 if is_right else 1


if __name__ == "__main__":
    sys.exit(main())
