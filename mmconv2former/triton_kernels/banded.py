"""Gradients of the depthwise 11x11 convolution on tensor cores, in 16 bits.

For one channel, a row of a convolution is the sum over the rows i of its
filter of

    out[y, n] = sum over k of x[y + i - K // 2, k] * band_i[k, n],

where ``band_i[k, n]`` is the tap that leads from column k to column n, or
zero. A window of 16 columns gives up to 8: a matrix product of 16 x 16 by 16
x 8 for each channel, whose 16 rows are images, which a program goes down side
by side. The weight gradient is the product of the same windows with the
columns of the gradient over the images, and its band.

Half of a band is zeros, and the products still take less time than the
multiplications and additions one by one: the data gradient five sixths of it,
the weight gradient five eighths. That gain is lost where rows of the products
are idle. The convolution itself gained nothing.

Where both gradients are computed here, what they read is in planes of 8
channels, (C / 8, N, H, W, 8). The rows of a program are whole there; in (N, H,
W, C) it would use 16 of each 32 bytes that the memory moves.

Sums are in fp32. Taps are rounded as in the convolution of torch under
autocast.
"""
import torch
import triton
import triton.language as tl
from torch.torch_version import TorchVersion

from .gelu import gelu_slope, gelu_tail
from .launch import Launch, plan
from .tiling import MAX_OFFSETS, ceil_div, plane_index, repeat, to_fp32

# The one that was timed. Smaller filters have less to gain, larger ones leave
# too few columns in a window.
KERNEL_SIZE = 11
CHANNELS, IMAGES, WINDOW, COLUMNS = 8, 16, 16, 8
# Earlier versions of Triton have no products with fewer than 16 columns.
HAS_NARROW_PRODUCTS = TorchVersion(triton.__version__) >= (3, 5)
# Least share of the rows of the products that are in use. About what the
# gradients take of the time of those without tensor cores, when all are.
LEAST_USED = dict(weight=0.65, input=0.8)
# Programs of 128 threads that an H100 or H200 holds at a time, three for each
# of its multiprocessors, and registers so that it does.
RESIDENT = 3 * 132
TILE = dict(CHANNELS=CHANNELS, IMAGES=IMAGES, WINDOW=WINDOW, COLUMNS=COLUMNS,
            num_warps=4, num_stages=1, maxnreg=168)


