// SPDX-License-Identifier: Apache-2.0
// Finds UCX when it is asked for, and fills the table of its functions.
#include "transport/ucx/api.h"

#include <dlfcn.h>

#include <map>
#include <memory>
#include <mutex>
#include <vector>

#include "core/error.h"

namespace m2n::ucx {
namespace {

constexpr const char* kLibrary = "libucp.so.0";

template <class Function>
void find(void* library, const char* name, Function*& function) {
  function = reinterpret_cast<Function*>(dlsym(library, name));
  if (function == nullptr) fail(std::string("the library has no ") + name);
}

void find_memory_functions(void* library, Api& api) {
  find(library, "ucp_put_nbx", api.put_nbx);
  find(library, "ucp_mem_map", api.mem_map);
  find(library, "ucp_mem_unmap", api.mem_unmap);
  find(library, "ucp_rkey_pack", api.rkey_pack);
  find(library, "ucp_rkey_buffer_release", api.rkey_buffer_release);
  find(library, "ucp_ep_rkey_unpack", api.ep_rkey_unpack);
  find(library, "ucp_rkey_destroy", api.rkey_destroy);
}

void find_functions(void* library, Api& api) {
  find(library, "ucp_get_version", api.get_version);
  unsigned major = 0, minor = 0, release = 0;
  api.get_version(&major, &minor, &release);
  const std::string version = std::to_string(major) + "." + std::to_string(minor) + "." + std::to_string(release);
  if (major != kMajor || minor < kMinor) fail("version " + version + " is not 1.13 or a later 1.x");
  find(library, "ucp_config_read", api.config_read);
  find(library, "ucp_config_modify", api.config_modify);
  find(library, "ucp_config_release", api.config_release);
  find(library, "ucp_init_version", api.init_version);
  find(library, "ucp_context_query", api.context_query);
  find(library, "ucp_cleanup", api.cleanup);
  find(library, "ucp_worker_create", api.worker_create);
  find(library, "ucp_worker_destroy", api.worker_destroy);
  find(library, "ucp_worker_query", api.worker_query);
  find(library, "ucp_worker_get_address", api.worker_get_address);
  find(library, "ucp_worker_release_address", api.worker_release_address);
  find(library, "ucp_worker_progress", api.worker_progress);
  find(library, "ucp_worker_get_efd", api.worker_get_efd);
  find(library, "ucp_worker_arm", api.worker_arm);
  find(library, "ucp_worker_fence", api.worker_fence);
  find(library, "ucp_worker_set_am_recv_handler", api.worker_set_am_recv_handler);
  find(library, "ucp_ep_create", api.ep_create);
  find(library, "ucp_ep_close_nbx", api.ep_close_nbx);
  find(library, "ucp_ep_query", api.ep_query);
  find(library, "ucp_am_send_nbx", api.am_send_nbx);
  find(library, "ucp_am_recv_data_nbx", api.am_recv_data_nbx);
  find(library, "ucp_request_check_status", api.request_check_status);
  find(library, "ucp_request_free", api.request_free);
  find(library, "ucs_status_string", api.status_string);
  find_memory_functions(library, api);
  Dl_info info{};
  dladdr(reinterpret_cast<void*>(api.get_version), &info);
  api.where = "UCX " + version + ", " + (info.dli_fname == nullptr ? kLibrary : info.dli_fname);
}

// nullptr, and why it cannot be used.
std::unique_ptr<Api> try_library(const std::string& path, int flags, std::string& why) {
  void* library = dlopen(path.c_str(), RTLD_NOW | RTLD_LOCAL | flags);
  if (library == nullptr) {
    const char* text = dlerror();
    if ((flags & RTLD_NOLOAD) == 0) why += (why.empty() ? "" : "; ") + std::string(text == nullptr ? path : text);
    return nullptr;
  }
  auto api = std::make_unique<Api>();
  try {
    find_functions(library, *api);
    return api;
  } catch (const Error& error) {
    why += (why.empty() ? "" : "; ") + path + ": " + error.what();
    dlclose(library);
    return nullptr;
  }
}

}  // namespace

void fail(const std::string& text) { throw Error(Failure::kSetup, "ucx: " + text); }

const Api& load(const std::string& library, const std::string& beside) {
  static std::mutex mutex;
  static auto* loaded = new std::map<std::string, std::unique_ptr<Api>>;
  std::lock_guard lock(mutex);
  const auto found = loaded->find(library + '\n' + beside);
  if (found != loaded->end()) return *found->second;
  std::string why;
  std::unique_ptr<Api> api;
  if (!library.empty()) {
    api = try_library(library, 0, why);
  } else {
    api = try_library(kLibrary, RTLD_NOLOAD, why);
    if (api == nullptr) api = try_library(kLibrary, 0, why);
    if (api == nullptr && !beside.empty()) api = try_library(beside, 0, why);
  }
  if (api == nullptr) {
    fail("UCX 1.13 or later could not be loaded (" + why +
         "); pip install 'm2n[ucx]', or the system's package (Debian: libucx0), or name the library: "
         "Config(ucx_library=...)");
  }
  return *(loaded->emplace(library + '\n' + beside, std::move(api)).first->second);
}

}  // namespace m2n::ucx
