"""Matrix products by the fastest library.

Tensors are (N, H, W, C). No function here builds a graph for autograd.
"""
import platform
from functools import cache
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from .operators import at_least_fp32, to_nchw

aten = torch.ops.aten

# Whether torch has products of 16 bits with results in fp32.
_MM_IN_FP32 = 'dtype' in aten.mm.overloads() and not torch.version.hip


def _has_onednn(device: torch.device) -> bool:
    return (device.type == 'cpu' and not torch.compiler.is_compiling()
            and torch.backends.mkldnn.is_available())


def _has_mm_in_fp32(dtype: torch.dtype) -> bool:
    """Whether GPUs multiply matrices of that type with results in fp32."""
    return (_MM_IN_FP32 and dtype.itemsize == 2
            and not torch.compiler.is_compiling()
            # With sums in fp16 torch refuses it.
            and not (dtype == torch.float16 and
                     torch.backends.cuda.matmul.allow_fp16_accumulation))


def _onednn_fp32(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether to ask oneDNN for products in fp32, of which torch asks MKL."""
    return dtype == torch.float32 and _has_onednn(device)


@cache
def _mkl_is_fast() -> bool:
    """Whether torch's own fp32 products, by MKL, are fast on this CPU.

    On those of Intel they are as fast as oneDNN's, and take transposed factors
    as they are. On those of AMD they take twice as long.
    """
    try:
        cpu = Path('/proc/cpuinfo').read_text()
    except OSError:  # not Linux
        cpu = platform.processor()
    return torch.backends.mkl.is_available() and 'GenuineIntel' in cpu


@cache
def _has_bf16() -> bool:
    return torch.ops.mkldnn._is_mkldnn_bf16_supported()


def _onednn_bf16(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether oneDNN takes bf16, which it does with the right instructions."""
    return dtype == torch.bfloat16 and _has_onednn(device) and _has_bf16()


def onednn_takes(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether :func:`onednn_linear` takes such operands, and is fast.

    Args:
        device (torch.device): Of the operands.
        dtype (torch.dtype): Of the operands.

    Returns:
        bool: Whether it does.
    """
    return _onednn_fp32(device, dtype) or _onednn_bf16(device, dtype)


def onednn_linear(x: Tensor, weight: Tensor, bias: Tensor | None,
                  residual: Tensor | None = None) -> Tensor:
    """:func:`linear` by oneDNN.

    Args:
        x (Tensor): (..., I).
        weight (Tensor): (O, I), also as oneDNN has rearranged it.
        bias (Tensor, optional): (O, ).
        residual (Tensor, optional): What is added to the result, (..., O), of
            the type of x. Defaults to None.

    Returns:
        Tensor: (..., O).
    """
    # There are no public names for these, which torch's compiler uses. They
    # read a bias as if it had no strides.
    product = torch.ops.mkldnn._linear_pointwise
    if bias is not None:
        bias = bias.contiguous()
    if residual is None:
        return product(x, weight, bias, 'none', [], 'none')
    return product.binary(x, residual, weight, bias, 'add')


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """Linear layer: (..., I), (O, I), (O, ) -> (..., O), without gradients."""
    # In bf16 torch asks oneDNN, too, but for a product of any two matrices,
    # which takes 5 to 8 % longer in the stages of T.
    if onednn_takes(x.device, x.dtype):
        return onednn_linear(x, weight, bias)
    return F.linear(x, weight, bias)


def linear_grad_input(grad: Tensor, weight: Tensor) -> Tensor:
    """Gradient of the input of a linear layer.

    Args:
        grad (Tensor): Of its output, (N, H, W, O).
        weight (Tensor): (O, I).

    Returns:
        Tensor: (N, H, W, I).
    """
    if _onednn_fp32(grad.device, grad.dtype):
        return onednn_linear(grad, weight.t(), None)
    # In bf16, too: with a transposed weight the product is the faster one.
    return torch.matmul(grad, weight)


def linear_grad_bias(grad: Tensor) -> Tensor:
    """Gradient of a bias, at least in fp32: (N, H, W, O) -> (O, )."""
    if grad.is_cuda:
        return grad.sum((0, 1, 2),
                        dtype=torch.promote_types(grad.dtype, torch.float32))
    # Sums in fp32 by itself; asked for an fp32 result it is five times slower.
    return at_least_fp32(grad.sum((0, 1, 2)))


def linear_grad_params(
        grad: Tensor, x: Tensor,
        grad_bias: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Gradients of weight and bias of a linear layer.

    Args:
        grad (Tensor): Of its output, (N, H, W, O).
        x (Tensor): Its input, (N, H, W, I).
        grad_bias (Tensor, optional): The gradient of the bias, if a kernel
            that read ``grad`` anyway has summed it up. Defaults to None.

    Returns:
        tuple[Tensor]: (O, I), and (O, ) at least in fp32.
    """
    if grad_bias is None:
        grad_bias = linear_grad_bias(grad)
    return linear_grad_weight(grad, x), grad_bias


def linear_grad_weight(grad: Tensor, x: Tensor) -> Tensor:
    """Gradient of the weight of a linear layer.

    Args:
        grad (Tensor): Of its output, (N, H, W, O).
        x (Tensor): Its input, (N, H, W, I).

    Returns:
        Tensor: (O, I).
    """
    rows, columns = grad.flatten(0, 2).t(), x.flatten(0, 2)
    if x.is_cuda:
        if _has_mm_in_fp32(x.dtype):
            return aten.mm.dtype(rows, columns, torch.float32)
        return torch.mm(rows, columns)
    (o, count), i = rows.shape, columns.shape[1]
    avoids_mkl = _onednn_fp32(x.device, x.dtype) and not _mkl_is_fast()
    if avoids_mkl and count >= 512 or count > 4096 and _onednn_bf16(
            x.device, x.dtype):
        # As a convolution, which sums over many positions faster. Its sum for
        # the bias is less exact than torch's.
        grad_weight = aten.convolution_backward(
            to_nchw(grad), to_nchw(x), x.new_empty(o, i, 1, 1), None, (1, 1),
            (0, 0), (1, 1), False, (0, 0), 1, (False, True, False))[1]
        return grad_weight.view(o, i)
    if avoids_mkl:
        # oneDNN wants both transposed; a matrix is copied by one thread.
        rows = grad.permute(3, 0, 1, 2).flatten(1)
        return onednn_linear(rows, columns.t(), None)
    return torch.mm(rows, columns)
