"""Mixed precision where mmengine and the libraries do not have it."""
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from mmengine.hooks import Hook
from mmengine.optim import AmpOptimWrapper, OptimWrapper
from mmengine.registry import OPTIM_WRAPPERS
from mmengine.runner import Runner
from torch import Tensor, nn


@OPTIM_WRAPPERS.register_module()
class CPUAmpOptimWrapper(AmpOptimWrapper):
    """mmengine's AmpOptimWrapper, which refuses to run without a GPU, on CPUs.

    Args:
        dtype (str): 'float16' or 'bfloat16'.
        loss_scale (str | float | dict): Of fp16: 'dynamic', a constant, or
            arguments of torch's GradScaler. Defaults to 'dynamic'.
        **kwargs: Arguments of mmengine's OptimWrapper.

    Raises:
        TypeError: If ``loss_scale`` is something else.
    """

    def __init__(self, dtype: str, loss_scale: str | float | dict = 'dynamic',
                 **kwargs: Any) -> None:
        OptimWrapper.__init__(self, **kwargs)
        self.cast_dtype = getattr(torch, dtype)
        self._scale_update_param = None
        if loss_scale == 'dynamic':
            options = {}
        elif isinstance(loss_scale, float):
            self._scale_update_param = loss_scale
            options = dict(init_scale=loss_scale)
        elif isinstance(loss_scale, dict):
            options = loss_scale
        else:  # as on GPUs
            raise TypeError("loss_scale must be 'dynamic', a float or a dict "
                            f'of arguments of GradScaler, got {loss_scale!r}')
        self.loss_scaler = torch.amp.GradScaler(
            'cpu', enabled=self.cast_dtype == torch.float16, **options)

    @contextmanager
    def optim_context(self, model: nn.Module) -> Iterator[None]:
        """Run what computes the losses of ``model`` under autocast."""
        with OptimWrapper.optim_context(self, model), \
                torch.autocast('cpu', self.cast_dtype):
            yield


class BoxesInFloat32(Hook):
    """Compute the boxes of detectors in fp32 where the rest is in 16 bits.

    mmdet makes anchors, and the corners of regions, of the type that the
    features have. In bf16 they would be rounded to 8 pixels from 1024 on, and
    mmcv has no bf16 kernel on the GPU to extract regions with. On the CPU its
    non-maximum suppression takes fp32 alone.
    """

    def before_train(self, runner: Runner) -> None:
        """Cast what dense heads return and what RoI extractors are given.

        Args:
            runner (Runner): The runner.
        """
        for module in runner.model.modules():
            if hasattr(module, 'prior_generator'):
                module.register_forward_hook(
                    lambda head, inputs, outputs: _in_float32(outputs))
            if hasattr(module, 'roi_layers'):
                module.register_forward_pre_hook(
                    lambda extractor, inputs: _in_float32(inputs))


def _in_float32(values: Any) -> Any:
    """Tensors in fp32, in the lists and tuples that they came in."""
    if isinstance(values, (list, tuple)):
        return type(values)(_in_float32(value) for value in values)
    return values.float() if isinstance(values, Tensor) else values
