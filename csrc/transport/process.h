// SPDX-License-Identifier: Apache-2.0
// Which process this is: told apart from every other one, and from what it was before a fork.
#pragma once

#include <cstdint>

namespace m2n {

// A random number that tells this process from every other one, made anew after fork.
uint64_t process_nonce();

// Counts forks between the first ancestor that used this library and this process: objects of another count
// belong to a parent and must not be used.
uint32_t fork_count();

}  // namespace m2n
