"""Reading pre-trained weights, whoever wrote the file, and proving the fit."""
import argparse
import os
import pickle
import re
import struct
import tarfile
import zipfile
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from http.client import HTTPException
from pathlib import Path
from typing import Any

import torch
from mmengine.fileio import get_local_path
from mmengine.logging import HistoryBuffer, print_log
from mmengine.model import BaseModule, update_init_info
from torch import Tensor, nn

from .archs import STEMS, describe_arch
from .operators import at_least_fp32

OFFICIAL_PAGE = 'https://github.com/HVision-NKU/Conv2Former'
WEIGHTS_VARIABLE = 'MMCONV2FORMER_WEIGHTS'

# A tensor that every Conv2Former has; what precedes it is the prefix.
_ANCHOR = 'stages.0.0.attn.proj.weight'
_FUSED_ANCHOR = 'stages.0.0.zv.weight'  # after fuse_for_inference
_BACKBONE_KEY = re.compile(r'((downsample_layers|stages)\.\d+\.|norm\d+\.)')
_OUT_NORM_KEY = re.compile(r'norm\d+\.')
# Layers of the official classification head -> ours.
_HEAD_LAYERS = {
    'head.0': 'neck.conv',
    'head.2': 'neck.norm',
    'pred': 'head.fc',
}
# Of an init_cfg; tensors are read to the CPU whatever map_location says.
_PRETRAINED_KEYS = {'type', 'checkpoint', 'prefix', 'map_location'}
# What torch.compile and FSDP put into the names of the modules they wrap.
WRAPPER = re.compile(r'\b(_orig_mod|_fsdp_wrapped_module)\.')


class CheckpointError(ValueError):
    """A checkpoint that cannot be read, is not trusted, or does not fit."""


def _log_statistic(owner: Any, name: str) -> Any:
    """What mmengine's log buffers ask of ``getattr``.

    Anything else would lead to all of Python, and a file could run code.
    """
    if owner is not HistoryBuffer or name not in ('min', 'max', 'mean',
                                                  'current'):
        # In torch's words, which read_checkpoint looks for.
        raise pickle.UnpicklingError(
            f'GLOBAL builtins.getattr was not an allowed one for {name!r}')
    return getattr(owner, name)


def safe_globals() -> list[tuple[Any, str]]:
    """What beside tensors a training checkpoint may hold.

    The settings that timm writes, and the log buffers that mmengine writes.
    ``torch.load(weights_only=True)`` calls only what is listed, and none of it
    runs code of the file.

    Returns:
        list[tuple[object, str]]: Objects and the names that they are pickled
        under, for ``torch.serialization.safe_globals``.
    """
    # NumPy's types are taken from torch, which saves the package an import.
    arrays = [
        torch.zeros((), dtype=dtype).numpy()
        for dtype in (torch.float64, torch.float32, torch.float16, torch.int64,
                      torch.int32, torch.int16, torch.int8, torch.uint64,
                      torch.uint32, torch.uint16, torch.uint8, torch.bool)
    ]
    reconstruct, scalar, dtype = (
        value.__reduce__()[0]
        for value in (arrays[0], arrays[0][()], arrays[0].dtype))
    allowed = [(argparse.Namespace, 'argparse.Namespace'),
               (HistoryBuffer, f'{HistoryBuffer.__module__}.HistoryBuffer'),
               (_log_statistic, 'builtins.getattr'), (slice, 'builtins.slice'),
               (type(arrays[0]), 'numpy.ndarray'),
               (dtype, 'numpy.dtype')]
    # NumPy 2 moved these; a file names the place of the NumPy that wrote it.
    for core in ('numpy.core', 'numpy._core'):
        allowed += [(reconstruct, f'{core}.multiarray._reconstruct'),
                    (scalar, f'{core}.multiarray.scalar')]
    for kind in (type(array.dtype) for array in arrays):
        allowed.append((kind, f'numpy.dtypes.{kind.__name__}'))
    return allowed


