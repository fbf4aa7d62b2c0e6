// Lookup-free quantization: signs, ballot-packed token indices, binary entropies, and the codebook entropy through the
// factors of its 2^E probabilities.
//
// Token n = t F + f of a [rows, C] latent (F = C / E) holds bit k of channel k F + f. With p_k = sigmoid(4 x_k / T) the
// soft assignment factorizes, and a code is a pair (i, j) of half-codes of E / 2 and E - E / 2 bits:
//
//   P[j, i] = 1/N sum_n B[n, j] A[n, i],    A, B = products of the bits' probabilities
//
// Blocks accumulate A^T B over a stretch of tokens in registers; later kernels add the stretches in a fixed order.
// Backward, with G = dH/dP:  dA = B G / N, dB = A G^T / N, and bit k of a half receives
// (1 - p_k) sum_{bit set} dA A - p_k sum_{bit clear} dA A: no division by a probability.
#include "common.cuh"
#include "launchers.h"

using namespace flowmo;

namespace {

constexpr int THREADS = 256;
constexpr int MOST_BITS = 20;

struct Bit {
    float set, clear, logit;  // probabilities of the bit, and its logit
};
__device__ inline Bit bit_of(float x, float logit_scale) {
    const float logit = x * logit_scale;
    const float e = expf(-fabsf(logit));
    const float large = 1.0f / (1.0f + e), small = e * large;
    return logit >= 0.0f ? Bit{large, small, logit} : Bit{small, large, logit};
}

// ---- signs, tokens, sums over elements ------------------------------------------------------------------------------

constexpr int QUANTIZE_WARPS = THREADS / WARP;

// A warp takes a row at a time: 32 channels give 32 bits by one ballot, and lane f gathers the bits of token f.
template <typename T>
__global__ void __launch_bounds__(THREADS)
    quantize(const T* x, T* codes, int64_t* tokens, float* sums, int64_t rows, int64_t stride, int channels, int bits,
             float logit_scale) {
    DYNAMIC_SHARED(uint32_t, signs);  // [warps, words]
    SHARED_ARRAY(float, scratch, 2 * WARP);
    const int lane = threadIdx.x % WARP, warp = threadIdx.x / WARP;
    const int words = (channels + WARP - 1) / WARP, factors = channels / bits;
    uint32_t* const mine = signs + warp * words;
    float sum[2] = {0.0f, 0.0f};  // binary entropies, squared distances
    for (int64_t row = int64_t{blockIdx.x} * QUANTIZE_WARPS + warp; row < rows;
         row += int64_t{gridDim.x} * QUANTIZE_WARPS) {
        for (int word = 0; word < words; ++word) {
            const int c = word * WARP + lane;
            const float v = c < channels ? to_float(x[row * stride + c]) : 0.0f;
            const bool positive = c < channels && v > 0.0f;
            const uint32_t ballot = __ballot_sync(ALL_LANES, positive);
            if (lane == 0) mine[word] = ballot;
            if (c < channels) {
                const float q = positive ? 1.0f : -1.0f;
                codes[row * channels + c] = from_float<T>(q);
                const Bit b = bit_of(v, logit_scale);
                const float a = fabsf(b.logit), e = expf(-a);
                sum[0] += log1pf(e) + a * e / (1.0f + e);
                sum[1] += (v - q) * (v - q);
            }
        }
        __syncwarp();
        for (int f = lane; f < factors; f += WARP) {
            uint32_t token = 0;
            for (int k = 0; k < bits; ++k) {
                const int c = k * factors + f;
                token |= (mine[c / WARP] >> (c % WARP) & 1u) << k;
            }
            tokens[row * factors + f] = token;
        }
        __syncwarp();
    }
    block_sum<2>(sum, scratch);
    if (threadIdx.x == 0) {
        sums[blockIdx.x] = sum[0];
        sums[gridDim.x + blockIdx.x] = sum[1];
    }
}

// ---- products of half-codes ---------------------------------------------------------------------------------------

struct Shape {
    int64_t n, stride;  // tokens; elements between rows of x
    int factors, bits, half;
    float logit_scale;
};

// Probabilities of the bits of `count` tokens from `first`, as [bits, count]; zeros beyond the last token.
template <typename T>
__device__ inline void load_bits(const T* x, const Shape& s, int64_t first, int count, float* set, float* clear) {
    for (int item = threadIdx.x; item < count * s.bits; item += blockDim.x) {
        const int k = item / count;
        const int64_t n = first + item % count;
        float p = 0.0f, q = 0.0f;
        if (n < s.n) {
            const Bit b = bit_of(to_float(x[n / s.factors * s.stride + k * s.factors + n % s.factors]), s.logit_scale);
            p = b.set;
            q = b.clear;
        }
        set[item] = p;
        clear[item] = q;
    }
}

// Product over `bits` bits (from bit `first_bit` of the token) that spell `code`.
__device__ inline float product(const float* set, const float* clear, int count, int token, int first_bit, int bits,
                                int code) {
    float value = 1.0f;
    for (int k = 0; k < bits; ++k) {
        value *= (code >> k & 1 ? set : clear)[(first_bit + k) * count + token];
    }
    return value;
}

constexpr int PAIR_TOKENS = 16;

// A tile of 16 M x 16 M pairs of half-codes, M x M of them a thread, over a stretch of tokens.
template <typename T, int M>
__global__ void __launch_bounds__(THREADS)
    accumulate_pairs(const T* x, float* pairs, Shape s, int64_t tokens_per_block) {
    constexpr int SIDE = 16 * M, W = M < 4 ? M : 4;
    SHARED_ARRAY(float, set, PAIR_TOKENS * MOST_BITS);
    SHARED_ARRAY(float, clear, PAIR_TOKENS * MOST_BITS);
    SHARED_ARRAY(float, low, PAIR_TOKENS * SIDE);
    SHARED_ARRAY(float, high, PAIR_TOKENS * SIDE);
    const int size_i = 1 << s.half, size_j = 1 << (s.bits - s.half);
    const int tiles_i = (size_i + SIDE - 1) / SIDE;
    const int first_i = static_cast<int>(blockIdx.y) % tiles_i * SIDE, first_j = static_cast<int>(blockIdx.y) / tiles_i * SIDE;
    const int column = threadIdx.x % 16, row = threadIdx.x / 16;
    float sum[M][M] = {};
    const int64_t begin = blockIdx.x * tokens_per_block;
    const int64_t end = smaller(begin + tokens_per_block, s.n);
    for (int64_t first = begin; first < end; first += PAIR_TOKENS) {
        __syncthreads();
        load_bits(x, s, first, PAIR_TOKENS, set, clear);
        __syncthreads();
        for (int item = threadIdx.x; item < PAIR_TOKENS * SIDE; item += THREADS) {
            const int n = item / SIDE, code = item % SIDE;
            low[item] = product(set, clear, PAIR_TOKENS, n, 0, s.half, first_i + code);
            high[item] = product(set, clear, PAIR_TOKENS, n, s.half, s.bits - s.half, first_j + code);
        }
        __syncthreads();
        const int count = static_cast<int>(smaller(PAIR_TOKENS, end - first));
        for (int n = 0; n < count; ++n) {
            float a[M], b[M];
#pragma unroll
            for (int m = 0; m < M; ++m) {  // W neighbours at a time: 16-byte reads without bank conflicts
                a[m] = low[n * SIDE + m / W * 16 * W + column * W + m % W];
                b[m] = high[n * SIDE + m / W * 16 * W + row * W + m % W];
            }
#pragma unroll
            for (int i = 0; i < M; ++i) {
#pragma unroll
                for (int j = 0; j < M; ++j) sum[j][i] += b[j] * a[i];
            }
        }
    }
    float* const out = pairs + (int64_t{blockIdx.x} << s.bits);
#pragma unroll
    for (int j = 0; j < M; ++j) {
#pragma unroll
        for (int i = 0; i < M; ++i) {
            const int at_i = first_i + i / W * 16 * W + column * W + i % W;
            const int at_j = first_j + j / W * 16 * W + row * W + j % W;
            if (at_i < size_i && at_j < size_j) out[(static_cast<int64_t>(at_j) << s.half) + at_i] = sum[j][i];
        }
    }
}

// P, added over the stretches in order; dH/dP = -(log(P + eps) + P / (P + eps)); the entropy of the block's codes.
__global__ void __launch_bounds__(THREADS)
    finish_codebook(const float* pairs, float* gradient, float* entropies, int size, int splits, float inverse_n,
                    float eps) {
    SHARED_ARRAY(float, scratch, WARP);
    const int code = blockIdx.x * THREADS + threadIdx.x;
    float entropy[1] = {0.0f};
    if (code < size) {
        float p = 0.0f;
        for (int split = 0; split < splits; ++split) p += pairs[static_cast<int64_t>(split) * size + code];
        p *= inverse_n;
        const float log_p = logf(p + eps);
        gradient[code] = -(log_p + p / (p + eps));
        entropy[0] = -p * log_p;
    }
    block_sum<1>(entropy, scratch);
    if (threadIdx.x == 0) entropies[blockIdx.x] = entropy[0];
}

__global__ void __launch_bounds__(THREADS)
    finish_scalars(const float* sums, int blocks, const float* entropies, int entropy_blocks, float* sample,
                   float* codebook, float* commitment, float inverse_n, float inverse_numel) {
    SHARED_ARRAY(float, scratch, 3 * WARP);
    float total[3] = {0.0f, 0.0f, 0.0f};
    for (int i = threadIdx.x; i < blocks; i += THREADS) {
        total[0] += sums[i];
        total[1] += sums[blocks + i];
    }
    for (int i = threadIdx.x; i < entropy_blocks; i += THREADS) total[2] += entropies[i];
    block_sum<3>(total, scratch);
    if (threadIdx.x == 0) {
        *sample = total[0] * inverse_n;
        *commitment = total[1] * inverse_numel;
        *codebook = total[2];
    }
}

// ---- backward -------------------------------------------------------------------------------------------------------

constexpr int TURN = 32;

__global__ void __launch_bounds__(TURN * 8) transpose(const float* from, float* to, int rows, int columns) {
    SHARED_ARRAY(float, tile, TURN * (TURN + 1));
    const int lane = threadIdx.x % TURN, first = threadIdx.x / TURN;
    for (int r = first; r < TURN; r += 8) {
        const int row = blockIdx.y * TURN + r, column = blockIdx.x * TURN + lane;
        if (row < rows && column < columns) tile[r * (TURN + 1) + lane] = from[static_cast<int64_t>(row) * columns + column];
    }
    __syncthreads();
    for (int r = first; r < TURN; r += 8) {
        const int row = blockIdx.x * TURN + r, column = blockIdx.y * TURN + lane;
        if (row < columns && column < rows) to[static_cast<int64_t>(row) * rows + column] = tile[lane * (TURN + 1) + r];
    }
}

struct Gradients {
    int64_t codes, sample, codebook, commitment;  // upstream; 0 where there is none
};

// A block takes TOKENS tokens; a thread owns half-codes and multiplies their row of G with all the tokens' factors.
template <typename T, int TOKENS>
__global__ void __launch_bounds__(THREADS)
    backward(const T* x, const float* gradient, const float* turned, T* grad_x, Gradients upstream, Shape s,
             float inverse_n, float inverse_numel) {
    DYNAMIC_SHARED(float, factor);  // [half-codes, TOKENS]: A, then B
    SHARED_ARRAY(float, set, TOKENS * MOST_BITS);
    SHARED_ARRAY(float, clear, TOKENS * MOST_BITS);
    const int size_i = 1 << s.half, size_j = 1 << (s.bits - s.half), units = size_i + size_j;
    float* const weighted = factor + units * TOKENS;  // dA A, then dB B
    const int64_t first = int64_t{blockIdx.x} * TOKENS;
    load_bits(x, s, first, TOKENS, set, clear);
    __syncthreads();
    if (upstream.codebook != 0) {
        for (int item = threadIdx.x; item < units * TOKENS; item += THREADS) {
            const int u = item / TOKENS, n = item % TOKENS;
            factor[item] = u < size_i ? product(set, clear, TOKENS, n, 0, s.half, u)
                                      : product(set, clear, TOKENS, n, s.half, s.bits - s.half, u - size_i);
        }
        __syncthreads();
        for (int u = threadIdx.x; u < units; u += THREADS) {
            const bool low = u < size_i;
            const float* const column = low ? gradient + u : turned + (u - size_i);
            const float* const others = factor + (low ? size_i * TOKENS : 0);
            const int count = low ? size_j : size_i, stride = low ? size_i : size_j;
            float sum[TOKENS] = {};
            for (int i = 0; i < count; ++i) {
                const float g = column[static_cast<int64_t>(i) * stride];
#pragma unroll
                for (int n = 0; n < TOKENS; n += 4) {
                    float other[4];
                    unpack<float>(load_16_bytes(others + i * TOKENS + n), other);
#pragma unroll
                    for (int k = 0; k < 4; ++k) sum[n + k] += g * other[k];
                }
            }
#pragma unroll
            for (int n = 0; n < TOKENS; ++n) weighted[u * TOKENS + n] = sum[n] * factor[u * TOKENS + n];
        }
        __syncthreads();
    }
    for (int item = threadIdx.x; item < TOKENS * s.bits; item += THREADS) {
        const int k = item / TOKENS;
        const int64_t n = first + item % TOKENS;
        if (n >= s.n) continue;
        const int64_t row = n / s.factors, c = k * s.factors + n % s.factors;
        const int64_t at = row * (static_cast<int64_t>(s.bits) * s.factors) + c;
        const float v = to_float(x[row * s.stride + c]);
        const float p = set[item], q = clear[item];
        float grad = 0.0f;
        if (upstream.codes != 0) grad += to_float(address_of<const T>(upstream.codes)[at]);
        if (upstream.commitment != 0) {
            grad += *address_of<const float>(upstream.commitment) * inverse_numel * 2.0f * (v - (v > 0.0f ? 1.0f : -1.0f));
        }
        if (upstream.sample != 0) {  // dHb / dlogit = -logit p (1 - p)
            grad -= *address_of<const float>(upstream.sample) * inverse_n * s.logit_scale * (v * s.logit_scale) * p * q;
        }
        if (upstream.codebook != 0) {
            const bool low = k < s.half;
            const float* const mine = weighted + (low ? 0 : size_i * TOKENS) + item % TOKENS;
            const int count = low ? size_i : size_j, bit = low ? k : k - s.half;
            float sum_set = 0.0f, sum_clear = 0.0f;
            for (int i = 0; i < count; ++i) {
                const float value = mine[i * TOKENS];
                if (i >> bit & 1) {
                    sum_set += value;
                } else {
                    sum_clear += value;
                }
            }
            grad += *address_of<const float>(upstream.codebook) * inverse_n * s.logit_scale *
                    (q * sum_set - p * sum_clear);
        }
        grad_x[at] = from_float<T>(grad);
    }
}

Shape make_shape(int64_t rows, int64_t stride, int64_t channels, int64_t bits, double temperature) {
    const int64_t factors = channels / bits;
    return {rows * factors, stride, static_cast<int>(factors), static_cast<int>(bits), static_cast<int>(bits / 2),
            static_cast<float>(4.0 / temperature)};
}

bool is_served(int64_t channels, int64_t bits) {
    return bits >= 1 && bits <= MOST_BITS && channels >= bits && channels % bits == 0 && channels <= 32768;
}

}  // namespace

