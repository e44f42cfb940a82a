"""The residual branches of a block with hand-written gradients.

Both branches have one form,

    x + keep * scale * linear(middle(linear(layer_norm(x)))),

where the middle is ``gate`` for convolutional modulation, [z|v] ->
DW_k(GELU(z)) * v, and ``position`` for the MLP, z -> h + GELU(DW_3(h)) with
h = GELU(z). On the plain path, in :mod:`mmconv2former.backbone`, autograd
stores what each operator read, some 27 tensors of the size of x in a block.
Here 9 are stored, the inputs of the branches and of their middles and the
output of the large depthwise convolution. All else is computed once more in
the backward pass, where it is cheap beside the matrix products.

Tensors are (N, H, W, C). What is not a matrix product is done by one of two
sets of kernels with the same names: torch's, in this file, or those of
:mod:`mmconv2former.triton_kernels` on GPUs.
"""
import os
import platform
import sys
from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager
from functools import cache
from itertools import chain, repeat
from pathlib import Path
from subprocess import SubprocessError
from types import ModuleType, SimpleNamespace
from typing import Any

import torch
import torch.nn.functional as F
from mmengine.logging import print_log
from torch import Tensor, nn

from .operators import LayerNorm2d, Pointwise

# Bytes that tensors of some samples at a time may have; of one, any number.
PART = 2**22

aten = torch.ops.aten

# Whether torch has products of 16 bits with results in fp32.
_MM_IN_FP32 = 'dtype' in aten.mm.overloads()


def has_hooks(module: nn.Module) -> bool:
    """Whether a call of that module calls others, too."""
    return bool(module._forward_hooks or module._forward_pre_hooks
                or module._backward_hooks or module._backward_pre_hooks)


