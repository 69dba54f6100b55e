# SPDX-License-Identifier: Apache-2.0
"""m2n between processes beside NCCL's grouped send and recv, on one GPU or several. Part of `make gpu`; prints lines of
JSON.

One attention rank and N expert ranks, a process each; with several GPUs the attention rank has the first, the experts
the second. A round trip brings T rows to their expert ranks, T / N each, and as many back. The two take turns in one
run; the host's clock times them, the end on the device included. Several ranks on one GPU need NCCL 2.30 or later and
NCCL_MULTI_RANK_GPU_ENABLE=1. With `--backend gloo --device cpu` the same runs where there is no GPU.
"""

from __future__ import annotations

import argparse
import datetime
import functools
import json
import sys
import tempfile
import time
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist

import m2n
from m2n.testing import run_ranks

WARM_UP = 5
TIMEOUT_S = 60.0


def device_of(kind: str, process: int) -> str:
    """Of a process of the group, the attention rank first."""
    return f"cuda:{min(process, torch.cuda.device_count() - 1, 1)}" if kind == "cuda" else kind


def join_group(options: argparse.Namespace, store: str, process: int) -> None:
    torch.set_num_threads(1)
    if options.device == "cuda":
        torch.cuda.set_device(device_of("cuda", process))
    dist.init_process_group(
        options.backend, init_method=f"file://{store}/group", rank=process, world_size=1 + options.expert_ranks,
        timeout=datetime.timedelta(seconds=TIMEOUT_S),
    )  # fmt: skip


def exchange(sends: list[tuple[torch.Tensor, int]], receives: list[tuple[torch.Tensor, int]]) -> None:
    """One group of sends and receives with other processes; returns when they are done, or on a GPU enqueued."""
    operations = [dist.P2POp(dist.isend, tensor, process) for tensor, process in sends]
    operations += [dist.P2POp(dist.irecv, tensor, process) for tensor, process in receives]
    for work in dist.batch_isend_irecv(operations):
        work.wait()


def host_us(work: Callable[[], Any], device: str) -> float:
    began = time.perf_counter()
    work()
    if device != "cpu":
        torch.cuda.synchronize()
    return 1e6 * (time.perf_counter() - began)


def attention(comm: m2n.AttentionComm, options: argparse.Namespace, store: str) -> dict[str, list[float]]:
    """The one attention rank: times round trips, those of m2n and of the group in turn."""
    join_group(options, store, 0)
    device, tokens = comm.device, options.tokens
    x = torch.randn(tokens, options.hidden, device=device).to(torch.bfloat16)
    y, replies = torch.empty_like(x), torch.empty_like(x)
    ids = (torch.arange(tokens, device=device) * options.expert_ranks // tokens)[:, None]
    route = comm.route(ids, torch.ones(tokens, 1, device=device))
    counts = torch.bincount(ids[:, 0], minlength=options.expert_ranks).tolist()
    processes = range(1, 1 + options.expert_ranks)

    def by_m2n() -> None:
        comm.dispatch_send(x, route)
        comm.combine_recv(out=y)

    def by_group() -> None:
        exchange(list(zip(x.split(counts), processes)), [])
        exchange([], list(zip(replies.split(counts), processes)))

    samples: dict[str, list[float]] = {"m2n": [], options.backend: []}
    for i in range(options.rounds + WARM_UP):
        for name, work in (("m2n", by_m2n), (options.backend, by_group)):
            us = host_us(work, device)
            if i >= WARM_UP:
                samples[name].append(us)
    comm.check()
    if not torch.equal(y, x) or not torch.equal(replies, x):
        raise RuntimeError("the rows that came back are not those that were sent")
    dist.destroy_process_group()
    return samples


def expert(comm: m2n.ExpertComm, options: argparse.Namespace, store: str) -> None:
    """Sends what it gets back as it is."""
    join_group(options, store, 1 + comm.rank)
    first, last = (-(-options.tokens * end // options.expert_ranks) for end in (comm.rank, comm.rank + 1))
    rows = torch.empty(last - first, options.hidden, dtype=torch.bfloat16, device=comm.device)
    for _ in range(options.rounds + WARM_UP):
        batch = comm.dispatch_recv(timeout=TIMEOUT_S)
        if batch is None:
            raise RuntimeError("no rows have come in time")
        comm.combine_send(batch, batch.gather())
        exchange([], [(rows, 0)])
        exchange([(rows, 0)], [])
    if comm.device != "cpu":
        torch.cuda.synchronize()
    dist.destroy_process_group()


def rows_of(samples: dict[str, list[float]], options: argparse.Namespace) -> list[dict[str, Any]]:
    """Lines of the result: the group's first, which is the limit of m2n's."""
    rows, limit_us = [], None
    num_bytes = 2 * 2 * options.hidden * options.tokens
    for name in (options.backend, "m2n"):
        each = sorted(samples[name])
        p50, p99 = each[len(each) // 2], each[min(len(each) - 1, round(0.99 * len(each)))]
        row = {
            "name": f"round trip between 1 + {options.expert_ranks} processes, {name}, {options.tokens} x "
            f"{options.hidden} bf16",
            "bytes": num_bytes, "samples": len(each), "p50_us": round(p50, 3), "p99_us": round(p99, 3),
        }  # fmt: skip
        if limit_us is not None:
            row |= {"limit_us": round(limit_us, 3), "ratio": round(p50 / limit_us, 3), "limit": options.backend}
        rows, limit_us = [*rows, row], p50
    return rows


def main() -> int:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--backend", default="nccl", choices=("nccl", "gloo"))
    parser.add_argument("--device", default="cuda", choices=("cuda", "cpu"))
    parser.add_argument("--expert-ranks", type=int, default=1)
    parser.add_argument("--tokens", type=int, nargs="+", default=[8, 128, 4096])
    parser.add_argument("--hidden", type=int, default=7168)
    parser.add_argument("--rounds", type=int, default=100)
    options = parser.parse_args()
    for tokens in options.tokens:
        each = argparse.Namespace(**{**vars(options), "tokens": tokens})
        shape = m2n.Shape(options.hidden, options.expert_ranks, 1, tokens)
        devices = (device_of(options.device, 0), device_of(options.device, 1))
        config = m2n.Config(arrays="torch", timeout_s=TIMEOUT_S)
        with tempfile.TemporaryDirectory(prefix="m2n-") as store:
            bodies = tuple(functools.partial(body, options=each, store=store) for body in (attention, expert))
            samples = run_ranks(
                bodies, 1, options.expert_ranks, shape=shape, processes=True, timeout=3 * TIMEOUT_S, device=devices,
                config=config,
            )["attention", 0]  # fmt: skip
        for row in rows_of(samples, each):
            print(json.dumps(row), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
