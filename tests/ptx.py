"""Executes PTX, what Triton makes of a kernel for a GPU, without one.

Triton's own interpreter runs the Python of a kernel. This one runs what the
compiler has made of it, instruction by instruction and for all threads of many
programs at a time, and tells what a GPU does in silence: access to memory
outside of the tensors or not aligned, programs that read or write what another
one has written, and warps that do so in shared memory without a barrier.

It knows the instructions that the kernels of this package consist of, as the
manual describes them (PTX ISA 8.7); of others it says that it does not. A
branch may differ between programs, not between the threads of one.
"""
import ctypes
import re
from collections.abc import Sequence
from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np
from torch import Tensor

WARP = 32
# Threads at a time.
LANES = 2**15
REGISTERS = {'p': np.bool_, 'rs': np.uint16, 'r': np.uint32, 'rd': np.uint64}
UNSIGNED = {1: np.uint8, 2: np.uint16, 4: np.uint32, 8: np.uint64}
HALVES = 'f16', 'bf16', 'f16x2', 'bf16x2'
TYPES = {*HALVES, 'f32', 'pred', *(f'{letter}{width}' for letter in 'bus'
                                   for width in (16, 32, 64))}
# What may stand between the name of an instruction and its type. `ftz` sets
# numbers below 1e-38 to zero, which is not done here, nor is `approx`.
MODIFIERS = {
    'eq', 'ne', 'lt', 'le', 'gt', 'ge', 'lo', 'hi', 'wide', 'rn', 'approx',
    'full', 'ftz', 'uni', 'param', 'global', 'shared', 'v2', 'v4', 'sync',
    'rzi', 'bfly', 'idx', 'l', 'r', 'wrap', 'aligned', 'm8n8', 'x1', 'x2',
    'x4', 'trans', 'm16n8k8', 'm16n8k16', 'row', 'col'}


class Fault(Exception):
    """What no correct kernel does."""


class Instruction(NamedTuple):
    """Such as ``@%p1 ld.global.v2.b32 {%r1, %r2}, [%rd1+8];``.

    Attributes:
        text (str): All of it.
        guard (str): The predicate, with ``!`` if it must be false, or ''.
        parts (list[str]): Name and modifiers, 'ld', 'global', 'v2', 'b32'.
        operands (list[str]): As they are written, the result first.
    """
    text: str
    guard: str
    parts: list[str]
    operands: list[str]

    @property
    def kind(self) -> str:
        """Type of the operands, such as 'f32'."""
        return self.parts[-1]


class Kernel(NamedTuple):
    """A parsed kernel.

    Attributes:
        threads (int): Of a program.
        parameters (list[str]): Their names, in order.
        instructions (list[Instruction]): In order.
        labels (dict[str, int]): The instructions that they stand before.
    """
    threads: int
    parameters: list[str]
    instructions: list[Instruction]
    labels: dict[str, int]


@lru_cache
def parse(ptx: str) -> Kernel:
    """Parse the one kernel of a PTX module.

    Raises:
        NotImplementedError: If it has instructions that are not known here.
    """
    body = ptx[ptx.index('.entry'):]
    instructions, labels = [], {}
    for line in body[body.index('\n{') + 2:body.index('\n}')].splitlines():
        line = line.partition('//')[0].strip()
        if line.endswith(':'):
            labels[line[:-1]] = len(instructions)
        elif line and not line.startswith('.'):
            guard, name, rest = re.fullmatch(
                r'(?:@(!?%\w+)\s+)?([\w.]+)\s*(.*);', line).groups()
            # Commas in braces and brackets do not separate operands.
            operands = re.findall(r'\{[^}]*\}|\[[^]]*\]|[^\s,]+', rest)
            parts = name.split('.')
            if not {*parts[1:]} <= TYPES | MODIFIERS:
                raise NotImplementedError(line)
            instructions.append(
                Instruction(line, guard or '', parts, operands))
    return Kernel(
        int(re.search(r'\.reqntid (\d+)', body).group(1)),
        re.findall(r'\.param [^\n]*?(\w+_param_\d+)', body),
        instructions, labels)


