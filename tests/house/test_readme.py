# SPDX-License-Identifier: Apache-2.0
"""What the README shows must run as it stands."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

README = Path(__file__).resolve().parents[2] / "README.md"


def test_the_example_runs_and_is_short(tmp_path: Path) -> None:
    (example,) = re.findall(r"```python\n(.*?)```", README.read_text(), re.S)
    code_lines = [line for line in example.splitlines() if line.strip()]
    assert len(code_lines) <= 20
    (tmp_path / "example.py").write_text(example)
    done = subprocess.run([sys.executable, "example.py"], cwd=tmp_path, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == [
        "[[20.",
        "20.",
        "20.",
        "20.]",
        "[20.",
        "20.",
        "20.",
        "20.]",
        "[20.",
        "20.",
        "20.",
        "20.]]",
    ]
    assert done.stderr == ""


def test_the_ranks_of_the_example_are_a_process_each(tmp_path: Path) -> None:
    program = README.parent / "examples/ranks.py"
    command = [sys.executable, str(program)]
    ranks = [
        subprocess.Popen([*command, role, str(tmp_path / "store")], stdout=-1, stderr=-1, text=True)
        for role in ("attention", "expert")
    ]
    (said, wrong), (nothing, wrong_too) = (rank.communicate(timeout=60) for rank in ranks)
    assert [rank.returncode for rank in ranks] == [0, 0], wrong + wrong_too
    assert said.splitlines() == ["layer 0: [1.25 2.   3.25]", "layer 1: [ 1.5625  4.     10.5625]"]
    assert wrong + wrong_too + nothing == ""
