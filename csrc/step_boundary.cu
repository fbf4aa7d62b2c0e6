// From one sampling step to the next: last layer, guidance, Euler step, next patch embedding, for 16 tokens a block.
//
//   n  = LN((1 + scale) LN(h) + shift);  v = n W_out^T + b_out;  v = v_null + w (v - v_null) when guided
//   z' = z - dt v;                       x = z' W_in^T + b_in
//
// n and z' are rounded to the type of the weights, as the separate layers would; the rest is float32. Tokens are read
// once and written once; n, v and z' stay in shared memory. The velocity: lanes split the width, a warp takes three
// outputs of all tokens, so that a weight is read once. The embedding: a thread takes four columns of eight tokens.
#include "launchers.h"
#include "views.cuh"

using namespace flowmo;

namespace {

constexpr int THREADS = 256, WARPS = THREADS / WARP;
constexpr int TOKENS = 16;
constexpr int OUTPUTS = 3;            // of the last layer, for a warp at a time
constexpr int COLUMNS = 4, HALF = 8;  // of the embedding and tokens, for a thread at a time

struct Arguments {
    int64_t h, h_null;  // h_null 0: not guided
    int64_t h_batch, h_row, null_batch, null_row;
    int h_dtype;
    bool h_aligned, null_aligned;
    Table shift, scale;
    int64_t w_out, b_out, w_in, b_in, z, z_next, x;
    int b_out_dtype, b_in_dtype;
    bool w_out_aligned, w_in_aligned;
    int tokens, width, patch, embedding;
    float dt, w, eps;
};

// Columns a row takes in shared memory: whole groups of eight, whose tail holds zeros.
__host__ __device__ inline int padded(int n) { return (n + 7) / 8 * 8; }

// Mean and 1 / sqrt(variance + eps) of a row that the lanes of a warp hold in shared memory, each its own columns.
__device__ inline void moments(const float* row, int width, float eps, float& mean, float& rstd) {
    const int lane = threadIdx.x % WARP;
    float total = 0.0f, squares = 0.0f;
    for (int i = lane * 8; i < width; i += WARP * 8) {
        for (int k = 0; k < 8 && i + k < width; ++k) total += row[i + k];
    }
    mean = warp_sum(total) / width;
    for (int i = lane * 8; i < width; i += WARP * 8) {
        for (int k = 0; k < 8 && i + k < width; ++k) squares += (row[i + k] - mean) * (row[i + k] - mean);
    }
    rstd = rsqrtf(warp_sum(squares) / width + eps);
}

// Eight elements of shared memory as floats.
template <typename W>
__device__ inline void load_eight(const W* p, float (&v)[8]) {
    if constexpr (sizeof(W) == 4) {
        float part[4];
#pragma unroll
        for (int j = 0; j < 2; ++j) {
            unpack<float>(load_16_bytes(p + 4 * j), part);
#pragma unroll
            for (int k = 0; k < 4; ++k) v[4 * j + k] = part[k];
        }
    } else {
        unpack<W>(load_16_bytes(p), v);
    }
}
// Eight weights of global memory; zeros from `count` on.
template <typename W>
__device__ inline void load_weights(const W* p, int count, bool aligned, float (&v)[8]) {
    constexpr int N = VEC<W>;
#pragma unroll
    for (int j = 0; j < 8 / N; ++j) {
        float part[N];
        unpack<W>(load_vector(p + j * N, count - j * N, aligned), part);
#pragma unroll
        for (int k = 0; k < N; ++k) v[j * N + k] = part[k];
    }
}

template <typename W>
__global__ void __launch_bounds__(THREADS, sizeof(W) == 4 ? 1 : 2) boundary(Arguments p) {
    DYNAMIC_SHARED(float, row_space);  // [WARPS, width]: a row while it is normalized
    const int wide = padded(p.width), deep = padded(p.patch);
    float* const velocity = row_space + WARPS * wide;  // [2, TOKENS, patch]: conditional, null
    float* const state = velocity + 2 * TOKENS * deep;  // [TOKENS, patch]: z' as the embedding reads it
    W* const normed = reinterpret_cast<W*>(state + TOKENS * deep);  // [TOKENS, width]
    const int lane = threadIdx.x % WARP, warp = threadIdx.x / WARP;
    const int64_t batch = blockIdx.y;
    const int first = blockIdx.x * TOKENS;
    const int count = static_cast<int>(smaller(TOKENS, p.tokens - first));
    const int passes = p.h_null != 0 ? 2 : 1;

    for (int pass = 0; pass < passes; ++pass) {
        const void* const h = address_of<const void>(pass == 0 ? p.h : p.h_null);
        const int64_t h_batch = pass == 0 ? p.h_batch : p.null_batch, h_row = pass == 0 ? p.h_row : p.null_row;
        const bool h_aligned = pass == 0 ? p.h_aligned : p.null_aligned;
        float* const row = row_space + warp * wide;
        for (int t = warp; t < TOKENS; t += WARPS) {
            const int token = t < count ? t : 0;  // rows beyond the end repeat the first; nobody reads their results
            const int64_t start = batch * h_batch + (first + token) * h_row;
            for (int i = lane * 8; i < p.width; i += WARP * 8) {
                float v[8];
                load_numbers<8>(h, p.h_dtype, start + i, p.width - i, h_aligned, v);
                for (int k = 0; k < 8; ++k) row[i + k] = v[k];
            }
            float mean, rstd;
            moments(row, p.width, p.eps, mean, rstd);
            for (int i = lane * 8; i < p.width; i += WARP * 8) {
                float shift[8], scale[8];
                p.shift.load<8>(batch, 0, i, p.width - i, shift);
                p.scale.load<8>(batch, 0, i, p.width - i, scale);
                for (int k = 0; k < 8; ++k) row[i + k] = (1.0f + scale[k]) * ((row[i + k] - mean) * rstd) + shift[k];
            }
            moments(row, p.width, p.eps, mean, rstd);
            for (int i = lane * 8; i < p.width; i += WARP * 8) {
                for (int k = 0; k < 8; ++k) {
                    normed[t * wide + i + k] = from_float<W>(i + k < p.width ? (row[i + k] - mean) * rstd : 0.0f);
                }
            }
        }
        __syncthreads();
        for (int output = warp * OUTPUTS; output < p.patch; output += WARPS * OUTPUTS) {
            float sum[OUTPUTS][TOKENS] = {};
            for (int i = lane * 8; i < p.width; i += WARP * 8) {
                float weight[OUTPUTS][8];
#pragma unroll
                for (int o = 0; o < OUTPUTS; ++o) {
                    const int64_t at = smaller(output + o, p.patch - 1);
                    load_weights(address_of<const W>(p.w_out) + at * p.width + i, p.width - i, p.w_out_aligned,
                                 weight[o]);
                }
#pragma unroll
                for (int t = 0; t < TOKENS; ++t) {
                    float n[8];
                    load_eight(normed + t * wide + i, n);
#pragma unroll
                    for (int o = 0; o < OUTPUTS; ++o) {
#pragma unroll
                        for (int k = 0; k < 8; ++k) sum[o][t] += weight[o][k] * n[k];
                    }
                }
            }
#pragma unroll
            for (int o = 0; o < OUTPUTS; ++o) {
#pragma unroll
                for (int t = 0; t < TOKENS; ++t) {
                    const float total = warp_sum(sum[o][t]);
                    if (lane == 0 && output + o < p.patch) {
                        velocity[(pass * TOKENS + t) * deep + output + o] =
                            total + load_number(address_of<const void>(p.b_out), p.b_out_dtype, output + o);
                    }
                }
            }
        }
        __syncthreads();
    }

    for (int item = threadIdx.x; item < TOKENS * deep; item += THREADS) {
        const int t = item / deep, i = item % deep;
        float next = 0.0f;
        if (t < count && i < p.patch) {
            const int64_t at = (batch * p.tokens + first + t) * p.patch + i;
            float v = velocity[item];
            if (passes == 2) {
                const float null = velocity[TOKENS * deep + item];
                v = null + p.w * (v - null);
            }
            next = address_of<const float>(p.z)[at] - p.dt * v;
            address_of<float>(p.z_next)[at] = next;
        }
        state[item] = to_float(from_float<W>(next));
    }
    __syncthreads();

    for (int column = threadIdx.x; column < p.embedding; column += THREADS * COLUMNS) {
        for (int half = 0; half < TOKENS; half += HALF) {
            float sum[COLUMNS][HALF] = {};
            for (int i = 0; i < p.patch; i += 8) {
                float weight[COLUMNS][8];
#pragma unroll
                for (int c = 0; c < COLUMNS; ++c) {
                    const int64_t at = smaller(column + c * THREADS, p.embedding - 1);
                    load_weights(address_of<const W>(p.w_in) + at * p.patch + i, p.patch - i, p.w_in_aligned, weight[c]);
                }
#pragma unroll
                for (int t = 0; t < HALF; ++t) {
                    float z[8];
                    load_eight(state + (half + t) * deep + i, z);
#pragma unroll
                    for (int c = 0; c < COLUMNS; ++c) {
#pragma unroll
                        for (int k = 0; k < 8; ++k) sum[c][t] += weight[c][k] * z[k];
                    }
                }
            }
#pragma unroll
            for (int c = 0; c < COLUMNS; ++c) {
                const int at = column + c * THREADS;
                if (at >= p.embedding) continue;
                const float bias = load_number(address_of<const void>(p.b_in), p.b_in_dtype, at);
#pragma unroll
                for (int t = 0; t < HALF; ++t) {
                    if (half + t < count) {
                        address_of<W>(p.x)[(batch * p.tokens + first + half + t) * p.embedding + at] =
                            from_float<W>(sum[c][t] + bias);
                    }
                }
            }
        }
    }
}

}  // namespace

