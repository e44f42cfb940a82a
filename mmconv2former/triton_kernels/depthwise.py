"""The depthwise convolutions, with the GELUs and products beside them.

The kernels are sliding windows in registers. A lane owns one channel of one
strip of ``STRIP`` columns; a warp is a program, with one lane or two
neighbouring ones for each of its threads, and lanes run over strips and
channels without a gap, so that 72 channels leave none idle. A program reads
each input row once, as ``STRIP + 2 * HALO`` coalesced loads, and uses every
value for up to K taps of each of its output rows. Where one strip spans the
image, ``HALO`` is 0 and the taps outside the image are neither loaded nor
multiplied.
"""
import torch
import triton
import triton.language as tl
from torch import Tensor

from . import banded
from .gelu import gelu, gelu_and_slope, gelu_slope, gelu_tail
from .launch import Launch, plan
from .sums import sum_partials
from .tiling import (
    PROGRAMS,
    as_pixels,
    ceil_div,
    column_place,
    column_tiles,
    contiguous_like,
    plane_index,
    repeat,
    small_images,
    split_count,
    to_fp32,
)

# Where programs do not end together there are so many times more, for others
# to begin when the first have ended.
WAVES = 8


def _tile(width: int, kernel_size: int, channels: int, strip: int, lanes: int,
          registers: int) -> tuple[dict, int]:
    """Block sizes of a depthwise kernel, and its programs for a row of output.

    ``strip`` divides 56, 28, 14 and 7. Fewer registers leave room for more
    warps, which hide each other's loads. ``WHOLE`` is for rows that strips
    and lanes fill without a rest: they need no comparisons for it.
    """
    halo = kernel_size // 2 if width > strip else 0
    used = ceil_div(width, strip) * channels
    whole = width % strip == 0 and used % lanes == 0
    return dict(STRIP=strip, HALO=halo, LANES=lanes, WHOLE=whole, num_warps=1,
                num_stages=1, maxnreg=registers), ceil_div(used, lanes)


def _convolution_tile(height: int, width: int, kernel_size: int,
                      channels: int) -> tuple[dict, int]:
    """:func:`_tile` of :func:`_convolve`, and programs for an image."""
    tile, blocks = _tile(width, kernel_size, channels, strip=7, lanes=64,
                         registers=96 if kernel_size <= 13 else 128)
    return dict(tile, ROWS=2), ceil_div(height, 2) * blocks


