"""A block with hand-written gradients.

Its residual branches have one form,

    x + keep * scale * linear(middle(linear(layer_norm(x)))),

where the middle is ``gate`` for convolutional modulation, [z|v] ->
DW_k(GELU(z)) * v, and ``position`` for the MLP, z -> h + GELU(DW_3(h)) with
h = GELU(z). One kernel adds the first branch to x and normalises the sum for
the second; its backward pass also gives the gradients of the first branch.

On the plain path, in :mod:`mmconv2former.backbone`, autograd stores what each
operator read, some 27 tensors of the size of x in a block. Here 9 are stored,
the inputs of the branches and of their middles and the output of the large
depthwise convolution. All else is computed once more in the backward pass,
where it is cheap beside the matrix products.

Tensors are (N, H, W, C).
"""
from collections.abc import Sequence
from itertools import chain
from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import dispatch
from .dispatch import (
    autocast_dtype,
    product_dtype,
    refuse_second_derivatives,
    without_autocast,
)
from .operators import at_least_fp32
from .products import (
    linear,
    linear_grad_bias,
    linear_grad_input,
    linear_grad_params,
    linear_grad_weight,
    onednn_linear,
    onednn_takes,
)
from .torch_kernels import PART_BYTES, in_parts


class Branch(NamedTuple):
    """What a residual branch consists of, but for its middle.

    Attributes:
        norm_weight, norm_bias (Tensor, optional): Of the layer norm, (C, );
            for :func:`infer` also None for ones and zeros.
        eps (float): Of the layer norm.
        weights (Sequence[Tensor]): Weight and bias of each layer: of the first
            linear layers, whose outputs stand side by side (two of (C, C) for
            'gate', one of (O, C) for 'position'), of the depthwise
            convolution, and of the last linear layer, (C, C) or (C, O).
            Linear layers may be 1x1 convolutions. For :func:`infer`, one of
            the two lists that :func:`prepare` returns.
        scale (Tensor, optional): Layer scale, (C, ); for :func:`infer` also
            None for ones. Defaults to None.
        keep (Tensor, optional): Drop path, (N, 1, 1, 1). Defaults to None,
            ones.
    """
    norm_weight: Tensor | None
    norm_bias: Tensor | None
    eps: float
    weights: Sequence[Tensor]
    scale: Tensor | None = None
    keep: Tensor | None = None


class _Saved(NamedTuple):
    """What the backward pass takes of the parameters of a branch."""
    norm_weight: Tensor
    norm_bias: Tensor
    scale: Tensor
    # In the precision of the products; the last times the scale where
    # :func:`_folds_scale` says so.
    in_weight: Tensor
    dw_weight: Tensor
    dw_bias: Tensor
    weight: Tensor
    # Parameters of the last layer.
    out_weight: Tensor
    out_bias: Tensor


_SAVED = len(_Saved._fields)


def _hidden_bytes(x: Tensor, channels: int, dtype: torch.dtype) -> int:
    """Size of so many channels of one sample."""
    return x.shape[1] * x.shape[2] * channels * dtype.itemsize


def _whole(parts: Sequence[Tensor]) -> Tensor:
    """The batch of these parts."""
    return parts[0] if len(parts) == 1 else torch.cat(parts)


def _folds_scale(x: Tensor, dtype: torch.dtype) -> bool:
    """Whether the last weight has the layer scale in it for its gradients.

    That saves a pass over the gradient, and costs a copy of the weight, which
    GPUs make anyway for its precision. Not in fp16, whose least number is
    6e-8: a layer scale of 1e-6 times a weight of 0.02 is less.
    """
    return x.is_cuda and dtype != torch.float16


