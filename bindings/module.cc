// SPDX-License-Identifier: Apache-2.0
// The native module m2n._C: names, argument checks, and when to hold Python's lock. No logic.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <optional>

#include "bind.h"
#include "exchange/host/attention.h"
#include "exchange/host/expert.h"
#include "exchange/rows/plain_floats.h"
#include "transport/choice.h"
#include "transport/memory_limit.h"

namespace m2n::bindings {
namespace {

// A copy of this many bytes takes a few microseconds: below it, giving up the lock costs more than it frees.
constexpr uint64_t kLargeCopyBytes = 64 * 1024;

class MaybeRelease {
 public:
  explicit MaybeRelease(bool is_long) {
    if (is_long) release_.emplace();
  }

 private:
  std::optional<WithoutLock> release_;
};

Shape make_shape(uint32_t hidden, uint32_t num_experts, uint32_t top_k, uint32_t max_tokens, uint32_t microbatches,
                 const std::string& dispatch_dtype, const std::string& combine_dtype, const std::string& reduce_at) {
  Shape shape;
  shape.hidden = hidden;
  shape.num_experts = num_experts;
  shape.top_k = top_k;
  shape.max_tokens = max_tokens;
  shape.microbatches = microbatches;
  shape.dispatch_dtype = parse_dtype(dispatch_dtype, "dispatch_dtype", /*may_be_float8=*/true);
  shape.combine_dtype = parse_dtype(combine_dtype, "combine_dtype", /*may_be_float8=*/false);
  if (reduce_at != "expert" && reduce_at != "attention") {
    throw py::value_error("reduce_at: expected 'expert' or 'attention', got '" + reduce_at + "'");
  }
  shape.reduce_at = reduce_at == "expert" ? ReduceAt::kExpert : ReduceAt::kAttention;
  return shape;
}

struct TopK {
  std::vector<int32_t> ids;
  std::vector<float> weights;
  uint32_t num_tokens;
};

TopK read_topk(const Shape& shape, const py::object& topk_ids, const py::object& topk_weights) {
  const Tensor ids(topk_ids, "topk_ids", kOnCpu);
  const Tensor weights(topk_weights, "topk_weights", kOnCpu);
  require_topk(shape, ids, weights);
  const PlainFloats floats;  // weights may have to be rounded
  return {ids.read_ids(shape.top_k), weights.read_floats(shape.top_k), static_cast<uint32_t>(ids.num_rows())};
}

// Where experts are, made once a placement: the ranks of expert e are ranks[rank_offsets[e] : rank_offsets[e + 1]].
struct PlacementTable {
  std::vector<int32_t> rank_offsets, ranks;
};

void build_from_topk(Route& route, const py::object& topk_ids, const py::object& topk_weights,
                     const PlacementTable& table, uint32_t num_ranks, uint32_t own_rank, bool packs) {
  const TopK topk = read_topk(route.shape(), topk_ids, topk_weights);
  route.prepare(topk.num_tokens, num_ranks);
  route.build_from_topk(topk.ids.data(), topk.weights.data(), table.rank_offsets, table.ranks, own_rank);
  route.set_packs(packs);
}

void build_from_splits(Route& route, const std::vector<uint32_t>& splits, const py::object& topk_ids,
                       const py::object& topk_weights) {
  const TopK topk = read_topk(route.shape(), topk_ids, topk_weights);
  require_splits(splits, topk.num_tokens);
  route.prepare(topk.num_tokens, static_cast<uint32_t>(splits.size()));
  route.build_from_splits(topk.ids.data(), topk.weights.data(), splits);
}

void attention_dispatch_send(AttentionComm& comm, const py::object& x, std::shared_ptr<const Route> route,
                             uint32_t microbatch, uint32_t layer, double timeout_s, uint32_t placement_version) {
  const Tensor rows(x, "x", kOnCpu);
  const DType dtype = require_x_rows(rows, comm.shape(), route->view().num_tokens);
  const uint64_t bytes = route->num_rows() * comm.layout().dispatch_rows.row_bytes;
  const int64_t deadline_ns = deadline_after(timeout_s);
  const bool is_long =
      bytes >= kLargeCopyBytes || (!comm.is_busy(microbatch) && !comm.is_free(microbatch, &route->view()));
  const MaybeRelease release(is_long);
  comm.dispatch_send(rows.data(), rows.row_stride_bytes(), dtype, std::move(route), microbatch, layer, deadline_ns,
                     placement_version);
}

void attention_combine_recv(AttentionComm& comm, const py::object& y, uint32_t microbatch, double timeout_s,
                            bool takes_nan) {
  const Tensor rows(y, "out", kOnCpu, true);
  require_out_rows(rows, comm.shape(), comm.num_tokens(microbatch));
  const int64_t deadline_ns = deadline_after(timeout_s);
  const uint64_t bytes = rows.num_rows() * comm.layout().combine_rows.row_bytes;
  // Ready means that it will not wait, or that rows are missing: with NaN for those it waits for the others.
  const MaybeRelease release(bytes >= kLargeCopyBytes || takes_nan || !comm.is_ready(microbatch));
  comm.combine_recv(rows.data(), rows.row_stride_bytes(), microbatch, deadline_ns, takes_nan);
}

std::shared_ptr<Batch> expert_dispatch_recv(ExpertComm& comm, std::optional<uint32_t> layer,
                                            std::optional<uint32_t> microbatch, double linger_us,
                                            const std::vector<uint32_t>& attention_ranks, double timeout_s) {
  const Wanted wanted = make_wanted(layer, microbatch, linger_us, attention_ranks);
  const int64_t deadline_ns = deadline_after(timeout_s);
  if (timeout_s == 0) return comm.dispatch_recv(wanted, 0);
  const WithoutLock release;
  return comm.dispatch_recv(wanted, deadline_ns);
}

void expert_combine_send(ExpertComm& comm, const std::shared_ptr<Batch>& batch, const py::object& y, bool reduced) {
  const Tensor rows(y, "y", kOnCpu);
  const DType dtype = require_y_rows(rows, comm.shape(), batch->num_rows(), batch->num_pairs(), reduced);
  const MaybeRelease release(static_cast<uint64_t>(rows.num_rows()) * comm.layout().combine_rows.row_bytes >=
                             kLargeCopyBytes);
  comm.combine_send(*batch, rows.data(), rows.row_stride_bytes(), dtype, reduced);
}

// The descriptors belong to the caller from here on.
py::dict offer_to_dict(Comm::Offer offer) {
  py::list objects;
  for (Handle& handle : offer.handles) objects.append(py::make_tuple(handle.fd.release(), handle.id));
  py::dict dict;
  dict["peer_idx"] = offer.peer_idx;
  dict["process"] = offer.origin.process;
  dict["device"] = offer.origin.device;
  dict["wakes"] = offer.wakes;
  dict["objects"] = objects;
  dict["address"] = py::bytes(offer.address);
  dict["link"] = offer.link;
  return dict;
}

const char* state_name(PeerState state) {
  switch (state) {
    case PeerState::kUnused:
      return "unused";
    case PeerState::kLive:
      return "live";
    case PeerState::kLeft:
      return "left";
    case PeerState::kLost:
      return "lost";
  }
  return "";
}

void attach_peer(Comm& comm, uint32_t peer_idx, const std::vector<std::pair<int, uint64_t>>& objects, uint64_t process,
                 const std::string& device, bool wakes, const py::bytes& address, int data_fd) {
  Fd data(data_fd);
  std::vector<Handle> handles;
  for (const auto& [fd, id] : objects) handles.push_back({Fd(fd), 0, id});
  const std::string address_bytes = address;
  const WithoutLock release;
  comm.attach(peer_idx, std::move(handles), {process, device}, wakes, address_bytes, std::move(data));
}

void watch_peer_of(Comm& comm, uint32_t peer_idx, int connection_fd, int pidfd, double send_every_s,
                   double lost_after_s, const std::string& displaces) {
  const auto ns = [](double seconds) { return static_cast<int64_t>(seconds * 1e9); };
  comm.watch(peer_idx, connection_fd, pidfd, {ns(send_every_s), ns(lost_after_s)}, displaces);
}

py::list clock_offsets_list(const Comm& comm) {
  py::list list;
  for (const auto& [rank, offset] : comm.clock_offsets()) {
    list.append(py::make_tuple(rank, offset.ahead_ns, offset.round_trip_ns));
  }
  return list;
}

py::dict stats_dict(const Comm& comm) {
  const Stats stats = comm.stats();
  py::dict dict;
  dict["messages_sent"] = stats.messages_sent;
  dict["messages_received"] = stats.messages_received;
  dict["rows_sent"] = stats.rows_sent;
  dict["rows_received"] = stats.rows_received;
  dict["bytes_sent"] = stats.bytes_sent;
  dict["bytes_received"] = stats.bytes_received;
  dict["bytes_packed"] = stats.bytes_packed;
  dict["stream_waits"] = stats.stream_waits;
  dict["stream_waits_ended"] = stats.stream_waits_ended;
  dict["wait_us"] = static_cast<double>(stats.wait_ns) / 1e3;
  dict["signals_held"] = stats.signals_held;
  dict["held_us"] = static_cast<double>(stats.held_ns) / 1e3;
  return dict;
}

py::list peers_list(const Comm& comm) {
  py::list list;
  for (const PeerInfo& info : comm.peer_infos()) {
    list.append(py::make_tuple(info.rank, state_name(info.state), info.life, info.why));
  }
  return list;
}

bool wait_peer(Comm& comm, uint32_t rank, double timeout_s) {
  const int64_t deadline_ns = deadline_after(timeout_s);
  const WithoutLock release;
  return comm.wait_peer(rank, deadline_ns);
}

// A wait in a verb must not hide Ctrl-C.
void check_interrupt() {
  if (WithoutLock* const guard = WithoutLock::of_this_thread(); guard != nullptr) return guard->check_signals();
  if (PyGILState_Check() != 0 && PyErr_CheckSignals() != 0) throw py::error_already_set();
}

void bind_comm(py::module_& module) {
  py::class_<Comm, std::shared_ptr<Comm>> type(module, "Comm");
  type.def(
      "offer",
      [](Comm& comm, uint32_t rank, uint64_t life, bool is_over_network, uint32_t link) {
        auto offer = [&] {
          const WithoutLock release;  // it allocates the peer's memory
          return comm.offer(rank, life, is_over_network, link);
        }();
        return offer_to_dict(std::move(offer));
      },
      py::arg("rank"), py::arg("life"), py::arg("is_over_network") = false, py::arg("link") = 0);
  type.def("attach", &attach_peer, py::arg("peer_idx"), py::arg("objects"), py::arg("process"), py::arg("device"),
           py::arg("wakes"), py::arg("address"), py::arg("data_fd") = -1);
  type.def("withdraw", &Comm::withdraw, py::arg("peer_idx"));
  type.def("watch", &watch_peer_of, py::arg("peer_idx"), py::arg("connection_fd"), py::arg("pidfd"),
           py::arg("send_every_s"), py::arg("lost_after_s"), py::arg("displaces") = "", py::call_guard<WithoutLock>());
  type.def(  // for tests
      "drop_peer", [](Comm& comm, uint32_t peer_idx) { comm.drop_peer(peer_idx, LossCause::kProtocol); },
      py::arg("peer_idx"));
  type.def("drop", &Comm::drop, py::arg("rank"), py::arg("reason"), py::call_guard<WithoutLock>());
  type.def("recover", &Comm::recover, py::arg("rank"), py::call_guard<WithoutLock>());
  type.def(
      "set_give_up", [](Comm& comm, double give_up_s) { comm.set_give_up(timeout_ns(give_up_s)); },
      py::arg("give_up_s"));
  type.def("close", &Comm::close, py::call_guard<WithoutLock>());  // it may wait for what is held back
  type.def("abort", &Comm::abort, py::call_guard<WithoutLock>());
  type.def("check", &Comm::check);
  type.def("peers", &peers_list);
  type.def("clock_offsets", &clock_offsets_list);
  type.def("stats", &stats_dict);
  type.def("wait_peer", &wait_peer, py::arg("rank"), py::arg("timeout_s"));
  type.def_property_readonly("is_closed", &Comm::is_closed);
}

void bind_attention(py::module_& module) {
  py::class_<AttentionComm, Comm, std::shared_ptr<AttentionComm>> type(module, "AttentionComm");
  type.def(py::init<const Shape&, uint32_t, uint32_t, const std::string&>(), py::arg("shape"), py::arg("rank"),
           py::arg("max_peers"), py::arg("transport"));
  type.def("dispatch_send", &attention_dispatch_send, py::arg("x"), py::arg("route"), py::arg("microbatch"),
           py::arg("layer"), py::arg("timeout_s"), py::arg("placement_version"));
  type.def("combine_recv", &attention_combine_recv, py::arg("out"), py::arg("microbatch"), py::arg("timeout_s"),
           py::arg("takes_nan"));
  type.def(
      "missing", [](AttentionComm& comm, uint32_t microbatch) { return owed_dict(comm.missing(microbatch)); },
      py::arg("microbatch"));
  type.def("set_hosts", &AttentionComm::set_hosts, py::arg("ranks"), py::call_guard<WithoutLock>());
  type.def("num_tokens", &AttentionComm::num_tokens, py::arg("microbatch"));
  type.def("is_busy", &AttentionComm::is_busy, py::arg("microbatch"));
  type.def("ready", &AttentionComm::is_ready, py::arg("microbatch"));
  type.def(
      "wait_ready",
      [](AttentionComm& comm, const std::vector<uint32_t>& microbatches, double timeout_s) {
        const int64_t deadline_ns = deadline_after(timeout_s);
        const WithoutLock release;
        return comm.wait_ready(microbatches, deadline_ns);
      },
      py::arg("microbatches"), py::arg("timeout_s"));
  type.def(
      "idle",
      [](AttentionComm& comm, double timeout_s, uint32_t placement_version) {
        const int64_t deadline_ns = deadline_after(timeout_s);
        const WithoutLock release;
        comm.idle(deadline_ns, placement_version);
      },
      py::arg("timeout_s"), py::arg("placement_version"));
}

void bind_expert(py::module_& module) {
  py::class_<ExpertComm, Comm, std::shared_ptr<ExpertComm>> type(module, "ExpertComm");
  type.def(py::init<const Shape&, uint32_t, uint32_t, const std::string&, std::vector<uint32_t>>(), py::arg("shape"),
           py::arg("rank"), py::arg("max_peers"), py::arg("transport"), py::arg("local_experts"));
  type.def("dispatch_recv", &expert_dispatch_recv, py::arg("layer"), py::arg("microbatch"), py::arg("linger_us"),
           py::arg("attention_ranks"), py::arg("timeout_s"));
  type.def(
      "wait_work",
      [](ExpertComm& comm, double timeout_s) -> std::optional<std::pair<uint32_t, uint32_t>> {
        const int64_t deadline_ns = deadline_after(timeout_s);
        const WithoutLock release;
        const auto work = comm.wait_work(deadline_ns);
        if (!work) return std::nullopt;
        return std::pair{work->layer, work->microbatch};
      },
      py::arg("timeout_s"));
  type.def("combine_send", &expert_combine_send, py::arg("batch"), py::arg("y"), py::arg("reduced"));
  type.def("set_experts", &ExpertComm::set_experts, py::arg("local_experts"));
  type.def("placement_versions", &ExpertComm::placement_versions);
  type.def(
      "wait_placement",
      [](ExpertComm& comm, uint32_t version, double timeout_s) {
        const int64_t deadline_ns = deadline_after(timeout_s);
        const WithoutLock release;
        comm.wait_placement(version, deadline_ns);
      },
      py::arg("version"), py::arg("timeout_s"));
  type.def("window", [](const ExpertComm& comm) {
    return window_array(comm.rows_window(), comm.window_rows(), comm.shape(), kOnCpu);
  });
  type.def("scales", [](const ExpertComm& comm) {
    return scales_array(comm.rows_window(), comm.window_rows(), comm.shape(), kOnCpu);
  });
}

void bind_values(py::module_& module) {
  py::class_<Shape>(module, "Shape")
      .def(py::init(&make_shape), py::arg("hidden"), py::arg("num_experts"), py::arg("top_k"), py::arg("max_tokens"),
           py::arg("microbatches"), py::arg("dispatch_dtype"), py::arg("combine_dtype"), py::arg("reduce_at"));
  py::class_<PlacementTable>(module, "PlacementTable")
      .def(py::init<std::vector<int32_t>, std::vector<int32_t>>(), py::arg("rank_offsets"), py::arg("ranks"));
  py::class_<Route, std::shared_ptr<Route>>(module, "Route")
      .def(py::init<const Shape&>(), py::arg("shape"))
      .def("build_from_topk", &build_from_topk, py::arg("topk_ids"), py::arg("topk_weights"), py::arg("table"),
           py::arg("num_ranks"), py::arg("own_rank"), py::arg("packs"))
      .def("build_from_splits", &build_from_splits, py::arg("splits"), py::arg("topk_ids"), py::arg("topk_weights"))
      .def_property_readonly("packs", &Route::packs)
      .def_property_readonly("num_tokens", [](const Route& route) { return route.view().num_tokens; })
      .def_property_readonly("num_rows", &Route::num_rows)
      .def_property_readonly("rows_per_rank", [](const Route& route) {
        std::vector<uint32_t> rows;
        for (uint32_t rank = 0; rank < route.view().num_ranks; ++rank) {
          rows.push_back(route.view().row_offsets[rank + 1] - route.view().row_offsets[rank]);
        }
        return rows;
      });
  py::class_<Array>(module, "Array")
      .def("__dlpack__", [](const Array& array, const py::kwargs&) { return array.to_dlpack(); })
      .def("__dlpack_device__",
           [](const Array& array) { return py::make_tuple(array.device.device_type, array.device.device_id); })
      .def_property_readonly("is_bfloat16", [](const Array& array) { return array.kind == Kind::kBFloat; })
      .def_property_readonly("is_float8", [](const Array& array) { return array.kind == Kind::kFloat8E4M3; })
      .def("bits", [](const Array& array) {
        Array bits = array;
        bits.kind = Kind::kUInt;
        return bits;
      });
  py::class_<Batch, std::shared_ptr<Batch>>(module, "Batch")
      .def_property_readonly(
          "about",
          [](const Batch& b) { return std::tuple(b.layer, b.microbatch, b.num_rows(), b.num_pairs(), b.ranks, true); })
      .def_readonly("hosting", &Batch::hosting)
      .def_property_readonly("row_index_by_expert",
                             [](const std::shared_ptr<Batch>& b) {
                               return list_array(b, b->row_index_by_expert.data(), b->row_index_by_expert.size(),
                                                 kOnCpu);
                             })
      .def_property_readonly("expert_offsets",
                             [](const std::shared_ptr<Batch>& b) {
                               return list_array(b, b->expert_offsets.data(), b->expert_offsets.size(), kOnCpu);
                             })
      .def_property_readonly("weights", [](const std::shared_ptr<Batch>& b) {
        return list_array(b, b->weights.data(), b->weights.size(), kOnCpu);
      });
}

}  // namespace

PYBIND11_MODULE(_C, module) {
  module.doc() = "Native core of m2n. Use the names of the package m2n instead.";
  bind_errors(module);
  on_sleep = &check_interrupt;
  bind_values(module);
  bind_comm(module);
  bind_attention(module);
  bind_expert(module);
  bind_device(module);
  module.def("start_seq_at", [](uint32_t seq) { g_first_seq = seq; }, py::arg("seq"));                   // for tests
  module.def("fault_delays", &fault_delays, py::arg("transport"), py::arg("stream"), py::arg("count"));  // for tests
  module.def("require_memory", &require_memory, py::arg("what"), py::arg("bytes"),
             py::arg("proc") = "/proc");  // for tests
  module.def("describe_transport", &describe_transport, py::arg("name"));
  module.attr("max_microbatches") = kMaxSlots - 1;
  module.attr("has_cuda") = bool{M2N_HAS_CUDA};
  module.def("why_no_cuda", &why_no_cuda);
  module.attr("sanitizer") = M2N_SANITIZE_NAME;
  module.attr("version") = M2N_VERSION;
}

}  // namespace m2n::bindings
