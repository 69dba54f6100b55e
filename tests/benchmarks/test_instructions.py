# SPDX-License-Identifier: Apache-2.0
"""How many instructions an exchange takes: no more than it did, and a longer exchange is found."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import pytest

pytest.importorskip("rich")
from libraries import CXX, ROOT, build_libraries  # noqa: E402

from m2n.benchmarks.exchange import instructions  # noqa: E402

pytestmark = [pytest.mark.slow, pytest.mark.valgrind, pytest.mark.timeout(300)]

# Of the libraries that tests compile (unoptimised), by g++ 12 on x86-64: by tokens and hidden.
COUNTED = {(1, 256): 58_152, (16, 256): 555_306}
CEILING = 1.10


@pytest.fixture(scope="module")
def program(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("instructions")
    for library in build_libraries().glob("*.a"):
        shutil.copy(library, folder)
    return instructions.link(ROOT, folder)


@pytest.mark.essential
@pytest.mark.parametrize("case", COUNTED, ids=str)
def test_an_exchange_takes_no_more_instructions_than_it_did(program: Path, case: tuple[int, int]) -> None:
    version = subprocess.run([CXX, "-dumpfullversion", "-dumpmachine"], capture_output=True, text=True).stdout
    if not re.match(r"12\.", version) or shutil.which(CXX) is None:
        pytest.skip(f"the counts are those of g++ 12, this is {CXX} {version.split()[0]}")
    counted = instructions.count(program, *case)
    assert counted <= CEILING * COUNTED[case], f"{counted:,.0f}; it was {COUNTED[case]:,}: see m2n-bench instructions"
    assert counted >= 0.9 * COUNTED[case], f"{counted:,.0f}: less than {COUNTED[case]:,}; write the new figure here"


def test_more_work_is_counted(program: Path) -> None:
    fewer, more = (instructions.count(program, num_tokens, 64) for num_tokens in (1, 2))
    assert fewer < more < 2 * fewer
