"""Export a classifier or a backbone to ONNX or torch.export, and check it.

    python tools/export.py CONFIG CHECKPOINT [--format onnx torch] [--fuse]

The input is a batch of images (N, 3, height, width) in fp32 as the data
preprocessor of the config leaves them: of which mean and standard deviation,
the report says. Batch, height and width are dynamic. A classifier gives its
logits, without softmax; a backbone gives the feature maps that its config
returns, with the output norms that it has.

--format onnx writes .onnx for onnxruntime and others; --format torch writes
.pt2 for torch.export.load, which takes images with sides of 64 pixels or more
(twice the stride of the model).

What was written is loaded and run on images of several sizes, and compared
with the model in PyTorch, before --fuse. Where they differ, nothing is left
but an error.
"""
import argparse
import contextlib
import importlib.util
import logging
import math
import os
import os.path as osp
import tempfile
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import torch
from mmengine.config import Config
from mmengine.registry import MODELS, init_default_scope
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram

import checkpoint_files
import launch
from config_queries import preprocessing
from mmconv2former import fuse_for_inference

SUFFIXES = dict(onnx='.onnx', torch='.pt2')
# Number, height and width of the images: what is traced, and what is checked.
# For models of stride 32; those of larger strides get larger ones.
STRIDE = 32
TRACED = 2, 96, 128
SIZES = (TRACED, (1, 224, 224), (3, 65, 97), (1, 131, 64))
SMALL_SIZES = ((2, 33, 47), )  # ONNX does not keep the smallest side
TOLERANCE = 1e-4  # difference over the largest value
# Of onnxscript 0.7, to which torch leaves the conversion.
MIN_OPSET, MAX_OPSET = 18, 25

Run = Callable[[Tensor], Sequence[Tensor]]


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """Parse the command line.

    Args:
        argv (list[str], optional): Arguments; those of the process if None.

    Returns:
        Namespace: The options.
    """
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter)
    launch.add_config(parser)
    parser.add_argument('checkpoint', help='checkpoint file')
    parser.add_argument(
        '--format',
        nargs='+',
        choices=list(SUFFIXES),
        default=['onnx'],
        help='what to write; defaults to onnx')
    parser.add_argument(
        '--part',
        choices=['classifier', 'backbone'],
        help='defaults to the classifier if the config has one, else to the '
        'backbone')
    parser.add_argument(
        '--fuse',
        action='store_true',
        help='fold norms and layer scales into the convolutions first')
    parser.add_argument(
        '--opset',
        type=int,
        default=20,
        help=f'ONNX operator set, {MIN_OPSET} to {MAX_OPSET}; defaults to 20, '
        'the first with GELU')
    parser.add_argument(
        '--out',
        type=Path,
        metavar='FILE',
        help='file to write, with the ending of the format in place of .onnx '
        'or .pt2 or behind the name. Defaults to '
        'work_dirs/<config>/<config>_<part>')
    return parser.parse_args(argv)


def check_packages() -> None:
    """Check that what writes and runs ONNX is installed.

    Raises:
        SystemExit: If a package is missing.
    """
    missing = [
        name for name in ('onnx', 'onnxruntime', 'onnxscript')
        if importlib.util.find_spec(name) is None
    ]
    if missing:
        raise SystemExit(f'--format onnx needs {", ".join(missing)}: pip '
                         f'install {" ".join(missing)}')


def load_model(cfg: Config, checkpoint: str) -> nn.Module:
    """Build a model on the CPU and load all of its weights.

    Args:
        cfg (Config): The config.
        checkpoint (str): File or URL.

    Returns:
        nn.Module: The model in evaluation mode.

    Raises:
        SystemExit: If the checkpoint cannot be read or lacks weights.
    """
    init_default_scope(cfg.get('default_scope') or 'mmengine')
    if 'backbone' in cfg.model:
        cfg.model.backbone.pop('compile', None)  # anew for each size
    model = MODELS.build(cfg.model)
    checkpoint_files.load_weights(model, checkpoint)
    return model.eval()


def select(model: nn.Module, part: str | None) -> tuple[nn.Module, list[str]]:
    """The part of a model to export.

    Args:
        model (nn.Module): The model.
        part (str, optional): 'classifier' or 'backbone'.

    Returns:
        tuple[nn.Module, list[str]]: The part, and names of its outputs.

    Raises:
        SystemExit: If a classifier is wanted and there is none, or if there
            is no backbone.
    """
    if not hasattr(model, 'backbone'):
        raise SystemExit(
            f'{type(model).__name__} cannot be exported: it has no backbone, '
            f'but {", ".join(name for name, _ in model.named_children())}. '
            'Export a model that has the one of these, by its own config')
    # The heads of self-supervised models compute losses alone.
    is_classifier = hasattr(getattr(model, 'head', None), 'predict')
    if part == 'classifier' and not is_classifier:
        raise SystemExit(
            f'--part classifier: {type(model).__name__} is none. Of detectors '
            'and segmentors this tool exports the backbone, --part backbone')
    if is_classifier and part != 'backbone':
        return model, ['logits']
    return model.backbone, [f'stage{i}' for i in model.backbone.out_indices]


