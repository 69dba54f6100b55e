# SPDX-License-Identifier: Apache-2.0
"""Links by rate and delay, as --links takes them."""

from __future__ import annotations

import re
from typing import NamedTuple

from m2n.reference_model.errors import InputError

DEFAULT_LINKS = ",".join(f"{rate}:{delay}" for rate in ("1gbit", "10gbit") for delay in ("0.1ms", "1ms", "5ms"))
_UNITS = {"mbit": 1.0, "gbit": 1e3, "us": 1.0, "ms": 1e3}
_LEAST_MBIT, _MOST_MBIT, _MOST_DELAY_US = 10, 100_000, 100_000


class Link(NamedTuple):
    """A cable: megabits per second and microseconds, each way."""

    mbit: float
    delay_us: float

    @property
    def name(self) -> str:
        """As in "1gbit:0.1ms"."""
        return f"{self.mbit / 1e3:g}gbit:{self.delay_us / 1e3:g}ms"

    def message_ms(self, num_bytes: int) -> float:
        """One way for a message that comes alone: its bits one after another, then the delay."""
        return num_bytes * 8e-3 / self.mbit + self.delay_us / 1e3


def parse_links(text: str) -> list[Link]:
    """RATE:DELAY with commas between them.

    Raises:
        InputError: with what was expected.
    """
    links = []
    for part in text.split(","):
        found = re.fullmatch(r"(\d+(?:\.\d+)?)(mbit|gbit):(\d+(?:\.\d+)?)(us|ms)", part.strip())
        if found is None:
            raise InputError(
                "--links: expected RATE:DELAY in mbit or gbit and, one way, us or ms, as in 1gbit:0.1ms,10gbit:5ms; "
                f"got {part!r}"
            )
        rate, rate_unit, delay, delay_unit = found.groups()
        link = Link(float(rate) * _UNITS[rate_unit], float(delay) * _UNITS[delay_unit])
        if not _LEAST_MBIT <= link.mbit <= _MOST_MBIT:
            raise InputError(f"--links: expected a rate from 10mbit to 100gbit, got {part!r}")
        if link.delay_us > _MOST_DELAY_US:
            raise InputError(f"--links: expected a delay of at most 100ms, got {part!r}")
        links.append(link)
    return links
