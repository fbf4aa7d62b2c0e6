// Small kernels that try the executor itself: right ones, and ones broken in the ways that it must catch.
#pragma once

#include <cstdint>

// out[i] = sum of the block's x, by shuffles and shared memory; atomics count the threads in out[n].
int sum_block(int64_t out, int64_t x, int64_t n, int64_t stream);
// out[i] = x[i] after a trip through bf16 (kind 1) or fp16 (kind 2).
int through_half(int64_t out, int64_t x, int64_t n, int64_t kind, int64_t stream);
// out[i] = x[n - 1 - i] through shared memory; `fault` says what is wrong, 0 for nothing.
int reverse(int64_t out, int64_t x, int64_t n, int64_t fault, int64_t stream);
// Warp collectives in wrong company; `fault` says how.
int meet_badly(int64_t out, int64_t fault, int64_t stream);
// A launch that CUDA refuses: 0 too many threads, 1 an empty grid, 2 dynamic shared memory without consent.
int refused(int64_t kind, int64_t stream);

#define FLOWMO_LAUNCHERS(X) X(sum_block) X(through_half) X(reverse) X(meet_badly) X(refused)
