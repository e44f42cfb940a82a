"""What the checks know of annotation files in COCO's format.

pycocotools and mmdet take such a file as it is: they leave out what does not
fit without a word, or end in a KeyError.

``explain_*`` run when a data set could not be built, and say what in its file
is the reason. ``check_*`` run on what has been built: before the first
iteration, and :func:`check_masks` also with each image that is read.
"""
import json
import logging
import math
import mmap
import os.path as osp
import re
from collections.abc import Iterable, Iterator
from numbers import Real
from typing import Any

from mmengine.logging import print_log

from data_error import DataError, some_of

# What pycocotools and mmdet take for granted.
_KEYS = {
    'images': ('id', 'file_name', 'height', 'width'),
    'annotations': ('id', 'image_id', 'category_id', 'bbox', 'area'),
    'categories': ('id', 'name')
}
_MASK_FORMAT = ('a mask is a list of polygons, [[x1, y1, x2, y2, x3, y3, '
                "...], ...], or run lengths, {'size': [height, width], "
                "'counts': ...}, which fill that size")


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


def _read_list(path: str, name: str, limit: int) -> list | None:
    """A list of a COCO file, of at most so many bytes, and nothing else of it.

    The whole of COCO's own file takes ten seconds and more.

    Raises:
        DataError: If the file is empty.
        JSONDecodeError: If the list does not end within the limit.
    """
    if not osp.getsize(path):  # which cannot be mapped
        raise DataError(f"'{path}' is empty; expected the annotations of a "
                        'data set in COCO format')
    first = None
    with open(path, 'rb') as file, mmap.mmap(
            file.fileno(), 0, access=mmap.ACCESS_READ) as text:
        for found in re.finditer(rb'"%s"\s*:\s*(?=\[)' % name.encode(), text):
            start = text[found.end():found.end() + limit]
            values, _ = json.JSONDecoder().raw_decode(
                start.decode(errors='replace'))
            if values and all(isinstance(value, dict) and 'id' in value
                              for value in values):
                return values
            # What has no ids may be a list of that name inside of another.
            first = values if first is None else first
    return first


def read_categories(path: str) -> dict[int, str]:
    """Read the categories of a COCO file, and nothing else of it.

    Args:
        path (str): The file.

    Returns:
        dict[int, str]: Names by id, in the order of the file.

    Raises:
        DataError: If it has no list of categories, or if one of them has no
            number and name of its own.
    """
    try:
        # Even the 1203 categories of LVIS are less than a megabyte.
        categories = _read_list(path, 'categories', 2**24)
    except json.JSONDecodeError as error:
        raise DataError(
            f"the categories of '{path}' are no JSON ({error})") from error
    if categories is None:
        raise DataError(f"'{path}' has no list of categories, so it is no "
                        'COCO annotation file')
    names = {}
    for category in categories:
        key, name = (category.get(key) if isinstance(category, dict) else None
                     for key in ('id', 'name'))
        if not isinstance(key, (int, float)) or not isinstance(name, str):
            raise DataError(
                f"'{path}' has the category {category!r}. Its id must be a "
                'number, the category_id of its annotations, and its name a '
                'text')
        if key in names:
            raise DataError(
                f"'{path}' has more than one category with the id {key}: "
                f"'{names[key]}' and '{name}'. Give each an id of its own, "
                'and correct category_id of the annotations')
        names[key] = name
    return names


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
            f"'{path}' has more than one category of the name "
            f'{some_of(twice)}. Give each a name of its own, or merge them')
    if found != classes:
        missing = [name for name in classes if name not in found]
        raise DataError(
            f"'{path}' does not fit the classes of the config. " +
            (f'It has no category {some_of(missing)}. '
             if missing else 'It has them in another order. ') +
            f'Its categories: {some_of(list(names.values()))}. Set '
            'metainfo.classes of the data sets of train, val and test to '
            'those names, in that order, and num_classes of the heads to '
            'their number')
    return names


def _check_category_ids(path: str, used: set,
                        categories: dict[int, str]) -> None:
    """Look for annotations of a COCO file that are of no category.

    Raises:
        DataError: If there are any.
    """
    stray = sorted(used - set(categories), key=str)
    if stray:
        raise DataError(
            f"'{path}' has annotations with category_id {some_of(stray)}, "
            f'and its categories are {some_of(list(categories))}. Correct the '
            'ids, or add the categories to the file')


def _check_shared_ids(path: str, content: dict) -> None:
    """Look for images or annotations of a file that have the same id.

    Of such images pycocotools takes the last, and gives it the annotations of
    all.
    """
    for name in 'images', 'annotations':
        first: dict[Any, int] = {}
        for i, entry in enumerate(content.get(name, ())):
            before = first.setdefault(entry.get('id'), i)
            if before != i:
                raise DataError(
                    f"'{path}' has the id {entry.get('id')} twice, at entries "
                    f"{before} and {i} of '{name}'. Number all {name} of the "
                    'file in one go')


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
                f'its images: they have the image_id {some_of(used, 5)}, '
                f'and the images the id {some_of(ids, 5)}. Correct the '
                'ids; a text is not the number that it spells')
    return None


