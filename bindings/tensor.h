// SPDX-License-Identifier: Apache-2.0
// Tensors cross the border as DLPack: pointer, shape, strides, dtype. No framework's headers are needed.
#pragma once

#include <pybind11/pybind11.h>

#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "exchange/device/verbs/route.h"
#include "exchange/rows/dtype.h"

namespace m2n::bindings {

namespace py = pybind11;

// The DLPack ABI (https://dmlc.github.io/dlpack): these structs are its specification.
struct DLDevice {
  int32_t device_type;
  int32_t device_id;
};
struct DLDataType {
  uint8_t code;
  uint8_t bits;
  uint16_t lanes;
};
struct DLTensor {
  void* data;
  DLDevice device;
  int32_t ndim;
  DLDataType dtype;
  int64_t* shape;
  int64_t* strides;
  uint64_t byte_offset;
};
struct DLManagedTensor {
  DLTensor tensor;
  void* context;
  void (*deleter)(DLManagedTensor*);
};
struct DLManagedTensorVersioned {
  uint32_t major;
  uint32_t minor;
  void* context;
  void (*deleter)(DLManagedTensorVersioned*);
  uint64_t flags;  // see kReadOnly, kIsCopied
  DLTensor tensor;
};
constexpr uint64_t kReadOnly = 1;
constexpr uint64_t kIsCopied = 2;  // what is written there, the tensor's owner does not see

// What a type of tensors may offer beside __dlpack__: C functions, as `__dlpack_c_exchange_api__` (DLPack 1.3), which
// take a fraction of the time. We use the one that fills in a DLTensor; it holds as long as the object lives.
struct ExchangeApi {
  uint32_t major;
  uint32_t minor;
  void* older;
  void* unused[3];
  int (*read_tensor)(void* object, DLTensor* tensor);  // may be nullptr
};

enum class Kind : uint8_t { kInt = 0, kUInt = 1, kFloat = 2, kBFloat = 4, kFloat8E4M3 = 10 };

// Somebody's tensor, held while this lives. Make and destroy it with the GIL.
class Tensor {
 public:
  // Throws TypeError or ValueError that names `argument` when `object` is no tensor on that device. On a GPU it is
  // taken as it is: the caller's stream is what orders it. `is_written`: refuses what is read-only, or would be a copy.
  Tensor(const py::object& object, const char* argument, DLDevice device, bool is_written = false);
  ~Tensor();
  Tensor(const Tensor&) = delete;
  Tensor& operator=(const Tensor&) = delete;

  // Checks that it is [rows][hidden] with adjacent elements of `dtype`; uint16 stands for the bits of
  // bfloat16, which numpy does not have.
  void require_rows(DType dtype, uint32_t hidden) const;
  DType float_dtype() const;
  int64_t num_rows() const { return tensor_->shape[0]; }
  uint64_t row_stride_bytes() const;
  unsigned char* data() const { return static_cast<unsigned char*>(tensor_->data) + tensor_->byte_offset; }

  // [T][K] of any integer (int32, int64) or float type, as a packed copy.
  std::vector<int32_t> read_ids(uint32_t top_k) const;
  std::vector<float> read_floats(uint32_t top_k) const;
  IdType id_type() const;
  WeightType weight_type() const;

  void require_matrix(uint32_t columns) const;
  void require_scalar() const;  // one element
  int64_t stride(int dim) const;

 private:
  bool is(Kind kind, uint8_t bits) const;
  std::string describe() const;

  // True when the object's type has the C functions, and they know it.
  bool read_by_api(const py::object& object);
  void read_by_capsule(const py::object& object, DLDevice device, bool is_written);

  const char* argument_;
  py::object owner_;  // the capsule, or the tensor itself
  DLTensor by_api_{};
  const DLTensor* tensor_ = nullptr;
};

// Memory of ours that others may look at without a copy: `owner` lives as long as any view.
struct Array {
  std::shared_ptr<const void> owner;
  void* data;
  std::vector<int64_t> shape;
  Kind kind;
  uint8_t bits;
  DLDevice device;
  std::vector<int64_t> strides{};  // in elements; none: packed

  py::capsule to_dlpack() const;
};

// float8 only where it `may_be_float8`.
DType parse_dtype(const std::string& name, const char* argument, bool may_be_float8);

}  // namespace m2n::bindings
