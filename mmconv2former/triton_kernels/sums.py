"""Partial sums of many programs to sums, in a fixed order."""
import triton
import triton.language as tl
from torch import Tensor

from .launch import Launch, plan
from .tiling import ceil_div


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
    programs = sum(kinds) * ceil_div(c, columns)
    longest = max(parts * strips for parts, _, strips, _ in shapes)
    if longest > 640:
        tile = dict(ROWS=512, num_warps=8)
    else:  # few programs had better have few loads after another
        tile = dict(ROWS=128 if programs > 256 else 256)
    launch = Launch(_sum_kernel, programs, *sizes, C=c, TAPS=taps,
                    KINDS0=kinds[0], KINDS1=kinds[1], KINDS2=kinds[2],
                    COLUMNS=columns, **tile)
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
