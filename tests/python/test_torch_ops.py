# SPDX-License-Identifier: Apache-2.0
"""The verbs as torch operators: compiled, they do what they do eagerly, in order, once, and with the same errors."""

from __future__ import annotations

import dataclasses
import functools
import gc
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from bodies import SMALL as SHAPE
from launched import Pair, config
from small_case import IDS, TWO, WEIGHTS
from waits import until

import m2n
import m2n.torch_ops as ops
from m2n import testing
from m2n.testing import run_ranks, serve

# Its compiler is given torch's own path unquoted.
has_space = pytest.mark.skipif(" " in torch.__file__, reason="inductor cannot compile: torch's path has a space")
BACKENDS = ("aot_eager", pytest.param("inductor", marks=[pytest.mark.slow, has_space]))
INDUCTOR = pytest.param("cpu", "inductor", marks=[pytest.mark.slow, has_space])
on_backends = pytest.mark.parametrize("backend", BACKENDS)
# Older torch wants it said (2.4 does); in newer fullgraph says it.
torch._dynamo.config.capture_dynamic_output_shape_ops = True
SMALL = dataclasses.replace(SHAPE, hidden=16)
LATE_S = 0.05
# Small whole numbers: products and sums are exact, in whatever order a backend takes them.
EXPERTS = torch.randint(
    -2, 3, (SHAPE.num_experts, SMALL.hidden, SMALL.hidden), generator=torch.Generator().manual_seed(0)
).float()
GATE = torch.randint(-2, 3, (SMALL.hidden, SHAPE.num_experts), generator=torch.Generator().manual_seed(1)).float()


@pytest.fixture(autouse=True, scope="module")
def fresh_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """What an earlier run left on disk was perhaps compiled for other operators."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path_factory.mktemp("inductor")))
        yield


@pytest.fixture(autouse=True)
def fresh_compiler() -> Iterator[None]:
    torch.compiler.reset()
    torch._dynamo.utils.counters.clear()
    yield
    torch.compiler.reset()


@pytest.fixture
def pair(tmp_path: Path) -> Iterator[Pair]:
    with opened(tmp_path) as both:
        yield both


def opened(store: Path, on: str = "cpu", **of_attention: Any) -> Pair:
    pair = Pair(store, on, shape=SMALL, **of_attention)
    for comm in (pair.comm, *pair.experts):
        ops.register(comm)
    return pair


def compiled(fn: Callable[..., Any], backend: str = "aot_eager") -> Any:
    """Any T from the first call on, so that there is little to compile."""
    return torch.compile(fn, fullgraph=True, backend=backend, dynamic=True)


def graphs() -> int:
    return int(torch._dynamo.utils.counters["stats"]["unique_graphs"])


def workload(num_tokens: int = 3, seed: int = 0, shape: m2n.Shape = SMALL) -> testing.Workload:
    made = testing.make_workload(shape, "padded", seed, num_tokens)
    whole = torch.arange(num_tokens * shape.hidden).reshape(num_tokens, shape.hidden) % 7 - 3.0
    return testing.Workload(whole.to(made.x.dtype), made.topk_ids, (made.topk_weights * 16).round() / 16)


def matmul(expert: int, x: torch.Tensor) -> torch.Tensor:
    """What the experts here compute; also the oracle's."""
    return (x.float() @ EXPERTS[expert]).to(x.dtype)


def expert_layer(comm: Any, layer: int, microbatch: int = 0) -> torch.Tensor:
    """A product for each pair with its expert's matrix, gathered."""
    x, rows, offsets, weights = ops.dispatch_recv(comm, layer, microbatch)
    expert_of_pair = torch.searchsorted(offsets[1:], torch.ones_like(rows).cumsum(0) - 1, right=True)
    y = (x.float().unsqueeze(2) * EXPERTS[expert_of_pair]).sum(1).to(x.dtype)
    ops.combine_send(comm, y, microbatch)
    return weights * 2  # used after the batch was given back


