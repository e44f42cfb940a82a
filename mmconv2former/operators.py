"""Operators of the Conv2Former block, written plainly.

They are the reference of the fused path, :mod:`mmconv2former.fused_block`,
and what is exported.
"""
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def to_nchw(x: Tensor) -> Tensor:
    """(N, H, W, C) -> (N, C, H, W), a view."""
    return x.permute(0, 3, 1, 2)


def to_nhwc(x: Tensor) -> Tensor:
    """(N, C, H, W) -> (N, H, W, C), a view."""
    return x.permute(0, 2, 3, 1)


def at_least_fp32(x: Tensor) -> Tensor:
    """x, in fp32 if its type has fewer than 32 bits."""
    return x.float() if x.dtype.itemsize < 4 else x


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


def add_position(z: Tensor, depthwise: Callable[[Tensor], Tensor]) -> Tensor:
    """The middle of the MLP: ``h + GELU(DW_3(h))`` with ``h = GELU(z)``.

    The paper does not mention the 3x3 convolution; the official code has it.

    Args:
        z (Tensor): Output of the first linear layer, (N, C, H, W).
        depthwise (Callable): DW_3, which keeps the shape.

    Returns:
        Tensor: (N, C, H, W).
    """
    h = F.gelu(z)
    return h + F.gelu(depthwise(h))


class LayerNorm2d(nn.LayerNorm):
    """Layer normalisation over the channels of each position.

    A subclass of ``nn.LayerNorm``, so that rules which ask for norm layers
    (weight decay, freezing) find it.

    Args:
        num_channels (int): Channels of the input.
        eps (float): Added to the variance. Defaults to 1e-6, the official
            value.
        affine (bool): Whether there are a weight and a bias. Defaults to
            True.
    """

    def __init__(self, num_channels: int, eps: float = 1e-6,
                 affine: bool = True) -> None:
        super().__init__(num_channels, eps=eps, elementwise_affine=affine)

    def forward(self, x: Tensor) -> Tensor:
        """(N, C, H, W) -> (N, C, H, W), in channels-last memory."""
        x = to_nhwc(x)
        if x.device.type == 'cpu' and torch.is_grad_enabled() \
                and not torch.jit.is_tracing():
            # On CPUs the gradients of the parameters are summed in the
            # precision of x: in bf16 they are wrong by a third over 50,000
            # positions.
            wide, weight, bias = (
                t if t is None else at_least_fp32(t)
                for t in (x, self.weight, self.bias))
            out = F.layer_norm(wide, self.normalized_shape, weight, bias,
                               self.eps)
            return to_nchw(out.to(x.dtype))
        return to_nchw(super().forward(x))


class Pointwise(nn.Conv2d):
    """1x1 convolution, as the matrix product that it is.

    Args:
        in_channels (int): Channels of the input.
        out_channels (int): Channels of the output.
        kernel_size (int | tuple[int]): 1. Defaults to 1.
        kwargs: As for ``nn.Conv2d``. Libraries such as peft make layers of the
            class of one that they find by its arguments.

    Raises:
        ValueError: If it would be another convolution.
    """

    def __init__(self, in_channels: int, out_channels: int,
                 kernel_size: int | tuple[int, int] = 1, *args: Any,
                 **kwargs: Any) -> None:
        super().__init__(in_channels, out_channels, kernel_size, *args,
                         **kwargs)
        if self.kernel_size != (1, 1) or self.stride != (1, 1) \
                or self.padding != (0, 0) or self.groups != 1:
            raise ValueError('Pointwise is a 1x1 convolution without stride, '
                             f'padding or groups, got {self}')

    def forward(self, x: Tensor) -> Tensor:
        """(N, C, H, W) -> (N, O, H, W)."""
        weight = self.weight.flatten(1)
        if x.device.type == 'cpu' and x.dtype == torch.float32:
            # oneDNN's; torch asks MKL for fp32 products, which on AMD is half
            # as fast. By way of the matrix the gradient gets the strides of
            # the weight; in channels-last memory it would have others, of
            # which DDP warns.
            return F.conv2d(x, weight[:, :, None, None], self.bias)
        return to_nchw(F.linear(to_nhwc(x), weight, self.bias))


class DropPath(nn.Module):
    """Stochastic depth: drop a residual branch per sample while training.

    Args:
        rate (float): Probability of dropping, in [0, 1). Defaults to 0.
    """

    def __init__(self, rate: float = 0.) -> None:
        super().__init__()
        self.rate = rate

    def factor(self, x: Tensor) -> Tensor | None:
        """Draw what each sample is multiplied with, (N, 1, ...), if any."""
        if not self.training or self.rate == 0.:
            return None
        keep = 1. - self.rate
        mask = torch.empty(
            (len(x), ) + (1, ) * (x.ndim - 1), dtype=x.dtype,
            device=x.device).bernoulli_(keep)
        return mask.div_(keep)

    def forward(self, x: Tensor) -> Tensor:
        """(N, ...) -> (N, ...); the expected value is that of the input."""
        factor = self.factor(x)
        return x if factor is None else x * factor

    def extra_repr(self) -> str:
        return f'rate={self.rate:g}'