def is_own(layer: nn.Module) -> bool:
    """Whether a layer of a block is as the block has made it, without hooks.

    Then the operators can stand in for it with its parameters.
    """
    if has_hooks(layer):
        return False
    kind = type(layer)
    if kind is nn.GELU:
        return layer.approximate == 'none'
    if kind not in (LayerNorm2d, Pointwise, nn.Conv2d) \
            or layer.weight is None or layer.bias is None:
        return False
    if kind is not nn.Conv2d:
        return True
    c, i, k, width = layer.weight.shape
    return (i == 1 and k == width and layer.groups == c
            and layer.stride == layer.dilation == (1, 1)
            and layer.padding == (k // 2, k // 2)
            and layer.padding_mode == 'zeros')


def _nchw(x: Tensor) -> Tensor:
    return x.permute(0, 3, 1, 2)


def _nhwc(x: Tensor) -> Tensor:
    return x.permute(0, 2, 3, 1)


def _wide(x: Tensor) -> Tensor:
    """At least fp32, in which gradients of parameters are handed on."""
    return x.float() if x.dtype.itemsize < 4 else x


@cache
def report(text: str) -> None:
    """Log how the backbone runs, once.

    Args:
        text (str): A line.
    """
    print_log(f'Conv2Former: {text}', logger='current')


@cache
def _is_emulated(dtype: torch.dtype) -> bool:
    """Whether this CPU computes in that type by other ones."""
    if not torch.backends.cpu.get_cpu_capability().startswith('AVX'):
        return False  # not known of others
    if dtype == torch.bfloat16:
        return not (torch.cpu._is_avx512_bf16_supported()
                    or torch.cpu._is_amx_tile_supported())
    return dtype == torch.float16 \
        and not torch.ops.mkldnn._is_mkldnn_fp16_supported()


def is_recorded(x: Tensor) -> bool:
    """Whether what is done with that tensor goes into a CUDA graph."""
    return x.is_cuda and torch.cuda.is_current_stream_capturing()


def _asked_dtype(x: Tensor) -> torch.dtype:
    """Of what autocast computes, or of x without autocast.

    It leaves fp64 alone.
    """
    device = x.device.type
    if torch.is_autocast_enabled(device) and x.dtype != torch.double:
        return torch.get_autocast_dtype(device)
    return x.dtype


def product_dtype(x: Tensor) -> torch.dtype:
    """Of matrix products and convolutions."""
    dtype = _asked_dtype(x)
    if x.device.type == 'cpu' and not torch.compiler.is_compiling() \
            and _is_emulated(dtype):
        # In bf16 a product would take three times as long, and a large
        # depthwise convolution up to 28 times.
        report(f'blocks compute in fp32, for this CPU emulates {dtype}')
        return torch.float32
    return dtype


class _Alone:
    """Without autocast, and on the device of a tensor.

    In a microsecond or two where the contexts of torch take seven.
    """

    def __init__(self, x: Tensor) -> None:
        self.device = x.device

    def __enter__(self) -> None:
        kind = self.device.type
        self.autocast = torch.is_autocast_enabled(kind)
        torch.set_autocast_enabled(kind, False)
        self.previous = None
        if kind == 'cuda' and torch.cuda.current_device() != self.device.index:
            self.previous = torch.cuda.current_device()
            torch.cuda.set_device(self.device)

    def __exit__(self, *_: Any) -> None:
        torch.set_autocast_enabled(self.device.type, self.autocast)
        if self.previous is not None:
            torch.cuda.set_device(self.previous)


def _alone(x: Tensor) -> AbstractContextManager:
    """How the kernels are called: the types of their operands are chosen."""
    if torch.compiler.is_compiling():
        return torch.autocast(x.device.type, enabled=False)
    return _Alone(x)


def _has_onednn(device: torch.device) -> bool:
    return (device.type == 'cpu' and not torch.compiler.is_compiling()
            and torch.backends.mkldnn.is_available())


def _onednn_fp32(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether to ask oneDNN for products; in bf16 torch does by itself."""
    return dtype == torch.float32 and _has_onednn(device)


@cache
def _mkl_is_at_home() -> bool:
    """Whether torch's own fp32 products, by MKL, are fast on this CPU.

    On those of Intel they are as fast as oneDNN's, and take transposed factors
    as they are. On those of AMD they take twice as long.
    """
    try:
        cpu = Path('/proc/cpuinfo').read_text()
    except OSError:  # not Linux
        cpu = platform.processor()
    return torch.backends.mkl.is_available() and 'GenuineIntel' in cpu


def _onednn_bf16(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether oneDNN takes bf16, which it does with the right instructions."""
    return (dtype == torch.bfloat16 and _has_onednn(device)
            and torch.ops.mkldnn._is_mkldnn_bf16_supported())


def _onednn_linear(x: Tensor, weight: Tensor, bias: Tensor | None,
                   activation: str = 'none') -> Tensor:
    """There is no public name for this, which torch's compiler uses."""
    return torch.ops.mkldnn._linear_pointwise(x, weight, bias, activation, [],
                                              'none')


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """Linear layer: (..., I), (O, I), (O, ) -> (..., O), without gradients."""
    if _onednn_fp32(x.device, x.dtype):
        return _onednn_linear(x, weight, bias)
    return F.linear(x, weight, bias)


def _product(x: Tensor, weight: Tensor) -> Tensor:
    """(N, H, W, O), (O, I) -> (N, H, W, I), what of a gradient passes."""
    if x.is_cuda:  # fewer calls
        return torch.mm(x.flatten(0, 2), weight).view(*x.shape[:3], -1)
    return linear(x, weight.t())


def _join(groups: Iterable[Sequence[Tensor]],
          dtype: torch.dtype) -> list[Tensor]:
    """Each group of parameters as one tensor of that type, (O, ...)."""
    joined, sources, targets = [], [], []
    for group in groups:
        out = group[0]
        if len(group) > 1:
            sizes = [p.shape[0] for p in group]
            out = out.new_empty((sum(sizes), *out.shape[1:]), dtype=dtype)
            sources += group
            targets += out.split_with_sizes(sizes)
        elif out.dtype != dtype:
            sources.append(out)
            out = torch.empty_like(out, dtype=dtype)
            targets.append(out)
        joined.append(out)
    if targets:
        torch._foreach_copy_(targets, sources)
    return joined


def _bias_grad(grad: Tensor) -> Tensor:
    if grad.is_cuda:
        return grad.sum((0, 1, 2),
                        dtype=torch.promote_types(grad.dtype, torch.float32))
    # Sums in fp32 by itself; asked for an fp32 result it is five times slower.
    return _wide(grad.sum((0, 1, 2)))


def _linear_backward(
        grad: Tensor, x: Tensor,
        grad_bias: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """(N, H, W, O), (N, H, W, I) -> (O, I), (O, ), the latter in fp32.

    Kernels that read ``grad`` anyway may have summed it up to ``grad_bias``.
    """
    rows, columns = grad.flatten(0, 2).t(), x.flatten(0, 2).t()
    o, i = len(rows), len(columns)
    if _onednn_bf16(x.device, x.dtype) and rows.shape[1] > 2048:
        # As a convolution, which sums over many positions a third faster.
        _, grad_weight, grad_bias = aten.convolution_backward(
            _nchw(grad), _nchw(x), x.new_empty(o, i, 1, 1), (o, ), (1, 1),
            (0, 0), (1, 1), False, (0, 0), 1, (False, True, True))
        return grad_weight.view(o, i), _wide(grad_bias)
    if grad_bias is None:
        grad_bias = _bias_grad(grad)
    if x.is_cuda and x.dtype.itemsize == 2 and _MM_IN_FP32 \
            and not torch.compiler.is_compiling():
        return aten.mm.dtype(rows, columns.t(), torch.float32), grad_bias
    if not _onednn_fp32(x.device, x.dtype) or _mkl_is_at_home():
        return torch.mm(rows, columns.t()), grad_bias
    # oneDNN wants the first of the two transposed, which had better be the
    # smaller where there is more to copy than to transpose afterwards.
    if i < min(rows.shape):
        grad_weight = linear(_transposed(x), rows).t().contiguous()
    else:
        grad_weight = linear(_transposed(grad), columns)
    return grad_weight, grad_bias


def _transposed(x: Tensor) -> Tensor:
    """(N, H, W, C) -> (C, NHW), copied by all threads, a matrix by one."""
    return x.permute(3, 0, 1, 2).flatten(1)


def _depthwise(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """(N, H, W, C) -> (N, H, W, C)."""
    k = weight.shape[-1]
    image = _nchw(x)
    if _onednn_fp32(x.device, x.dtype) and 9 <= k <= 13 \
            and min(image.shape[2:]) > k // 2:
        # Nearly twice as fast in oneDNN, which pays for the copy.
        image = image.contiguous()
    return _nhwc(
        F.conv2d(image, weight, bias, padding=k // 2,
                 groups=len(weight))).contiguous()


def depthwise_grad_weight(grad: Tensor, x: Tensor,
                          kernel_size: int) -> Tensor:
    """Weight gradient of a depthwise convolution, as another convolution.

    dW[c, i, j] = sum over n, h, w of x[n, h + i - p, w + j - p, c] *
    grad[n, h, w, c] is itself a depthwise convolution: of the image with its
    gradient as the kernel, each sample a group. oneDNN is fast at forward
    convolutions of any kernel, and at weight gradients only of those up to
    3x3 that fit into the image.

    Args:
        grad (Tensor): Gradient of the output of the convolution,
            (N, H, W, C).
        x (Tensor): Its input, (N, H, W, C).
        kernel_size (int): Size of the kernel k, odd; the padding is k // 2.

    Returns:
        Tensor: (C, 1, k, k), in fp32 where the input has less.
    """
    n, h, w, c = x.shape
    padding = kernel_size // 2
    x, grad = _nchw(x), _nchw(grad)
    if x.dtype != torch.bfloat16 or h * w < 1024:
        # Rounds once instead of once for each sample. Large maps are twice
        # as fast in bf16, and have no few numbers that could cancel out.
        x, grad = _wide(x), _wide(grad)
    # oneDNN's contiguous kernels are the faster ones, but end at 13 and where
    # the padding exceeds the image; its channels-last ones take anything.
    if kernel_size <= 13 and min(h, w) > padding:
        image, kernel = x.reshape(1, n * c, h, w), grad.reshape(
            n * c, 1, h, w)
    else:
        image, kernel = (
            t.permute(2, 3, 0, 1).reshape(1, h, w, n * c).permute(0, 3, 1, 2)
            for t in (x, grad))
        kernel = kernel.transpose(0, 1)
    out = F.conv2d(image, kernel, padding=padding, groups=n * c)
    return _wide(out).view(n, c, 1, kernel_size, kernel_size).sum(0)


def _depthwise_backward(grad: Tensor, x: Tensor,
                        weight: Tensor) -> tuple[Tensor, ...]:
    """Gradients of input, weight and bias, the latter two at least in fp32."""
    c, k = len(weight), weight.shape[-1]
    as_convolution = x.device.type == 'cpu' and (
        k > 3 or k > min(x.shape[1:3]))
    grad_x, grad_weight, grad_bias = aten.convolution_backward(
        _nchw(grad), _nchw(x), weight, (c, ), (1, 1), (k // 2, k // 2),
        (1, 1), False, (0, 0), c, (True, ) + 2 * (not as_convolution, ))
    if as_convolution:
        grad_weight = depthwise_grad_weight(grad, x, k)
        grad_bias = _bias_grad(grad)
    return _nhwc(grad_x), _wide(grad_weight), _wide(grad_bias)


def _parts(sample: int, size: int, *tensors: Tensor | None
           ) -> list[tuple[Tensor | None, ...]]:
    """Tensors of the same samples, on CPUs some samples at a time.

    So few that the largest temporary tensor is small: the C library gives
    large ones back to the system when they are freed, and gets the memory of
    the next ones page by page.

    Args:
        sample (int): Bytes that one sample takes of that tensor.
        size (int): Bytes that all of it may take, unless one sample takes
            more.
        tensors (Tensor, optional): (N, ...); the first is no None.

    Returns:
        list[tuple]: The parts of each; None remains None.
    """
    x = tensors[0]
    if x.device.type != 'cpu' or torch.compiler.is_compiling():
        return [tensors]
    samples = max(size // max(sample, 1), 1)
    if samples >= len(x):
        return [tensors]
    return list(zip(*(
        repeat(None) if t is None else t.split(samples) for t in tensors)))


def filters(weight: Tensor, bias: Tensor,
            dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Parameters of a depthwise convolution as :func:`gate` likes them.

    Args:
        weight (Tensor): (C, 1, k, k).
        bias (Tensor): (C, ).
        dtype (torch.dtype): Of the other operands.

    Returns:
        tuple[Tensor]: Both, of the same shapes.
    """
    return weight.to(dtype), bias.to(dtype)


def gate(zv: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """``DW_k(GELU(z)) * v``.

    Args:
        zv (Tensor): [z|v], (N, H, W, 2C).
        weight (Tensor): Depthwise kernel, (C, 1, k, k), k odd.
        bias (Tensor): Bias of the depthwise convolution, (C, ).

    Returns:
        Tensor: (N, H, W, C).
    """
    return gate_forward(zv, weight, bias)[0]


def gate_forward(zv: Tensor, weight: Tensor,
                 bias: Tensor) -> tuple[Tensor, Tensor]:
    """:func:`gate`, and the output of the convolution, (N, H, W, C)."""
    z, v = zv.chunk(2, -1)
    # GELU is several times as fast on contiguous memory.
    a = _depthwise(F.gelu(z.contiguous()), weight, bias)
    return a * v, a


def gate_backward(grad: Tensor, zv: Tensor, a: Tensor, weight: Tensor,
                  bias: Tensor) -> tuple[Tensor, ...]:
    """Gradients of :func:`gate`, and its result once more.

    Args:
        grad (Tensor): Gradient of the result, (N, H, W, C).
        a (Tensor): Output of the convolution, (N, H, W, C).
        zv, weight, bias (Tensor): As above. This and ``a`` may be of another
            type than the rest.

    Returns:
        tuple[Tensor]: Gradients of zv, weight and bias (the latter two in
        fp32) and the result, which the caller has not stored. Triton's
        kernels add the sum of the first over all positions, (2C, ).
    """
    grad_zv = torch.empty_like(zv, dtype=grad.dtype)
    grad_z, grad_v = grad_zv.chunk(2, -1)
    z, v = zv.chunk(2, -1)
    z, a = z.to(grad.dtype).contiguous(), a.to(grad.dtype)
    torch.mul(grad, a, out=grad_v)
    grad_a = grad * v
    h = F.gelu(z)
    grad_h, grad_weight, grad_bias = _depthwise_backward(grad_a, h, weight)
    grad_z.copy_(aten.gelu_backward(grad_h, z, grad_input=grad_h))
    return grad_zv, grad_weight, grad_bias, a * v


def position(z: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """``h + GELU(DW_3(h))`` with ``h = GELU(z)``.

    Args:
        z (Tensor): (N, H, W, C).
        weight (Tensor): Depthwise kernel, (C, 1, 3, 3).
        bias (Tensor): Bias of the depthwise convolution, (C, ).

    Returns:
        Tensor: (N, H, W, C).
    """
    out = torch.empty_like(z)
    for z_part, out_part in _parts(z[:1].nbytes, PART, z, out):
        h = F.gelu(z_part)
        torch.add(h, aten.gelu_(_depthwise(h, weight, bias)), out=out_part)
    return out


def position_backward(grad: Tensor, z: Tensor, weight: Tensor,
                      bias: Tensor) -> tuple[Tensor, ...]:
    """Gradients of :func:`position`, and its result once more.

    Args:
        grad (Tensor): Gradient of the result, (N, H, W, C), which is
            overwritten.
        z, weight, bias (Tensor): As above. z may be of another type than the
            rest.

    Returns:
        tuple[Tensor]: Gradients of z, weight and bias (the latter two in
        fp32) and the result, which the caller has not stored. Triton's
        kernels add the sum of the first over all positions, (C, ).
    """
    z = z.to(grad.dtype)
    h = F.gelu(z)
    d = _depthwise(h, weight, bias)
    grad_d = aten.gelu_backward(grad, d)
    out = torch.add(h, aten.gelu_(d), out=d)
    grad_h, *grads = _depthwise_backward(grad_d, h, weight)
    aten.gelu_backward(grad_h.add_(grad), z, grad_input=grad)
    return grad, *grads, out


def _norm_parameters(x: Tensor, *parameters: Tensor
                     | None) -> list[Tensor | None]:
    """CPUs take them in fp32 whatever x is in, and are faster then."""
    return [
        p if p is None else p.to(x.dtype) if x.is_cuda else _wide(p)
        for p in parameters
    ]


def patches(x: Tensor, size: int) -> Tensor:
    """(N, H, W, C) -> (N, H // P, W // P, P * P * C), P the size.

    What does not fill a patch is left out.
    """
    n, height, width, c = x.shape
    rows, columns = height // size, width // size
    return x[:, :rows * size, :columns * size].reshape(
        n, rows, size, columns, size, c).transpose(2, 3).flatten(3)


def unpatched(x: Tensor, size: int, height: int, width: int) -> Tensor:
    """The inverse of :func:`patches`, with zeros for what was left out."""
    n, rows, columns, _ = x.shape
    x = x.reshape(n, rows, columns, size, size, -1).transpose(2, 3).reshape(
        n, rows * size, columns * size, -1)
    return F.pad(x, (0, 0, 0, width - columns * size, 0, height - rows * size))


def layer_norm(x: Tensor, weight: Tensor | None, bias: Tensor | None,
               eps: float, dtype: torch.dtype, patch: int = 1) -> Tensor:
    """Layer norm over the channels.

    Args:
        x (Tensor): (N, H, W, C).
        weight, bias (Tensor, optional): (C, ); None for ones and zeros.
        eps (float): Added to the variance.
        dtype (torch.dtype): Of the result.
        patch (int): Side of the :func:`patches` of the result. Defaults to 1.

    Returns:
        Tensor: (N, H, W, C), or its patches.
    """
    out = F.layer_norm(x, x.shape[-1:], *_norm_parameters(x, weight, bias),
                       eps).to(dtype)
    return out if patch == 1 else patches(out, patch)


def layer_norm_backward(grad: Tensor, x: Tensor, weight: Tensor, bias: Tensor,
                        eps: float, residual: Tensor | None,
                        patch: int = 1) -> tuple[Tensor, ...]:
    """Gradients of a layer norm over the channels, and of what passes by it.

    Args:
        grad (Tensor): Gradient of the output, (N, H, W, C), or its patches.
        x (Tensor): Input, (N, H, W, C).
        weight, bias (Tensor): (C, ).
        eps (float): Added to the variance.
        residual (Tensor, optional): What else reaches x, (N, H, W, C).
        patch (int): Side of the patches. Defaults to 1.

    Returns:
        tuple[Tensor]: Gradients of x, weight and bias, and the output once
        more, of the type of ``grad``.
    """
    dtype = x.dtype
    if patch > 1:
        grad = unpatched(grad, patch, *x.shape[1:3])
    if not x.is_cuda:
        # Sums of bf16 are wrong by a third on CPUs, over the 50,000 positions
        # of four images of 448x448.
        x = _wide(x)
    parameters = _norm_parameters(x, weight, bias)
    normed, mean, rstd = aten.native_layer_norm(x, weight.shape, *parameters,
                                                eps)
    normed = normed.to(grad.dtype)
    grad_x, grad_weight, grad_bias = aten.native_layer_norm_backward(
        grad.to(x.dtype), x, weight.shape, mean, rstd, *parameters,
        (True, True, True))
    if residual is not None:
        grad_x = grad_x.to(residual.dtype).add_(residual)
    if patch > 1:
        normed = patches(normed, patch)
    return grad_x.to(dtype), _wide(grad_weight), _wide(grad_bias), normed


def scale_residual(x: Tensor, y: Tensor, scale: Tensor,
                   keep: Tensor | None) -> Tensor:
    """``x + keep * scale * y``.

    Args:
        x, y (Tensor): (N, H, W, C).
        scale (Tensor): Layer scale, (C, ).
        keep (Tensor, optional): Drop path, (N, 1, 1, 1).

    Returns:
        Tensor: (N, H, W, C), of the type of x.
    """
    scale = _scale_for(x, scale)
    return torch.addcmul(x, y.to(x.dtype), scale if keep is None else
                         scale * keep).to(x.dtype)


def _scale_for(x: Tensor, scale: Tensor) -> Tensor:
    # fp16's numbers end above 1e-6 * 0.02.
    return scale if x.dtype == torch.float16 else scale.to(x.dtype)


def scale_backward(grad: Tensor, scale: Tensor) -> tuple[Tensor, ...]:
    """What of a gradient passes a layer scale.

    Args:
        grad (Tensor): (N, H, W, C).
        scale (Tensor): (C, ).

    Returns:
        tuple[Tensor]: The product, of the type of ``grad``. Triton's kernel
        adds the sum of ``grad`` over all positions, (C, ).
    """
    return (grad * _scale_for(grad, scale)).to(grad.dtype),


def drop_backward(grad: Tensor, scale: Tensor, keep: Tensor,
                  dtype: torch.dtype) -> tuple[Tensor, ...]:
    """What of a gradient passes drop path, and then a layer scale.

    Args:
        grad (Tensor): (N, H, W, C).
        scale (Tensor): (C, ).
        keep (Tensor): (N, 1, 1, 1).
        dtype (torch.dtype): Of the results.

    Returns:
        tuple[Tensor]: Both gradients. Triton's kernel adds the sum of the
        first over all positions, (C, ).
    """
    grad = (grad * keep).to(dtype)
    return grad, *scale_backward(grad, scale)


def layer_scale_backward(grad_weight: Tensor, grad_bias: Tensor,
                         weight: Tensor, bias: Tensor,
                         scale: Tensor) -> tuple[Tensor, ...]:
    """Gradients of a linear layer and of the layer scale behind it.

    Args:
        grad_weight (Tensor): Gradient of the weight as if the scale were 1,
            (O, I), which is overwritten.
        grad_bias (Tensor): That of the bias, (O, ), likewise.
        weight, bias, scale (Tensor): The parameters, (O, I), (O, ) and (O, ).

    Returns:
        tuple[Tensor]: Gradients of the three, at least in fp32.
    """
    grad_weight, scale = _wide(grad_weight), _wide(scale)
    grad_scale = (
        torch.linalg.vecdot(_wide(weight), grad_weight) +
        _wide(bias) * grad_bias)
    return (grad_weight.mul_(scale[:, None]), grad_bias.mul_(scale),
            grad_scale)


def _refuse_second_derivatives() -> None:
    if torch.is_grad_enabled():
        raise RuntimeError(
            'the fused operators of Conv2Former have no second derivatives; '
            'build the backbone with fused=False or set '
            'MMCONV2FORMER_FUSED=0 to differentiate twice')


def _hidden_bytes(x: Tensor, in_weight: Tensor, dtype: torch.dtype) -> int:
    """What a sample takes of the output of the first linear layers."""
    return x.shape[1] * x.shape[2] * len(in_weight) * dtype.itemsize


def _branch_backward(
        middle: str, eps: float, grad: Tensor, x: Tensor, keep: Tensor | None,
        *stored: Tensor, norm_weight: Tensor, norm_bias: Tensor,
        in_weight: Tensor, dw_weight: Tensor, dw_bias: Tensor, weight: Tensor,
        scale: Tensor) -> tuple[Tensor, ...]:
    """Gradients of :class:`ResidualBranch` but for its layer scale.

    That is part of the last linear layer here, and gets its gradient from
    that layer's: of x, and in fp32 of weight and bias of the norm, of the
    first linear layers, of the convolution and, as if the scale were 1, of
    the last layer.
    """
    kernels, dtype = _kernels(x), weight.dtype
    if keep is None:
        grad_y = grad.to(dtype)
        grad_middle, *sums = kernels.scale_backward(grad_y, scale)
    else:
        grad_y, grad_middle, *sums = kernels.drop_backward(
            grad, scale, keep, dtype)
    grad_middle = _product(grad_middle, weight)
    grad_z, grad_dw_weight, grad_dw_bias, y, *in_sums = getattr(
        kernels, f'{middle}_backward')(grad_middle, *stored, dw_weight,
                                       dw_bias)
    del grad_middle, stored
    grads = _linear_backward(grad_y, y, *sums)
    del y, grad_y
    grad_x, grad_norm_weight, grad_norm_bias, normed = (
        kernels.layer_norm_backward(
            _product(grad_z, in_weight), x, norm_weight, norm_bias, eps, grad))
    return (grad_x, grad_norm_weight, grad_norm_bias,
            *_linear_backward(grad_z, normed, *in_sums), grad_dw_weight,
            grad_dw_bias, *grads)


class ResidualBranch(torch.autograd.Function):
    """``x + keep * scale * linear(middle(linear(layer_norm(x))))``.

    Args:
        x (Tensor): (N, H, W, C).
        norm_weight, norm_bias (Tensor): (C, ).
        scale (Tensor): Layer scale, (C, ).
        keep (Tensor, optional): Drop path, (N, 1, 1, 1).
        eps (float): Of the layer norm.
        middle (str): 'gate' or 'position'.
        parameters (Tensor): Weight and bias of each layer in turn: of the
            first linear layers, whose outputs stand side by side (two of
            (C, C) for 'gate', one of (O, C) for 'position'), of the depthwise
            convolution and of the last linear layer, (C, C) or (C, O). The
            weights of linear layers may be those of 1x1 convolutions.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, norm_weight: Tensor, norm_bias: Tensor,
                scale: Tensor, keep: Tensor | None, eps: float, middle: str,
                *parameters: Tensor) -> Tensor:
        dtype, kernels, asked = product_dtype(x), _kernels(x), _asked_dtype(x)
        in_weight, in_bias, dw_weight, dw_bias, weight, bias = (
            kernels.operands(parameters, dtype))
        with _alone(x):
            z = linear(
                kernels.layer_norm(x, norm_weight, norm_bias, eps, dtype),
                in_weight, in_bias)
            if middle == 'gate':
                y, *stored = kernels.gate_forward(z, dw_weight, dw_bias)
            else:
                y, stored = kernels.position(z, dw_weight, dw_bias), []
            y = linear(y, weight, bias)
            out = kernels.scale_residual(x, y, scale, keep)
        ctx.eps, ctx.middle = eps, middle
        ctx.shapes = [p.shape for p in parameters]
        ctx.save_for_backward(x, norm_weight, norm_bias, in_weight, dw_weight,
                              dw_bias, weight, *parameters[-2:], scale, keep,
                              # Where the CPU emulates that type.
                              *(t.to(asked) for t in (z, *stored)))
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        _refuse_second_derivatives()
        (x, norm_weight, norm_bias, in_weight, dw_weight, dw_bias, weight,
         out_weight, out_bias, scale, keep, *stored) = ctx.saved_tensors
        outs, totals = [], None
        with _alone(x):
            # Parts that are no smaller than the gradients that they add to.
            size = max(PART, 4 * in_weight.nbytes)
            parts = _parts(_hidden_bytes(x, in_weight, weight.dtype), size,
                           grad.contiguous(), x, keep, *stored)
            for part in parts:
                out, *grads = _branch_backward(
                    ctx.middle, ctx.eps, *part, norm_weight=norm_weight,
                    norm_bias=norm_bias, in_weight=in_weight,
                    dw_weight=dw_weight, dw_bias=dw_bias, weight=weight,
                    scale=scale)
                outs.append(out)
                if len(parts) > 1:
                    grads = list(map(_wide, grads))
                if totals is None:
                    totals = grads
                else:
                    torch._foreach_add_(totals, grads)
            (grad_norm_weight, grad_norm_bias, grad_in_weight, grad_in_bias,
             grad_dw_weight, grad_dw_bias, *grads) = totals
            grad_weight, grad_bias, grad_scale = (
                _kernels(x).layer_scale_backward(
                    *grads, out_weight.flatten(1), out_bias, scale))
            grad_x = outs[0] if len(outs) == 1 else torch.cat(outs)
        sizes = [shape[0] for shape in ctx.shapes[:-4:2]]
        pairs = zip(
            _wide(grad_in_weight).split_with_sizes(sizes),
            grad_in_bias.split_with_sizes(sizes))
        grads = [
            *chain(*pairs), grad_dw_weight, grad_dw_bias, grad_weight,
            grad_bias
        ]
        return (grad_x, grad_norm_weight, grad_norm_bias, grad_scale, None,
                None, None, *map(Tensor.view, grads, ctx.shapes))


class Downsampling(torch.autograd.Function):
    """A layer norm over the channels and a convolution of patches.

    The convolution is a matrix product over the patches, which the kernels of
    the norm write and whose gradients they read.

    Args:
        x (Tensor): (N, H, W, C).
        norm_weight, norm_bias (Tensor, optional): (C, ); None only where x
            wants no gradient.
        eps (float): Added to the variance.
        weight (Tensor): Of the convolution, (O, C, P, P), stride P.
        bias (Tensor): (O, ).
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, norm_weight: Tensor | None,
                norm_bias: Tensor | None, eps: float, weight: Tensor,
                bias: Tensor) -> Tensor:
        dtype = product_dtype(x)
        ctx.eps, ctx.shape = eps, weight.shape
        with _alone(x):
            weight = _nhwc(weight).to(dtype).flatten(1)
            ctx.save_for_backward(x, norm_weight, norm_bias, weight)
            y = _kernels(x).layer_norm(x, norm_weight, norm_bias, eps, dtype,
                                       ctx.shape[3])
            return linear(y, weight, bias.to(dtype))

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        _refuse_second_derivatives()
        x, norm_weight, norm_bias, weight = ctx.saved_tensors
        o, c, size, _ = ctx.shape
        with _alone(x):
            grad = grad.to(weight.dtype).contiguous()
            grad_x, *norm_grads, normed = _kernels(x).layer_norm_backward(
                _product(grad, weight), x, norm_weight, norm_bias, ctx.eps,
                None, size)
            grad_weight, grad_bias = _linear_backward(grad, normed)
        grad_weight = _nchw(_wide(grad_weight).view(o, size, size, c))
        return grad_x, *norm_grads, None, grad_weight, grad_bias


def downsampling(x: Tensor, norm: nn.Module, conv: nn.Module) -> Tensor:
    """``conv(norm(x))``, by the kernels where GPUs have them.

    Args:
        x (Tensor): (N, C, H, W).
        norm (nn.Module): Layer norm over the channels.
        conv (nn.Module): Convolution of patches.

    Returns:
        Tensor: (N, C', H', W'), in channels-last memory.
    """
    # torch's own norm gives each pixel 128 threads, most of them idle, and
    # under autocast reads and writes fp32.
    if _kernels(x) is sys.modules[__name__] \
            or _obstacle(x, ()) or not _is_own_downsampling(norm, conv) \
            or norm.weight is None and x.requires_grad:
        return conv(norm(x))
    return _nchw(
        Downsampling.apply(_nhwc(x), norm.weight, norm.bias, norm.eps,
                           conv.weight, conv.bias))


def _is_own_downsampling(norm: nn.Module, conv: nn.Module) -> bool:
    return (type(norm) is LayerNorm2d and type(conv) is nn.Conv2d
            and not has_hooks(norm) and not has_hooks(conv)
            and conv.bias is not None and conv.groups == 1
            and conv.dilation == (1, 1) and conv.padding == (0, 0)
            and conv.kernel_size == conv.stride == conv.stride[::-1])


def residual_branch(x: Tensor, norm: LayerNorm2d, layers: Iterable[nn.Module],
                    scale: Tensor, keep: Tensor | None,
                    middle: str) -> Tensor:
    """A residual branch of a block, with less work where gradients are off.

    Args:
        norm (LayerNorm2d): The layer norm.
        layers (Iterable[nn.Module]): Those whose parameters
            :class:`ResidualBranch` takes.
        x, scale, keep, middle: Those of :class:`ResidualBranch`.

    Returns:
        Tensor: (N, H, W, C).
    """
    parameters = [p for layer in layers for p in (layer.weight, layer.bias)]
    if torch.is_grad_enabled():
        return ResidualBranch.apply(x, norm.weight, norm.bias, scale, keep,
                                    norm.eps, middle, *parameters)
    return infer(x, norm.weight, norm.bias, scale, keep, norm.eps, middle,
                 prepare(x, parameters, middle))


def operands(parameters: Sequence[Tensor],
             dtype: torch.dtype) -> list[Tensor]:
    """Weights and biases of a branch as the products and kernels take them.

    Args:
        parameters (Sequence[Tensor]): Those of :class:`ResidualBranch`.
        dtype (torch.dtype): Of the products.

    Returns:
        list[Tensor]: Weight and bias of the first layers as one, (O, I) and
        (O, ), those of the convolution, and those of the last layer.
    """
    return _operands(parameters, dtype, filters)


def _operands(parameters: Sequence[Tensor], dtype: torch.dtype,
              filters: Callable) -> list[Tensor]:
    *_, dw_weight, dw_bias, out_weight, out_bias = parameters
    in_weight, in_bias, out_weight, out_bias = _join(
        ([p.flatten(1) for p in parameters[:-4:2]], parameters[1:-4:2],
         [out_weight.flatten(1)], [out_bias]), dtype)
    return [
        in_weight, in_bias, *filters(dw_weight, dw_bias, dtype), out_weight,
        out_bias
    ]


def prepare(x: Tensor, parameters: Sequence[Tensor], middle: str,
            pack: bool = False) -> list[Tensor]:
    """Weights of a branch as :func:`infer` takes them.

    Args:
        x (Tensor): Of the type and on the device of the inputs.
        parameters (Sequence[Tensor]): Those of :class:`ResidualBranch`, or
            with one layer in place of the first ones.
        middle (str): 'gate' or 'position'.
        pack (bool): Whether to spend time and memory for the sake of many
            calls to come. Defaults to False.

    Returns:
        list[Tensor]: In the precision of the products.
    """
    dtype = product_dtype(x)
    if not _onednn_takes_gelu(x.device, dtype):
        return _kernels(x).operands(parameters, dtype)
    if middle == 'gate' and len(parameters) == 6:
        # Only one of the halves meets a GELU.
        pairs = zip(*(p.chunk(2) for p in parameters[:2]))
        parameters = [*chain(*pairs), *parameters[2:]]
    *linears, dw_weight, dw_bias, out_weight, out_bias = (
        p.to(dtype) for p in parameters)

    def factor(p: Tensor) -> Tensor:
        if p.ndim == 1:
            return p
        p = p.flatten(1)
        return torch.ops.mkldnn._reorder_linear_weight(p) if pack else p

    return [
        *map(factor, linears), dw_weight, dw_bias,
        factor(out_weight), out_bias
    ]


def infer(x: Tensor, norm_weight: Tensor | None, norm_bias: Tensor | None,
          scale: Tensor | None, keep: Tensor | None, eps: float, middle: str,
          weights: Sequence[Tensor]) -> Tensor:
    """:class:`ResidualBranch` without gradients.

    Args:
        norm_weight, norm_bias, scale (Tensor, optional): None for ones and
            zeros.
        weights (Sequence[Tensor]): From :func:`prepare`.
        x, keep, eps, middle: Those of :class:`ResidualBranch`.

    Returns:
        Tensor: (N, H, W, C).
    """
    dtype, kernels = product_dtype(x), _kernels(x)
    parts = _parts(_hidden_bytes(x, weights[1], dtype), PART, x, keep)
    if len(parts) > 1:
        return torch.cat([
            infer(part, norm_weight, norm_bias, scale, keep_part, eps, middle,
                  weights) for part, keep_part in parts])
    with _alone(x):
        y = kernels.layer_norm(x, norm_weight, norm_bias, eps, dtype)
        if _onednn_takes_gelu(x.device, dtype):
            middles = dict(gate=_onednn_gate, position=_onednn_position)
            y = middles[middle](y, *weights[:-2])
            if scale is None and x.dtype == dtype:
                return torch.ops.mkldnn._linear_pointwise.binary(
                    y, x, *weights[-2:], 'add')
            y = _onednn_linear(y, *weights[-2:])
        else:
            y = getattr(kernels, middle)(
                linear(y, *weights[:2]), *weights[2:4])
            y = linear(y, *weights[4:])
        if scale is None:
            return y.to(x.dtype).add_(x)
        return kernels.scale_residual(x, y, scale, keep)


# oneDNN does GELU on the results of a product or a convolution before they go
# to memory.


def _onednn_takes_gelu(device: torch.device, dtype: torch.dtype) -> bool:
    return _onednn_fp32(device, dtype) or _onednn_bf16(device, dtype)


def _onednn_gate(y: Tensor, z_weight: Tensor, z_bias: Tensor,
                 v_weight: Tensor, v_bias: Tensor, dw_weight: Tensor,
                 dw_bias: Tensor) -> Tensor:
    h = _onednn_linear(y, z_weight, z_bias, 'gelu')
    return _onednn_linear(y, v_weight, v_bias).mul_(
        _depthwise(h, dw_weight, dw_bias))


def _onednn_position(y: Tensor, weight: Tensor, bias: Tensor,
                     dw_weight: Tensor, dw_bias: Tensor) -> Tensor:
    h = _onednn_linear(y, weight, bias, 'gelu')
    d = torch.ops.mkldnn._convolution_pointwise(
        _nchw(h), dw_weight, dw_bias, [1, 1], [1, 1], [1, 1], len(dw_weight),
        'gelu', [], 'none')
    return _nhwc(d).add_(h)


def _fp32(x: Tensor, *shape: int) -> Tensor:
    return x.new_empty(shape, dtype=torch.float32)


def _patches_shape(x: Tensor, size: int) -> tuple[int, ...]:
    n, height, width, c = x.shape
    return n, height // size, width // size, size * size * c


# What the kernels return, for tracing without data.
SHAPES = dict(
    layer_norm=lambda x, weight, bias, eps, dtype, patch=1: x.new_empty(
        _patches_shape(x, patch), dtype=dtype),
    layer_norm_backward=lambda grad, x, weight, bias, eps, residual, patch=1:
    (x.new_empty(x.shape), *(_fp32(x, len(weight)) for _ in range(2)),
     grad.new_empty(_patches_shape(x, patch))),
    gate=lambda zv, weight, bias: zv.new_empty(
        (*zv.shape[:3], len(weight))),
    gate_forward=lambda zv, weight, bias: tuple(
        zv.new_empty((*zv.shape[:3], len(weight))) for _ in range(2)),
    gate_backward=lambda grad, zv, a, weight, bias:
    (zv.new_empty(zv.shape), _fp32(zv, *weight.shape), _fp32(zv, len(bias)),
     a.new_empty(a.shape), _fp32(zv, zv.shape[3])),
    position=lambda z, weight, bias: z.new_empty(z.shape),
    position_backward=lambda grad, z, weight, bias:
    (z.new_empty(z.shape), _fp32(z, *weight.shape), _fp32(z, len(bias)),
     z.new_empty(z.shape), _fp32(z, len(bias))),
    scale_backward=lambda grad, scale:
    (grad.new_empty(grad.shape), _fp32(grad, len(scale))),
    drop_backward=lambda grad, scale, keep, dtype: (
        *(grad.new_empty(grad.shape, dtype=dtype) for _ in range(2)),
        _fp32(grad, len(scale))),
    scale_residual=lambda x, y, scale, keep: x.new_empty(x.shape),
    layer_scale_backward=lambda grad_weight, grad_bias, weight, bias, scale: (
        _fp32(scale, *weight.shape), *(_fp32(scale, len(scale))
                                       for _ in range(2))),
)


# The operators of the Triton kernels once they are needed, and the module of
# their functions. A global, of which torch.compile knows where it comes from.
TRITON = SimpleNamespace()


@cache
def _make_triton_operators() -> str:
    """Fill ``TRITON``, or say why that cannot be.

    With operators of torch, which torch.compile takes as they are. Not by
    ``custom_op``, which takes 20 microseconds a call where this takes 3.
    """

    def on_its_device(function: Callable) -> Callable:

        def call(x: Tensor, *others: Any) -> Any:
            with torch.cuda.device_of(x):
                return function(x, *others)

        return call

    try:
        from . import triton_kernels
    except ImportError as error:
        return f'Triton cannot be imported ({error})'
    TRITON.functions = triton_kernels
    TRITON.operands = lambda parameters, dtype: _operands(
        parameters, dtype, triton_kernels.filters)
    for name, shapes in SHAPES.items():
        function = getattr(triton_kernels, name)
        operator = f'mmconv2former::{name}'
        torch.library.define(
            operator, torch.library.infer_schema(function, mutates_args=()),
            tags=torch.Tag.pt2_compliant_tag)
        torch.library.impl(operator, 'cuda', on_its_device(function))
        torch.library.register_fake(operator, shapes)
        setattr(TRITON, name, getattr(torch.ops.mmconv2former, name).default)
    return ''


@cache
def _try_triton(device: torch.device) -> str:
    if torch.version.hip or torch.cuda.get_device_capability(device) < (8, 0):
        return 'the Triton kernels want an NVIDIA GPU of the Ampere ' \
            'generation or later'
    if obstacle := _make_triton_operators():
        return obstacle
    x = torch.zeros(1, 1, 1, 8, device=device)
    try:  # Triton compiles a launcher, for which it needs a C compiler
        TRITON.scale_residual(x, x, x[0, 0, 0], None)
    except (RuntimeError, OSError, SubprocessError) as error:
        return f'Triton cannot compile here ({error})'
    return ''


# torch.compile calls the next two and takes what they return. It would trace
# into a cached function, and replaces torch's is_exporting by True.


@torch.compiler.assume_constant_result
def _triton_obstacle(device: torch.device) -> str:
    """Why Triton's kernels cannot run on that GPU, or ''."""
    return _try_triton(device)


@torch.compiler.assume_constant_result
def _is_exporting() -> bool:
    return torch.compiler.is_exporting()


def _kernels(x: Tensor) -> ModuleType | SimpleNamespace:
    # Triton's compute in fp32.
    if not x.is_cuda or x.dtype == torch.double or _triton_obstacle(x.device):
        return sys.modules[__name__]
    if torch.compiler.is_compiling() or type(x) is not Tensor:
        return TRITON  # fake tensors, and others that torch looks into
    return TRITON.functions  # the same without torch's dispatcher


def _obstacle(x: Tensor, modules: Iterable[nn.Module]) -> str:
    """Why the plain path must run, or ''."""
    if os.environ.get('MMCONV2FORMER_FUSED') == '0':
        return 'MMCONV2FORMER_FUSED=0'
    if _is_exporting() or torch.jit.is_tracing():
        return 'the model is being exported'
    if not x.numel():
        return 'the batch is empty'
    if x.device.type not in ('cpu', 'cuda'):
        return f'device {x.device.type} has no fused operators'
    if not all(map(is_own, modules)):
        return 'layers of the blocks were replaced, or have hooks'
    if torch.compiler.is_compiling() \
            and _kernels(x) is sys.modules[__name__]:
        return 'the model is being compiled, which fuses them as well'
    return ''


def available(x: Tensor, modules: Iterable[nn.Module]) -> bool:
    """Whether the fused operators can take these layers; logged once.

    Args:
        x (Tensor): Input of the block.
        modules (Iterable[nn.Module]): Layers whose parameters the operators
            would read, passing by their ``forward``.

    Returns:
        bool: Whether :class:`ResidualBranch` may stand in for them.
    """
    obstacle = _obstacle(x, modules)
    if not torch.compiler.is_compiling():
        if obstacle:
            report(f'plain operators, because {obstacle}')
        elif not x.is_cuda:
            report(f'fused operators on the {x.device.type}')
        elif _kernels(x) is not sys.modules[__name__]:
            report('fused operators with Triton kernels')
        else:
            reason = _triton_obstacle(x.device) or 'the model is in fp64'
            report(f'fused operators of torch alone, because {reason}')
    return not obstacle
