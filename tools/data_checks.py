"""Does the data fit the config, and can its files be used?

Before the first iteration, when the runner has built a data loader,
:func:`check_loader` compares its classes with the heads and its categories
with the classes, and looks at a sample of its files; :func:`check_agreement`
compares it with the data of training, and :func:`check_metric` what measures
on it. What is peculiar to COCO's files is in :mod:`coco_checks`, to class
folders and lists of images in :mod:`classification_checks`. The files that
are read later :class:`checked_load.CheckedLoad` looks at: is it whole, and
are its labels classes?
"""
import json
import logging
import os.path as osp
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
from mmengine.config import ConfigDict
from mmengine.logging import print_log
from mmengine.registry import DATASETS

import coco_checks
from checked_load import CheckedLoad, check_header, is_local, wrap_loads
from classification_checks import (
    check_label,
    check_listed_labels,
    check_order,
    class_folders,
    explain_class_folders,
    explain_lists,
    odd_folders,
)
from config_queries import data_sets, type_name
from data_error import DataError, describe, some_of

# Files of a data set that are looked at before the first iteration.
SAMPLE = 100


def check_metric(metric: dict, loader: Any, sizes: dict[str, int],
                 ignored: dict[str, int], where: str) -> None:
    """Check that a metric fits the model and the data.

    Args:
        metric (dict): Config of the metric.
        loader (DataLoader): The data that it will measure.
        sizes (dict[str, int]): Of :func:`config_queries.model_sizes`.
        ignored (dict[str, int]): Of :func:`config_queries.ignored_labels`.
        where (str): Name of the setting, such as 'val_evaluator'.

    Raises:
        DataError: If it does not.
    """
    _check_topk(metric, sizes, where)
    _check_ignored(metric, ignored, sizes, where)
    coco_checks.check_metric(metric, loader, where)


def _check_ignored(metric: dict, ignored: dict[str, int],
                   sizes: dict[str, int], where: str) -> None:
    """Check that a metric ignores what the heads ignore.

    Raises:
        DataError: If it counts a label that is no class.
    """
    own = metric.get('ignore_index', 255)
    for key, label in ignored.items():
        if type_name(metric) == 'IoUMetric' and label != own \
                and label >= max(sizes.values(), default=0):
            raise DataError(
                f'{key}={label}, which is no class, and {where} ignores {own}:'
                f' whatever is predicted where the label is {label} would '
                f'count as wrong. Set {where}.ignore_index={label}')


def _check_topk(metric: dict, sizes: dict[str, int], where: str) -> None:
    """Check that a classifier has the classes that a metric counts up to.

    Raises:
        DataError: If it has not; mmpretrain would say so after an epoch.
    """
    topk, classes = metric.get('topk') or (), min(sizes.values(), default=0)
    most = max(topk if isinstance(topk, (list, tuple)) else [topk], default=0)
    if type_name(metric) == 'Accuracy' and classes and most > classes:
        raise DataError(
            f'{where}: topk={topk} asks for the {most} best classes, and the '
            f'model has {classes}: set topk=(1, )')


def build_loader(build: Callable, cfg: Any, *args: Any, **kwargs: Any) -> Any:
    """Build a data loader; say why where there is nothing to load.

    Args:
        build (Callable): ``build_dataloader`` of the runner.
        cfg (dict | DataLoader): Its first argument.
        args, kwargs: The others.

    Returns:
        DataLoader: The loader.

    Raises:
        DataError: If an annotation file is no JSON or incomplete, if there
            is no image or no object to train on, if there are not as many
            class folders as classes or a list of images is of another form,
            or if the type of the data set has classes of its own.
    """
    if isinstance(cfg, dict) and not cfg.get('num_workers'):
        # torch refuses to keep workers where there are none.
        cfg = {**cfg, 'persistent_workers': False}
    try:
        return build(cfg, *args, **kwargs)
    except (AssertionError, KeyError, RuntimeError, TypeError,
            ValueError) as error:
        _explain(error, cfg['dataset'])
        raise


def _explain(error: Exception, cfg: ConfigDict) -> None:
    """Say why a data set cannot be built, where that can be told.

    Args:
        error (Exception): What building it has raised.
        cfg (ConfigDict): Its config.

    Raises:
        DataError: With the reason.
    """
    text, reason = str(error), None
    no_images = ('no images. Compare data_root, data_prefix, ann_file, the '
                 'suffixes and filter_cfg with the files')
    if isinstance(error, KeyError):
        coco_checks.explain_missing_key(_unread(cfg), error.args[0])
    elif isinstance(error, json.JSONDecodeError):
        reason = f'an annotation file that is no JSON ({error})'
    elif 'annotation file format' in text:  # pycocotools
        coco_checks.explain_format(_unread(cfg))
    elif 'are not unique' in text:  # mmdet
        coco_checks.explain_shared_ids(_unread(cfg))
    elif 'at least one array' in text:  # NumPy, asked by mmengine
        coco_checks.explain_no_images(_unread(cfg))
        reason = no_images
    elif 'subfolders' in text:  # mmpretrain
        for data_set in _unread(cfg):
            _check_class_names(describe(data_set),
                               data_set.metainfo.get('classes'))
        explain_class_folders(_unread(cfg))
        reason = no_images
    elif 'subset of classes' in text:  # mmseg
        reason = ('classes that its type does not have. Data of your own '
                  "takes type='BaseSegDataset', reduce_zero_label and the "
                  'suffixes of its files (docs/data.md, Images and label '
                  'maps)')
    elif isinstance(error, (TypeError, ValueError)):
        explain_lists(_unread(cfg))
        coco_checks.explain_entries(_unread(cfg))
    if reason is not None:
        settings = {
            key: value for key, value in cfg.items() if key != 'pipeline'}
        raise DataError(f'the data set {settings} has {reason}') from error


