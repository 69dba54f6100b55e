# SPDX-License-Identifier: Apache-2.0
"""How full the ping-pong pipeline was: T_a, T_e, T_c of a traced run, the paper's constraints, and what to change.

T_a, T_e: what a microbatch of a layer costs an attention rank, and what one microbatch of every attention rank costs
an expert rank. T_c: how long a message is on its way, one way. T_f = max(T_a, T_e). With m microbatches the pipeline
of MegaScale-Infer (section 4.1) is full if (1) T_a ~ T_e, (2) T_c < T_f, (3) m T_f >= 2 (T_f + T_c).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from ..run_config import ATTENTION as ATTENTION_ROLE
from ..trace import ATTENTION, COMBINE_RECV, COMMUNICATING, COMPUTING, DISPATCH_SEND, ROUND, ROUTE, WAIT, Trace
from .messages import Messages, combine_delays, dispatch_delays, match

# (1): how far T_a and T_e may be apart.
BALANCE = 1.25
MIN_SAMPLES = 5
# A pipeline that lacks less than this of a full one is called full: the times are measured.
SHORTFALL = 1.05
# Above these shares of the ranks' time something is to be said.
MUCH_COMMUNICATING, MUCH_BUBBLE = 0.25, 0.35
MAX_ADVICE = 3

SHARES = ("busy", "communicating", "waiting", "other")

WAITED_FOR, HIDDEN, HELD_BACK = "messages that were waited for", "hidden", "held-back signals"


def summarise(traces: Sequence[Trace], microbatches: int, held_us: float = 0.0) -> dict[str, Any]:
    """What the traces of all ranks of a run say about its pipeline, as JSON values; times are microseconds.

    Args:
        microbatches: m of the run.
        held_us: how long a faulty transport held signals back on average, 0: it did not. Taken for T_c where no
            message was waited for.
    """
    messages = match(traces)
    ranks = _shares((*messages.attention, *messages.experts))
    mean = {name: _mean([rank[name] for rank in ranks]) for name in ("busy", "communicating")}
    t_a, t_e = map(_median_us, _samples_ns(messages))
    t_f = None if t_a is None or t_e is None else max(t_a, t_e)
    wire = _wire(messages, held_us)
    t_c = wire["t_c_us"]
    constraints = _constraints(microbatches, t_a, t_e, t_f, t_c)
    summary: dict[str, Any] = {
        "microbatches": microbatches,
        "t_a_us": t_a,
        "t_e_us": t_e,
        "t_f_us": t_f,
        **wire,
        "t_c_over_t_f": round(t_c / t_f, 4) if t_c is not None and t_f else None,
        "busy": mean["busy"],
        "communicating": mean["communicating"],
        "bubble": round(1 - mean["busy"] - mean["communicating"], 4) if ranks else None,
        "constraints": constraints,
        "ranks": ranks,
        "counts": _counts(traces),
    }
    summary["advice"] = _advice(summary)
    return summary


def samples_ns(traces: Sequence[Trace]) -> tuple[np.ndarray, np.ndarray]:
    """T_a and T_e of every microbatch of every layer with experts, in ns: what `summarise` gives the medians of."""
    return _samples_ns(match(traces))


def _samples_ns(messages: Messages) -> tuple[np.ndarray, np.ndarray]:
    with_tokens = [_with_tokens(trace) for trace in messages.attention]
    t_a = np.concatenate([_attention_ns(trace) for trace in messages.attention] or [np.zeros(0)])
    return t_a, _expert_ns(messages, with_tokens)


def _mean(values: list[float]) -> float:
    return round(sum(values) / len(values), 4) if values else 0.0


def _median_us(times_ns: np.ndarray) -> float | None:
    return round(float(np.median(times_ns)) / 1e3, 3) if len(times_ns) else None


def _shares(traces: Sequence[Trace]) -> list[dict[str, Any]]:
    """What each rank did from the first event of any attention rank to the last one, or the first dropped one."""
    attention = [trace for trace in traces if trace.role == ATTENTION_ROLE and len(trace.events)]
    begin_ns = min((int(trace.field("begin_ns").min()) for trace in attention), default=0)
    end_ns = max((int(trace.field("end_ns").max()) for trace in attention), default=0)
    cut_short = [int(trace.field("end_ns").max()) for trace in traces if trace.num_dropped and len(trace.events)]
    span_ns = max(min([end_ns, *cut_short]) - begin_ns, 0)
    ranks = []
    for trace in traces:
        first_ns, last_ns = (
            np.clip(trace.field(name), begin_ns, begin_ns + span_ns) for name in ("begin_ns", "end_ns")
        )
        kind, time_ns = trace.field("kind"), last_ns - first_ns
        times_ns = [int(time_ns[np.isin(kind, of)].sum()) for of in (COMPUTING, COMMUNICATING, (WAIT,))]
        shares = [round(each_ns / max(span_ns, 1), 6) for each_ns in times_ns]
        shares.append(max(round(1 - sum(shares), 6), 0.0))
        ranks.append({"role": trace.role, "rank": trace.rank, **dict(zip(SHARES, shares))})
    return ranks


def _keys(trace: Trace) -> np.ndarray:
    """One number per (step, layer, microbatch), for each event."""
    step, layer, microbatch = (trace.field(name) + 1 for name in ("step", "layer", "microbatch"))
    num_layers, num_microbatches = (int(column.max(initial=0)) + 1 for column in (layer, microbatch))
    return (step * num_layers + layer) * num_microbatches + microbatch


def _with_tokens(trace: Trace) -> np.ndarray:
    """For each event whether its microbatch had tokens: strict lockstep sends empty ones too."""
    keys = _keys(trace)
    return np.isin(keys, keys[trace.field("kind") == ATTENTION])


def _attention_ns(trace: Trace) -> np.ndarray:
    """What each microbatch of a layer with experts cost this rank."""
    kind = trace.field("kind")
    _, group = np.unique(_keys(trace), return_inverse=True)
    num_groups = int(group.max(initial=-1)) + 1
    is_part = np.isin(kind, (ATTENTION, ROUTE, DISPATCH_SEND, COMBINE_RECV))
    time_ns = np.where(is_part, trace.field("end_ns") - trace.field("begin_ns"), 0)
    total_ns = np.bincount(group, weights=time_ns, minlength=num_groups)
    counts = (np.bincount(group[kind == of], minlength=num_groups) for of in (ATTENTION, DISPATCH_SEND))
    return total_ns[np.logical_and(*counts)]


def _expert_ns(messages: Messages, with_tokens: list[np.ndarray]) -> np.ndarray:
    """What each microbatch of a layer cost an expert rank, for all attention ranks together.

    Where a batch holds them all, that is the batch. Batches of some of them share their time out among their ranks,
    and the k-th dispatches of all ranks add up.
    """
    per_round = [np.zeros(0)]
    for e, batches in enumerate(messages.batches):
        links = [link for link in messages.links if link.expert == e]
        num_ranks, has_tokens = np.zeros(len(batches.first), np.int64), np.zeros(len(batches.first), bool)
        for link in links:
            num_ranks[link.batch] += 1
            has_tokens[link.batch] |= with_tokens[link.attention][link.dispatch_send]
        share_ns = batches.duration_ns / np.maximum(num_ranks, 1)
        counts = has_tokens & (batches.send >= 0)
        is_counted = [counts[link.batch] for link in links]
        shares = [share_ns[link.batch][is_kept] for link, is_kept in zip(links, is_counted)]
        rounds = [
            np.stack((batches.microbatch[link.batch], link.round))[:, is_kept]
            for link, is_kept in zip(links, is_counted)
        ]
        if rounds:
            microbatch, k = np.concatenate(rounds, axis=1)
            _, group = np.unique(microbatch * (int(k.max(initial=0)) + 1) + k, return_inverse=True)
            per_round.append(np.bincount(group, weights=np.concatenate(shares)))
    return np.concatenate(per_round)


def _wire(messages: Messages, held_us: float) -> dict[str, Any]:
    """T_c, and where it was seen."""
    delays = (dispatch_delays(messages), combine_delays(messages))
    dispatch_ns, combine_ns = (each.waited_for for each in delays)
    if len(dispatch_ns) + len(combine_ns) < MIN_SAMPLES:
        # Of those that came late the fast ones are missing. They stand for all if most of the others may have taken
        # as long: then not a few came late, but the ranks began to wait late.
        late = [np.concatenate((each.waited_for, each.came_late)) for each in delays]
        at_most_ns = np.concatenate([each.at_most for each in delays])
        late_ns = np.concatenate(late)
        if len(late_ns) and (not len(at_most_ns) or np.median(late_ns) <= np.median(at_most_ns)):
            dispatch_ns, combine_ns = late
    both_ns = np.concatenate((dispatch_ns, combine_ns))
    t_c, source = _median_us(both_ns), WAITED_FOR
    if len(both_ns) < MIN_SAMPLES:
        t_c, source = (round(held_us, 3), HELD_BACK) if held_us > 0 else (None, HIDDEN)
    return {
        "t_c_us": t_c,
        "t_c_source": source,
        "t_c_samples": len(both_ns),
        "t_c_dispatch_us": _median_us(dispatch_ns),
        "t_c_dispatch_samples": len(dispatch_ns),
        "t_c_combine_us": _median_us(combine_ns),
        "t_c_combine_samples": len(combine_ns),
    }


def _constraints(
    m: int, t_a: float | None, t_e: float | None, t_f: float | None, t_c: float | None
) -> dict[str, dict[str, Any]]:
    """Whether each constraint holds (None: unknown) and its numbers.

    (3) is the condition of the paper, for T_a = T_e; needed_us is what a full pipeline needs whatever they are.
    """
    balanced: dict[str, Any] = {"holds": None, "t_e_over_t_a": None}
    if t_a and t_e:
        balanced = {"holds": max(t_a, t_e) <= BALANCE * min(t_a, t_e), "t_e_over_t_a": round(t_e / t_a, 4)}
    hop: dict[str, Any] = {"holds": None, "t_c_us": t_c, "t_f_us": t_f}
    full: dict[str, Any] = {"holds": None, "m_t_f_us": None, "round_us": None, "needed_us": None}
    if t_f:
        full["m_t_f_us"] = round(m * t_f, 3)
        full["holds"] = False if m < 2 else None
    if t_a and t_e and t_f and t_c is not None:
        hop["holds"] = t_c < t_f
        full["round_us"], full["needed_us"] = round(2 * (t_f + t_c), 3), round(t_a + t_e + 2 * t_c, 3)
        full["holds"] = m * t_f >= 2 * (t_f + t_c)
    return {"1": balanced, "2": hop, "3": full}


def _counts(traces: Sequence[Trace]) -> dict[str, int]:
    attention = [trace for trace in traces if trace.role == ATTENTION_ROLE]
    layers = [trace.field("layer") for trace in attention]
    with_experts = [trace.field("layer")[trace.field("kind") == DISPATCH_SEND] for trace in attention]
    return {
        "steps": max((int(trace.field("step").max(initial=-1)) + 1 for trace in attention), default=0),
        "layers": len({int(layer) for column in layers for layer in np.unique(column) if layer >= 0}),
        "layers_with_experts": len({int(layer) for column in with_experts for layer in np.unique(column)}),
        "rounds": sum(len(trace.of_kind(ROUND)) for trace in attention),
        "events": sum(len(trace.events) for trace in traces),
        "dropped": sum(trace.num_dropped for trace in traces),
    }


def _advice(summary: dict[str, Any]) -> list[str]:
    """At most three sentences, the most important first."""
    if summary["counts"]["rounds"]:
        return [
            "Decode steps ran as CUDA graphs, whose inside cannot be timed: T_a, T_e and T_c are of the steps with "
            "prompts; leave out --cuda-graphs to see the others."
        ]
    t_a, t_e, t_c, t_f = (summary[name] for name in ("t_a_us", "t_e_us", "t_c_us", "t_f_us"))
    if not t_a or not t_e or not t_f:
        return ["No microbatch was traced on its way through the experts: nothing can be said about the pipeline."]
    advice = []
    is_slow_wire = t_c is not None and t_c >= t_f
    if is_slow_wire:
        advice.append(
            f"T_c is {t_c / t_f:.1f} x T_f: the network is slower than compute, or ranks share cores; "
            "use larger microbatches, a faster link, or a core per rank."
        )
    m, full = summary["microbatches"], summary["constraints"]["3"]
    if full["needed_us"] is not None and full["needed_us"] > SHORTFALL * full["m_t_f_us"]:
        enough = math.ceil(2 * (1 + t_c / t_f))
        advice.append(
            f"m = {m} is too few for T_c/T_f = {t_c / t_f:.2f}: {enough} microbatches would fill the pipeline."
        )
    elif full["holds"] is False and t_c is None:
        advice.append(f"m = {m} is too few: attention and experts take turns; 3 microbatches would fill the pipeline.")
    if t_e > BALANCE * t_a:
        advice.append(
            f"T_e is {t_e / t_a:.1f} x T_a: the experts are the bottleneck; use more expert ranks, "
            "or fewer attention ranks for each."
        )
    elif t_a > BALANCE * t_e:
        advice.append(
            f"T_a is {t_a / t_e:.1f} x T_e: attention is the bottleneck; "
            "use more attention ranks for these expert ranks."
        )
    if summary["communicating"] > MUCH_COMMUNICATING and not is_slow_wire:
        advice.append(
            f"The ranks spend {summary['communicating']:.0%} of their time in the verbs: "
            "the microbatches are too small; use more sequences per microbatch."
        )
    if not advice and summary["bubble"] > MUCH_BUBBLE:
        advice.append(
            f"T_a, T_e, T_c and m fit, and still the ranks are idle for {summary['bubble']:.0%} of the time: "
            "microbatches of different size, ranks that run out of sequences, or processes that share cores."
        )
    seen = "T_c is hidden behind them" if t_c is None else "the pipeline is full"
    return advice[:MAX_ADVICE] or [f"T_a and T_e are balanced and {seen}: nothing needs to change."]


def describe(summary: dict[str, Any]) -> list[str]:
    """The summary in a few lines for people."""
    lines = []
    for role in dict.fromkeys(rank["role"] for rank in summary["ranks"]):
        of_role = [rank for rank in summary["ranks"] if rank["role"] == role]
        shares = {name: _mean([rank[name] for rank in of_role]) for name in SHARES}
        lines.append(f"{role} ranks: " + ", ".join(f"{share:.0%} {name}" for name, share in shares.items()))
    bubble = "" if summary["bubble"] is None else f"; bubble {summary['bubble']:.0%}"
    lines.append(describe_times(summary) + bubble)
    if summary["t_f_us"]:
        lines.append(_describe_constraints(summary))
    if summary["counts"]["dropped"]:
        lines.append(f"{summary['counts']['dropped']} later events were not kept")
    return lines + summary["advice"]


def describe_times(summary: dict[str, Any]) -> str:
    """T_a, T_e and T_c, and where T_c was seen."""
    t_c = {
        WAITED_FOR: f"{_us(summary['t_c_us'])} ({summary['t_c_samples']} {WAITED_FOR})",
        HELD_BACK: f"{_us(summary['t_c_us'])} ({HELD_BACK})",
        HIDDEN: HIDDEN,
    }[summary["t_c_source"]]
    return f"T_a {_us(summary['t_a_us'])}, T_e {_us(summary['t_e_us'])}, T_c {t_c}"


def _describe_constraints(summary: dict[str, Any]) -> str:
    about, m = summary["constraints"], summary["microbatches"]
    says = (
        (about["1"], f"T_e/T_a = {about['1']['t_e_over_t_a']:.2f}, T_a ~ T_e"),
        (about["2"], "T_c < T_f"),
        (about["3"], f"{m} T_f = {_us(about['3']['m_t_f_us'])} >= 2 (T_f + T_c) = {_us(about['3']['round_us'])}"),
    )
    words = {True: "yes", False: "no", None: "unknown"}
    return "; ".join(f"({idx}) {text}: {words[each['holds']]}" for idx, (each, text) in enumerate(says, 1))


def _us(time_us: float | None) -> str:
    """A time in three digits, or "?"."""
    if time_us is None:
        return "?"
    return f"{time_us / 1e3:.3g} ms" if time_us >= 1e3 else f"{time_us:.3g} us"
