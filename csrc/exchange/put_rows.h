// SPDX-License-Identifier: Apache-2.0
// Rows into a peer's memory, shared among the blocks that run a verb.
#pragma once

#include <cstdint>

#include "core/peer.h"

namespace m2n {

// Where the share of one of `num_parts` begins.
M2N_HD constexpr uint32_t share(uint32_t num_items, uint32_t part, uint32_t num_parts) {
  return static_cast<uint32_t>(uint64_t{num_items} * part / num_parts);
}

// Rows that travel as they are, in the order row_at(i) gives; each block takes a run of them. Neighbours go as one
// piece.
template <class Exec, class RowAt>
M2N_HD void put_rows(Exec& exec, unsigned char* to, uint32_t num_rows, uint64_t row_bytes, bool is_streamed,
                     RowAt&& row_at) {
  const uint32_t end = share(num_rows, exec.block() + 1, exec.num_blocks());
  uint32_t run = 1;
  for (uint32_t row = share(num_rows, exec.block(), exec.num_blocks()); row < end; row += run) {
    const unsigned char* from = row_at(row);
    for (run = 1; row + run < end && row_at(row + run) == from + run * row_bytes; ++run) {
    }
    put(exec, to + row * row_bytes, from, run * row_bytes, is_streamed);
  }
}

}  // namespace m2n
