"""Which path runs, by which kernels and in which precision.

There are three sets of kernels with the same names: on GPUs Triton's,
:mod:`mmconv2former.triton_kernels`, on CPUs those in C++,
:mod:`mmconv2former.cpp_kernels`, and those of torch's operators,
:mod:`mmconv2former.torch_kernels`, where the others cannot run.
"""
import os
import threading
from collections.abc import Callable
from contextlib import AbstractContextManager
from functools import cache, partial
from types import ModuleType, SimpleNamespace
from typing import Any

import torch
from mmengine.logging import print_log
from torch import Tensor, nn
from torch.nn.modules import module as torch_module

from . import cpp_kernels, fake_kernels, torch_kernels

# (channels, device) of a block's input -> its first module that was changed or
# has hooks, or None.
FindModified = Callable[[int, torch.device], nn.Module | None]
# The environment variable that turns the fused path off everywhere.
FUSED_VARIABLE = 'MMCONV2FORMER_FUSED'
# What layers of a class do as long as nobody gives it another forward.
_FORWARDS: dict[type, Callable] = {}


def remember_forward(*kinds: type) -> None:
    """Have :func:`is_plain` see when these classes get another ``forward``.

    Args:
        kinds (type): Classes of layers.
    """
    _FORWARDS.update((kind, kind.forward) for kind in kinds)


remember_forward(nn.Sequential, nn.Conv2d, nn.GELU, nn.BatchNorm2d)


def is_intercepted(module: nn.Module) -> bool:
    """Whether the module has hooks or a replaced ``forward``.

    The fused path reads weights without calling modules and would skip both.
    mmengine replaces ``forward`` to turn on activation checkpointing, and
    accelerate to offload weights.
    """
    return bool(module._forward_hooks or module._forward_pre_hooks
                or module._backward_hooks or module._backward_pre_hooks
                or 'forward' in module.__dict__)


def has_global_hooks() -> bool:
    """Whether hooks are registered for all modules."""
    # For which torch 2.7 has no function.
    return bool(torch_module._global_forward_hooks
                or torch_module._global_forward_pre_hooks
                or torch_module._global_backward_hooks
                or torch_module._global_backward_pre_hooks)


def is_plain(module: nn.Module, kind: type) -> bool:
    """Whether a module is of that very class and a call does what the class
    was written to do."""
    return (type(module) is kind and not is_intercepted(module)
            and (torch.compiler.is_compiling()
                 or kind.forward is _FORWARDS[kind]))


def is_readable(parameter: Tensor | None, device: torch.device) -> bool:
    """Whether kernels for a device can read a parameter from memory.

    Tensors of other classes, such as quantized ones, have their numbers
    elsewhere.
    """
    return (type(parameter) in (nn.Parameter, Tensor)
            and parameter.device == device)


