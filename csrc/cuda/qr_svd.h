// The exact route by Householder QR of both factors, for the modules whose Gram matrices cannot keep
// the promise: cpu::qr_svd.
#pragma once

#include <cstdint>

#include "../ragged/slab.h"
#include "launch.h"

namespace fastagg::cuda {

// Writes out, and kept[l], of every module l whose lossy[l] is not zero, for diag(alpha) A and B
// diag(beta), each (modules, rows). How many those are is known to the device alone: the launches are
// as many for none as for all, and return at once for none.
template <class T>
void qr_svd(const Slab& a, const Slab& bt, const double* alpha, const double* beta,
            const int32_t* lossy, const SvdOut<T>& out, int32_t* kept, Workspace& workspace,
            Stream stream);

}  // namespace fastagg::cuda