class _LastGrads(NamedTuple):
    """Gradients of y, the output of a last layer, in x + keep * scale * y.

    Attributes:
        unscaled (Tensor): As if the scale were 1, (N, H, W, C).
        scaled (Tensor): As it is, (N, H, W, C).
        total (Tensor, optional): Sum of the first over all positions, (C, ),
            if a kernel has taken it.
        is_own (bool): Whether there was anything to compute for these. If
            not, both are the gradient of the sum, and the total is taken by
            the backward pass of the norm, which reads that as its residual.
    """
    unscaled: Tensor
    scaled: Tensor
    total: Tensor | None
    is_own: bool


def _last_grads(grad: Tensor, is_own: bool, unscaled: Tensor, scaled: Tensor,
                total: Tensor | None) -> _LastGrads:
    """From what ``scale_residual_backward`` returns, where tensors without
    elements stand for those that they would repeat."""
    unscaled = unscaled if unscaled.numel() else grad
    scaled = scaled if scaled.numel() else unscaled
    return _LastGrads(unscaled, scaled, total, is_own)


def _bias_grad(last: _LastGrads, total: Tensor | None) -> Tensor:
    """Gradient of the bias of the last layer; ``total`` is what the backward
    pass of the norm has summed up, if it was asked to."""
    total = last.total if last.is_own else total
    return linear_grad_bias(last.unscaled) if total is None else total


def _has_own_grad(grad: Tensor, scale: Tensor | None, keep: Tensor | None,
                  dtype: torch.dtype) -> bool:
    """Whether y in x + keep * scale * y has other gradients than the sum."""
    return scale is not None or keep is not None or grad.dtype != dtype


def _block_backward(
        kernels: Any, grad: Tensor, x: Tensor, mlp_x: Tensor,
        keep: Tensor | None, mlp_keep: Tensor | None, zv: Tensor, a: Tensor,
        z: Tensor, eps: tuple[float, float], modulation: _Saved,
        mlp: _Saved) -> tuple[Tensor, list[Tensor], list[Tensor]]:
    """Gradients of :class:`BlockFunction`, without those of the layer scales.

    A scale counts as part of the last linear layer, from whose gradients
    ``scaled_linear_backward`` has its own. Sums over positions, which are the
    gradients of all that is no matrix, are not read here.

    Returns:
        tuple: The gradient of x and, for convolutional modulation and the
        MLP, those of weight and bias of the norm, of the first linear layers,
        of the convolution and, as if the scale were 1, of the last layer, at
        least in fp32.
    """
    dtype = mlp.weight.dtype
    scale, mlp_scale = (None if _folds_scale(x, dtype) else branch.scale
                        for branch in (modulation, mlp))
    last = _LastGrads(grad, grad, None, False)
    if _has_own_grad(grad, mlp_scale, mlp_keep, dtype):
        last = _last_grads(grad, True, *kernels.scale_residual_backward(
            grad, mlp_scale, mlp_keep, dtype))
    grad, last, mlp_grads = _mlp_backward(kernels, grad, last, mlp_x, z,
                                          eps[1], mlp, scale, keep)
    grad, modulation_grads = _modulation_backward(kernels, grad, last, x, zv,
                                                  a, eps[0], modulation)
    return grad, modulation_grads, mlp_grads


def _mlp_backward(
        kernels: Any, grad: Tensor, last: _LastGrads, x: Tensor, z: Tensor,
        eps: float, mlp: _Saved, scale: Tensor | None, keep: Tensor | None
) -> tuple[Tensor, _LastGrads, list[Tensor]]:
    """The MLP's part, with what is next in line: scale and drop path of the
    branch before it, of which x is the sum."""
    dtype = mlp.weight.dtype
    grad_z, *dw_grads, y, grad_in_bias = kernels.position_backward(
        linear_grad_input(last.scaled, mlp.weight), z, mlp.dw_weight,
        mlp.dw_bias)
    grad_weight = linear_grad_weight(last.unscaled, y)
    del y  # before there are others as large
    (grad, grad_norm_weight, grad_norm_bias, normed, total, *before) = (
        kernels.scale_residual_norm_backward(
            linear_grad_input(grad_z, mlp.in_weight), x, mlp.norm_weight,
            mlp.norm_bias, eps, grad, scale, keep, dtype,
            sums_residual=not last.is_own))
    grads = [
        grad_norm_weight, grad_norm_bias,
        *linear_grad_params(grad_z, normed, grad_in_bias), *dw_grads,
        grad_weight, _bias_grad(last, total)]
    is_own = _has_own_grad(grad, scale, keep, dtype)
    return grad, _last_grads(grad, is_own, *before), grads


