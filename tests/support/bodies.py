# SPDX-License-Identifier: Apache-2.0
"""What ranks do in the tests: importable, so that it runs in spawned processes too. Needs numpy only."""

from __future__ import annotations

import dataclasses
import functools
import gc
import multiprocessing
import os
import pickle
import sys
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import m2n
from m2n.ranks import serve
from m2n.testing import apply_expert, expert_outputs, start_seq_at


def config_of(transport: str) -> m2n.Config:
    """Of the ranks of a test: a transport's name, with "ucx-put" for UCX by puts, in shared memory,
    "gpu-direct" for rows that lie elsewhere, as in a GPU's memory, and "stream-waits" for streams that wait for signals
    by themselves."""
    common: dict[str, Any] = {"arrays": "numpy", "timeout_s": 20.0, "connect_timeout_s": 20.0}
    if transport == "ucx-put":
        return m2n.Config(transport="ucx", ucx_way="put", ucx_variables={"TLS": "posix,cma,self"}, **common)
    if transport == "gpu-direct":
        return dataclasses.replace(config_of("ucx-put"), gpu_direct=True)
    if transport == "ucx":
        return m2n.Config(transport="ucx", ucx_variables={"TLS": "tcp,self"}, insecure=True, **common)
    if transport == "stream-waits":
        return m2n.Config(transport="shm", stream_waits=True, **common)
    return m2n.Config(transport=transport, **common)


# Tests that run over several transports set the variable, for the processes that they start too.
TRANSPORT_VARIABLE = "M2N_TEST_TRANSPORT"
NUMPY = config_of(os.environ.get(TRANSPORT_VARIABLE, "auto"))


def is_nan(y: Any) -> list[bool]:
    """Row by row of a tensor: all NaN, or none."""
    assert (y.isnan().all(1) | ~y.isnan().any(1)).all()
    return y.isnan().all(1).tolist()


def exchange(comm: m2n.AttentionComm, workloads: list[list[Any]]) -> list[Any]:
    """Sends this rank's workloads, a layer each, with as many microbatches in flight as there are; their results."""
    results: list[Any] = []
    num_microbatches = comm.shape.microbatches
    for layer, workload in enumerate(workloads[comm.rank]):
        if layer >= num_microbatches:
            results.append(comm.combine_recv(layer % num_microbatches))
        route = comm.route(workload.topk_ids, workload.topk_weights)
        comm.dispatch_send(workload.x, route, microbatch=layer % num_microbatches, layer=layer)
    for layer in range(len(results), len(workloads[comm.rank])):
        results.append(comm.combine_recv(layer % num_microbatches))
    return results


def answer(comm: m2n.ExpertComm, attention: int, linger_us: float = 50) -> int:
    """Applies the stand-in experts until all attention ranks have left."""
    experts = comm.placement.experts_of(comm.rank)
    return serve(comm, attention, lambda batch: expert_outputs(batch, experts, apply_expert), linger_us)


def pair(workloads: list[list[Any]], **options: Any) -> tuple[Any, Any]:
    """(attention function, expert function) for run_ranks."""
    return (
        functools.partial(exchange, workloads=workloads),
        functools.partial(answer, attention=len(workloads), **options),
    )


def exchange_on_gpu(comm: m2n.AttentionComm, workloads: list[list[Any]]) -> list[Any]:
    """Like exchange(), of workloads in numpy and with results in numpy."""
    import torch

    def on_gpu(workload: Any) -> Any:
        return type(workload)(*(torch.from_numpy(array).to(comm.device) for array in vars(workload).values()))

    placed = [[on_gpu(workload) for workload in layers] for layers in workloads]
    results = exchange(comm, placed)
    torch.cuda.synchronize(comm.device)
    return [y.cpu().numpy() for y in results]


def gpu_expert_that_dies(store: str, shape: m2n.Shape, placement: m2n.Placement) -> None:
    """Ends its process once a message has come, without an answer."""
    with m2n.ExpertComm(0, shape, placement, store, config=m2n.Config(arrays="torch"), device="cuda:0") as comm:
        comm.wait_work(timeout=20.0)
        os.kill(os.getpid(), 9)


def attention_main(rank: int, store: str, shape: m2n.Shape, placement: m2n.Placement, to_do: str) -> None:
    """An attention process of the fault tests."""
    import numpy as np

    with m2n.AttentionComm(rank, shape, placement, store, config=NUMPY) as comm:
        ids = np.tile(np.arange(shape.top_k, dtype=np.int32), (4, 1))
        weights = np.full(ids.shape, 0.5, np.float32)
        x = np.ones((4, shape.hidden), np.float32)
        comm.dispatch_send(x, comm.route(ids, weights))
        if to_do == "die":
            os.kill(os.getpid(), 9)
        if to_do == "hold":
            time.sleep(60)


