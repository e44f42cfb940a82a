"""Train any config of the three tasks: python tools/train.py CONFIG."""
import argparse

from mmengine.config import Config
from mmengine.device import get_device
from mmengine.runner import find_latest_checkpoint

import launch
from mmconv2former.checkpoint import find_checkpoint


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """Parse the command line.

    Args:
        argv (list[str], optional): Arguments; those of the process if None.

    Returns:
        Namespace: The options.
    """
    parser = argparse.ArgumentParser(description='Train a model.')
    parser.add_argument('config', help='config file')
    parser.add_argument(
        '--resume',
        nargs='?',
        const='auto',
        metavar='PATH',
        help='go on from a checkpoint; without a path, or with auto, from '
        'the latest one in the work dir if there is one')
    parser.add_argument(
        '--amp',
        action='store_true',
        help='train in mixed precision: fp16, or bf16 with --cfg-options '
        'optim_wrapper.dtype=bfloat16')
    parser.add_argument(
        '--auto-scale-lr',
        action='store_true',
        help='scale the learning rate with the real batch size, linearly '
        'from auto_scale_lr.base_batch_size of the config')
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
    if args.amp:
        if get_device() == 'cpu':
            raise SystemExit('--amp needs a GPU, and torch sees none: train '
                             'without it')
        # A dtype or a loss scale that the config sets stays.
        cfg.optim_wrapper.type = 'AmpOptimWrapper'
    if args.auto_scale_lr:
        if 'base_batch_size' not in cfg.get('auto_scale_lr', {}):
            raise SystemExit(
                '--auto-scale-lr needs the batch size that the learning rate '
                'is meant for: auto_scale_lr=dict(base_batch_size=...) in '
                'the config')
        cfg.auto_scale_lr.enable = True
    checkpoint = args.resume
    if checkpoint == 'auto':
        checkpoint = find_latest_checkpoint(cfg.work_dir)
    if checkpoint is not None:
        launch.check_file(checkpoint, 'the checkpoint to resume,')
        cfg.resume = True
        cfg.load_from = checkpoint
        # The checkpoint has all weights: those of init_cfg are not needed.
        if 'backbone' in cfg.model:
            cfg.model.backbone.init_cfg = None
    return cfg


def check_pretrained(cfg: Config) -> None:
    """Check that the weights which the backbone starts from are there.

    Args:
        cfg (Config): The config.

    Raises:
        SystemExit: If they are not; the message says what can be done.
    """
    backbone = cfg.model.get('backbone', {})
    init_cfg = backbone.get('init_cfg')
    if str(backbone.get('type')).endswith('Conv2Former') and isinstance(
            init_cfg, dict) and init_cfg.get('type') == 'Pretrained':
        try:
            find_checkpoint(init_cfg.checkpoint)
        except FileNotFoundError as error:
            raise SystemExit(str(error)) from error


def main(argv: list[str] | None = None) -> None:
    """Train.

    Args:
        argv (list[str], optional): Arguments; those of the process if None.
    """
    args = parse_args(argv)
    cfg = merge_args(launch.read_config(args), args)
    check_pretrained(cfg)
    launch.check_data(cfg, ('train', 'val'))
    launch.check_writable(cfg.work_dir, '--work-dir')
    launch.build_runner(cfg).train()


if __name__ == '__main__':
    main()
