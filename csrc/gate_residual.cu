// x' = x + gate * branch, alone and with the modulated LayerNorm of x', and the gradients of both.
#include "launchers.h"
#include "rows.cuh"

using namespace flowmo;

int gate_residual(int64_t sum, int64_t sum_batch, int64_t sum_row, int64_t x, int64_t x_batch, int64_t x_row,
                  int64_t branch, int64_t branch_batch, int64_t branch_row, int64_t gate, int64_t gate_batch,
                  int64_t gate_stream, int64_t gate_dtype, int64_t batch, int64_t length, int64_t width, int64_t split,
                  int64_t dtype, int64_t stream) {
    ForwardArguments p = {};
    p.x = make_rows(x, x_batch, x_row, dtype);
    p.branch = make_rows(branch, branch_batch, branch_row, dtype);
    p.sum = make_rows(sum, sum_batch, sum_row, dtype);
    p.gate = make_table(gate, gate_batch, gate_stream, gate_dtype);
    set_sizes(p, batch, length, width, split, 0.0);
    return launch_rows_forward<false, true>(p, dtype, stream);
}

int gate_residual_norm_modulate(int64_t sum, int64_t sum_batch, int64_t sum_row, int64_t y, int64_t y_batch,
                                int64_t y_row, int64_t x, int64_t x_batch, int64_t x_row, int64_t branch,
                                int64_t branch_batch, int64_t branch_row, int64_t gate, int64_t gate_batch,
                                int64_t gate_stream, int64_t gate_dtype, int64_t shift, int64_t shift_batch,
                                int64_t shift_stream, int64_t shift_dtype, int64_t scale, int64_t scale_batch,
                                int64_t scale_stream, int64_t scale_dtype, int64_t batch, int64_t length,
                                int64_t width, int64_t split, double eps, int64_t dtype, int64_t stream) {
    ForwardArguments p = {};
    p.x = make_rows(x, x_batch, x_row, dtype);
    p.branch = make_rows(branch, branch_batch, branch_row, dtype);
    p.sum = make_rows(sum, sum_batch, sum_row, dtype);
    p.y = make_rows(y, y_batch, y_row, dtype);
    p.gate = make_table(gate, gate_batch, gate_stream, gate_dtype);
    p.shift = make_table(shift, shift_batch, shift_stream, shift_dtype);
    p.scale = make_table(scale, scale_batch, scale_stream, scale_dtype);
    set_sizes(p, batch, length, width, split, eps);
    return launch_rows_forward<true, true>(p, dtype, stream);
}

int gate_residual_backward(int64_t grad_branch, int64_t grad_branch_batch, int64_t grad_branch_row, int64_t grad_gate,
                           int64_t partial,
                           int64_t grad_sum, int64_t grad_sum_batch, int64_t grad_sum_row, int64_t branch,
                           int64_t branch_batch, int64_t branch_row, int64_t gate, int64_t gate_batch,
                           int64_t gate_stream, int64_t gate_dtype, int64_t batch, int64_t length, int64_t width,
                           int64_t split, int64_t gate_streams, int64_t rows_per_chunk, int64_t dtype,
                           int64_t stream) {
    BackwardArguments p = {};
    p.branch = make_rows(branch, branch_batch, branch_row, dtype);
    p.grad_sum = make_rows(grad_sum, grad_sum_batch, grad_sum_row, dtype);
    p.grad_branch = make_rows(grad_branch, grad_branch_batch, grad_branch_row, dtype);
    p.gate = make_table(gate, gate_batch, gate_stream, gate_dtype);
    p.partial = partial;
    set_chunks(p, batch, length, width, split, rows_per_chunk, 0.0);
    ReduceArguments sums = {};
    sums.outputs[0] = grad_gate;
    sums.streams[0] = static_cast<int>(gate_streams);
    return launch_rows_backward<false, true>(p, sums, dtype, stream);
}

int gate_residual_norm_modulate_backward(
    int64_t grad_x, int64_t grad_x_batch, int64_t grad_x_row, int64_t grad_branch, int64_t grad_branch_batch,
    int64_t grad_branch_row, int64_t grad_gate, int64_t grad_shift, int64_t grad_scale, int64_t partial,
    int64_t grad_sum, int64_t grad_sum_batch, int64_t grad_sum_row, int64_t grad_y, int64_t grad_y_batch,
    int64_t grad_y_row, int64_t sum, int64_t sum_batch, int64_t sum_row, int64_t branch, int64_t branch_batch,
    int64_t branch_row, int64_t gate, int64_t gate_batch, int64_t gate_stream, int64_t gate_dtype, int64_t scale,
    int64_t scale_batch, int64_t scale_stream, int64_t scale_dtype, int64_t batch, int64_t length, int64_t width,
    int64_t split, int64_t gate_streams, int64_t scale_streams, int64_t rows_per_chunk, double eps, int64_t dtype,
    int64_t stream) {
    BackwardArguments p = {};
    p.grad_y = make_rows(grad_y, grad_y_batch, grad_y_row, dtype);
    p.x = make_rows(sum, sum_batch, sum_row, dtype);
    p.branch = make_rows(branch, branch_batch, branch_row, dtype);
    p.grad_sum = make_rows(grad_sum, grad_sum_batch, grad_sum_row, dtype);
    p.grad_x = make_rows(grad_x, grad_x_batch, grad_x_row, dtype);
    p.grad_branch = make_rows(grad_branch, grad_branch_batch, grad_branch_row, dtype);
    p.gate = make_table(gate, gate_batch, gate_stream, gate_dtype);
    p.scale = make_table(scale, scale_batch, scale_stream, scale_dtype);
    p.partial = partial;
    set_chunks(p, batch, length, width, split, rows_per_chunk, eps);
    ReduceArguments sums = {};
    sums.outputs[0] = grad_shift;
    sums.outputs[1] = grad_scale;
    sums.outputs[2] = grad_gate;
    sums.streams[0] = sums.streams[1] = static_cast<int>(scale_streams);
    sums.streams[2] = static_cast<int>(gate_streams);
    return launch_rows_backward<true, true>(p, sums, dtype, stream);
}
