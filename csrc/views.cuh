// How tensors reach a kernel: address, strides in elements, and whether 16-byte accesses are possible.
#pragma once

#include "common.cuh"

namespace flowmo {

// One [B, L, D] tensor whose last dimension is contiguous; strides count elements.
struct Rows {
    int64_t address, batch_stride, row_stride;
    bool aligned;  // every row starts on 16 bytes

    template <typename T>
    __device__ T* row(int64_t batch, int64_t index) const {
        return address_of<T>(address) + batch * batch_stride + index * row_stride;
    }
};

// One table [B, D] or [B, 2, D] of modulation vectors; address 0 stands for "not there".
struct Table {
    int64_t address, batch_stride, stream_stride;
    int dtype;
    bool aligned;

    template <int N>
    __device__ void load(int64_t batch, int stream, int start, int count, float (&v)[N]) const {
        load_numbers<N>(address_of<const void>(address), dtype,
                        batch * batch_stride + stream * stream_stride + start, count, aligned, v);
    }
    __device__ float at(int64_t batch, int stream, int i) const {
        return load_number(address_of<const void>(address), dtype,
                           batch * batch_stride + stream * stream_stride + i);
    }
};

inline int64_t number_size(int64_t dtype) { return dtype == FP32 ? 4 : 2; }

inline Rows make_rows(int64_t address, int64_t batch_stride, int64_t row_stride, int64_t dtype) {
    const int64_t size = number_size(dtype);
    return {address, batch_stride, row_stride,
            is_aligned(address) && is_aligned(batch_stride * size) && is_aligned(row_stride * size)};
}

inline Table make_table(int64_t address, int64_t batch_stride, int64_t stream_stride, int64_t dtype) {
    const int64_t size = number_size(dtype);
    return {address, batch_stride, stream_stride, static_cast<int>(dtype),
            is_aligned(address) && is_aligned(batch_stride * size) && is_aligned(stream_stride * size)};
}

}  // namespace flowmo
