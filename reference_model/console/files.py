# SPDX-License-Identifier: Apache-2.0
"""The files that a command writes: refused before anything is started, or written whatever becomes of the others."""

from __future__ import annotations

import errno
import importlib.util
import io
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ..errors import InputError


def check_writable(path: str | Path) -> None:
    """Refuse a file that cannot be written, without changing what is there.

    Raises:
        InputError: with the path and the reason.
    """
    existed = os.path.exists(path)
    if existed and not os.path.isfile(path) and not os.path.isdir(path):
        # A pipe or a device: to the reader of a pipe the end of this look would be the end of the file.
        if not os.access(path, os.W_OK):
            raise InputError(f"cannot write {path}: {os.strerror(errno.EACCES)}")
        return
    try:
        with open(path, "ab"):
            pass
        if not existed:
            os.unlink(os.path.realpath(path))
    except OSError as error:
        raise InputError(f"cannot write {path}: {error.strerror}") from error


def check_matplotlib() -> None:
    """Raises InputError where matplotlib is not installed."""
    if importlib.util.find_spec("matplotlib") is None:
        raise InputError("pictures need matplotlib: pip install 'm2n[bench]'")


def save_picture(figure: Any, path: str | Path, dpi: int = 100) -> None:
    """In the format that the name tells, else PNG; that of few colours, which is a third as large."""
    from PIL import Image

    suffix = Path(path).suffix.removeprefix(".").lower()
    with open(path, "wb") as file:
        if suffix != "png" and suffix in figure.canvas.get_supported_filetypes():
            figure.savefig(file, format=suffix)
            return
        pixels = io.BytesIO()
        figure.savefig(pixels, dpi=dpi, format="png")
        with Image.open(pixels) as image:
            image.convert("RGB").quantize(128).save(file, "PNG", optimize=True)


class Files:
    """The files that a command was asked for. One that cannot be written keeps no other one from being written."""

    def __init__(self) -> None:
        self._faults: list[str] = []

    def write(self, path: Path | None, write: Callable[[], Any]) -> bool:
        """Calls write() where there is a path; was it written?"""
        if path is None:
            return False
        try:
            write()
        except OSError as error:
            self._faults.append(f"cannot write {path}: {error.strerror or error}")
            return False
        except InputError as error:  # it names the file
            self._faults.append(str(error))
            return False
        return True

    def raise_faults(self) -> None:
        """Raises InputError for what could not be written."""
        if self._faults:
            raise InputError("; ".join(self._faults))
