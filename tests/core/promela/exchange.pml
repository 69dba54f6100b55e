/* SPDX-License-Identifier: Apache-2.0 */
/* Dispatch and combine without losses: whom an expert rank waits for, and whether every wait ends.
 *
 * Modelled: 2 attention ranks that start at any time, with a thread per microbatch (or, ONE_THREAD, one thread in the
 * order of ping-pong); credits; messages with and without rows; lingering; IDLE_NEXT; strict lockstep; links that come
 * up one by one at any time; leaving. Lingering is a timeout that may fire at any moment (or, ENDLESS, never).
 *
 *   microbatch   AttentionComm::dispatch_send (finish_empty_messages, find_peers, send_to_peer), combine_recv
 *                (wait_replies, take_replies), idle; at its end Comm::close
 *   connect      Comm::watch: a link is LIVE
 *   expert       ExpertComm::dispatch_recv (inbox.h: scan, is_complete, belongs, answer_empty), combine_send
 *
 * Abstracted away: memory orders, sleeping and waking; routes (who gets rows is any choice); which of several complete
 * batches goes first (any); when a goodbye is seen (any time). A message is put and signalled in one step: nobody
 * looks between the two, and an overwrite shows at the put. A look of dispatch_recv notes what is here and decides in
 * one step.
 *
 * Every run is finite (test_promela.py looks for cycles), so "every wait ends" is "no run stops where a rank still
 * waits": an invalid end state. Configured by E, MB, LAPS, and what #ifdef names below. BUG_...: a mistake.
 */
#define A 2
#define SLOTS MB
#include "link.pml"

#define UNUSED 0
#define LIVE 1
#define LEFT 2
byte link[A * E];             /* the PeerState at both ends */
byte threads[A];              /* of a rank: microbatches that have not finished */
byte turn[A];                 /* ONE_THREAD: the microbatch whose verbs the thread calls now */
byte laps_done[A];            /* of microbatch 0 */
bool is_expected[A * E * MB]; /* ExpertComm::Inbox */

#ifdef BUG_ENDLESS_LINGER
#define ENDLESS
#endif
#ifdef BUG_NO_CREDIT /* a slot is used again before the reply to its last message was consumed */
#define IS_FREE(box) true
#else
#define IS_FREE(box) (!AWAITS_REPLY(box) || REPLY_IS_HERE(box))
#endif
#ifdef ONE_THREAD
#define MY_TURN (turn[a] == mb)
#else
#define MY_TURN true
#endif

/* The replies to empty messages are awaited before the slot's next message. */
inline finish_empty_messages() {
  do
  :: e < E && IS_FREE(BOX(a, e, mb)) ->
      if :: AWAITS_REPLY(BOX(a, e, mb)) -> consume_reply(BOX(a, e, mb)) :: else fi;
      e++
  :: e == E -> e = 0; break
  od
}

/* Who is LIVE gets a message; any of them gets rows. */
inline find_peers(is_idle) {
  snapshot = 0;
  rows = 0;
  do
  :: e < E ->
      if
      :: link[LINK(a, e)] == LIVE ->
          snapshot = snapshot | BIT(e);
          if
          :: !is_idle -> rows = rows | BIT(e)
#ifdef ANY_ROWS
          :: skip
#else
          :: is_idle
#endif
          fi
      :: else
      fi;
      e++
  :: else -> e = 0; break
  od;
#ifdef BUG_SKIP_EMPTY
  snapshot = rows;
#endif
}

#define TO ((a + e) % E) /* each sender begins with another peer */

inline send_to_peers(is_idle) {
  do
  :: atomic { e < E ->
      if
      :: HAS(snapshot, TO) ->
          write_message(to_expert[BOX(a, TO, mb)], ROW(lap, mb, a), lap, rows & BIT(TO), is_idle);
          signal_dispatch(BOX(a, TO, mb))
      :: else
      fi;
      e++ }
  :: atomic { e == E -> e = 0; break }
  od
}

inline dispatch_send(is_idle) {
  atomic { finish_empty_messages(); find_peers(is_idle) }
  send_to_peers(is_idle)
}

inline combine_recv() {
  atomic {
#ifndef BUG_NO_CREDIT
    do /* wait_replies: nothing is consumed before all are here */
    :: e < E && (!HAS(rows, e) || REPLY_IS_HERE(BOX(a, e, mb))) -> e++
    :: e == E -> e = 0; break
    od;
#endif
    do
    :: e < E && HAS(rows, e) && REPLY_IS_HERE(BOX(a, e, mb)) ->
        assert(to_attention[BOX(a, e, mb)].unread);                 /* no row counts twice */
        assert(to_attention[BOX(a, e, mb)].row == ROW(lap, mb, a)); /* none is lost: these are this lap's */
        assert(to_attention[BOX(a, e, mb)].groups == BIT(e));
        consume_reply(BOX(a, e, mb));
        e++
    :: e < E && !(HAS(rows, e) && REPLY_IS_HERE(BOX(a, e, mb))) -> e++
    :: else -> e = 0; break
    od
  }
}

