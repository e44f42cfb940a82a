"""Make the Digits data: three tasks from one set of real images.

scikit-learn carries 1,797 real handwritten digits, scanned at 8x8 pixels. This
tool draws them on textured canvases and writes, with no network and the same
on every run::

    DEST/
      classification/{train,val}/{0..9}/*.png   one digit per 64x64 image
      scenes/{train,val}/*.png                  several digits per 128x128
                                                image
      scenes/{train,val}.json                   COCO instances (RLE masks)
      scenes/labels/{train,val}/*.png           label maps: 0 background,
                                                1..10 the digits 0..9
      manifest.json                             settings, and for every image
                                                the source digits it shows

The source digits are split once, class by class, so no digit of the validation
images is ever seen in training. In the scenes a digit may lie over another;
masks, boxes, areas and label maps hold the pixels that stay visible.

    python tools/make_digits.py data/digits

A second run with the same settings does nothing. The data is written beside
DEST and renamed when it is complete. A DEST that holds anything but what its
manifest names is left alone.
"""
import argparse
import json
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import cv2
import numpy as np

from argument_types import positive, seed_number
from make_mini_dataset import run_lengths, save

# Part of the settings in the manifest: raise it when the pictures change, so
# that data made by an older version of this file is made anew.
VERSION = 1
CLASSES = tuple('0123456789')
SPLITS = ('train', 'val')
VAL_FRACTION = 0.2
SCENE_SIZE, SCENE_DIGITS, SCENE_DIGIT_PX = 128, (3, 4), (36, 60)
CLASSIFICATION_SIZE, CLASSIFICATION_DIGIT_PX = 64, (44, 52)
# A digit keeps at least this share of its pixels when others cover it.
MIN_VISIBLE = 0.85


def load_sources() -> tuple[np.ndarray, np.ndarray]:
    """Return the source digits, (1797, 8, 8) in [0, 1], and their classes."""
    from sklearn.datasets import load_digits
    digits = load_digits()
    return digits.images.astype(np.float32) / 16, digits.target.astype(int)


def split_sources(labels: np.ndarray, seed: int) -> dict[str, list[int]]:
    """Split source indices class by class.

    Args:
        labels (np.ndarray): Class of each source digit, (N,).
        seed (int): The same seed gives the same split.

    Returns:
        dict[str, list[int]]: 'train' and 'val', disjoint, sorted.
    """
    rng = np.random.RandomState(seed)
    split = dict(train=[], val=[])
    for label in range(len(CLASSES)):
        indices = rng.permutation(np.flatnonzero(labels == label))
        num_val = round(len(indices) * VAL_FRACTION)
        split['val'] += indices[:num_val].tolist()
        split['train'] += indices[num_val:].tolist()
    return {name: sorted(indices) for name, indices in split.items()}


def draw_canvas(rng: np.random.RandomState, size: int) -> np.ndarray:
    """Return a textured colour canvas, (size, size, 3) float32 in [0, 1]."""
    texture = np.zeros((size, size), np.float32)
    for cells, weight in ((3, 1.0), (8, 0.5), (24, 0.35)):
        noise = rng.standard_normal((cells, cells)).astype(np.float32)
        noise = cv2.resize(noise, (size, size), interpolation=cv2.INTER_CUBIC)
        texture += weight * rng.uniform(0.3, 1) * noise
    if rng.uniform() < 0.5:  # stripes
        y, x = np.mgrid[:size, :size]
        angle, period = rng.uniform(0, np.pi), rng.uniform(6, 24)
        wave = (x * np.cos(angle) + y * np.sin(angle)) * 2 * np.pi / period
        texture += rng.uniform(0.2, 0.7) * np.sin(wave)
    texture *= rng.uniform(0.03, 0.09)
    colour = rng.uniform(0.15, 0.45) + rng.uniform(-0.1, 0.1, 3)
    tint = 1 + rng.uniform(-0.5, 0.5, 3)
    canvas = colour + texture[..., None] * tint
    canvas += rng.normal(0, 0.02, canvas.shape)
    return canvas.clip(0, 1).astype(np.float32)


