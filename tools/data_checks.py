"""Does the data fit the config, and can its files be used?

Before the first iteration, when the runner has built a data loader,
:func:`check_loader` compares its classes with the heads and its categories
with the classes, and looks at a sample of its files; :func:`check_agreement`
compares it with the data of training, and :func:`check_metric` with what will
measure it. :class:`CheckedLoad` looks at each file when it is read: is it
whole, and are its labels classes?
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


def model_sizes(cfg: ConfigDict) -> dict[str, int]:
    """Numbers of classes that a model and its preprocessing are made for.

    Args:
        cfg (Config): The whole config.

    Returns:
        dict[str, int]: Those of :func:`head_sizes` and, of a classifier that
        trains on one-hot labels, the length of those.
    """
    model = cfg.model.get('module', cfg.model)  # test.py --tta wraps it
    sizes = head_sizes(model)
    # As mmengine does: that of the model goes before that of the config.
    where = 'data_preprocessor'
    settings = cfg.get(where)
    if 'data_preprocessor' in model:
        where, settings = f'model.{where}', model.data_preprocessor
    settings = settings or {}
    one_hot = settings.get('to_onehot') or settings.get('batch_augments') or (
        model.get('train_cfg') or {}).get('augments')
    if one_hot and settings.get('num_classes'):
        sizes[f'{where}.num_classes'] = settings['num_classes']
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
            is no image or no object to train on, if there are not as many
            class folders as classes, or if the type of the data set has
            classes of its own.
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
        elif 'annotation file format' in str(error):  # pycocotools
            for path in _coco_files(cfg['dataset']):
                _read_json(path)
            raise
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


def _coco_files(cfg: ConfigDict) -> Iterator[str]:
    """Annotation files in COCO's format of data sets that are not read."""
    for data_set in _unread(cfg):
        if hasattr(data_set, 'COCOAPI') and osp.isfile(data_set.ann_file):
            yield data_set.ann_file


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
    """Find what a COCO file lacks that made mmdet raise a KeyError.

    Args:
        cfg (ConfigDict): Config of the data set.
        key (object): What was not found.

    Raises:
        DataError: If a file has no categories, or an entry of it no such
            key.
    """
    lists = [name for name, keys in _COCO_KEYS.items() if key in keys]
    for path in _coco_files(cfg) if lists or key == 'categories' else ():
        content = _read_json(path)
        if key == 'categories':
            read_categories(path)
        for name in lists:
            for i, entry in enumerate(content.get(name, ())):
                if key not in entry:
                    raise DataError(
                        f"'{path}' is incomplete: entry {i} of "
                        f"'{name}' (id {entry.get('id')}) has no '{key}'. Add "
                        'it, or take the entry out of the file')


