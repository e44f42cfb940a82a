"""Report of the Digits quickstart: a table, loss curves and pictures.

Reads what training and testing left in WORK_DIRS (mmengine's logs, and the
predictions that tools/test.py --out wrote), prints the table and writes one
HTML page that needs no other file::

    python tools/digits_report.py --work-dirs work_dirs --data data/digits

tools/quickstart.sh runs it; after that it can be run again at any time.
"""
import argparse
import base64
import html
import io
import json
import pickle
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import cv2
import matplotlib
import numpy as np
from matplotlib import pyplot as plt
from matplotlib.colors import to_rgb
from PIL import Image
from pycocotools import mask as rle

from argument_types import positive
from data_error import DataError

matplotlib.use('Agg')  # pictures go to files: no screen is needed


class Metric(NamedTuple):
    """A figure in the table."""
    name: str  # as shown
    key: str  # in the log of the library's evaluator
    scale: float  # from the log to what is shown
    target: float
    digits: int  # decimals shown


class Task(NamedTuple):
    """A trained model; ``run`` is its config and its folder of logs."""
    name: str
    run: str
    metrics: tuple[Metric, ...]
    has_scratch: bool  # --compare trains it from scratch too


TASKS = (
    Task('classification', 'conv2former_mini_digits',
         (Metric('top-1 %', 'accuracy/top1', 1, 97, 1), ), False),
    Task('instance segmentation', 'mask_rcnn_conv2former_mini_digits',
         (Metric('box mAP@50', 'coco/bbox_mAP_50', 1, 0.85, 3),
          Metric('mask mAP@50', 'coco/segm_mAP_50', 1, 0.80, 3)), True),
    Task('semantic segmentation', 'upernet_conv2former_mini_digits',
         (Metric('mIoU', 'mIoU', 0.01, 0.75, 3), ), True),
)
SCRATCH = '_scratch'  # appended to the run that starts without pre-training
COLOURS = ('#f94144', '#f8961e', '#f9c74f', '#90be6d', '#43aa8b', '#4cc9f0',
           '#277da1', '#7b6cf6', '#c77dff', '#ff70a6')
SCORE = 0.5  # boxes below it are not drawn


class Detection(NamedTuple):
    """A digit in a scene: box (x1, y1, x2, y2), mask (H, W), class, score."""
    box: tuple[float, float, float, float]
    mask: np.ndarray
    label: int
    score: float | None = None  # None: the truth


# ---------------------------------------------------------------- reading


def newest(folder: Path, pattern: str) -> Path:
    """The newest file in ``folder`` that matches ``pattern``.

    Raises:
        FileNotFoundError: If there is none.
    """
    found = sorted(folder.glob(pattern), key=lambda path: path.stat().st_mtime)
    if not found:
        raise FileNotFoundError(f'no {pattern} in {folder}')
    return found[-1]


def read(path: Path, parse: Callable[[bytes], Any]) -> Any:
    """What ``parse`` makes of a file.

    Raises:
        FileNotFoundError: If there is none.
        DataError: If it was cut or changed.
    """
    content = path.read_bytes()
    # The last two are what pillow raises for pictures.
    try:
        return parse(content)
    except (ValueError, EOFError, pickle.UnpicklingError, OSError,
            SyntaxError) as error:
        raise DataError(f'{path} is damaged ({error}): delete it') from error


def read_picture(path: Path) -> np.ndarray:
    """The pixels of a picture; see :func:`read` for the errors."""
    return read(path, lambda data: np.array(Image.open(io.BytesIO(data))))


def read_metrics(run: Path, names: Iterable[str] = ()) -> dict[str, float]:
    """What the library's own evaluator found in the last test of a run.

    Raises:
        FileNotFoundError: If there was no test.
        DataError: If one of the metrics named is missing.
    """
    path = newest(run / 'test', '*/*.json')
    found = read(path, json.loads)
    for name in names:
        if name not in found:
            raise DataError(f'{path} has no {name}')
    return found


def read_losses(run: Path) -> tuple[list[int], list[float]]:
    """Iterations and losses of the last training of a run."""
    lines = read(
        newest(run, '*/vis_data/scalars.json'),
        lambda text: list(map(json.loads, text.splitlines())))
    logged = [line for line in lines if 'loss' in line]
    return ([line['step'] for line in logged],
            [line['loss'] for line in logged])