def both_sides(attention: Any, expert: Any, x: Any, ids: Any, weights: Any, layer: int) -> tuple[Any, Any]:
    """A layer of an attention and of an expert rank in one graph: exchanged, one would wait for the other forever."""
    ops.dispatch_send(attention, x, ids, weights, 0, layer)
    doubled = expert_layer(expert, layer)
    return ops.combine_recv(attention, x, 0), doubled


def check_both_sides(pair: Pair, run: Any, given: testing.Workload, layer: int) -> None:
    y, doubled = run(pair.comm, pair.experts[0], given.x, given.topk_ids, given.topk_weights, layer)
    assert torch.equal(y, testing.oracle_combine(given, pair.comm.shape, pair.options["placement"], apply=matmul))
    used = given.topk_weights[given.topk_ids >= 0]
    assert torch.equal(doubled.sort().values, (used * 2).sort().values)


class Settled:
    """A comm whose verbs can be called again and again: it brings about what each needs, and ends it afterwards."""

    def __init__(self, pair: Pair, given: testing.Workload) -> None:
        self.pair, self.given, self.expert = pair, given, pair.experts[0]
        self.config, self.shape, self.route = pair.comm.config, pair.comm.shape, pair.comm.route

    def end(self) -> None:
        batches = ops._entry(self.expert).batches
        for batch in list(batches.values()):  # of an earlier call
            self.expert.combine_send(batch, batch.gather())
            self.pair.comm.combine_recv()
        batches.clear()

    def send(self) -> None:
        route = self.route(self.given.topk_ids, self.given.topk_weights)
        self.pair.comm.dispatch_send(self.given.x, route)

    def dispatch_send(self, *args: Any) -> None:
        self.pair.comm.dispatch_send(*args)
        self.pair.answer()
        self.pair.comm.combine_recv()

    def combine_recv(self, *args: Any, **options: Any) -> Any:
        self.send()
        self.pair.answer()
        return self.pair.comm.combine_recv(*args, **options)

    def dispatch_recv(self, *args: Any, **options: Any) -> Any:
        self.send()
        return self.expert.dispatch_recv(*args, **options)

    def combine_send(self, batch: Any, y: Any, reduced: bool) -> None:
        self.expert.combine_send(batch, y, reduced)
        self.pair.comm.combine_recv()


def test_plain_m2n_does_not_import_torch() -> None:
    code = "import sys, m2n; assert 'torch' not in sys.modules and 'm2n.torch_ops' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)


@pytest.mark.parametrize("verb", ["dispatch_send", "combine_recv", "dispatch_recv", "combine_send"])
def test_opcheck_finds_nothing(verb: str, pair: Pair, monkeypatch: pytest.MonkeyPatch) -> None:
    given = workload(5)
    settled = Settled(pair, given)
    attention, expert = ops._entry(pair.comm), ops._entry(pair.experts[0])
    if verb == "combine_send":  # each call gets a batch of its own
        monkeypatch.setattr(ops, "_batch_of", lambda *_: (settled.send(), pair.experts[0].dispatch_recv())[1])
    monkeypatch.setattr(ops, "_comm_of", lambda handle, role: (settled.end(), settled)[1])
    num_pairs = int((given.topk_ids >= 0).sum())
    arguments: dict[str, tuple[Any, ...]] = {
        "dispatch_send": (given.x, given.topk_ids, given.topk_weights, attention.handle, 0, 0),
        "combine_recv": (given.x, attention.handle, 0, torch.float32, None),
        "dispatch_recv": (expert.handle, 0, 0, 50.0, None, None, True),
        "combine_send": (torch.ones(num_pairs, SMALL.hidden), expert.handle, 0, False),
    }
    # The ticket that dispatch_recv returns is a number of its own each time: nothing to compare.
    tests = ["test_schema", "test_autograd_registration", "test_faketensor"]
    tests += [] if verb == "dispatch_recv" else ["test_aot_dispatch_dynamic"]
    operator = getattr(torch.ops.m2n, verb).default
    torch.library.opcheck(operator, (ops.order, *arguments[verb]), test_utils=tests)


