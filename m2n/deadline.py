# SPDX-License-Identifier: Apache-2.0
"""The end of a wait, as one object that is passed down: no wait inside outlasts the one outside."""

from __future__ import annotations

import time


class Deadline:
    """A moment, so many seconds from now."""

    def __init__(self, seconds: float) -> None:
        self.seconds = seconds  # from its making on
        self._began = time.monotonic()

    @property
    def passed(self) -> float:
        """Seconds since it was made."""
        return time.monotonic() - self._began

    def remaining(self) -> float:
        """Seconds that are left, at least 0."""
        return max(self.seconds - self.passed, 0.0)

    @property
    def has_expired(self) -> bool:
        """Is nothing left?"""
        return self.remaining() == 0.0

    def cut(self, seconds: float) -> Deadline:
        """One that ends in so many seconds, or with this one."""
        return Deadline(min(seconds, self.remaining()))

    def sleep(self, seconds: float) -> None:
        """Sleeps for so long, or until it has expired."""
        time.sleep(min(seconds, self.remaining()))
