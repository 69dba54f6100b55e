# SPDX-License-Identifier: Apache-2.0
"""What this build can do, as data."""

from __future__ import annotations

import platform
from typing import Any

from . import _C
from ._C import SetupError
from .shape import Config

__version__ = _C.version


def features() -> dict[str, Any]:
    """The version, the transports, and whether CUDA was compiled in (`cuda`: driver or not).

    `cuda_words` says whether a GPU can be used here, and if not, why. It looks for one. Likewise `ucx` says whether UCX
    can be loaded, and `ucx_words` which, or why not; it loads it. `insecure_words` says what M2N_INSECURE=1 opens,
    where it is set.
    """
    reason = _C.why_no_cuda()
    try:
        has_ucx, ucx_words = True, _C.describe_transport(Config()._network("ucx"))
    except SetupError as error:
        has_ucx, ucx_words = False, str(error)
    return {
        "version": __version__,
        "python": platform.python_version(),
        "machine": platform.machine(),
        "transports": ["shm", "tcp", *(["cuda"] if _C.has_cuda else []), *(["ucx"] if has_ucx else [])],
        "cuda": bool(_C.has_cuda),
        "cuda_words": reason or "a GPU can be used: device='cuda:0'",
        "ucx": has_ucx,
        "ucx_words": ucx_words,
        **({"insecure_words": Config()._insecure_words()} if Config().insecure else {}),
        "sanitizer": _C.sanitizer or None,
    }
