// SPDX-License-Identifier: Apache-2.0
// The words for a broken protocol.
#include "exchange/bodies/inbox.h"

namespace m2n {

std::string describe(const Violation& violation, uint32_t layer) {
  const std::string slot = "slot " + std::to_string(violation.slot) + ": ";
  const std::string seen = std::to_string(violation.seen);
  const std::string where = "layer " + std::to_string(layer) + ", row " + std::to_string(violation.expected) + ": ";
  switch (violation.breach) {
    case Breach::kNone:
      break;
    case Breach::kSeq:
      return slot + "expected message " + std::to_string(violation.expected) +
             " after the reply to the last one, saw " + seen;
    case Breach::kNumRows:
      return slot + "bad number of rows " + seen;
    case Breach::kHeaderRows:
      return slot + "bad number of rows in the header " + seen;
    case Breach::kMicrobatch:
      return slot + "bad microbatch " + seen;
    case Breach::kFlags:
      return slot + "bad flags " + seen;
    case Breach::kIdRange:
      return where + "expert id out of range: " + seen;
    case Breach::kWeight:
      return where + "weight not finite for expert " + seen;
  }
  return "";
}

}  // namespace m2n
