# SPDX-License-Identifier: Apache-2.0
"""What a command owes its user: a line for what goes wrong, results in their files whatever becomes of the display, and
children that import what it imports itself, whatever lies in the current folder."""

from __future__ import annotations

import argparse
import io
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("torch")
pytest.importorskip("tokenizers")

from rich.console import Console  # noqa: E402

import m2n  # noqa: E402
from m2n.__main__ import main as library_main  # noqa: E402
from m2n.benchmarks import cli  # noqa: E402
from m2n.benchmarks.memory import link_bytes  # noqa: E402
from m2n.benchmarks.report import print_rows, write_json  # noqa: E402
from m2n.reference_model import generate  # noqa: E402
from m2n.reference_model.children import python_command  # noqa: E402
from m2n.reference_model.command import Files, outlast_stdout, run_command  # noqa: E402
from m2n.reference_model.config import ModelConfig  # noqa: E402
from m2n.reference_model.display import Display  # noqa: E402
from m2n.reference_model.errors import CheckpointError, InputError  # noqa: E402
from m2n.reference_model.launcher import RankFailed  # noqa: E402
from m2n.reference_model.run_config import MAX_PEERS, RunConfig  # noqa: E402
from m2n.reference_model.timeline import save_picture  # noqa: E402
from m2n.reference_model.tokenizer import Tokenizer  # noqa: E402
from m2n.reference_model.torchrun import run_under_torchrun  # noqa: E402

SHIPPED = generate.DEFAULT_CHECKPOINT
ARGUMENTS = ["--prompt", "And it", "--max-new-tokens", "3"]
COMMAND = [sys.executable, "-c", "from m2n.reference_model.generate import main; exit(main())"]


