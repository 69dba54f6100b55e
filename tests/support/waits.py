# SPDX-License-Identifier: Apache-2.0
"""How long tests wait, and for what."""

from __future__ import annotations

import time
from collections.abc import Callable

# A loss is noticed in milliseconds; these machines are busy, and 6x says nothing under a second.
SOON_S = 5.0
# For what takes processes that start, or many steps.
WAIT_S = 20.0


def until(is_so: Callable[[], bool], what: str = "what this test waits for", within_s: float = SOON_S) -> None:
    """AssertionError if it is not so in time."""
    deadline = time.monotonic() + within_s
    while not is_so():
        assert time.monotonic() < deadline, f"did not come: {what}"
        time.sleep(0.001)