def read_seconds(path: Path) -> dict[str, float]:
    """Seconds of each step, from lines 'name<TAB>seconds'.

    Raises:
        FileNotFoundError: If there is no such file, or it has no total.
        DataError: If it was cut or changed.
    """

    def parse(text: bytes) -> dict[str, float]:
        pairs = (line.split('\t') for line in text.decode().splitlines())
        return {name: float(taken) for name, taken in pairs}

    seconds = read(path, parse)
    if 'total' not in seconds:
        raise FileNotFoundError(f'no total in {path}: that run has not ended')
    return seconds


def read_predictions(run: Path) -> list[dict]:
    """Predictions of mmpretrain and mmdet, one dict per image."""
    return read(run / 'test' / 'predictions.pkl', pickle.loads)


def read_truth(coco_file: Path) -> dict[str, list[Detection]]:
    """File name -> the digits in it, from a COCO file of the scenes."""
    coco = read(coco_file, json.loads)
    names = {image['id']: image['file_name'] for image in coco['images']}
    truth = {name: [] for name in names.values()}
    for item in coco['annotations']:
        x, y, width, height = item['bbox']
        size = item['segmentation']['size']
        mask = rle.decode(rle.frPyObjects(item['segmentation'], *size))
        truth[names[item['image_id']]].append(
            Detection((x, y, x + width, y + height), mask,
                      item['category_id'] - 1))
    return truth


def read_detections(predictions: list[dict]) -> dict[str, list[Detection]]:
    """File name -> the digits that mmdet found in it, surest first."""
    found = {}
    for image in predictions:
        digits = image['pred_instances']
        found[Path(image['img_path']).name] = [
            Detection(tuple(box), rle.decode(mask), int(label), float(score))
            for box, mask, label, score in zip(digits['bboxes'].tolist(
            ), digits['masks'], digits['labels'], digits['scores'])
            if score >= SCORE
        ]
    return found


# ------------------------------------------------------------------ table


def make_rows(work_dirs: Path, seconds: dict[str, float],
              compare: bool) -> list[dict]:
    """One dict per figure: task, metric, value, target, ok, minutes, ...

    Minutes, of training and testing, stand at the first figure of a task.
    """
    rows = []
    for task in TASKS:
        keys = [metric.key for metric in task.metrics]
        found = read_metrics(work_dirs / task.run, keys)
        scratch = {}
        if compare and task.has_scratch:
            scratch = read_metrics(work_dirs / (task.run + SCRATCH), keys)
        minutes = sum(taken for step, taken in seconds.items()
                      if step in (f'train {task.run}', f'test {task.run}'))
        for metric in task.metrics:
            value = found[metric.key] * metric.scale
            row = dict(
                task=task.name,
                metric=metric.name,
                value=f'{value:.{metric.digits}f}',
                target=f'{metric.target:.{metric.digits}f}',
                met='yes' if value >= metric.target else 'NO',
                minutes=f'{minutes / 60:.1f}')
            if metric != task.metrics[0]:
                row.update(task='', minutes='')
            if compare:
                row.update({'from scratch': '', 'difference': ''})
            if scratch:
                other = scratch[metric.key] * metric.scale
                row.update({
                    'from scratch': f'{other:.{metric.digits}f}',
                    'difference': f'{value - other:+.{metric.digits}f}'
                })
            rows.append(row)
    # The dense models train at the same time, so the minutes do not add up.
    rows.append(
        dict.fromkeys(rows[0], '')
        | dict(
            task='everything, data included',
            minutes=f'{seconds["total"] / 60:.1f}'))
    return rows


def format_text(rows: list[dict]) -> str:
    """The table in plain text."""
    lines = [list(rows[0])] + [list(row.values()) for row in rows]
    widths = [max(map(len, column)) for column in zip(*lines)]
    lines.insert(1, ['-' * width for width in widths])
    return '\n'.join('  '.join(
        cell.ljust(width) if i < 2 else cell.rjust(width)
        for i, (cell, width) in enumerate(zip(line, widths)))
                     for line in lines)