def images(size: tuple[int, int, int], channels: int) -> Tensor:
    """Random images.

    Args:
        size (tuple[int, int, int]): Number, height and width.
        channels (int): Number of channels.

    Returns:
        Tensor: (N, channels, height, width).
    """
    n, height, width = size
    generator = torch.Generator().manual_seed(height * width)
    return torch.randn(n, channels, height, width, generator=generator)


def run_model(model: nn.Module) -> Run:
    """Make a function that returns the outputs of a module as a sequence."""

    def run(x: Tensor) -> Sequence[Tensor]:
        with torch.no_grad():
            out = model(x)
        return (out, ) if isinstance(out, Tensor) else out

    return run


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Without what torch's exporters say about themselves."""
    # This one logs what its solver cannot solve, and does without.
    logger = logging.getLogger('torch.fx.experimental.symbolic_shapes')
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter('ignore')
            yield
    finally:
        logger.setLevel(level)


def write(program: ExportedProgram, path: str, outputs: list[str], opset: int,
          dynamic: tuple[dict[int, Dim]]) -> None:
    """Write a program to an .onnx or a .pt2 file.

    Args:
        program (ExportedProgram): The program.
        path (str): File to write.
        outputs (list[str]): Names of the outputs in ONNX.
        opset (int): Operator set of ONNX.
        dynamic (tuple[dict]): The dynamic sides of the images.

    Raises:
        SystemExit: If the exporter does not write the operator set.
    """
    if path.endswith(SUFFIXES['torch']):
        torch.export.save(program, path)
        return
    torch.onnx.export(
        program, (), path, dynamo=True, opset_version=opset,
        input_names=['images'], output_names=outputs, dynamic_shapes=dynamic,
        external_data=False, verbose=False)
    import onnx
    written = onnx.load(path).opset_import[0].version
    if written != opset:
        raise SystemExit(f'--opset {opset}: torch {torch.__version__} writes '
                         f'this model with operator set {written} only; give '
                         'another, such as the default')


def load(path: str) -> Run:
    """Make a function that runs what was written.

    Args:
        path (str): An .onnx or a .pt2 file.

    Returns:
        Callable: Images -> outputs.
    """
    if path.endswith(SUFFIXES['torch']):
        return run_model(torch.export.load(path).module())
    import onnxruntime
    session = onnxruntime.InferenceSession(
        path, providers=['CPUExecutionProvider'])
    return lambda x: [
        torch.from_numpy(out)
        for out in session.run(None, {'images': x.numpy()})
    ]


def difference(outs: Sequence[Tensor], expected: Sequence[Tensor]) -> float:
    """Compare outputs with what they should be.

    Args:
        outs (Sequence[Tensor]): The outputs.
        expected (Sequence[Tensor]): What they should be.

    Returns:
        float: The largest difference, over the largest value of its output;
        infinite if a shape differs or a value is not a number.
    """
    if [x.shape for x in outs] != [x.shape for x in expected]:
        return math.inf
    worst = torch.stack([
        (x - y).abs().max() / y.abs().max() for x, y in zip(outs, expected)
    ]).max().item()
    return math.inf if math.isnan(worst) else worst


def shape_of(out: Tensor, traced: tuple[int, int, int]) -> str:
    """Shape of an output, given the one for the images that are traced."""
    sides = [
        f'{name}/{whole // side}' for name, whole, side in zip(
            ('height', 'width'), traced[1:], out.shape[2:])
    ]
    return ', '.join(['batch', str(out.shape[1]), *sides])


