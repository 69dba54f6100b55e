/* SPDX-License-Identifier: Apache-2.0 */
/* Lives and links: an index that is given back and used again, links of two lives that are made again, handshakes that
 * overlap, and what is still written on old links.
 *
 * Modelled: one attention rank and one expert rank, with A and E lives that may overlap, and INDICES entries for peers
 * at either side; handshakes whose parts come at any later time and are given up half way; links that are cut between
 * two living ranks, and lives that die, at any step, up to LOSSES times in all; watchers that say so at any later time,
 * each side for itself. A row is the identity of the link that it was sent on: whoever reads one asserts that it is
 * this very link's.
 *
 *   connect      an attention rank's Comm::offer, attach and watch, or withdraw; close
 *   accept_link  the same of an expert rank
 *   microbatch   AttentionComm::dispatch_send, combine_recv, with take_hold and drop_hold of core/hold.h
 *   expert       ExpertComm::dispatch_recv (scan, under the lock of the inboxes), combine_send
 *   others       for each entry: the watcher; a caller that is told of a loss and calls recover; the return
 *
 * A landing area belongs to one link: each has fresh memory. With SHARED all ranks are in one process, and an index is
 * one piece of memory whoever has mapped it: who writes on an old link writes into what the index has now. There an
 * entry is first unmapped, and its index returned when the peer's has been too.
 *
 * Abstracted away: memory orders (explorer/hold.cc); what exchange.pml and loss.pml have; zero rows, which are messages
 * like any other here. Every run is finite: "every wait ends" and "no index is kept for ever" are "no invalid end
 * state". Configured by A, E, INDICES (1 or 2), LINKS, SLOTS (1 or 2), LAPS, LOSSES; TWO_THREADS serve each expert rank.
 * BUG_...: a mistake.
 */
#define UNUSED 0 /* free, or being joined */
#define LIVE 1
#define LEFT 2
#define LOST 3
#define NOBODY LINKS
#define SEQS 4
#define NEXT(seq) (((seq) + 1) % SEQS)

typedef Entry {     /* of a peer, at one side */
  byte state;
  byte link;        /* whose it is */
  byte offered;     /* at the expert rank: its place among all offers */
  bool is_known;    /* the caller knows that the link is gone, or a newer one of the same rank is live */
  bool is_unmapped; /* the peer's memory cannot be written from here any more */
  byte hold[SLOTS]; /* of an expert rank a count: the next message may be taken before the last batch has let go */
  byte sent[SLOTS]; /* SendSeq; of an expert rank RecvSeq: accepted */
  byte done[SLOTS]; /* consumed; of an expert rank: replied */
  byte users        /* ghost: verbs that use what the entry has */
};
Entry at_a[A * INDICES], at_e[E * INDICES];

typedef Area {
  byte seq;    /* the signal */
  byte row;    /* the link that the rows were sent on */
  bool unread  /* ghost */
};
Area to_expert[LINKS * SLOTS], to_attention[LINKS * SLOTS];

typedef Link {
  byte a, e;        /* its lives */
  byte at_a, at_e;  /* its entries */
  byte number;      /* among the links of these two lives, from 1 */
  bool is_offered, is_cut, says_goodbye
};
Link link[LINKS];
byte num_links;
byte numbers[A * E];      /* given */
byte newest_seen[A * E];  /* at the expert rank: the highest number of this life */
byte newest_live[A * E];  /* ghost: the same, of links that were live */
byte offers[E];           /* made by the expert rank */
byte newest_offer[E];     /* the latest one that was ever live */
byte untold_a[A], untold_e[E]; /* ghost: losses that no caller was told of */
bool gone_a[A], gone_e[E]; /* dead, or closed */
bool is_done[A];          /* all messages of this life are sent and answered, or given up */
byte microbatches[A];     /* that have not ended */
byte accepting[E];        /* handshakes that have not ended */
byte current;             /* the expert rank's life that a joiner finds in the store */

#define BOX(l, s) ((l) * SLOTS + (s))
#define PAIR(l) (link[l].a * E + link[l].e)
#define GONE_A(l) gone_a[link[l].a]
#define GONE_E(l) gone_e[link[l].e]
#ifdef SHARED
#define OF_EXPERT(l) (at_e[link[l].at_e].link == NOBODY -> (l) : at_e[link[l].at_e].link)
#define OF_ATTENTION(l) (at_a[link[l].at_a].link == NOBODY -> (l) : at_a[link[l].at_a].link)
#define HAS_MAPPED(entry, l, is_gone) (!(is_gone) && entry.link == (l) && !entry.is_unmapped)
#else
#define OF_EXPERT(l) (l)
#define OF_ATTENTION(l) (l)
#define HAS_MAPPED(entry, l, is_gone) false
#endif

