#include "cuda/kernels.h"
#include "ragged/slots.h"
#include "workspace.h"

using namespace fastagg;

extern "C" {

void simt_stack(const void* const* flats, const int64_t* sizes, int64_t flat_count,
                const StackSlot* slots, int64_t count, const double* scale, void* a, void* bt,
                int64_t dtype, int64_t modules, int64_t rows, int64_t m, int64_t n,
                int64_t* nonfinite, double* sum_of_squares) {
  HeapWorkspace workspace;
  cuda::stack(flats, sizes, flat_count, slots, count, scale,
              {a, bt, static_cast<DType>(dtype), modules, rows, m, n, nonfinite, sum_of_squares},
              workspace, nullptr);
}

void simt_scan(const void* flat, int64_t bytes, const Span* spans, int64_t count,
               int64_t* nonfinite, double* sum_of_squares) {
  cuda::scan(flat, bytes, spans, count, nonfinite, sum_of_squares, nullptr);
}

void simt_redistribute(const float* u, const float* s, const float* vt, int64_t modules, int64_t m,
                       int64_t n, int64_t r, const HandOutSlot* slots, const double* scalings,
                       int64_t count, void* const* flats, const int64_t* sizes,
                       int64_t flat_count) {
  cuda::redistribute(u, s, vt, modules, m, n, r, slots, scalings, count, flats, sizes, flat_count,
                     nullptr);
}

bool simt_lies_within(int64_t offset, int64_t rows, int64_t cols, int64_t dtype, int64_t bytes) {
  return lies_within(offset, rows, cols, static_cast<DType>(dtype), bytes);
}

}  // extern "C"
