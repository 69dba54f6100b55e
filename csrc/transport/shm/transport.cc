// SPDX-License-Identifier: Apache-2.0
// Shared memory of one host: anonymous memfd objects, mapped by their owner at a fixed stride and by one peer
// each. Nothing has a name, so nothing is left behind by a killed process.
#include <fcntl.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cstring>
#include <new>
#include <vector>

#include "core/atomic.h"
#include "core/error.h"
#include "transport/choice.h"
#include "transport/local.h"
#include "transport/memory_limit.h"

namespace m2n {
namespace {

[[noreturn]] void fail(const std::string& what, int error_number) {
  throw Error(Failure::kSetup, "shm: " + what + ": " + std::strerror(error_number));
}

constexpr const char* kWhat = "the memory that one peer writes";

// Takes the memory up front: running out of it is an error here, not a signal at the first write. In pieces: each ends
// before the next signal of a timer comes, after which it would begin anew; and others may take memory at the same
// time. 0, or an error number.
int allocate(int fd, uint64_t bytes) {
  constexpr uint64_t kPieceBytes = 2 << 20;
  constexpr uint64_t kCheckedBytes = 64 << 20;
  for (uint64_t at = 0; at < bytes; at += kPieceBytes) {
    if (at % kCheckedBytes == 0) require_memory(kWhat, bytes - at);
    int error_number;
    do {
      const auto length = static_cast<off_t>(std::min(kPieceBytes, bytes - at));
      error_number = posix_fallocate(fd, static_cast<off_t>(at), length);
    } while (error_number == EINTR);
    if (error_number != 0) return error_number;
  }
  return 0;
}

Fd make_sealed_memfd(uint64_t bytes) {
  require_file_size(kWhat, bytes);
  Fd fd(memfd_create("m2n", MFD_CLOEXEC | MFD_ALLOW_SEALING));
  if (fd.get() < 0) fail("memfd_create", errno);
  int error_number = allocate(fd.get(), bytes);
  if (error_number == 0 && fcntl(fd.get(), F_ADD_SEALS, F_SEAL_SHRINK | F_SEAL_GROW | F_SEAL_SEAL) != 0) {
    error_number = errno;
  }
  if (error_number != 0) fail("cannot allocate " + std::to_string(bytes) + " bytes of shared memory", error_number);
  return fd;
}

// Test builds put a page that nobody may touch in front of every range and behind it: sanitizers do not know where a
// mapping ends. Between the objects of a window there is none: its stride is the caller's, and holes are readable.
#if defined(M2N_GUARD_PAGES)
constexpr uint64_t kGuardBytes = kPageBytes;
#else
constexpr uint64_t kGuardBytes = 0;
#endif

// Reserved addresses, which objects are mapped into. What none covers reads as zero and costs no memory.
class Range {
 public:
  explicit Range(uint64_t bytes) : bytes_(bytes) {
    const int flags = MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE;
    void* base = mmap(nullptr, bytes + 2 * kGuardBytes, kGuardBytes == 0 ? PROT_READ : PROT_NONE, flags, -1, 0);
    if (base == MAP_FAILED) fail("cannot reserve " + std::to_string(bytes) + " bytes of addresses", errno);
    base_ = static_cast<unsigned char*>(base);
    if (kGuardBytes != 0 && mprotect(data(), bytes, PROT_READ) != 0) fail("cannot place guard pages", errno);
    madvise(base_, bytes + 2 * kGuardBytes, MADV_DONTFORK);
  }
  ~Range() {
    // In a forked child the range is not ours: what lies there now belongs to somebody else.
    if (fork_count_ == fork_count()) munmap(base_, bytes_ + 2 * kGuardBytes);
  }
  Range(const Range&) = delete;
  Range& operator=(const Range&) = delete;

  unsigned char* data() const { return base_ + kGuardBytes; }
  uint64_t bytes() const { return bytes_; }

  // Maps an object; 0, or an error number.
  int map(uint64_t offset, int fd, uint64_t object_bytes) {
    unsigned char* at = data() + offset;
    const int flags = MAP_SHARED | MAP_FIXED | MAP_POPULATE;
    if (mmap(at, object_bytes, PROT_READ | PROT_WRITE, flags, fd, 0) == MAP_FAILED) return errno;
    madvise(at, object_bytes, MADV_DONTFORK);
    return 0;
  }

