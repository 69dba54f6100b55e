# SPDX-License-Identifier: Apache-2.0
"""Lines on stderr about what no call of the user's can raise. What comes again and again is said once, then counted."""

from __future__ import annotations

import re
import sys
import threading
import time

_QUIET_S = 10.0  # how long a line of one kind is only counted after it was said
_MAX_KINDS = 32  # beyond, all that is new counts as one kind: strangers can make up any number
_MAX_CHARS = 600


def printable(text: object, max_chars: int = 200) -> str:
    """What somebody else has said, as it may be printed: one line, no control characters, not too long."""
    cleaned = "".join(character if character.isprintable() else "?" for character in str(text)[: max_chars + 1])
    return cleaned if len(cleaned) <= max_chars else cleaned[: max_chars - 3] + "..."


class Notes:
    """Says a thing once, then counts what is like it: equal but for its numbers, and from the same source."""

    def __init__(self, quiet_s: float = _QUIET_S) -> None:
        self._quiet_s = quiet_s
        self._lock = threading.Lock()
        self._said: dict[tuple[str, str], tuple[float, int]] = {}  # when last, and how often since then

    def say(self, text: str, source: str = "", is_always: bool = False) -> None:
        """One line, unless such a one was said within the last seconds; `is_always`: also then."""
        text = printable(text, _MAX_CHARS)
        kind = (source, re.sub(r"[0-9a-f]*[0-9][0-9a-f]*", "#", text))
        now = time.monotonic()
        with self._lock:
            if kind not in self._said and len(self._said) >= _MAX_KINDS:
                self._forget(now)
                kind = kind if len(self._said) < _MAX_KINDS else ("", "")
            said_at, count = self._said.get(kind, (-self._quiet_s, 0))
            is_due = is_always or now - said_at >= self._quiet_s
            self._said[kind] = (now, 0) if is_due else (said_at, count + 1)
        if is_due:
            more = f" (and {count} more like it in the last {now - said_at:.0f} s)" if count else ""
            print(f"m2n: {text}{more}", file=sys.stderr, flush=True)

    def clear(self) -> None:
        """For tests: as if nothing had been said."""
        with self._lock:
            self._said.clear()

    def _forget(self, now: float) -> None:
        """Kinds of which nothing has come for long make room."""
        for kind, (said_at, count) in list(self._said.items()):
            if now - said_at >= self._quiet_s and count == 0:
                del self._said[kind]


_of_this_process = Notes()
say, clear = _of_this_process.say, _of_this_process.clear
