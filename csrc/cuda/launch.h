// What the callers of the CUDA kernels know of CUDA: a stream, and memory in stream order.
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

namespace fastagg::cuda {

using Stream = void*;  // a cudaStream_t

int architecture();  // of the current device: 90 for compute capability 9.0

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

// Hands out the same memory again after each rewind(), to a loop whose turns take the same pieces in
// the same order: on one stream a turn's work is done before the next one's begins.
class Recycled final : public Workspace {
 public:
  explicit Recycled(Workspace& workspace) : workspace_(workspace) {}

  void rewind() { next_ = 0; }

  void* bytes(int64_t count) override {
    if (next_ == pieces_.size()) pieces_.push_back({nullptr, -1});
    Piece& piece = pieces_[next_++];
    if (piece.size < count) piece = {workspace_.bytes(count), count};
    return piece.data;
  }

 private:
  struct Piece {
    void* data;
    int64_t size;
  };
  Workspace& workspace_;
  std::vector<Piece> pieces_;
  size_t next_ = 0;
};

}  // namespace fastagg::cuda
