// SPDX-License-Identifier: Apache-2.0
// What we use of UCX's C API, as of version 1.13, and the table of its functions, filled when UCX is loaded. Declared
// here so that no build needs UCX: its structs only ever grow at their end and say by a mask which fields count. A test
// compares all of this with UCX's own headers.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>

namespace m2n::ucx {

enum class Status : int8_t { kOk = 0, kInProgress = 1, kLast = -100 };

struct Config;
struct Context;
struct Worker;
struct Endpoint;
struct Memory;
struct RemoteKey;
struct Address;

// What calls with _nbx return: nullptr (done), a Status below 0, or a request that goes on.
using Request = void*;
inline bool is_error(Request request) {
  return reinterpret_cast<uintptr_t>(request) >= static_cast<uintptr_t>(static_cast<intptr_t>(Status::kLast));
}
inline Status error_of(Request request) { return static_cast<Status>(reinterpret_cast<intptr_t>(request)); }

// Room for what later versions append, in structs that UCX reads.
struct Room {
  uint64_t words[24] = {};
};

struct Params {
  static constexpr uint64_t kFeatures = 1 << 0;
  static constexpr uint64_t kRma = 1 << 1, kWakeup = 1 << 4, kAm = 1 << 6;
  uint64_t field_mask = kFeatures;
  uint64_t features = 0;
  Room room;
};

struct ContextAttributes {
  static constexpr uint64_t kMemoryTypes = 1 << 2;
  static constexpr uint64_t kCuda = 1 << 1;  // of memory_types
  uint64_t field_mask = kMemoryTypes;
  size_t request_bytes = 0;
  int thread_mode = 0;
  uint64_t memory_types = 0;
  Room room;
};

struct WorkerParams {
  static constexpr uint64_t kThreadMode = 1 << 0;
  static constexpr int kSerialized = 1;
  uint64_t field_mask = kThreadMode;
  int thread_mode = kSerialized;
  Room cpu_mask, room;
};

using ErrorCallback = void (*)(void* arg, Endpoint* endpoint, Status status);
struct EndpointParams {
  static constexpr uint64_t kAddress = 1 << 0, kErrorMode = 1 << 1, kErrorHandler = 1 << 2;
  static constexpr int kNoErrors = 0, kPeerErrors = 1;
  uint64_t field_mask = kAddress;
  const Address* address = nullptr;
  int error_mode = kNoErrors;
  ErrorCallback error_callback = nullptr;
  void* error_arg = nullptr;
  Room room;
};

struct Transport {
  const char* name = nullptr;
  const char* device = nullptr;
};
struct WorkerAttributes {
  static constexpr uint64_t kMaxHeader = 1 << 3;
  uint64_t field_mask = kMaxHeader;
  int thread_mode = 0;
  uint32_t address_flags = 0;
  Address* address = nullptr;
  size_t address_bytes = 0;
  size_t max_header_bytes = 0;
  Room room;
};
struct EndpointAttributes {
  static constexpr uint64_t kTransports = 1 << 3;  // from 1.14 on; before that it is ignored
  uint64_t field_mask = kTransports;
  char name_and_addresses[32 + 2 * 128] = {};
  Transport* transports = nullptr;
  unsigned num_transports = 0;
  size_t transport_bytes = sizeof(Transport);
  Room room;
};

struct MapParams {
  static constexpr uint64_t kAddress = 1 << 0, kLength = 1 << 1;
  uint64_t field_mask = kAddress | kLength;
  void* address = nullptr;
  size_t length = 0;
  Room room;
};

struct Iov {
  void* buffer;
  size_t length;
};

using SendCallback = void (*)(void* request, Status status, void* user_data);
using ReceiveCallback = void (*)(void* request, Status status, size_t length, void* user_data);
struct RequestParam {
  static constexpr uint32_t kCallback = 1 << 1, kUserData = 1 << 2, kDatatype = 1 << 3, kFlags = 1 << 4;
  // Done with the caller's memory as soon as can be.
  static constexpr uint32_t kFastCompletion = 1 << 17;
  static constexpr uint64_t kBytes = 1 << 3, kIov = 2;
  static constexpr uint32_t kForceClose = 1 << 0;
  uint32_t field_mask = 0;
  uint32_t flags = 0;
  void* request = nullptr;
  union {
    SendCallback send = nullptr;
    ReceiveCallback receive;
  } callback;
  uint64_t datatype = kBytes;
  void* user_data = nullptr;
  Room room;
};

struct AmReceived {
  static constexpr uint64_t kIsRendezvous = 1 << 17;
  uint64_t attributes;
  Endpoint* reply_endpoint;
};
using AmCallback = Status (*)(void* arg, const void* header, size_t header_bytes, void* data, size_t num_bytes,
                              const AmReceived* received);
struct AmHandler {
  static constexpr uint64_t kId = 1 << 0, kCallback = 1 << 2, kArg = 1 << 3;
  uint64_t field_mask = kId | kCallback | kArg;
  unsigned id = 0;
  uint32_t flags = 0;
  AmCallback callback = nullptr;
  void* arg = nullptr;
  Room room;
};

// Each member is the function ucp_<name>.
struct Api {
  void (*get_version)(unsigned* major, unsigned* minor, unsigned* release);
  Status (*config_read)(const char* prefix, const char* file, Config** config);
  Status (*config_modify)(Config* config, const char* name, const char* value);
  void (*config_release)(Config* config);
  Status (*init_version)(unsigned major, unsigned minor, const Params* params, const Config* config, Context** context);
  Status (*context_query)(Context* context, ContextAttributes* attributes);
  void (*cleanup)(Context* context);
  Status (*worker_create)(Context* context, const WorkerParams* params, Worker** worker);
  void (*worker_destroy)(Worker* worker);
  Status (*worker_query)(Worker* worker, WorkerAttributes* attributes);
  Status (*worker_get_address)(Worker* worker, Address** address, size_t* num_bytes);
  void (*worker_release_address)(Worker* worker, Address* address);
  unsigned (*worker_progress)(Worker* worker);
  Status (*worker_get_efd)(Worker* worker, int* fd);
  Status (*worker_arm)(Worker* worker);
  Status (*worker_fence)(Worker* worker);
  Status (*worker_set_am_recv_handler)(Worker* worker, const AmHandler* handler);
  Status (*ep_create)(Worker* worker, const EndpointParams* params, Endpoint** endpoint);
  Request (*ep_close_nbx)(Endpoint* endpoint, const RequestParam* param);
  Status (*ep_query)(Endpoint* endpoint, EndpointAttributes* attributes);
  Request (*am_send_nbx)(Endpoint* endpoint, unsigned id, const void* header, size_t header_bytes, const void* buffer,
                         size_t count, const RequestParam* param);
  Request (*am_recv_data_nbx)(Worker* worker, void* data, void* buffer, size_t count, const RequestParam* param);
  Request (*put_nbx)(Endpoint* endpoint, const void* buffer, size_t count, uint64_t remote, RemoteKey* key,
                     const RequestParam* param);
  Status (*mem_map)(Context* context, const MapParams* params, Memory** memory);
  Status (*mem_unmap)(Context* context, Memory* memory);
  Status (*rkey_pack)(Context* context, Memory* memory, void** packed, size_t* num_bytes);
  void (*rkey_buffer_release)(void* packed);
  Status (*ep_rkey_unpack)(Endpoint* endpoint, const void* packed, RemoteKey** key);
  void (*rkey_destroy)(RemoteKey* key);
  Status (*request_check_status)(void* request);
  void (*request_free)(void* request);

  const char* (*status_string)(Status status);  // ucs_status_string
  std::string where;                            // "UCX 1.22.0, /usr/lib/libucp.so.0"
};

inline constexpr unsigned kMajor = 1, kMinor = 13;  // the oldest version that will do

// Loads UCX: `library` alone where it is given; else one that this process has loaded already, the system's, and at
// last `beside`, a path that may be "". Once per process and path; never unloaded. Throws Error(kSetup) in words.
const Api& load(const std::string& library, const std::string& beside);

// Throws Error(kSetup), of UCX.
[[noreturn]] void fail(const std::string& text);

}  // namespace m2n::ucx
