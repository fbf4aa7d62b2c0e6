// Per-head RMSNorm of q and k with a learned gain, then rotation of adjacent pairs, in a joint [B, L, 3, H, d] buffer.
//
//   n = x / sqrt(mean(x^2) + eps);  u = g n;  (y_2i, y_2i+1) = (u_2i cos_i - u_2i+1 sin_i, u_2i+1 cos_i + u_2i sin_i)
//
// Heads of 32, 64 and 96 channels: 32 / VEC lanes share a head, each holds one, two or three 16-byte vectors of q, of k
// and of v, so that no lane idles at 96. Any other even size: one warp a head. The gains' gradients are summed in
// registers over a chunk of tokens, then over the chunks in a fixed order.
#include "launchers.h"
#include "reduce.cuh"
#include "views.cuh"

using namespace flowmo;

namespace {

// One [B, L, 3, H, d] tensor with contiguous channels; strides count elements.
struct Heads {
    int64_t address, batch_stride, token_stride, part_stride, head_stride;
    bool aligned;

    template <typename T>
    __device__ T* head(int64_t batch, int64_t token, int part, int64_t head) const {
        return address_of<T>(address) + batch * batch_stride + token * token_stride + part * part_stride +
               head * head_stride;
    }
};

Heads make_heads(int64_t address, int64_t batch, int64_t token, int64_t part, int64_t head, int64_t dtype) {
    const int64_t size = number_size(dtype);
    return {address, batch, token, part, head,
            is_aligned(address) && is_aligned(batch * size) && is_aligned(token * size) && is_aligned(part * size) &&
                is_aligned(head * size)};
}

struct Arguments {
    Heads x, y;      // forward: in and out; backward: in, and the gradient of out
    Heads grad_x;    // backward
    int64_t gain[2];  // of q and of k, [d] or [2, d]
    int gain_stride, gain_dtype;
    int64_t cosines, sines;  // float32 [L, d / 2]
    int64_t partial;         // backward: [B chunks, 2, d] float32, the chunks before `split` first
    bool tables_aligned, copy_v;
    int batch, length, heads, width, split;
    int rows_per_chunk, chunks_before, chunks;
    float eps;
};

constexpr int THREADS = 256;

template <int N>
__device__ inline void load_floats(const float* p, bool aligned, float (&v)[N]) {
    if constexpr (N == 4) {
        if (aligned) {
            unpack<float>(load_16_bytes(p), v);
            return;
        }
    }
#pragma unroll
    for (int i = 0; i < N; ++i) v[i] = p[i];
}

// Lanes that share a head add their values.
template <int LANES>
__device__ inline float group_sum(float v) {
#pragma unroll
    for (int offset = LANES / 2; offset > 0; offset /= 2) v += __shfl_xor_sync(ALL_LANES, v, offset);
    return v;
}

template <int N, bool BACK>
__device__ inline void rotate(const float (&cosine)[N / 2], const float (&sine)[N / 2], float (&v)[N]) {
#pragma unroll
    for (int k = 0; k < N / 2; ++k) {
        const float even = v[2 * k], odd = v[2 * k + 1], s = BACK ? -sine[k] : sine[k];
        v[2 * k] = even * cosine[k] - odd * s;
        v[2 * k + 1] = odd * cosine[k] + even * s;
    }
}

// Not p.gain[part]: indexing an argument by a variable would copy it to local memory.
__device__ inline const void* gain_of(const Arguments& p, int part) {
    return address_of<const void>(part == 0 ? p.gain[0] : p.gain[1]);
}

template <typename T, int NV>
__global__ void __launch_bounds__(THREADS) forward_groups(Arguments p) {
    constexpr int N = VEC<T>, LANES = 32 / N;  // lanes to a head
    const int64_t item = (int64_t{blockIdx.x} * THREADS + threadIdx.x) / LANES;
    const int sub = threadIdx.x % LANES;
    const int64_t row = item / p.heads;
    const int64_t head = item - row * p.heads;
    const int64_t batch = row / p.length;
    const int64_t token = row - batch * p.length;
    const bool here = batch < p.batch;  // every lane of a warp must reach the shuffles
    const int parts = p.copy_v ? 3 : 2;

    uint4 raw[3][NV];
#pragma unroll
    for (int part = 0; part < 3; ++part) {
        const T* const x = p.x.head<const T>(batch, token, part, head);
#pragma unroll
        for (int j = 0; j < NV; ++j) {
            raw[part][j] = load_vector(x + (j * LANES + sub) * N, here && part < parts ? N : 0, p.x.aligned);
        }
    }
    float cosine[NV][N / 2], sine[NV][N / 2];
#pragma unroll
    for (int j = 0; j < NV; ++j) {
        const int64_t i = (here ? token : 0) * (p.width / 2) + (j * LANES + sub) * (N / 2);
        load_floats<N / 2>(address_of<const float>(p.cosines) + i, p.tables_aligned, cosine[j]);
        load_floats<N / 2>(address_of<const float>(p.sines) + i, p.tables_aligned, sine[j]);
    }
#pragma unroll
    for (int part = 0; part < 2; ++part) {
        float v[NV][N], squares = 0.0f;
#pragma unroll
        for (int j = 0; j < NV; ++j) {
            unpack<T>(raw[part][j], v[j]);
#pragma unroll
            for (int k = 0; k < N; ++k) squares += v[j][k] * v[j][k];
        }
        const float scale = rsqrtf(group_sum<LANES>(squares) / p.width + p.eps);
        const int64_t gain_row = token >= p.split ? p.gain_stride : 0;
#pragma unroll
        for (int j = 0; j < NV; ++j) {
            const int i = (j * LANES + sub) * N;
            float gain[N];
            load_numbers<N>(gain_of(p, part), p.gain_dtype, gain_row + i, N, p.tables_aligned, gain);
#pragma unroll
            for (int k = 0; k < N; ++k) v[j][k] *= scale * gain[k];
            rotate<N, false>(cosine[j], sine[j], v[j]);
            if (here) store_vector<T>(p.y.head<T>(batch, token, part, head) + i, v[j], N, p.y.aligned);
        }
    }
    if (p.copy_v && here) {
#pragma unroll
        for (int j = 0; j < NV; ++j) {
            T* const y = p.y.head<T>(batch, token, 2, head) + (j * LANES + sub) * N;
            store_raw<T>(y, raw[2][j], N, p.y.aligned);
        }
    }
}

// Any even head size: one warp a head, x read twice.
template <typename T>
__global__ void __launch_bounds__(THREADS, 4) forward_warps(Arguments p) {
    const int64_t item = (int64_t{blockIdx.x} * THREADS + threadIdx.x) / WARP;
    const int lane = threadIdx.x % WARP;
    const int64_t row = item / p.heads;
    const int64_t head = item - row * p.heads;
    const int64_t batch = row / p.length;
    const int64_t token = row - batch * p.length;
    if (batch >= p.batch) return;
    for (int part = 0; part < (p.copy_v ? 3 : 2); ++part) {
        const T* const x = p.x.head<const T>(batch, token, part, head);
        T* const y = p.y.head<T>(batch, token, part, head);
        if (part == 2) {
            for (int i = lane; i < p.width; i += WARP) y[i] = x[i];
            continue;
        }
        float squares = 0.0f;
        for (int i = lane; i < p.width; i += WARP) squares += to_float(x[i]) * to_float(x[i]);
        const float scale = rsqrtf(warp_sum(squares) / p.width + p.eps);
        const int64_t gain_row = token >= p.split ? p.gain_stride : 0;
        for (int i = lane; i < p.width / 2; i += WARP) {
            const float cosine = address_of<const float>(p.cosines)[token * (p.width / 2) + i];
            const float sine = address_of<const float>(p.sines)[token * (p.width / 2) + i];
            const float even = to_float(x[2 * i]) * scale * load_number(gain_of(p, part), p.gain_dtype, gain_row + 2 * i);
            const float odd =
                to_float(x[2 * i + 1]) * scale * load_number(gain_of(p, part), p.gain_dtype, gain_row + 2 * i + 1);
            y[2 * i] = from_float<T>(even * cosine - odd * sine);
            y[2 * i + 1] = from_float<T>(odd * cosine + even * sine);
        }
    }
}

struct Span {
    int begin, end, stream;
    int64_t partial_row;  // chunks of all images, those before `split` first
};
__device__ inline Span span_of(const Arguments& p, int chunk, int64_t batch) {
    if (chunk < p.chunks_before) {
        const int begin = chunk * p.rows_per_chunk;
        return {begin, static_cast<int>(smaller(begin + p.rows_per_chunk, p.split)), 0,
                batch * p.chunks_before + chunk};
    }
    const int after = chunk - p.chunks_before;
    const int begin = p.split + after * p.rows_per_chunk;
    return {begin, static_cast<int>(smaller(begin + p.rows_per_chunk, p.length)), 1,
            int64_t{p.batch} * p.chunks_before + batch * (p.chunks - p.chunks_before) + after};
}

// Grid (chunks, B, 3): q, k, and v whose gradient is copied.
template <typename T, int NV>
__global__ void __launch_bounds__(THREADS) backward_groups(Arguments p) {
    constexpr int N = VEC<T>, LANES = 32 / N, GROUPS = THREADS / LANES, WIDTH = 32 * NV;
    SHARED_ARRAY(float, sums, THREADS / WARP * WIDTH);
    const int64_t batch = blockIdx.y;
    const int part = blockIdx.z;
    const Span span = span_of(p, blockIdx.x, batch);
    const int sub = threadIdx.x % LANES, group = threadIdx.x / LANES;
    const int items = (span.end - span.begin) * p.heads;
    float gain[NV][N], sum[NV][N] = {};
    if (part < 2) {
#pragma unroll
        for (int j = 0; j < NV; ++j) {
            load_numbers<N>(gain_of(p, part), p.gain_dtype,
                            (span.stream == 1 ? p.gain_stride : 0) + (j * LANES + sub) * N, N, p.tables_aligned,
                            gain[j]);
        }
    }
    for (int first = 0; first < items; first += GROUPS) {
        const int item = first + group;
        const bool here = item < items;
        const int64_t token = here ? span.begin + item / p.heads : span.begin;
        const int64_t head = here ? item % p.heads : 0;
        uint4 raw_x[NV], raw_grad[NV];
#pragma unroll
        for (int j = 0; j < NV; ++j) {
            const int i = (j * LANES + sub) * N;
            raw_grad[j] = load_vector(p.y.head<const T>(batch, token, part, head) + i, here ? N : 0, p.y.aligned);
            raw_x[j] = load_vector(p.x.head<const T>(batch, token, part, head) + i, here && part < 2 ? N : 0,
                                   p.x.aligned);
        }
        T* const grad_x = p.grad_x.head<T>(batch, token, part, head);
        if (part == 2) {
#pragma unroll
            for (int j = 0; j < NV; ++j) {
                if (here) store_raw<T>(grad_x + (j * LANES + sub) * N, raw_grad[j], N, p.grad_x.aligned);
            }
            continue;
        }
        float n[NV][N], grad[NV][N], squares = 0.0f, dot = 0.0f;
#pragma unroll
        for (int j = 0; j < NV; ++j) {
            unpack<T>(raw_x[j], n[j]);
#pragma unroll
            for (int k = 0; k < N; ++k) squares += n[j][k] * n[j][k];
        }
        const float scale = rsqrtf(group_sum<LANES>(squares) / p.width + p.eps);
#pragma unroll
        for (int j = 0; j < NV; ++j) {
            float cosine[N / 2], sine[N / 2];
            const int64_t i = token * (p.width / 2) + (j * LANES + sub) * (N / 2);
            load_floats<N / 2>(address_of<const float>(p.cosines) + i, p.tables_aligned, cosine);
            load_floats<N / 2>(address_of<const float>(p.sines) + i, p.tables_aligned, sine);
            unpack<T>(raw_grad[j], grad[j]);
            rotate<N, true>(cosine, sine, grad[j]);
#pragma unroll
            for (int k = 0; k < N; ++k) {
                n[j][k] *= scale;
                sum[j][k] += grad[j][k] * n[j][k];
                grad[j][k] *= gain[j][k];
                dot += grad[j][k] * n[j][k];
            }
        }
        const float mean_dot = group_sum<LANES>(dot) / p.width;
#pragma unroll
        for (int j = 0; j < NV; ++j) {
#pragma unroll
            for (int k = 0; k < N; ++k) grad[j][k] = scale * (grad[j][k] - n[j][k] * mean_dot);
            if (here) store_vector<T>(grad_x + (j * LANES + sub) * N, grad[j], N, p.grad_x.aligned);
        }
    }
    if (part == 2) return;
    // Groups of a warp first, then the warps.
#pragma unroll
    for (int j = 0; j < NV; ++j) {
#pragma unroll
        for (int k = 0; k < N; ++k) {
#pragma unroll
            for (int offset = LANES; offset < WARP; offset *= 2) {
                sum[j][k] += __shfl_xor_sync(ALL_LANES, sum[j][k], offset);
            }
            if (threadIdx.x % WARP < LANES) sums[threadIdx.x / WARP * WIDTH + (j * LANES + sub) * N + k] = sum[j][k];
        }
    }
    __syncthreads();
    if (threadIdx.x < WIDTH) {
        float total = 0.0f;
        for (int w = 0; w < THREADS / WARP; ++w) total += sums[w * WIDTH + threadIdx.x];
        address_of<float>(p.partial)[(span.partial_row * 2 + part) * WIDTH + threadIdx.x] = total;
    }
}

// Any even head size: one warp a chunk; a lane owns pairs and keeps their sums in `partial`.
template <typename T>
__global__ void __launch_bounds__(WARP) backward_warps(Arguments p) {
    const int64_t batch = blockIdx.y;
    const int part = blockIdx.z;
    const Span span = span_of(p, blockIdx.x, batch);
    const int lane = threadIdx.x;
    const int64_t gain_row = span.stream == 1 ? p.gain_stride : 0;
    float* const partial = address_of<float>(p.partial) + (span.partial_row * 2 + part) * p.width;
    const auto gain = [&](int i) { return load_number(gain_of(p, part), p.gain_dtype, gain_row + i); };
    if (part < 2) {
        for (int i = lane; i < p.width / 2; i += WARP) partial[2 * i] = partial[2 * i + 1] = 0.0f;
    }
    for (int item = 0; item < (span.end - span.begin) * p.heads; ++item) {
        const int64_t token = span.begin + item / p.heads, head = item % p.heads;
        const T* const x = p.x.head<const T>(batch, token, part, head);
        const T* const grad_y = p.y.head<const T>(batch, token, part, head);
        T* const grad_x = p.grad_x.head<T>(batch, token, part, head);
        if (part == 2) {
            for (int i = lane; i < p.width; i += WARP) grad_x[i] = grad_y[i];
            continue;
        }
        const auto unrotated = [&](int i, float (&grad)[2]) {
            const float cosine[1] = {address_of<const float>(p.cosines)[token * (p.width / 2) + i]};
            const float sine[1] = {address_of<const float>(p.sines)[token * (p.width / 2) + i]};
            grad[0] = to_float(grad_y[2 * i]);
            grad[1] = to_float(grad_y[2 * i + 1]);
            rotate<2, true>(cosine, sine, grad);
        };
        float squares = 0.0f, dot = 0.0f;
        for (int i = lane; i < p.width; i += WARP) squares += to_float(x[i]) * to_float(x[i]);
        const float scale = rsqrtf(warp_sum(squares) / p.width + p.eps);
        for (int i = lane; i < p.width / 2; i += WARP) {
            float grad[2];
            unrotated(i, grad);
            for (int k = 0; k < 2; ++k) {
                const float n = to_float(x[2 * i + k]) * scale;
                partial[2 * i + k] += grad[k] * n;
                dot += grad[k] * gain(2 * i + k) * n;
            }
        }
        const float mean_dot = warp_sum(dot) / p.width;
        for (int i = lane; i < p.width / 2; i += WARP) {
            float grad[2];
            unrotated(i, grad);
            for (int k = 0; k < 2; ++k) {
                const float n = to_float(x[2 * i + k]) * scale;
                grad_x[2 * i + k] = from_float<T>(scale * (grad[k] * gain(2 * i + k) - n * mean_dot));
            }
        }
    }
}

// Calls body with the kernel's number of vectors a lane for head sizes 32, 64 and 96, and with 0 for the others.
template <typename Body>
int with_head_size(int64_t width, Body body) {
    switch (width) {
        case 32: return body(std::integral_constant<int, 1>{});
        case 64: return body(std::integral_constant<int, 2>{});
        case 96: return body(std::integral_constant<int, 3>{});
        default: return body(std::integral_constant<int, 0>{});
    }
}

}  // namespace

