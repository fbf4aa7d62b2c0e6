// Every launcher: addresses, sizes, strides (in elements) and the stream as integers in, CUDA's error code out (0 = fine).
// An address of 0 stands for "not there". FLOWMO_LAUNCHERS is the table of contents that the Python module and the
// host executor's runner are made of.
#pragma once

#include <cstdint>

// csrc/norm_modulate.cu
int norm_modulate(int64_t y, int64_t y_batch, int64_t y_row, int64_t x, int64_t x_batch, int64_t x_row, int64_t shift,
    int64_t shift_batch, int64_t shift_stream, int64_t shift_dtype, int64_t scale, int64_t scale_batch,
    int64_t scale_stream, int64_t scale_dtype, int64_t batch, int64_t length, int64_t width, int64_t split,
    double eps, int64_t dtype, int64_t stream);
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
    int64_t scale_stream, int64_t scale_dtype, int64_t batch, int64_t length, int64_t width, int64_t split,
    double eps, int64_t dtype, int64_t stream);
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

// csrc/qk_norm_rope.cu
int qk_norm_rope(int64_t y, int64_t y_batch, int64_t y_token, int64_t y_part, int64_t y_head, int64_t x,
    int64_t x_batch, int64_t x_token, int64_t x_part, int64_t x_head, int64_t q_gain, int64_t k_gain,
    int64_t gain_stride, int64_t gain_dtype, int64_t cosines, int64_t sines, int64_t batch, int64_t length,
    int64_t heads, int64_t width, int64_t split, int64_t copy_v, double eps, int64_t dtype, int64_t stream);
int qk_norm_rope_backward(int64_t grad_x, int64_t grad_x_batch, int64_t grad_x_token, int64_t grad_x_part,
    int64_t grad_x_head, int64_t grad_q_gain, int64_t grad_k_gain, int64_t partial, int64_t grad_y,
    int64_t grad_y_batch, int64_t grad_y_token, int64_t grad_y_part, int64_t grad_y_head, int64_t x, int64_t x_batch,
    int64_t x_token, int64_t x_part, int64_t x_head, int64_t q_gain, int64_t k_gain, int64_t gain_stride,
    int64_t gain_dtype, int64_t cosines, int64_t sines, int64_t batch, int64_t length, int64_t heads, int64_t width,
    int64_t split, int64_t rows_per_chunk, double eps, int64_t dtype, int64_t stream);

// csrc/lfq.cu
int lfq(int64_t codes, int64_t tokens, int64_t sample, int64_t codebook, int64_t commitment, int64_t gradient,
    int64_t pairs, int64_t sums, int64_t entropies, int64_t x, int64_t rows, int64_t stride, int64_t channels,
    int64_t bits, int64_t splits, int64_t blocks, double temperature, double eps, int64_t dtype, int64_t stream);
int lfq_backward(int64_t grad_x, int64_t turned, int64_t grad_codes, int64_t grad_sample, int64_t grad_codebook,
    int64_t grad_commitment, int64_t x, int64_t gradient, int64_t rows, int64_t stride, int64_t channels,
    int64_t bits, double temperature, int64_t dtype, int64_t stream);

// csrc/pack_tokens.cu
int pack_tokens(int64_t packed, int64_t tokens, int64_t stride, int64_t batch, int64_t n, int64_t bits,
    int64_t stream);
int unpack_tokens(int64_t tokens, int64_t packed, int64_t stride, int64_t batch, int64_t n, int64_t bits,
    int64_t stream);

// csrc/euler_step.cu
int euler_step(int64_t z_next, int64_t copy, int64_t z, int64_t v, int64_t v_null, double dt, double w, int64_t size,
    int64_t dtype, int64_t stream);
int euler_step_backward(int64_t grad_z, int64_t grad_v, int64_t grad_null, int64_t grad_next, int64_t grad_copy,
    double dt, double w, int64_t size, int64_t dtype, int64_t stream);

// csrc/step_boundary.cu
int step_boundary(int64_t z_next, int64_t x, int64_t h, int64_t h_batch, int64_t h_row, int64_t h_null,
    int64_t null_batch, int64_t null_row, int64_t h_dtype, int64_t shift, int64_t shift_batch, int64_t shift_dtype,
    int64_t scale, int64_t scale_batch, int64_t scale_dtype, int64_t w_out, int64_t b_out, int64_t b_out_dtype,
    int64_t z, int64_t w_in, int64_t b_in, int64_t b_in_dtype, int64_t batch, int64_t tokens, int64_t width,
    int64_t patch, int64_t embedding, double dt, double w, double eps, int64_t dtype, int64_t stream);

// csrc/optim.cu
int adam_hold_ema(int64_t table, int64_t chunks, int64_t first_chunks, int64_t squares, int64_t scales,
    int64_t found_inf, int64_t tensors, int64_t n_chunks, int64_t adam, int64_t hold, int64_t average, double rate,
    double beta1, double beta2, double root, double eps, double decay, int64_t stream);

// csrc/device.cu
const char* error_text(int code);
int set_device(int64_t index);

#define FLOWMO_LAUNCHERS(X) \
    X(norm_modulate) \
    X(norm_modulate_backward) \
    X(gate_residual) \
    X(gate_residual_norm_modulate) \
    X(gate_residual_backward) \
    X(gate_residual_norm_modulate_backward) \
    X(qk_norm_rope) \
    X(qk_norm_rope_backward) \
    X(lfq) \
    X(lfq_backward) \
    X(pack_tokens) \
    X(unpack_tokens) \
    X(euler_step) \
    X(euler_step_backward) \
    X(step_boundary) \
    X(adam_hold_ema)