def format_html(rows: list[dict]) -> str:
    """The table as HTML."""
    head = ''.join(f'<th>{html.escape(name)}</th>' for name in rows[0])
    body = ''
    for row in rows:
        cells = ''.join(f'<td>{html.escape(cell)}</td>'
                        for cell in row.values())
        missed = ' class="missed"' if row['met'] == 'NO' else ''
        body += f'<tr{missed}>{cells}</tr>\n'
    return f'<table><tr>{head}</tr>\n{body}</table>'


# --------------------------------------------------------------- pictures


def draw_image(axes: plt.Axes, image: np.ndarray, title: str = '') -> None:
    """Show an image without axes."""
    axes.imshow(image, interpolation='nearest' if image.ndim == 2 else None)
    axes.set_title(title, fontsize=9, pad=3)
    axes.axis('off')


def draw_detections(axes: plt.Axes, image: np.ndarray,
                    detections: list[Detection], title: str = '') -> None:
    """Show an image with boxes, masks and digits."""
    grey = image.mean(2, keepdims=True).repeat(3, 2) / 255 * 0.7
    for detection in detections[::-1]:
        inside = detection.mask.astype(bool)
        colour = to_rgb(COLOURS[detection.label])
        grey[inside] = 0.25 * grey[inside] + 0.75 * np.array(colour)
    draw_image(axes, grey, title)
    for box, _, label, score in detections:
        left, top, right, bottom = box
        axes.add_patch(
            plt.Rectangle((left - 0.5, top - 0.5),
                          right - left,
                          bottom - top,
                          fill=False,
                          lw=1.2,
                          ec=COLOURS[label]))
        axes.text(
            left,
            max(top, 6),
            str(label) if score is None else f'{label}  {score:.2f}',
            fontsize=6.5,
            va='bottom',
            color='black',
            bbox=dict(fc=COLOURS[label], ec='none', pad=0.8))


def draw_labels(axes: plt.Axes, label_map: np.ndarray,
                title: str = '') -> None:
    """Show a label map: 0 background, 1..10 the digits, each written on it."""
    colours = np.array([to_rgb('#20232a')] + [to_rgb(c) for c in COLOURS])
    draw_image(axes, colours[label_map], title)
    for label in np.unique(label_map[label_map > 0]):
        for y, x in centres(label_map == label):
            axes.text(
                x,
                y,
                str(label - 1),
                fontsize=7,
                ha='center',
                va='center',
                color='black',
                bbox=dict(fc='white', ec='none', pad=0.6, alpha=0.75))


def centres(mask: np.ndarray,
            least: int = 40) -> Iterator[tuple[float, float]]:
    """Centre (row, column) of each connected part of ``least`` pixels."""
    _, _, stats, middle = cv2.connectedComponentsWithStats(
        mask.astype(np.uint8))
    for part, (x, y) in zip(stats[1:], middle[1:]):
        if part[cv2.CC_STAT_AREA] >= least:
            yield y, x


def draw_classes(plots: Iterable[plt.Axes], predictions: list[dict]) -> None:
    """Show images with the predicted digit, a wrong one in red."""
    for axes, image in zip(plots, predictions):
        draw_image(axes, read_picture(Path(image['img_path'])))
        predicted = int(image['pred_label'])
        wrong = predicted != int(image['gt_label'])
        axes.set_title(
            f'{predicted}, not {int(image["gt_label"])}'
            if wrong else str(predicted),
            fontsize=9,
            pad=2,
            color='#d00000' if wrong else 'black')


def draw_scenes(grid: list[list[plt.Axes]], names: list[str], data: Path,
                work_dirs: Path) -> None:
    """One scene per row: image, digits found, labels; each beside the truth.

    Args:
        grid (list[list[Axes]]): Rows of five axes.
        names (list[str]): File names of validation scenes, one per row.
        data (Path): Folder of the Digits data.
        work_dirs (Path): Folder of the runs.
    """
    truth = read_truth(data / 'scenes/val.json')
    found = read_detections(read_predictions(work_dirs / TASKS[1].run))
    labels = work_dirs / TASKS[2].run / 'test' / 'predictions'
    for i, (row, name) in enumerate(zip(grid, names)):
        titles = ('scene', 'digits: truth', 'digits: Mask R-CNN',
                  'labels: truth', 'labels: UperNet') if i == 0 else [''] * 5
        if name not in truth or name not in found:
            raise DataError(f'the predictions of {TASKS[1].run} are of other '
                            f'scenes than those in {data}: {name} is missing')
        image = read_picture(data / 'scenes/val' / name)
        draw_image(row[0], image, titles[0])
        draw_detections(row[1], image, truth[name], titles[1])
        draw_detections(row[2], image, found[name], titles[2])
        draw_labels(row[3], read_picture(data / 'scenes/labels/val' / name),
                    titles[3])
        draw_labels(row[4], read_picture(labels / name), titles[4])