int lfq(int64_t codes, int64_t tokens, int64_t sample, int64_t codebook, int64_t commitment, int64_t gradient,
        int64_t pairs, int64_t sums, int64_t entropies, int64_t x, int64_t rows, int64_t stride, int64_t channels,
        int64_t bits, int64_t splits, int64_t blocks, double temperature, double eps, int64_t dtype, int64_t stream) {
    if (!is_served(channels, bits)) return INVALID_VALUE;
    const Shape s = make_shape(rows, stride, channels, bits, temperature);
    const float inverse_n = 1.0f / static_cast<float>(larger(s.n, 1));
    const float inverse_numel = 1.0f / static_cast<float>(larger(rows * channels, 1));
    const int64_t size = int64_t{1} << bits;
    if (rows > 0) {
        const int status = with_type(dtype, [&](auto tag) {
            using T = typename decltype(tag)::type;
            const auto first = quantize<T>;
            const int64_t words = ceil_div(channels, WARP);
            const int quantized =
                LAUNCH(first, static_cast<unsigned>(blocks), THREADS, QUANTIZE_WARPS * words * sizeof(uint32_t), stream,
                       address_of<const T>(x), address_of<T>(codes), address_of<int64_t>(tokens), address_of<float>(sums),
                       rows, stride, static_cast<int>(channels), static_cast<int>(bits), s.logit_scale);
            if (quantized != 0) return quantized;
            const int64_t per_block = ceil_div(ceil_div(s.n, splits), PAIR_TOKENS) * PAIR_TOKENS;
            const bool small = bits <= 10;  // tiles of 32 x 32 pairs instead of 128 x 128
            const int64_t side = small ? 32 : 128;
            const int64_t tiles = ceil_div(int64_t{1} << s.half, side) * ceil_div(int64_t{1} << (bits - s.half), side);
            const dim3 grid(static_cast<unsigned>(splits), static_cast<unsigned>(tiles));
            if (small) {
                const auto second = accumulate_pairs<T, 2>;
                return LAUNCH(second, grid, THREADS, 0, stream, address_of<const T>(x), address_of<float>(pairs), s,
                              per_block);
            }
            const auto second = accumulate_pairs<T, 8>;
            return LAUNCH(second, grid, THREADS, 0, stream, address_of<const T>(x), address_of<float>(pairs), s, per_block);
        });
        if (status != 0) return status;
    }
    const int64_t entropy_blocks = ceil_div(size, THREADS);
    const int finished =
        LAUNCH(finish_codebook, static_cast<unsigned>(entropy_blocks), THREADS, 0, stream, address_of<const float>(pairs),
               address_of<float>(gradient), address_of<float>(entropies), static_cast<int>(size),
               rows > 0 ? static_cast<int>(splits) : 0, inverse_n, static_cast<float>(eps));
    if (finished != 0) return finished;
    return LAUNCH(finish_scalars, 1u, THREADS, 0, stream, address_of<const float>(sums),
                  rows > 0 ? static_cast<int>(blocks) : 0, address_of<const float>(entropies),
                  static_cast<int>(entropy_blocks), address_of<float>(sample), address_of<float>(codebook),
                  address_of<float>(commitment), inverse_n, inverse_numel);
}

