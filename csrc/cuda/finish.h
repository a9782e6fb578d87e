// The last step of every SVD route, which makes a decomposition a function of its input: the signs, the
// zeros of the columns that carry no weight, and NaN throughout where the input was not finite.
#pragma once

#include <cstdint>

#include "../ragged/slab.h"
#include "launch.h"

namespace fastagg::cuda {

// cpu::fix_signs with the first kept[l] columns of module l, or cpu::fill_nonfinite where nonfinite[l]
// is not zero; both (modules). What u, s and vt hold beyond the kept columns is not read.
template <class T>
void finish(const SvdOut<T>& out, const int32_t* kept, const int32_t* nonfinite,
            Workspace& workspace, Stream stream);

}  // namespace fastagg::cuda
