"""What the blocks do besides matrix products, by operators of torch.

The reference of :mod:`mmconv2former.triton_kernels` and
:mod:`mmconv2former.cpp_kernels`, whose functions have the same names, and what
runs where these cannot. The last ones, from :func:`pixels_first` on, are the
reference of :mod:`mmconv2former.triton_kernels.stem` and run in tests only:
without its kernels the stem runs its layers.

Tensors are (N, H, W, C). No function here builds a graph for autograd.
"""
from collections.abc import Callable, Iterable, Sequence
from contextlib import nullcontext
from functools import cache
from itertools import repeat

import torch
import torch.nn.functional as F
from torch import Tensor

from .depthwise import depthwise, depthwise_backward
from .operators import at_least_fp32, to_nhwc

aten = torch.ops.aten

# A context in which kernels may put off sums over positions to its end. Here
# they are taken at once.
deferred_sums = nullcontext

# Largest temporary tensor where a batch is processed in parts; that of a
# single sample may exceed it.
PART_BYTES = 2**22


@cache
def _raise_trim_threshold() -> None:
    """Have glibc keep up to 64 MB of freed memory for the next tensor.

    When a block of up to 32 MB that was mapped by itself is freed, glibc
    raises its trim threshold to twice the size of that block. The pages of
    this one are never touched. In training, ``keep_freed_memory`` of
    tools/launch.py does more.
    """
    torch.empty(2**25 - 2**16, dtype=torch.uint8, device='cpu')


