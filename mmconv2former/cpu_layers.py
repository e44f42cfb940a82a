"""Layers of torch that CPUs do better by other means.

Batch norm and GELU of feature maps whose channels are last in memory, for
which torch takes about twice as long, and convolutions that it gets wrong.
"""
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from . import dispatch
from .dispatch import is_plain, refuse_second_derivatives
from .operators import to_nchw, to_nhwc
from .torch_kernels import PART_BYTES, in_parts

aten = torch.ops.aten


class BatchNormFunction(torch.autograd.Function):
    """Batch norm of feature maps whose channels are last in memory.

    torch's is slow with few channels. Here it gets rows of pixels, as if each
    column of the map had channels of its own, and their moments and sums are
    put together.

    Args:
        x (Tensor): (N, C, H, W).
        norm (nn.BatchNorm2d): Whose running moments are used or updated.
        weight, bias (Tensor): Its parameters, (C, ).
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, norm: nn.BatchNorm2d, weight: Tensor,
                bias: Tensor) -> Tensor:
        rows, width = _rows(x), x.shape[3]
        dtype = torch.promote_types(x.dtype, torch.float32)
        if norm.training:
            norm.num_batches_tracked.add_(1)
            count = x[:, 0].numel()
            # Running moments of that type, not changed, for results of it.
            running = rows.new_zeros(rows.shape[1], dtype=dtype)
            means, variances = (
                t.view(width, -1) for t in torch.batch_norm_update_stats(
                    rows, running, running, 0.))
            mean = means.mean(0)
            var = (variances + (means - mean).square_()).mean(0)
            norm.running_mean.lerp_(mean.to(norm.running_mean), norm.momentum)
            norm.running_var.lerp_(
                (var * (count / (count - 1))).to(norm.running_var),
                norm.momentum)
        else:
            mean, var = (t.to(dtype)
                         for t in (norm.running_mean, norm.running_var))
        ctx.training = norm.training
        ctx.save_for_backward(x, mean, torch.rsqrt(var + norm.eps), weight)
        out, _, _ = aten.native_batch_norm(
            rows, *(t.to(dtype).repeat(width)
                    for t in (weight, bias, mean, var)), False, 0., norm.eps)
        return _from_rows(out, x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        refuse_second_derivatives(grad)
        x, mean, rstd, weight = ctx.saved_tensors
        grad, rows, width = _rows(grad), _rows(x), x.shape[3]
        _, *sums = aten.native_batch_norm_backward(
            grad, rows, None, None, None, mean.repeat(width),
            rstd.repeat(width), True, 0., (False, True, True))
        grad_weight, grad_bias = (t.view(width, -1).sum(0) for t in sums)
        scale = (rstd * weight).repeat(width)
        if ctx.training:  # through the moments
            share = scale / -x[:, 0].numel()
            slope = share * (rstd * grad_weight).repeat(width)
            shift = torch.addcmul(share * grad_bias.repeat(width), slope,
                                  mean.repeat(width), value=-1)
        out = torch.empty_like(grad)
        for grad_part, part, out_part in in_parts(scale.nbytes, PART_BYTES,
                                                  grad, rows, out):
            grad_part = grad_part.to(scale.dtype)
            if ctx.training:
                out_part.copy_(
                    torch.addcmul(shift, grad_part, scale).addcmul_(
                        part.to(scale.dtype), slope))
            else:
                out_part.copy_(grad_part * scale)
        return _from_rows(out, x), None, grad_weight, grad_bias


def _rows(x: Tensor) -> Tensor:
    """(N, C, H, W) -> (N * H, W * C)."""
    return to_nhwc(x).contiguous().flatten(0, 1).flatten(1)


def _from_rows(rows: Tensor, x: Tensor) -> Tensor:
    """The inverse of :func:`_rows`, in the shape of x."""
    return to_nchw(rows.view(to_nhwc(x).shape))


def batch_norm(x: Tensor, norm: nn.BatchNorm2d) -> Tensor:
    """``norm(x)``, of which CPUs compute the gradients faster.

    Args:
        x (Tensor): (N, C, H, W).
        norm (nn.BatchNorm2d): The layer.

    Returns:
        Tensor: (N, C, H, W).
    """
    # In this order: a trace would hold the numbers that are compared last.
    # The replacement overwrites what a mode may keep.
    if not torch.is_grad_enabled() or dispatch.has_dispatch_mode() \
            or not _can_replace(x, norm, nn.BatchNorm2d) \
            or not dispatch.has_usual_moments(norm) \
            or x.numel() == x.shape[1]:
        return norm(x)
    return BatchNormFunction.apply(x, norm, norm.weight, norm.bias)


def gelu(x: Tensor, layer: nn.GELU) -> Tensor:
    """``layer(x)``, which takes half as long where torch asks oneDNN for it.

    Args:
        x (Tensor): (N, C, H, W), in channels-last memory.
        layer (nn.GELU): The layer.

    Returns:
        Tensor: (N, C, H, W).
    """
    if not _can_replace(x, layer, nn.GELU):
        return layer(x)
    # It does so for what it calls contiguous.
    return to_nchw(layer(to_nhwc(x)))


def convolution(x: Tensor, layer: nn.Conv2d) -> Tensor:
    """``layer(x)``, by other means where torch gets it wrong in bf16.

    On CPUs with AMX, torch 2.11 (oneDNN 3.10) gets two kinds wrong. Where the
    result is one pixel wide
    (https://github.com/pytorch/pytorch/issues/163347), it is computed two
    pixels wide and cut. Where 4 to 24 channels meet a kernel of 4 columns or
    more, some are wrong, and all are computed in fp32. Other CPUs do the same,
    so that results do not depend on the CPU.

    Args:
        x (Tensor): (N, C, H, W).
        layer (nn.Conv2d): The layer.

    Returns:
        Tensor: (N, C', H', W').
    """
    if dispatch.autocast_dtype(x) != torch.bfloat16 \
            or not _can_replace(x, layer, nn.Conv2d) \
            or layer.padding_mode != 'zeros':
        return layer(x)
    if layer.kernel_size[1] > 3 and 3 < layer.in_channels <= 24:
        with dispatch.without_autocast(x):
            x, weight, bias = (
                t if t is None else t.float()
                for t in (x, layer.weight, layer.bias))
            out = F.conv2d(x, weight, bias, layer.stride, layer.padding,
                           layer.dilation, layer.groups)
        return out.bfloat16()
    out = layer(x)
    if out.shape[3] > 1:
        return out
    # With zeros for another column of the result, which is cut off.
    out = layer(F.pad(x, (0, layer.stride[1])))
    return dispatch.channels_last(out[..., :1])


def _can_replace(x: Tensor, layer: nn.Module, kind: type) -> bool:
    """Whether a layer on a CPU need not be called with x itself."""
    return (x.device.type == 'cpu' and is_plain(layer, kind)
            and not torch.compiler.is_compiling()
            and not dispatch.find_obstacle(x))
