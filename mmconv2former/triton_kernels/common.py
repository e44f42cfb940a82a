"""What the kernels share: sums, GELU, and how work is cut into programs.

Sizes of blocks were chosen by timing on an H100, of T at 128 x 224 x 224 in
bf16.
"""
from math import prod

import triton
import triton.language as tl
from torch import Tensor
from torch.torch_version import TorchVersion

from .launch import Launch, plan

if TorchVersion(triton.__version__) < (3, 3):
    raise ImportError(f'found Triton {triton.__version__}; expected 3.3 or '
                      'later (tuples in kernels), which torch 2.7 brings')

# Programs that sum over the batch: as many as the 132 multiprocessors of an
# H100 or H200 hold at a time. A constant, so that results do not depend on
# the device.
PROGRAMS = 16 * 132
# Offsets within an image are counted in 32 bits.
MAX_OFFSETS = 2**31


def ceil_div(a: int, b: int) -> int:
    # triton.cdiv takes a microsecond and a half.
    return -(-a // b)


def split_count(items: int, programs: int, waves: int = 1) -> int:
    """Into how many equal parts to cut a sum over the items.

    Each part is the work of as many programs; all of them fill the GPU.
    """
    share = ceil_div(items, max(waves * PROGRAMS // programs, 1))
    return ceil_div(items, max(share, 1))


def as_pixels(x: Tensor) -> tuple[Tensor, int]:
    """(N, H, W, C) in equal steps from pixel to pixel, and the step.

    A copy where that cannot be.
    """
    if not x.is_contiguous():
        rows = x.reshape(-1, x.shape[-1])
        if rows.stride(1) == 1:
            return rows, rows.stride(0)
        x = rows.contiguous()
    return x, x.shape[-1]


def small_images(shape: tuple[int, ...], stride: int) -> tuple[int, ...]:
    """The shape, or that of its rows as images where those are too large."""
    n, height, width, c = shape
    if height * width * stride < MAX_OFFSETS:
        return shape
    return n * height, 1, width, c


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
        _sum_kernel, sum(kinds) * ceil_div(c, columns), *sizes, C=c,
        TAPS=taps, KINDS0=kinds[0], KINDS1=kinds[1], KINDS2=kinds[2],
        COLUMNS=columns, **(dict(ROWS=64) if longest <= 1024 else
                            dict(ROWS=512, num_warps=8)))
    return launch, sum(kinds)


def sum_partials(*partials: Tensor, taps: int = 0) -> Tensor:
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
def gelu_tail(u, EXACT: tl.constexpr):
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
def gelu(x, EXACT: tl.constexpr):
    """GELU (that of erf, not of tanh); infinities give NaN."""
    u = tl.abs(x)
    return tl.maximum(x, 0.) - u * gelu_tail(u, EXACT)


@triton.jit
def gelu_slope(x, tail):
    """Derivative of GELU, with the tail at abs(x)."""
    u = tl.abs(x)
    # exp(-u * u / 2) / sqrt(2 * pi)
    density = tl.exp2(-0.72134752 * u * u - 1.32574806)
    slope = tail - u * density
    return tl.where(x > 0., 1. - slope, slope)


@triton.jit
def gelu_and_slope(x, EXACT: tl.constexpr):
    """GELU and its derivative."""
    u = tl.abs(x)
    tail = gelu_tail(u, EXACT)
    return tl.maximum(x, 0.) - u * tail, gelu_slope(x, tail)


def norm_tile(channels: int) -> dict:
    """Blocks of 2048 values: 16 for each of the 128 threads."""
    block = triton.next_power_of_2(channels)
    return dict(C=channels, BLOCK=block, PIXELS=max(2048 // block, 1))


def row_tiles(shape: tuple[int, ...]) -> tuple[dict, int, int, int]:
    """Block sizes, pixels, tiles and programs of sums over the pixels, where
    a program takes all channels."""
    *image, c = shape
    tile, pixels = norm_tile(c), prod(image)
    tiles = ceil_div(pixels, tile['PIXELS'])
    return tile, pixels, tiles, max(min(tiles, PROGRAMS // 4), 1)


def column_tiles(shape: tuple[int, ...],
                 block: int) -> tuple[dict, int, int, int]:
    """The same where a program takes a block of channels, and how many parts
    the sums have.

    Few lanes are idle so, where those of whole rows are up to half of them;
    but what is written in less than 64 bytes at a time is written slowly.
    """
    *image, c = shape
    block = min(triton.next_power_of_2(c), block)
    tile, pixels = dict(C=c, BLOCK=block, PIXELS=2048 // block), prod(image)
    tiles, blocks = ceil_div(pixels, 2048 // block), ceil_div(c, block)
    return tile, pixels, tiles, max(min(tiles, PROGRAMS // 2 // blocks), 1)


@triton.jit
def column_place(C: tl.constexpr, BLOCK: tl.constexpr):
    """Channels of a program of :func:`column_tiles`, which part of the sums
    it has, and how many there are."""
    blocks: tl.constexpr = (C + BLOCK - 1) // BLOCK
    pid = tl.program_id(0)
    return (pid % blocks * BLOCK + tl.arange(0, BLOCK)[None, :],
            pid // blocks, tl.num_programs(0) // blocks)


@triton.jit
def patch_index(pixel, height, width, PATCH: tl.constexpr):
    """Index of a pixel among those in patches, and whether it is in one."""
    pixel = pixel.to(tl.int32)  # in which divisions are several times faster
    row, x = pixel // width, pixel % width
    n, y = row // height, row % height
    rows, columns = height // PATCH, width // PATCH
    patch = (n * rows + y // PATCH) * columns + x // PATCH
    return (tl.cast(patch, tl.int64) * (PATCH * PATCH)
            + (y % PATCH * PATCH + x % PATCH),
            (y < rows * PATCH) & (x < columns * PATCH))
