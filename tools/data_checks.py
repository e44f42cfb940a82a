"""Does the data fit the config, and can its files be used?

Before the first iteration, when the runner has built a data loader,
:func:`check_loader` compares its classes with the heads and its categories
with the classes, and looks at a sample of its files. :class:`CheckedLoad`
looks at each file when it is read: is it whole, and are its labels classes?
"""
import json
import mmap
import os.path as osp
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import cv2
from mmcv.transforms import BaseTransform
from mmengine.config import ConfigDict
from mmengine.registry import DATASETS
from PIL import Image

# Files of a data set that are looked at before the first iteration.
SAMPLE = 100
# What OpenCV, Pillow and mmcv raise for a file that is no whole image.
_UNREADABLE = (OSError, ValueError, SyntaxError, AssertionError,
               AttributeError, cv2.error, Image.DecompressionBombError)


class DataError(ValueError):
    """Data that cannot be used; the message names the file."""


@contextmanager
def one_message() -> Iterator[None]:
    """End the program with the message of a :class:`DataError` alone.

    Raises:
        SystemExit: In its place. The traceback that torch puts in front of
            an error from a worker process is left out.
    """
    try:
        yield
    except DataError as error:
        mark = f'{DataError.__name__}: '
        raise SystemExit(str(error).rpartition(mark)[2].strip()) from error


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


def head_sizes(model: Any, where: str = 'model') -> dict[str, int]:
    """Numbers of classes that the heads in a model config are made for.

    Args:
        model (object): The config, or a part of it.
        where (str): Its dotted name.

    Returns:
        dict[str, int]: By the name of the setting. The head of the region
        proposal network, which knows objects only, is left out.
    """
    sizes = {}
    if isinstance(model, dict):
        last = re.sub(r'\.\d+$', '', where).rpartition('.')[2]
        if 'num_classes' in model and 'head' in last and last != 'rpn_head':
            sizes[f'{where}.num_classes'] = model['num_classes']
        parts = model.items()
    elif isinstance(model, (list, tuple)):
        parts = enumerate(model)
    else:
        parts = ()
    for key, part in parts:
        sizes.update(head_sizes(part, f'{where}.{key}'))
    return sizes


def build_loader(build: Callable, cfg: Any, *args: Any, **kwargs: Any) -> Any:
    """Build a data loader; say why where there is nothing to load.

    Args:
        build (Callable): ``build_dataloader`` of the runner.
        cfg (dict | DataLoader): Its first argument.
        args, kwargs: The others.

    Returns:
        DataLoader: The loader.

    Raises:
        DataError: If an annotation file is no JSON, if there is no image, or
            if the type of the data set has classes of its own.
    """
    try:
        return build(cfg, *args, **kwargs)
    except ValueError as error:
        if isinstance(error, json.JSONDecodeError):
            reason = f'an annotation file that is no JSON ({error})'
        elif 'at least one array' in str(error):  # NumPy, asked by mmengine
            _explain_no_images(cfg['dataset'])
            reason = ('no images. Compare data_root, data_prefix, ann_file, '
                      'the suffixes and filter_cfg with the files')
        elif 'subset of classes' in str(error):  # mmseg
            reason = ('classes that its type does not have. Data of your own '
                      "takes type='BaseSegDataset', reduce_zero_label and "
                      'the suffixes of its files (docs/data.md, Images and '
                      'label maps)')
        else:
            raise
        settings = {
            key: value
            for key, value in cfg['dataset'].items() if key != 'pipeline'
        }
        raise DataError(f'the data set {settings} has {reason}') from error


def _explain_no_images(cfg: ConfigDict) -> None:
    """Where no category of a COCO file is a class, mmdet filters all images.

    Args:
        cfg (ConfigDict): Config of the data set without images.

    Raises:
        DataError: If that is why.
    """
    for _, leaf in data_sets(cfg, ''):
        # It has not read its file, but knows the path and the classes.
        data_set = DATASETS.build({**leaf, 'lazy_init': True})
        if hasattr(data_set, 'COCOAPI'):
            _compare_categories(data_set)


