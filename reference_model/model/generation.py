# SPDX-License-Identifier: Apache-2.0
"""GenerationRules: what generation_config.json asks of the next token, applied as transformers does, or refused."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ..errors import ConfigError, brief

if TYPE_CHECKING:
    import torch

# Options that would change tokens, and the values at which they do not. All others change nothing here: they are about
# sampling, for which the command has options of its own, about beams, caches or what a library returns.
_NEUTRAL: dict[str, tuple[Any, ...]] = {
    "num_beams": (1,),
    "num_return_sequences": (1,),
    "encoder_repetition_penalty": (1, 1.0),
    "encoder_no_repeat_ngram_size": (0,),
    "forced_bos_token_id": (),
    "forced_eos_token_id": ([],),
    "exponential_decay_length_penalty": (),
    "sequence_bias": ({}, []),
    "guidance_scale": (1, 1.0),
    "watermarking_config": (),
    "token_healing": (False,),
    "stop_strings": ([],),
    "max_time": (),
    "penalty_alpha": (0, 0.0),
    "dola_layers": (),
    "constraints": ([],),
    "force_words_ids": ([],),
}


# Options of a generation_config.json: transformers finds them in a config.json of old, too.
OPTIONS = frozenset(
    [
        *_NEUTRAL,
        *("repetition_penalty", "no_repeat_ngram_size", "min_length", "min_new_tokens", "bad_words_ids"),
        *("suppress_tokens", "begin_suppress_tokens", "eos_token_id", "max_length", "max_new_tokens", "do_sample"),
        *("temperature", "top_k", "top_p", "min_p", "top_h", "typical_p", "epsilon_cutoff", "eta_cutoff"),
        *("early_stopping", "length_penalty", "num_beam_groups", "diversity_penalty", "renormalize_logits"),
        *("remove_invalid_values", "decoder_start_token_id", "cache_implementation", "cache_config"),
        *("output_scores", "output_logits", "return_dict_in_generate", "prompt_lookup_num_tokens", "low_memory"),
    ]
)


@dataclass(frozen=True)
class GenerationRules:
    """Rules on the logits of a sequence's next token. Each field is the option of its name; the defaults do nothing."""

    repetition_penalty: float = 1.0
    no_repeat_ngram_size: int = 0
    min_length: int = 0  # with the prompt
    min_new_tokens: int = 0
    bad_words_ids: tuple[tuple[int, ...], ...] = ()
    suppress_tokens: tuple[int, ...] = ()
    begin_suppress_tokens: tuple[int, ...] = ()

    @classmethod
    def from_dict(cls, raw: Mapping[str, Any], vocab_size: int) -> GenerationRules:
        """Read a generation_config.json, or a config.json of old that holds such options; raises ConfigError naming the
        option."""
        for name, neutral in _NEUTRAL.items():
            value = raw.get(name)
            if value is not None and value not in neutral:
                raise ConfigError(f"option {name} = {brief(value)} of the generation config is not supported")
        words = raw.get("bad_words_ids") or []
        if not isinstance(words, list) or not all(isinstance(word, list) and word for word in words):
            raise ConfigError(f"bad_words_ids must be a list of lists of token ids, not {brief(words)}")
        return cls(
            repetition_penalty=_number(raw, "repetition_penalty", 1.0),
            no_repeat_ngram_size=_count(raw, "no_repeat_ngram_size"),
            min_length=_count(raw, "min_length"),
            min_new_tokens=_count(raw, "min_new_tokens"),
            bad_words_ids=tuple(_token_ids("bad_words_ids", word, vocab_size) for word in words),
            suppress_tokens=_token_ids("suppress_tokens", raw.get("suppress_tokens") or [], vocab_size),
            begin_suppress_tokens=_token_ids(
                "begin_suppress_tokens", raw.get("begin_suppress_tokens") or [], vocab_size
            ),
        )

    @property
    def changes_nothing(self) -> bool:
        return self == GenerationRules()

    def apply(
        self, logits_V: torch.Tensor, prompt_ids: list[int], output_ids: list[int], eos_token_ids: frozenset[int]
    ) -> torch.Tensor:
        """The logits [V] after the rules, in the order of transformers' processors; `eos_token_ids`: those that end."""
        import torch

        token_ids = prompt_ids + output_ids
        logits_V = logits_V.clone()
        if self.repetition_penalty != 1.0:
            seen = torch.tensor(sorted(set(token_ids)), device=logits_V.device)
            values = logits_V[seen]
            logits_V[seen] = torch.where(values < 0, values * self.repetition_penalty, values / self.repetition_penalty)
        banned = [*self._repeated(token_ids), *self._bad_words(token_ids, eos_token_ids), *self.suppress_tokens]
        if len(token_ids) < self.min_length or len(output_ids) < self.min_new_tokens:
            banned += eos_token_ids
        if not output_ids:
            banned += self.begin_suppress_tokens
        logits_V[banned] = -torch.inf
        return logits_V

    def _repeated(self, token_ids: list[int]) -> list[int]:
        """Tokens that would complete a run of so many tokens which was there before."""
        size = self.no_repeat_ngram_size
        if not size or len(token_ids) + 1 < size:
            return []
        last = token_ids[len(token_ids) - size + 1 :]
        starts = range(len(token_ids) - size + 1)
        return [token_ids[i + size - 1] for i in starts if token_ids[i : i + size - 1] == last]

    def _bad_words(self, token_ids: list[int], eos_token_ids: frozenset[int]) -> list[int]:
        return [
            last
            for *before, last in self.bad_words_ids
            if not (not before and last in eos_token_ids) and token_ids[len(token_ids) - len(before) :] == before
        ]


def _number(raw: Mapping[str, Any], name: str, default: float) -> float:
    value = default if raw.get(name) is None else raw[name]
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value < float("inf"):
        raise ConfigError(f"{name} must be a positive number, not {brief(value)}")
    return float(value)


def _count(raw: Mapping[str, Any], name: str) -> int:
    value = raw.get(name) or 0
    if not isinstance(value, int) or value < 0:
        raise ConfigError(f"{name} must be a number from 0 up, not {brief(value)}")
    return int(value)


def _token_ids(name: str, value: Any, vocab_size: int) -> tuple[int, ...]:
    if not isinstance(value, list) or not all(type(token) is int and 0 <= token < vocab_size for token in value):
        raise ConfigError(f"{name} must be a list of token ids below {vocab_size}, not {brief(value)}")
    return tuple(value)
