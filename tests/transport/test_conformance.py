# SPDX-License-Identifier: Apache-2.0
"""Every transport keeps the contract of csrc/transport: the sentences of conformance/suite.cc, on a line for each."""

from __future__ import annotations

import functools
from pathlib import Path

import pytest
from bodies import config_of
from conformance_suite import compile_suite, sentences
from libraries import build_libraries
from tiers import needs_compiler

import m2n

pytestmark = needs_compiler

UCX = pytest.mark.ucx
GPU = (pytest.mark.cuda, pytest.mark.nvcc, pytest.mark.slow)
# The native name, and how many sentences say nothing about this transport.
TRANSPORTS = [
    pytest.param("shm", 2, id="shm"),
    pytest.param(m2n.Faults(delay_us=100, jitter_us=100, seed=1)._transport("shm"), 1, id="faulty"),
    pytest.param(config_of("auto")._network("auto"), 2, id="auto"),
    pytest.param(config_of("tcp")._network("tcp"), 3, id="tcp"),
    pytest.param(config_of("ucx")._network("ucx"), 3, id="ucx", marks=UCX),
    pytest.param(config_of("ucx-put")._network("ucx"), 3, id="ucx-put", marks=UCX),
    pytest.param("pinned:cuda:0", 2, id="pinned", marks=GPU),
    pytest.param("cuda:0", 12, id="cuda", marks=GPU),
]


@functools.cache
def program_for(cuda: bool) -> Path:
    folder = build_libraries("m2n_transport", cuda=cuda)
    return compile_suite(folder / "conformance", cuda=cuda)


@pytest.mark.parametrize("name, num_not_here", TRANSPORTS)
def test_a_transport_keeps_the_contract(name: str, num_not_here: int) -> None:
    said = sentences(program_for(name.split(":")[0] in ("cuda", "pinned")), name)
    assert not said["WRONG"]
    assert len(said["not here"]) == num_not_here and said["holds"], said["not here"]
