# SPDX-License-Identifier: Apache-2.0
"""Memory of the shared-memory transport as a function of the shape: of a link, and of a rank.

The numbers follow csrc/exchange/rows/layout.h and csrc/transport/shm/transport.cc;
tests/exchange/test_memory.py holds them against what the kernel says of real processes.
"""

from __future__ import annotations

import math
from typing import Any

PAGE_BYTES = 4096
_LINE_BYTES = 128
_WAKE_BYTES = PAGE_BYTES  # one wake word of each rank, which all its peers map
_BYTES_OF = {"float32": 4, "bfloat16": 2, "float16": 2}


def _round_up(num_bytes: int, unit: int) -> int:
    return -(-num_bytes // unit) * unit


def _row_bytes(hidden: int, dtype: str) -> int:
    """A row of float8 has its scales behind it."""
    if dtype == "float8_e4m3fn":
        return _round_up(_round_up(hidden, 4) + 4 * -(-hidden // 128), 16)
    return hidden * _BYTES_OF[dtype]


def _rows(num_slots: int, max_rows: int, row_bytes: int) -> dict[str, int]:
    """The object that one peer writes rows into, and the distance to the next peer's."""
    object_bytes = _round_up(num_slots * max_rows * row_bytes, PAGE_BYTES)
    return {"bytes": object_bytes, "stride": _round_up(object_bytes, math.lcm(PAGE_BYTES, row_bytes))}


def _meta(num_slots: int, ids_per_slot: int) -> int:
    """Signals and headers, a line each per slot, and for a dispatch its ids and weights."""
    slot_ids_bytes = _round_up(ids_per_slot * 4, _LINE_BYTES)
    return _round_up(num_slots * 2 * (_LINE_BYTES + slot_ids_bytes), PAGE_BYTES)


def _layout(shape: Any) -> dict[str, Any]:
    num_slots = shape.microbatches + 1  # the last one is for retries
    pairs = shape.max_tokens * shape.top_k
    reply_rows = shape.max_tokens if shape.reduce_at == "expert" else pairs
    return {
        "dispatch_rows": _rows(num_slots, shape.max_tokens, _row_bytes(shape.hidden, shape.dispatch_dtype)),
        "dispatch_meta": _meta(num_slots, pairs),
        "combine_rows": _rows(num_slots, reply_rows, _row_bytes(shape.hidden, shape.combine_dtype)),
        "combine_meta": _meta(num_slots, 0),
    }


def link_bytes(shape: Any) -> dict[str, int]:
    """Bytes of physical memory that one link takes, all of it allocated when the link is made.

    Args:
        shape: m2n.Shape.

    Returns:
        `dispatch_rows`, `dispatch_meta` (in the expert rank's window), `combine_rows`, `combine_meta` (in the
        attention rank's), and `total`.
    """
    layout = _layout(shape)
    parts = {
        "dispatch_rows": layout["dispatch_rows"]["bytes"],
        "dispatch_meta": layout["dispatch_meta"],
        "combine_rows": layout["combine_rows"]["bytes"],
        "combine_meta": layout["combine_meta"],
    }
    return {**parts, "total": sum(parts.values())}


def rank_bytes(shape: Any, role: str, peers: int, max_peers: int = 64) -> dict[str, int]:
    """Bytes of one rank with `peers` links, each life of a peer counted.

    Args:
        shape: m2n.Shape.
        role: "attention" or "expert".
        peers: links made so far.
        max_peers: as given to the comm.

    Returns:
        `owned`: physical memory of its windows; over all ranks these add up to what the job takes. `mapped`: memory of
        its peers that it maps to write into, in its resident set but not its own. `addresses`: reserved for windows,
        which cost no memory.

    Raises:
        ValueError: an unknown role, or more peers than max_peers.
    """
    if role not in ("attention", "expert"):
        raise ValueError(f"role: expected 'attention' or 'expert', got {role!r}")
    if not 0 <= peers <= max_peers:
        raise ValueError(f"peers: expected 0 to max_peers={max_peers}, got {peers}")
    layout = _layout(shape)
    own, other = ("dispatch", "combine") if role == "expert" else ("combine", "dispatch")
    per_link = {side: layout[f"{side}_rows"]["bytes"] + layout[f"{side}_meta"] for side in (own, other)}
    return {
        "owned": _WAKE_BYTES + peers * per_link[own],
        "mapped": peers * (_WAKE_BYTES + per_link[other]),
        "addresses": _WAKE_BYTES + max_peers * (layout[f"{own}_rows"]["stride"] + layout[f"{own}_meta"]),
    }
