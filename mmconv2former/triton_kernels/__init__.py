"""Triton kernels of the residual branches, and of the stem in ``stem``.

The functions listed here stand in for those of the same names in
:mod:`mmconv2former.torch_kernels`, which describes them and is their
reference.

Tensors are (N, H, W, C) with the channels last in memory. Inputs may have any
strides; what the kernels cannot read in place (anything but a slice of the
channels) is copied first. Outputs are contiguous. Arithmetic is in fp32, or on
tensor cores with sums in fp32, each output is rounded once, and sums are taken
in a fixed order, so that two runs give the same bits. Nothing here builds a
graph for autograd, and the device of the tensors has to be the current one.
"""
from .depthwise import (
    filters,
    gate,
    gate_backward,
    gate_forward,
    position,
    position_backward,
)
from .norm import (
    layer_norm,
    layer_norm_backward,
    scale_residual,
    scale_residual_backward,
    scale_residual_norm,
    scale_residual_norm_backward,
)
from .sums import deferred_sums
from .weights import operands, scaled_linear_backward

__all__ = [
    'deferred_sums', 'filters', 'gate', 'gate_backward', 'gate_forward',
    'layer_norm', 'layer_norm_backward', 'operands', 'position',
    'position_backward', 'scale_residual', 'scale_residual_backward',
    'scale_residual_norm', 'scale_residual_norm_backward',
    'scaled_linear_backward'
]
