# SPDX-License-Identifier: Apache-2.0
"""Bad input to the library: a clear error on the side that erred, before anything is sent; peers are told."""

from __future__ import annotations

import dataclasses
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import bodies
import ml_dtypes
import numpy as np
import pytest
import torch

import m2n
from m2n import bootstrap
from m2n.ranks import run_ranks

SHAPE = m2n.Shape(
    hidden=16, num_experts=4, top_k=2, max_tokens=8, microbatches=2, dispatch_dtype="float32", combine_dtype="float32"
)
PLACEMENT = m2n.Placement.block(4, 1)
FAST = m2n.Config(arrays="torch", timeout_s=5.0, connect_timeout_s=1.0)
IDS = torch.tensor([[0, 1], [2, 3], [1, 3]])
WEIGHTS = torch.full((3, 2), 0.5)
SEEDED = torch.Generator().manual_seed(1)  # workers of pytest-xdist must find the same names
X = torch.randn(3, 16, generator=SEEDED)


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[m2n.AttentionComm, m2n.ExpertComm]]:
    store = tmp_path_factory.mktemp("store")
    with m2n.ExpertComm(0, SHAPE, PLACEMENT, store, name="pair", config=FAST) as expert:
        with m2n.AttentionComm(0, SHAPE, PLACEMENT, store, name="pair", config=FAST) as attention:
            yield attention, expert


def nothing_was_sent(pair: tuple[m2n.AttentionComm, m2n.ExpertComm]) -> None:
    assert pair[1].dispatch_recv(timeout=0) is None


@pytest.mark.parametrize(
    "x, error, words",
    [
        (X.double(), TypeError, "x: expected float32, bfloat16 or float16, got float64"),
        (X.bfloat16(), TypeError, "x: expected dtype float32 as in the Shape, got bfloat16"),
        (X[:, :15], ValueError, r"x: expected shape \[T, 16\], got float32 \[3, 15\]"),
        (X[0], ValueError, r"x: expected shape \[T, 16\]"),
        (X[:2], ValueError, "x: the route is for 3 tokens, x has 2 rows"),
        (torch.randn(16, 3, generator=SEEDED).t(), ValueError, "elements of a row must be adjacent"),
        (X[:1].expand(3, 16), ValueError, "rows must not overlap"),
        ([[1.0] * 16] * 3, TypeError, "x: expected a torch, numpy or other DLPack tensor, got list"),
        (torch.empty(3, 16, device="meta"), (TypeError, ValueError), "x: "),
    ],
    ids=lambda value: str(value)[:30].replace("\n", " "),
)
def test_x(pair: Any, x: Any, error: Any, words: str) -> None:
    comm = pair[0]
    with pytest.raises(error, match=words):
        comm.dispatch_send(x, comm.route(IDS, WEIGHTS))
    nothing_was_sent(pair)


@pytest.mark.parametrize(
    "ids, weights, error, words",
    [
        ([[0, 4]], [[1.0, 1.0]], ValueError, "topk_ids: expert id 4 at token 0 is out of range; expected 0 to 3"),
        ([[0, 1], [-2, 1]], [[1.0, 1.0]] * 2, ValueError, "topk_ids: expert id -2 at token 1 is out of range"),
        ([[0, 2**40]], [[1.0, 1.0]], ValueError, "out of range"),
        ([[3, 3]], [[1.0, 1.0]], ValueError, "topk_ids: expert id 3 comes twice at token 0"),
        ([[0, 1, 2]], [[1.0, 1.0, 1.0]], ValueError, r"topk_ids: expected shape \[T, 2\]"),
        ([[0, 1]], [[1.0, 1.0]] * 2, ValueError, "topk_weights: expected 1 rows as in topk_ids, got 2"),
        ([[0, 1]], [[float("nan"), 1.0]], ValueError, "topk_weights: not finite at token 0, k=0"),
        ([[0.0, 1.0]], [[1.0, 1.0]], TypeError, "topk_ids: expected int32 or int64, got float32"),
        ([[0, 1]], [[1, 1]], TypeError, "topk_weights: expected float32"),
        ([[0, 1]] * 9, [[1.0, 1.0]] * 9, ValueError, "9 tokens, but max_tokens is 8; send them in several dispatches"),
    ],
)
def test_route(pair: Any, ids: Any, weights: Any, error: Any, words: str) -> None:
    with pytest.raises(error, match=words):
        pair[0].route(torch.tensor(ids), torch.tensor(weights))