def is_layer(layer: nn.Module, kind: type, device: torch.device,
             *shape: int) -> bool:
    """Whether a layer is one that the fused path can stand in for.

    The kernels read its parameters, and do not look how long these are.

    Args:
        layer (nn.Module): The layer.
        kind (type): What it must be; a ``nn.Conv2d`` is a depthwise one that
            keeps the size.
        device (torch.device): Of its parameters.
        shape (int): Of the weight; there is to be a bias, too.

    Returns:
        bool: Whether it is.
    """
    if not is_plain(layer, kind):
        return False
    weight, bias = map(layer._parameters.get, ('weight', 'bias'))
    if not is_readable(weight, device) or not is_readable(bias, device) \
            or weight.shape != shape or bias.shape != shape[:1]:
        return False
    return kind is not nn.Conv2d or (
        layer.groups == shape[0] and layer.stride == layer.dilation == (1, 1)
        and layer.padding == (shape[2] // 2, shape[2] // 2)
        and layer.padding_mode == 'zeros')


def is_gelu(layer: nn.Module) -> bool:
    """Whether a layer is GELU, that of erf."""
    return is_plain(layer, nn.GELU) and layer.approximate == 'none'


def has_usual_moments(norm: nn.BatchNorm2d) -> bool:
    """Whether a batch norm has weight, bias, running moments and a fixed
    momentum, which its replacements read and update."""
    return (norm.weight is not None and norm.bias is not None
            and norm.running_mean is not None
            and norm.num_batches_tracked is not None
            and norm.track_running_stats and norm.momentum is not None)


@cache
def log_once(text: str) -> None:
    """Log how the backbone runs, once.

    Args:
        text (str): A line.
    """
    print_log(f'Conv2Former: {text}', logger='current')


@cache
def _is_emulated(dtype: torch.dtype) -> bool:
    """Whether this CPU has no instructions for that type, so that oneDNN
    converts to fp32 and back."""
    if not torch.backends.cpu.get_cpu_capability().startswith('AVX'):
        return False  # not known of others
    if dtype == torch.bfloat16:
        return not (torch.cpu._is_avx512_bf16_supported()
                    or torch.cpu._is_amx_tile_supported())
    return dtype == torch.float16 \
        and not torch.ops.mkldnn._is_mkldnn_fp16_supported()


def is_capturing(x: Tensor) -> bool:
    """Whether operations on that tensor are captured into a CUDA graph."""
    return x.is_cuda and torch.cuda.is_current_stream_capturing()


def is_autocast(x: Tensor) -> bool:
    """Whether autocast is on for the device of a tensor."""
    device = x.device.type
    return device != 'meta' and torch.is_autocast_enabled(device)


def autocast_dtype(x: Tensor) -> torch.dtype:
    """Precision that autocast asks for; that of x without it and for fp64."""
    if is_autocast(x) and x.dtype != torch.double:
        return torch.get_autocast_dtype(x.device.type)
    return x.dtype


def product_dtype(x: Tensor) -> torch.dtype:
    """Precision of matrix products and convolutions."""
    dtype = autocast_dtype(x)
    if x.device.type == 'cpu' and not torch.compiler.is_compiling() \
            and _is_emulated(dtype):
        # In bf16 a product would take three times as long, and a large
        # depthwise convolution up to 28 times.
        log_once(f'blocks compute in fp32, for this CPU emulates {dtype}')
        return torch.float32
    return dtype


class _WithoutAutocast:
    """Autocast off, and the device of a tensor the current one.

    In a microsecond or two where the contexts of torch take seven.
    """

    def __init__(self, x: Tensor) -> None:
        self.device = x.device

    def __enter__(self) -> None:
        kind = self.device.type
        self.autocast = torch.is_autocast_enabled(kind)
        torch.set_autocast_enabled(kind, False)
        self.other = None
        if kind == 'cuda' and torch.cuda.current_device() != self.device.index:
            # set_device, to go back to a GPU that is not in use, would take
            # memory there.
            self.other = torch.cuda.device(self.device)
            self.other.__enter__()

    def __exit__(self, *_: Any) -> None:
        torch.set_autocast_enabled(self.device.type, self.autocast)
        if self.other is not None:
            self.other.__exit__(None, None, None)


def without_autocast(x: Tensor) -> AbstractContextManager:
    """Context for kernels, whose operands have the types that they shall."""
    if torch.compiler.is_compiling():
        return torch.autocast(x.device.type, enabled=False)
    return _WithoutAutocast(x)


# Filled by _make_triton_operators when first needed: an operator of torch for
# each Triton kernel, by its name, and as ``functions`` the module of the plain
# functions. A global, because torch.compile has to know where it comes from.
TRITON = SimpleNamespace()
_REGISTERING = threading.Lock()


@cache
def _make_triton_operators() -> str:
    """Fill ``TRITON``, or say why that cannot be.

    With operators of torch, which torch.compile takes as they are. Not by
    ``custom_op``, which takes 20 microseconds a call where this takes 3.
    """
    try:
        from . import triton_kernels
    except ImportError as error:
        return f'Triton cannot be imported ({error})'
    with _REGISTERING:  # torch refuses a second definition, of another thread
        if not hasattr(TRITON, 'functions'):
            _register(triton_kernels)
            TRITON.functions = triton_kernels
    return ''


def _own_memory(out: Tensor) -> Tensor:
    """A copy of a part of a vector; whole tensors as they are."""
    return out if out.untyped_storage().nbytes() == out.nbytes \
        else out.clone()


def _as_operator(function: Callable) -> Callable:
    """A function of the kernels as torch wants it.

    Outputs of an operator may not share memory, and torch's compiler takes
    them to begin at multiples of 16 bytes.
    """

    def call(first: Tensor | list[Tensor], *others: Any) -> Any:
        x = first if isinstance(first, Tensor) else first[0]
        with torch.cuda.device_of(x):
            outs = function(first, *others)
        return outs if isinstance(outs, Tensor) \
            else tuple(map(_own_memory, outs))

    return call


def _register(triton_kernels: ModuleType) -> None:
    # triton_kernels.operands cannot become an operator of torch: it takes and
    # returns lists of lists, and may return a tensor that it was given.
    TRITON.operands = partial(torch_kernels.join_operands,
                              filters=triton_kernels.filters)
    TRITON.deferred_sums = torch_kernels.deferred_sums
    for name, fake in fake_kernels.KERNELS.items():
        function = getattr(triton_kernels, name)
        operator = f'mmconv2former::{name}'
        torch.library.define(
            operator, torch.library.infer_schema(function, mutates_args=()),
            tags=torch.Tag.pt2_compliant_tag)
        torch.library.impl(operator, 'cuda', _as_operator(function))
        torch.library.register_fake(operator, fake)
        setattr(TRITON, name, getattr(torch.ops.mmconv2former, name).default)


@cache
def _try_triton(device: torch.device) -> str:
    if torch.version.hip or torch.cuda.get_device_capability(device) < (8, 0):
        return 'the Triton kernels want an NVIDIA GPU of the Ampere ' \
            'generation or later'
    if obstacle := _make_triton_operators():
        return obstacle
    x = torch.zeros(1, 1, 1, 8, device=device)
    # Triton compiles a launcher, for which it needs a C compiler, and for this
    # GPU. Its own errors, those of the system and of CUDA have no common base.
    try:
        TRITON.scale_residual(x, x, x[0, 0, 0], None)
    except torch.OutOfMemoryError:
        raise  # which may pass
    except Exception as error:
        return (f'Triton cannot compile here ({type(error).__name__}: '
                f'{error})')
    return ''


@cache
def _cpp_obstacle() -> str:
    """Why the C++ kernels cannot run on this CPU, or ''."""
    try:
        cpp_kernels.library.load()
    except cpp_kernels.library.CompilerError as error:
        return f'the C++ kernels {error}'
    return ''


# torch.compile runs the next two functions while it traces, and takes their
# results for constants. By itself it would trace into functools.cache, and it
# takes torch.compiler.is_exporting() for True.


@torch.compiler.assume_constant_result
def triton_obstacle(device: torch.device) -> str:
    """Why Triton's kernels cannot run on that GPU, or ''."""
    return _try_triton(device)


@torch.compiler.assume_constant_result
def _is_exporting() -> bool:
    return torch.compiler.is_exporting()


def has_dispatch_mode() -> bool:
    """Whether a TorchDispatchMode is given each operation of torch."""
    return (not torch.compiler.is_compiling()
            and torch._C._len_torch_dispatch_stack() > 0)


def kernels_for(x: Tensor) -> ModuleType | SimpleNamespace:
    """The kernels that take such a tensor.

    Args:
        x (Tensor): On its device and of its type.

    Returns:
        module: :mod:`mmconv2former.torch_kernels`,
        :mod:`mmconv2former.cpp_kernels`,
        :mod:`mmconv2former.triton_kernels` or, where torch's dispatcher has
        to see the calls, ``TRITON`` with operators of the same names.
    """
    if x.dtype == torch.double:  # the others compute in fp32
        return torch_kernels
    # No subclass of Tensor (FakeTensor, DTensor), and no TorchDispatchMode.
    is_ordinary = type(x) is Tensor and not has_dispatch_mode()
    if not x.is_cuda:
        if not is_ordinary or torch.compiler.is_compiling() \
                or x.device.type != 'cpu' or _cpp_obstacle():
            return torch_kernels
        return cpp_kernels
    if triton_obstacle(x.device):
        return torch_kernels
    if torch.compiler.is_compiling() or not is_ordinary:
        return TRITON
    return TRITON.functions  # the same without torch's dispatcher


def is_transformed() -> bool:
    """Whether operations stand for others: vmap, jvp, dual tensors, ...

    Operators that autograd does not see would drop the tangents.
    """
    return (torch._C._functorch.peek_interpreter_stack() is not None
            or torch.autograd.forward_ad._current_level >= 0)


def channels_last(x: Tensor) -> Tensor:
    """(N, C, H, W) in channels-last memory, where that can be asked for."""
    if is_transformed() and not torch.compiler.is_compiling():
        return x  # vmap refuses it
    return x.contiguous(memory_format=torch.channels_last)


def find_obstacle(x: Tensor, find_modified: FindModified | None = None) -> str:
    """Why the plain path must run, or ''.

    Args:
        x (Tensor): The input.
        find_modified (FindModified, optional): Given the channels and the
            device of x, the first module of the block that was changed or has
            hooks, or None. Defaults to None, which does not look.

    Returns:
        str: The reason.

    Raises:
        ValueError: If the environment variable is neither 0 nor 1.
    """
    switch = os.environ.get(FUSED_VARIABLE, '1')
    if switch == '0':
        return f'{FUSED_VARIABLE}=0'
    if switch not in ('', '1'):
        raise ValueError(f'{FUSED_VARIABLE} must be 0 or 1, got {switch!r}')
    if _is_exporting() or torch.jit.is_tracing():
        return 'the model is being exported'
    if not torch.compiler.is_compiling() and is_transformed():
        return 'torch.func or forward-mode differentiation transforms it'
    if not torch.compiler.is_compiling() and has_global_hooks():
        return 'hooks are registered for all modules'
    if not x.numel():
        return 'the batch is empty'
    if x.device.type not in ('cpu', 'cuda'):
        return f'device {x.device.type} has no fused operators'
    # Compiled, it would bound sizes that are to be dynamic.
    if not torch.compiler.is_compiling() \
            and x.numel() // x.shape[1] >= 2**31:
        return 'the kernels count the positions of a batch in 32 bits'
    if find_modified is not None:
        modified = find_modified(x.shape[1], x.device)
        if modified is not None:
            return (f'the {type(modified).__name__} of a block was replaced '
                    'or changed, or has hooks')
    if torch.compiler.is_compiling() \
            and kernels_for(x) is torch_kernels:
        return 'the model is being compiled, which fuses them as well'
    return ''


def available(x: Tensor, find_modified: FindModified) -> bool:
    """Whether the fused operators can take these layers; logged once.

    Args:
        x (Tensor): Input of the block, (N, C, H, W).
        find_modified (FindModified): As for :func:`find_obstacle`, such as
            :meth:`mmconv2former.backbone.Block.modified`.

    Returns:
        bool: Whether they can.

    Raises:
        ValueError: If the environment variable is neither 0 nor 1.
    """
    obstacle = find_obstacle(x, find_modified)
    if not obstacle and has_dispatch_mode() \
            and kernels_for(x) is torch_kernels:
        # That of selective checkpointing may keep a tensor which these
        # kernels then overwrite.
        obstacle = 'a TorchDispatchMode looks on'
    if not torch.compiler.is_compiling():
        if obstacle:
            log_once(f'plain operators, because {obstacle}')
        elif kernels_for(x) is not torch_kernels:
            log_once(
                'fused operators with Triton kernels; the first steps are '
                'slow where Triton has to compile them' if x.is_cuda else
                'fused operators with C++ kernels' +
                (', and of torch for what is in fp16'
                 if autocast_dtype(x) == torch.float16 else ''))
        else:
            missing = triton_obstacle(x.device) if x.is_cuda \
                else _cpp_obstacle()
            reason = 'the model is in fp64' if x.dtype == torch.double \
                else missing or f'they get a {type(x).__name__}'
            log_once(f'fused operators of torch alone, because {reason}')
    return not obstacle


def refuse_second_derivatives(grad: Tensor) -> None:
    """To be called in the backward pass of the fused functions.

    Args:
        grad (Tensor): What it is given.

    Raises:
        RuntimeError: If there is to be a graph of the backward pass, or it is
            one of several at a time.
    """
    if torch.is_grad_enabled() or not torch.compiler.is_compiling() and (
            is_transformed()
            or torch._C._functorch.is_legacy_batchedtensor(grad)):
        raise RuntimeError(
            'the fused operators of Conv2Former have no second derivatives, '
            'and no batches of gradients; build the backbone with fused=False '
            f'or set {FUSED_VARIABLE}=0 for these')
