/* SPDX-License-Identifier: Apache-2.0 */
/* Losses: dead peers, cut connections, verdicts and replies that come late, and the retry slot.
 *
 * Modelled: attention ranks with a thread per microbatch (or, ONE_THREAD, one thread that calls the verbs of its
 * microbatches in turn); at any step an expert rank dies, a connection breaks between two living ranks, or
 * (KILL_SENDER) attention rank 1 dies; each side's watcher says LOST at any later time. A microbatch that misses rows
 * sends them again through the retry slot, to any living expert rank; the slot belongs to one microbatch at a time,
 * others queue in order. With DEADLINES a wait may fail once per lap; then the caller calls again, or gives the lost
 * rows up.
 *
 *   microbatch   AttentionComm::dispatch_send (find_peers), combine_recv (look_for_reply, take_replies; with
 *                missing="nan": leave_missing). A recover() touches no slot in flight, so it is no step here;
 *                designed, not built: resend and the queue for the retry slot (all in resend.pml)
 *   expert       ExpertComm::dispatch_recv, combine_send: any message that has arrived may be served
 *   watcher      Watcher, Comm::peer_gone
 *   fate         what goes wrong, up to LOSSES times
 *
 * Abstracted away: memory orders; empty messages, lingering, lockstep and joins (exchange.pml); a new life of a lost
 * rank, as that has a link of its own; the split of a retry over several ranks; refusals and violations. An expert rank
 * accepts, computes and answers in one step: nobody sees the parts, and LOST comes at any time on its side too.
 *
 * Every run is finite, as in exchange.pml: "every wait ends" is "no invalid end state". Configured by A, E, MB, LAPS,
 * LOSSES. BUG_...: a mistake.
 */
#define SLOTS (MB + 1)
#include "link.pml"

#define RETRY MB  /* the slot */
#define NOBODY E
#define ALL (BIT(E) - 1)

bool dead[E], dead_sender[A];
bool is_cut[A * E];              /* the control connection has ended */
bool is_lost[A * E];             /* verdict of the attention rank on the expert rank, for good */
bool is_sender_lost[A * E];      /* and the other way round */
bool was_here[A * E * SLOTS];    /* ghost: a reply that was complete when its sender was declared LOST */
chan queue[A] = [MB] of { byte } /* for the retry slot: its owner, then who waits */
byte turn[A];                    /* ONE_THREAD */

#ifdef ONE_THREAD
#define MY_TURN (turn[a] == mb)
#else
#define MY_TURN true
#endif
#ifdef OWN_RETRY_ONLY /* a wait looks after its own microbatch only, not after the retries of all of its rank */
#define MAY_DRIVE MY_TURN
#else
#define MAY_DRIVE true
#endif

#include "resend.pml"

proctype microbatch(byte a, mb) {
  byte lap, e, g, owes, reads, need, got, given_up;
  byte groups[E];
  byte retry_to = NOBODY;
  bool is_queued, has_failed, was_gone;
  {
    do
    :: lap < LAPS ->
        (MY_TURN);
        dispatch_send();
        if :: owes == 0 -> break :: else fi; /* PeerLost: nobody is left */
        turn[a] = (mb + 1) % MB;
#ifdef RESEND /* for each microbatch, before combine_recv of any */
        (MY_TURN);
        resend();
        turn[a] = (mb + 1) % MB;
#endif
        (MAY_DRIVE);
        combine_recv();
        atomic { lap++; reads = 0; owes = 0; got = 0; given_up = 0; has_failed = false; was_gone = false }
    :: else -> break
    od;
    turn[a] = (mb + 1) % MB
  } unless { dead_sender[a] }
}

#define SERVE(a_, slot_) \
  :: atomic { !dead[e] && !is_sender_lost[LINK(a_, e)] && IS_HERE(BOX(a_, e, slot_)) -> \
              accept(BOX(a_, e, slot_)); write_reply(BOX(a_, e, slot_)); signal_reply(BOX(a_, e, slot_)) }

proctype expert(byte e) {
end:
  do
  SERVE(0, 0)
  SERVE(0, 1)
#if MB == 2
  SERVE(0, 2)
#endif
#if A == 2
  SERVE(1, 0)
  SERVE(1, 1)
#endif
  od
}

inline declare_lost(a_, e_) {
  is_lost[LINK(a_, e_)] = true;
  for (slot : 0 .. MB) {
    was_here[BOX(a_, e_, slot)] = AWAITS_REPLY(BOX(a_, e_, slot)) && REPLY_IS_HERE(BOX(a_, e_, slot))
  }
  slot = 0
}

#define WATCH(a_, e_) \
  :: atomic { is_cut[LINK(a_, e_)] && !is_lost[LINK(a_, e_)] -> declare_lost(a_, e_) } \
  :: atomic { is_cut[LINK(a_, e_)] && !is_sender_lost[LINK(a_, e_)] -> is_sender_lost[LINK(a_, e_)] = true }

proctype watcher() {
  byte slot;
end:
  do
  WATCH(0, 0)
  WATCH(0, 1)
#if E == 3
  WATCH(0, 2)
#endif
#if A == 2
  WATCH(1, 0)
  WATCH(1, 1)
#endif
  od
}

proctype fate() {
  byte losses, i;
  do
  :: losses < LOSSES ->
      losses++;
      if
      :: atomic { select(i : 0 .. E - 1); dead[i] = true; is_cut[LINK(0, i)] = true; is_cut[LINK(A - 1, i)] = true }
      :: atomic { select(i : 0 .. A * E - 1); is_cut[i] = true }
#ifdef KILL_SENDER
      :: d_step { dead_sender[1] = true; is_cut[LINK(1, 0)] = true; is_cut[LINK(1, 1)] = true }
#endif
      :: losses = LOSSES /* nothing more goes wrong */
      fi;
      i = 0
  :: else -> break
  od
}

init {
  byte i, j;
  atomic {
    for (i : 0 .. A - 1) {
      for (j : 0 .. MB - 1) { run microbatch(i, j) }
    }
    for (j : 0 .. E - 1) { run expert(j) }
    run watcher();
    run fate()
  }
}