def _dtype(kind: str) -> np.dtype:
    """Of numbers of a type that NumPy has."""
    if kind == 'pred':
        return np.dtype(bool)
    letter = {'b': 'u', 's': 'i'}.get(kind[0], kind[0])
    return np.dtype(f'{letter}{int(kind[1:]) // 8}')


def _numbers(bits: np.ndarray, kind: str) -> np.ndarray:
    """Numbers of a type in registers, (lanes, ) or for 'x2' (lanes, 2)."""
    if kind not in HALVES:
        return bits.view(_dtype(kind))
    halves = bits.view(np.uint16).reshape(len(bits), -1)
    halves = halves if kind.endswith('x2') else halves[:, 0]
    if kind.startswith('f16'):
        return halves.view(np.float16).astype(np.float32)
    return (halves.astype(np.uint32) << np.uint32(16)).view(np.float32)


def _bits(numbers: np.ndarray, kind: str) -> np.ndarray:
    """The reverse, rounded to nearest even where need be; floats from fp32."""
    if kind.startswith('f16'):
        with np.errstate(over='ignore'):
            halves = numbers.astype(np.float16).view(np.uint16)
    elif kind.startswith('bf16'):
        bits = numbers.astype(np.float32).view(np.uint32).astype(np.uint64)
        rounded = (bits + np.uint64(0x7fff)
                   + (bits >> np.uint64(16) & np.uint64(1))) >> np.uint64(16)
        halves = np.where(np.isnan(numbers), 0x7fff, rounded).astype(np.uint16)
    else:
        numbers = np.ascontiguousarray(numbers, _dtype(kind))
        return numbers if kind == 'pred' \
            else numbers.view(UNSIGNED[numbers.itemsize])
    halves = np.ascontiguousarray(halves)
    return halves.view(np.uint32)[:, 0] if kind.endswith('x2') else halves


