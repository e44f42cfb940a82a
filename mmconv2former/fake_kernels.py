"""What the kernels return, without data.

For tracing. Functions stand in for those of the same names in
:mod:`mmconv2former.triton_kernels`, which are registered with torch as
operators; :mod:`mmconv2former.torch_kernels` describes them.
"""
from collections.abc import Sequence

import torch
from torch import Tensor

from .torch_kernels import branch_grads, patches_shape


def _fp32(x: Tensor, *shape: int) -> Tensor:
    return x.new_empty(shape, dtype=torch.float32)


def gate(zv: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return zv.new_empty((*zv.shape[:3], len(weight)))


def gate_forward(zv: Tensor, weight: Tensor,
                 bias: Tensor) -> tuple[Tensor, Tensor]:
    return gate(zv, weight, bias), gate(zv, weight, bias)


def gate_backward(grad: Tensor, zv: Tensor, a: Tensor, weight: Tensor,
                  bias: Tensor) -> tuple[Tensor, ...]:
    return (zv.new_empty(zv.shape), _fp32(zv, *weight.shape),
            _fp32(zv, len(bias)), a.new_empty(a.shape), _fp32(zv, zv.shape[3]))


def position(z: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return z.new_empty(z.shape)


def position_backward(grad: Tensor, z: Tensor, weight: Tensor,
                      bias: Tensor) -> tuple[Tensor, ...]:
    return (z.new_empty(z.shape), _fp32(z, *weight.shape),
            _fp32(z, len(bias)), z.new_empty(z.shape), _fp32(z, len(bias)))


def layer_norm(x: Tensor, weight: Tensor | None, bias: Tensor | None,
               eps: float, dtype: torch.dtype, patch: int = 1) -> Tensor:
    return x.new_empty(patches_shape(x, patch), dtype=dtype)


def layer_norm_backward(grad: Tensor, x: Tensor, weight: Tensor, bias: Tensor,
                        eps: float, residual: Tensor | None, patch: int = 1,
                        sums_residual: bool = False) -> tuple[Tensor, ...]:
    c = len(weight)
    return (x.new_empty(x.shape), _fp32(x, c), _fp32(x, c),
            grad.new_empty(patches_shape(x, patch)),
            _fp32(x, c if sums_residual else 0))


def scale_residual(x: Tensor, y: Tensor, scale: Tensor | None,
                   keep: Tensor | None) -> Tensor:
    return x.new_empty(x.shape)


def scale_residual_backward(grad: Tensor, scale: Tensor | None,
                            keep: Tensor | None,
                            dtype: torch.dtype) -> tuple[Tensor, ...]:
    return (*branch_grads(grad, scale, keep, dtype),
            _fp32(grad, grad.shape[3]))


def scale_residual_norm(x: Tensor, y: Tensor, scale: Tensor | None,
                        keep: Tensor | None, weight: Tensor | None,
                        bias: Tensor | None, eps: float,
                        dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    return (scale_residual(x, y, scale, keep),
            layer_norm(x, weight, bias, eps, dtype))


def scale_residual_norm_backward(grad: Tensor, x: Tensor, weight: Tensor,
                                 bias: Tensor, eps: float, residual: Tensor,
                                 scale: Tensor | None, keep: Tensor | None,
                                 dtype: torch.dtype,
                                 sums_residual: bool) -> tuple[Tensor, ...]:
    own, scaled, total = scale_residual_backward(x, scale, keep, dtype)
    if not own.numel() and not scaled.numel():
        total = _fp32(x, 0)
    return (*layer_norm_backward(grad, x, weight, bias, eps, residual, 1,
                                 sums_residual), own, scaled, total)


def scaled_linear_backward(
        grad_weights: Sequence[Tensor], grad_biases: Sequence[Tensor],
        weights: Sequence[Tensor], biases: Sequence[Tensor],
        scales: Sequence[Tensor]) -> tuple[Tensor, ...]:
    return tuple(
        _fp32(scale, *shape) for weight, scale in zip(weights, scales)
        for shape in (weight.shape, scale.shape, scale.shape))


# What is registered.
KERNELS = {
    f.__name__: f
    for f in (gate, gate_forward, gate_backward, position, position_backward,
              layer_norm, layer_norm_backward, scale_residual,
              scale_residual_backward, scale_residual_norm,
              scale_residual_norm_backward, scaled_linear_backward)
}