def _modulation_backward(
        kernels: Any, grad: Tensor, last: _LastGrads, x: Tensor, zv: Tensor,
        a: Tensor, eps: float,
        modulation: _Saved) -> tuple[Tensor, list[Tensor]]:
    """The part of convolutional modulation."""
    grad_zv, *dw_grads, y, grad_in_bias = kernels.gate_backward(
        linear_grad_input(last.scaled, modulation.weight), zv, a,
        modulation.dw_weight, modulation.dw_bias)
    grad_weight = linear_grad_weight(last.unscaled, y)
    del y
    grad, grad_norm_weight, grad_norm_bias, normed, total = (
        kernels.layer_norm_backward(
            linear_grad_input(grad_zv, modulation.in_weight), x,
            modulation.norm_weight, modulation.norm_bias, eps, grad,
            sums_residual=not last.is_own))
    return grad, [
        grad_norm_weight, grad_norm_bias,
        *linear_grad_params(grad_zv, normed, grad_in_bias), *dw_grads,
        grad_weight, _bias_grad(last, total)]


def _parameter_grads(shapes: Sequence[torch.Size], grads: Sequence[Tensor],
                     last: Sequence[Tensor]) -> list[Tensor]:
    """What :func:`_block_backward` has of a branch in the shapes and the order
    of the parameters, with the gradients of the last layer and the layer scale
    in place of its own."""
    (grad_norm_weight, grad_norm_bias, grad_in_weight, grad_in_bias,
     grad_dw_weight, grad_dw_bias, *_) = grads
    grad_weight, grad_bias, grad_scale = last
    sizes = [shape[0] for shape in shapes[3:-4:2]]
    pairs = zip(
        at_least_fp32(grad_in_weight).split_with_sizes(sizes),
        grad_in_bias.split_with_sizes(sizes))
    found = (grad_norm_weight, grad_norm_bias, grad_scale, *chain(*pairs),
             grad_dw_weight, grad_dw_bias, grad_weight, grad_bias)
    # Vectors have their shape, and a view costs a microsecond.
    return [g if g.ndim == 1 else g.view(shape)
            for g, shape in zip(found, shapes, strict=True)]


