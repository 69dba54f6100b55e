# SPDX-License-Identifier: Apache-2.0
"""Every order of small cases of the protocol, on a memory with weak orders, and each mistake that it must find.

The programs are in tests/core/explorer; what they model is said at the top of link.cc there. They include the headers
of csrc/core. A mistake is seeded by text in a copy of one file, so the very line is shown to matter.
"""

from __future__ import annotations

import os
import re

import pytest
from explored import OWN, RELACY, THREADS, WHOLE, Edit, build, explore, run

pytestmark = [pytest.mark.slow, pytest.mark.explorer]

SIGNAL_STORE = "  atomic_ref(word).store(value, order::memory_order_seq_cst);\n#endif"
SIGNAL_LOAD = "  return atomic_ref(word).load(order::memory_order_seq_cst);\n#endif"


def signal_store(order: str) -> Edit:
    return Edit("core/atomic.h", SIGNAL_STORE, SIGNAL_STORE.replace("seq_cst", order))


def signal_load(order: str) -> Edit:
    return Edit("core/atomic.h", SIGNAL_LOAD, SIGNAL_LOAD.replace("seq_cst", order))


def state_load(order: str) -> Edit:
    return Edit("core/atomic.h", "return load_seq_cst(word);", f"return load_{order}(word);")


# What a signal is on a device, which never sleeps, and how it looks at a peer's state.
DEVICE_SIGNAL = (signal_store("release"), signal_load("acquire"))
DEVICE = (*DEVICE_SIGNAL, state_load("acquire"))


ALLOWED = (
    "store_buffering_release_acquire", "store_buffering_seq_cst_acquire", "store_buffering_release_seq_cst",
    "message_passing_relaxed_acquire", "message_passing_release_relaxed", "independent_reads_release_acquire",
    "opposite_writes_release",
)  # fmt: skip
FORBIDDEN = (
    "store_buffering_seq_cst", "message_passing_release_acquire", "independent_reads_seq_cst", "coherence_relaxed",
    "adding_relaxed",
)  # fmt: skip


@pytest.mark.parametrize("name", ALLOWED, ids=[f"explorer-{name}" for name in ALLOWED])
def test_what_cxx_allows_is_explored(name: str) -> None:
    done = explore("orders", name, OWN)
    assert done.returncode == 1 and "the outcome in question" in done.stdout, done.stdout


@pytest.mark.parametrize("name", FORBIDDEN, ids=[f"explorer-{name}" for name in FORBIDDEN])
def test_what_cxx_forbids_is_not_explored(name: str) -> None:
    done = explore("orders", name, OWN)
    assert done.returncode == 0 and done.stdout.startswith("explored: "), done.stdout


CASES = {
    "link": (
        "one_link", "wrap", "two_senders", "two_receivers", "skipped_number", "ended_wait", "mortal_expert",
        "mortal_attention"
    ),
    "wake": (
        "one_writer", "two_writers", "two_messages", "two_sleepers", "closed", "closed_or_signalled", "mortal_peer"
    ),
    "blocks": ("two_blocks", "three_blocks"),
    "doorbell": ("two_ringers",),
    "hold": ("one_user", "another_rank", "two_users", "seen_lost", "batch"),
}  # fmt: skip
ALL = [(program, case) for program, cases in CASES.items() for case in cases]


@pytest.mark.essential
@pytest.mark.parametrize("program, case", ALL, ids=[f"explorer-{case}" for _, case in ALL])
def test_every_order_is_right(program: str, case: str) -> None:
    done = explore(program, case, WHOLE)
    assert done.returncode == 0 and re.match(r"explored: \d+ states", done.stdout), done.stdout
    print(done.stdout)


# A device neither sleeps nor gives an entry back.
NO_SLEEP = [(program, case) for program, case in ALL if program not in ("wake", "hold")]


@pytest.mark.parametrize("program, case", NO_SLEEP, ids=[f"explorer-{case}" for _, case in NO_SLEEP])
def test_every_order_is_right_with_the_signals_of_a_device(program: str, case: str) -> None:
    done = explore(program, case, WHOLE, DEVICE)
    assert done.returncode == 0 and re.match(r"explored: \d+ states", done.stdout), done.stdout