int lfq_backward(int64_t grad_x, int64_t turned, int64_t grad_codes, int64_t grad_sample, int64_t grad_codebook,
                 int64_t grad_commitment, int64_t x, int64_t gradient, int64_t rows, int64_t stride, int64_t channels,
                 int64_t bits, double temperature, int64_t dtype, int64_t stream) {
    if (!is_served(channels, bits)) return INVALID_VALUE;
    const Shape s = make_shape(rows, stride, channels, bits, temperature);
    if (s.n == 0) return 0;
    const int size_i = 1 << s.half, size_j = 1 << (bits - s.half);
    if (grad_codebook != 0) {
        const dim3 grid(static_cast<unsigned>(ceil_div(size_i, TURN)), static_cast<unsigned>(ceil_div(size_j, TURN)));
        const int turning = LAUNCH(transpose, grid, TURN * 8, 0, stream, address_of<const float>(gradient),
                                   address_of<float>(turned), size_j, size_i);
        if (turning != 0) return turning;
    }
    const Gradients upstream = {grad_codes, grad_sample, grad_codebook, grad_commitment};
    return with_type(dtype, [&](auto tag) {
        using T = typename decltype(tag)::type;
        const auto run = [&](auto kernel, int tokens) {
            const size_t bytes = grad_codebook != 0 ? sizeof(float) * 2 * (size_i + size_j) * tokens : 0;
            const int allowed = ALLOW_SHARED(kernel, bytes);
            if (allowed != 0) return allowed;
            return LAUNCH(kernel, static_cast<unsigned>(ceil_div(s.n, tokens)), THREADS, bytes, stream,
                          address_of<const T>(x), address_of<const float>(gradient), address_of<const float>(turned),
                          address_of<T>(grad_x), upstream, s, 1.0f / static_cast<float>(s.n),
                          1.0f / static_cast<float>(rows * channels));
        };
        // Sixteen tokens keep the reads of G low; from 17 bits on shared memory has room for four.
        return bits <= 16 ? run(backward<T, 16>, 16) : run(backward<T, 4>, 4);
    });
}