def in_parts(sample_bytes: int, part_bytes: int, *tensors: Tensor | None
             ) -> list[tuple[Tensor | None, ...]]:
    """A batch in parts that need small temporary tensors; whole on GPUs.

    The C library gives large tensors back to the system when they are freed,
    and gets the memory of the next ones page by page.

    Args:
        sample_bytes (int): Size of the largest temporary tensor of one sample.
        part_bytes (int): Size that this tensor may have for a part of several
            samples.
        tensors (Tensor, optional): The batch, (N, ...) each. The first is not
            None.

    Returns:
        list[tuple]: A part of each tensor; None remains None.
    """
    x = tensors[0]
    if x.device.type != 'cpu' or torch.compiler.is_compiling():
        return [tensors]
    _raise_trim_threshold()
    samples = max(part_bytes // max(sample_bytes, 1), 1)
    if samples >= len(x):
        return [tensors]
    return list(zip(*(
        repeat(None) if t is None else t.split(samples) for t in tensors)))


def _join(groups: Iterable[Sequence[Tensor]],
          dtype: torch.dtype) -> list[Tensor]:
    """Each group of parameters as one tensor of that type, (O, ...)."""
    joined, sources, targets = [], [], []
    for group in groups:
        out = group[0]
        if len(group) > 1:
            sizes = [p.shape[0] for p in group]
            out = out.new_empty((sum(sizes), *out.shape[1:]), dtype=dtype)
            sources += group
            targets += out.split_with_sizes(sizes)
        elif out.dtype != dtype:
            sources.append(out)
            out = torch.empty_like(out, dtype=dtype)
            targets.append(out)
        joined.append(out)
    if targets:
        torch._foreach_copy_(targets, sources)
    return joined


def filters(weight: Tensor, bias: Tensor,
            dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Parameters of a depthwise convolution as the kernels read them.

    Args:
        weight (Tensor): (C, 1, k, k).
        bias (Tensor): (C, ).
        dtype (torch.dtype): Of the other operands.

    Returns:
        tuple[Tensor]: Both, of the same shapes.
    """
    return weight.to(dtype), bias.to(dtype)


def operands(branches: Sequence[Sequence[Tensor]], dtype: torch.dtype,
             scales: Sequence[Tensor | None] = (None, None)
             ) -> list[list[Tensor]]:
    """Weights and biases of the two branches of a block as the products and
    kernels take them.

    Args:
        branches (Sequence[Sequence[Tensor]]): Weight and bias of each of the
            layers of each :class:`mmconv2former.fused_block.Branch`.
        dtype (torch.dtype): Of the products.
        scales (Sequence[Tensor | None]): Layer scales, (O, ). Defaults to
            (None, None).

    Returns:
        list[list[Tensor]]: For each branch weight and bias of the first layers
        as one, (O, I) and (O, ), those of the convolution, and those of the
        last layer; with a scale also the last weight times the scale.
    """
    return join_operands(branches, dtype, scales, filters=filters)


def join_operands(branches: Sequence[Sequence[Tensor]], dtype: torch.dtype,
                  scales: Sequence[Tensor | None] = (None, None), *,
                  filters: Callable) -> list[list[Tensor]]:
    """:func:`operands` with the given :func:`filters`."""
    found = []
    for parameters, scale in zip(branches, scales, strict=True):
        *_, dw_weight, dw_bias, last_weight, last_bias = parameters
        last_weight = last_weight.flatten(1)
        in_weight, in_bias, out_weight, out_bias = _join(
            ([p.flatten(1) for p in parameters[:-4:2]], parameters[1:-4:2],
             [last_weight], [last_bias]), dtype)
        outs = [
            in_weight, in_bias, *filters(dw_weight, dw_bias, dtype),
            out_weight, out_bias
        ]
        if scale is not None:
            scaled = at_least_fp32(last_weight) * at_least_fp32(scale)[:, None]
            outs.append(scaled.to(dtype))
        found.append(outs)
    return found


def _gelu_backward(grad: Tensor, x: Tensor, out: Tensor) -> Tensor:
    """Gradient of GELU(x), written to ``out``, which may be an operand."""
    # Called by its full name, torch need not try the overload without ``out``
    # first, and format an error that says what does not fit.
    return aten.gelu_backward.grad_input(grad, x, grad_input=out)


def gate(zv: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """``DW_k(GELU(z)) * v``, convolutional modulation but for its layers.

    Args:
        zv (Tensor): [z|v], (N, H, W, 2C).
        weight (Tensor): Depthwise kernel, (C, 1, k, k), k odd.
        bias (Tensor): Bias of the depthwise convolution, (C, ).

    Returns:
        Tensor: (N, H, W, C).
    """
    return gate_forward(zv, weight, bias)[0]


def gate_forward(zv: Tensor, weight: Tensor,
                 bias: Tensor) -> tuple[Tensor, Tensor]:
    """:func:`gate`, and the output of the convolution, (N, H, W, C)."""
    z, v = zv.chunk(2, -1)
    # GELU is several times as fast on contiguous memory.
    h = aten.gelu_(z.clone(memory_format=torch.contiguous_format))
    a = depthwise(h, weight, bias)
    return a * v, a


def gate_backward(grad: Tensor, zv: Tensor, a: Tensor, weight: Tensor,
                  bias: Tensor) -> tuple[Tensor, ...]:
    """Gradients of :func:`gate`, and its result once more.

    Args:
        grad (Tensor): Gradient of the result, (N, H, W, C).
        a (Tensor): Output of the convolution, (N, H, W, C).
        zv, weight, bias (Tensor): As above. These and ``a`` may be of other
            types than the gradient.

    Returns:
        tuple[Tensor]: Gradients of zv, weight and bias (the latter two in
        fp32), the result, which the caller has not stored, and the sum of the
        first over all positions, (2C, ), which only hand-written kernels have
        at hand: None here.
    """
    # A mode may look on in the backward pass alone: the C++ kernels keep the
    # filters of bf16 in fp32.
    weight = weight.to(grad.dtype)
    grad_zv = torch.empty_like(zv, dtype=grad.dtype)
    grad_z, grad_v = grad_zv.chunk(2, -1)
    z, v = zv.to(grad.dtype).chunk(2, -1)
    z, a = z.contiguous(), a.to(grad.dtype)
    torch.mul(grad, a, out=grad_v)
    grad_a = grad * v
    h = F.gelu(z)
    grad_h, grad_weight, grad_bias = depthwise_backward(grad_a, h, weight)
    grad_z.copy_(_gelu_backward(grad_h, z, grad_h))
    return grad_zv, grad_weight, grad_bias, a * v, None


def position(z: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """``h + GELU(DW_3(h))``, ``h = GELU(z)``.

    See :func:`mmconv2former.operators.add_position`.

    Args:
        z (Tensor): (N, H, W, C).
        weight (Tensor): Depthwise kernel, (C, 1, 3, 3).
        bias (Tensor): Bias of the depthwise convolution, (C, ).

    Returns:
        Tensor: (N, H, W, C).
    """
    h = F.gelu(z)
    return aten.gelu_(depthwise(h, weight, bias)).add_(h)


def position_backward(grad: Tensor, z: Tensor, weight: Tensor,
                      bias: Tensor) -> tuple[Tensor, ...]:
    """Gradients of :func:`position`, and its result once more.

    Args:
        grad (Tensor): Gradient of the result, (N, H, W, C), which is
            overwritten.
        z, weight, bias (Tensor): As above, also of other types than the
            gradient.

    Returns:
        tuple[Tensor]: Gradients of z, weight and bias (the latter two in
        fp32), the result, which the caller has not stored, and the sum of the
        first over all positions, (C, ): None here, see
        :func:`gate_backward`.
    """
    weight, bias = filters(weight, bias, grad.dtype)
    z = z.to(grad.dtype)
    h = F.gelu(z)
    d = depthwise(h, weight, bias)
    out = F.gelu(d).add_(h)
    grad_d = _gelu_backward(grad, d, d)
    grad_h, *grads = depthwise_backward(grad_d, h, weight)
    _gelu_backward(grad_h.add_(grad), z, grad)
    return grad, *grads, out, None


def _norm_parameters(x: Tensor, *parameters: Tensor
                     | None) -> list[Tensor | None]:
    """Weight and bias as torch's layer norm takes them fastest: in the type of
    x on GPUs, at least in fp32 on CPUs, whatever the type of x."""
    return [
        p if p is None else p.to(x.dtype) if x.is_cuda else at_least_fp32(p)
        for p in parameters
    ]


def patches(x: Tensor, size: int) -> Tensor:
    """(N, H, W, C) -> (N, H // P, W // P, P * P * C), P the size.

    What does not fill a patch is left out.
    """
    n, height, width, c = x.shape
    rows, columns = height // size, width // size
    return x[:, :rows * size, :columns * size].reshape(
        n, rows, size, columns, size, c).transpose(2, 3).flatten(3)


def patches_shape(x: Tensor, size: int) -> tuple[int, ...]:
    """That of :func:`patches`."""
    n, height, width, c = x.shape
    return n, height // size, width // size, size * size * c


def unpatch(x: Tensor, size: int, height: int, width: int) -> Tensor:
    """The inverse of :func:`patches`, with zeros for what was left out."""
    n, rows, columns, _ = x.shape
    x = x.reshape(n, rows, columns, size, size, -1).transpose(2, 3).reshape(
        n, rows * size, columns * size, -1)
    return F.pad(x, (0, 0, 0, width - columns * size, 0, height - rows * size))


def layer_norm(x: Tensor, weight: Tensor | None, bias: Tensor | None,
               eps: float, dtype: torch.dtype, patch: int = 1) -> Tensor:
    """Layer norm over the channels.

    Args:
        x (Tensor): (N, H, W, C).
        weight, bias (Tensor, optional): (C, ); None for ones and zeros.
        eps (float): Added to the variance.
        dtype (torch.dtype): Of the result.
        patch (int): Side of the :func:`patches` of the result. Defaults to 1.

    Returns:
        Tensor: (N, H, W, C), or its patches.
    """
    if not x.is_cuda and x.shape[-1] < 96:
        # torch's own sums over few channels take twice as long in 16 bits.
        x = at_least_fp32(x)
    out = F.layer_norm(x, x.shape[-1:], *_norm_parameters(x, weight, bias),
                       eps).to(dtype)
    return out if patch == 1 else patches(out, patch)


def layer_norm_backward(grad: Tensor, x: Tensor, weight: Tensor, bias: Tensor,
                        eps: float, residual: Tensor | None, patch: int = 1,
                        sums_residual: bool = False) -> tuple[Tensor, ...]:
    """Gradients of a layer norm over the channels, and of what passes by it.

    Args:
        grad (Tensor): Gradient of the output, (N, H, W, C), or its patches.
        x (Tensor): Input, (N, H, W, C).
        weight, bias (Tensor): (C, ).
        eps (float): Added to the variance.
        residual (Tensor, optional): What else reaches x, (N, H, W, C).
        patch (int): Side of the patches. Defaults to 1.
        sums_residual (bool): Whether the sum of the residual is wanted.
            Defaults to False.

    Returns:
        tuple[Tensor]: Gradients of x, weight and bias, the output once more,
        of the type of ``grad``, and the sum of the residual over all
        positions, (C, ), or (0, ) if it is not wanted: None here, see
        :func:`gate_backward`.
    """
    dtype = x.dtype
    if patch > 1:
        grad = unpatch(grad, patch, *x.shape[1:3])
    if not x.is_cuda:
        # Sums of bf16 are wrong by a third on CPUs, over the 50,000 positions
        # of four images of 448x448.
        x = at_least_fp32(x)
    parameters = _norm_parameters(x, weight, bias)
    normed, mean, rstd = aten.native_layer_norm(x, weight.shape, *parameters,
                                                eps)
    normed = normed.to(grad.dtype)
    grad_x, grad_weight, grad_bias = aten.native_layer_norm_backward(
        grad.to(x.dtype), x, weight.shape, mean, rstd, *parameters,
        (True, True, True))
    if residual is not None:
        grad_x = grad_x.to(residual.dtype).add_(residual)
    if patch > 1:
        normed = patches(normed, patch)
    return (grad_x.to(dtype), at_least_fp32(grad_weight),
            at_least_fp32(grad_bias), normed, None)


def scale_residual(x: Tensor, y: Tensor, scale: Tensor | None,
                   keep: Tensor | None) -> Tensor:
    """``x + keep * scale * y``.

    Args:
        x, y (Tensor): (N, H, W, C).
        scale (Tensor, optional): Layer scale, (C, ).
        keep (Tensor, optional): Drop path, (N, 1, 1, 1).

    Returns:
        Tensor: (N, H, W, C), of the type of x.
    """
    y = y.to(x.dtype)
    if scale is None:
        return (x + y if keep is None else x + keep * y).to(x.dtype)
    scale = _scale_for(x, scale)
    return torch.addcmul(x, y, scale if keep is None else
                         scale * keep).to(x.dtype)


def _scale_for(x: Tensor, scale: Tensor) -> Tensor:
    # A scale of 1e-6 has two digits in fp16.
    return scale if x.dtype == torch.float16 else scale.to(x.dtype)


def scale_residual_backward(
        grad: Tensor, scale: Tensor | None, keep: Tensor | None,
        dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor | None]:
    """Gradients of y in ``x + keep * scale * y``.

    Args:
        grad (Tensor): Of the sum, (N, H, W, C).
        scale (Tensor, optional): (C, ).
        keep (Tensor, optional): (N, 1, 1, 1).
        dtype (torch.dtype): Of the gradients.

    Returns:
        tuple[Tensor]: The gradient as if the scale were 1, (0, ) where that
        is ``grad``; the gradient, (0, ) without a scale; and the sum of the
        former over all positions, (C, ): None here, see
        :func:`gate_backward`.
    """
    grad_y, none = grad, grad.new_empty(0, dtype=dtype)
    if keep is not None:
        grad_y = grad_y * keep
    grad_y = grad_y.to(dtype)
    scaled = none
    if scale is not None:
        scaled = (grad_y * _scale_for(grad_y, scale)).to(dtype)
    return none if grad_y is grad else grad_y, scaled, None


def branch_grads(grad: Tensor, scale: Tensor | None, keep: Tensor | None,
                 dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Memory for the gradients that :func:`scale_residual_backward` returns.
    """
    has_own = keep is not None or grad.dtype != dtype
    return (grad.new_empty(grad.shape if has_own else 0, dtype=dtype),
            grad.new_empty(0 if scale is None else grad.shape, dtype=dtype))


def scale_residual_norm(x: Tensor, y: Tensor, scale: Tensor | None,
                        keep: Tensor | None, weight: Tensor | None,
                        bias: Tensor | None, eps: float,
                        dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """:func:`scale_residual` and :func:`layer_norm` of its result: both."""
    out = scale_residual(x, y, scale, keep)
    return out, layer_norm(out, weight, bias, eps, dtype)


def scale_residual_norm_backward(
        grad: Tensor, x: Tensor, weight: Tensor, bias: Tensor, eps: float,
        residual: Tensor, scale: Tensor | None, keep: Tensor | None,
        dtype: torch.dtype, sums_residual: bool) -> tuple[Tensor | None, ...]:
    """Gradients of :func:`scale_residual_norm`.

    Args:
        grad (Tensor): Of the norm, (N, H, W, C).
        x (Tensor): The sum, (N, H, W, C).
        residual (Tensor): Its gradient but for what comes through the norm,
            (N, H, W, C).
        weight, bias, eps, scale, keep, dtype, sums_residual: As above.

    Returns:
        tuple[Tensor]: What :func:`layer_norm_backward` returns, and then what
        :func:`scale_residual_backward` makes of its first; where that makes
        neither of the gradients, its sum is (0, ), too.
    """
    grad_x, *others = layer_norm_backward(grad, x, weight, bias, eps, residual)
    return (grad_x, *others,
            *scale_residual_backward(grad_x, scale, keep, dtype))


def scaled_linear_backward(
        grad_weights: Sequence[Tensor], grad_biases: Sequence[Tensor],
        weights: Sequence[Tensor], biases: Sequence[Tensor],
        scales: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """Gradients of the last linear layers of the two branches of a block, and
    of the layer scales behind them.

    Args:
        grad_weights (Sequence[Tensor]): Gradients of the weights as if the
            scales were 1, (O, I) each, which are overwritten.
        grad_biases (Sequence[Tensor]): Those of the biases, (O, ), likewise.
        weights, biases, scales (Sequence[Tensor]): The parameters, (O, I),
            (O, ) and (O, ).

    Returns:
        tuple[Tensor]: Gradients of weight, bias and scale of the first branch
        and then of the second, at least in fp32.
    """
    outs = []
    for grad_weight, grad_bias, weight, bias, scale in zip(
            grad_weights, grad_biases, weights, biases, scales, strict=True):
        grad_weight, scale = at_least_fp32(grad_weight), at_least_fp32(scale)
        grad_scale = (
            torch.linalg.vecdot(at_least_fp32(weight), grad_weight) +
            at_least_fp32(bias) * grad_bias)
        outs += (grad_weight.mul_(scale[:, None]), grad_bias.mul_(scale),
                 grad_scale)
    return tuple(outs)


def pad_channels(x: Tensor, channels: int) -> Tensor:
    """(..., C) -> (..., channels), with zeros from C on."""
    return F.pad(x, (0, channels - x.shape[-1]))


def pixels_first(x: Tensor, channels: int, dtype: torch.dtype) -> Tensor:
    """Images with their channels last, and zeros in further ones.

    Args:
        x (Tensor): (N, C, H, W).
        channels (int): Number of channels of the result, a power of two.
        dtype (torch.dtype): Of the result.

    Returns:
        Tensor: (N, H, W, channels).
    """
    return pad_channels(to_nhwc(x.to(dtype)), channels)


def gelu_moments(x: Tensor, running_mean: Tensor, running_var: Tensor,
                 eps: float, momentum: float) -> tuple[Tensor, Tensor]:
    """Moments of GELU(x) for a batch norm, whose running ones are updated.

    Args:
        x (Tensor): (N, H, W, C).
        running_mean, running_var (Tensor): Of the first channels, which are
            those that count, (D, ).
        eps (float): Added to the variance.
        momentum (float): Of the running moments.

    Returns:
        tuple[Tensor]: Mean and inverse standard deviation, (C, ), in fp32.
    """
    h = at_least_fp32(F.gelu(x))
    var, mean = torch.var_mean(h, (0, 1, 2), correction=0)
    count, used = h[..., 0].numel(), len(running_mean)
    running_mean.lerp_(mean[:used].to(running_mean), momentum)
    running_var.lerp_((var[:used] * (count / max(count - 1, 1))).to(
        running_var), momentum)
    return mean, torch.rsqrt(var + eps)


def gelu_norm(x: Tensor, mean: Tensor, rstd: Tensor, weight: Tensor,
              bias: Tensor, patch: int, channels: int) -> Tensor:
    """``(GELU(x) - mean) * rstd * weight + bias``, as patches.

    Args:
        x (Tensor): (N, H, W, C).
        mean, rstd (Tensor): (C, ).
        weight, bias (Tensor): Of the first channels, (D, ), and 0 for others.
        patch (int): Side of the patches P. What does not fill a patch is left
            out.
        channels (int): Of the result, E; zeros from C on.

    Returns:
        Tensor: The patches, (N, H // P, W // P, P * P * E).
    """
    c = x.shape[3]
    h = at_least_fp32(F.gelu(x))
    out = (h - mean) * (rstd * pad_channels(weight, c)) + pad_channels(bias, c)
    return patches(pad_channels(out.to(x.dtype), channels), patch)


def gelu_norm_backward(grad: Tensor, x: Tensor, mean: Tensor, rstd: Tensor,
                       weight: Tensor, training: bool, patch: int,
                       channels: int) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of :func:`gelu_norm`.

    Args:
        grad (Tensor): Of the result, (N, H // P, W // P, P * P * E).
        training (bool): Whether mean and rstd are those of GELU(x), and
            gradients pass through them.
        channels (int): Of the gradient of x; zeros from C on.
        x, mean, rstd, weight, patch: As above.

    Returns:
        tuple[Tensor]: Gradients of x, and of weight and bias in fp32.
    """
    n, height, width, c = x.shape
    grad = unpatch(grad.to(mean.dtype), patch, height, width)[..., :c]
    z = x.to(mean.dtype)
    normed = (F.gelu(x).to(z) - mean) * rstd
    grad_bias = grad.sum((0, 1, 2))
    grad_weight = (grad * normed).sum((0, 1, 2))
    if training:
        grad = grad - (grad_bias + normed * grad_weight) / (n * height * width)
    grad = aten.gelu_backward(grad * (rstd * pad_channels(weight, c)), z)
    used = len(weight)
    return (pad_channels(grad.to(x.dtype), channels), grad_weight[:used],
            grad_bias[:used])
