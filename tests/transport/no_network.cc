// SPDX-License-Identifier: Apache-2.0
// In the place of csrc/transport/{network,tcp,ucx}, for programs of tests that never ask for a network: those
// take long to compile.
#include <memory>
#include <string>

#include "core/error.h"
#include "transport/choice.h"

namespace m2n {

std::unique_ptr<Transport> make_tcp_transport(const Choice&) {
  throw Error(Failure::kSetup, "tcp: not in this program");
}
std::unique_ptr<Transport> make_ucx_transport(const Choice&) {
  throw Error(Failure::kSetup, "ucx: not in this program");
}
std::string describe_ucx(const UcxOptions&) { return "not in this program"; }

}  // namespace m2n
