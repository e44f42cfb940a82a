"""From a command line and a config to a runner.

All tools that take a config read it here; train.py and test.py start their
runner, too. The checks come before anything is built, so that wrong input ends
in one message and not in a traceback after minutes of loading. What only the
built data sets show is left to data_checks.py.
"""
import argparse
import ast
import atexit
import ctypes
import difflib
import inspect
import logging
import os
import os.path as osp
import platform
import tempfile
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from mmengine.config import Config, DictAction
from mmengine.config.utils import ConfigParsingError
from mmengine.device import get_device
from mmengine.logging import print_log
from mmengine.registry import RUNNERS
from mmengine.runner import Runner

import data_checks
from config_queries import (
    config_parts,
    data_paths,
    data_sets,
    evaluators,
    ignored_labels,
    library,
    model_sizes,
    type_name,
)
from mmconv2former.checkpoint import safe_globals

# What a config may hold beside the arguments of mmengine's runner.
_SETTINGS = ('auto_scale_lr', 'compile', 'find_unused_parameters', 'launcher',
             'model_wrapper_cfg', 'runner_type', 'strategy', 'tta_model',
             'tta_pipeline')
CONFIGS = Path(__file__).resolve().parents[1] / 'configs'

# mmengine 0.10.7 reads its own checkpoints with torch.load, which refuses
# their log buffers since torch 2.6.
torch.serialization.add_safe_globals(safe_globals())


class _SettingsAction(DictAction):
    """mmengine's reading of KEY=VALUE, which ends in a traceback without '=',
    with half a list or with dicts, and takes the spaces out of paths."""

    @staticmethod
    def _parse_iterable(val: str) -> Any:
        text = val.strip('\'"')
        if text.startswith(('[', '(')):
            # mmengine's would take the spaces out of names, and numbers out
            # of quotes.
            with suppress(ValueError, SyntaxError):
                value = ast.literal_eval(text)
                if isinstance(value, (list, tuple)):  # '(1)' is one, there
                    return value
        if text.startswith(('{', 'dict(')) or text.startswith(
                ('[', '(')) and ('{' in text or 'dict(' in text):
            try:
                return Config.fromstring(f'value = {text}', '.py').value
            except (SyntaxError, NameError, TypeError, ValueError,
                    ArithmeticError) as error:
                raise ValueError(
                    f'{text} is not as Python writes dicts: {error}'
                ) from error
        if ' ' in text and ',' not in text and text[0] not in '([':
            return text
        return DictAction._parse_iterable(val)

    def __call__(self, parser: argparse.ArgumentParser, namespace: Any,
                 values: list[str], option_string: str | None = None) -> None:
        for value in values:
            if '=' not in value:
                parser.error(f"{option_string}: expected KEY=VALUE, got "
                             f"'{value}'")
        try:
            super().__call__(parser, namespace, values, option_string)
        except (AssertionError, ValueError) as error:
            parser.error(f'{option_string}: {error}')


