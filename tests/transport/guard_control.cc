// SPDX-License-Identifier: Apache-2.0
// Controls for the guard pages of test builds: the accesses that must work, and one that must not.
// Usage: guard_control inside|hole, or window|peer front|end read|write
#include <cstdio>
#include <cstring>
#include <string>

#include "transport/choice.h"

namespace {

constexpr uint64_t kObjectBytes = m2n::kPageBytes;
constexpr uint64_t kStrideBytes = 3 * m2n::kPageBytes;
constexpr uint32_t kMaxPeers = 2;

void touch(volatile unsigned char* byte, bool is_write) {
  if (is_write) {
    *byte = 1;
  } else {
    (void)*byte;
  }
}

// The whole window can be read, every object written at both of its ends, and the peer sees it.
int inside(const m2n::Window& window, const m2n::Mapping& peer) {
  uint64_t sum = 0;
  for (uint64_t i = 0; i < window.bytes(); ++i) sum += window.data()[i];
  if (sum != 0) return 1;
  peer.data()[0] = 1;
  peer.data()[kObjectBytes - 1] = 2;
  const unsigned char* object = window.data() + kStrideBytes;
  return object[0] == 1 && object[kObjectBytes - 1] == 2 ? 0 : 1;
}

}  // namespace

int main(int argc, char** argv) {
  const std::string where = argc > 1 ? argv[1] : "";
  const std::string end = argc > 2 ? argv[2] : "";
  const bool is_write = argc > 3 && std::strcmp(argv[3], "write") == 0;
  const auto transport = m2n::make_transport("shm");
  const auto window = transport->make_window(kObjectBytes, kStrideBytes, kMaxPeers);
  // As if another process had made it: a mapping of its own.
  const auto peer = transport->attach(window->add_object(1), {m2n::process_nonce() + 1});
  if (where == "inside") return inside(*window, *peer);
  if (where == "window") touch(end == "front" ? window->data() - 1 : window->data() + window->bytes(), is_write);
  if (where == "peer") touch(end == "front" ? peer->data() - 1 : peer->data() + kObjectBytes, is_write);
  if (where == "hole") touch(window->data() + kStrideBytes + kObjectBytes, true);
  std::puts("nothing stopped it");
  return 0;
}
