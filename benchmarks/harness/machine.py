# SPDX-License-Identifier: Apache-2.0
"""Where figures come from."""

from __future__ import annotations

import importlib.metadata
import os
import platform
from datetime import date
from pathlib import Path
from typing import Any

import m2n

_PACKAGES = ("numpy", "torch", "libucx-cu12", "libucx-cu13", "mpi4py", "ucxx-cu12", "ucxx-cu13")


def machine() -> dict[str, Any]:
    """Processor, cores, system, versions of what is installed, date."""
    names = [line.split(":", 1)[1].strip() for line in _cpu_info() if line.startswith("model name")]
    versions = {}
    for name in _PACKAGES:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return {
        "cpu": names[0] if names else platform.processor(),
        "cores": os.cpu_count(),
        "system": f"{platform.system()} {platform.release()}",
        "python": platform.python_version(),
        **versions,
        "m2n": m2n.__version__,
        "date": date.today().isoformat(),
    }


def _cpu_info() -> list[str]:
    try:
        return Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return []
