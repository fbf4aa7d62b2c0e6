// Runs CUDA kernels on the CPU: what common.cuh asks for, for a plain C++ compiler.
//
// Blocks run one after another. Every thread of a block is a fibre; fibres switch only where CUDA threads can wait for
// each other: barriers, warp collectives and atomics. The order of blocks and of threads follows a schedule (natural,
// reversed, shuffled by a seed), so a kernel that leans on an order it did not ask for gives different results.
// Shared memory is allocated per block with the exact size asked for and filled with a byte of the schedule, so
// AddressSanitizer sees every access beyond it and reads of what was never written differ between two fills.
#pragma once

#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>

#if __has_include(<cuda_bf16.h>) && !defined(FLOWMO_OWN_HALF_TYPES)
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#else
#include "half_types.h"
#endif

#undef __launch_bounds__
#undef __global__
#undef __device__
#undef __host__
#undef __forceinline__
#define __launch_bounds__(...)
#define __global__
#define __device__
#define __host__
#define __forceinline__ inline

namespace executor {

enum class Order : uint32_t { NATURAL = 0, REVERSED = 1, SHUFFLED = 2 };

struct Schedule {
    Order order = Order::NATURAL;
    uint64_t seed = 0;
    uint8_t fill = 0xff;  // of shared memory before the kernel writes to it
};
extern Schedule schedule;

struct Index {
    unsigned x, y, z;
};
struct Grid {
    unsigned x, y, z;
    Grid(unsigned x_, unsigned y_ = 1, unsigned z_ = 1) : x(x_), y(y_), z(z_) {}
    Grid(dim3 d) : x(d.x), y(d.y), z(d.z) {}
    Grid(int x_) : x(static_cast<unsigned>(x_)), y(1), z(1) {}
};

const Index& thread_index();
const Index& block_index();
const Index& block_size();
const Index& grid_size();

void wait_for_block();
// Meets the lanes of `mask`: each gives a value and gets the value of lane `source`; `ballot` collects the predicates.
enum class Meeting : int { SYNC, SHUFFLE, VOTE };
struct Met {
    uint64_t value;
    uint32_t ballot;
};
Met meet(Meeting kind, uint32_t mask, uint64_t value, int source, bool predicate);
void let_others_run();

void* shared_array(const void* key, size_t bytes);
void* dynamic_shared();
int allow_shared(const void* kernel, size_t bytes);
int launch(Grid grid, Grid block, size_t shared_bytes, const void* kernel, const std::function<void()>& body);

template <typename T>
T shuffle(uint32_t mask, T v, int source) {
    static_assert(sizeof(T) <= 8, "shuffles move at most 8 bytes");
    uint64_t bits = 0;
    std::memcpy(&bits, &v, sizeof(T));
    bits = meet(Meeting::SHUFFLE, mask, bits, source, false).value;
    std::memcpy(&v, &bits, sizeof(T));
    return v;
}
inline int lane() {
    const Index &t = thread_index(), &n = block_size();
    return static_cast<int>((t.x + n.x * (t.y + n.y * t.z)) % 32);
}

}  // namespace executor

#define threadIdx (::executor::thread_index())
#define blockIdx (::executor::block_index())
#define blockDim (::executor::block_size())
#define gridDim (::executor::grid_size())

#define LAUNCH(kernel, grid, block, shared_bytes, stream, ...)                                                        \
    (static_cast<void>(stream), ::executor::launch((grid), (block), (shared_bytes),                                   \
                                                   reinterpret_cast<const void*>(+kernel),                            \
                                                   [&] { kernel(__VA_ARGS__); }))
#define SHARED_ARRAY(type, name, count)                                                                               \
    static const char name##_key = 0;                                                                                 \
    type* const name = static_cast<type*>(::executor::shared_array(&name##_key, sizeof(type) * (count)))
#define DYNAMIC_SHARED(type, name) type* const name = static_cast<type*>(::executor::dynamic_shared())
#define ALLOW_SHARED(kernel, shared_bytes)                                                                            \
    ::executor::allow_shared(reinterpret_cast<const void*>(+kernel), (shared_bytes))

// ---- what CUDA offers inside kernels ------------------------------------------------------------------------------

inline void __syncthreads() { executor::wait_for_block(); }
inline void __syncwarp(uint32_t mask = 0xffffffffu) {
    executor::meet(executor::Meeting::SYNC, mask, 0, executor::lane(), false);
}
template <typename T>
T __shfl_sync(uint32_t mask, T v, int source, int width = 32) {
    const int lane = executor::lane();
    return executor::shuffle(mask, v, (lane & ~(width - 1)) + (source & (width - 1)));
}
template <typename T>
T __shfl_xor_sync(uint32_t mask, T v, int lane_mask, int width = 32) {
    const int lane = executor::lane(), source = lane ^ lane_mask;
    return executor::shuffle(mask, v, source < (lane & ~(width - 1)) + width ? source : lane);
}
template <typename T>
T __shfl_down_sync(uint32_t mask, T v, unsigned delta, int width = 32) {
    const int lane = executor::lane(), source = lane + static_cast<int>(delta);
    return executor::shuffle(mask, v, source < (lane & ~(width - 1)) + width ? source : lane);
}
template <typename T>
T __shfl_up_sync(uint32_t mask, T v, unsigned delta, int width = 32) {
    const int lane = executor::lane(), source = lane - static_cast<int>(delta);
    return executor::shuffle(mask, v, source >= (lane & ~(width - 1)) ? source : lane);
}
inline uint32_t __ballot_sync(uint32_t mask, bool predicate) {
    return executor::meet(executor::Meeting::VOTE, mask, 0, executor::lane(), predicate).ballot;
}
inline bool __any_sync(uint32_t mask, bool predicate) { return __ballot_sync(mask, predicate) != 0; }
inline bool __all_sync(uint32_t mask, bool predicate) { return __ballot_sync(mask, predicate) == mask; }
inline int __popc(uint32_t bits) { return __builtin_popcount(bits); }

template <typename T>
T atomicAdd(T* p, T v) {
    executor::let_others_run();
    const T before = *p;
    *p = static_cast<T>(before + v);
    return before;
}
template <typename T>
T atomicMax(T* p, T v) {
    executor::let_others_run();
    const T before = *p;
    if (v > before) *p = v;
    return before;
}

inline float rsqrtf(float v) { return 1.0f / std::sqrt(v); }
