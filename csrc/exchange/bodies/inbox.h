// SPDX-License-Identifier: Apache-2.0
// What an expert rank knows of arrived messages, and which batch goes next. Host and device run the same lines.
#pragma once

#include <cstdint>
#include <string>

#include "core/peer.h"
#include "core/slot.h"
#include "exchange/bodies/dispatch.h"
#include "exchange/rows/layout.h"
#include "exchange/rows/put_rows.h"

namespace m2n {

inline constexpr int64_t kNever = INT64_MAX;

// Kept per (attention peer, slot). `header` is the private copy of the message that waits there.
struct Inbox {
  RecvSeq seq;
  bool is_pending = false;
  bool is_expected = false;  // has dispatched before, and did not say IDLE_NEXT
  bool is_closed = false;    // its peer is gone, and what it completed before has been seen: nothing more counts
  int64_t seen_ns = kNever;  // kNever until stamp()
  Header header{};
};

struct InboxView {
  Layout layout;
  uint32_t max_tokens;
  PeerTable peers;
  const unsigned char* meta;  // our own window of meta objects, by peer index
  Inbox* inboxes;             // [peer][slot]

  M2N_HD Inbox& at(uint32_t peer_idx, uint32_t slot) const { return inboxes[peer_idx * layout.num_slots + slot]; }
  M2N_HD const unsigned char* meta_of(uint32_t peer_idx) const {
    return meta + peer_idx * layout.dispatch_meta.object_bytes;
  }
  M2N_HD const Signal* signal_of(uint32_t peer_idx, uint32_t slot) const {
    return reinterpret_cast<const Signal*>(meta_of(peer_idx) + layout.dispatch_meta.signal(slot));
  }
  // Do messages of this peer count that have come? Those of one that is gone do until it is given up, or its rank has a
  // newer life.
  M2N_HD bool is_served(uint32_t peer_idx) const {
    const PeerState state = peers.state(peer_idx);
    if (state == PeerState::kLive) return true;
    return is_gone(state) && !peers.is_given_up(peer_idx) &&
           peers.find(peers.entries[peer_idx].rank) == static_cast<int32_t>(peer_idx);
  }
};

enum class Breach : uint32_t { kNone, kSeq, kNumRows, kHeaderRows, kMicrobatch, kFlags, kIdRange, kWeight };

// How a peer broke the protocol; `seen` is the value that is wrong.
struct Violation {
  Breach breach = Breach::kNone;
  uint32_t peer_idx = 0;
  uint32_t slot = 0;
  uint32_t expected = 0;  // kSeq: the seq; kIdRange, kWeight: the row
  int64_t seen = 0;
};

// In words; `layer` is that of the message.
std::string describe(const Violation& violation, uint32_t layer);

// Checks the private copy of a header against its signal.
M2N_HD inline Violation check_header(const Layout& layout, uint32_t max_tokens, uint32_t peer_idx, uint32_t slot,
                                     Signal signal, const Header& header) {
  const auto broken = [&](Breach breach, uint32_t seen) { return Violation{breach, peer_idx, slot, 0, seen}; };
  if (signal_rows(signal) > max_tokens) return broken(Breach::kNumRows, signal_rows(signal));
  if (header.num_rows != signal_rows(signal)) return broken(Breach::kHeaderRows, header.num_rows);
  if (header.microbatch != slot && slot != layout.retry_slot()) return broken(Breach::kMicrobatch, header.microbatch);
  if ((header.flags & ~kKnownFlags) != 0) return broken(Breach::kFlags, header.flags);
  return {};
}

struct Scanned {
  Violation violation;
  uint32_t num_arrived = 0;
  uint32_t num_answered = 0;  // empty messages that nobody else sees
};

// Answers a message without rows: an empty one, or one that is refused.
template <class Exec>
M2N_HD void answer_empty(Exec& exec, const InboxView& view, uint32_t peer_idx, uint32_t slot, uint32_t num_rows,
                         uint32_t detail) {
  Inbox& box = view.at(peer_idx, slot);
  Header header{};
  header.layer = box.header.layer;
  header.microbatch = slot;
  header.num_rows = num_rows;
  header.detail = detail;
  box.seq.replied = box.seq.accepted;
  const PeerView& peer = view.peers.entries[peer_idx].view;
  flush(exec, peer_signal(peer, view.layout.combine_meta, slot));
  ring(exec, peer, view.layout.combine_meta, slot, box.seq.replied, header);
}

// Notes the message behind a new signal. The header is read once into private memory and checked there.
template <class Exec>
M2N_HD Violation accept(Exec& exec, const InboxView& view, uint32_t peer_idx, uint32_t slot, Signal signal,
                        Scanned* scanned) {
  Inbox& box = view.at(peer_idx, slot);
  if (signal_seq(signal) != box.seq.accepted + 1u || box.seq.accepted != box.seq.replied) {
    return {Breach::kSeq, peer_idx, slot, box.seq.accepted + 1, signal_seq(signal)};
  }
  const unsigned char* meta = view.meta_of(peer_idx);
  // What is read next comes from the same core.
  prefetch(meta + view.layout.dispatch_meta.ids(slot));
  prefetch(meta + view.layout.dispatch_meta.weights(slot));
  const Header header = read_header(meta + view.layout.dispatch_meta.header(slot));
  const Violation violation = check_header(view.layout, view.max_tokens, peer_idx, slot, signal, header);
  if (violation.breach != Breach::kNone) return violation;
  ++scanned->num_arrived;
  box.seq.accepted = signal_seq(signal);
  box.header = header;
  box.is_expected = (header.flags & kFlagIdleNext) == 0;
  box.is_pending = header.num_rows != 0 || box.is_expected;
  box.seen_ns = kNever;
  if (box.is_pending) return {};
  answer_empty(exec, view, peer_idx, slot, 0, 0);  // "nothing to send": answered here
  ++scanned->num_answered;
  return {};
}

// One look at a slot whose peer was in this `state` before. A peer that is gone is looked at once more, as by look_for:
// what it completed before its end still counts. What else it wrote there is nobody's any more, and no violation.
template <class Exec>
M2N_HD Violation look_at(Exec& exec, const InboxView& view, uint32_t peer_idx, uint32_t slot, PeerState state,
                         Scanned* scanned) {
  Inbox& box = view.at(peer_idx, slot);
  if (state == PeerState::kUnused || box.is_closed) return {};
  const Signal signal = poll_signal(view.signal_of(peer_idx, slot));
  Violation violation;
  if (signal_seq(signal) != box.seq.accepted) violation = accept(exec, view, peer_idx, slot, signal, scanned);
  if (!is_gone(state)) return violation;
  box.is_closed = true;
  return {};
}

// Notes everything that has arrived since the last look, up to the first violation. For one thread. What it finds has
// no time yet: a reading of the clock takes as long as a hop between cores, and a batch that is complete needs none.
template <class Exec>
M2N_HD Scanned scan(Exec& exec, const InboxView& view) {
  Scanned scanned;
  const uint32_t num_peers = view.peers.size();
  for (uint32_t peer_idx = 0; peer_idx < num_peers; ++peer_idx) {
    const PeerState state = view.peers.state(peer_idx);
    for (uint32_t slot = 0; slot < view.layout.num_slots; ++slot) {
      // Mostly the peer is live, and nothing is new: waits look again and again.
      const bool is_quiet = state == PeerState::kLive && signal_seq(poll_signal(view.signal_of(peer_idx, slot))) ==
                                                             view.at(peer_idx, slot).seq.accepted;
      if (is_quiet) continue;
      scanned.violation = look_at(exec, view, peer_idx, slot, state, &scanned);
      if (scanned.violation.breach != Breach::kNone) return scanned;
    }
  }
  return scanned;
}

// The newest placement version that the last messages of a peer tell. Only reported: it may write any number there.
M2N_HD inline uint32_t shown_version(const InboxView& view, uint32_t peer_idx) {
  uint32_t newest = 0;
  for (uint32_t slot = 0; slot < view.layout.num_slots; ++slot) {
    const uint32_t version = view.at(peer_idx, slot).header.placement_version;
    if (version > newest) newest = version;
  }
  return newest;
}

// Gives what waits without one the time at which it was seen.
M2N_HD inline void stamp(const InboxView& view, int64_t now_ns) {
  for (uint32_t i = 0; i < view.peers.size() * view.layout.num_slots; ++i) {
    Inbox& box = view.inboxes[i];
    if (box.is_pending && box.seen_ns == kNever) box.seen_ns = now_ns;
  }
}

// A batch, by what its messages name.
struct Work {
  uint32_t layer;
  uint32_t microbatch;
};

// Which batch dispatch_recv is asked for.
struct Wanted {
  bool is_any_layer = true;
  uint32_t layer = 0;
  bool is_any_microbatch = true;
  uint32_t microbatch = 0;
  int64_t linger_ns = 0;                      // how long to wait for others after the first message
  const uint32_t* attention_ranks = nullptr;  // where given: strictly all of these, and no lingering
  uint32_t num_attention_ranks = 0;
  uint64_t open_slots = 0;  // bits: not these; a batch of theirs is still being served (on a device)

