// What a kernel file asks of its compiler: nvcc, or g++ with the tests' SIMT shim, which runs the same
// file on a CPU. Hence the rules of this folder: kernels take one-dimensional grids of whole warps, all
// shared memory is dynamic and comes from shared_memory(), no thread returns before the last barrier,
// warp functions take all 32 lanes, and only integers are added by atomics (their sum has no order).
#pragma once

#include "../ragged/config.h"
#include "launch.h"

#ifdef FASTAGG_SIMT
#include "simt.h"
#else
#include <cuda_runtime.h>

#include <mutex>
#include <set>
#include <stdexcept>
#include <string>
#include <utility>
#endif

namespace fastagg::cuda {

constexpr int kWarp = 32;
constexpr unsigned kAllLanes = 0xffffffffu;

// What of the current device decides how work is cut up.
struct Limits {
  int multiprocessors;
  int64_t shared_bytes;  // that one block may ask for
  int architecture;      // 90 for compute capability 9.0
};

#ifdef FASTAGG_SIMT

template <class T>
T* shared_memory() {
  return reinterpret_cast<T*>(simt::shared());
}

template <class... Parameters, class... Arguments>
void launch(void (*kernel)(Parameters...), int64_t blocks, int threads, int64_t shared_bytes,
            Stream, Arguments... arguments) {
  simt::run(blocks, threads, shared_bytes, [&] { kernel(arguments...); });
}

inline void zero(void* data, int64_t bytes, Stream) {
  if (bytes > 0) memset(data, 0, static_cast<size_t>(bytes));
}

inline Limits limits() { return {simt::multiprocessors(), simt::shared_limit(), 90}; }

#else

#ifdef __CUDACC__
extern __shared__ __align__(128) unsigned char fastagg_shared_memory[];

template <class T>
__device__ __forceinline__ T* shared_memory() {
  return reinterpret_cast<T*>(fastagg_shared_memory);
}
#endif

inline void check(cudaError_t error, const char* what) {
  if (error == cudaSuccess) return;
  throw std::runtime_error(std::string("fastagg: ") + what + ": " + cudaGetErrorString(error));
}

inline Limits limits() {
  int device = 0, multiprocessors = 0, shared = 0, major = 0, minor = 0;
  check(cudaGetDevice(&device), "current device");
  check(cudaDeviceGetAttribute(&multiprocessors, cudaDevAttrMultiProcessorCount, device), "limits");
  check(cudaDeviceGetAttribute(&shared, cudaDevAttrMaxSharedMemoryPerBlockOptin, device), "limits");
  check(cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device), "limits");
  check(cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, device), "limits");
  return {multiprocessors, shared, 10 * major + minor};
}

// Lets a kernel have all the shared memory that there is. What it may have is the process's to know: were
// it set to what each launch asks for, a thread could lower it between another's setting and launch.
// Once a device, because setting it may wait for copies under way.
inline void allow_shared_memory(const void* kernel) {
  static std::mutex mutex;
  static std::set<std::pair<const void*, int> > allowed;  // on which device
  int device = 0;
  check(cudaGetDevice(&device), "current device");
  const std::lock_guard<std::mutex> lock(mutex);
  if (allowed.count({kernel, device})) return;
  check(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                             static_cast<int>(limits().shared_bytes)),
        "shared memory of a kernel");
  allowed.insert({kernel, device});
}

// Runs `kernel` on `blocks` blocks in stream order; no blocks, no launch.
template <class... Parameters, class... Arguments>
void launch(void (*kernel)(Parameters...), int64_t blocks, int threads, int64_t shared_bytes,
            Stream stream, Arguments... arguments) {
  if (blocks == 0) return;
  if (blocks > INT32_MAX) throw std::runtime_error("fastagg: a launch of more than 2^31 blocks");
  constexpr int64_t kAlwaysThere = 48 << 10;
  if (shared_bytes > kAlwaysThere) allow_shared_memory(reinterpret_cast<const void*>(kernel));
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(static_cast<unsigned>(blocks));
  config.blockDim = dim3(static_cast<unsigned>(threads));
  config.dynamicSmemBytes = static_cast<size_t>(shared_bytes);
  config.stream = static_cast<cudaStream_t>(stream);
  check(cudaLaunchKernelEx(&config, kernel, static_cast<Parameters>(arguments)...),
        "launch of a kernel");
}

inline void zero(void* data, int64_t bytes, Stream stream) {
  if (bytes == 0) return;
  check(cudaMemsetAsync(data, 0, static_cast<size_t>(bytes), static_cast<cudaStream_t>(stream)),
        "memset");
}

#endif

FASTAGG_HD int64_t tiles(int64_t size, int64_t tile) { return (size + tile - 1) / tile; }

}  // namespace fastagg::cuda
