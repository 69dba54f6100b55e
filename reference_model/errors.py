# SPDX-License-Identifier: Apache-2.0
"""Errors whose cause is the input: a configuration, a checkpoint, a prompt or an argument."""

from __future__ import annotations

import importlib
from collections.abc import Iterable


class InputError(ValueError):
    """Bad input: the command line prints the text and exits with status 2."""


class ConfigError(InputError):
    """A configuration that this model does not run; names the option."""


class CheckpointError(InputError):
    """Files that do not hold what the configuration promises; names the file and the tensor."""


def brief(value: object, most: int = 120) -> str:
    """A value of a file, or an error's text, for a message of one line: at most so many characters of it."""
    text = str(value) if isinstance(value, BaseException) else repr(value)
    text = " ".join(text.split())
    return text if len(text) <= most else f"{text[: most - 3]}..."


def missing_packages(names: Iterable[str]) -> list[str]:
    """Those that cannot be imported here: a command says so before it does anything."""
    missing = []
    for name in names:
        try:
            importlib.import_module(name)
        except ImportError:
            missing.append(name)
    return missing
