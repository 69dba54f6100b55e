// SPDX-License-Identifier: Apache-2.0
// Across hosts through UCX, loaded when it is asked for: for RDMA, also with rows in the memory of a GPU, where NICs
// reach it (GPUDirect).
#include "core/error.h"
#include "transport/ucx/links.h"
#include "transport/ucx/tls.h"

namespace m2n {
namespace {

void require_no_tcp(const UcxOptions& options) {
  const std::string transports = ucx::tls_of(options.variables);
  if (options.is_insecure || transports.empty() || !ucx::lets_tcp_in(transports)) return;
  throw Error(
      Failure::kArgument,
      "ucx: TLS='" + transports +
          "' (ucx_variables, UCX_TLS) lets TCP in, by which whoever reaches this host can read and write all "
          "memory of this process; leave it unset or use '^tcp', take transport='tcp', or Config(insecure=True) "
          "where the network is yours alone");
}

}  // namespace

std::unique_ptr<Transport> make_ucx_transport(const Choice& choice) {
  require_no_tcp(choice.ucx);
  auto transport = make_network_transport(choice, [choice] { return std::make_unique<ucx::Links>(choice); });
  ucx::load(choice.ucx.library, choice.ucx.beside);
  return transport;
}

std::string describe_ucx(const UcxOptions& options) { return ucx::load(options.library, options.beside).where; }

}  // namespace m2n