def _where_from(checkpoint: str) -> str:
    """Where a file of that name can be had."""
    path = Path(checkpoint)
    if 'work_dirs' in path.parts[:-1]:
        return ('training leaves it, where no other folder is named that of '
                f'the config {path.parent.name}.py; run that first')
    name, in22k, _ = path.name.partition('_in22k.pth')
    if in22k:
        return ('weights trained on ImageNet-22K alone are not published; '
                f'they are what the config {name}_in22k.py leaves. The '
                f'nearest that are: {name.removesuffix("_k11")}_in22k_ft_'
                f'in1k.pth, by the links at {OFFICIAL_PAGE}')
    return (f'official weights are behind the links at {OFFICIAL_PAGE}; use a '
            'file as it is, or convert it with: python '
            'tools/convert_checkpoint.py SRC DST')


def _describe_path(path: Path) -> str:
    """A path that is no file, and what it is instead."""
    return f'{path} (a folder)' if path.is_dir() else str(path)


def find_checkpoint(
        checkpoint: str | os.PathLike,
        keys: Sequence[str] = ('model.backbone.init_cfg', )) -> str:
    """Find a checkpoint file.

    Args:
        checkpoint (str | PathLike): A path, or a name relative to the working
            directory or to the directory in ``MMCONV2FORMER_WEIGHTS``. A URL
            is returned as it is.
        keys (Sequence[str]): What of a config asks for it, for the message.
            Defaults to ``('model.backbone.init_cfg', )``.

    Returns:
        str: The path of an existing file, or the URL.

    Raises:
        FileNotFoundError: If there is none; the message says where the
            official weights are, and how to go on without.
        CheckpointError: If it is no path.
    """
    # mmengine puts no None in the place of one of several.
    wholes = dict.fromkeys(re.sub(r'\.\d+$', '', key) for key in keys)
    scratch = '--cfg-options ' + ' '.join(f'{key}=None' for key in wholes)
    if not isinstance(checkpoint, (str, os.PathLike)):
        raise CheckpointError(
            f'{" and ".join(f"{key}.checkpoint" for key in keys)} must be a '
            f'path or a URL, got {checkpoint!r}. To train from scratch: '
            f'{scratch}')
    checkpoint = os.fspath(checkpoint)
    if '://' in checkpoint:
        return checkpoint
    # Path.expanduser refuses users that are not there.
    tried = [Path(os.path.expanduser(checkpoint))]
    if os.environ.get(WEIGHTS_VARIABLE):
        tried.append(
            Path(os.path.expanduser(os.environ[WEIGHTS_VARIABLE]), checkpoint))
    for path in tried:
        if path.is_file():
            return str(path)
    raise FileNotFoundError(
        f"no checkpoint '{checkpoint}'; looked for "
        f'{", ".join(map(_describe_path, tried))}'
        f'{"" if len(tried) > 1 else f" ({WEIGHTS_VARIABLE} is not set)"}.\n'
        f'- To get it: {_where_from(checkpoint)}\n'
        f'- Put it into a directory and name that in {WEIGHTS_VARIABLE}, or '
        'give its path: --cfg-options '
        f'{" ".join(f"{key}.checkpoint=PATH" for key in keys)}\n'
        f'- Train from scratch: {scratch}')


def read_checkpoint(path: str, trust_pickle: bool = False) -> Any:
    """Read a checkpoint without running code that it may contain.

    Args:
        path (str): A file, or a URL that mmengine can read.
        trust_pickle (bool): Whether to unpickle any object in the file,
            which can run arbitrary code. Defaults to False.

    Returns:
        object: What the file holds, tensors on the CPU.

    Raises:
        OSError: If there is no such file.
        CheckpointError: If the file cannot be fetched, is damaged or of
            another kind, or holds an object that is neither a tensor nor
            plain data and is not trusted.
    """
    # On exit the context removes what it was given, also where that had been
    # allowed before: it gets only what is new.
    known = torch.serialization.get_safe_globals()
    new = [item for item in safe_globals() if item not in known]
    try:
        with _fetched(path) as local, torch.serialization.safe_globals(new):
            return torch.load(
                local, map_location='cpu', weights_only=not trust_pickle)
    except CheckpointError:
        raise
    except ImportError as error:  # of a pickle that is trusted
        raise CheckpointError(
            f'{path} holds objects of a module that is not installed here '
            f'({error}). Install it, or convert the file where it was made'
        ) from error
    except (pickle.UnpicklingError, struct.error, EOFError, RuntimeError,
            AttributeError, LookupError, ValueError, AssertionError,
            TypeError) as error:
        blocked = re.search(
            r'GLOBAL (\S+) (?:was not an allowed|whose module \S+ is blocked)|'
            r"via `add_safe_globals`, but got <class '(\S+)'>", str(error))
        if blocked:
            raise CheckpointError(
                f'{path} holds a pickled {blocked[1] or blocked[2]}, and '
                'unpickling can run code. If you trust who made the file, '
                'convert it once to tensors only: python '
                'tools/convert_checkpoint.py SRC DST --trust-pickle'
            ) from error
        if kind := _other_kind(path):
            raise CheckpointError(f'{path} is {kind}') from error
        raise CheckpointError(
            f'{path} is damaged or no checkpoint ('
            f'{": ".join([type(error).__name__, *_reason(error)])}); '
            'fetch or copy it again and compare the size') from error


