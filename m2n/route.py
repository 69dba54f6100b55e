# SPDX-License-Identifier: Apache-2.0
"""Where each token goes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from . import _C, arrays
from .checks import require_int
from .shape import Shape


class Route:
    """Where each (token, expert) goes. Made by `AttentionComm.route`, or from rows that are sorted already."""

    __slots__ = ("_native", "_splits", "_version")

    def __init__(
        self, native: Any, splits: tuple[list[int], Any, Any] | None = None, version: int | None = None
    ) -> None:
        self._native: _C.Route | _C.DeviceRoute = native
        self._version = version  # of the placement it is made for; None: the caller's splits know none
        self._splits = splits  # what a route of ready-made splits is built from, on a device by its first dispatch

    @classmethod
    def from_splits(cls, splits: Sequence[int], topk_ids: Any, topk_weights: Any, *, shape: Shape) -> Route:
        """A route for rows that are sorted by destination already.

        Args:
            splits: [N] rows for each expert rank, in ascending rank.
            topk_ids: int32 or int64 [R, top_k], R = sum(splits): the experts which that rank applies to the row;
                -1 for fewer than top_k, at least one each.
            topk_weights: float [R, top_k].

        `combine_recv` gives one result per row, [R, hidden]. That the ranks host these experts, by the placement that
        the comm has at dispatch_send, is the caller's to see to.

        Raises:
            ValueError, TypeError: naming the argument.
        """
        rows = [require_int("splits", split, 0) for split in splits]
        if not arrays.is_on_cpu(topk_ids):
            return cls(None, (rows, topk_ids, topk_weights))
        native = _C.Route(shape._native())
        native.build_from_splits(rows, topk_ids, topk_weights)
        return cls(native, (rows, topk_ids, topk_weights))

    @property
    def num_tokens(self) -> int:
        """Tokens, padded ones included."""
        return self._native.num_tokens

    @property
    def num_rows(self) -> int:
        """Rows to be sent: a token once for each expert rank that has experts for it. On a GPU it waits for them."""
        return self._native.num_rows

    @property
    def rows_per_rank(self) -> list[int]:
        """Rows for each expert rank. On a GPU it waits for them."""
        return self._native.rows_per_rank
