"""Tables and a plot of what tools/benchmark.py has measured.

    python tools/plot_benchmark.py benchmarks/FILE.json ... [--plot FILE.png]

The tables are Markdown. 'speed-up' is the median, over the samples, of the
time of the first model over that of the model; 'step memory' is a ratio to
the first model's. 'roofline' is the least time that the arithmetic and the
memory traffic of a fused Conv2Former take on that GPU over the time it took.

The plot shows time and memory per pixel against the size of the image, where
there are several, else against the batch. What grows in proportion to the
work is a level line. Where no case was measured at several, it shows bars.
"""
import argparse
import itertools
import json
import math
from pathlib import Path
from statistics import median

import matplotlib
from matplotlib import pyplot as plt
from matplotlib.backend_bases import FigureCanvasBase
from matplotlib.lines import Line2D
from matplotlib.ticker import NullLocator

matplotlib.use('Agg')  # pictures go to files: no screen is needed

WHAT = ('task', 'mode', 'dtype', 'weights_dtype', 'channels_last',
        'drop_path', 'cudnn_benchmark', 'device')
CASE = (*WHAT, 'batch', 'height', 'width')


def describe(row: dict, batch: bool = True, size: bool = True) -> str:
    """A case in words, with or without its batch and size."""
    parts = [row['task'], row['mode']]
    if row['mode'] != 'optimizer':
        parts.append(row['dtype'])
        parts += [f'batch {row["batch"]}'] * batch
        parts += [f'{row["height"]}x{row["width"]}'] * size
    parts.append(row['device'])
    if row['weights_dtype'] != 'fp32':
        parts.append(f'weights {row["weights_dtype"]}')
    if row['channels_last']:
        parts.append('channels-last')
    if row['drop_path']:
        parts.append(f'drop path {row["drop_path"]:g}')
    if row.get('cudnn_benchmark'):
        parts.append('cuDNN benchmark')
    return ', '.join(parts)


def values(row: dict, keys: tuple[str, ...]) -> tuple:
    """Those values of a row, of which older files lack some."""
    return tuple(row.get(key, False) for key in keys)


def cells(row: dict, first: dict) -> dict[str, str]:
    """A line of a table: heading -> text.

    Args:
        row (dict): What was measured for a model.
        first (dict): The same for the first model of the case.

    Returns:
        dict[str, str]: Only what is known of this model.
    """
    line = {'model': row['model']}
    times = row['samples']
    if times is None:
        return {**line, 'ms': row['failed'].partition('\n')[0][:60]}
    line['ms'] = f'{1e3 * median(times):.4g}'
    line['least - greatest'] = f'{1e3 * min(times):.4g} - ' \
                               f'{1e3 * max(times):.4g}'
    if row['mode'] != 'optimizer':
        line['images/s'] = f'{row["batch"] / median(times):.4g}'
    ratio = median(a / b for a, b in zip(first['samples'], times))
    line['speed-up'] = f'{ratio:.2f}'
    if 'memory_step' in row:
        line['step MB'] = f'{row["memory_step"] / 1e6:.0f}'
        line['total MB'] = f'{row["memory_total"] / 1e6:.0f}'
        line['step memory'] = \
            f'{row["memory_step"] / first["memory_step"]:.2f}'
    if 'difference' in row:
        line['difference (allowed)'] = \
            f'{row["difference"]:.1g} ({row["tolerance"]:.2g})'
    if row.get('roofline'):
        line['roofline'] = f'{row["roofline"] / median(times):.0%}'
    return line


def make_table(rows: list[dict]) -> str:
    """The rows of one case as a table in Markdown."""
    first = next((row for row in rows if row['samples']), rows[0])
    lines = [cells(row, first) for row in rows]
    headings = list(dict.fromkeys(itertools.chain(*lines)))
    columns = []
    for heading in headings:
        texts = [line.get(heading, '') for line in lines]
        width = max(map(len, (heading, *texts)))
        if heading == 'model':
            columns.append([heading.ljust(width), '-' * width] +
                           [text.ljust(width) for text in texts])
        else:
            columns.append([heading.rjust(width), '-' * (width - 1) + ':'] +
                           [text.rjust(width) for text in texts])
    return '\n'.join(f'| {" | ".join(line)} |' for line in zip(*columns))


