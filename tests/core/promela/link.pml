/* SPDX-License-Identifier: Apache-2.0 */
/* What exchange.pml and loss.pml share: the landing areas of A x E links, and what the two sides do to them.
 *
 * A row is one byte, its identity: lap, microbatch, sender. A signal is its seq mod 4; classify() (core/slot.h) is
 * the assertion in accept().
 * The ghost `unread` is true from the signal until the reader has finished: writing an area then is the first thing
 * that these models look for. Memory orders are abstracted away (each step is atomic and seen by all at once): they
 * are the explorer's and the litmus test's job.
 */
#define SEQS 4
#define NEXT(seq) (((seq) + 1) % SEQS)
#define BOX(a, e, slot) (((a) * E + (e)) * SLOTS + (slot))
#define LINK(a, e) ((a) * E + (e))
#define BIT(i) (1 << (i))
#define HAS(mask, i) (((mask) >> (i)) & 1)
#define ROW(lap, mb, a) (1 + (lap) * 16 + (mb) * 4 + (a))

typedef Area {    /* one landing area: rows and header, and the signal word beside it; written by the peer alone */
  byte seq;       /* the signal */
  byte row;       /* identity of the rows */
  byte layer;     /* header.layer */
  byte groups;    /* which rows: bit g for the tokens whose experts lived on expert rank g; 0: zero rows */
  bool idle_next; /* header.flags */
  bool unread     /* ghost */
};
Area to_expert[A * E * SLOTS];    /* dispatch areas, in the expert ranks' memory */
Area to_attention[A * E * SLOTS]; /* combine areas, in the attention ranks' memory */

/* SendSeq of the attention rank: `sent` is what it last wrote, to_expert[].seq. */
byte consumed[A * E * SLOTS];
/* RecvSeq of the expert rank. */
byte accepted[A * E * SLOTS];
byte replied[A * E * SLOTS];

#define AWAITS_REPLY(box) (to_expert[box].seq != consumed[box])
#define REPLY_IS_HERE(box) (to_attention[box].seq == to_expert[box].seq)
/* A message that was not answered; its reader has accepted it already or will at its next look. */
#define IS_HERE(box) (to_expert[box].seq != replied[box])

/* put(): rows and header. */
inline write_message(area, row_, layer_, groups_, idle_) {
  assert(!area.unread); /* no unread row is overwritten */
  area.row = row_;
  area.layer = layer_;
  area.groups = groups_;
  area.idle_next = idle_
}

/* signal() of a dispatch: the seq after the last one. */
inline signal_dispatch(box) {
  to_expert[box].seq = NEXT(to_expert[box].seq);
  to_expert[box].unread = true
}

/* A receiver accepts last + 1 and nothing else, and only after its reply to the last one. */
inline accept(box) {
  assert(to_expert[box].seq == NEXT(accepted[box]) && accepted[box] == replied[box]);
  accepted[box] = to_expert[box].seq
}

/* combine_send() for one message, first half: reads the rows in place and writes the reply. */
inline write_reply(box) {
  assert(to_expert[box].unread && to_expert[box].seq == accepted[box]); /* what was accepted is still there */
  assert(!to_attention[box].unread);                                    /* no unread row is overwritten */
  to_attention[box].row = to_expert[box].row;
  to_attention[box].groups = to_expert[box].groups
}

/* Second half: `replied` before the signal, which may bring the next message at once. */
inline signal_reply(box) {
  to_expert[box].unread = false;
  replied[box] = accepted[box];
  to_attention[box].seq = accepted[box];
  to_attention[box].unread = true
}

/* take_replies() for one reply. */
inline consume_reply(box) {
  consumed[box] = to_expert[box].seq;
  to_attention[box].unread = false
}
