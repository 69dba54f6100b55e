# SPDX-License-Identifier: Apache-2.0
"""m2n-bench instructions: how many instructions an exchange takes, of this tree and of another one, by callgrind.

Both trees are compiled here, by one compiler. One thread drives an attention and an expert rank in turn, so nothing
waits, and the counts repeat to a few instructions.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from m2n.reference_model.console.tables import print_table
from m2n.reference_model.errors import InputError

from ..harness.options import add_outputs
from ..harness.report import results_console, save_json, size_name
from ..harness.runs import RunFailed

SOURCE = Path(__file__).with_suffix(".cc")
COMPILE = ("-std=c++20", "-O2", "-w", "-ffp-contract=off", "-DM2N_HAS_CUDA=0", "-pthread")
CASES = ((1, 256), (16, 256), (64, 1024))  # tokens, and float32 elements of each: 1, 16 and 256 KB
_EXCHANGES = 200
_GOAL = 1.01
_TIMEOUT_S = 600

_ABOUT = """Instructions of one exchange (dispatch_send, dispatch_recv, combine_send, combine_recv; top-k 2) at the C++
boundary, counted by callgrind with M2N_STORES=regular, one thread for both ranks. With --base the same of another tree,
a folder or a commit, built by the same compiler. Needs sources, cmake, a C++ compiler and valgrind."""


def add_parser(commands: Any) -> None:
    parser = commands.add_parser("instructions", help="of an exchange, by callgrind", description=_ABOUT)
    parser.add_argument("--tree", type=Path, default=Path.cwd(), metavar="DIR", help="sources (default: this folder)")
    parser.add_argument("--base", metavar="DIR|COMMIT", help="what the tree is compared with")
    add_outputs(parser)
    parser.set_defaults(run=run, needs=("rich",))


def run(args: argparse.Namespace, command: str) -> None:
    from rich.table import Table

    for tool, package in (("valgrind", "valgrind"), ("cmake", "cmake"), (_compiler(), "g++")):
        if shutil.which(tool) is None:
            raise InputError(f"{tool} is not there: apt-get install -y {package}")
    with tempfile.TemporaryDirectory(prefix="m2n-") as folder, _tree(args.base, args.tree, Path(folder)) as base:
        trees = {"new": args.tree} if base is None else {"base": base, "new": args.tree}
        programs = {name: build(tree, Path(folder) / name) for name, tree in trees.items()}
        rows = []
        for num_tokens, hidden in CASES:
            row: dict[str, Any] = {"bytes": num_tokens * hidden * 4}
            row |= {name: count(program, num_tokens, hidden) for name, program in programs.items()}
            if base is not None:
                row["ratio"] = round(row["new"] / row["base"], 4)
            rows.append(row)
    table = Table("size", *programs, "ratio", title="Instructions of an exchange")
    for row in rows:
        figures = [f"{row[name]:,.0f}" for name in programs]
        table.add_row(size_name(row["bytes"]), *figures, f"{row['ratio']:.4f}" if "ratio" in row else "")
    console = results_console(100)
    print_table(console, table)
    if base is not None:
        console.print(f"Goal: at most {_GOAL:g} times as many.")
    save_json(args.json, command, compiler=_version(), goal=_GOAL, rows=rows)


def _compiler() -> str:
    return os.environ.get("CXX", "g++")


def _version() -> str:
    return subprocess.run([_compiler(), "--version"], capture_output=True, text=True).stdout.split("\n")[0]


@contextmanager
def _tree(base: str | None, tree: Path, folder: Path) -> Iterator[Path | None]:
    """The sources of a folder, or of a commit, which are checked out meanwhile."""
    if base is None or Path(base).is_dir():
        yield None if base is None else Path(base)
        return
    checkout = folder / "checkout"
    _must(["git", "-C", tree, "worktree", "add", "--detach", checkout, base], "--base: expected a folder or a commit")
    try:
        yield checkout
    finally:
        _must(["git", "-C", tree, "worktree", "remove", "--force", checkout], "git worktree")


def build(tree: Path, folder: Path) -> Path:
    """The program of a source tree, in an empty folder.

    Raises:
        RunFailed: with what the compiler has said.
    """
    options = ["-DM2N_PYTHON=OFF", "-DM2N_CUDA=OFF", "-DCMAKE_BUILD_TYPE=Release"]
    _must(["cmake", "-S", tree, "-B", folder, *options], f"{tree}: cmake")
    _must(["cmake", "--build", folder, "--parallel", "2", "--target", "m2n_exchange"], f"{tree}: cmake --build")
    return link(tree, folder)


def link(tree: Path, folder: Path) -> Path:
    """The program, with libraries that lie in the folder already."""
    libraries = [folder / f"libm2n_{name}.a" for name in ("exchange", "transport")]
    program = folder / "instructions"
    _must([_compiler(), *COMPILE, f"-I{tree / 'csrc'}", SOURCE, *libraries, "-ldl", "-o", program], f"{SOURCE.name}")
    return program


def count(program: Path, num_tokens: int, hidden: int) -> float:
    """Instructions of one exchange.

    Raises:
        RunFailed: with what valgrind has said.
    """
    counted = program.with_suffix(".counted")
    valgrind = ["valgrind", "--tool=callgrind", "--collect-atstart=no", "--toggle-collect=exchange"]
    command = [*valgrind, f"--callgrind-out-file={counted}", program, num_tokens, hidden, _EXCHANGES]
    said = _must(command, "valgrind", {**os.environ, "M2N_STORES": "regular"})
    found = re.search(r"^(?:totals|summary): (\d+)", counted.read_text(), re.MULTILINE)
    if found is None or int(found[1]) == 0:
        raise RunFailed(f"valgrind counted nothing: {said[-500:]}")
    return int(found[1]) / _EXCHANGES


def _must(command: list[Any], what: str, environment: dict[str, str] | None = None) -> str:
    words = [str(word) for word in command]
    done = subprocess.run(words, capture_output=True, text=True, timeout=_TIMEOUT_S, env=environment)
    if done.returncode != 0:
        raise RunFailed(f"{what}: {done.stderr[-1000:] or done.stdout[-1000:]}")
    return done.stderr
