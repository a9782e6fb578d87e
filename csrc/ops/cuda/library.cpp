// The ops on CUDA. Their schemas are in fastagg/_C.
#include "../interface.h"
#include "kernels.h"

STABLE_TORCH_LIBRARY_IMPL(fastagg, CUDA, m) {
  fastagg::ops::implement_ops<fastagg::ops::CudaKernels>(m);
}
