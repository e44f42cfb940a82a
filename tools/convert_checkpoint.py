"""Convert an official Conv2Former checkpoint to the names of OpenMMLab.

    python tools/convert_checkpoint.py SRC DST [options]

DST holds tensors only, under ``backbone.``, ``neck.`` and ``head.`` as
mmpretrain's ImageClassifier names them; it works as ``load_from`` of a
classifier and as the ``Pretrained`` checkpoint of a backbone in any task. The
SHA-256 of SRC is stored in it, that of DST in DST.sha256.
"""
import argparse
import hashlib
import os
import sys
import tempfile
from pathlib import Path

import torch

from mmconv2former import Conv2Former, Conv2FormerNeck
from mmconv2former.archs import STEMS, describe_arch
from mmconv2former.checkpoint import (
    CheckpointError,
    check_finite,
    infer_arch,
    load_backbone,
    load_neck,
    model_weights,
    naming,
    read_checkpoint,
    rename_classifier,
)


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """Parse the command line; that of the process if ``argv`` is None."""
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('src', type=Path, help='official checkpoint')
    parser.add_argument('dst', type=Path, help='file to write')
    parser.add_argument(
        '--backbone-only', action='store_true', help='leave the head out')
    parser.add_argument(
        '--prefix',
        help='what precedes the names of the backbone in SRC, where it has '
        'several, such as student.backbone.')
    parser.add_argument(
        '--trust-pickle',
        action='store_true',
        help='unpickle any object in SRC; this can run code that SRC holds')
    return parser.parse_args(argv)


def sha256(path: str | Path) -> str:
    """SHA-256 of a file, as hexadecimal digits."""
    digest = hashlib.sha256()
    with open(path, 'rb') as file:
        while block := file.read(2**20):
            digest.update(block)
    return digest.hexdigest()


def convert(src: Path, dst: Path, backbone_only: bool = False,
            trust_pickle: bool = False,
            prefix: str | None = None) -> dict[str, str | int]:
    """Convert a checkpoint and prove that the result loads.

    Args:
        src (Path): The official checkpoint.
        dst (Path): The file to write; untouched if anything fails.
        backbone_only (bool): Whether to leave the head out.
        trust_pickle (bool): Whether to unpickle objects of ``src``.
        prefix (str, optional): What precedes the names of the backbone in
            ``src``. Defaults to None, which finds it.

    Returns:
        dict: ``arch`` (str), ``tensors`` (int), ``kind`` (str) and the
        digests ``src_sha256`` and ``dst_sha256``.

    Raises:
        FileNotFoundError: If ``src`` or the directory of ``dst`` is missing.
        IsADirectoryError: If ``src``, ``dst`` or the file of the checksum,
            ``dst``.sha256, is a directory.
        FileExistsError: If ``dst`` is ``src``.
        CheckpointError: If ``src`` cannot be read or is not one Conv2Former.
    """
    for path, what in ((src, 'file to convert'),
                       (dst.parent, 'directory to write into')):
        if not path.exists():
            raise FileNotFoundError(f'the {what} does not exist: {path}')
    if src.is_dir():
        raise IsADirectoryError(f'{src} is a directory; name a file in it')
    if dst.exists() and dst.samefile(src):
        raise FileExistsError(f'{dst} is the file to convert, of which only '
                              'the weights would be left; name another one')
    if dst.is_dir():
        raise IsADirectoryError(f'{dst} is a directory; name the file to '
                                f'write, such as {dst / src.name}')
    checksum = dst.with_name(dst.name + '.sha256')
    if checksum.is_dir():
        raise IsADirectoryError(f'{checksum} is a directory, and is to be the '
                                'file of the checksum; name another file to '
                                'write')
    with naming(str(src)):
        weights, kind = model_weights(read_checkpoint(str(src), trust_pickle))
        state_dict = {
            key: value.detach().clone()
            for key, value in rename_classifier(
                weights, () if backbone_only else ('neck', 'head'),
                prefix).items()
        }
    inner = {
        key[len('backbone.'):]: value
        for key, value in state_dict.items() if key.startswith('backbone.')
    }
    arch = infer_arch(inner)
    if arch['stem'] is None:
        widths = sorted(row['last_kernel'] for row in STEMS.values())
        raise CheckpointError(
            f'{src}: the stem is of another kind than those of Conv2Former, '
            f'whose last convolution is {" or ".join(map(str, widths))} '
            'pixels wide')
    if 0 in arch['depths']:
        raise CheckpointError(
            f'{src}: stage {arch["depths"].index(0)} of the backbone has no '
            'blocks; expected a whole Conv2Former')
    check_finite(state_dict, str(src))
    meta = dict(
        arch={key: list(value) if isinstance(value, tuple) else value
              for key, value in arch.items()},
        source=src.name,
        source_sha256=sha256(src),
        source_weights=kind)
    with tempfile.TemporaryDirectory(dir=dst.parent) as folder:
        written, digests = Path(folder, dst.name), Path(folder, checksum.name)
        torch.save(dict(meta=meta, state_dict=state_dict), written)
        try:
            prove(str(written), arch, backbone_only)
        except CheckpointError as error:
            raise CheckpointError(
                str(error).replace(str(written), str(src))) from error
        digest = sha256(written)
        digests.write_text(f'{digest}  {dst.name}\n')
        os.replace(digests, checksum)
        os.replace(written, dst)
    return dict(
        arch=describe_arch(arch),
        tensors=len(state_dict),
        kind=kind,
        src_sha256=meta['source_sha256'],
        dst_sha256=digest)


