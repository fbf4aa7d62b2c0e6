// Adam, the hold of weight norms and the exponential average over whole lists of weights in one pass (two where a whole
// matrix's norm is held, because that norm is known only after the first).
//
//   m = m + (1 - b1)(g - m);  v = b2 v + (1 - b2) g^2;  w -= rate * m / (sqrt(v) * root + eps)
//   w *= |w_0| / |w|;  a = a + (1 - decay)(w - a)
//
// `table` [tensors, 6] holds addresses: weight, gradient, first and second moment, average, norm (0: not there).
// `found_inf` (0: not there) is one number; where it is not zero, every kernel returns at once and nothing changes.
// `chunks` [n, 3] says which part of which tensor a block takes; a chunk is a row where the norm of rows is held.
#include "common.cuh"
#include "launchers.h"

using namespace flowmo;

namespace {

constexpr int THREADS = 256;
enum Hold : int { FREE = 0, WHOLE = 1, ROWS = 2 };

struct Update {
    const int64_t* table;
    const int64_t* chunks;
    float* squares;  // one per chunk, with WHOLE
    const float* found_inf;
    float rate, first_share, second_share, keep_second, root, eps, average_share;
    bool adam, average;
    int hold;
};

struct Tensors {
    float *weight, *first, *second, *average;
    const float *grad, *norm;
};
__device__ inline Tensors tensors_of(const int64_t* table, int64_t tensor, int64_t start) {
    const int64_t* const row = table + tensor * 6;
    const auto at = [&](int column) { return row[column] == 0 ? nullptr : address_of<float>(row[column]) + start; };
    return {at(0), at(2), at(3), at(4), at(1), row[5] == 0 ? nullptr : address_of<const float>(row[5])};
}

__device__ inline bool skipped(const float* found_inf) { return found_inf != nullptr && *found_inf != 0.0f; }

__device__ inline bool all_aligned(const Tensors& t) {
    const auto bits = reinterpret_cast<uintptr_t>(t.weight) | reinterpret_cast<uintptr_t>(t.grad) |
                      reinterpret_cast<uintptr_t>(t.first) | reinterpret_cast<uintptr_t>(t.second) |
                      reinterpret_cast<uintptr_t>(t.average);
    return bits % 16 == 0;
}

__device__ inline float hold_scale(float squares, float held) {
    const float now = sqrtf(squares);
    return now > 0.0f && held > 0.0f ? held / now : 1.0f;
}

__device__ inline void load_four(const float* p, int count, bool aligned, float (&v)[4]) {
    unpack<float>(p == nullptr ? make_uint4(0u, 0u, 0u, 0u) : load_vector(p, count, aligned), v);
}

// w *= scale, and the average after it.
__device__ inline void rescale(const Tensors& t, int64_t length, bool aligned, float scale, bool average, float share) {
    for (int64_t i = threadIdx.x * 4; i < length; i += THREADS * 4) {
        const int count = static_cast<int>(smaller(4, length - i));
        float w[4], a[4];
        load_four(t.weight + i, count, aligned, w);
        if (average) load_four(t.average + i, count, aligned, a);
#pragma unroll
        for (int k = 0; k < 4; ++k) w[k] *= scale;
        store_vector<float>(t.weight + i, w, count, aligned);
        if (average) {
#pragma unroll
            for (int k = 0; k < 4; ++k) a[k] += share * (w[k] - a[k]);
            store_vector<float>(t.average + i, a, count, aligned);
        }
    }
}

__global__ void __launch_bounds__(THREADS) update(Update u) {
    SHARED_ARRAY(float, scratch, WARP);
    if (skipped(u.found_inf)) return;
    const int64_t* const chunk = u.chunks + 3 * int64_t{blockIdx.x};
    const int64_t tensor = chunk[0], start = chunk[1], length = chunk[2];
    const Tensors t = tensors_of(u.table, tensor, start);
    const bool aligned = all_aligned(t);
    const bool held = u.hold != FREE && t.norm != nullptr;
    const bool average_now = u.average && !held;  // a held weight is averaged after it is rescaled
    float squares[1] = {0.0f};
    for (int64_t i = threadIdx.x * 4; i < length; i += THREADS * 4) {
        const int count = static_cast<int>(smaller(4, length - i));
        float w[4], g[4], m[4], v[4], a[4];
        load_four(t.weight + i, count, aligned, w);
        if (u.adam) {
            load_four(t.grad + i, count, aligned, g);
            load_four(t.first + i, count, aligned, m);
            load_four(t.second + i, count, aligned, v);
        }
        if (average_now) load_four(t.average + i, count, aligned, a);
        if (u.adam) {
#pragma unroll
            for (int k = 0; k < 4; ++k) {
                m[k] += u.first_share * (g[k] - m[k]);
                v[k] = u.keep_second * v[k] + u.second_share * g[k] * g[k];
                w[k] -= k < count ? u.rate * m[k] / (sqrtf(v[k]) * u.root + u.eps) : 0.0f;
            }
            store_vector<float>(t.first + i, m, count, aligned);
            store_vector<float>(t.second + i, v, count, aligned);
            store_vector<float>(t.weight + i, w, count, aligned);
        }
#pragma unroll
        for (int k = 0; k < 4; ++k) squares[0] += w[k] * w[k];  // zeros beyond the end
        if (average_now) {
#pragma unroll
            for (int k = 0; k < 4; ++k) a[k] += u.average_share * (w[k] - a[k]);
            store_vector<float>(t.average + i, a, count, aligned);
        }
    }
    if (!held) return;
    block_sum<1>(squares, scratch);
    if (u.hold == WHOLE) {
        if (threadIdx.x == 0) u.squares[blockIdx.x] = squares[0];
        return;
    }
    // A thread reads again what it wrote itself.
    const int64_t row = length > 0 ? start / length : 0;
    rescale(t, length, aligned, hold_scale(squares[0], t.norm[row]), u.average, u.average_share);
}

// The factor of each held tensor: its chunks' squares, added in order.
__global__ void __launch_bounds__(THREADS)
    find_scales(const int64_t* table, const int64_t* first_chunks, const float* squares, float* scales) {
    SHARED_ARRAY(float, scratch, WARP);
    const int64_t tensor = blockIdx.x;
    if (table[tensor * 6 + 5] == 0) {
        if (threadIdx.x == 0) scales[tensor] = 1.0f;
        return;
    }
    float total[1] = {0.0f};
    for (int64_t c = first_chunks[tensor] + threadIdx.x; c < first_chunks[tensor + 1]; c += THREADS) total[0] += squares[c];
    block_sum<1>(total, scratch);
    if (threadIdx.x == 0) scales[tensor] = hold_scale(total[0], *address_of<const float>(table[tensor * 6 + 5]));
}

__global__ void __launch_bounds__(THREADS) rescale_chunks(Update u, const float* scales) {
    if (skipped(u.found_inf)) return;
    const int64_t* const chunk = u.chunks + 3 * int64_t{blockIdx.x};
    const Tensors t = tensors_of(u.table, chunk[0], chunk[1]);
    if (t.norm == nullptr) return;
    rescale(t, chunk[2], all_aligned(t), scales[chunk[0]], u.average, u.average_share);
}

}  // namespace

