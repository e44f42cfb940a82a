"""The layer norm and the convolution between two stages, by our kernels."""
from typing import Any

import torch
from torch import Tensor, nn

from . import dispatch, torch_kernels
from .cpu_layers import convolution
from .dispatch import (
    autocast_dtype,
    is_plain,
    is_readable,
    log_once,
    product_dtype,
    refuse_second_derivatives,
    without_autocast,
)
from .operators import LayerNorm2d, at_least_fp32, to_nchw, to_nhwc
from .products import linear, linear_grad_input, linear_grad_params


class DownsamplingFunction(torch.autograd.Function):
    """A layer norm over the channels and a convolution of patches.

    The convolution is a matrix product over the patches, which the kernels of
    the norm write and whose gradients they read.

    Args:
        x (Tensor): (N, H, W, C).
        norm_weight, norm_bias (Tensor, optional): (C, ); None only where x
            and the convolution want no gradients.
        eps (float): Added to the variance.
        weight (Tensor): Of the convolution, (O, C, P, P), stride P.
        bias (Tensor): (O, ).
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, norm_weight: Tensor | None,
                norm_bias: Tensor | None, eps: float, weight: Tensor,
                bias: Tensor) -> Tensor:
        dtype, asked = product_dtype(x), autocast_dtype(x)
        ctx.eps, ctx.shape = eps, weight.shape
        with without_autocast(x):
            # Detached, for the error about a change before the backward pass.
            weight = to_nhwc(weight.detach()).to(
                dtype, memory_format=torch.contiguous_format).flatten(1)
            ctx.save_for_backward(x, norm_weight, norm_bias, weight)
            y = dispatch.kernels_for(x).layer_norm(
                x, norm_weight, norm_bias, eps, dtype, ctx.shape[3])
            y = linear(y, weight, bias.to(dtype))
        # In fp32 where the CPU emulates the type that is asked for. Not `.to`
        # where it is that type: torch's compiler would take what that returns
        # for a second output, and give this one's gradient to the other.
        return y if asked == dtype else y.to(asked)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        refuse_second_derivatives(grad)
        x, norm_weight, norm_bias, weight = ctx.saved_tensors
        o, c, size, _ = ctx.shape
        kernels = dispatch.kernels_for(x)
        with without_autocast(x), kernels.deferred_sums():
            grad = grad.to(weight.dtype).contiguous()
            grad_x, *norm_grads, normed, _ = kernels.layer_norm_backward(
                linear_grad_input(grad, weight), x, norm_weight, norm_bias,
                ctx.eps, None, size)
            # torch's sum takes ten times as long as memory on GPUs.
            *_, total = kernels.scale_residual_backward(grad, None, None,
                                                        grad.dtype)
            grad_weight, grad_bias = linear_grad_params(grad, normed, total)
        grad_weight = to_nchw(
            at_least_fp32(grad_weight).view(o, size, size, c))
        return grad_x, *norm_grads, None, grad_weight, grad_bias


def downsampling(x: Tensor, norm: nn.Module, conv: nn.Module) -> Tensor:
    """``conv(norm(x))``, by hand-written kernels where these can run.

    Args:
        x (Tensor): (N, C, H, W).
        norm (nn.Module): Layer norm over the channels.
        conv (nn.Module): Convolution of patches.

    Returns:
        Tensor: (N, C', H', W'), in channels-last memory.
    """
    # On GPUs torch's own norm gives each pixel 128 threads, most of them idle,
    # and under autocast reads and writes fp32.
    # Kernels are asked for, and so compiled, where nothing else is in the way.
    if dispatch.find_obstacle(x) or dispatch.kernels_for(x) is torch_kernels:
        return convolution(norm(x), conv)
    is_unmodified = _is_unmodified(x, norm, conv)
    # The backward pass of the norm reads its weight.
    lacks_weight = is_unmodified and norm.weight is None \
        and torch.is_grad_enabled() and any(
            t.requires_grad for t in (x, conv.weight, conv.bias))
    if not is_unmodified or lacks_weight:
        if not torch.compiler.is_compiling():
            log_once('plain operators of a downsampling, because its layers '
                     'were replaced or have hooks, or its norm no weight')
        return convolution(norm(x), conv)
    return to_nchw(
        DownsamplingFunction.apply(to_nhwc(x), norm.weight, norm.bias,
                                   norm.eps, conv.weight, conv.bias))


def _is_unmodified(x: Tensor, norm: nn.Module, conv: nn.Module) -> bool:
    c, device = x.shape[1], x.device
    return (is_plain(norm, LayerNorm2d) and is_plain(conv, nn.Conv2d)
            and norm.normalized_shape == (c, )
            and (norm.weight is None) == (norm.bias is None)
            and all(p is None or is_readable(p, device) and p.shape == (c, )
                    for p in (norm.weight, norm.bias))
            and is_readable(conv.weight, device)
            and is_readable(conv.bias, device) and conv.groups == 1
            and conv.weight.shape == (len(conv.bias), c, *conv.stride)
            and conv.dilation == (1, 1) and conv.padding == (0, 0)
            and conv.stride == conv.stride[::-1])