def check_loader(loader: Any, sizes: dict[str, int], exact: bool) -> None:
    """Check what a built data loader will give, and what it reads from now on.

    Args:
        loader (DataLoader): The loader; the loading steps of its pipelines
            are put into :class:`CheckedLoad` in place.
        sizes (dict[str, int]): What :func:`head_sizes` returns.
        exact (bool): Whether the heads must have as many classes as the
            data. A classifier may have more.

    Raises:
        DataError: If something does not fit.
    """
    for data_set in _leaves(loader.dataset):
        meta = getattr(data_set, 'metainfo', {})
        classes = meta.get('classes')
        name = describe(data_set)
        if isinstance(classes, str):
            raise DataError(
                f'{name}: metainfo.classes must be a list of names, got the '
                f"text '{classes}'. Write metainfo.classes=\"[{classes}]\"")
        if classes is not None:
            _check_sizes(name, len(classes), sizes, exact)
            if hasattr(data_set, 'cat_ids') and osp.isfile(data_set.ann_file):
                categories = _compare_categories(data_set)
                stray = sorted(set(data_set.cat_img_map) - set(categories))
                if stray:
                    raise DataError(
                        f"'{data_set.ann_file}' has annotations with "
                        f'category_id {_some(stray)}, and its categories are '
                        f'{_some(list(categories))}. Correct the ids, or add '
                        'the categories to the file')
        # Only mmseg computes its loss from label maps as they are.
        limit = None
        if hasattr(data_set, 'reduce_zero_label'):
            limit = len(classes or ()) or max(sizes.values(), default=None)
        loads = list(_check_loads(getattr(data_set, 'pipeline', None), limit))
        _check_sample(data_set, loads)


def _leaves(data_set: Any) -> Iterator[Any]:
    """Data sets inside the wrappers of mmengine, the libraries and torch."""
    if hasattr(data_set, 'datasets'):
        for inner in data_set.datasets:
            yield from _leaves(inner)
    elif hasattr(data_set, 'dataset'):
        yield from _leaves(data_set.dataset)
    else:
        yield data_set


def describe(data_set: Any) -> str:
    """Name a data set in a message: its class and what it reads."""
    prefix = getattr(data_set, 'data_prefix', None) or {}
    paths = [getattr(data_set, 'ann_file', None), *dict(prefix).values()]
    return (f'{type(data_set).__name__} '
            f'({", ".join(str(path) for path in paths if path)})')


def _check_sizes(name: str, count: int, sizes: dict[str, int],
                 exact: bool) -> None:
    """Compare the number of classes with those of the heads."""
    wanted = count if exact else max(count, *sizes.values(), 0)
    wrong = {key: size for key, size in sizes.items() if size != wanted}
    if wrong:
        raise DataError(
            f'{name} has {count} classes, and the model is made for others: ' +
            ', '.join(f'{key}={size}' for key, size in wrong.items()) +
            '. Give the names of the classes with metainfo.classes of the '
            'data sets, or --cfg-options ' +
            ' '.join(f'{key}={wanted}' for key in wrong))


def _compare_categories(data_set: Any) -> dict[int, str]:
    """Compare the categories of a COCO file with the classes.

    mmdet leaves out, without a word, classes that the file does not have and
    annotations of other categories, and numbers the labels in the order of
    the file.

    Args:
        data_set (CocoDataset): The data set, loaded or not.

    Returns:
        dict[int, str]: The categories.

    Raises:
        DataError: If they are not the classes.
    """
    path, classes = data_set.ann_file, list(data_set.metainfo['classes'])
    names = read_categories(path)
    ids = getattr(data_set, 'cat_ids', names)
    found = [names[key] for key in ids if names[key] in classes]
    if found != classes:
        missing = [name for name in classes if name not in found]
        raise DataError(
            f"'{path}' does not fit the classes of the config. " +
            (f'It has no category {_some(missing)}. '
             if missing else 'It has them in another order. ') +
            f'Its categories: {_some(list(names.values()))}. Set '
            'metainfo.classes of the data sets of train, val and test to '
            'those names, in that order, and num_classes of the heads to '
            'their number')
    return names


def _some(values: list, count: int = 20) -> str:
    """The first of a list, as text."""
    return (', '.join(repr(value) for value in values[:count]) +
            (f', ... ({len(values)})' if len(values) > count else ''))


