# SPDX-License-Identifier: Apache-2.0
"""Lives and links as a model in Promela: an index that is given back and used again, links that are made again.

What is modelled stands at the top of tests/core/promela/lives.pml. Spin looks at all states: no row of an old link is
delivered on a new one, nothing is given back while a verb uses it, there are never two live links of one rank, no
caller misses a loss, every wait ends and no index is kept for ever.
"""

from __future__ import annotations

from pathlib import Path

import pytest
from verified import DEADLOCK, finds, holds

pytestmark = [pytest.mark.promela]

ONE_INDEX = "lives A=1 E=1 INDICES=1 LINKS=2 SLOTS=1 LAPS=2 LOSSES=1"
SHORT = "lives A=1 E=1 INDICES=1 LINKS=2 SLOTS=1 LAPS=1 LOSSES=1"
TWO_INDICES = "lives A=1 E=1 INDICES=2 LINKS=2 SLOTS=1 LAPS=1 LOSSES=1"
THREE_LINKS = "lives A=1 E=1 INDICES=2 LINKS=3 SLOTS=1 LAPS=1 LOSSES=0"

HOLDS = {
    "cut and linked again": ONE_INDEX,
    "ranks of one process": f"{ONE_INDEX} SHARED",
}
HOLDS_TOO = {
    "two indices, so that handshakes overlap": TWO_INDICES,
    "two threads that serve": f"{ONE_INDEX} TWO_THREADS",
    "two slots": "lives A=1 E=1 INDICES=1 LINKS=2 SLOTS=2 LAPS=1 LOSSES=1",
    "cut twice": "lives A=1 E=1 INDICES=1 LINKS=3 SLOTS=1 LAPS=2 LOSSES=2",
    "two lives of an attention rank": "lives A=2 E=1 INDICES=1 LINKS=2 SLOTS=1 LAPS=1 LOSSES=0",
    "two lives of an expert rank": "lives A=1 E=2 INDICES=1 LINKS=2 SLOTS=1 LAPS=1 LOSSES=1 KILLS",
}
USED = r"assertion violated \(at_[ae]\[.*\]\.users==0\)"
UNTOLD = r"assertion violated .*untold_"
WRONG_SEQ = r"assertion violated .*\.seq==\(\(at_e.*\.sent"
WRONG_LINK = r"assertion violated .*\.row==l"
TWO_LIVE = r"assertion violated +!\(\(at_[ae]\[.*\]\.state==1\)\)"
OLDER = r"assertion violated .*>newest_"
# Mistake: what it is seeded into, and what Spin must say.
SEEDED = {
    "given back while it is held": (f"{ONE_INDEX} BUG_NOT_HELD", USED),
    "given back before the caller knows": (f"{ONE_INDEX} BUG_NOT_KNOWN", UNTOLD),
    "seqs that are not reset": (f"{ONE_INDEX} BUG_SEQS_NOT_RESET", WRONG_SEQ),
    "a hold that ends with dispatch_send": (f"{ONE_INDEX} BUG_HOLD_ENDS_EARLY", USED),
    "a hold that is kept after a loss": (f"{ONE_INDEX} BUG_HOLD_IS_KEPT", DEADLOCK),
    "two lives that are both live": (f"{TWO_INDICES} BUG_BOTH_LIVE", TWO_LIVE),
}
SEEDED_MORE = {
    "a hold that ends before the reply": (f"{ONE_INDEX} BUG_HOLD_ENDS_BEFORE_REPLY", USED),
    "the state looked at before the hold": (f"{ONE_INDEX} BUG_STATE_BEFORE_HOLD", USED),
    "a hold of batches that is not counted": (f"{ONE_INDEX} TWO_THREADS BUG_HOLD_NOT_COUNTED", USED),
    "recover that drops the holds of other threads": (f"{ONE_INDEX} BUG_RECOVER_DROPS_HOLDS", USED),
    "each side of one process waits for the other": (f"{ONE_INDEX} SHARED BUG_EACH_WAITS_FOR_THE_OTHER", DEADLOCK),
    "a late write that lands in the new link": (f"{ONE_INDEX} SHARED BUG_OLD_MAPPING_NOT_AWAITED", WRONG_LINK),
    "the number of a link not compared": (f"{SHORT} BUG_NUMBER_NOT_COMPARED", OLDER),
    "only links at lower indices replaced": (f"{THREE_LINKS} BUG_ONLY_LOWER_INDICES", TWO_LIVE),
    "an overtaken handshake that becomes live": (f"{TWO_INDICES} BUG_OVERTAKEN_GOES_LIVE", OLDER),
    "an offer compared with live ones only": (f"{TWO_INDICES} BUG_ONLY_LIVE_LINKS_COMPARED", OLDER),
}


@pytest.mark.parametrize("case", HOLDS.values(), ids=HOLDS)
def test_lives_and_links_hold(case: str, tmp_path: Path) -> None:
    holds(case, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("case", HOLDS_TOO.values(), ids=HOLDS_TOO)
def test_lives_and_links_hold_too(case: str, tmp_path: Path) -> None:
    holds(case, tmp_path)


@pytest.mark.slow
def test_every_run_of_lives_and_links_is_finite(tmp_path: Path) -> None:
    holds(SHORT, tmp_path, cycles=True)


@pytest.mark.parametrize("case, expected", SEEDED.values(), ids=SEEDED)
def test_seeded_mistake_is_found(case: str, expected: str, tmp_path: Path) -> None:
    finds(case, expected, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("case, expected", SEEDED_MORE.values(), ids=SEEDED_MORE)
def test_seeded_mistake_is_found_too(case: str, expected: str, tmp_path: Path) -> None:
    finds(case, expected, tmp_path)
