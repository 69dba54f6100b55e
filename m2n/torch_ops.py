# SPDX-License-Identifier: Apache-2.0
"""The four verbs as torch operators, for models under `torch.compile(fullgraph=True)`. Import it explicitly.

    import m2n.torch_ops as ops

    ops.register(comm)  # once, outside of compiled code
    ops.dispatch_send(comm, x, topk_ids, topk_weights, microbatch=0, layer=3)  # in compiled code or outside

Every function takes the comm or the handle that `register` gave. They are inference only: nothing has a gradient. They
call the public verbs, on the current stream. Errors of the verbs come out of compiled code unchanged. A comm that is
not registered when the code is compiled is an error of the compiler, which names the cause. All calls of a graph are
made, in program order, also those of different comms and those whose results are not used. Older torch needs
`torch._dynamo.config.capture_dynamic_output_shape_ops = True` for `dispatch_recv`.

Why there is an argument that carries nothing: the compiler may drop, merge or reorder operators that it takes for pure.
Each operator here therefore says that it writes to one tensor, `order`: a write to an argument is kept, and kept in
order, by every backend, and all of this is public. (Effects, `torch.library._register_effectful_op`, are private, and
inductor fails where a graph has two effects with results of unknown size: seen with torch 2.4 and 2.13.) One tensor for
all comms, as a graph that drives two of them must not exchange a send of one with a wait of the other.

`dispatch_recv` is two operators: inductor loses the size of a result that is unknown to it where the operator also
writes to an argument. So the first one receives and gives a ticket, and the second, pure one gives tensors for it.

Nothing that an operator returns is memory of the library: inductor computes in place in results that nobody else needs,
and would do so in a window that peers write to. Kernels that read rows in the window use `open_batch`, in an operator
of their own.

Fake kernels look at their arguments only, and never at the comm: a compiled graph may come from a cache on disk.
"""

from __future__ import annotations

import threading
import weakref
from typing import Any

try:
    import torch
except ImportError as error:
    raise ImportError("m2n.torch_ops needs torch 2.4 or later: pip install 'm2n[model]'") from error

from ._C import Error, SlotBusy, Timeout
from .attention import AttentionComm
from .comm import Comm
from .expert import Batch, ExpertComm
from .shape import FLOAT8

__all__ = [
    "combine_recv",
    "combine_send",
    "dispatch_recv",
    "dispatch_send",
    "open_batch",
    "order",
    "register",
    "unregister",
]

# Also where the module is first imported under inference_mode, it can be written to outside.
with torch.inference_mode(False):
    order = torch.zeros((), dtype=torch.uint8, device="cpu")
"""The tensor that orders the raw operators, torch.ops.m2n.*: their first argument."""


class _Entry:
    """What is known of a registered comm. Compiled code reads the constants; the comm is looked up by the handle."""

    def __init__(self, handle: int, comm: Comm) -> None:
        self.handle = handle
        self.comm = weakref.ref(comm)
        self.role = comm.role
        self.hidden = comm.shape.hidden
        self.combine_dtype = getattr(torch, comm.shape.combine_dtype)
        is_float8 = comm.shape.dispatch_dtype == FLOAT8
        self.rows_dtype = self.combine_dtype if is_float8 else getattr(torch, comm.shape.dispatch_dtype)
        self.num_experts = len(comm.placement.experts_of(comm.rank)) if isinstance(comm, ExpertComm) else 0
        self.device = torch.device(comm.device if comm.device.startswith("cuda") else "cpu")
        self.batches: dict[int, Batch] = {}  # by microbatch; received and not answered
        self.copies: dict[int, tuple[int, Any]] = {}  # by microbatch: ticket and tensors, received and not taken
        self.num_tickets = 0


# On the comm itself, since the compiler can follow an attribute, and not a dictionary with weak keys.
_ATTRIBUTE = "_torch_ops_entry"
_entries: dict[int, _Entry] = {}
_lock = threading.Lock()
_last_handle = 0