def read_categories(path: str) -> dict[int, str]:
    """Read the categories of a COCO file, and nothing else of it.

    The whole of COCO's own file takes ten seconds and more.

    Args:
        path (str): The file.

    Returns:
        dict[int, str]: Names by id, in the order of the file.

    Raises:
        DataError: If it has no list of categories.
    """
    with open(path, 'rb') as file, mmap.mmap(
            file.fileno(), 0, access=mmap.ACCESS_READ) as text:
        found = re.search(rb'"categories"\s*:\s*(?=\[)', text)
        if found is None:
            raise DataError(f"'{path}' has no list of categories, so it is "
                            'no COCO annotation file')
        # Even the 1203 categories of LVIS are less than a megabyte.
        start = text[found.end():found.end() + 2**24].decode(errors='replace')
    categories, _ = json.JSONDecoder().raw_decode(start)
    return {category['id']: category['name'] for category in categories}


def _check_sample(data_set: Any, loads: list['CheckedLoad']) -> None:
    """Look for some images, and read their label maps."""
    if not hasattr(data_set, 'get_data_info'):
        return
    count = min(len(data_set), SAMPLE)
    for i in range(count):
        info = data_set.get_data_info(i * len(data_set) // count)
        path = info.get('img_path')
        if path and not getattr(data_set, 'backend_args', None) and \
                '://' not in path and not osp.isfile(path):
            raise DataError(f"{describe(data_set)} names the image '{path}', "
                            'which does not exist')
        for load in loads:
            if load.num_classes is not None:
                load(dict(info))
                break


def _check_loads(step: Any, num_classes: int | None) -> Iterator[Any]:
    """Put the loading steps of a pipeline into :class:`CheckedLoad`.

    Args:
        step (object): A pipeline, or a transform that may hold others.
        num_classes (int, optional): For label maps.

    Yields:
        CheckedLoad: The steps.
    """
    for name in ('transforms', 'subroutines'):
        inner = getattr(step, name, None)
        if not isinstance(inner, list):
            if inner is not None:
                yield from _check_loads(inner, num_classes)
            continue
        for i, part in enumerate(inner):
            if type(part).__name__.startswith('LoadImage'):
                inner[i] = CheckedLoad(part, 'img_path')
            elif getattr(part, 'with_seg', False):
                inner[i] = CheckedLoad(part, 'seg_map_path', num_classes)
            else:
                yield from _check_loads(part, num_classes)
                continue
            yield inner[i]


class CheckedLoad(BaseTransform):
    """A loading transform whose errors name the file.

    Args:
        load (BaseTransform): The transform.
        key (str): Where its input holds the path: 'img_path' or
            'seg_map_path'.
        num_classes (int, optional): Labels of a label map must be less, or
            255. Defaults to None, any.
    """

    def __init__(self, load: BaseTransform, key: str,
                 num_classes: int | None = None):
        self.load = load
        self.key = key
        self.num_classes = num_classes

    def transform(self, results: dict) -> dict | None:
        """Load.

        Args:
            results (dict): The sample so far.

        Returns:
            dict | None: What the transform returns.

        Raises:
            DataError: If the file is missing or damaged, or if its labels
                are no classes.
        """
        path = results.get(self.key)
        try:
            results = self.load(results)
        except _UNREADABLE as error:
            reason = 'it does not exist' if isinstance(
                error, FileNotFoundError) else f'it is damaged ({error})'
            kind = 'image' if self.key == 'img_path' else 'label map'
            raise DataError(
                f"cannot read the {kind} '{path}': {reason}. Put a good copy "
                'there, or take it out of the data set') from error
        if results is not None and self.num_classes is not None:
            self._check_labels(path, results)
        return results

    def _check_labels(self, path: str, results: dict) -> None:
        """Look for labels that are no classes."""
        labels = results['gt_seg_map']
        if labels.ndim != 2:
            raise DataError(
                f"the label map '{path}' has {labels.shape[-1]} channels. It "
                'must have one, which holds numbers of classes')
        wrong = labels[(labels >= self.num_classes) & (labels != 255)]
        if wrong.size:
            # The numbers of the file, as the one who has to mend it sees them.
            shift = int(results.get('reduce_zero_label') or 0)
            count = len(results.get('label_map') or ()) or self.num_classes
            raise DataError(
                f"the label map '{path}' has the label {wrong.max() + shift} "
                f'({wrong.size} pixels), which is no class: there are '
                f'{count}, with labels {shift} to {count - 1 + shift}, and '
                f'{"0 and " * shift}255 for what is ignored. Correct the '
                'file, or give metainfo.classes of the data sets and '
                'num_classes of the heads, and reduce_zero_label')

    def __repr__(self) -> str:
        return f'{type(self).__name__}({self.load!r})'
