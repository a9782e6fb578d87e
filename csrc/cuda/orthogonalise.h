// The core SVD's work: the left singular vectors of scales[l] C of every module l times their singular
// values, in any order, as the rows of vectors (modules, size, size). `scales` brings the largest entry
// of every matrix into [1/2, 1). A module whose `skip` is not zero is left as it is; null skips none.
#pragma once

#include <cstdint>

#include "launch.h"

namespace fastagg::cuda {

// One thread block a matrix; false, and nothing is done, where its shared memory cannot hold one.
bool orthogonalise_in_shared(const double* c, const double* scales, int64_t modules, int64_t size,
                             const int32_t* skip, double* vectors, Stream stream);

// Of any size.
void orthogonalise_large(const double* c, const double* scales, int64_t modules, int64_t size,
                         const int32_t* skip, double* vectors, Workspace& workspace, Stream stream);

}  // namespace fastagg::cuda
