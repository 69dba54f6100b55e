// SPDX-License-Identifier: Apache-2.0
// Our declarations of UCX beside its own headers: sizes, offsets, values, and the types of functions.
#include <ucp/api/ucp.h>

#include <cstddef>
#include <type_traits>

#include "transport/ucx/api.h"

namespace ours = m2n::ucx;

#define SAME_PLACE(ours_type, ours_field, theirs_type, theirs_field)                           \
  static_assert(offsetof(ours::ours_type, ours_field) == offsetof(theirs_type, theirs_field)); \
  static_assert(sizeof(ours::ours_type::ours_field) == sizeof(theirs_type::theirs_field))
#define ROOM_FOR(ours_type, theirs_type) static_assert(sizeof(ours::ours_type) >= sizeof(theirs_type))
#define SAME_VALUE(ours_value, theirs_value) \
  static_assert(static_cast<long long>(ours_value) == static_cast<long long>(theirs_value))

static_assert(sizeof(ours::Status) == sizeof(ucs_status_t) && std::is_signed_v<std::underlying_type_t<ours::Status>>);
SAME_VALUE(ours::Status::kOk, UCS_OK);
SAME_VALUE(ours::Status::kInProgress, UCS_INPROGRESS);
SAME_VALUE(ours::Status::kLast, UCS_ERR_LAST);

ROOM_FOR(Params, ucp_params_t);
SAME_PLACE(Params, field_mask, ucp_params_t, field_mask);
SAME_PLACE(Params, features, ucp_params_t, features);
SAME_VALUE(ours::Params::kFeatures, UCP_PARAM_FIELD_FEATURES);
SAME_VALUE(ours::Params::kRma, UCP_FEATURE_RMA);
SAME_VALUE(ours::Params::kWakeup, UCP_FEATURE_WAKEUP);
SAME_VALUE(ours::Params::kAm, UCP_FEATURE_AM);

ROOM_FOR(ContextAttributes, ucp_context_attr_t);
SAME_PLACE(ContextAttributes, memory_types, ucp_context_attr_t, memory_types);
SAME_VALUE(ours::ContextAttributes::kMemoryTypes, UCP_ATTR_FIELD_MEMORY_TYPES);
SAME_VALUE(ours::ContextAttributes::kCuda, UCS_BIT(UCS_MEMORY_TYPE_CUDA));

ROOM_FOR(WorkerParams, ucp_worker_params_t);
SAME_PLACE(WorkerParams, thread_mode, ucp_worker_params_t, thread_mode);
SAME_VALUE(ours::WorkerParams::kThreadMode, UCP_WORKER_PARAM_FIELD_THREAD_MODE);
SAME_VALUE(ours::WorkerParams::kSerialized, UCS_THREAD_MODE_SERIALIZED);

ROOM_FOR(WorkerAttributes, ucp_worker_attr_t);
SAME_PLACE(WorkerAttributes, max_header_bytes, ucp_worker_attr_t, max_am_header);
SAME_VALUE(ours::WorkerAttributes::kMaxHeader, UCP_WORKER_ATTR_FIELD_MAX_AM_HEADER);

ROOM_FOR(EndpointParams, ucp_ep_params_t);
SAME_PLACE(EndpointParams, address, ucp_ep_params_t, address);
SAME_PLACE(EndpointParams, error_mode, ucp_ep_params_t, err_mode);
static_assert(offsetof(ours::EndpointParams, error_callback) == offsetof(ucp_ep_params_t, err_handler.cb));
static_assert(offsetof(ours::EndpointParams, error_arg) == offsetof(ucp_ep_params_t, err_handler.arg));
SAME_VALUE(ours::EndpointParams::kAddress, UCP_EP_PARAM_FIELD_REMOTE_ADDRESS);
SAME_VALUE(ours::EndpointParams::kErrorMode, UCP_EP_PARAM_FIELD_ERR_HANDLING_MODE);
SAME_VALUE(ours::EndpointParams::kErrorHandler, UCP_EP_PARAM_FIELD_ERR_HANDLER);
SAME_VALUE(ours::EndpointParams::kNoErrors, UCP_ERR_HANDLING_MODE_NONE);
SAME_VALUE(ours::EndpointParams::kPeerErrors, UCP_ERR_HANDLING_MODE_PEER);

#if UCP_API_VERSION >= UCP_VERSION(1, 15)
ROOM_FOR(EndpointAttributes, ucp_ep_attr_t);
static_assert(offsetof(ours::EndpointAttributes, transports) == offsetof(ucp_ep_attr_t, transports.entries));
static_assert(offsetof(ours::EndpointAttributes, num_transports) == offsetof(ucp_ep_attr_t, transports.num_entries));
static_assert(offsetof(ours::EndpointAttributes, transport_bytes) == offsetof(ucp_ep_attr_t, transports.entry_size));
SAME_PLACE(Transport, name, ucp_transport_entry_t, transport_name);
SAME_VALUE(ours::EndpointAttributes::kTransports, UCP_EP_ATTR_FIELD_TRANSPORTS);
#endif

