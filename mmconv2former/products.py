"""Matrix products by the fastest library, and torch's depthwise convolutions.

Tensors are (N, H, W, C). No function here builds a graph for autograd.
"""
import platform
from functools import cache
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from .operators import at_least_fp32, to_nchw, to_nhwc

aten = torch.ops.aten

# Whether torch has products of 16 bits with results in fp32.
_MM_IN_FP32 = 'dtype' in aten.mm.overloads()


def _has_onednn(device: torch.device) -> bool:
    return (device.type == 'cpu' and not torch.compiler.is_compiling()
            and torch.backends.mkldnn.is_available())


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
        if x.dtype.itemsize == 2 and _MM_IN_FP32 \
                and not torch.compiler.is_compiling():
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


def depthwise(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Depthwise convolution that keeps the size.

    Args:
        x (Tensor): (N, H, W, C).
        weight (Tensor): (C, 1, k, k), k odd.
        bias (Tensor, optional): (C, ).

    Returns:
        Tensor: (N, H, W, C).
    """
    c, k = len(weight), weight.shape[-1]
    if x.device.type == 'cpu' and c <= 16 and k > 13 \
            and x.dtype == torch.bfloat16:
        # For which oneDNN, in torch 2.11, takes forever where maps are large.
        return depthwise(x.float(), weight.float(), None if bias is None
                         else bias.float()).to(x.dtype)
    out = F.conv2d(to_nchw(x), weight, bias, padding=k // 2, groups=c)
    return to_nhwc(out).contiguous()


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
    _, h, w, c = x.shape
    # Taps that meet nothing but the padding have no gradient.
    size = min(kernel_size, 2 * max(h, w) - 1)
    if size == 1:  # a convolution of one tap takes a thousand times as long
        out = (at_least_fp32(x) * at_least_fp32(grad)).sum(0).view(c, 1, 1, 1)
    else:
        out = _correlate(grad, x, size)
    border = (kernel_size - size) // 2
    return F.pad(out, (border, border, border, border)) if border else out


def _correlate(grad: Tensor, x: Tensor, kernel_size: int) -> Tensor:
    """:func:`depthwise_grad_weight` by a convolution."""
    n, h, w, c = x.shape
    padding = kernel_size // 2
    x, grad = to_nchw(x), to_nchw(grad)
    if x.dtype != torch.bfloat16 or h * w < 1024:
        # Rounds once instead of once for each sample. Large maps are twice
        # as fast in bf16, and have no few numbers that could cancel out.
        x, grad = at_least_fp32(x), at_least_fp32(grad)
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
    return at_least_fp32(out).view(n, c, 1, kernel_size, kernel_size).sum(0)


def depthwise_backward(grad: Tensor, x: Tensor,
                       weight: Tensor) -> tuple[Tensor, ...]:
    """Gradients of input, weight and bias, the latter two at least in fp32."""
    c, k = len(weight), weight.shape[-1]
    if x.device.type == 'cpu' and (k > 3 or k > min(x.shape[1:3])):
        return (depthwise(grad, weight.flip(2, 3), None),
                depthwise_grad_weight(grad, x, k), linear_grad_bias(grad))
    grad_x, grad_weight, grad_bias = aten.convolution_backward(
        to_nchw(grad), to_nchw(x), weight, (c, ), (1, 1), (k // 2, k // 2),
        (1, 1), False, (0, 0), c, (True, True, True))
    return (to_nhwc(grad_x), at_least_fp32(grad_weight),
            at_least_fp32(grad_bias))
