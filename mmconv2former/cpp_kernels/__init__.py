"""C++ kernels of the residual branches, for CPUs.

The functions here stand in for those of the same names in
:mod:`mmconv2former.torch_kernels`, which describes them, is their reference,
and gets what they do not take: numbers that are neither fp32 nor bf16, and
depthwise convolutions beyond 21x21.

Tensors are (N, H, W, C). Inputs may have any strides; those that are not
contiguous are copied first. Outputs are contiguous. Arithmetic is in fp32,
each output is rounded once, and sums are taken in a fixed order, so that two
runs give the same bits, with any number of threads. Nothing here builds a
graph for autograd.
"""
from collections.abc import Sequence

import torch
from torch import Tensor, get_num_threads

from .. import torch_kernels
from ..torch_kernels import branch_grads, patches_shape
from . import library

LARGEST_KERNEL = 21  # of KERNELS in planes.h

deferred_sums = torch_kernels.deferred_sums
# Small: torch's serve CPUs well.
scaled_linear_backward = torch_kernels.scaled_linear_backward


def _takes(*dtypes: torch.dtype) -> bool:
    return all(d in (torch.float32, torch.bfloat16) for d in dtypes)


def _is_small(weight: Tensor) -> bool:
    return weight.shape[-1] <= LARGEST_KERNEL


def _is_bf16(x: Tensor) -> bool:
    return x.dtype == torch.bfloat16


def _in_fp32(parameter: Tensor | None) -> Tensor | None:
    return None if parameter is None else parameter.float().contiguous()


def _pointer(x: Tensor | None) -> int | None:
    return None if x is None else x.data_ptr()