@contextmanager
def _fetched(path: str) -> Iterator[str]:
    """A file on this machine, while in the context."""
    with ExitStack() as stack:
        try:
            local = stack.enter_context(get_local_path(path))
        # No connection, an unknown scheme, or a missing client library.
        except (OSError, HTTPException, LookupError, ImportError) as error:
            raise CheckpointError(
                f'cannot fetch {path} ({type(error).__name__}: {error}). Get '
                'the file by other means and give its path; URLs may be of '
                'http, https and the storages that mmengine knows'
            ) from error
        yield local


def _other_kind(path: str) -> str:
    """What a file is that torch does not read, and what to do; '' if unknown.
    """
    is_here = os.path.isfile(path)
    if path.endswith('.safetensors') or is_here and _is_safetensors(path):
        return ('in the format of safetensors. Convert it once: torch.save('
                'safetensors.torch.load_file(SRC), DST)')
    if not is_here:
        return ''
    # First, for zipfile finds files at the end of others.
    is_archive = tarfile.is_tarfile(path)
    if not is_archive and zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as file:  # torch's own are archives, too
            is_archive = not any(
                name.endswith('/data.pkl') for name in file.namelist())
    return ('an archive of other files. Unpack it, and name the checkpoint '
            'in it') if is_archive else ''


def _is_safetensors(path: str) -> bool:
    """Whether a file begins as those do: with the length of a JSON object."""
    with open(path, 'rb') as file:
        start = file.read(9)
    return start[8:] == b'{' and 8 + int.from_bytes(
        start[:8], 'little') <= os.path.getsize(path)


def _reason(error: Exception) -> list[str]:
    """The first line of a message, if any.

    Without the text in which torch wraps it, which asks to unpickle what was
    refused with good reason.
    """
    wrapped, _, text = str(error).rpartition('WeightsUnpickler error:')
    if not wrapped and text.startswith('Weights only load failed'):
        return []
    return text.strip().splitlines()[:1]


def model_weights(checkpoint: Any) -> tuple[dict[str, Tensor], str]:
    """The model's tensors in a checkpoint, the averaged ones where it can.

    Args:
        checkpoint (object): What :func:`read_checkpoint` returns: a timm
            training file (``state_dict_ema``, ``state_dict``), an mmengine
            checkpoint, a bare state dict, or a module in the place of one.

    Returns:
        tuple[dict[str, Tensor], str]: The tensors by name, and 'EMA weights'
        or 'weights'.

    Raises:
        CheckpointError: If there are no tensors.
    """
    weights, kind = checkpoint, 'weights'
    if isinstance(checkpoint, dict):
        if checkpoint.get('state_dict_ema'):  # timm
            weights, kind = checkpoint['state_dict_ema'], 'EMA weights'
        elif 'state_dict' in checkpoint:
            weights = checkpoint['state_dict']
            # mmengine's EMAHook swaps the two when it saves: the average is
            # in state_dict, the weights that are trained in ema_state_dict.
            if 'ema_state_dict' in checkpoint:
                kind = 'EMA weights'
        elif checkpoint.get('model_ema'):  # the authors of ConvNeXt, DeiT
            weights, kind = checkpoint['model_ema'], 'EMA weights'
        elif 'model' in checkpoint:
            weights = checkpoint['model']
    if isinstance(weights, nn.Module):  # from a pickle that is trusted
        weights = weights.state_dict()
    tensors = {
        WRAPPER.sub('', str(key)): value
        for key, value in (
            weights.items() if isinstance(weights, dict) else ())
        if isinstance(value, Tensor)
    }
    if not tensors:
        found = f'keys: {_some([*map(repr, weights)]) or "none"}' \
            if isinstance(weights, dict) else f'a {type(weights).__name__}'
        raise CheckpointError(
            f'no tensors in the checkpoint ({found}); expected a state dict, '
            'or one as state_dict_ema, state_dict, model_ema or model')
    for key, value in tensors.items():
        if value.is_meta or value.layout != torch.strided:
            raise CheckpointError(
                f'{key} in the checkpoint has no numbers in memory (device '
                f'{value.device}, {value.layout}); save it as an ordinary '
                'tensor')
    return tensors, kind