def add_config(parser: argparse.ArgumentParser) -> None:
    """Add what names a config and changes it.

    Args:
        parser (ArgumentParser): The parser to add to.
    """
    parser.add_argument('config', help='config file')
    parser.add_argument(
        '--cfg-options',
        nargs='+',
        action=_SettingsAction,
        metavar='KEY=VALUE',
        help='settings that replace those of the config, such as '
        'train_dataloader.batch_size=4 or \'model.neck.in_channels="[8,16]"\'')


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add the options that train.py and test.py have besides.

    Args:
        parser (ArgumentParser): The parser to add to.
    """
    parser.add_argument(
        '--work-dir',
        help='folder for logs and checkpoints; defaults to the work_dir of '
        'the config, then to work_dirs/<name of the config>')
    parser.add_argument(
        '--launcher',
        choices=['none', 'pytorch', 'slurm', 'mpi'],
        default='none',
        help='what started the processes; dist_train.sh and dist_test.sh '
        'give pytorch')
    # torch.distributed.launch passes the one or the other spelling.
    parser.add_argument('--local-rank', '--local_rank', type=int, default=0)


def read_config(args: argparse.Namespace) -> Config:
    """Read the config and merge the options.

    Args:
        args (Namespace): With what :func:`add_config` adds and, of a run,
            :func:`add_options`.

    Returns:
        Config: The config; its work_dir is set.

    Raises:
        SystemExit: If there is no such file or it cannot be read, or
            --cfg-options has a key that looks like a slip or does not fit the
            config.
    """
    if not osp.isfile(args.config):
        raise SystemExit(_no_config(args.config))
    try:
        cfg = Config.fromfile(args.config)
    except (AssertionError, ConfigParsingError, ImportError, OSError,
            SyntaxError, TypeError, ValueError) as error:
        # A base that is missing, most often, or a dict in place of what is
        # none in the base.
        raise SystemExit(f"config '{args.config}' cannot be read: "
                         f'{type(error).__name__}: {error}') from error
    if args.cfg_options is not None:
        _check_keys(args.cfg_options, cfg)
        try:
            cfg.merge_from_dict(args.cfg_options)
        except (AttributeError, KeyError, TypeError) as error:
            # A list has no such index, or what is there has no keys.
            raise SystemExit(
                f'--cfg-options {" ".join(args.cfg_options)}: '
                f'{error.args[0]}') from error
    for _, part in config_parts(cfg.get('model')):
        # Which mmengine leaves where there is nothing to delete.
        part.pop('_delete_', None)
    if 'launcher' in args:
        cfg.launcher = args.launcher
        os.environ.setdefault('LOCAL_RANK', str(args.local_rank))
    if getattr(args, 'work_dir', None) is not None:
        cfg.work_dir = args.work_dir
    elif cfg.get('work_dir') is None:
        cfg.work_dir = osp.join('work_dirs', Path(args.config).stem)
    return cfg


def _check_keys(options: dict, cfg: Config) -> None:
    """Tell keys that nobody reads: those that are nearly those of the config,
    and variables of its file, which have been put into the rest of it."""
    read = {*inspect.signature(Runner.__init__).parameters, *_SETTINGS}
    known = {*cfg, *read}
    for key in options:
        name = key.partition('.')[0]
        if name in cfg and name not in read:
            print_log(
                f"--cfg-options {key}: '{name}' is a variable of the config "
                'file, which has been read by now. Name the settings that it '
                'went into, or change the file', logger='current',
                level=logging.WARNING)
        near = difflib.get_close_matches(name, known, n=1, cutoff=0.8)
        if name not in known and near:
            raise SystemExit(f"--cfg-options {key}: the config has no '{name}'"
                             f". Did you mean '{near[0]}'?")


def _no_config(path: str) -> str:
    """The message for a config that does not exist, with near names."""
    if osp.isdir(path):
        return f"config '{path}' is a folder; name a file in it"
    known = {}
    for folder in (Path(path).parent, *CONFIGS.glob('*')):
        for found in sorted(folder.glob('*.py')):
            known.setdefault(found.stem, osp.relpath(found))
    near = difflib.get_close_matches(Path(path).stem, known, cutoff=0.7)
    if near:
        hint = 'Did you mean ' + ' or '.join(known[name]
                                             for name in near) + '?'
    else:
        hint = f'The configs of this project are in {osp.relpath(CONFIGS)}.'
    return f"config '{path}' does not exist. {hint}"


def check_writable(folder: str, by: str) -> None:
    """Make a folder and try to write in it.

    Args:
        folder (str): The folder; made if it does not exist.
        by (str): What chooses it, an option, for the message.

    Raises:
        SystemExit: If it cannot be made or written in.
    """
    try:
        os.makedirs(folder, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise SystemExit(
            f"cannot write in '{folder}': {error.strerror}. Choose a folder "
            f'that you may write in with {by}') from error


def check_folders(cfg: Config) -> None:
    """Check that what a run writes can be written.

    Args:
        cfg (Config): The config, with work dir and launcher.

    Raises:
        SystemExit: If it cannot.
    """
    check_writable(cfg.work_dir, '--work-dir')
    if cfg.get('launcher', 'none') != 'none':
        check_writable('.', 'cd, for processes collect their results in the '
                       'current one')


def check_model(cfg: Config, path: str, *parts: str) -> None:
    """Check that a config has a model, and what else is needed.

    Args:
        cfg (Config): The config.
        path (str): Where it comes from.
        parts (str): Other settings that are needed.

    Raises:
        SystemExit: If it has none.
    """
    for part in ('model', *parts):
        if cfg.get(part) is None:  # which may be empty
            raise SystemExit(f"config '{path}' has no {part}")


def check_data(cfg: Config, parts: tuple[str, ...]) -> None:
    """Check that the data which a run will read is there.

    Args:
        cfg (Config): The config.
        parts (tuple[str]): Among 'train', 'val' and 'test'.

    Raises:
        SystemExit: If a path is missing; the message shows every path that
            is expected, each marked as found or missing.
    """
    # The others take '~' for the name of a folder.
    expand = osp.expanduser if library(cfg) == 'mmpretrain' else str
    layout, missing = [], False
    for part in parts:
        loader = cfg.get(f'{part}_dataloader')
        if not loader or 'dataset' not in loader:
            continue
        wanted = [
            (f'{where} ({type_name(data_set)})', data_paths(data_set))
            for where, data_set in data_sets(
                loader.dataset, f'{part}_dataloader.dataset')
            if not data_set.get('backend_args')
        ]
        wanted += [
            (f'{part}_evaluator ({type_name(metric)})', {
                'ann_file': metric.ann_file
            })
            for metric in evaluators(cfg, part)
            if metric.get('ann_file') and not metric.get('backend_args')
        ]
        for name, paths in wanted:
            layout.append(name)
            for key, path in paths.items():
                found = osp.exists(expand(path))
                missing = missing or not found
                layout.append(
                    f'  [{"found" if found else "MISSING"}] {path}  ({key})')
    if missing:
        raise SystemExit(
            'the data is not where the config expects it. Expected:\n' +
            '\n'.join(layout) +
            f'\nRelative paths start at {os.getcwd()}. Put the data there or '
            'link it, or give the paths with --cfg-options, such as '
            f'{parts[0]}_dataloader.dataset.data_root=FOLDER')


def without_sync_bn(model: Any) -> Any:
    """Turn SyncBN into BN, since torch has the former on GPUs only.

    Args:
        model (object): Config of a model, or a part of one.

    Returns:
        object: A copy with plain batch norm.
    """
    if isinstance(model, dict):
        copy = {key: without_sync_bn(part) for key, part in model.items()}
        return {**copy, 'type': 'BN'} if type_name(copy) in (
            'SyncBN', 'SyncBatchNorm') else copy
    if isinstance(model, (list, tuple)):
        return type(model)(without_sync_bn(part) for part in model)
    return model


def keep_freed_memory() -> None:
    """Have the C library keep memory that is freed for the next tensors.

    glibc would give it back to the system and get it again page by page, which
    takes a third of the time of a training step with an image of 800x1344. For
    this process, and those that it forks; where the environment sets
    thresholds of its own, nothing is changed.
    """
    if platform.libc_ver()[0] != 'glibc' or any(
            name.startswith(('MALLOC_', 'GLIBC_TUNABLES'))
            for name in os.environ):
        return
    mallopt = ctypes.CDLL(None).mallopt
    # M_TRIM_THRESHOLD and M_MMAP_THRESHOLD of malloc.h. Some versions of glibc
    # refuse more than 32 MB for the latter.
    mallopt(-1, 2**31 - 1)
    mallopt(-3, 2**30) or mallopt(-3, 2**25)


def build_runner(cfg: Config) -> Runner:
    """Build the runner; without a GPU, processes talk through gloo.

    Args:
        cfg (Config): The config; ``launcher`` says whether it is one of
            several processes.

    Returns:
        Runner: The runner, which checks each data loader that it builds, and
        the metrics of val and test with their data.

    Raises:
        SystemExit: If the launcher needs a GPU, and there is none.
    """
    if cfg.launcher in ('slurm', 'mpi') and get_device() == 'cpu':
        raise SystemExit(f'--launcher {cfg.launcher} needs GPUs, and torch '
                         'sees none; on a CPU dist_train.sh and dist_test.sh '
                         'start several processes')
    if get_device() == 'cpu':
        keep_freed_memory()
    if cfg.launcher == 'pytorch' and get_device() == 'cpu':
        # mmengine would call torch.cuda.set_device and give DDP a device id.
        if not torch.distributed.is_initialized():
            torch.distributed.init_process_group('gloo')
            # A thread of gloo that has yet to free a tensor of the last
            # exchange aborts the process if Python ends before it.
            atexit.register(time.sleep, 0.5)
        cfg.model = without_sync_bn(cfg.model)
        cfg.model_wrapper_cfg = {
            'type': 'MMDistributedDataParallel',
            'broadcast_buffers': False,
            'find_unused_parameters': cfg.get('find_unused_parameters', False),
            **cfg.get('model_wrapper_cfg', {}), 'device_ids': None
        }
    sizes = model_sizes(cfg)
    ignored = ignored_labels(cfg.model)
    if 'runner_type' in cfg:
        runner = RUNNERS.build(cfg)
    else:
        runner = Runner.from_cfg(cfg)
    build_dataloader, built = runner.build_dataloader, []

    def build_and_check(*args: Any, **kwargs: Any) -> Any:
        loader = data_checks.build_loader(build_dataloader, *args, **kwargs)
        # A classifier may have more classes than the data.
        data_checks.check_loader(
            loader, sizes, library(cfg) != 'mmpretrain', ignored)
        built.append(loader)
        data_checks.check_agreement(built[0], loader)
        return loader

    def checked(part: str, build_loop: Callable) -> Callable:

        def build_and_compare(loop: Any) -> Any:
            loop = build_loop(loop)
            for metric in evaluators(cfg, part):
                data_checks.check_metric(metric, loop.dataloader, sizes,
                                         ignored, f'{part}_evaluator')
            return loop

        return build_and_compare

    # The loops ask the runner for their data.
    runner.build_dataloader = build_and_check
    runner.build_val_loop = checked('val', runner.build_val_loop)
    runner.build_test_loop = checked('test', runner.build_test_loop)
    return runner