def draw_ink(rng: np.random.RandomState, source: np.ndarray,
             pixels: int) -> np.ndarray:
    """Enlarge a source digit smoothly and turn it a little.

    Args:
        rng (np.random.RandomState): Source of the angle.
        source (np.ndarray): One source digit, (8, 8) in [0, 1].
        pixels (int): Side to which the 8 source pixels are enlarged.

    Returns:
        np.ndarray: Opacity of the ink in [0, 1], cut to the pixels above 0.
    """
    # The ink of many digits touches the border of its 8x8 tile, so the tile
    # gets two empty pixels on each side, in which the strokes can end.
    tile = np.pad(source, 2)
    side = round(pixels * tile.shape[0] / source.shape[0])
    tile = cv2.resize(tile, (side, side), interpolation=cv2.INTER_CUBIC)
    centre = (side - 1) / 2
    turn = cv2.getRotationMatrix2D((centre, centre), rng.uniform(-12, 12), 1)
    tile = cv2.warpAffine(tile, turn, (side, side), flags=cv2.INTER_LINEAR)
    ink = ((tile - 0.3) / 0.3).clip(0, 1)
    rows, columns = np.flatnonzero(ink.any(1)), np.flatnonzero(ink.any(0))
    return ink[rows[0]:rows[-1] + 1, columns[0]:columns[-1] + 1]


def draw_colour(rng: np.random.RandomState, canvas: float,
                behind: np.ndarray) -> np.ndarray:
    """Return an ink lighter than the canvas and unlike what lies behind it.

    Args:
        rng (np.random.RandomState): Source of the colour.
        canvas (float): Mean brightness of the empty canvas.
        behind (np.ndarray): Mean colour behind the digit, (3, ); that of
            another digit where it covers one.

    Returns:
        np.ndarray: Colour, (3, ) in [0, 1].
    """
    colours = []
    for _ in range(3):
        tint = rng.uniform(-0.3, 0.3, 3)
        brightness = canvas + rng.uniform(0.25, 0.5)
        colours.append((brightness + tint - tint.mean()).clip(0, 1))
    return max(colours, key=lambda colour: np.abs(colour - behind).sum())


def draw_scene(rng: np.random.RandomState, size: int,
               sources: Sequence[np.ndarray], pixel_range: tuple[int, int]
               ) -> tuple[np.ndarray, np.ndarray]:
    """Draw digits on one canvas, the later ones over the earlier ones.

    A digit that would hide too much of another is placed elsewhere; after 30
    tries it is left out.

    Args:
        rng (np.random.RandomState): Decides everything that varies.
        size (int): Side of the square canvas in pixels.
        sources (Sequence[np.ndarray]): Source digits, each (8, 8).
        pixel_range (tuple[int, int]): Least and greatest side to which the
            8x8 pixels of a digit are enlarged.

    Returns:
        tuple: The image, (size, size, 3) uint8 BGR; and the instance map,
        (size, size) int, 0 where no digit is visible, i + 1 where sources[i]
        is.
    """
    canvas = draw_canvas(rng, size)
    brightness = canvas.mean()
    instances = np.zeros((size, size), int)
    full_area = {}
    for number, source in enumerate(sources, start=1):
        pixels = rng.randint(pixel_range[0], pixel_range[1] + 1)
        ink = draw_ink(rng, source, pixels)
        height, width = ink.shape
        for _ in range(30):
            top = rng.randint(0, size - height + 1)
            left = rng.randint(0, size - width + 1)
            place = np.s_[top:top + height, left:left + width]
            covered = instances[place][ink > 0.5]
            if all((instances == other).sum() - (covered == other).sum() >=
                   MIN_VISIBLE * area for other, area in full_area.items()):
                break
        else:
            continue
        behind = canvas[place]
        colour = draw_colour(rng, brightness, behind[ink > 0.5].mean(0))
        opacity = ink[..., None]
        canvas[place] = behind * (1 - opacity) + colour * opacity
        instances[place][ink > 0.5] = number
        full_area[number] = (ink > 0.5).sum()
    return (canvas * 255).round().astype(np.uint8), instances


def annotate(instances: np.ndarray,
             labels: Sequence[int]) -> tuple[list[dict], np.ndarray]:
    """Describe the visible digits of an instance map.

    Args:
        instances (np.ndarray): Instance map of :func:`draw_scene`.
        labels (Sequence[int]): Class of each digit given to it.

    Returns:
        tuple: COCO annotations without ids (list of dict), and the label map,
        (size, size) uint8 with 0 background and class + 1 elsewhere.
    """
    annotations = []
    label_map = np.zeros(instances.shape, np.uint8)
    for number, label in enumerate(labels, start=1):
        mask = instances == number
        if not mask.any():
            continue
        label_map[mask] = label + 1
        rows = np.flatnonzero(mask.any(1))
        columns = np.flatnonzero(mask.any(0))
        box = [columns[0], rows[0], np.ptp(columns) + 1, np.ptp(rows) + 1]
        annotations.append(
            dict(
                category_id=label + 1,
                bbox=[int(side) for side in box],
                area=int(mask.sum()),
                iscrowd=0,
                segmentation=dict(
                    size=list(mask.shape), counts=run_lengths(mask))))
    return annotations, label_map


