"""Triton kernels of the residual branches.

Functions without a leading underscore stand in for those of the same names in
:mod:`mmconv2former.torch_kernels`, which describes them and is their
reference.

Tensors are (N, H, W, C) with the channels last in memory. Inputs may have any
strides; what the kernels cannot read in place (anything but a slice of the
channels) is copied first. Outputs are contiguous. Arithmetic is in fp32,
each output is rounded once, and sums are taken in a fixed order, so that two
runs give the same bits. Nothing here builds a graph for autograd, and the
device of the tensors has to be the current one.

The depthwise kernels are sliding windows in registers. A lane owns one channel
of one strip of ``STRIP`` columns; a warp is a program, with one lane or two
neighbouring ones for each of its threads, and lanes run over strips and
channels without a gap, so that 72 channels leave none idle. A program reads
each input row once, as ``STRIP + 2 * HALO`` coalesced loads, and uses every
value for up to K taps of each of its output rows. Where one strip spans the
image, ``HALO`` is 0 and the taps outside the image are neither loaded nor
multiplied.

Sizes of blocks were chosen by timing on an H100, of T at 128 x 224 x 224 in
bf16.
"""
from collections.abc import Sequence
from math import prod

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.torch_version import TorchVersion

from .torch_kernels import patches_shape
from .triton_launch import Launch, plan

if TorchVersion(triton.__version__) < (3, 3):
    raise ImportError(f'found Triton {triton.__version__}; expected 3.3 or '
                      'later (tuples in kernels), which torch 2.7 brings')

# Programs that sum over the batch: as many as the 132 multiprocessors of an
# H100 or H200 hold at a time. A constant, so that results do not depend on
# the device.
PROGRAMS = 16 * 132
# Where programs do not end together there are so many times more, for others
# to begin when the first have ended.
WAVES = 8


# Offsets within an image are counted in 32 bits.
MAX_OFFSETS = 2**31


