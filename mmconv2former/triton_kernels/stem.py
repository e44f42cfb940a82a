"""Triton kernels of the stem: GELU and batch norm between its convolutions.

Functions without a leading underscore stand in for those of the same names in
:mod:`mmconv2former.torch_kernels`, which describes them and is their
reference.
What is said of precision and order in :mod:`mmconv2former.triton_kernels`
holds here too, but for GELU, which is exact of fp16 as well: the error of the
other form has one sign, and would be that of the mean of a million values.
"""
import torch
import triton
import triton.language as tl
from torch import Tensor

from .gelu import gelu, gelu_and_slope
from .launch import Launch, plan
from .sums import sum_partials
from .tiling import (
    ceil_div,
    column_place,
    column_tiles,
    norm_tile,
    patch_index,
)


@triton.jit(do_not_specialize=[
    'height', 'width', 'stride_n', 'stride_c', 'stride_h', 'stride_w'])
def _pixels_first_kernel(x_ptr, out_ptr, height, width, stride_n, stride_c,
                         stride_h, stride_w, IN: tl.constexpr,
                         OUT: tl.constexpr, BLOCK: tl.constexpr):
    """(N, C, H, W) in any strides -> (N, H, W, OUT)."""
    blocks = tl.cdiv(height * width, BLOCK)
    n = tl.cast(tl.program_id(0) // blocks, tl.int64)
    pixel = tl.program_id(0) % blocks * BLOCK + tl.arange(0, BLOCK)[:, None]
    channel = tl.arange(0, OUT)[None, :]
    inside = pixel < height * width
    at = n * stride_n + tl.cast(pixel // width, tl.int64) * stride_h \
        + pixel % width * stride_w + tl.cast(channel, tl.int64) * stride_c
    x = tl.load(x_ptr + at, inside & (channel < IN), 0.)
    tl.store(out_ptr + (n * height * width + pixel) * OUT + channel, x, inside)


@plan
def _pixels_first_launch(shape: tuple[int, ...], strides: tuple[int, ...],
                         channels: int) -> Launch:
    n, c, height, width = shape
    block = 2048 // channels
    return Launch(
        _pixels_first_kernel, n * ceil_div(height * width, block), height,
        width, *strides, IN=c, OUT=channels, BLOCK=block)


def pixels_first(x: Tensor, channels: int, dtype: torch.dtype) -> Tensor:
    """See :func:`mmconv2former.torch_kernels.pixels_first`."""
    n, _, height, width = x.shape
    out = x.new_empty((n, height, width, channels), dtype=dtype)
    _pixels_first_launch(x.shape, x.stride(), channels)(x, out)
    return out


@triton.jit(do_not_specialize=['pixels', 'tiles'])
def _gelu_moments_kernel(x_ptr, partial_ptr, pixels, tiles, C: tl.constexpr,
                         BLOCK: tl.constexpr, PIXELS: tl.constexpr):
    """For each part and channel the number of values, their mean, and the
    sum of the squares of their distances from it."""
    exact: tl.constexpr = x_ptr.dtype.element_ty != tl.bfloat16
    channel, part, parts = column_place(C, BLOCK)
    used = channel < C
    sums = tl.zeros((PIXELS, BLOCK), tl.float32)
    squares = tl.zeros((PIXELS, BLOCK), tl.float32)
    # Distances are from the mean of the first tile: squares of large values
    # would hide a small variance.
    pixel = tl.cast(part, tl.int64) * PIXELS + tl.arange(0, PIXELS)[:, None]
    x = tl.load(x_ptr + pixel * C + channel, used & (pixel < pixels),
                0.).to(tl.float32)
    rows = tl.minimum(pixels - part * PIXELS, PIXELS)
    centre = tl.sum(gelu(x, exact), 0)[None, :] / rows
    count = 0
    for tile in range(part, tiles, parts):
        pixel = tl.cast(tile, tl.int64) * PIXELS \
            + tl.arange(0, PIXELS)[:, None]
        inside = used & (pixel < pixels)
        x = tl.load(x_ptr + pixel * C + channel, inside, 0.).to(tl.float32)
        x = tl.where(inside, gelu(x, exact) - centre, 0.)
        sums += x
        squares += x * x
        count += tl.minimum(pixels - tile * PIXELS, PIXELS)
    mean = tl.sum(sums, 0)[None, :] / count
    out = partial_ptr + part * (3 * C) + channel
    tl.store(out, tl.zeros((1, BLOCK), tl.float32) + count, used)
    tl.store(out + C, centre + mean, used)
    tl.store(out + 2 * C,
             tl.sum(squares, 0)[None, :] - count * (mean * mean), used)


@triton.jit(do_not_specialize=['pixels', 'parts'])
def _moments_kernel(partial_ptr, mean_ptr, rstd_ptr, running_mean_ptr,
                    running_var_ptr, pixels, parts, eps, momentum,
                    C: tl.constexpr, USED: tl.constexpr, COLUMNS: tl.constexpr,
                    ROWS: tl.constexpr):
    """Moments of all parts from those of each; updates the running ones."""
    channel = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    sums = tl.zeros((ROWS, COLUMNS), tl.float32)
    for start in range(0, parts, ROWS):
        row = start + tl.arange(0, ROWS)[:, None]
        inside = (row < parts) & (channel < C)[None, :]
        at = partial_ptr + row * (3 * C) + channel[None, :]
        sums += tl.load(at, inside, 0.) * tl.load(at + C, inside, 0.)
    mean = tl.sum(sums, 0) / pixels
    sums = tl.zeros((ROWS, COLUMNS), tl.float32)
    for start in range(0, parts, ROWS):
        row = start + tl.arange(0, ROWS)[:, None]
        inside = (row < parts) & (channel < C)[None, :]
        at = partial_ptr + row * (3 * C) + channel[None, :]
        distance = tl.load(at + C, inside, 0.) - mean[None, :]
        sums += tl.load(at + 2 * C, inside, 0.) \
            + tl.load(at, inside, 0.) * distance * distance
    square = tl.sum(sums, 0)
    tl.store(mean_ptr + channel, mean, channel < C)
    tl.store(rstd_ptr + channel, tl.rsqrt(square / pixels + eps), channel < C)
    used = channel < USED
    old = tl.load(running_mean_ptr + channel, used, 0.)
    tl.store(running_mean_ptr + channel, old + momentum * (mean - old), used)
    old = tl.load(running_var_ptr + channel, used, 0.)
    tl.store(running_var_ptr + channel,
             old + momentum * (square / tl.maximum(pixels - 1, 1) - old), used)


@plan
def _moments_launches(shape: tuple[int, ...], used: int, eps: float,
                      momentum: float) -> tuple[Launch, Launch, int]:
    tile, pixels, tiles, parts = column_tiles(shape, 16)
    c, columns = shape[3], 8
    return (Launch(_gelu_moments_kernel, parts * ceil_div(c, tile['BLOCK']),
                   pixels, tiles, **tile),
            Launch(_moments_kernel, ceil_div(c, columns), pixels, parts, eps,
                   momentum, C=c, USED=used, COLUMNS=columns, ROWS=256), parts)


def gelu_moments(x: Tensor, running_mean: Tensor, running_var: Tensor,
                 eps: float, momentum: float) -> tuple[Tensor, Tensor]:
    """See :func:`mmconv2former.torch_kernels.gelu_moments`."""
    c = x.shape[3]
    first, second, parts = _moments_launches(
        x.shape, len(running_mean), float(eps), float(momentum))
    partial = x.new_empty((parts, 3, c), dtype=torch.float32)
    mean, rstd = (x.new_empty(c, dtype=torch.float32) for _ in range(2))
    first(x, partial)
    second(partial, mean, rstd, running_mean, running_var)
    return mean, rstd


@triton.jit(do_not_specialize=['pixels', 'height', 'width'])
def _gelu_norm_kernel(x_ptr, mean_ptr, rstd_ptr, weight_ptr, bias_ptr, out_ptr,
                      pixels, height, width, C: tl.constexpr,
                      USED: tl.constexpr, OUT: tl.constexpr,
                      PATCH: tl.constexpr, BLOCK: tl.constexpr,
                      PIXELS: tl.constexpr):
    """out = (GELU(x) - mean) * rstd * weight + bias, as patches."""
    exact: tl.constexpr = x_ptr.dtype.element_ty != tl.bfloat16
    channel = tl.arange(0, BLOCK)[None, :]
    used = channel < USED
    scale = tl.load(weight_ptr + channel, used, 0.).to(tl.float32) \
        * tl.load(rstd_ptr + channel, used, 0.)
    bias = tl.load(bias_ptr + channel, used, 0.).to(tl.float32)
    mean = tl.load(mean_ptr + channel, used, 0.)
    pixel = tl.cast(tl.program_id(0), tl.int64) * PIXELS \
        + tl.arange(0, PIXELS)[:, None]
    inside = pixel < pixels
    x = tl.load(x_ptr + pixel * C + channel, inside & (channel < C),
                0.).to(tl.float32)
    out = (gelu(x, exact) - mean) * scale + bias
    if PATCH > 1:
        pixel, is_used = patch_index(pixel, height, width, PATCH)
        inside &= is_used
    tl.store(out_ptr + pixel * OUT + channel, out, inside & (channel < OUT))


@plan
def _gelu_norm_launch(shape: tuple[int, ...], used: int, patch: int,
                      channels: int) -> Launch:
    n, height, width, c = shape
    tile, pixels = dict(norm_tile(channels), C=c), n * height * width
    return Launch(
        _gelu_norm_kernel, ceil_div(pixels, tile['PIXELS']), pixels, height,
        width, USED=used, OUT=channels, PATCH=patch, **tile)


def gelu_norm(x: Tensor, mean: Tensor, rstd: Tensor, weight: Tensor,
              bias: Tensor, patch: int, channels: int) -> Tensor:
    """See :func:`mmconv2former.torch_kernels.gelu_norm`."""
    n, height, width, _ = x.shape
    out = x.new_empty(
        (n, height // patch, width // patch, patch * patch * channels))
    _gelu_norm_launch(x.shape, len(weight), patch, channels)(
        x, mean, rstd, weight, bias, out)
    return out


@triton.jit(do_not_specialize=['pixels', 'tiles', 'height', 'width'])
def _gelu_norm_sums_kernel(grad_ptr, x_ptr, mean_ptr, rstd_ptr, partial_ptr,
                           pixels, tiles, height, width, C: tl.constexpr,
                           GRAD: tl.constexpr, PATCH: tl.constexpr,
                           BLOCK: tl.constexpr, PIXELS: tl.constexpr):
    """Sums of the gradient, and of its products with what was normalized."""
    exact: tl.constexpr = x_ptr.dtype.element_ty != tl.bfloat16
    channel, part, parts = column_place(C, BLOCK)
    used = channel < C
    mean = tl.load(mean_ptr + channel, used, 0.)
    rstd = tl.load(rstd_ptr + channel, used, 0.)
    sums = tl.zeros((PIXELS, BLOCK), tl.float32)
    products = tl.zeros((PIXELS, BLOCK), tl.float32)
    for tile in range(part, tiles, parts):
        pixel = tl.cast(tile, tl.int64) * PIXELS \
            + tl.arange(0, PIXELS)[:, None]
        inside = used & (pixel < pixels)
        x = tl.load(x_ptr + pixel * C + channel, inside, 0.).to(tl.float32)
        if PATCH > 1:
            pixel, is_used = patch_index(pixel, height, width, PATCH)
            inside &= is_used
        grad = tl.load(grad_ptr + pixel * GRAD + channel, inside,
                       0.).to(tl.float32)
        sums += grad
        products += grad * ((gelu(x, exact) - mean) * rstd)
    out = partial_ptr + part * (2 * C) + channel
    tl.store(out, tl.sum(products, 0)[None, :], used)
    tl.store(out + C, tl.sum(sums, 0)[None, :], used)


@triton.jit(do_not_specialize=['pixels', 'height', 'width'])
def _gelu_norm_backward_kernel(grad_ptr, x_ptr, mean_ptr, rstd_ptr, weight_ptr,
                               sums_ptr, out_ptr, pixels, height, width,
                               C: tl.constexpr, USED: tl.constexpr,
                               GRAD: tl.constexpr, OUT: tl.constexpr,
                               PATCH: tl.constexpr, BLOCK: tl.constexpr,
                               PIXELS: tl.constexpr):
    """Gradient of x, through the moments where there are their sums."""
    exact: tl.constexpr = x_ptr.dtype.element_ty != tl.bfloat16
    channel = tl.arange(0, BLOCK)[None, :]
    used = channel < USED
    mean = tl.load(mean_ptr + channel, used, 0.)
    rstd = tl.load(rstd_ptr + channel, used, 0.)
    scale = tl.load(weight_ptr + channel, used, 0.).to(tl.float32) * rstd
    pixel = tl.cast(tl.program_id(0), tl.int64) * PIXELS \
        + tl.arange(0, PIXELS)[:, None]
    inside = pixel < pixels
    x = tl.load(x_ptr + pixel * C + channel, inside & (channel < C),
                0.).to(tl.float32)
    place, has_grad = pixel, inside & used
    if PATCH > 1:
        place, is_used = patch_index(pixel, height, width, PATCH)
        has_grad &= is_used
    grad = tl.load(grad_ptr + place * GRAD + channel, has_grad,
                   0.).to(tl.float32)
    h, slope = gelu_and_slope(x, exact)
    if sums_ptr is not None:  # through the moments
        products = tl.load(sums_ptr + channel, used, 0.)
        total = tl.load(sums_ptr + C + channel, used, 0.)
        grad -= (total + (h - mean) * rstd * products) / pixels
    tl.store(out_ptr + pixel * OUT + channel, grad * scale * slope,
             inside & (channel < OUT))


@plan
def _gelu_norm_backward_launches(
        shape: tuple[int, ...], used: int, grad_channels: int, patch: int,
        channels: int) -> tuple[Launch, Launch, tuple[int, ...]]:
    _, height, width, c = shape
    options = dict(GRAD=grad_channels, PATCH=patch)
    tile, pixels, tiles, parts = column_tiles(shape, 16)
    first = Launch(
        _gelu_norm_sums_kernel, parts * ceil_div(c, tile['BLOCK']), pixels,
        tiles, height, width, **options, **tile)
    tile = dict(norm_tile(channels), C=c)
    second = Launch(
        _gelu_norm_backward_kernel, ceil_div(pixels, tile['PIXELS']), pixels,
        height, width, USED=used, OUT=channels, **options, **tile)
    return first, second, (parts, 2, 1, c)


def gelu_norm_backward(grad: Tensor, x: Tensor, mean: Tensor, rstd: Tensor,
                       weight: Tensor, training: bool, patch: int,
                       channels: int) -> tuple[Tensor, Tensor, Tensor]:
    """See :func:`mmconv2former.torch_kernels.gelu_norm_backward`."""
    first, second, partial = _gelu_norm_backward_launches(
        x.shape, len(weight), grad.shape[3] // patch**2, patch, channels)
    partial = x.new_empty(partial, dtype=torch.float32)
    grad, out = grad.contiguous(), x.new_empty((*x.shape[:3], channels))
    first(grad, x, mean, rstd, partial)
    sums = sum_partials(partial)
    second(grad, x, mean, rstd, weight, sums if training else None, out)
    grad_weight, grad_bias = sums.view(2, -1)[:, :len(weight)].unbind()
    return out, grad_weight, grad_bias
