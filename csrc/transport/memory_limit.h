// SPDX-License-Identifier: Apache-2.0
// May this process take so much more memory? To be asked before it is touched: beyond a memory cgroup's limit, or the
// machine's memory, the kernel kills somebody; beyond the limit for a file's size (a memfd is a file) it sends SIGXFSZ.
#pragma once

#include <cstdint>
#include <string>

namespace m2n {

// Throws Error(kSetup), with the sizes, where `what` of that size does not fit beside what is held already: in the
// memory cgroups (v1, v2) of this process and all above them, and in this machine. What the page cache can give back
// is not counted as held. `proc`: where the kernel tells it, elsewhere than in /proc for tests.
void require_memory(const std::string& what, uint64_t bytes, const std::string& proc = "/proc");

// Likewise where a file of that size may not be made (RLIMIT_FSIZE).
void require_file_size(const std::string& what, uint64_t bytes);

}  // namespace m2n
