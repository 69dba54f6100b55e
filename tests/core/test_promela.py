# SPDX-License-Identifier: Apache-2.0
"""The protocol as a model in Promela: every order of steps of small cases, and each mistake that it must find.

What is modelled stands at the top of tests/core/promela/exchange.pml and loss.pml. Spin looks at all states: no
assertion fails (no unread row overwritten, none lost or doubled), and no run stops where a rank still waits. A second
look proves that there are no cycles, so every run is finite; with that, every wait ends, whatever the scheduling.
"""

from __future__ import annotations

from pathlib import Path

import pytest
from verified import DEADLOCK, finds, holds

pytestmark = [pytest.mark.slow, pytest.mark.promela]

OVERWRITTEN = r"assertion violated +!\(to_\w+\[.*\]\.unread\)"
DOUBLED = r"assertion violated \(\(got&to_attention\[.*\]\.groups\)==0\)"
LOST = r"assertion violated \(\(\(got\|given_up\)=="

# Two microbatches that need the retry slot, and one attention rank with two expert ranks of which one is lost.
TWO = "A=1 E=2 MB=2 LAPS=1 LOSSES=1"
ONE = "A=1 E=2 MB=1 LAPS=2 LOSSES=1"
STAGGERED = "E=2 MB=1 LAPS=2"
JOINER = "E=2 MB=1 LAPS=3 JOINER"

HOLDS = {
    "links of two ranks, one thread each": "exchange E=2 MB=2 LAPS=2 ONE_THREAD ALL_LINKED",
    "a thread per microbatch": "exchange E=1 MB=2 LAPS=1 ALL_LINKED",
    "zero rows": "exchange E=2 MB=1 LAPS=2 ALL_LINKED ANY_ROWS",
    "an idle rank, without an end to lingering": "exchange E=1 MB=1 LAPS=2 IDLE ENDLESS",
    "lockstep of two microbatches": "exchange E=2 MB=2 LAPS=2 STRICT ONE_THREAD ALL_LINKED",
    "lockstep with a thread per microbatch": "exchange E=2 MB=2 LAPS=2 STRICT ALL_LINKED",
    "lockstep with zero rows": "exchange E=2 MB=1 LAPS=2 STRICT ALL_LINKED ANY_ROWS",
    "both expert ranks lost": "loss A=1 E=2 MB=1 LAPS=2 LOSSES=2 DEADLINES",
    "a retry that is lost as well": "loss A=1 E=3 MB=1 LAPS=1 LOSSES=2",
    "three expert ranks, two microbatches": "loss A=1 E=3 MB=2 LAPS=1 LOSSES=1",
    "an attention rank lost": "loss A=2 E=2 MB=1 LAPS=1 LOSSES=1 KILL_SENDER",
    "failover inside combine_recv, one thread": f"loss {TWO} ONE_THREAD OWN_RETRY_ONLY DEADLINES",
    "resend of both before either is combined": f"loss {TWO} ONE_THREAD RESEND",
}
# Mistake: what it is seeded into, and what Spin must say.
SEEDED = {
    "a slot used before its reply was consumed": (f"exchange {STAGGERED} BUG_NO_CREDIT", OVERWRITTEN),
    "an idle rank waited for": ("exchange E=1 MB=1 LAPS=2 IDLE ENDLESS BUG_IDLE_IGNORED", DEADLOCK),
    "lockstep where zero rows are not sent": (
        f"exchange {STAGGERED} STRICT ALL_LINKED ANY_ROWS BUG_SKIP_EMPTY",
        DEADLOCK,
    ),
    "the state of a peer not looked at": (f"loss {ONE} BUG_NO_STATE", DEADLOCK),
    "no second look after LOST": (f"loss {ONE} BUG_NO_SECOND_LOOK", r"assertion violated +!\(was_here"),
    "a verdict of LOST that is not kept": (f"loss {ONE} BUG_VERDICT_NOT_KEPT", LOST),
    "what a lost peer owed not sent again": (f"loss {ONE} BUG_NOT_SENT_AGAIN", LOST),
    "a failed wait that consumes": (f"loss {ONE} DEADLINES BUG_FAILED_WAIT", DOUBLED),
    "a failed wait that stays in the queue": (f"loss {TWO} DEADLINES BUG_STAYS_IN_QUEUE", DEADLOCK),
    "a thread that drives only one of its retries": (f"loss {TWO} ONE_THREAD RESEND OWN_RETRY_ONLY", DEADLOCK),
}


@pytest.mark.essential
@pytest.mark.parametrize("case", HOLDS.values(), ids=HOLDS)
def test_promela_model_holds(case: str, tmp_path: Path) -> None:
    holds(case, tmp_path)


@pytest.mark.parametrize("case, expected", SEEDED.values(), ids=SEEDED)
def test_seeded_mistake_is_found(case: str, expected: str, tmp_path: Path) -> None:
    finds(case, expected, tmp_path)


def test_promela_staggered_start_holds(tmp_path: Path) -> None:
    holds(f"exchange {STAGGERED}", tmp_path)


def test_seeded_endless_linger_deadlocks_a_staggered_start(tmp_path: Path) -> None:
    finds(f"exchange {STAGGERED} BUG_ENDLESS_LINGER", DEADLOCK, tmp_path)


def test_promela_joiner_admitted_at_different_laps_holds(tmp_path: Path) -> None:
    holds(f"exchange {JOINER}", tmp_path)


def test_seeded_endless_linger_deadlocks_expert_ranks_that_admit_a_joiner_at_different_laps(tmp_path: Path) -> None:
    finds(f"exchange {JOINER} BUG_ENDLESS_LINGER", DEADLOCK, tmp_path)


def test_promela_two_microbatches_that_need_the_retry_slot_at_once_take_turns(tmp_path: Path) -> None:
    holds(f"loss {TWO} DEADLINES", tmp_path)


def test_seeded_two_microbatches_in_the_retry_slot_overwrite_an_unread_row(tmp_path: Path) -> None:
    finds(f"loss {TWO} BUG_TWO_IN_RETRY", OVERWRITTEN, tmp_path)


def test_promela_late_reply_after_a_loss_counts_no_row_twice(tmp_path: Path) -> None:
    holds(f"loss {ONE} DEADLINES", tmp_path)


def test_seeded_late_reply_of_a_replaced_peer_doubles_a_row_when_it_is_read(tmp_path: Path) -> None:
    finds(f"loss {ONE} BUG_READ_REPLACED", DOUBLED, tmp_path)


@pytest.mark.parametrize("case", [f"exchange {STAGGERED}", f"exchange {JOINER}", f"loss {TWO} DEADLINES"])
def test_promela_every_run_is_finite(case: str, tmp_path: Path) -> None:
    # No state is marked as progress, so any cycle at all is one without progress.
    holds(case, tmp_path, cycles=True)


def test_seeded_call_that_is_tried_for_ever_is_found_as_a_cycle(tmp_path: Path) -> None:
    finds(f"loss {ONE} DEADLINES BUG_TRIES_FOREVER", "non-progress cycle", tmp_path, cycles=True)
