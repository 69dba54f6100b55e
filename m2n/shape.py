# SPDX-License-Identifier: Apache-2.0
"""What both sides agree on before they talk: the shape, the placement, and the settings of a comm."""

from __future__ import annotations

import dataclasses
import importlib.util
import math
import os
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Literal

from . import _C
from .checks import (
    flag_of,
    require_int,
    require_positive_seconds,
    require_seconds,
    require_text,
    require_version,
)

DTYPES = ("float32", "bfloat16", "float16")
FLOAT8 = "float8_e4m3fn"
_MAX_DELAY_US = 10_000_000


def _dtype_name(field: str, dtype: Any) -> str:
    """The name of a dtype given by name or as a torch, numpy or ml_dtypes dtype."""
    known = (*DTYPES, FLOAT8) if field == "dispatch_dtype" else DTYPES
    name = dtype.__name__ if isinstance(dtype, type) else getattr(dtype, "name", None) or str(dtype)
    name = name.removeprefix("torch.")
    if name not in known:
        raise ValueError(f"{field}: expected one of {', '.join(known)}, got {dtype!r}")
    return name


MAX_RANK = 2**31 - 1  # native code looks ranks up as numbers of 32 bits with a sign
MAX_LAYER = 2**32 - 1


@dataclasses.dataclass(frozen=True)
class Shape:
    """The shape of one exchange; equal on all ranks of a comm, or the handshake refuses.

    Args:
        hidden: elements of one token's hidden state.
        num_experts: experts of one layer over all expert ranks; ids are global, 0 to num_experts - 1.
        top_k: experts per token.
        max_tokens: tokens of one dispatch at most; longer prefills are sent in chunks.
        microbatches: how many dispatches of one rank may be in flight (paper section 4.1); at most 63.
        dispatch_dtype, combine_dtype: of rows to and from experts: "float32", "bfloat16", "float16", or such a torch,
            numpy or ml_dtypes dtype. dispatch_dtype may also be "float8_e4m3fn". dispatch_send then takes rows of any
            of the three and makes them float8 on their way, with a float32 scale for each 128 elements. The last block
            of a row may be shorter. scale = amax / 448, and 1 where that is not above 0, amax being the block's largest
            magnitude, NaN left out; the element is x / scale, to the nearest (even), at most +-448. NaN stays NaN; an
            infinite element makes its block NaN once scales are applied.
        reduce_at: "expert" (one reply row per token and expert rank: the weighted sum over that rank's experts; fewest
            bytes) or "attention" (one reply row per token and expert; bits do not depend on the placement).

    Raises:
        ValueError, TypeError: naming the field.
    """

    hidden: int
    num_experts: int
    top_k: int
    max_tokens: int
    microbatches: int = 1
    dispatch_dtype: Any = "bfloat16"
    combine_dtype: Any = "bfloat16"
    reduce_at: Literal["expert", "attention"] = "expert"

    def __post_init__(self) -> None:
        for field in ("hidden", "num_experts", "top_k", "max_tokens", "microbatches"):
            object.__setattr__(self, field, require_int(field, getattr(self, field), minimum=1))
        for field in ("dispatch_dtype", "combine_dtype"):
            object.__setattr__(self, field, _dtype_name(field, getattr(self, field)))
        if self.microbatches > _C.max_microbatches:
            raise ValueError(f"microbatches: expected at most {_C.max_microbatches}, got {self.microbatches}")
        if self.top_k > self.num_experts:
            raise ValueError(f"top_k: expected at most num_experts={self.num_experts}, got {self.top_k}")
        if self.reduce_at not in ("expert", "attention"):
            raise ValueError(f"reduce_at: expected 'expert' or 'attention', got {self.reduce_at!r}")

    def _native(self) -> _C.Shape:
        return _C.Shape(**dataclasses.asdict(self))


