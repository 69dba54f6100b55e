# SPDX-License-Identifier: Apache-2.0
"""Which experts each token goes to in a benchmark: int32 ids [M, T, top_k], -1 for none."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from m2n.reference_model.errors import InputError

ROUTINGS = ("balanced", "uniform", "zipf", "hot")


def make_topk(routing: str, m: int, n: int, rows_per_pair: int, num_experts: int, top_k: int) -> np.ndarray:
    """Ids for every attention rank; expert e lives on expert rank e // (num_experts / n).

    "balanced" gives every pair exactly `rows_per_pair` rows. "uniform", "zipf" (popularity falls as 1/expert) and "hot"
    (everybody's first choice is expert 0) are random from a fixed seed, with as many tokens; anything else is the path
    of a file of recorded routes (`m2n-generate --record-routes`), taken from its start, again and again.
    """
    spread = min(top_k, n)  # expert ranks of a token
    num_tokens = -(-rows_per_pair * n // spread)
    if routing == "balanced":
        return np.broadcast_to(_balanced(n, rows_per_pair, num_experts, top_k), (m, num_tokens, top_k))
    if routing not in ROUTINGS:
        return _recorded(routing, m, num_tokens, top_k)
    generator = np.random.default_rng(0)
    popularity = 1.0 / np.arange(1, num_experts + 1) if routing == "zipf" else np.ones(num_experts)
    # The largest keys are a weighted sample without replacement.
    keys = np.log(generator.random((m, num_tokens, num_experts))) / popularity
    if routing == "hot":
        keys[..., 0] = 1.0
    return np.argsort(-keys, axis=-1, kind="stable")[..., :top_k].astype(np.int32)


def _balanced(n: int, rows_per_pair: int, num_experts: int, top_k: int) -> np.ndarray:
    """Expert ranks in turn; where a rank has several of a token's experts, neighbours on it."""
    spread, per_rank = min(top_k, n), num_experts // n
    num_tokens = -(-rows_per_pair * n // spread)
    token, k = np.arange(num_tokens)[:, None], np.arange(top_k)[None, :]
    turn = token * spread + k % spread
    ids = (turn % n) * per_rank + (token + k // spread) % per_rank
    return np.where(turn < rows_per_pair * n, ids, -1).astype(np.int32)


def recorded_experts(path: str) -> tuple[int, int]:
    """(num_experts, top_k) of a file of recorded routes.

    Raises:
        InputError: it is none.
    """
    try:
        with np.load(path) as routes:
            return int(routes["num_experts"]), int(routes["top_k"])
    except (OSError, ValueError, KeyError) as error:
        names = ", ".join(ROUTINGS)
        is_there = Path(path).exists()
        reason = f"{path} holds no recorded routes ({error})" if is_there else f"there is no file {path!r}"
        raise InputError(f"--routing: expected {names} or a file of recorded routes; {reason}") from error


def _recorded(path: str, m: int, num_tokens: int, top_k: int) -> np.ndarray:
    with np.load(path) as routes:
        ids = routes["topk_ids"].astype(np.int32)
    return np.resize(ids, (m, num_tokens, top_k))
