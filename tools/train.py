"""Train any config of the three tasks: python tools/train.py CONFIG."""
import argparse
import logging
import os

from mmengine.config import Config, ConfigDict
from mmengine.device import get_device
from torch import nn

import checkpoint_files
import launch
import resume
from amp import BoxesInFloat32, CPUAmpOptimWrapper
from config_queries import config_parts, has_hook, type_name
from data_error import one_message
from fsdp import ShardedStrategy
from mmconv2former.checkpoint import (
    CheckpointError,
    find_checkpoint,
    is_pretrained,
)

# mmengine's wrapper, and that of CPUs in its place.
_AMP = 'AmpOptimWrapper', CPUAmpOptimWrapper.__name__
# What --amp may be given, and the name that torch has for it.
DTYPES = {'fp16': 'float16', 'bf16': 'bfloat16'}
# Where a launcher says how many processes there are.
WORLD_SIZE = {
    'pytorch': 'WORLD_SIZE',
    'slurm': 'SLURM_NTASKS',
    'mpi': 'OMPI_COMM_WORLD_SIZE',
}


def dtype(name: str) -> str:
    """Read the value of --amp.

    Args:
        name (str): 'fp16' or 'bf16'.

    Returns:
        str: torch's name.

    Raises:
        ArgumentTypeError: If it is another; most often the config.
    """
    if name not in DTYPES:
        raise argparse.ArgumentTypeError(
            f"expected fp16, bf16 or nothing, got '{name}'; if that is the "
            'config, put --amp after it')
    return DTYPES[name]


def _resumed(path: str) -> str:
    """Read the value of --resume, which is not the config."""
    if path.endswith('.py'):
        raise argparse.ArgumentTypeError(
            f"expected a checkpoint or nothing, got '{path}'; if that is the "
            'config, put --resume after it')
    return path


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """Parse the command line.

    Args:
        argv (list[str], optional): Arguments; those of the process if None.

    Returns:
        Namespace: The options.
    """
    parser = argparse.ArgumentParser(description='Train a model.')
    launch.add_config(parser)
    parser.add_argument(
        '--resume',
        nargs='?',
        const='auto',
        type=_resumed,
        metavar='PATH',
        help='go on from a checkpoint; without a path, or with auto, from '
        'the latest one in the work dir if there is one')
    parser.add_argument(
        '--amp',
        nargs='?',
        const=True,
        type=dtype,
        metavar='fp16|bf16',
        help='train in mixed precision: fp16 with dynamic loss scaling, '
        'unless the config sets another dtype, or bf16')
    parser.add_argument(
        '--auto-scale-lr',
        action='store_true',
        help='scale the learning rate linearly from '
        'auto_scale_lr.base_batch_size of the config to the images of an '
        'update: processes x batch size x accumulated steps')
    parser.add_argument(
        '--fsdp',
        action='store_true',
        help='shard gradients and optimizer state over the processes, for '
        'models that outgrow one GPU (docs/training.md)')
    launch.add_options(parser)
    return parser.parse_args(argv)


def merge_args(cfg: Config, args: argparse.Namespace) -> Config:
    """Merge the options of training into the config.

    Args:
        cfg (Config): The config, changed in place.
        args (Namespace): What :func:`parse_args` returns.

    Returns:
        Config: The config.

    Raises:
        SystemExit: If an option cannot be followed.
    """
    launch.check_model(cfg, args.config, 'train_dataloader', 'train_cfg',
                       'optim_wrapper')
    settings = cfg.optim_wrapper
    if args.amp or type_name(settings) in _AMP:
        settings.type = _AMP[get_device() == 'cpu']
        if args.amp not in (None, True):
            settings.dtype = args.amp
        # That of CPUs needs one.
        settings.setdefault('dtype', 'float16')
        if settings.dtype == 'bfloat16':
            # It has the range of fp32, so that nothing needs scaling.
            settings.setdefault('loss_scale', 1.)
    if args.fsdp:
        if type_name(settings) == CPUAmpOptimWrapper.__name__ \
                and settings.dtype == 'float16':
            raise SystemExit('--fsdp in fp16 runs on GPUs only, for on CPUs '
                             'each process would scale its losses by itself: '
                             'train with --amp bf16, or without --fsdp')
        if cfg.launcher == 'none':
            raise SystemExit('--fsdp shards over several processes: start '
                             'them with dist_train.sh or slurm_train.sh')
        if has_hook(cfg, 'EMAHook'):
            raise SystemExit('--fsdp cannot train with EMAHook, which copies '
                             'the whole model: take it out of custom_hooks, '
                             'or train without --fsdp')
        cfg.runner_type = 'FlexibleRunner'
        cfg.strategy = {
            **cfg.get('strategy', {}), 'type': ShardedStrategy.__name__
        }
    if args.auto_scale_lr:
        auto = cfg.get('auto_scale_lr') or {}
        cfg.auto_scale_lr = {**auto, 'enable': True}
    if args.resume is None and cfg.get('resume'):
        # The config that a resumed run has saved.
        args.resume = cfg.get('load_from') or 'auto'
    checkpoint, cfg.resume = args.resume, False
    if checkpoint == 'auto':
        checkpoint = resume.latest_checkpoint(cfg.work_dir)
    if checkpoint is not None:
        resume.check_resumable(checkpoint, cfg)
        cfg.resume = True
        cfg.load_from = checkpoint
        # The checkpoint has all weights: those of init_cfg are not needed.
        for part in own_parts(cfg).values():
            if any(map(is_pretrained, _inits(part).values())):
                part.init_cfg = None
    return cfg


