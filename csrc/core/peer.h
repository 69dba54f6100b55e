// SPDX-License-Identifier: Apache-2.0
// What one rank may write in one peer's memory, and the three things it does there: put, drain, signal.
#pragma once

#include <cstring>
#include <type_traits>
#include <utility>

#include "core/arrive.h"
#include "core/atomic.h"
#include "core/copy.h"
#include "core/doorbell.h"
#include "core/platform.h"
#include "core/slot.h"
#include "core/wake.h"
#include "core/wire.h"

namespace m2n {

// Plain pointers without ownership: a kernel may hold it by value.
struct PeerView {
  unsigned char* rows = nullptr;       // the peer's landing area for rows from us
  unsigned char* meta = nullptr;       // signals, headers, ids and weights for the same slots
  WakeWord* wake = nullptr;            // the peer's wake word
  const Doorbell* doorbell = nullptr;  // where given, both are send areas, and this sends them
};

// The state of a peer as its owner sees it. Written by one thread only, read by waiters.
enum class PeerState : uint32_t { kUnused, kLive, kLeft, kLost };
M2N_HD constexpr bool is_gone(PeerState state) { return state == PeerState::kLeft || state == PeerState::kLost; }

// kDropped: by a decision of one side, for a reason in words.
enum class LossCause : uint32_t { kNone, kProcessDied, kConnectionClosed, kProtocol, kReplaced, kSilent, kDropped };

// One link to a life of a rank, at an index that serves another one once this is gone and nobody holds it (hold.h).
// What stands before `state` is written while that is kUnused.
struct PeerEntry {
  PeerView view;
  uint32_t rank;
  uint32_t joined;       // its number among all links that were made here, from 1
  uint32_t state;        // a PeerState
  uint32_t is_given_up;  // by recover(): the caller knows that it is gone
};

// All peers of a rank, in memory that bodies can read wherever they run.
struct PeerTable {
  PeerEntry* entries;
  uint32_t* count;

