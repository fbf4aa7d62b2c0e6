// The part of CUDA's types that the kernels use, for machines without CUDA's headers: vectors, bf16 and fp16 with
// rounding to nearest even.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

struct alignas(16) uint4 {
    uint32_t x, y, z, w;
};
struct alignas(8) uint2 {
    uint32_t x, y;
};
struct alignas(16) float4 {
    float x, y, z, w;
};
struct alignas(8) float2 {
    float x, y;
};
struct dim3 {
    unsigned x, y, z;
    dim3(unsigned x_ = 1, unsigned y_ = 1, unsigned z_ = 1) : x(x_), y(y_), z(z_) {}
};
inline uint4 make_uint4(uint32_t x, uint32_t y, uint32_t z, uint32_t w) { return {x, y, z, w}; }
inline float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }

struct __nv_bfloat16 {
    uint16_t bits;
};
struct __half {
    uint16_t bits;
};
struct __nv_bfloat162 {
    __nv_bfloat16 x, y;
};
struct __half2 {
    __half x, y;
};

inline float __bfloat162float(__nv_bfloat16 v) {
    const uint32_t bits = static_cast<uint32_t>(v.bits) << 16;
    float f;
    std::memcpy(&f, &bits, 4);
    return f;
}
inline __nv_bfloat16 __float2bfloat16_rn(float f) {
    uint32_t bits;
    std::memcpy(&bits, &f, 4);
    if (std::isnan(f)) return {0x7fff};
    return {static_cast<uint16_t>((bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16)};
}
inline float __half2float(__half v) {
    const int exponent = (v.bits >> 10) & 31, fraction = v.bits & 1023;
    float f;
    if (exponent == 31) {
        f = fraction ? NAN : INFINITY;
    } else {
        f = exponent ? std::ldexp(static_cast<float>(1024 + fraction), exponent - 25)
                     : std::ldexp(static_cast<float>(fraction), -24);
    }
    return v.bits & 0x8000 ? -f : f;
}
inline __half __float2half_rn(float f) {
    const uint16_t sign = std::signbit(f) ? 0x8000 : 0;
    const float magnitude = std::fabs(f);
    if (std::isnan(f)) return {static_cast<uint16_t>(sign | 0x7fff)};
    if (magnitude >= 65520.0f) return {static_cast<uint16_t>(sign | 0x7c00)};
    if (magnitude == 0.0f) return {sign};
    int exponent = 0;
    std::frexp(magnitude, &exponent);
    const int unit = exponent - 11 < -24 ? -24 : exponent - 11;  // of the last place
    // nearbyint rounds ties to even, and a carry into the next exponent is what the sum of bits gives.
    const int steps = static_cast<int>(std::nearbyint(std::ldexp(magnitude, -unit)));
    return {static_cast<uint16_t>(sign | ((unit + 24) * 1024 + steps))};
}
inline __nv_bfloat162 __floats2bfloat162_rn(float low, float high) {
    return {__float2bfloat16_rn(low), __float2bfloat16_rn(high)};
}
inline __half2 __floats2half2_rn(float low, float high) { return {__float2half_rn(low), __float2half_rn(high)}; }
inline float __low2float(__half2 v) { return __half2float(v.x); }
inline float __high2float(__half2 v) { return __half2float(v.y); }