int qk_norm_rope(int64_t y, int64_t y_batch, int64_t y_token, int64_t y_part, int64_t y_head, int64_t x,
                 int64_t x_batch, int64_t x_token, int64_t x_part, int64_t x_head, int64_t q_gain, int64_t k_gain,
                 int64_t gain_stride, int64_t gain_dtype, int64_t cosines, int64_t sines, int64_t batch,
                 int64_t length, int64_t heads, int64_t width, int64_t split, int64_t copy_v, double eps,
                 int64_t dtype, int64_t stream) {
    if (batch * length * heads * width == 0) return 0;
    Arguments p = {};
    p.x = make_heads(x, x_batch, x_token, x_part, x_head, dtype);
    p.y = make_heads(y, y_batch, y_token, y_part, y_head, dtype);
    p.gain[0] = q_gain;
    p.gain[1] = k_gain;
    p.gain_stride = static_cast<int>(gain_stride);
    p.gain_dtype = static_cast<int>(gain_dtype);
    p.cosines = cosines;
    p.sines = sines;
    p.tables_aligned = is_aligned(cosines) && is_aligned(sines) && is_aligned(q_gain) && is_aligned(k_gain);
    p.copy_v = copy_v != 0;
    p.batch = static_cast<int>(batch);
    p.length = static_cast<int>(length);
    p.heads = static_cast<int>(heads);
    p.width = static_cast<int>(width);
    p.split = static_cast<int>(split);
    p.eps = static_cast<float>(eps);
    return with_type(dtype, [&](auto tag) {
        using T = typename decltype(tag)::type;
        return with_head_size(width, [&](auto size) {
            constexpr int NV = decltype(size)::value;
            const int64_t items = batch * length * heads;
            if constexpr (NV > 0) {
                const auto kernel = forward_groups<T, NV>;
                const int64_t blocks = ceil_div(items * (32 / VEC<T>), THREADS);
                return LAUNCH(kernel, static_cast<unsigned>(blocks), THREADS, 0, stream, p);
            } else {
                const auto kernel = forward_warps<T>;
                const int64_t blocks = ceil_div(items * WARP, THREADS);
                return LAUNCH(kernel, static_cast<unsigned>(blocks), THREADS, 0, stream, p);
            }
        });
    });
}

