"""Fully sharded data parallel training, for models that outgrow one GPU.

``train.py --fsdp`` gives :class:`ShardedStrategy` to mmengine's
``FlexibleRunner``. Each process holds a part of the gradients and of the
state of the optimizer, and, as settings may ask, of the weights, of which the
blocks of the backbone are gathered one at a time.
"""
from typing import Any

import torch
from mmengine._strategy import FSDPStrategy
from mmengine.device import get_device
from mmengine.optim import BaseOptimWrapper
from mmengine.registry import STRATEGIES
from torch import nn
from torch.distributed.fsdp import (
    FullOptimStateDictConfig,
    FullStateDictConfig,
)
from torch.distributed.fsdp import FullyShardedDataParallel as FSDP
from torch.distributed.fsdp.wrap import ModuleWrapPolicy

from mmconv2former.backbone import Block

# What mmengine's wrapper keeps beside the state of its optimizer.
_EXTRA = ('base_param_settings', 'loss_scaler')


@STRATEGIES.register_module()
class ShardedStrategy(FSDPStrategy):
    """mmengine's strategy, made to work with today's torch.

    mmengine passes the arguments of ``optim_state_dict_to_load`` in the order
    of torch 2.0, and makes parameter groups of shards, which have neither the
    names nor the shapes that weight decay and layer decay go by.

    Args:
        model_wrapper (dict, optional): What to change in the settings of
            ``MMFullyShardedDataParallel``. By default each block of the
            backbone is a unit; what is outside of the backbone has to stay
            in the root, because detectors and segmentors call its methods
            and not its ``forward``.
        state_dict_cfg (str | dict): As in mmengine. Defaults to 'full',
            checkpoints like those of any other training.
        kwargs: Those of ``FSDPStrategy``.
    """

    def __init__(self, *, model_wrapper: dict | None = None,
                 state_dict_cfg: str | dict = 'full',
                 **kwargs: Any) -> None:
        settings = dict(
            type='MMFullyShardedDataParallel',
            sharding_strategy='SHARD_GRAD_OP',
            auto_wrap_policy=ModuleWrapPolicy({Block}))
        if get_device() == 'cpu':
            settings['device_id'] = torch.device('cpu')
            if state_dict_cfg == 'full':
                # Without offload_to_cpu, which frees what it has not copied.
                state_dict_cfg = dict(
                    state_dict_type='FULL_STATE_DICT',
                    state_dict_config=FullStateDictConfig(rank0_only=True),
                    optim_state_dict_config=FullOptimStateDictConfig(
                        rank0_only=True))
        super().__init__(
            model_wrapper={**settings, **(model_wrapper or {})},
            state_dict_cfg=state_dict_cfg, **kwargs)

    def build_optim_wrapper(self, optim_wrapper: dict,
                            model: nn.Module) -> BaseOptimWrapper:
        """Build the optimizer while the parameters are whole.

        Args:
            optim_wrapper (dict): Config of the optimizer wrapper.
            model (nn.Module): The sharded model.

        Returns:
            BaseOptimWrapper: The wrapper.
        """
        with FSDP.summon_full_params(model, writeback=False):
            wrapper = super().build_optim_wrapper(optim_wrapper, model)
        if getattr(wrapper, 'clip_func', None) is nn.utils.clip_grad_norm_:
            # Which would clip each shard by the norm of its own gradients.
            wrapper.clip_func = lambda parameters, **options: \
                model.clip_grad_norm_(**options)
        return wrapper

    def optim_state_dict(self) -> dict:
        """Gather the state of the optimizer.

        Returns:
            dict: The whole state, in the first process.
        """
        state = FSDP.optim_state_dict(self.model, self.optim_wrapper.optimizer)
        own = self.optim_wrapper.state_dict()
        return {**state, **{key: own[key] for key in _EXTRA if key in own}}

    def load_optim_state_dict(self, state_dict: dict) -> None:
        """Take over the state of an optimizer.

        Args:
            state_dict (dict): What :meth:`optim_state_dict` has returned in
                the first process.
        """
        extra = {key: state_dict[key] for key in _EXTRA if key in state_dict}
        state = FSDP.optim_state_dict_to_load(
            self.model, self.optim_wrapper.optimizer,
            {key: value for key, value in state_dict.items()
             if key not in extra})
        self.optim_wrapper.load_state_dict({**state, **extra})
