// SPDX-License-Identifier: Apache-2.0
// The contract of a network: messages to peers whose memory nobody here can write.
#pragma once

#include <cstdint>
#include <string>

#include "core/wake.h"
#include "core/wire.h"
#include "transport/fd.h"

namespace m2n {

// Told by a network, from a thread of its own that holds no lock.
class LinkListener {
 public:
  virtual ~LinkListener() = default;
  // A link is broken; `violation`: the peer has sent what it must not, "" for any other cause.
  virtual void link_broke(uint32_t peer_idx, const std::string& violation) = 0;
  // After Network::end(): whatever the peer sent has arrived, and nothing more will.
  virtual void link_ended(uint32_t peer_idx) = 0;
};

// The two objects of a link, rows and meta, in the owner's windows; or the send areas that stand for them at its peer.
struct Areas {
  unsigned char* rows = nullptr;
  uint64_t rows_bytes = 0;
  unsigned char* meta = nullptr;
  uint64_t meta_bytes = 0;
};

// What a comm has where no peer can write its memory: messages, which move only while some thread makes progress.
//
// Whoever waits makes it: enter(), look() between two looks at what it waits for, sleep(), leave(). Where nobody waits,
// a thread of the network's own takes over.
class Network : public Wire {
 public:
  // What send areas are made for.
  struct Peers {
    uint32_t max_peers;
    uint64_t rows_bytes, meta_bytes;  // of each peer's objects, whole pages
  };
  // Before anything else. Signals that arrive wake the sleepers of `own_wake`. Both stay until close().
  virtual void open(LinkListener* listener, WakeWord* own_wake, const Peers& peers) = 0;
  // How one peer reaches these objects: bytes for the handshake.
  virtual std::string make_address(uint32_t peer_idx, const Areas& own) = 0;
  // The other end of that, by the peer's address: the send areas for it. `data`: a connected stream socket, where this
  // network takes one for each link. `wakes`: will it wake a sleeper here? Throws Error(kSetup).
  virtual Areas connect(uint32_t peer_idx, const std::string& address, Fd data, bool* wakes) = 0;
  // The peer is gone. Takes what is still under way, and says link_ended(); at once, where nothing may arrive any more.
  virtual void end(uint32_t peer_idx) = 0;
  virtual void end_now(uint32_t peer_idx) = 0;
  // The index shall serve another link. False: something of the old one is still being read or written; try again
  // later.
  virtual bool release(uint32_t peer_idx) = 0;
  // Returns when everything that was sent has left, or after a few seconds.
  virtual void drain() = 0;
  // Nothing is read or written any more when it returns, within a few seconds.
  virtual void close() = 0;

  virtual void look() = 0;
  virtual void enter() = 0;
  virtual void leave() = 0;
  // Sleeps until something arrives, interrupt(), or the end of the time, unless *events is no longer `seen`. False:
  // some other thread sleeps here; this one must sleep on the word.
  virtual bool sleep(const uint32_t* events, uint32_t seen, int64_t most_ns) = 0;
  virtual void interrupt() = 0;
};

}  // namespace m2n