def filters(weight: Tensor, bias: Tensor,
            dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """See :func:`mmconv2former.torch_kernels.filters`; always in fp32."""
    return _taps_first(weight), bias


def _taps_first(weight: Tensor) -> Tensor:
    """(C, 1, K, K) in fp32, as (K * K, C) in memory: lanes read coalesced."""
    (c, _, k, _), (channel, _, row, column) = weight.shape, weight.stride()
    if weight.dtype == torch.float32 \
            and (channel, row, column) == (1, k * c, c):
        return weight
    taps = weight.new_empty((k, k, c, 1), dtype=torch.float32)
    return taps.permute(2, 3, 0, 1).copy_(weight.detach())


@triton.jit
def _place(width, C: tl.constexpr, STRIP: tl.constexpr, LANES: tl.constexpr,
           WHOLE: tl.constexpr):
    """Channel and first column of each lane, whether it has work, and the
    number of the program among those for the same lanes."""
    lanes = tl.cdiv(width, STRIP) * C
    blocks = tl.cdiv(lanes, LANES)
    pid = tl.program_id(0)
    lane = pid % blocks * LANES + tl.arange(0, LANES)
    if WHOLE:
        alive = tl.full((LANES, ), True, tl.int1)
    else:
        alive = lane < lanes
    return lane % C, lane // C * STRIP, alive, pid // blocks


@triton.jit
def _inside(column, width, mask, t: tl.constexpr, STRIP: tl.constexpr,
            WHOLE: tl.constexpr):
    """The mask where column t of a strip, or of those beside it, is in the
    image.

    Where strips are whole, all columns of one are the same comparison.
    """
    if t < 0:
        inside = mask & (column >= (STRIP - 1 - t) // STRIP * STRIP)
    elif not WHOLE:
        inside = mask & (column < width - t)
    elif t >= STRIP:
        inside = mask & (column < width - t // STRIP * STRIP)
    else:
        inside = mask
    return inside


@triton.jit
def _pixel(n, y, height, width):
    """Index of the first pixel of a row, in 64 bits."""
    return (tl.cast(n, tl.int64) * height + y) * width


@triton.jit
def _load_raw(ptr, column, width, mask, STRIDE: tl.constexpr,
              STRIP: tl.constexpr, HALO: tl.constexpr, WHOLE: tl.constexpr):
    """A row of each strip with its halo as a tuple of columns.

    Zero outside the image. Each column can leave it on one side only.
    """
    row = ()
    for t in tl.static_range(-HALO, STRIP + HALO):
        inside = _inside(column, width, mask, t, STRIP, WHOLE)
        row = row + (tl.load(ptr + t * STRIDE, inside, 0.), )
    return row


@triton.jit
def _wide(row, COUNT: tl.constexpr):
    """A row in fp32."""
    out = ()
    for t in tl.static_range(COUNT):
        out = out + (to_fp32(row[t]), )
    return out


@triton.jit
def _load(ptr, column, width, mask, STRIDE: tl.constexpr, STRIP: tl.constexpr,
          HALO: tl.constexpr, WHOLE: tl.constexpr):
    """:func:`_load_raw` in fp32."""
    return _wide(_load_raw(ptr, column, width, mask, STRIDE, STRIP, HALO,
                           WHOLE), STRIP + 2 * HALO)


@triton.jit
def _gelu_row(row, COUNT: tl.constexpr, EXACT: tl.constexpr):
    out = ()
    for t in tl.static_range(COUNT):
        out = out + (gelu(row[t], EXACT), )
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
    return repeat(tl.zeros((LANES, ), tl.float32), COUNT)


@triton.jit
def _convolve(x_ptr, weight_ptr, channel, column, alive, n, top, height, width,
              C: tl.constexpr, K: tl.constexpr, ROWS: tl.constexpr,
              STRIP: tl.constexpr, HALO: tl.constexpr, LANES: tl.constexpr,
              WHOLE: tl.constexpr, FLIP: tl.constexpr):
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
                  alive, C, STRIP, HALO, WHOLE)
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
    tl.store(h_ptr + n * size + at, gelu(z.to(tl.float32), exact), at < size)


@plan
def _gelu_launch(shape: tuple[int, ...], stride: int) -> Launch:
    n, height, width, c = small_images(shape, stride)
    area, block = height * width, 1024
    return Launch(_gelu_kernel, n * ceil_div(area * c, block), area, C=c,
                  STRIDE=stride, BLOCK=block)


@triton.jit(do_not_specialize=['height', 'width'])
def _gate_kernel(h_ptr, zv_ptr, weight_ptr, bias_ptr, p_ptr, a_ptr, height,
                 width, C: tl.constexpr, K: tl.constexpr, ROWS: tl.constexpr,
                 STRIP: tl.constexpr, HALO: tl.constexpr,
                 LANES: tl.constexpr, WHOLE: tl.constexpr):
    """p = a * v with a = DW(h) + bias, of which a is kept if asked."""
    channel, column, alive, item = _place(width, C, STRIP, LANES, WHOLE)
    n = item // tl.cdiv(height, ROWS)
    top = item % tl.cdiv(height, ROWS) * ROWS
    sums = _convolve(h_ptr, weight_ptr, channel, column, alive, n, top, height,
                     width, C, K, ROWS, STRIP, HALO, LANES, WHOLE, False)
    bias = tl.load(bias_ptr + channel).to(tl.float32)
    for o in tl.static_range(ROWS):
        y = top + o
        pixel = _pixel(n, y, height, width) + column
        mask = alive & (y < height)
        one, two = pixel * C + channel, pixel * (2 * C) + C + channel
        v = _load_raw(zv_ptr + two, column, width, mask, 2 * C, STRIP, 0,
                      WHOLE)
        for t in tl.static_range(STRIP):
            inside = _inside(column, width, mask, t, STRIP, WHOLE)
            # Rounded as the backward pass will find it. In bf16, the products
            # of two channels are one instruction.
            a = (sums[o][t] + bias).to(p_ptr.dtype.element_ty)
            tl.store(p_ptr + one + t * C,
                     a.to(tl.float32) * v[t].to(tl.float32), inside)
            if a_ptr is not None:
                tl.store(a_ptr + one + t * C, a, inside)


@triton.jit(do_not_specialize=['pixels', 'tiles'])
def _gate_backward_kernel(grad_ptr, zv_ptr, a_ptr, h_ptr, p_ptr, da_ptr,
                          grad_zv_ptr, partial_ptr, pixels, tiles,
                          C: tl.constexpr, GRAD_STRIDE: tl.constexpr,
                          PLANE: tl.constexpr, BLOCK: tl.constexpr,
                          PIXELS: tl.constexpr):
    """What needs no neighbours: h = GELU(z), p = a * v and the gradients of a
    and v, with the sums of the latter. h and the gradient of a are in planes
    of PLANE channels."""
    exact: tl.constexpr = zv_ptr.dtype.element_ty == tl.float32
    channel, part, parts = column_place(C, BLOCK)
    used = channel < C
    sums = tl.zeros((PIXELS, BLOCK), tl.float32)
    for tile in range(part, tiles, parts):
        pixel = tl.cast(tile, tl.int64) * PIXELS \
            + tl.arange(0, PIXELS)[:, None]
        inside = used & (pixel < pixels)
        one, two = pixel * C + channel, pixel * (2 * C) + channel
        in_plane = plane_index(pixel, channel, pixels, PLANE)
        grad = tl.load(grad_ptr + pixel * GRAD_STRIDE + channel, inside,
                       0.).to(tl.float32)
        z = tl.load(zv_ptr + two, inside, 0.).to(tl.float32)
        v = tl.load(zv_ptr + two + C, inside, 0.).to(tl.float32)
        a = tl.load(a_ptr + one, inside, 0.).to(tl.float32)
        tl.store(h_ptr + in_plane, gelu(z, exact), inside)
        tl.store(p_ptr + one, a * v, inside)
        tl.store(da_ptr + in_plane, grad * v, inside)
        tl.store(grad_zv_ptr + two + C, grad * a, inside)
        sums += grad * a
    tl.store(partial_ptr + part * C + channel, tl.sum(sums, 0)[None, :], used)


@triton.jit(do_not_specialize=['items', 'splits', 'height', 'width'])
def _gate_input_grad_kernel(da_ptr, weight_ptr, zv_ptr, grad_zv_ptr,
                            partial_ptr, items, splits, height, width,
                            C: tl.constexpr,
                            K: tl.constexpr, ROWS: tl.constexpr,
                            STRIP: tl.constexpr, HALO: tl.constexpr,
                            LANES: tl.constexpr, WHOLE: tl.constexpr):
    """The gradient of z = DW_flipped(da) * GELU'(z), and sums of each lane."""
    exact: tl.constexpr = zv_ptr.dtype.element_ty == tl.float32
    channel, column, alive, split = _place(width, C, STRIP, LANES, WHOLE)
    total = tl.zeros((LANES, ), tl.float32)
    for item in range(split, items, splits):
        n = item // tl.cdiv(height, ROWS)
        top = item % tl.cdiv(height, ROWS) * ROWS
        sums = _convolve(da_ptr, weight_ptr, channel, column, alive, n, top,
                         height, width, C, K, ROWS, STRIP, HALO, LANES, WHOLE,
                         True)
        for o in tl.static_range(ROWS):
            y = top + o
            at = (_pixel(n, y, height, width) + column) * (2 * C) + channel
            mask = alive & (y < height)
            z = _load(zv_ptr + at, column, width, mask, 2 * C, STRIP, 0, WHOLE)
            for t in tl.static_range(STRIP):
                slope = gelu_slope(z[t], gelu_tail(tl.abs(z[t]), exact))
                inside = _inside(column, width, mask, t, STRIP, WHOLE)
                grad = sums[o][t] * slope
                tl.store(grad_zv_ptr + at + t * (2 * C), grad, inside)
                total += tl.where(inside, grad, 0.)
    tl.store(partial_ptr + tl.cast(split, tl.int64) * tl.cdiv(width, STRIP) * C
             + column // STRIP * C + channel, total, alive)


@triton.jit(do_not_specialize=['rows', 'splits', 'height', 'width'])
def _weight_grad_kernel(x_ptr, dy_ptr, partial_ptr, rows, splits, height,
                        width, C: tl.constexpr, K: tl.constexpr,
                        TAP_ROWS: tl.constexpr, STRIP: tl.constexpr,
                        HALO: tl.constexpr, LANES: tl.constexpr,
                        WHOLE: tl.constexpr):
    """Sums of the weight and bias gradient over a part of the batch's rows.

    A program holds TAP_ROWS rows of the filter; the programs for its other
    rows are neighbours, so that they find the same inputs in the cache.
    """
    channel, column, alive, item = _place(width, C, STRIP, LANES, WHOLE)
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
                  width, alive, C, STRIP, HALO, WHOLE)
        new = ()
        for o in tl.static_range(TAP_ROWS):
            taps = sums[o]
            i = head + o
            at = y - i + K // 2
            if (i < K) & (at >= 0) & (at < height):
                dy = _load(dy_ptr + _pixel(n, at, height, width) * C + first,
                           column, width, alive, C, STRIP, 0, WHOLE)
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
def _gate_backward_launch(shape: tuple[int, ...], grad_stride: int,
                          plane: int) -> tuple[Launch, tuple[int, ...]]:
    c = shape[3]
    tile, pixels, tiles, parts = column_tiles(
        shape, 64 if c > 128 else 128, warps=24)
    launch = Launch(
        _gate_backward_kernel, parts * ceil_div(c, tile['BLOCK']), pixels,
        tiles, GRAD_STRIDE=grad_stride, PLANE=plane, maxnreg=80, **tile)
    return launch, (parts, 1, 1, c)


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
    rows = ceil_div(height, tile['ROWS'])
    blocks, items = programs // rows, n * rows
    splits = split_count(items, blocks, WAVES)
    launch = Launch(_gate_input_grad_kernel, splits * blocks, items, splits,
                    height, width, C=c, K=k, **tile)
    return launch, (splits, 1, ceil_div(width, tile['STRIP']), c)


@plan
def _weight_grad_launch(shape: tuple[int, ...],
                        k: int) -> tuple[Launch, tuple[int, ...]]:
    n, height, width, c = shape
    tile, blocks = _tile(width, k, c, strip=14 if width > 7 else 7, lanes=32,
                         registers=128)
    # Some 50 sums fit into the registers; groups of equal numbers of rows.
    groups = ceil_div(k, max(50 // k, 1))
    programs = blocks * groups
    splits = split_count(n * height, programs)
    launch = Launch(_weight_grad_kernel, splits * programs, n * height,
                    splits, height, width, C=c, K=k,
                    TAP_ROWS=ceil_div(k, groups), **tile)
    return launch, (splits, k * k + 1, ceil_div(width, tile['STRIP']), c)


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
    grad, stride = as_pixels(grad)
    shape, k = a.shape, weight.shape[-1]
    h, p, da = (torch.empty_like(a) for _ in range(3))
    grad_zv = torch.empty_like(zv)
    taps, c = k * k, shape[3]

    def empty(shape: tuple[int, ...]) -> Tensor:
        return a.new_empty(shape, dtype=torch.float32)

    banded_weight = banded.takes_weight_grad(shape, k, zv.dtype)
    banded_input = banded.takes_input_grad(shape, k, zv.dtype)
    # h and da are in planes of so many channels, here those of all.
    plane = c
    if banded_weight and banded_input and c % banded.CHANNELS == 0:
        plane = banded.CHANNELS
    launch, partial = _gate_backward_launch(shape, stride, plane)
    launch(grad, zv, a, h, p, da, grad_zv, v_partial := empty(partial))
    launch, partial = banded.weight_grad_launch(shape, k, plane) \
        if banded_weight else _weight_grad_launch(shape, k)
    launch(h, da, taps_partial := empty(partial))
    launch, partial = banded.input_grad_launch(shape, k, plane) \
        if banded_input else _gate_input_grad_launch(shape, k)
    launch(da, _taps_first(weight), zv, grad_zv, z_partial := empty(partial))
    grad_weight, grad_bias, sums = sum_partials(
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
              STRIDE: tl.constexpr, STRIP: tl.constexpr, HALO: tl.constexpr,
              WHOLE: tl.constexpr):
    """Row y of an image, zero above it and from ``end`` on."""
    return _load(ptr + _pixel(n, y, height, width) * STRIDE, column, width,
                 alive & (y >= 0) & (y < end), STRIDE, STRIP, HALO, WHOLE)


@triton.jit
def _add_row(sums, row, taps_ptr, STEP: tl.constexpr, STRIP: tl.constexpr,
             HALO: tl.constexpr):
    """Add the products of a row with a row of a 3x3 filter to STRIP sums."""
    # Taps are loaded anew for each row: registers cost more.
    return _correlate(sums, row, _load_taps(taps_ptr, 3, STEP), 3, STRIP, HALO)


@triton.jit(do_not_specialize=[
    'items', 'splits', 'share', 'height', 'width'])
def _position_kernel(z_ptr, weight_ptr, bias_ptr, grad_ptr, s_ptr, dd_ptr,
                     partial_ptr, items, splits, share, height, width,
                     C: tl.constexpr, Z_STRIDE: tl.constexpr,
                     GRAD_STRIDE: tl.constexpr, STRIP: tl.constexpr,
                     HALO: tl.constexpr, LANES: tl.constexpr,
                     WHOLE: tl.constexpr):
    """s = h + GELU(d) with d = DW_3(h) + bias and h = GELU(z).

    With a gradient also dd, that of d, and the sums for those of the filter
    and the bias. An item is ``share`` rows of an image; the program walks
    down them with three rows of h in registers, so that each value of z is
    read, and its GELU computed, hardly more than once. The next row is asked
    for before this one is worked on.
    """
    exact: tl.constexpr = z_ptr.dtype.element_ty == tl.float32
    columns: tl.constexpr = STRIP + 2 * HALO
    channel, column, alive, split = _place(width, C, STRIP, LANES, WHOLE)
    bias = tl.load(bias_ptr + channel).to(tl.float32)
    top_sums = _zeros(3, LANES)
    mid_sums = _zeros(3, LANES)
    low_sums = _zeros(3, LANES)
    total = tl.zeros((LANES, ), tl.float32)
    first = z_ptr + column * Z_STRIDE + channel
    for item in range(split, items, splits):
        n, start, end = _item_rows(item, share, height)
        limit = tl.minimum(end + 1, height)
        # The row above the first, the first, and the one below it.
        above = _zeros(columns, LANES)
        row = _zeros(columns, LANES)
        ahead = _read_row(first, column, width, alive, n, start - 1, height,
                          limit, Z_STRIDE, STRIP, HALO, WHOLE)
        for y in range(start, start + 2):
            above = row
            row = _gelu_row(ahead, columns, exact)
            ahead = _read_row(first, column, width, alive, n, y, height, limit,
                              Z_STRIDE, STRIP, HALO, WHOLE)
        for y in range(start, end):
            pixel = _pixel(n, y, height, width) + column
            if grad_ptr is not None:
                grad = _load(grad_ptr + pixel * GRAD_STRIDE + channel, column,
                             width, alive, GRAD_STRIDE, STRIP, 0, WHOLE)
            below = _gelu_row(ahead, columns, exact)
            ahead = _read_row(first, column, width, alive, n, y + 2, height,
                              limit, Z_STRIDE, STRIP, HALO, WHOLE)
            taps_ptr = weight_ptr + channel
            d = repeat(bias, STRIP)
            d = _add_row(d, above, taps_ptr, C, STRIP, HALO)
            d = _add_row(d, row, taps_ptr + 3 * C, C, STRIP, HALO)
            d = _add_row(d, below, taps_ptr + 6 * C, C, STRIP, HALO)
            out = pixel * C + channel
            if grad_ptr is not None:
                dd = ()
                for t in tl.static_range(STRIP):
                    inside = _inside(column, width, alive, t, STRIP, WHOLE)
                    e, slope = gelu_and_slope(d[t], exact)
                    dd = dd + (grad[t] * slope, )
                    tl.store(s_ptr + out + t * C, row[t + HALO] + e, inside)
                    tl.store(dd_ptr + out + t * C, dd[t], inside)
                    total += dd[t]
                top_sums = _correlate_weight(top_sums, above, dd, 3, STRIP,
                                             HALO)
                mid_sums = _correlate_weight(mid_sums, row, dd, 3, STRIP, HALO)
                low_sums = _correlate_weight(low_sums, below, dd, 3, STRIP,
                                             HALO)
            else:
                for t in tl.static_range(STRIP):
                    tl.store(s_ptr + out + t * C,
                             row[t + HALO] + gelu(d[t], exact),
                             _inside(column, width, alive, t, STRIP, WHOLE))
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
        LANES: tl.constexpr, WHOLE: tl.constexpr):
    """(DW_flipped(dd) + grad) * GELU'(z), and sums of each lane.

    A program walks down its items as that of :func:`_position_kernel`.
    """
    exact: tl.constexpr = z_ptr.dtype.element_ty == tl.float32
    channel, column, alive, split = _place(width, C, STRIP, LANES, WHOLE)
    total = tl.zeros((LANES, ), tl.float32)
    none = _zeros(STRIP, LANES)
    first = dd_ptr + column * C + channel
    taps_ptr = weight_ptr + 8 * C + channel  # the last
    for item in range(split, items, splits):
        n, start, end = _item_rows(item, share, height)
        limit = tl.minimum(end + 1, height)
        # Sums of this row of outputs and of the next, without what is below.
        this = none
        after = none
        ahead = _read_row(first, column, width, alive, n, start - 1, height,
                          limit, C, STRIP, HALO, WHOLE)
        for y in range(start, start + 2):
            this = _add_row(after, ahead, taps_ptr - 3 * C, -C, STRIP, HALO)
            after = _add_row(none, ahead, taps_ptr, -C, STRIP, HALO)
            ahead = _read_row(first, column, width, alive, n, y, height, limit,
                              C, STRIP, HALO, WHOLE)
        for y in range(start, end):
            pixel = _pixel(n, y, height, width) + column
            grad = _load(grad_ptr + pixel * GRAD_STRIDE + channel, column,
                         width, alive, GRAD_STRIDE, STRIP, 0, WHOLE)
            z = _load(z_ptr + pixel * Z_STRIDE + channel, column, width, alive,
                      Z_STRIDE, STRIP, 0, WHOLE)
            below = ahead
            ahead = _read_row(first, column, width, alive, n, y + 2, height,
                              limit, C, STRIP, HALO, WHOLE)
            dh = _add_row(this, below, taps_ptr - 6 * C, -C, STRIP, HALO)
            this = _add_row(after, below, taps_ptr - 3 * C, -C, STRIP, HALO)
            after = _add_row(none, below, taps_ptr, -C, STRIP, HALO)
            out = out_ptr + pixel * C + channel
            for t in tl.static_range(STRIP):
                inside = _inside(column, width, alive, t, STRIP, WHOLE)
                slope = gelu_slope(z[t], gelu_tail(tl.abs(z[t]), exact))
                dz = (dh[t] + grad[t]) * slope
                tl.store(out + t * C, dz, inside)
                total += tl.where(inside, dz, 0.)
    tl.store(partial_ptr + tl.cast(split, tl.int64) * tl.cdiv(width, STRIP) * C
             + column // STRIP * C + channel, total, alive)


def _position_tile(shape: tuple[int, ...], strip: int,
                   registers: int) -> tuple[dict, int, int, int]:
    """Block sizes, programs for a row, rows of an item, and items.

    A multiprocessor has room for 16 warps with 128 registers, and for 12 with
    up to 168.
    """
    n, height, width, c = shape
    tile, blocks = _tile(width, 3, c, strip, 64, registers)
    # Tall items read fewer rows twice; low ones keep small inputs parallel.
    share = min(max(n * height * blocks // (2 * PROGRAMS), 4), 28)
    return tile, blocks, share, n * ceil_div(height, share)


@plan
def _position_launch(shape: tuple[int, ...], stride: int) -> Launch:
    _, height, width, c = shape
    tile, blocks, share, items = _position_tile(
        shape, strip=14 if width > 7 else 7, registers=168)
    return Launch(_position_kernel, items * blocks, items, items, share,
                  height, width, C=c, Z_STRIDE=stride, GRAD_STRIDE=0, **tile)


@plan
def _position_backward_launches(
        shape: tuple[int, ...], stride: int, grad_stride: int
) -> tuple[Launch, Launch, tuple[int, ...], tuple[int, ...]]:
    """Both passes, and the shapes of their partial sums."""
    _, height, width, c = shape
    tile, blocks, share, items = _position_tile(shape, strip=7,
                                                registers=128)
    splits = split_count(items, blocks, WAVES)
    first, second = (
        Launch(kernel, splits * blocks, items, splits, share, height, width,
               C=c, Z_STRIDE=stride, GRAD_STRIDE=grad_stride, **tile)
        for kernel in (_position_kernel, _position_input_grad_kernel))
    strips = ceil_div(width, tile['STRIP'])
    return first, second, (splits, 10, strips, c), (splits, 1, strips, c)


def position(z: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """See :func:`mmconv2former.torch_kernels.position`."""
    out = contiguous_like(z)
    shape, (z, stride) = z.shape, as_pixels(z)
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
    s = contiguous_like(z)
    dd, grad_z = torch.empty_like(s), torch.empty_like(s)
    shape, taps, c = z.shape, _taps_first(weight), z.shape[3]
    (z, stride), (grad, grad_stride) = as_pixels(z), as_pixels(grad)

    first, second, *partials = _position_backward_launches(
        shape, stride, grad_stride)
    d_partial, z_partial = (
        s.new_empty(partial, dtype=torch.float32) for partial in partials)
    first(z, taps, bias.contiguous(), grad, s, dd, d_partial)
    second(dd, taps, z, grad, grad_z, z_partial)
    grad_weight, grad_bias, total = sum_partials(
        d_partial, z_partial, taps=9).split_with_sizes((9 * c, c, c))
    return grad_z, grad_weight.view(weight.shape), grad_bias, s, total