def fit_lr(cfg: Config) -> tuple[int, str] | None:
    """Compare the images of an update with those that the rate is meant for.

    mmengine would scale the rate too, but counts neither accumulated steps
    nor scales the base rate in its log.

    Args:
        cfg (Config): The config. If ``auto_scale_lr.enable`` is set, the
            learning rate is scaled in place, and ``auto_scale_lr`` then says
            what it is meant for.

    Returns:
        tuple[int, str] | None: Level and text of a line for the log, if there
        is something to say.

    Raises:
        SystemExit: If the rate is to be scaled and something is not known.
    """
    auto = cfg.get('auto_scale_lr') or {}
    base = auto.get('base_batch_size')
    images = cfg.train_dataloader.get('batch_size')
    optimizer = cfg.optim_wrapper.get('optimizer') or {}
    if not base or None in (images, optimizer.get('lr')):
        if auto.get('enable'):
            raise SystemExit(
                '--auto-scale-lr needs auto_scale_lr.base_batch_size, '
                'train_dataloader.batch_size and optim_wrapper.optimizer.lr '
                f'in the config, got {base}, {images} and '
                f'{optimizer.get("lr")}')
        return None
    processes = int(os.environ.get(WORLD_SIZE.get(cfg.launcher, ''), 1))
    steps = cfg.optim_wrapper.get('accumulative_counts', 1)
    batch = processes * images * steps
    scaled = optimizer.lr * batch / base
    text = (f'An update sees {batch} images (processes {processes} x batch '
            f'size {images} x accumulated steps {steps}), and the learning '
            f'rate {optimizer.lr:g} is meant for {base}. ')
    if auto.get('enable'):
        optimizer.lr = scaled
        cfg.auto_scale_lr = dict(enable=False, base_batch_size=batch)
        return logging.INFO, text + f'It has been scaled to {scaled:g}.'
    if batch == base:
        return None
    if cfg.get('resume'):
        return logging.WARNING, text + 'That of the checkpoint goes on.'
    return logging.WARNING, text + (
        f'Linear scaling would make it {scaled:g}: add --auto-scale-lr, or '
        'set optim_wrapper.optimizer.lr.')


def own_parts(cfg: Config) -> dict[str, ConfigDict]:
    """Backbones and necks of this package in a model, by their dotted names.
    """
    return {where: part for where, part in config_parts(cfg.model)
            if 'Conv2Former' in type_name(part)}


def _inits(part: ConfigDict) -> dict[str, ConfigDict]:
    """The entries of ``init_cfg``, which may have several, by their names."""
    inits = part.get('init_cfg') or {}
    if isinstance(inits, (list, tuple)):
        return {f'init_cfg.{i}': init for i, init in enumerate(inits)}
    return dict(init_cfg=inits)


def pretrained_weights(cfg: Config) -> dict[str, str]:
    """Weights that parts of this package start from.

    Args:
        cfg (Config): The config.

    Returns:
        dict[str, str]: Paths by the dotted names of the settings, such as
        'model.backbone.init_cfg'.
    """
    return {
        f'{where}.{key}': init['checkpoint']
        for where, part in own_parts(cfg).items()
        for key, init in _inits(part).items()
        if is_pretrained(init) and 'checkpoint' in init
    }


def check_pretrained(cfg: Config) -> None:
    """Check that the weights which the model starts from are there.

    Args:
        cfg (Config): The config.

    Raises:
        SystemExit: If they are not; the message says what can be done.
    """
    found = pretrained_weights(cfg)
    for path in found.values():
        keys = [key for key, other in found.items() if other == path]
        try:
            find_checkpoint(path, keys)
        except (FileNotFoundError, CheckpointError) as error:
            hint = ''
            if cfg.get('load_from'):
                hint = '\n- Start from load_from alone: with the same option'
            raise SystemExit(f'{error}{hint}') from error