def register(comm: AttentionComm | ExpertComm) -> int:
    """Makes a comm known to the operators; not in compiled code. The handle ends with the comm, which it keeps not.

    Returns:
        The handle, an int > 0 that is never used again. The same comm has the same handle.

    Raises:
        ValueError: the comm is closed, or is an expert rank's that gives out other arrays than torch's.
    """
    global _last_handle
    if not isinstance(comm, (AttentionComm, ExpertComm)):
        raise TypeError(f"comm: expected m2n.AttentionComm or m2n.ExpertComm, got {type(comm).__name__}")
    if comm._native.is_closed:
        raise ValueError(f"comm: {comm!r} is closed")
    if isinstance(comm, ExpertComm) and comm._library != "torch":
        raise ValueError(f"comm: it gives out {comm._library} arrays; make it with Config(arrays='torch')")
    with _lock:
        entry: _Entry | None = getattr(comm, _ATTRIBUTE, None)
        if entry is None:
            _last_handle += 1
            entry = _entries[_last_handle] = _Entry(_last_handle, comm)
            vars(comm)[_ATTRIBUTE] = entry
            weakref.finalize(comm, _entries.pop, entry.handle, None).atexit = False
    return entry.handle


def unregister(comm: Comm | int) -> None:
    """The handle is unknown from now on. A batch that is open stays so; its peers wait for it until the comm closes.

    Raises:
        ValueError: it is not registered.
    """
    entry = _entry(comm)
    with _lock:
        _entries.pop(entry.handle, None)
        known = entry.comm()
        if known is not None:
            vars(known).pop(_ATTRIBUTE, None)


def open_batch(comm: Comm | int, microbatch: int = 0) -> Batch:
    """The batch that `dispatch_recv` got and `combine_send` has not answered.

    For an operator of your own that reads `batch.x`, the window, without a copy; and for answering it by hand, with the
    public `combine_send`, where the code between the two has failed.

    Raises:
        ValueError: there is none, or the comm is unknown or closed.
    """
    entry = _entry(comm)
    _comm_of(entry.handle, "expert")
    return _batch_of(entry, microbatch, "open_batch")


def dispatch_send(
    comm: Comm | int, x: Any, topk_ids: Any, topk_weights: Any, microbatch: int = 0, layer: int = 0
) -> None:
    """`AttentionComm.route` and `AttentionComm.dispatch_send`.

    Args:
        x: [T, hidden], as for the verb. Borrowed until `combine_recv`, which wants it again.
        topk_ids: int32 or int64 [T, top_k], -1 is padding. topk_weights: float [T, top_k].

    Raises:
        What the two raise. ValueError: the comm is unknown or closed.
    """
    torch.ops.m2n.dispatch_send(order, x, topk_ids, topk_weights, _handle(comm), microbatch, layer)


def combine_recv(comm: Comm | int, x: Any, microbatch: int = 0, timeout: float | None = None) -> Any:
    """`AttentionComm.combine_recv` into a new tensor.

    Args:
        x: what `dispatch_send` of this microbatch was given. It says T, and as it is needed here the compiler cannot
            use its memory for something else while the library borrows it.
        timeout: seconds; default: config.timeout_s.

    Returns:
        [T, hidden] of shape.combine_dtype.

    Raises:
        What the verb raises. ValueError: the comm is unknown or closed, or T is not that of the dispatch.
    """
    entry = _entry(comm)
    return torch.ops.m2n.combine_recv(order, x, entry.handle, microbatch, entry.combine_dtype, timeout)


def dispatch_recv(
    comm: Comm | int,
    layer: int,
    microbatch: int = 0,
    linger_us: float | None = 50.0,
    attention_ranks: list[int] | None = None,
    timeout: float | None = None,
    gather: bool = True,
) -> tuple[Any, Any, Any, Any]:
    """`ExpertComm.dispatch_recv` of this layer and microbatch, with `Batch.gather`. P differs from batch to batch.

    Args:
        linger_us, attention_ranks, timeout: as for the verb.
        gather: False leaves out the copy of the rows, for a kernel that reads them in the window (`open_batch`).

    Returns:
        x [P, hidden] of shape.dispatch_dtype, a row for each pair, expert by expert ([0, hidden] without `gather`);
        of shape.combine_dtype, scales applied, where rows are dispatched as float8;
        row_index_by_expert int32 [P], the pairs' rows in the window; expert_offsets int32 [E_local + 1];
        weights float32 [P]. All are copies, and are valid also after `combine_send`.

    Raises:
        Timeout: no batch by the deadline; call again. SlotBusy: the last one of this microbatch was not answered.
        What the verb raises. ValueError: the comm is unknown or closed.
    """
    entry = _entry(comm)
    ticket = torch.ops.m2n.dispatch_recv(
        order, entry.handle, layer, microbatch, linger_us, attention_ranks, timeout, gather
    )
    facts = (entry.hidden, entry.num_experts, entry.rows_dtype, entry.device)
    copies: tuple[Any, Any, Any, Any] = torch.ops.m2n.take_copies(ticket, entry.handle, *facts, gather)
    return copies