# (what is wrong, program, case, the edits, what the explorer says)
RACE = "data race"
HANG = "a wait that never ends"
PUT_THEN_SIGNAL = """\
  m2n::put(exec, &area.header, &header, 1);
  if (m2n::drain(exec, nullptr)) m2n::signal(exec, m2n::PeerView{}, &area.signal, m2n::make_signal(1, seq));
"""
SIGNAL_THEN_PUT = "".join(reversed(PUT_THEN_SIGNAL.splitlines(keepends=True)))
LAST_LOOK = "    arrival = classify(poll_signal(word), last_seq);\n"
SEEN, READY = (
    "  const uint32_t seen = load_seq_cst(&wake->events);  // SYNC: wake-event\n",
    "  if (ready()) return true;                           // it loads signals seq_cst\n",
)
STORE_AHEAD = "store_seq_cst(word, with_ahead(peers, seq)); return true;"
ENDING = """\
    await([&] {
      m2n::run_ahead(&area.signal, seq + 1);
      return m2n::load_acquire(&shared.is_passed) != 0;
    });
"""
ENDING_ONCE = "    m2n::run_ahead(&area.signal, seq + 1);\n"
LEAVE = "if (m2n::leave(exec, &shared.gate))"
TAKE_HOLD = """\
  store_seq_cst(hold, 1u);                                                 // SYNC: peer-hold
  return static_cast<PeerState>(load_seq_cst(state)) == PeerState::kLive;  // SYNC: peer-state
"""
STATE_THEN_HOLD = """\
  const bool is_live = static_cast<PeerState>(load_seq_cst(state)) == PeerState::kLive;
  store_seq_cst(hold, 1u);
  return is_live;
"""
LOSE_THEN_LOOK = """\
  join_and_lose();
  await([] { return !is_any_held(); });
"""
LOOK_THEN_LOSE = "".join(reversed(LOSE_THEN_LOOK.splitlines(keepends=True)))
SET_LIVE = "  set_state(m2n::PeerState::kLive);\n"
SET_LOST = SET_LIVE + "  set_state(m2n::PeerState::kLost);"
SET_LOST_BY_RELEASE = SET_LIVE + "  m2n::store_release(&shared.state, uint32_t{3});"
END_USE = "  m2n::drop_hold(&shared.holds[slot]);\n}"
GIVE_BACK = "  set_state(m2n::PeerState::kUnused);\n"
RESET_HOLD = "  m2n::drop_hold(&shared.holds[0]);\n"
SAME_RANK = " && explorer::read_byte(&shared.rank) == kOld"
BATCH_HOLD = "m2n::add_hold(&shared.holds[0]);"
RESET_INBOX = "explorer::write_byte(&shared.is_taken, 1);  // the"
DECIDE = "store_release_to_blocks(&gate->verdict, verdict);"
WRONG = [
    ("signal-before-rows", "link", "one_link", [Edit("link.cc", PUT_THEN_SIGNAL, SIGNAL_THEN_PUT)], RACE),
    ("relaxed-signal", "link", "one_link", [signal_store("relaxed")], RACE),
    ("relaxed-poll", "link", "one_link", [signal_load("relaxed")], RACE),
    (
        "second-writer-to-a-signal",
        "link",
        "two_senders",
        [Edit("link.cc", "attention(thread, thread + 1) : expert(0, 2)", "attention(0, 1) : expert(0, 2)")],
        RACE,
    ),
    (
        "any-later-number-is-accepted",
        "link",
        "skipped_number",
        [Edit("core/slot.h", "seq == last_seq + 1u ?", "seq >= last_seq + 1u ?")],
        "leaves out a number",
    ),
    (
        "numbers-do-not-wrap",
        "link",
        "wrap",
        [Edit("core/slot.h", "seq == last_seq + 1u ?", "seq == last_seq + 1ull ?")],
        "violation",
    ),
    ("no-second-look-at-a-dead-peer", "link", "mortal_expert", [Edit("core/peer.h", LAST_LOOK, "")], "was lost"),
    (
        "the-owner-of-a-signal-stores-instead-of-replacing",
        "link",
        "ended_wait",
        [Edit("core/peer.h", "return replace_seq_cst(word, seen, with_ahead(peers, seq));", STORE_AHEAD)],
        HANG,
    ),
    (
        "a-number-that-runs-ahead-is-taken-for-the-peers",
        "link",
        "ended_wait",
        [Edit("core/peer.h", "return without_ahead(load_signal(word));", "return load_signal(word);")],
        "violation",
    ),
    (
        "a-wait-is-ended-only-once",
        "link",
        "ended_wait",
        [Edit("link.cc", ENDING, ENDING_ONCE)],
        HANG,
    ),
    (
        "relaxed-state-of-a-peer",
        "link",
        "mortal_expert",
        [*DEVICE_SIGNAL, state_load("relaxed")],
        "was lost",
    ),
    ("wake-with-a-release-signal", "wake", "one_writer", [signal_store("release")], HANG),
    ("wake-with-an-acquire-poll", "wake", "one_writer", [signal_load("acquire")], HANG),
    (
        "wake-with-an-acquire-look-at-waiters",
        "wake",
        "one_writer",
        [Edit("core/wake.h", "load_seq_cst(&wake->waiters)", "load_acquire(&wake->waiters)")],
        HANG,
    ),
    (
        "wake-with-an-acq-rel-registration",
        "wake",
        "one_writer",
        [Edit("core/wake.h", "add_seq_cst(&wake->waiters, 1u)", "add_acq_rel(&wake->waiters, 1u)")],
        HANG,
    ),
    (
        "wake-without-an-event",
        "wake",
        "one_writer",
        [Edit("core/wake.h", "  add_seq_cst(&wake->events, 1u);", "  ")],
        HANG,
    ),
    ("events-read-after-the-look", "wake", "one_writer", [Edit("core/wake.h", SEEN + READY, READY + SEEN)], HANG),
    (
        "release-store-in-close",
        "wake",
        "closed",
        [Edit("wake.cc", "store_seq_cst(&shared.is_closed", "store_release(&shared.is_closed")],
        HANG,
    ),
    (
        "release-store-of-a-loss",
        "wake",
        "mortal_peer",
        [Edit("wake.cc", "store_seq_cst(&shared.state", "store_release(&shared.state")],
        HANG,
    ),
    (
        "counter-left-half-way-after-an-abort",
        "blocks",
        "two_blocks",
        [Edit("blocks.cc", LEAVE, "if ((verdict == kGo || index == 0) && m2n::leave(exec, &shared.gate))")],
        "nobody has finished it",
    ),
    (
        "counter-not-reset",
        "blocks",
        "two_blocks",
        [Edit("core/arrive.h", "  store_relaxed(arrivals, 0u);", "  ")],
        "nobody has finished it",
    ),
    (
        "verdict-not-reset",
        "blocks",
        "two_blocks",
        [Edit("core/arrive.h", "  store_relaxed(&gate->verdict, 0u);", "  ")],
        "an aborted one was",
    ),
    (
        "relaxed-arrival",
        "blocks",
        "two_blocks",
        [Edit("core/arrive.h", "add_acq_rel(arrivals", "add_relaxed(arrivals")],
        RACE,
    ),
    (
        "relaxed-verdict",
        "blocks",
        "two_blocks",
        [Edit("core/arrive.h", DECIDE, DECIDE.replace("release_to_blocks", "relaxed"))],
        RACE,
    ),
    (
        "relaxed-ring",
        "doorbell",
        "two_ringers",
        [Edit("core/doorbell.h", "store_release(&ring.lap", "store_relaxed(&ring.lap")],
        "a message that nobody rang for",
    ),
    (
        "relaxed-look-at-the-ring",
        "doorbell",
        "two_ringers",
        [Edit("core/doorbell.h", "load_acquire(&ring().lap)", "load_relaxed(&ring().lap)")],
        "a message that nobody rang for",
    ),
    (
        "a-ring-too-small",
        "doorbell",
        "two_ringers",
        [Edit("doorbell.cc", "kNumRings = 2", "kNumRings = 1")],
        HANG,
    ),
    (
        "rings-without-laps",
        "doorbell",
        "two_ringers",
        [Edit("core/doorbell.h", "ticket / bell.num_rings + 1);", "uint64_t{1});")],
        HANG,
    ),
    (
        "relaxed-tickets",
        "doorbell",
        "two_ringers",
        [Edit("core/doorbell.h", "add_acq_rel(bell.next_ticket", "add_relaxed(bell.next_ticket")],
        HANG,
    ),
]
# (what is wrong, case, file, the text there, what it becomes, what the explorer says)
HOLD, HOLD_CASES = "core/hold.h", "hold.cc"
WRONG_HOLDS = [
    ("relaxed-hold", "one_user", HOLD, "store_seq_cst(", "store_relaxed(", RACE),
    ("release-hold", "one_user", HOLD, "store_seq_cst(", "store_release(", RACE),
    ("state-before-the-hold", "one_user", HOLD, TAKE_HOLD, STATE_THEN_HOLD, RACE),
    ("acquire-look-at-the-state", "one_user", HOLD, "load_seq_cst(state)", "load_acquire(state)", RACE),
    ("acquire-look-at-a-hold", "one_user", HOLD, "load_seq_cst(hold)", "load_acquire(hold)", RACE),
    ("relaxed-look-at-a-hold", "one_user", HOLD, "load_seq_cst(hold)", "load_relaxed(hold)", RACE),
    ("relaxed-end-of-a-hold", "one_user", HOLD, "store_release(", "store_relaxed(", RACE),
    ("release-loss", "one_user", HOLD_CASES, SET_LOST, SET_LOST_BY_RELEASE, RACE),
    ("holds-looked-at-before-the-loss", "one_user", HOLD_CASES, LOSE_THEN_LOOK, LOOK_THEN_LOSE, RACE),
    ("only-one-slots-hold-looked-at", "two_users", HOLD_CASES, "slot < num_slots;", "slot < 1;", RACE),
    ("a-hold-that-is-kept", "one_user", HOLD_CASES, END_USE, "}", HANG),
    ("holds-reset-by-who-gives-back", "one_user", HOLD_CASES, GIVE_BACK, GIVE_BACK + RESET_HOLD, RACE),
    ("rank-not-compared", "another_rank", HOLD_CASES, SAME_RANK, "", "a message for another rank"),
    ("a-message-taken-without-a-hold", "batch", HOLD_CASES, BATCH_HOLD, "", HANG),
    ("an-inbox-that-is-not-reset", "batch", HOLD_CASES, RESET_INBOX, "// the", "a reply to another life"),
]
WRONG += [(what, "hold", case, [Edit(file, old, new)], says) for what, case, file, old, new, says in WRONG_HOLDS]


