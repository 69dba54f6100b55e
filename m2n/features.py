# SPDX-License-Identifier: Apache-2.0
"""What this build can do, as data."""

from __future__ import annotations

import platform
from typing import Any

from . import _C

__version__ = _C.version


def features() -> dict[str, Any]:
    """The version, the transports, and whether CUDA was compiled in (`cuda`: driver or not).

    `cuda_words` says in words what works with it.
    """
    compiled = bool(_C.has_cuda)
    return {
        "version": __version__,
        "python": platform.python_version(),
        "machine": platform.machine(),
        "transports": ["shm"],
        "cuda": compiled,
        "cuda_words": (
            "the bodies were compiled for a device; kernels that launch them are not part of this version"
            if compiled
            else "not compiled in: no CUDA compiler was found at build time, or M2N_CUDA=OFF"
        ),
        "sanitizer": _C.sanitizer or None,
    }