def _unread(cfg: ConfigDict) -> Iterator[Any]:
    """Build data sets that know paths and classes, and have read nothing."""
    for _, leaf in data_sets(cfg, ''):
        try:
            data_set = DATASETS.build({**leaf, 'lazy_init': True})
        except TypeError:
            continue  # of a class of one's own without lazy_init
        yield data_set


def check_loader(loader: Any, sizes: dict[str, int], exact: bool,
                 ignored: dict[str, int] | None = None) -> None:
    """Check what a built data loader will give, and what it reads from now on.

    Args:
        loader (DataLoader): The loader; the loading steps of its pipelines
            are put into :class:`CheckedLoad` in place.
        sizes (dict[str, int]): Of :func:`config_queries.model_sizes`.
        exact (bool): Whether the heads must have as many classes as the
            data. A classifier may have more.
        ignored (dict[str, int], optional): Of
            :func:`config_queries.ignored_labels`. Where there is none, data
            sets say which label is ignored. Defaults to None.

    Raises:
        DataError: If something does not fit.
    """
    found, ignored = list(_leaves(loader.dataset)), ignored or {}
    if len(set(ignored.values())) > 1:
        raise DataError(
            'the heads do not ignore the same label: ' +
            ', '.join(f'{key}={label}' for key, label in ignored.items()))
    for data_set in found:
        meta = getattr(data_set, 'metainfo', {})
        classes = meta.get('classes')
        name = describe(data_set)
        _check_class_names(name, classes)
        if classes is not None:
            # Those of panoptic data are things and stuff, and heads that have
            # but a number of classes are for things.
            _check_sizes(data_set, meta.get('thing_classes') or classes, sizes,
                         exact)
            check_order(data_set, classes)
            coco_checks.check_data_set(data_set, alone=len(found) == 1)
        # Only mmseg computes its loss from label maps as they are.
        limit = None
        if hasattr(data_set, 'reduce_zero_label'):
            limit = len(classes or ()) or max(sizes.values(), default=None)
        label = next(iter(ignored.values()),
                     getattr(data_set, 'ignore_index', 255))
        loads = list(wrap_loads(getattr(data_set, 'pipeline', None), limit,
                                label))
        count = len(classes or ()) or min(sizes.values(), default=0)
        _check_sample(data_set, loads, count)
        check_listed_labels(data_set, count)
    # A sampler without end has a length too.
    if loader.drop_last and not len(loader) \
            and 'Infinite' not in type(loader.sampler).__name__:
        raise DataError(
            f'{", ".join(map(describe, found))}: there are '
            f'{len(loader.sampler)} images for a process, and drop_last=True '
            f'leaves out what is less than a batch of {loader.batch_size}: '
            'make batch_size smaller, or drop_last=False')


def check_agreement(first: Any, second: Any) -> None:
    """Check that labels mean the same in two data loaders.

    A label is the place of a name in the classes of its data set, and without
    a list of classes mmpretrain numbers the folders that it finds.

    Args:
        first (DataLoader): The one that was built first, that of training.
        second (DataLoader): A later one, of val or test.

    Raises:
        DataError: If they have other classes, or another reduce_zero_label.
    """
    one = next(_leaves(first.dataset))
    for other in _leaves(second.dataset):
        pair = one, other
        names = ' and '.join(describe(data_set) for data_set in pair)
        classes = [
            list(getattr(data_set, 'metainfo', {}).get('classes') or ())
            for data_set in pair
        ]
        unshared = set(classes[0]).symmetric_difference(classes[1])
        # With the same folders labels are the same by any names, such as those
        # that mmpretrain has for ImageNet's.
        folders = [unshared and class_folders(data_set) for data_set in pair]
        are_same = folders[0] and folders[0] == folders[1]
        if all(classes) and classes[0] != classes[1] and not are_same:
            raise DataError(
                f'{names} do not have the same classes, so that a label '
                'means one thing here and another there: '
                f'{_difference(*classes)}. ' +
                (odd_folders(one, unshared) or odd_folders(other, unshared)
                 or 'Add the class folders that are missing, or set '
                 'metainfo.classes of the data sets of train, val and test to '
                 'the same list of names'))
        shifts = [
            getattr(data_set, 'reduce_zero_label', None) for data_set in pair
        ]
        if None not in shifts and shifts[0] != shifts[1]:
            raise DataError(
                f'{names} differ in reduce_zero_label ({shifts[0]} and '
                f'{shifts[1]}), so that the labels of one are shifted '
                'against those of the other. Set it to the same in the data '
                'sets of train, val and test: True if 0 is no class in the '
                'label maps')


