// One wheel serves every x86-64 CPU: the compiler makes a version of each marked loop per
// instruction set, and the loader picks. On other architectures the baseline has vectors already.
#pragma once

#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__) &&    \
    !defined(__SANITIZE_ADDRESS__) && !defined(__SANITIZE_UNDEFINED__) && \
    !defined(__SANITIZE_THREAD__)
#define FASTAGG_VECTORIZE __attribute__((target_clones("avx512f", "avx2", "default")))
#else
#define FASTAGG_VECTORIZE
#endif