  // Makes a hole of it again; false where the system has no room for that.
  bool unmap(uint64_t offset, uint64_t object_bytes) {
    unsigned char* at = data() + offset;
    const int flags = MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE | MAP_FIXED;
    if (mmap(at, object_bytes, PROT_READ, flags, -1, 0) == MAP_FAILED) return false;
    madvise(at, object_bytes, MADV_DONTFORK);
    return true;
  }

 private:
  const uint32_t fork_count_ = fork_count();
  uint64_t bytes_;
  unsigned char* base_;
};

class ShmWindow final : public Window, public std::enable_shared_from_this<ShmWindow> {
 public:
  ShmWindow(uint64_t object_bytes, uint64_t stride_bytes, uint32_t max_peers)
      : object_bytes_(object_bytes),
        stride_bytes_(stride_bytes),
        ids_(max_peers, kNoObject),
        range_(stride_bytes * max_peers) {}

  ~ShmWindow() override {
    for (uint64_t id : ids_) forget_local_object(id);
  }

  unsigned char* data() const override { return range_.data(); }
  uint64_t bytes() const override { return range_.bytes(); }

  Handle add_object(uint32_t peer_idx) override {
    if (peer_idx >= ids_.size()) throw Error(Failure::kSetup, "shm: peer index beyond max_peers");
    Handle handle;
    handle.bytes = object_bytes_;
    handle.fd = make_sealed_memfd(object_bytes_);
    const uint64_t offset = stride_bytes_ * peer_idx;
    if (const int error_number = range_.map(offset, handle.fd.get(), object_bytes_); error_number != 0) {
      fail("cannot map an object", error_number);
    }
    handle.id = add_local_object(weak_from_this(), data() + offset);
    ids_[peer_idx] = handle.id;
    return handle;
  }

  // The memory of an object lives on for whoever has mapped it by its descriptor.
  bool remove_object(uint32_t peer_idx) override {
    if (ids_.at(peer_idx) == kNoObject) return true;
    if (!forget_unmapped_local_object(ids_[peer_idx])) return false;
    if (!range_.unmap(stride_bytes_ * peer_idx, object_bytes_)) return false;
    ids_[peer_idx] = kNoObject;
    return true;
  }

  void set_word(uint64_t offset, uint64_t value) override {
    store_relaxed(reinterpret_cast<uint64_t*>(data() + offset), value);  // relaxed: the handshake comes before any peer
  }

 private:
  static constexpr uint64_t kNoObject = 0;

  uint64_t object_bytes_;
  uint64_t stride_bytes_;
  std::vector<uint64_t> ids_;  // by peer index
  Range range_;
};

class ShmMapping final : public Mapping {
 public:
  ShmMapping(int fd, uint64_t bytes) : range_(bytes) {
    struct stat status{};
    const int seals = fcntl(fd, F_GET_SEALS);
    if (fstat(fd, &status) != 0 || seals < 0 || (seals & F_SEAL_SHRINK) == 0 ||
        static_cast<uint64_t>(status.st_size) != bytes) {
      throw Error(Failure::kSetup, "shm: the peer's memory object is not a sealed memfd of the agreed " +
                                       std::to_string(bytes) +
                                       " bytes; both sides must run the same version and shape");
    }
    const int error_number = range_.map(0, fd, bytes);
    if (error_number != 0) fail("cannot map the peer's memory object", error_number);
  }
  unsigned char* data() const override { return range_.data(); }

 private:
  Range range_;
};

class ShmTransport final : public Transport {
 public:
  uint64_t page_bytes() const override { return kPageBytes; }

  std::shared_ptr<void> make_words(uint64_t bytes) override {
    const auto align = std::align_val_t{kLineBytes};
    void* words = ::operator new(bytes, align);
    std::memset(words, 0, bytes);
    return {words, [align](void* data) { ::operator delete(data, align); }};
  }

  std::shared_ptr<Window> make_window(uint64_t object_bytes, uint64_t stride_bytes, uint32_t max_peers) override {
    // With no room for one peer it is of no use: said when the comm is made, not when the first one joins.
    require_file_size(kWhat, object_bytes);
    require_memory(kWhat, object_bytes);
    return std::make_shared<ShmWindow>(object_bytes, stride_bytes, max_peers);
  }

  std::shared_ptr<Mapping> attach(Handle handle, const Origin& origin) override {
    if (origin.process == process_nonce()) return map_local_object(handle.id);
    return std::make_shared<ShmMapping>(handle.fd.get(), handle.bytes);
  }
};

}  // namespace

std::unique_ptr<Transport> make_shm_transport(const Choice&) { return std::make_unique<ShmTransport>(); }

}  // namespace m2n
