# SPDX-License-Identifier: Apache-2.0
"""Waits by kernels and by the streams themselves (`Config.stream_waits`) on one GPU: round trips through memory of the
host, and what a matrix product loses beside streams that wait. Part of `make gpu`; prints lines of JSON.
"""

from __future__ import annotations

import dataclasses
import sys
import tempfile
from functools import partial

import torch

from m2n.benchmarks.gpu.verbs import CONFIG, NUM_RANKS, Bench, emit, host_us, times_of

FORMS = {"by kernels": False, "by streams": True}


def bench_of(store: str, num_tokens: int, by_stream: bool) -> Bench:
    config = dataclasses.replace(CONFIG, transport="shm", stream_waits=by_stream)
    return Bench(store, num_tokens, microbatches=1, config=config)


def count_waits(bench: Bench) -> int:
    return sum(int(comm.stats()["stream_waits"]) for comm in (bench.attention, *(side.comm for side in bench.sides)))


def time_round_trips(store: str) -> None:
    """Launched one by one; the two forms take turns."""
    for num_tokens in (1, 128):
        benches = {form: bench_of(store, num_tokens, by_stream) for form, by_stream in FORMS.items()}
        samples: dict[str, list[float]] = {form: [] for form in FORMS}
        for _ in range(120):
            for form, bench in benches.items():
                samples[form].append(host_us(bench.round_trip))
        size = f"{num_tokens} x 7168 bf16, top-8, 8 ranks"
        first_us = None
        for form, bench in benches.items():
            more = {} if first_us is None else {"limit_us": first_us, "limit": "waits by kernels"}
            us = emit(f"round trip through memory of the host, waits {form}, {size}", samples[form][20:],
                      2 * bench.num_bytes, stream_waits=count_waits(bench), **more)  # fmt: skip
            first_us = first_us or us
            bench.close()


def time_product_beside(store: str) -> None:
    """While eight expert ranks wait for a dispatch, each on its stream."""
    a, b = (torch.randn(4096, 4096, device="cuda").to(torch.bfloat16) for _ in range(2))
    out, products = torch.empty_like(a), 20

    def multiply() -> None:
        for _ in range(products):
            torch.matmul(a, b, out=out)

    def time_products(into: list[float]) -> None:
        into += times_of(multiply, 20, per=products)

    multiply()
    alone_us = emit("matrix product 4096^3 bf16, nothing waits", times_of(multiply, 20, per=products))
    for form, by_stream in FORMS.items():
        bench = bench_of(store, 8, by_stream)
        bench.round_trip()
        torch.cuda.synchronize()
        samples: list[float] = []
        bench.round_trip_behind(partial(time_products, samples))
        emit(f"matrix product 4096^3 bf16, {NUM_RANKS} ranks wait {form}", samples, limit_us=alone_us,
             limit="nothing waits")  # fmt: skip
        bench.close()


def main() -> None:
    """Runs everything, about 10 s."""
    torch.cuda.set_stream(torch.cuda.Stream())
    with tempfile.TemporaryDirectory(prefix="m2n-") as store:
        time_round_trips(store)
        time_product_beside(store)


if __name__ == "__main__":
    sys.exit(main())