class Placement:
    """Which expert ranks host which expert: a plain value, ``Placement([[0], [0, 1], [1]])`` for three experts.

    An expert with several ranks is replicated: an attention rank takes its replicas in turn, token by token (`home`).

    Args:
        ranks_of_expert: for each global expert id the expert ranks that host it, at least one.
        num_expert_ranks: ranks in all; default: up to the highest that hosts anything.
        version: 0 to 2**32 - 1, higher in a placement that comes later. Attention ranks tell it with every message
            (docs/hosts.md), so that expert ranks know when nobody needs what they hosted before.

    Raises:
        ValueError, TypeError: an expert without a rank, a rank twice, or below zero; the version.
    """

    def __init__(
        self, ranks_of_expert: Iterable[Sequence[int]], num_expert_ranks: int | None = None, version: int = 0
    ) -> None:
        table = tuple(
            tuple(require_int("placement", rank, 0, MAX_RANK - 1) for rank in ranks) for ranks in ranks_of_expert
        )
        if not table:
            raise ValueError("placement: expected at least one expert")
        for expert, ranks in enumerate(table):
            if not ranks:
                raise ValueError(f"placement: expert {expert} has no expert rank")
            if len(set(ranks)) != len(ranks):
                raise ValueError(f"placement: expert {expert} names an expert rank twice: {list(ranks)}")
        highest = max(max(ranks) for ranks in table)
        if num_expert_ranks is None:
            num_expert_ranks = highest + 1
        num_expert_ranks = require_int("num_expert_ranks", num_expert_ranks, 0, MAX_RANK)
        if num_expert_ranks <= highest:
            raise ValueError(f"placement: expert rank {highest} does not exist, there are {num_expert_ranks}")
        self.ranks_of_expert = table
        self.num_expert_ranks = num_expert_ranks
        self.version = require_version(version)
        self._offsets = [0]
        for ranks in table:
            self._offsets.append(self._offsets[-1] + len(ranks))
        self._ranks = [rank for ranks in table for rank in ranks]

    @classmethod
    def block(cls, num_experts: int, expert_ranks: int, version: int = 0) -> Placement:
        """Neighbouring experts on one rank, in blocks whose sizes differ by at most one."""
        num_experts = require_int("num_experts", num_experts, 1)
        expert_ranks = require_int("expert_ranks", expert_ranks, 1)
        return cls([[expert * expert_ranks // num_experts] for expert in range(num_experts)], expert_ranks, version)

    def _native(self) -> _C.PlacementTable:
        """For routes; made once a comm."""
        return _C.PlacementTable(self._offsets, self._ranks)

    @property
    def num_experts(self) -> int:
        """How many experts there are."""
        return len(self.ranks_of_expert)

    @property
    def members(self) -> list[int]:
        """The expert ranks that attention ranks link with: those that host an expert, and in version 0 all. A rank
        that hosts nothing later on is about to leave, or has left."""
        return self.hosts if self.version > 0 else list(range(self.num_expert_ranks))

    @property
    def hosts(self) -> list[int]:
        """The expert ranks that host an expert. No dispatch waits for another one."""
        return sorted({rank for ranks in self.ranks_of_expert for rank in ranks})

    def experts_of(self, rank: int) -> list[int]:
        """The global ids that `rank` hosts, ascending: the order of `Batch.expert_offsets`."""
        return [expert for expert, ranks in enumerate(self.ranks_of_expert) if rank in ranks]

    def home(self, expert: int, token: int, attention_rank: int) -> int:
        """The expert rank that serves `expert` for the token at row `token` of attention rank `attention_rank`."""
        ranks = self.ranks_of_expert[expert]
        return ranks[(token + attention_rank) % len(ranks)]

    def __eq__(self, other: object) -> bool:
        return (
            isinstance(other, Placement)
            and self.ranks_of_expert == other.ranks_of_expert
            and self.num_expert_ranks == other.num_expert_ranks
            and self.version == other.version
        )

    def __hash__(self) -> int:
        return hash((self.ranks_of_expert, self.num_expert_ranks, self.version))

    def __repr__(self) -> str:
        table = [list(ranks) for ranks in self.ranks_of_expert]
        return f"Placement({table}, {self.num_expert_ranks}, version={self.version})"


@dataclasses.dataclass(frozen=True)
class Faults:
    """A slow network, put under a comm on the CPU: each signal it sends is held back by delay_us + U[0, jitter_us].

    Rows are written at once; no core is occupied meanwhile. With jitter, signals may overtake each other.

    Args:
        delay_us, jitter_us: microseconds, at most 10 s in all.
        seed: of the jitter. Each rank of a role has numbers of its own, the same in every run.

    Raises:
        ValueError, TypeError: naming the field.
    """

    delay_us: float = 0.0
    jitter_us: float = 0.0
    seed: int = 0

    def __post_init__(self) -> None:
        for field in ("delay_us", "jitter_us"):
            value = getattr(self, field)
            if isinstance(value, bool) or not isinstance(value, (int, float)):
                raise TypeError(f"{field}: expected microseconds, got {value!r}")
            if not (math.isfinite(value) and 0 <= value <= _MAX_DELAY_US):
                raise ValueError(f"{field}: expected microseconds from 0 to {_MAX_DELAY_US}, got {value!r}")
        if self.delay_us + self.jitter_us > _MAX_DELAY_US:
            raise ValueError(
                f"jitter_us: expected delay_us + jitter_us of at most {_MAX_DELAY_US}, "
                f"got {self.delay_us!r} + {self.jitter_us!r}"
            )
        object.__setattr__(self, "seed", require_int("seed", self.seed, 0, 2**64 - 1))

    @classmethod
    def _from_environment(cls) -> Faults | None:
        text = os.environ.get("M2N_FAULTS", "")
        if not text:
            return None
        expected = "M2N_FAULTS: expected something like 'delay_us=500,jitter_us=100,seed=1'"
        known = {"delay_us": float, "jitter_us": float, "seed": int}
        fields: dict[str, Any] = {}
        for part in text.split(","):
            key, _, value = part.partition("=")
            if key not in known or key in fields:
                raise ValueError(f"{expected}, got {key!r} in {text!r}")
            try:
                fields[key] = known[key](value)
            except ValueError:
                raise ValueError(f"{expected}, got {part!r} in {text!r}") from None
        try:
            return cls(**fields)
        except ValueError as error:
            raise ValueError(f"{expected}; {error}") from None

    def _transport(self, inner: str) -> str:
        """The native name of `inner` with these faults."""
        delay_ns, jitter_ns = int(self.delay_us * 1e3), int(self.jitter_us * 1e3)
        return f"faulty:delay_ns={delay_ns},jitter_ns={jitter_ns},seed={self.seed}:{inner}"


_MIN_KEY_CHARS = 16


def _flag(variable: str) -> bool:
    return flag_of(variable, os.environ.get(variable))


@dataclasses.dataclass(frozen=True)
class Config:
    """Settings of a comm that its peers need not share. The only place that reads environment variables.

    Args:
        job: separates jobs that use one store; default: M2N_JOB or "default".
        timeout_s: deadline of a verb that is given none, in seconds; no wait is endless.
        connect_timeout_s: deadline for reaching the store and for finding and joining all peers, in seconds.
        store_timeout_s: how long one attempt to reach the store may take, in seconds. The store may be served later:
            after each attempt a line on stderr says what is waited for, until connect_timeout_s.
        bind: where an expert rank listens for attention ranks of other hosts: an address, an interface or a network, as
            "10.0.0.5", "eth0", "10.0.0.0/16" or "[fd01::5]", each with or without ":port"; default: M2N_BIND, or
            nowhere. It takes a job_key, or insecure=True.
        job_key: a secret of the job's ranks, by which those of different hosts prove that they belong to it; default:
            M2N_JOB_KEY. Who does not have it joins nothing and writes nothing. Nothing is encrypted.
        insecure: the network is trusted; default: M2N_INSECURE=1 (or true, yes, on). Ranks of different hosts may join
            without a key; one that is set is still asked for. UCX may take TCP, by which whoever reaches this host can
            read and write all memory of this process.
        heartbeat_s: how often, in seconds, a rank tells those of other hosts that it is alive. One that is silent for
            three of its own periods is lost.
        give_up_s: a peer that is alive but owes an answer for so many seconds is dropped by the call that waits for it,
            which raises PeerLost. On an attention rank that is a reply, to an empty message too. On an expert rank in
            strict lockstep it is the message of a listed rank, after another one has sent. On a device once a launched
            wait has ended late, not in graphs. Default: None, never.
        transport: where windows lie; default: M2N_TRANSPORT, or "auto". All ranks of a comm need the same. "cuda": in
            the memory of GPUs. "shm": in that of the host, where ranks on GPUs link with ranks on CPUs. "auto": where
            the comm's device is, and ranks on CPUs reach other hosts as with "tcp". "tcp": in memory of the host, by
            messages over a connection for each link, which the handshake makes. Kernels write theirs there too, and a
            thread of their process sends them. "ucx": the same through UCX, for RDMA.
        arrays: what an expert rank gets its batches as: "torch", "numpy", "cupy", or "auto": torch if it was imported,
            else cupy on a GPU and numpy on the CPU.
        num_sms: on a GPU, the most thread blocks of a verb that moves rows, of 512 or 1,024 threads each. More is
            faster up to about half of the device's multiprocessors, and takes more from what computes beside it.
        stream_waits: outside graphs the stream itself waits for signals (cuStreamWaitValue; paper section 5) ahead
            of the kernels of combine_recv, and of a dispatch_recv with sync=False and attention_ranks: no
            multiprocessor is held meanwhile. combine_recv then waits for all expert ranks, also for those that it has
            sent no rows to. Needs transport "shm", "tcp" or "ucx"; nothing changes for comms on CPUs. Set
            CUDA_DEVICE_MAX_CONNECTIONS=32: a stream that waits may hold up others that share its hardware queue.
            Default: M2N_STREAM_WAITS=1, or False: kernels wait.
        faults: a slow network to imitate; default: M2N_FAULTS, as "delay_us=500,jitter_us=100,seed=1", or none.
        ucx_library: the path of libucp.so.0 (UCX 1.13 or later); default: M2N_UCX_LIBRARY, or None: the system's, else
            that of the package libucx-cu12 or libucx-cu13. It is loaded by the first comm with transport="ucx".
        ucx_way: "put": a message is puts, a fence and a put of its signal; "message": one active message; "auto": puts
            where the network has real ones (RDMA). Peers may differ.
        ucx_variables: settings of UCX for this comm, as {"NET_DEVICES": "mlx5_0:1"}. UCX also reads its own environment
            (UCX_TLS, UCX_NET_DEVICES, ...), which these overrule. Peers need a transport in common. Without `insecure`
            TLS is "^tcp" by default, and a list that lets TCP in is refused.
        gpu_direct: with transport "ucx" on a GPU, rows lie in its memory, both ways, and NICs read and write them there
            (GPUDirect RDMA); ids, weights and signals stay in that of the host. Needs puts, a UCX with CUDA, and a GPU
            that a NIC's writes reach in order, as Hopper's. The peer need not have it. Not run on such a NIC yet.
    """

    job: str = dataclasses.field(default_factory=lambda: os.environ.get("M2N_JOB", "default"))
    timeout_s: float = 30.0
    connect_timeout_s: float = 60.0
    store_timeout_s: float = 4.0
    bind: str = dataclasses.field(default_factory=lambda: os.environ.get("M2N_BIND", ""))
    job_key: str | None = dataclasses.field(default_factory=lambda: os.environ.get("M2N_JOB_KEY") or None, repr=False)
    insecure: bool = dataclasses.field(default_factory=lambda: _flag("M2N_INSECURE"))
    heartbeat_s: float = 1.0
    give_up_s: float | None = None
    transport: str = dataclasses.field(default_factory=lambda: os.environ.get("M2N_TRANSPORT") or "auto")
    arrays: Literal["auto", "torch", "numpy", "cupy"] = "auto"
    num_sms: int = 64
    stream_waits: bool = dataclasses.field(default_factory=lambda: _flag("M2N_STREAM_WAITS"))
    faults: Faults | None = dataclasses.field(default_factory=Faults._from_environment)
    ucx_library: str | None = dataclasses.field(default_factory=lambda: os.environ.get("M2N_UCX_LIBRARY") or None)
    ucx_way: Literal["auto", "message", "put"] = "auto"
    ucx_variables: Mapping[str, str] = dataclasses.field(default_factory=dict)
    gpu_direct: bool = False

    def __post_init__(self) -> None:
        for field in ("insecure", "stream_waits", "gpu_direct"):  # a word like "no" would count as true
            if not isinstance(getattr(self, field), bool):
                raise TypeError(f"{field}: expected True or False, got {getattr(self, field)!r}")
        for field in ("timeout_s", "connect_timeout_s", "store_timeout_s"):
            require_positive_seconds(field, getattr(self, field))
        if self.give_up_s is not None and not 0 < require_seconds("give_up_s", self.give_up_s) <= 1e9:
            raise ValueError(f"give_up_s: expected seconds > 0 or None, got {self.give_up_s!r}")
        if not 0.01 <= require_seconds("heartbeat_s", self.heartbeat_s) <= 3600:
            raise ValueError(f"heartbeat_s: expected seconds from 0.01 to 3600, got {self.heartbeat_s!r}")
        for field in ("job", "bind"):
            require_text(field, getattr(self, field))
        if self.job_key is not None and (not isinstance(self.job_key, str) or len(self.job_key) < _MIN_KEY_CHARS):
            raise ValueError(
                f"job_key: expected at least {_MIN_KEY_CHARS} characters, as `openssl rand -hex 16` prints"
            )
        require_int("num_sms", self.num_sms, 1)
        for field, known in (
            ("transport", ("auto", "shm", "cuda", "tcp", "ucx")),
            ("arrays", ("auto", "torch", "numpy", "cupy")),
            ("ucx_way", ("auto", "message", "put")),
        ):
            if getattr(self, field) not in known:
                raise ValueError(f"{field}: expected one of {', '.join(known)}, got {getattr(self, field)!r}")
        if self.faults is not None and not isinstance(self.faults, Faults):
            raise TypeError(f"faults: expected m2n.Faults or None, got {type(self.faults).__name__}")
        if self.ucx_library is not None and not isinstance(self.ucx_library, (str, os.PathLike)):
            raise TypeError(f"ucx_library: expected a path, got {self.ucx_library!r}")
        if self.ucx_library is not None and (not self.ucx_library or ";" in os.fspath(self.ucx_library)):
            raise ValueError(f"ucx_library: expected a path without ';', got {self.ucx_library!r}")
        if not isinstance(self.ucx_variables, Mapping):
            raise TypeError(f"ucx_variables: expected a dict, got {self.ucx_variables!r}")
        for key, value in self.ucx_variables.items():
            is_name = isinstance(key, str) and key.removeprefix("UCX_").replace("_", "").isalnum() and key.isupper()
            if not is_name or not isinstance(value, str) or ";" in value:
                raise ValueError(
                    f"ucx_variables: expected something like {{'TLS': 'tcp,self'}}, got {key!r}: {value!r}"
                )

    def _insecure_words(self) -> str:
        """What `insecure` means with these settings; "" without it."""
        if not self.insecure:
            return ""
        joins = "can join ranks" if self.job_key is None else "must show the job key to join ranks"
        return (
            f"insecure=True (M2N_INSECURE): the network must be trusted: whoever reaches this host {joins}, and where "
            "UCX takes TCP can read and write all memory of this process"
        )

    def _network(self, transport: str, device: str = "cpu") -> str:
        """The native name of the transport `tcp`, `ucx` or `auto` with these settings; `device` uses its windows."""
        options = {"device": device} if device.startswith("cuda") else {}
        if transport == "ucx":
            options |= {"way": self.ucx_way, "library": self.ucx_library or "", "beside": _ucx_of_package()}
            options |= {"insecure": "1"} if self.insecure else {}
            if self.gpu_direct:  # on "emulated" rows lie in memory of the host too, apart from the rest
                options["rows"] = f"gpudirect:{device}" if device.startswith("cuda") else "shm"
            options |= {key.removeprefix("UCX_"): value for key, value in self.ucx_variables.items()}
        return ";".join([transport, *(f"{key}={value}" for key, value in options.items() if value)])


def _ucx_of_package() -> str:
    """The library of an installed libucx-cu12 or libucx-cu13, or nothing."""
    package = importlib.util.find_spec("libucx")
    folders = (package.submodule_search_locations or []) if package else []
    paths = [os.path.join(folder, "lib", "libucp.so.0") for folder in folders]
    return next((path for path in paths if os.path.exists(path) and ";" not in path), "")
