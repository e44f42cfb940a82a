"""Layer-wise learning-rate decay for classifiers, detectors, segmentors."""
import inspect
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from mmengine.logging import MMLogger, print_log
from mmengine.optim import DefaultOptimWrapperConstructor, OptimWrapper
from torch import Tensor, nn
from torch.optim import Optimizer

from .checkpoint import WRAPPER, CheckpointError
from .registry import OPTIM_WRAPPER_CONSTRUCTORS

# The multipliers of mmengine's constructor, which does that part of the work.
_MMENGINE_KEYS = ('custom_keys', 'bias_lr_mult', 'bias_decay_mult',
                  'norm_decay_mult', 'flat_decay_mult', 'dwconv_decay_mult',
                  'dcn_offset_lr_mult', 'bypass_duplicate')
_KEYS = ('decay_rate', 'decay_type', 'num_layers') + _MMENGINE_KEYS


@contextmanager
def _silenced(logger: MMLogger) -> Iterator[None]:
    """mmengine logs several lines per parameter; the table says it shorter."""
    was, logger.disabled = logger.disabled, True
    try:
        yield
    finally:
        logger.disabled = was


def _backbones(module: nn.Module,
               prefix: str = '') -> Iterator[tuple[str, nn.Module]]:
    """Prefixes and modules of what knows its depths in a model.

    mmpretrain's classifiers, which ask their backbone, are passed over.
    """
    if hasattr(module, 'get_layer_depth') and not hasattr(module, 'backbone'):
        yield WRAPPER.sub('', prefix), module
        return
    for name, child in module.named_children():
        yield from _backbones(child, f'{prefix}{name}.')


def _ask(backbone: nn.Module, prefix: str, num_layers: int | None,
         decay_type: str) -> Callable[[str], tuple[int, int]]:
    """The depth map of a backbone, as a function of a parameter's name."""
    cls = type(backbone).__name__
    if not hasattr(backbone, 'get_layer_depth'):
        raise TypeError(
            f'layer-wise decay asks the backbone for its depths, and {cls} '
            'has no get_layer_depth. Give the class a method '
            "get_layer_depth(self, param_name, prefix='') -> (depth, "
            'num_layers + 2), with depth 0 for the stem, 1 .. num_layers for '
            'the layers in order (blocks of `stages` spread evenly) and '
            'num_layers + 1 for what does not start with the prefix; or '
            'leave the constructor out')
    takes = inspect.signature(backbone.get_layer_depth).parameters
    options = {}
    if 'num_layers' in takes:
        options['num_layers'] = num_layers
    if 'decay_type' in takes:
        options['decay_type'] = decay_type
    elif decay_type != 'layer_wise':
        raise ValueError(f'{cls}.get_layer_depth knows layer_wise decay only '
                         f'(it takes no decay_type), got {decay_type!r}')

    def depth_of(name: str) -> tuple[int, int]:
        depth, total = backbone.get_layer_depth(name, prefix, **options)
        if num_layers is not None and total != num_layers + 2:
            raise ValueError(
                f'{cls} counts {total - 2} layers and num_layers is '
                f'{num_layers}; set num_layers={total - 2} or leave it out')
        return depth, total

    return depth_of


def describe_groups(param_groups: list[dict]) -> str:
    """One line per parameter group, as a table.

    Args:
        param_groups (list[dict]): Groups of an optimizer, or those saved in
            a checkpoint, whose parameters are numbers and not counted.

    Returns:
        str: Columns layer, lr scale, weight decay, tensors, parameters.
    """
    lines = [f'{"layer":>5} {"lr scale":>9} {"weight decay":>12} '
             f'{"tensors":>7} {"parameters":>11}']
    for group in param_groups:
        size = sum(p.numel() for p in group['params'] if isinstance(p, Tensor))
        lines.append(f'{group.get("layer", "?"):>5} '
                     f'{group.get("lr_scale", float("nan")):>9.4g} '
                     f'{group.get("weight_decay", 0.):>12.4g} '
                     f'{len(group["params"]):>7} {size or "?":>11}')
    return '\n'.join(lines)