def _with_files(data_sets: Iterable[Any]) -> Iterator[Any]:
    """Those data sets that read a COCO file of this machine."""
    for data_set in data_sets:
        if hasattr(data_set, 'COCOAPI') and osp.isfile(data_set.ann_file):
            yield data_set


def explain_format(data_sets: Iterable[Any]) -> None:
    """Find what made pycocotools refuse the format of a file.

    Args:
        data_sets (Iterable[object]): The data sets, not loaded.

    Raises:
        DataError: If a file is no JSON, or no dictionary.
    """
    for data_set in _with_files(data_sets):
        _read_json(data_set.ann_file)


def explain_missing_key(data_sets: Iterable[Any], key: Any) -> None:
    """Find what a file lacks that made mmdet raise a KeyError.

    Args:
        data_sets (Iterable[object]): The data sets, not loaded.
        key (object): What was not found.

    Raises:
        DataError: If a file has no categories, or an entry of it no such
            key.
    """
    lists = [name for name, keys in _KEYS.items() if key in keys]
    if not lists and key != 'categories':
        return
    for data_set in _with_files(data_sets):
        path = data_set.ann_file
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


def explain_shared_ids(data_sets: Iterable[Any]) -> None:
    """Find what in a file has the id of something else.

    Args:
        data_sets (Iterable[object]): The data sets, not loaded.

    Raises:
        DataError: If there is any.
    """
    for data_set in _with_files(data_sets):
        _check_shared_ids(data_set.ann_file, _read_json(data_set.ann_file))


def explain_no_images(data_sets: Iterable[Any]) -> None:
    """Where no object of a file can be used, mmdet filters all images.

    Args:
        data_sets (Iterable[object]): The data sets, not loaded.

    Raises:
        DataError: If that is why.
    """
    for data_set in _with_files(data_sets):
        content = _read_json(data_set.ann_file)
        _check_category_ids(
            data_set.ann_file,
            {entry['category_id'] for entry in content.get('annotations', ())
             if 'category_id' in entry},
            _compare_categories(data_set))
        reason = _without_objects(content)
        if reason is not None:
            raise DataError(f"'{data_set.ann_file}' {reason}")


def explain_entries(data_sets: Iterable[Any]) -> None:
    """Find what has another type than pycocotools and mmdet take for granted.

    Args:
        data_sets (Iterable[object]): The data sets, not loaded.

    Raises:
        DataError: If an entry of a file is that.
    """
    for data_set in _with_files(data_sets):
        content = _read_json(data_set.ann_file)
        for name in _KEYS:
            entries = content.get(name, [])
            if not isinstance(entries, list):
                raise DataError(f"'{data_set.ann_file}' has '{name}' that are "
                                'no list')
            for i, entry in enumerate(entries):
                wrong = _wrong_value(entry)
                if wrong:
                    raise DataError(f"'{data_set.ann_file}' cannot be read: "
                                    f"entry {i} of '{name}' {wrong}")


def _wrong_value(entry: Any) -> str:
    """What is wrong with an entry of a COCO file, or ''."""
    if not isinstance(entry, dict):
        return f'is {entry!r}, and not a dictionary'
    kinds = dict(file_name=str, name=str, height=Real, width=Real, area=Real)
    for key, kind in kinds.items():
        if key in entry and not isinstance(entry[key], kind):
            return (f'(id {entry.get("id")}) has {key}={entry[key]!r}; '
                    f'expected a {"text" if kind is str else "number"}')
    box = entry.get('bbox', [0] * 4)
    if not isinstance(box, list) or len(box) != 4 or not all(
            isinstance(number, Real) for number in box):
        return (f'(id {entry.get("id")}) has bbox={box!r}; expected four '
                'numbers, x, y, width and height')
    return ''


def check_data_set(data_set: Any, alone: bool) -> None:
    """Check the COCO file of a data set, as far as loading it does not.

    Args:
        data_set (object): The data set, loaded. Others are left alone, and so
            are files that are not on this machine.
        alone (bool): Whether it is all the data. Otherwise it may be
            pictures of nothing, by intention.

    Raises:
        DataError: If its categories are not the classes, or, in training, if
            images have the same id or there is no object.
    """
    if not hasattr(data_set, 'cat_ids') or not osp.isfile(data_set.ann_file):
        return
    _check_category_ids(data_set.ann_file, set(data_set.cat_img_map),
                        _compare_categories(data_set))
    if not data_set.test_mode:
        _check_image_ids(data_set.ann_file)
        _check_objects(data_set, alone)


def _check_image_ids(path: str) -> None:
    """Look for images of a COCO file that have the same id.

    Raises:
        DataError: If there are any.
    """
    try:
        # COCO's 118,000 take 30 MB.
        images = _read_list(path, 'images', 2**28)
    except json.JSONDecodeError:  # not the whole of them
        return
    _check_shared_ids(path, dict(images=images or ()))