def export(model: nn.Module, outputs: list[str], paths: list[Path],
           channels: int = 3, opset: int = 20,
           fuse: bool = False) -> list[str]:
    """Write a model to files and prove that they compute the same.

    Args:
        model (nn.Module): Takes images (N, channels, height, width) in fp32;
            changed in place by ``fuse``.
        outputs (list[str]): Names of its outputs.
        paths (list[Path]): Files to write, ending in .onnx or .pt2, in
            folders that exist. A file is untouched if its check fails.
        channels (int): Channels of the images. Defaults to 3.
        opset (int): Operator set of ONNX. Defaults to 20.
        fuse (bool): Whether to fold norms and layer scales first. Defaults
            to False.

    Returns:
        list[str]: The report, line by line.

    Raises:
        SystemExit: If a file would compute something else.
    """
    strides = getattr(getattr(model, 'backbone', model), 'out_strides', ())
    stride = max(STRIDE, *strides)
    # torch.export takes sides that the model reduces to 1 for a special case.
    min_side = 2 * stride
    sizes = [(n, height * stride // STRIDE, width * stride // STRIDE)
             for n, height, width in SIZES + SMALL_SIZES]
    traced = sizes[0]
    expected = {
        size: run_model(model)(images(size, channels))
        for size in sizes
    }
    if fuse:
        fuse_for_inference(model)
    dynamic = ({
        0: Dim('batch'),
        2: Dim('height', min=min_side),
        3: Dim('width', min=min_side)
    }, )
    with torch.no_grad(), quiet():
        program = torch.export.export(
            model, (images(traced, channels), ), dynamic_shapes=dynamic,
            strict=False,
            # The stride of the 16x16 embeddings makes conditions on the sizes
            # that torch cannot prove; they are checked when it runs.
            prefer_deferred_runtime_asserts_over_guards=True)
    report = []
    for path in paths:
        is_onnx = path.suffix == SUFFIXES['onnx']
        with tempfile.TemporaryDirectory(dir=path.parent) as folder, quiet():
            temporary = osp.join(folder, path.name)
            write(program, temporary, outputs, opset, dynamic)
            run = load(temporary)
            checked = [size for size in sizes
                       if is_onnx or min(size[1:]) >= min_side]
            differences = {
                size: difference(run(images(size, channels)), expected[size])
                for size in checked
            }
            worst = max(differences.values())
            if worst > TOLERANCE:
                raise SystemExit(
                    f'{path} was not written: its results would differ from '
                    f"the model's by {worst:.1e} of the largest value, where "
                    f'{TOLERANCE:.0e} is allowed (by number, height and '
                    f'width of the images: {differences})')
            os.replace(temporary, path)
        kind = f'ONNX, opset {opset}' if is_onnx else 'torch.export'
        report += [
            f'{path}: {kind}, {path.stat().st_size / 1e6:.1f} MB',
            f'  input   images  (batch, {channels}, height, width), sides of '
            f'at least {stride if is_onnx else min_side}'
        ]
        report += [
            f'  output  {name}  ({shape_of(out, traced)})'
            for name, out in zip(outputs, expected[traced], strict=True)
        ]
        listed = ', '.join('x'.join(map(str, size)) for size in checked)
        report += [
            f'  checked on {listed} (number x height x width):',
            f'  largest difference from the model {worst:.1e} of the largest '
            f'value, at most {TOLERANCE:.0e}'
        ]
    return report


def main(argv: list[str] | None = None) -> None:
    """Export and print the report.

    Args:
        argv (list[str], optional): Arguments; those of the process if None.
    """
    args = parse_args(argv)
    if 'onnx' in args.format:
        check_packages()
        if not MIN_OPSET <= args.opset <= MAX_OPSET:
            raise SystemExit(
                f'--opset must be at least {MIN_OPSET} and at most '
                f'{MAX_OPSET}, which is what torch exports; got {args.opset}')
    cfg = launch.read_config(args)
    launch.check_model(cfg, args.config)
    model, outputs = select(load_model(cfg, args.checkpoint), args.part)
    out = args.out
    if out is None:
        name = 'classifier' if outputs == ['logits'] else 'backbone'
        out = Path(cfg.work_dir, f'{Path(args.config).stem}_{name}.onnx')
    if out.is_dir():
        raise SystemExit(f"--out '{out}' is a folder; name a file")
    launch.check_writable(str(out.parent), '--out')
    if out.suffix in SUFFIXES.values():
        out = out.with_suffix('')
    paths = [Path(f'{out}{SUFFIXES[kind]}') for kind in args.format]
    for path in paths:
        if path.is_dir():
            raise SystemExit(f"'{path}' is a folder, and the model would be "
                             'written there; name another file with --out')
    backbone = getattr(model, 'backbone', model)
    channels = getattr(backbone, 'in_channels', 3)
    report = export(model, outputs, paths, channels, args.opset, args.fuse)
    _, settings = preprocessing(cfg)
    order = 'RGB' if settings.get('to_rgb') or settings.get(
        'bgr_to_rgb') else 'BGR'
    if channels != 3:  # which mmpretrain leaves as they are
        order = f'{channels} channels in the order of the loader'
    print('\n'.join(report))
    print(f'pixels: {order}, mean {settings.get("mean")}, standard deviation '
          f'{settings.get("std")}')


if __name__ == '__main__':
    main()
