// The CPU kernels' threads, matrix products and SVD, from torch.
#include "../cpu/runtime.h"

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

template <class T>
void mm(const Matrix<T>& a, const Matrix<T>& b, const Matrix<T>& out) {
  if (out.rows == 0 || out.cols == 0) return;
  std::array<StableIValue, 3> stack{torch::stable::detail::from(tensor_of(a)),
                                    torch::stable::detail::from(tensor_of(b)),
                                    torch::stable::detail::from(tensor_of(out))};
  TORCH_ERROR_CODE_CHECK(torch_call_dispatcher("aten::mm", "out", stack.data(), TORCH_ABI_VERSION));
  // The op returns its out argument: a handle that must be released.
  torch::stable::detail::to<Tensor>(stack[0]);
}

// BLAS cannot add into a view here (addmm takes Scalars, which the stable ABI does not carry), and
// a product's panel is so much larger than its result that adding it afterwards costs nothing.
template <class T>
void mm_add(const Matrix<T>& a, const Matrix<T>& b, const Matrix<T>& out) {
  Workspace<T> product(out.rows * out.cols);
  mm(a, b, row_major(product.get(), out.rows, out.cols));
  for (int64_t i = 0; i < out.rows; ++i) {
    T* row = out.data + i * out.row_stride;
    const T* added = product.get() + i * out.cols;
    for (int64_t j = 0; j < out.cols; ++j) row[j] += added[j];
  }
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

void svd(const double* a, int64_t p, int64_t q, double* u, double* s, double* vt) {
  const int64_t k = std::min(p, q);
  if (k == 0) return;
  const Tensor input = tensor_of(row_major(const_cast<double*>(a), p, q));
  std::array<StableIValue, 3> stack{
      torch::stable::detail::from(input), torch::stable::detail::from(false),
      torch::stable::detail::from(std::optional<std::string>(std::nullopt))};
  TORCH_ERROR_CODE_CHECK(
      torch_call_dispatcher("aten::linalg_svd", "", stack.data(), TORCH_ABI_VERSION));
  const std::array<double*, 3> outs{u, s, vt};
  const std::array<int64_t, 3> rows{p, 1, k};
  const std::array<int64_t, 3> cols{k, k, q};
  for (size_t i = 0; i < 3; ++i) {
    const Tensor result = torch::stable::detail::to<Tensor>(stack[i]);
    const auto* data = static_cast<const double*>(result.const_data_ptr());
    const int64_t row_stride = i == 1 ? 0 : result.stride(0);
    const int64_t col_stride = i == 1 ? result.stride(0) : result.stride(1);
    for (int64_t r = 0; r < rows[i]; ++r)
      for (int64_t c = 0; c < cols[i]; ++c)
        outs[i][r * cols[i] + c] = data[r * row_stride + c * col_stride];
  }
}

}  // namespace fastagg::cpu