def _difference(first: list[str], second: list[str]) -> str:
    """Say in words how two lists of classes differ."""
    only = [
        f'only the {which} of the two has {some_of(extra, 5)}'
        for which, extra in (
            ('first', [name for name in first if name not in second]),
            ('second', [name for name in second if name not in first]))
        if extra
    ]
    return ', and '.join(only) or 'they have them in another order'


def _leaves(data_set: Any) -> Iterator[Any]:
    """Data sets inside the wrappers of mmengine, the libraries and torch."""
    if hasattr(data_set, 'datasets'):
        for inner in data_set.datasets:
            yield from _leaves(inner)
    elif hasattr(data_set, 'dataset'):
        yield from _leaves(data_set.dataset)
    else:
        yield data_set


def _check_class_names(name: str, classes: Any) -> None:
    """Refuse a text as the list of classes; each letter would be one."""
    if isinstance(classes, str):
        raise DataError(
            f'{name}: metainfo.classes must be a list of names, got the '
            f"text '{classes}'. Write metainfo.classes=\"[{classes}]\"")


def _check_sizes(data_set: Any, classes: Any, sizes: dict[str, int],
                 exact: bool) -> None:
    """Compare the number of classes with those that the model is made for."""
    count, found = len(classes), set(sizes.values())
    # A classifier may have more, as long as all of it has the same number.
    if not exact and len(found) == 1 and count <= min(found):
        if count < min(found):
            print_log(
                f'{describe(data_set)} has {count} classes, and the model is '
                f'made for {min(found)}; if that is not meant: --cfg-options '
                + ' '.join(f'{key}={count}' for key in sizes),
                logger='current', level=logging.WARNING)
        return
    wrong = {key: size for key, size in sizes.items() if size != count}
    if wrong:
        advice = (
            'Give the names of the classes with metainfo.classes of the '
            'data sets, or --cfg-options ' +
            ' '.join(f'{key}={count}' for key in wrong))
        if count > min(found) and list(classes) == class_folders(data_set):
            advice = odd_folders(data_set, classes) or advice
        raise DataError(
            f'{describe(data_set)} has {count} classes, and the model is made '
            'for others: ' +
            ', '.join(f'{key}={size}' for key, size in wrong.items()) +
            f'. {advice}')


def _check_sample(data_set: Any, loads: list['CheckedLoad'],
                  classes: int) -> None:
    """Look for some images, read their label maps, and compare their labels
    with the number of classes."""
    if not hasattr(data_set, 'get_data_info'):
        return
    count = min(len(data_set), SAMPLE)
    pixels = np.zeros(256, int)  # of each label
    for i in range(count):
        info = data_set.get_data_info(i * len(data_set) // count)
        path = info.get('img_path')
        if any(getattr(load.load, 'with_mask', False) for load in loads):
            coco_checks.check_masks(info)
        check_label(data_set, path, info.get('gt_label'), classes)
        local = path and is_local(path, data_set)
        if local and not osp.isfile(path):
            raise DataError(f"{describe(data_set)} names the image '{path}', "
                            'which does not exist')
        for load in loads:
            if load.num_classes is not None:
                labels = load(dict(info))['gt_seg_map']
                if local:
                    check_header(info, labels)
                if labels.dtype == np.uint8:  # as mmseg's own loader gives
                    pixels += np.bincount(labels.ravel(), minlength=256)
                    ignored = load.ignore_index
                break
    if pixels.any():
        _tell_lone_class(data_set, pixels, ignored, count)


def _tell_lone_class(data_set: Any, pixels: np.ndarray, ignored: int,
                     count: int) -> None:
    """Warn where nothing can be learned but one class, as from masks of 0 and
    255, and the measures would be perfect."""
    classes = data_set.metainfo.get('classes') or ()
    found = [label for label in np.flatnonzero(pixels) if label != ignored]
    share = pixels[ignored] / pixels.sum() if ignored < 256 else 0
    if share and len(found) < 2 <= len(classes):
        names = [classes[label] for label in found if label < len(classes)]
        print_log(
            f'{describe(data_set)}: of {len(classes)} classes, the {count} '
            f'label maps that were looked at have {some_of(names) or "none"}. '
            f'{share:.0%} of their pixels are {ignored}, which is ignored. If '
            'that is a class, write its number, counted from 0, in its place',
            logger='current', level=logging.WARNING)