def test_fake_results_are_like_the_real_ones(pair: Pair) -> None:
    given, expert = workload(5), ops._entry(pair.experts[0])
    ops.dispatch_send(pair.comm, given.x, given.topk_ids, given.topk_weights)
    ticket = torch.ops.m2n.dispatch_recv(ops.order, expert.handle, 0, 0, 50.0, None, None, True)
    arguments = (ticket, expert.handle, expert.hidden, expert.num_experts, expert.rows_dtype, expert.device, True)
    taken = torch.ops.m2n.take_copies(*arguments)
    with torch._subclasses.FakeTensorMode(shape_env=torch.fx.experimental.symbolic_shapes.ShapeEnv()) as mode:
        fakes = torch.ops.m2n.take_copies(mode.from_tensor(ticket), *arguments[1:])
    for fake, real in zip(fakes, taken):
        assert fake.dtype == real.dtype and fake.device == real.device and fake.dim() == real.dim()
    assert [tuple(fakes[0].shape)[1], len(fakes[2])] == [SMALL.hidden, SMALL.num_experts + 1] and len(taken[2]) == 5
    with pytest.raises(m2n.Error, match="taken, or a later batch has come"):
        torch.ops.m2n.take_copies(*arguments)


@pytest.mark.parametrize("device, backend", [("emulated", "aot_eager"), ("cpu", "aot_eager"), INDUCTOR])
def test_both_sides_in_one_graph_equal_the_oracle(device: str, backend: str, tmp_path: Path) -> None:
    with opened(tmp_path, device) as pair:
        check_both_sides(pair, both_sides, workload(), 0)
        run = compiled(both_sides, backend)
        for layer, num_tokens in enumerate((3, 5, 8, 4, 7, 6), 2):
            check_both_sides(pair, run, workload(num_tokens, layer), layer)
        assert graphs() == 1  # T, P and the layer may change


def attention_layers(comm: Any, xs: list[torch.Tensor], record: list[Any]) -> list[torch.Tensor]:
    """Two layers of two microbatches in ping-pong order: each is in flight while the other computes."""
    sent: list[Any] = [None, None]
    for layer in range(3):
        for microbatch in range(2):
            if layer > 0:
                x, ids, weights = sent[microbatch]
                y = ops.combine_recv(comm, x, microbatch)
                record.append((x, ids, weights, y))
                xs[microbatch] = (x + y).round().clamp(-4, 4)
            if layer < 2:
                x = xs[microbatch] * 2 - 1
                scores, ids = ((x @ GATE) / 64 + torch.arange(4) / 1024).topk(2)
                sent[microbatch] = (x, ids, scores)
                ops.dispatch_send(comm, x, ids, scores, microbatch, layer)
    return xs


def run_layers(comm: m2n.AttentionComm, backend: str) -> list[Any]:
    """(results compiled, results eager) for some T, each with what was sent."""
    ops.register(comm)

    def layers(*xs: torch.Tensor) -> Any:
        record: list[Any] = []
        return attention_layers(comm, list(xs), record), record

    run, pairs = compiled(layers, backend), []
    for num_tokens in (3, 8, 5):
        xs = [workload(num_tokens).x, workload(num_tokens).x + 1]
        pairs.append((run(*xs), layers(*xs)))
    assert graphs() == 1
    return pairs


@on_backends
def test_compiled_attention_layers_equal_the_oracle_and_eager(backend: str) -> None:
    def answer(comm: m2n.ExpertComm) -> int:
        experts = comm.placement.experts_of(comm.rank)
        return serve(comm, 1, lambda batch: testing.expert_outputs(batch, experts, matmul))

    attention = functools.partial(run_layers, backend=backend)
    ran = run_ranks((attention, answer), attention=1, experts=2, shape=SMALL, config=config(), timeout=100)
    for (out, record), (out_eager, record_eager) in ran["attention", 0]:
        assert all(map(torch.equal, out, out_eager)) and len(record) == 4
        for sent, sent_eager in zip(record, record_eager):
            assert all(map(torch.equal, sent, sent_eager))
            given = testing.Workload(*sent[:3])
            assert torch.equal(sent[3], testing.oracle_combine(given, SMALL, TWO, apply=matmul))


