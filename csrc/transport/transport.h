// SPDX-License-Identifier: Apache-2.0
// The contract of a transport: it makes memory of one rank writable by a peer. It knows bytes, not what they mean.
//
// An owner makes a Window: one reserved address range with room for `max_peers` objects at a fixed stride.
// Every peer gets an object of its own, so it can reach nothing else; holes read as zero, so the owner may
// touch the whole range. A peer attaches what it was handed and writes there; there is no copy in between.
#pragma once

#include <cstdint>
#include <memory>
#include <string>

#include "transport/fd.h"
#include "transport/network.h"
#include "transport/process.h"
#include "transport/relay.h"

namespace m2n {

// How an object travels to the peer, beside the control connection's text.
struct Handle {
  Fd fd;
  uint64_t bytes = 0;  // exact size of the object
  uint64_t id = 0;     // key of the object inside the process that made it
};

// Who made an object, in the words of its maker.
struct Origin {
  uint64_t process = 0;     // the maker's process_nonce(): inside one process both sides share one mapping
  std::string device = "";  // what transports of devices tell theirs apart by
};

// Somebody else's memory, writable here while this lives.
class Mapping {
 public:
  virtual ~Mapping() = default;
  virtual unsigned char* data() const = 0;
};

class Window {
 public:
  virtual ~Window() = default;
  virtual unsigned char* data() const = 0;
  virtual uint64_t bytes() const = 0;
  // Makes the object of `peer_idx`, zeroed, and a handle for it, where there is none; throws Error(kSetup).
  virtual Handle add_object(uint32_t peer_idx) = 0;
  // Leaves a hole again. Who has attached the object keeps its memory, which is no longer this window's. False: a peer
  // of this process, which shares the window's own mapping, still has it; try again later.
  virtual bool remove_object(uint32_t peer_idx) = 0;
  // Sets one word of the window before any peer can reach it.
  virtual void set_word(uint64_t offset, uint64_t value) = 0;
};

class Transport {
 public:
  virtual ~Transport() = default;
  virtual uint64_t page_bytes() const = 0;
  // Zeroed host memory that bodies can read and write wherever they work on these windows.
  virtual std::shared_ptr<void> make_words(uint64_t bytes) = 0;
  // `object_bytes` and `stride_bytes` are rounded up to whole pages by the caller.
  virtual std::shared_ptr<Window> make_window(uint64_t object_bytes, uint64_t stride_bytes, uint32_t max_peers) = 0;
  // Likewise, of rows, which may lie in other memory than signals.
  virtual std::shared_ptr<Window> make_rows_window(uint64_t object_bytes, uint64_t stride_bytes, uint32_t max_peers) {
    return make_window(object_bytes, stride_bytes, max_peers);
  }
  virtual Origin origin() const { return {process_nonce()}; }
  // Throws Error(kSetup) that says why this peer cannot be reached.
  virtual std::shared_ptr<Mapping> attach(Handle handle, const Origin& origin) = 0;
  // Lets bodies use the send areas for a peer, on pages that hold nothing else, wherever they work on these windows,
  // while what it returns lives.
  virtual std::shared_ptr<void> expose(const Areas& /*send*/) { return nullptr; }
  // What a rank's signals go through; nullptr: the rank stores them itself. Random choices are those of `stream`.
  virtual std::unique_ptr<SignalRelay> make_relay(uint64_t /*stream*/) { return nullptr; }
  // Can peers attach to what add_object() gives out? Those that cannot, or all, are reached over a network.
  virtual bool shares_memory() const { return true; }
  // nullptr: there is none. Throws Error(kSetup).
  virtual std::unique_ptr<Network> make_network() { return nullptr; }
};

}  // namespace m2n
