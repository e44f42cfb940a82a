"""Test a checkpoint of any config: python tools/test.py CONFIG CHECKPOINT."""
import argparse
import os.path as osp

from mmengine.config import Config, ConfigDict
from mmengine.runner import Runner

import checkpoint_files
import launch
from config_queries import data_sets, evaluators, has_hook, library, type_name
from data_error import one_message
from mmconv2former import fuse_for_inference


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """Parse the command line.

    Args:
        argv (list[str], optional): Arguments; those of the process if None.

    Returns:
        Namespace: The options.
    """
    parser = argparse.ArgumentParser(description='Test a model.')
    launch.add_config(parser)
    parser.add_argument('checkpoint', help='checkpoint file')
    parser.add_argument(
        '--tta',
        action='store_true',
        help='test-time augmentation, where the config has tta_model and '
        'tta_pipeline')
    parser.add_argument(
        '--fuse',
        action='store_true',
        help='rewrite the backbone into fewer operations with the same '
        'results (docs/export.md), which is faster on CPUs')
    parser.add_argument(
        '--out',
        metavar='PATH',
        help='save the predictions: to a .pkl file in classification and '
        'detection, as label maps into a folder in segmentation')
    parser.add_argument(
        '--show-dir', metavar='FOLDER', help='save painted predictions')
    launch.add_options(parser)
    return parser.parse_args(argv)


def merge_args(cfg: Config, args: argparse.Namespace) -> Config:
    """Merge the options of testing into the config.

    Args:
        cfg (Config): The config, changed in place.
        args (Namespace): What :func:`parse_args` returns.

    Returns:
        Config: The config.

    Raises:
        SystemExit: If an option cannot be followed.
    """
    launch.check_model(cfg, args.config, 'test_dataloader', 'test_cfg',
                       'test_evaluator')
    checkpoint_files.check_file(args.checkpoint, 'the checkpoint')
    # A strategy, such as that of --fsdp, is for training.
    for name in 'runner_type', 'strategy':
        cfg.pop(name, None)
    cfg.resume = False  # which the config of a resumed run says
    # A fused model takes no weights: main() loads them before.
    cfg.load_from = None if args.fuse else args.checkpoint
    if args.fuse:
        _refuse_averaging(cfg)
    if args.tta:
        _augment(cfg)
    if args.out is not None:
        _dump(cfg, args.out)
    if args.show_dir is not None:
        _paint(cfg, osp.abspath(args.show_dir), args.tta)
    return cfg


def _refuse_averaging(cfg: Config) -> None:
    """Refuse --fuse where a hook exchanges weights around the test."""
    if has_hook(cfg, 'EMAHook'):
        # mmengine saves the average as the weights of the model.
        raise SystemExit(
            '--fuse: EMAHook of the config exchanges weights, and a fused '
            'model takes none. Take it out of custom_hooks, or all of them: '
            '--cfg-options custom_hooks="[]". The checkpoint has the averaged '
            'weights in place of the others')


def _fuse(runner: Runner, path: str) -> None:
    """Fuse the backbone of a model that has its weights."""
    model = runner.model.eval()
    try:
        fuse_for_inference(model)
    except ValueError as error:
        raise SystemExit(f'--fuse: {error}') from error
    runner.logger.info(f'Load checkpoint from {path}, and fuse the backbone')


def _augment(cfg: Config) -> None:
    """Wrap the model and exchange the pipeline for --tta."""
    if any(part and part.get('mask_head')
           for part in (cfg.model, cfg.model.get('roi_head'))):
        raise SystemExit(
            '--tta: mmdet merges the boxes of augmented images but not their '
            'masks, so it cannot be used with instance segmentation. Test '
            'without it; a larger scale is the nearest thing: --cfg-options '
            'test_dataloader.dataset.pipeline.1.scale="(1600,960)"')
    if 'tta_model' not in cfg or 'tta_pipeline' not in cfg:
        raise SystemExit(
            '--tta: the config has no tta_model and tta_pipeline, which say '
            'how to augment and how to merge; '
            'configs/classification/_base_/imagenet_224.py and '
            'configs/segmentation/_base_/ade20k_512.py show them')
    cfg.model = ConfigDict(**cfg.tta_model, module=cfg.model)
    for _, data_set in data_sets(cfg.test_dataloader.dataset, ''):
        data_set.pipeline = cfg.tta_pipeline


def _dump(cfg: Config, out: str) -> None:
    """Save predictions to a file, or to a folder in segmentation."""
    metrics = evaluators(cfg, 'test')
    if library(cfg) == 'mmseg':
        if out.endswith(('.pkl', '.pickle')) or osp.isfile(out):
            raise SystemExit(f"--out '{out}': of segmentation label maps are "
                             'written, as pictures; name a folder for them')
        launch.check_writable(out, '--out')
        # mmseg's metric writes label maps; a pickle would hold every logit.
        for metric in metrics:
            metric.output_dir = out
        return
    if not out.endswith(('.pkl', '.pickle')):
        raise SystemExit(f"--out must end with .pkl or .pickle, got '{out}'")
    if osp.isdir(out):
        raise SystemExit(f"--out '{out}' is a folder; name a file")
    launch.check_writable(osp.dirname(osp.abspath(out)), '--out')
    metrics = [
        *metrics,
        dict(
            type='mmdet.DumpDetResults' if library(cfg) == 'mmdet'
            else 'DumpResults',
            out_file_path=out)
    ]
    evaluator = cfg.test_evaluator
    if not isinstance(evaluator, dict) or 'metrics' not in evaluator:
        cfg.test_evaluator = metrics
    elif type_name(evaluator) == 'Evaluator':
        evaluator.metrics = metrics
    else:
        raise SystemExit(
            f'--out: test_evaluator is a {type_name(evaluator)}, which '
            'cannot be given another metric, one that saves predictions. '
            'Make it a list of metrics')


def _paint(cfg: Config, folder: str, tta: bool) -> None:
    """Have the visualization hook of the task save every image."""
    if cfg.launcher != 'none':
        raise SystemExit('--show-dir: the libraries paint the images of the '
                         'first process only; test in one process')
    hook = cfg.get('default_hooks', {}).get('visualization')
    name = type_name(hook) if hook else None
    if name == 'VisualizationHook':
        if tta:
            raise SystemExit('--show-dir: mmpretrain cannot paint augmented '
                             'images; leave --tta out')
        hook.update(enable=True, interval=1, out_dir=folder)
    elif name == 'DetVisualizationHook':
        hook.update(draw=True, interval=1, test_out_dir=folder)
    elif name == 'SegVisualizationHook':
        hook.update(draw=True, interval=1)
        cfg.visualizer.update(
            save_dir=folder, vis_backends=[dict(type='LocalVisBackend')])
    else:
        raise SystemExit(
            '--show-dir: default_hooks.visualization of the config must be '
            "the hook of mmpretrain, mmdet or mmseg ('VisualizationHook', "
            "'DetVisualizationHook' or 'SegVisualizationHook'), got "
            f'{name!r}')
    launch.check_writable(folder, '--show-dir')


def main(argv: list[str] | None = None) -> None:
    """Test.

    Args:
        argv (list[str], optional): Arguments; those of the process if None.
    """
    args = parse_args(argv)
    cfg = merge_args(launch.read_config(args), args)
    launch.check_data(cfg, ('test', ))
    launch.check_folders(cfg)
    with one_message():
        runner = launch.build_runner(cfg)
        checkpoint_files.load_weights(runner.model, args.checkpoint)
        if args.fuse:
            _fuse(runner, args.checkpoint)
        runner.test()


if __name__ == '__main__':
    main()