def find_prefix(weights: dict[str, Tensor],
                prefix: str | None = None) -> str:
    """What precedes the backbone's names: '', 'module.', 'backbone.', ...

    Args:
        weights (dict[str, Tensor]): Tensors of a whole model.
        prefix (str, optional): The one to take, where there are several.
            Defaults to None.

    Returns:
        str: The prefix.

    Raises:
        CheckpointError: If the tensors are not of one Conv2Former.
    """
    found = [
        key[:-len(_ANCHOR)] for key in weights
        if key == _ANCHOR or key.endswith('.' + _ANCHOR)
    ]
    if any(key.endswith(_FUSED_ANCHOR) for key in weights):
        raise CheckpointError(
            'the weights are of a Conv2Former after fuse_for_inference, which '
            'cannot be undone; take the checkpoint that was loaded before it')
    if not found:
        raise CheckpointError(
            f'not a Conv2Former: no tensor ...{_ANCHOR}; the file has '
            f'{_some(list(weights))}')
    if prefix is None and len(found) == 1:
        return found[0]
    for candidate in found:
        if prefix in (candidate, candidate.removesuffix('.')):
            return candidate
    raise CheckpointError(
        f'Conv2Former is in the file under {", ".join(map(repr, found))}; '
        "name one: init_cfg=dict(type='Pretrained', checkpoint=..., "
        f'prefix={found[0]!r})' +
        ('' if prefix is None else f' instead of prefix={prefix!r}') +
        ', or --prefix of tools/convert_checkpoint.py')


def infer_arch(weights: dict[str, Tensor]) -> dict:
    """Read the settings of the architecture off the shapes.

    Args:
        weights (dict[str, Tensor]): Tensors of the backbone, without prefix.

    Returns:
        dict: As :func:`mmconv2former.archs.resolve_arch`, with None for a
        stem of another kind.
    """
    depths: list[int] = []
    dims: list[int] = []
    kernel_size = 0
    for key, value in weights.items():
        found = re.fullmatch(r'stages\.(\d+)\.(\d+)\.attn\.(proj|att\.2)'
                             r'\.weight', key)
        if found is None or value.ndim != 4:
            continue
        stage, block = int(found[1]), int(found[2])
        if found[3] == 'att.2':
            kernel_size = value.shape[-1]
            continue
        while len(depths) <= stage:
            depths.append(0)
            dims.append(0)
        depths[stage] = max(depths[stage], block + 1)
        dims[stage] = value.shape[0]
    # The last by its number: files may list them in any order.
    stem_convs = {
        key: value
        for key, value in weights.items()
        if key.startswith('downsample_layers.0.') and value.ndim == 4
    }
    last_kernel = stem_convs[max(stem_convs)].shape[-1] if stem_convs else 0
    stem = next((name for name, settings in STEMS.items()
                 if settings['last_kernel'] == last_kernel), None)
    return dict(
        depths=tuple(depths),
        dims=tuple(dims),
        kernel_size=kernel_size,
        stem=stem)


def _some(names: list[str], count: int = 3) -> str:
    rest = len(names) - count
    return ', '.join(names[:count]) + (f' and {rest} more' if rest > 0 else '')