def write_classification(root: Path, split: str, images: np.ndarray,
                         labels: np.ndarray, indices: list[int],
                         settings: dict[str, int]) -> dict[str, list[int]]:
    """Write one split as class folders.

    Returns:
        dict[str, list[int]]: File name -> the source digit that it shows.
    """
    views = settings['views'] if split == 'train' else 1
    shown = {}
    for index in indices:
        label = int(labels[index])
        for view in range(views):
            rng = np.random.RandomState((settings['seed'], index, view))
            image, _ = draw_scene(rng, CLASSIFICATION_SIZE, [images[index]],
                                  CLASSIFICATION_DIGIT_PX)
            name = f'classification/{split}/{label}/{index:04}_{view}.png'
            save(root / name, image)
            shown[name] = [index]
    return shown


def write_scenes(root: Path, split: str, images: np.ndarray,
                 labels: np.ndarray, indices: list[int],
                 settings: dict[str, int]) -> dict[str, list[int]]:
    """Write one split of the scenes, its COCO file and its label maps.

    Returns:
        dict[str, list[int]]: File name -> the source digits visible in it, in
        the order of its annotations.
    """
    coco = dict(
        info=dict(description='Digits scenes, made by tools/make_digits.py'),
        categories=[
            dict(id=number, name=name)
            for number, name in enumerate(CLASSES, start=1)
        ],
        images=[],
        annotations=[])
    shown = {}
    for scene in range(settings[f'{split}_scenes']):
        rng = np.random.RandomState(
            (settings['seed'], SPLITS.index(split), scene, 0))
        count = rng.randint(SCENE_DIGITS[0], SCENE_DIGITS[1] + 1)
        chosen = rng.choice(indices, count, replace=False).tolist()
        image, instances = draw_scene(rng, SCENE_SIZE,
                                      [images[index] for index in chosen],
                                      SCENE_DIGIT_PX)
        annotations, label_map = annotate(
            instances, [int(labels[index]) for index in chosen])
        name = f'{scene:04}.png'
        save(root / 'scenes' / split / name, image)
        save(root / 'scenes/labels' / split / name, label_map)
        coco['images'].append(
            dict(
                id=scene, file_name=name, width=SCENE_SIZE, height=SCENE_SIZE))
        for annotation in annotations:
            annotation.update(id=len(coco['annotations']) + 1, image_id=scene)
            coco['annotations'].append(annotation)
        shown[f'scenes/{split}/{name}'] = [
            index for number, index in enumerate(chosen, start=1)
            if (instances == number).any()
        ]
    (root / 'scenes' / f'{split}.json').write_text(json.dumps(coco))
    return shown


def read_manifest(dest: Path) -> dict | None:
    """Read what this tool noted in ``dest``.

    Returns:
        dict | None: The manifest; None without a readable one of this tool.
    """
    try:
        manifest = json.loads((dest / 'manifest.json').read_text())
    except (OSError, ValueError):
        return None
    is_ours = isinstance(manifest, dict) and all(
        isinstance(manifest.get(key), dict)
        for key in ('settings', 'sources', 'files'))
    return manifest if is_ours else None


def files_of(manifest: dict) -> set[str]:
    """Names of all files of the data with that manifest.

    Args:
        manifest (dict): Of :func:`read_manifest`.

    Returns:
        set[str]: Relative to its folder.
    """
    scenes = {name for name in manifest['files'] if name.startswith('scenes/')}
    return {'manifest.json', *manifest['files'],
            *(f'scenes/{split}.json' for split in SPLITS),
            *(name.replace('scenes/', 'scenes/labels/', 1) for name in scenes)}