def _are_alike(saved: dict, own: dict) -> bool:
    """Whether two groups are the same, whatever the base rate is and however
    far a schedule of the weight decay has gone."""
    if any(saved.get(key) != own.get(key) for key in ('layer', 'names')):
        return False
    decays = [group.get('initial_weight_decay', group.get('weight_decay'))
              for group in (saved, own)]
    scales = saved.get('lr_scale'), own.get('lr_scale')
    # Of another base rate the scale may be another in its last digit.
    return all(
        one == other or None not in (one, other)
        and math.isclose(one, other, rel_tol=1e-6)
        for one, other in (scales, decays))


def _check_groups(optimizer: Optimizer, state_dict: dict) -> None:
    """Refuse saved groups that are not the optimizer's own.

    torch compares only their number and sizes, and then takes over the saved
    settings: a changed decay rate would be forgotten without a word.
    """
    saved, own = state_dict['param_groups'], optimizer.param_groups
    if len(saved) == len(own) and all(map(_are_alike, saved, own)):
        _check_shapes(own, saved, state_dict['state'])
        return
    if not any('names' in group for group in saved):
        raise CheckpointError(
            'the checkpoint was trained without '
            f'{LayerDecayOptimWrapperConstructor.__name__}, so its optimizer '
            'state cannot be resumed. Resume with the constructor that it was '
            'trained with, or load the weights alone (load_from=..., '
            'resume=False)')
    saved_names, own_names = ({
        name
        for group in groups for name in group.get('names', ())
    } for groups in (saved, own))
    only = ''.join(
        f'\nOnly in {where}: {", ".join(sorted(names)[:5])}'
        f'{" ..." if len(names) > 5 else ""}'
        for where, names in (('the checkpoint', saved_names - own_names),
                             ('this model', own_names - saved_names))
        if names)
    raise CheckpointError(
        'the parameter groups of the checkpoint are not those of this '
        'config, so its optimizer state cannot be resumed. Resume with the '
        'paramwise_cfg, weight decay and model that it was trained with, or '
        'load the weights alone (load_from=..., resume=False).\n'
        f'In the checkpoint:\n{describe_groups(saved)}\n'
        f'In this config:\n{describe_groups(own)}{only}')


# Optimizer state that has the shape of the parameter, of torch's optimizers.
# That of others, such as Adafactor's and 8-bit ones, may be smaller.
_AVERAGES = ('exp_avg', 'exp_avg_sq', 'max_exp_avg_sq', 'momentum_buffer',
             'sum')


def _check_shapes(own: list[dict], saved: list[dict], state: dict) -> None:
    """Refuse averages of gradients of another shape, which a fused optimizer
    would read beyond their end."""
    for group, saved_group in zip(own, saved):
        for name, p, number in zip(group.get('names', ()), group['params'],
                                   saved_group['params']):
            # ZeroRedundancyOptimizer has None for those of other processes.
            found = state.get(number) or {}
            for value in map(found.get, _AVERAGES):
                if isinstance(value, Tensor) and value.shape != p.shape:
                    raise CheckpointError(
                        f'the checkpoint was trained with {name} of shape '
                        f'{tuple(value.shape)}, and here it has '
                        f'{tuple(p.shape)}, so its optimizer state cannot be '
                        'resumed. Resume with the model that it was trained '
                        'with, or load the weights alone (load_from=..., '
                        'resume=False)')


