// One guided Euler step on the sampler's state, and its gradient, in one pass each.
//
//   velocity = v_null + w (v - v_null);  z' = z - dt velocity (float32);  copy = z' in the type of v
#include "common.cuh"
#include "launchers.h"

using namespace flowmo;

namespace {

constexpr int THREADS = 256;

// N floats at p, 16 bytes at a time.
template <int N>
__device__ inline void load_state(const float* p, int count, bool aligned, float (&v)[N]) {
#pragma unroll
    for (int j = 0; j < N / 4; ++j) {
        float part[4];
        unpack<float>(load_vector(p + 4 * j, count - 4 * j, aligned), part);
#pragma unroll
        for (int k = 0; k < 4; ++k) v[4 * j + k] = part[k];
    }
}
template <int N>
__device__ inline void store_state(float* p, const float (&v)[N], int count, bool aligned) {
#pragma unroll
    for (int j = 0; j < N / 4; ++j) {
        const float part[4] = {v[4 * j], v[4 * j + 1], v[4 * j + 2], v[4 * j + 3]};
        store_vector<float>(p + 4 * j, part, count - 4 * j, aligned);
    }
}

__device__ inline int count_at(int64_t i, int64_t size, int most) {
    return static_cast<int>(smaller(most, size - i));
}

template <typename T>
__global__ void __launch_bounds__(THREADS)
    step(const float* z, const T* v, const T* v_null, float* z_next, T* copy, float dt, float w, int64_t size,
         bool aligned) {
    constexpr int N = VEC<T>;
    const int64_t i = (int64_t{blockIdx.x} * THREADS + threadIdx.x) * N;
    const int count = count_at(i, size, N);
    if (count <= 0) return;
    const uint4 raw = load_vector(v + i, count, aligned);
    uint4 raw_null = make_uint4(0u, 0u, 0u, 0u);
    if (v_null != nullptr) raw_null = load_vector(v_null + i, count, aligned);
    float state[N], velocity[N];
    load_state<N>(z + i, count, aligned, state);
    unpack<T>(raw, velocity);
    if (v_null != nullptr) {
        float null[N];
        unpack<T>(raw_null, null);
#pragma unroll
        for (int k = 0; k < N; ++k) velocity[k] = null[k] + w * (velocity[k] - null[k]);
    }
#pragma unroll
    for (int k = 0; k < N; ++k) state[k] -= dt * velocity[k];
    store_state<N>(z_next + i, state, count, aligned);
    store_vector<T>(copy + i, state, count, aligned);
}

// dz = dz' + dcopy;  dv = -dt w dz;  dv_null = -dt (1 - w) dz.
template <typename T>
__global__ void __launch_bounds__(THREADS)
    step_backward(const float* grad_next, const T* grad_copy, float* grad_z, T* grad_v, T* grad_null, float dt, float w,
                  int64_t size, bool aligned) {
    constexpr int N = VEC<T>;
    const int64_t i = (int64_t{blockIdx.x} * THREADS + threadIdx.x) * N;
    const int count = count_at(i, size, N);
    if (count <= 0) return;
    float grad[N] = {};
    if (grad_next != nullptr) load_state<N>(grad_next + i, count, aligned, grad);
    if (grad_copy != nullptr) {
        float other[N];
        unpack<T>(load_vector(grad_copy + i, count, aligned), other);
#pragma unroll
        for (int k = 0; k < N; ++k) grad[k] += other[k];
    }
    store_state<N>(grad_z + i, grad, count, aligned);
    float out[N];
    if (grad_null != nullptr) {
#pragma unroll
        for (int k = 0; k < N; ++k) out[k] = -dt * (1.0f - w) * grad[k];
        store_vector<T>(grad_null + i, out, count, aligned);
    }
    const float factor = grad_null != nullptr ? -dt * w : -dt;
#pragma unroll
    for (int k = 0; k < N; ++k) out[k] = factor * grad[k];
    store_vector<T>(grad_v + i, out, count, aligned);
}

}  // namespace

int euler_step(int64_t z_next, int64_t copy, int64_t z, int64_t v, int64_t v_null, double dt, double w, int64_t size,
               int64_t dtype, int64_t stream) {
    if (size == 0) return 0;
    const bool aligned = is_aligned(z_next) && is_aligned(copy) && is_aligned(z) && is_aligned(v) && is_aligned(v_null);
    return with_type(dtype, [&](auto tag) {
        using T = typename decltype(tag)::type;
        const auto kernel = step<T>;
        const unsigned blocks = static_cast<unsigned>(ceil_div(size, THREADS * VEC<T>));
        return LAUNCH(kernel, blocks, THREADS, 0, stream, address_of<const float>(z), address_of<const T>(v),
                      address_of<const T>(v_null), address_of<float>(z_next), address_of<T>(copy),
                      static_cast<float>(dt), static_cast<float>(w), size, aligned);
    });
}

int euler_step_backward(int64_t grad_z, int64_t grad_v, int64_t grad_null, int64_t grad_next, int64_t grad_copy,
                        double dt, double w, int64_t size, int64_t dtype, int64_t stream) {
    if (size == 0) return 0;
    const bool aligned = is_aligned(grad_z) && is_aligned(grad_v) && is_aligned(grad_null) && is_aligned(grad_next) &&
                         is_aligned(grad_copy);
    return with_type(dtype, [&](auto tag) {
        using T = typename decltype(tag)::type;
        const auto kernel = step_backward<T>;
        const unsigned blocks = static_cast<unsigned>(ceil_div(size, THREADS * VEC<T>));
        return LAUNCH(kernel, blocks, THREADS, 0, stream, address_of<const float>(grad_next),
                      address_of<const T>(grad_copy), address_of<float>(grad_z), address_of<T>(grad_v),
                      address_of<T>(grad_null), static_cast<float>(dt), static_cast<float>(w), size, aligned);
    });
}