class _Region:
    """Memory of a tensor, and which program has written each byte."""

    def __init__(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        self.start, size = storage.data_ptr(), storage.nbytes()
        self.memory = np.ctypeslib.as_array(
            (ctypes.c_uint8 * size).from_address(self.start))
        self.writer = np.full(size, -1)


class GlobalMemory:
    """What the tensors that a kernel was given hold."""

    def __init__(self, tensors: Sequence[Tensor]) -> None:
        # Views of one tensor are one region.
        regions = {r.start: r for r in map(_Region, tensors)
                   if len(r.memory)}
        self.regions = [regions[start] for start in sorted(regions)]
        self.starts = np.array([r.start for r in self.regions], np.uint64)
        self.sizes = np.array([len(r.memory) for r in self.regions], np.uint64)

    def access(self, addresses: np.ndarray, width: int, count: int,
               programs: np.ndarray, values: np.ndarray | None) -> np.ndarray:
        """Read ``count`` numbers of ``width`` bytes for each address, or write
        values, (addresses, count)."""
        found = np.searchsorted(self.starts, addresses, 'right') - 1
        offsets = addresses - self.starts[found]
        size = np.uint64(width * count)
        outside = (found < 0) | (offsets + size > self.sizes[found])
        if outside.any():
            raise Fault(f'{outside.sum()} threads outside of all tensors')
        if (addresses % size).any():
            raise Fault(f'address that is no multiple of {size}')
        out = np.empty((len(addresses), count), UNSIGNED[width])
        for i in np.unique(found):
            region, lanes = self.regions[i], found == i
            memory = region.memory[:len(region.memory) // width * width].view(
                UNSIGNED[width])
            at = offsets[lanes].astype(np.int64)
            index = (at // width)[:, None] + np.arange(count)
            own = programs[lanes]
            places = at[:, None] + np.arange(width * count)
            is_shared = (region.writer[places] >= 0) & (
                region.writer[places] != own[:, None])
            if values is not None:
                region.writer[places] = own[:, None]
                is_shared |= region.writer[places] != own[:, None]
            if is_shared.any():
                raise Fault('two programs in one place')
            if values is not None:
                memory[index] = values[lanes]
                if (memory[index] != values[lanes]).any():
                    raise Fault('two threads write different values')
            out[lanes] = memory[index]
        return out


class SharedMemory:
    """That of some programs; nobody else's until a barrier."""

    def __init__(self, programs: int, size: int) -> None:
        self.memory = np.zeros((programs, -(-size // 8) * 8), np.uint8)
        self.is_written = np.zeros(self.memory.shape, bool)
        self.size = size
        # The warps that have, -1 for none and -2 for several.
        self.writer = np.full(self.memory.shape, -1)
        self.reader = np.full(self.memory.shape, -1)

    def take(self, keep: np.ndarray) -> 'SharedMemory':
        """That of some of these programs, as a copy."""
        other = SharedMemory(0, self.size)
        for name in 'memory', 'is_written', 'writer', 'reader':
            setattr(other, name, getattr(self, name)[keep])
        return other

    def barrier(self) -> None:
        self.writer[:] = self.reader[:] = -1

    def access(self, addresses: np.ndarray, width: int, count: int,
               programs: np.ndarray, warps: np.ndarray,
               values: np.ndarray | None) -> np.ndarray:
        """As that of :class:`GlobalMemory`."""
        at, size = addresses.astype(np.int64), width * count
        if (at + size > self.size).any() or (at % size).any():
            raise Fault('outside of shared memory, or not aligned')
        rows = programs[:, None]
        places = rows, at[:, None] + np.arange(size)
        index = rows, (at // width)[:, None] + np.arange(count)
        memory, own = self.memory.view(UNSIGNED[width]), warps[:, None]

        def by_others(who: np.ndarray) -> np.ndarray:
            return (who[places] != -1) & (who[places] != own)

        if values is None:
            if by_others(self.writer).any():
                raise Fault('reads what another warp wrote, with no barrier')
            if not self.is_written[places].all():
                raise Fault('reads shared memory that nobody has written')
            self.reader[places] = np.where(by_others(self.reader), -2, own)
        else:
            if by_others(self.reader).any():
                raise Fault('writes where another warp read, with no barrier')
            # Warps may write the same.
            is_new = (memory[index] != values).any(1, keepdims=True)
            if (by_others(self.writer) & is_new).any():
                raise Fault('writes where another warp wrote, with no barrier')
            self.writer[places] = own
            self.is_written[places] = True
            memory[index] = values
            if (memory[index] != values).any():
                raise Fault('two threads write different values')
        return memory[index]


def _divide(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    if a.dtype.kind == 'f':
        return a / b
    quotient = abs(a.astype(np.int64)) // abs(np.asarray(b).astype(np.int64))
    return (np.sign(a) * np.sign(b) * quotient).astype(a.dtype)


def _shift(a: np.ndarray, count: np.ndarray, left: bool) -> np.ndarray:
    """Shifts by the width and more are zero, or the sign."""
    width = a.dtype.itemsize * 8
    at_most = np.minimum(count, width - 1).astype(a.dtype)
    shifted = a << at_most if left else a >> at_most
    return shifted if a.dtype.kind == 'i' else np.where(
        count >= width, 0, shifted).astype(a.dtype)


def _field(a: np.ndarray, start: np.ndarray, length: np.ndarray) -> np.ndarray:
    """A field of bits, with its sign if a has one."""
    above = a.dtype.itemsize * 8 - length
    return a << (above - start).astype(a.dtype) >> above.astype(a.dtype)


def _permute(a: np.ndarray, b: np.ndarray, selector: np.ndarray) -> np.ndarray:
    """Four of the eight bytes of two registers."""
    source = np.stack([a, b], 1).view(np.uint8)
    selector, *others = set(selector.tolist())
    if others or selector & 0x8888:
        raise NotImplementedError('prmt by registers, or that repeats signs')
    bytes_ = source[:, [selector >> 4 * i & 7 for i in range(4)]]
    return np.ascontiguousarray(bytes_).view(np.uint32)[:, 0]


# By names. Floats of 16 bits come and go as fp32.
OPERATIONS = {
    'add': np.add, 'sub': np.subtract, 'div': _divide, 'neg': np.negative,
    'abs': np.abs, 'max': np.fmax, 'min': np.fmin,
    'and': np.bitwise_and, 'or': np.bitwise_or, 'xor': np.bitwise_xor,
    'not': np.invert, 'bfe': _field, 'prmt': _permute,
    'rem': lambda a, b: a - _divide(a, b) * b,
    'ex2': np.exp2, 'sqrt': np.sqrt, 'rcp': lambda a: 1 / a,
    'rsqrt': lambda a: 1 / np.sqrt(a),
    # The product of two numbers of fp32 is exact in fp64.
    'fma': lambda a, b, c: (np.float64(a) * b + c).astype(np.float32),
}
COMPARISONS = {'eq': np.equal, 'ne': np.not_equal, 'lt': np.less,
               'le': np.less_equal, 'gt': np.greater, 'ge': np.greater_equal}


class Programs:
    """Some programs of a launch, which have taken the same branches so far."""

    def __init__(self, kernel: Kernel, ids: np.ndarray,
                 registers: dict[str, np.ndarray], memory: GlobalMemory,
                 shared: SharedMemory) -> None:
        self.kernel, self.ids = kernel, ids
        self.registers, self.memory, self.shared = registers, memory, shared
        threads = np.arange(kernel.threads)
        self.lanes = len(ids) * kernel.threads
        self.program = np.repeat(ids, kernel.threads)
        self.row = np.repeat(np.arange(len(ids)), kernel.threads)
        self.warp = np.tile(threads // WARP, len(ids))
        self.mask = np.ones(self.lanes, bool)

    def take(self, keep: np.ndarray) -> 'Programs':
        """Some of these programs."""
        lanes = np.repeat(keep, self.kernel.threads)
        registers = {k: v[lanes] for k, v in self.registers.items()}
        return Programs(self.kernel, self.ids[keep], registers, self.memory,
                        self.shared.take(keep))

    def bits(self, operand: str, kind: str) -> np.ndarray:
        """What an operand holds, (lanes, )."""
        name = operand.lstrip('%')
        if name in self.registers:
            return self.registers[name]
        if operand.startswith('%'):  # undefined: half of a pair, unused
            dtype = np.dtype(REGISTERS[re.sub(r'\d', '', name)])
            return np.full(self.lanes, 0x7fc1 % 256**dtype.itemsize, dtype)
        if operand == 'global_smem':  # shared memory starts at 0
            operand = '0'
        value = int(re.sub('^0f', '0x', operand), 0)
        if kind == 'pred':
            return np.full(self.lanes, bool(value))
        size = 4 if kind.endswith('x2') else int(kind.lstrip('bfsu')) // 8
        return np.full(self.lanes, value % 256**size, UNSIGNED[size])

    def read(self, operand: str, kind: str) -> np.ndarray:
        """The numbers of an operand."""
        return _numbers(self.bits(operand, kind), kind)

    def write(self, register: str, bits: np.ndarray) -> None:
        """Set a register, where the guard of the instruction allows it."""
        name = register.lstrip('%')
        if name == '_':  # not wanted
            return
        new = bits.astype(REGISTERS[re.sub(r'\d', '', name)])
        if not self.mask.all() and name in self.registers:
            new = np.where(self.mask, new, self.registers[name])
        self.registers[name] = new

    def run(self, position: int = 0) -> None:
        """Run these programs from an instruction to their end."""
        while True:
            step = self.kernel.instructions[position]
            guard = step.guard.lstrip('!%')
            self.mask = self.registers[guard] ^ step.guard.startswith('!') \
                if guard else np.ones(self.lanes, bool)
            name = step.parts[0]
            position += 1
            if name == 'ret':
                return
            if name == 'bra':
                taken = self.mask.reshape(-1, self.kernel.threads)
                goes = taken[:, 0]
                if (taken != goes[:, None]).any():
                    raise NotImplementedError('a branch of some threads')
                target = self.kernel.labels[step.operands[0]]
                if goes.any() and not goes.all():
                    self.take(goes).run(target)
                    self.take(~goes).run(position)
                    return
                position = target if goes.all() else position
                continue
            try:
                getattr(self, f'_{name}', self._compute)(step)
            except Fault as error:
                raise Fault(f'{error}: {step.text}') from None

    def _compute(self, step: Instruction) -> None:
        """What is done to each number by itself."""
        name, kind = step.parts[0], step.kind
        if name not in OPERATIONS:
            raise NotImplementedError(step.text)
        target, *sources = step.operands
        # Where a field begins, and its length, are numbers of 32 bits.
        kinds = [kind] + 2 * ['u32' if name == 'bfe' else kind]
        self.write(target, _bits(OPERATIONS[name](
            *map(self.read, sources, kinds)), kind))

    def _mul(self, step: Instruction) -> None:
        """mul and mad: the low, the high or both halves of a product."""
        target, a, b, *added = step.operands
        kind, part = step.kind, step.parts[1]
        a, b = self.read(a, kind), self.read(b, kind)
        if 'f' in kind:
            self.write(target, _bits(a * b, kind))
            return
        width = 8 * a.itemsize
        if part != 'lo':
            wide = f'{kind[0]}{2 * width}'
            a, b = a.astype(_dtype(wide)), b.astype(_dtype(wide))
            kind = wide if part == 'wide' else kind
        product = a * b
        if part == 'hi':
            product = (product >> product.dtype.type(width)).astype(
                _dtype(kind))
        if added:
            product = product + self.read(added[0], kind)
        self.write(target, _bits(product, kind))

    _mad = _mul

    def _shl(self, step: Instruction) -> None:
        target, a, count = step.operands
        # Bits move in whole, to the right with their sign.
        self.write(target, _bits(_shift(
            self.read(a, step.kind), self.read(count, 'u32'),
            step.parts[0] == 'shl'), step.kind))

    _shr = _shl

    def _shf(self, step: Instruction) -> None:
        """A shift of two registers as one, of which one half is left."""
        target, low, high, count = step.operands
        both = self.bits(high, 'b32').astype(np.uint64) << np.uint64(32) \
            | self.bits(low, 'b32')
        count = (self.bits(count, 'b32') & np.uint32(31)).astype(np.uint64)
        self.write(target, both << count >> np.uint64(32)
                   if step.parts[1] == 'l' else both >> count)

    def _mov(self, step: Instruction) -> None:
        """Also one register to two, or two to one."""
        target, source = step.operands
        half = f'b{int(step.kind[1:]) // 2}' if step.kind[1:].isdigit() else ''
        if target.startswith('{'):
            halves = self.bits(source, step.kind).view(_dtype(half))
            for i, register in enumerate(_names(target)):
                self.write(register, halves[i::2])
        elif source.startswith('{'):
            halves = [self.bits(name, half) for name in _names(source)]
            self.write(target, np.stack(halves, 1).view(
                _dtype(step.kind))[:, 0])
        else:
            self.write(target, self.bits(source, step.kind))

    def _setp(self, step: Instruction) -> None:
        targets, *sources = step.operands
        found = COMPARISONS[step.parts[1]](
            *(self.read(source, step.kind) for source in sources))
        for register, column in zip(targets.split('|'),
                                    np.reshape(found, (self.lanes, -1)).T):
            self.write(register, column)

    def _selp(self, step: Instruction) -> None:
        target, a, b, condition = step.operands
        self.write(target, np.where(
            self.bits(condition, 'pred'), self.bits(a, step.kind),
            self.bits(b, step.kind)))

    def _cvt(self, step: Instruction) -> None:
        target, *sources = step.operands
        to, kind = step.parts[-2:]
        # Of two the first becomes the upper half.
        numbers = [self.read(source, kind) for source in reversed(sources)]
        numbers = np.stack(numbers, 1) if len(numbers) > 1 else numbers[0]
        if 'f' not in to:
            numbers = numbers.astype(_dtype(to))
        self.write(target, _bits(numbers, to))

    def _shfl(self, step: Instruction) -> None:
        """Exchange between the threads of a warp."""
        target, source, by, *_ = step.operands
        mode, lane = step.parts[2], np.arange(WARP)
        values, by = (self.bits(operand, 'b32').reshape(-1, WARP)
                      for operand in (source, by))
        index = by if mode == 'idx' else lane ^ by
        if mode not in ('idx', 'bfly') or (index >= WARP).any():
            raise NotImplementedError(step.text)
        self.write(target, np.take_along_axis(
            values, index.astype(np.int64), 1).ravel())

    def _bar(self, step: Instruction) -> None:
        if step.parts[1] == 'sync':
            self.shared.barrier()

    def _addresses(self, operand: str, kind: str) -> np.ndarray:
        """Of an operand such as [%rd1+8]."""
        base, offset = re.fullmatch(
            r'\[\s*([%\w]+)\s*(?:\+\s*(-?\w+)\s*)?\]', operand).groups()
        bits = self.bits(base, kind)
        return bits + bits.dtype.type(int(offset or '0', 0)
                                      % 256**bits.itemsize)

    def _access(self, step: Instruction, operand: str,
                values: np.ndarray | None = None) -> np.ndarray:
        """Read or write numbers, (lanes, count)."""
        width, vector = int(step.kind[1:]) // 8, step.parts[2]
        count = int(vector[1:]) if vector.startswith('v') else 1
        lanes, is_global = self.mask, step.parts[1] == 'global'
        out = np.zeros((self.lanes, count), UNSIGNED[width])
        if lanes.any():
            addresses = self._addresses(
                operand, 'b64' if is_global else 'b32')[lanes]
            values = None if values is None else values[lanes]
            out[lanes] = self.memory.access(
                addresses, width, count, self.program[lanes], values) \
                if is_global else self.shared.access(
                    addresses, width, count, self.row[lanes],
                    self.warp[lanes], values)
        return out

    def _ld(self, step: Instruction) -> None:
        target, source = step.operands
        if step.parts[1] == 'param':
            self.write(target, self.registers[source.strip('[]')])
            return
        for register, column in zip(_names(target),
                                    self._access(step, source).T):
            self.write(register, column)

    def _st(self, step: Instruction) -> None:
        target, source = step.operands
        values = np.stack([self.bits(name, step.kind)
                           for name in _names(source)], 1)
        # The lower half of a register is stored without more.
        self._access(step, target, values.astype(_dtype(step.kind)))

    def _matrices(self, operand: str, count: int,
                  values: np.ndarray | None = None) -> np.ndarray:
        """Read or write 8x8 matrices of 16 bits in shared memory, (warps,
        count, 8, 8), of which each row is where a thread says."""
        def first(of_lanes: np.ndarray) -> np.ndarray:
            return of_lanes.reshape(-1, WARP)[:, :8 * count].ravel()

        return self.shared.access(
            first(self._addresses(operand, 'b32')), 2, 8, first(self.row),
            first(self.warp), None if values is None else values.reshape(
                -1, 8)).reshape(-1, count, 8, 8)

    def _ldmatrix(self, step: Instruction) -> None:
        target, source = step.operands
        registers = _names(target)
        matrices = self._matrices(source, len(registers))
        if 'trans' in step.parts:
            matrices = matrices.swapaxes(2, 3)
        for i, register in enumerate(registers):
            # A thread has two neighbours in a row.
            self.write(register, np.ascontiguousarray(matrices[:, i]).view(
                np.uint32).ravel())

    def _stmatrix(self, step: Instruction) -> None:
        target, source = step.operands
        pairs = np.stack([self.bits(name, 'b32').reshape(-1, WARP)
                          for name in _names(source)], 1)
        matrices = pairs.view(np.uint16).reshape(len(pairs), -1, 8, 8)
        if 'trans' in step.parts:
            matrices = matrices.swapaxes(2, 3)
        self._matrices(target, matrices.shape[1],
                       np.ascontiguousarray(matrices))

    def _mma(self, step: Instruction) -> None:
        """A product of matrices: (16, k) by (k, 8), added to (16, 8).

        Registers hold 8x8 blocks as ldmatrix leaves them, b's transposed, and
        those of fp32 a number each.
        """
        shape, kinds = step.parts[3], step.parts[6:]
        if kinds[0] != 'f32' or kinds[3] != 'f32' or kinds[1] != kinds[2]:
            raise NotImplementedError(step.text)
        depth = int(shape.removeprefix('m16n8k')) // 8
        target, a, b, c = map(_names, step.operands)

        def blocks(names: list[str]) -> list[np.ndarray]:
            return [self.read(name, f'{kinds[1]}x2').reshape(-1, 8, 8)
                    for name in names]

        a, b = blocks(a), blocks(b)
        # Numbers 0 and 1 of c are neighbours in the upper half.
        c = [np.stack([self.read(name, 'f32') for name in c[2 * i:2 * i + 2]],
                      1).reshape(-1, 8, 8) for i in range(2)]
        for half in range(2):
            out = c[half].astype(np.float64)
            for i in range(depth):
                out = out + np.float64(a[2 * i + half]) @ np.float64(
                    b[i].swapaxes(1, 2))
            pairs = out.astype(np.float32).reshape(-1, 2)
            for i in range(2):
                self.write(target[2 * half + i], _bits(pairs[:, i], 'f32'))


def _names(operand: str) -> list[str]:
    """Registers or numbers of an operand such as {%r1, %r2}."""
    return re.findall(r'[%\w]+', operand)


def run(ptx: str, shared: int, count: int, arguments: Sequence[Any]) -> None:
    """Run a kernel on tensors of the CPU.

    Args:
        ptx (str): As the compiler has written it.
        shared (int): Bytes of shared memory.
        count (int): Number of programs.
        arguments (Sequence[Tensor | int | float]): In the order of the
            parameters, of which Triton has some more at the end.

    Raises:
        Fault: If the kernel does what it must not.
        NotImplementedError: If it has instructions that are not known here.
    """
    kernel = parse(ptx)
    memory = GlobalMemory([a for a in arguments if isinstance(a, Tensor)])
    values = dict.fromkeys(kernel.parameters, np.uint64(0))
    for name, argument in zip(kernel.parameters, arguments):
        if isinstance(argument, Tensor):
            argument = argument.data_ptr()
        values[name] = np.float32(argument).view(np.uint32) if isinstance(
            argument, float) else np.uint64(argument % 2**64)
    at_a_time = max(LANES // kernel.threads, 1)
    for first in range(0, count, at_a_time):
        ids = np.arange(first, min(first + at_a_time, count))
        lanes = len(ids) * kernel.threads
        registers = {name: np.full(lanes, value)
                     for name, value in values.items()}
        for name, numbers in (
                ('tid.x', np.tile(np.arange(kernel.threads), len(ids))),
                ('ctaid.x', np.repeat(ids, kernel.threads)),
                ('nctaid.x', np.full(lanes, count))):
            registers[name] = numbers.astype(np.uint32)
        Programs(kernel, ids, registers, memory,
                 SharedMemory(len(ids), shared)).run()


def execute(kernel: Any, programs: int, *arguments: Any,
            **constants: Any) -> None:
    """``kernel[(programs, )](*arguments, **constants)``.

    Args:
        kernel (triton.JITFunction): Compiled for the driver that Triton finds,
            which may be a stub.
        programs (int): Their number.
        arguments (Tensor | int | float | None): Tensors are of the CPU.
        constants (int): The constants, and options of the compiler.
    """
    compiled = kernel.warmup(*arguments, grid=(programs, ), **constants)
    given = dict(zip(kernel.arg_names, arguments))
    run(compiled.asm['ptx'], compiled.metadata.shared, programs,
        [given[name] for name, kind in compiled.src.signature.items()
         if kind != 'constexpr'])
