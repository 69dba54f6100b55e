// SPDX-License-Identifier: Apache-2.0
// What one rank may write in one peer's memory, and the three things it does there: put, drain, signal.
#pragma once

#include <cstring>

#include "core/atomic.h"
#include "core/platform.h"
#include "core/slot.h"
#include "core/wake.h"

namespace m2n {

// Plain pointers without ownership: a kernel may hold it by value.
struct PeerView {
  unsigned char* rows = nullptr;   // the peer's landing area for rows from us
  unsigned char* small = nullptr;  // signals, headers, ids and weights for the same slots
  WakeWord* wake = nullptr;        // the peer's wake word
};

// The state of a peer as its owner sees it. Written by one thread only, read by waiters.
enum class PeerState : uint32_t { kUnused, kLive, kLeft, kLost };

enum class LossCause : uint32_t { kNone, kProcessDied, kConnectionClosed, kProtocol, kReplaced };

// An Exec runs a body: `worker()` of `num_workers()`, `sync()` among them, `wake(WakeWord*)` after a signal.
// A host thread is one worker; a GPU block is many.

// Copies bytes into a peer's memory. 16-byte pieces on the device, memcpy on the host; same contract: the
// bytes are visible to whoever sees a signal stored after drain().
template <class Exec>
M2N_HD void put(Exec& exec, void* peer_bytes, const void* own_bytes, uint64_t num_bytes) {
#if defined(__CUDA_ARCH__)
  auto* to = static_cast<unsigned char*>(peer_bytes);
  const auto* from = static_cast<const unsigned char*>(own_bytes);
  for (uint64_t i = exec.worker(); i < num_bytes; i += exec.num_workers()) to[i] = from[i];
#else
  if (exec.worker() == 0) std::memcpy(peer_bytes, own_bytes, num_bytes);
#endif
}

// Ends a series of puts: all workers' writes precede what follows.
template <class Exec>
M2N_HD void drain(Exec& exec) {
  exec.sync();
}

// Tells the peer that the slot is complete. Call after drain().
template <class Exec>
M2N_HD void signal(Exec& exec, const PeerView& peer, Signal* word, Signal value) {
  if (exec.worker() != 0) return;
  store_signal(word, value);  // SYNC: slot-signal
  exec.wake(peer.wake);
}

M2N_HD inline Signal poll_signal(const Signal* word) {
  return load_signal(word);  // SYNC: slot-signal
}

}  // namespace m2n