def _ceil_div(a: int, b: int) -> int:
    # triton.cdiv takes a microsecond and a half.
    return -(-a // b)


def _tile(width: int, kernel_size: int, channels: int, strip: int, lanes: int,
          registers: int) -> tuple[dict, int]:
    """Block sizes of a depthwise kernel, and its programs for a row of output.

    ``strip`` divides 56, 28, 14 and 7. Fewer registers leave room for more
    warps, which hide each other's loads.
    """
    halo = kernel_size // 2 if width > strip else 0
    blocks = _ceil_div(_ceil_div(width, strip) * channels, lanes)
    return dict(STRIP=strip, HALO=halo, LANES=lanes, num_warps=1, num_stages=1,
                maxnreg=registers), blocks


def _convolution_tile(height: int, width: int, kernel_size: int,
                      channels: int) -> tuple[dict, int]:
    """:func:`_tile` of :func:`_convolve`, and programs for an image."""
    tile, blocks = _tile(width, kernel_size, channels, strip=7, lanes=64,
                         registers=96 if kernel_size <= 13 else 128)
    return dict(tile, ROWS=2), _ceil_div(height, 2) * blocks


def _splits(items: int, programs: int, waves: int = 1) -> int:
    """Into how many equal parts to cut a sum over the items.

    Each part is the work of as many programs; all of them fill the GPU.
    """
    share = _ceil_div(items, max(waves * PROGRAMS // programs, 1))
    return _ceil_div(items, max(share, 1))


def _pixels(x: Tensor) -> tuple[Tensor, int]:
    """(N, H, W, C) in equal steps from pixel to pixel, and the step.

    A copy where that cannot be.
    """
    if not x.is_contiguous():
        rows = x.reshape(-1, x.shape[-1])
        if rows.stride(1) == 1:
            return rows, rows.stride(0)
        x = rows.contiguous()
    return x, x.shape[-1]


def _small_images(shape: tuple[int, ...], stride: int) -> tuple[int, ...]:
    """The shape, or that of its rows as images where those are too large."""
    n, height, width, c = shape
    if height * width * stride < MAX_OFFSETS:
        return shape
    return n * height, 1, width, c


def filters(weight: Tensor, bias: Tensor,
            dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """See :func:`mmconv2former.torch_kernels.filters`; always in fp32."""
    return _taps_first(weight), bias


@triton.jit
def _copy(source_ptr, target_ptr, block, SIZE: tl.constexpr,
          BLOCK: tl.constexpr):
    at = block * BLOCK + tl.arange(0, BLOCK)
    tl.store(target_ptr + at, tl.load(source_ptr + at, at < SIZE), at < SIZE)


@triton.jit
def _operands_kernel(
        weight0_ptr, weight1_ptr, bias0_ptr, bias1_ptr, dw_ptr, out_weight_ptr,
        out_bias_ptr, in_weight_to, in_bias_to, taps_to, out_weight_to,
        out_bias_to, SIZE0: tl.constexpr, SIZE1: tl.constexpr,
        ROWS0: tl.constexpr, ROWS1: tl.constexpr, C: tl.constexpr,
        TAPS: tl.constexpr, OUT_SIZE: tl.constexpr, OUT_ROWS: tl.constexpr,
        BLOCK: tl.constexpr):
    """Copies of all weights of a branch, a block by each program."""
    first: tl.constexpr = (SIZE0 + BLOCK - 1) // BLOCK
    second: tl.constexpr = first + (SIZE1 + BLOCK - 1) // BLOCK
    third: tl.constexpr = second + (OUT_SIZE + BLOCK - 1) // BLOCK
    fourth: tl.constexpr = third + (C * TAPS + BLOCK - 1) // BLOCK
    block = tl.program_id(0)
    if block < first:
        _copy(weight0_ptr, in_weight_to, block, SIZE0, BLOCK)
    elif block < second:
        if weight1_ptr is not None:
            _copy(weight1_ptr, in_weight_to + SIZE0, block - first, SIZE1,
                  BLOCK)
    elif block < third:
        _copy(out_weight_ptr, out_weight_to, block - second, OUT_SIZE, BLOCK)
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


@plan
def _operands_launch(rows0: int, rows1: int, columns: int, c: int, k: int,
                     out_rows: int, out_columns: int) -> Launch:
    sizes = [rows0 * columns, rows1 * columns, out_rows * out_columns,
             c * k * k]
    block = 1024
    return Launch(
        _operands_kernel, sum(_ceil_div(size, block) for size in sizes) + 1,
        SIZE0=sizes[0], SIZE1=sizes[1], ROWS0=rows0, ROWS1=rows1, C=c,
        TAPS=k * k, OUT_SIZE=sizes[2], OUT_ROWS=out_rows, BLOCK=block)


def operands(parameters: Sequence[Tensor], dtype: torch.dtype) -> list[Tensor]:
    """See :func:`mmconv2former.torch_kernels.operands`.

    In one launch, where each of so many small copies would cost as much as a
    pass over megabytes.
    """
    *linears, dw_weight, dw_bias, out_weight, out_bias = (
        p.detach().contiguous() for p in parameters)
    weight0, bias0, weight1, bias1 = *linears, *(4 - len(linears)) * (None, )
    rows0, columns = weight0.shape[:2]
    rows1 = 0 if weight1 is None else len(weight1)
    c, _, k, _ = dw_weight.shape
    out_rows, out_columns = out_weight.shape[:2]
    in_weight = weight0.new_empty((rows0 + rows1, columns), dtype=dtype)
    in_bias = bias0.new_empty(rows0 + rows1, dtype=dtype)
    taps = dw_weight.new_empty((k, k, c, 1), dtype=torch.float32)
    out = out_weight.new_empty((out_rows, out_columns), dtype=dtype)
    copied_bias = out_bias.new_empty(out_rows, dtype=dtype)
    _operands_launch(rows0, rows1, columns, c, k, out_rows, out_columns)(
        weight0, weight1, bias0, bias1, dw_weight, out_weight, out_bias,
        in_weight, in_bias, taps, out, copied_bias)
    return [in_weight, in_bias, taps.permute(2, 3, 0, 1), dw_bias, out,
            copied_bias]


def _taps_first(weight: Tensor) -> Tensor:
    """(C, 1, K, K) in fp32, as (K * K, C) in memory: lanes read coalesced."""
    (c, _, k, _), (channel, _, row, column) = weight.shape, weight.stride()
    if weight.dtype == torch.float32 \
            and (channel, row, column) == (1, k * c, c):
        return weight
    taps = weight.new_empty((k, k, c, 1), dtype=torch.float32)
    return taps.permute(2, 3, 0, 1).copy_(weight.detach())


@triton.jit
def _sum(out_ptr, ptr, parts, strips, kind, kinds, first, channel,
         C: tl.constexpr, TAPS: tl.constexpr, COLUMNS: tl.constexpr,
         ROWS: tl.constexpr):
    """Sum of one kind, of those from ``first`` on that lie at ``ptr``."""
    used = channel < C
    sums = tl.zeros((ROWS, COLUMNS), tl.float32)
    for start in range(0, parts * strips, ROWS):
        row = start + tl.arange(0, ROWS)
        at = tl.cast(row // strips * kinds + kind - first, tl.int64) * strips \
            + row % strips
        sums += tl.load(ptr + at[:, None] * C + channel[None, :],
                        used[None, :] & (row < parts * strips)[:, None], 0.)
    at = kind * C + channel
    if kind < TAPS:
        at = channel * TAPS + kind
    tl.store(out_ptr + at, tl.sum(sums, 0), used)


@triton.jit(do_not_specialize=[
    'parts0', 'strips0', 'parts1', 'strips1', 'parts2', 'strips2'])
def _sum_kernel(out_ptr, ptr0, ptr1, ptr2, parts0, strips0, parts1, strips1,
                parts2, strips2, C: tl.constexpr, TAPS: tl.constexpr,
                KINDS0: tl.constexpr, KINDS1: tl.constexpr,
                KINDS2: tl.constexpr, COLUMNS: tl.constexpr,
                ROWS: tl.constexpr):
    """A program sums one kind over parts and strips, for some channels."""
    blocks: tl.constexpr = (C + COLUMNS - 1) // COLUMNS
    kind = tl.program_id(0) // blocks
    channel = tl.program_id(0) % blocks * COLUMNS + tl.arange(0, COLUMNS)
    if kind < KINDS0:
        _sum(out_ptr, ptr0, parts0, strips0, kind, KINDS0, 0, channel, C, TAPS,
             COLUMNS, ROWS)
    if ptr1 is not None:
        if (kind >= KINDS0) & (kind < KINDS0 + KINDS1):
            _sum(out_ptr, ptr1, parts1, strips1, kind, KINDS1, KINDS0, channel,
                 C, TAPS, COLUMNS, ROWS)
    if ptr2 is not None:
        if kind >= KINDS0 + KINDS1:
            _sum(out_ptr, ptr2, parts2, strips2, kind, KINDS2, KINDS0 + KINDS1,
                 channel, C, TAPS, COLUMNS, ROWS)


@plan
def _sum_launch(taps: int, *shapes: tuple[int, ...]) -> tuple[Launch, int]:
    """The launch, and how many kinds of sums."""
    c = shapes[0][3]
    kinds = [0, 0, 0]
    sizes = [0, 1] * 3
    for i, (parts, kinds[i], strips, _) in enumerate(shapes):
        sizes[2 * i:2 * i + 2] = parts, strips
    columns = 32
    longest = max(parts * strips for parts, _, strips, _ in shapes)
    launch = Launch(
        _sum_kernel, sum(kinds) * _ceil_div(c, columns), *sizes, C=c,
        TAPS=taps, KINDS0=kinds[0], KINDS1=kinds[1], KINDS2=kinds[2],
        COLUMNS=columns, **(dict(ROWS=64) if longest <= 1024 else
                            dict(ROWS=512, num_warps=8)))
    return launch, sum(kinds)


def _sums(*partials: Tensor, taps: int = 0) -> Tensor:
    """Sums of partial sums, in one launch.

    Args:
        partials (Tensor): One to three, (parts, kinds, strips, C); to be
            summed over parts and strips.
        taps (int): How many of the first kinds belong to a filter.
            Defaults to 0.

    Returns:
        Tensor: Those of the filter, (C, taps), and after them those of all
        other kinds, (C, ) each, in one vector.
    """
    launch, kinds = _sum_launch(taps, *(p.shape for p in partials))
    out = partials[0].new_empty(kinds * partials[0].shape[3])
    launch(out, *partials, *(3 - len(partials)) * (None, ))
    return out


@triton.jit
def _tail(u, EXACT: tl.constexpr):
    """Normal distribution function at -u, u >= 0, in one exp2.

    The exponent is a polynomial fit of log2(erfc(u / sqrt(2)) / 2), -1 at 0.
    With ``EXACT`` it is wrong by 2e-8 in GELU, less than the rounding of
    fp32, and takes a third of the instructions of erf; with those, GELU would
    cost more than the traffic of the passes it is fused into. Without, for
    results in 16 bits, it is wrong by 1.4e-4 of the value down to u = 3 and by
    1e-3 down to 5, where fp16 rounds by up to 5e-4 and bf16 by 4e-3.
    """
    if EXACT:
        e = tl.fma(u, -2.35749349e-06, 3.38984428e-05)
        e = tl.fma(e, u, -1.61420714e-04)
        e = tl.fma(e, u, -1.93259766e-04)
        e = tl.fma(e, u, 7.13178283e-03)
        e = tl.fma(e, u, -5.25392666e-02)
        e = tl.fma(e, u, -4.59195673e-01)
        e = tl.fma(e, u, -1.15110636)
    else:
        e = tl.fma(u, -3.03835660e-04, 5.68419990e-03)
        e = tl.fma(e, u, -4.78710736e-02)
        e = tl.fma(e, u, -4.64317275e-01)
        e = tl.fma(e, u, -1.14940564)
    return tl.exp2(tl.fma(e, u, -1.))


@triton.jit
def _gelu(x, EXACT: tl.constexpr):
    """GELU (that of erf, not of tanh); infinities give NaN."""
    u = tl.abs(x)
    return tl.maximum(x, 0.) - u * _tail(u, EXACT)


@triton.jit
def _slope(x, tail):
    """Derivative of GELU, with the tail at abs(x)."""
    u = tl.abs(x)
    # exp(-u * u / 2) / sqrt(2 * pi)
    density = tl.exp2(-0.72134752 * u * u - 1.32574806)
    slope = tail - u * density
    return tl.where(x > 0., 1. - slope, slope)


@triton.jit
def _gelu_and_slope(x, EXACT: tl.constexpr):
    """GELU and its derivative."""
    u = tl.abs(x)
    tail = _tail(u, EXACT)
    return tl.maximum(x, 0.) - u * tail, _slope(x, tail)


@triton.jit
def _place(width, C: tl.constexpr, STRIP: tl.constexpr, LANES: tl.constexpr):
    """Channel and first column of each lane, whether it has work, and the
    number of the program among those for the same lanes."""
    lanes = tl.cdiv(width, STRIP) * C
    blocks = tl.cdiv(lanes, LANES)
    pid = tl.program_id(0)
    lane = pid % blocks * LANES + tl.arange(0, LANES)
    return lane % C, lane // C * STRIP, lane < lanes, pid // blocks


@triton.jit
def _pixel(n, y, height, width):
    """Index of the first pixel of a row, in 64 bits."""
    return (tl.cast(n, tl.int64) * height + y) * width


@triton.jit
def _load_raw(ptr, column, width, mask, STRIDE: tl.constexpr,
              STRIP: tl.constexpr, HALO: tl.constexpr):
    """A row of each strip with its halo as a tuple of columns.

    Zero outside the image. Each column can leave it on one side only.
    """
    row = ()
    for t in tl.static_range(-HALO, STRIP + HALO):
        if t < 0:
            inside = mask & (column >= -t)
        else:
            inside = mask & (column < width - t)
        row = row + (tl.load(ptr + t * STRIDE, inside, 0.), )
    return row


@triton.jit
def _wide(row, COUNT: tl.constexpr):
    out = ()
    for t in tl.static_range(COUNT):
        out = out + (row[t].to(tl.float32), )
    return out


@triton.jit
def _load(ptr, column, width, mask, STRIDE: tl.constexpr, STRIP: tl.constexpr,
          HALO: tl.constexpr):
    """:func:`_load_raw` in fp32."""
    return _wide(_load_raw(ptr, column, width, mask, STRIDE, STRIP, HALO),
                 STRIP + 2 * HALO)


@triton.jit
def _gelu_row(row, COUNT: tl.constexpr, EXACT: tl.constexpr):
    out = ()
    for t in tl.static_range(COUNT):
        out = out + (_gelu(row[t].to(tl.float32), EXACT), )
    return out


@triton.jit
def _load_taps(ptr, K: tl.constexpr, STEP: tl.constexpr):
    """A row of the filter, K values for each lane."""
    taps = ()
    for j in tl.static_range(K):
        taps = taps + (tl.load(ptr + j * STEP), )
    return taps


@triton.jit
def _correlate(sums, x, taps, K: tl.constexpr, STRIP: tl.constexpr,
               HALO: tl.constexpr):
    """Add a row of the convolution to the STRIP sums."""
    out = ()
    for t in tl.static_range(STRIP):
        total = sums[t]
        for j in tl.static_range(K):
            if (t + j - K // 2 >= -HALO) and (t + j - K // 2 < STRIP + HALO):
                total = tl.fma(x[t + j - K // 2 + HALO], taps[j], total)
        out = out + (total, )
    return out


@triton.jit
def _correlate_weight(sums, x, grad, K: tl.constexpr, STRIP: tl.constexpr,
                      HALO: tl.constexpr):
    """Add a row of the weight gradient to the K sums."""
    out = ()
    for j in tl.static_range(K):
        total = sums[j]
        for t in tl.static_range(STRIP):
            if (t + j - K // 2 >= -HALO) and (t + j - K // 2 < STRIP + HALO):
                total = tl.fma(x[t + j - K // 2 + HALO], grad[t], total)
        out = out + (total, )
    return out


@triton.jit
def _zeros(COUNT: tl.constexpr, LANES: tl.constexpr):
    out = ()
    for _ in tl.static_range(COUNT):
        out = out + (tl.zeros((LANES, ), tl.float32), )
    return out


@triton.jit
def _convolve(x_ptr, weight_ptr, channel, column, alive, n, top, height, width,
              C: tl.constexpr, K: tl.constexpr, ROWS: tl.constexpr,
              STRIP: tl.constexpr, HALO: tl.constexpr, LANES: tl.constexpr,
              FLIP: tl.constexpr):
    """ROWS rows of a depthwise convolution without bias, as tuples.

    ``FLIP`` takes the filter from its end, which is the data gradient.
    """
    sums = ()
    for _ in tl.static_range(ROWS):
        sums = sums + (_zeros(STRIP, LANES), )
    first = x_ptr + column * C + channel
    for y in range(tl.maximum(top - K // 2, 0),
                   tl.minimum(top + ROWS + K // 2, height)):
        x = _load(first + _pixel(n, y, height, width) * C, column, width,
                  alive, C, STRIP, HALO)
        new = ()
        for o in tl.static_range(ROWS):
            row = sums[o]
            i = y - top - o + K // 2
            if (i >= 0) & (i < K):
                if FLIP:
                    taps = _load_taps(
                        weight_ptr + (K * K - 1 - i * K) * C + channel, K, -C)
                else:
                    taps = _load_taps(weight_ptr + i * K * C + channel, K, C)
                row = _correlate(row, x, taps, K, STRIP, HALO)
            new = new + (row, )
        sums = new
    return sums


@triton.jit(do_not_specialize=['area'])
def _gelu_kernel(z_ptr, h_ptr, area, C: tl.constexpr, STRIDE: tl.constexpr,
                 BLOCK: tl.constexpr):
    """h = GELU(z), of which z is a slice of the channels."""
    size = area * C  # of an image
    blocks = tl.cdiv(size, BLOCK)
    pid = tl.program_id(0)
    at = pid % blocks * BLOCK + tl.arange(0, BLOCK)
    n = tl.cast(pid // blocks, tl.int64)
    z = tl.load(z_ptr + n * area * STRIDE + at // C * STRIDE + at % C,
                at < size, 0.)
    exact: tl.constexpr = z_ptr.dtype.element_ty == tl.float32
    tl.store(h_ptr + n * size + at, _gelu(z.to(tl.float32), exact), at < size)


@plan
def _gelu_launch(shape: tuple[int, ...], stride: int) -> Launch:
    n, height, width, c = _small_images(shape, stride)
    area, block = height * width, 1024
    return Launch(_gelu_kernel, n * _ceil_div(area * c, block), area, C=c,
                  STRIDE=stride, BLOCK=block)


@triton.jit(do_not_specialize=['height', 'width'])
def _gate_kernel(h_ptr, zv_ptr, weight_ptr, bias_ptr, p_ptr, a_ptr, height,
                 width, C: tl.constexpr, K: tl.constexpr, ROWS: tl.constexpr,
                 STRIP: tl.constexpr, HALO: tl.constexpr,
                 LANES: tl.constexpr):
    """p = a * v with a = DW(h) + bias, of which a is kept if asked."""
    channel, column, alive, item = _place(width, C, STRIP, LANES)
    n = item // tl.cdiv(height, ROWS)
    top = item % tl.cdiv(height, ROWS) * ROWS
    sums = _convolve(h_ptr, weight_ptr, channel, column, alive, n, top, height,
                     width, C, K, ROWS, STRIP, HALO, LANES, False)
    bias = tl.load(bias_ptr + channel).to(tl.float32)
    for y in range(top, top + ROWS):
        pixel = _pixel(n, y, height, width) + column
        mask = alive & (y < height)
        one, two = pixel * C + channel, pixel * (2 * C) + C + channel
        v = _load(zv_ptr + two, column, width, mask, 2 * C, STRIP, 0)
        for t in tl.static_range(STRIP):
            inside = mask & (column < width - t)
            # Rounded as the backward pass will find it.
            a = (sums[0][t] + bias).to(p_ptr.dtype.element_ty)
            tl.store(p_ptr + one + t * C, a.to(tl.float32) * v[t], inside)
            if a_ptr is not None:
                tl.store(a_ptr + one + t * C, a, inside)
        sums = sums[1:] + sums[:1]


@triton.jit(do_not_specialize=['pixels', 'tiles'])
def _gate_backward_kernel(grad_ptr, zv_ptr, a_ptr, h_ptr, p_ptr, da_ptr,
                          grad_zv_ptr, partial_ptr, pixels, tiles,
                          C: tl.constexpr, GRAD_STRIDE: tl.constexpr,
                          BLOCK: tl.constexpr, PIXELS: tl.constexpr):
    """What needs no neighbours: h = GELU(z), p = a * v and the gradients of a
    and v, with the sums of the latter."""
    exact: tl.constexpr = zv_ptr.dtype.element_ty == tl.float32
    channel = tl.arange(0, BLOCK)[None, :]
    used = channel < C
    sums = tl.zeros((PIXELS, BLOCK), tl.float32)
    for tile in range(tl.program_id(0), tiles, tl.num_programs(0)):
        pixel = tl.cast(tile, tl.int64) * PIXELS \
            + tl.arange(0, PIXELS)[:, None]
        inside = used & (pixel < pixels)
        one, two = pixel * C + channel, pixel * (2 * C) + channel
        grad = tl.load(grad_ptr + pixel * GRAD_STRIDE + channel, inside,
                       0.).to(tl.float32)
        z = tl.load(zv_ptr + two, inside, 0.).to(tl.float32)
        v = tl.load(zv_ptr + two + C, inside, 0.).to(tl.float32)
        a = tl.load(a_ptr + one, inside, 0.).to(tl.float32)
        tl.store(h_ptr + one, _gelu(z, exact), inside)
        tl.store(p_ptr + one, a * v, inside)
        tl.store(da_ptr + one, grad * v, inside)
        tl.store(grad_zv_ptr + two + C, grad * a, inside)
        sums += grad * a
    tl.store(partial_ptr + tl.program_id(0) * C + channel,
             tl.sum(sums, 0)[None, :], used)


@triton.jit(do_not_specialize=['items', 'splits', 'height', 'width'])
def _gate_input_grad_kernel(da_ptr, weight_ptr, zv_ptr, grad_zv_ptr,
                            partial_ptr, items, splits, height, width,
                            C: tl.constexpr,
                            K: tl.constexpr, ROWS: tl.constexpr,
                            STRIP: tl.constexpr, HALO: tl.constexpr,
                            LANES: tl.constexpr):
    """The gradient of z = DW_flipped(da) * GELU'(z), and sums of each lane."""
    exact: tl.constexpr = zv_ptr.dtype.element_ty == tl.float32
    channel, column, alive, split = _place(width, C, STRIP, LANES)
    total = tl.zeros((LANES, ), tl.float32)
    for item in range(split, items, splits):
        n = item // tl.cdiv(height, ROWS)
        top = item % tl.cdiv(height, ROWS) * ROWS
        sums = _convolve(da_ptr, weight_ptr, channel, column, alive, n, top,
                         height, width, C, K, ROWS, STRIP, HALO, LANES, True)
        for y in range(top, top + ROWS):
            at = (_pixel(n, y, height, width) + column) * (2 * C) + channel
            mask = alive & (y < height)
            z = _load(zv_ptr + at, column, width, mask, 2 * C, STRIP, 0)
            for t in tl.static_range(STRIP):
                slope = _slope(z[t], _tail(tl.abs(z[t]), exact))
                inside = mask & (column < width - t)
                grad = sums[0][t] * slope
                tl.store(grad_zv_ptr + at + t * (2 * C), grad, inside)
                total += tl.where(inside, grad, 0.)
            sums = sums[1:] + sums[:1]
    tl.store(partial_ptr + tl.cast(split, tl.int64) * tl.cdiv(width, STRIP) * C
             + column // STRIP * C + channel, total, alive)


@triton.jit(do_not_specialize=['rows', 'splits', 'height', 'width'])
def _weight_grad_kernel(x_ptr, dy_ptr, partial_ptr, rows, splits, height,
                        width, C: tl.constexpr, K: tl.constexpr,
                        TAP_ROWS: tl.constexpr, STRIP: tl.constexpr,
                        HALO: tl.constexpr, LANES: tl.constexpr):
    """Sums of the weight and bias gradient over a part of the batch's rows.

    A program holds TAP_ROWS rows of the filter; the programs for its other
    rows are neighbours, so that they find the same inputs in the cache.
    """
    channel, column, alive, item = _place(width, C, STRIP, LANES)
    groups: tl.constexpr = (K + TAP_ROWS - 1) // TAP_ROWS
    split, head = item // groups, item % groups * TAP_ROWS
    sums = ()
    for _ in tl.static_range(TAP_ROWS):
        sums = sums + (_zeros(K, LANES), )
    total = tl.zeros((LANES, ), tl.float32)
    first = column * C + channel
    share = tl.cdiv(rows, splits)
    for row in range(split * share, tl.minimum((split + 1) * share, rows)):
        n, y = row // height, row % height
        x = _load(x_ptr + _pixel(n, y, height, width) * C + first, column,
                  width, alive, C, STRIP, HALO)
        new = ()
        for o in tl.static_range(TAP_ROWS):
            taps = sums[o]
            i = head + o
            at = y - i + K // 2
            if (i < K) & (at >= 0) & (at < height):
                dy = _load(dy_ptr + _pixel(n, at, height, width) * C + first,
                           column, width, alive, C, STRIP, 0)
                taps = _correlate_weight(taps, x, dy, K, STRIP, HALO)
                if i == K // 2:  # meets each row of dy once
                    for t in tl.static_range(STRIP):
                        total += dy[t]
            new = new + (taps, )
        sums = new
    lanes = tl.cdiv(width, STRIP) * C
    out = partial_ptr + column // STRIP * C + channel \
        + tl.cast(split, tl.int64) * (K * K + 1) * lanes
    for o in tl.static_range(TAP_ROWS):
        for j in tl.static_range(K):
            tl.store(out + ((head + o) * K + j) * lanes, sums[o][j],
                     alive & (head + o < K))
    tl.store(out + K * K * lanes, total,
             alive & (head <= K // 2) & (K // 2 < head + TAP_ROWS))


@plan
def _gate_backward_launch(shape: tuple[int, ...], grad_stride: int
                          ) -> tuple[Launch, tuple[int, ...]]:
    tile, pixels, tiles, programs = _row_tiles(shape)
    launch = Launch(_gate_backward_kernel, programs, pixels, tiles,
                    GRAD_STRIDE=grad_stride, **tile)
    return launch, (programs, 1, 1, shape[3])


@plan
def _gate_launch(shape: tuple[int, ...], k: int) -> Launch:
    n, height, width, c = shape
    tile, programs = _convolution_tile(height, width, k, c)
    return Launch(_gate_kernel, n * programs, height, width, C=c, K=k, **tile)


@plan
def _gate_input_grad_launch(shape: tuple[int, ...],
                            k: int) -> tuple[Launch, tuple[int, ...]]:
    n, height, width, c = shape
    tile, programs = _convolution_tile(height, width, k, c)
    rows = _ceil_div(height, tile['ROWS'])
    blocks, items = programs // rows, n * rows
    splits = _splits(items, blocks, WAVES)
    launch = Launch(_gate_input_grad_kernel, splits * blocks, items, splits,
                    height, width, C=c, K=k, **tile)
    return launch, (splits, 1, _ceil_div(width, tile['STRIP']), c)


@plan
def _weight_grad_launch(shape: tuple[int, ...],
                        k: int) -> tuple[Launch, tuple[int, ...]]:
    n, height, width, c = shape
    tile, blocks = _tile(width, k, c, strip=14 if width > 7 else 7, lanes=32,
                         registers=128)
    # Some 50 sums fit into the registers; groups of equal numbers of rows.
    groups = _ceil_div(k, max(50 // k, 1))
    programs = blocks * groups
    splits = _splits(n * height, programs)
    launch = Launch(_weight_grad_kernel, splits * programs, n * height,
                    splits, height, width, C=c, K=k,
                    TAP_ROWS=_ceil_div(k, groups), **tile)
    return launch, (splits, k * k + 1, _ceil_div(width, tile['STRIP']), c)


def gate(zv: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """See :func:`mmconv2former.torch_kernels.gate`."""
    return _gate(zv, weight, bias, store=False)[0]


def gate_forward(zv: Tensor, weight: Tensor,
                 bias: Tensor) -> tuple[Tensor, Tensor]:
    """See :func:`mmconv2former.torch_kernels.gate_forward`."""
    return _gate(zv, weight, bias, store=True)


def _gate(zv: Tensor, weight: Tensor, bias: Tensor,
          store: bool) -> tuple[Tensor, Tensor | None]:
    zv = zv.contiguous()
    *image, twice = zv.shape
    shape = (*image, twice // 2)
    # On its load by the convolution GELU would be computed six to ten times
    # for each value, which costs more than the pass over memory.
    h = zv.new_empty(shape)
    _gelu_launch(shape, twice)(zv, h)
    p, a = torch.empty_like(h), torch.empty_like(h) if store else None
    _gate_launch(shape, weight.shape[-1])(
        h, zv, _taps_first(weight), bias.contiguous(), p, a)
    return p, a


def gate_backward(
        grad: Tensor, zv: Tensor, a: Tensor, weight: Tensor,
        bias: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """See :func:`mmconv2former.torch_kernels.gate_backward`."""
    # da = grad * v costs one more tensor, but a second load and a product for
    # every tap without it.
    zv, a = zv.contiguous(), a.contiguous()
    grad, stride = _pixels(grad)
    shape, k = a.shape, weight.shape[-1]
    h, p, da = (torch.empty_like(a) for _ in range(3))
    grad_zv = torch.empty_like(zv)
    taps, c = k * k, shape[3]

    def empty(shape: tuple[int, ...]) -> Tensor:
        return a.new_empty(shape, dtype=torch.float32)

    launch, partial = _gate_backward_launch(shape, stride)
    launch(grad, zv, a, h, p, da, grad_zv, v_partial := empty(partial))
    launch, partial = _weight_grad_launch(shape, k)
    launch(h, da, taps_partial := empty(partial))
    launch, partial = _gate_input_grad_launch(shape, k)
    launch(da, _taps_first(weight), zv, grad_zv, z_partial := empty(partial))
    grad_weight, grad_bias, sums = _sums(
        taps_partial, z_partial, v_partial, taps=taps).split_with_sizes(
            (taps * c, c, 2 * c))
    return grad_zv, grad_weight.view(weight.shape), grad_bias, p, sums


@triton.jit
def _item_rows(item, share, height):
    """Image of an item, its first row, and the one after its last."""
    items = tl.cdiv(height, share)
    start = item % items * share
    return item // items, start, tl.minimum(start + share, height)


@triton.jit
def _read_row(ptr, column, width, alive, n, y, height, end,
              STRIDE: tl.constexpr, STRIP: tl.constexpr, HALO: tl.constexpr):
    """Row y of an image, zero above it and from ``end`` on."""
    return _load_raw(ptr + _pixel(n, y, height, width) * STRIDE, column, width,
                     alive & (y >= 0) & (y < end), STRIDE, STRIP, HALO)


@triton.jit
def _convolve_rows(sums, above, row, below, weight_ptr, C: tl.constexpr,
                   STRIP: tl.constexpr, HALO: tl.constexpr):
    """Add a 3x3 convolution of three rows to the STRIP sums.

    The filter goes backwards if C is negative.
    """
    # Loaded anew for each row: registers cost more.
    taps = _load_taps(weight_ptr, 3, C)
    sums = _correlate(sums, above, taps, 3, STRIP, HALO)
    taps = _load_taps(weight_ptr + 3 * C, 3, C)
    sums = _correlate(sums, row, taps, 3, STRIP, HALO)
    taps = _load_taps(weight_ptr + 6 * C, 3, C)
    return _correlate(sums, below, taps, 3, STRIP, HALO)


@triton.jit(do_not_specialize=[
    'items', 'splits', 'share', 'height', 'width'])
def _position_kernel(z_ptr, weight_ptr, bias_ptr, grad_ptr, s_ptr, dd_ptr,
                     partial_ptr, items, splits, share, height, width,
                     C: tl.constexpr, Z_STRIDE: tl.constexpr,
                     GRAD_STRIDE: tl.constexpr, STRIP: tl.constexpr,
                     HALO: tl.constexpr, LANES: tl.constexpr):
    """s = h + GELU(d) with d = DW_3(h) + bias and h = GELU(z).

    With a gradient also dd, that of d, and the sums for those of the filter
    and the bias. An item is ``share`` rows of an image; the program walks
    down them with three rows of h in registers, so that each value of z is
    read, and its GELU computed, hardly more than once. The next row is asked
    for before this one is worked on.
    """
    exact: tl.constexpr = z_ptr.dtype.element_ty == tl.float32
    columns: tl.constexpr = STRIP + 2 * HALO
    channel, column, alive, split = _place(width, C, STRIP, LANES)
    bias = tl.load(bias_ptr + channel).to(tl.float32)
    top_sums = _zeros(3, LANES)
    mid_sums = _zeros(3, LANES)
    low_sums = _zeros(3, LANES)
    total = tl.zeros((LANES, ), tl.float32)
    first = z_ptr + column * Z_STRIDE + channel
    for item in range(split, items, splits):
        n, start, end = _item_rows(item, share, height)
        above = _zeros(columns, LANES)
        row = _zeros(columns, LANES)
        raw = _read_row(first, column, width, alive, n, start - 1, height,
                        height, Z_STRIDE, STRIP, HALO)
        for below_y in range(start - 1, end + 1):
            below = _gelu_row(raw, columns, exact)
            raw = _read_row(first, column, width, alive, n, below_y + 1,
                            height, tl.minimum(end + 1, height), Z_STRIDE,
                            STRIP, HALO)
            if below_y > start:
                pixel = _pixel(n, below_y - 1, height, width) + column
                if grad_ptr is not None:
                    grad = _load(grad_ptr + pixel * GRAD_STRIDE + channel,
                                 column, width, alive, GRAD_STRIDE, STRIP, 0)
                d = ()
                for _ in tl.static_range(STRIP):
                    d = d + (bias, )
                d = _convolve_rows(d, above, row, below, weight_ptr + channel,
                                   C, STRIP, HALO)
                out = pixel * C + channel
                if grad_ptr is not None:
                    dd = ()
                    for t in tl.static_range(STRIP):
                        inside = alive & (column < width - t)
                        e, slope = _gelu_and_slope(d[t], exact)
                        dd = dd + (grad[t] * slope, )
                        tl.store(s_ptr + out + t * C, row[t + HALO] + e,
                                 inside)
                        tl.store(dd_ptr + out + t * C, dd[t], inside)
                        total += dd[t]
                    top_sums = _correlate_weight(top_sums, above, dd, 3,
                                                 STRIP, HALO)
                    mid_sums = _correlate_weight(mid_sums, row, dd, 3, STRIP,
                                                 HALO)
                    low_sums = _correlate_weight(low_sums, below, dd, 3,
                                                 STRIP, HALO)
                else:
                    for t in tl.static_range(STRIP):
                        tl.store(s_ptr + out + t * C,
                                 row[t + HALO] + _gelu(d[t], exact),
                                 alive & (column < width - t))
            above = row
            row = below
    if grad_ptr is not None:
        lanes = tl.cdiv(width, STRIP) * C
        partial = partial_ptr + column // STRIP * C + channel \
            + tl.cast(split, tl.int64) * 10 * lanes
        sums = top_sums + mid_sums + low_sums + (total, )
        for i in tl.static_range(10):
            tl.store(partial + i * lanes, sums[i], alive)


@triton.jit(do_not_specialize=[
    'items', 'splits', 'share', 'height', 'width'])
def _position_input_grad_kernel(
        dd_ptr, weight_ptr, z_ptr, grad_ptr, out_ptr, partial_ptr, items,
        splits, share, height, width, C: tl.constexpr, Z_STRIDE: tl.constexpr,
        GRAD_STRIDE: tl.constexpr, STRIP: tl.constexpr, HALO: tl.constexpr,
        LANES: tl.constexpr):
    """(DW_flipped(dd) + grad) * GELU'(z), and sums of each lane.

    A program walks down its items as that of :func:`_position_kernel`.
    """
    exact: tl.constexpr = z_ptr.dtype.element_ty == tl.float32
    columns: tl.constexpr = STRIP + 2 * HALO
    channel, column, alive, split = _place(width, C, STRIP, LANES)
    total = tl.zeros((LANES, ), tl.float32)
    first = dd_ptr + column * C + channel
    for item in range(split, items, splits):
        n, start, end = _item_rows(item, share, height)
        above = _zeros(columns, LANES)
        row = _zeros(columns, LANES)
        raw = _read_row(first, column, width, alive, n, start - 1, height,
                        height, C, STRIP, HALO)
        for below_y in range(start - 1, end + 1):
            below = _wide(raw, columns)
            raw = _read_row(first, column, width, alive, n, below_y + 1,
                            height, tl.minimum(end + 1, height), C, STRIP,
                            HALO)
            if below_y > start:
                pixel = _pixel(n, below_y - 1, height, width) + column
                dh = _load(grad_ptr + pixel * GRAD_STRIDE + channel, column,
                           width, alive, GRAD_STRIDE, STRIP, 0)
                z = _load(z_ptr + pixel * Z_STRIDE + channel, column, width,
                          alive, Z_STRIDE, STRIP, 0)
                dh = _convolve_rows(dh, above, row, below,
                                    weight_ptr + 8 * C + channel, -C, STRIP,
                                    HALO)
                out = out_ptr + pixel * C + channel
                for t in tl.static_range(STRIP):
                    inside = alive & (column < width - t)
                    slope = _slope(z[t], _tail(tl.abs(z[t]), exact))
                    tl.store(out + t * C, dh[t] * slope, inside)
                    total += tl.where(inside, dh[t] * slope, 0.)
            above = row
            row = below
    tl.store(partial_ptr + tl.cast(split, tl.int64) * tl.cdiv(width, STRIP) * C
             + column // STRIP * C + channel, total, alive)


def _position_tile(shape: tuple[int, ...], strip: int, lanes: int,
                   registers: int) -> tuple[dict, int, int, int]:
    """Block sizes, programs for a row, rows of an item, and items."""
    n, height, width, c = shape
    tile, blocks = _tile(width, 3, c, strip, lanes, registers)
    # Tall items read fewer rows twice; low ones keep small inputs parallel.
    share = min(max(n * height * blocks // (2 * PROGRAMS), 4), 28)
    return tile, blocks, share, n * _ceil_div(height, share)


@plan
def _position_launch(shape: tuple[int, ...], stride: int) -> Launch:
    _, height, width, c = shape
    tile, blocks, share, items = _position_tile(
        shape, strip=14 if width > 7 else 7, lanes=64, registers=168)
    return Launch(_position_kernel, items * blocks, items, items, share,
                  height, width, C=c, Z_STRIDE=stride, GRAD_STRIDE=0, **tile)


@plan
def _position_backward_launch(
        shape: tuple[int, ...], stride: int,
        grad_stride: int) -> tuple[Launch, tuple[int, ...]]:
    _, height, width, c = shape
    tile, blocks, share, items = _position_tile(shape, strip=7, lanes=64,
                                                registers=168)
    splits = _splits(items, blocks, WAVES)
    launch = Launch(_position_kernel, splits * blocks, items, splits, share,
                    height, width, C=c, Z_STRIDE=stride,
                    GRAD_STRIDE=grad_stride, **tile)
    return launch, (splits, 10, _ceil_div(width, tile['STRIP']), c)


@plan
def _position_input_grad_launch(
        shape: tuple[int, ...], stride: int,
        grad_stride: int) -> tuple[Launch, tuple[int, ...]]:
    _, height, width, c = shape
    tile, blocks, share, items = _position_tile(shape, strip=7, lanes=32,
                                                registers=64)
    splits = _splits(items, blocks, WAVES)
    launch = Launch(_position_input_grad_kernel, splits * blocks, items,
                    splits, share, height, width, C=c, Z_STRIDE=stride,
                    GRAD_STRIDE=grad_stride, **tile)
    return launch, (splits, 1, _ceil_div(width, tile['STRIP']), c)


def position(z: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """See :func:`mmconv2former.torch_kernels.position`."""
    out = z.new_empty(z.shape)
    shape, (z, stride) = z.shape, _pixels(z)
    _position_launch(shape, stride)(
        z, _taps_first(weight), bias.contiguous(), None, out, None, None)
    return out


def position_backward(
        grad: Tensor, z: Tensor, weight: Tensor,
        bias: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """See :func:`mmconv2former.torch_kernels.position_backward`.

    In two passes, the second from dd, the gradient of d = DW_3(h) + bias, in
    the precision of ``z``. One pass moves 4 tensors instead of 8, but computes
    GELU and its derivative on more columns beside each strip, and holds three
    rows of h and three of dd; it took as long.
    """
    s = z.new_empty(z.shape)
    dd, grad_z = torch.empty_like(s), torch.empty_like(s)
    shape, taps, c = z.shape, _taps_first(weight), z.shape[3]
    (z, stride), (grad, grad_stride) = _pixels(z), _pixels(grad)

    launch, partial = _position_backward_launch(shape, stride, grad_stride)
    d_partial = s.new_empty(partial, dtype=torch.float32)
    launch(z, taps, bias.contiguous(), grad, s, dd, d_partial)
    launch, partial = _position_input_grad_launch(shape, stride, grad_stride)
    z_partial = s.new_empty(partial, dtype=torch.float32)
    launch(dd, taps, z, grad, grad_z, z_partial)
    grad_weight, grad_bias, total = _sums(
        d_partial, z_partial, taps=9).split_with_sizes((9 * c, c, c))
    return grad_z, grad_weight.view(weight.shape), grad_bias, s, total


def _norm_tile(channels: int) -> dict:
    """Blocks of 2048 values: 16 for each of the 128 threads."""
    block = triton.next_power_of_2(channels)
    return dict(C=channels, BLOCK=block, PIXELS=max(2048 // block, 1))


def _row_tiles(shape: tuple[int, ...]) -> tuple[dict, int, int, int]:
    """Block sizes, pixels, tiles and programs of sums over the pixels, where
    a program takes all channels."""
    *image, c = shape
    tile, pixels = _norm_tile(c), prod(image)
    tiles = _ceil_div(pixels, tile['PIXELS'])
    return tile, pixels, tiles, max(min(tiles, PROGRAMS // 4), 1)


def _column_tiles(shape: tuple[int, ...],
                  block: int) -> tuple[dict, int, int, int]:
    """The same where a program takes a block of channels, and how many parts
    the sums have.

    Few lanes are idle so, where those of whole rows are up to half of them;
    but what is written in less than 64 bytes at a time is written slowly.
    """
    *image, c = shape
    block = min(triton.next_power_of_2(c), block)
    tile, pixels = dict(C=c, BLOCK=block, PIXELS=2048 // block), prod(image)
    tiles, blocks = _ceil_div(pixels, 2048 // block), _ceil_div(c, block)
    return tile, pixels, tiles, max(min(tiles, PROGRAMS // 2 // blocks), 1)


@triton.jit
def _column_place(C: tl.constexpr, BLOCK: tl.constexpr):
    """Channels of a program of :func:`_column_tiles`, which part of the sums
    it has, and how many there are."""
    blocks: tl.constexpr = (C + BLOCK - 1) // BLOCK
    pid = tl.program_id(0)
    return (pid % blocks * BLOCK + tl.arange(0, BLOCK)[None, :],
            pid // blocks, tl.num_programs(0) // blocks)


@triton.jit
def _normalize(x, used, eps, C: tl.constexpr):
    """Rows of mean 0 and variance 1, and their inverse standard deviation."""
    x = x.to(tl.float32)
    normed = tl.where(used, x - tl.sum(x, 1)[:, None] / C, 0.)
    rstd = tl.rsqrt(tl.sum(normed * normed, 1)[:, None] / C + eps)
    return normed * rstd, rstd


@triton.jit
def _patch(pixel, height, width, PATCH: tl.constexpr):
    """Index of a pixel among those in patches, and whether it is in one."""
    pixel = pixel.to(tl.int32)  # in which divisions are several times faster
    row, x = pixel // width, pixel % width
    n, y = row // height, row % height
    rows, columns = height // PATCH, width // PATCH
    patch = (n * rows + y // PATCH) * columns + x // PATCH
    return (tl.cast(patch, tl.int64) * (PATCH * PATCH)
            + (y % PATCH * PATCH + x % PATCH),
            (y < rows * PATCH) & (x < columns * PATCH))


@triton.jit(do_not_specialize=['pixels', 'height', 'width'])
def _layer_norm_kernel(x_ptr, weight_ptr, bias_ptr, out_ptr, pixels, height,
                       width, eps, C: tl.constexpr, X_STRIDE: tl.constexpr,
                       PATCH: tl.constexpr, BLOCK: tl.constexpr,
                       PIXELS: tl.constexpr):
    """out = (x - mean) * rstd * weight + bias, as patches."""
    channel = tl.arange(0, BLOCK)[None, :]
    used = channel < C
    pixel = tl.cast(tl.program_id(0), tl.int64) * PIXELS \
        + tl.arange(0, PIXELS)[:, None]
    inside = used & (pixel < pixels)
    x = tl.load(x_ptr + pixel * X_STRIDE + channel, inside, 0.)
    normed, _ = _normalize(x, used, eps, C)
    if weight_ptr is not None:
        normed *= tl.load(weight_ptr + channel, used, 0.).to(tl.float32)
        normed += tl.load(bias_ptr + channel, used, 0.).to(tl.float32)
    if PATCH > 1:
        pixel, is_used = _patch(pixel, height, width, PATCH)
        inside &= is_used
    tl.store(out_ptr + pixel * C + channel, normed, inside)


@plan
def _layer_norm_launch(shape: tuple[int, ...], stride: int, eps: float,
                       patch: int) -> Launch:
    n, height, width, c = shape
    tile, pixels = _norm_tile(c), n * height * width
    return Launch(_layer_norm_kernel, _ceil_div(pixels, tile['PIXELS']),
                  pixels, height, width, eps, X_STRIDE=stride, PATCH=patch,
                  **tile)


def layer_norm(x: Tensor, weight: Tensor | None, bias: Tensor | None,
               eps: float, dtype: torch.dtype, patch: int = 1) -> Tensor:
    """See :func:`mmconv2former.torch_kernels.layer_norm`.

    That of torch gives each pixel a block of threads, most of which have
    nothing to do where channels are few.
    """
    out = _patches_like(x, patch, dtype)
    if weight is not None:
        weight, bias = weight.contiguous(), bias.contiguous()
    shape, (x, stride) = x.shape, _pixels(x)
    _layer_norm_launch(shape, stride, float(eps), patch)(x, weight, bias, out)
    return out


def _patches_like(x: Tensor, patch: int, dtype: torch.dtype) -> Tensor:
    shape = x.shape if patch == 1 else patches_shape(x, patch)
    return x.new_empty(shape, dtype=dtype)


@triton.jit(do_not_specialize=['pixels', 'tiles', 'height', 'width'])
def _layer_norm_backward_kernel(
        grad_ptr, x_ptr, weight_ptr, bias_ptr, residual_ptr, grad_x_ptr,
        normed_ptr, partial_ptr, pixels, tiles, height, width, eps,
        C: tl.constexpr, GRAD_STRIDE: tl.constexpr, X_STRIDE: tl.constexpr,
        RESIDUAL_STRIDE: tl.constexpr, PATCH: tl.constexpr,
        BLOCK: tl.constexpr, PIXELS: tl.constexpr):
    """With g = grad * weight and n = (x - mean) * rstd,

    grad_x = (g - mean(g) - n * mean(g * n)) * rstd + residual, the output
    once more, and sums of grad * n and of grad for each program.
    """
    pid = tl.program_id(0)
    channel = tl.arange(0, BLOCK)[None, :]
    used = channel < C
    weight = tl.load(weight_ptr + channel, used, 0.).to(tl.float32)
    bias = tl.load(bias_ptr + channel, used, 0.).to(tl.float32)
    weight_sums = tl.zeros((PIXELS, BLOCK), tl.float32)
    bias_sums = tl.zeros((PIXELS, BLOCK), tl.float32)
    for tile in range(pid, tiles, tl.num_programs(0)):
        pixel = tl.cast(tile, tl.int64) * PIXELS \
            + tl.arange(0, PIXELS)[:, None]
        inside = used & (pixel < pixels)
        x = tl.load(x_ptr + pixel * X_STRIDE + channel, inside, 0.)
        place, has_grad = pixel, inside
        if PATCH > 1:
            place, is_used = _patch(pixel, height, width, PATCH)
            has_grad = inside & is_used
        grad = tl.load(grad_ptr + place * GRAD_STRIDE + channel, has_grad, 0.)
        if residual_ptr is not None:
            residual = tl.load(residual_ptr + pixel * RESIDUAL_STRIDE
                               + channel, inside, 0.)
        normed, rstd = _normalize(x, used, eps, C)
        tl.store(normed_ptr + place * C + channel, normed * weight + bias,
                 has_grad)
        grad = grad.to(tl.float32)
        weight_sums += grad * normed
        bias_sums += grad
        grad *= weight
        grad -= tl.sum(grad, 1)[:, None] / C \
            + normed * (tl.sum(grad * normed, 1)[:, None] / C)
        grad *= rstd
        if residual_ptr is not None:
            grad += residual.to(tl.float32)
        tl.store(grad_x_ptr + pixel * C + channel, grad, inside)
    out = partial_ptr + pid * (2 * C) + channel
    tl.store(out, tl.sum(weight_sums, 0)[None, :], used)
    tl.store(out + C, tl.sum(bias_sums, 0)[None, :], used)


@plan
def _layer_norm_backward_launch(
        shape: tuple[int, ...], grad_stride: int, stride: int,
        residual_stride: int, eps: float,
        patch: int) -> tuple[Launch, tuple[int, ...]]:
    _, height, width, c = shape
    tile, pixels, tiles, programs = _row_tiles(shape)
    launch = Launch(_layer_norm_backward_kernel, programs, pixels, tiles,
                    height, width, eps, GRAD_STRIDE=grad_stride,
                    X_STRIDE=stride, RESIDUAL_STRIDE=residual_stride,
                    PATCH=patch, maxnreg=128,  # all programs at a time
                    **tile)
    return launch, (programs, 2, 1, c)


def layer_norm_backward(grad: Tensor, x: Tensor, weight: Tensor, bias: Tensor,
                        eps: float, residual: Tensor | None, patch: int = 1
                        ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """See :func:`mmconv2former.torch_kernels.layer_norm_backward`."""
    grad_x = x.new_empty(x.shape)
    normed = _patches_like(x, patch, grad.dtype)
    shape, step = x.shape, 0
    if patch == 1:
        grad, grad_stride = _pixels(grad)
    else:
        grad, grad_stride = grad.contiguous(), shape[3]
    x, stride = _pixels(x)
    if residual is not None:
        residual, step = _pixels(residual)
    launch, partial = _layer_norm_backward_launch(
        shape, grad_stride, stride, step, float(eps), patch)
    partial = x.new_empty(partial, dtype=torch.float32)
    launch(grad, x, weight.contiguous(), bias.contiguous(), residual, grad_x,
           normed, partial)
    return grad_x, *_sums(partial).chunk(2), normed


@triton.jit(do_not_specialize=['area'])
def _scale_residual_kernel(
        x_ptr, y_ptr, scale_ptr, keep_ptr, out_ptr, area, C: tl.constexpr,
        X_STRIDE: tl.constexpr, Y_STRIDE: tl.constexpr, BLOCK: tl.constexpr,
        PIXELS: tl.constexpr):
    """out = x + keep * scale * y."""
    tiles = tl.cdiv(area, PIXELS)
    n = tl.cast(tl.program_id(0) // tiles, tl.int64)
    # In full shape, so that the vectors come in the layout of the tensors.
    channel = tl.broadcast_to(tl.arange(0, BLOCK)[None, :], (PIXELS, BLOCK))
    used = channel < C
    pixel = tl.program_id(0) % tiles * PIXELS + tl.arange(0, PIXELS)[:, None]
    inside = used & (pixel < area)
    x = tl.load(x_ptr + n * area * X_STRIDE + pixel * X_STRIDE + channel,
                inside, 0.)
    y = tl.load(y_ptr + n * area * Y_STRIDE + pixel * Y_STRIDE + channel,
                inside, 0.)
    scale = tl.load(scale_ptr + channel, used, 0.).to(tl.float32)
    if keep_ptr is not None:
        scale *= tl.load(keep_ptr + n).to(tl.float32)
    out = (x.to(tl.float32) + y.to(tl.float32) * scale).to(x.dtype)
    tl.store(out_ptr + n * area * C + pixel * C + channel, out, inside)


@plan
def _scale_residual_launch(shape: tuple[int, ...], x_stride: int,
                           y_stride: int) -> Launch:
    n, height, width, c = shape
    area, tile = height * width, _norm_tile(c)
    return Launch(_scale_residual_kernel,
                  n * _ceil_div(area, tile['PIXELS']), area,
                  X_STRIDE=x_stride, Y_STRIDE=y_stride, **tile)


def scale_residual(x: Tensor, y: Tensor, scale: Tensor,
                   keep: Tensor | None) -> Tensor:
    """See :func:`mmconv2former.torch_kernels.scale_residual`."""
    out = x.new_empty(x.shape)
    shape, (x, x_stride), (y, y_stride) = x.shape, _pixels(x), _pixels(y)
    images = _small_images(shape, max(x_stride, y_stride))
    if keep is not None:
        keep = keep.contiguous()
        if images is not shape:
            keep = keep.repeat_interleave(shape[1])
    _scale_residual_launch(images, x_stride, y_stride)(
        x, y, scale.contiguous(), keep, out)
    return out


@triton.jit(do_not_specialize=['pixels', 'tiles', 'area'])
def _scale_backward_kernel(grad_ptr, scale_ptr, keep_ptr, y_ptr, out_ptr,
                           partial_ptr, pixels, tiles, area, C: tl.constexpr,
                           GRAD_STRIDE: tl.constexpr, BLOCK: tl.constexpr,
                           PIXELS: tl.constexpr):
    """y = grad * keep, out = y * scale, and sums of y for each part."""
    channel, part, parts = _column_place(C, BLOCK)
    used = channel < C
    scale = tl.load(scale_ptr + channel, used, 0.).to(tl.float32)
    sums = tl.zeros((PIXELS, BLOCK), tl.float32)
    for tile in range(part, tiles, parts):
        pixel = tl.cast(tile, tl.int64) * PIXELS \
            + tl.arange(0, PIXELS)[:, None]
        inside = used & (pixel < pixels)
        at = pixel * C + channel
        grad = tl.load(grad_ptr + pixel * GRAD_STRIDE + channel, inside,
                       0.).to(tl.float32)
        if keep_ptr is not None:
            grad *= tl.load(keep_ptr + pixel.to(tl.int32) // area,
                            pixel < pixels, 0.).to(tl.float32)
            # Rounded as the gradient of the weight will find it.
            grad = grad.to(y_ptr.dtype.element_ty)
            tl.store(y_ptr + at, grad, inside)
            grad = grad.to(tl.float32)
        tl.store(out_ptr + at, grad * scale, inside)
        sums += grad
    tl.store(partial_ptr + part * C + channel,
             tl.sum(sums, 0)[None, :], used)


@plan
def _scale_backward_launch(shape: tuple[int, ...], grad_stride: int
                           ) -> tuple[Launch, tuple[int, ...]]:
    c = shape[3]
    tile, pixels, tiles, parts = _column_tiles(shape, 32 if c > 128 else 128)
    launch = Launch(
        _scale_backward_kernel, parts * _ceil_div(c, tile['BLOCK']), pixels,
        tiles, shape[1] * shape[2], GRAD_STRIDE=grad_stride, **tile)
    return launch, (parts, 1, 1, c)


def scale_backward(grad: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
    """See :func:`mmconv2former.torch_kernels.scale_backward`."""
    _, out, total = _scale_backward(grad, scale, None, grad.dtype)
    return out, total


def drop_backward(grad: Tensor, scale: Tensor, keep: Tensor,
                  dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """See :func:`mmconv2former.torch_kernels.drop_backward`."""
    return _scale_backward(grad, scale, keep, dtype)


def _scale_backward(
        grad: Tensor, scale: Tensor, keep: Tensor | None,
        dtype: torch.dtype) -> tuple[Tensor | None, Tensor, Tensor]:
    out = grad.new_empty(grad.shape, dtype=dtype)
    y = None if keep is None else torch.empty_like(out)
    keep = None if keep is None else keep.contiguous()
    shape, (grad, stride) = grad.shape, _pixels(grad)
    launch, partial = _scale_backward_launch(shape, stride)
    partial = grad.new_empty(partial, dtype=torch.float32)
    launch(grad, scale.contiguous(), keep, y, out, partial)
    return y, out, _sums(partial)


@triton.jit
def _scaled_linear_backward_kernel(
        grad_weight_ptr, grad_bias_ptr, weight_ptr, bias_ptr, scale_ptr,
        out_weight_ptr, out_bias_ptr, out_scale_ptr, COLUMNS: tl.constexpr,
        BLOCK: tl.constexpr):
    """Gradients times scale; that of the scale is the sum of grad * weight
    over a row, and grad * bias."""
    row = tl.program_id(0)
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


@plan
def _scaled_linear_backward_launch(rows: int, columns: int) -> Launch:
    return Launch(_scaled_linear_backward_kernel, rows, COLUMNS=columns,
                  BLOCK=min(triton.next_power_of_2(columns), 1024))


def scaled_linear_backward(grad_weight: Tensor, grad_bias: Tensor,
                         weight: Tensor, bias: Tensor,
                         scale: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """See :func:`mmconv2former.torch_kernels.scaled_linear_backward`."""
    outs = tuple(
        scale.new_empty(shape, dtype=torch.float32)
        for shape in (weight.shape, scale.shape, scale.shape))
    _scaled_linear_backward_launch(*weight.shape)(
        *(t.contiguous()
          for t in (grad_weight, grad_bias, weight, bias, scale)), *outs)
    return outs
