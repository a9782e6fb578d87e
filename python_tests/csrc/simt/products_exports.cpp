// csrc/cuda/products.h for Python: layouts as lists of int64.
#include "cuda/products.h"

using fastagg::DType;
using namespace fastagg::cuda;

namespace {

Operand operand(const void* data, int64_t dtype, const int64_t* strides) {
  return {data, static_cast<DType>(dtype), strides[0], strides[1], strides[2]};
}

}  // namespace

extern "C" {

void multiply_f64(const void* x, int64_t x_dtype, const int64_t* x_strides, const void* y,
                  int64_t y_dtype, const int64_t* y_strides, void* out, int64_t out_dtype,
                  const int64_t* out_strides, const int64_t* shape, const int32_t* skip) {
  const Result result{out, static_cast<DType>(out_dtype), out_strides[0], out_strides[1],
                      out_strides[2]};
  multiply(operand(x, x_dtype, x_strides), operand(y, y_dtype, y_strides), result,
           {shape[0], shape[1], shape[2], shape[3]}, skip, nullptr);
}

void inner_products_f64(const void* x, int64_t dtype, const int64_t* strides, double* out,
                        int64_t modules, int64_t size, int64_t k) {
  inner_products(operand(x, dtype, strides), out, modules, size, k, nullptr);
}
}