int adam_hold_ema(int64_t table, int64_t chunks, int64_t first_chunks, int64_t squares, int64_t scales,
                  int64_t found_inf, int64_t tensors, int64_t n_chunks, int64_t adam, int64_t hold, int64_t average,
                  double rate, double beta1, double beta2, double root, double eps, double decay, int64_t stream) {
    if (n_chunks == 0) return 0;
    Update u = {};
    u.table = address_of<const int64_t>(table);
    u.chunks = address_of<const int64_t>(chunks);
    u.squares = address_of<float>(squares);
    u.found_inf = address_of<const float>(found_inf);
    u.rate = static_cast<float>(rate);
    u.first_share = static_cast<float>(1.0 - beta1);
    u.second_share = static_cast<float>(1.0 - beta2);
    u.keep_second = static_cast<float>(beta2);
    u.root = static_cast<float>(root);
    u.eps = static_cast<float>(eps);
    u.average_share = static_cast<float>(1.0 - decay);
    u.adam = adam != 0;
    u.average = average != 0;
    u.hold = static_cast<int>(hold);
    const int updated = LAUNCH(update, static_cast<unsigned>(n_chunks), THREADS, 0, stream, u);
    if (updated != 0 || hold != WHOLE) return updated;
    const int found = LAUNCH(find_scales, static_cast<unsigned>(tensors), THREADS, 0, stream, u.table,
                             address_of<const int64_t>(first_chunks), u.squares, address_of<float>(scales));
    if (found != 0) return found;
    return LAUNCH(rescale_chunks, static_cast<unsigned>(n_chunks), THREADS, 0, stream, u, address_of<const float>(scales));
}