def test_splits() -> None:
    with pytest.raises(ValueError, match="splits: they add up to 2 rows, topk_ids has 3"):
        m2n.Route.from_splits([2], IDS, WEIGHTS, shape=SHAPE)
    with pytest.raises(ValueError, match="every row needs at least one expert"):
        m2n.Route.from_splits([3], torch.full((3, 2), -1), WEIGHTS, shape=SHAPE)
    with pytest.raises(ValueError, match="splits: expected at least 0"):
        m2n.Route.from_splits([4, -1], IDS, WEIGHTS, shape=SHAPE)


def test_a_busy_slot_and_a_slot_that_is_not(pair: Any) -> None:
    attention, expert = pair
    route = attention.route(IDS, WEIGHTS)
    attention.dispatch_send(X, route, microbatch=1, layer=7)
    with pytest.raises(
        m2n.SlotBusy, match=r"microbatch 1 is in flight since layer 7; call combine_recv\(microbatch=1\)"
    ):
        attention.dispatch_send(X, route, microbatch=1)
    with pytest.raises(ValueError, match="microbatch 0: nothing was dispatched"):
        attention.combine_recv(0)
    with pytest.raises(ValueError, match="microbatch: expected 0 to 1, got 2"):
        attention.dispatch_send(X, route, microbatch=2)
    for out, error, words in [
        (torch.empty(2, 16), ValueError, "out: expected 3 rows, got 2"),
        (torch.empty(3, 16).bfloat16(), TypeError, "out: expected dtype float32"),
        (torch.empty(3, 8), ValueError, "out: expected shape"),
    ]:
        with pytest.raises(error, match=words):
            attention.combine_recv(1, out=out)
    batch = expert.dispatch_recv()
    for y, error, words in [
        (torch.zeros(5, 16), ValueError, r"y: expected 6 rows, one per \(row, expert\) pair, got 5"),
        (torch.zeros(6, 8), ValueError, "y: expected shape"),
        (torch.zeros(6, 16).double(), TypeError, "y: expected float32, bfloat16 or float16"),
        (None, TypeError, "y: expected a torch"),
    ]:
        with pytest.raises(error, match=words):
            expert.combine_send(batch, y)
    with pytest.raises(ValueError, match="y: expected 3 rows, one per received row, got 6"):
        expert.combine_send(batch, torch.zeros(6, 16), reduced=True)
    with pytest.raises(TypeError, match=r"batch: expected m2n.Batch"):
        expert.combine_send(None, torch.zeros(6, 16))
    with pytest.raises(ValueError, match="layout: expected"):
        batch.gather("rows")
    expert.combine_send(batch, batch.gather())  # an error has used nothing up
    assert attention.combine_recv(1).shape == (3, 16)


def test_arguments_of_the_verbs(pair: Any) -> None:
    attention, expert = pair
    with pytest.raises(TypeError, match=r"route: expected m2n.Route"):
        attention.dispatch_send(X, IDS)
    with pytest.raises(ValueError, match="stream: 'cpu' has none"):
        attention.dispatch_send(X, attention.route(IDS, WEIGHTS), stream=3)
    with pytest.raises(ValueError, match="timeout: expected seconds >= 0"):
        expert.dispatch_recv(timeout=-1)
    with pytest.raises(ValueError, match="attention_ranks: give it together with linger_us=None"):
        expert.dispatch_recv(linger_us=None)
    with pytest.raises(ValueError, match="attention_ranks: expected at least one"):
        expert.dispatch_recv(linger_us=None, attention_ranks=[])
    with pytest.raises(ValueError, match="linger_us: expected microseconds"):
        expert.dispatch_recv(linger_us=-1)
    for comm in (attention, expert):
        comm.recover(0)  # alive: a new life may have come meanwhile
        for give_up in (comm.recover, comm.drop):
            with pytest.raises(ValueError, match=f"rank 9 was never linked with {comm.role} rank 0"):
                give_up(9)
    with pytest.raises(ValueError, match="missing: expected 'raise' or 'nan', got 0"):
        attention.combine_recv(missing=0)
    with pytest.raises(ValueError, match="give_up_s: expected seconds > 0 or None, got 0"):
        m2n.Config(give_up_s=0)
    other = dataclasses.replace(SHAPE, max_tokens=64)
    with pytest.raises(ValueError, match="route: it was made for another Shape"):
        attention.dispatch_send(X, m2n.Route.from_splits([3], IDS, WEIGHTS, shape=other))
    route = attention.route(IDS, WEIGHTS)
    with pytest.raises(ValueError, match="out of range"):
        attention.route(IDS + 3, WEIGHTS, out=route)
    assert (route.num_tokens, route.num_rows) == (0, 0)  # not half of one and half of the other
    nothing_was_sent(pair)