def report(results: dict) -> str:
    """The machine, and a table for each case.

    Args:
        results (dict): ``machine`` and ``rows``, as ``--json`` writes them.

    Returns:
        str: Markdown.
    """
    parts = [', '.join(f'{k} {v}' for k, v in results['machine'].items())]
    for _, group in itertools.groupby(results['rows'],
                                      lambda row: values(row, CASE)):
        rows = list(group)
        parts.append(f'{describe(rows[0])}:\n\n{make_table(rows)}')
    return '\n\n'.join(parts)


def plot_bars(rows: list[dict], path: Path) -> None:
    """Plot time and memory, a bar for each model.

    Args:
        rows (list[dict]): Rows of any number of files.
        path (Path): The picture to write.
    """
    cases = {}
    for row in rows:
        cases.setdefault(values(row, CASE), []).append(row)
    fig, axes = plt.subplots(
        len(cases), 2, squeeze=False, layout='constrained',
        figsize=(11, 0.8 + sum(0.6 + 0.25 * len(c) for c in cases.values())),
        height_ratios=[2 + len(case) for case in cases.values()])
    for (left, right), case in zip(axes, cases.values()):
        models = [row['model'] for row in case]
        colours = [f'C{i}' for i in range(len(case))]
        times = [1e3 * median(row['samples']) for row in case]
        memory = [row.get('memory_step', 0) / 1e9 for row in case]
        for axis, numbers, unit in (
            (left, times, 'time of a step, ms'),
            (right, memory, 'memory of a step, GB')):
            bars = axis.barh(models, numbers, color=colours)
            axis.bar_label(bars, [f'{number:.3g}' if number else 'not measured'
                                  for number in numbers], padding=3)
            axis.set_xlabel(unit)
            axis.margins(x=0.15)
            axis.invert_yaxis()
            axis.spines[['top', 'right']].set_visible(False)
        left.set_title(describe(case[0]), loc='left')
    fig.savefig(path, dpi=120)
    plt.close(fig)


def _swept(rows: list[dict], fixed: tuple[str, ...],
           swept: tuple[str, ...]) -> list[list[dict]]:
    """Rows that differ in what is swept alone, for each of a model once."""
    groups = {}
    for row in rows:
        groups.setdefault(values(row, fixed), []).append(row)
    return [group for group in groups.values()
            if len({values(row, swept) for row in group}) > 1
            and len({values(row, ('model', *swept)) for row in group})
            == len(group)]


def plot(rows: list[dict], path: Path) -> None:
    """Plot time and memory per pixel, a line for each model.

    Bars where no case was measured at several sizes or batches.

    Args:
        rows (list[dict]): Rows of any number of files.
        path (Path): The picture to write.

    Raises:
        SystemExit: If no step of a model was measured, or some in a series
            and others not.
    """
    rows = [
        row for row in rows if row['samples'] and row['mode'] != 'optimizer'
    ]
    by_size = len({(row['height'], row['width']) for row in rows}) > 1
    swept, fixed = ('height', 'width'), ('batch', )
    if not by_size:
        swept, fixed = fixed, swept
    # With --same-pixels each size has a batch of its own.
    groups = _swept(rows, WHAT + fixed, swept) or (
        _swept(rows, WHAT, swept) if by_size else [])
    if not rows:
        raise SystemExit('nothing to plot: the files have no training step '
                         'and no forward pass')
    if not groups:
        plot_bars(rows, path)
        return
    drawn = list(itertools.chain(*groups))
    others = {describe(row): None for row in rows if row not in drawn}
    if others:
        raise SystemExit(
            f'--plot: {"; ".join(others)}: not measured at several '
            f'{"sizes" if by_size else "batches"} as the others were, and '
            'cannot be drawn with them; plot the files one by one')
    models = list(dict.fromkeys(row['model'] for row in rows))
    fig, axes = plt.subplots(
        len(groups), 2, figsize=(11, 1 + 3.5 * len(groups)), squeeze=False,
        layout='constrained')
    for (left, right), group in zip(axes, groups):
        ticks, lines = {}, {}
        one_batch = len({row['batch'] for row in group}) == 1
        for row in group:
            pixels = row['batch'] * row['height'] * row['width']
            side = values(row, swept)
            place = math.prod(side)
            ticks[place] = 'x'.join(map(str, dict.fromkeys(side)))
            lines.setdefault(row['model'], []).append((
                place, 1e9 * median(row['samples']) / pixels,
                row.get('memory_step', float('nan')) / pixels / 1e3))
        for model, points in lines.items():
            places, nanoseconds, kilobytes = zip(*sorted(points))
            colour = f'C{models.index(model)}'
            left.plot(places, nanoseconds, 'o-', color=colour)
            right.plot(places, kilobytes, 'o-', color=colour)
        for axis, unit in ((left, 'time of a step, ns per pixel'),
                           (right, 'memory of a step, kB per pixel')):
            axis.set(
                title=describe(group[0], batch=one_batch, size=not by_size),
                ylabel=unit,
                xlabel='pixels' if by_size else 'images in the batch',
                xscale='log')
            axis.set_ylim(bottom=0)
            axis.set_xticks(list(ticks), list(ticks.values()))
            axis.xaxis.set_minor_locator(NullLocator())
            axis.grid(alpha=0.3)
    fig.legend(
        [Line2D([], [], marker='o', color=f'C{i}')
         for i in range(len(models))],
        models,
        loc='outside upper center',
        ncols=3)
    fig.savefig(path, dpi=120)
    plt.close(fig)


