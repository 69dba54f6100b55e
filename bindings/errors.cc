// SPDX-License-Identifier: Apache-2.0
// m2n.Error, PeerLost, Timeout, ProtocolError, SetupError, SlotBusy.
#include "bind.h"

#include <pybind11/stl.h>

#include <string>

#include "core/error.h"

namespace m2n::bindings {
namespace {

namespace py = pybind11;

struct ErrorTypes {
  py::object error, peer_lost, timeout, protocol, setup, slot_busy;
};
ErrorTypes* g_error_types = nullptr;  // lives as long as the interpreter

void make_error_types(py::module_& module) {
  auto* types = new ErrorTypes;
  const auto make = [&](const char* name, const py::object& base, const char* doc) {
    const std::string full_name = std::string("m2n.") + name;
    auto type =
        py::reinterpret_steal<py::object>(PyErr_NewExceptionWithDoc(full_name.c_str(), doc, base.ptr(), nullptr));
    type.attr("peer") = py::none();
    module.attr(name) = type;
    return type;
  };
  const auto runtime_error = py::reinterpret_borrow<py::object>(PyExc_RuntimeError);
  types->error = make("Error", runtime_error, "Base of all errors of m2n. `peer`: the peer's rank, or None.");
  types->peer_lost = make("PeerLost", types->error,
                          "A peer died, was cut off, or left while it owed a reply. `missing`: of a batch in flight, "
                          "for each expert rank that will not answer the tokens whose rows it owes; else empty.");
  // Read-only: it stands for all errors that are not about a batch.
  types->peer_lost.attr("missing") = py::module_::import("types").attr("MappingProxyType")(py::dict());
  types->timeout =
      make("Timeout", types->error, "A deadline passed while the peer was alive; the call can be repeated.");
  types->protocol =
      make("ProtocolError", types->error, "A peer sent something that the protocol does not allow, or refused.");
  types->setup = make("SetupError", types->error, "Memory, connections or the store are not as they must be.");
  types->slot_busy = make("SlotBusy", types->error, "A dispatch into a microbatch that is still in flight.");
  g_error_types = types;
}

void translate(std::exception_ptr pointer) {
  try {
    if (pointer) std::rethrow_exception(pointer);
  } catch (const Error& error) {
    if (error.kind() == Failure::kArgument) {
      PyErr_SetString(PyExc_ValueError, error.what());
      return;
    }
    const py::object& type = error.kind() == Failure::kPeerLost   ? g_error_types->peer_lost
                             : error.kind() == Failure::kTimeout  ? g_error_types->timeout
                             : error.kind() == Failure::kProtocol ? g_error_types->protocol
                             : error.kind() == Failure::kSetup    ? g_error_types->setup
                                                                  : g_error_types->slot_busy;
    py::object value = type(error.what());
    if (error.peer_rank() != Error::kNoPeer) value.attr("peer") = error.peer_rank();
    if (!error.owed().empty()) value.attr("missing") = owed_dict(error.owed());
    PyErr_SetObject(type.ptr(), value.ptr());
  }
}

}  // namespace

py::dict owed_dict(const Owed& owed) {
  py::dict dict;
  for (const auto& [rank, rows] : owed) dict[py::int_(rank)] = py::cast(rows);
  return dict;
}

void bind_errors(py::module_& module) {
  make_error_types(module);
  py::register_exception_translator(&translate);
}

}  // namespace m2n::bindings
