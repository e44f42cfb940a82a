"""What a config says: of which task, which data, how many classes.

A config may leave things out, wrap them or name a class in place of a string;
what is known of that is here. Nothing is built, and no config is changed.
"""
import os
import os.path as osp
import re
from collections.abc import Iterator
from typing import Any

from mmengine.config import Config, ConfigDict

# Heads with classes of their own: of stuff, an edge or none, or texts.
AUXILIARY_HEADS = ('FusedSemanticHead', 'SCNetSemanticHead', 'STDCHead',
                   'SideAdapterCLIPHead')


def type_name(cfg: dict) -> str:
    """Name of the class that a config is of.

    Args:
        cfg (dict): Config with a ``type``: a name with or without scope or,
            in mmengine's new style, the class.

    Returns:
        str: The name without scope; '' if there is no ``type``.
    """
    kind = cfg.get('type') or ''
    return str(getattr(kind, '__name__', kind)).rpartition('.')[2]


def has_hook(cfg: ConfigDict, name: str) -> bool:
    """Whether a config has a custom hook of that type."""
    return any(type_name(hook) == name
               for hook in cfg.get('custom_hooks') or ())


def library(cfg: Config) -> str:
    """The library of a config's task.

    Args:
        cfg (Config): The config. In mmengine's new style it names no scope,
            and its model is a class, or the name of one with its module.

    Returns:
        str: 'mmpretrain', 'mmdet' or 'mmseg'; '' if it is another one.
    """
    kind = (cfg.get('model') or {}).get('type')
    classes = getattr(kind, '__mro__', ())
    names = [cfg.get('default_scope'),
             *(c.__module__ for c in classes), str(kind)]
    roots = [str(name).partition('.')[0] for name in names]
    return next((root for root in roots
                 if root in ('mmpretrain', 'mmdet', 'mmseg')), '')


def config_parts(config: Any, where: str = 'model'
                 ) -> Iterator[tuple[str, ConfigDict]]:
    """A config and all those within it.

    Args:
        config (object): The config of a model, or a part of it.
        where (str): Its dotted name.

    Yields:
        tuple[str, ConfigDict]: Dotted name and config of a part, such as
        'model.backbone', or 'model.detector.backbone' of a teacher.
    """
    if isinstance(config, dict):
        yield where, config
        parts = config.items()
    else:
        parts = enumerate(config) if isinstance(config, (list, tuple)) else ()
    for key, part in parts:
        yield from config_parts(part, f'{where}.{key}')


def data_sets(cfg: ConfigDict, where: str) -> Iterator[tuple[str, ConfigDict]]:
    """Data sets in a data-set config, those inside wrappers too.

    Args:
        cfg (ConfigDict): Config of a data set or of a wrapper around one
            (``dataset``) or several (``datasets``).
        where (str): Dotted name of ``cfg`` in the whole config.

    Yields:
        tuple[str, ConfigDict]: Dotted name and config of a data set.
    """
    if 'dataset' in cfg:
        yield from data_sets(cfg.dataset, f'{where}.dataset')
    elif 'datasets' in cfg:
        for i, inner in enumerate(cfg.datasets):
            yield from data_sets(inner, f'{where}.datasets.{i}')
    else:
        yield where, cfg


def data_paths(data_set: ConfigDict) -> dict[str, str]:
    """Paths that a data set reads, as mmengine's ``BaseDataset`` joins them.

    Args:
        data_set (ConfigDict): Config with ``data_root``, ``ann_file`` and
            ``data_prefix`` (str or dict), each optional.

    Returns:
        dict[str, str]: Files and folders by the setting they come from.
        Empty if the config names none: such a data set knows by itself what
        it reads, or downloads it.
    """
    prefix = data_set.get('data_prefix') or {}
    if not isinstance(prefix, dict):
        prefix = {'images': prefix}
    names = {f'data_prefix.{key}': name for key, name in prefix.items()}
    kind = type_name(data_set)
    ann_file = data_set.get('ann_file')
    if not names and kind.endswith(('ImageNet', 'ImageNet21k')):
        names = {'split': data_set.get('split')}
    if not ann_file and kind.endswith(
        ('ImageNet', 'ImageNet21k', 'CustomDataset')):
        names = {
            f'{key}, one folder per class': name
            for key, name in names.items()
        }
    names['ann_file'] = ann_file
    root = os.fspath(data_set.get('data_root') or '')
    if not any(names.values()) and kind.endswith('CustomDataset') \
            and root and '://' not in root:
        return {'data_root, one folder per class': root}
    return {
        key: osp.join(root, name)
        for key, name in names.items()
        if name and isinstance(name, str) and '://' not in root + name
    }


