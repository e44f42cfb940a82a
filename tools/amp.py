"""Mixed precision where mmengine and the libraries do not have it."""
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from mmengine.hooks import Hook
from mmengine.optim import OptimWrapper
from mmengine.registry import OPTIM_WRAPPERS
from mmengine.runner import Runner
from torch import Tensor, nn


@OPTIM_WRAPPERS.register_module()
class AutocastOptimWrapper(OptimWrapper):
    """Mixed precision on CPUs, for which mmengine's AmpOptimWrapper has none.

    Args:
        dtype (str): What needs no loss scaling, 'bfloat16'.
        **kwargs: Arguments of mmengine's OptimWrapper.
    """

    def __init__(self, dtype: str, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.dtype = getattr(torch, dtype)

    @contextmanager
    def optim_context(self, model: nn.Module) -> Iterator[None]:
        """Run what computes the losses of ``model`` under autocast."""
        with super().optim_context(model), torch.autocast('cpu', self.dtype):
            yield


class BoxesInFloat32(Hook):
    """Compute the boxes of detectors in fp32 where the rest is in bf16.

    mmdet makes anchors, and the corners of regions, of the type that the
    features have. In bf16 they would be rounded to 8 pixels from 1024 on, and
    mmcv has no bf16 kernel on the GPU to extract regions with.
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
