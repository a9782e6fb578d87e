// Which tensors of a flat buffer hold a NaN or an infinity, and how large each is.
#include <algorithm>
#include <vector>

#include "convert.h"
#include "kernels.h"
#include "runtime.h"

namespace fastagg::cpu {

void scan(const void* flat, const Span* spans, int64_t count, int64_t* nonfinite,
          double* sum_of_squares) {
  constexpr int64_t kChunk = 1 << 18;  // elements of a task
  constexpr int64_t kBlock = 4096;     // elements converted at a time: they stay in the L1 cache
  struct Chunk {
    int64_t span, begin, end;
  };
  std::vector<Chunk> chunks;
  for (int64_t t = 0; t < count; ++t) {
    nonfinite[t] = 0;
    sum_of_squares[t] = 0;
    for (int64_t begin = 0; begin < spans[t].count; begin += kChunk)
      chunks.push_back({t, begin, std::min(begin + kChunk, spans[t].count)});
  }
  std::vector<Moments> partial(chunks.size());
  for_each_task(static_cast<int64_t>(chunks.size()), [&](int64_t task) {
    const Chunk& chunk = chunks[task];
    const Span& span = spans[chunk.span];
    float block[kBlock];
    for (int64_t i = chunk.begin; i < chunk.end; i += kBlock) {
      const int64_t length = std::min(kBlock, chunk.end - i);
      load(at(flat, span.offset + i * element_size(span.dtype)), span.dtype, length, 1.0f, block);
      const Moments found = moments(block, length);
      partial[task].nonfinite += found.nonfinite;
      partial[task].sum_of_squares += found.sum_of_squares;
    }
  });
  for (size_t task = 0; task < chunks.size(); ++task) {
    nonfinite[chunks[task].span] += partial[task].nonfinite;
    sum_of_squares[chunks[task].span] += partial[task].sum_of_squares;
  }
}

}  // namespace fastagg::cpu
