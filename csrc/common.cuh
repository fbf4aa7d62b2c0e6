// What every kernel file shares: 16-byte accesses with scalar tails, conversions, reductions, the launch macro.
//
// The same sources compile with nvcc and, with FLOWMO_HOST_EXECUTOR defined, with a plain C++ compiler against the
// executor in tests/cuda/host, which runs every CUDA thread as a fibre. Four macros hide the difference: LAUNCH,
// SHARED_ARRAY, DYNAMIC_SHARED and ALLOW_SHARED.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>
#include <type_traits>

#ifdef FLOWMO_HOST_EXECUTOR
#include "executor.h"
#else
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

// Launches and returns CUDA's error code (0 = fine).
#define LAUNCH(kernel, grid, block, shared_bytes, stream, ...)                                                        \
    (kernel<<<(grid), (block), (shared_bytes), reinterpret_cast<cudaStream_t>(stream)>>>(__VA_ARGS__),                \
     static_cast<int>(cudaGetLastError()))
#define SHARED_ARRAY(type, name, count) __shared__ __align__(16) type name[count]
#define DYNAMIC_SHARED(type, name)                                                                                    \
    extern __shared__ __align__(16) unsigned char dynamic_shared_bytes[];                                             \
    type* const name = reinterpret_cast<type*>(dynamic_shared_bytes)
// More than 48 KB of dynamic shared memory needs a kernel's consent.
#define ALLOW_SHARED(kernel, shared_bytes)                                                                            \
    static_cast<int>(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,                        \
                                          static_cast<int>(shared_bytes)))
#endif

namespace flowmo {

using bf16 = __nv_bfloat16;
using fp16 = __half;

constexpr int WARP = 32;
constexpr unsigned ALL_LANES = 0xffffffffu;
constexpr int INVALID_VALUE = 1;  // cudaErrorInvalidValue: what a launcher answers to sizes it cannot serve

// Number types as they come from Python.
enum DType : int { FP32 = 0, BF16 = 1, FP16 = 2 };

__host__ __device__ constexpr int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
__host__ __device__ constexpr int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }
__host__ __device__ constexpr int64_t larger(int64_t a, int64_t b) { return a > b ? a : b; }

// Addresses travel as integers from Python to the kernel.
template <typename T>
__host__ __device__ T* address_of(int64_t address) {
    return reinterpret_cast<T*>(static_cast<uintptr_t>(address));
}

// ---- one number -------------------------------------------------------------------------------------------------

__device__ inline float to_float(float v) { return v; }
__device__ inline float to_float(bf16 v) { return __bfloat162float(v); }
__device__ inline float to_float(fp16 v) { return __half2float(v); }

template <typename T>
__device__ inline T from_float(float v);
template <>
__device__ inline float from_float<float>(float v) { return v; }
template <>
__device__ inline bf16 from_float<bf16>(float v) { return __float2bfloat16_rn(v); }
template <>
__device__ inline fp16 from_float<fp16>(float v) { return __float2half_rn(v); }

__device__ inline float load_number(const void* base, int dtype, int64_t i) {
    if (dtype == BF16) return to_float(static_cast<const bf16*>(base)[i]);
    if (dtype == FP16) return to_float(static_cast<const fp16*>(base)[i]);
    return static_cast<const float*>(base)[i];
}

// ---- 16 bytes at a time -----------------------------------------------------------------------------------------

template <typename T>
constexpr int VEC = 16 / static_cast<int>(sizeof(T));

__device__ inline float bits_to_float(uint32_t bits) {
    float v;
    memcpy(&v, &bits, 4);
    return v;
}
__device__ inline uint32_t float_to_bits(float v) {
    uint32_t bits;
    memcpy(&bits, &v, 4);
    return bits;
}
__device__ inline uint32_t half_bits(bf16 v) {
    uint16_t bits;
    memcpy(&bits, &v, 2);
    return bits;
}
__device__ inline uint32_t half_bits(fp16 v) {
    uint16_t bits;
    memcpy(&bits, &v, 2);
    return bits;
}

