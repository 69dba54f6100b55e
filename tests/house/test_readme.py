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
