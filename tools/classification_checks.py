"""What goes wrong with images in class folders or lists, as mmpretrain reads
them."""
import os
import os.path as osp
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from data_error import DataError, describe, some_of


def _list_of(data_set: Any) -> str | None:
    """The list of images and labels that mmpretrain reads for a data set, if
    there is one on this machine."""
    path = getattr(data_set, 'ann_file', None)
    has_list = getattr(data_set, 'with_label', False) and path
    return path if has_list and osp.isfile(path) else None


def explain_lists(unread: Iterable[Any]) -> None:
    """mmpretrain reads a path, a space and a number from each line of a list.

    Args:
        unread (Iterable[object]): The data sets, not loaded.

    Raises:
        DataError: If a line is another one.
    """
    for path in filter(None, map(_list_of, unread)):
        try:
            lines = Path(path).read_text(encoding='utf-8').splitlines()
        except UnicodeDecodeError as error:
            raise DataError(f'{path} is no text in UTF-8 ({error}); save it '
                            'as such, without a byte order mark') from error
        for number, line in enumerate(lines, 1):
            image, _, label = line.strip().rpartition(' ')
            if not image or not label.isdecimal():
                raise DataError(
                    f'line {number} of {path} is {line.rstrip()!r}; expected '
                    'the path of an image, a space and the number of its '
                    'class, from 0')


def explain_class_folders(unread: Iterable[Any]) -> None:
    """mmpretrain takes each folder of a data set without a list for a class.

    Args:
        unread (Iterable[object]): The data sets, not loaded.

    Raises:
        DataError: If there is none, or if there are not as many as classes.
    """
    for data_set in unread:
        found = class_folders(data_set)
        if found is None:
            continue
        name, classes = describe(data_set), data_set.metainfo.get('classes')
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
                advice = odd_folders(data_set, found) or advice
            raise DataError(
                f'{name} has {len(found)} class folders '
                f'({some_of(found, 5)}), and there are {len(classes)} '
                f'classes. {advice}')


def class_folders(data_set: Any) -> list[str] | None:
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


def odd_folders(data_set: Any, among: Any) -> str:
    """Name the class folders that are most likely no classes.

    Args:
        data_set (object): The data set, loaded or not.
        among (Collection[str]): Names of those that do not fit.

    Returns:
        str: What to do with those that are hidden, such as Jupyter's, or
        hold no image. Empty if there are none.
    """
    odd = [
        name for name in class_folders(data_set) or ()
        if name in among and (name.startswith('.') or not any(
            data_set.is_valid_file(file) for _, _, files in os.walk(
                osp.join(data_set.img_prefix, name), followlinks=True)
            for file in files))
    ]
    if not odd:
        return ''
    return (f'Each folder in {data_set.img_prefix} counts as a class, and '
            f'{some_of(odd, 5)} is hidden or holds no image. Delete such a '
            'folder, or put its images there')


def check_order(data_set: Any, classes: Any) -> None:
    """Refuse the names of class folders in another order than the labels."""
    folders = class_folders(data_set)
    if folders and folders != list(classes) \
            and folders == sorted(map(str, classes)):
        raise DataError(
            f'{describe(data_set)} numbers its class folders in alphabetical '
            f'order, and metainfo.classes has them in another one: '
            f'{some_of(list(classes), 5)} in place of {some_of(folders, 5)}. '
            'Sort metainfo.classes of the data sets of train, val and test')


def check_label(data_set: Any, path: str, label: Any, count: int) -> None:
    """Check that the label of an image is a class.

    Args:
        data_set (object): The data set.
        path (str): The image.
        label (object): The label; what is no whole number is left alone.
        count (int): Number of classes; 0 if it is not known.

    Raises:
        DataError: If it is none.
    """
    if count and isinstance(label, int) and not 0 <= label < count:
        raise DataError(
            f"{describe(data_set)} gives '{path}' the label {label}, which is "
            f'no class: they are 0 to {count - 1}, counted from 0. Correct '
            'the list, or give the names of the classes with metainfo.classes '
            'and their number with num_classes of the head')


def check_listed_labels(data_set: Any, count: int) -> None:
    """:func:`check_label` for all images of mmpretrain's lists.

    In the file: to ask the data set for 14 million would take minutes.

    Args:
        data_set (object): The data set; others are left alone.
        count (int): Number of classes; 0 if it is not known.

    Raises:
        DataError: If a label is no class.
    """
    path = _list_of(data_set)
    if path is None:
        return
    with open(path, 'rb') as file:
        for line in file:
            name, _, label = line.strip().rpartition(b' ')
            if label.removeprefix(b'-').isdigit():
                check_label(data_set, name.decode(errors='replace'),
                            int(label), count)
