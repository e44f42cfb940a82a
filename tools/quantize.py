"""Quantise an exported classifier to int8, and test what that costs.

    python tools/export.py CONFIG CHECKPOINT --fuse --out model.onnx
    python tools/quantize.py CONFIG model.onnx

Weights and activations become 8-bit integers (static quantisation by
onnxruntime). The ranges of the activations are those on 256 training images,
which pass the pipeline of testing. Both files are then tested on up to 1000
test images; where int8 loses more than half a point of top-1 accuracy, the
new file is not written.
"""
import argparse
import copy
import itertools
import logging
import os
import os.path as osp
import statistics
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import torch
from mmengine.config import Config
from mmengine.registry import MODELS, init_default_scope
from mmengine.runner import Runner
from torch import Tensor

import data_checks
import export
import launch
from argument_types import positive
from config_queries import data_sets, library, preprocessing
from data_error import one_message

CALIBRATION_IMAGES = 256
BATCH = 32
MAX_LOSS = 0.5  # points of top-1 accuracy


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
    parser.add_argument(
        'model', type=Path, help='classifier that tools/export.py wrote')
    parser.add_argument(
        '--out',
        type=Path,
        metavar='FILE',
        help='file to write; defaults to the name of MODEL with _int8')
    parser.add_argument(
        '--images',
        type=positive,
        default=1000,
        help='test images to compare the accuracy on at most; defaults to '
        '1000, drawn at random')
    return parser.parse_args(argv)