@contextmanager
def naming(path: str) -> Iterator[None]:
    """Have the errors about a file begin with its name."""
    try:
        yield
    except CheckpointError as error:
        message = str(error)
        raise CheckpointError(message if path in message else
                              f'{path}: {message}') from error


def load_backbone(backbone: nn.Module,
                  checkpoint: str | os.PathLike,
                  prefix: str | None = None) -> None:
    """Load a pre-trained backbone, wholly or not at all.

    Reads official timm training files (``state_dict`` or ``state_dict_ema``,
    with or without ``module.``), bare state dicts, and checkpoints of
    mmpretrain, mmdet, mmseg and this project (``backbone.``). The output
    norms of a dense task, which a classifier does not have, may be new;
    heads are ignored. One line is logged.

    Args:
        backbone (Conv2Former): The backbone, changed in place.
        checkpoint (str | PathLike): As for :func:`find_checkpoint`.
        prefix (str, optional): What precedes the backbone's names in the
            file. Defaults to None, which finds it.

    Raises:
        FileNotFoundError: If there is no such file.
        CheckpointError: If the file cannot be read, or a tensor of the
            backbone is missing, left over, of another shape or no numbers.
    """
    path = find_checkpoint(checkpoint)
    with naming(path):
        weights, kind = model_weights(read_checkpoint(path))
        prefix = find_prefix(weights, prefix)
    theirs, others = {}, []
    for key, value in weights.items():
        name = key.removeprefix(prefix)
        if key.startswith(prefix) and _BACKBONE_KEY.match(name):
            theirs[name] = value
        else:
            others.append(name.removeprefix(prefix.removesuffix('backbone.')))
    # Of the counts of batch norms, which files of old versions of torch do not
    # have, nothing depends.
    ours = {key: value for key, value in backbone.state_dict().items()
            if key in theirs or not key.endswith('num_batches_tracked')}
    if _FUSED_ANCHOR in ours:
        raise CheckpointError(
            f'{path} cannot be loaded after fuse_for_inference: load it into '
            'the model before that')
    problems = _misfits(theirs, ours, len(backbone.stages))
    if problems:
        file, model = (describe_arch(arch)
                       for arch in (infer_arch(theirs), backbone.arch))
        raise CheckpointError(
            f'{path} does not fit the backbone. Tensors '
            f'{"; ".join(problems)}. The file seems to be {file}, ' +
            ('and so is the model: compare in_channels, mlp_ratio and fusion'
             if file == model else f'the model is {model}. Name the arch of '
             'the file in the config, or another file'))
    _refuse_meta(ours, path)
    loaded = {key: value for key, value in theirs.items() if key in ours}
    check_finite(loaded, path)
    backbone.load_state_dict(loaded, strict=False)

    new = {key.split('.')[0] for key in ours if key not in theirs}
    ignored = {name.split('.')[0] for name in others}
    ignored |= {
        'output norms' if _OUT_NORM_KEY.match(key) else 'later stages'
        for key in theirs if key not in ours
    }
    wanted = sum(key.split('.')[0] not in new for key in ours)
    print_log(
        f'loaded {len(loaded)} of {wanted} backbone tensors from {path}, '
        f'{kind}' + (f', new: {", ".join(sorted(new))}' if new else '') +
        (f', ignored: {", ".join(sorted(ignored))}' if ignored else ''),
        logger='current')


def check_finite(weights: dict[str, Tensor], path: str) -> None:
    """Check that weights are numbers.

    Args:
        weights (dict[str, Tensor]): The weights by name.
        path (str): Where they are from, for the message.

    Raises:
        CheckpointError: If some are NaN or infinite.
    """
    # torch has no such function for float8.
    broken = [key for key, value in weights.items()
              if not at_least_fp32(value).isfinite().all()]
    if broken:
        raise CheckpointError(
            f'{path}: {len(broken)} tensors hold NaN or infinity, the first '
            f'of them {broken[0]}, as after a training that diverged. Take an '
            'earlier checkpoint of it')


