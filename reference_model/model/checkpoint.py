# SPDX-License-Identifier: Apache-2.0
"""Checkpoint: the tensors of a safetensors directory, checked by their headers before any is read."""

from __future__ import annotations

import json
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import CheckpointError, brief
from .config import ModelConfig

if TYPE_CHECKING:
    import torch

_INDEX, _SINGLE = "model.safetensors.index.json", "model.safetensors"
HEAD = "lm_head.weight"
_MAX_HEADER_BYTES = 100_000_000  # the limit of the format itself
_FLOAT_TYPES = {"F32": "float32", "F16": "float16", "BF16": "bfloat16", "F64": "float64"}


@dataclass(frozen=True)
class TensorEntry:
    """Where a tensor lies."""

    path: Path
    shape: tuple[int, ...]
    dtype: str


class Checkpoint:
    """The tensors of one directory by name. Only headers are read here; `tensor` reads one tensor, on demand.

    device: where the tensors that are read come to lie.

    Raises CheckpointError, naming file and tensor, for files that are missing or truncated, or lack what their index
    promises.
    """

    def __init__(self, directory: str | Path, device: str = "cpu") -> None:
        self.directory, self.device = Path(directory), device
        if not self.directory.is_dir():
            raise CheckpointError(f"no checkpoint directory {self.directory}")
        self.entries: dict[str, TensorEntry] = {}
        # What lies in a directory beside the file that counts is of an older save: transformers reads it neither.
        if (self.directory / _SINGLE).exists():
            self.entries = _read_header(self.directory / _SINGLE)
        elif (self.directory / _INDEX).exists():
            self._read_shards(self.directory / _INDEX)
        else:
            raise CheckpointError(f"{self.directory} holds neither {_SINGLE} nor {_INDEX}")
        self._open_files: dict[Path, Any] = {}

    def _read_shards(self, index: Path) -> None:
        """All tensors of the files that the index names; of two of one name that in the later file, as transformers
        has it."""
        try:
            weight_map = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
            shards = {name: str(file) for name, file in weight_map.items()}
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise CheckpointError(f"{index} has no readable weight_map: {brief(error)}") from error
        for file in sorted(set(shards.values())):
            if Path(file).name != file:
                raise CheckpointError(f"{index} names a file outside its directory: {brief(file)}")
            path = self.directory / file
            if not path.exists():
                raise CheckpointError(f"{index.name} names {file}, which is missing from {self.directory}")
            self.entries.update(_read_header(path))
        for name, file in shards.items():
            if name not in self.entries:
                raise CheckpointError(f"{self.directory / file} lacks tensor {name}, which {index.name} places there")

    def tensor(self, name: str, dtype: torch.dtype) -> torch.Tensor:
        """Read one tensor, converted to dtype."""
        return self._file(name).get_tensor(name).to(self.device, dtype)

    def part(self, name: str, idx: int, dtype: torch.dtype) -> torch.Tensor:
        """Read element idx along the first dimension (one expert of a fused tensor), converted to dtype."""
        return self._file(name).get_slice(name)[idx].to(self.device, dtype).contiguous()

    def _file(self, name: str) -> Any:
        from safetensors import safe_open

        path = self.entries[name].path
        if path not in self._open_files:
            self._open_files[path] = safe_open(path, framework="pt")
        return self._open_files[path]


def _read_header(path: Path) -> dict[str, TensorEntry]:
    """Names, shapes and types in one safetensors file, with every tensor inside the file."""
    try:
        with path.open("rb") as file:
            size = file.seek(0, 2)
            file.seek(0)
            prefix = file.read(8)
            header_bytes = struct.unpack("<Q", prefix)[0] if len(prefix) == 8 else size
            if 8 + header_bytes > size or header_bytes > _MAX_HEADER_BYTES:
                raise CheckpointError(f"{path} is truncated or no safetensors file: {size} bytes, header cut short")
            header = json.loads(file.read(header_bytes))
        header.pop("__metadata__", None)
        entries: dict[str, TensorEntry] = {}
        for name, about in header.items():
            end = 8 + header_bytes + int(about["data_offsets"][1])
            if end > size:
                raise CheckpointError(f"{path} is truncated: tensor {name} ends at byte {end}, the file at byte {size}")
            entries[name] = TensorEntry(path, tuple(about["shape"]), str(about["dtype"]))
    except OSError as error:
        raise CheckpointError(f"cannot read {path}: {error.strerror or error}") from error
    except (ValueError, KeyError, TypeError, AttributeError, IndexError) as error:
        if isinstance(error, CheckpointError):
            raise
        raise CheckpointError(f"{path} has no readable safetensors header: {brief(error)}") from error
    return entries