int step_boundary(int64_t z_next, int64_t x, int64_t h, int64_t h_batch, int64_t h_row, int64_t h_null,
                  int64_t null_batch, int64_t null_row, int64_t h_dtype, int64_t shift, int64_t shift_batch,
                  int64_t shift_dtype, int64_t scale, int64_t scale_batch, int64_t scale_dtype, int64_t w_out,
                  int64_t b_out, int64_t b_out_dtype, int64_t z, int64_t w_in, int64_t b_in, int64_t b_in_dtype,
                  int64_t batch, int64_t tokens, int64_t width, int64_t patch, int64_t embedding, double dt, double w,
                  double eps, int64_t dtype, int64_t stream) {
    if (batch * tokens == 0 || width == 0 || patch == 0) return 0;
    const int64_t size = number_size(dtype);
    Arguments p = {};
    p.h = h;
    p.h_null = h_null;
    p.h_batch = h_batch;
    p.h_row = h_row;
    p.null_batch = null_batch;
    p.null_row = null_row;
    p.h_dtype = static_cast<int>(h_dtype);
    p.h_aligned = make_rows(h, h_batch, h_row, h_dtype).aligned;
    p.null_aligned = make_rows(h_null, null_batch, null_row, h_dtype).aligned;
    p.shift = make_table(shift, shift_batch, 0, shift_dtype);
    p.scale = make_table(scale, scale_batch, 0, scale_dtype);
    p.w_out = w_out;
    p.b_out = b_out;
    p.b_out_dtype = static_cast<int>(b_out_dtype);
    p.w_in = w_in;
    p.b_in = b_in;
    p.b_in_dtype = static_cast<int>(b_in_dtype);
    p.w_out_aligned = is_aligned(w_out) && is_aligned(width * size);
    p.w_in_aligned = is_aligned(w_in) && is_aligned(patch * size);
    p.z = z;
    p.z_next = z_next;
    p.x = x;
    p.tokens = static_cast<int>(tokens);
    p.width = static_cast<int>(width);
    p.patch = static_cast<int>(patch);
    p.embedding = static_cast<int>(embedding);
    p.dt = static_cast<float>(dt);
    p.w = static_cast<float>(w);
    p.eps = static_cast<float>(eps);
    return with_type(dtype, [&](auto tag) {
        using W = typename decltype(tag)::type;
        const auto kernel = boundary<W>;
        const size_t floats = static_cast<size_t>(WARPS) * padded(p.width) + 3 * TOKENS * static_cast<size_t>(padded(p.patch));
        const size_t bytes = floats * sizeof(float) + TOKENS * static_cast<size_t>(padded(p.width)) * sizeof(W);
        const int allowed = ALLOW_SHARED(kernel, bytes);
        if (allowed != 0) return allowed;
        const dim3 grid(static_cast<unsigned>(ceil_div(tokens, TOKENS)), static_cast<unsigned>(batch));
        return LAUNCH(kernel, grid, THREADS, bytes, stream, p);
    });
}
