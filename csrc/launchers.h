// Every launcher: addresses, sizes, strides (in elements) and the stream as integers in, CUDA's error code out (0 = fine).
// An address of 0 stands for "not there". FLOWMO_LAUNCHERS is the table of contents that the Python module and the
// host executor's runner are made of.
#pragma once

#include <cstdint>

// csrc/norm_modulate.cu
int norm_modulate(int64_t y, int64_t y_batch, int64_t y_row, int64_t x, int64_t x_batch, int64_t x_row, int64_t shift,
    int64_t shift_batch, int64_t shift_stream, int64_t shift_dtype, int64_t scale, int64_t scale_batch,
    int64_t scale_stream, int64_t scale_dtype, int64_t batch, int64_t length, int64_t width, int64_t split, double
    eps, int64_t dtype, int64_t stream);
int norm_modulate_backward(int64_t grad_x, int64_t grad_x_batch, int64_t grad_x_row, int64_t grad_shift,
    int64_t grad_scale, int64_t partial, int64_t grad_y, int64_t grad_y_batch, int64_t grad_y_row, int64_t x,
    int64_t x_batch, int64_t x_row, int64_t scale, int64_t scale_batch, int64_t scale_stream, int64_t scale_dtype,
    int64_t batch, int64_t length, int64_t width, int64_t split, int64_t streams, int64_t rows_per_chunk, double eps,
    int64_t dtype, int64_t stream);

// csrc/gate_residual.cu
int gate_residual(int64_t sum, int64_t sum_batch, int64_t sum_row, int64_t x, int64_t x_batch, int64_t x_row,
    int64_t branch, int64_t branch_batch, int64_t branch_row, int64_t gate, int64_t gate_batch, int64_t gate_stream,
    int64_t gate_dtype, int64_t batch, int64_t length, int64_t width, int64_t split, int64_t dtype, int64_t stream);
int gate_residual_norm_modulate(int64_t sum, int64_t sum_batch, int64_t sum_row, int64_t y, int64_t y_batch,
    int64_t y_row, int64_t x, int64_t x_batch, int64_t x_row, int64_t branch, int64_t branch_batch,
    int64_t branch_row, int64_t gate, int64_t gate_batch, int64_t gate_stream, int64_t gate_dtype, int64_t shift,
    int64_t shift_batch, int64_t shift_stream, int64_t shift_dtype, int64_t scale, int64_t scale_batch,
    int64_t scale_stream, int64_t scale_dtype, int64_t batch, int64_t length, int64_t width, int64_t split, double
    eps, int64_t dtype, int64_t stream);
int gate_residual_backward(int64_t grad_branch, int64_t grad_branch_batch, int64_t grad_branch_row, int64_t grad_gate,
    int64_t partial, int64_t grad_sum, int64_t grad_sum_batch, int64_t grad_sum_row, int64_t branch,
    int64_t branch_batch, int64_t branch_row, int64_t gate, int64_t gate_batch, int64_t gate_stream,
    int64_t gate_dtype, int64_t batch, int64_t length, int64_t width, int64_t split, int64_t gate_streams,
    int64_t rows_per_chunk, int64_t dtype, int64_t stream);
int gate_residual_norm_modulate_backward(int64_t grad_x, int64_t grad_x_batch, int64_t grad_x_row,
    int64_t grad_branch, int64_t grad_branch_batch, int64_t grad_branch_row, int64_t grad_gate, int64_t grad_shift,
    int64_t grad_scale, int64_t partial, int64_t grad_sum, int64_t grad_sum_batch, int64_t grad_sum_row,
    int64_t grad_y, int64_t grad_y_batch, int64_t grad_y_row, int64_t sum, int64_t sum_batch, int64_t sum_row,
    int64_t branch, int64_t branch_batch, int64_t branch_row, int64_t gate, int64_t gate_batch, int64_t gate_stream,
    int64_t gate_dtype, int64_t scale, int64_t scale_batch, int64_t scale_stream, int64_t scale_dtype, int64_t batch,
    int64_t length, int64_t width, int64_t split, int64_t gate_streams, int64_t scale_streams, int64_t rows_per_chunk,
    double eps, int64_t dtype, int64_t stream);

// csrc/device.cu
const char* error_text(int code);
int set_device(int64_t index);

#define FLOWMO_LAUNCHERS(X) \
    X(norm_modulate) \
    X(norm_modulate_backward) \
    X(gate_residual) \
    X(gate_residual_norm_modulate) \
    X(gate_residual_backward) \
    X(gate_residual_norm_modulate_backward)