def batches(cfg: Config, part: str,
            images: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Draw images as the model gets them in a test.

    Args:
        cfg (Config): The config of a classifier.
        part (str): 'train' or 'test'; both pass the pipeline of testing.
        images (int): How many, at most.

    Yields:
        tuple[Tensor, Tensor]: Images (N, C, H, W) and their classes (N, ).
    """
    dataset = copy.deepcopy(cfg[f'{part}_dataloader'].dataset)
    _, tested = next(data_sets(cfg.test_dataloader.dataset, ''))
    for _, data_set in data_sets(dataset, ''):
        data_set.pipeline = copy.deepcopy(tested.pipeline)
    loader = dict(
        batch_size=BATCH,
        num_workers=0,  # forks would copy the threads of onnxruntime
        dataset=dataset,
        sampler=dict(type='DefaultSampler', shuffle=True))
    _, settings = preprocessing(cfg)
    preprocessor = MODELS.build({'type': 'ClsDataPreprocessor', **settings})
    loader = data_checks.build_loader(Runner.build_dataloader, loader, seed=0)
    data_checks.check_loader(loader, {}, exact=False)
    for batch in loader:
        batch = preprocessor(batch)
        labels = [sample.gt_label.item() for sample in batch['data_samples']]
        yield batch['inputs'][:images], torch.tensor(labels[:images])
        images -= len(labels)
        if images <= 0:
            return


def check_onnx(path: Path) -> tuple[int, int]:
    """Check that a file is a classifier in ONNX that is not quantised yet.

    Args:
        path (Path): The file.

    Returns:
        tuple[int, int]: Numbers of its input channels and classes.

    Raises:
        SystemExit: If it is not.
    """
    import onnx
    from google.protobuf.message import DecodeError
    hint = 'write it with: python tools/export.py CONFIG CHECKPOINT'
    if not path.is_file():
        what = 'is a folder' if path.is_dir() else 'does not exist'
        raise SystemExit(f"the ONNX file '{path}' {what}; {hint}")
    try:
        graph = onnx.load(path, load_external_data=False).graph
    except DecodeError as error:
        raise SystemExit(f"'{path}' is no ONNX file; {hint}") from error
    inputs = [i.name for i in graph.input]
    outputs = [o.name for o in graph.output]
    if inputs != ['images'] or outputs != ['logits']:
        raise SystemExit(
            f"'{path}' turns {', '.join(inputs) or 'nothing'} into "
            f"{', '.join(outputs) or 'nothing'}; expected a classifier that "
            f'turns images into logits: {hint}')
    if any(node.op_type.endswith('QuantizeLinear') for node in graph.node):
        raise SystemExit(f"'{path}' is quantised already; expected a model in "
                         f'fp32: {hint}')
    images, logits = (tensors[0].type.tensor_type.shape.dim[1].dim_value
                      for tensors in (graph.input, graph.output))
    return images, logits


def quantize(model: Path, out: str, data: Iterator[Tensor]) -> None:
    """Quantise a model.

    Args:
        model (Path): ONNX file whose input is ``images``.
        out (str): ONNX file to write.
        data (Iterator[Tensor]): Images to take the ranges from.
    """
    from onnxruntime.quantization import QuantType, quantize_static
    from onnxruntime.quantization.shape_inference import quant_pre_process
    feeds = ({'images': x.numpy()} for x in data)
    logging.disable(logging.WARNING)  # one for each constant
    try:
        with tempfile.TemporaryDirectory() as folder:
            folded = osp.join(folder, 'folded.onnx')
            quant_pre_process(model, folded, skip_symbolic_shape=True)
            quantize_static(
                folded, out,
                SimpleNamespace(get_next=lambda: next(feeds, None)),
                per_channel=True, activation_type=QuantType.QUInt8,
                weight_type=QuantType.QInt8)
    finally:
        logging.disable(logging.NOTSET)


def compare(
        paths: list[str],
        data: Iterator[tuple[Tensor, Tensor]]) -> list[tuple[float, float]]:
    """Test classifiers on the same images, in turns.

    Args:
        paths (list[str]): ONNX files.
        data (Iterator[tuple[Tensor, Tensor]]): Images and classes.

    Returns:
        list[tuple[float, float]]: For each file the top-1 accuracy in percent
        and the median of the milliseconds for an image.
    """
    runs = [export.load(path) for path in paths]
    correct, seconds = [0 for _ in runs], [[] for _ in runs]
    total = 0
    for images, labels in data:
        total += len(labels)
        for i, run in enumerate(runs):
            start = time.perf_counter()
            logits, = run(images)
            seconds[i].append((time.perf_counter() - start) / len(labels))
            correct[i] += (logits.argmax(1) == labels).sum().item()
    return [(100 * right / total, 1000 * statistics.median(times))
            for right, times in zip(correct, seconds)]


def main(argv: list[str] | None = None) -> None:
    """Quantise and test.

    Args:
        argv (list[str], optional): Arguments; those of the process if None.
    """
    args = parse_args(argv)
    export.check_packages()
    cfg = launch.read_config(args)
    if library(cfg) != 'mmpretrain' or not cfg.get(
            'test_dataloader') or not cfg.get('train_dataloader'):
        raise SystemExit('only a classifier with data for training and test '
                         f"can be quantised; '{args.config}' is the config of "
                         'none')
    channels, classes = check_onnx(args.model)
    expected = cfg.model.get('head', {}).get('num_classes')
    if classes != expected:
        raise SystemExit(
            f"'{args.model}' has {classes} classes, and the config "
            f"'{args.config}' has {expected}; give the config that the model "
            'was exported with')
    out = args.out or args.model.with_stem(f'{args.model.stem}_int8')
    if out.resolve() == args.model.resolve():
        raise SystemExit(f"--out '{out}' is the model itself, which would be "
                         'lost; name another file')
    if out.is_dir():
        raise SystemExit(f"--out '{out}' is a folder; name a file")
    launch.check_data(cfg, ('train', 'test'))
    launch.check_writable(str(out.parent), '--out')
    init_default_scope(cfg.get('default_scope') or 'mmengine')
    with one_message(), tempfile.TemporaryDirectory(
            dir=out.parent) as folder:
        written = osp.join(folder, 'int8.onnx')
        training = batches(cfg, 'train', CALIBRATION_IMAGES)
        images, _ = first = next(training)
        if images.shape[1] != channels:
            raise SystemExit(
                f"'{args.model}' takes images of {channels} channels, and the "
                f"data of '{args.config}' has {images.shape[1]}; give the "
                'config, and the --cfg-options, that it was exported with')
        training = itertools.chain([first], training)
        quantize(args.model, written, (images for images, _ in training))
        paths = [str(args.model), written]
        results = compare(paths, batches(cfg, 'test', args.images))
        print('file      MB  top-1 %  ms/image')
        for name, path, (accuracy, time_) in zip(('fp32', 'int8'), paths,
                                                 results):
            print(f'{name}  {osp.getsize(path) / 1e6:6.1f}  {accuracy:7.2f}'
                  f'  {time_:8.2f}')
        loss = results[0][0] - results[1][0]
        if loss > MAX_LOSS:
            raise SystemExit(f'{out} was not written: int8 loses {loss:.2f} '
                             f'points of top-1, and {MAX_LOSS} are allowed')
        os.replace(written, out)
    print(out)


if __name__ == '__main__':
    main()
