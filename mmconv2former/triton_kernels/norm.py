"""Layer norm, and the residual with layer scale and drop path."""
import torch
import triton
import triton.language as tl
from torch import Tensor

from ..torch_kernels import branch_grads, patches_shape
from .launch import Launch, plan
from .sums import sum_partials
from .tiling import (
    as_pixels,
    ceil_div,
    chunk_tile,
    column_place,
    column_tiles,
    contiguous_like,
    padded_tile,
    patch_index,
    repeat,
    small_images,
    to_fp32,
)


@triton.jit
def _channels(PIXELS: tl.constexpr, BLOCK: tl.constexpr):
    """Channels of a tile, in its full shape.

    So that vectors over the channels are loaded in the layout of the tile: in
    one of their own, threads have to exchange them.
    """
    return tl.broadcast_to(tl.arange(0, BLOCK)[None, :], (PIXELS, BLOCK))


@triton.jit
def _load_chunks(ptr, inside, COUNT: tl.constexpr, STEP: tl.constexpr):
    out = ()
    for i in tl.static_range(COUNT):
        out = out + (tl.load(ptr + i * STEP, inside, 0.), )
    return out


@triton.jit
def _moments(xs, used, eps, C: tl.constexpr, CHUNKS: tl.constexpr):
    """Mean and inverse standard deviation of rows that come in chunks."""
    sums = to_fp32(xs[0])
    for i in tl.static_range(1, CHUNKS):
        sums += to_fp32(xs[i])
    mean = tl.sum(sums, 1)[:, None] / C
    squares = tl.zeros_like(sums)
    for i in tl.static_range(CHUNKS):
        centred = tl.where(used, to_fp32(xs[i]) - mean, 0.)
        squares += centred * centred
    # Not infinite outside the tensor if eps is 0.
    return mean, tl.rsqrt(
        tl.maximum(tl.sum(squares, 1)[:, None] / C + eps, 1e-30))


@triton.jit
def _affine(normed, weight_ptr, bias_ptr, channel, used):
    if weight_ptr is not None:
        normed *= tl.load(weight_ptr + channel, used, 0.).to(tl.float32)
        normed += tl.load(bias_ptr + channel, used, 0.).to(tl.float32)
    return normed


@triton.jit(do_not_specialize=['pixels', 'height', 'width'])
def _layer_norm_kernel(x_ptr, weight_ptr, bias_ptr, out_ptr, pixels, height,
                       width, eps, C: tl.constexpr, X_STRIDE: tl.constexpr,
                       PATCH: tl.constexpr, CHUNKS: tl.constexpr,
                       BLOCK: tl.constexpr, PIXELS: tl.constexpr):
    """out = (x - mean) * rstd * weight + bias, as patches."""
    STEP: tl.constexpr = C // CHUNKS
    channel = _channels(PIXELS, BLOCK)
    used = channel < STEP
    first = tl.cast(tl.program_id(0), tl.int64) * PIXELS
    pixel = tl.arange(0, PIXELS)[:, None]
    inside = used & (first + pixel < pixels)
    xs = _load_chunks(x_ptr + (first + pixel) * X_STRIDE + channel, inside,
                      CHUNKS, STEP)
    mean, rstd = _moments(xs, used, eps, C, CHUNKS)
    place, is_used = patch_index(first, pixel, height, width, PATCH)
    for i in tl.static_range(CHUNKS):
        normed = _affine((to_fp32(xs[i]) - mean) * rstd, weight_ptr, bias_ptr,
                         i * STEP + channel, used)
        tl.store(out_ptr + place * C + i * STEP + channel, normed,
                 inside & is_used)


def _row_tile(channels: int) -> dict:
    """Blocks of whole pixels without sums over them, of four warps."""
    tile, _ = chunk_tile(channels)
    return dict(tile, PIXELS=tile['PIXELS'] * 4 // tile['num_warps'],
                num_warps=4)


@plan
def _layer_norm_launch(shape: tuple[int, ...], stride: int, eps: float,
                       patch: int) -> Launch:
    n, height, width, c = shape
    tile, pixels = _row_tile(c), n * height * width
    return Launch(_layer_norm_kernel, ceil_div(pixels, tile['PIXELS']),
                  pixels, height, width, eps, X_STRIDE=stride, PATCH=patch,
                  **tile)


