// The clients' buffers on their way from a list on the host to a kernel: by value, as its parameter.
// A copy from pageable host memory would wait for the device, and could not stand in a CUDA graph.
#pragma once

#include <algorithm>

#include "../ragged/slots.h"
#include "device.h"

namespace fastagg::cuda {

// The parameters of a kernel end at 4096 bytes on every architecture; a few are left for the others.
constexpr int kWindow = 240;

// Buffers [first, first + count) of the list.
template <class Byte>
struct Window {
  int64_t first, count;
  Byte* data[kWindow];
  int64_t bytes[kWindow];
};

template <class Pointer, class Byte, class Function>
void for_each_window(Pointer const* flats, const int64_t* sizes, int64_t flat_count,
                     Window<Byte> window, const Function& function) {
  for (int64_t first = 0; first < flat_count; first += kWindow) {
    window.first = first;
    window.count = std::min<int64_t>(kWindow, flat_count - first);
    for (int64_t i = 0; i < window.count; ++i) {
      window.data[i] = static_cast<Byte*>(flats[first + i]);
      window.bytes[i] = sizes[first + i];
    }
    function(window);
  }
}

}  // namespace fastagg::cuda
