"""Copies of the weights of a block, and their gradients through its scales."""
from collections.abc import Sequence
from itertools import chain

import torch
import triton
import triton.language as tl
from torch import Tensor

from .launch import Launch, plan
from .tiling import ceil_div, contiguous_like


@triton.jit
def _copy(source_ptr, target_ptr, block, SIZE: tl.constexpr,
          BLOCK: tl.constexpr):
    at = block * BLOCK + tl.arange(0, BLOCK)
    tl.store(target_ptr + at, tl.load(source_ptr + at, at < SIZE), at < SIZE)


@triton.jit
def _copy_branch(block, weight0_ptr, weight1_ptr, bias0_ptr, bias1_ptr, dw_ptr,
                 out_weight_ptr, out_bias_ptr, scale_ptr, in_weight_to,
                 in_bias_to, taps_to, out_weight_to, out_bias_to, scaled_to,
                 ROWS0: tl.constexpr, ROWS1: tl.constexpr,
                 COLUMNS: tl.constexpr, C: tl.constexpr, TAPS: tl.constexpr,
                 OUT_ROWS: tl.constexpr, BLOCK: tl.constexpr):
    """A block of the copies of the weights of a branch."""
    size0: tl.constexpr = ROWS0 * COLUMNS
    size1: tl.constexpr = ROWS1 * COLUMNS
    out_size: tl.constexpr = OUT_ROWS * C
    first: tl.constexpr = (size0 + BLOCK - 1) // BLOCK
    second: tl.constexpr = first + (size1 + BLOCK - 1) // BLOCK
    third: tl.constexpr = second + (out_size + BLOCK - 1) // BLOCK
    fourth: tl.constexpr = third + (C * TAPS + BLOCK - 1) // BLOCK
    if block < first:
        _copy(weight0_ptr, in_weight_to, block, size0, BLOCK)
    elif block < second:
        if weight1_ptr is not None:
            _copy(weight1_ptr, in_weight_to + size0, block - first, size1,
                  BLOCK)
    elif block < third:
        _copy(out_weight_ptr, out_weight_to, block - second, out_size, BLOCK)
        if scaled_to is not None:
            at = (block - second) * BLOCK + tl.arange(0, BLOCK)
            inside = at < out_size
            scale = tl.load(scale_ptr + at // C, inside)
            weight = tl.load(out_weight_ptr + at, inside)
            tl.store(scaled_to + at,
                     weight.to(tl.float32) * scale.to(tl.float32), inside)
    elif block < fourth:
        at = (block - third) * BLOCK + tl.arange(0, BLOCK)
        inside = at < C * TAPS
        tap = tl.load(dw_ptr + at % C * TAPS + at // C, inside)
        tl.store(taps_to + at, tap, inside)
    else:
        for i in range((ROWS0 + BLOCK - 1) // BLOCK):
            _copy(bias0_ptr, in_bias_to, i, ROWS0, BLOCK)
        if bias1_ptr is not None:
            for i in range((ROWS1 + BLOCK - 1) // BLOCK):
                _copy(bias1_ptr, in_bias_to + ROWS0, i, ROWS1, BLOCK)
        for i in range((OUT_ROWS + BLOCK - 1) // BLOCK):
            _copy(out_bias_ptr, out_bias_to, i, OUT_ROWS, BLOCK)


@triton.jit
def _operands_kernel(
        weight0, weight1, bias0, bias1, dw, out_weight, out_bias, scale,
        in_weight_to, in_bias_to, taps_to, out_weight_to, out_bias_to,
        scaled_to, mlp_weight0, mlp_weight1, mlp_bias0, mlp_bias1, mlp_dw,
        mlp_out_weight, mlp_out_bias, mlp_scale, mlp_in_weight_to,
        mlp_in_bias_to, mlp_taps_to, mlp_out_weight_to, mlp_out_bias_to,
        mlp_scaled_to, BLOCKS: tl.constexpr, ROWS0: tl.constexpr,
        ROWS1: tl.constexpr, COLUMNS: tl.constexpr, C: tl.constexpr,
        TAPS: tl.constexpr, OUT_ROWS: tl.constexpr, MLP_ROWS0: tl.constexpr,
        MLP_ROWS1: tl.constexpr, MLP_COLUMNS: tl.constexpr,
        MLP_C: tl.constexpr, MLP_TAPS: tl.constexpr,
        MLP_OUT_ROWS: tl.constexpr, BLOCK: tl.constexpr):
    """Copies of all weights of a block, BLOCKS programs for the first branch,
    the others for the second."""
    block = tl.program_id(0)
    if block < BLOCKS:
        _copy_branch(block, weight0, weight1, bias0, bias1, dw, out_weight,
                     out_bias, scale, in_weight_to, in_bias_to, taps_to,
                     out_weight_to, out_bias_to, scaled_to, ROWS0, ROWS1,
                     COLUMNS, C, TAPS, OUT_ROWS, BLOCK)
    else:
        _copy_branch(block - BLOCKS, mlp_weight0, mlp_weight1, mlp_bias0,
                     mlp_bias1, mlp_dw, mlp_out_weight, mlp_out_bias,
                     mlp_scale, mlp_in_weight_to, mlp_in_bias_to, mlp_taps_to,
                     mlp_out_weight_to, mlp_out_bias_to, mlp_scaled_to,
                     MLP_ROWS0, MLP_ROWS1, MLP_COLUMNS, MLP_C, MLP_TAPS,
                     MLP_OUT_ROWS, BLOCK)


_SIZES = 'ROWS0', 'ROWS1', 'COLUMNS', 'C', 'TAPS', 'OUT_ROWS'


@plan
def _operands_launch(*branches: tuple[int, ...]) -> Launch:
    block, constants, blocks = 1024, {}, []
    for prefix, sizes in zip(('', 'MLP_'), branches):
        rows0, rows1, columns, c, taps, out_rows = sizes
        blocks.append(1 + sum(
            ceil_div(size, block) for size in (
                rows0 * columns, rows1 * columns, out_rows * c, c * taps)))
        constants |= {prefix + name: size
                      for name, size in zip(_SIZES, sizes)}
    return Launch(_operands_kernel, sum(blocks), BLOCKS=blocks[0], BLOCK=block,
                  **constants)


def _operands_of(parameters: Sequence[Tensor], dtype: torch.dtype,
                 scale: Tensor | None) -> tuple[list, list, tuple[int, ...]]:
    """The pointers of the kernel for a branch, its operands, and the sizes."""
    *linears, dw_weight, dw_bias, out_weight, out_bias = (
        p.contiguous() for p in parameters)
    weight0, bias0, weight1, bias1 = *linears, *(4 - len(linears)) * (None, )
    rows0, columns = weight0.shape[:2]
    rows1 = 0 if weight1 is None else len(weight1)
    c, _, k, _ = dw_weight.shape
    out_rows = len(out_weight)
    in_weight = weight0.new_empty((rows0 + rows1, columns), dtype=dtype)
    in_bias = bias0.new_empty(rows0 + rows1, dtype=dtype)
    out = out_weight.new_empty((out_rows, c), dtype=dtype)
    copied_bias = torch.empty_like(out_bias, dtype=dtype)
    taps = dw_weight.new_empty((k, k, c, 1), dtype=torch.float32)
    scaled = None
    if scale is not None:
        scale, scaled = scale.contiguous(), torch.empty_like(out)
    return ([weight0, weight1, bias0, bias1, dw_weight, out_weight, out_bias,
             scale, in_weight, in_bias, taps, out, copied_bias, scaled],
            [in_weight, in_bias, taps.permute(2, 3, 0, 1), dw_bias, out,
             copied_bias] + [scaled] * (scale is not None),
            (rows0, rows1, columns, c, k * k, out_rows))


def operands(branches: Sequence[Sequence[Tensor]], dtype: torch.dtype,
             scales: Sequence[Tensor | None] = (None, None)
             ) -> list[list[Tensor]]:
    """See :func:`mmconv2former.torch_kernels.operands`.

    In one launch, where each of so many small copies would cost as much as a
    pass over megabytes.
    """
    tensors, found, sizes = zip(*(
        _operands_of(parameters, dtype, scale)
        for parameters, scale in zip(branches, scales, strict=True)))
    _operands_launch(*sizes)(*chain(*tensors))
    return list(found)


@triton.jit
def _scaled_row(row, grad_weight_ptr, grad_bias_ptr, weight_ptr, bias_ptr,
                scale_ptr, out_weight_ptr, out_bias_ptr, out_scale_ptr,
                COLUMNS: tl.constexpr, BLOCK: tl.constexpr):
    """Gradients times scale; that of the scale is the sum of grad * weight
    over the row, and grad * bias."""
    scale = tl.load(scale_ptr + row).to(tl.float32)
    total = tl.zeros((BLOCK, ), tl.float32)
    for start in range(0, COLUMNS, BLOCK):
        column = start + tl.arange(0, BLOCK)
        at, inside = row * COLUMNS + column, column < COLUMNS
        grad = tl.load(grad_weight_ptr + at, inside, 0.).to(tl.float32)
        weight = tl.load(weight_ptr + at, inside, 0.).to(tl.float32)
        total += grad * weight
        tl.store(out_weight_ptr + at, grad * scale, inside)
    grad = tl.load(grad_bias_ptr + row).to(tl.float32)
    bias = tl.load(bias_ptr + row).to(tl.float32)
    tl.store(out_bias_ptr + row, grad * scale)
    tl.store(out_scale_ptr + row, tl.sum(total, 0) + grad * bias)


@triton.jit
def _scaled_linear_backward_kernel(
        grad_weight, grad_bias, weight, bias, scale, out_weight, out_bias,
        out_scale, mlp_grad_weight, mlp_grad_bias, mlp_weight, mlp_bias,
        mlp_scale, mlp_out_weight, mlp_out_bias, mlp_out_scale,
        ROWS: tl.constexpr, COLUMNS: tl.constexpr, MLP_COLUMNS: tl.constexpr,
        BLOCK: tl.constexpr, MLP_BLOCK: tl.constexpr):
    """A row of a layer; those of the first come before those of the second."""
    row = tl.program_id(0)
    if row < ROWS:
        _scaled_row(row, grad_weight, grad_bias, weight, bias, scale,
                    out_weight, out_bias, out_scale, COLUMNS, BLOCK)
    else:
        _scaled_row(row - ROWS, mlp_grad_weight, mlp_grad_bias, mlp_weight,
                    mlp_bias, mlp_scale, mlp_out_weight, mlp_out_bias,
                    mlp_out_scale, MLP_COLUMNS, MLP_BLOCK)


@plan
def _scaled_linear_backward_launch(*shapes: tuple[int, ...]) -> Launch:
    (rows, columns), (mlp_rows, mlp_columns) = shapes
    block, mlp_block = (min(triton.next_power_of_2(c), 1024)
                        for c in (columns, mlp_columns))
    return Launch(_scaled_linear_backward_kernel, rows + mlp_rows, ROWS=rows,
                  COLUMNS=columns, MLP_COLUMNS=mlp_columns, BLOCK=block,
                  MLP_BLOCK=mlp_block)


def scaled_linear_backward(
        grad_weights: Sequence[Tensor], grad_biases: Sequence[Tensor],
        weights: Sequence[Tensor], biases: Sequence[Tensor],
        scales: Sequence[Tensor]
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """See :func:`mmconv2former.torch_kernels.scaled_linear_backward`."""
    tensors, found = [], []
    for inputs in zip(grad_weights, grad_biases, weights, biases, scales,
                      strict=True):
        _, _, weight, _, scale = inputs
        outs = [contiguous_like(t, torch.float32)
                for t in (weight, scale, scale)]
        tensors += (*(t.contiguous() for t in inputs), *outs)
        found += outs
    _scaled_linear_backward_launch(*(w.shape for w in weights))(*tensors)
    return tuple(found)