#define IS_FREE(entry) (entry.link == NOBODY)
#define IS_LIVE(entry) (entry.state == LIVE)
#define IS_GONE(entry) (entry.state == LEFT || entry.state == LOST)
#define IS_UNTOLD(entry) (entry.state == LOST && !entry.is_known)
#define IS_SETTLED(entry) (IS_FREE(entry) || IS_LIVE(entry))
#define IS_OLD(entry) (IS_LIVE(entry) && link[entry.link % LINKS].e != current)
#if INDICES == 2
#define ANY(is, at, whose) (is(at[(whose) * 2]) || is(at[(whose) * 2 + 1]))
#define ALL(is, at, whose) (is(at[(whose) * 2]) && is(at[(whose) * 2 + 1]))
#define FIRST(is, at, whose) (is(at[(whose) * 2]) -> (whose) * 2 : (whose) * 2 + 1)
#else
#define ANY(is, at, whose) is(at[whose])
#define ALL(is, at, whose) is(at[whose])
#define FIRST(is, at, whose) (whose)
#endif
#if SLOTS == 2
#define IS_HELD(entry) (entry.hold[0] || entry.hold[1])
#else
#define IS_HELD(entry) entry.hold[0]
#endif

/* --- what both sides do with their entries; `whose` is a life */

inline know(entry, untold) {
  if :: IS_UNTOLD(entry) -> untold-- :: else fi;
  entry.is_known = true
}

inline lose(entry, untold) {
  entry.state = LOST;
  entry.is_known = false;
  untold++;
  link[entry.link].is_cut = true
}

/* Every other link of that rank, whichever it is, is LOST from here on. */
inline go_live(entry, other, untold) {
#if INDICES == 2
#ifdef BUG_ONLY_LOWER_INDICES
  if
  :: mine % 2 == 1 && IS_LIVE(other) -> lose(other, untold)
  :: else
  fi;
#elif !defined(BUG_BOTH_LIVE)
  if :: IS_LIVE(other) -> lose(other, untold) :: else fi;
#endif
  if :: IS_GONE(other) -> know(other, untold) :: else fi;
  assert(!IS_LIVE(other)); /* never two live links of one rank */
#endif
  entry.state = LIVE
}

/* A handshake failed: nobody has to be told, and the returner does the rest. */
inline withdraw(entry, l) {
  link[l].is_cut = true;
  entry.state = LOST;
  entry.is_known = true
}

#ifdef BUG_NOT_HELD
#define MAY_END(entry) (IS_GONE(entry) && (entry.state == LEFT || entry.is_known))
#elif defined(BUG_NOT_KNOWN)
#define MAY_END(entry) (IS_GONE(entry) && !IS_HELD(entry))
#else
#define MAY_END(entry) (IS_GONE(entry) && (entry.state == LEFT || entry.is_known) && !IS_HELD(entry))
#endif

inline unmap(entry) {
  assert(entry.users == 0); /* nothing is given back while a verb uses it */
  entry.is_unmapped = true
}

inline give_back(entry) {
  assert(entry.users == 0);
  entry.state = UNUSED;
  entry.link = NOBODY;
  entry.offered = 0;
  entry.is_known = false;
  entry.is_unmapped = false;
  entry.hold[0] = false;
#ifndef BUG_SEQS_NOT_RESET
  entry.sent[0] = 0;
  entry.done[0] = 0;
#endif
#if SLOTS == 2
  entry.hold[1] = false;
#ifndef BUG_SEQS_NOT_RESET
  entry.sent[1] = 0;
  entry.done[1] = 0;
#endif
#endif
}

/* --- links */

#ifdef SHARED /* its memory is found there, or it has gone already */
#define MAY_ACCEPT(l) (HAS_MAPPED(at_a[link[l].at_a], l, GONE_A(l)) && !IS_GONE(at_a[link[l].at_a]))
#define MAY_ATTACH(l) (link[l].is_offered && HAS_MAPPED(at_e[link[l].at_e], l, GONE_E(l)))
#else
#define MAY_ACCEPT(l) true
#define MAY_ATTACH(l) link[l].is_offered
#endif
#ifdef BUG_NUMBER_NOT_COMPARED
#define IS_NEWER(l) true
#else
#define IS_NEWER(l) (link[l].number > newest_seen[PAIR(l)])
#endif
#ifdef BUG_ONLY_LIVE_LINKS_COMPARED /* that one may have come to its end meanwhile, and its index to another */
#define IS_OVERTAKEN (INDICES == 2 && IS_LIVE(at_e[mine ^ 1]) && at_e[mine].offered < at_e[mine ^ 1].offered)
#elif defined(BUG_OVERTAKEN_GOES_LIVE)
#define IS_OVERTAKEN false
#else
#define IS_OVERTAKEN (at_e[mine].offered < newest_offer[e])
#endif

