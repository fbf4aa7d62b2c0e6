// Tokens to and from a stream of bits, least significant first: bit k of token n is bit n * bits + k of the stream.
//
// Eight tokens are exactly `bits` bytes, so a thread takes eight: 64 bytes of tokens and `bits` bytes of the stream.
#include "common.cuh"
#include "launchers.h"

using namespace flowmo;

namespace {

constexpr int THREADS = 128;
constexpr int GROUP = 8;

__global__ void __launch_bounds__(THREADS)
    pack_groups(const int64_t* tokens, uint8_t* packed, int64_t stride, int64_t n, int bits, int64_t groups, int64_t bytes,
                int64_t images, bool aligned) {
    const int64_t item = int64_t{blockIdx.x} * THREADS + threadIdx.x;
    const int64_t image = item / groups, group = item - image * groups;
    if (image >= images) return;
    const int64_t* const from = tokens + image * stride + group * GROUP;
    const int count = static_cast<int>(smaller(GROUP, n - group * GROUP));
    uint32_t token[GROUP] = {};  // the low words hold every bit that is kept
    if (aligned && count == GROUP) {
#pragma unroll
        for (int j = 0; j < GROUP / 2; ++j) {
            const uint4 raw = *reinterpret_cast<const uint4*>(from + 2 * j);
            token[2 * j] = raw.x;
            token[2 * j + 1] = raw.z;
        }
    } else {
#pragma unroll
        for (int j = 0; j < GROUP; ++j) {
            if (j < count) token[j] = static_cast<uint32_t>(from[j]);
        }
    }
    uint8_t* to = packed + image * bytes + group * bits;
    const uint64_t mask = (uint64_t{1} << bits) - 1;
    uint64_t waiting = 0;
    int held = 0;
#pragma unroll
    for (int j = 0; j < GROUP; ++j) {
        if (j >= count) break;
        waiting |= (token[j] & mask) << held;
        held += bits;
        for (; held >= 8; held -= 8, waiting >>= 8) *to++ = static_cast<uint8_t>(waiting);
    }
    if (held > 0) *to = static_cast<uint8_t>(waiting);
}

__global__ void __launch_bounds__(THREADS)
    unpack_groups(const uint8_t* packed, int64_t* tokens, int64_t stride, int64_t n, int bits, int64_t groups,
                  int64_t images, bool aligned) {
    const int64_t item = int64_t{blockIdx.x} * THREADS + threadIdx.x;
    const int64_t image = item / groups, group = item - image * groups;
    if (image >= images) return;
    const uint8_t* from = packed + image * stride + group * bits;
    int64_t* const to = tokens + image * n + group * GROUP;
    const int count = static_cast<int>(smaller(GROUP, n - group * GROUP));
    const uint64_t mask = (uint64_t{1} << bits) - 1;
    uint32_t token[GROUP] = {};
    uint64_t waiting = 0;
    int held = 0;
#pragma unroll
    for (int j = 0; j < GROUP; ++j) {
        if (j >= count) break;
        for (; held < bits; held += 8) waiting |= static_cast<uint64_t>(*from++) << held;
        token[j] = static_cast<uint32_t>(waiting & mask);
        waiting >>= bits;
        held -= bits;
    }
    if (aligned && count == GROUP) {
#pragma unroll
        for (int j = 0; j < GROUP / 2; ++j) {
            *reinterpret_cast<uint4*>(to + 2 * j) = make_uint4(token[2 * j], 0u, token[2 * j + 1], 0u);
        }
    } else {
#pragma unroll
        for (int j = 0; j < GROUP; ++j) {
            if (j < count) to[j] = token[j];
        }
    }
}

}  // namespace

int pack_tokens(int64_t packed, int64_t tokens, int64_t stride, int64_t batch, int64_t n, int64_t bits,
                int64_t stream) {
    if (batch * n == 0) return 0;
    if (bits < 1 || bits > 32) return INVALID_VALUE;
    const int64_t groups = ceil_div(n, GROUP);
    const bool aligned = is_aligned(tokens) && stride % 2 == 0;
    return LAUNCH(pack_groups, static_cast<unsigned>(ceil_div(batch * groups, THREADS)), THREADS, 0, stream,
                  address_of<const int64_t>(tokens), address_of<uint8_t>(packed), stride, n, static_cast<int>(bits),
                  groups, ceil_div(n * bits, 8), batch, aligned);
}

int unpack_tokens(int64_t tokens, int64_t packed, int64_t stride, int64_t batch, int64_t n, int64_t bits,
                  int64_t stream) {
    if (batch * n == 0) return 0;
    if (bits < 1 || bits > 32) return INVALID_VALUE;
    const int64_t groups = ceil_div(n, GROUP);
    const bool aligned = is_aligned(tokens) && n % 2 == 0;
    return LAUNCH(unpack_groups, static_cast<unsigned>(ceil_div(batch * groups, THREADS)), THREADS, 0, stream,
                  address_of<const uint8_t>(packed), address_of<int64_t>(tokens), stride, n, static_cast<int>(bits),
                  groups, batch, aligned);
}