@dataclass(frozen=True)
class ExpertNames:
    """How a checkpoint spells its experts: one tensor each, or one 3-D tensor for all of a layer."""

    prefix: str  # "mlp" or "block_sparse_moe"
    gate: str
    up: str
    down: str
    is_fused: bool

    @classmethod
    def of(cls, checkpoint: Checkpoint, config: ModelConfig) -> ExpertNames:
        """Look at the names in the files; without any experts there, the family's own names are meant."""
        names = checkpoint.entries
        is_mixtral = config.family == "mixtral"
        has_block = any(".block_sparse_moe." in name for name in names)
        has_mlp = any(".mlp.gate.weight" in name for name in names)
        prefix = "block_sparse_moe" if has_block or (is_mixtral and not has_mlp) else "mlp"
        if any(name.endswith(".experts.gate_up_proj") for name in names):
            return cls(prefix, "gate_up_proj", "gate_up_proj", "down_proj", True)
        has_w1 = any(name.endswith(".w1.weight") for name in names)
        has_gate = any(".experts.0.gate_proj.weight" in name for name in names)
        if has_w1 or (is_mixtral and not has_gate):
            return cls(prefix, "w1", "w3", "w2", False)
        return cls(prefix, "gate_proj", "up_proj", "down_proj", False)

    def router(self, layer: int) -> str:
        return f"model.layers.{layer}.{self.prefix}.gate.weight"

    def fused(self, layer: int, part: str) -> str:
        return f"model.layers.{layer}.{self.prefix}.experts.{part}"

    def expert(self, layer: int, expert_id: int, part: str) -> str:
        return f"model.layers.{layer}.{self.prefix}.experts.{expert_id}.{part}.weight"


def expected_shapes(config: ModelConfig, names: ExpertNames) -> dict[str, tuple[int, ...]]:
    """Every tensor the configuration calls for, with its shape."""
    query, key = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
    shapes: dict[str, tuple[int, ...]] = {
        "model.embed_tokens.weight": (config.vocab_size, config.hidden),
        "model.norm.weight": (config.hidden,),
    }
    shapes[HEAD] = (config.vocab_size, config.hidden)
    for layer, has_experts in enumerate(config.moe_layers):
        base = f"model.layers.{layer}"
        shapes[f"{base}.input_layernorm.weight"] = (config.hidden,)
        shapes[f"{base}.post_attention_layernorm.weight"] = (config.hidden,)
        for part, rows in (("q", query), ("k", key), ("v", key)):
            shapes[f"{base}.self_attn.{part}_proj.weight"] = (rows, config.hidden)
        shapes[f"{base}.self_attn.o_proj.weight"] = (config.hidden, query)
        if config.attention_bias:
            for part, rows in (("q", query), ("k", key), ("v", key), ("o", config.hidden)):
                shapes[f"{base}.self_attn.{part}_proj.bias"] = (rows,)
        if config.qk_norm != "none":
            per_head = config.qk_norm == "head"
            shapes[f"{base}.self_attn.q_norm.weight"] = (config.head_dim if per_head else query,)
            shapes[f"{base}.self_attn.k_norm.weight"] = (config.head_dim if per_head else key,)
        if has_experts:
            shapes[names.router(layer)] = (config.num_experts, config.hidden)
            shapes.update(_expert_shapes(config, names, layer))
        else:
            for part in ("gate_proj", "up_proj"):
                shapes[f"{base}.mlp.{part}.weight"] = (config.dense_hidden, config.hidden)
            shapes[f"{base}.mlp.down_proj.weight"] = (config.hidden, config.dense_hidden)
    return shapes


def _expert_shapes(config: ModelConfig, names: ExpertNames, layer: int) -> dict[str, tuple[int, ...]]:
    count, hidden, inner = config.num_experts, config.hidden, config.expert_hidden
    if names.is_fused:
        return {
            names.fused(layer, names.gate): (count, 2 * inner, hidden),
            names.fused(layer, names.down): (count, hidden, inner),
        }
    shapes: dict[str, tuple[int, ...]] = {}
    for expert_id in range(count):
        shapes[names.expert(layer, expert_id, names.gate)] = (inner, hidden)
        shapes[names.expert(layer, expert_id, names.up)] = (inner, hidden)
        shapes[names.expert(layer, expert_id, names.down)] = (hidden, inner)
    return shapes


def check(checkpoint: Checkpoint, config: ModelConfig) -> ExpertNames:
    """Compare all headers with the configuration; return how the experts are named.

    Raises CheckpointError for the first tensor that is missing, extra, of another shape or no float.
    """
    names = ExpertNames.of(checkpoint, config)
    shapes = expected_shapes(config, names)
    for name, shape in shapes.items():
        entry = checkpoint.entries.get(name)
        if entry is None and name == HEAD and config.tie_word_embeddings:
            continue
        if entry is None:
            raise CheckpointError(f"{checkpoint.directory} lacks tensor {name} {list(shape)}")
        if entry.shape != shape:
            raise CheckpointError(f"{entry.path}: tensor {name} has shape {list(entry.shape)}, expected {list(shape)}")
        if entry.dtype not in _FLOAT_TYPES:
            known = ", ".join(_FLOAT_TYPES)
            raise CheckpointError(f"{entry.path}: tensor {name} has type {entry.dtype}; supported are {known}")
    for name, entry in checkpoint.entries.items():
        # Old files carry the rotary frequencies.
        if name not in shapes and not name.endswith(".rotary_emb.inv_freq"):
            raise CheckpointError(f"{entry.path} holds tensor {name}, which {config.family} does not have")
    return names