@OPTIM_WRAPPER_CONSTRUCTORS.register_module()
class LayerDecayOptimWrapperConstructor(DefaultOptimWrapperConstructor):
    """Learning rates that shrink from the head towards the stem.

    A parameter at depth d of ``num_layers + 2`` learns at ``decay_rate **
    (num_layers + 1 - d)`` times the base rate; everything outside the
    backbone learns at the base rate. The backbone is asked for the depths
    (``get_layer_depth``, see :meth:`mmconv2former.Conv2Former.
    get_layer_depth`), so that mmpretrain's backbones work too, wherever in
    the model it is; of several, such as those of a student and of two
    streams, each. The rule is that of ConvNeXt's official code, which took it
    from BEiT's.

    Parameters are grouped by (depth, learning rate, weight decay): a few tens
    of groups in a stable order, reported as one table. Frozen parameters are
    left out. When a checkpoint is resumed, its groups must be these.

    Args:
        optim_wrapper_cfg (dict): Config of the optimizer wrapper; its
            ``optimizer`` needs ``lr``.
        paramwise_cfg (dict): May contain

            - ``decay_rate`` (float): In (0, 1]. Required.
            - ``decay_type`` (str): 'layer_wise' or 'stage_wise'. Defaults to
              'layer_wise'.
            - ``num_layers`` (int): Layers that the backbone is divided into.
              Defaults to the backbone's own number.
            - what mmengine's ``DefaultOptimWrapperConstructor`` knows:
              ``custom_keys``, ``norm_decay_mult``, ``bias_decay_mult``,
              ``flat_decay_mult``, ``dwconv_decay_mult``, ``bias_lr_mult``,
              ``dcn_offset_lr_mult``, ``bypass_duplicate`` (True here: what
              layers share is learned once). Learning-rate multipliers act on
              top of the decay.

    Raises:
        ValueError: If ``paramwise_cfg`` has other keys or values, if
            ``get_layer_depth`` puts no parameter into a layer of the backbone,
            or if layers share parameters and ``bypass_duplicate`` is False.
        TypeError: If nothing in the model has a ``get_layer_depth``.
        CheckpointError: When a checkpoint with other groups is resumed.

    Examples:
        >>> optim_wrapper = dict(
        ...     optimizer=dict(type='AdamW', lr=1e-4, weight_decay=0.05),
        ...     constructor='LayerDecayOptimWrapperConstructor',
        ...     paramwise_cfg=dict(decay_rate=0.95, num_layers=6))
    """

    def _validate_cfg(self) -> None:
        custom = self.paramwise_cfg.get('custom_keys')
        scaled = [key for key in self.paramwise_cfg
                  if key.endswith('decay_mult')]
        if isinstance(custom, dict):
            for name, settings in custom.items():
                if not isinstance(settings, dict):
                    raise ValueError(
                        f'custom_keys[{name!r}] of paramwise_cfg must be a '
                        f'dict such as dict(lr_mult=0.1), got {settings!r}')
                if 'decay_mult' in settings:
                    scaled.append(f'custom_keys[{name!r}].decay_mult')
        if scaled and self.base_wd is None:
            raise ValueError(f'{scaled[0]} of paramwise_cfg needs '
                             'weight_decay in the optimizer config, got '
                             f'{dict(self.optimizer_cfg)}')
        super()._validate_cfg()
        unknown = sorted(set(self.paramwise_cfg) - set(_KEYS))
        if unknown:
            raise ValueError(f'unknown keys in paramwise_cfg: '
                             f'{", ".join(unknown)}; it may contain '
                             f'{", ".join(_KEYS)}')
        rate = self.paramwise_cfg.get('decay_rate')
        if not isinstance(rate, (int, float)) or not 0 < rate <= 1:
            raise ValueError('paramwise_cfg needs decay_rate in (0, 1], got '
                             f'{rate!r}')
        if self.base_lr is None:
            raise ValueError('layer-wise decay needs lr in the optimizer '
                             f'config, got {dict(self.optimizer_cfg)}')

    def add_params(self, params: list[dict], module: nn.Module,
                   **kwargs: Any) -> None:
        """Add the parameter groups of a whole model.

        Args:
            params (list[dict]): The list to add to.
            module (nn.Module): The model, with a backbone somewhere in it,
                or a backbone itself.
        """
        names = {id(p): WRAPPER.sub('', name)
                 for name, p in module.named_parameters()}
        depth_of = self._depth_map(module, [*names.values()])
        singles: list[dict] = []
        with _silenced(MMLogger.get_current_instance()):
            # DefaultOptimWrapperConstructor recurses through self.add_params.
            # Of parameters that layers share, each one once: in a group of
            # several parameters torch would step them several times.
            DefaultOptimWrapperConstructor(
                dict(optimizer=self.optimizer_cfg), {
                    'bypass_duplicate': True,
                    **{
                        key: value
                        for key, value in self.paramwise_cfg.items()
                        if key in _MMENGINE_KEYS
                    }
                }).add_params(singles, module)
        if len({id(p) for single in singles
                for p in single['params']}) < len(singles):
            raise ValueError('some parameters are shared by several layers: '
                             'leave out bypass_duplicate=False')
        groups: dict[tuple, dict] = {}
        for single in singles:
            param, = single.pop('params')
            name = names[id(param)]
            depth, total = depth_of(name)
            scale = self.paramwise_cfg['decay_rate']**(total - 1 - depth)
            lr = single.pop('lr', self.base_lr) * scale
            if self.base_wd is not None:  # else that of the optimizer holds
                single.setdefault('weight_decay', self.base_wd)
            for applied in ('lr_mult', 'decay_mult'):
                single.pop(applied, None)
            key = (depth, -single.get('weight_decay', 0.), lr, repr(single))
            group = groups.setdefault(
                key,
                dict(params=[], names=[], layer=depth, lr=lr,
                     lr_scale=lr / self.base_lr if self.base_lr else scale,
                     **single))
            group['params'].append(param)
            group['names'].append(name)
        params.extend(groups[key] for key in sorted(groups))

    def _depth_map(self, model: nn.Module,
                   names: list[str]) -> Callable[[str], tuple[int, int]]:
        """Depth and number of depths of any parameter of a model."""
        options = (self.paramwise_cfg.get('num_layers'),
                   self.paramwise_cfg.get('decay_type', 'layer_wise'))
        found = dict(_backbones(model)) or {
            '': getattr(model, 'backbone', model)}
        maps = {prefix: _ask(backbone, prefix, *options)
                for prefix, backbone in found.items()}
        for prefix, ask in maps.items():
            inside = [name for name in names if name.startswith(prefix)]
            depths = map(ask, inside)
            if inside and all(depth == total - 1 for depth, total in depths):
                raise ValueError(
                    'layer-wise decay finds no layer of the backbone: by '
                    f'get_layer_depth of {type(found[prefix]).__name__} all '
                    f'{len(inside)} parameters lie outside of it (the first '
                    f'is {inside[0]}). Correct that method, or leave the '
                    'constructor out')
        first = next(iter(maps.values()))

        def depth_of(name: str) -> tuple[int, int]:
            # The first one counts what lies outside of all.
            return next((ask for prefix, ask in maps.items()
                         if name.startswith(prefix)), first)(name)

        return depth_of

    def __call__(self, model: nn.Module) -> OptimWrapper:
        """Build the optimizer wrapper and log the table of groups.

        Args:
            model (nn.Module): The model, wrapped for distributed training or
                not.

        Returns:
            OptimWrapper: The wrapper.
        """
        optim_wrapper = super().__call__(model)
        optimizer = optim_wrapper.optimizer
        optimizer.register_load_state_dict_pre_hook(_check_groups)
        frozen = [p for p in model.parameters() if not p.requires_grad]
        print_log(
            describe_groups(optimizer.param_groups) +
            (f'\nfrozen: {len(frozen)} tensors' if frozen else ''),
            logger='current')
        return optim_wrapper