def check_schedule(cfg: Config) -> None:
    """Check that training goes on for longer than its warm-up.

    Args:
        cfg (Config): The config.

    Raises:
        SystemExit: If a schedule begins when training has ended, of which
            mmengine would say so in other words after all has been built.
    """
    schedules = _schedules(cfg).values()
    for unit, by_epoch in ('epochs', True), ('iters', False):
        last = (cfg.get('train_cfg') or {}).get(f'max_{unit}')
        begins = [s.get('begin', 0) for s in schedules  # and go on to the end
                  if s.get('by_epoch', True) == by_epoch and 'end' not in s]
        if last is not None and begins and max(begins) >= last:
            raise SystemExit(
                f'train_cfg.max_{unit}={last}: the schedule of the learning '
                f'rate begins after {max(begins)} {unit} of warm-up. Train '
                'for longer, or set another param_scheduler')


def flat_schedules(cfg: Config) -> list[str]:
    """Warnings of schedules that give all groups one rate.

    Args:
        cfg (Config): The config.

    Returns:
        list[str]: A line for each that takes away the layer decay.
    """
    rate = (cfg.optim_wrapper.get('paramwise_cfg') or {}).get('decay_rate', 1)
    if rate == 1 or 'Decay' not in str(cfg.optim_wrapper.get('constructor')):
        return []
    found = []
    for where, schedule in _schedules(cfg).items():
        kind = type_name(schedule)
        if not kind.endswith('LR'):  # of a momentum
            continue
        if kind.startswith('OneCycle'):
            found.append(
                f'{where}: {kind} has one rate for all groups, so that there '
                'is no layer decay; take LinearLR and CosineAnnealingLR')
        elif schedule.get('eta_min'):
            found.append(
                f'{where}: eta_min={schedule.eta_min} is one rate for all '
                'groups, so that the layer decay is lost towards the end; '
                'eta_min=0, or eta_min_ratio of CosineAnnealingLR, keeps it')
    return found


def _schedules(cfg: Config) -> dict[str, ConfigDict]:
    """The schedules of the optimizer by the names of their settings."""
    schedules = cfg.get('param_scheduler') or []
    if isinstance(schedules, dict):
        return dict(param_scheduler=schedules)
    return {f'param_scheduler.{i}': part for i, part in enumerate(schedules)}


def main(argv: list[str] | None = None) -> None:
    """Train.

    Args:
        argv (list[str], optional): Arguments; those of the process if None.
    """
    args = parse_args(argv)
    cfg = merge_args(launch.read_config(args), args)
    check_pretrained(cfg)
    check_schedule(cfg)
    if cfg.get('load_from') and not cfg.get('resume'):
        checkpoint_files.read_file(cfg.load_from, 'load_from')
    launch.check_data(cfg, ('train', 'val'))
    launch.check_folders(cfg)
    note = fit_lr(cfg)
    earlier = os.path.isfile(os.path.join(cfg.work_dir, 'last_checkpoint'))
    with one_message():
        runner = launch.build_runner(cfg)
        resume.check_processes(cfg)
        if cfg.get('load_from') and isinstance(
                runner.model, nn.Module):  # FlexibleRunner builds it later
            if cfg.get('resume'):
                checkpoint_files.load_weights(runner.model, cfg.load_from)
            else:
                checkpoint_files.check_weight_names(runner.model,
                                                    cfg.load_from)
        if note is not None:
            runner.logger.log(*note)
        for text in flat_schedules(cfg):
            runner.logger.warning(text)
        if args.resume == 'auto' and not cfg.get('resume'):
            runner.logger.warning(f'--resume: no checkpoint in {cfg.work_dir};'
                                  ' training begins anew')
        if earlier and not cfg.get('resume'):
            runner.logger.warning(
                f'{cfg.work_dir} has checkpoints of an earlier run, which '
                'those of this one replace; --resume would go on from there')
        if cfg.optim_wrapper.get('dtype') == 'bfloat16' or \
                cfg.optim_wrapper.get('type') == CPUAmpOptimWrapper.__name__:
            runner.register_hook(BoxesInFloat32())
        if cfg.get('resume'):
            runner.register_hook(resume.ResumedSettings())
        try:
            runner.train()
        except CheckpointError as error:  # of an init_cfg
            raise SystemExit(str(error)) from error


if __name__ == '__main__':
    main()