proctype accept_link(byte l) {
  byte e, mine;
  e = link[l].e;
  {
    if
    :: atomic { IS_NEWER(l) && ANY(IS_FREE, at_e, e) && MAY_ACCEPT(l) ->
          mine = FIRST(IS_FREE, at_e, e);
          at_e[mine].link = l;
          offers[e]++;
          at_e[mine].offered = offers[e];
          newest_seen[PAIR(l)] = link[l].number;
          link[l].at_e = mine;
          link[l].is_offered = true
        };
        atomic {
          if
          :: link[l].is_cut || IS_OVERTAKEN -> withdraw(at_e[mine], l)
          :: !IS_OVERTAKEN ->
              go_live(at_e[mine], at_e[mine ^ 1], untold_e[e]);
              assert(link[l].number > newest_live[PAIR(l)]); /* no link comes after a newer one */
              assert(at_e[mine].offered > newest_offer[e]);
              newest_live[PAIR(l)] = link[l].number;
              newest_offer[e] = at_e[mine].offered
          fi;
          accepting[e]--
        }
    :: atomic { link[l].is_cut || !IS_NEWER(l) -> accepting[e]-- } /* refused */
    fi
  } unless { gone_e[e] }
}

#define WANTS_LINK(a_) (!ANY(IS_LIVE, at_a, a_) || ANY(IS_OLD, at_a, a_))

proctype connect(byte a) {
  byte i, l, mine;
  {
    do
    :: atomic { !is_done[a] && num_links < LINKS && WANTS_LINK(a) && ANY(IS_FREE, at_a, a) ->
          l = num_links;
          num_links++;
          mine = FIRST(IS_FREE, at_a, a);
          at_a[mine].link = l;
          link[l].a = a;
          link[l].e = current;
          link[l].at_a = mine;
          numbers[PAIR(l)]++;
          link[l].number = numbers[PAIR(l)];
          accepting[link[l].e]++;
          run accept_link(l) };
        if
        :: atomic { MAY_ATTACH(l) -> go_live(at_a[mine], at_a[mine ^ 1], untold_a[a]); l = 0; mine = 0 }
        :: atomic { withdraw(at_a[mine], l); l = 0; mine = 0 } /* refused, or its time is over */
        fi
    :: atomic { is_done[a] || num_links == LINKS -> break }
    od;
    (is_done[a]);
    atomic { ALL(IS_SETTLED, at_a, a) -> /* no index is kept for ever; then close: a goodbye to who is left */
      i = 0;
      do
      :: i < INDICES ->
          if
          :: IS_LIVE(at_a[a * INDICES + i]) ->
              link[at_a[a * INDICES + i].link].says_goodbye = true;
              link[at_a[a * INDICES + i].link].is_cut = true
          :: else
          fi;
          i++
      :: else -> break
      od;
      assert(untold_a[a] == 0); /* of every loss a caller was told */
      at_a[a * INDICES].link = NOBODY;
      at_a[a * INDICES].state = UNUSED;
      at_a[a * INDICES + INDICES - 1].link = NOBODY;
      at_a[a * INDICES + INDICES - 1].state = UNUSED;
      gone_a[a] = true
    }
  } unless { gone_a[a] }
}

/* --- verbs */

#define MY_REPLY to_attention[BOX(at_a[mine].link, s)]

inline send() { /* put and signal */
  assert(!to_expert[BOX(OF_EXPERT(l), s)].unread); /* no unread row is overwritten */
  at_a[mine].sent[s] = NEXT(at_a[mine].sent[s]);
  to_expert[BOX(OF_EXPERT(l), s)].row = l;
  to_expert[BOX(OF_EXPERT(l), s)].unread = true;
  to_expert[BOX(OF_EXPERT(l), s)].seq = at_a[mine].sent[s]
}

inline begin_use() { at_a[mine].users++; l = at_a[mine].link }