def expert_main(rank: int, store: str, shape: m2n.Shape, placement: m2n.Placement, to_do: str) -> None:
    """An expert process of the fault tests."""
    with m2n.ExpertComm(rank, shape, placement, store, config=NUMPY) as comm:
        if to_do == "hold":
            time.sleep(60)
        batch = comm.dispatch_recv()
        if to_do == "die":
            os.kill(os.getpid(), 9)
        assert batch is not None
        comm.combine_send(batch, expert_outputs(batch, placement.experts_of(rank)))
        if to_do == "answer_and_die":
            os.kill(os.getpid(), 9)


def expert_that_is_dropped(rank: int, store: str, shape: m2n.Shape, placement: m2n.Placement, says: str) -> None:
    """Serves until its attention rank is lost, and writes what it was told into a file; before that "met"."""
    with m2n.ExpertComm(rank, shape, placement, store, config=NUMPY) as comm:
        comm.wait_peer(0)
        Path(says).write_text("met")
        try:
            answer(comm, 1)
        except m2n.PeerLost as error:
            Path(says).write_text(str(error))


# The first numbers are 2^32 - 2 and 2^32 - 1, then 0.
NEAR_THE_END = 2**32 - 3


def run_rank(
    role: str,
    rank: int,
    store: str,
    shape: m2n.Shape,
    placement: m2n.Placement,
    workloads: list[list[Any]],
    first_seq: int = 0,
) -> Any:
    """One rank of an exchange, made where this is called; an attention rank's results."""
    start_seq_at(first_seq)
    if role == "expert":
        with m2n.ExpertComm(rank, shape, placement, store, config=NUMPY) as expert:
            return answer(expert, len(workloads))
    with m2n.AttentionComm(rank, shape, placement, store, config=NUMPY) as attention:
        return exchange(attention, workloads)


def launch(directory: str, method: str, first_seq: str) -> None:
    """Runs the ranks of directory/given as children of this process, started by `method`; writes directory/results."""
    shape, placement, workloads = pickle.loads(Path(directory, "given").read_bytes())
    ranks = [("expert", rank) for rank in range(placement.num_expert_ranks)]
    ranks += [("attention", rank) for rank in range(len(workloads))]
    context = multiprocessing.get_context(method)
    if method == "forkserver":
        context.set_forkserver_preload(["bodies"])  # its children share what the import has left in memory
    with ProcessPoolExecutor(len(ranks), mp_context=context) as pool:
        rest = (f"{directory}/store", shape, placement, workloads, int(first_seq))
        futures = [pool.submit(run_rank, role, rank, *rest) for role, rank in ranks]
        results = {rank: future.result(timeout=60) for rank, future in zip(ranks, futures)}
    Path(directory, "results").write_bytes(pickle.dumps(results))


# What the functions below exchange.
SMALL = m2n.Shape(64, 4, 2, 8, microbatches=2, dispatch_dtype="float32", combine_dtype="float32")
ONE = m2n.Placement.block(4, 1)


def small_expert(store: Any, placement: m2n.Placement = ONE, rank: int = 0, **options: Any) -> m2n.ExpertComm:
    """An expert rank; the only one, unless it is placed otherwise."""
    return m2n.ExpertComm(rank, SMALL, placement, store, **{"config": NUMPY, **options})


def small_attention(store: Any, placement: m2n.Placement = ONE, rank: int = 0, **options: Any) -> m2n.AttentionComm:
    """One of its attention ranks."""
    return m2n.AttentionComm(rank, SMALL, placement, store, **{"config": NUMPY, **options})


def small_dispatch(comm: m2n.AttentionComm, microbatch: int = 0) -> Any:
    """Dispatches 8 tokens; what combine_recv must return."""
    import numpy as np

    x = np.arange(8 * 64, dtype=np.float32).reshape(8, 64) + comm.rank
    ids = np.array([[token % 4, (token + 1) % 4] for token in range(8)], np.int32)
    comm.dispatch_send(x, comm.route(ids, np.full((8, 2), 0.5, np.float32)), microbatch)
    return np.stack([sum(np.float32(0.5) * apply_expert(e, x[t]) for e in sorted(ids[t])) for t in range(8)])


def small_answer(comm: m2n.ExpertComm, timeout: float = 20.0) -> bool:
    """Answers one batch if there is one by then."""
    batch = comm.dispatch_recv(timeout=timeout)
    if batch is not None:
        comm.combine_send(batch, expert_outputs(batch, comm.placement.experts_of(comm.rank)))
    return batch is not None


