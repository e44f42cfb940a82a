"""Operators of the Conv2Former block.

The block calls these functions and nothing else. Each is written plainly;
where there is a faster form, it stands beside the plain one, is taken where it
is known to be faster, and is switched off by ``MMCONV2FORMER_FUSED=0``.
"""
import os
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def _l1(a: Tensor) -> Tensor:
    return F.normalize(a, p=1, dim=1)


def _linear(a: Tensor) -> Tensor:
    """Map the values at each position linearly to (0, 1]."""
    low, high = a.amin(1, keepdim=True), a.amax(1, keepdim=True)
    eps = 1e-6  # keeps the lowest value above 0, and a flat position finite
    return (a - low + eps) / (high - low + eps)


# How the weights A = DW(..) act on the values V (paper, ablation of the
# fusion strategy). The paper does not say over which axis 'l1' and 'linear'
# normalise: over the channels of a position is our choice, because the
# result then does not depend on the size of the image.
FUSIONS = {
    'hadamard': lambda a, v: a * v,
    'sum': lambda a, v: a + v,
    'sigmoid': lambda a, v: a.sigmoid() * v,
    'l1': lambda a, v: _l1(a) * v,
    'linear': lambda a, v: _linear(a) * v,
}


def _depthwise_weight_grad(x: Tensor, grad: Tensor,
                           kernel_size: int) -> Tensor:
    """Weight gradient of a depthwise convolution, as another convolution.

    dW[c, i, j] = sum over n, h, w of x[n, c, h + i - p, w + j - p] *
    grad[n, c, h, w] is itself a depthwise convolution: of the image with its
    gradient as the kernel, each sample a group. oneDNN is fast at forward
    convolutions of any kernel, and at weight gradients up to 3x3 only.

    Args:
        x (Tensor): Input of the convolution, (N, C, H, W).
        grad (Tensor): Gradient of its output, (N, C, H, W).
        kernel_size (int): Size of the kernel k, odd; the padding is k // 2.

    Returns:
        Tensor: (C, 1, k, k).
    """
    n, c, h, w = x.shape
    padding = kernel_size // 2
    dtype = x.dtype
    if dtype in (torch.bfloat16, torch.float16):
        # As fast, and rounds once instead of once for each sample.
        x, grad = x.float(), grad.float()
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
    grads = out.view(n, c, 1, kernel_size, kernel_size)
    return grads.sum(0).to(dtype)


class _DepthwiseConv(torch.autograd.Function):
    """``F.conv2d`` with the weight gradient above."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight)
        return F.conv2d(x, weight, bias, padding=weight.shape[-1] // 2,
                        groups=len(weight))

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        k = weight.shape[-1]
        grad_x = grad_weight = grad_bias = None
        if ctx.needs_input_grad[0]:
            grad_x = torch.ops.aten.convolution_backward(
                grad, x, weight, None, (1, 1), (k // 2, k // 2), (1, 1),
                False, (0, 0), len(weight), (True, False, False))[0]
        if ctx.needs_input_grad[1]:
            grad_weight = _depthwise_weight_grad(x, grad, k)
        if ctx.needs_input_grad[2]:
            grad_bias = grad.sum((0, 2, 3))
        return grad_x, grad_weight, grad_bias


def depthwise_conv2d(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """Depthwise convolution that keeps the size.

    Args:
        x (Tensor): (N, C, H, W).
        weight (Tensor): (C, 1, k, k), k odd.
        bias (Tensor): (C, ).

    Returns:
        Tensor: (N, C, H, W).
    """
    k = weight.shape[-1]
    if (x.device.type == 'cpu' and k > 3 and weight.requires_grad
            and torch.is_grad_enabled()
            and os.environ.get('MMCONV2FORMER_FUSED') != '0'):
        if torch.is_autocast_enabled('cpu'):
            dtype = torch.get_autocast_dtype('cpu')
            x, weight, bias = x.to(dtype), weight.to(dtype), bias.to(dtype)
        return _DepthwiseConv.apply(x, weight, bias)
    return F.conv2d(x, weight, bias, padding=k // 2, groups=len(weight))


def modulate(z: Tensor, v: Tensor, weight: Tensor, bias: Tensor,
             fusion: str = 'hadamard') -> Tensor:
    """Convolutional modulation: ``fuse(DW_k(GELU(z)), v)``.

    Args:
        z (Tensor): Input of the attention branch, (N, C, H, W).
        v (Tensor): Values, (N, C, H, W).
        weight (Tensor): Depthwise kernel, (C, 1, k, k), k odd.
        bias (Tensor): Bias of the depthwise convolution, (C, ).
        fusion (str): A key of ``FUSIONS``. Defaults to 'hadamard'.

    Returns:
        Tensor: (N, C, H, W).
    """
    a = depthwise_conv2d(F.gelu(z), weight, bias)
    return FUSIONS[fusion](a, v)


def add_position(z: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """The middle of the MLP: ``h + GELU(DW_3(h))`` with ``h = GELU(z)``.

    The paper does not mention the 3x3 convolution; the official code has it.

    Args:
        z (Tensor): Output of the first linear layer, (N, C, H, W).
        weight (Tensor): Depthwise kernel, (C, 1, 3, 3).
        bias (Tensor): Bias of the depthwise convolution, (C, ).

    Returns:
        Tensor: (N, C, H, W).
    """
    h = F.gelu(z)
    return h + F.gelu(depthwise_conv2d(h, weight, bias))


class LayerNorm2d(nn.LayerNorm):
    """Layer normalisation over the channels of each position.

    A subclass of ``nn.LayerNorm``, so that rules which ask for norm layers
    (weight decay, freezing) find it.

    Args:
        num_channels (int): Channels of the input.
        eps (float): Added to the variance. Defaults to 1e-6, the official
            value.
    """

    def __init__(self, num_channels: int, eps: float = 1e-6) -> None:
        super().__init__(num_channels, eps=eps)

    def forward(self, x: Tensor) -> Tensor:
        """(N, C, H, W) -> (N, C, H, W), in channels-last memory."""
        return super().forward(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


class DropPath(nn.Module):
    """Stochastic depth: drop a residual branch per sample while training.

    Args:
        rate (float): Probability of dropping, in [0, 1). Defaults to 0.
    """

    def __init__(self, rate: float = 0.) -> None:
        super().__init__()
        self.rate = rate

    def forward(self, x: Tensor) -> Tensor:
        """(N, ...) -> (N, ...); the expected value is that of the input."""
        if not self.training or self.rate == 0.:
            return x
        keep = 1. - self.rate
        mask = torch.empty(
            (len(x), ) + (1, ) * (x.ndim - 1), dtype=x.dtype,
            device=x.device).bernoulli_(keep)
        return x * (mask / keep)

    def extra_repr(self) -> str:
        return f'rate={self.rate:g}'
