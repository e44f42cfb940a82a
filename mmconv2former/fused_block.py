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

Tensors are (N, H, W, C).
"""
from collections.abc import Iterable, Sequence
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn

from . import dispatch
from .dispatch import (
    autocast_dtype,
    product_dtype,
    refuse_second_derivatives,
    without_autocast,
)
from .operators import LayerNorm2d, at_least_fp32
from .products import (
    linear,
    linear_grad_input,
    linear_grad_params,
    onednn_linear,
    onednn_takes,
)
from .torch_kernels import PART_BYTES, in_parts


def _hidden_bytes(x: Tensor, in_weight: Tensor, dtype: torch.dtype) -> int:
    """Size of the output of the first linear layers for one sample."""
    return x.shape[1] * x.shape[2] * len(in_weight) * dtype.itemsize


def _whole(parts: Sequence[Tensor]) -> Tensor:
    """The batch of these parts."""
    return parts[0] if len(parts) == 1 else torch.cat(parts)


def _folds_scale(x: Tensor, dtype: torch.dtype) -> bool:
    """Whether the last weight has the layer scale in it for its gradients.

    That saves a pass over the gradient, and costs a copy of the weight, which
    GPUs make anyway for its precision. fp16's numbers end above 1e-6 * 0.02.
    """
    return x.is_cuda and dtype != torch.float16


def _branch_backward(
        middle: str, eps: float, grad: Tensor, x: Tensor, keep: Tensor | None,
        *stored: Tensor, norm_weight: Tensor, norm_bias: Tensor,
        in_weight: Tensor, dw_weight: Tensor, dw_bias: Tensor, weight: Tensor,
        scale: Tensor) -> tuple[Tensor, ...]:
    """Gradients of :class:`ResidualBranchFunction`, without its layer scale's.

    The scale counts as part of the last linear layer, from whose gradients
    ``scaled_linear_backward`` has its own. ``weight`` is that layer's, times
    the scale where :func:`_folds_scale` says so.

    Returns:
        tuple[Tensor]: Gradients of x and, at least in fp32, of weight and
        bias of the norm, of the first linear layers, of the convolution and,
        as if the scale were 1, of the last layer.
    """
    kernels, dtype = dispatch.kernels_for(x), weight.dtype
    if keep is None:
        grad_y, grad_bias = grad.to(dtype), None
    else:
        grad_y, grad_bias = kernels.drop_backward(grad, keep, dtype)
    grad_middle, folded = grad_y, _folds_scale(x, dtype)
    if not folded:
        grad_middle, grad_bias = kernels.scale_backward(grad_y, scale)
    grad_middle = linear_grad_input(grad_middle, weight)
    middle_backward = kernels.gate_backward if middle == 'gate' \
        else kernels.position_backward
    grad_z, grad_dw_weight, grad_dw_bias, y, grad_in_bias = middle_backward(
        grad_middle, *stored, dw_weight, dw_bias)
    del grad_middle, stored
    # Where no pass has summed up the gradient yet, that of the norm does.
    sum_comes_later = folded and keep is None
    if not sum_comes_later:
        grads = linear_grad_params(grad_y, y, grad_bias)
        del y, grad_y
    grad_x, grad_norm_weight, grad_norm_bias, normed, grad_sum = (
        kernels.layer_norm_backward(
            linear_grad_input(grad_z, in_weight), x, norm_weight, norm_bias,
            eps, grad))
    if sum_comes_later:
        grads = linear_grad_params(grad_y, y, grad_sum)
        del y, grad_y
    return (grad_x, grad_norm_weight, grad_norm_bias,
            *linear_grad_params(grad_z, normed, grad_in_bias), grad_dw_weight,
            grad_dw_bias, *grads)


class ResidualBranchFunction(torch.autograd.Function):
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
        dtype, asked = product_dtype(x), autocast_dtype(x)
        kernels = dispatch.kernels_for(x)
        with without_autocast(x):
            in_weight, in_bias, dw_weight, dw_bias, weight, bias, *scaled = (
                kernels.operands(parameters, dtype,
                                 scale if _folds_scale(x, dtype) else None))
            z = linear(
                kernels.layer_norm(x, norm_weight, norm_bias, eps, dtype),
                in_weight, in_bias)
            if middle == 'gate':
                y, *stored = kernels.gate_forward(z, dw_weight, dw_bias)
                y = linear(y, weight, bias)
            else:
                stored, parts = [], in_parts(
                    _hidden_bytes(x, in_weight, dtype), PART_BYTES, z)
                y = _whole([
                    linear(
                        kernels.position(part, dw_weight, dw_bias), weight,
                        bias) for part, in parts])
            out = kernels.scale_residual(x, y, scale, keep)
        ctx.eps, ctx.middle = eps, middle
        ctx.shapes = [p.shape for p in parameters]
        ctx.save_for_backward(x, norm_weight, norm_bias, in_weight, dw_weight,
                              dw_bias, *(scaled or [weight]),
                              *parameters[-2:], scale, keep,
                              # Where the CPU emulates that type.
                              *(t.to(asked) for t in (z, *stored)))
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        refuse_second_derivatives(grad)
        (x, norm_weight, norm_bias, in_weight, dw_weight, dw_bias, weight,
         out_weight, out_bias, scale, keep, *stored) = ctx.saved_tensors
        outs, totals = [], None
        with without_autocast(x):
            # Parts that are no smaller than the gradients that they add to.
            size = max(PART_BYTES, 4 * in_weight.nbytes)
            parts = in_parts(_hidden_bytes(x, in_weight, weight.dtype), size,
                           grad.contiguous(), x, keep, *stored)
            for part in parts:
                out, *grads = _branch_backward(
                    ctx.middle, ctx.eps, *part, norm_weight=norm_weight,
                    norm_bias=norm_bias, in_weight=in_weight,
                    dw_weight=dw_weight, dw_bias=dw_bias, weight=weight,
                    scale=scale)
                outs.append(out)
                if len(parts) > 1:
                    grads = list(map(at_least_fp32, grads))
                if totals is None:
                    totals = grads
                else:
                    torch._foreach_add_(totals, grads)
            (grad_norm_weight, grad_norm_bias, grad_in_weight, grad_in_bias,
             grad_dw_weight, grad_dw_bias, *grads) = totals
            grad_weight, grad_bias, grad_scale = (
                dispatch.kernels_for(x).scaled_linear_backward(
                    *grads, out_weight.flatten(1), out_bias, scale))
            grad_x = _whole(outs)
        sizes = [shape[0] for shape in ctx.shapes[:-4:2]]
        pairs = zip(
            at_least_fp32(grad_in_weight).split_with_sizes(sizes),
            grad_in_bias.split_with_sizes(sizes))
        grads = [
            *chain(*pairs), grad_dw_weight, grad_dw_bias, grad_weight,
            grad_bias
        ]
        return (grad_x, grad_norm_weight, grad_norm_bias, grad_scale, None,
                None, None, *map(Tensor.view, grads, ctx.shapes))


def residual_branch(x: Tensor, norm: LayerNorm2d, layers: Iterable[nn.Module],
                    scale: Tensor, keep: Tensor | None,
                    middle: str) -> Tensor:
    """A residual branch of a block, with less work where gradients are off.

    Args:
        norm (LayerNorm2d): The layer norm.
        layers (Iterable[nn.Module]): The layers with the parameters that
            :class:`ResidualBranchFunction` takes.
        x, scale, keep, middle: Those of :class:`ResidualBranchFunction`.

    Returns:
        Tensor: (N, H, W, C).
    """
    parameters = [p for layer in layers for p in (layer.weight, layer.bias)]
    if torch.is_grad_enabled():
        return ResidualBranchFunction.apply(x, norm.weight, norm.bias, scale,
                                            keep, norm.eps, middle,
                                            *parameters)
    weight, bias = parameters[-2:]
    if keep is None and x.device.type == 'cpu' and x.numel() > weight.numel() \
            and product_dtype(x) == torch.bfloat16:
        # The weight is copied for its type anyway, and the product adds x.
        parameters[-2:] = weight.flatten(1) * scale[:, None], bias * scale
        scale = None
    return infer(x, norm.weight, norm.bias, scale, keep, norm.eps, middle,
                 prepare(x, parameters))


def prepare(x: Tensor, parameters: Sequence[Tensor],
            pack: bool = False) -> list[Tensor]:
    """Weights of a branch as :func:`infer` takes them.

    Args:
        x (Tensor): Of the type and on the device of the inputs.
        parameters (Sequence[Tensor]): Those of
            :class:`ResidualBranchFunction`, or with one layer in place of the
            first ones.
        pack (bool): Whether to spend time and memory for the sake of many
            calls to come. Defaults to False.

    Returns:
        list[Tensor]: In the precision of the products.
    """
    dtype = product_dtype(x)
    with without_autocast(x):
        weights = dispatch.kernels_for(x).operands(parameters, dtype)
    if pack and onednn_takes(x.device, dtype):
        in_weight, in_bias, *filters, weight, bias = weights
        in_weight, weight = map(torch.ops.mkldnn._reorder_linear_weight,
                                (in_weight, weight))
        weights = [in_weight, in_bias, *filters, weight, bias]
    return weights


def infer(x: Tensor, norm_weight: Tensor | None, norm_bias: Tensor | None,
          scale: Tensor | None, keep: Tensor | None, eps: float, middle: str,
          weights: Sequence[Tensor]) -> Tensor:
    """:class:`ResidualBranchFunction` without gradients.

    Args:
        norm_weight, norm_bias, scale (Tensor, optional): None for ones and
            zeros.
        weights (Sequence[Tensor]): From :func:`prepare`.
        x, keep, eps, middle: Those of :class:`ResidualBranchFunction`.

    Returns:
        Tensor: (N, H, W, C).
    """
    dtype, kernels = product_dtype(x), dispatch.kernels_for(x)
    # A bias for a weight, which may be rearranged.
    parts = in_parts(_hidden_bytes(x, weights[1], dtype), PART_BYTES, x, keep)
    if len(parts) > 1:
        return torch.cat([
            infer(part, norm_weight, norm_bias, scale, keep_part, eps, middle,
                  weights) for part, keep_part in parts])
    with without_autocast(x):
        y = kernels.layer_norm(x, norm_weight, norm_bias, eps, dtype)
        kernel = kernels.gate if middle == 'gate' else kernels.position
        y = kernel(linear(y, *weights[:2]), *weights[2:4])
        if scale is not None:
            y = linear(y, *weights[4:])
            return kernels.scale_residual(x, y, scale, keep)
        if x.dtype == dtype and onednn_takes(x.device, dtype):
            return onednn_linear(y, *weights[4:], residual=x)
        return linear(y, *weights[4:]).to(x.dtype).add_(x)
