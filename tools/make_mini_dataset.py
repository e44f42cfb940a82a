"""Make miniature stand-ins for ImageNet, COCO and ADE20K, in the true formats.

They show drawn shapes and stripes that tell the class, so a model can learn
from them. A config finds them without a change where the real data would be::

    python tools/make_mini_dataset.py imagenet data/imagenet
    python tools/make_mini_dataset.py coco data/coco
    python tools/make_mini_dataset.py ade20k data/ade

The same settings make the same files.
"""
import argparse
import colorsys
import importlib.util
import json
import runpy
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import cv2
import numpy as np
from pycocotools import mask as rle

from argument_types import positive, seed_number

# Width and height of the pictures, in turn.
SIZES = ((96, 64), (64, 96), (128, 80), (48, 48))
# COCO numbers its 80 classes from 1 to 90, with gaps.
COCO_IDS = sorted(
    set(range(1, 91)) - {12, 26, 29, 30, 45, 66, 68, 69, 71, 83})
# What is special about a picture of COCO, in turn.
COCO_TRAITS = ('object in two pieces', 'grey', 'crowd', 'no object',
               'small objects', 'narrow', 'crowd alone', 'nothing')

Box = tuple[float, float, float]  # x and y of the centre, radius
Object = tuple[int, list[np.ndarray], bool]  # class, polygons, is it a crowd


def class_names(package: str, path: str, name: str) -> list[str]:
    """Read class names from a file of a library.

    Importing the library would take seconds and say much.

    Args:
        package (str): Import name of the library.
        path (str): File in the package.
        name (str): Name of the list, or of a function that gives it.

    Returns:
        list[str]: The names.

    Raises:
        ModuleNotFoundError: If the library is not installed.
    """
    spec = importlib.util.find_spec(package)
    if spec is None:
        raise ModuleNotFoundError(f'{package} has the class names, and is not '
                                  'installed: see README.md, Installing')
    folder = spec.submodule_search_locations[0]
    names = runpy.run_path(f'{folder}/{path}')[name]
    return [each.strip() for each in (names() if callable(names) else names)]


def draw_background(rng: np.random.Generator, width: int,
                    height: int) -> np.ndarray:
    """Draw grainy clouds.

    Args:
        rng (Generator): Source of randomness.
        width (int): In pixels.
        height (int): In pixels.

    Returns:
        np.ndarray: Picture, (height, width, 3) uint8.
    """
    clouds = rng.uniform(60, 200, (3, 3, 1)) + rng.uniform(-20, 20, (3, 3, 3))
    clouds = cv2.resize(clouds, (width, height), interpolation=cv2.INTER_CUBIC)
    grain = rng.integers(-12, 13, (height, width, 1))
    return np.clip(clouds + grain, 0, 255).astype(np.uint8)


def draw_stripes(label: int, width: int, height: int) -> np.ndarray:
    """Draw stripes whose colour and direction tell the class.

    Args:
        label (int): The class, from 0.
        width (int): In pixels.
        height (int): In pixels.

    Returns:
        np.ndarray: Picture, (height, width, 3) uint8.
    """
    y, x = np.mgrid[:height, :width].astype(np.float32)
    angle = 2.4 * label
    wave = np.sin(x * np.cos(angle) + y * np.sin(angle))
    # Steps of the golden ratio keep the hues of neighbours apart.
    colour = np.array(colorsys.hsv_to_rgb(0.618 * label % 1, 0.9, 255))
    return ((0.75 + 0.25 * wave[..., None]) * colour).astype(np.uint8)


def polygon(rng: np.random.Generator, label: int, box: Box) -> np.ndarray:
    """Turn a regular polygon, whose number of sides depends on the class.

    Args:
        rng (Generator): Source of randomness.
        label (int): The class, from 0.
        box (tuple[float, float, float]): Centre and radius, in pixels.

    Returns:
        np.ndarray: Corners, (3 to 7, 2).
    """
    x, y, radius = box
    sides = 3 + label % 5
    angles = rng.uniform(0, 6.28) + 2 * np.pi / sides * np.arange(sides)
    return np.stack(
        [x + radius * np.cos(angles), y + radius * np.sin(angles)], axis=1)