def _explain_no_images(cfg: ConfigDict) -> None:
    """Where no object of a COCO file can be used, mmdet filters all images.

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
            reason = _without_objects(content)
            if reason is not None:
                raise DataError(f"'{data_set.ann_file}' {reason}")


def _without_objects(content: dict) -> str | None:
    """Say why no image of a COCO file can have an object.

    Args:
        content (dict): The file.

    Returns:
        str | None: What follows its name in a message. None if there are
        annotations of its images.
    """
    images = content.get('images') or []
    annotations = content.get('annotations') or []
    ids, used = (
        sorted({entry.get(key) for entry in entries}, key=str)
        for entries, key in ((images, 'id'), (annotations, 'image_id')))
    if not images:
        return "lists no 'images'. Add them to the file"
    if not annotations:
        return ("has no 'annotations', so there is no object to train on. "
                'Add them, or give the file that has them as ann_file')
    if not set(ids) & set(used):
        return (f'has {len(annotations)} annotations, and none is of one of '
                f'its images: they have the image_id {_some(used, 5)}, '
                f'and the images the id {_some(ids, 5)}. Correct the '
                'ids; a text is not the number that it spells')
    return None


def _check_objects(data_set: Any, alone: bool) -> None:
    """Look for an object to train on; mmdet would train without any.

    Args:
        data_set (CocoDataset): The data set, loaded.
        alone (bool): Whether it is all the data. Otherwise it may be
            pictures of nothing, by intention.

    Raises:
        DataError: If there is none.
    """
    for info in map(data_set.get_data_info, range(len(data_set))):
        # Panoptic segments, or frames of a video, are objects too.
        if info.get('segments_info') or 'instances' not in info or not all(
                instance.get('ignore_flag') for instance in info['instances']):
            return
    path = data_set.ann_file
    content = _read_json(path)
    if not alone and not content.get('annotations'):
        return
    reason = _without_objects(content)
    if reason is None:
        entry = content['annotations'][0]
        reason = (
            'has no object to train on. mmdet leaves out an annotation whose '
            'area is 0, whose bbox (x, y, width and height, in pixels) is '
            'less than a pixel wide or high or outside the image, and one '
            'that is ignore or iscrowd. Correct them; entry 0 has '
            f'area={entry.get("area")} and bbox={entry.get("bbox")}')
    raise DataError(f"'{path}' {reason}")


def _explain_class_folders(cfg: ConfigDict) -> None:
    """mmpretrain takes each folder of a data set without a list for a class.

    Args:
        cfg (ConfigDict): Config of the data set.

    Raises:
        DataError: If there is none, or if there are not as many as classes.
    """
    for data_set in _unread(cfg):
        found = _class_folders(data_set)
        if found is None:
            continue
        name, classes = describe(data_set), data_set.metainfo.get('classes')
        _check_names(name, classes)
        if not found:
            raise DataError(
                f'{name} has no class folders. Sort its images into one '
                'folder per class, or list them with their labels in an '
                'ann_file (docs/data.md)')
        if classes is not None and len(found) != len(classes):
            advice = (
                'Add the folders that are missing, or set metainfo.classes of '
                'the data sets of train, val and test to the names of the '
                'folders, in alphabetical order, and model.head.num_classes '
                'and data_preprocessor.num_classes to their number '
                '(docs/data.md, Images in class folders)')
            if len(found) > len(classes):
                advice = _odd_folders(data_set, found) or advice
            raise DataError(
                f'{name} has {len(found)} class folders ({_some(found, 5)}), '
                f'and there are {len(classes)} classes. {advice}')


def _class_folders(data_set: Any) -> list[str] | None:
    """Folders that mmpretrain takes for the classes of a data set.

    Args:
        data_set (object): The data set, loaded or not.

    Returns:
        list[str] | None: Their names, in the order of the labels. None if
        the labels come from elsewhere, or if it is not on this machine.
    """
    folder = getattr(data_set, 'img_prefix', '')
    if not getattr(data_set, 'with_label', False) or data_set.ann_file or \
            not osp.isdir(folder):
        return None
    return sorted(entry.name for entry in os.scandir(folder)
                  if entry.is_dir())


def _odd_folders(data_set: Any, among: Any) -> str:
    """Name the class folders that are most likely no classes.

    Args:
        data_set (object): The data set, loaded or not.
        among (Collection[str]): Names of those that do not fit.

    Returns:
        str: What to do with those that are hidden, such as Jupyter's, or
        hold no image. Empty if there are none.
    """
    odd = [
        name for name in _class_folders(data_set) or ()
        if name in among and (name.startswith('.') or not any(
            data_set.is_valid_file(file) for _, _, files in os.walk(
                osp.join(data_set.img_prefix, name), followlinks=True)
            for file in files))
    ]
    if not odd:
        return ''
    return (f'Each folder in {data_set.img_prefix} counts as a class, and '
            f'{_some(odd, 5)} is hidden or holds no image. Delete such a '
            'folder, or put its images there')


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
    leaves = list(_leaves(loader.dataset))
    for data_set in leaves:
        meta = getattr(data_set, 'metainfo', {})
        classes = meta.get('classes')
        name = describe(data_set)
        _check_names(name, classes)
        if classes is not None:
            _check_sizes(data_set, classes, sizes, exact)
            if hasattr(data_set, 'cat_ids') and osp.isfile(data_set.ann_file):
                _check_ids(data_set.ann_file, set(data_set.cat_img_map),
                           _compare_categories(data_set))
                if not data_set.test_mode:
                    _check_objects(data_set, len(leaves) == 1)
        # Only mmseg computes its loss from label maps as they are.
        limit = None
        if hasattr(data_set, 'reduce_zero_label'):
            limit = len(classes or ()) or max(sizes.values(), default=None)
        loads = list(_check_loads(getattr(data_set, 'pipeline', None), limit))
        _check_sample(data_set, loads)


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
        if all(classes) and classes[0] != classes[1]:
            unshared = set(classes[0]).symmetric_difference(classes[1])
            raise DataError(
                f'{names} do not have the same classes, so that a label '
                'means one thing here and another there: '
                f'{_difference(*classes)}. ' +
                (_odd_folders(one, unshared) or _odd_folders(other, unshared)
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
        f'only the {which} of the two has {_some(extra, 5)}'
        for which, extra in (
            ('first', [name for name in first if name not in second]),
            ('second', [name for name in second if name not in first]))
        if extra
    ]
    return ', and '.join(only) or 'they have them in another order'


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


def _check_sizes(data_set: Any, classes: Any, sizes: dict[str, int],
                 exact: bool) -> None:
    """Compare the number of classes with those that the model is made for."""
    count, found = len(classes), set(sizes.values())
    # A classifier may have more, as long as all of it has the same number.
    if not exact and len(found) == 1 and count <= min(found):
        return
    wrong = {key: size for key, size in sizes.items() if size != count}
    if wrong:
        advice = (
            'Give the names of the classes with metainfo.classes of the '
            'data sets, or --cfg-options ' +
            ' '.join(f'{key}={count}' for key in wrong))
        if count > min(found) and list(classes) == _class_folders(data_set):
            advice = _odd_folders(data_set, classes) or advice
        raise DataError(
            f'{describe(data_set)} has {count} classes, and the model is made '
            'for others: ' +
            ', '.join(f'{key}={size}' for key, size in wrong.items()) +
            f'. {advice}')


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
        if any(getattr(load.load, 'with_mask', False) for load in loads):
            _check_masks(info)
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


def _check_masks(info: dict) -> None:
    """Look for objects without a mask, where a pipeline loads masks."""
    # The masks of panoptic segments are in an image.
    if 'segments_info' not in info and not all(
            'mask' in instance for instance in info.get('instances', ())):
        raise DataError(
            f"the image '{info.get('img_path')}' has annotations without "
            "'segmentation' (or it is empty), and the config trains masks "
            '(LoadAnnotations, with_mask=True). Add the masks to the '
            'annotation file, or train boxes alone: '
            'model.roi_head.mask_head=None, with_mask=False in the pipelines, '
            "and metric='bbox' of val_evaluator and test_evaluator")


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
            elif getattr(part, 'with_seg', False) or getattr(
                    part, 'with_mask', False):
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
                classes, if it is not as large as its image, or if an object
                has no mask.
        """
        path = results.get(self.key)
        if getattr(self.load, 'with_mask', False):
            _check_masks(results)
        try:
            results = self.load(results)
        except _UNREADABLE as error:
            if path is None:  # no file of its own, but the annotations
                raise
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
