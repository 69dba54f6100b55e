# SPDX-License-Identifier: Apache-2.0
"""RunConfig: one disaggregated run, as the command line, the launcher and every rank understand it."""

from __future__ import annotations

import dataclasses
import re
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import m2n

from .errors import InputError
from .model.config import ModelConfig

if TYPE_CHECKING:
    import torch

    from .model.sampling import SamplingConfig

DTYPES = ("float32", "bfloat16", "float16")
ATTENTION, EXPERT = "attention", "expert"
MAX_PEERS = 1024  # of a comm, as the library has it


@dataclass(frozen=True)
class RunConfig:
    """What all ranks of a run must agree on; plain values only, so that it travels as JSON."""

    checkpoint: str
    attention_ranks: int = 1
    expert_ranks: int = 1
    microbatches: int = 2
    max_new_tokens: int = 64
    dtype: str = "float32"
    ignore_eos: bool = False
    temperature: float = 0.0
    top_p: float = 1.0
    seed: int = 0
    max_batch: int = 8  # sequences at work on one attention rank
    max_tokens: int = 256  # tokens of one microbatch; longer prompts are computed in pieces
    dispatch_dtype: str | None = None  # of rows on their way to experts; None: dtype
    reduce_at: str = "expert"
    linger_us: float | None = 50.0  # of expert ranks, for other attention ranks; None: strict lockstep of all of them
    delay_us: float = 0.0  # every signal is held back so long, and up to jitter_us longer: a slow network
    jitter_us: float = 0.0
    record_routes: bool = False
    job: str = "generate"
    timeout_s: float = 120.0
    connect_timeout_s: float = 600.0  # ranks load their weights before they connect
    attention_device: str = "cpu"  # "cpu", "cuda", "cuda:N" or "emulated" (the launches of a GPU, on CPU threads)
    expert_device: str = "cpu"
    attention_threads: int = 1  # of each attention rank, for torch
    expert_threads: int = 1
    cuda_graphs: bool = False  # microbatches take their steps together, decode steps as one graph on each rank
    one_process: bool | None = None  # all ranks as threads of one process; None: where all are on one GPU

    def __post_init__(self) -> None:
        counts = [each.name for each in dataclasses.fields(self) if each.type == "int" and each.name != "seed"]
        for name in counts:
            value = getattr(self, name)
            if value < 1:
                raise InputError(f"{name.replace('_', '-')} must be at least 1, not {value}")
        if self.dtype not in DTYPES:
            raise InputError(f"dtype must be one of {', '.join(DTYPES)}, not {self.dtype!r}")
        if self.dispatch_dtype not in (None, self.dtype, "float8_e4m3fn"):
            raise InputError(
                f"dispatch-dtype must be float8_e4m3fn, or the dtype {self.dtype}, not {self.dispatch_dtype!r}"
            )
        if self.reduce_at not in ("expert", "attention"):
            raise InputError(f"reduce-at must be expert or attention, not {self.reduce_at!r}")
        if self.linger_us is not None and not 0 <= self.linger_us <= 1e9:
            raise InputError(f"linger-us must be microseconds from 0 to 1e9, not {self.linger_us!r}")
        for role in (ATTENTION, EXPERT):
            name = _device(f"{role}-device", self.device(role))
            object.__setattr__(self, f"{role}_device", name)
        try:
            config = self.comm_config
        except ValueError as error:
            raise InputError(str(error)) from error
        self._check_devices(config)

    def _check_devices(self, config: m2n.Config) -> None:
        """Refuse what this version of the library cannot link, and ranks that cannot live where they would be."""
        devices = [self.attention_device, self.expert_device]
        if "emulated" in devices and any(name.startswith("cuda") for name in devices):
            raise InputError(
                f"attention-device {devices[0]} with expert-device {devices[1]}: emulated stands in for a GPU where "
                "there is none; beside a GPU use cpu"
            )
        if self.is_one_process and self.attention_threads != self.expert_threads:
            raise InputError(
                f"attention-threads {self.attention_threads} and expert-threads {self.expert_threads}: ranks of one "
                "process (one-process, or all on one GPU) share torch's number of threads; give both the same"
            )
        if self.cuda_graphs and ("cpu" in devices or self.record_routes):
            raise InputError(
                f"cuda-graphs needs attention and experts on devices and no record-routes, which reads each route on "
                f"the host; attention-device is {devices[0]}, expert-device {devices[1]}"
            )
        if config.faults is not None and devices != ["cpu", "cpu"]:
            raise InputError(
                "delay-us, jitter-us and M2N_FAULTS hold back signals of CPUs only; leave them out, or use --device cpu"
            )

    def check_machine(self) -> None:
        """Refuse GPUs that this machine or this build does not have; imports torch where one is asked for."""
        for role in (ATTENTION, EXPERT):
            name = self.device(role)
            if not name.startswith("cuda"):
                continue
            import torch

            num_gpus = torch.cuda.device_count()
            if int(name.removeprefix("cuda:")) >= num_gpus or not m2n.features()["cuda"]:
                raise InputError(
                    f"{role}-device {name}: torch finds {num_gpus} GPUs, and m2n says: {m2n.features()['cuda_words']}; "
                    "use cpu, or emulated to test without a GPU"
                )

    def as_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)

    @property
    def torch_dtype(self) -> torch.dtype:
        import torch

        return {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}[self.dtype]

    @property
    def sampling(self) -> SamplingConfig:
        from .model.sampling import SamplingConfig

        return SamplingConfig(self.temperature, self.top_p, self.seed)

    def device(self, role: str) -> str:
        """Where a role's verbs run, by the name that m2n knows."""
        return self.attention_device if role == ATTENTION else self.expert_device

    def torch_device(self, role: str) -> str:
        """Where a role's tensors lie: emulated launches read and write memory of the host."""
        return "cpu" if self.device(role) == "emulated" else self.device(role)

    def max_peers(self, role: str) -> int:
        """A place for every rank of the other side, and for as many that replace one."""
        return 2 * (self.expert_ranks if role == ATTENTION else self.attention_ranks)

    def num_threads(self, role: str) -> int:
        """Threads of torch on each rank of a role."""
        return self.attention_threads if role == ATTENTION else self.expert_threads

    @property
    def is_one_process(self) -> bool:
        """Processes take turns on a GPU, and one that waits keeps the others out meanwhile; streams of one do not."""
        if self.one_process is not None:
            return self.one_process
        return self.attention_device == self.expert_device and self.attention_device.startswith("cuda")

    @property
    def is_lockstep(self) -> bool:
        return self.linger_us is None

    @property
    def comm_config(self) -> m2n.Config:
        """The settings of this run's comms. Without a delay it is the environment's to imitate a slow network."""
        kinds = {name.partition(":")[0] for name in (self.attention_device, self.expert_device)}
        config = m2n.Config(job=self.job, timeout_s=self.timeout_s, connect_timeout_s=self.connect_timeout_s)
        if len(kinds) != 1 and config.transport == "auto":
            # A GPU and a CPU meet in memory of the host, which both can write.
            config = dataclasses.replace(config, transport="shm")
        if self.delay_us == 0 and self.jitter_us == 0:
            return config
        faults = m2n.Faults(delay_us=self.delay_us, jitter_us=self.jitter_us, seed=self.seed)
        return dataclasses.replace(config, faults=faults)

    @property
    def ranks(self) -> list[tuple[str, int]]:
        """(role, rank) of every rank: attention ranks first."""
        attention = [(ATTENTION, rank) for rank in range(self.attention_ranks)]
        return attention + [(EXPERT, rank) for rank in range(self.expert_ranks)]

    def check_model(self, config: ModelConfig) -> None:
        """Refuse what the model or the library cannot do."""
        try:
            self.shape(config)
        except ValueError as error:  # it names the field: more microbatches than a comm has slots, say
            raise InputError(str(error)) from error
        max_peers = max(self.max_peers(ATTENTION), self.max_peers(EXPERT))
        if max_peers > MAX_PEERS:
            raise InputError(f"attention-ranks and expert-ranks must be at most {MAX_PEERS // 2}, not {max_peers // 2}")
        # As the library has it: places of a batch are 24 bits, rows of all peers' windows 31.
        slots = max_peers * (self.microbatches + 1)
        replies = config.top_k if self.reduce_at == "attention" else 1
        most = min((2**24 - 2) // config.top_k, (2**31 - 1) // (slots * replies))
        if self.max_tokens > most:
            raise InputError(f"max-tokens must be at most {most} for this model and these ranks, not {self.max_tokens}")
        if self.expert_ranks > config.num_experts:
            raise InputError(f"{self.expert_ranks} expert ranks, but the model has {config.num_experts} experts")

    def check_memory(self, config: ModelConfig) -> None:
        """Refuse windows that this host has no memory for; all of it is taken when ranks link."""
        if any(self.device(role).startswith("cuda") for role in (ATTENTION, EXPERT)):
            return
        from .model.precision import dispatch_bytes

        shape = self.shape(config)
        replies = config.top_k if self.reduce_at == "attention" else 1
        token_bytes = dispatch_bytes(shape) + replies * config.hidden * self.torch_dtype.itemsize
        token_bytes *= self.attention_ranks * self.expert_ranks * (self.microbatches + 1)
        free = free_bytes()
        if self.max_tokens * token_bytes > free:
            raise InputError(
                f"max-tokens must be at most {int(free / token_bytes)} for this model and these ranks, not "
                f"{self.max_tokens}: windows would take {self.max_tokens * token_bytes / 1e9:.1f} GB, and "
                f"{free / 1e9:.1f} GB are free"
            )

    def shape(self, config: ModelConfig) -> m2n.Shape:
        """What travels between the ranks of this run."""
        return m2n.Shape(
            hidden=config.hidden,
            num_experts=config.num_experts,
            top_k=config.top_k,
            max_tokens=self.max_tokens,
            microbatches=self.microbatches,
            dispatch_dtype=self.dispatch_dtype or self.dtype,
            combine_dtype=self.dtype,
            reduce_at=self.reduce_at,
        )

    def placement(self, config: ModelConfig) -> m2n.Placement:
        """Contiguous blocks of experts, sizes differing by at most one."""
        return m2n.Placement.block(config.num_experts, self.expert_ranks)

    def expert_groups(self, config: ModelConfig) -> list[list[int]]:
        """The global expert ids of each expert rank."""
        placement = self.placement(config)
        return [list(placement.experts_of(rank)) for rank in range(self.expert_ranks)]

    def share(self, attention_rank: int, num_prompts: int) -> list[int]:
        """The prompts (by number) that an attention rank takes."""
        return list(range(attention_rank, num_prompts, self.attention_ranks))


def free_bytes() -> float:
    """Memory of this host that is free, or can be made so."""
    try:
        lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
        return next(1024.0 * int(line.split()[1]) for line in lines if line.startswith("MemAvailable:"))
    except (OSError, StopIteration):
        return float("inf")


def _device(option: str, name: str) -> str:
    """The device in full: "cuda" is "cuda:0"."""
    if re.fullmatch(r"cpu|emulated|cuda(:\d+)?", name) is None:
        raise InputError(f"{option} must be cpu, cuda, cuda:N or emulated, not {name!r}")
    return "cuda:0" if name == "cuda" else name


def check_prompts(prompts: list[list[int]], config: ModelConfig) -> None:
    """Refuse token ids that the model cannot continue, by the number of the prompt."""
    if not prompts:
        raise InputError("no prompts")
    for idx, token_ids in enumerate(prompts):
        if not token_ids:
            raise InputError(f"prompt {idx} has no tokens")
        if len(token_ids) >= config.context:
            raise InputError(
                f"prompt {idx} has {len(token_ids)} tokens; the context of the model is {config.context}, "
                "the answer included"
            )
        if max(token_ids) >= config.vocab_size or min(token_ids) < 0:
            raise InputError(f"prompt {idx} has token ids outside the vocabulary of {config.vocab_size}")