def paint_losses(work_dirs: Path, compare: bool) -> plt.Figure:
    """Loss curves, one plot per task."""
    figure, plots = plt.subplots(
        1, len(TASKS), figsize=(11, 2.8), layout='constrained')
    for task, axes in zip(TASKS, plots):
        axes.plot(*read_losses(work_dirs / task.run), label='pre-trained')
        if compare and task.has_scratch:
            axes.plot(
                *read_losses(work_dirs / (task.run + SCRATCH)),
                label='from scratch')
            axes.legend(frameon=False)
        axes.set_title(task.name, fontsize=10)
        axes.set_xlabel('iteration')
        axes.set_ylim(bottom=0)
        axes.grid(alpha=0.3)
    plots[0].set_ylabel('training loss')
    return figure


def paint_classes(work_dirs: Path, rows: int, columns: int) -> plt.Figure:
    """Validation images of all classes, the wrongly classified ones first."""
    predictions = read_predictions(work_dirs / TASKS[0].run)
    wrong = [
        image for image in predictions
        if int(image['pred_label']) != int(image['gt_label'])
    ]
    free = max(1, rows * columns - len(wrong))
    step = max(1, len(predictions) // free)
    figure, grid = plt.subplots(
        rows, columns, figsize=(11, 0.95 * rows), layout='constrained')
    draw_classes(grid.flat, wrong + predictions[::step])
    return figure


def paint_scenes(work_dirs: Path, data: Path, names: list[str]) -> plt.Figure:
    """Validation scenes, one per row."""
    figure, grid = plt.subplots(
        len(names),
        5,
        figsize=(11, 2.25 * len(names)),
        layout='constrained',
        squeeze=False)
    draw_scenes(grid, names, data, work_dirs)
    return figure


def paint_overview(work_dirs: Path, data: Path,
                   names: list[str]) -> plt.Figure:
    """All three tasks in one picture, for the README."""
    figure = plt.figure(
        figsize=(10, 1.2 + 2.05 * len(names)), layout='constrained')
    top, bottom = figure.subfigures(
        2, 1, height_ratios=[1, 2.05 * len(names)])
    predictions = read_predictions(work_dirs / TASKS[0].run)
    step = max(1, len(predictions) // 14)
    draw_classes(top.subplots(1, 14), predictions[::step])
    grid = bottom.subplots(len(names), 5, squeeze=False)
    draw_scenes(grid, names, data, work_dirs)
    return figure


def to_png(figure: plt.Figure, dpi: int) -> bytes:
    """A figure as a PNG with 256 colours, a third of the size."""
    buffer = io.BytesIO()
    figure.savefig(buffer, dpi=dpi)
    plt.close(figure)
    image = Image.open(buffer).convert('RGB').quantize(256)
    buffer = io.BytesIO()
    image.save(buffer, 'PNG', optimize=True)
    return buffer.getvalue()


# ------------------------------------------------------------------- page

PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>Digits report</title>
<style>
body {{ font: 15px/1.5 system-ui, sans-serif; color: #20232a;
  max-width: 1100px; margin: 2em auto; padding: 0 1em; }}
h1 {{ font-size: 1.6em; }} h2 {{ font-size: 1.15em; margin-top: 2em; }}
table {{ border-collapse: collapse; font-variant-numeric: tabular-nums; }}
th, td {{ padding: .3em .9em; text-align: right;
  border-bottom: 1px solid #d8dbe2; }}
th:nth-child(-n+2), td:nth-child(-n+2) {{ text-align: left; }}
tr:last-child td {{ border-bottom: 0; font-weight: 600; }}
.missed td {{ color: #d00000; }}
img {{ width: 100%; }} p {{ max-width: 46em; }}
</style></head><body>
<h1>Digits: one backbone, three tasks</h1>
<p>One small Conv2Former, trained to classify real handwritten digits; its
weights then start Mask R-CNN and UperNet on scenes of such digits. Every
figure is measured by the library's own evaluator on validation images, whose
digits none of the models has seen in training.</p>
{table}
{sections}
</body></html>
"""


def write_page(path: Path, rows: list[dict],
               pictures: dict[str, bytes]) -> None:
    """Write the page: the table and one section per picture.

    Args:
        path (Path): File to write.
        rows (list[dict]): Of :func:`make_rows`.
        pictures (dict[str, bytes]): Heading -> PNG.
    """
    sections = '\n'.join(
        f'<h2>{html.escape(heading)}</h2>\n<img alt="{html.escape(heading)}" '
        f'src="data:image/png;base64,{base64.b64encode(png).decode()}">'
        for heading, png in pictures.items())
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(PAGE.format(table=format_html(rows), sections=sections))


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """Parse the command line; that of the process if ``argv`` is None."""
    parser = argparse.ArgumentParser(
        description='Table, loss curves and pictures of the Digits runs.')
    parser.add_argument('--work-dirs', type=Path, default=Path('work_dirs'))
    parser.add_argument('--data', type=Path, default=Path('data/digits'))
    parser.add_argument(
        '--out',
        type=Path,
        help='page to write, or a folder for it; defaults to '
        'WORK_DIRS/digits/report.html')
    parser.add_argument(
        '--compare',
        action='store_true',
        help='add the dense models trained from scratch')
    parser.add_argument(
        '--scenes', type=positive, default=6, help='number of scenes shown')
    parser.add_argument(
        '--picture',
        type=Path,
        help='write all three tasks in one PNG too, such as docs/digits.png')
    args = parser.parse_args(argv)
    if args.picture and args.picture.is_dir():
        parser.error(f'--picture {args.picture} is a folder: name a PNG in it')
    return args


def make_report(args: argparse.Namespace) -> None:
    """Print the table and write the page, and the picture if it is wanted.

    Args:
        args (Namespace): The options.

    Raises:
        FileNotFoundError: If a run or the data is missing.
        DataError: If what a run has left cannot be read.
        OSError: If the page or the picture cannot be written.
    """
    out = args.out or args.work_dirs / 'digits/report.html'
    if out.is_dir():
        out /= 'report.html'
    seconds = read_seconds(args.work_dirs / 'digits/seconds.tsv')
    rows = make_rows(args.work_dirs, seconds, args.compare)
    names = [path.name for path in sorted(
        (args.data / 'scenes/val').glob('*.png'))][:args.scenes]
    if not names:
        raise FileNotFoundError(f'no scenes in {args.data / "scenes/val"}')
    pictures = {
        'Training loss':
        to_png(paint_losses(args.work_dirs, args.compare), 110),
        'Classification: predicted digit, mistakes first':
        to_png(paint_classes(args.work_dirs, 4, 15), 110),
        'Scenes: instances and label maps':
        to_png(paint_scenes(args.work_dirs, args.data, names), 110),
    }
    write_page(out, rows, pictures)
    print(format_text(rows))
    if args.picture:
        args.picture.parent.mkdir(parents=True, exist_ok=True)
        overview = paint_overview(args.work_dirs, args.data, names[:3])
        args.picture.write_bytes(to_png(overview, 100))
    print(f'report: {out}')


def main(argv: list[str] | None = None) -> None:
    """Make the report, or say what is missing.

    Args:
        argv (list[str], optional): Arguments; those of the process if None.
    """
    args = parse_args(argv)
    try:
        make_report(args)
    except (FileNotFoundError, DataError) as error:
        compare = ' --compare' * args.compare
        raise SystemExit(
            f'there is no report to make: {error}. Run bash '
            f'tools/quickstart.sh{compare} first, or say with --work-dirs and '
            '--data where its runs and data are') from error
    except OSError as error:
        raise SystemExit(f'the report cannot be written: {error}') from error


if __name__ == '__main__':
    main()