def read(path: Path) -> dict:
    """Read what ``--json`` of tools/benchmark.py wrote.

    Args:
        path (Path): The file.

    Returns:
        dict: ``machine`` and ``rows``.

    Raises:
        SystemExit: If it is missing, or something else.
    """
    hint = 'tools/benchmark.py --json writes such files'
    try:
        results = json.loads(path.read_text())
        needed = {*CASE, 'model', 'samples'}
        is_ours = isinstance(results['machine'], dict) and all(
            needed <= row.keys() for row in results['rows'])
    except OSError as error:
        raise SystemExit(
            f"cannot read '{path}': {error.strerror}; {hint}") from error
    except (ValueError, KeyError, TypeError, AttributeError):
        is_ours = False
    if not is_ours:
        raise SystemExit(f"'{path}' holds no measurements of models; {hint}")
    return results


def check_picture(path: Path) -> None:
    """Check that a picture can be written, before anything is drawn.

    Args:
        path (Path): The picture to write.

    Raises:
        SystemExit: If its ending is unknown, or its folder does not exist.
    """
    known = FigureCanvasBase.get_supported_filetypes()
    if path.suffix[1:].lower() not in known:
        raise SystemExit(f"--plot '{path}': expected a file that ends in ." +
                         ', .'.join(sorted(known)))
    if path.is_dir() or not path.parent.is_dir():
        raise SystemExit(f"--plot '{path}': expected a file in a folder that "
                         'exists')


def main(argv: list[str] | None = None) -> None:
    """Print the tables and write the plot.

    Args:
        argv (list[str], optional): Arguments; those of the process if None.
    """
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('files', nargs='+', type=Path, metavar='FILE')
    parser.add_argument('--plot', type=Path, metavar='FILE',
                        help='the picture to write')
    args = parser.parse_args(argv)
    if args.plot:
        check_picture(args.plot)
    found = [read(path) for path in args.files]
    print('\n\n'.join(map(report, found)))
    if args.plot:
        rows, files = [], {}
        for file, results in zip(args.files, found):
            for row in results['rows']:
                key = row['model'], values(row, CASE)
                if files.setdefault(key, file) != file:
                    raise SystemExit(
                        f"--plot: '{files[key]}' and '{file}' both have "
                        f'{row["model"]} ({describe(row)}), which would be '
                        'drawn as one; plot them one by one')
                rows.append(row)
        try:
            plot(rows, args.plot)
        except OSError as error:
            raise SystemExit(f"cannot write '{args.plot}': {error.strerror}; "
                             'name another file with --plot') from error


if __name__ == '__main__':
    main()