@pytest.fixture
def trap(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The current folder holds what must not be imported."""
    for name in ("m2n/__init__.py", "torch/__init__.py", "numpy.py", "json.py", "runpy.py"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("raise SystemExit('imported from the current folder')\n")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_a_child_imports_from_where_its_parent_does(trap: Path) -> None:
    done = subprocess.run(python_command("m2n", "info"), capture_output=True, text=True, timeout=60)
    assert done.returncode == 0 and "transports" in done.stdout, done.stderr
    moved = subprocess.run([sys.executable, "-m", "m2n", "info"], capture_output=True, text=True, timeout=60)
    assert "imported from the current folder" in moved.stderr, "the trap is one"


def test_a_child_keeps_the_settings_of_its_parent_and_leaves_interrupts_to_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """PYTHON* variables, and packages that the user has installed for himself; a path may hold what is no text."""
    (tmp_path / "tells.py").write_text(
        "import signal, site, sys; print(signal.getsignal(signal.SIGINT) is signal.SIG_IGN, "
        "sys.flags.ignore_environment, sys.flags.no_user_site, sys.flags.utf8_mode, sys.argv[1:])"
    )
    monkeypatch.setattr(sys, "path", [*sys.path, tmp_path, str(tmp_path)])
    monkeypatch.setenv("PYTHONUTF8", "1")
    done = subprocess.run(python_command("tells", "a b"), capture_output=True, text=True, timeout=60)
    assert done.stdout == "True 0 0 1 ['a b']\n", done.stderr


def test_the_ranks_of_a_benchmark_start_in_any_folder(trap: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = "latency --sizes 1024 --baselines gloo --starts 1 --seconds 0.02 --json out.json"
    assert cli.main(options.split()) == 0
    rows = json.loads((trap / "out.json").read_text())["rows"]
    ran = {(row["contender"], row["boundary"]) for row in rows if "p50_us" in row}
    assert {("m2n", "python"), ("gloo", "python"), ("m2n", "cpp")} <= ran


def test_results_are_written_though_standard_output_takes_nothing(trap: Path) -> None:
    """Closed, of an encoding that lacks the characters, or full; and ranks start in any folder."""
    program = (
        "import sys; sys.path.insert(0, sys.path.pop(0)); sys.path.remove(''); "
        "from m2n.reference_model.generate import main; exit(main())"
    )
    command = [sys.executable, "-c", program, "--prompt", "für – alle", "--max-new-tokens", "2", "--json", "out.json"]
    environment = {**os.environ, "PYTHONIOENCODING": "latin-1"}
    closed = subprocess.run(
        ["bash", "-c", '"$@" >&-', "bash", *command], capture_output=True, text=True, timeout=60, env=environment
    )
    assert closed.returncode == 0, closed.stderr
    assert json.loads((trap / "out.json").read_text())["sequences"][0]["prompt"] == "für – alle"


class Broken(io.StringIO):
    """Standard output that takes nothing any more."""

    def __init__(self, error: OSError, file: Any) -> None:
        super().__init__()
        self.error, self.fileno = error, file.fileno  # type: ignore[method-assign]

    def write(self, text: str) -> int:
        raise self.error


@pytest.mark.parametrize("error", [BrokenPipeError(32, "Broken pipe"), OSError(28, "No space left on device")])
@pytest.mark.parametrize("is_kept", [False, True])
def test_output_that_breaks_ends_a_run_only_where_nothing_else_is_kept(
    error: OSError, is_kept: bool, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tokenizer, reached = Tokenizer(SHIPPED), []

    def body() -> int:
        if is_kept:
            outlast_stdout()
        event = {"event": "tokens", "tokens": [(0, tokenizer.encode("a")[0], "length")]}
        Display(tokenizer, ["x"], [[1]], 1).event(event)
        reached.append(True)
        return 0

    with (tmp_path / "stdout").open("w") as file:
        monkeypatch.setattr(sys, "stdout", Broken(error, file))
        status = run_command("prog", body)
    assert (status, bool(reached)) == ((0, True) if is_kept else ({32: 141, 28: 2}[error.errno or 0], False))
    line = f"prog: cannot write standard output: {error.strerror}\n"
    assert capsys.readouterr().err == ("" if is_kept or status == 141 else line)


def test_standard_error_ends_nothing_and_closed_input_is_empty(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def body() -> int:
        print("lost", file=sys.stderr)
        Display(Tokenizer(SHIPPED), ["x"], [[1]], 1).lines(["lost, too"])
        return len(sys.stdin.buffer.read())

    with (tmp_path / "stderr").open("w") as file:
        for error in (BrokenPipeError(32, "Broken pipe"), OSError(28, "No space left on device")):
            broken = Broken(error, file)
            monkeypatch.setattr(sys, "stderr", broken)
            monkeypatch.setattr(sys, "stdin", None)
            assert run_command("prog", body) == 0
            assert sys.stderr is broken and sys.stdin is None, "as they were"


def test_a_pipe_that_breaks_elsewhere_is_told(capsys: pytest.CaptureFixture[str]) -> None:
    def body() -> int:
        raise BrokenPipeError(32, "Broken pipe")

    assert run_command("prog", body) == 2
    assert capsys.readouterr().err == "prog: [Errno 32] Broken pipe\n"


@pytest.mark.parametrize("error", [BrokenPipeError(32, "Broken pipe"), OSError(28, "No space left on device")])
def test_what_the_library_prints_may_have_no_reader(
    error: OSError, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with (tmp_path / "stdout").open("w") as file:
        monkeypatch.setattr(sys, "stdout", Broken(error, file))
        status = library_main(["info"])
    assert (status, capsys.readouterr().err) == ((141, "") if error.errno == 32 else (2, f"m2n: {error}\n"))


def test_a_file_that_cannot_be_written_keeps_no_other_from_it(tmp_path: Path) -> None:
    files, good = Files(), tmp_path / "good"
    full = Path("/dev/full")
    assert not files.write(full, lambda: write_json(full, {}))
    assert files.write(good, lambda: good.write_text("x")) and not files.write(None, lambda: None)
    with pytest.raises(InputError, match="cannot write /dev/full: No space left on device$"):
        files.raise_faults()


def test_an_interrupt_and_bad_input_are_a_line_each(capsys: pytest.CaptureFixture[str]) -> None:
    def fail(error: BaseException) -> int:
        raise error

    assert run_command("prog", lambda: fail(KeyboardInterrupt())) == 130
    assert run_command("prog", lambda: fail(InputError("no such thing"))) == 2
    assert run_command("prog", lambda: 1) == 1
    assert capsys.readouterr().err == "prog: ended by SIGINT\nprog: no such thing\n"


@pytest.mark.slow
@pytest.mark.parametrize("after_s", [0.4, 1.0, 2.5])
def test_ctrl_c_while_it_starts_is_a_line_and_leaves_nothing(after_s: float) -> None:
    """In the first moments, before this code runs, it is Python's own traceback."""
    with subprocess.Popen(
        [*COMMAND, *ARGUMENTS, "--max-new-tokens", "5000"],
        stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, start_new_session=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # a job in the background ignores it
    ) as process:  # fmt: skip
        time.sleep(after_s)
        os.killpg(process.pid, signal.SIGINT)
        said = process.communicate(timeout=20)[1]
    if process.returncode != -signal.SIGINT:
        assert process.returncode == 130 and said == "m2n-generate: ended by SIGINT\n"


@pytest.mark.slow
def test_ctrl_c_ends_a_diagnosis_with_a_line() -> None:
    with subprocess.Popen(
        [sys.executable, "-m", "m2n", "diagnose"], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        start_new_session=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # a job in the background ignores it
    ) as process:  # fmt: skip
        assert process.stdout is not None
        process.stdout.readline()  # of the first transport: both ranks are there
        os.killpg(process.pid, signal.SIGINT)
        said = process.communicate(timeout=20)[1]
    assert process.returncode == 130 and said.endswith("m2n: ended by SIGINT\n") and "Traceback" not in said, said


@pytest.mark.parametrize(
    ("variables", "expected"),
    [
        ({"RANK": "zero"}, "RANK: expected a number, as torchrun sets it, got 'zero'"),
        ({"RANK": "2"}, "RANK: expected 0 to 1, as WORLD_SIZE is 2, got 2"),
        ({"WORLD_SIZE": "two"}, "WORLD_SIZE: expected a number, as torchrun sets it, got 'two'"),
        ({"MASTER_PORT": "http"}, "MASTER_PORT: expected a number, as torchrun sets it, got 'http'"),
    ],
)
def test_variables_of_torchrun_are_refused_by_name(
    variables: dict[str, str], expected: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name, value in {"RANK": "1", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", **variables}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("MASTER_PORT", variables.get("MASTER_PORT", "1"))
    assert generate.main(ARGUMENTS) == 2
    assert capsys.readouterr().err == f"m2n-generate: {expected}\n"


def test_a_store_that_is_not_there_is_told_by_its_address(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"RANK": "1", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1"}.items():
        monkeypatch.setenv(name, value)
    run = RunConfig(str(SHIPPED), connect_timeout_s=0.01)
    with pytest.raises(RankFailed, match=r"no store at 127\.0\.0\.1:1 \(MASTER_ADDR, MASTER_PORT\): .*refused"):
        run_under_torchrun(run, [[1]])


def texts_of(*arguments: str) -> list[str]:
    return generate._prompt_texts(generate.build_parser().parse_args(list(arguments)))


def test_lines_of_a_prompts_file_end_at_line_feeds_and_nowhere_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = "\ufeffone\u2028line\n\n\x0btwo\r\nthree\x85four\rfive\x0c\x1c\n"
    expected = ["one\u2028line", "\x0btwo", "three\x85four\rfive\x0c\x1c"]
    path = tmp_path / "для всех.txt"
    path.write_bytes(text.encode())
    assert texts_of("--prompts", str(path)) == expected
    stdin = argparse.Namespace(buffer=io.BytesIO(text.encode()))
    monkeypatch.setattr(sys, "stdin", stdin)
    assert texts_of("--prompt", "first", "--prompts", "-") == ["first", *expected]


def test_prompts_that_are_no_utf_8_are_told_with_their_place(tmp_path: Path) -> None:
    path = tmp_path / "prompts"
    path.write_bytes(b"abc\xff\n")
    with pytest.raises(InputError, match=r"prompts in .*prompts are not UTF-8: byte 0xff at place 3$"):
        texts_of("--prompts", str(path))
    with pytest.raises(InputError, match="prompt 1 is not UTF-8 at character 1"):
        texts_of("--prompt", "a", "--prompt", "a\udcff")
    with pytest.raises(InputError, match=r"cannot read the prompts in .*: Is a directory$"):
        texts_of("--prompts", str(tmp_path))


@pytest.mark.parametrize("name", ["mistralai/Mixtral-8x7B-v0.1", "Qwen/Qwen3-30B-A3B"])
def test_a_name_of_a_hub_says_how_to_download_it(name: str) -> None:
    with pytest.raises(CheckpointError, match=f"hf download {name} --local-dir DIR"):
        ModelConfig.from_directory(name)
    with pytest.raises(CheckpointError, match="there is no checkpoint directory ./no/such$"):
        ModelConfig.from_directory("./no/such")


@pytest.mark.parametrize("options", [{}, {"attention_ranks": 40}, {"reduce_at": "attention"}, {"microbatches": 3}])
def test_a_microbatch_too_large_is_told_with_what_would_do(options: dict[str, Any]) -> None:
    """What is allowed by its words is allowed."""
    config = ModelConfig.from_directory(SHIPPED)
    with pytest.raises(InputError, match=r"max-tokens must be at most \d+ for this model") as refused:
        RunConfig(str(SHIPPED), max_tokens=100_000_000, **options).check_model(config)
    most = int(str(refused.value).split("at most ")[1].split()[0])
    RunConfig(str(SHIPPED), max_tokens=most, **options).check_model(config)


def test_ranks_are_no_more_than_a_comm_has_places_for(tmp_path: Path) -> None:
    config = ModelConfig.from_directory(SHIPPED)
    most = MAX_PEERS // 2
    RunConfig(str(SHIPPED), attention_ranks=most).check_model(config)
    with pytest.raises(InputError, match=f"expert-ranks must be at most {most}, not {most + 1}"):
        RunConfig(str(SHIPPED), attention_ranks=most + 1).check_model(config)
    with pytest.raises(ValueError, match=f"max_peers: expected 1 to {MAX_PEERS}"):
        m2n.AttentionComm(0, m2n.Shape(8, 4, 2, 16), m2n.Placement.block(4, 1), tmp_path, max_peers=MAX_PEERS + 1)


@pytest.mark.parametrize("options", [{}, {"reduce_at": "attention", "attention_ranks": 3, "dtype": "bfloat16"}])
def test_windows_that_no_memory_is_free_for_are_refused_before_any_is_taken(
    options: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    config = ModelConfig.from_directory(SHIPPED)
    run = RunConfig(str(SHIPPED), max_tokens=1_000_000, **options)
    links = run.attention_ranks * run.expert_ranks
    needed = links * link_bytes(run.shape(config))["total"]
    monkeypatch.setattr("m2n.reference_model.run_config.free_bytes", lambda: needed)
    run.check_memory(config)
    monkeypatch.setattr("m2n.reference_model.run_config.free_bytes", lambda: 0.9 * needed)
    with pytest.raises(InputError, match=r"max-tokens must be at most \d+ for .* windows would take .* GB are free"):
        run.check_memory(config)


@pytest.mark.parametrize("columns", [40, 200])
def test_the_summary_is_legible_at_any_width(
    columns: int, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", str(columns))
    rank = {"role": "expert", "rank": 0, "batches": 12, "busy_s": 0.5, "wait_s": 0.25}
    rank |= {"bytes_sent": 3_000_000, "bytes_received": 4_000_000}
    about = {"ranks": [rank], "tokens": 5, "sequences": 1, "seconds": 1.0, "tokens_per_s": 5.0, "bytes_moved": 7e6}
    monkeypatch.setattr("m2n.reference_model.display.describe", lambda pipeline: [])
    Display(Tokenizer(SHIPPED), ["a"], [[1]], 5).summary({**about, "pipeline": {}})
    said = capsys.readouterr().err
    assert "…" not in said and all(figure in said for figure in ("expert 0", "0.500", "0.250", "3.000", "4.000", "12"))
    assert ("expert 0: busy s 0.500, waiting s 0.250" in said) == (columns == 40)


@pytest.mark.parametrize("columns", [40, 200])
def test_tables_of_benchmarks_are_legible_at_any_width(columns: int) -> None:
    names = ("p50_us", "p90_us", "p99_us", "p999_us", "max_us", "p50_min_us", "p50_max_us", "throughput_gb_s")
    case = {"m": 1, "n": 2, "bytes": 1024, "placement": "pinned", "contender": "m2n", "boundary": "cpp"}
    row = {name: 100.0 + at for at, name in enumerate((*names, "p50_over_m2n", "p99_over_m2n"))}
    reason = "a reason " * 12
    shown = io.StringIO()
    rows = [{**case, "direction": "dispatch", **row}, {**case, "contender": "mpi", "reason": reason}]
    print_rows(rows, Console(file=shown, width=columns), ("dispatch",))
    said = shown.getvalue()
    assert "…" not in said and all(f"{figure:.2f}" in said for figure in row.values())
    assert ("m2n: boundary cpp, direction dispatch, p50 us 100.00" in said) == (columns == 40)
    assert f"mpi (cpp): not run: {reason.strip()}" in " ".join(said.split())


def test_a_picture_has_the_format_that_its_name_tells_or_is_png(tmp_path: Path) -> None:
    figure = pytest.importorskip("matplotlib.figure").Figure((1, 1))
    for name, begin in (("a.png", b"\x89PNG"), ("a.pdf", b"%PDF"), ("a.xyz", b"\x89PNG"), ("a", b"\x89PNG")):
        save_picture(figure, tmp_path / name)
        assert (tmp_path / name).read_bytes().startswith(begin)


def test_a_checkpoint_may_be_a_link_of_any_name_that_nobody_can_write(tmp_path: Path) -> None:
    """A prompt of special tokens alone, too, and one of nothing."""
    copy, link = tmp_path / "copy", tmp_path / "Καλημέρα 模型"
    copy.mkdir()
    for path in SHIPPED.glob("*.*"):
        (copy / path.name).write_bytes(path.read_bytes())
        (copy / path.name).chmod(0o444)
    copy.chmod(0o555)
    link.symlink_to(copy)
    try:
        options = ["--checkpoint", str(link), "--json", str(tmp_path / "ö.json"), "--max-new-tokens", "2"]
        assert generate.main(["--prompt", "<|end|>", "--prompt", "", *options]) == 0
    finally:
        copy.chmod(0o755)
    sequences = json.loads((tmp_path / "ö.json").read_text(encoding="utf-8"))["sequences"]
    assert [len(sequence["token_ids"]) for sequence in sequences] == [2, 2]
