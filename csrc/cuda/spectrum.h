// From the SVD of a core to what the exact routes return of it, and to the vectors that they use.
#pragma once

#include <cstdint>

#include "../ragged/slab.h"
#include "launch.h"

namespace fastagg::cuda {

// Of every module whose skip[l] is zero: the twin of cpu::write_spectrum for s (modules, rows), where the
// product of the factors' (modules, rows, rows) Frobenius norms bounds that of dW's terms.
template <class T>
void write_spectrum(const double* s, const double* factor_a, const double* factor_b, int64_t rows,
                    const int32_t* skip, const SvdOut<T>& out, int32_t* kept, Stream stream);

// w (modules, rows, columns) = the first kept[l] columns of u (modules, rows, rows), then zeros, of
// every module whose skip[l] is zero. What core_svd's vectors of small singular values lack in
// orthogonality, rounding times s[0] / s[j], is made up for.
void leading_vectors(const double* u, const double* s, const int32_t* kept, int64_t modules,
                     int64_t rows, int64_t columns, const int32_t* skip, double* w, Stream stream);

}  // namespace fastagg::cuda
