// The exact route in chunks, for whoever decides what memory it may take.
#pragma once

#include <cstdint>

#include "../ragged/slab.h"
#include "launch.h"

namespace fastagg::cuda {

// gram_svd of kernels.h, `chunk` modules at a time, whose temporaries take the same memory: no bit of
// a result depends on it.
template <class T>
void gram_svd_by_chunks(const Slab& a, const Slab& bt, const double* coefficients,
                        const SvdOut<T>& out, int64_t chunk, Workspace& workspace, Stream stream);

}  // namespace fastagg::cuda
