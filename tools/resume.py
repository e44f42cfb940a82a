"""Going on from a checkpoint: from which, whether it can be, and with what.

mmengine takes the settings of the optimizer and of the schedules from the
checkpoint, whatever the config says; :class:`ResumedSettings` tells which, and
changes what would not do here.
"""
import math
import os
import zipfile
from collections.abc import Iterator, Set
from pathlib import Path
from typing import Any

from mmengine.config import Config
from mmengine.dist import all_gather_object
from mmengine.hooks import Hook
from mmengine.runner import (
    EpochBasedTrainLoop,
    Runner,
    find_latest_checkpoint,
)
from torch.optim import Optimizer

import checkpoint_files
from config_queries import has_hook, type_name
from fsdp import ShardedStrategy

# What the groups of an optimizer have besides its settings.
_NOT_SETTINGS = {'params', 'param_names', 'names', 'layer', 'lr_scale', 'lr',
                 'initial_lr', 'initial_momentum', 'initial_weight_decay'}
# What a schedule keeps of where it stands.
_PROGRESS = {'last_step', 'base_values', 'verbose'}


def latest_checkpoint(work_dir: str) -> str | None:
    """The checkpoint that training goes on from.

    Args:
        work_dir (str): Folder of the run, which may have been moved.

    Returns:
        str | None: Path of the file, or None if there is none.

    Raises:
        SystemExit: If there are checkpoints, and mmengine's note of the last
            one is missing, or if it does not name one of them.
    """
    path = find_latest_checkpoint(work_dir)
    if path:
        # First that of this folder, which may be the copy of another one.
        beside = os.path.join(work_dir, os.path.basename(path))
        for file in beside, path:
            if os.path.isfile(file):
                return file
    found = [file.name for file in Path(work_dir).glob('*.pth')]
    if path is None:
        if not any(name.startswith(('epoch_', 'iter_')) for name in found):
            return None
        reason = (f"there is no file last_checkpoint in '{work_dir}', but "
                  'there are checkpoints')
    else:
        reason = (f"the file last_checkpoint in '{work_dir}' names the "
                  f"checkpoint '{path}', which does not exist")
    whole = _checkpoints(Path(work_dir))
    raise SystemExit(f'{reason}: ' + (
        f'give one with --resume PATH, of {", ".join(whole)} there' if whole
        else 'none that is whole is left there, so start without --resume'))


def _checkpoints(folder: Path, but: Set[str] = frozenset()) -> list[str]:
    """Names of the checkpoints that were written to their end."""
    return sorted({file.name for file in folder.glob('*.pth')
                   if zipfile.is_zipfile(file)} - but)


def check_resumable(path: str, cfg: Config) -> None:
    """Check that training can go on from a checkpoint.

    Args:
        path (str): File or URL.
        cfg (Config): The config, with what --fsdp adds.

    Raises:
        SystemExit: If it has weights alone, cannot be read, or was made with
            --fsdp and is resumed without it, or the other way round.
    """
    try:
        checkpoint = checkpoint_files.read_file(path,
                                                'the checkpoint to resume')
    except SystemExit as error:
        others = _checkpoints(Path(path).parent, {Path(path).name})
        raise SystemExit(
            f'{error}. Others are beside it, for --resume PATH: '
            f'{", ".join(others)}' if others else error.code) from error
    missing = {'meta', 'optimizer', 'state_dict'} - {*checkpoint}
    if missing:
        raise SystemExit(
            f"the checkpoint to resume, '{path}', has no "
            f'{" and no ".join(sorted(missing))}, as a training saves them; '
            f'to start from its weights: --cfg-options load_from={path}')
    # torch numbers the parameters; sharded ones go by their names.
    saved = any(
        isinstance(p, str)
        for group in checkpoint['optimizer'].get('param_groups', ())
        for p in group['params'])
    strategy = cfg.get('strategy') or {}
    sharded = type_name(strategy) == ShardedStrategy.__name__
    if saved != sharded:
        made, here = ('with', 'without') if saved else ('without', 'with')
        raise SystemExit(
            f"the checkpoint to resume, '{path}', was made {made} --fsdp, and "
            f'this run is {here} it. Resume {made} --fsdp, or start from its '
            f'weights: --cfg-options load_from={path}')


def check_processes(cfg: Config) -> None:
    """Check that all processes go on from the same checkpoint.

    Args:
        cfg (Config): The config.

    Raises:
        SystemExit: If they do not.
    """
    own = os.path.basename(cfg.load_from) if cfg.get('resume') else 'none'
    found = all_gather_object(own)
    if len({*found}) > 1:
        raise SystemExit(
            '--resume: the processes found different checkpoints '
            f'({", ".join(dict.fromkeys(found))}), this one {own} in '
            f"'{cfg.work_dir}'. Machines must share the work dir, or each "
            'have a copy of it')