def combine_send(comm: Comm | int, y: Any, microbatch: int = 0, reduced: bool = False) -> None:
    """`ExpertComm.combine_send` for the open batch of this microbatch.

    Args:
        y: [P, hidden] expert by expert, float32, bfloat16 or float16; unweighted. With `reduced` [num_rows, hidden].

    Raises:
        What the verb raises; then the batch is still open. ValueError: no batch is, or the comm is unknown or closed.
    """
    torch.ops.m2n.combine_send(order, y, _handle(comm), microbatch, reduced)


def _entry(comm: Comm | int) -> _Entry:
    """Runs in the compiler too, hence its plain steps."""
    if isinstance(comm, int):
        entry = _entries.get(comm)
        if entry is None:
            raise ValueError(_unknown(comm))
        return entry
    found: _Entry | None = getattr(comm, _ATTRIBUTE, None)
    if found is None:
        raise ValueError("comm: it is not registered; call m2n.torch_ops.register(comm) before")
    return found


def _handle(comm: Comm | int) -> int:
    """Of an int nothing needs to be known before the operator runs: a compiled graph serves any handle."""
    return comm if isinstance(comm, int) else _entry(comm).handle


def _unknown(handle: int) -> str:
    return f"handle {handle}: no comm has it; it comes from m2n.torch_ops.register(comm), and ends with the comm"


def _comm_of(handle: int, role: str) -> Any:
    entry = _entries.get(handle)
    comm = None if entry is None else entry.comm()
    if entry is None or comm is None:
        raise ValueError(_unknown(handle))
    if comm._native.is_closed:
        entry.batches.clear()
        entry.copies.clear()
        raise ValueError(f"handle {handle}: its comm, {comm!r}, is closed")
    if entry.role != role:
        raise ValueError(f"handle {handle}: expected an {role} rank's comm, got {comm!r}")
    return comm


def _batch_of(entry: _Entry, microbatch: int, verb: str) -> Batch:
    batch = entry.batches.get(microbatch)
    if batch is None or batch._window is None:  # answered by hand
        raise ValueError(
            f"{verb}(handle={entry.handle}, microbatch={microbatch}): no batch is open; dispatch_recv first"
        )
    return batch


def _dispatch_send(
    order: Any, x: Any, topk_ids: Any, topk_weights: Any, handle: int, microbatch: int, layer: int
) -> None:
    comm = _comm_of(handle, "attention")
    comm.dispatch_send(x, comm.route(topk_ids, topk_weights), microbatch, layer)


def _combine_recv(order: Any, x: Any, handle: int, microbatch: int, dtype: Any, timeout: float | None) -> Any:
    comm = _comm_of(handle, "attention")
    return comm.combine_recv(microbatch, out=x.new_empty(x.shape, dtype=dtype), timeout=timeout)


def _dispatch_recv(
    order: Any,
    handle: int,
    layer: int,
    microbatch: int,
    linger_us: float | None,
    attention_ranks: list[int] | None,
    timeout: float | None,
    gather: bool,
) -> Any:
    comm = _comm_of(handle, "expert")
    entry = _entries[handle]
    where = f"dispatch_recv(handle={handle}, layer={layer}, microbatch={microbatch})"
    held = entry.batches.get(microbatch)
    if held is not None and held._window is not None:
        raise SlotBusy(f"{where}: layer {held.layer} of this microbatch was not answered; combine_send first")
    batch = comm.dispatch_recv(layer, microbatch, linger_us, attention_ranks, timeout=timeout)
    if batch is None:
        raise Timeout(f"{where}: no batch within {comm.config.timeout_s if timeout is None else timeout} s; call again")
    entry.batches[microbatch] = batch
    rows = batch.gather() if gather else batch.x.new_empty((0, comm.shape.hidden), dtype=entry.rows_dtype)
    lists = (batch.row_index_by_expert, batch.expert_offsets, batch.weights)
    entry.num_tickets += 1
    # One for each microbatch at most: where nobody takes it, the next one goes in its place.
    entry.copies[microbatch] = (entry.num_tickets, (rows, *(tensor.clone() for tensor in lists)))
    return torch.tensor([microbatch, entry.num_tickets], device="cpu")


