#include <torch/csrc/stable/library.h>

#include "../cpu/kernels.h"
#include "checks.h"

namespace fastagg::ops {

std::tuple<Tensor, Tensor> scan(const Tensor& flat, const Tensor& spans) {
  check_cpu("scan", "flat", flat);
  const Tensor buffer = as_contiguous(flat);
  const auto rows = table<Span>("scan", "spans", spans);
  for (int64_t i = 0; i < rows.count; ++i)
    check_range("scan", "spans", i, "span", rows[i].offset, rows[i].count, 1, rows[i].dtype,
                bytes_of(buffer));
  Tensor nonfinite = empty_cpu({rows.count}, ScalarType::Long);
  Tensor sums = empty_cpu({rows.count}, ScalarType::Double);
  cpu::scan(buffer.const_data_ptr(), rows.rows, rows.count,
            static_cast<int64_t*>(nonfinite.mutable_data_ptr()),
            static_cast<double*>(sums.mutable_data_ptr()));
  return {nonfinite, sums};
}

}  // namespace fastagg::ops

STABLE_TORCH_LIBRARY_FRAGMENT(fastagg, m) {
  m.def("scan(Tensor flat, Tensor spans) -> (Tensor nonfinite, Tensor sum_of_squares)");
}

STABLE_TORCH_LIBRARY_IMPL(fastagg, CPU, m) { m.impl("scan", TORCH_BOX(&fastagg::ops::scan)); }
