# SPDX-License-Identifier: Apache-2.0
"""One-sided dispatch and combine between M attention ranks and N expert ranks of a Mixture-of-Experts model."""

from ._C import Error, PeerLost, ProtocolError, SetupError, SlotBusy, Timeout
from .attention import AttentionComm
from .comm import PeerStatus
from .expert import Batch, ExpertComm
from .features import __version__, features
from .route import Route
from .shape import Config, Faults, Placement, Shape
from .store import host_store

__all__ = [
    "AttentionComm",
    "Batch",
    "Config",
    "Error",
    "ExpertComm",
    "Faults",
    "PeerLost",
    "PeerStatus",
    "Placement",
    "ProtocolError",
    "Route",
    "SetupError",
    "Shape",
    "SlotBusy",
    "Timeout",
    "__version__",
    "features",
    "host_store",
]
