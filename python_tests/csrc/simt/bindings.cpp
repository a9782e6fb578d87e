// The ops on CUDA, bindings and kernels, as ops of their own for CPU tensors: the shim is their GPU.
#include "ops/cuda/kernels.h"
#include "ops/interface.h"

STABLE_TORCH_LIBRARY_FRAGMENT(fastagg_simt, m) { fastagg::ops::define_ops(m); }

STABLE_TORCH_LIBRARY_IMPL(fastagg_simt, CPU, m) {
  fastagg::ops::implement_ops<fastagg::ops::CudaKernels>(m);
}
