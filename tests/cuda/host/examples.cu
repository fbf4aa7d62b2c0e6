// Small kernels that try the executor itself: right ones, and ones broken in the ways that it must catch.
#include "examples.h"

#include "common.cuh"

using namespace flowmo;

namespace {

enum Fault : int { NONE, READS_BEYOND, WRITES_BEYOND, NO_BARRIER, READS_UNWRITTEN, SHARED_BEYOND, MISALIGNED };

__global__ void sum_kernel(float* out, const float* x, int n) {
    SHARED_ARRAY(float, scratch, WARP);
    float v[1] = {threadIdx.x < static_cast<unsigned>(n) ? x[threadIdx.x] : 0.0f};
    block_sum<1>(v, scratch);
    if (threadIdx.x < static_cast<unsigned>(n)) out[threadIdx.x] = v[0];
    atomicAdd(out + n, 1.0f);
}

__global__ void half_kernel(float* out, const float* x, int n, int kind) {
    const int i = blockIdx.x * blockDim.x + threadIdx.x;
    if (i >= n) return;
    const float v = x[i];
    // One number alone, and as the upper one of a pair of a 16-byte vector, must round alike.
    if (kind == 1) {
        const float alone = to_float(from_float<bf16>(v)), vector[8] = {0, v, 0, 0, 0, 0, 0, v};
        float back[8];
        unpack<bf16>(pack<bf16>(vector), back);
        out[i] = (alone == back[7] && alone == back[1]) || v != v ? alone : -1.0f;
    } else {
        const float alone = to_float(from_float<fp16>(v)), vector[8] = {0, v, 0, 0, 0, 0, 0, v};
        float back[8];
        unpack<fp16>(pack<fp16>(vector), back);
        out[i] = (alone == back[7] && alone == back[1]) || v != v ? alone : -1.0f;
    }
}

__global__ void reverse_kernel(float* out, const float* x, int n, int fault) {
    SHARED_ARRAY(float, row, 64);
    DYNAMIC_SHARED(float, more);
    const int i = threadIdx.x;
    if (fault == MISALIGNED) {
        out[i] = bits_to_float(load_16_bytes(x + 1).x);
        return;
    }
    const float v = x[fault == READS_BEYOND ? i + 1 : i];
    if (!(fault == READS_UNWRITTEN && i == 6)) row[i] = v;
    more[i] = v;
    if (fault == SHARED_BEYOND) more[i + 1] = v;
    if (fault != NO_BARRIER) __syncthreads();
    out[fault == WRITES_BEYOND ? i + 1 : i] = i % 2 ? row[n - 1 - i] : more[n - 1 - i];
}

__global__ void meeting_kernel(float* out, int fault) {
    const int lane = threadIdx.x;
    if (fault == 1 && lane == 3) return;  // a lane of the mask is gone
    if (fault == 2 && lane == 3) __syncthreads();  // a lane waits elsewhere
    if (fault == 3 && lane == 3) __syncwarp();  // a lane takes part in another collective
    if (fault == 4) {
        out[lane] = static_cast<float>(__ballot_sync(0xfu, true));  // most lanes are not in their own mask
    } else {
        out[lane] = __shfl_xor_sync(ALL_LANES, static_cast<float>(lane), 1);
    }
}

__global__ void nothing() {}

}  // namespace

int sum_block(int64_t out, int64_t x, int64_t n, int64_t stream) {
    return LAUNCH(sum_kernel, 1u, 128, 0, stream, address_of<float>(out), address_of<const float>(x),
                  static_cast<int>(n));
}
int through_half(int64_t out, int64_t x, int64_t n, int64_t kind, int64_t stream) {
    return LAUNCH(half_kernel, static_cast<unsigned>(ceil_div(n, 128)), 128, 0, stream, address_of<float>(out),
                  address_of<const float>(x), static_cast<int>(n), static_cast<int>(kind));
}
int reverse(int64_t out, int64_t x, int64_t n, int64_t fault, int64_t stream) {
    return LAUNCH(reverse_kernel, 1u, static_cast<int>(n), n * sizeof(float), stream, address_of<float>(out),
                  address_of<const float>(x), static_cast<int>(n), static_cast<int>(fault));
}
int meet_badly(int64_t out, int64_t fault, int64_t stream) {
    return LAUNCH(meeting_kernel, 1u, 32, 0, stream, address_of<float>(out), static_cast<int>(fault));
}
int refused(int64_t kind, int64_t stream) {
    if (kind == 0) return LAUNCH(nothing, 1u, 1056, 0, stream);
    if (kind == 1) return LAUNCH(nothing, 0u, 32, 0, stream);
    return LAUNCH(nothing, 1u, 32, 50 * 1024, stream);
}
