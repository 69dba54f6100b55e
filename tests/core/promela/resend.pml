/* SPDX-License-Identifier: Apache-2.0 */
/* Part of loss.pml: the calls of an attention rank, with what a lost expert rank owed sent again.
 *
 * The design that is proved here: a lost rank leaves the snapshot of the slot for good; what it owed waits for the
 * retry slot, in order; the owner may send again when its retry is lost too, and hands the slot on when all that it
 * missed has come. A waiter reads the signal, then the state, then the signal again: as LOST is final, that is one
 * question here.
 */
#ifdef BUG_NO_STATE /* a waiter does not look at the peer's state */
#define IS_GONE(e_, slot_) false
#elif defined(BUG_NO_SECOND_LOOK) /* the signal was read before the state only: it may have come in between */
#define IS_GONE(e_, slot_) is_lost[LINK(a, e_)]
#else
#define IS_GONE(e_, slot_) (is_lost[LINK(a, e_)] && !REPLY_IS_HERE(BOX(a, e_, slot_)))
#endif
#ifdef BUG_TWO_IN_RETRY
#define OWNS_RETRY true
#else
#define OWNS_RETRY (queue[a]?[eval(mb)])
#endif
#define IS_LIVE(e_) (e_ < E && !is_lost[LINK(a, (e_) % E)])
#define IS_ANY_LIVE (IS_LIVE(0) || IS_LIVE(1) || IS_LIVE(2))
#define HAS_REPLIED(e_) (!HAS(owes, e_) || REPLY_IS_HERE(BOX(a, (e_) % E, mb)))
#define HAS_ALL (need == 0 && retry_to == NOBODY && HAS_REPLIED(0) && HAS_REPLIED(1) && HAS_REPLIED(2))
#ifdef BUG_VERDICT_NOT_KEPT /* LOST ended the wait, then a late reply was there, and others were still pending */
#define IS_READY (HAS_ALL || (was_gone && HAS(owes, 0) && REPLY_IS_HERE(BOX(a, 0, mb))))
#else
#define IS_READY HAS_ALL
#endif

/* Group g goes to rank g, or to the first living rank after it: another replica. Nobody lives: PeerLost. */
inline dispatch_send() {
  atomic {
    do
    :: g < E ->
        e = g;
        do
        :: IS_LIVE(e) || !IS_ANY_LIVE -> break
        :: else -> e = (e + 1) % E
        od;
        if :: IS_ANY_LIVE -> groups[e] = groups[e] | BIT(g); owes = owes | BIT(e) :: else fi;
        g++
    :: else -> e = 0; g = 0; break
    od
  }
  do
  :: atomic { e < E ->
      if
      :: HAS(owes, e) ->
          write_message(to_expert[BOX(a, e, mb)], ROW(lap, mb, a), lap, groups[e], false);
          signal_dispatch(BOX(a, e, mb));
          groups[e] = 0
      :: else
      fi;
      e++ }
  :: atomic { e == E -> e = 0; reads = owes; break }
  od
}

/* What a reply brings: no row counts twice. */
inline count_reply(box) {
  assert(to_attention[box].row == ROW(lap, mb, a));
  assert((got & to_attention[box].groups) == 0);
  got = got | to_attention[box].groups
}

/* A lost rank leaves the snapshot, and its signal on this slot is never read again. */
inline replace_peer(e_) {
  assert(!was_here[BOX(a, e_, mb)]); /* a complete reply of a dead peer counts */
  owes = owes & ~BIT(e_);
#ifndef BUG_READ_REPLACED
  reads = reads & ~BIT(e_);
#endif
#ifndef BUG_NOT_SENT_AGAIN
  need = need | to_expert[BOX(a, e_, mb)].groups
#endif
}

inline join_queue() { queue[a]!mb; is_queued = true }

inline leave_queue() {
#ifndef BUG_STAYS_IN_QUEUE
  if :: is_queued -> queue[a]??eval(mb); is_queued = false :: else fi
#else
  is_queued = false
#endif
}

inline send_retry(e_) {
  write_message(to_expert[BOX(a, e_, RETRY)], ROW(lap, mb, a), lap, need, false);
  signal_dispatch(BOX(a, e_, RETRY));
  retry_to = e_;
  need = 0
}

/* The slot is the next one's once all that this microbatch missed has come. */
inline consume_retry() {
  count_reply(BOX(a, retry_to, RETRY));
  consume_reply(BOX(a, retry_to, RETRY));
  retry_to = NOBODY;
  if :: need == 0 -> queue[a]??eval(mb); is_queued = false :: else fi
}

/* The slot's own thread takes NaN for what is missing. */
inline take_nan() {
  given_up = given_up | need;
  need = 0;
  leave_queue()
}

/* At its deadline. Nothing is consumed; who has not sent its retry leaves the queue. */
inline fail_wait() {
#ifndef BUG_TRIES_FOREVER
  has_failed = true;
#endif
  if :: retry_to == NOBODY -> leave_queue() :: else fi;
#ifdef BUG_FAILED_WAIT
  if :: HAS(reads, 0) && REPLY_IS_HERE(BOX(a, 0, mb)) -> count_reply(BOX(a, 0, mb)) :: else fi
#endif
}

inline take_reply(e_) {
  if
  :: HAS(reads, e_) && REPLY_IS_HERE(BOX(a, e_, mb)) -> count_reply(BOX(a, e_, mb)); consume_reply(BOX(a, e_, mb))
  :: else
  fi
}

/* The caller queues what is lost by now; a wait of this rank does the rest. */
inline resend() {
  if
  :: atomic { HAS(owes, 0) && IS_GONE(0, mb) -> replace_peer(0); join_queue() }
  :: atomic { HAS(owes, 1) && IS_GONE(1, mb) -> replace_peer(1); join_queue() }
  :: true
  fi
}

#define PEER(e_) \
  :: atomic { HAS(owes, e_) && IS_GONE(e_, mb) -> replace_peer(e_) } \
  :: atomic { need != 0 && retry_to == NOBODY && is_queued && OWNS_RETRY && IS_LIVE(e_) -> send_retry(e_) }

inline combine_recv() {
  do
  PEER(0)
  PEER(1)
#if E == 3
  PEER(2)
#endif
#ifdef BUG_VERDICT_NOT_KEPT
  :: atomic { !was_gone && HAS(owes, 0) && IS_GONE(0, mb) -> was_gone = true }
#endif
  :: atomic { need != 0 && !is_queued -> join_queue() }
  :: atomic { need != 0 && retry_to == NOBODY && !IS_ANY_LIVE -> take_nan() }
  :: atomic { retry_to != NOBODY && REPLY_IS_HERE(BOX(a, retry_to, RETRY)) -> consume_retry() }
  :: atomic { retry_to != NOBODY && IS_GONE(retry_to, RETRY) ->
      assert(!was_here[BOX(a, retry_to, RETRY)]);
      need = need | to_expert[BOX(a, retry_to, RETRY)].groups;
      retry_to = NOBODY }
#ifdef DEADLINES
  :: atomic { !has_failed && !IS_READY -> fail_wait(); if :: need != 0 && retry_to == NOBODY -> take_nan() :: skip fi }
#endif
  :: atomic { MY_TURN && IS_READY ->
      take_reply(0);
      take_reply(1);
#if E == 3
      take_reply(2);
#endif
      assert((got | given_up) == ALL && (got & given_up) == 0); /* no row is lost unknowingly */
      break }
  od
}