template <typename T>
__device__ inline void unpack_word(uint32_t word, float& low, float& high);
template <>
__device__ inline void unpack_word<bf16>(uint32_t word, float& low, float& high) {
    low = bits_to_float(word << 16);
    high = bits_to_float(word & 0xffff0000u);
}
template <>
__device__ inline void unpack_word<fp16>(uint32_t word, float& low, float& high) {
    __half2 pair;
    memcpy(&pair, &word, 4);
    low = __low2float(pair);
    high = __high2float(pair);
}

template <typename T>
__device__ inline uint32_t pack_word(float low, float high);
template <>
__device__ inline uint32_t pack_word<bf16>(float low, float high) {
    const __nv_bfloat162 pair = __floats2bfloat162_rn(low, high);
    uint32_t word;
    memcpy(&word, &pair, 4);
    return word;
}
template <>
__device__ inline uint32_t pack_word<fp16>(float low, float high) {
    const __half2 pair = __floats2half2_rn(low, high);
    uint32_t word;
    memcpy(&word, &pair, 4);
    return word;
}

// 16 raw bytes as VEC<T> floats, and back with one rounding.
template <typename T>
__device__ inline void unpack(const uint4& raw, float (&v)[VEC<T>]) {
    if constexpr (sizeof(T) == 4) {
        v[0] = bits_to_float(raw.x);
        v[1] = bits_to_float(raw.y);
        v[2] = bits_to_float(raw.z);
        v[3] = bits_to_float(raw.w);
    } else {
        unpack_word<T>(raw.x, v[0], v[1]);
        unpack_word<T>(raw.y, v[2], v[3]);
        unpack_word<T>(raw.z, v[4], v[5]);
        unpack_word<T>(raw.w, v[6], v[7]);
    }
}
template <typename T>
__device__ inline uint4 pack(const float (&v)[VEC<T>]) {
    if constexpr (sizeof(T) == 4) {
        return make_uint4(float_to_bits(v[0]), float_to_bits(v[1]), float_to_bits(v[2]), float_to_bits(v[3]));
    } else {
        return make_uint4(pack_word<T>(v[0], v[1]), pack_word<T>(v[2], v[3]), pack_word<T>(v[4], v[5]),
                          pack_word<T>(v[6], v[7]));
    }
}

// The first `count` of VEC<T> elements at p, zeros after them, one element at a time: for tails and unaligned rows.
template <typename T>
__device__ inline uint4 load_elements(const T* p, int count) {
    uint32_t word[4] = {0u, 0u, 0u, 0u};
#pragma unroll
    for (int i = 0; i < VEC<T>; ++i) {
        if (i < count) {
            if constexpr (sizeof(T) == 4) {
                word[i] = float_to_bits(p[i]);
            } else {
                word[i / 2] |= half_bits(p[i]) << (16 * (i % 2));
            }
        }
    }
    return make_uint4(word[0], word[1], word[2], word[3]);
}
template <typename T>
__device__ inline uint4 load_16_bytes(const T* p) {
    return *reinterpret_cast<const uint4*>(p);
}
template <typename T>
__device__ inline uint4 load_vector(const T* p, int count, bool aligned) {
    if (count <= 0) return make_uint4(0u, 0u, 0u, 0u);
    return aligned && count >= VEC<T> ? load_16_bytes(p) : load_elements(p, count);
}
template <typename T>
__device__ inline void store_raw(T* p, const uint4& raw, int count, bool aligned) {
    if (aligned && count >= VEC<T>) {
        *reinterpret_cast<uint4*>(p) = raw;
        return;
    }
    const uint32_t word[4] = {raw.x, raw.y, raw.z, raw.w};
#pragma unroll
    for (int i = 0; i < VEC<T>; ++i) {
        if (i >= count) continue;
        if constexpr (sizeof(T) == 4) {
            memcpy(p + i, &word[i], 4);
        } else {
            const uint16_t half = static_cast<uint16_t>(word[i / 2] >> (16 * (i % 2)));
            memcpy(p + i, &half, 2);
        }
    }
}
template <typename T>
__device__ inline void store_vector(T* p, const float (&v)[VEC<T>], int count, bool aligned) {
    store_raw<T>(p, pack<T>(v), count, aligned);
}

