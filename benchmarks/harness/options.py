# SPDX-License-Identifier: Apache-2.0
"""Options that several commands take, and how their values are read."""

from __future__ import annotations

import argparse
from pathlib import Path

from m2n.reference_model.errors import InputError

from .cases import DTYPE_BYTES
from .routing import ROUTINGS
from .runs import known_contenders

_LIMITS = "memcpy,non-temporal,hop"


def add_options(parser: argparse.ArgumentParser, sizes: str) -> None:
    """What all transport benchmarks take."""
    add = parser.add_argument
    add("--sizes", default=sizes, metavar="BYTES,...", help="per pair of ranks (default %(default)s)")
    known = ",".join(known_contenders())
    add("--baselines", default=_LIMITS, metavar="NAME,...", help=f"of {known} (default %(default)s; '' for none)")
    add("--python", action="store_true", help="m2n at the Python boundary too, as with any contender there")
    add("--hidden", type=int, metavar="H", help="elements of a row (default: rows of at most 8 KB)")
    add("--dtype", choices=sorted(DTYPE_BYTES), default="bfloat16", help="of rows, both ways (default bfloat16)")
    add("--top-k", type=int, default=2, metavar="K", help="experts of a token (default 2)")
    add("--experts", type=int, metavar="E", help="default: at least 8, as many on each rank")
    add("--reduce-at", choices=("expert", "attention"), default="expert", help="where sums are made (default expert)")
    add("--routing", default="balanced", metavar="HOW", help=f"{', '.join(ROUTINGS)}, or a file of --record-routes")
    add("--transport", default="shm", choices=("shm", "tcp", "ucx"), help="of m2n (default shm), by loopback")
    add(
        "--pin",
        default="auto",
        metavar="auto|none|C,...",
        help="cores by process, attention ranks first (default auto)",
    )
    add("--starts", type=int, default=8, metavar="N", help="process starts per case (default 8)")
    add("--seconds", type=float, default=0.3, metavar="S", help="of each contender in a start (default 0.3)")
    add_outputs(parser)
    add("--plot", type=Path, metavar="FILE.png", help="draw p50 and p99 against bytes (needs matplotlib)")
    add("--compare", type=Path, metavar="OLD.json", help="against the results of an earlier run")


def add_outputs(parser: argparse.ArgumentParser) -> None:
    """Where results go."""
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all results")


def parse_list(option: str, text: str) -> list[int]:
    """Whole numbers with commas between them.

    Raises:
        InputError: naming the option.
    """
    try:
        return [int(word) for word in text.split(",")]
    except ValueError:
        raise InputError(f"{option}: expected whole numbers with commas between them, got {text!r}") from None
