#pragma once

#include "flats.h"
#include "results.h"
#include "tables.h"

namespace fastagg::ops {

template <class Kernels>
std::tuple<Tensor, Tensor> scan(const Tensor& flat, const Tensor& spans) {
  const char* op = "scan";
  const Device home = home_of(op, "flat", flat, Kernels::kDevice);
  const Tensor buffer = as_contiguous(flat);
  const int64_t bytes = bytes_of(buffer);
  auto table = rows_of<Span>(op, "spans", spans, home);
  const int64_t count = spans.size(0);
  if (const Span* rows = table.on_host())
    for (int64_t i = 0; i < count; ++i)
      check_range(op, "spans", i, "span", rows[i].offset, rows[i].count, 1, rows[i].dtype, bytes);

  Kernels kernels(home);
  Tensor nonfinite = empty_on(home, {count}, ScalarType::Long);
  Tensor sums = empty_on(home, {count}, ScalarType::Double);
  kernels.scan(buffer.const_data_ptr(), bytes, table.on(home), count, data_of<int64_t>(nonfinite),
               data_of<double>(sums));
  return {nonfinite, sums};
}

}  // namespace fastagg::ops
