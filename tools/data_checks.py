"""Does the data fit the config, and can its files be used?

Before the first iteration, when the runner has built a data loader,
:func:`check_loader` compares its classes with the heads and its categories
with the classes, and looks at a sample of its files; :func:`check_metric`
compares the data with what will measure it. :class:`CheckedLoad` looks at each
file when it is read: is it whole, and are its labels classes?
"""
import json
import mmap
import os
import os.path as osp
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import cv2
import numpy as np
from mmcv.transforms import BaseTransform
from mmengine.config import ConfigDict
from mmengine.registry import DATASETS
from PIL import Image, UnidentifiedImageError

# Files of a data set that are looked at before the first iteration.
SAMPLE = 100
# What OpenCV, Pillow and mmcv raise for a file that is no whole image.
_UNREADABLE = (OSError, ValueError, SyntaxError, AssertionError,
               AttributeError, cv2.error, Image.DecompressionBombError)
# What pycocotools and mmdet take for granted in a COCO file.
_COCO_KEYS = {
    'images': ('id', 'file_name', 'height', 'width'),
    'annotations': ('id', 'image_id', 'category_id', 'bbox', 'area'),
    'categories': ('id', 'name')
}


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
        DataError: If an annotation file is no JSON or incomplete, if there
            is no image, if there are not as many class folders as classes,
            or if the type of the data set has classes of its own.
    """
    try:
        return build(cfg, *args, **kwargs)
    except (AssertionError, KeyError, RuntimeError, ValueError) as error:
        no_images = ('no images. Compare data_root, data_prefix, ann_file, '
                     'the suffixes and filter_cfg with the files')
        if isinstance(error, KeyError):
            _explain_missing_key(cfg['dataset'], error.args[0])
            raise
        if isinstance(error, json.JSONDecodeError):
            reason = f'an annotation file that is no JSON ({error})'
        elif 'at least one array' in str(error):  # NumPy, asked by mmengine
            _explain_no_images(cfg['dataset'])
            reason = no_images
        elif 'subfolders' in str(error):  # mmpretrain
            _explain_class_folders(cfg['dataset'])
            reason = no_images
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


def _unread(cfg: ConfigDict) -> Iterator[Any]:
    """Build data sets that know paths and classes, and have read nothing."""
    for _, leaf in data_sets(cfg, ''):
        yield DATASETS.build({**leaf, 'lazy_init': True})


def _read_json(path: str) -> dict:
    """Read an annotation file, the whole of it.

    Raises:
        DataError: If it is none.
    """
    try:
        with open(path, encoding='utf-8') as file:
            content = json.load(file)
    except ValueError as error:  # of JSON or UTF-8
        raise DataError(f"'{path}' is no JSON file ({error}); expected the "
                        'annotations of a data set in COCO format') from error
    if not isinstance(content, dict):
        raise DataError(f"'{path}' holds a {type(content).__name__}; expected "
                        'the annotations of a data set in COCO format')
    return content


def _explain_missing_key(cfg: ConfigDict, key: Any) -> None:
    """Find the entry of a COCO file that made mmdet raise a KeyError.

    Args:
        cfg (ConfigDict): Config of the data set.
        key (object): What was not found.

    Raises:
        DataError: If an entry of a file lacks it.
    """
    lists = [name for name, keys in _COCO_KEYS.items() if key in keys]
    for data_set in _unread(cfg) if lists else ():
        if not hasattr(data_set, 'COCOAPI') or not osp.isfile(
                data_set.ann_file):
            continue
        content = _read_json(data_set.ann_file)
        for name in lists:
            for i, entry in enumerate(content.get(name, ())):
                if key not in entry:
                    raise DataError(
                        f"'{data_set.ann_file}' is incomplete: entry {i} of "
                        f"'{name}' (id {entry.get('id')}) has no '{key}'. Add "
                        'it, or take the entry out of the file')


def _explain_no_images(cfg: ConfigDict) -> None:
    """Where no object of a COCO file is of a class, mmdet filters all images.

    Args:
        cfg (ConfigDict): Config of the data set without images.

    Raises:
        DataError: If that is why.
    """
    for data_set in _unread(cfg):
        if hasattr(data_set, 'COCOAPI') and osp.isfile(data_set.ann_file):
            content = _read_json(data_set.ann_file)
            _check_ids(
                data_set.ann_file,
                {entry['category_id']
                 for entry in content.get('annotations', ())
                 if 'category_id' in entry},
                _compare_categories(data_set))


def _explain_class_folders(cfg: ConfigDict) -> None:
    """mmpretrain takes each folder of a data set without a list for a class.

    Args:
        cfg (ConfigDict): Config of the data set.

    Raises:
        DataError: If there is none, or if there are not as many as classes.
    """
    for data_set in _unread(cfg):
        folder = getattr(data_set, 'img_prefix', '')
        if data_set.ann_file or not getattr(
                data_set, 'with_label', False) or not osp.isdir(folder):
            continue
        found = sorted(
            entry.name for entry in os.scandir(folder) if entry.is_dir())
        name, classes = describe(data_set), data_set.metainfo.get('classes')
        _check_names(name, classes)
        if not found:
            raise DataError(
                f'{name} has no class folders. Sort its images into one '
                'folder per class, or list them with their labels in an '
                'ann_file (docs/data.md)')
        if classes is not None and len(found) != len(classes):
            raise DataError(
                f'{name} has {len(found)} class folders ({_some(found, 5)}), '
                f'and there are {len(classes)} classes. Add the folders that '
                'are missing, or set metainfo.classes of the data sets of '
                'train, val and test to the names of the folders, in '
                'alphabetical order, and model.head.num_classes and '
                'data_preprocessor.num_classes to their number (docs/data.md, '
                'Images in class folders)')


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
        _check_names(name, classes)
        if classes is not None:
            _check_sizes(name, len(classes), sizes, exact)
            if hasattr(data_set, 'cat_ids') and osp.isfile(data_set.ann_file):
                _check_ids(data_set.ann_file, set(data_set.cat_img_map),
                           _compare_categories(data_set))
        # Only mmseg computes its loss from label maps as they are.
        limit = None
        if hasattr(data_set, 'reduce_zero_label'):
            limit = len(classes or ()) or max(sizes.values(), default=None)
        loads = list(_check_loads(getattr(data_set, 'pipeline', None), limit))
        _check_sample(data_set, loads)


def check_metric(metric: dict, loader: Any, where: str) -> None:
    """Compare the COCO file of a metric with the data that it will measure.

    The metric turns labels into categories and looks for images by its own
    file. With another one it fails after an epoch, or measures nonsense.

    Args:
        metric (dict): Its config.
        loader (DataLoader): The data. Wrapped data sets are left alone, and
            so are files that are not on this machine.
        where (str): Name of the setting, such as 'val_evaluator'.

    Raises:
        DataError: If the file has other categories or images.
    """
    path, data_set = metric.get('ann_file'), loader.dataset
    if not path or not hasattr(data_set, 'cat_ids'):
        return
    own = data_set.ann_file
    if not osp.isfile(path) or not osp.isfile(own) or \
            osp.realpath(path) == osp.realpath(own):
        return
    classes = list(data_set.metainfo['classes'])
    names = list(read_categories(path).values())
    reason = None
    if [name for name in names if name in classes] != classes:
        reason = (f'its categories are {_some(names)}, and the classes are '
                  f'{_some(classes)}')
    else:
        # Ids alone do not tell: most files count their images from 0 or 1.
        images = {
            image['id']: image.get('file_name', '')
            for image in _read_json(path).get('images', ())
        }
        infos = map(data_set.get_data_info, range(len(data_set)))
        paths = {info['img_id']: info['img_path'] for info in infos}
        if images.keys() != paths.keys() or not all(
                paths[key].endswith(osp.basename(name))
                for key, name in images.items()):
            reason = (f'its {len(images)} images are not the {len(paths)} '
                      'of the data set')
    if reason is not None:
        raise DataError(
            f"{where} measures with '{path}', and its data set reads "
            f"'{own}': {reason}. Set {where}.ann_file={own}")


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


def _check_names(name: str, classes: Any) -> None:
    """Refuse a text as the list of classes; each letter would be one."""
    if isinstance(classes, str):
        raise DataError(
            f'{name}: metainfo.classes must be a list of names, got the '
            f"text '{classes}'. Write metainfo.classes=\"[{classes}]\"")


def _check_ids(path: str, used: set, categories: dict[int, str]) -> None:
    """Look for annotations of a COCO file that are of no category."""
    stray = sorted(used - set(categories), key=str)
    if stray:
        raise DataError(
            f"'{path}' has annotations with category_id {_some(stray)}, and "
            f'its categories are {_some(list(categories))}. Correct the ids, '
            'or add the categories to the file')


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
    twice = sorted({name for name in found if found.count(name) > 1})
    if twice:
        raise DataError(
            f"'{path}' has more than one category of the name {_some(twice)}. "
            'Give each a name of its own, or merge them')
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
        DataError: If it has no list of categories, or if one of them has no
            number and name of its own.
    """
    if not osp.getsize(path):  # which cannot be mapped
        raise DataError(f"'{path}' is empty; expected the annotations of a "
                        'data set in COCO format')
    with open(path, 'rb') as file, mmap.mmap(
            file.fileno(), 0, access=mmap.ACCESS_READ) as text:
        found = re.search(rb'"categories"\s*:\s*(?=\[)', text)
        if found is None:
            raise DataError(f"'{path}' has no list of categories, so it is "
                            'no COCO annotation file')
        # Even the 1203 categories of LVIS are less than a megabyte.
        start = text[found.end():found.end() + 2**24].decode(errors='replace')
    try:
        categories, _ = json.JSONDecoder().raw_decode(start)
    except json.JSONDecodeError as error:
        raise DataError(
            f"the categories of '{path}' are no JSON ({error})") from error
    names = {}
    for category in categories:
        key, name = category.get('id'), category.get('name')
        if not isinstance(key, (int, float)) or not isinstance(name, str):
            raise DataError(
                f"'{path}' has the category {category}. Its id must be a "
                'number, the category_id of its annotations, and its name a '
                'text')
        if key in names:
            raise DataError(
                f"'{path}' has more than one category with the id {key}: "
                f"'{names[key]}' and '{name}'. Give each an id of its own, "
                'and correct category_id of the annotations')
        names[key] = name
    return names