  M2N_HD uint32_t size() const { return load_acquire(count); }  // SYNC: link-added
  M2N_HD PeerState state(uint32_t peer_idx) const {
    return static_cast<PeerState>(load_state(&entries[peer_idx].state));  // SYNC: peer-state
  }
  M2N_HD bool is_live(uint32_t peer_idx) const { return state(peer_idx) == PeerState::kLive; }
  M2N_HD bool is_given_up(uint32_t peer_idx) const {
    return load_relaxed(&entries[peer_idx].is_given_up) != 0;  // relaxed: only what the caller said some time ago
  }
  // Relaxed, both: an index may come to another rank meanwhile, and who acts on it holds it, or keeps it from that.
  M2N_HD uint32_t rank(uint32_t peer_idx) const { return load_relaxed(&entries[peer_idx].rank); }
  M2N_HD uint32_t joined(uint32_t peer_idx) const { return load_relaxed(&entries[peer_idx].joined); }
  // The newest link to a rank, or -1.
  M2N_HD int32_t find(uint32_t wanted) const {
    int32_t newest = -1;
    for (uint32_t i = 0; i < size(); ++i) {
      if (rank(i) != wanted || state(i) == PeerState::kUnused) continue;
      if (newest < 0 || joined(i) > joined(static_cast<uint32_t>(newest))) newest = static_cast<int32_t>(i);
    }
    return newest;
  }
};

inline constexpr uint32_t kAhead = 4;  // loads of a lane that are under way at once, where nobody says otherwise

#if defined(__CUDA_ARCH__)
// Pieces of one size, shared among the lanes.
template <uint32_t kLoads, class Piece, class Exec>
__device__ void put_pieces(const Exec& exec, void* peer_bytes, const void* own_bytes, uint64_t num_bytes) {
  auto* to = static_cast<Piece*>(peer_bytes) + exec.lane();
  const auto* from = static_cast<const Piece*>(own_bytes) + exec.lane();
  const uint32_t num_lanes = exec.num_lanes();
  for (int64_t left = static_cast<int64_t>(num_bytes / sizeof(Piece)) - exec.lane(); left > 0;) {
    Piece pieces[kLoads];
#pragma unroll
    for (uint32_t j = 0; j < kLoads; ++j) {
      if (j * num_lanes < left) pieces[j] = from[j * num_lanes];
    }
#pragma unroll
    for (uint32_t j = 0; j < kLoads; ++j) {
      if (j * num_lanes < left) to[j * num_lanes] = pieces[j];
    }
    to += kLoads * num_lanes;
    from += kLoads * num_lanes;
    left -= kLoads * num_lanes;
  }
}
#endif

// Some Execs may have an outgoing message, for peers whose memory cannot be written from here (those that have none
// ring a doorbell for them), or a relay, which does what signal() does, but later (and has none itself). In the words
// of C++17, which is what relacy compiles.
template <class Exec, class = void>
inline constexpr bool kHasOutgoing = false;
template <class Exec>
inline constexpr bool kHasOutgoing<Exec, std::void_t<decltype(std::declval<Exec&>().outgoing())>> = true;
template <class Exec, class = void>
inline constexpr bool kHasRelay = false;
template <class Exec>
inline constexpr bool kHasRelay<Exec, std::void_t<decltype(std::declval<Exec&>().relay())>> = true;

// The lanes of a group copy bytes into a peer's memory: one warp on a device, in pieces of 16 bytes where the addresses
// allow it; one thread on the host, with `is_streamed` by stores that pass the caches by. Same contract: the bytes are
// visible to whoever sees a signal stored after drain().
template <uint32_t kLoads = kAhead, class Exec>
M2N_HD void put([[maybe_unused]] const Exec& exec, void* peer_bytes, const void* own_bytes, uint64_t num_bytes,
                [[maybe_unused]] bool is_streamed = false) {
#if defined(__CUDA_ARCH__)
  const uint64_t bits = reinterpret_cast<uint64_t>(peer_bytes) | reinterpret_cast<uint64_t>(own_bytes) | num_bytes;
  if (bits % sizeof(uint4) == 0) return put_pieces<kLoads, uint4>(exec, peer_bytes, own_bytes, num_bytes);
  if (bits % sizeof(uint32_t) == 0) return put_pieces<1, uint32_t>(exec, peer_bytes, own_bytes, num_bytes);
  put_pieces<1, unsigned char>(exec, peer_bytes, own_bytes, num_bytes);
#else
  if constexpr (kHasOutgoing<Exec>) {
    if (exec.outgoing() != nullptr && exec.outgoing()->covers(peer_bytes)) [[unlikely]]
      return exec.outgoing()->put(peer_bytes, own_bytes, num_bytes);
  }
  if (is_streamed) {
    copy_streamed(static_cast<unsigned char*>(peer_bytes), static_cast<const unsigned char*>(own_bytes), num_bytes);
  } else {
    std::memcpy(peer_bytes, own_bytes, num_bytes);
  }
#endif
}

// Says that a body has written bytes there by itself.
template <class Exec>
M2N_HD void wrote([[maybe_unused]] const Exec& exec, [[maybe_unused]] void* peer_bytes,
                  [[maybe_unused]] uint64_t num_bytes) {
#if !defined(__CUDA_ARCH__)
  if constexpr (kHasOutgoing<Exec>) {
    if (exec.outgoing() != nullptr && exec.outgoing()->covers(peer_bytes)) [[unlikely]]
      exec.outgoing()->put(peer_bytes, peer_bytes, num_bytes);
  }
#endif
}

// Returns when nothing reads any more what the last message with this word was put from: before the next one is written
// into a send area, and before the sender's own rows may change. Where bytes are written at once, so is that.
template <class Exec>
M2N_HD void flush([[maybe_unused]] const Exec& exec, [[maybe_unused]] const Signal* word) {
#if !defined(__CUDA_ARCH__)
  if constexpr (kHasOutgoing<Exec>) {
    if (exec.outgoing() != nullptr && exec.outgoing()->covers(word)) [[unlikely]]
      exec.outgoing()->finish(word);
  }
#endif
}

// Ends a series of puts. True for the one thread that may signal: all blocks' writes precede what it does.
// `arrivals` counts the blocks of this message; one block alone needs no count.
template <class Exec>
M2N_HD bool drain(Exec& exec, uint32_t* arrivals, [[maybe_unused]] bool is_streamed = false) {
#if !defined(__CUDA_ARCH__)
  if (is_streamed) drain_streams();
#endif
  return arrive(exec, arrivals);
}

// Tells the peer that the slot is complete. Call where drain() was true.
template <class Exec>
M2N_HD void signal(Exec& exec, const PeerView& peer, Signal* word, Signal value) {
  if constexpr (kHasOutgoing<Exec>) {
    if (exec.outgoing() != nullptr && exec.outgoing()->covers(word)) [[unlikely]]
      return exec.outgoing()->send(word, value);
  }
  if constexpr (kHasRelay<Exec>) {
    if (exec.relay() != nullptr) [[unlikely]]
      return exec.relay()->send(word, value, peer.wake);
  }
  if constexpr (!kHasOutgoing<Exec>) {
    if (peer.doorbell != nullptr) return ring_doorbell(*peer.doorbell, word, value);
  }
  store_signal(word, value);  // SYNC: slot-signal
  exec.wake(peer.wake);
}

M2N_HD inline Signal poll_signal(const Signal* word) {
  return without_ahead(load_signal(word));  // SYNC: slot-signal
}

// By the owner of a word, for a stream that waits until its seq has come to this one: puts it there ahead of the peer,
// which loses nothing by it. False: there was no need, or the peer's own came in between, and may have to be looked at
// again.
inline bool run_ahead(Signal* word, uint32_t seq) {
  const Signal seen = load_signal(word);  // SYNC: slot-signal
  const Signal peers = without_ahead(seen);
  if (static_cast<int32_t>(signal_seq(seen) - seq) >= 0 || seq - signal_seq(peers) > kMostAhead) return false;
  return replace_seq_cst(word, seen, with_ahead(peers, seq));  // SYNC: slot-signal
}

enum class Look : uint32_t {
  kPending,
  kArrived,
  kGone,       // and nothing more will come
  kViolation,  // a seq that the protocol does not allow
};

// One look of a waiter for the message after `last_seq`: the signal, then whether the peer is live, and if it is gone
// the signal once more: what it completed before its end still counts.
template <class IsLive>
M2N_HD Look look_for(const Signal* word, uint32_t last_seq, IsLive&& is_live) {
  Arrival arrival = classify(poll_signal(word), last_seq);
  if (arrival == Arrival::kNone) {
    if (is_live()) return Look::kPending;
    arrival = classify(poll_signal(word), last_seq);
    if (arrival == Arrival::kNone) return Look::kGone;
  }
  return arrival == Arrival::kNext ? Look::kArrived : Look::kViolation;
}

}  // namespace m2n