def layer_norm(x: Tensor, weight: Tensor | None, bias: Tensor | None,
               eps: float, dtype: torch.dtype, patch: int = 1) -> Tensor:
    """See :func:`mmconv2former.torch_kernels.layer_norm`.

    That of torch gives each pixel a block of threads, most of which have
    nothing to do where channels are few.
    """
    out = _patches_like(x, patch, dtype)
    shape, (x, stride) = x.shape, as_pixels(x)
    _layer_norm_launch(shape, stride, float(eps), patch)(
        x, _contiguous(weight), _contiguous(bias), out)
    return out


def _patches_like(x: Tensor, patch: int, dtype: torch.dtype) -> Tensor:
    return contiguous_like(x, dtype) if patch == 1 else x.new_empty(
        patches_shape(x, patch), dtype=dtype)


@triton.jit
def _keep_of(keep_ptr, pixel, pixels, area):
    """The factor of drop path for each pixel, of which an image has area."""
    return tl.load(keep_ptr + pixel.to(tl.int32) // area, pixel < pixels,
                   0.).to(tl.float32)


@triton.jit
def _store_own(grad, scale_ptr, keep, own_ptr, scaled_ptr, at, channel, inside,
               used):
    """own = grad * keep and scaled = own * scale, where they are asked for.

    Returns own as it is rounded, which the gradient of the weight will find;
    zeros outside.
    """
    own = to_fp32(grad) * keep
    if own_ptr is not None:
        rounded = own.to(own_ptr.dtype.element_ty)
        tl.store(own_ptr + at, rounded, inside)
        own = to_fp32(rounded)
    if scaled_ptr is not None:
        scale = tl.load(scale_ptr + channel, used, 0.).to(tl.float32)
        tl.store(scaled_ptr + at, own * scale, inside)
    return tl.where(inside, own, 0.)


