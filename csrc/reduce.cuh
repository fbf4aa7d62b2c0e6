// Second stage of the sums over rows: adds the chunks of an image and stream in a fixed order.
#pragma once

#include "common.cuh"

namespace flowmo {

struct ReduceArguments {
    int64_t partial;     // [B, chunks, sums, D] float32
    int64_t outputs[3];  // one [B, streams, D] float32 per sum; 0 when not wanted
    int streams[3];
    int chunks, chunks_before, sums, width;
};

constexpr int REDUCE_ROWS = 8;

static __global__ void __launch_bounds__(WARP* REDUCE_ROWS) reduce_chunks(ReduceArguments p) {
    SHARED_ARRAY(float, part, REDUCE_ROWS * WARP);
    const int column = blockIdx.x * WARP + threadIdx.x % WARP;
    const int lane = threadIdx.x / WARP;
    const int64_t batch = blockIdx.y / 2;
    const int stream = blockIdx.y % 2, which = blockIdx.z;
    // Not p.streams[which]: indexing an argument by a variable would copy it to local memory.
    const int streams = which == 0 ? p.streams[0] : which == 1 ? p.streams[1] : p.streams[2];
    const int64_t output = which == 0 ? p.outputs[0] : which == 1 ? p.outputs[1] : p.outputs[2];
    if (stream >= streams || output == 0) return;
    const int begin = stream == 1 ? p.chunks_before : 0;
    const int end = streams == 2 && stream == 0 ? p.chunks_before : p.chunks;
    float total = 0.0f;
    if (column < p.width) {
        const float* const partial = address_of<const float>(p.partial);
        for (int c = begin + lane; c < end; c += REDUCE_ROWS) {
            total += partial[((batch * p.chunks + c) * p.sums + which) * p.width + column];
        }
    }
    part[threadIdx.x] = total;
    __syncthreads();
    if (lane == 0 && column < p.width) {
        for (int r = 1; r < REDUCE_ROWS; ++r) total += part[r * WARP + threadIdx.x];
        address_of<float>(output)[(batch * streams + stream) * p.width + column] = total;
    }
}

}  // namespace flowmo
