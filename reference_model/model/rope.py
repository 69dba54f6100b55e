# SPDX-License-Identifier: Apache-2.0
"""Rotary position embeddings: which frequencies a config.json asks for (default, linear, dynamic, yarn, llama3)."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ..errors import ConfigError, brief

if TYPE_CHECKING:
    import torch

_OPTIONS: dict[str, tuple[str, ...]] = {
    "default": (),
    "linear": ("factor",),
    "dynamic": ("factor",),  # it stretches what lies behind max_position_embeddings, where no sequence of ours gets
    "yarn": ("factor", "attention_factor", "beta_fast", "beta_slow", "mscale", "mscale_all_dim", "truncate"),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor"),
}
_REQUIRED: dict[str, tuple[str, ...]] = {
    "linear": ("factor",),
    "dynamic": ("factor",),
    "yarn": ("factor",),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor"),
}


@dataclass(frozen=True)
class RopeConfig:
    """Frequencies of the rotary embedding; `options` holds what its type needs beyond theta."""

    kind: str
    theta: float
    dim: int  # of a head, all of it rotated
    original_context: int
    context: int  # most positions: what config.json says, or what the stretched frequencies are made for
    options: Mapping[str, Any]

    @classmethod
    def from_dict(cls, raw: Mapping[str, Any], theta: float, head_dim: int, context: int) -> RopeConfig:
        """Read rope_parameters (or the older rope_scaling); raises ConfigError naming the option."""
        given = raw.get("rope_scaling") or raw.get("rope_parameters") or {}
        if not isinstance(given, Mapping):
            raise ConfigError(f"rope_parameters must be an object, not {brief(given)}")
        options = {name: value for name, value in given.items() if value is not None}
        kind = options.pop("rope_type", None) or options.pop("type", None) or "default"
        options.pop("type", None)
        if kind not in _OPTIONS:
            raise ConfigError(f"rope_type {kind!r} is not supported; supported are {', '.join(_OPTIONS)}")
        theta = float(options.pop("rope_theta", theta))
        partial = options.pop("partial_rotary_factor", raw.get("partial_rotary_factor"))
        if partial not in (None, 1, 1.0):
            raise ConfigError(f"partial_rotary_factor = {partial!r} is not supported")
        original = options.pop("original_max_position_embeddings", context)
        original = raw.get("original_max_position_embeddings") or original
        for name in options:
            if name not in _OPTIONS[kind]:
                raise ConfigError(f"option {name} of rope_type {kind!r} is not supported")
        for name in _REQUIRED.get(kind, ()):
            if name not in options:
                raise ConfigError(f"rope_type {kind!r} needs the option {name}")
        for name, value in options.items():
            is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
            if name != "truncate" and not (is_number and (value > 0 or (value == 0 and name != "factor"))):
                raise ConfigError(f"option {name} of rope_type {kind!r} must be a positive number, not {brief(value)}")
        if kind in ("linear", "yarn"):
            trained = int(original) if kind == "yarn" else context
            context = max(context, int(trained * options["factor"]))
        return cls(kind, theta, head_dim, int(original), context, options)

    def frequencies(self) -> tuple[torch.Tensor, float]:
        """Inverse frequencies float32 [head_dim / 2] and the factor on cosine and sine."""
        import torch

        exponents = torch.arange(0, self.dim, 2, dtype=torch.int64).to(torch.float32) / self.dim
        inverse = 1.0 / (self.theta**exponents)
        if self.kind == "linear":
            return inverse / self.options["factor"], 1.0
        if self.kind == "llama3":
            return self._llama3(inverse), 1.0
        if self.kind == "yarn":
            return self._yarn(self.theta**exponents), self._yarn_attention_factor()
        return inverse, 1.0

    def _llama3(self, inverse: torch.Tensor) -> torch.Tensor:
        import torch

        factor, low, high = (self.options[name] for name in _REQUIRED["llama3"])
        wavelength = 2 * math.pi / inverse
        scaled = torch.where(wavelength > self.original_context / low, inverse / factor, inverse)
        smooth = (self.original_context / wavelength - low) / (high - low)
        smoothed = (1 - smooth) * scaled / factor + smooth * scaled
        is_medium = ~(wavelength < self.original_context / high) & ~(wavelength > self.original_context / low)
        return torch.where(is_medium, smoothed, scaled)

    def _yarn(self, position_frequencies: torch.Tensor) -> torch.Tensor:
        import torch

        def correction_dim(num_rotations: float) -> float:
            turns = math.log(self.original_context / (num_rotations * 2 * math.pi))
            return self.dim * turns / (2 * math.log(self.theta))

        low = correction_dim(self.options.get("beta_fast") or 32)
        high = correction_dim(self.options.get("beta_slow") or 1)
        if self.options.get("truncate", True):
            low, high = math.floor(low), math.ceil(high)
        low, high = max(low, 0), min(high, self.dim - 1)
        if low == high:
            high += 0.001  # a ramp needs a width
        ramp = torch.clamp((torch.arange(self.dim // 2, dtype=torch.float32) - low) / (high - low), 0, 1)
        extrapolated = 1.0 / position_frequencies
        interpolated = 1.0 / (self.options["factor"] * position_frequencies)
        return interpolated * ramp + extrapolated * (1 - ramp)

    def _yarn_attention_factor(self) -> float:
        given = self.options.get("attention_factor")
        if given is not None:
            return float(given)

        def mscale(scale: float, weight: float = 1.0) -> float:
            return 1.0 if scale <= 1 else 0.1 * weight * math.log(scale) + 1.0

        factor = self.options["factor"]
        weight, weight_all = self.options.get("mscale"), self.options.get("mscale_all_dim")
        if weight and weight_all:
            return mscale(factor, weight) / mscale(factor, weight_all)
        return mscale(factor)
