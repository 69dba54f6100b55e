// SPDX-License-Identifier: Apache-2.0
// Reading and making DLPack capsules.
#include "tensor.h"

#include <cstring>
#include <limits>

#include "lock.h"

namespace m2n::bindings {
namespace {

constexpr int32_t kCpu = 1;
constexpr const char* kPlain = "dltensor";
constexpr const char* kVersioned = "dltensor_versioned";
constexpr const char* kExchangeApi = "dlpack_exchange_api";

std::string name_of(DLDevice device) {
  if (device.device_type == kCpu) return "the CPU";
  const std::string number = std::to_string(device.device_id);
  if (device.device_type == 2) return "cuda:" + number;
  return "DLPack device type " + std::to_string(device.device_type) + ", number " + number;
}

void require_device(const char* argument, DLDevice found, DLDevice expected) {
  const bool is_same_number = found.device_type == kCpu || found.device_id == expected.device_id;
  if (found.device_type == expected.device_type && is_same_number) return;
  throw py::value_error(std::string(argument) + ": this comm is on " + name_of(expected) + ", the tensor is on " +
                        name_of(found) + "; move it there first");
}

py::object attribute_of(const py::object& object, const char* name) {
  return call_python([&] { return PyObject_GetAttrString(object.ptr(), name); });
}

py::object call(const py::object& callable, const py::dict& options = py::dict()) {
  const py::tuple no_arguments;
  return call_python([&] { return PyObject_Call(callable.ptr(), no_arguments.ptr(), options.ptr()); });
}

// What a tensor says of itself, where it has to be known before __dlpack__ is called.
DLDevice device_of(const py::object& object, const char* argument) {
  try {
    const auto [type, number] = py::cast<std::pair<int32_t, int32_t>>(call(attribute_of(object, "__dlpack_device__")));
    return {type, number};
  } catch (const std::exception& error) {
    throw py::type_error(std::string(argument) + ": DLPack does not know its device: " + error.what());
  }
}

py::object call_dlpack(const py::object& object, const char* argument, DLDevice device) {
  if (!py::hasattr(object, "__dlpack__")) {
    throw py::type_error(std::string(argument) + ": expected a torch, numpy or other DLPack tensor, got " +
                         std::string(py::str(py::type::of(object).attr("__name__"))));
  }
  const py::object dlpack = attribute_of(object, "__dlpack__");
  py::dict options;
  if (device.device_type != kCpu) {
    require_device(argument, device_of(object, argument), device);  // no CPU tensor understands the next line
    options["stream"] = -1;                                         // no waiting: whoever calls orders the streams
  }
  py::dict versioned(options.attr("copy")());
  versioned["max_version"] = py::make_tuple(1, 0);
  const auto fail = [argument](const py::error_already_set& error) {
    throw py::type_error(std::string(argument) + ": cannot be read through DLPack: " + error.what());
  };
  try {
    return call(dlpack, versioned);
  } catch (py::error_already_set& error) {
    if (!error.matches(PyExc_TypeError)) fail(error);
  }
  try {
    return call(dlpack, options);  // a library from before DLPack 1.0, which exports nothing that is read-only
  } catch (py::error_already_set& error) {
    fail(error);
  }
  return py::none();
}

// The C functions of a type, or nullptr. The last type asked for is remembered, under the GIL.
const ExchangeApi* api_of(PyTypeObject* type) {
  static PyTypeObject* last_type = nullptr;  // a reference is held: no other type can get its address
  static const ExchangeApi* last_api = nullptr;
  if (type == last_type) return last_api;
  Py_INCREF(type);
  Py_XDECREF(last_type);
  last_type = type;
  last_api = nullptr;
  const py::object found = py::getattr(reinterpret_cast<PyObject*>(type), "__dlpack_c_exchange_api__", py::none());
  if (!PyCapsule_IsValid(found.ptr(), kExchangeApi)) return nullptr;
  const auto* api = static_cast<const ExchangeApi*>(PyCapsule_GetPointer(found.ptr(), kExchangeApi));
  if (api->major == 1 && api->read_tensor != nullptr) last_api = api;
  return last_api;
}

}  // namespace

Tensor::Tensor(const py::object& object, const char* argument, DLDevice device, bool is_written) : argument_(argument) {
  if (!read_by_api(object)) read_by_capsule(object, device, is_written);
  require_device(argument, tensor_->device, device);
}

bool Tensor::read_by_api(const py::object& object) {
  const ExchangeApi* api = api_of(Py_TYPE(object.ptr()));
  if (api == nullptr) return false;
  if (api->read_tensor(object.ptr(), &by_api_) != 0) {
    PyErr_Clear();  // __dlpack__ says why in its own words
    return false;
  }
  owner_ = object;
  tensor_ = &by_api_;
  return true;
}

void Tensor::read_by_capsule(const py::object& object, DLDevice device, bool is_written) {
  owner_ = call_dlpack(object, argument_, device);
  if (PyCapsule_IsValid(owner_.ptr(), kVersioned)) {
    const auto* managed = static_cast<DLManagedTensorVersioned*>(PyCapsule_GetPointer(owner_.ptr(), kVersioned));
    if (is_written && (managed->flags & (kReadOnly | kIsCopied)) != 0) {
      throw py::value_error(std::string(argument_) + ": it is read-only; give a tensor that can be written");
    }
    tensor_ = &managed->tensor;
  } else if (PyCapsule_IsValid(owner_.ptr(), kPlain)) {
    tensor_ = &static_cast<DLManagedTensor*>(PyCapsule_GetPointer(owner_.ptr(), kPlain))->tensor;
  } else {
    throw py::type_error(std::string(argument_) + ": __dlpack__ gave no DLPack capsule");
  }
}

// The capsule was not consumed, so its own destructor frees the tensor.
Tensor::~Tensor() = default;

bool Tensor::is(Kind kind, uint8_t bits) const {
  return tensor_->dtype.code == static_cast<uint8_t>(kind) && tensor_->dtype.bits == bits && tensor_->dtype.lanes == 1;
}

std::string Tensor::describe() const {
  std::string text = tensor_->dtype.code == 0    ? "int"
                     : tensor_->dtype.code == 1  ? "uint"
                     : tensor_->dtype.code == 2  ? "float"
                     : tensor_->dtype.code == 4  ? "bfloat"
                     : tensor_->dtype.code == 10 ? "e4m3fn float"
                                                 : "type " + std::to_string(tensor_->dtype.code) + "/";
  text += std::to_string(tensor_->dtype.bits) + " [";
  for (int i = 0; i < tensor_->ndim; ++i) text += (i == 0 ? "" : ", ") + std::to_string(tensor_->shape[i]);
  return text + "]";
}

int64_t Tensor::stride(int dim) const {
  if (tensor_->strides != nullptr) return tensor_->strides[dim];
  int64_t packed = 1;
  for (int i = tensor_->ndim - 1; i > dim; --i) packed *= tensor_->shape[i];
  return packed;
}

void Tensor::require_matrix(uint32_t columns) const {
  if (tensor_->ndim == 2 && tensor_->shape[1] == columns) return;
  throw py::value_error(std::string(argument_) + ": expected shape [T, " + std::to_string(columns) + "], got " +
                        describe());
}

void Tensor::require_scalar() const {
  for (int32_t dim = 0; dim < tensor_->ndim; ++dim) {
    if (tensor_->shape[dim] != 1) {
      throw py::value_error(std::string(argument_) + ": expected a tensor of one element, got " + describe());
    }
  }
}

DType Tensor::float_dtype() const {
  if (is(Kind::kFloat, 32)) return DType::kFloat32;
  if (is(Kind::kFloat, 16)) return DType::kFloat16;
  if (is(Kind::kBFloat, 16) || is(Kind::kUInt, 16)) return DType::kBFloat16;
  throw py::type_error(std::string(argument_) + ": expected float32, bfloat16 or float16, got " + describe());
}

void Tensor::require_rows(DType dtype, uint32_t hidden) const {
  require_matrix(hidden);
  if (float_dtype() != dtype) {
    const char* name = dtype == DType::kFloat32 ? "float32" : dtype == DType::kFloat16 ? "float16" : "bfloat16";
    throw py::type_error(std::string(argument_) + ": expected dtype " + name + " as in the Shape, got " + describe());
  }
  if (tensor_->shape[0] != 0 && (stride(1) != 1 || (tensor_->shape[0] > 1 && stride(0) < hidden))) {
    throw py::value_error(
        std::string(argument_) +
        ": the elements of a row must be adjacent (stride 1) and rows must not overlap; got strides " +
        std::to_string(stride(0)) + ", " + std::to_string(stride(1)) + "; make it contiguous first");
  }
}

uint64_t Tensor::row_stride_bytes() const { return static_cast<uint64_t>(stride(0)) * (tensor_->dtype.bits / 8); }

std::vector<int32_t> Tensor::read_ids(uint32_t top_k) const {
  const bool is_short = id_type() == IdType::kInt32;
  std::vector<int32_t> ids(static_cast<size_t>(num_rows()) * top_k);
  for (int64_t row = 0; row < num_rows(); ++row) {
    for (uint32_t k = 0; k < top_k; ++k) {
      const int64_t at = row * stride(0) + k * stride(1);
      int64_t id;
      if (is_short) {
        id = reinterpret_cast<const int32_t*>(data())[at];
      } else {
        id = reinterpret_cast<const int64_t*>(data())[at];
      }
      if (id < std::numeric_limits<int32_t>::min() || id > std::numeric_limits<int32_t>::max()) {
        throw py::value_error(std::string(argument_) + ": expert id " + std::to_string(id) + " at token " +
                              std::to_string(row) + " is out of range");
      }
      ids[static_cast<size_t>(row) * top_k + k] = static_cast<int32_t>(id);
    }
  }
  return ids;
}

IdType Tensor::id_type() const {
  if (is(Kind::kInt, 32)) return IdType::kInt32;
  if (is(Kind::kInt, 64)) return IdType::kInt64;
  throw py::type_error(std::string(argument_) + ": expected int32 or int64, got " + describe());
}

WeightType Tensor::weight_type() const {
  if (is(Kind::kFloat, 64)) return WeightType::kFloat64;
  switch (float_dtype()) {
    case DType::kFloat32:
      return WeightType::kFloat32;
    case DType::kBFloat16:
      return WeightType::kBFloat16;
    case DType::kFloat16:
      return WeightType::kFloat16;
    case DType::kFloat8E4M3:
      break;  // float_dtype() gives none
  }
  return WeightType::kFloat32;
}

std::vector<float> Tensor::read_floats(uint32_t top_k) const {
  std::vector<float> values(static_cast<size_t>(num_rows()) * top_k);
  const auto read = [&](auto element) {
    using T = decltype(element);
    for (int64_t row = 0; row < num_rows(); ++row) {
      for (uint32_t k = 0; k < top_k; ++k) {
        const T value = reinterpret_cast<const T*>(data())[row * stride(0) + k * stride(1)];
        if constexpr (std::is_same_v<T, double>) {
          values[static_cast<size_t>(row) * top_k + k] = static_cast<float>(value);
        } else {
          values[static_cast<size_t>(row) * top_k + k] = to_float(value);
        }
      }
    }
  };
  if (is(Kind::kFloat, 64)) {
    read(double{});
  } else {
    with_dtype(float_dtype(), read);
  }
  return values;
}

py::capsule Array::to_dlpack() const {
  struct Context {
    DLManagedTensor managed;
    std::shared_ptr<const void> owner;
    std::vector<int64_t> shape, strides;
  };
  auto* context = new Context{{}, owner, shape, strides};
  context->managed.tensor = {data,
                             device,
                             static_cast<int32_t>(shape.size()),
                             {static_cast<uint8_t>(kind), bits, 1},
                             context->shape.data(),
                             strides.empty() ? nullptr : context->strides.data(),
                             0};
  context->managed.context = context;
  context->managed.deleter = [](DLManagedTensor* managed) { delete static_cast<Context*>(managed->context); };
  return py::capsule(&context->managed, kPlain, [](PyObject* capsule) {
    // Whoever takes the tensor renames the capsule, and then frees the tensor itself.
    if (!PyCapsule_IsValid(capsule, kPlain)) return;
    auto* managed = static_cast<DLManagedTensor*>(PyCapsule_GetPointer(capsule, kPlain));
    managed->deleter(managed);
  });
}

DType parse_dtype(const std::string& name, const char* argument, bool may_be_float8) {
  if (may_be_float8 && name == "float8_e4m3fn") return DType::kFloat8E4M3;
  if (name == "float32") return DType::kFloat32;
  if (name == "bfloat16") return DType::kBFloat16;
  if (name == "float16") return DType::kFloat16;
  throw py::value_error(std::string(argument) + ": expected 'float32', 'bfloat16'" +
                        (may_be_float8 ? ", 'float16' or 'float8_e4m3fn'" : " or 'float16'") + ", got '" + name + "'");
}

}  // namespace m2n::bindings
