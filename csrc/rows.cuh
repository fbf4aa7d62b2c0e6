// Kernels over the rows of [B, L, D]: LayerNorm with modulation, gate and residual, and their gradients.
//
//   x' = x + gate * branch                           (RESIDUAL)
//   y  = (1 + scale) * (x' - mean) / sqrt(var + eps) + shift      (NORM; x' = x without RESIDUAL)
//
// gate, shift and scale belong to an image and a stream: rows before `split` use stream 0, the others stream 1 (a table
// with one vector an image has stream stride 0).
// Forward: one warp a row with the row in registers, or one block a row when it does not fit. Backward: a block walks
// a chunk of rows of one image and stream, a thread owns 16 bytes of columns, so that the sums over rows stay in
// registers; a second kernel adds the chunks in a fixed order.
#pragma once

#include "reduce.cuh"
#include "views.cuh"

namespace flowmo {

struct ForwardArguments {
    Rows x, branch, sum, y;  // sum is x'
    Table gate, shift, scale;
    int64_t rows;
    int length, width, split;
    float eps;
};

inline void set_sizes(ForwardArguments& p, int64_t batch, int64_t length, int64_t width, int64_t split, double eps) {
    p.rows = batch * length;
    p.length = static_cast<int>(length);
    p.width = static_cast<int>(width);
    p.split = static_cast<int>(split);
    p.eps = static_cast<float>(eps);
}

constexpr int FORWARD_WARPS = 4;

template <typename T, int NV>
__device__ inline void load_row(const T* row, bool aligned, int width, uint4 (&raw)[NV]) {
    const int lane = threadIdx.x % WARP;
    if (aligned && width % VEC<T> == 0) {
#pragma unroll
        for (int j = 0; j < NV; ++j) {
            const int i = (j * WARP + lane) * VEC<T>;
            raw[j] = i < width ? load_16_bytes(row + i) : make_uint4(0u, 0u, 0u, 0u);
        }
    } else {
#pragma unroll
        for (int j = 0; j < NV; ++j) {
            const int i = (j * WARP + lane) * VEC<T>;
            raw[j] = load_vector(row + i, width - i, aligned);
        }
    }
}

// One warp a row, at most NV 16-byte vectors a lane.
template <typename T, int NV, bool NORM, bool RESIDUAL>
__global__ void __launch_bounds__(FORWARD_WARPS* WARP, 4) rows_forward(ForwardArguments p) {
    constexpr int N = VEC<T>;
    const int lane = threadIdx.x % WARP;
    const int64_t row = int64_t{blockIdx.x} * FORWARD_WARPS + threadIdx.x / WARP;
    if (row >= p.rows) return;
    const int64_t batch = row / p.length;
    const int index = static_cast<int>(row - batch * p.length);
    const int stream = index >= p.split ? 1 : 0;

    uint4 raw[NV];
    load_row<T, NV>(p.x.row<T>(batch, index), p.x.aligned, p.width, raw);
    float v[NV][N];
    if constexpr (RESIDUAL) {
        uint4 raw_branch[NV];
        load_row<T, NV>(p.branch.row<T>(batch, index), p.branch.aligned, p.width, raw_branch);
        T* const sum = p.sum.row<T>(batch, index);
#pragma unroll
        for (int j = 0; j < NV; ++j) {
            const int i = (j * WARP + lane) * N;
            float branch[N], gate[N];
            unpack<T>(raw[j], v[j]);
            unpack<T>(raw_branch[j], branch);
            if (p.gate.address != 0) {
                p.gate.load<N>(batch, stream, i, p.width - i, gate);
#pragma unroll
                for (int k = 0; k < N; ++k) v[j][k] += gate[k] * branch[k];
            } else {
#pragma unroll
                for (int k = 0; k < N; ++k) v[j][k] += branch[k];
            }
            // y comes from x' as stored, so that the fused op equals the two ops in sequence.
            const uint4 rounded = pack<T>(v[j]);
            store_raw<T>(sum + i, rounded, p.width - i, p.sum.aligned);
            unpack<T>(rounded, v[j]);
        }
    } else {
#pragma unroll
        for (int j = 0; j < NV; ++j) unpack<T>(raw[j], v[j]);
    }
    if constexpr (NORM) {
        float total = 0.0f;
#pragma unroll
        for (int j = 0; j < NV; ++j) {
#pragma unroll
            for (int k = 0; k < N; ++k) total += v[j][k];  // zeros beyond the row
        }
        const float mean = warp_sum(total) / p.width;
        float squares = 0.0f;
#pragma unroll
        for (int j = 0; j < NV; ++j) {
            const int count = p.width - (j * WARP + lane) * N;
#pragma unroll
            for (int k = 0; k < N; ++k) {
                const float centred = k < count ? v[j][k] - mean : 0.0f;
                squares += centred * centred;
            }
        }
        const float scale_row = rsqrtf(warp_sum(squares) / p.width + p.eps);
        T* const y = p.y.row<T>(batch, index);
#pragma unroll
        for (int j = 0; j < NV; ++j) {
            const int i = (j * WARP + lane) * N;
            if (i >= p.width) continue;
            float shift[N], scale[N];
#pragma unroll
            for (int k = 0; k < N; ++k) v[j][k] = (v[j][k] - mean) * scale_row;
            if (p.scale.address != 0) {
                p.scale.load<N>(batch, stream, i, p.width - i, scale);
                p.shift.load<N>(batch, stream, i, p.width - i, shift);
#pragma unroll
                for (int k = 0; k < N; ++k) v[j][k] = (1.0f + scale[k]) * v[j][k] + shift[k];
            }
            store_vector<T>(y + i, v[j], p.width - i, p.y.aligned);
        }
    }
}

constexpr int WIDE_THREADS = 256;

// One block a row of any width; x is read again (from the caches) instead of being kept.
template <typename T, bool NORM, bool RESIDUAL>
__global__ void __launch_bounds__(WIDE_THREADS, 4) rows_forward_wide(ForwardArguments p) {
    SHARED_ARRAY(float, scratch, 2 * WARP);
    const int64_t row = blockIdx.x;
    const int64_t batch = row / p.length;
    const int index = static_cast<int>(row - batch * p.length);
    const int stream = index >= p.split ? 1 : 0;
    const T* const x = p.x.row<T>(batch, index);
    const auto value = [&](int i) {
        float v = to_float(x[i]);
        if constexpr (RESIDUAL) {
            const float gate = p.gate.address != 0 ? p.gate.at(batch, stream, i) : 1.0f;
            v = to_float(from_float<T>(v + gate * to_float(p.branch.row<T>(batch, index)[i])));
        }
        return v;
    };
    const int step = blockDim.x;
    if constexpr (NORM) {
        float total[1] = {0.0f};
        for (int i = threadIdx.x; i < p.width; i += step) total[0] += value(i);
        block_sum<1>(total, scratch);
        const float mean = total[0] / p.width;
        float squares[1] = {0.0f};
        for (int i = threadIdx.x; i < p.width; i += step) squares[0] += (value(i) - mean) * (value(i) - mean);
        block_sum<1>(squares, scratch + WARP);
        const float scale_row = rsqrtf(squares[0] / p.width + p.eps);
        T* const y = p.y.row<T>(batch, index);
        for (int i = threadIdx.x; i < p.width; i += step) {
            const float v = value(i);
            const float n = (v - mean) * scale_row;
            if constexpr (RESIDUAL) p.sum.row<T>(batch, index)[i] = from_float<T>(v);
            y[i] = from_float<T>(
                p.scale.address != 0 ? (1.0f + p.scale.at(batch, stream, i)) * n + p.shift.at(batch, stream, i) : n);
        }
    } else {
        for (int i = threadIdx.x; i < p.width; i += step) {
            p.sum.row<T>(batch, index)[i] = from_float<T>(value(i));
        }
    }
}

// Vectors a lane of the two register widths, 768 and 1280 columns. The narrow one is the encoder's, in the type that it
// is trained and run in; other types take the broad kernel, which keeps the build short.
template <typename T>
constexpr int NARROW = 768 / (WARP * VEC<T>);
template <typename T>
constexpr int BROAD = 1280 / (WARP * VEC<T>);

template <bool NORM, bool RESIDUAL>
int launch_rows_forward(const ForwardArguments& p, int64_t dtype, int64_t stream) {
    if (p.rows <= 0 || p.width <= 0) return 0;
    return with_type(dtype, [&](auto tag) {
        using T = typename decltype(tag)::type;
        const unsigned blocks = static_cast<unsigned>(ceil_div(p.rows, FORWARD_WARPS));
        if constexpr (std::is_same_v<T, bf16>) {
            if (p.width <= 768) {
                const auto kernel = rows_forward<T, NARROW<T>, NORM, RESIDUAL>;
                return LAUNCH(kernel, blocks, FORWARD_WARPS * WARP, 0, stream, p);
            }
        }
        if (p.width <= 1280) {
            const auto kernel = rows_forward<T, BROAD<T>, NORM, RESIDUAL>;
            return LAUNCH(kernel, blocks, FORWARD_WARPS * WARP, 0, stream, p);
        }
        const auto kernel = rows_forward_wide<T, NORM, RESIDUAL>;
        return LAUNCH(kernel, static_cast<unsigned>(p.rows), WIDE_THREADS, 0, stream, p);
    });
}

// ---- backward ---------------------------------------------------------------------------------------------------

struct BackwardArguments {
    Rows grad_y, x, branch, grad_sum;  // x is what was normalised; grad_sum is d loss / d x'
    Rows grad_x, grad_branch;
    Table gate, scale;
    int64_t partial;  // [B, chunks, SUMS, D] float32, or 0 when no sum over rows is wanted
    int batch, length, width, split;
    int rows_per_chunk, chunks_before, chunks;  // chunks of rows before `split`, and of all rows
    float eps;
};

// The sums over rows that a gradient needs: shift and scale with NORM, gate with RESIDUAL.
template <bool NORM, bool RESIDUAL>
constexpr int SUMS = (NORM ? 2 : 0) + (RESIDUAL ? 1 : 0);

struct Chunk {
    int begin, end, stream;
};
__device__ inline Chunk chunk_of(const BackwardArguments& p, int i) {
    if (i < p.chunks_before) {
        const int begin = i * p.rows_per_chunk;
        return {begin, static_cast<int>(smaller(begin + p.rows_per_chunk, p.split)), 0};
    }
    const int begin = p.split + (i - p.chunks_before) * p.rows_per_chunk;
    return {begin, static_cast<int>(smaller(begin + p.rows_per_chunk, p.length)), 1};
}

// Threads of the register kernel: wide enough for 1280 columns in float32 and 2560 in half precision.
constexpr int BACKWARD_THREADS = 320;

template <typename T, bool NORM, bool RESIDUAL>
__global__ void __launch_bounds__(BACKWARD_THREADS, 1) rows_backward(BackwardArguments p) {
    constexpr int N = VEC<T>;
    constexpr int R = NORM && RESIDUAL ? 2 : 4;  // rows at a time: eight 16-byte loads in flight
    const int64_t batch = blockIdx.y;
    const Chunk chunk = chunk_of(p, blockIdx.x);
    const int i = threadIdx.x * N;
    const int count = p.width - i;  // columns of this thread; may be negative

    float factor[N], gate[N];  // 1 + scale, and gate
#pragma unroll
    for (int k = 0; k < N; ++k) factor[k] = 0.0f, gate[k] = 1.0f;
    if constexpr (NORM) {
        if (p.scale.address != 0 && count > 0) p.scale.load<N>(batch, chunk.stream, i, count, factor);
#pragma unroll
        for (int k = 0; k < N; ++k) factor[k] += 1.0f;
    }
    if constexpr (RESIDUAL) {
        if (p.gate.address != 0 && count > 0) p.gate.load<N>(batch, chunk.stream, i, count, gate);
    }
    float sum_shift[N] = {}, sum_scale[N] = {}, sum_gate[N] = {};

    for (int first = chunk.begin; first < chunk.end; first += R) {
        uint4 raw_x[R], raw_grad[R], raw_branch[R], raw_sum[R];
#pragma unroll
        for (int r = 0; r < R; ++r) {
            const bool here = first + r < chunk.end;
            const int n = here ? count : 0;
            const int row = here ? first + r : first;
            if constexpr (NORM) {
                raw_x[r] = load_vector(p.x.row<const T>(batch, row) + i, n, p.x.aligned);
                raw_grad[r] = load_vector(p.grad_y.row<const T>(batch, row) + i, n, p.grad_y.aligned);
            }
            if constexpr (RESIDUAL) {
                raw_branch[r] = load_vector(p.branch.row<const T>(batch, row) + i, n, p.branch.aligned);
                raw_sum[r] = load_vector(p.grad_sum.row<const T>(batch, row) + i, n, p.grad_sum.aligned);
            }
        }
        float grad[R][N];  // d loss / d x'
        if constexpr (NORM) {
            SHARED_ARRAY(float, scratch_mean, R * WARP);
            SHARED_ARRAY(float, scratch_square, R * WARP);
            SHARED_ARRAY(float, scratch_dots, 2 * R * WARP);
            float n[R][N], mean[R], rstd[R], dots[2 * R];
#pragma unroll
            for (int r = 0; r < R; ++r) {
                unpack<T>(raw_x[r], n[r]);
                mean[r] = 0.0f;
#pragma unroll
                for (int k = 0; k < N; ++k) mean[r] += n[r][k];
            }
            block_sum<R>(mean, scratch_mean);
#pragma unroll
            for (int r = 0; r < R; ++r) {
                mean[r] /= p.width;
                rstd[r] = 0.0f;
#pragma unroll
                for (int k = 0; k < N; ++k) {
                    n[r][k] = k < count ? n[r][k] - mean[r] : 0.0f;
                    rstd[r] += n[r][k] * n[r][k];
                }
            }
            block_sum<R>(rstd, scratch_square);
#pragma unroll
            for (int r = 0; r < R; ++r) {
                rstd[r] = rsqrtf(rstd[r] / p.width + p.eps);
                unpack<T>(raw_grad[r], grad[r]);
                dots[2 * r] = 0.0f;
                dots[2 * r + 1] = 0.0f;
#pragma unroll
                for (int k = 0; k < N; ++k) {
                    n[r][k] *= rstd[r];
                    sum_shift[k] += grad[r][k];
                    sum_scale[k] += grad[r][k] * n[r][k];
                    grad[r][k] *= factor[k];
                    dots[2 * r] += grad[r][k];
                    dots[2 * r + 1] += grad[r][k] * n[r][k];
                }
            }
            block_sum<2 * R>(dots, scratch_dots);
#pragma unroll
            for (int r = 0; r < R; ++r) {
                const float mean_grad = dots[2 * r] / p.width, mean_dot = dots[2 * r + 1] / p.width;
#pragma unroll
                for (int k = 0; k < N; ++k) grad[r][k] = rstd[r] * (grad[r][k] - mean_grad - n[r][k] * mean_dot);
            }
        }
#pragma unroll
        for (int r = 0; r < R; ++r) {
            const int row = first + r;
            if constexpr (RESIDUAL) {
                float upstream[N], branch[N];
                unpack<T>(raw_sum[r], upstream);
                unpack<T>(raw_branch[r], branch);
#pragma unroll
                for (int k = 0; k < N; ++k) {
                    grad[r][k] = NORM ? grad[r][k] + upstream[k] : upstream[k];
                    sum_gate[k] += grad[r][k] * branch[k];
                    branch[k] = gate[k] * grad[r][k];
                }
                if (row < chunk.end) {
                    store_vector<T>(p.grad_branch.row<T>(batch, row) + i, branch, count, p.grad_branch.aligned);
                }
            }
            if constexpr (NORM) {  // without it the gradient of x is grad_sum itself
                if (row < chunk.end) {
                    store_vector<T>(p.grad_x.row<T>(batch, row) + i, grad[r], count, p.grad_x.aligned);
                }
            }
        }
    }
    if (p.partial != 0) {
        constexpr int COUNT = SUMS<NORM, RESIDUAL>;
        float* const partial = address_of<float>(p.partial) +
                               ((batch * p.chunks + blockIdx.x) * COUNT) * p.width + i;
#pragma unroll
        for (int k = 0; k < N; ++k) {
            if (k < count) {
                if constexpr (NORM) {
                    partial[k] = sum_shift[k];
                    partial[p.width + k] = sum_scale[k];
                }
                if constexpr (RESIDUAL) partial[(COUNT - 1) * p.width + k] = sum_gate[k];
            }
        }
    }
}

// The same for rows of any width: four passes over a row, sums over rows kept in `partial` (a thread owns its columns).
template <typename T, bool NORM, bool RESIDUAL>
__global__ void __launch_bounds__(WIDE_THREADS, 4) rows_backward_wide(BackwardArguments p) {
    SHARED_ARRAY(float, scratch_mean, WARP);
    SHARED_ARRAY(float, scratch_square, WARP);
    SHARED_ARRAY(float, scratch_dots, 2 * WARP);
    constexpr int COUNT = SUMS<NORM, RESIDUAL>;
    const int64_t batch = blockIdx.y;
    const Chunk chunk = chunk_of(p, blockIdx.x);
    const int step = blockDim.x;
    float* const partial = address_of<float>(p.partial) +
                           ((batch * p.chunks + blockIdx.x) * COUNT) * p.width;
    for (int row = chunk.begin; row < chunk.end; ++row) {
        float mean[1] = {0.0f}, rstd[1] = {0.0f}, dots[2] = {0.0f, 0.0f};
        if constexpr (NORM) {
            const T* const x = p.x.row<const T>(batch, row);
            const T* const grad_y = p.grad_y.row<const T>(batch, row);
            for (int i = threadIdx.x; i < p.width; i += step) mean[0] += to_float(x[i]);
            block_sum<1>(mean, scratch_mean);
            mean[0] /= p.width;
            for (int i = threadIdx.x; i < p.width; i += step) {
                const float centred = to_float(x[i]) - mean[0];
                rstd[0] += centred * centred;
            }
            block_sum<1>(rstd, scratch_square);
            rstd[0] = rsqrtf(rstd[0] / p.width + p.eps);
            for (int i = threadIdx.x; i < p.width; i += step) {
                const float factor = p.scale.address != 0 ? 1.0f + p.scale.at(batch, chunk.stream, i) : 1.0f;
                const float grad = to_float(grad_y[i]) * factor;
                dots[0] += grad;
                dots[1] += grad * (to_float(x[i]) - mean[0]) * rstd[0];
            }
            block_sum<2>(dots, scratch_dots);
        }
        for (int i = threadIdx.x; i < p.width; i += step) {
            float grad = 0.0f, sum_shift = 0.0f, sum_scale = 0.0f, sum_gate = 0.0f;
            if constexpr (NORM) {
                const float n = (to_float(p.x.row<const T>(batch, row)[i]) - mean[0]) * rstd[0];
                const float factor = p.scale.address != 0 ? 1.0f + p.scale.at(batch, chunk.stream, i) : 1.0f;
                sum_shift = to_float(p.grad_y.row<const T>(batch, row)[i]);
                sum_scale = sum_shift * n;
                grad = rstd[0] * (sum_shift * factor - dots[0] / p.width - n * (dots[1] / p.width));
            }
            if constexpr (RESIDUAL) {
                grad += to_float(p.grad_sum.row<const T>(batch, row)[i]);
                sum_gate = grad * to_float(p.branch.row<const T>(batch, row)[i]);
                const float gate = p.gate.address != 0 ? p.gate.at(batch, chunk.stream, i) : 1.0f;
                p.grad_branch.row<T>(batch, row)[i] = from_float<T>(gate * grad);
            }
            if constexpr (NORM) p.grad_x.row<T>(batch, row)[i] = from_float<T>(grad);
            if (p.partial != 0) {
                const bool fresh = row == chunk.begin;
                if constexpr (NORM) {
                    partial[i] = (fresh ? 0.0f : partial[i]) + sum_shift;
                    partial[p.width + i] = (fresh ? 0.0f : partial[p.width + i]) + sum_scale;
                }
                if constexpr (RESIDUAL) {
                    float& sum = partial[(COUNT - 1) * p.width + i];
                    sum = (fresh ? 0.0f : sum) + sum_gate;
                }
            }
        }
    }
}

inline void set_chunks(BackwardArguments& p, int64_t batch, int64_t length, int64_t width, int64_t split,
                       int64_t rows_per_chunk, double eps) {
    p.batch = static_cast<int>(batch);
    p.length = static_cast<int>(length);
    p.width = static_cast<int>(width);
    p.split = static_cast<int>(split);
    p.rows_per_chunk = static_cast<int>(rows_per_chunk);
    p.chunks_before = static_cast<int>(ceil_div(split, rows_per_chunk));
    p.chunks = p.chunks_before + static_cast<int>(ceil_div(length - split, rows_per_chunk));
    p.eps = static_cast<float>(eps);
}

template <bool NORM, bool RESIDUAL>
int launch_rows_backward(const BackwardArguments& p, ReduceArguments sums, int64_t dtype, int64_t stream) {
    if (p.width <= 0 || p.batch <= 0) return 0;
    if (p.chunks > 0) {
        const int status = with_type(dtype, [&](auto tag) {
            using T = typename decltype(tag)::type;
            const dim3 grid(static_cast<unsigned>(p.chunks), static_cast<unsigned>(p.batch));
            const int threads = static_cast<int>(ceil_div(ceil_div(p.width, VEC<T>), WARP) * WARP);
            if (threads <= BACKWARD_THREADS) {
                const auto kernel = rows_backward<T, NORM, RESIDUAL>;
                return LAUNCH(kernel, grid, threads, 0, stream, p);
            }
            const auto kernel = rows_backward_wide<T, NORM, RESIDUAL>;
            return LAUNCH(kernel, grid, WIDE_THREADS, 0, stream, p);
        });
        if (status != 0) return status;
    }
    if (p.partial == 0 && p.chunks > 0) return 0;
    sums.partial = p.partial;
    sums.chunks = p.chunks;
    sums.chunks_before = p.chunks_before;
    sums.sums = SUMS<NORM, RESIDUAL>;
    sums.width = p.width;
    bool wanted = false;
    for (int64_t output : sums.outputs) wanted = wanted || output != 0;
    if (!wanted) return 0;
    const dim3 grid(static_cast<unsigned>(ceil_div(p.width, WARP)), static_cast<unsigned>(p.batch * 2),
                    static_cast<unsigned>(sums.sums));
    return LAUNCH(reduce_chunks, grid, WARP * REDUCE_ROWS, 0, stream, sums);
}

}  // namespace flowmo
