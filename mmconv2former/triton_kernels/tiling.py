"""How feature maps are cut into the work of programs.

Sizes of blocks were chosen by timing on an H100, of T at 128 x 224 x 224 in
bf16.
"""
from math import prod

import torch
import triton
import triton.language as tl
from torch import Tensor

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


def contiguous_like(x: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """Room for a result, contiguous whatever x is.

    ``x.new_empty(x.shape)`` takes twice as long.
    """
    return torch.empty_like(x, dtype=dtype,
                            memory_format=torch.contiguous_format)


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


def padded_tile(channels: int) -> dict:
    """Blocks of pixels with all their channels, padded to a power of two: 2048
    values, 16 for each of the 128 threads."""
    block = triton.next_power_of_2(channels)
    return dict(C=channels, CHUNKS=1, BLOCK=block,
                PIXELS=max(2048 // block, 1))


def programs_of_four_warps(warps: int) -> int:
    """How many programs of four warps run at a time on an H100, where a
    multiprocessor has registers for that many warps."""
    return PROGRAMS // 16 * warps // 4  # 132 multiprocessors


def column_tiles(shape: tuple[int, ...], block: int,
                 warps: int = 32) -> tuple[dict, int, int, int]:
    """Block sizes, pixels, tiles and parts of sums over the pixels, where a
    program of four warps takes a block of channels.

    A multiprocessor has registers for so many ``warps`` at a time.

    Few lanes are idle so, where those of whole rows are up to half of them;
    but what is written in less than 64 bytes at a time is written slowly.
    """
    *image, c = shape
    block = min(triton.next_power_of_2(c), block)
    tile, pixels = dict(C=c, BLOCK=block, PIXELS=2048 // block), prod(image)
    tiles, blocks = ceil_div(pixels, 2048 // block), ceil_div(c, block)
    programs = programs_of_four_warps(warps)
    return tile, pixels, tiles, max(min(tiles, programs // blocks), 1)


def chunk_tile(channels: int) -> tuple[dict, int]:
    """Blocks of pixels with all their channels, and the programs at a time of
    sums over them.

    Where the channels are three, five or nine times a power of two, or nearly,
    they come in as many chunks of neighbours: padded to a power of two, up to
    half of the lanes would be idle. Those of 72, 144 and 288 channels were
    timed, the others chosen by their number of instructions.
    """
    padded = triton.next_power_of_2(channels)
    tile = dict(padded_tile(channels), num_warps=4)
    # Fewer programs where the sums of each are long.
    warps = 2 if channels <= 512 else 4
    for chunks in 3, 5, 9:
        if channels % chunks:
            continue
        block = triton.next_power_of_2(channels // chunks)
        # 10 to 18 values for each thread.
        pixels = warps * (128 if chunks == 3 else 64) // block
        if block >= 16 and pixels and chunks * block < padded:
            padded = chunks * block
            tile = dict(C=channels, CHUNKS=chunks, BLOCK=block, PIXELS=pixels,
                        num_warps=warps)
    return tile, PROGRAMS // tile['num_warps']


@triton.jit
def repeat(x, COUNT: tl.constexpr):
    """A tuple of COUNT times the same."""
    out = ()
    for _ in tl.static_range(COUNT):
        out = out + (x, )
    return out


@triton.jit
def to_fp32(x):
    """What is loaded for calculations with fp32, in fp32; bf16 by integers.

    The compiler puts floats of 16 bits in pairs and takes them apart again,
    with one or two instructions more for each.
    """
    if x.dtype == tl.bfloat16:
        x = (x.to(tl.uint16, bitcast=True).to(tl.uint32) << 16).to(
            tl.float32, bitcast=True)
    return x.to(tl.float32)


@triton.jit
def column_place(C: tl.constexpr, BLOCK: tl.constexpr):
    """Channels of a program of :func:`column_tiles`, which part of the sums
    it has, and how many there are."""
    blocks: tl.constexpr = (C + BLOCK - 1) // BLOCK
    pid = tl.program_id(0)
    return (pid % blocks * BLOCK + tl.arange(0, BLOCK)[None, :],
            pid // blocks, tl.num_programs(0) // blocks)


@triton.jit
def plane_index(pixel, channel, pixels, PLANE: tl.constexpr):
    """Index of a value in planes of PLANE channels, each with all pixels."""
    plane = tl.cast(channel // PLANE, tl.int64)
    return (plane * pixels + pixel) * PLANE + channel % PLANE


@triton.jit
def _small_quotient(a, b):
    """a // b for a < b + 2048, in fp32: a division of integers takes several
    times as many instructions."""
    quotient = ((a.to(tl.float32) + 0.5) * (1. / b)).to(tl.int32)
    return tl.where(a < b, 0, tl.maximum(quotient, 1))


@triton.jit
def patch_index(first, pixel, height, width, PATCH: tl.constexpr):
    """Index of a pixel among those in patches, and whether it is in one.

    Pixels are counted from the ``first`` of a tile.
    """
    if PATCH == 1:
        index = first + pixel
        inside = pixel >= 0  # all are
    else:
        first = first.to(tl.int32)  # in which divisions are faster
        row, x = first // width, first % width + pixel
        n, y = row // height, row % height
        rows = _small_quotient(x, width)
        x -= rows * width
        y += rows
        images = _small_quotient(y, height)
        y -= images * height
        high, wide = height // PATCH, width // PATCH
        patch = ((n + images) * high + y // PATCH) * wide + x // PATCH
        index = tl.cast(patch, tl.int64) * (PATCH * PATCH) \
            + (y % PATCH * PATCH + x % PATCH)
        inside = (y < high * PATCH) & (x < wide * PATCH)
    return index, inside
