# SPDX-License-Identifier: Apache-2.0
"""Where errors advise something, found in the sources, and what cannot be tried by test_advice.py, with the reason."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
_GRAPH, _GPU = "needs a CUDA graph: test_graphs.py", "needs a GPU that lacks something"
ELSEWHERE = {
    "make a comm in the child, or start processes with 'spawn'": "test_processes.py does both",
    "it was used before fork(), and cannot be used in the child; start processes": "test_processes.py",
    "in time, the rows of its result are NaN; call again to go on waiting": "test_device.py, the late reply",
    "a graph cannot be captured while the host waits for rows; name layer": _GRAPH,
    "memory cannot be allocated while a graph is captured; receive once": _GRAPH,
    "memory cannot be allocated while a graph is captured; make a route before": _GRAPH,
    "a comm cannot be made while a CUDA graph is captured: make it before": _GRAPH,
    ": it is read-only; give a tensor that can be written": "test_arguments.py gives one then",
    "timeout: verbs of a captured graph have the comm's; use set_timeout": _GRAPH,
    "a stream cannot wait by itself here (cuStreamBatchMemOp); leave out": _GPU,
    "its driver lets no NIC into its memory; leave out gpu_direct": _GPU,
    "need a flush before its kernels may read them, which m2n does not do; leave out gpu_direct": _GPU,
    "cannot share memory of a GPU between processes by file descriptors; run both": _GPU,
    "the two have no peer access": _GPU,
    "in the memory of a GPU; use transport='shm', 'tcp' or 'ucx' on all": "needs a GPU: test_stream_waits.py",
    "config.arrays: 'numpy' cannot hold the memory of": "needs a GPU",
    "pip install libucx-cu12 and name it by ucx_library, or leave out gpu_direct": "needs a UCX with CUDA",
    "pip install 'm2n[ucx]', or the system's package": "installs something: test_ucx.py shows the words",
    "gpu_direct needs puts in both directions": "test_gpu_direct.py has both sides put",
    "only emulates: it would wait for the peer to make progress; use 'auto'": "test_ucx.py, all others use auto",
    "use Config(transport='auto'), 'tcp' or 'ucx', without faults": "needs two hosts: test_channel.py",
    "lets TCP in, by which whoever reaches this host": "test_ucx.py starts UCX without it, and insecure",
    "install the same m2n on both": "needs another version: test_channel.py shows the words",
    "give it Config(bind=...) or M2N_BIND, an address": "test_channel.py, two hosts by name",
    "has a job key and {} is insecure; give all ranks the same": "test_channel.py, who does not have the key",
    "signals over {} cannot be held back yet; use transport='shm', or no faults": "test_faulty.py uses shm",
    "owe a reply: call combine_recv for what is in flight": "test_lives.py: why an index is not free",
    "are lost: call recover() for each": "test_lives.py: why an index is not free",
    "still have their memory: close and drop them": "test_lives.py: why an index is not free",
    "sent what is not answered: call dispatch_recv and combine_send, or recover()": "test_lives.py, likewise",
    "may be in use by graphs that were captured: make a new comm": _GRAPH,
    "; connect anew": "the attention side does so by itself",
    "are held already; raise the limit, end what holds it, or make the shape smaller": "test_shortages.py",
    "raise the limit (ulimit -f), or make the shape smaller": "test_shortages.py",
    "has no file descriptors left; raise its limit": "test_shortages.py",
    "(/sys/class/infiniband): take tcp between hosts": "test_two_hosts.py does",
    "set M2N_UCX_LIBRARY to a system's libucp.so.0": "needs RDMA devices",
    "is served by torch, which is not installed; install torch": "needs an environment without torch",
    "no batch within {} s; call again": "test_torch_ops.py, errors of the verbs",
    "m2n.torch_ops needs torch 2.4 or later: pip install": "needs an old torch",
    "the C++ headers were not installed with m2n; install m2n again": "needs a broken installation",
    "diagnose: give --role and --store together, or neither": "test_channel.py calls it both ways",
    # No advice, though it reads like one.
    "Native core of m2n. Use the names of the package m2n instead.": "documentation",
    "s so far: {} (job {}, name {}": "a note of what is waited for",
}

_VERBS = (
    "bring|call|check|choose|close|connect|copy|drop|give|install|leave|lower|make|name|pass|pip install|raise|receive|"
    "run|send|set|start|take|upgrade|use|wait"
)
_ADVICE = re.compile(rf"(?:^|[;:,.?] )(?:it |and |or )?(?:{_VERBS})\b", re.IGNORECASE)


def texts_of_cxx(source: str) -> Iterator[str]:
    yield from re.findall(r'"((?:\\.|[^"\\\n])*)"', re.sub(r'"\s*\n\s*"', "", re.sub(r"//[^\n]*", "", source)))


def texts_of_python(source: str) -> Iterator[str]:
    tree = ast.parse(source)
    scopes = [node for node in ast.walk(tree) if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef))]
    is_seen = {id(node.body[0].value) for node in scopes if node.body and isinstance(node.body[0], ast.Expr)}
    for node in ast.walk(tree):
        if isinstance(node, ast.JoinedStr):
            is_seen |= {id(part) for part in ast.walk(node)}
            yield "".join(str(part.value) if isinstance(part, ast.Constant) else "{}" for part in node.values)
        elif isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in is_seen:
            yield node.value


def all_advice() -> Iterator[str]:
    for folder in ("csrc", "bindings", "m2n"):
        for path in sorted((ROOT / folder).rglob("*")):
            if "examples" in path.parts or path.suffix not in (".cc", ".cu", ".h", ".py"):
                continue
            texts = texts_of_python if path.suffix == ".py" else texts_of_cxx
            for text in texts(path.read_text(encoding="utf-8")):
                if " " in text.strip() and _ADVICE.search(text):
                    yield text
