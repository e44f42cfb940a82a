"""Depthwise convolutions by operators of torch, and their gradients.

For :mod:`mmconv2former.torch_kernels`. Tensors are (N, H, W, C). No function
here builds a graph for autograd.
"""
import torch
import torch.nn.functional as F
from torch import Tensor

from .operators import at_least_fp32, to_nchw, to_nhwc
from .products import linear_grad_bias

aten = torch.ops.aten


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
            and x.dtype.itemsize == 2:
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
        # In fp32, so that only the sum over the samples is rounded, and not
        # the part of each. Large maps stay in bf16, which is twice as fast;
        # of so many numbers the sum hardly suffers from that rounding.
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