def test_a_batch_of_another_comm(pair: Any, tmp_path: Path) -> None:
    with m2n.ExpertComm(0, SHAPE, PLACEMENT, tmp_path, config=FAST) as expert:
        with m2n.AttentionComm(0, SHAPE, PLACEMENT, tmp_path, config=FAST) as attention:
            attention.dispatch_send(X, attention.route(IDS, WEIGHTS))
            batch = expert.dispatch_recv()
            with pytest.raises(ValueError, match="batch: it was received by another comm"):
                pair[1].combine_send(batch, batch.gather())


@pytest.mark.parametrize(
    "change, error, words",
    [
        ({"hidden": 0}, ValueError, "hidden: expected at least 1"),
        ({"top_k": 5}, ValueError, "top_k: expected at most num_experts=4"),
        ({"max_tokens": 2.5}, TypeError, "max_tokens: expected an int"),
        ({"microbatches": True}, TypeError, "microbatches: expected an int"),
        ({"microbatches": 64}, ValueError, "microbatches: expected at most 63, got 64"),
        ({"dispatch_dtype": "float64"}, ValueError, "dispatch_dtype: expected one of float32"),
        ({"combine_dtype": torch.int32}, ValueError, "combine_dtype"),
        ({"combine_dtype": "float8_e4m3fn"}, ValueError, "combine_dtype: expected one of .*float16, got 'float8"),
        ({"dispatch_dtype": torch.float8_e5m2}, ValueError, "dispatch_dtype: .*float8_e4m3fn, got torch.float8_e5m2"),
        ({"reduce_at": "nowhere"}, ValueError, "reduce_at: expected 'expert' or 'attention'"),
    ],
)
def test_shape(change: dict[str, Any], error: Any, words: str) -> None:
    with pytest.raises(error, match=words):
        dataclasses.replace(SHAPE, **change)


def test_torch_dtypes_are_names() -> None:
    assert dataclasses.replace(SHAPE, dispatch_dtype=torch.bfloat16).dispatch_dtype == "bfloat16"
    assert dataclasses.replace(SHAPE, combine_dtype=np.dtype("float16")).combine_dtype == "float16"
    assert dataclasses.replace(SHAPE, combine_dtype=np.float32).combine_dtype == "float32"
    for float8 in (torch.float8_e4m3fn, ml_dtypes.float8_e4m3fn, np.dtype(ml_dtypes.float8_e4m3fn), "float8_e4m3fn"):
        assert dataclasses.replace(SHAPE, dispatch_dtype=float8).dispatch_dtype == "float8_e4m3fn"
    native = dataclasses.asdict(dataclasses.replace(SHAPE, dispatch_dtype="float8_e4m3fn"))
    with pytest.raises(ValueError, match="combine_dtype: expected 'float32', 'bfloat16' or 'float16', got 'float8"):
        m2n._C.Shape(**{**native, "combine_dtype": "float8_e4m3fn"})