// `count` (at most N) numbers of a small table whose type is known at run time only, zeros after them.
template <int N>
__device__ inline void load_numbers(const void* base, int dtype, int64_t start, int count, bool aligned,
                                    float (&v)[N]) {
    if (aligned && count >= N) {
        if (dtype == FP32) {
            const float* p = static_cast<const float*>(base) + start;
#pragma unroll
            for (int j = 0; j < N / 4; ++j) {
                const uint4 raw = load_16_bytes(p + 4 * j);
                v[4 * j] = bits_to_float(raw.x);
                v[4 * j + 1] = bits_to_float(raw.y);
                v[4 * j + 2] = bits_to_float(raw.z);
                v[4 * j + 3] = bits_to_float(raw.w);
            }
        } else {
            const uint16_t* p = static_cast<const uint16_t*>(base) + start;
            uint32_t word[N / 2];
            if constexpr (N == 8) {
                const uint4 raw = *reinterpret_cast<const uint4*>(p);
                word[0] = raw.x, word[1] = raw.y, word[2] = raw.z, word[3] = raw.w;
            } else {
                const uint2 raw = *reinterpret_cast<const uint2*>(p);
                word[0] = raw.x, word[1] = raw.y;
            }
#pragma unroll
            for (int j = 0; j < N / 2; ++j) {
                if (dtype == BF16) {
                    unpack_word<bf16>(word[j], v[2 * j], v[2 * j + 1]);
                } else {
                    unpack_word<fp16>(word[j], v[2 * j], v[2 * j + 1]);
                }
            }
        }
    } else {
#pragma unroll
        for (int i = 0; i < N; ++i) v[i] = i < count ? load_number(base, dtype, start + i) : 0.0f;
    }
}

// ---- reductions: fixed order, so the same numbers give the same bits ---------------------------------------------

__device__ inline float warp_sum(float v) {
#pragma unroll
    for (int offset = WARP / 2; offset > 0; offset /= 2) v += __shfl_xor_sync(ALL_LANES, v, offset);
    return v;
}

// Sums N values over the block; every thread gets them. `scratch` holds at least N * 32 floats and may be used again
// only after another barrier (callers alternate between two).
template <int N>
__device__ inline void block_sum(float (&v)[N], float* scratch) {
    const int lane = threadIdx.x % WARP, warp = threadIdx.x / WARP, warps = (blockDim.x + WARP - 1) / WARP;
#pragma unroll
    for (int i = 0; i < N; ++i) v[i] = warp_sum(v[i]);
    if (lane == 0) {
#pragma unroll
        for (int i = 0; i < N; ++i) scratch[warp * N + i] = v[i];
    }
    __syncthreads();
#pragma unroll
    for (int i = 0; i < N; ++i) v[i] = 0.0f;
    for (int w = 0; w < warps; ++w) {
#pragma unroll
        for (int i = 0; i < N; ++i) v[i] += scratch[w * N + i];
    }
}

// ---- type switch ------------------------------------------------------------------------------------------------

template <typename T>
struct Type {
    using type = T;
};

// Calls body(Type<T>{}) for the number type of a code from Python.
template <typename Body>
int with_type(int64_t dtype, Body body) {
    switch (dtype) {
        case FP32: return body(Type<float>{});
        case BF16: return body(Type<bf16>{});
        case FP16: return body(Type<fp16>{});
        default: return INVALID_VALUE;
    }
}

inline bool is_aligned(int64_t address, int64_t bytes = 16) { return address % bytes == 0; }

}  // namespace flowmo