def filters(weight: Tensor, bias: Tensor,
            dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """See :func:`mmconv2former.torch_kernels.filters`; in fp32 for bf16."""
    if _takes(dtype) and _is_small(weight):
        dtype = torch.float32
    return torch_kernels.filters(weight, bias, dtype)


def operands(branches: Sequence[Sequence[Tensor]], dtype: torch.dtype,
             scales: Sequence[Tensor | None] = (None, None)
             ) -> list[list[Tensor]]:
    """See :func:`mmconv2former.torch_kernels.operands`."""
    return torch_kernels.join_operands(
        branches, dtype, scales, filters=filters)


def gate(zv: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """See :func:`mmconv2former.torch_kernels.gate`."""
    if not _takes(zv.dtype) or not _is_small(weight):
        return torch_kernels.gate(zv, weight, bias)
    return _gate(zv, weight, bias, None)


def gate_forward(zv: Tensor, weight: Tensor,
                 bias: Tensor) -> tuple[Tensor, Tensor]:
    """See :func:`mmconv2former.torch_kernels.gate_forward`."""
    if not _takes(zv.dtype) or not _is_small(weight):
        return torch_kernels.gate_forward(zv, weight, bias)
    a = zv.new_empty((*zv.shape[:-1], len(weight)))
    return _gate(zv, weight, bias, a), a


def _gate(zv: Tensor, weight: Tensor, bias: Tensor,
          a: Tensor | None) -> Tensor:
    zv, weight, bias = zv.contiguous(), _in_fp32(weight), _in_fp32(bias)
    out = zv.new_empty((*zv.shape[:-1], len(weight)))
    library.load().gate(
        zv.data_ptr(), weight.data_ptr(), bias.data_ptr(), out.data_ptr(),
        _pointer(a), *out.shape, weight.shape[-1], _is_bf16(zv),
        get_num_threads())
    return out


def gate_backward(grad: Tensor, zv: Tensor, a: Tensor, weight: Tensor,
                  bias: Tensor) -> tuple[Tensor, ...]:
    """See :func:`mmconv2former.torch_kernels.gate_backward`."""
    if not _takes(grad.dtype, zv.dtype) or not _is_small(weight):
        return torch_kernels.gate_backward(grad, zv, a, weight, bias)
    grad, zv, a = grad.contiguous(), zv.contiguous(), a.to(zv).contiguous()
    weight = _in_fp32(weight)
    grad_zv = torch.empty_like(zv, dtype=grad.dtype)
    out, grad_weight = torch.empty_like(grad), torch.empty_like(weight)
    sums = weight.new_empty(3 * len(weight))
    library.load().gate_backward(
        grad.data_ptr(), zv.data_ptr(), a.data_ptr(), weight.data_ptr(),
        grad_zv.data_ptr(), out.data_ptr(), grad_weight.data_ptr(),
        sums.data_ptr(), *grad.shape, weight.shape[-1], _is_bf16(grad),
        _is_bf16(zv), get_num_threads())
    return (grad_zv, grad_weight, sums[:len(weight)], out,
            sums[len(weight):])


def position(z: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """See :func:`mmconv2former.torch_kernels.position`."""
    if not _takes(z.dtype):
        return torch_kernels.position(z, weight, bias)
    z, weight, bias = z.contiguous(), _in_fp32(weight), _in_fp32(bias)
    out = torch.empty_like(z)
    library.load().position(
        z.data_ptr(), weight.data_ptr(), bias.data_ptr(), out.data_ptr(),
        *z.shape, weight.shape[-1], _is_bf16(z), get_num_threads())
    return out


def position_backward(grad: Tensor, z: Tensor, weight: Tensor,
                      bias: Tensor) -> tuple[Tensor, ...]:
    """See :func:`mmconv2former.torch_kernels.position_backward`; nothing is
    overwritten."""
    if not _takes(grad.dtype, z.dtype):
        return torch_kernels.position_backward(grad, z, weight, bias)
    grad, z = grad.contiguous(), z.contiguous()
    weight, bias = _in_fp32(weight), _in_fp32(bias)
    grad_z, out = torch.empty_like(grad), torch.empty_like(grad)
    grad_weight = torch.empty_like(weight)
    sums = weight.new_empty((2, len(weight)))
    library.load().position_backward(
        grad.data_ptr(), z.data_ptr(), weight.data_ptr(), bias.data_ptr(),
        grad_z.data_ptr(), out.data_ptr(), grad_weight.data_ptr(),
        sums.data_ptr(), *grad.shape, weight.shape[-1], _is_bf16(grad),
        _is_bf16(z), get_num_threads())
    return grad_z, grad_weight, sums[0], out, sums[1]


def layer_norm(x: Tensor, weight: Tensor | None, bias: Tensor | None,
               eps: float, dtype: torch.dtype, patch: int = 1) -> Tensor:
    """See :func:`mmconv2former.torch_kernels.layer_norm`."""
    if not _takes(x.dtype, dtype):
        return torch_kernels.layer_norm(x, weight, bias, eps, dtype, patch)
    x, weight, bias = x.contiguous(), _in_fp32(weight), _in_fp32(bias)
    out = x.new_empty(patches_shape(x, patch), dtype=dtype)
    library.load().layer_norm(
        x.data_ptr(), _pointer(weight), _pointer(bias), eps, out.data_ptr(),
        *x.shape, patch, _is_bf16(x), _is_bf16(out), get_num_threads())
    return out


def layer_norm_backward(grad: Tensor, x: Tensor, weight: Tensor, bias: Tensor,
                        eps: float, residual: Tensor | None, patch: int = 1,
                        sums_residual: bool = False) -> tuple[Tensor, ...]:
    """See :func:`mmconv2former.torch_kernels.layer_norm_backward`; the sum of
    the residual is None here, too."""
    if not _takes(grad.dtype, x.dtype):
        return torch_kernels.layer_norm_backward(grad, x, weight, bias, eps,
                                                 residual, patch)
    grad, x = grad.contiguous(), x.contiguous()
    if residual is not None:
        residual = residual.to(x).contiguous()
    weight, bias = _in_fp32(weight), _in_fp32(bias)
    grad_x, normed = torch.empty_like(x), torch.empty_like(grad)
    sums = weight.new_empty((2, len(weight)))
    library.load().layer_norm_backward(
        grad.data_ptr(), x.data_ptr(), weight.data_ptr(), bias.data_ptr(),
        eps, _pointer(residual), grad_x.data_ptr(), normed.data_ptr(),
        sums.data_ptr(), *x.shape, patch, _is_bf16(x), _is_bf16(grad),
        get_num_threads())
    return grad_x, sums[0], sums[1], normed, None


def scale_residual(x: Tensor, y: Tensor, scale: Tensor | None,
                   keep: Tensor | None) -> Tensor:
    """See :func:`mmconv2former.torch_kernels.scale_residual`."""
    if not _takes(x.dtype, y.dtype):
        return torch_kernels.scale_residual(x, y, scale, keep)
    x, y = x.contiguous(), y.contiguous()
    scale, keep = _in_fp32(scale), _in_fp32(keep)
    out = torch.empty_like(x)
    library.load().scale_residual(
        x.data_ptr(), y.data_ptr(), _pointer(scale), _pointer(keep),
        out.data_ptr(), *_samples(x), _is_bf16(x), _is_bf16(y),
        get_num_threads())
    return out


def _samples(x: Tensor) -> tuple[int, int, int]:
    """Samples, positions of each, and channels."""
    n, height, width, c = x.shape
    return n, height * width, c


def scale_residual_backward(
        grad: Tensor, scale: Tensor | None, keep: Tensor | None,
        dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """See :func:`mmconv2former.torch_kernels.scale_residual_backward`."""
    if not _takes(grad.dtype, dtype):
        return torch_kernels.scale_residual_backward(grad, scale, keep, dtype)
    grad, scale, keep = grad.contiguous(), _in_fp32(scale), _in_fp32(keep)
    # Of no size they have no address either.
    own, scaled = branch_grads(grad, scale, keep, dtype)
    sums = grad.new_empty(grad.shape[3], dtype=torch.float32)
    library.load().scale_residual_backward(
        grad.data_ptr(), _pointer(scale), _pointer(keep), own.data_ptr(),
        scaled.data_ptr(), sums.data_ptr(), *_samples(grad), _is_bf16(grad),
        _is_bf16(own), get_num_threads())
    return own, scaled, sums


def scale_residual_norm(x: Tensor, y: Tensor, scale: Tensor | None,
                        keep: Tensor | None, weight: Tensor | None,
                        bias: Tensor | None, eps: float,
                        dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """See :func:`mmconv2former.torch_kernels.scale_residual_norm`."""
    if not _takes(x.dtype, dtype) or y.dtype != dtype:
        return torch_kernels.scale_residual_norm(x, y, scale, keep, weight,
                                                 bias, eps, dtype)
    x, y = x.contiguous(), y.contiguous()
    scale, keep, weight, bias = map(_in_fp32, (scale, keep, weight, bias))
    out, normed = torch.empty_like(x), torch.empty_like(y)
    library.load().scale_residual_norm(
        x.data_ptr(), y.data_ptr(), *map(_pointer, (scale, keep, weight,
                                                    bias)),
        eps, out.data_ptr(), normed.data_ptr(), *_samples(x), _is_bf16(x),
        _is_bf16(y), get_num_threads())
    return out, normed


def scale_residual_norm_backward(
        grad: Tensor, x: Tensor, weight: Tensor, bias: Tensor, eps: float,
        residual: Tensor, scale: Tensor | None, keep: Tensor | None,
        dtype: torch.dtype, sums_residual: bool) -> tuple[Tensor | None, ...]:
    """See :func:`mmconv2former.torch_kernels.scale_residual_norm_backward`;
    the sum of the residual is None here, too."""
    if not _takes(x.dtype, dtype) or grad.dtype != dtype:
        return torch_kernels.scale_residual_norm_backward(
            grad, x, weight, bias, eps, residual, scale, keep, dtype,
            sums_residual)
    grad, x = grad.contiguous(), x.contiguous()
    residual = residual.to(x).contiguous()
    weight, bias, scale, keep = map(_in_fp32, (weight, bias, scale, keep))
    grad_x, normed = torch.empty_like(x), torch.empty_like(grad)
    own, scaled = branch_grads(x, scale, keep, dtype)
    sums = weight.new_empty((3, len(weight)))
    library.load().scale_residual_norm_backward(
        grad.data_ptr(), x.data_ptr(), weight.data_ptr(), bias.data_ptr(), eps,
        residual.data_ptr(), _pointer(scale), _pointer(keep),
        grad_x.data_ptr(), normed.data_ptr(), own.data_ptr(),
        scaled.data_ptr(), sums.data_ptr(), *_samples(x), _is_bf16(x),
        _is_bf16(grad), get_num_threads())
    return (grad_x, sums[0], sums[1], normed, None, own, scaled, sums[2])