proctype microbatch(byte a, s) {
  byte lap, l, mine;
  {
    do
    :: atomic { lap < LAPS && ANY(IS_LIVE, at_a, a) ->
          mine = FIRST(IS_LIVE, at_a, a);
#ifdef BUG_STATE_BEFORE_HOLD
          begin_use()
        };
        atomic { at_a[mine].hold[s] = true; send() };
#else
          at_a[mine].hold[s] = true
        };
        atomic {
          if
          :: IS_LIVE(at_a[mine]) -> begin_use(); send()
          :: else -> at_a[mine].hold[s] = false; mine = 0; goto again
          fi
#ifdef BUG_HOLD_ENDS_EARLY
          ; at_a[mine].hold[s] = false
#endif
        };
#endif
        atomic {
          if
          :: MY_REPLY.seq == at_a[mine].sent[s] ->
              assert(MY_REPLY.unread && MY_REPLY.row == l); /* nothing of another link is delivered */
              MY_REPLY.unread = false;
              at_a[mine].hold[s] = false
          :: IS_GONE(at_a[mine]) && MY_REPLY.seq != at_a[mine].sent[s] -> /* PeerLost */
#ifndef BUG_HOLD_IS_KEPT
              at_a[mine].hold[s] = false
#endif
          fi;
          at_a[mine].done[s] = at_a[mine].sent[s];
          at_a[mine].users--;
          lap++;
          mine = 0;
          l = 0
        };
again:  skip
    :: atomic { lap == LAPS -> break }
    :: atomic { num_links == LINKS && ALL(IS_FREE, at_a, a) -> break } /* nobody comes any more */
    od;
    atomic { microbatches[a]--; is_done[a] = (microbatches[a] == 0) }
  } unless { gone_a[a] }
}

#define MY_MESSAGE to_expert[BOX(at_e[mine].link, s)]
/* A message that came whole counts, though its sender is gone. */
#define IS_HERE(j_, s_) (at_e[j_].state != UNUSED && !at_e[j_].is_known && !at_e[j_].is_unmapped && \
                         to_expert[BOX(at_e[j_].link, s_)].seq != at_e[j_].sent[s_])
#ifdef BUG_HOLD_NOT_COUNTED
#define HOLD_BATCH at_e[mine].hold[s] = 1
#define END_BATCH at_e[mine].hold[s] = 0
#elif defined(BUG_HOLD_ENDS_BEFORE_REPLY)
#define HOLD_BATCH at_e[mine].hold[s]++
#define END_BATCH skip
#else
#define HOLD_BATCH at_e[mine].hold[s]++
#define END_BATCH at_e[mine].hold[s]--
#endif
#define TAKE(j_, s_) \
  :: atomic { IS_HERE(j_, s_) -> \
        mine = j_; s = s_; \
        assert(MY_MESSAGE.seq == NEXT(at_e[mine].sent[s]) && at_e[mine].sent[s] == at_e[mine].done[s]); \
        at_e[mine].sent[s] = MY_MESSAGE.seq; \
        l = at_e[mine].link; \
        at_e[mine].users++; \
        HOLD_BATCH }

proctype expert(byte e) {
  byte mine, s, l;
  {
end:
    do
    :: if
       TAKE(e * INDICES, 0)
#if INDICES == 2
       TAKE(e * INDICES + 1, 0)
#endif
#if SLOTS == 2
       TAKE(e * INDICES, 1)
#if INDICES == 2
       TAKE(e * INDICES + 1, 1)
#endif
#endif
       fi;
#ifdef BUG_HOLD_ENDS_BEFORE_REPLY
       at_e[mine].hold[s]--;
#endif
       atomic {
         assert(MY_MESSAGE.unread && MY_MESSAGE.row == l);       /* nothing of another link is delivered */
         assert(!to_attention[BOX(OF_ATTENTION(l), s)].unread); /* no unread row is overwritten */
         MY_MESSAGE.unread = false;
         at_e[mine].done[s] = at_e[mine].sent[s];
         to_attention[BOX(OF_ATTENTION(l), s)].row = l;
         to_attention[BOX(OF_ATTENTION(l), s)].unread = true;
         to_attention[BOX(OF_ATTENTION(l), s)].seq = at_e[mine].done[s]
       };
       atomic {
         at_e[mine].users--;
         END_BATCH;
         mine = 0;
         s = 0;
         l = 0
       }
    od
  } unless { gone_e[e] }
}

/* --- whoever else looks at an entry: of each the steps come at any time */

#ifdef BUG_EACH_WAITS_FOR_THE_OTHER /* an entry is unmapped when its index is returned, not before */
#define UNMAPPED_FIRST false
#define MAY_RETURN(entry) MAY_END(entry)
#elif defined(SHARED)
#define UNMAPPED_FIRST true
#define MAY_RETURN(entry) entry.is_unmapped
#else
#define UNMAPPED_FIRST false
#define MAY_RETURN(entry) MAY_END(entry)
#endif
#ifdef BUG_OLD_MAPPING_NOT_AWAITED
#define IS_LET_GO(other, l, is_gone) true
#else
#define IS_LET_GO(other, l, is_gone) !HAS_MAPPED(other, l, is_gone)
#endif

