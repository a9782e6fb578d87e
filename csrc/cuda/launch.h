// What the callers of the CUDA kernels know of CUDA: a stream, and memory in stream order.
#pragma once

#include <cstdint>

namespace fastagg::cuda {

using Stream = void*;  // a cudaStream_t

// Device memory for the time of one call. What is taken stays the caller's until the work launched on
// its stream is done; nothing is given back earlier, so a launcher may take and forget.
class Workspace {
 public:
  virtual ~Workspace() = default;
  virtual void* bytes(int64_t count) = 0;  // aligned to 256 bytes, uninitialised

  template <class T>
  T* take(int64_t count) {
    return static_cast<T*>(bytes(count * static_cast<int64_t>(sizeof(T))));
  }
};

}  // namespace fastagg::cuda