@triton.jit(do_not_specialize=['pixels', 'tiles', 'height', 'width'])
def _layer_norm_backward_kernel(
        grad_ptr, x_ptr, weight_ptr, bias_ptr, residual_ptr, scale_ptr,
        keep_ptr, grad_x_ptr, normed_ptr, own_ptr, scaled_ptr, partial_ptr,
        pixels, tiles, height, width, eps, C: tl.constexpr,
        GRAD_STRIDE: tl.constexpr, X_STRIDE: tl.constexpr,
        RESIDUAL_STRIDE: tl.constexpr, SUMS_RESIDUAL: tl.constexpr,
        PATCH: tl.constexpr, CHUNKS: tl.constexpr, BLOCK: tl.constexpr,
        PIXELS: tl.constexpr):
    """With g = grad * weight and n = (x - mean) * rstd,

    grad_x = (g - mean(g) - n * mean(g * n)) * rstd + residual, the output
    once more, and sums of grad * n, of grad and, if asked, of the residual for
    each program. If asked also own = grad_x * keep with its sums, and scaled =
    own * scale.
    """
    pid = tl.program_id(0)
    STEP: tl.constexpr = C // CHUNKS
    channel = _channels(PIXELS, BLOCK)
    used = channel < STEP
    zero = tl.zeros((PIXELS, BLOCK), tl.float32)
    weight_sums = repeat(zero, CHUNKS)
    bias_sums = repeat(zero, CHUNKS)
    residual_sums = repeat(zero, CHUNKS)
    own_sums = repeat(zero, CHUNKS)
    goes_on: tl.constexpr = own_ptr is not None or scaled_ptr is not None
    for tile in range(pid, tiles, tl.num_programs(0)):
        first = tl.cast(tile, tl.int64) * PIXELS
        pixel = first + tl.arange(0, PIXELS)[:, None]
        inside = used & (pixel < pixels)
        xs = _load_chunks(x_ptr + pixel * X_STRIDE + channel, inside, CHUNKS,
                          STEP)
        place, is_used = patch_index(
            first, tl.arange(0, PIXELS)[:, None], height, width, PATCH)
        has_grad = inside & is_used
        grads = _load_chunks(grad_ptr + place * GRAD_STRIDE + channel,
                             has_grad, CHUNKS, STEP)
        if residual_ptr is not None:
            residuals = _load_chunks(
                residual_ptr + pixel * RESIDUAL_STRIDE + channel, inside,
                CHUNKS, STEP)
        mean, rstd = _moments(xs, used, eps, C, CHUNKS)
        grad_sums, product_sums = zero, zero
        new_weight_sums = ()
        new_bias_sums = ()
        for i in tl.static_range(CHUNKS):
            weight = tl.load(weight_ptr + i * STEP + channel, used,
                             0.).to(tl.float32)
            bias = tl.load(bias_ptr + i * STEP + channel, used,
                           0.).to(tl.float32)
            normed = (to_fp32(xs[i]) - mean) * rstd
            tl.store(normed_ptr + place * C + i * STEP + channel,
                     normed * weight + bias, has_grad)
            grad = to_fp32(grads[i])
            new_weight_sums = new_weight_sums + (weight_sums[i]
                                                 + grad * normed, )
            new_bias_sums = new_bias_sums + (bias_sums[i] + grad, )
            grad_sums += grad * weight
            product_sums += grad * weight * normed
        weight_sums = new_weight_sums
        bias_sums = new_bias_sums
        grad_mean = tl.sum(grad_sums, 1)[:, None] / C
        product_mean = tl.sum(product_sums, 1)[:, None] / C
        new_residual_sums = ()
        new_own_sums = ()
        keep = 1.
        if keep_ptr is not None:
            keep = _keep_of(keep_ptr, pixel, pixels, height * width)
        for i in tl.static_range(CHUNKS):
            # Once more: registers cost more.
            weight = tl.load(weight_ptr + i * STEP + channel, used,
                             0.).to(tl.float32)
            normed = (to_fp32(xs[i]) - mean) * rstd
            out = (to_fp32(grads[i]) * weight - grad_mean
                   - normed * product_mean) * rstd
            if residual_ptr is not None:
                residual = to_fp32(residuals[i])
                out += residual
                if SUMS_RESIDUAL:
                    new_residual_sums = new_residual_sums + (
                        residual_sums[i] + residual, )
            out = out.to(grad_x_ptr.dtype.element_ty)
            at = pixel * C + i * STEP + channel
            tl.store(grad_x_ptr + at, out, inside)
            if goes_on:
                own = _store_own(out, scale_ptr, keep, own_ptr, scaled_ptr, at,
                                 i * STEP + channel, inside, used)
                new_own_sums = new_own_sums + (own_sums[i] + own, )
        if SUMS_RESIDUAL:
            residual_sums = new_residual_sums
        if goes_on:
            own_sums = new_own_sums
    kinds: tl.constexpr = 2 + SUMS_RESIDUAL + goes_on
    row = tl.arange(0, BLOCK)[None, :]
    for i in tl.static_range(CHUNKS):
        to = partial_ptr + pid * (kinds * C) + i * STEP + row
        tl.store(to, tl.sum(weight_sums[i], 0)[None, :], row < STEP)
        tl.store(to + C, tl.sum(bias_sums[i], 0)[None, :], row < STEP)
        if SUMS_RESIDUAL:
            tl.store(to + 2 * C, tl.sum(residual_sums[i], 0)[None, :],
                     row < STEP)
        if goes_on:
            tl.store(to + (kinds - 1) * C, tl.sum(own_sums[i], 0)[None, :],
                     row < STEP)


@plan
def _layer_norm_backward_launch(
        shape: tuple[int, ...], grad_stride: int, stride: int,
        residual_stride: int, eps: float, patch: int, sums_residual: bool,
        goes_on: bool) -> tuple[Launch, tuple[int, ...]]:
    n, height, width, c = shape
    (tile, programs), pixels = chunk_tile(c), n * height * width
    tiles = ceil_div(pixels, tile['PIXELS'])
    programs = max(min(tiles, programs), 1)
    launch = Launch(_layer_norm_backward_kernel, programs, pixels, tiles,
                    height, width, eps, GRAD_STRIDE=grad_stride,
                    X_STRIDE=stride, RESIDUAL_STRIDE=residual_stride,
                    SUMS_RESIDUAL=int(sums_residual), PATCH=patch,
                    maxnreg=128,  # all programs at a time
                    **tile)
    return launch, (programs, 2 + sums_residual + goes_on, 1, c)


