// Argument checks of the ops, the same on every device. Every message names the op, the argument, what
// was expected and what came. Kernels receive checked input and never check again.
#pragma once

#include <torch/csrc/stable/device.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <algorithm>
#include <initializer_list>
#include <sstream>
#include <stdexcept>
#include <string>

#include "../ragged/dtype.h"

namespace fastagg::ops {

using torch::headeronly::DeviceType;
using torch::headeronly::ScalarType;
using torch::stable::Device;
using torch::stable::Tensor;

template <class... Parts>
[[noreturn]] void fail(const char* op, const char* argument, const Parts&... parts) {
  std::ostringstream message;
  message << "fastagg::" << op << ": argument '" << argument << "': ";
  (message << ... << parts);
  throw std::runtime_error(message.str());
}

template <class... Parts>
void check(bool condition, const char* op, const char* argument, const Parts&... parts) {
  if (!condition) fail(op, argument, parts...);
}

inline std::string shape_of(const Tensor& tensor) {
  std::ostringstream text;
  text << '(';
  for (int64_t d = 0; d < tensor.dim(); ++d) text << (d ? ", " : "") << tensor.size(d);
  text << ')';
  return text.str();
}

inline const char* name_of(ScalarType dtype) { return torch::headeronly::toString(dtype); }

inline bool is_factor_dtype(ScalarType dtype) {
  return dtype == ScalarType::Float || dtype == ScalarType::BFloat16 || dtype == ScalarType::Half;
}

inline DType dtype_of(const Tensor& tensor) {
  switch (tensor.scalar_type()) {
    case ScalarType::Float:
      return DType::Float32;
    case ScalarType::BFloat16:
      return DType::BFloat16;
    case ScalarType::Half:
      return DType::Float16;
    default:
      return DType::Float64;
  }
}

inline Tensor as_contiguous(const Tensor& tensor) {
  return tensor.is_contiguous() ? tensor : torch::stable::contiguous(tensor);
}

inline std::string name_of(const Device& device) {
  if (device.is_cpu()) return "cpu";
  if (!device.is_cuda()) return "another device";
  return device.has_index() ? "cuda:" + std::to_string(device.index()) : "cuda";
}

inline bool is_on(const Tensor& tensor, const Device& device) {
  const Device its = tensor.device();
  return its.type() == device.type() && (its.is_cpu() || its.index() == device.index());
}

inline void check_device(const char* op, const char* argument, const Tensor& tensor,
                         const Device& home) {
  check(is_on(tensor, home), op, argument, "expected a tensor on ", name_of(home),
        " like the other arguments, got one on ", name_of(tensor.device()),
        "; move all arguments to one device");
}

// Where an op runs: on the device of its first argument, which the dispatcher may have passed over
// for a later one.
inline Device home_of(const char* op, const char* argument, const Tensor& tensor, DeviceType type) {
  const Device home = tensor.device();
  if (home.type() != type) check_device(op, argument, tensor, Device(type));
  return home;
}

inline void check_shape(const char* op, const char* argument, const Tensor& tensor,
                        std::initializer_list<int64_t> shape) {
  bool same = tensor.dim() == static_cast<int64_t>(shape.size());
  int64_t d = 0;
  for (const int64_t size : shape) same = same && tensor.size(d++) == size;
  if (same) return;
  std::ostringstream expected;
  d = 0;
  for (const int64_t size : shape) expected << (d++ ? ", " : "") << size;
  fail(op, argument, "expected shape (", expected.str(), "), got ", shape_of(tensor));
}

// Refuses a result whose bytes an int64 cannot count, before anything is computed from its sizes.
inline void check_countable(const char* op, const char* argument,
                            std::initializer_list<int64_t> shape) {
  int64_t bytes = 8;
  for (const int64_t size : shape)
    check(!__builtin_mul_overflow(bytes, std::max<int64_t>(size, 1), &bytes), op, argument,
          "expected a result of fewer than 2^63 bytes, got a size of ", size);
}

}  // namespace fastagg::ops