def _check_sample(data_set: Any, loads: list['CheckedLoad']) -> None:
    """Look for some images, and read their label maps."""
    if not hasattr(data_set, 'get_data_info'):
        return
    count = min(len(data_set), SAMPLE)
    for i in range(count):
        info = data_set.get_data_info(i * len(data_set) // count)
        path = info.get('img_path')
        local = path and _is_local(path, data_set)
        if local and not osp.isfile(path):
            raise DataError(f"{describe(data_set)} names the image '{path}', "
                            'which does not exist')
        for load in loads:
            if load.num_classes is not None:
                labels = load(dict(info))['gt_seg_map']
                if local:
                    _check_header(info, labels)
                break


def _is_local(path: str, reader: Any) -> bool:
    """Whether a data set or a loading step reads a path of this machine."""
    return not getattr(reader, 'backend_args', None) and '://' not in path


def _check_header(info: dict, labels: np.ndarray) -> None:
    """Compare the size of a label map with that in the image file."""
    try:
        with Image.open(info['img_path']) as image:  # decodes nothing
            shape = image.size[::-1]
    except _UNREADABLE:
        return  # CheckedLoad names it, if the loader cannot read it either
    # The loader may turn an image that was stored lying on its side.
    if sorted(shape) != sorted(labels.shape):
        raise _other_size(info, shape, labels)


def _other_size(info: dict, shape: tuple, labels: np.ndarray) -> DataError:
    """The error for a label map that is not as large as its image."""
    (height, width), (rows, columns) = shape, labels.shape
    return DataError(
        f"the label map '{info['seg_map_path']}' is {columns} wide and {rows} "
        f"high, and its image '{info['img_path']}' {width} wide and {height} "
        'high. Make the label map anew for this image, or take both out of '
        'the data set')


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
            DataError: If the file is missing or damaged, if its labels are no
                classes, or if it is not as large as its image.
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
        """Look for labels that are no classes, and compare the size."""
        labels = results['gt_seg_map']
        if labels.ndim != 2:
            raise DataError(
                f"the label map '{path}' has {labels.shape[-1]} channels. It "
                'must have one, which holds numbers of classes')
        shape = results.get('ori_shape')  # that of the image as loaded
        if shape is not None and tuple(shape[:2]) != labels.shape:
            raise _other_size(results, shape[:2], labels)
        wide = self._wide_labels(path)
        wrong = wide[(wide < 0) | (wide > 255)]
        if wrong.size:
            raise self._no_class(path, wrong, results)
        wrong = labels[(labels >= self.num_classes) & (labels != 255)]
        if wrong.size:
            # The numbers of the file, as the one who has to mend it sees them.
            wrong = wrong + int(results.get('reduce_zero_label') or 0)
            raise self._no_class(path, wrong, results)

    def _wide_labels(self, path: str) -> np.ndarray:
        """Labels of more than one byte, of which mmseg keeps the last only.

        Returns:
            numpy.ndarray: The labels of the file. Empty if they are bytes,
            as the header of the file tells, or if it is not on this machine.
        """
        if _is_local(path, self.load):
            try:
                with Image.open(path) as image:
                    if image.mode[0] in 'IF':  # integers and floats
                        return np.array(image)
            except UnidentifiedImageError:
                pass  # mmcv has other decoders, which have read it
        return np.empty(0)

    def _no_class(self, path: str, wrong: np.ndarray,
                  results: dict) -> DataError:
        """The error for labels, as the file has them, that are no classes."""
        shift = int(results.get('reduce_zero_label') or 0)
        count = len(results.get('label_map') or ()) or self.num_classes
        return DataError(
            f"the label map '{path}' has the label {wrong.max()} "
            f'({wrong.size} pixels), which is no class: there are '
            f'{count}, with labels {shift} to {count - 1 + shift}, and '
            f'{"0 and " * shift}255 for what is ignored. Correct the '
            'file, or give metainfo.classes of the data sets and '
            'num_classes of the heads, and reduce_zero_label')

    def __repr__(self) -> str:
        return f'{type(self).__name__}({self.load!r})'