class BlockFunction(torch.autograd.Function):
    """The residual branches of a block, one after the other.

    Args:
        x (Tensor): (N, H, W, C).
        keep, mlp_keep (Tensor, optional): Drop path of the branches,
            (N, 1, 1, 1).
        eps (tuple[float]): Of their layer norms.
        count (int): How many of the parameters are those of the first branch.
        parameters (Tensor): Of convolutional modulation and then of the MLP:
            weight and bias of the norm, the layer scale, and weight and bias
            of each of the layers of a :class:`Branch`.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, keep: Tensor | None,
                mlp_keep: Tensor | None, eps: tuple[float, float], count: int,
                *parameters: Tensor) -> Tensor:
        dtype, asked = product_dtype(x), autocast_dtype(x)
        kernels, folds = dispatch.kernels_for(x), _folds_scale(x, dtype)
        branches = parameters[:count], parameters[count:]
        (*norm, scale), (*mlp_norm, mlp_scale) = (p[:3] for p in branches)
        with without_autocast(x):
            weights, mlp_weights = kernels.operands(
                [p[3:] for p in branches], dtype,
                (scale, mlp_scale) if folds else (None, None))
            normed = kernels.layer_norm(x, *norm, eps[0], dtype)
            zv = linear(normed, *weights[:2])
            del normed
            y, a = kernels.gate_forward(zv, *weights[2:4])
            y = linear(y, *weights[4:6])
            mlp_x, normed = kernels.scale_residual_norm(
                x, y, scale, keep, *mlp_norm, eps[1], dtype)
            del y
            z = linear(normed, *mlp_weights[:2])
            del normed
            parts = in_parts(_hidden_bytes(x, z.shape[3], dtype), PART_BYTES,
                             z)
            y = _whole([
                linear(kernels.position(part, *mlp_weights[2:4]),
                       *mlp_weights[4:6]) for part, in parts])
            out = kernels.scale_residual(mlp_x, y, mlp_scale, mlp_keep)
        ctx.eps = eps
        ctx.shapes = [[p.shape for p in branch] for branch in branches]
        saved = []
        for p, w in zip(branches, (weights, mlp_weights)):
            # Detached: these may be views of parameters, and torch's error
            # about one changed before the backward pass would be about views
            # instead of the change.
            matrices = w[0].detach(), w[6 if folds else 4].detach()
            saved.extend(_Saved(*p[:3], matrices[0], *w[2:4], matrices[1],
                                *p[-2:]))
        ctx.save_for_backward(*saved, x, mlp_x, keep, mlp_keep,
                              # `asked` is not `dtype` only where the CPU
                              # emulates it.
                              *(t.to(asked) for t in (zv, a, z)))
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        refuse_second_derivatives(grad)
        saved = ctx.saved_tensors
        branches = (_Saved(*saved[:_SAVED]),
                    _Saved(*saved[_SAVED:2 * _SAVED]))
        x, *others = saved[2 * _SAVED:]
        kernels, weight = dispatch.kernels_for(x), branches[1].in_weight
        outs, totals = [], None
        with without_autocast(x):
            # Parts that are no smaller than the gradients that they add to.
            size = max(PART_BYTES, 4 * weight.nbytes)
            parts = in_parts(_hidden_bytes(x, len(weight), weight.dtype), size,
                             grad.contiguous(), x, *others)
            for part in parts:
                with kernels.deferred_sums():
                    out, *grads = _block_backward(kernels, *part, ctx.eps,
                                                  *branches)
                outs.append(out)
                if len(parts) > 1:
                    grads = [list(map(at_least_fp32, g)) for g in grads]
                if totals is None:
                    totals = grads
                else:
                    torch._foreach_add_(sum(totals, []), sum(grads, []))
            last = kernels.scaled_linear_backward(
                *([grads[i] for grads in totals] for i in (-2, -1)),
                [branch.out_weight.flatten(1) for branch in branches],
                [branch.out_bias for branch in branches],
                [branch.scale for branch in branches])
            grads = map(_parameter_grads, ctx.shapes, totals,
                        (last[:3], last[3:]))
            return _whole(outs), None, None, None, None, *chain(*grads)


def fused_block(x: Tensor, modulation: Branch, mlp: Branch) -> Tensor:
    """The residual branches of a block, with less work where nothing wants
    gradients.

    Args:
        x (Tensor): (N, H, W, C).
        modulation, mlp (Branch): The branches, in this order.

    Returns:
        Tensor: (N, H, W, C).
    """
    branches = modulation, mlp
    own, others = ((b.norm_weight, b.norm_bias, b.scale, *b.weights)
                   for b in branches)
    if torch.is_grad_enabled() and any(
            t.requires_grad for t in (x, *own, *others)):
        return BlockFunction.apply(
            x, modulation.keep, mlp.keep, (modulation.eps, mlp.eps), len(own),
            *own, *others)
    branches = [_absorb_scale(x, b) for b in branches]
    prepared = prepare(x, [b.weights for b in branches])
    # The compiler of torch 2.7 knows no _replace.
    return infer(x, *(
        Branch(b.norm_weight, b.norm_bias, b.eps, weights, b.scale, b.keep)
        for b, weights in zip(branches, prepared)))


def _absorb_scale(x: Tensor, branch: Branch) -> Branch:
    """Make the layer scale part of the last layer where that costs nothing."""
    *others, weight, bias = branch.weights
    if branch.keep is not None or x.device.type != 'cpu' \
            or x.numel() <= weight.numel() \
            or product_dtype(x) != torch.bfloat16:
        return branch
    # The weight is copied for its type anyway, and the product adds x.
    scale = branch.scale
    return branch._replace(scale=None, weights=[
        *others, weight.flatten(1) * scale[:, None], bias * scale])


def prepare(x: Tensor, branches: Sequence[Sequence[Tensor]],
            pack: bool = False) -> list[list[Tensor]]:
    """Weights of the branches of a block as :func:`infer` takes them.

    Args:
        x (Tensor): Of the type and on the device of the inputs.
        branches (Sequence[Sequence[Tensor]]): For both, weight and bias of
            each of the layers of a :class:`Branch`, or with one layer in place
            of the first ones.
        pack (bool): Whether to spend time and memory for the sake of many
            calls to come. Defaults to False.

    Returns:
        list[list[Tensor]]: In the precision of the products.
    """
    dtype = product_dtype(x)
    with without_autocast(x):
        prepared = dispatch.kernels_for(x).operands(branches, dtype)
    if pack and onednn_takes(x.device, dtype):
        for weights in prepared:
            for i in 0, -2:  # of the linear layers
                weights[i] = torch.ops.mkldnn._reorder_linear_weight(
                    weights[i])
    return prepared


def infer(x: Tensor, modulation: Branch, mlp: Branch) -> Tensor:
    """:class:`BlockFunction` without gradients.

    Args:
        x (Tensor): (N, H, W, C).
        modulation, mlp (Branch): The branches, in this order.

    Returns:
        Tensor: (N, H, W, C).
    """
    dtype, kernels = product_dtype(x), dispatch.kernels_for(x)
    hidden = len(mlp.weights[1])  # of the bias: the weight may be packed
    parts = in_parts(_hidden_bytes(x, hidden, dtype), PART_BYTES, x,
                     modulation.keep, mlp.keep)
    if len(parts) > 1:
        return torch.cat([
            infer(part, modulation._replace(keep=keep),
                  mlp._replace(keep=mlp_keep))
            for part, keep, mlp_keep in parts])
    *norm, weights, scale, keep = modulation
    *mlp_norm, mlp_weights, mlp_scale, mlp_keep = mlp
    # Each y is gone, and its memory free, when there is the next.
    with without_autocast(x):
        y = linear(kernels.layer_norm(x, *norm, dtype), *weights[:2])
        y = kernels.gate(y, *weights[2:4])
        if _product_adds(x, modulation, dtype):
            x = onednn_linear(y, *weights[4:], residual=x)
            y = kernels.layer_norm(x, *mlp_norm, dtype)
        else:
            y = linear(y, *weights[4:])
            x, y = kernels.scale_residual_norm(x, y, scale, keep, *mlp_norm,
                                               dtype)
        y = linear(y, *mlp_weights[:2])
        y = kernels.position(y, *mlp_weights[2:4])
        if _product_adds(x, mlp, dtype):
            return onednn_linear(y, *mlp_weights[4:], residual=x)
        y = linear(y, *mlp_weights[4:])
        return kernels.scale_residual(x, y, mlp_scale, mlp_keep)


def _product_adds(x: Tensor, branch: Branch, dtype: torch.dtype) -> bool:
    """Whether the last product of a branch can add x itself."""
    return (branch.scale is branch.keep is None and x.dtype == dtype
            and onednn_takes(x.device, dtype))
