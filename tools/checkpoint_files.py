"""Checkpoint files that a command line or a config names.

Is there such a file, can it be read, and does it fit the model? Where it does
not, mmengine would go on from random weights.
"""
import os
import os.path as osp
from collections import OrderedDict

from torch import Tensor, nn

from mmconv2former.archs import describe_arch
from mmconv2former.checkpoint import (
    CheckpointError,
    infer_arch,
    model_weights,
    read_checkpoint,
)


def check_file(path: str, what: str) -> None:
    """Check that a checkpoint is there.

    Args:
        path (str): A file, or a URL, which is left to mmengine.
        what (str): What it is, for the message.

    Raises:
        SystemExit: If there is no such file.
    """
    if osp.isdir(path):
        raise SystemExit(f"{what} '{path}' is a folder; name a file in it")
    if '://' not in path and not osp.isfile(path):
        raise SystemExit(f"{what} '{path}' does not exist: give a path from "
                         f'{os.getcwd()}, a full one, or a URL')


def read_file(path: str, what: str) -> dict:
    """Read a checkpoint.

    Args:
        path (str): File or URL.
        what (str): What it is, for the message.

    Returns:
        dict: What it holds.

    Raises:
        SystemExit: If there is none, or it cannot be read.
    """
    check_file(path, what)
    try:
        checkpoint = read_checkpoint(path)
        model_weights(checkpoint)
    except CheckpointError as error:
        raise SystemExit(f'{what}: {error}' if path in str(error) else
                         f"{what} '{path}': {error}") from error
    return checkpoint


def load_weights(model: nn.Module, path: str) -> None:
    """Load a checkpoint, which must have all weights of a model.

    mmengine would go on with random ones in place of others, and without
    blocks, norms and necks that the model was trained with. Other parts of
    the file, such as an auxiliary head, do no harm.

    Args:
        model (nn.Module): The model.
        path (str): File or URL.

    Raises:
        SystemExit: If weights of the model are missing or of other shapes,
            or the file has more of them in its backbone or neck.
    """
    checkpoint = read_file(path, 'the checkpoint')
    weights = checkpoint.get('state_dict', checkpoint)
    state = OrderedDict((key.removeprefix('module.'), value)
                        for key, value in weights.items())
    if hasattr(weights, '_metadata'):  # versions of layers, to load old files
        state._metadata = weights._metadata
    try:
        found = _unwrapped(model).load_state_dict(state, strict=False)
        missing, more = (
            [key for key in keys if not key.endswith('num_batches_tracked')]
            for keys in (found.missing_keys, found.unexpected_keys))
        more = [key for key in more if key.startswith(('backbone.', 'neck.'))]
        reason = ''
        if missing:
            reason = (f'{len(missing)} tensors are missing, such as '
                      f'{missing[0]}')
        elif more:
            reason = (f'its backbone or neck has {len(more)} tensors more, '
                      f'such as {more[0]}')
    except RuntimeError as error:
        # A line of what it is about, and one for each tensor.
        what, *lines = str(error).splitlines()
        reason = f'{len(lines)} tensors, such as: {lines[0].strip()}' \
            if lines else what
    if reason:
        raise SystemExit(
            f"the checkpoint '{path}' does not fit the config: "
            f'{reason.rstrip(".")}. {_describe_weights(state)}Name the config '
            'that it was trained with; official classifiers are converted '
            'with tools/convert_checkpoint.py')


def check_weight_names(model: nn.Module, path: str) -> None:
    """Check that a checkpoint to start from has weights of a model.

    mmengine would train from random ones. Some may be missing, such as those
    of a head for other classes.

    Args:
        model (nn.Module): The model.
        path (str): File or URL.

    Raises:
        SystemExit: If it has none.
    """
    checkpoint = read_file(path, 'load_from')
    names = checkpoint.get('state_dict', checkpoint).keys()
    own = _unwrapped(model).state_dict().keys()
    if not any(name.removeprefix('module.') in own for name in names):
        raise SystemExit(
            f"load_from: '{path}' has no weights by the names of this model, "
            f'such as {next(iter(own))}, but {len(names)} others, such as '
            f'{min(names)}. Official classifiers are converted with '
            'tools/convert_checkpoint.py; a backbone alone is for init_cfg of '
            'the backbone: --cfg-options '
            'model.backbone.init_cfg._delete_=True '
            'model.backbone.init_cfg.type=Pretrained '
            f'model.backbone.init_cfg.checkpoint={path} load_from=None')


def _unwrapped(model: nn.Module) -> nn.Module:
    """The model inside of DDP and of test-time augmentation."""
    while hasattr(model, 'module'):
        model = model.module
    return model


def _describe_weights(weights: dict[str, Tensor]) -> str:
    """Which Conv2Former these are of, as a sentence, if that can be told."""
    arch = infer_arch({key.removeprefix('backbone.'): value
                       for key, value in weights.items()})
    return f'The file holds {describe_arch(arch)}. ' if arch['depths'] else ''