def _refuse_meta(ours: dict[str, Tensor], path: str) -> None:
    for key, value in ours.items():
        if value.is_meta:
            raise CheckpointError(
                f'{path} cannot be loaded into {key} on the meta device: give '
                "the model memory first, with to_empty(device='cpu')")


def _misfits(theirs: dict[str, Tensor], ours: dict[str, Tensor],
             num_stages: int) -> list[str]:
    """Say which tensors of a file do not fit those of a backbone.

    Output norms may be on one side only, and the file may have more stages
    than the backbone, whose last ones are not built if nobody reads them.
    """
    missing = [
        key for key in ours
        if key not in theirs and not _OUT_NORM_KEY.match(key)
    ]
    left_over = [
        key for key in theirs if key not in ours
        and not _OUT_NORM_KEY.match(key)
        and int(key.split('.')[1]) < num_stages
    ]
    other_numbers = [
        f'{key} {theirs[key].dtype} instead of {value.dtype}'
        for key, value in ours.items() if key in theirs
        # Nothing depends on the counters of batch norms.
        and not key.endswith('num_batches_tracked')
        and theirs[key].is_floating_point() != value.is_floating_point()
    ]
    return [
        f'{len(names)} {what}: {_some(names)}'
        for names, what in ((missing, 'missing'),
                            (_reshaped(theirs, ours), 'of another shape'),
                            (other_numbers, 'of another kind of numbers'),
                            (left_over, 'that the model lacks')) if names
    ]


def _reshaped(theirs: dict[str, Tensor], ours: dict[str, Tensor]) -> list[str]:
    """Tensors of a file that have another shape than those of that name."""
    return [
        f'{key} {tuple(theirs[key].shape)} instead of {tuple(value.shape)}'
        for key, value in ours.items()
        if key in theirs and theirs[key].shape != value.shape
    ]


def rename_classifier(weights: dict[str, Tensor],
                      parts: Sequence[str] = ('neck', 'head'),
                      prefix: str | None = None) -> dict[str, Tensor]:
    """Give the tensors of an official classifier our names.

    Args:
        weights (dict[str, Tensor]): Tensors with official names (or ours),
            any prefix.
        parts (Sequence[str]): What of the official head to keep beside the
            backbone: 'neck', all but its linear layer, and 'head', that one.
            Defaults to both.
        prefix (str, optional): As for :func:`find_prefix`. Defaults to None.

    Returns:
        dict[str, Tensor]: Tensors under ``backbone.`` and the names of the
        parts, as ``ImageClassifier`` names them.

    Raises:
        CheckpointError: If the tensors are not of one Conv2Former, or a part
            is wanted and not there.
    """
    prefix = find_prefix(weights, prefix)
    outer = prefix.removesuffix('backbone.')
    wanted = [layer for layer in _HEAD_LAYERS.values()
              if layer.split('.')[0] in parts]
    renamed = {}
    for key, value in weights.items():
        name = key.removeprefix(prefix)
        if key.startswith(prefix) and _BACKBONE_KEY.match(name):
            renamed['backbone.' + name] = value
        elif key.startswith(outer):
            layer, _, leaf = key.removeprefix(outer).rpartition('.')
            layer = _HEAD_LAYERS.get(layer, layer)
            if layer in wanted:
                renamed[f'{layer}.{leaf}'] = value
    missing = [
        f'{layer}.{leaf}' for layer in wanted for leaf in ('weight', 'bias')
        if f'{layer}.{leaf}' not in renamed
    ]
    if missing:
        raise CheckpointError(
            'the file has no whole classification head, missing '
            f'{_some(missing)}; take the backbone alone (--backbone-only of '
            'tools/convert_checkpoint.py, no init_cfg in the neck)')
    return renamed


