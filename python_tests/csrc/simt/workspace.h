// Memory for one call, which starts as NaN; each piece is a block of its own, for the sanitizers.
#pragma once

#include <cstdlib>
#include <cstring>
#include <memory>
#include <new>
#include <vector>

#include "cuda/launch.h"

class HeapWorkspace final : public fastagg::cuda::Workspace {
 public:
  void* bytes(int64_t count) override {
    const size_t size = (static_cast<size_t>(count) + 255) / 256 * 256;
    void* data = std::aligned_alloc(256, size ? size : 256);
    if (!data) throw std::bad_alloc();
    std::memset(data, 0xff, size ? size : 256);
    blocks_.emplace_back(data, &std::free);
    return data;
  }

 private:
  std::vector<std::unique_ptr<void, void (*)(void*)>> blocks_;
};
