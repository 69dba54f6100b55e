# SPDX-License-Identifier: Apache-2.0
"""Runs under torchrun, or started by hand with the variables that torchrun sets: each process takes its role from its
rank, and the first one reports for all."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import json
import os
import socket
import sys
import time
from datetime import timedelta
from typing import Any

import m2n

from .errors import InputError, brief
from .launcher import RankFailed
from .result import RunResult
from .run_config import ATTENTION, RunConfig
from .worker import run_rank, settle

_VARIABLES = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
_LEAVE_S = 5.0
_LOOK_S = 1.0
_TELL_S = 5.0


def is_torchrun() -> bool:
    """Was this process started by torchrun, or as it starts processes?"""
    return all(name in os.environ for name in _VARIABLES)


def _number(name: str) -> int:
    if not os.environ[name].isdecimal():
        raise InputError(f"{name}: expected a number, as torchrun sets it, got {os.environ[name]!r}")
    return int(os.environ[name])


def global_rank() -> int:
    return _number("RANK")


def run_under_torchrun(run: RunConfig, prompts: list[list[int]]) -> RunResult | None:
    """Be one rank of the run: 0 to M - 1 are attention ranks, the rest expert ranks.

    Returns the result of all in the process of rank 0, and None in the others.
    """
    rank, world_size = global_rank(), _number("WORLD_SIZE")
    if world_size != len(run.ranks):
        raise InputError(
            f"torchrun started {world_size} processes; {run.attention_ranks} attention ranks and "
            f"{run.expert_ranks} expert ranks need {len(run.ranks)}"
        )
    if rank >= world_size:
        raise InputError(f"RANK: expected 0 to {world_size - 1}, as WORLD_SIZE is {world_size}, got {rank}")
    if run.one_process:
        raise InputError(
            "torchrun starts a process for each rank, but with --one-process they are threads of one process: run "
            "m2n-generate by itself"
        )
    run = dataclasses.replace(run, one_process=False)
    role, role_rank = run.ranks[rank]
    store, _served = _store(rank, run)
    events: list[dict[str, Any]] = []
    result = RunResult(run, prompts)

    def emit(event: dict[str, Any]) -> None:
        events.append({**event, "role": role, "rank": role_rank})
        if rank == 0:
            result.add(events[-1])

    share = run.share(role_rank, len(prompts)) if role == ATTENTION else []
    own = {idx: prompts[idx] for idx in share}
    try:
        run_rank(run, role, role_rank, own, store, emit, meet=functools.cache(settle))
    except Exception as error:
        store.set("failed", f"{role} rank {role_rank}: {error}")
        raise
    if rank != 0:
        store.set(f"result/{rank}", json.dumps(events))
        _await(store, "end")
        store.set(f"left/{rank}", "1")
        return None
    for other in range(1, world_size):
        _await(store, f"result/{other}")
        for event in json.loads(store.get(f"result/{other}")):
            result.add(event)
    store.set("end", "1")
    with contextlib.suppress(RuntimeError):  # who serves the store goes last
        store.wait([f"left/{other}" for other in range(1, world_size)], timedelta(seconds=_LEAVE_S))
    return result


def _await(store: Any, key: str) -> None:
    """Waits for a rank that may still be generating, however long; but not for one that has failed."""
    while True:
        try:
            return store.wait([key], timedelta(seconds=_LOOK_S))
        except RuntimeError:  # it is not there yet, or the store has gone, which the next call raises
            if store.check(["failed"]):
                raise RankFailed(f"another rank failed: {store.get('failed').decode()}") from None


def _await_server(host: str, port: int, most_s: float) -> None:
    """Waits for the store's server where a signal can end it: TCPStore waits in native code."""
    began, is_told = time.monotonic(), False
    while True:
        try:
            return socket.create_connection((host, port), timeout=_LOOK_S).close()
        except OSError as error:  # it may not be there yet, nor its name
            waited_s = time.monotonic() - began
            if waited_s > most_s:
                raise
            if waited_s > _TELL_S and not is_told:
                is_told = True
                print(f"waits for a store at {host}:{port} (MASTER_ADDR, MASTER_PORT): {error}", file=sys.stderr)
            time.sleep(0.1)


def _store(rank: int, run: RunConfig) -> tuple[Any, Any]:
    """torchrun's own store where it keeps one, or one that rank 0 serves, as long as it keeps the second result."""
    from torch.distributed import PrefixStore, TCPStore

    host, port = os.environ["MASTER_ADDR"], _number("MASTER_PORT")
    served = None
    if rank == 0 and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True":
        served = m2n.host_store(f"tcp://{f'[{host}]' if ':' in host else host}:{port}")  # at this address alone
    timeout = timedelta(seconds=run.connect_timeout_s)
    try:
        _await_server(host, port, run.connect_timeout_s)
        store = TCPStore(host, port, is_master=False, timeout=timeout, wait_for_workers=False)
    except (OSError, RuntimeError) as error:
        raise RankFailed(f"no store at {host}:{port} (MASTER_ADDR, MASTER_PORT): {brief(error)}") from error
    # A restarted run must not find the addresses of the one before.
    return PrefixStore(f"m2n/{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}", store), served
