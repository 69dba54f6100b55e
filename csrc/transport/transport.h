// SPDX-License-Identifier: Apache-2.0
// The contract of a transport: it makes memory of one rank writable by a peer. It knows bytes, not what they
// mean.
//
// An owner makes a Window: one reserved address range with room for `max_peers` objects at a fixed stride.
// Every peer gets an object of its own, so it can reach nothing else; holes read as zero, so the owner may
// touch the whole range. A peer attaches what it was handed and writes there; there is no copy in between.
#pragma once

#include <unistd.h>

#include <cstdint>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "core/peer.h"
#include "core/platform.h"
#include "core/slot.h"
#include "core/wake.h"
#include "core/wire.h"

namespace m2n {

// A file descriptor with one owner; -1: none.
class Fd {
 public:
  explicit Fd(int fd = -1) : fd_(fd) {}
  Fd(Fd&& other) noexcept : fd_(other.release()) {}
  Fd& operator=(Fd&& other) noexcept {
    std::swap(fd_, other.fd_);
    return *this;
  }
  ~Fd() {
    if (fd_ >= 0) close(fd_);
  }
  int get() const { return fd_; }
  int release() { return std::exchange(fd_, -1); }

 private:
  int fd_;
};

// How an object travels to the peer, beside the control connection's text.
struct Handle {
  Fd fd;
  uint64_t bytes = 0;  // exact size of the object
  uint64_t id = 0;     // key of the object inside the process that made it
};

// A random number that tells this process from every other one, made anew after fork.
uint64_t process_nonce();

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

struct HeldSignals {
  uint64_t count = 0;
  uint64_t total_ns = 0;  // from send() to the store
};

// Stores signals in the place of their sender, later and from another thread. What is still held when it ends is
// dropped.
class SignalRelay {
 public:
  virtual ~SignalRelay() = default;
  // Who sees the signal sees also what the caller wrote before.
  virtual void send(Signal* word, Signal value, WakeWord* wake) = 0;
  // Returns when everything that was sent is stored.
  virtual void drain() = 0;
  // Drops what is still held for words in this memory; none of them is stored any more when it returns.
  virtual void forget(const unsigned char* memory, uint64_t num_bytes) = 0;
  virtual HeldSignals held() const = 0;  // what was stored so far
};

// Told by a network, from a thread of its own that holds no lock.
class LinkListener {
 public:
  virtual ~LinkListener() = default;
  // A link is broken; `violation`: the peer has sent what it must not, "" for any other cause.
  virtual void link_broke(uint32_t peer_idx, const std::string& violation) = 0;
  // After Network::end(): whatever the peer sent has arrived, and nothing more will.
  virtual void link_ended(uint32_t peer_idx) = 0;
};

// The two objects of a link, rows and small, in the owner's windows; or the send areas that stand for them at its peer.
struct Areas {
  unsigned char* rows = nullptr;
  uint64_t rows_bytes = 0;
  unsigned char* small = nullptr;
  uint64_t small_bytes = 0;
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
    uint64_t rows_bytes, small_bytes;  // of each peer's objects, whole pages
  };
  // Before anything else. Signals that arrive wake the sleepers of `own_wake`. Both stay until close().
  virtual void open(LinkListener* listener, WakeWord* own_wake, const Peers& peers) = 0;
  // How one peer reaches these objects: bytes for the handshake.
  virtual std::string make_door(uint32_t peer_idx, const Areas& own) = 0;
  // The other end of that, by the peer's door: the send areas for it. `data`: a connected stream socket, where this
  // network takes one for each link. `wakes`: will it wake a sleeper here? Throws Error(kSetup).
  virtual Areas connect(uint32_t peer_idx, const std::string& door, Fd data, bool* wakes) = 0;
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

// Names -> factories. Throws Error(kSetup) that lists what there is.
std::unique_ptr<Transport> make_transport(const std::string& name);
// The one for words that host threads of this machine wait on, whatever memory the rows lie in.
std::unique_ptr<Transport> make_host_transport();

// The first delays that the relay of a faulty transport of this name gives to its signals, in ns.
std::vector<int64_t> fault_delays(const std::string& name, uint64_t stream, uint32_t count);

// The library that a transport of this name needs, in words; "" where it needs none. Throws Error(kSetup) where there
// is no such library or transport.
std::string describe_transport(const std::string& name);

// Why GPU ranks cannot run here, in words; "" when they can.
std::string why_no_cuda();

// Counts forks between the first ancestor that used this library and this process: objects of another count
// belong to a parent and must not be used.
uint32_t fork_count();

}  // namespace m2n