@pytest.mark.parametrize(
    "program, case, edits, says", [wrong[1:] for wrong in WRONG], ids=[f"explorer-wrong-{wrong[0]}" for wrong in WRONG]
)
def test_a_mistake_is_found(program: str, case: str, edits: list[Edit], says: str) -> None:
    done = explore(program, case, OWN, tuple(edits))
    assert done.returncode == 1 and says in done.stdout.split("\n")[0], done.stdout[:2000]
    print(done.stdout)


# Switches between threads that could go on, as many as end in seconds.
BY_RELACY = [
    ("link", "one_link", 4), ("link", "two_senders", 2), ("link", "two_receivers", 2), ("link", "skipped_number", 5),
    ("wake", "one_writer", 5), ("wake", "two_writers", 4), ("wake", "two_messages", 4), ("wake", "two_sleepers", 4),
    ("wake", "closed", 5), ("wake", "closed_or_signalled", 4), ("blocks", "two_blocks", 1),
    ("doorbell", "two_ringers", 1), ("hold", "one_user", 9), ("hold", "another_rank", 9), ("hold", "two_users", 3),
    ("hold", "seen_lost", 5), ("hold", "batch", 4),
]  # fmt: skip


@pytest.mark.relacy
@pytest.mark.parametrize("program, case, switches", BY_RELACY, ids=[f"explorer-{case}" for _, case, _ in BY_RELACY])
def test_relacy_agrees_that_it_is_right(program: str, case: str, switches: int) -> None:
    done = explore(program, case, RELACY, switches=switches)
    assert done.returncode == 0 and "explored: " in done.stdout, done.stdout[-3000:]
    print(done.stdout.strip().split("\n")[-1])