proctype microbatch(byte a, mb) {
  byte lap, e, snapshot, rows;
  do
  :: lap < LAPS ->
      (MY_TURN && (link[LINK(a, 0)] == LIVE || link[LINK(a, E - 1)] == LIVE)); /* wait_peer */
#ifdef IDLE /* rank 1 says that it has nothing for now, and comes back when rank 0 has finished */
      if
      :: a == 1 && lap == 1 -> dispatch_send(true); (link[LINK(0, 0)] == LEFT)
      :: else
      fi;
#endif
      dispatch_send(false);
      turn[a] = (mb + 1) % MB;
      (MY_TURN);
      combine_recv();
      atomic { lap++; snapshot = 0; rows = 0; if :: mb == 0 -> laps_done[a] = lap :: else fi }
  :: else -> break
  od;
  turn[a] = (mb + 1) % MB;
  atomic { finish_empty_messages(); threads[a]-- }
  if /* the last one closes: a goodbye to each peer */
  :: threads[a] == 0 ->
      do
      :: atomic { e < E -> link[LINK(a, e)] = LEFT; e++ }
      :: else -> break
      od
  :: else
  fi
}

/* Links come up in any order, at any time; those of a joiner when both expert ranks have served the other. */
proctype connect(byte a, e) {
#ifdef JOINER
  (laps_done[0] > 0);
#endif
  if
  :: atomic { link[LINK(a, e)] == UNUSED -> link[LINK(a, e)] = LIVE }
  :: link[LINK(a, e)] == LEFT /* it closed before this link was up */
  fi
}

#define IS_SERVED(a_) (link[LINK(a_, e)] == LIVE)
#define LAYER(a_, mb_) to_expert[BOX(a_, e, mb_)].layer
#define IS_IN(a_, mb_, layer_) (IS_SERVED(a_) && IS_HERE(BOX(a_, e, mb_)) && LAYER(a_, mb_) == layer_ && \
                                !to_expert[BOX(a_, e, mb_)].idle_next)
/* A peer whose slot holds another layer cannot send this one before that is answered. */
#define IS_MISSING(a_, mb_) (IS_SERVED(a_) && !IS_HERE(BOX(a_, e, mb_)) && is_expected[BOX(a_, e, mb_)])
#ifdef STRICT
#define IS_COMPLETE(a_, mb_) (IS_IN(0, mb_, LAYER(a_, mb_)) && IS_IN(1, mb_, LAYER(a_, mb_)))
#elif defined(ENDLESS)
#define IS_COMPLETE(a_, mb_) (!IS_MISSING(0, mb_) && !IS_MISSING(1, mb_))
#else
#define IS_COMPLETE(a_, mb_) true /* complete, or its lingering has ended */
#endif

/* One message of the batch: a peer is waited for from its first message on. */
inline take_message(a_, mb_) {
  accept(BOX(a_, e, mb_));
  is_expected[BOX(a_, e, mb_)] = true;
  batch = batch | BIT(a_)
}

/* All messages of this layer and microbatch that are here. */
inline collect(mb_, layer_) {
  mb = mb_;
  if :: IS_IN(0, mb_, layer_) -> take_message(0, mb_) :: else fi;
  if :: IS_IN(1, mb_, layer_) -> take_message(1, mb_) :: else fi
}
inline answer(a_) {
  write_reply(BOX(a_, e, mb));
  signal_reply(BOX(a_, e, mb));
  batch = batch & ~BIT(a_)
}

/* An empty message with IDLE_NEXT is answered at once. */
inline note_idle(a_, mb_) {
  accept(BOX(a_, e, mb_));
  write_reply(BOX(a_, e, mb_));
  signal_reply(BOX(a_, e, mb_));
#ifndef BUG_IDLE_IGNORED
  is_expected[BOX(a_, e, mb_)] = false
#endif
}

#define LOOK(a_, mb_) \
  :: atomic { batch == 0 && IS_IN(a_, mb_, LAYER(a_, mb_)) && IS_COMPLETE(a_, mb_) -> collect(mb_, LAYER(a_, mb_)) } \
  :: atomic { batch == 0 && IS_SERVED(a_) && IS_HERE(BOX(a_, e, mb_)) && to_expert[BOX(a_, e, mb_)].idle_next -> \
              note_idle(a_, mb_) }

proctype expert(byte e) {
  byte mb, batch;
end:
  do
  LOOK(0, 0)
  LOOK(1, 0)
#if MB == 2
  LOOK(0, 1)
  LOOK(1, 1)
#endif
  :: atomic { HAS(batch, 0) -> answer(0) }
  :: atomic { batch == BIT(1) -> answer(1); mb = 0 }
  od
}

init {
  byte i, j;
  atomic {
    for (i : 0 .. A - 1) {
      threads[i] = MB;
      for (j : 0 .. E - 1) {
        if
#ifdef JOINER
        :: i == 0 -> link[LINK(i, j)] = LIVE
        :: i == 1 -> run connect(i, j)
#elif defined(ALL_LINKED)
        :: link[LINK(i, j)] = LIVE
#else
        :: run connect(i, j)
#endif
        fi
      }
      for (j : 0 .. MB - 1) { run microbatch(i, j) }
    }
    for (j : 0 .. E - 1) { run expert(j) }
  }
}
