# SPDX-License-Identifier: Apache-2.0
"""Checks of what a user gave, by the name of the argument or field."""

from __future__ import annotations

import math
from typing import Any

# The words that other programs take, too.
_TRUE = ("1", "true", "yes", "on")
_FALSE = ("", "0", "false", "no", "off")


def require_int(field: str, value: Any, minimum: int, maximum: int = 2**31 - 1) -> int:
    """An int within the limits, which are those of native code."""
    if isinstance(value, bool) or not hasattr(value, "__index__"):
        raise TypeError(f"{field}: expected an int, got {value!r}")
    number = int(value.__index__())
    if number < minimum:
        raise ValueError(f"{field}: expected at least {minimum}, got {number}")
    if number > maximum:
        raise ValueError(f"{field}: expected at most {maximum}, got {number}")
    return number


def require_version(version: Any) -> int:
    return require_int("version", version, 0, 2**32 - 1)


def require_seconds(field: str, value: Any, minimum: float = 0.0) -> float:
    """A number of seconds, at least `minimum`; infinity too."""
    if isinstance(value, bool) or not hasattr(value, "__float__") or isinstance(value, (str, bytes)):
        raise TypeError(f"{field}: expected seconds, got {value!r}")
    number = float(value)
    if math.isnan(number) or number < minimum:
        raise ValueError(f"{field}: expected seconds >= {minimum:g}, got {value!r}")
    return number


def require_positive_seconds(field: str, value: Any) -> float:
    """A number of seconds above 0."""
    number = require_seconds(field, value)
    if number == 0:
        raise ValueError(f"{field}: expected seconds > 0, got {value!r}")
    return number


def require_text(field: str, value: Any) -> str:
    """A str."""
    if not isinstance(value, str):
        raise TypeError(f"{field}: expected a str, got {value!r}")
    return value


def flag_of(variable: str, text: str | None) -> bool:
    """What an environment variable says: unset, empty, 0, false, no, off; or 1, true, yes, on; in any case."""
    word = (text or "").strip().lower()
    if word not in (*_TRUE, *_FALSE):
        raise ValueError(f"{variable}: expected 1, true, yes, on, or 0, false, no, off, got {text!r}")
    return word in _TRUE
