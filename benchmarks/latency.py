# SPDX-License-Identifier: Apache-2.0
"""One-way dispatch latency between two processes against memcpy + signal of the same rows, interleaved in one run.

`python benchmarks/latency.py` from a source tree: builds m2n_latency (CMake) and starts it many times, because results
jump between levels from one process start to the next. Prints the median over the starts of p50 and p99, and the
median of their ratio.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
ROW_BYTES = 2048


def build(folder: Path) -> Path:
    """Compiles the benchmark for the host only; the path of the program."""
    try:
        import pybind11
    except ImportError:
        sys.exit("benchmarks/latency.py: the build needs pybind11; run it from the environment that `make test` made")
    configure = ["cmake", "-S", str(ROOT), "-B", str(folder), "-DM2N_CUDA=OFF", f"-DPython_EXECUTABLE={sys.executable}"]
    configure.append(f"-Dpybind11_DIR={pybind11.get_cmake_dir()}")
    subprocess.run(configure, check=True, stdout=subprocess.DEVNULL)
    subprocess.run(["cmake", "--build", str(folder), "--target", "m2n_latency"], check=True, stdout=subprocess.DEVNULL)
    return folder / "m2n_latency"


def measure(program: Path, rows: int, reads: bool, rounds: int) -> dict[str, Any]:
    """One process start."""
    arguments = [str(program), str(rows), str(ROW_BYTES), str(rounds), "reads" if reads else "unread"]
    done = subprocess.run(arguments, check=True, capture_output=True, text=True, timeout=300)
    result: dict[str, Any] = json.loads(done.stdout)
    return result


def summarise(runs: list[dict[str, Any]]) -> dict[str, Any]:
    """Medians over the process starts."""
    keys = [f"{contender}_{share}_us" for contender in ("memcpy", "m2n") for share in ("p50", "p99")]
    summary = {key: round(statistics.median(run[key] for run in runs), 2) for key in keys}
    ratios = sorted(run["m2n_p50_us"] / run["memcpy_p50_us"] for run in runs)
    summary["p50_ratio"] = round(statistics.median(ratios), 2)
    summary["p50_ratio_min_max"] = [round(ratios[0], 2), round(ratios[-1], 2)]
    return summary


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", default="2048,16384,262144", help="bytes of rows, comma-separated")
    parser.add_argument("--starts", type=int, default=15, help="process starts per row")
    parser.add_argument("--rounds", type=int, default=2000)
    parser.add_argument("--json", type=Path, help="write {machine, command, rows} here")
    arguments = parser.parse_args()
    cases = [(int(size) // ROW_BYTES, reads) for size in arguments.sizes.split(",") for reads in (False, True)]
    runs: dict[tuple[int, bool], list[dict[str, Any]]] = {case: [] for case in cases}
    with tempfile.TemporaryDirectory(prefix="m2n-latency-") as folder:
        program = build(Path(folder))
        for start in range(arguments.starts):
            print(f"\rstart {start + 1} of {arguments.starts}", end="", file=sys.stderr, flush=True)
            for case in cases:
                runs[case].append(measure(program, *case, arguments.rounds))
        print(file=sys.stderr)
    rows = [
        {"bytes": count * ROW_BYTES, "receiver_reads": reads, **summarise(runs[count, reads])} for count, reads in cases
    ]
    columns = ("memcpy_p50_us", "memcpy_p99_us", "m2n_p50_us", "m2n_p99_us", "p50_ratio")
    print(f"{'bytes':>8} {'read':>5}" + "".join(f"{column:>15}" for column in columns) + "   min..max")
    for row in rows:
        low, high = row["p50_ratio_min_max"]
        is_read = "yes" if row["receiver_reads"] else "no"
        print(f"{row['bytes']:>8} {is_read:>5}" + "".join(f"{row[key]:>15}" for key in columns) + f"   {low}..{high}")
    if arguments.json:
        machine = {"system": platform.system(), "machine": platform.machine(), "cores": os.cpu_count()}
        result = {"machine": machine, "command": " ".join(sys.argv), "rows": rows}
        arguments.json.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