def prove(path: str, arch: dict, backbone_only: bool) -> None:
    """Load a converted file strictly into the modules that it is for.

    Raises:
        CheckpointError: If it does not fit.
    """
    weights, _ = model_weights(read_checkpoint(path))
    # What else the shapes tell. Where a tensor is missing, the loading says
    # so.
    settings = {}
    stem = weights.get('backbone.downsample_layers.0.0.weight')
    if stem is not None:
        settings['in_channels'] = stem.shape[1]
    shapes = [value.shape for key, value in weights.items()
              if key.endswith('.mlp.fc1.weight')]
    if shapes:
        # Any ratio by which int(ratio * dim) is the width of each MLP.
        settings['mlp_ratio'] = (
            max(hidden / dim for hidden, dim, *_ in shapes)
            + min((hidden + 1) / dim for hidden, dim, *_ in shapes)) / 2
    load_backbone(Conv2Former(arch, **settings), path)
    if not backbone_only:
        width = len(weights['neck.norm.weight'])
        load_neck(Conv2FormerNeck(arch['dims'][-1], width), path)
        shape = weights['head.fc.weight'].shape
        if shape[1:] != (width, ) \
                or weights['head.fc.bias'].shape != shape[:1]:
            raise CheckpointError(
                f'{path}: the linear layer of the head has a weight of shape '
                f'{tuple(shape)} and a bias of shape '
                f'{tuple(weights["head.fc.bias"].shape)}; expected (classes, '
                f'{width}) and (classes,), for the layers before it have '
                f'{width} channels')


def main(argv: list[str] | None = None) -> None:
    """Convert, and print what has been converted.

    Args:
        argv (list[str], optional): Arguments; those of the process if None.
    """
    args = parse_args(argv)
    try:
        report = convert(args.src, args.dst, args.backbone_only,
                         args.trust_pickle, args.prefix)
    except (CheckpointError, OSError) as error:
        sys.exit(f'error: {error}')
    print(f'{report["arch"]}: {report["tensors"]} tensors '
          f'({report["kind"]}), strict load proved')
    print(f'{report["src_sha256"]}  {args.src}')
    print(f'{report["dst_sha256"]}  {args.dst}')


if __name__ == '__main__':
    main()