def save(path: Path, picture: np.ndarray) -> None:
    """Save a picture, and make the folder for it.

    Args:
        path (Path): File; its suffix decides the format.
        picture (np.ndarray): Colour, or one channel, uint8.

    Raises:
        OSError: If it cannot be written.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    if not cv2.imwrite(str(path), picture):
        raise OSError(f"cannot write '{path}'; is the disk full?")


def make_imagenet(root: Path,
                  images: int = 1,
                  seed: int = 0,
                  classes: int = 1000) -> None:
    """Make ``{train,val}/<class>/*.JPEG`` and ``classes.txt``.

    The folders are named like WordNet ids, in the order of the classes. One
    picture of each split is grey.

    Args:
        root (Path): Folder to fill.
        images (int): Pictures per class and split. Defaults to 1.
        seed (int): Seed of everything random. Defaults to 0.
        classes (int): Number of classes, 21841 for ImageNet-22K. The names
            are the true ones if there are 1000. Defaults to 1000.
    """
    folders = [f'n{label:08d}' for label in range(classes)]
    names = folders
    if classes == 1000:
        names = class_names('mmpretrain', 'datasets/categories.py',
                            'IMAGENET_CATEGORIES')
    (root / 'classes.txt').write_text('\n'.join(names) + '\n')
    for i, split in enumerate(('train', 'val')):
        rng = np.random.default_rng([seed, i])
        for label, name in enumerate(folders):
            folder = root / split / name
            folder.mkdir(parents=True)
            for j in range(images):
                width, height = SIZES[(label + j) % len(SIZES)]
                x, y = rng.uniform(0.4, 0.6, 2) * (width, height)
                radius = rng.uniform(0.3, 0.5) * min(width, height)
                corners = polygon(rng, label, (x, y, radius))
                mask = cv2.fillPoly(
                    np.zeros((height, width), np.uint8),
                    [corners.round().astype(np.int32)], 1).astype(bool)
                picture = draw_background(rng, width, height)
                picture[mask] = draw_stripes(label, width, height)[mask]
                if label == 1 and j == 0:
                    picture = cv2.cvtColor(picture, cv2.COLOR_BGR2GRAY)
                save(folder / f'{name}_{j}.JPEG', picture)


def cells(width: float, height: float, columns: int,
          rows: int) -> Iterator[Box]:
    """Divide a rectangle into cells.

    Args:
        width (float): In pixels.
        height (float): In pixels.
        columns (int): Number of columns.
        rows (int): Number of rows.

    Yields:
        tuple[float, float, float]: Centre of a cell and the radius of what
        has room in it.
    """
    wide, high = width / columns, height / rows
    for i in range(columns * rows):
        yield ((i % columns + 0.5) * wide, (i // columns + 0.5) * high,
               0.45 * min(wide, high))


def coco_objects(rng: np.random.Generator, number: int, trait: str, width: int,
                 height: int) -> list[Object]:
    """Place the objects of a picture of COCO.

    Args:
        rng (Generator): Source of randomness.
        number (int): Number of the picture; it decides the classes.
        trait (str): One of ``COCO_TRAITS``.
        width (int): In pixels.
        height (int): In pixels.

    Returns:
        list[tuple]: For each object its class, its polygons, and whether it
        is a crowd.
    """
    # 13 and 80 have no common divisor: after 40 pictures all classes occur.
    first, second = (13 * (2 * number + i) % 80 for i in range(2))
    if trait == 'no object':
        return []
    if trait == 'small objects':
        return [(label, [polygon(rng, label, (x, y, 6))], False)
                for (x, y, _), label in zip(
                    cells(width, height, 3, 2), 3 * [first, second])]
    split = (2, 1) if width >= height else (1, 2)
    left, right = cells(width, height, *split)
    x, y, radius = left
    objects = [(first, [polygon(rng, first, left)], False),
               (second, [polygon(rng, second, right)], False)]
    if trait == 'object in two pieces':
        objects[0] = (first, [
            polygon(rng, first, (x, y + shift * radius, 0.45 * radius))
            for shift in (-0.5, 0.5)
        ], False)
    elif trait in ('crowd', 'crowd alone'):
        objects[0] = (first, [
            polygon(rng, first, (x - radius + dx, y - radius + dy, r))
            for dx, dy, r in cells(2 * radius, 2 * radius, 3, 3)
        ], True)
    return objects[:1] if trait == 'crowd alone' else objects


def run_lengths(mask: np.ndarray) -> list[int]:
    """Lengths of the runs of zeros and ones, column by column.

    COCO's own files hold crowds in this uncompressed form.

    Args:
        mask (np.ndarray): (height, width), bool or uint8.

    Returns:
        list[int]: The lengths; the first is that of zeros, perhaps 0.
    """
    flat = np.concatenate([[0], mask.ravel(order='F')])
    starts = np.flatnonzero(np.diff(flat))
    return np.diff([0, *starts, mask.size]).tolist()


def make_coco(root: Path, images: int = 8, seed: int = 0) -> None:
    """Make ``{train,val}2017/*.jpg`` and ``annotations/instances_*.json``.

    Args:
        root (Path): Folder to fill.
        images (int): Pictures per split. Everything special (see
            ``COCO_TRAITS``) occurs in 8. Defaults to 8.
        seed (int): Seed of everything random. Defaults to 0.
    """
    names = class_names('mmdet', 'evaluation/functional/class_names.py',
                        'coco_classes')
    # mmdet writes 'traffic_light' there, and COCO 'traffic light'.
    categories = [
        dict(supercategory=name, id=key, name=name)
        for key, name in zip(COCO_IDS, (x.replace('_', ' ') for x in names))
    ]
    (root / 'annotations').mkdir()
    for i, split in enumerate(('train2017', 'val2017')):
        (root / split).mkdir()
        rng = np.random.default_rng([seed, i])
        infos, annotations = [], []
        for number in range(images):
            trait = COCO_TRAITS[number % len(COCO_TRAITS)]
            width, height = SIZES[number % len(SIZES)]
            if trait == 'narrow':
                height = 28
            image_id = 139 + 146 * number + i
            info = dict(
                license=1,
                file_name=f'{image_id:012d}.jpg',
                coco_url='',
                height=height,
                width=width,
                date_captured='2017-01-01 00:00:00',
                flickr_url='',
                id=image_id)
            infos.append(info)
            picture = draw_background(rng, width, height)
            for label, polygons, iscrowd in coco_objects(
                    rng, number, trait, width, height):
                polygons = [
                    corners.clip(0, (width, height)).round(2).ravel().tolist()
                    for corners in polygons
                ]
                region = rle.merge(rle.frPyObjects(polygons, height, width))
                mask = rle.decode(region)
                stripes = draw_stripes(label, width, height)
                picture[mask > 0] = stripes[mask > 0]
                annotations.append(
                    dict(
                        segmentation=dict(
                            counts=run_lengths(mask), size=[height, width])
                        if iscrowd else polygons,
                        area=float(rle.area(region)),
                        iscrowd=int(iscrowd),
                        image_id=image_id,
                        bbox=rle.toBbox(region).tolist(),
                        category_id=COCO_IDS[label],
                        id=len(annotations) + 1))
            if trait == 'grey':
                picture = cv2.cvtColor(picture, cv2.COLOR_BGR2GRAY)
            save(root / split / info['file_name'], picture)
        content = dict(
            info=dict(
                description='Miniature stand-in for COCO 2017',
                url='',
                version='1.0',
                year=2017,
                contributor='',
                date_created='2017/01/01'),
            licenses=[dict(url='', id=1, name='Drawn, no rights reserved')],
            images=infos,
            annotations=annotations,
            categories=categories)
        (root / f'annotations/instances_{split}.json').write_text(
            json.dumps(content))


def make_ade20k(root: Path, images: int = 8, seed: int = 0) -> None:
    """Make ``ADEChallengeData2016`` with pictures and label maps.

    A label map has one channel: 0 is 'other', 1 to 150 are the classes, each
    of which occurs in both splits.

    Args:
        root (Path): Folder to fill.
        images (int): Pictures per split. Defaults to 8.
        seed (int): Seed of everything random. Defaults to 0.
    """
    names = class_names('mmseg', 'utils/class_names.py', 'ade_classes')
    root = root / 'ADEChallengeData2016'
    scenes, pixels, shown = [], np.zeros(151), {}
    for i, (split, short) in enumerate(
        (('training', 'train'), ('validation', 'val'))):
        for kind in ('images', 'annotations'):
            (root / kind / split).mkdir(parents=True)
        rng = np.random.default_rng([seed, i])
        shown[split] = np.zeros(151, int)
        for number in range(images):
            name = f'ADE_{short}_{number + 1:08d}'
            width, height = SIZES[number % len(SIZES)]
            # Pictures share the classes out. A pixel belongs to the nearest
            # of as many random points.
            labels = np.r_[0, np.arange(1 + number % 150, 151, images)]
            points = rng.choice(width * height, len(labels), replace=False)
            y, x = np.mgrid[:height, :width]
            distance = np.hypot(y - (points // width)[:, None, None],
                                x - (points % width)[:, None, None])
            label_map = labels[distance.argmin(0)].astype(np.uint8)
            picture = draw_background(rng, width, height)
            for label in labels[1:]:
                region = label_map == label
                picture[region] = draw_stripes(label, width, height)[region]
            save(root / 'images' / split / f'{name}.jpg', picture)
            save(root / 'annotations' / split / f'{name}.png', label_map)
            scenes.append(f'{name} misc')
            counts = np.bincount(label_map.ravel(), minlength=151)
            pixels += counts
            shown[split] += counts > 0
    (root / 'sceneCategories.txt').write_text('\n'.join(scenes) + '\n')
    rows = ['Idx\tRatio\tTrain\tVal\tName'] + [
        f'{k}\t{pixels[k] / pixels.sum():.4f}\t{shown["training"][k]}\t'
        f'{shown["validation"][k]}\t{name}' for k, name in enumerate(names, 1)
    ]
    (root / 'objectInfo150.txt').write_text('\n'.join(rows) + '\n')


MAKERS = dict(imagenet=make_imagenet, coco=make_coco, ade20k=make_ade20k)


def make_mini_dataset(data: str, dest: str | Path, **settings: int) -> None:
    """Make a stand-in beside ``dest`` and rename it when it is complete.

    Args:
        data (str): 'imagenet', 'coco' or 'ade20k'.
        dest (str | Path): Folder to make.
        settings: See the function of the format, such as
            :func:`make_imagenet`.

    Raises:
        FileExistsError: If ``dest`` is anything but an empty folder.
        OSError: If it cannot be written.
    """
    dest = Path(dest).resolve()
    if dest.exists() and not (dest.is_dir() and not any(dest.iterdir())):
        raise FileExistsError(
            f"'{dest}' exists and is not an empty folder, so it may hold real "
            'data. Give another folder, or remove it first')
    dest.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(
            prefix=f'{dest.name}.', dir=dest.parent) as partial:
        root = Path(partial) / dest.name
        root.mkdir()
        MAKERS[data](root, **settings)
        root.rename(dest)


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """Parse the command line.

    Args:
        argv (list[str], optional): Arguments; those of the process if None.

    Returns:
        Namespace: The options; those that were not given are missing.
    """
    parser = argparse.ArgumentParser(
        description='Make a miniature stand-in for a data set, in its true '
        'format.',
        argument_default=argparse.SUPPRESS)
    parser.add_argument('data', choices=MAKERS, help='what to stand in for')
    parser.add_argument(
        'dest',
        metavar='DEST',
        help='folder to make, new or empty: data/imagenet, data/coco or '
        'data/ade (which gets ADEChallengeData2016) is where the configs '
        'look')
    parser.add_argument(
        '--images',
        type=positive,
        metavar='N',
        help='pictures per split (default 8; with fewer, some special cases '
        'of COCO are missing); for imagenet per split and class (default 1)')
    parser.add_argument(
        '--seed', type=seed_number, metavar='S', help='seed (default 0)')
    parser.add_argument(
        '--classes',
        type=positive,
        metavar='C',
        help='imagenet only: number of classes (default 1000), 21841 for '
        'ImageNet-22K')
    args = parser.parse_args(argv)
    if 'classes' in args and args.data != 'imagenet':
        parser.error(f'--classes is for imagenet; {args.data} has its own')
    return args


def main(argv: list[str] | None = None) -> None:
    """Make a stand-in.

    Args:
        argv (list[str], optional): Arguments; those of the process if None.
    """
    settings = vars(parse_args(argv))
    start = time.time()
    try:
        make_mini_dataset(**settings)
    except OSError as error:
        raise SystemExit(f'cannot make the data: {error}') from error
    print(f'made {settings["dest"]} in {time.time() - start:.1f} s')


if __name__ == '__main__':
    main()
