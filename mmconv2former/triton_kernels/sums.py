"""Partial sums of many programs to sums, in a fixed order."""
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from .launch import Launch, plan
from .tiling import ceil_div

# Sets of partial sums that one launch takes at most.
SETS = 4


class _Set(NamedTuple):
    """Partial sums, (parts, kinds, strips, C), to be summed over parts and
    strips.

    Attributes:
        shape (tuple[int]): That shape.
        taps (int): How many of the first kinds belong to a filter.
        start (int): Where the sums begin in what is returned.
    """
    shape: tuple[int, ...]
    taps: int
    start: int


class _Deferred(threading.local):
    """Sets that wait, each with the vector for its sums and its tensor."""
    sets: list[tuple[_Set, Tensor, Tensor]] | None = None


_DEFERRED = _Deferred()


@triton.jit
def _sum(out_ptr, ptr, program, parts, strips, C: tl.constexpr,
         KINDS: tl.constexpr, TAPS: tl.constexpr, START: tl.constexpr,
         COLUMNS: tl.constexpr, ROWS: tl.constexpr):
    """Sum of one kind for some channels."""
    blocks: tl.constexpr = (C + COLUMNS - 1) // COLUMNS
    kind = program // blocks
    channel = program % blocks * COLUMNS + tl.arange(0, COLUMNS)
    used = channel < C
    sums = tl.zeros((ROWS, COLUMNS), tl.float32)
    for start in range(0, parts * strips, ROWS):
        row = start + tl.arange(0, ROWS)
        at = tl.cast(row // strips * KINDS + kind, tl.int64) * strips \
            + row % strips
        sums += tl.load(ptr + at[:, None] * C + channel[None, :],
                        used[None, :] & (row < parts * strips)[:, None], 0.)
    at = kind * C + channel
    if kind < TAPS:
        at = channel * TAPS + kind
    tl.store(out_ptr + START + at, tl.sum(sums, 0), used)


@triton.jit(do_not_specialize=[
    'parts0', 'strips0', 'end0', 'parts1', 'strips1', 'end1', 'parts2',
    'strips2', 'end2', 'parts3', 'strips3'])
def _sum_kernel(out0, ptr0, out1, ptr1, out2, ptr2, out3, ptr3, parts0,
                strips0, end0, parts1, strips1, end1, parts2, strips2, end2,
                parts3, strips3, C0: tl.constexpr, KINDS0: tl.constexpr,
                TAPS0: tl.constexpr, START0: tl.constexpr,
                COLUMNS0: tl.constexpr, ROWS0: tl.constexpr, C1: tl.constexpr,
                KINDS1: tl.constexpr, TAPS1: tl.constexpr,
                START1: tl.constexpr, COLUMNS1: tl.constexpr,
                ROWS1: tl.constexpr, C2: tl.constexpr, KINDS2: tl.constexpr,
                TAPS2: tl.constexpr, START2: tl.constexpr,
                COLUMNS2: tl.constexpr, ROWS2: tl.constexpr, C3: tl.constexpr,
                KINDS3: tl.constexpr, TAPS3: tl.constexpr,
                START3: tl.constexpr, COLUMNS3: tl.constexpr,
                ROWS3: tl.constexpr):
    """Up to SETS sets, whose programs follow each other and end there."""
    program = tl.program_id(0)
    if program < end0:
        _sum(out0, ptr0, program, parts0, strips0, C0, KINDS0, TAPS0, START0,
             COLUMNS0, ROWS0)
    if ptr1 is not None:
        if (program >= end0) & (program < end1):
            _sum(out1, ptr1, program - end0, parts1, strips1, C1, KINDS1,
                 TAPS1, START1, COLUMNS1, ROWS1)
    if ptr2 is not None:
        if (program >= end1) & (program < end2):
            _sum(out2, ptr2, program - end1, parts2, strips2, C2, KINDS2,
                 TAPS2, START2, COLUMNS2, ROWS2)
    if ptr3 is not None:
        if program >= end2:
            _sum(out3, ptr3, program - end2, parts3, strips3, C3, KINDS3,
                 TAPS3, START3, COLUMNS3, ROWS3)


def _tile(rows: int) -> tuple[int, int]:
    """Channels of a program and rows at a time, 32 values for each thread.

    Long sums have few programs, and had better have few loads after another.
    """
    return (8, 1024) if rows > 512 else (32, 256)


@plan
def _sum_launch(*sets: _Set) -> Launch:
    sizes, constants, end = [], {}, 0
    for i, (shape, taps, start) in enumerate(
            [*sets, *(SETS - len(sets)) * [_Set((0, 0, 1, 1), 0, 0)]]):
        parts, kinds, strips, c = shape
        columns, rows = _tile(parts * strips)
        end += kinds * ceil_div(c, columns)
        sizes += parts, strips, end
        constants |= {f'C{i}': c, f'KINDS{i}': kinds, f'TAPS{i}': taps,
                      f'START{i}': start, f'COLUMNS{i}': columns,
                      f'ROWS{i}': rows}
    return Launch(_sum_kernel, end, *sizes[:-1], **constants, num_warps=8)


def _launch(sets: list[tuple[_Set, Tensor, Tensor]]) -> None:
    tensors = [t for _, *pair in sets for t in pair]
    _sum_launch(*(s for s, *_ in sets))(
        *tensors, *(2 * SETS - len(tensors)) * (None, ))


@contextmanager
def deferred_sums() -> Iterator[None]:
    """Sums are taken by fewer launches, the last of them at the end of this
    context; before that nothing may read them."""
    previous, _DEFERRED.sets = _DEFERRED.sets, []
    try:
        yield
        if _DEFERRED.sets:
            _launch(_DEFERRED.sets)
    finally:
        _DEFERRED.sets = previous


@plan
def _describe(taps: int,
              *shapes: tuple[int, ...]) -> tuple[list[_Set], int]:
    """Sets of partial sums, and how long the vector of their sums is."""
    sets, start = [], 0
    for shape in shapes:
        sets.append(_Set(shape, 0 if start else taps, start))
        start += shape[1] * shape[3]
    return sets, start


def sum_partials(*partials: Tensor, taps: int = 0) -> Tensor:
    """Sums of partial sums, in one launch; see :func:`deferred_sums`.

    Args:
        partials (Tensor): One to four, (parts, kinds, strips, C), of the same
            channels; to be summed over parts and strips.
        taps (int): How many of the first kinds belong to a filter.
            Defaults to 0.

    Returns:
        Tensor: Those of the filter, (C, taps), and after them those of all
        other kinds, (C, ) each, in one vector.
    """
    sets, size = _describe(taps, *(p.shape for p in partials))
    out = partials[0].new_empty(size)
    found = [(s, out, partial) for s, partial in zip(sets, partials)]
    waiting = _DEFERRED.sets
    if waiting is None:
        _launch(found)
        return out
    if len(waiting) + len(found) > SETS:
        _launch(waiting)
        waiting.clear()
    waiting += found
    return out