def test_placement() -> None:
    with pytest.raises(ValueError, match="expert 1 has no expert rank"):
        m2n.Placement([[0], []])
    with pytest.raises(ValueError, match="names an expert rank twice"):
        m2n.Placement([[0, 0]])
    with pytest.raises(ValueError, match="expert rank 2 does not exist, there are 2"):
        m2n.Placement([[0], [2]], 2)
    with pytest.raises(ValueError, match="at least one expert"):
        m2n.Placement([])
    with pytest.raises(ValueError, match="expert_ranks: expected at least 1"):
        m2n.Placement.block(4, 0)
    assert m2n.Placement.block(5, 2) == m2n.Placement([[0], [0], [0], [1], [1]])


@pytest.mark.parametrize(
    "options, error, words",
    [
        ({"rank": 1}, ValueError, r"rank: expected below 1 \(the placement's\), got 1"),
        ({"rank": -1}, ValueError, "rank: expected at least 0"),
        ({"shape": "x"}, TypeError, r"shape: expected m2n.Shape"),
        ({"placement": [[0]]}, TypeError, r"placement: expected m2n.Placement"),
        ({"placement": m2n.Placement.block(5, 1)}, ValueError, "places 5 experts, the shape has 4"),
        ({"max_peers": 0}, ValueError, "max_peers: expected at least 1"),
        ({"max_peers": 5000}, ValueError, "max_peers: expected 1 to 1024"),
        ({"device": "tpu:0"}, ValueError, "device: expected 'cpu', 'cuda', 'cuda:<number>' or 'emulated', got 'tpu:0'"),
        ({"device": "cuda:x"}, ValueError, "device: expected 'cpu', 'cuda', 'cuda:<number>' or 'emulated'"),
        ({"store": 5}, TypeError, "store: expected a path"),
        ({"store": "http://host:1"}, ValueError, "store: expected tcp://host:port"),
        ({"store": "/proc/nowhere"}, m2n.SetupError, "store: cannot use the directory /proc/nowhere"),
        ({"shape": dataclasses.replace(SHAPE, max_tokens=2**27)}, ValueError, "cannot be indexed by int32"),
    ],
)
def test_opening_a_comm(options: dict[str, Any], error: Any, words: str, tmp_path: Path) -> None:
    arguments = {"rank": 0, "shape": SHAPE, "placement": PLACEMENT, "store": tmp_path, "config": FAST, **options}
    with pytest.raises(error, match=words):
        m2n.ExpertComm(**arguments)
    m2n.ExpertComm(0, SHAPE, PLACEMENT, tmp_path, config=FAST).close()  # the failed one left nothing open


def test_config() -> None:
    for change, words in [
        ({"timeout_s": 0}, "timeout_s: expected seconds > 0"),
        ({"transport": "smoke"}, "transport: expected one of auto, shm, cuda"),
        ({"arrays": "jax"}, "arrays: expected"),
    ]:
        with pytest.raises(ValueError, match=words):
            m2n.Config(**change)


def test_no_ranks() -> None:
    for attention, experts in ((0, 1), (1, 0)):
        with pytest.raises(ValueError, match="expected at least 1 of each"):
            run_ranks(bodies.pair([[]]), attention, experts, shape=SHAPE)


