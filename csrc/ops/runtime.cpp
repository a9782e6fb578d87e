// The CPU kernels' threads, matrix products and SVD, from torch.
#include "../cpu/runtime.h"

#include <torch/csrc/inductor/aoti_torch/generated/c_shim_cpu.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <array>
#include <atomic>
#include <exception>
#include <mutex>

namespace fastagg::cpu {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

template <class T>
Tensor tensor_of(const Matrix<T>& matrix) {
  const std::array<int64_t, 2> sizes{matrix.rows, matrix.cols};
  const std::array<int64_t, 2> strides{matrix.row_stride, matrix.col_stride};
  const torch::stable::Device cpu(torch::headeronly::DeviceType::CPU, -1);
  return torch::stable::from_blob(const_cast<void*>(static_cast<const void*>(matrix.data)), sizes,
                                  strides, cpu,
                                  sizeof(T) == 8 ? ScalarType::Double : ScalarType::Float);
}

// Products come from the C functions that torch's ahead-of-time compiler calls, of the same stable
// interface as the dispatcher: its addmm takes Scalars, which a StableIValue does not carry, and these
// take doubles.
template <class T>
void mm(const Matrix<T>& a, const Matrix<T>& b, const Matrix<T>& out) {
  if (out.rows == 0 || out.cols == 0) return;
  const Tensor left = tensor_of(a), right = tensor_of(b), product = tensor_of(out);
  TORCH_ERROR_CODE_CHECK(aoti_torch_cpu_mm_out(product.get(), left.get(), right.get()));
}

// BLAS adds into `out` itself (beta = 1). A product over nothing adds nothing.
template <class T>
void mm_add(const Matrix<T>& a, const Matrix<T>& b, const Matrix<T>& out) {
  if (out.rows == 0 || out.cols == 0 || a.cols == 0) return;
  const Tensor left = tensor_of(a), right = tensor_of(b), sum = tensor_of(out);
  TORCH_ERROR_CODE_CHECK(
      aoti_torch_cpu_addmm_out(sum.get(), sum.get(), left.get(), right.get(), 1.0, 1.0));
}

// A result (of one or two dimensions) of the dispatcher, at its own strides, into memory of ours.
void copy_out(const Tensor& result, const Matrix<double>& out) {
  const auto* data = static_cast<const double*>(result.const_data_ptr());
  const int64_t row_stride = result.stride(0);
  const int64_t col_stride = result.dim() == 2 ? result.stride(1) : 0;
  for (int64_t i = 0; i < out.rows; ++i)
    for (int64_t j = 0; j < out.cols; ++j)
      out.data[i * out.row_stride + j * out.col_stride] = data[i * row_stride + j * col_stride];
}

}  // namespace

void run_tasks(int64_t count, TaskFunction function, void* context) {
  if (count <= 0) return;
  std::atomic<int64_t> next{0};
  std::atomic<bool> failed{false};
  std::exception_ptr error;
  std::mutex guard;
  const auto work = [&](int64_t, int64_t) {
    // Nothing may be thrown through torch's thread pool: it would end the process.
    try {
      for (int64_t task; !failed && (task = next.fetch_add(1)) < count;) function(context, task);
    } catch (...) {
      const std::lock_guard<std::mutex> lock(guard);
      if (!error) error = std::current_exception();
      failed = true;
    }
  };
  // At least two slices, so that the region is parallel and BLAS inside it stays on one thread.
  const int64_t threads = torch::stable::get_num_threads();
  torch::stable::parallel_for(0, std::max<int64_t>(2, std::min(threads, count)), 1, work);
  if (error) std::rethrow_exception(error);
}

void multiply(const Matrix<float>& a, const Matrix<float>& b, const Matrix<float>& out) {
  mm(a, b, out);
}

void multiply(const Matrix<double>& a, const Matrix<double>& b, const Matrix<double>& out) {
  mm(a, b, out);
}

void multiply_add(const Matrix<float>& a, const Matrix<float>& b, const Matrix<float>& out) {
  mm_add(a, b, out);
}

void multiply_add(const Matrix<double>& a, const Matrix<double>& b, const Matrix<double>& out) {
  mm_add(a, b, out);
}

void square_svd(const double* a, int64_t n, double* u, double* s, double* vt) {
  if (n == 0) return;
  std::array<StableIValue, 3> stack{
      torch::stable::detail::from(tensor_of(row_major(const_cast<double*>(a), n, n))),
      torch::stable::detail::from(false),
      torch::stable::detail::from(std::optional<std::string>(std::nullopt))};
  TORCH_ERROR_CODE_CHECK(
      torch_call_dispatcher("aten::linalg_svd", "", stack.data(), TORCH_ABI_VERSION));
  const std::array<Matrix<double>, 3> outs{
      row_major(u, n, n), {s, n, 1, 1, 0}, row_major(vt, n, n)};
  for (size_t i = 0; i < 3; ++i) copy_out(torch::stable::detail::to<Tensor>(stack[i]), outs[i]);
}

}  // namespace fastagg::cpu