RELACY_FINDS = ("relaxed-signal", "wake-with-a-release-signal", "release-hold", "acquire-look-at-a-hold")


@pytest.mark.relacy
@pytest.mark.parametrize("name", RELACY_FINDS, ids=[f"explorer-wrong-{name}" for name in RELACY_FINDS])
def test_relacy_agrees_that_it_is_wrong(name: str) -> None:
    program, case, edits, _ = next(wrong[1:] for wrong in WRONG if wrong[0] == name)
    done = explore(program, case, RELACY, tuple(edits), switches=2)
    assert done.returncode == 1 and re.search(r"DATA RACE|DEADLOCK", done.stdout), done.stdout[-3000:]


def lost_rounds(edits: tuple[Edit, ...], seconds: int) -> tuple[int, int]:
    """(rounds in which both sides missed each other, rounds) on two real threads; ends at the first lost one."""
    done = run([build("litmus", tuple(THREADS), edits), str(10**9), str(seconds)])
    if "NEEDS TWO CORES" in done.stdout:
        pytest.skip("two cores are needed to see what one thread's stores look like from another; this machine has one")
    found = re.fullmatch(r"lost (\d+) of (\d+) rounds\n", done.stdout)
    assert done.returncode == 0 and found, done.stdout + done.stderr
    return int(found[1]), int(found[2])


def test_litmus_no_wake_is_lost_on_real_threads() -> None:
    lost, rounds = lost_rounds((), seconds=4)
    print(f"lost {lost} of {rounds} rounds")
    assert lost == 0 and rounds > 0


@pytest.mark.skipif(
    os.uname().machine not in ("x86_64", "AMD64"), reason="shown on x86-64 only: elsewhere it may be rare"
)
def test_litmus_wrong_release_signal_loses_wakes_on_real_threads() -> None:
    lost, rounds = lost_rounds((signal_store("release"),), seconds=60)
    print(f"lost {lost} of {rounds} rounds")
    assert lost > 0, f"in {rounds} rounds no wake was lost, although the signal was stored with release"