def _check_objects(data_set: Any, alone: bool) -> None:
    """Look for an object to train on; mmdet would train without any.

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


def check_masks(info: dict) -> None:
    """Look for objects without a mask, where a pipeline loads masks.

    Args:
        info (dict): What a data set knows of an image.

    Raises:
        DataError: If there is one, or if a mask is no mask.
    """
    # The masks of panoptic segments are in an image.
    if 'segments_info' in info:
        return
    path = info.get('img_path')
    for instance in info.get('instances', ()):
        if 'mask' not in instance:
            raise DataError(
                f"the image '{path}' has annotations without 'segmentation' "
                '(or it is empty), and the config trains masks '
                '(LoadAnnotations, with_mask=True). Add the masks to the '
                'annotation file, or train boxes alone: '
                'model.roi_head.mask_head=None, with_mask=False in the '
                "pipelines, and metric='bbox' of val_evaluator and "
                'test_evaluator')
        if not _is_mask(instance['mask']):
            raise DataError(
                f"the image '{path}' has an annotation with the segmentation "
                f'{str(instance["mask"])[:100]}; {_MASK_FORMAT}. Correct it '
                'in the annotation file')


def _is_mask(mask: Any) -> bool:
    """Whether it is a list of polygons, which may be arrays, or run lengths.
    """
    if isinstance(mask, dict):
        return _is_run_lengths(**mask)
    return isinstance(mask, list) and all(
        isinstance(polygon, Iterable) and all(
            isinstance(number, Real) and math.isfinite(number)
            for number in polygon)
        for polygon in mask)


def _is_run_lengths(counts: Any = None, size: Any = None,
                    **_: Any) -> bool:
    """Whether these fill a mask; of others pycocotools takes what lies in
    memory, or ends in an error without a name."""
    if not isinstance(size, list) or len(size) != 2 or not all(
            isinstance(number, int) for number in size):
        return False
    if isinstance(counts, list):
        return all(isinstance(number, int) and number >= 0
                   for number in counts) and sum(counts) == size[0] * size[1]
    from pycocotools import mask  # comes with mmdet

    try:
        mask.decode(dict(counts=counts, size=size))
    except (TypeError, ValueError):
        return False
    return True


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
        DataError: If the file has other categories or images, some of the
            same id, or objects that are to be measured and cannot be.
    """
    path, data_set = metric.get('ann_file'), loader.dataset
    if not path or not osp.isfile(path) or not hasattr(data_set, 'cat_ids'):
        return
    own = data_set.ann_file
    if osp.isfile(own) and osp.realpath(path) != osp.realpath(own):
        _compare_files(path, data_set, where)
    elif getattr(data_set, '_indices', None) is not None:
        print_log(
            f"{where} measures on all images of '{path}', and indices= takes "
            f'{len(data_set)} of them: the others count as missed',
            logger='current', level=logging.WARNING)
    # Those of LVIS and of panoptic segments know no crowds, or elsewhere.
    has_crowds = 'CocoMetric' in str(metric.get('type'))
    has_masks = 'segm' in (metric.get('metric') or ())
    if has_crowds or has_masks:
        content = _read_json(path)
        _check_shared_ids(path, content)
        used = set(data_set.cat_ids)
        entries = [entry for entry in content.get('annotations', ())
                   if entry.get('category_id') in used]
    if has_crowds:
        _check_crowds(path, where, entries)
    if has_masks:
        _check_measured_masks(path, where, entries)


def _compare_files(path: str, data_set: Any, where: str) -> None:
    """Compare the file of a metric with that of its data set.

    Raises:
        DataError: If it has other categories or images.
    """
    classes = list(data_set.metainfo['classes'])
    names = list(read_categories(path).values())
    reason = None
    if [name for name in names if name in classes] != classes:
        reason = (f'its categories are {some_of(names)}, and the classes are '
                  f'{some_of(classes)}')
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
            f"'{data_set.ann_file}': {reason}. Set "
            f'{where}.ann_file={data_set.ann_file}')


def _check_crowds(path: str, where: str, entries: list[dict]) -> None:
    """Look for objects that pycocotools fails to count after an epoch.

    Raises:
        DataError: If there are any.
    """
    for entry in entries:
        if 'iscrowd' not in entry:
            raise DataError(
                f"{where} measures with '{path}', and its annotation with the "
                f"id {entry.get('id')} has no 'iscrowd', which pycocotools "
                "wants. Add 'iscrowd': 0 to the annotations of single objects")


def _check_measured_masks(path: str, where: str, entries: list[dict]) -> None:
    """Look for masks that pycocotools fails to read after an epoch.

    Raises:
        DataError: If there are any.
    """
    wrong = []
    for entry in entries:
        mask = entry.get('segmentation')
        # Four numbers and less it does not take for a polygon.
        if not (mask and _is_mask(mask) and
                (isinstance(mask, dict) or len(mask[0]) > 4)):
            wrong.append(entry)
    if wrong:
        raise DataError(
            f"{where} measures masks, and '{path}' has annotations without "
            f'one that can be read ({len(wrong)}), such as that with the id '
            f'{wrong[0].get("id")} and the segmentation '
            f'{str(wrong[0].get("segmentation"))[:100]}; {_MASK_FORMAT}, and '
            'the first polygon has three corners and more. Correct them, '
            'take them out of the file, or measure boxes alone: '
            f'{where}.metric=bbox')
