// What of torch the ops on CUDA use besides tensors. Where the tests' SIMT shim stands for a GPU, its
// device is the CPU; nothing else in this folder knows of it.
#pragma once

#include <torch/csrc/stable/accelerator.h>

#include "../../cuda/launch.h"
#include "../checks.h"

#ifdef FASTAGG_SIMT
#include <torch/csrc/inductor/aoti_torch/generated/c_shim_cpu.h>
#define FASTAGG_TORCH(function) aoti_torch_cpu_##function
#else
#include <torch/csrc/inductor/aoti_torch/generated/c_shim_cuda.h>
#define FASTAGG_TORCH(function) aoti_torch_cuda_##function
#endif

namespace fastagg::ops {

#ifdef FASTAGG_SIMT

constexpr DeviceType kCudaDevice = DeviceType::CPU;

struct Current {
  explicit Current(const Device&) {}
  cuda::Stream stream() const { return nullptr; }
};

#else

constexpr DeviceType kCudaDevice = DeviceType::CUDA;

// Makes a device current for the time of a call; its stream is the one that is current there.
class Current {
 public:
  explicit Current(const Device& home) : guard_(home.index()) {
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(home.index(), &stream_));
  }
  cuda::Stream stream() const { return stream_; }

 private:
  torch::stable::accelerator::DeviceGuard guard_;
  void* stream_ = nullptr;
};

#endif

}  // namespace fastagg::ops
