# SPDX-License-Identifier: Apache-2.0
"""Rows that travel as they are, whatever their bits, size and number: no path of the copies changes them."""

from __future__ import annotations

import pytest
import torch
from oracle import run_one

import m2n


def echo(comm: m2n.ExpertComm, reduced: bool) -> None:
    """One batch, answered with the rows that came."""
    batch = comm.dispatch_recv(timeout=10)
    rows = batch.gather()  # one expert per row: expert-major
    if reduced:
        rows = torch.empty_like(rows)
        rows[:] = batch.x[batch.row_index_by_expert.sort().values]  # wire order: ascending in the window
    comm.combine_send(batch, rows, reduced=reduced)


def send(x: torch.Tensor, shape: m2n.Shape, reduced: bool, n: int = 1) -> torch.Tensor:
    """What comes back for x when token t goes, with weight 1, to expert t % num_experts."""
    ids = (torch.arange(len(x)) % shape.num_experts)[:, None]

    def attention(comm: m2n.AttentionComm) -> torch.Tensor:
        comm.dispatch_send(x, comm.route(ids, torch.ones(len(x), 1)))
        return comm.combine_recv()

    return run_one(attention, lambda comm: echo(comm, reduced), shape, n=n)["attention", 0]


def one_expert(hidden: int, tokens: int, dtype: str, experts: int = 2) -> m2n.Shape:
    return m2n.Shape(hidden, experts, 1, tokens, dispatch_dtype=dtype, combine_dtype=dtype)


@pytest.mark.sanitize
@pytest.mark.parametrize("reduced", [False, True])
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_every_number_of_16_bits_comes_back(dtype: str, reduced: bool) -> None:
    x = torch.arange(65536, dtype=torch.int32).to(torch.uint16).view(getattr(torch, dtype)).reshape(64, 1024)
    y = send(x, one_expert(1024, 64, dtype), reduced)
    expected = (torch.zeros(64, 1024) + x.float()).to(x.dtype)  # +0 for -0
    is_number = ~torch.isnan(x)
    assert torch.equal(torch.isnan(y), ~is_number)
    assert torch.equal(y.view(torch.uint16)[is_number], expected.view(torch.uint16)[is_number])


@pytest.mark.parametrize("reduced", [False, True])
@pytest.mark.parametrize(("hidden", "tokens"), [(8191, 1100), (3, 7), (1, 1), (4096, 2100)])
def test_large_and_odd_rows_come_back(hidden: int, tokens: int, reduced: bool) -> None:
    """Up to 18 MB at once, which is past the size from which copies pass the caches by; rows at any address."""
    x = torch.randint(-99, 99, (tokens, hidden), generator=torch.Generator().manual_seed(tokens)).to(torch.bfloat16)
    assert torch.equal(send(x, one_expert(hidden, tokens, "bfloat16"), reduced), x)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_a_sum_of_several_rows_longer_than_a_span(dtype: str) -> None:
    """Tokens with no, one and several ranks; rows of more elements than are summed at a time."""
    shape = m2n.Shape(2500, 6, 3, 12, dispatch_dtype=dtype, combine_dtype=dtype)
    ids = torch.tensor([[0, 2, 4], [0, 1, -1], [5, -1, -1], [-1, -1, -1]]).repeat(3, 1)
    x = torch.randint(-9, 9, (12, 2500)).to(getattr(torch, dtype))

    def attention(comm: m2n.AttentionComm) -> torch.Tensor:
        comm.dispatch_send(x, comm.route(ids, torch.ones(12, 3)))
        return comm.combine_recv()

    def expert(comm: m2n.ExpertComm) -> None:
        batch = comm.dispatch_recv(timeout=10)
        comm.combine_send(batch, batch.gather())

    y = run_one(attention, expert, shape, n=3)["attention", 0]
    assert torch.equal(y, x * (ids >= 0).sum(1, keepdim=True).to(x.dtype))