ROOM_FOR(MapParams, ucp_mem_map_params_t);
SAME_PLACE(MapParams, address, ucp_mem_map_params_t, address);
SAME_PLACE(MapParams, length, ucp_mem_map_params_t, length);
SAME_VALUE(ours::MapParams::kAddress, UCP_MEM_MAP_PARAM_FIELD_ADDRESS);
SAME_VALUE(ours::MapParams::kLength, UCP_MEM_MAP_PARAM_FIELD_LENGTH);

static_assert(sizeof(ours::Iov) == sizeof(ucp_dt_iov_t));
SAME_PLACE(Iov, buffer, ucp_dt_iov_t, buffer);
SAME_PLACE(Iov, length, ucp_dt_iov_t, length);

ROOM_FOR(RequestParam, ucp_request_param_t);
SAME_PLACE(RequestParam, field_mask, ucp_request_param_t, op_attr_mask);
SAME_PLACE(RequestParam, flags, ucp_request_param_t, flags);
SAME_PLACE(RequestParam, callback, ucp_request_param_t, cb);
SAME_PLACE(RequestParam, datatype, ucp_request_param_t, datatype);
SAME_PLACE(RequestParam, user_data, ucp_request_param_t, user_data);
SAME_VALUE(ours::RequestParam::kCallback, UCP_OP_ATTR_FIELD_CALLBACK);
SAME_VALUE(ours::RequestParam::kUserData, UCP_OP_ATTR_FIELD_USER_DATA);
SAME_VALUE(ours::RequestParam::kDatatype, UCP_OP_ATTR_FIELD_DATATYPE);
SAME_VALUE(ours::RequestParam::kFlags, UCP_OP_ATTR_FIELD_FLAGS);
SAME_VALUE(ours::RequestParam::kFastCompletion, UCP_OP_ATTR_FLAG_FAST_CMPL);
SAME_VALUE(ours::RequestParam::kBytes, ucp_dt_make_contig(1));
SAME_VALUE(ours::RequestParam::kIov, UCP_DATATYPE_IOV);
SAME_VALUE(ours::RequestParam::kForceClose, UCP_EP_CLOSE_FLAG_FORCE);

SAME_PLACE(AmReceived, attributes, ucp_am_recv_param_t, recv_attr);
SAME_VALUE(ours::AmReceived::kIsRendezvous, UCP_AM_RECV_ATTR_FLAG_RNDV);
ROOM_FOR(AmHandler, ucp_am_handler_param_t);
SAME_PLACE(AmHandler, id, ucp_am_handler_param_t, id);
SAME_PLACE(AmHandler, callback, ucp_am_handler_param_t, cb);
SAME_PLACE(AmHandler, arg, ucp_am_handler_param_t, arg);
SAME_VALUE(ours::AmHandler::kId, UCP_AM_HANDLER_PARAM_FIELD_ID);
SAME_VALUE(ours::AmHandler::kCallback, UCP_AM_HANDLER_PARAM_FIELD_CB);
SAME_VALUE(ours::AmHandler::kArg, UCP_AM_HANDLER_PARAM_FIELD_ARG);

// Of functions: as many parameters, and each as large.
template <class Ours, class Theirs>
constexpr bool kIsAlike = false;
template <class A, class... As, class B, class... Bs>
  requires(sizeof...(As) == sizeof...(Bs))
constexpr bool kIsAlike<A (*)(As...), B (*)(Bs...)> =
    (std::is_void_v<A> ? std::is_void_v<B>
                       : sizeof(std::conditional_t<std::is_void_v<A>, char, A>) ==
                             sizeof(std::conditional_t<std::is_void_v<B>, char, B>)) &&
    ((sizeof(As) == sizeof(Bs)) && ...);
#define ALIKE(name) static_assert(kIsAlike<decltype(ours::Api::name), decltype(&ucp_##name)>, #name)

ALIKE(get_version);
ALIKE(config_read);
ALIKE(config_modify);
ALIKE(config_release);
ALIKE(init_version);
ALIKE(context_query);
ALIKE(cleanup);
ALIKE(worker_create);
ALIKE(worker_destroy);
ALIKE(worker_query);
ALIKE(worker_get_address);
ALIKE(worker_release_address);
ALIKE(worker_progress);
ALIKE(worker_get_efd);
ALIKE(worker_arm);
ALIKE(worker_fence);
ALIKE(worker_set_am_recv_handler);
ALIKE(ep_create);
ALIKE(ep_close_nbx);
ALIKE(ep_query);
ALIKE(am_send_nbx);
ALIKE(am_recv_data_nbx);
ALIKE(put_nbx);
ALIKE(mem_map);
ALIKE(mem_unmap);
ALIKE(rkey_pack);
ALIKE(rkey_buffer_release);
ALIKE(ep_rkey_unpack);
ALIKE(rkey_destroy);
ALIKE(request_check_status);
ALIKE(request_free);
static_assert(kIsAlike<decltype(ours::Api::status_string), decltype(&ucs_status_string)>);
