// SPDX-License-Identifier: Apache-2.0
// Which transport a comm has, and how: its name is read once, here, and a folder makes what was chosen.
#pragma once

#include <cstdint>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "transport/transport.h"

namespace m2n {

// A slow network to imitate.
struct Faults {
  int64_t delay_ns = 0;
  int64_t jitter_ns = 0;
  uint64_t seed = 0;
};

struct UcxOptions {
  // Puts, a fence and a put of the signal where remote memory access is real; one active message where it is emulated.
  enum class Way : uint32_t { kAuto, kMessage, kPut };
  std::string library, beside;  // see ucx::load()
  bool is_insecure = false;     // TCP may be taken, by which anybody on the network reaches this process
  Way way = Way::kAuto;
  std::vector<std::pair<std::string, std::string>> variables;  // of UCX, without their UCX_
};

struct Choice {
  enum class Kind : uint32_t { kShm, kAuto, kFaulty, kTcp, kUcx, kCuda, kPinned, kGpuDirect };
  Kind kind = Kind::kShm;
  std::string device{};                   // a GPU that has the windows, or uses them too; "": none
  std::shared_ptr<const Choice> inner{};  // kFaulty: what it is put around; networks: what has the rows, else the host
  Faults faults{};
  UcxOptions ucx{};
};

// A name is one of "shm", "tcp" or "auto" and ";device=cuda:0", "cuda:0", "pinned:cuda:0", "gpudirect:cuda:0",
// "faulty:delay_ns=500000,jitter_ns=100000,seed=1:<another>", or as "ucx;way=auto;library=/a/libucp.so.0;TLS=rc,self",
// where UCX's own variables have capitals. Throws Error(kSetup) that says what was expected.
Choice read_choice(const std::string& name);

std::unique_ptr<Transport> make_transport(const Choice& choice);
inline std::unique_ptr<Transport> make_transport(const std::string& name) { return make_transport(read_choice(name)); }
// The one for words that host threads of this machine wait on, whatever memory the rows lie in.
inline std::unique_ptr<Transport> make_host_transport() { return make_transport(Choice{}); }

// What the folders make, each of its own kinds.
std::unique_ptr<Transport> make_shm_transport(const Choice& choice);
std::unique_ptr<Transport> make_faulty_transport(const Choice& choice);
std::unique_ptr<Transport> make_tcp_transport(const Choice& choice);
std::unique_ptr<Transport> make_ucx_transport(const Choice& choice);
std::unique_ptr<Transport> make_cuda_transport(const Choice& choice);
std::unique_ptr<Transport> make_pinned_transport(const Choice& choice);

// The first delays that the relay of a faulty transport of this name gives to its signals, in ns.
std::vector<int64_t> fault_delays(const std::string& name, uint64_t stream, uint32_t count);

// The library that a transport of this name needs, in words; "" where it needs none. Throws Error(kSetup) where there
// is no such library or transport.
std::string describe_transport(const std::string& name);
std::string describe_ucx(const UcxOptions& options);

// Why GPU ranks cannot run here, in words; "" when they can.
std::string why_no_cuda();

}  // namespace m2n
