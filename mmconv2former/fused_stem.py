"""The convolutional stem with hand-written gradients.

It is convolution, GELU, batch norm, twice, and a convolution of patches.

On GPUs in 16 bits all of it is replaced. cuDNN is slow with 3 and with 36
channels, which it pads in a pass of its own for each call, and torch's batch
norm is ten times slower than memory at few channels. Here images and feature
maps have a multiple of 8 channels from the start, GELU is part of the passes
of the batch norm, and the last convolution is a matrix product over the
patches that the pass before it writes.

Tensors are (N, H, W, C) where nothing else is said.
"""
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from . import dispatch
from .dispatch import (
    is_gelu,
    is_plain,
    log_once,
    product_dtype,
    refuse_second_derivatives,
    without_autocast,
)
from .operators import to_nchw, to_nhwc
from .torch_kernels import pad_channels

aten = torch.ops.aten


def _multiple_of_8(channels: int) -> int:
    return -(-channels // 8) * 8


def _convolution_channels(channels: int) -> int:
    """As many channels as cuDNN is fast with, 3x3 at 112 x 112: gradients of
    40 and of 48 take twice as long as those of 64."""
    return _multiple_of_8(channels) if channels <= 32 else -(
        -channels // 64) * 64


def _padded_filter(weight: Tensor, outs: int, ins: int,
                   dtype: torch.dtype) -> Tensor:
    """(O, I, K, K), channels last in memory, as (outs, ins, K, K)."""
    o, i, *size = weight.shape
    out = weight.new_zeros((outs, *size, ins), dtype=dtype)
    out[:o, ..., :i] = to_nhwc(weight)
    return to_nchw(out)


def _convolution_backward(grad: Tensor, x: Tensor, padded: Tensor,
                          weight: Tensor, conv: nn.Conv2d, input_grad: bool
                          ) -> tuple[Tensor | None, Tensor]:
    grad_x, grad_weight, _ = aten.convolution_backward(
        to_nchw(grad), to_nchw(x), padded, None, conv.stride, conv.padding,
        (1, 1), False, (0, 0), 1, (input_grad, True, False))
    o, i, *_ = weight.shape
    return (to_nhwc(grad_x) if input_grad else None,
            grad_weight[:o, :i].to(weight.dtype,
                                   memory_format=torch.contiguous_format))


class StemFunction(torch.autograd.Function):
    """A stem of two convolutions with GELU and batch norm, and a third one.

    Args:
        x (Tensor): Images without gradients, (N, C, H, W).
        kernels (module): :mod:`mmconv2former.triton_kernels.stem`, or their
            reference, :mod:`mmconv2former.torch_kernels`.
        layers (Sequence[nn.Module]): Convolution, batch norm, convolution,
            batch norm, convolution.
        parameters (Tensor): The weights of the first convolution, weight and
            bias of the first norm, and so on.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, kernels: Any,
                layers: Sequence[nn.Module], *parameters: Tensor) -> Tensor:
        dtype = product_dtype(x)
        conv1, norm1, conv2, norm2, conv3 = layers
        mid1, mid2 = (_multiple_of_8(c.out_channels) for c in (conv1, conv2))
        wide1, wide2 = _convolution_channels(mid1), _convolution_channels(mid2)
        patch = conv3.stride[0]
        with without_autocast(x):
            image = kernels.pixels_first(x, _multiple_of_8(x.shape[1]), dtype)
            padded1 = _padded_filter(conv1.weight, mid1, image.shape[3], dtype)
            z1 = _convolution(image, padded1, conv1)
            moments1 = _moments(z1, norm1, kernels)
            x = kernels.gelu_norm(z1, *moments1, norm1.weight, norm1.bias, 1,
                                  wide1)
            padded2 = _padded_filter(conv2.weight, wide2, wide1, dtype)
            z2 = _convolution(x, padded2[:mid2], conv2)
            moments2 = _moments(z2, norm2, kernels)
            x = kernels.gelu_norm(z2, *moments2, norm2.weight, norm2.bias,
                                  patch, mid2)
            matrix = to_nhwc(_padded_filter(
                conv3.weight, len(conv3.weight), mid2, dtype)).flatten(1)
            out = to_nchw(F.linear(x, matrix))
        ctx.kernels, ctx.layers = kernels, layers
        ctx.training = norm1.training, norm2.training
        ctx.save_for_backward(image, z1, *moments1, padded2, z2, *moments2,
                              matrix, *parameters)
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        refuse_second_derivatives(grad)
        (image, z1, mean1, rstd1, padded2, z2, mean2, rstd2, matrix, weight1,
         scale1, bias1, weight2, scale2, bias2, weight3) = ctx.saved_tensors
        kernels, (conv1, _, conv2, _, conv3) = ctx.kernels, ctx.layers
        mid1, mid2 = z1.shape[3], z2.shape[3]
        wide2, wide1, *_ = padded2.shape
        with without_autocast(image):
            grad = to_nhwc(grad).to(image.dtype).flatten(0, 2)
            patch = conv3.stride[0]
            x = kernels.gelu_norm(z2, mean2, rstd2, scale2, bias2, patch, mid2)
            o, i, k, _ = weight3.shape
            grad_weight3 = torch.mm(grad.t(), x.flatten(0, 2)).view(
                o, k, k, -1)[..., :i]
            grad = torch.mm(grad, matrix).view(x.shape)
            del x
            grad, grad_scale2, grad_bias2 = kernels.gelu_norm_backward(
                grad, z2, mean2, rstd2, scale2, ctx.training[1], patch, wide2)
            x = kernels.gelu_norm(z1, mean1, rstd1, scale1, bias1, 1, wide1)
            grad, grad_weight2 = _convolution_backward(
                grad, x, padded2, weight2, conv2, True)
            del x
            grad, grad_scale1, grad_bias1 = kernels.gelu_norm_backward(
                grad, z1, mean1, rstd1, scale1, ctx.training[0], 1, mid1)
            # Its values are not read, for images want no gradient.
            padded1 = torch.empty(
                (mid1, image.shape[3], *weight1.shape[2:]), dtype=image.dtype,
                device=image.device, memory_format=torch.channels_last)
            _, grad_weight1 = _convolution_backward(
                grad, image, padded1, weight1, conv1, False)
        return (None, None, None, grad_weight1, grad_scale1, grad_bias1,
                grad_weight2, grad_scale2, grad_bias2,
                to_nchw(grad_weight3).to(
                    weight3.dtype, memory_format=torch.contiguous_format))


def _convolution(x: Tensor, weight: Tensor, conv: nn.Conv2d) -> Tensor:
    return to_nhwc(F.conv2d(to_nchw(x), weight, None, conv.stride,
                          conv.padding)).contiguous()


def _moments(z: Tensor, norm: nn.BatchNorm2d,
             kernels: Any) -> tuple[Tensor, Tensor]:
    """Mean and inverse standard deviation by which GELU(z) is normalized."""
    if norm.training:
        norm.num_batches_tracked.add_(1)
        return kernels.gelu_moments(z, norm.running_mean, norm.running_var,
                                    norm.eps, norm.momentum)
    dtype = torch.promote_types(z.dtype, torch.float32)
    mean, var = norm.running_mean.to(dtype), norm.running_var.to(dtype)
    return tuple(pad_channels(t, z.shape[3])
                 for t in (mean, torch.rsqrt(var + norm.eps)))


def _is_unmodified_stem(x: Tensor, layers: Sequence[nn.Module]) -> bool:
    """Whether these are layers of a stem as it was built, without hooks.

    The kernels read their parameters, and do not look how long these are.
    """
    kinds = [nn.Conv2d, nn.GELU, nn.BatchNorm2d] * 2 + [nn.Conv2d]
    if len(layers) != len(kinds) or not all(map(is_plain, layers, kinds)):
        return False
    convs, norms = layers[::3], layers[2::3]
    last, channels = convs[-1], [x.shape[1]]
    for conv, norm in zip(convs, norms):
        channels.append(conv.out_channels)
        if not dispatch.has_usual_moments(norm) or not all(
                dispatch.is_readable(t, x.device)
                and t.shape == (conv.out_channels, ) and t.is_contiguous()
                for t in (norm.weight, norm.bias, norm.running_mean,
                          norm.running_var)):
            return False
    return (all(map(is_gelu, layers[1::3]))
            and all(dispatch.is_readable(conv.weight, x.device)
                    and conv.weight.shape == (conv.out_channels, ins,
                                              *conv.kernel_size)
                    for conv, ins in zip(convs, channels))
            and all(conv.bias is None and conv.groups == 1
                    and conv.dilation == (1, 1)
                    and conv.padding_mode == 'zeros'
                    and not isinstance(conv.padding, str) for conv in convs)
            and last.padding == (0, 0)
            and last.stride == last.kernel_size == last.stride[::-1])


def available(x: Tensor, layers: nn.Sequential) -> bool:
    """Whether :func:`stem` can stand in for ``layers(x)``.

    Args:
        x (Tensor): Images, (N, C, H, W).
        layers (nn.Sequential): The stem.

    Returns:
        bool: On GPUs with Triton, in 16 bits, for the stem as it was built.
    """
    # Only where Triton's functions are called directly: the stem's kernels are
    # not registered as operators of torch.
    if not x.is_cuda or torch.compiler.is_compiling() \
            or dispatch.find_obstacle(x) or dispatch.kernels_for(
                x) is not getattr(dispatch.TRITON, 'functions', None):
        return False
    obstacle = ''
    if product_dtype(x).itemsize != 2:
        obstacle = 'it computes in more than 16 bits'
    elif x.shape[1] > 16:  # pixels_first holds those of a pixel at once
        obstacle = f'images have {x.shape[1]} channels'
    elif x.requires_grad:
        obstacle = 'images have gradients'
    elif not _is_unmodified_stem(x, list(layers)):
        obstacle = 'it is of other layers, or they have hooks'
    if obstacle:
        log_once(f'plain operators of the stem, because {obstacle}')
    return not obstacle


def stem(x: Tensor, layers: nn.Sequential) -> Tensor:
    """``layers(x)`` by the kernels.

    Args:
        x (Tensor): Images, (N, C, H, W).
        layers (nn.Sequential): The stem.

    Returns:
        Tensor: (N, C', H', W'), in channels-last memory.
    """
    from .triton_kernels import stem as kernels

    conv1, _, norm1, conv2, _, norm2, conv3 = layers
    return StemFunction.apply(
        x, kernels, (conv1, norm1, conv2, norm2, conv3), conv1.weight,
        norm1.weight, norm1.bias, conv2.weight, norm2.weight, norm2.bias,
        conv3.weight)