def layer_norm_backward(
        grad: Tensor, x: Tensor, weight: Tensor, bias: Tensor, eps: float,
        residual: Tensor | None, patch: int = 1, sums_residual: bool = False
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """See :func:`mmconv2former.torch_kernels.layer_norm_backward`."""
    return _layer_norm_backward(
        grad, x, weight, bias, eps, residual, patch, sums_residual)[:5]


def _layer_norm_backward(
        grad: Tensor, x: Tensor, weight: Tensor, bias: Tensor, eps: float,
        residual: Tensor | None, patch: int, sums_residual: bool,
        scale: Tensor | None = None, keep: Tensor | None = None,
        own: Tensor | None = None,
        scaled: Tensor | None = None) -> tuple[Tensor, ...]:
    grad_x = contiguous_like(x)
    normed = _patches_like(x, patch, grad.dtype)
    shape, step = x.shape, 0
    if patch == 1:
        grad, grad_stride = as_pixels(grad)
    else:
        grad, grad_stride = grad.contiguous(), shape[3]
    x, stride = as_pixels(x)
    if residual is not None:
        residual, step = as_pixels(residual)
    goes_on = own is not None or scaled is not None
    launch, partial = _layer_norm_backward_launch(
        shape, grad_stride, stride, step, float(eps), patch, sums_residual,
        goes_on)
    partial = x.new_empty(partial, dtype=torch.float32)
    launch(grad, x, weight.contiguous(), bias.contiguous(), residual, scale,
           keep, grad_x, normed, own, scaled, partial)
    c = shape[3]
    grad_weight, grad_bias, total, own_total = sum_partials(
        partial).split_with_sizes((c, c, sums_residual * c, goes_on * c))
    return grad_x, grad_weight, grad_bias, normed, total, own_total


@triton.jit(do_not_specialize=['area'])
def _scale_residual_kernel(
        x_ptr, y_ptr, scale_ptr, keep_ptr, weight_ptr, bias_ptr, out_ptr,
        normed_ptr, area, eps, C: tl.constexpr, X_STRIDE: tl.constexpr,
        Y_STRIDE: tl.constexpr, CHUNKS: tl.constexpr, BLOCK: tl.constexpr,
        PIXELS: tl.constexpr):
    """out = x + keep * scale * y, and its layer norm if asked."""
    tiles = tl.cdiv(area, PIXELS)
    n = tl.cast(tl.program_id(0) // tiles, tl.int64)
    STEP: tl.constexpr = C // CHUNKS
    channel = _channels(PIXELS, BLOCK)
    used = channel < STEP
    pixel = tl.program_id(0) % tiles * PIXELS + tl.arange(0, PIXELS)[:, None]
    inside = used & (pixel < area)
    xs = _load_chunks(x_ptr + n * area * X_STRIDE + pixel * X_STRIDE + channel,
                      inside, CHUNKS, STEP)
    ys = _load_chunks(y_ptr + n * area * Y_STRIDE + pixel * Y_STRIDE + channel,
                      inside, CHUNKS, STEP)
    keep = 1.
    if keep_ptr is not None:
        keep = tl.load(keep_ptr + n).to(tl.float32)
    at = n * area * C + pixel * C + channel
    outs = ()
    for i in tl.static_range(CHUNKS):
        y = to_fp32(ys[i])
        if scale_ptr is not None:
            scale = tl.load(scale_ptr + i * STEP + channel, used, 0.)
            y *= scale.to(tl.float32) * keep
        elif keep_ptr is not None:
            y *= keep
        out = (to_fp32(xs[i]) + y).to(xs[i].dtype)
        tl.store(out_ptr + at + i * STEP, out, inside)
        outs = outs + (to_fp32(out), )
    if normed_ptr is not None:
        mean, rstd = _moments(outs, used, eps, C, CHUNKS)
        for i in tl.static_range(CHUNKS):
            normed = _affine((outs[i] - mean) * rstd, weight_ptr,
                             bias_ptr, i * STEP + channel, used)
            tl.store(normed_ptr + at + i * STEP, normed, inside)


@plan
def _scale_residual_launch(shape: tuple[int, ...], x_stride: int,
                           y_stride: int, eps: float,
                           norms: bool) -> Launch:
    n, height, width, c = shape
    # Without the norm, memory is the limit also where threads are idle.
    area, tile = height * width, (_row_tile if norms else padded_tile)(c)
    return Launch(_scale_residual_kernel,
                  n * ceil_div(area, tile['PIXELS']), area, eps,
                  X_STRIDE=x_stride, Y_STRIDE=y_stride, **tile)


def scale_residual(x: Tensor, y: Tensor, scale: Tensor | None,
                   keep: Tensor | None) -> Tensor:
    """See :func:`mmconv2former.torch_kernels.scale_residual`."""
    return _scale_residual(x, y, scale, keep)


def scale_residual_norm(x: Tensor, y: Tensor, scale: Tensor | None,
                        keep: Tensor | None, weight: Tensor | None,
                        bias: Tensor | None, eps: float,
                        dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """See :func:`mmconv2former.torch_kernels.scale_residual_norm`."""
    normed = contiguous_like(x, dtype)
    out = _scale_residual(x, y, scale, keep, weight, bias, eps, normed)
    return out, normed


def _scale_residual(x: Tensor, y: Tensor, scale: Tensor | None,
                    keep: Tensor | None, weight: Tensor | None = None,
                    bias: Tensor | None = None, eps: float = 0.,
                    normed: Tensor | None = None) -> Tensor:
    out = contiguous_like(x)
    shape, (x, x_stride), (y, y_stride) = x.shape, as_pixels(x), as_pixels(y)
    images = small_images(shape, max(x_stride, y_stride))
    scale, keep, weight, bias = map(_contiguous, (scale, keep, weight, bias))
    if keep is not None and images is not shape:
        keep = keep.repeat_interleave(shape[1])
    _scale_residual_launch(images, x_stride, y_stride, float(eps),
                           normed is not None)(
        x, y, scale, keep, weight, bias, out, normed)
    return out


def _contiguous(parameter: Tensor | None) -> Tensor | None:
    return None if parameter is None else parameter.contiguous()


@triton.jit(do_not_specialize=['pixels', 'tiles', 'area'])
def _scale_residual_backward_kernel(
        grad_ptr, scale_ptr, keep_ptr, own_ptr, scaled_ptr, partial_ptr,
        pixels, tiles, area, C: tl.constexpr, GRAD_STRIDE: tl.constexpr,
        BLOCK: tl.constexpr, PIXELS: tl.constexpr):
    """own = grad * keep with its sums for each part, and scaled = own * scale.
    """
    channel, part, parts = column_place(C, BLOCK)
    used = channel < C
    sums = tl.zeros((PIXELS, BLOCK), tl.float32)
    for tile in range(part, tiles, parts):
        pixel = tl.cast(tile, tl.int64) * PIXELS \
            + tl.arange(0, PIXELS)[:, None]
        inside = used & (pixel < pixels)
        grad = tl.load(grad_ptr + pixel * GRAD_STRIDE + channel, inside, 0.)
        keep = 1.
        if keep_ptr is not None:
            keep = _keep_of(keep_ptr, pixel, pixels, area)
        sums += _store_own(grad, scale_ptr, keep, own_ptr, scaled_ptr,
                           pixel * C + channel, channel, inside, used)
    tl.store(partial_ptr + part * C + channel,
             tl.sum(sums, 0)[None, :], used)


@plan
def _scale_residual_backward_launch(
        shape: tuple[int, ...],
        grad_stride: int) -> tuple[Launch, tuple[int, ...]]:
    c = shape[3]
    tile, pixels, tiles, parts = column_tiles(shape, 32 if c > 128 else 128)
    launch = Launch(
        _scale_residual_backward_kernel, parts * ceil_div(c, tile['BLOCK']),
        pixels, tiles, shape[1] * shape[2], GRAD_STRIDE=grad_stride, **tile)
    return launch, (parts, 1, 1, c)


def scale_residual_backward(
        grad: Tensor, scale: Tensor | None, keep: Tensor | None,
        dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """See :func:`mmconv2former.torch_kernels.scale_residual_backward`."""
    own, scaled = branch_grads(grad, scale, keep, dtype)
    shape, (grad, stride) = grad.shape, as_pixels(grad)
    launch, partial = _scale_residual_backward_launch(shape, stride)
    partial = grad.new_empty(partial, dtype=torch.float32)
    launch(grad, _contiguous(scale), _contiguous(keep), _unless_empty(own),
           _unless_empty(scaled), partial)
    return own, scaled, sum_partials(partial)


def _unless_empty(x: Tensor) -> Tensor | None:
    return x if x.numel() else None


def scale_residual_norm_backward(
        grad: Tensor, x: Tensor, weight: Tensor, bias: Tensor, eps: float,
        residual: Tensor, scale: Tensor | None, keep: Tensor | None,
        dtype: torch.dtype, sums_residual: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """See :func:`mmconv2former.torch_kernels.scale_residual_norm_backward`."""
    own, scaled = branch_grads(x, scale, keep, dtype)
    *others, total = _layer_norm_backward(
        grad, x, weight, bias, eps, residual, 1, sums_residual,
        _contiguous(scale), _contiguous(keep), _unless_empty(own),
        _unless_empty(scaled))
    return *others, own, scaled, total