int qk_norm_rope_backward(int64_t grad_x, int64_t grad_x_batch, int64_t grad_x_token, int64_t grad_x_part,
                          int64_t grad_x_head, int64_t grad_q_gain, int64_t grad_k_gain, int64_t partial,
                          int64_t grad_y, int64_t grad_y_batch, int64_t grad_y_token, int64_t grad_y_part,
                          int64_t grad_y_head, int64_t x, int64_t x_batch, int64_t x_token, int64_t x_part,
                          int64_t x_head, int64_t q_gain, int64_t k_gain, int64_t gain_stride, int64_t gain_dtype,
                          int64_t cosines, int64_t sines, int64_t batch, int64_t length, int64_t heads,
                          int64_t width, int64_t split, int64_t rows_per_chunk, double eps, int64_t dtype,
                          int64_t stream) {
    if (width == 0) return 0;
    Arguments p = {};
    p.x = make_heads(x, x_batch, x_token, x_part, x_head, dtype);
    p.y = make_heads(grad_y, grad_y_batch, grad_y_token, grad_y_part, grad_y_head, dtype);
    p.grad_x = make_heads(grad_x, grad_x_batch, grad_x_token, grad_x_part, grad_x_head, dtype);
    p.gain[0] = q_gain;
    p.gain[1] = k_gain;
    p.gain_stride = static_cast<int>(gain_stride);
    p.gain_dtype = static_cast<int>(gain_dtype);
    p.cosines = cosines;
    p.sines = sines;
    p.partial = partial;
    p.tables_aligned = is_aligned(cosines) && is_aligned(sines) && is_aligned(q_gain) && is_aligned(k_gain);
    p.batch = static_cast<int>(batch);
    p.length = static_cast<int>(length);
    p.heads = static_cast<int>(heads);
    p.width = static_cast<int>(width);
    p.split = static_cast<int>(split);
    p.rows_per_chunk = static_cast<int>(rows_per_chunk);
    p.chunks_before = static_cast<int>(ceil_div(split, rows_per_chunk));
    p.chunks = p.chunks_before + static_cast<int>(ceil_div(length - split, rows_per_chunk));
    p.eps = static_cast<float>(eps);
    const bool empty = batch * length * heads == 0;
    if (!empty) {
        const int status = with_type(dtype, [&](auto tag) {
            using T = typename decltype(tag)::type;
            return with_head_size(width, [&](auto size) {
                constexpr int NV = decltype(size)::value;
                const dim3 grid(static_cast<unsigned>(p.chunks), static_cast<unsigned>(batch), 3);
                if constexpr (NV > 0) {
                    const auto kernel = backward_groups<T, NV>;
                    return LAUNCH(kernel, grid, THREADS, 0, stream, p);
                } else {
                    const auto kernel = backward_warps<T>;
                    return LAUNCH(kernel, grid, WARP, 0, stream, p);
                }
            });
        });
        if (status != 0) return status;
    }
    ReduceArguments sums = {};
    sums.partial = partial;
    sums.outputs[0] = grad_q_gain;
    sums.outputs[1] = grad_k_gain;
    sums.streams[0] = sums.streams[1] = gain_stride > 0 ? 2 : 1;
    sums.chunks_before = empty ? 0 : p.batch * p.chunks_before;
    sums.chunks = empty ? 0 : p.batch * p.chunks;
    sums.sums = 2;
    sums.width = p.width;
    const dim3 grid(static_cast<unsigned>(ceil_div(width, WARP)), 2, 2);
    return LAUNCH(reduce_chunks, grid, WARP * REDUCE_ROWS, 0, stream, sums);
}
