// The schemas, and the ops on the CPU.
#include "cpu_kernels.h"
#include "interface.h"

STABLE_TORCH_LIBRARY_FRAGMENT(fastagg, m) { fastagg::ops::define_ops(m); }

STABLE_TORCH_LIBRARY_IMPL(fastagg, CPU, m) {
  fastagg::ops::implement_ops<fastagg::ops::CpuKernels>(m);
}
