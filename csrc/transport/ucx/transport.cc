// SPDX-License-Identifier: Apache-2.0
// Across hosts through UCX, loaded when it is asked for: for RDMA, also with rows in the memory of a GPU, where NICs
// reach it (GPUDirect).
#include "transport/network/transport.h"
#include "core/error.h"
#include "transport/transport.h"
#include "transport/ucx/links.h"
#include "transport/ucx/tls.h"

namespace m2n {
namespace {

// "ucx;way=auto;library=/a/libucp.so.0;TLS=rc,self": names of UCX's own variables have capitals.
ucx::Settings parse_settings(const std::string& name) {
  const auto refuse = [&](const std::string& part) {
    throw Error(Failure::kSetup,
                "transport: expected 'ucx' and ';key=value' for way (auto, message, put), library, beside, device, "
                "rows, insecure or a variable of UCX, got '" +
                    part + "' in '" + name + "'");
  };
  const std::string kind = name.substr(0, name.find(';'));
  if (kind != "ucx") refuse(kind);
  ucx::Settings settings;
  for_each_option(name, [&](const std::string& key, const std::string& value, const std::string& part) {
    if (key == "library") {
      settings.library = value;
    } else if (key == "beside") {
      settings.beside = value;
    } else if (key == "device") {
      settings.device = value;
    } else if (key == "rows") {
      settings.rows = value;
    } else if (key == "insecure") {
      settings.is_insecure = true;
    } else if (key == "way" && (value == "auto" || value == "message" || value == "put")) {
      settings.way = value == "auto" ? ucx::Way::kAuto : value == "put" ? ucx::Way::kPut : ucx::Way::kMessage;
    } else if (!key.empty() && key[0] >= 'A' && key[0] <= 'Z' && part.size() != key.size()) {
      settings.variables.emplace_back(key, value);
    } else {
      refuse(part);
    }
  });
  return settings;
}

void require_no_tcp(const ucx::Settings& settings) {
  const std::string transports = ucx::tls_of(settings.variables);
  if (settings.is_insecure || transports.empty() || !ucx::lets_tcp_in(transports)) return;
  throw Error(
      Failure::kArgument,
      "ucx: TLS='" + transports +
          "' (ucx_variables, UCX_TLS) lets TCP in, by which whoever reaches this host can read and write all "
          "memory of this process; leave it unset or use '^tcp', take transport='tcp', or Config(insecure=True) "
          "where the network is yours alone");
}

}  // namespace

std::unique_ptr<Transport> make_ucx_transport(const std::string& name) {
  const ucx::Settings settings = parse_settings(name);
  require_no_tcp(settings);
  auto transport = make_network_transport({settings.device, settings.rows, false},
                                          [settings] { return std::make_unique<ucx::Links>(settings); });
  ucx::load(settings.library, settings.beside);
  return transport;
}

std::string describe_ucx(const std::string& name) {
  const ucx::Settings settings = parse_settings(name);
  return ucx::load(settings.library, settings.beside).where;
}

}  // namespace m2n