def _take_copies(ticket: Any, handle: int, *facts: Any) -> tuple[Any, Any, Any, Any]:
    copies: tuple[Any, Any, Any, Any] | None
    microbatch, number = ticket.tolist()
    of, copies = _entries[handle].copies.pop(microbatch, (0, None))
    if of != number or copies is None:
        raise Error(f"take_copies(handle={handle}, microbatch={microbatch}): taken, or a later batch has come")
    return copies


def _combine_send(order: Any, y: Any, handle: int, microbatch: int, reduced: bool) -> None:
    comm = _comm_of(handle, "expert")
    entry = _entries[handle]
    comm.combine_send(_batch_of(entry, microbatch, "combine_send"), y, reduced)
    entry.batches.pop(microbatch, None)


def _fake_nothing(*args: Any) -> None:
    return None


def _fake_combine_recv(order: Any, x: Any, handle: int, microbatch: int, dtype: Any, timeout: float | None) -> Any:
    return x.new_empty(x.shape, dtype=dtype)


def _fake_dispatch_recv(*args: Any) -> Any:
    return torch.empty(2, dtype=torch.int64, device="cpu")


def _fake_take_copies(
    ticket: Any, handle: int, hidden: int, num_experts: int, dtype: Any, device: Any, gather: bool
) -> tuple[Any, Any, Any, Any]:
    num_pairs = torch.library.get_ctx().new_dynamic_size()
    return (
        torch.empty((num_pairs if gather else 0, hidden), dtype=dtype, device=device),
        torch.empty(num_pairs, dtype=torch.int32, device=device),
        torch.empty(num_experts + 1, dtype=torch.int32, device=device),
        torch.empty(num_pairs, dtype=torch.float32, device=device),
    )


_OPERATORS = (
    (
        "dispatch_send(Tensor(a!) order, Tensor x, Tensor topk_ids, Tensor topk_weights, SymInt handle, "
        "SymInt microbatch, SymInt layer) -> ()",
        _dispatch_send,
        _fake_nothing,
    ),
    (
        "combine_recv(Tensor(a!) order, Tensor x, SymInt handle, SymInt microbatch, ScalarType dtype, "
        "float? timeout) -> Tensor",
        _combine_recv,
        _fake_combine_recv,
    ),
    (
        "dispatch_recv(Tensor(a!) order, SymInt handle, SymInt layer, SymInt microbatch, float? linger_us, "
        "SymInt[]? attention_ranks, float? timeout, bool gather) -> Tensor",
        _dispatch_recv,
        _fake_dispatch_recv,
    ),
    (
        "take_copies(Tensor ticket, SymInt handle, SymInt hidden, SymInt num_experts, ScalarType dtype, "
        "Device device, bool gather) -> (Tensor x, Tensor row_index_by_expert, Tensor expert_offsets, Tensor weights)",
        _take_copies,
        _fake_take_copies,
    ),
    (
        "combine_send(Tensor(a!) order, Tensor y, SymInt handle, SymInt microbatch, bool reduced) -> ()",
        _combine_send,
        _fake_nothing,
    ),
)


def _define() -> None:
    # They wait on the host, which no CUDA graph can hold; inductor cuts its graphs there (torch 2.8 and later).
    known = (getattr(torch.Tag, name, None) for name in ("pt2_compliant_tag", "cudagraph_unsafe"))
    tags = tuple(tag for tag in known if tag is not None)
    for schema, implementation, fake in _OPERATORS:
        name = f"m2n::{schema.partition('(')[0]}"
        torch.library.define(name, schema[schema.index("(") :], tags=tags)
        torch.library.impl(name, "default", implementation)  # every device: the verb knows where its memory is
        torch.library.register_fake(name, fake)


_define()
