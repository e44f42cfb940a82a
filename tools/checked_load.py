"""Loading steps that look at each file when it is read."""
from collections.abc import Iterator
from typing import Any

import cv2
import numpy as np
from mmcv.transforms import BaseTransform
from PIL import Image, UnidentifiedImageError

from coco_checks import check_masks
from data_error import DataError

# What OpenCV, Pillow and mmcv raise for a file that is no whole image.
_UNREADABLE = (OSError, ValueError, SyntaxError, AssertionError,
               AttributeError, cv2.error, Image.DecompressionBombError)


class CheckedLoad(BaseTransform):
    """A loading transform whose errors name the file.

    Args:
        load (BaseTransform): The transform.
        key (str): Where its input holds the path: 'img_path' or
            'seg_map_path'.
        num_classes (int, optional): Labels of a label map must be less, or
            ``ignore_index``. Defaults to None, any.
        ignore_index (int): Label of what is ignored. Defaults to 255.
    """

    def __init__(self, load: BaseTransform, key: str,
                 num_classes: int | None = None,
                 ignore_index: int = 255) -> None:
        self.load = load
        self.key = key
        self.num_classes = num_classes
        self.ignore_index = ignore_index

    def transform(self, results: dict) -> dict | None:
        """Load.

        Args:
            results (dict): The sample so far.

        Returns:
            dict | None: What the transform returns.

        Raises:
            DataError: If the file is missing or damaged, if its labels are no
                classes, if it is not as large as its image, or if an object
                has no mask, or lies where another image than this would be.
        """
        path = results.get(self.key)
        if getattr(self.load, 'with_mask', False):
            check_masks(results)
        try:
            results = self.load(results)
        except _UNREADABLE as error:
            if path is None:  # no file of its own, but the annotations
                raise
            reason = (f'it is damaged, or in a format that the loader does '
                      f'not know ({error}). Put a good copy there')
            if isinstance(error, FileNotFoundError):
                reason = 'it does not exist. Put a good copy there'
            elif isinstance(error, PermissionError):
                reason = 'you may not read it. Change its permissions'
            kind = 'image' if self.key == 'img_path' else 'label map'
            raise DataError(f"cannot read the {kind} '{path}': {reason}, or "
                            'take it out of the data set') from error
        if results is not None and self.num_classes is not None:
            self._check_labels(path, results)
        if results is not None and self.key == 'img_path':
            _check_boxes(path, results)
        return results

    def _check_labels(self, path: str, results: dict) -> None:
        """Look for labels that are no classes, and compare the size."""
        labels = results['gt_seg_map']
        shape = results.get('ori_shape')  # that of the image as loaded
        if labels.ndim < 2:  # mmseg takes out sides of one pixel
            labels = np.atleast_2d(labels)
            if shape is not None and labels.size == shape[0] * shape[1]:
                labels = labels.reshape(shape[:2])
            results['gt_seg_map'] = labels
        if labels.ndim != 2:
            raise DataError(
                f"the label map '{path}' has {labels.shape[-1]} channels. It "
                'must have one, which holds numbers of classes')
        if shape is not None and tuple(shape[:2]) != labels.shape:
            raise _other_size(results, shape[:2], labels)
        wide = self._wide_labels(path)
        # Of 16 bits and of signed numbers, mmseg makes 255 of these.
        wrong = wide[(wide < 0) | (wide > 255)]
        wrong = wrong[~np.isin(wrong, (-1, 65535))]
        if wrong.size:
            raise self._no_class(path, wrong, results)
        wrong = labels[(labels >= self.num_classes)
                       & (labels != self.ignore_index)]
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
        if is_local(path, self.load):
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
            f'{"0 and " * shift}{self.ignore_index} for what is ignored. '
            'Correct the file, or give metainfo.classes of the data sets and '
            'num_classes of the heads, and reduce_zero_label. Another label '
            'is ignored with ignore_index of all heads and evaluators and '
            'seg_pad_val of the data preprocessor')

    def __repr__(self) -> str:
        return f'{type(self).__name__}({self.load!r})'


def _check_boxes(path: str, results: dict) -> None:
    """Refuse boxes that are those of an image of another size."""
    width, height = results.get('width'), results.get('height')
    shape = results.get('ori_shape')  # that of the image as loaded
    if None in (width, height, shape) or shape[:2] == (height, width):
        return
    for instance in results.get('instances') or ():
        box = instance.get('bbox', ())
        if len(box) != 4:
            continue
        _, _, right, bottom = box
        # Rounding may lead beyond the border, where the sizes are wrong and
        # the boxes right.
        if right > shape[1] + 1 or bottom > shape[0] + 1:
            raise DataError(
                f"the image '{path}' is {shape[1]} wide and {shape[0]} high, "
                f'and its annotations are for one {width} wide and {height} '
                f'high: a box ends at ({right:g}, {bottom:g}), outside of it. '
                'Was it made smaller or turned (EXIF) after that? Put the '
                'image there that was annotated')


def wrap_loads(step: Any, num_classes: int | None,
               ignore_index: int) -> Iterator[Any]:
    """Put the loading steps of a pipeline into :class:`CheckedLoad`.

    Args:
        step (object): A pipeline, or a transform that may hold others.
        num_classes (int, optional): For label maps.
        ignore_index (int): For label maps.

    Yields:
        CheckedLoad: The steps.
    """
    for name in ('transforms', 'subroutines'):
        inner = getattr(step, name, None)
        if not isinstance(inner, list):
            if inner is not None:
                yield from wrap_loads(inner, num_classes, ignore_index)
            continue
        for i, part in enumerate(inner):
            if type(part).__name__.startswith('LoadImage'):
                inner[i] = CheckedLoad(part, 'img_path')
            elif getattr(part, 'with_seg', False) or getattr(
                    part, 'with_mask', False):
                inner[i] = CheckedLoad(part, 'seg_map_path', num_classes,
                                       ignore_index)
            else:
                yield from wrap_loads(part, num_classes, ignore_index)
                continue
            yield inner[i]


def is_local(path: str, reader: Any) -> bool:
    """Whether a data set or a loading step reads a path of this machine."""
    return not getattr(reader, 'backend_args', None) and '://' not in path


def check_header(info: dict, labels: np.ndarray) -> None:
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