def mapped_kib() -> int:
    """How much of this process's memory is objects of m2n, other than holes."""
    total, is_ours = 0, False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        first, *rest = line.split()
        if not first.endswith(":"):
            is_ours = "memfd:m2n" in line
        elif first == "Size:" and is_ours:
            total += int(rest[0])
    return total


def views_outlive_everything(store: str, library: str) -> None:
    """Takes views, closes and deletes what they came from, reads them, and looks when the memory goes."""
    import numpy as np

    config = m2n.Config(arrays=library, timeout_s=20.0)  # type: ignore[arg-type]
    server = m2n.ExpertComm(0, SMALL, ONE, store, config=config)
    comm = m2n.AttentionComm(0, SMALL, ONE, store, config=config)
    small_dispatch(comm)
    batch = server.dispatch_recv()
    assert batch is not None
    x, index = batch.x, batch.row_index_by_expert
    # Views of views, in the library and in numpy over it; with a copy of what must be read from each.
    views = {"x": x, "rows": x[2:5, ::3], "numpy": np.asarray(x)[:6]}
    lists = {"index": index[1:], "offsets": batch.expert_offsets, "weights": np.asarray(batch.weights)[::2]}
    expected = {name: np.array(view, copy=True) for name, view in {**views, **lists}.items()}
    assert expected["rows"].any() and len(expected["index"]) == 15
    before = mapped_kib()
    server.close()
    comm.close()
    assert np.array_equal(np.asarray(batch.gather()), expected["x"][np.asarray(index)])
    assert mapped_kib() == before, "close() took memory that can still be reached"
    del server, comm, batch, index, x
    gc.collect()
    assert 0 < mapped_kib() < before, "only the window that is looked at must stay"
    for name, view in {**views, **lists}.items():
        assert np.array_equal(np.asarray(view), expected[name]), name
    for name in list(views):
        assert mapped_kib() > 0, name
        view = views.pop(name)
        assert np.array_equal(np.asarray(view), expected[name])
        del view
    gc.collect()
    assert mapped_kib() == 0, "the last view of the window is gone, its memory is not"
    for name, view in lists.items():
        assert np.array_equal(np.asarray(view), expected[name]), name


def child_that_ends_by_itself(store: str) -> None:
    """A forked child with its parent's comms ends as programs do; the parent's links must not notice."""
    import numpy as np

    with small_expert(store) as server:
        with small_attention(store) as comm:
            expected = small_dispatch(comm)
            batch = server.dispatch_recv()
            assert batch is not None
            child = os.fork()
            if child == 0:
                sys.exit(0)  # through both with-blocks, finalizers, and the interpreter's end
            assert os.waitpid(child, 0)[1] == 0
            assert [peer.state for peer in (*comm.peers(), *server.peers())] == ["live", "live"]
            server.combine_send(batch, expert_outputs(batch, range(4)))
            assert np.array_equal(comm.combine_recv(), expected)
            with small_attention(store, rank=1) as other:
                expected = small_dispatch(other)
                small_answer(server)
                assert np.array_equal(other.combine_recv(), expected)


def orphan(name: str, role: str, directory: str, launcher: int) -> None:
    """A rank whose parent is going to be killed. Says what it saw in directory/<name>-<role>."""
    import numpy as np

    says = Path(directory, f"{name}-{role}")
    store = f"{directory}/store"
    if role == "expert":
        with small_expert(store, name=name) as server:
            answer(server, 1)
        says.write_text("ended")
        return
    with small_attention(store, name=name) as comm:
        if name == "with_parent":
            small_dispatch(comm)
            try:
                comm.combine_recv()
            except m2n.PeerLost as error:
                says.write_text(str(error))
            return
        num_alone = 0
        while num_alone < 50:
            expected = small_dispatch(comm)
            assert np.array_equal(comm.combine_recv(), expected)
            num_alone += os.getppid() != launcher
            Path(directory, "exchanging").touch()
    says.write_text("ended")


def launcher_to_be_killed(directory: str) -> None:
    """Starts ranks as its children, is the peer of one of them, prints their pids, and waits for its end."""
    context = multiprocessing.get_context("spawn")
    with small_expert(f"{directory}/store", name="with_parent") as server:
        for name, role in (("siblings", "expert"), ("siblings", "attention"), ("with_parent", "attention")):
            child = context.Process(target=orphan, args=(name, role, directory, os.getpid()))
            child.start()
            print(child.pid, flush=True)
        assert server.dispatch_recv() is not None  # its reply will never come
        Path(directory, "received").touch()
        time.sleep(60)


def many_attention_ranks(store: str, first: int, last: int, ready: Any) -> None:
    """Attention ranks first..last of one process, each with a message under way; waits for its end."""
    comms = [small_attention(store, rank=rank) for rank in range(first, last + 1)]
    for comm in comms:
        small_dispatch(comm)
    ready.set()
    time.sleep(60)