def load_neck(neck: nn.Module,
              checkpoint: str | os.PathLike,
              prefix: str | None = None) -> None:
    """Load the neck of a pre-trained classifier, wholly or not at all.

    For fine-tuning on other classes: of the official head, the layers before
    the linear one. Reads what :func:`load_backbone` reads; one line is logged.

    Args:
        neck (Conv2FormerNeck): The neck, changed in place.
        checkpoint (str | PathLike): As for :func:`find_checkpoint`.
        prefix (str, optional): As for :func:`load_backbone`. Defaults to
            None.

    Raises:
        FileNotFoundError: If there is no such file.
        CheckpointError: If the file cannot be read, has no such head, or one
            of another shape or of no numbers.
    """
    path = find_checkpoint(checkpoint, ('model.neck.init_cfg', ))
    with naming(path):
        weights, kind = model_weights(read_checkpoint(path))
        theirs = {
            key.removeprefix('neck.'): value
            for key, value in rename_classifier(
                weights, ('neck', ), prefix).items()
            if key.startswith('neck.')
        }
    ours = neck.state_dict()
    _refuse_meta(ours, path)
    if reshaped := _reshaped(theirs, ours):
        raise CheckpointError(
            f'{path} does not fit the neck. Tensors of another shape: '
            f'{_some(reshaped)}. Give the neck the in_channels and '
            'out_channels of the file, or leave its init_cfg out')
    check_finite(theirs, path)
    neck.load_state_dict(theirs)
    print_log(
        f'loaded {len(theirs)} of {len(ours)} neck tensors from {path}, '
        f'{kind}', logger='current')


def is_pretrained(init_cfg: dict) -> bool:
    """Whether that is mmengine's ``Pretrained``, by any of its names."""
    kind = init_cfg.get('type')
    name = str(getattr(kind, '__name__', kind)).rpartition('.')[2]
    return name in ('Pretrained', 'PretrainedInit')


class PretrainedModule(BaseModule):
    """A module that loads a ``Pretrained`` init_cfg last and strictly.

    mmengine's own ``Pretrained`` only warns about tensors that do not fit.
    """

    def load_pretrained(self, checkpoint: str | os.PathLike,
                        prefix: str | None = None) -> None:
        """Load weights of a pre-trained model, wholly or not at all.

        Args:
            checkpoint (str | PathLike): As for :func:`find_checkpoint`.
            prefix (str, optional): What precedes the names in the file.
                Defaults to None, which finds it.
        """
        raise NotImplementedError

    def init_weights(self) -> None:
        """Initialise; a ``Pretrained`` init_cfg is loaded last.

        Raises:
            FileNotFoundError: If the checkpoint is not found.
            CheckpointError: If it does not fit.
        """
        first_call = not self.is_init
        init_cfg = self.init_cfg
        cfgs = [init_cfg] if isinstance(init_cfg, dict) else init_cfg or []
        if not all(isinstance(cfg, dict) and 'type' in cfg for cfg in cfgs):
            raise CheckpointError(
                "init_cfg must be dict(type='Pretrained', checkpoint=PATH), "
                'another initialisation of mmengine or a list of them, got '
                f'{init_cfg!r}')
        pretrained = list(filter(is_pretrained, cfgs))
        self.init_cfg = [cfg for cfg in cfgs if cfg not in pretrained]
        self._loads_file = bool(pretrained)
        try:
            super().init_weights()
        finally:
            self.init_cfg = init_cfg
        if not first_call:
            return
        # To be called again once the file is there.
        self._is_init = False
        for cfg in pretrained:
            if 'checkpoint' not in cfg:
                raise CheckpointError(
                    "init_cfg=dict(type='Pretrained') needs a checkpoint, got "
                    f'{dict(cfg)}; name a file, or set init_cfg=None')
            unknown = sorted(set(cfg) - _PRETRAINED_KEYS)
            if unknown:
                raise CheckpointError(
                    f"unknown keys in init_cfg=dict(type='Pretrained'): "
                    f'{", ".join(unknown)}; it may contain '
                    f'{", ".join(sorted(_PRETRAINED_KEYS))}')
            self.load_pretrained(cfg['checkpoint'], cfg.get('prefix'))
            if hasattr(self, '_params_init_info'):  # as a part of a model
                update_init_info(self, 'PretrainedInit: load from '
                                 f'{cfg["checkpoint"]}')
        self._is_init = True

    def _dump_init_info(self) -> None:
        """Leave out mmengine's table where a file is still to be loaded.

        Of a module on its own it would be written before that, and say of
        each parameter that nothing has changed it.
        """
        if not self._loads_file:
            super()._dump_init_info()