@pytest.mark.parametrize(
    "change, words",
    [
        ({"hidden": 32}, "shapes differ in hidden: .*32.*16"),
        ({"reduce_at": "attention"}, "shapes differ in reduce_at"),
        ({"combine_dtype": "bfloat16"}, "shapes differ in combine_dtype"),
    ],
)
def test_shapes_that_differ(
    change: dict[str, Any], words: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    with m2n.ExpertComm(0, SHAPE, PLACEMENT, tmp_path, config=FAST):
        with pytest.raises(m2n.SetupError, match=words):
            m2n.AttentionComm(0, dataclasses.replace(SHAPE, **change), PLACEMENT, tmp_path, config=FAST)
        assert "a peer could not join: handshake: shapes differ" in capfd.readouterr().err  # the other side is told


def test_versions_that_differ(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with m2n.ExpertComm(0, SHAPE, PLACEMENT, tmp_path, config=FAST):
        introduction = bootstrap.introduction
        monkeypatch.setattr(bootstrap, "introduction", lambda *about: {**introduction(*about), "m2n": 99})
        with pytest.raises(m2n.SetupError, match="speaks version 99 of the protocol, expert rank 0 speaks 4"):
            m2n.AttentionComm(0, SHAPE, PLACEMENT, tmp_path, config=FAST)


def test_a_peer_that_never_comes(tmp_path: Path) -> None:
    began = time.monotonic()
    with pytest.raises(m2n.SetupError, match="expert rank 0 could not be joined within 1.* not published") as caught:
        m2n.AttentionComm(0, SHAPE, PLACEMENT, tmp_path, config=FAST)
    assert time.monotonic() - began < 10 and "job 'default'" in str(caught.value)


def test_a_stale_address_is_looked_up_again(tmp_path: Path) -> None:
    expert = m2n.ExpertComm(0, SHAPE, PLACEMENT, tmp_path, config=FAST)
    expert.close()
    with pytest.raises(m2n.SetupError, match="its address m2n-.* is stale"):
        m2n.AttentionComm(0, SHAPE, PLACEMENT, tmp_path, config=FAST)
    joined = []

    def join() -> None:
        config = dataclasses.replace(FAST, connect_timeout_s=20)
        with m2n.AttentionComm(0, SHAPE, PLACEMENT, tmp_path, config=config) as comm:
            joined.append(comm.peers()[0].state)

    thread = threading.Thread(target=join)
    thread.start()
    time.sleep(0.1)
    with m2n.ExpertComm(0, SHAPE, PLACEMENT, tmp_path, config=FAST):
        thread.join()
    assert joined == ["live"]


def test_a_store_that_cannot_be_reached() -> None:
    with pytest.raises(m2n.SetupError, match=r"store: cannot reach, within 1 s, tcp://127.0.0.1:9") as caught:
        m2n.ExpertComm(0, SHAPE, PLACEMENT, "tcp://127.0.0.1:9", config=FAST)
    assert "python -m m2n store" in str(caught.value)


def test_a_store_that_fails() -> None:
    class Broken:
        def set(self, key: str, value: str) -> None:
            raise RuntimeError("gone")

        def get(self, key: str) -> bytes:
            return b""

        def wait(self, keys: list[str], timeout: Any) -> None:
            raise RuntimeError("gone")

    with pytest.raises(m2n.SetupError, match="store: cannot be written: gone"):
        m2n.ExpertComm(0, SHAPE, PLACEMENT, Broken(), config=FAST)
    Broken.set = lambda self, key, value: None  # type: ignore[method-assign]
    with pytest.raises(m2n.SetupError, match="store: cannot be read any more: gone"):
        m2n.AttentionComm(0, SHAPE, PLACEMENT, Broken(), config=FAST)
    Broken.wait = lambda self, keys, timeout: None  # type: ignore[method-assign]
    with pytest.raises(m2n.SetupError, match="is not an address of m2n"):
        m2n.AttentionComm(0, SHAPE, PLACEMENT, Broken(), config=FAST)


@pytest.mark.parametrize("kind", ["tcp", "object", "path"])
def test_every_kind_of_store(kind: str, tmp_path: Path) -> None:
    with m2n.host_store() as hosted:
        store: Any = hosted.url if kind == "tcp" else tmp_path
        if kind == "object":
            from torch.distributed import FileStore

            store = FileStore(str(tmp_path / "file"), -1)
        with m2n.ExpertComm(0, SHAPE, PLACEMENT, store, config=FAST):
            with m2n.AttentionComm(0, SHAPE, PLACEMENT, store, config=FAST) as comm:
                assert [peer.state for peer in comm.peers()] == ["live"]


def test_two_of_a_rank_in_one_process(tmp_path: Path) -> None:
    with m2n.ExpertComm(0, SHAPE, PLACEMENT, tmp_path, config=FAST):
        with pytest.raises(m2n.SetupError, match="expert rank 0 is open in this process already"):
            m2n.ExpertComm(0, SHAPE, PLACEMENT, tmp_path, config=FAST)
        m2n.ExpertComm(0, SHAPE, PLACEMENT, tmp_path, name="other", config=FAST).close()
