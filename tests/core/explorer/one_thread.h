// SPDX-License-Identifier: Apache-2.0
// How bodies run in the cases, and in the sanitizers' control: one thread each.
#pragma once

#include <cstdint>

struct OneThread {
  uint32_t thread() const { return 0; }
  uint32_t num_threads() const { return 1; }
  uint32_t block() const { return 0; }
  uint32_t num_blocks() const { return 1; }
  void sync() {}
};
