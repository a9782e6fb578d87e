// Philox4x32-10 (Salmon, Moraes, Dror and Shaw, SC 2011): the random test matrix as a pure function
// of (seed, stream, element index), hence the same on every device, thread count and shard.
#pragma once

#include "config.h"

namespace fastagg {

struct Philox4 {
  uint32_t word[4];
};

FASTAGG_HD Philox4 philox(uint64_t key, uint64_t counter_low, uint64_t counter_high) {
  uint32_t c0 = static_cast<uint32_t>(counter_low);
  uint32_t c1 = static_cast<uint32_t>(counter_low >> 32);
  uint32_t c2 = static_cast<uint32_t>(counter_high);
  uint32_t c3 = static_cast<uint32_t>(counter_high >> 32);
  uint32_t k0 = static_cast<uint32_t>(key);
  uint32_t k1 = static_cast<uint32_t>(key >> 32);
  for (int round = 0; round < 10; ++round) {
    const uint64_t p0 = static_cast<uint64_t>(0xD2511F53u) * c0;
    const uint64_t p1 = static_cast<uint64_t>(0xCD9E8D57u) * c2;
    c0 = static_cast<uint32_t>(p1 >> 32) ^ c1 ^ k0;
    c2 = static_cast<uint32_t>(p0 >> 32) ^ c3 ^ k1;
    c1 = static_cast<uint32_t>(p1);
    c3 = static_cast<uint32_t>(p0);
    k0 += 0x9E3779B9u;
    k1 += 0xBB67AE85u;
  }
  return {{c0, c1, c2, c3}};
}

// One call yields 128 signs; element e is bit e % 128 of block e / 128.
constexpr int64_t kSignsPerBlock = 128;

FASTAGG_HD Philox4 rademacher_block(uint64_t seed, uint64_t stream, uint64_t block) {
  return philox(seed, block, stream);
}

FASTAGG_HD float rademacher_sign(const Philox4& block, int64_t bit) {
  return (block.word[bit >> 5] >> (bit & 31)) & 1u ? 1.0f : -1.0f;
}

}  // namespace fastagg