def evaluators(cfg: Config, part: str) -> list[ConfigDict]:
    """Configs of the metrics of 'val' or 'test', as a list.

    Args:
        cfg (Config): The config.
        part (str): 'train' (which has none), 'val' or 'test'.

    Returns:
        list[ConfigDict]: The configs.
    """
    metrics = cfg.get(f'{part}_evaluator') or []
    if isinstance(metrics, dict) and 'metrics' in metrics:  # an evaluator
        metrics = metrics.metrics
    return metrics if isinstance(metrics, list) else [metrics]


def head_sizes(model: ConfigDict) -> dict[str, int]:
    """Numbers of classes that the heads in a model config are made for.

    Args:
        model (ConfigDict): The config.

    Returns:
        dict[str, int]: By the name of the setting. The head of the region
        proposal network, which knows objects only, is left out, and so are
        ``AUXILIARY_HEADS``. Empty where the classes are texts, of which the
        number is a greatest one.
    """
    sizes = {}
    for where, part in config_parts(model):
        if 'language_model' in part:
            return {}
        last = re.sub(r'\.\d+$', '', where).rpartition('.')[2]
        if 'num_classes' in part and 'head' in last and last != 'rpn_head' \
                and type_name(part) not in AUXILIARY_HEADS \
                and not part.get('class_agnostic'):
            sizes[f'{where}.num_classes'] = part['num_classes']
    return sizes


def _without_tta(model: ConfigDict) -> ConfigDict:
    """The model inside of what test.py --tta wraps around it."""
    return model.get('module', model)


def preprocessing(cfg: Config) -> tuple[str, dict]:
    """What happens to the images in front of the model.

    Args:
        cfg (Config): The whole config.

    Returns:
        tuple[str, dict]: Dotted name and settings of the data preprocessor,
        which are empty if there is none. As mmengine's runner has it, that of
        the model goes before that of the config, even where it is None.
    """
    model = _without_tta(cfg.model)
    where = 'data_preprocessor'
    if where in model:
        return f'model.{where}', model[where] or {}
    return where, cfg.get(where) or {}


def model_sizes(cfg: Config) -> dict[str, int]:
    """Numbers of classes that a model and its preprocessing are made for.

    Args:
        cfg (Config): The whole config.

    Returns:
        dict[str, int]: Those of :func:`head_sizes` and, of a classifier that
        trains on one-hot labels, the length of those.
    """
    model = _without_tta(cfg.model)
    sizes = head_sizes(model)
    where, settings = preprocessing(cfg)
    one_hot = settings.get('to_onehot') or settings.get('batch_augments') or (
        model.get('train_cfg') or {}).get('augments')
    if one_hot and settings.get('num_classes'):
        sizes[f'{where}.num_classes'] = settings['num_classes']
    return sizes


def ignored_labels(model: ConfigDict) -> dict[str, int]:
    """Labels that the heads of a segmentor ignore.

    Args:
        model (ConfigDict): Config of the model.

    Returns:
        dict[str, int]: By the name of the setting.
    """
    model = _without_tta(model)
    found = {}
    for key in ('decode_head', 'auxiliary_head'):
        heads = model.get(key) or []
        for i, head in enumerate(heads if isinstance(heads, list)
                                 else [heads]):
            where = f'model.{key}{f".{i}" * isinstance(heads, list)}'
            label = head.get('ignore_index', 255)
            if label is not None:  # as masked losses want it
                found[f'{where}.ignore_index'] = label
    return found