def check_replaceable(dest: Path, manifest: dict | None) -> None:
    """Check that replacing ``dest`` destroys nothing but Digits data.

    Args:
        dest (Path): A folder or file.
        manifest (dict | None): Of :func:`read_manifest`.

    Raises:
        FileExistsError: If it is no folder, or holds a file that the
            manifest does not name.
        OSError: If it cannot be read.
    """
    if not dest.is_dir():
        raise FileExistsError(
            f"'{dest}' is a file; give a new or empty folder")
    made = files_of(manifest) if manifest else set()
    foreign = sorted(
        name for name in (path.relative_to(dest).as_posix()
                          for path in dest.rglob('*')
                          if path.is_symlink() or not path.is_dir())
        if name not in made)
    if foreign:
        raise FileExistsError(
            f"'{dest}' holds {', '.join(foreign[:3])}, which no manifest.json "
            'of this tool names; give a new or empty folder, or remove this '
            'one first')


def is_filled(path: Path) -> bool:
    """Whether there is such a file, and something in it."""
    return path.is_file() and path.stat().st_size > 0


def make_digits(dest: str | Path,
                train_scenes: int = 1000,
                val_scenes: int = 100,
                views: int = 3,
                seed: int = 0,
                report: Callable[[str], None] = print) -> bool:
    """Make the Digits data in ``dest``, unless it is there already.

    Args:
        dest (str | Path): Folder to make. What an older run made there is
            replaced; a folder with other things is not touched.
        train_scenes (int): Number of training scenes. Defaults to 1000.
        val_scenes (int): Number of validation scenes. Defaults to 100.
        views (int): Pictures of each training digit in the classification
            folder, each on a canvas of its own. Defaults to 3.
        seed (int): Seed of everything random. Defaults to 0.
        report (Callable[[str], None]): Takes the lines that tell the progress.

    Returns:
        bool: Whether anything was made.

    Raises:
        FileExistsError: If ``dest`` holds anything that is not Digits data.
        OSError: If it cannot be written.
    """
    dest = Path(dest).resolve()
    settings = dict(
        version=VERSION,
        train_scenes=train_scenes,
        val_scenes=val_scenes,
        views=views,
        seed=seed)
    manifest = read_manifest(dest)
    if manifest and manifest['settings'] == settings and all(
            is_filled(dest / name) for name in files_of(manifest)):
        report(f'{dest} is complete, nothing to do')
        return False
    if dest.exists():
        check_replaceable(dest, manifest)

    dest.parent.mkdir(parents=True, exist_ok=True)
    # A name that no folder has yet, so that nothing is in the way.
    with tempfile.TemporaryDirectory(
            prefix=f'{dest.name}.', dir=dest.parent) as folder:
        partial = Path(folder, 'new')
        images, labels = load_sources()
        sources = split_sources(labels, seed)
        shown = {}
        for split in SPLITS:
            for kind, write in (('classification', write_classification),
                                ('scenes', write_scenes)):
                files = write(partial, split, images, labels, sources[split],
                              settings)
                report(f'{len(files):5} images in {kind}/{split}')
                shown.update(files)
        manifest = dict(settings=settings, sources=sources, files=shown)
        (partial / 'manifest.json').write_text(json.dumps(manifest))
        if dest.exists():
            # Others may have written there meanwhile. What is replaced is
            # deleted with the folder, when the new data is in its place.
            check_replaceable(dest, read_manifest(dest))
            dest.rename(Path(folder, 'old'))
        partial.rename(dest)
    return True


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """Parse the command line.

    Args:
        argv (list[str], optional): Arguments; those of the process if None.

    Returns:
        Namespace: The options.
    """
    parser = argparse.ArgumentParser(
        description='Make the Digits data: classification, instance and '
        'semantic segmentation from 1,797 real handwritten digits.')
    parser.add_argument('dest', help='folder to make, such as data/digits')
    parser.add_argument('--train-scenes', type=positive, default=1000)
    parser.add_argument('--val-scenes', type=positive, default=100)
    parser.add_argument(
        '--views',
        type=positive,
        default=3,
        help='pictures of each training digit for classification')
    parser.add_argument('--seed', type=seed_number, default=0)
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> None:
    """Make the data.

    Args:
        argv (list[str], optional): Arguments; those of the process if None.
    """
    args = parse_args(argv)
    start = time.time()
    try:
        made = make_digits(**vars(args))
    except OSError as error:
        raise SystemExit(f'cannot make the data: {error}') from error
    if made:
        print(f'made {args.dest} in {time.time() - start:.0f} s')


if __name__ == '__main__':
    main()