@on_backends
@pytest.mark.parametrize("dtype", ["bfloat16", "float8_e4m3fn"])
def test_half_precision_and_reduce_at_attention_have_their_dtypes(dtype: str, backend: str, tmp_path: Path) -> None:
    types = {"dispatch_dtype": dtype, "combine_dtype": "float16", "reduce_at": "attention"}
    with Pair(tmp_path, "cpu", shape=dataclasses.replace(SMALL, **types)) as pair:
        ops.register(pair.comm), ops.register(pair.experts[0])
        given = workload(shape=pair.comm.shape)
        given.x[:, 0] = 448  # the scale of its float8 row is 1: whole numbers stay
        check_both_sides(pair, compiled(both_sides, backend), given, 0)


@on_backends
def test_calls_whose_results_are_not_used_are_made_in_order(backend: str, pair: Pair) -> None:
    expert, comm = pair.experts[0], pair.comm

    def layer(x: Any, ids: Any, weights: Any) -> None:
        for number in range(3):  # the same arguments each time: dropped or merged, SlotBusy or Timeout would tell
            ops.dispatch_send(comm, x, ids, weights)
            ops.dispatch_recv(expert, 0, timeout=1.0)
            ops.combine_send(expert, x.new_ones((6, SMALL.hidden)))
            if number < 2:
                ops.combine_recv(comm, x, timeout=1.0)

    x = torch.ones(3, SMALL.hidden)
    compiled(layer, backend)(x, torch.from_numpy(IDS), torch.from_numpy(WEIGHTS))
    assert torch.equal(ops.combine_recv(comm, x), torch.ones(3, SMALL.hidden))
    assert comm.stats()["messages_sent"] == 3 == expert.stats()["messages_sent"]


@on_backends
def test_the_compiler_never_writes_into_the_window(backend: str, pair: Pair) -> None:
    expert, given = pair.experts[0], workload()

    def layer(number: int) -> torch.Tensor:
        x, *_ = ops.dispatch_recv(expert, number)
        return x * 2 + 1  # in place, where the compiler takes x for a result that nobody else has

    pair.comm.dispatch_send(given.x, pair.comm.route(given.topk_ids, given.topk_weights))
    doubled = compiled(layer, backend)(0)
    batch = ops.open_batch(expert)
    assert torch.equal(batch.gather() * 2 + 1, doubled)


def test_rows_are_left_in_the_window_for_an_operator_that_reads_them_there(pair: Pair) -> None:
    given, expert = workload(), pair.experts[0]
    ops.dispatch_send(pair.comm, given.x, given.topk_ids, given.topk_weights)
    x, rows, *_ = compiled(lambda: ops.dispatch_recv(expert, 0, gather=False))()
    assert x.shape == (0, SMALL.hidden) and expert.stats()["rows_gathered"] == 0
    batch = ops.open_batch(expert)
    assert torch.equal(batch.row_index_by_expert, rows)
    y = torch.cat([matmul(e, batch.x[rows[a:b]]) for e, (a, b) in enumerate(spans(batch.expert_offsets))])
    compiled(lambda y: ops.combine_send(expert, y))(y)
    assert torch.equal(
        ops.combine_recv(pair.comm, given.x),
        testing.oracle_combine(given, SMALL, pair.options["placement"], apply=matmul),
    )


def spans(offsets: torch.Tensor) -> list[tuple[int, int]]:
    return list(zip(offsets.tolist(), offsets.tolist()[1:]))