def _strips(width: int, kernel_size: int) -> tuple[dict, int]:
    """Columns of a strip and of the window left of it, and strips of a row.

    A window that holds the whole row begins with it.
    """
    if width <= WINDOW:
        strips = ceil_div(width, COLUMNS)
        return dict(STRIP=ceil_div(width, strips), HALO=0), strips
    strip = WINDOW - kernel_size + 1
    return dict(STRIP=strip, HALO=kernel_size // 2), ceil_div(width, strip)


def _rows(height: int) -> int:
    """Rows of an image that a program of the weight gradient holds."""
    return min((14, 7), key=lambda rows: ceil_div(height, rows) * rows)


def _is_possible(shape: tuple[int, ...], kernel_size: int,
                 dtype: torch.dtype) -> bool:
    _, height, width, c = shape
    return (HAS_NARROW_PRODUCTS and kernel_size == KERNEL_SIZE
            and dtype.itemsize == 2
            and height * width * 2 * c < MAX_OFFSETS)


@plan
def takes_weight_grad(shape: tuple[int, ...], kernel_size: int,
                      dtype: torch.dtype) -> bool:
    """Whether the weight gradient is computed here, where that is faster.

    Args:
        shape (tuple[int]): (N, H, W, C).
        kernel_size (int): Of the convolution.
        dtype (torch.dtype): Of the tensors.

    Returns:
        bool: Whether it is.
    """
    if not _is_possible(shape, kernel_size, dtype):
        return False
    n, height, _, c = shape
    if c % CHANNELS:  # registers for the rest go to memory
        return False
    rows = _rows(height)
    groups = ceil_div(n * ceil_div(height, rows), IMAGES)
    return n * height >= LEAST_USED['weight'] * groups * IMAGES * rows


@plan
def takes_input_grad(shape: tuple[int, ...], kernel_size: int,
                     dtype: torch.dtype) -> bool:
    """The same of the data gradient."""
    if not _is_possible(shape, kernel_size, dtype):
        return False
    n, _, width, c = shape
    groups = ceil_div(n, IMAGES)
    programs = groups * _strips(width, kernel_size)[1] * ceil_div(
        c, CHANNELS)
    # Wider than a strip, below which it was slower, and enough to do.
    return (width > COLUMNS and n >= LEAST_USED['input'] * groups * IMAGES
            and programs >= RESIDENT * 2 // 3)


@triton.jit
def _band(taps_ptr, i, channel, shift, C: tl.constexpr, K: tl.constexpr,
          WINDOW: tl.constexpr, COLUMNS: tl.constexpr, dtype: tl.constexpr):
    """Row i of the filter, from its end, as (channels, WINDOW, COLUMNS)."""
    j = tl.arange(0, WINDOW)[None, :, None] \
        - tl.arange(0, COLUMNS)[None, None, :] + shift
    inside = (j >= 0) & (j < K) & (channel < C)
    return tl.load(taps_ptr + (K * K - 1 - i * K - j) * C + channel, inside,
                   0.).to(dtype)


@triton.jit
def _across(x):
    """(channels, columns, images) from (channels, images, columns), or back.

    Threads that are neighbours load what is along the second dimension.
    """
    return tl.permute(x, (0, 2, 1))


@triton.jit
def _load_row(ptr, y, height, step, inside):
    return tl.load(ptr + y * step, inside & (y >= 0) & (y < height), 0.)


@triton.jit
def _store_grad(grad, z, total, grad_zv_ptr, y, step, inside):
    """grad * GELU'(z), and its sum with the total."""
    z = to_fp32(z)
    grad *= gelu_slope(z, gelu_tail(tl.abs(z), False))
    tl.store(grad_zv_ptr + y * step, grad, inside)
    return total + tl.where(inside, grad, 0.)


@triton.jit(do_not_specialize=['images', 'height', 'width'])
def _banded_input_grad_kernel(da_ptr, taps_ptr, zv_ptr, grad_zv_ptr,
                              partial_ptr, images, height, width,
                              C: tl.constexpr, K: tl.constexpr,
                              STRIP: tl.constexpr, HALO: tl.constexpr,
                              PLANE: tl.constexpr, CHANNELS: tl.constexpr,
                              IMAGES: tl.constexpr, WINDOW: tl.constexpr,
                              COLUMNS: tl.constexpr):
    """The gradient of z = DW_flipped(da) * GELU'(z), and sums of a program.

    The K rows of outputs that a row of ``da`` adds to are held, the oldest
    first. The next row is asked for before this one is worked on.
    """
    blocks: tl.constexpr = (C + CHANNELS - 1) // CHANNELS
    strips = tl.cdiv(width, STRIP)
    pid = tl.program_id(0)
    channels = pid % blocks * CHANNELS + tl.arange(0, CHANNELS)
    channel = channels[:, None, None]
    left = pid // blocks % strips * STRIP
    window = left - HALO if HALO > 0 else 0
    image = (pid // blocks // strips * IMAGES
             + tl.arange(0, IMAGES))[None, :, None]
    used = (image < images) & (channel < C)
    first = tl.cast(image, tl.int64) * height * width  # pixel
    column = window + tl.arange(0, WINDOW)[None, :, None]
    in_window = _across(used) & (column >= 0) & (column < width)
    pixels = tl.cast(images, tl.int64) * height * width
    da = da_ptr + plane_index(_across(first) + column, channel, pixels, PLANE)
    column = left + tl.arange(0, COLUMNS)[None, None, :]
    in_strip = used & (column < tl.minimum(left + STRIP, width))
    at = (first + column) * (2 * C) + channel
    step = width * (2 * C)

    bands = ()
    for i in tl.static_range(K):
        bands = bands + (_band(taps_ptr, i, channel, window - left + K // 2, C,
                               K, WINDOW, COLUMNS, da_ptr.dtype.element_ty), )
    zero = tl.zeros((CHANNELS, IMAGES, COLUMNS), tl.float32)
    total = zero
    sums = repeat(zero, K)
    row = _load_row(da, 0, height, width * PLANE, in_window)
    z = _load_row(zv_ptr + at, -(K // 2), height, step, in_strip)
    for y in range(height):
        this_row, this_z = row, z
        row = _load_row(da, y + 1, height, width * PLANE, in_window)
        z = _load_row(zv_ptr + at, y + 1 - K // 2, height, step, in_strip)
        new = ()
        for s in tl.static_range(K):
            new = new + (tl.dot(_across(this_row), bands[K - 1 - s],
                                sums[s]), )
        if y >= K // 2:
            total = _store_grad(new[0], this_z, total, grad_zv_ptr + at,
                                y - K // 2, step, in_strip)
        sums = new[1:] + (zero, )
    # Below the image there is nothing to add.
    for y in range(height - K // 2, height):
        this_z = z
        z = _load_row(zv_ptr + at, y + 1, height, step, in_strip)
        if y >= 0:
            total = _store_grad(sums[0], this_z, total, grad_zv_ptr + at, y,
                                step, in_strip)
        sums = sums[1:] + (zero, )
    tl.store(partial_ptr + tl.cast(pid // blocks, tl.int64) * C + channels,
             tl.sum(tl.sum(total, 2), 1), channels < C)


@triton.jit(do_not_specialize=['images', 'splits', 'height', 'width'])
def _banded_weight_grad_kernel(x_ptr, dy_ptr, partial_ptr, images, splits,
                               height, width, C: tl.constexpr, K: tl.constexpr,
                               STRIP: tl.constexpr, HALO: tl.constexpr,
                               ROWS: tl.constexpr, PLANE: tl.constexpr,
                               CHANNELS: tl.constexpr, IMAGES: tl.constexpr,
                               WINDOW: tl.constexpr, COLUMNS: tl.constexpr):
    """Sums of the weight and bias gradient over a part of the batch.

    ``images`` are parts of ROWS rows. Of the product for row i of the filter,
    each diagonal in the band belongs to a tap, and each of its columns is
    stored as a sum of its own.
    """
    blocks: tl.constexpr = (C + CHANNELS - 1) // CHANNELS
    strips = tl.cdiv(width, STRIP)
    pid = tl.program_id(0)
    channel = (pid % blocks * CHANNELS + tl.arange(0, CHANNELS))[:, None, None]
    part = pid // blocks
    pixels = tl.cast(images // tl.cdiv(height, ROWS), tl.int64) \
        * height * width
    groups = tl.cdiv(images, IMAGES)
    # Where windows begin with the row, the sums of each strip are apart.
    fixed = part // splits * STRIP if HALO == 0 else 0
    shift = K // 2 - HALO - fixed
    units = groups if HALO == 0 else groups * strips
    sums = repeat(tl.zeros((CHANNELS, WINDOW, COLUMNS), tl.float32), K)
    total = tl.zeros((CHANNELS, IMAGES, COLUMNS), tl.float32)
    for unit in range(part % splits, units, splits):
        left = fixed if HALO == 0 else unit // groups * STRIP
        window = left - HALO if HALO > 0 else 0
        image = unit % groups * IMAGES + tl.arange(0, IMAGES)
        parts = tl.cdiv(height, ROWS)
        first = tl.cast(image // parts, tl.int64) * height * width  # pixel
        top = image % parts * ROWS

        column = left + tl.arange(0, COLUMNS)[None, None, :]
        inside = (image < images)[None, :, None] & (channel < C) \
            & (column < tl.minimum(left + STRIP, width))
        dy_first = dy_ptr + plane_index(first[None, :, None] + column, channel,
                                        pixels, PLANE)
        dys = ()
        for o in tl.static_range(ROWS):
            dy = _load_row(dy_first, top[None, :, None] + o, height,
                           width * PLANE, inside)
            total += dy.to(tl.float32)
            dys = dys + (dy, )

        column = window + tl.arange(0, WINDOW)[None, :, None]
        inside = (image < images)[None, None, :] & (channel < C) \
            & (column >= 0) & (column < width)
        x_first = x_ptr + plane_index(first[None, None, :] + column, channel,
                                      pixels, PLANE)
        x_top = top[None, None, :] - K // 2
        rows = ()  # asked for two ahead
        for r in tl.static_range(2):
            rows = rows + (_load_row(x_first, x_top + r, height, width * PLANE,
                                     inside), )
        for r in tl.static_range(ROWS + K - 1):
            row = rows[0]
            rows = rows[1:] + (_load_row(x_first, x_top + r + 2, height,
                                         width * PLANE, inside), )
            new = ()
            for i in tl.static_range(K):
                if (r - i >= 0) and (r - i < ROWS):
                    new = new + (tl.dot(row, dys[r - i], sums[i]), )
                else:
                    new = new + (sums[i], )
            sums = new

    k = tl.arange(0, WINDOW)[None, :, None]
    n = tl.arange(0, COLUMNS)[None, None, :]
    used = (channel < C) & (n < STRIP)
    out = partial_ptr + tl.cast(part, tl.int64) * ((K * K + 1) * STRIP * C) \
        + n * C + channel
    j = k - n + shift
    # Taps that meet nothing but the padding are in no window.
    missing = (k + n - shift < 0) | (k + n - shift >= WINDOW)
    for i in tl.static_range(K):
        tl.store(out + (i * K + j) * (STRIP * C), sums[i],
                 used & (j >= 0) & (j < K))
        if HALO == 0:
            tl.store(out + (i * K + k) * (STRIP * C),
                     tl.zeros((CHANNELS, WINDOW, COLUMNS), tl.float32),
                     used & missing & (k < K))
    tl.store(out + K * K * (STRIP * C), tl.sum(total, 1)[:, None, :], used)


@plan
def input_grad_launch(shape: tuple[int, ...], k: int,
                      plane: int) -> tuple[Launch, tuple[int, ...]]:
    n, height, width, c = shape
    tile, strips = _strips(width, k)
    parts = ceil_div(n, IMAGES) * strips
    launch = Launch(_banded_input_grad_kernel,
                    parts * ceil_div(c, CHANNELS), n, height, width,
                    C=c, K=k, PLANE=plane, **tile, **TILE)
    return launch, (parts, 1, 1, c)


@plan
def weight_grad_launch(shape: tuple[int, ...], k: int,
                       plane: int) -> tuple[Launch, tuple[int, ...]]:
    n, height, width, c = shape
    (tile, strips), rows = _strips(width, k), _rows(height)
    images = n * ceil_div(height, rows)
    units, apart = ceil_div(images, IMAGES), strips
    if tile['HALO']:
        units, apart = units * strips, 1
    blocks = apart * ceil_div(c, CHANNELS)
    splits = ceil_div(units, ceil_div(units, max(RESIDENT // blocks, 1)))
    launch = Launch(_banded_weight_grad_kernel, splits * blocks, images,
                    splits, height, width, C=c, K=k, ROWS=rows, PLANE=plane,
                    **tile, **TILE)
    return launch, (splits * apart, k * k + 1, tile['STRIP'], c)
