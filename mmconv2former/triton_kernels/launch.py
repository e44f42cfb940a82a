"""Launches of Triton kernels that cost the CPU less than Triton's own."""
from collections.abc import Hashable
from functools import lru_cache
from typing import Any

import triton
from torch import Tensor
from torch.torch_version import TorchVersion
from triton.compiler import CompiledKernel
from triton.runtime import driver

if TorchVersion(triton.__version__) < (3, 3):
    raise ImportError(f'found Triton {triton.__version__}; expected 3.3 or '
                      'later (tuples in kernels), which torch 2.7 brings')

# Keeps what a function finds for each combination of shapes. Training with
# many sizes of images has some thousands.
plan = lru_cache(maxsize=4096)

# What Triton has compiled for each kernel with its constants, by the device
# and the types of aligned tensors. Shared, for images of many sizes.
COMPILED: dict[tuple[Hashable, ...], dict[tuple[Hashable, ...], Any]] = {}
# Triton's launch metadata, and the hooks on entering and leaving a launch.
NO_HOOKS = None, None, None


class Launch:
    """A kernel with all of its arguments but the tensors.

    ``kernel[grid](...)`` looks at every argument, anew in each call, to choose
    among what is compiled: at types, values, and alignment of pointers. That
    takes ten microseconds. Here only types and alignment of the tensors are
    looked at. ``compiled[grid](...)``, Triton's call of a compiled kernel,
    spends half of its time on a description for launch hooks, which the
    profilers of torch and Nsight do not need; its last step is called instead.

    Args:
        kernel (JITFunction): Takes pointers, scalars and constants, in this
            order.
        programs (int): Number of programs, the grid.
        scalars (int | float): The scalars.
        constants (int): The constants, and options of the compiler.
    """

    def __init__(self, kernel: Any, programs: int, *scalars: float,
                 **constants: int) -> None:
        self.kernel, self.grid = kernel, (programs, 1, 1)
        self.scalars = scalars
        # Products and sums in one instruction: Triton 3.9 warns that this
        # will not be its default.
        self.constants = dict(constants, enable_fp_fusion=True)
        names = [name for name in kernel.arg_names if name in constants]
        self.tail = (*scalars, *(constants[name] for name in names))
        # Triton passes integers in 32 bits where they fit.
        variant = (kernel.__name__, *(isinstance(x, int) and x >> 31
                                      for x in scalars), *constants.items())
        self.compiled = COMPILED.setdefault(variant, {})

    def __call__(self, *tensors: Tensor | None) -> None:
        """Launch; tensors after the first may be None where the kernel allows
        it."""
        # All are on one device, the current one.
        device = tensors[0].get_device()
        key, pointers, bits = [device], [], 0
        for tensor in tensors:
            if tensor is None:
                key.append(None)
                pointers.append(None)
            else:
                key.append(tensor.dtype)
                pointers.append(pointer := tensor.data_ptr())
                bits |= pointer
        key = tuple(key)
        # What is compiled for pointers to multiples of 16 bytes reads so many
        # at a time.
        is_aligned = bits % 16 == 0
        compiled = self.compiled.get(key) if is_aligned else None
        if compiled is not None:
            compiled.run(
                *self.grid, driver.active.get_current_stream(device),
                compiled.function, compiled.packed_metadata, *NO_HOOKS,
                *pointers, *self.tail)
            return
        compiled = self.kernel[self.grid](*tensors, *self.scalars,
                                          **self.constants)
        if is_aligned and isinstance(compiled, CompiledKernel):
            self.compiled[key] = compiled
