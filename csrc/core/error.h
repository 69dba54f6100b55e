// SPDX-License-Identifier: Apache-2.0
// The kinds of failure and the one exception that carries them on the host.
#pragma once

#include <stdexcept>
#include <string>
#include <utility>

namespace m2n {

enum class Failure { kPeerLost, kTimeout, kProtocol, kSetup, kSlotBusy, kArgument };

class Error : public std::runtime_error {
 public:
  static constexpr int kNoPeer = -1;

  Error(Failure kind, std::string text, int peer_rank = kNoPeer)
      : std::runtime_error(std::move(text)), kind_(kind), peer_rank_(peer_rank) {}

  Failure kind() const { return kind_; }
  int peer_rank() const { return peer_rank_; }

 private:
  Failure kind_;
  int peer_rank_;
};

}  // namespace m2n
