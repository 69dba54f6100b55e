// SPDX-License-Identifier: Apache-2.0
// The kinds of failure and the one exception that carries them on the host.
#pragma once

#include <cstdint>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

namespace m2n {

enum class Failure { kPeerLost, kTimeout, kProtocol, kSetup, kSlotBusy, kArgument };

// Rows that will not come, by number, for each peer that owes some.
using Owed = std::vector<std::pair<uint32_t, std::vector<int32_t>>>;

class Error : public std::runtime_error {
 public:
  static constexpr int kNoPeer = -1;

  Error(Failure kind, std::string text, int peer_rank = kNoPeer)
      : std::runtime_error(std::move(text)), kind_(kind), peer_rank_(peer_rank) {}

  Failure kind() const { return kind_; }
  int peer_rank() const { return peer_rank_; }
  // Of kPeerLost, where it is about rows.
  const Owed& owed() const { return owed_; }
  void set_owed(Owed owed) { owed_ = std::move(owed); }

 private:
  Failure kind_;
  int peer_rank_;
  Owed owed_;
};

}  // namespace m2n
