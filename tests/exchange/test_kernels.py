# SPDX-License-Identifier: Apache-2.0
"""What is compiled for a GPU: no warnings, and the instructions that the protocol stands on."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
SOURCE = ROOT / "csrc/exchange/device/machines/cuda.cu"
VERBS = (
    *("RouteVerb", "DispatchVerb", "DispatchSendAs", "AwaitVerb", "CombineRecvAs"),
    *("PollVerb", "ReceiveVerb", "CombineSendAs"),
)
OPTIONS = ("-std=c++20", "-O3", "-fmad=false", f"-I{ROOT / 'csrc'}", "-DM2N_HAS_CUDA=1", "-Werror", "all-warnings")

pytestmark = [pytest.mark.slow, pytest.mark.nvcc, pytest.mark.timeout(600)]


def nvcc(*arguments: str | Path) -> None:
    done = subprocess.run(["nvcc", *OPTIONS, *map(str, arguments)], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.fixture(scope="module")
def compiled(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the PTX that is shipped, for compute_80 and 89, and machine code from it for sm_80, 90 and 100."""
    place = tmp_path_factory.mktemp("kernels")
    codes = ["-gencode", "arch=compute_80,code=sm_80", "-gencode", "arch=compute_89,code=[sm_90,sm_100]"]
    options = [*codes, "--threads", "0", "--keep", "--keep-dir", place, "-Xcompiler=-Wall,-Wextra"]
    nvcc(*options, "-c", SOURCE, "-o", place / "run_cuda.o")
    return place


@pytest.fixture(scope="module", params=["80", "89"])
def architecture(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(scope="module")
def ptx(compiled: Path, architecture: str) -> dict[str, str]:
    """The code of each verb's kernels, by its name: those for rows of one type each together."""
    (path,) = compiled.glob(f"*{architecture}*.ptx")
    kernels = re.findall(r"\.entry (\w+)\((.*?)^\}", path.read_text(), re.DOTALL | re.MULTILINE)
    assert len(kernels) == 5 + 3 + 3 + 9
    return {verb: "".join(body for name, body in kernels if verb in name) for verb in VERBS}


def test_one_build_holds_machine_code_for_sm_80_90_and_100(compiled: Path) -> None:
    assert {path.stem.rpartition("_")[2] for path in compiled.glob("*.cubin")} == {"80", "90", "100"}


def test_what_surrounds_the_kernels_compiles_without_a_warning(tmp_path: Path) -> None:
    """On the side of the host, and what measures them."""
    surroundings = [ROOT / "benchmarks/gpu/timing.cu", *(ROOT / "csrc/transport/cuda").glob("*.cc")]
    assert len(surroundings) == 5
    for source in surroundings:
        nvcc("-arch=sm_90", "-Xcompiler=-Wall,-Wextra,-Werror", "-c", source, "-o", tmp_path / "surroundings.o")


@pytest.mark.parametrize("verb", ["DispatchVerb", "DispatchSendAs", "CombineSendAs", "ReceiveVerb"])
def test_a_signal_is_a_system_wide_release(ptx: dict[str, str], verb: str) -> None:
    assert re.search(r"\bst\.release\.sys(\.global)?\.[bu]64\b", ptx[verb])


@pytest.mark.parametrize("verb", ["DispatchVerb", "DispatchSendAs", "AwaitVerb", "PollVerb", "ReceiveVerb"])
def test_a_wait_looks_with_a_system_wide_acquire(ptx: dict[str, str], verb: str) -> None:
    assert re.search(r"\bld\.acquire\.sys(\.global)?\.[bu]64\b", ptx[verb])


@pytest.mark.parametrize("verb", ["DispatchVerb", "DispatchSendAs", "CombineRecvAs", "CombineSendAs"])
def test_the_last_block_to_arrive_sees_what_all_wrote(ptx: dict[str, str], verb: str) -> None:
    assert re.search(r"\batom(\.global)?\.add\.acq_rel\.gpu(\.global)?\.u32\b", ptx[verb])


@pytest.mark.parametrize("verb", ["DispatchVerb", "DispatchSendAs", "CombineRecvAs", "CombineSendAs"])
def test_rows_are_read_and_written_by_16_bytes(ptx: dict[str, str], verb: str) -> None:
    assert re.search(r"\bst(\.global)?\.v4\.[bfu]32\b", ptx[verb])
    assert re.search(r"\bld(\.global)?\.v4\.[bfu]32\b", ptx[verb])


def test_deadlines_are_wall_clock_time(ptx: dict[str, str]) -> None:
    for verb in ("DispatchVerb", "DispatchSendAs", "AwaitVerb", "PollVerb", "ReceiveVerb"):
        assert "%globaltimer" in ptx[verb]


@pytest.mark.parametrize("verb", VERBS)
def test_nothing_traps(ptx: dict[str, str], verb: str) -> None:
    assert not re.search(r"\btrap\b|\bbrkpt\b", ptx[verb])


@pytest.mark.parametrize("verb", VERBS)
def test_nothing_is_read_through_the_cache_that_does_not_see_peers(ptx: dict[str, str], verb: str) -> None:
    assert not re.search(r"\bld\.global(\.\w+)*\.nc\b|\bld\.const\b|\btex\.", ptx[verb])
    assert "ld.param" in ptx[verb]  # it is the kernel's code that was looked at


@pytest.mark.parametrize("verb", VERBS)
def test_products_and_sums_round_separately(ptx: dict[str, str], verb: str) -> None:
    """But for the remainders of quotients, where 16 elements become float8, of each of three types: four each."""
    assert len(re.findall(r"\bfma\.", ptx[verb])) == (3 * 16 * 4 if verb == "DispatchSendAs" else 0)


def test_processors_that_can_convert_to_float8_by_themselves(ptx: dict[str, str], architecture: str) -> None:
    """Pairs of elements; once behind quotients, once behind divisions."""
    num_pairs = len(re.findall(r"\bcvt\.rn\.satfinite\.e4m3x2\.f32\b", ptx["DispatchSendAs"]))
    assert num_pairs == (2 * 3 * 8 if architecture == "89" else 0)
