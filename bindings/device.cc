// SPDX-License-Identifier: Apache-2.0
// The comms whose verbs run on a device. Streams are handles of the device's own kind, as integers; 0: its default.
#include <pybind11/stl.h>

#include "bind.h"
#include "exchange/device/attention.h"
#include "exchange/device/expert.h"

namespace m2n::bindings {
namespace {

constexpr int32_t kCuda = 2;  // in DLPack's words

// "emulated" works in the memory of the host.
DLDevice tensors_of(const std::string& device) {
  if (!device.starts_with("cuda")) return kOnCpu;
  return {kCuda, device.size() > 5 ? std::stoi(device.substr(5)) : 0};
}

// Below zero: the comm's own, as it is when the launch runs.
int64_t launch_timeout_ns(double timeout_s) { return timeout_s < 0 ? kTimeoutOfComm : timeout_ns(timeout_s); }

Stream to_stream(uint64_t handle) { return reinterpret_cast<Stream>(handle); }

std::shared_ptr<DeviceRoute> make_route(DeviceAttentionComm& comm, const py::object& topk_ids,
                                        const py::object& topk_weights, const std::vector<uint32_t>& splits,
                                        const py::object& num_tokens, std::shared_ptr<DeviceRoute> out,
                                        uint64_t stream) {
  const Tensor ids(topk_ids, "topk_ids", tensors_of(comm.device()));
  const Tensor weights(topk_weights, "topk_weights", tensors_of(comm.device()));
  require_topk(comm.shape(), ids, weights);
  if (!splits.empty()) require_splits(splits, ids.num_rows());
  TopKView topk{static_cast<uint32_t>(ids.num_rows()),
                ids.data(),
                ids.id_type(),
                ids.stride(0),
                ids.stride(1),
                weights.data(),
                weights.weight_type(),
                weights.stride(0),
                weights.stride(1)};
  std::optional<Tensor> so_far;
  if (!num_tokens.is_none()) {
    so_far.emplace(num_tokens, "num_tokens", tensors_of(comm.device()));
    so_far->require_scalar();
    topk.num_so_far = so_far->data();
    topk.num_type = so_far->id_type();
  }
  const WithoutLock release;
  return comm.make_route(topk, splits, std::move(out), to_stream(stream));
}

void dispatch_send(DeviceAttentionComm& comm, const py::object& x, std::shared_ptr<const DeviceRoute> route,
                   uint32_t microbatch, uint32_t layer, double timeout_s, uint32_t /*placement_version*/,
                   uint32_t num_sms, uint64_t stream) {
  const Tensor rows(x, "x", tensors_of(comm.device()));
  const DType dtype = require_x_rows(rows, comm.shape(), route->view.num_tokens);
  const int64_t wait_ns = launch_timeout_ns(timeout_s);
  const WithoutLock release;
  comm.dispatch_send(rows.data(), rows.row_stride_bytes(), dtype, std::move(route), microbatch, layer, wait_ns, num_sms,
                     to_stream(stream));
}

void combine_recv(DeviceAttentionComm& comm, const py::object& y, uint32_t microbatch, double timeout_s, bool takes_nan,
                  uint32_t num_sms, uint64_t stream) {
  const Tensor rows(y, "out", tensors_of(comm.device()), true);
  require_out_rows(rows, comm.shape(), comm.num_tokens(microbatch));
  const int64_t wait_ns = launch_timeout_ns(timeout_s);
  const WithoutLock release;
  comm.combine_recv(rows.data(), rows.row_stride_bytes(), microbatch, wait_ns, num_sms, to_stream(stream), takes_nan);
}

int wait_ready(DeviceAttentionComm& comm, const std::vector<uint32_t>& microbatches, double timeout_s,
               uint64_t stream) {
  const int64_t deadline_ns = deadline_after(timeout_s);
  const WithoutLock release;
  return comm.wait_ready(microbatches, deadline_ns, to_stream(stream));
}

std::shared_ptr<DeviceBatch> dispatch_recv(DeviceExpertComm& comm, std::optional<uint32_t> layer,
                                           std::optional<uint32_t> microbatch, double linger_us,
                                           const std::vector<uint32_t>& attention_ranks, double timeout_s, bool sync,
                                           uint64_t stream) {
  const Wanted wanted = make_wanted(layer, microbatch, linger_us, attention_ranks);
  if (!sync) {
    if (!layer || !microbatch) throw py::value_error("dispatch_recv: with sync=False name layer and microbatch");
    const int64_t wait_ns = launch_timeout_ns(timeout_s);
    const WithoutLock release;
    return comm.launch_recv(wanted, wait_ns, to_stream(stream));
  }
  const int64_t deadline_ns = deadline_after(timeout_s);
  const WithoutLock release;
  return comm.dispatch_recv(wanted, deadline_ns, to_stream(stream));
}

std::optional<std::pair<uint32_t, uint32_t>> wait_work(DeviceExpertComm& comm, double timeout_s, uint64_t stream) {
  const int64_t deadline_ns = deadline_after(timeout_s);
  const WithoutLock release;
  const auto work = comm.wait_work(deadline_ns, to_stream(stream));
  if (!work) return std::nullopt;
  return std::pair{work->layer, work->microbatch};
}

void combine_send(DeviceExpertComm& comm, const std::shared_ptr<DeviceBatch>& batch, const py::object& y, bool reduced,
                  uint32_t num_sms, uint64_t stream) {
  const Tensor rows(y, "y", tensors_of(comm.device()));
  const DType dtype = require_y_rows(rows, comm.shape(), batch->num_rows, batch->num_pairs, reduced);
  const WithoutLock release;
  comm.combine_send(*batch, rows.data(), rows.row_stride_bytes(), dtype, reduced, num_sms, to_stream(stream));
}

template <class DeviceComm, class... Options>
void bind_launches(py::class_<DeviceComm, Options...>& type) {
  type.def(
      "set_timeout", [](DeviceComm& comm, double timeout_s) { comm.set_timeout(timeout_ns(timeout_s)); },
      py::arg("timeout_s"));
  type.def("use_stream_waits", [](DeviceComm& comm) { comm.use_stream_waits(); });
  type.def(
      "is_capturing", [](DeviceComm& comm, uint64_t stream) { return comm.is_capturing(to_stream(stream)); },
      py::arg("stream"));
}

void bind_device_attention(py::module_& module) {
  py::class_<DeviceRoute, std::shared_ptr<DeviceRoute>>(module, "DeviceRoute")
      .def_property_readonly("num_tokens", [](const DeviceRoute& route) { return route.view.num_tokens; })
      .def_property_readonly("num_rows",
                             [](const DeviceRoute& route) {
                               const WithoutLock release;  // it waits until the route is built
                               return route.num_rows();
                             })
      .def_property_readonly("rows_per_rank", [](const DeviceRoute& route) {
        const WithoutLock release;
        return route.read_rows_per_rank();
      });
  py::class_<DeviceAttentionComm, Comm, std::shared_ptr<DeviceAttentionComm>> type(module, "DeviceAttentionComm");
  type.def(py::init<const Shape&, uint32_t, uint32_t, const std::string&, const std::string&,
                    const std::vector<int32_t>&, const std::vector<int32_t>&, uint32_t, uint32_t>(),
           py::arg("shape"), py::arg("rank"), py::arg("max_peers"), py::arg("transport"), py::arg("device"),
           py::arg("rank_offsets"), py::arg("ranks"), py::arg("num_ranks"), py::arg("placement_version"));
  type.def("make_route", &make_route, py::arg("topk_ids"), py::arg("topk_weights"), py::arg("splits"),
           py::arg("num_tokens"), py::arg("out"), py::arg("stream"));
  type.def("dispatch_send", &dispatch_send, py::arg("x"), py::arg("route"), py::arg("microbatch"), py::arg("layer"),
           py::arg("timeout_s"), py::arg("placement_version"), py::arg("num_sms"), py::arg("stream"));
  type.def("set_hosts", [](DeviceAttentionComm&, const std::vector<uint32_t>&) {}, py::arg("ranks"));  // kernels know
  type.def("combine_recv", &combine_recv, py::arg("out"), py::arg("microbatch"), py::arg("timeout_s"),
           py::arg("takes_nan"), py::arg("num_sms"), py::arg("stream"));
  type.def("num_tokens", &DeviceAttentionComm::num_tokens, py::arg("microbatch"));
  type.def("is_busy", &DeviceAttentionComm::is_busy, py::arg("microbatch"));
  type.def(
      "ready",
      [](DeviceAttentionComm& comm, uint32_t microbatch, uint64_t stream) {
        return wait_ready(comm, {microbatch}, 0, stream) == 0;
      },
      py::arg("microbatch"), py::arg("stream"));
  type.def("wait_ready", &wait_ready, py::arg("microbatches"), py::arg("timeout_s"), py::arg("stream"));
  type.def(
      "idle",
      [](DeviceAttentionComm& comm, double timeout_s, uint32_t, uint64_t stream) {
        const int64_t wait_ns = timeout_ns(timeout_s);
        const WithoutLock release;
        comm.idle(wait_ns, to_stream(stream));
      },
      py::arg("timeout_s"), py::arg("placement_version"), py::arg("stream"));
  bind_launches(type);
}

void bind_device_expert(py::module_& module) {
  using BatchPtr = std::shared_ptr<DeviceBatch>;
  py::class_<DeviceBatch, BatchPtr>(module, "DeviceBatch")
      .def_property_readonly("about",
                             [](const DeviceBatch& b) {
                               return std::tuple(b.layer, b.microbatch, b.num_rows, b.num_pairs, b.ranks, b.is_counted);
                             })
      .def_property_readonly("hosting", [](const DeviceBatch&) { return 0; })  // its placement is fixed
      .def_property_readonly("counts",
                             [](const BatchPtr& batch) {
                               auto* counts = reinterpret_cast<int32_t*>(&batch->slot.state->num_messages);
                               return list_array(batch, counts, 3, tensors_of(batch->device));
                             })
      .def_property_readonly("row_index_by_expert",
                             [](const BatchPtr& batch) {
                               return list_array(batch, batch->slot.lists.row_index_by_expert, batch->num_pairs,
                                                 tensors_of(batch->device));
                             })
      .def_property_readonly("expert_offsets",
                             [](const BatchPtr& batch) {
                               return list_array(batch, batch->slot.lists.expert_offsets, batch->num_local_experts + 1,
                                                 tensors_of(batch->device));
                             })
      .def_property_readonly("weights", [](const BatchPtr& batch) {
        return list_array(batch, batch->slot.lists.weights, batch->num_pairs, tensors_of(batch->device));
      });
  py::class_<DeviceExpertComm, Comm, std::shared_ptr<DeviceExpertComm>> type(module, "DeviceExpertComm");
  type.def(py::init<const Shape&, uint32_t, uint32_t, const std::string&, const std::string&,
                    const std::vector<uint32_t>&>(),
           py::arg("shape"), py::arg("rank"), py::arg("max_peers"), py::arg("transport"), py::arg("device"),
           py::arg("local_experts"));
  type.def("dispatch_recv", &dispatch_recv, py::arg("layer"), py::arg("microbatch"), py::arg("linger_us"),
           py::arg("attention_ranks"), py::arg("timeout_s"), py::arg("sync"), py::arg("stream"));
  type.def("wait_work", &wait_work, py::arg("timeout_s"), py::arg("stream"));
  type.def("combine_send", &combine_send, py::arg("batch"), py::arg("y"), py::arg("reduced"), py::arg("num_sms"),
           py::arg("stream"));
  type.def(
      "placement_versions",
      [](DeviceExpertComm& comm, uint64_t stream) {
        const WithoutLock release;
        return comm.placement_versions(to_stream(stream));
      },
      py::arg("stream"));
  type.def(
      "wait_placement",
      [](DeviceExpertComm& comm, uint32_t version, double timeout_s, uint64_t stream) {
        const int64_t deadline_ns = deadline_after(timeout_s);
        const WithoutLock release;
        comm.wait_placement(version, deadline_ns, to_stream(stream));
      },
      py::arg("version"), py::arg("timeout_s"), py::arg("stream"));
  bind_launches(type);
  type.def("window", [](const DeviceExpertComm& comm) {
    return window_array(comm.rows_window(), comm.window_rows(), comm.shape(), tensors_of(comm.device()));
  });
  type.def("scales", [](const DeviceExpertComm& comm) {
    return scales_array(comm.rows_window(), comm.window_rows(), comm.shape(), tensors_of(comm.device()));
  });
}

}  // namespace

void bind_device(py::module_& module) {
  bind_device_attention(module);
  bind_device_expert(module);
}

}  // namespace m2n::bindings
