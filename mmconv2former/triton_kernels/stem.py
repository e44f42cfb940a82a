"""Triton kernels of the stem: GELU and batch norm between its convolutions.

Functions without a leading underscore stand in for those of the same names in
:mod:`mmconv2former.torch_kernels`, which describes them and is their
reference.
What is said of precision and order in :mod:`mmconv2former.triton_kernels`
holds here too, but for GELU, which is exact of fp16 as well: the error of the
other form has one sign, and would be that of the mean of a million values.
"""
from math import gcd, prod

import torch
import triton
import triton.language as tl
from torch import Tensor

from .gelu import gelu, gelu_and_slope
from .launch import Launch, plan
from .sums import sum_partials
from .tiling import ceil_div, patch_index, programs_of_four_warps, to_fp32


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


def _tiles(pixels: int, channels: int, rows: int) -> tuple[dict, int, int]:
    """Block sizes of a map with a multiple of 8 channels, tiles of so many
    rows, and the blocks of each.

    The map is taken for a matrix with rows of ``GROUP`` pixels, as many as
    fill blocks of 64 columns, of which a program has one: with 40 channels,
    three of eight threads would be idle otherwise.
    """
    group = 64 // gcd(channels, 64)
    return (dict(GROUP=group, ROWS=rows), ceil_div(pixels, group * rows),
            group * channels // 64)


@triton.jit
def _columns(program, C: tl.constexpr, GROUP: tl.constexpr,
             ROWS: tl.constexpr):
    """Columns and pixels of a program, and the number of its tile or part.

    Returns:
        tuple: Pixels of a tile from its first, (8, ROWS, 1), channels,
        (8, 1, 8), columns, (8, 1, 8), and the number. Vectors of 8 channels
        come first: neighbouring threads take those, and not rows.
    """
    blocks: tl.constexpr = GROUP * C // 64
    vector = program % blocks * 8 + tl.arange(0, 8)[:, None, None]
    lane = tl.arange(0, 8)[None, None, :]
    pixel = tl.arange(0, ROWS)[None, :, None] * GROUP + vector // (C // 8)
    return (pixel, vector % (C // 8) * 8 + lane, vector * 8 + lane,
            program // blocks)


@triton.jit
def _first_pixel(tile, GROUP: tl.constexpr, ROWS: tl.constexpr):
    return tl.cast(tile, tl.int64) * (ROWS * GROUP)


@triton.jit(do_not_specialize=['pixels', 'tiles', 'parts'])
def _gelu_moments_kernel(x_ptr, partial_ptr, pixels, tiles, parts,
                         C: tl.constexpr, GROUP: tl.constexpr,
                         ROWS: tl.constexpr):
    """For each part and column the number of values, their mean, and the sum
    of the squares of their distances from it."""
    exact: tl.constexpr = x_ptr.dtype.element_ty != tl.bfloat16
    pixel, channel, column, part = _columns(tl.program_id(0), C, GROUP, ROWS)
    at = pixel * C + channel
    counts = tl.zeros((8, ROWS, 1), tl.float32)
    sums = tl.zeros((8, ROWS, 8), tl.float32)
    squares = tl.zeros((8, ROWS, 8), tl.float32)
    # Distances are from the mean of the first tile: squares of large values
    # would hide a small variance.
    first = _first_pixel(part, GROUP, ROWS)
    inside = first + pixel < pixels
    x = to_fp32(tl.load(x_ptr + first * C + at, inside, 0.))
    count = tl.maximum(tl.sum(inside.to(tl.float32), 1), 1.)
    centre = (tl.sum(gelu(x, exact), 1) / count)[:, None, :]
    for tile in range(part, tiles, parts):
        first = _first_pixel(tile, GROUP, ROWS)
        inside = first + pixel < pixels
        x = to_fp32(tl.load(x_ptr + first * C + at, inside, 0.))
        x = tl.where(inside, gelu(x, exact) - centre, 0.)
        sums += x
        squares += x * x
        counts += inside.to(tl.float32)
    count = tl.sum(counts, 1)[:, None, :]
    # None where a map has fewer pixels than a row has.
    mean = tl.sum(sums, 1)[:, None, :] / tl.maximum(count, 1.)
    out = partial_ptr + part * (3 * GROUP * C) + column
    tl.store(out, tl.broadcast_to(count, (8, 1, 8)))
    tl.store(out + GROUP * C, centre + mean)
    tl.store(out + 2 * GROUP * C,
             tl.sum(squares, 1)[:, None, :] - count * (mean * mean))


@triton.jit(do_not_specialize=['pixels', 'parts'])
def _moments_kernel(partial_ptr, mean_ptr, rstd_ptr, running_mean_ptr,
                    running_var_ptr, pixels, parts, eps, momentum,
                    C: tl.constexpr, USED: tl.constexpr, GROUP: tl.constexpr,
                    COLUMNS: tl.constexpr, ROWS: tl.constexpr):
    """Moments of all parts and columns from those of each; updates the running
    ones."""
    channel = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    sums = tl.zeros((ROWS, COLUMNS), tl.float32)
    for start in range(0, parts * GROUP, ROWS):
        row = start + tl.arange(0, ROWS)[:, None]
        inside = (row < parts * GROUP) & (channel < C)[None, :]
        at = partial_ptr + channel[None, :] \
            + (row // GROUP * (3 * GROUP) + row % GROUP) * C
        sums += tl.load(at, inside, 0.) * tl.load(at + GROUP * C, inside, 0.)
    mean = tl.sum(sums, 0) / pixels
    sums = tl.zeros((ROWS, COLUMNS), tl.float32)
    for start in range(0, parts * GROUP, ROWS):
        row = start + tl.arange(0, ROWS)[:, None]
        inside = (row < parts * GROUP) & (channel < C)[None, :]
        at = partial_ptr + channel[None, :] \
            + (row // GROUP * (3 * GROUP) + row % GROUP) * C
        distance = tl.load(at + GROUP * C, inside, 0.) - mean[None, :]
        sums += tl.load(at + 2 * GROUP * C, inside, 0.) \
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


def _sums_tile(shape: tuple[int, ...]) -> tuple[dict, int, int, int, int]:
    """Block sizes of sums over the pixels, pixels, tiles, parts of the sums
    and programs for them, which run at a time."""
    *image, c = shape
    pixels = prod(image)
    tile, tiles, blocks = _tiles(pixels, c, 32)
    # With 80 registers there is room for 24 warps.
    parts = max(min(tiles, programs_of_four_warps(24) // blocks), 1)
    return dict(tile, maxnreg=80), pixels, tiles, parts, parts * blocks


@plan
def _moments_launches(shape: tuple[int, ...], used: int, eps: float,
                      momentum: float
                      ) -> tuple[Launch, Launch, tuple[int, ...]]:
    c, columns = shape[3], 8
    tile, pixels, tiles, parts, programs = _sums_tile(shape)
    return (Launch(_gelu_moments_kernel, programs, pixels, tiles, parts, C=c,
                   **tile),
            Launch(_moments_kernel, ceil_div(c, columns), pixels, parts, eps,
                   momentum, C=c, USED=used, GROUP=tile['GROUP'],
                   COLUMNS=columns, ROWS=256),
            (parts, 3, tile['GROUP'], c))


def gelu_moments(x: Tensor, running_mean: Tensor, running_var: Tensor,
                 eps: float, momentum: float) -> tuple[Tensor, Tensor]:
    """See :func:`mmconv2former.torch_kernels.gelu_moments`."""
    c = x.shape[3]
    first, second, partial = _moments_launches(
        x.shape, len(running_mean), float(eps), float(momentum))
    partial = x.new_empty(partial, dtype=torch.float32)
    mean, rstd = (x.new_empty(c, dtype=torch.float32) for _ in range(2))
    first(x, partial)
    second(partial, mean, rstd, running_mean, running_var)
    return mean, rstd


@triton.jit(do_not_specialize=['pixels', 'height', 'width'])
def _gelu_norm_kernel(x_ptr, mean_ptr, rstd_ptr, weight_ptr, bias_ptr, out_ptr,
                      pixels, height, width, C: tl.constexpr,
                      USED: tl.constexpr, OUT: tl.constexpr,
                      PATCH: tl.constexpr, GROUP: tl.constexpr,
                      ROWS: tl.constexpr):
    """out = (GELU(x) - mean) * rstd * weight + bias, as patches."""
    exact: tl.constexpr = x_ptr.dtype.element_ty != tl.bfloat16
    pixel, channel, _, tile = _columns(tl.program_id(0), OUT, GROUP, ROWS)
    first = _first_pixel(tile, GROUP, ROWS)
    used = channel < USED
    scale = tl.load(weight_ptr + channel, used, 0.).to(tl.float32) \
        * tl.load(rstd_ptr + channel, used, 0.)
    bias = tl.load(bias_ptr + channel, used, 0.).to(tl.float32)
    mean = tl.load(mean_ptr + channel, used, 0.)
    inside = first + pixel < pixels
    x = tl.load(x_ptr + first * C + pixel * C + channel,
                inside & (channel < C), 0.)
    out = (gelu(to_fp32(x), exact) - mean) * scale + bias
    place, is_used = patch_index(first, pixel, height, width, PATCH)
    tl.store(out_ptr + place * OUT + channel, out, inside & is_used)


@plan
def _gelu_norm_launch(shape: tuple[int, ...], used: int, patch: int,
                      channels: int) -> Launch:
    *image, c = shape
    pixels = prod(image)
    tile, tiles, blocks = _tiles(pixels, channels, 64)
    return Launch(_gelu_norm_kernel, tiles * blocks, pixels, *image[1:], C=c,
                  USED=used, OUT=channels, PATCH=patch, **tile)


def gelu_norm(x: Tensor, mean: Tensor, rstd: Tensor, weight: Tensor,
              bias: Tensor, patch: int, channels: int) -> Tensor:
    """See :func:`mmconv2former.torch_kernels.gelu_norm`."""
    n, height, width, _ = x.shape
    out = x.new_empty(
        (n, height // patch, width // patch, patch * patch * channels))
    _gelu_norm_launch(x.shape, len(weight), patch, channels)(
        x, mean, rstd, weight, bias, out)
    return out


@triton.jit(do_not_specialize=[
    'pixels', 'tiles', 'parts', 'height', 'width'])
def _gelu_norm_sums_kernel(grad_ptr, x_ptr, mean_ptr, rstd_ptr, partial_ptr,
                           pixels, tiles, parts, height, width,
                           C: tl.constexpr, GRAD: tl.constexpr,
                           PATCH: tl.constexpr, GROUP: tl.constexpr,
                           ROWS: tl.constexpr):
    """Sums of the gradient, and of its products with what was normalized."""
    exact: tl.constexpr = x_ptr.dtype.element_ty != tl.bfloat16
    pixel, channel, column, part = _columns(tl.program_id(0), C, GROUP, ROWS)
    at = pixel * C + channel
    mean, rstd = tl.load(mean_ptr + channel), tl.load(rstd_ptr + channel)
    sums = tl.zeros((8, ROWS, 8), tl.float32)
    products = tl.zeros((8, ROWS, 8), tl.float32)
    for tile in range(part, tiles, parts):
        first = _first_pixel(tile, GROUP, ROWS)
        inside = first + pixel < pixels
        x = tl.load(x_ptr + first * C + at, inside, 0.)
        place, is_used = patch_index(first, pixel, height, width, PATCH)
        grad = to_fp32(tl.load(grad_ptr + place * GRAD + channel,
                               inside & is_used, 0.))
        sums += grad
        products += grad * (gelu(to_fp32(x), exact) - mean)
    out = partial_ptr + part * (2 * GROUP * C) + column
    tl.store(out, tl.sum(products, 1)[:, None, :] * rstd)
    tl.store(out + GROUP * C, tl.sum(sums, 1)[:, None, :])


@triton.jit(do_not_specialize=['pixels', 'height', 'width'])
def _gelu_norm_backward_kernel(grad_ptr, x_ptr, mean_ptr, rstd_ptr, weight_ptr,
                               sums_ptr, out_ptr, pixels, height, width,
                               C: tl.constexpr, USED: tl.constexpr,
                               GRAD: tl.constexpr, OUT: tl.constexpr,
                               PATCH: tl.constexpr, GROUP: tl.constexpr,
                               ROWS: tl.constexpr):
    """Gradient of x, through the moments where there are their sums."""
    exact: tl.constexpr = x_ptr.dtype.element_ty != tl.bfloat16
    pixel, channel, _, tile = _columns(tl.program_id(0), OUT, GROUP, ROWS)
    first = _first_pixel(tile, GROUP, ROWS)
    used = channel < USED
    mean = tl.load(mean_ptr + channel, used, 0.)
    rstd = tl.load(rstd_ptr + channel, used, 0.)
    scale = tl.load(weight_ptr + channel, used, 0.).to(tl.float32) * rstd
    inside = first + pixel < pixels
    x = tl.load(x_ptr + first * C + pixel * C + channel,
                inside & (channel < C), 0.)
    place, is_used = patch_index(first, pixel, height, width, PATCH)
    grad = to_fp32(tl.load(grad_ptr + place * GRAD + channel,
                           inside & is_used & used, 0.))
    h, slope = gelu_and_slope(to_fp32(x), exact)
    if sums_ptr is not None:  # through the moments
        products = tl.load(sums_ptr + channel, used, 0.) * (rstd / pixels)
        total = tl.load(sums_ptr + C + channel, used, 0.) * (1. / pixels)
        grad -= total + (h - mean) * products
    tl.store(out_ptr + first * OUT + pixel * OUT + channel,
             grad * scale * slope, inside)


@plan
def _gelu_norm_backward_launches(
        shape: tuple[int, ...], used: int, grad_channels: int, patch: int,
        channels: int) -> tuple[Launch, Launch, tuple[int, ...]]:
    _, height, width, c = shape
    options = dict(C=c, GRAD=grad_channels, PATCH=patch)
    tile, pixels, tiles, parts, programs = _sums_tile(shape)
    first = Launch(_gelu_norm_sums_kernel, programs, pixels, tiles, parts,
                   height, width, **options, **tile)
    partial = parts, 2, tile['GROUP'], c
    tile, tiles, blocks = _tiles(pixels, channels, 64)
    second = Launch(_gelu_norm_backward_kernel, tiles * blocks, pixels, height,
                    width, USED=used, OUT=channels, **options, **tile)
    return first, second, partial


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