  M2N_HD bool matches(const Inbox& box) const {
    return box.is_pending && (is_any_layer || layer == box.header.layer) &&
           (is_any_microbatch || microbatch == box.header.microbatch) && (open_slots >> box.header.microbatch & 1) == 0;
  }
  M2N_HD bool is_listed(uint32_t rank) const {
    for (uint32_t i = 0; i < num_attention_ranks; ++i) {
      if (attention_ranks[i] == rank) return true;
    }
    return false;
  }
  M2N_HD bool is_strict() const { return num_attention_ranks != 0; }
};

// What a look at the inboxes found.
struct Found {
  bool is_complete = false;  // (layer, microbatch) can be received
  uint32_t layer = 0;
  uint32_t microbatch = 0;
  bool is_started = false;           // at least one message that matches waits
  int64_t linger_until_ns = kNever;  // when the lingering for the first of them ends
};

// Has (layer, microbatch) everybody it waits for? Else `linger_until_ns` is lowered to the end of lingering.
template <class Clock>
M2N_HD bool is_complete(const InboxView& view, const Wanted& wanted, uint32_t layer, uint32_t microbatch, Clock&& clock,
                        int64_t* linger_until_ns) {
  int64_t first_seen_ns = kNever;
  bool is_anyone_missing = false;
  uint32_t num_listed = 0;
  for (uint32_t peer_idx = 0; peer_idx < view.peers.size(); ++peer_idx) {
    const Inbox& box = view.at(peer_idx, microbatch);
    const bool is_here = box.is_pending && box.header.layer == layer && view.is_served(peer_idx);
    if (is_here && box.seen_ns < first_seen_ns) first_seen_ns = box.seen_ns;
    if (is_here && wanted.is_listed(view.peers.entries[peer_idx].rank)) ++num_listed;
    // A peer whose slot holds another layer cannot send this one before that is answered.
    const bool may_come = !box.is_pending && box.is_expected && box.seq.accepted == box.seq.replied;
    if (may_come && view.peers.is_live(peer_idx)) is_anyone_missing = true;
  }
  if (wanted.is_strict()) return num_listed == wanted.num_attention_ranks;
  if (!is_anyone_missing || wanted.linger_ns == 0) return true;
  const int64_t now_ns = clock();
  const int64_t until_ns = (first_seen_ns == kNever ? now_ns : first_seen_ns) + wanted.linger_ns;
  if (now_ns >= until_ns) return true;
  if (until_ns < *linger_until_ns) *linger_until_ns = until_ns;
  return false;
}

// The complete (layer, microbatch) whose first message came first. `clock()` is called only where lingering decides.
template <class Clock>
M2N_HD Found find_complete(const InboxView& view, const Wanted& wanted, Clock&& clock) {
  Found found;
  int64_t found_seen_ns = kNever;
  for (uint32_t peer_idx = 0; peer_idx < view.peers.size(); ++peer_idx) {
    const uint32_t first = wanted.is_any_microbatch ? 0 : wanted.microbatch;
    const uint32_t end = wanted.is_any_microbatch ? view.layout.num_slots - 1 : wanted.microbatch + 1;
    for (uint32_t microbatch = first; microbatch < end; ++microbatch) {
      const Inbox& box = view.at(peer_idx, microbatch);
      if (!wanted.matches(box) || !view.is_served(peer_idx)) continue;
      found.is_started = true;
      if (found.is_complete && box.seen_ns >= found_seen_ns) continue;
      if (!is_complete(view, wanted, box.header.layer, microbatch, clock, &found.linger_until_ns)) continue;
      found.is_complete = true;
      found.layer = box.header.layer;
      found.microbatch = microbatch;
      found_seen_ns = box.seen_ns;
    }
  }
  return found;
}

// Strict: does a message that matches wait, of this rank?
M2N_HD inline bool has_sent(const InboxView& view, const Wanted& wanted, uint32_t rank) {
  const int32_t peer_idx = view.peers.find(rank);
  if (peer_idx < 0 || !view.is_served(static_cast<uint32_t>(peer_idx))) return false;
  bool is_here = false;
  for (uint32_t slot = 0; slot + 1 < view.layout.num_slots; ++slot) {
    is_here |= wanted.matches(view.at(static_cast<uint32_t>(peer_idx), slot));
  }
  return is_here;
}

// Strict: the first listed rank that has not sent and never will, else the first that has not, or -1.
M2N_HD inline int32_t missing_rank(const InboxView& view, const Wanted& wanted) {
  int32_t missing = -1;
  for (uint32_t i = 0; i < wanted.num_attention_ranks; ++i) {
    const uint32_t rank = wanted.attention_ranks[i];
    if (has_sent(view, wanted, rank)) continue;
    const int32_t peer_idx = view.peers.find(rank);
    if (peer_idx >= 0 && !view.peers.is_live(static_cast<uint32_t>(peer_idx))) return static_cast<int32_t>(rank);
    if (missing < 0) missing = static_cast<int32_t>(rank);
  }
  return missing;
}

// Does this message go into the batch (layer, microbatch)?
M2N_HD inline bool belongs(const InboxView& view, const Wanted& wanted, uint32_t layer, uint32_t microbatch,
                           uint32_t peer_idx) {
  const Inbox& box = view.at(peer_idx, microbatch);
  if (!box.is_pending || box.header.layer != layer || !view.is_served(peer_idx)) return false;
  return !wanted.is_strict() || wanted.is_listed(view.peers.entries[peer_idx].rank);
}

// The message that waits in a slot, as one of a batch.
M2N_HD inline BatchMessage message_of(const InboxView& view, uint32_t peer_idx, uint32_t slot, uint32_t first_row) {
  const Inbox& box = view.at(peer_idx, slot);
  const unsigned char* meta = view.meta_of(peer_idx);
  const auto* ids = reinterpret_cast<const int32_t*>(meta + view.layout.dispatch_meta.ids(slot));
  const auto* weights = reinterpret_cast<const float*>(meta + view.layout.dispatch_meta.weights(slot));
  return {{peer_idx, slot, box.header.num_rows, ids, weights}, box.seq.accepted, first_row};
}

// The experts that are hosted here.
struct Hosted {
  uint32_t num_experts;       // of all
  const int32_t* expert_idx;  // [num_experts]: global id -> local index, -1: not hosted
};

enum class Taken : uint32_t { kForBatch, kRefused, kBroken };

// Takes a message's ids and weights into private memory, by one thread. One that names an expert that is not hosted is
// refused, which its sender learns; one that breaks the protocol is told in `violation`. Neither waits any longer.
template <class Exec>
M2N_HD Taken take_message(Exec& exec, const InboxView& view, const ArrivedMessage& message, const Hosted& hosted,
                          int32_t* idxs, float* weights, Violation* violation) {
  const RecvResult result = take_ids(message, view.layout.top_k, hosted.num_experts, hosted.expert_idx, idxs, weights);
  if (result.error == RecvError::kNone) return Taken::kForBatch;
  view.at(message.peer_idx, message.slot).is_pending = false;
  if (result.error == RecvError::kNotHosted) {
    const auto expert = static_cast<uint32_t>(result.value);
    answer_empty(exec, view, message.peer_idx, message.slot, kRefusedRows, expert);
    return Taken::kRefused;
  }
  const Breach breach = result.error == RecvError::kWeight ? Breach::kWeight : Breach::kIdRange;
  *violation = {breach, message.peer_idx, message.slot, result.row, result.value};
  return Taken::kBroken;
}

}  // namespace m2n