@on_backends
def test_errors_of_the_verbs_come_out_of_compiled_code(backend: str, pair: Pair) -> None:
    comm, expert, given = pair.comm, pair.experts[0], workload()
    sent = (given.x, given.topk_ids, given.topk_weights)
    send = compiled(lambda *tensors: ops.dispatch_send(comm, *tensors), backend)
    combine = compiled(lambda x: ops.combine_recv(comm, x, timeout=LATE_S) + 1, backend)
    receive = compiled(lambda: ops.dispatch_recv(expert, 7, timeout=LATE_S)[0] + 1, backend)
    answer = compiled(lambda y: ops.combine_send(expert, y), backend)
    with pytest.raises(
        m2n.Timeout, match=r"dispatch_recv\(handle=\d+, layer=7, microbatch=0\): no batch within 0.05 s"
    ):
        receive()
    with pytest.raises(ValueError, match="no batch is open; dispatch_recv first"):
        answer(given.x)
    send(*sent)
    with pytest.raises(m2n.SlotBusy, match="microbatch 0 is in flight"):
        send(*sent)
    with pytest.raises(m2n.Timeout, match=r"combine_recv\(microbatch=0\): expert rank 0 is alive") as caught:
        combine(given.x)
    assert caught.value.peer == 0
    x, *_ = ops.dispatch_recv(expert, 0)
    with pytest.raises(m2n.SlotBusy, match="layer 0 of this microbatch was not answered"):
        receive()
    with pytest.raises(ValueError, match="y: "):
        answer(torch.cat([x, x]))
    answer(x)  # the batch is still open
    assert combine(given.x).shape == given.x.shape
    expert.close()
    until(lambda: comm.peers()[0].state != "live")
    with pytest.raises(m2n.PeerLost, match="expert rank 0"):
        send(*sent)
    with pytest.raises(ValueError, match=r"handle \d+: its comm, .*expert rank 0.*, is closed"):
        receive()


def test_a_handle_ends_with_its_comm(tmp_path: Path) -> None:
    pair, x = opened(tmp_path), torch.ones(3, SMALL.hidden)
    handle = ops.register(pair.comm)
    expert = ops.register(pair.experts[0])
    assert handle == ops.register(pair.comm) != expert
    send = compiled(functools.partial(ops.dispatch_send, handle))
    tensors = (x, torch.from_numpy(IDS), torch.from_numpy(WEIGHTS))
    send(*tensors)
    with pytest.raises(ValueError, match=f"handle {handle}: expected an expert rank's comm"):
        ops.combine_send(handle, x)
    pair.comm.close()
    with pytest.raises(ValueError, match=f"handle {handle}: its comm, .*attention rank 0.*, is closed"):
        send(*tensors)
    with pytest.raises(ValueError, match="is closed"):
        ops.register(pair.comm)
    for comm in pair.experts:
        comm.close()
    ops.unregister(expert)
    with pytest.raises(ValueError, match=f"handle {expert}: no comm has it"):
        ops.open_batch(expert)
    del pair, comm
    gc.collect()
    with pytest.raises(ValueError, match=f"handle {handle}: no comm has it"):
        send(*tensors)
    with pytest.raises(ValueError, match="handle 12345: no comm has it"):
        ops.combine_recv(12345, x)
    # Where dtypes are taken from the comm, it is the compiler that meets the error; old ones keep the words.
    with pytest.raises(Exception, match="handle 12345: no comm has it|Observed exception"):
        compiled(lambda x: ops.combine_recv(12345, x))(x)


def test_what_cannot_be_registered_is_refused(tmp_path: Path) -> None:
    with pytest.raises(TypeError, match="comm: expected m2n.AttentionComm or m2n.ExpertComm, got int"):
        ops.register(3)
    options = {"shape": SHAPE, "placement": TWO, "store": tmp_path}
    of_numpy = dataclasses.replace(config(), arrays="numpy")
    with m2n.ExpertComm(0, config=of_numpy, **options) as comm:
        with pytest.raises(ValueError, match=r"it gives out numpy arrays; make it with Config\(arrays='torch'\)"):
            ops.register(comm)
        with pytest.raises(ValueError, match="it is not registered; call"):
            ops.dispatch_recv(comm, 0)


def test_compiled_code_works_under_inference_mode(pair: Pair) -> None:
    with torch.inference_mode():
        check_both_sides(pair, compiled(both_sides), workload(), 0)
    check_both_sides(pair, compiled(both_sides), workload(), 1)