class ResumedSettings(Hook):
    """Tell where the checkpoint that is resumed overrules the config, and take
    out of it what this run must count or scale by itself."""

    def after_load_checkpoint(self, runner: Runner, checkpoint: dict) -> None:
        """Compare and change, before mmengine takes over what is there.

        Args:
            runner (Runner): The runner, with optimizer and schedules of the
                config.
            checkpoint (dict): The checkpoint.

        Raises:
            SystemExit: If it was trained with another optimizer, or with
                other groups of its parameters.
        """
        anew = ('without --resume, from its weights: --cfg-options '
                f'load_from={runner.cfg.get("load_from") or "PATH"}')
        # Of several optimizers they are by name.
        saved = checkpoint.get('optimizer', {}).get('param_groups')
        kept = []
        if saved and isinstance(runner.optim_wrapper.param_groups, list):
            optimizer = runner.optim_wrapper.optimizer
            _check_optimizer(optimizer, saved, anew)
            # Those of the wrapper may be one more, of settings alone.
            _check_groups(optimizer.param_groups, saved, anew)
            kept += _optimizer_settings(
                runner.optim_wrapper.param_groups, saved)
        kept += _schedule_settings(runner, checkpoint)
        if kept:
            runner.logger.warning(
                'The checkpoint overrules the config: ' + '; '.join(kept) +
                f'. To train with what the config says, start {anew}')
        if 'ema_state_dict' in checkpoint and not has_hook(
                runner.cfg, 'EMAHook'):
            runner.logger.warning(
                'The checkpoint is of a run with EMAHook, and this one has '
                'none: it goes on from the averaged weights, with the state '
                'of the optimizer that belongs to the others')
        _drop_scale_of_bf16(checkpoint.get('optimizer', {}))
        _recount_iterations(runner, checkpoint['meta'])
        for unit in 'epoch', 'iter':
            last = runner.cfg.train_cfg.get(f'max_{unit}s')
            done = checkpoint['meta'].get(unit)
            if last is not None and done is not None and done >= last:
                runner.logger.warning(
                    f'Nothing is left to train: train_cfg.max_{unit}s is '
                    f'{last}, and the checkpoint has seen {done}. Validation '
                    'that was cut short is not made up for; tools/test.py '
                    'evaluates the checkpoint')


def _drop_scale_of_bf16(optimizer: dict) -> None:
    """Have fp16 begin with its own loss scale after a run in bf16, which
    scales by 1, and on CPUs saves no scale."""
    scaler = optimizer.get('loss_scaler')
    if scaler is not None and scaler.get('scale', 1.) == 1.:
        del optimizer['loss_scaler']


def _recount_iterations(runner: Runner, meta: dict) -> None:
    """Count iterations as if all epochs had been as long as they are now.

    An epoch is begun anew, by another number of processes or images at a time
    it may be shorter, and mmengine's accumulation of gradients ends in an
    assertion when more iterations were counted than there are in all.
    """
    loop = getattr(runner, 'train_loop', None)
    if isinstance(loop, EpochBasedTrainLoop):
        length, before = len(loop.dataloader), meta['iter']
        meta['iter'] = meta['epoch'] * length
        if meta['iter'] != before:
            runner.logger.warning(
                f'An epoch has {length} iterations: the checkpoint is taken '
                f'for one after {meta["iter"]} in place of {before}')


def _check_optimizer(optimizer: Optimizer, saved: list[dict],
                     anew: str) -> None:
    """Refuse the groups of another optimizer, whose state would be missed."""
    names = {*saved[0]} - _NOT_SETTINGS
    known = {*optimizer.defaults} - _NOT_SETTINGS
    # Versions of torch add settings, so that one of the two may have more.
    if names - known and known - names:
        raise SystemExit(
            'the checkpoint was trained with another optimizer than '
            f'{type(optimizer).__name__}: it has '
            f'{", ".join(sorted(names - known))} and no '
            f'{", ".join(sorted(known - names))}. Resume with the optimizer '
            f'that it was trained with, or start {anew}')


def _check_groups(own: list[dict], saved: list[dict], anew: str) -> None:
    """Refuse other groups than those of this config.

    torch would end in a traceback. Layer decay, whose groups have names,
    compares more and says more when the state is loaded.
    """
    if any('names' in group for group in own):
        return
    theirs, ours = ([len(group['params']) for group in groups]
                    for groups in (saved, own))
    if theirs != ours:
        raise SystemExit(
            'the parameters of the optimizer are grouped otherwise in the '
            f'checkpoint: {sum(theirs)} tensors, number of groups '
            f'{len(theirs)}; in this config {sum(ours)}, number of groups '
            f'{len(ours)}. Resume with the model and with the constructor '
            'and paramwise_cfg of optim_wrapper that it was trained with, or '
            f'start {anew}')


def _setting(group: dict, key: str) -> Any:
    """A setting of a group, before a schedule has changed it."""
    if key == 'betas' and 'initial_momentum' in group:
        return (group['initial_momentum'], *group[key][1:])
    return group.get(f'initial_{key}', group[key])


def _optimizer_settings(own: list[dict], saved: list[dict]) -> list[str]:
    """Settings of the optimizer that are others in the checkpoint, in the
    first group where there are any."""
    for theirs, ours in zip(saved, own):
        rate, own_rate = (
            group.get('initial_lr', group['lr']) / (
                group.get('lr_scale') or 1.)  # 0 of what does not learn
            for group in (theirs, ours))
        different = [
            (key, _setting(theirs, key), _setting(ours, key))
            for key in sorted({*theirs} & {*ours} - _NOT_SETTINGS)
            if _setting(theirs, key) != _setting(ours, key)
        ]
        if not math.isclose(rate, own_rate, rel_tol=1e-6):
            different.insert(0, ('lr', rate, own_rate))
        if different:
            return [f'{key} of the optimizer {value} (config: {instead})'
                    for key, value, instead in different]
    return []


def _schedule_settings(runner: Runner, checkpoint: dict) -> Iterator[str]:
    """Settings of the schedules that are others in the checkpoint."""
    saved, own = checkpoint.get('param_schedulers'), runner.param_schedulers
    if not isinstance(saved, list) or not isinstance(own, list):
        return
    for i, (theirs, schedule) in enumerate(zip(saved, own)):
        ours = schedule.state_dict()
        for key in sorted({*theirs} & {*ours} - _PROGRESS):
            if not key.startswith('_') and theirs[key] != ours[key]:
                yield (f'{key} of param_scheduler.{i} {theirs[key]} '
                       f'(config: {ours[key]})')
