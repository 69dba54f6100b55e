# SPDX-License-Identifier: Apache-2.0
"""m2n-generate: its output, its refusals, and that nothing survives it, however it ends."""

from __future__ import annotations

import json
import os
import shlex
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")
psutil = pytest.importorskip("psutil")

import tiny_checkpoints as tiny  # noqa: E402

from m2n.reference_model import generate  # noqa: E402
from m2n.reference_model.errors import InputError  # noqa: E402
from m2n.reference_model.model.tokenizer import TextStream, Tokenizer  # noqa: E402
from m2n.reference_model.run.launcher import Launcher, RankFailed  # noqa: E402
from m2n.reference_model.run_config import RunConfig  # noqa: E402

# The bound that a failing run must keep.
FAILURE_S = 10.0


@pytest.fixture(autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def reference() -> Any:
    return tiny.make_model("mixtral", num_experts=8)


@pytest.fixture(scope="session")
def directory(reference: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("generate") / "a path with spaces"
    return tiny.add_tokenizer(tiny.save(reference, directory))


def command(*arguments: object) -> list[str]:
    script = "from m2n.reference_model.generate import main; exit(main())"
    return [sys.executable, "-c", script, *map(str, arguments)]


def wait_until_gone(processes: list[Any], timeout_s: float) -> None:
    _, alive = psutil.wait_procs(processes, timeout=timeout_s)
    assert not alive


def test_one_command_generates_verifies_and_writes_what_was_asked_for(
    reference: Any, directory: Path, tmp_path: Path
) -> None:
    prompts = ["In the beginning", "a", "And the evening and the morning", "xyz", "Let there be", "q and"]
    (tmp_path / "prompts.txt").write_text("\n\n".join(prompts[1:]) + "\n")
    options = shlex.split("--attention-ranks 2 --expert-ranks 3 --microbatches 2 --max-new-tokens 9 --max-batch 2")
    options += shlex.split("--max-tokens 7 --ignore-eos --verify --json out.json --record-routes routes.npz")
    options += ["--expert-threads", "2"]
    options += ["--checkpoint", str(directory), "--prompt", prompts[0], "--prompts", "prompts.txt"]
    done = subprocess.run(command(*options), cwd=tmp_path, capture_output=True, text=True, timeout=100)
    assert done.returncode == 0, done.stderr
    assert "tokens/s" in done.stderr and "attention 1" in done.stderr and "expert 2" in done.stderr
    assert "equal those of the monolithic model" in done.stderr

    written, tokenizer = json.loads((tmp_path / "out.json").read_text()), Tokenizer(directory)
    prompt_ids = [tokenizer.encode(prompt) for prompt in prompts]
    expected = [tiny.reference_tokens(reference, ids, 9) for ids in prompt_ids]
    assert [sequence["prompt"] for sequence in written["sequences"]] == prompts
    assert [sequence["token_ids"] for sequence in written["sequences"]] == expected
    for idx, sequence in enumerate(written["sequences"]):
        assert sequence["text"] == tokenizer.decode(expected[idx])
        assert f"[{idx}] {prompts[idx]}{sequence['text']}\n" in done.stdout
    summary = written["summary"]
    assert (summary["tokens"], summary["sequences"], summary["verify"]["identical"]) == (54, 6, True)
    assert [(rank["role"], rank["rank"]) for rank in summary["ranks"]] == [
        *(("attention", rank) for rank in range(2)),
        *(("expert", rank) for rank in range(3)),
    ]
    for rank in summary["ranks"]:
        assert rank["device"] == "cpu" and (rank["threads"] == 2 or rank["role"] == "attention")
        assert rank["busy_s"] > 0 and rank["wait_s"] >= 0 and rank["bytes_sent"] > 0 and rank["bytes_received"] > 0
    routes = np.load(tmp_path / "routes.npz")
    assert len(routes["layer"]) == 2 * sum(len(ids) + 8 for ids in prompt_ids)


def test_a_single_prompt_is_streamed_and_sampling_repeats_with_its_seed(
    directory: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = shlex.split("--prompt Noah --max-new-tokens 7 --temperature 1 --top-p 0.95 --seed 5")
    options += ["--ignore-eos", "--verify", "--checkpoint", str(directory)]
    assert generate.main(options) == 0
    printed = capsys.readouterr()
    assert printed.out.startswith("Noah") and len(printed.out) == len("Noah") + 7 + 1
    assert "equal those of the monolithic model" in printed.err


def test_ranks_on_a_device_may_be_threads_of_one_process_and_the_files_say_where_they_were(
    reference: Any, directory: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = shlex.split("--prompt Noah --prompt ab --max-new-tokens 5 --ignore-eos --verify --reduce-at attention")
    options += shlex.split("--expert-ranks 2 --device emulated --attention-threads 2 --expert-threads 2 --one-process")
    options += ["--checkpoint", str(directory), "--json", str(tmp_path / "out.json")]
    assert generate.main([*options, "--trace", str(tmp_path / "trace.json")]) == 0
    assert "equal those of the monolithic model" in capsys.readouterr().err
    written, traced = (json.loads((tmp_path / name).read_text()) for name in ("out.json", "trace.json"))
    tokens = [tiny.reference_tokens(reference, Tokenizer(directory).encode(text), 5) for text in ("Noah", "ab")]
    assert [sequence["token_ids"] for sequence in written["sequences"]] == tokens
    for about in (written["summary"], traced["otherData"]):
        assert (about["attention_device"], about["expert_device"]) == ("emulated", "emulated")
        assert (about["attention_threads"], about["expert_threads"], about["is_one_process"]) == (2, 2, True)
    assert [rank["threads"] for rank in written["summary"]["ranks"]] == [2, 2, 2]


def test_devices_and_threads_are_for_both_roles_or_each(directory: Path) -> None:
    def run_of(options: str) -> RunConfig:
        return generate._run_config(generate.build_parser().parse_args(shlex.split(options)))

    cores = len(os.sched_getaffinity(0))
    run = run_of("--attention-ranks 1 --expert-ranks 1")
    assert (run.attention_device, run.expert_device, run.comm_config.transport) == ("cpu", "cpu", "auto")
    assert run.attention_threads == run.expert_threads == max(1, cores // 2) and not run.is_one_process
    run = run_of("--device cuda --attention-device cpu --expert-threads 3")
    assert (run.attention_device, run.expert_device, run.comm_config.transport) == ("cpu", "cuda:0", "shm")
    assert (run.attention_threads, run.expert_threads, run.is_one_process) == (max(1, cores // 2), 3, False)
    run = run_of("--device cuda")
    assert (run.torch_device("expert"), run.comm_config.transport, run.is_one_process) == ("cuda:0", "auto", True)
    assert not run_of("--device cuda --no-one-process").is_one_process
    run = run_of("--attention-device cuda:0 --expert-device cuda:1")
    assert (run.comm_config.transport, run.is_one_process) == ("auto", False)
    assert run_of("--device emulated").torch_device("attention") == "cpu"


def test_a_difference_from_the_monolithic_model_is_shown_and_fails(
    directory: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from m2n.reference_model.run import launcher

    def events_of_a_wrong_run(self: Any) -> Any:
        for token_id, finish in ((1, None), (2, "length")):
            self.result.add({"event": "tokens", "tokens": [[0, token_id, finish]]})
        yield {"event": "tokens", "tokens": [[0, 1, None], [0, 2, "length"]]}

    monkeypatch.setattr(launcher.Launcher, "events", events_of_a_wrong_run)
    options = ["--prompt", "Noah", "--max-new-tokens", "2", "--verify", "--checkpoint", str(directory)]
    assert generate.main(options) == 1
    assert "sequence 0, token 0: expected" in capsys.readouterr().err


# ---- ends


def main_with(directory: Path, tmp_path: Path, capfd: Any, act: Callable[[list[Any]], None]) -> tuple[int, str, float]:
    """Run the command on work for minutes; act(children) once text appears.

    Returns exit status, standard error and the seconds from the act to the end.
    """
    (tmp_path / "prompts.txt").write_text("a\n" * 2000)
    options = ["--prompts", str(tmp_path / "prompts.txt"), "--checkpoint", str(directory)]
    children: list[Any] = []
    acted_at: list[float] = []

    others = set(psutil.Process().children())  # multiprocessing keeps a helper process of its own

    def act_when_text_appears() -> None:
        while not capfd.readouterr().out:
            time.sleep(0.1)
        children.extend(set(psutil.Process().children()) - others)
        acted_at.append(time.monotonic())
        act(children)

    thread = threading.Thread(target=act_when_text_appears, daemon=True)
    thread.start()
    status = generate.main([*options, *shlex.split("--max-new-tokens 200 --max-batch 1 --ignore-eos")])
    seconds = time.monotonic() - acted_at[0]
    thread.join()
    assert len(children) == 2
    wait_until_gone(children, FAILURE_S)
    return status, capfd.readouterr().err, seconds


@pytest.mark.parametrize("role", ["expert", pytest.param("attention", marks=pytest.mark.slow)])
def test_a_killed_rank_ends_the_run_with_its_name(role: str, directory: Path, tmp_path: Path, capfd: Any) -> None:
    # The launcher starts the attention ranks first.
    def kill(children: list[Any]) -> None:
        sorted(children, key=lambda child: child.pid)[role == "expert"].kill()

    status, said, seconds = main_with(directory, tmp_path, capfd, kill)
    assert status == 1 and f"{role} rank 0 was killed by SIGKILL" in said
    assert seconds < FAILURE_S


def test_an_interrupted_run_says_so_and_leaves_no_process(directory: Path, tmp_path: Path, capfd: Any) -> None:
    status, said, seconds = main_with(directory, tmp_path, capfd, lambda _: os.kill(os.getpid(), signal.SIGINT))
    assert status == 128 + signal.SIGINT and "ended by SIGINT" in said
    assert seconds < FAILURE_S


@pytest.mark.slow
def test_ranks_do_not_outlive_a_killed_launcher(directory: Path, tmp_path: Path) -> None:
    (tmp_path / "prompts.txt").write_text("a\n" * 2000)
    options = shlex.split("--prompts prompts.txt --max-new-tokens 200 --max-batch 1 --ignore-eos")
    full_command = command(*options, "--checkpoint", directory)
    launcher = subprocess.Popen(full_command, cwd=tmp_path, stdout=subprocess.PIPE)
    assert launcher.stdout is not None and launcher.stdout.readline()
    children = psutil.Process(launcher.pid).children()
    assert len(children) == 2
    launcher.kill()
    launcher.wait()
    launcher.stdout.close()
    wait_until_gone(children, FAILURE_S)


@pytest.mark.parametrize("one_process", [False, True])
def test_the_error_of_a_rank_is_the_error_of_the_run(
    one_process: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = RunConfig(checkpoint=str(tmp_path), one_process=one_process)
    with pytest.raises(InputError, match=r"rank 0: cannot read .*config\.json"):
        list(Launcher(run, [[1]]).events())
    monkeypatch.setattr(RunConfig, "as_dict", lambda self: {"nonsense": 1})
    with pytest.raises(RankFailed, match="rank 0 failed: TypeError: .*nonsense"):
        list(Launcher(run, [[1]]).events())


@pytest.mark.slow
def test_it_runs_under_torchrun(directory: Path, tmp_path: Path) -> None:
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    script = tmp_path / "run.py"
    script.write_text("from m2n.reference_model.generate import main\nexit(main())\n")
    options = ["--prompt", "Noah", "--max-new-tokens", "6", "--verify", "--ignore-eos", "--json", "out.json"]
    options += ["--checkpoint", str(directory)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [*torchrun, str(script), *options],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=100,
        env=environment,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("Noah") and "equal those of the monolithic model" in done.stderr
    assert len(json.loads((tmp_path / "out.json").read_text())["sequences"][0]["token_ids"]) == 6


# ---- bad input


def refused(capsys: pytest.CaptureFixture[str], *options: object) -> str:
    """The message of a command that must fail for its input, before any rank is started."""
    try:
        status = generate.main([str(option) for option in options])
    except SystemExit as ended:  # argparse
        status = ended.code if isinstance(ended.code, int) else 1
    assert status == 2
    return capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        (["--attention-ranks", 0], "attention-ranks must be at least 1, not 0"),
        (["--expert-ranks", 0], "expert-ranks must be at least 1, not 0"),
        (["--expert-ranks", 9], "9 expert ranks, but the model has 8 experts"),
        (["--microbatches", 0], "microbatches must be at least 1"),
        (["--max-new-tokens", -3], "max-new-tokens must be at least 1"),
        (["--max-batch", "many"], "--max-batch"),
        (["--dtype", "int8"], "--dtype"),
        (["--dispatch-dtype", "float16"], "dispatch-dtype must be float8_e4m3fn, or the dtype float32, not 'float16'"),
        (["--temperature", -1], "temperature"),
        (["--top-p", 0], "top-p"),
        (["--prompt", ""], "prompt 1 has no tokens"),
        (["--prompt", "x" * 256], "prompt 1 has 256 tokens; the context of the model is 256"),
        (["--prompts", "/nowhere/prompts.txt"], "cannot read the prompts"),
        (["--microbatches", 64], "microbatches: expected at most 63, got 64"),
        (["--linger-us", -1], "linger-us must be microseconds"),
        (["--delay-us", -1], "delay_us"),
        (["--jitter-us", 1e9], "jitter_us"),
        (["--attention-threads", 0], "attention-threads must be at least 1, not 0"),
        (["--one-process", "--attention-threads", 2, "--expert-threads", 3], "share torch's number of threads"),
        (["--expert-device", "gpu"], "expert-device must be cpu, cuda, cuda:N or emulated, not 'gpu'"),
        (["--attention-device", "cuda:99"], "attention-device cuda:99: torch finds"),
        (["--device", "cuda", "--expert-device", "emulated"], "beside a GPU use cpu"),
        (
            ["--device", "emulated", "--delay-us", 5],
            "delay-us, jitter-us and M2N_FAULTS hold back signals of CPUs only",
        ),
        (["--json", "/nowhere/out.json"], "/nowhere/out.json"),
        (["--trace", "/nowhere/trace.json"], "/nowhere/trace.json"),
        (["--trace", "/proc/trace.json"], "/proc/trace.json"),
        (["--timeline", "/nowhere/timeline.png"], "/nowhere/timeline.png"),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else None,
)
def test_bad_options_are_refused_with_their_name(
    options: list[object], expected: str, directory: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert expected in refused(capsys, "--checkpoint", directory, "--prompt", "Noah", *options)


def test_a_bad_checkpoint_is_refused_before_any_rank_starts(
    directory: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("config.json", "model.safetensors", "tokenizer.json"):
        (tmp_path / name).write_bytes((directory / name).read_bytes())
    options = ["--prompt", "Noah", "--checkpoint", tmp_path]
    assert "there is no checkpoint directory" in refused(capsys, "--prompt", "x", "--checkpoint", tmp_path / "x")
    (tmp_path / "tokenizer.json").unlink()
    assert "no tokenizer" in refused(capsys, *options)
    whole = (tmp_path / "model.safetensors").read_bytes()
    (tmp_path / "model.safetensors").write_bytes(whole[:-10])
    assert "is truncated: tensor" in refused(capsys, *options)
    (tmp_path / "model.safetensors").write_bytes(whole)
    tiny.edit_config(tmp_path, num_hidden_layers=0)
    assert "num_hidden_layers must be a positive integer" in refused(capsys, *options)
    tiny.edit_config(tmp_path, num_hidden_layers=3)
    assert "lacks tensor model.layers.2." in refused(capsys, *options)
    tiny.edit_config(tmp_path, architectures=["GPT2LMHeadModel"], model_type="gpt2")
    assert "unknown architecture 'GPT2LMHeadModel'" in refused(capsys, *options)


def test_without_prompts_the_command_says_what_to_give(directory: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "--prompt" in refused(capsys, "--checkpoint", directory)


def test_without_its_extras_the_command_says_what_to_install(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "tokenizers", None)
    assert "needs tokenizers: pip install 'm2n[model]'" in refused(capsys, "--prompt", "Noah")


def test_streamed_pieces_add_up_to_the_text_and_no_character_is_cut(tmp_path: Path) -> None:
    from tokenizers import Tokenizer as HuggingFaceTokenizer
    from tokenizers import decoders, models, pre_tokenizers

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    byte_level = HuggingFaceTokenizer(models.BPE({char: idx for idx, char in enumerate(alphabet)}, []))
    byte_level.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    byte_level.decoder = decoders.ByteLevel()
    byte_level.save(str(tmp_path / "tokenizer.json"))
    tokenizer = Tokenizer(tmp_path)
    text = " naïve — déjà 光 vu"
    prompt, answer = tokenizer.encode("The"), tokenizer.encode(text)
    stream = TextStream(tokenizer, prompt)
    pieces = [stream.add(token_id) for token_id in answer]
    assert "".join(pieces) == text and "" in pieces
    assert tokenizer.answer(prompt, answer) == text


def test_a_terminal_sees_progress_and_then_every_answer_in_order(
    directory: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from m2n.reference_model.run.display import Display

    monkeypatch.setenv("FORCE_COLOR", "1")
    tokenizer = Tokenizer(directory)
    texts = ["one", "two"]
    with Display(tokenizer, texts, [tokenizer.encode(text) for text in texts], max_new=2) as display:
        display.event({"event": "stderr", "role": "expert", "rank": 1, "text": "waiting for [somebody]"})
        for idx, char, finish in ((1, "b", "stop"), (0, "a", None), (0, "c", "length")):
            token_id = tokenizer.encode(char)[0]
            display.event({"event": "tokens", "role": "attention", "rank": 0, "tokens": [[idx, token_id, finish]]})
    printed = capsys.readouterr()
    assert printed.out == "[0] oneac\n\n[1] twob\n\n"
    assert "[expert 1] waiting for [somebody]" in printed.err and "sequences" in printed.err


def test_torchrun_with_another_number_of_processes_is_refused(
    directory: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    environment = {"TORCHELASTIC_RUN_ID": "x", "RANK": "0", "WORLD_SIZE": "3", "MASTER_ADDR": "localhost"}
    for name, value in {**environment, "MASTER_PORT": "1"}.items():
        monkeypatch.setenv(name, value)
    said = refused(capsys, "--prompt", "Noah", "--checkpoint", directory)
    assert "torchrun started 3 processes; 1 attention ranks and 1 expert ranks need 2" in said
    said = refused(capsys, "--prompt", "Noah", "--checkpoint", directory, "--one-process", "--expert-ranks", 2)
    assert "with --one-process they are threads of one process" in said
