// SPDX-License-Identifier: Apache-2.0
// Names of transports, and the identity of this process.
#include "transport/transport.h"

#include <pthread.h>
#include <sys/random.h>
#include <unistd.h>

#include <atomic>
#include <mutex>

#include "core/error.h"
#include "transport/host_exec.h"

namespace m2n {

std::unique_ptr<Transport> make_shm_transport();
std::unique_ptr<Transport> make_faulty_transport(const std::string& name);
std::unique_ptr<Transport> make_tcp_transport(const std::string& name);
std::unique_ptr<Transport> make_ucx_transport(const std::string& name);
std::string describe_ucx(const std::string& name);
#if M2N_HAS_CUDA
std::unique_ptr<Transport> make_cuda_transport(const std::string& device);
std::unique_ptr<Transport> make_gpu_direct_transport(const std::string& device);
std::unique_ptr<Transport> make_pinned_transport(const std::string& device);
#else
std::string why_no_cuda() { return "not compiled in: no CUDA compiler was found at build time, or M2N_CUDA=OFF"; }
#endif

std::unique_ptr<Transport> make_transport(const std::string& name) {
  if (name == "shm") return make_shm_transport();
  if (name.rfind("faulty", 0) == 0) return make_faulty_transport(name);
  if (name.rfind("tcp", 0) == 0 || name.rfind("auto", 0) == 0) return make_tcp_transport(name);
  if (name.rfind("ucx", 0) == 0) return make_ucx_transport(name);
#if M2N_HAS_CUDA
  if (name.rfind("cuda", 0) == 0) return make_cuda_transport(name);
  if (name.rfind("pinned:", 0) == 0) return make_pinned_transport(name.substr(7));
  if (name.rfind("gpudirect:", 0) == 0) return make_gpu_direct_transport(name.substr(10));
  throw Error(Failure::kSetup,
              "transport: '" + name +
                  "' is not known to this build; known: shm, auto, faulty, tcp, ucx, cuda, pinned, gpudirect");
#else
  throw Error(Failure::kSetup,
              "transport: '" + name +
                  "' is not known to this build; known: shm, auto, faulty, tcp, ucx; cuda, pinned and gpudirect are " +
                  why_no_cuda());
#endif
}

std::string describe_transport(const std::string& name) {
  if (name.rfind("ucx", 0) == 0) return describe_ucx(name);
  make_transport(name);
  return "";
}

std::unique_ptr<Transport> make_host_transport() { return make_shm_transport(); }

void wake_sleepers(WakeWord* own_wake, Network* network) {
  wake_waiters(own_wake, [network](const uint32_t* word) {
    futex_wake_all(word);
    if (network != nullptr) network->interrupt();
  });
}

namespace {

std::atomic<uint32_t> g_fork_count{0};
std::atomic<uint64_t> g_process_nonce{0};

void after_fork_in_child() {
  g_fork_count.fetch_add(1, std::memory_order_relaxed);
  g_process_nonce.store(0, std::memory_order_relaxed);
}

void register_fork_handler() {
  static std::once_flag once;
  std::call_once(once, [] { pthread_atfork(nullptr, nullptr, after_fork_in_child); });
}

}  // namespace

uint32_t fork_count() {
  register_fork_handler();
  return g_fork_count.load(std::memory_order_relaxed);
}

uint64_t process_nonce() {
  register_fork_handler();
  uint64_t nonce = g_process_nonce.load(std::memory_order_relaxed);
  while (nonce == 0) {
    uint64_t fresh = 0;
    if (getrandom(&fresh, sizeof fresh, 0) != sizeof fresh) continue;
    // Relaxed: the number itself is all that is shared. A race between two first callers has one winner.
    if (g_process_nonce.compare_exchange_strong(nonce, fresh, std::memory_order_relaxed)) nonce = fresh;
  }
  return nonce;
}

}  // namespace m2n