#define OTHERS(entry, at_other, other_of, untold_, is_gone_other) \
  :: atomic { IS_LIVE(entry) && link[entry.link].is_cut -> \
        if \
        :: link[entry.link].says_goodbye -> entry.state = LEFT \
        :: else -> lose(entry, untold_) \
        fi } \
  :: atomic { IS_UNTOLD(entry) -> know(entry, untold_); RECOVER_MISTAKE(entry) } \
  :: atomic { UNMAPPED_FIRST && !entry.is_unmapped && MAY_END(entry) -> unmap(entry) } \
  :: atomic { !IS_FREE(entry) && MAY_RETURN(entry) && \
              IS_LET_GO(at_other[other_of(entry.link)], entry.link, is_gone_other(entry.link)) -> give_back(entry) }
#ifdef BUG_RECOVER_DROPS_HOLDS
#define RECOVER_MISTAKE(entry) entry.hold[0] = false
#else
#define RECOVER_MISTAKE(entry) skip
#endif
#define INDEX_E(l) link[l].at_e
#define INDEX_A(l) link[l].at_a

proctype others_a(byte a) {
  {
end:
    do
    OTHERS(at_a[a * INDICES], at_e, INDEX_E, untold_a[a], GONE_E)
#if INDICES == 2
    OTHERS(at_a[a * INDICES + 1], at_e, INDEX_E, untold_a[a], GONE_E)
#endif
    od
  } unless { gone_a[a] }
}

proctype others_e(byte e) {
  {
end:
    do
    OTHERS(at_e[e * INDICES], at_a, INDEX_A, untold_e[e], GONE_A)
#if INDICES == 2
    OTHERS(at_e[e * INDICES + 1], at_a, INDEX_A, untold_e[e], GONE_A)
#endif
    od
  } unless { gone_e[e] }
}

/* --- what goes wrong, and the end */

inline cut_all_of(is_its) {
  i = 0;
  do
  :: i < num_links -> if :: is_its -> link[i].is_cut = true :: else fi; i++
  :: else -> break
  od
}

proctype fate() {
  byte losses, i;
end:
  do
  :: atomic { losses < LOSSES && num_links > 0 && !link[0].is_cut -> link[0].is_cut = true; losses++ }
  :: atomic { losses < LOSSES && num_links > 1 && !link[1].is_cut -> link[1].is_cut = true; losses++ }
#if LINKS == 3
  :: atomic { losses < LOSSES && num_links > 2 && !link[2].is_cut -> link[2].is_cut = true; losses++ }
#endif
#ifdef KILLS
  :: atomic { losses < LOSSES && !gone_a[0] -> gone_a[0] = true; cut_all_of(link[i].a == 0); losses++; i = 0 }
#if E > 1
  :: atomic { losses < LOSSES && !gone_e[0] && current > 0 ->
        gone_e[0] = true; cut_all_of(link[i].e == 0); losses++; i = 0 }
#endif
#endif
  od
}

inline start(a_) {
  microbatches[a_] = SLOTS;
  run connect(a_);
  run others_a(a_);
  run microbatch(a_, 0)
#if SLOTS == 2
  ; run microbatch(a_, 1)
#endif
}

init {
  byte i;
  atomic {
    for (i : 0 .. A * INDICES - 1) { at_a[i].link = NOBODY }
    for (i : 0 .. E * INDICES - 1) { at_e[i].link = NOBODY }
    for (i : 0 .. E - 1) {
      run expert(i);
#ifdef TWO_THREADS
      run expert(i);
#endif
      run others_e(i)
    }
    run fate();
    start(0);
    i = 0
  }
  /* The next lives, at any time: the last ones may still be there. */
#if A > 1
  atomic { start(1) }
#endif
#if A > 2
  atomic { start(2) }
#endif
#if E > 1
  current = 1;
#endif
  i = 0;
  do
  :: i < A -> (gone_a[i]); i++ /* every wait has ended */
  :: else -> break
  od;
  i = 0;
  do
  :: i < E ->
      (gone_e[i] || (accepting[i] == 0 && ALL(IS_FREE, at_e, i))); /* no index is kept for ever */
      atomic { assert(gone_e[i] || untold_e[i] == 0); i++ }
  :: else -> break
  od
}
