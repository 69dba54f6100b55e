// SPDX-License-Identifier: Apache-2.0
// The contract of a transport: it makes memory of one rank writable by a peer. It knows bytes, not what they
// mean.
//
// An owner makes a Window: one reserved address range with room for `max_peers` objects at a fixed stride.
// Every peer gets an object of its own, so it can reach nothing else; holes read as zero, so the owner may
// touch the whole range. A peer attaches what it was handed and writes there; there is no copy in between.
#pragma once

#include <cstdint>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "core/platform.h"
#include "core/slot.h"
#include "core/wake.h"

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
  ~Fd();
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
  // Makes the object of `peer_idx`, zeroed, and a handle for it. Once per index; throws Error(kSetup).
  virtual Handle add_object(uint32_t peer_idx) = 0;
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
  virtual HeldSignals held() const = 0;  // what was stored so far
};

class Transport {
 public:
  virtual ~Transport() = default;
  virtual uint64_t page_bytes() const = 0;
  // Zeroed host memory that bodies can read and write wherever they work on these windows.
  virtual std::shared_ptr<void> make_words(uint64_t bytes) = 0;
  // `object_bytes` and `stride_bytes` are rounded up to whole pages by the caller.
  virtual std::shared_ptr<Window> make_window(uint64_t object_bytes, uint64_t stride_bytes, uint32_t max_peers) = 0;
  virtual Origin origin() const { return {process_nonce()}; }
  virtual std::shared_ptr<Mapping> attach(Handle handle, const Origin& origin) = 0;
  // What a rank's signals go through; nullptr: the rank stores them itself. Random choices are those of `stream`.
  virtual std::unique_ptr<SignalRelay> make_relay(uint64_t /*stream*/) { return nullptr; }
};

// Names -> factories. Throws Error(kSetup) that lists what there is.
std::unique_ptr<Transport> make_transport(const std::string& name);
// The one for words that host threads of this machine wait on, whatever memory the rows lie in.
std::unique_ptr<Transport> make_host_transport();

// The first delays that the relay of a faulty transport of this name gives to its signals, in ns.
std::vector<int64_t> fault_delays(const std::string& name, uint64_t stream, uint32_t count);

// Why GPU ranks cannot run here, in words; "" when they can.
std::string why_no_cuda();

// Counts forks between the first ancestor that used this library and this process: objects of another count
// belong to a parent and must not be used.
uint32_t fork_count();

}  // namespace m2n
