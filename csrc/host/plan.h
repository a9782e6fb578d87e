// The plan of a round: which client's factors land in which rows of which bucket's slabs.
// Torch-free; numpy int64 / float64 arrays in and out. Bound as `fastagg._host.build_plan`.
#pragma once

#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>

#include <cstdint>

namespace fastagg::host {

using Int64Array =
    pybind11::array_t<std::int64_t, pybind11::array::c_style | pybind11::array::forcecast>;

// tables    list of K arrays (J_k, 6), client k's slots: a_offset, a_dtype, b_offset, b_dtype, rank, 0
// modules   list of K arrays (J_k,): the module of each slot, below M, or -1 to leave the slot out
// scales    list of K arrays (J_k,) float64: what multiplies the slot's update
// bucket    (M,) the bucket of each module
// place     (M,) its index within the bucket, 0 .. L - 1
// lengths   (N,) how many modules each of the N buckets has
//
// Returns N tuples (slots, scale, first, ranks):
//   slots   (S, 9) int64: module (its place), row, rank, a_flat, a_offset, a_dtype, b_flat,
//           b_offset, b_dtype, ordered by module and then by client; a client's rows follow those
//           of the clients before it; flat is the client's number k
//   scale   (S,) float64
//   first   (L + 1,) int64: slots first[j] .. first[j + 1] - 1 belong to module j
//   ranks   (L,) int64: R_j, the sum of the ranks of module j's slots
//
// O(slots) time. Throws std::invalid_argument (ValueError) for arrays of unlike lengths or numbers
// out of range.
pybind11::list build_plan(const pybind11::list& tables, const pybind11::list& modules,
                          const pybind11::list& scales, const Int64Array& bucket,
                          const Int64Array& place, const Int64Array& lengths);

}  // namespace fastagg::host
