"""The recipes of n and t, run by the tools on miniature data.

A run is what a user would type: the config as it is, in a folder where data/
holds the miniature data and the classifier's checkpoint has the name that the
dense configs look for. The options shrink sizes and counts, and nothing else;
what is not a size or a count says why it is there.
"""
import math
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from mmengine.config import Config
from mmengine.hooks import Hook

ROOT = Path(__file__).resolve().parents[1]
CONFIGS = {
    'classification': 'conv2former_{}_in1k',
    'detection': 'mask_rcnn_conv2former_{}_coco',
    'segmentation': 'upernet_conv2former_{}_ade20k',
}
METRICS = {
    'classification': {'accuracy/top1', 'accuracy/top5'},
    'detection': {'coco/bbox_mAP', 'coco/segm_mAP'},
    'segmentation': {'aAcc', 'mIoU', 'mAcc'},
}
# Iterations, and after how many of them the run is killed. N runs until it has
# learnt from its only batch.
ITERATIONS = {
    'n': {
        'classification': (24, 16),
        'detection': (12, 8),
        'segmentation': (20, 10)
    },
    't': dict.fromkeys(CONFIGS, (3, 2)),
}
# The dense models take four times as long where fp16 is emulated.
OPTIONS = {('t', 'classification'): ['--amp', 'fp16']}
SMALL_LOADERS = [
    f'{part}_dataloader.{option}' for part in ('train', 'val', 'test')
    for option in ('num_workers=0', 'persistent_workers=False',
                   'pin_memory=False', 'dataset.indices=2')
]
SMALL = {
    'classification': [
        # Mixed, erased and distorted pictures need more than two to show
        # what is learnt.
        'train_dataloader.batch_size=8',
        'train_dataloader.dataset.indices=8',
        'train_dataloader.dataset.pipeline.1.scale=32',
        *(option for part in ('val', 'test') for option in (
            f'{part}_dataloader.dataset.pipeline.1.scale=36',
            f'{part}_dataloader.dataset.pipeline.2.crop_size=32')),
        'param_scheduler.0.end=2',
        'param_scheduler.1.begin=2',
    ],
    'detection': [
        # Pictures 0 and 2: both are wide, so that they make one batch, and
        # the second has a crowd.
        'train_dataloader.batch_size=2',
        'train_dataloader.dataset.indices=[0,2]',
        *(f'train_dataloader.dataset.pipeline.3.transforms.{where}'
          for where in ('0.0.scales=[(64,96)]', '1.0.scales=[(64,96)]',
                        '1.1.crop_size=(48,64)', '1.2.scales=[(64,96)]')),
        *(f'{part}_dataloader.dataset.pipeline.1.scale=(96,64)'
          for part in ('val', 'test')),
        'model.train_cfg.rpn_proposal.max_per_img=20',
        'model.train_cfg.rcnn.sampler.num=16',
        'model.test_cfg.rpn.max_per_img=20',
        'model.test_cfg.rcnn.max_per_img=10',
        # After so few steps no box would reach the threshold, and COCO's
        # evaluator gives no metric for no boxes.
        'model.test_cfg.rcnn.score_thr=0',
        'param_scheduler.0.end=2',
    ],
    'segmentation': [
        'train_dataloader.batch_size=2',
        'train_dataloader.dataset.pipeline.2.scale=(96,64)',
        # The loss is a mean over all pixels, padding included: at scales from
        # 0.5 to 2 it would tell how much padding there is.
        'train_dataloader.dataset.pipeline.2.ratio_range=(1,1)',
        'train_dataloader.dataset.pipeline.3.crop_size=(64,64)',
        *(f'{part}_dataloader.dataset.pipeline.1.scale=(96,64)'
          for part in ('val', 'test')),
        *(f'tta_pipeline.1.transforms.0.{i}.scale=({width},{width * 2 // 3})'
          for i, width in enumerate((48, 54, 60, 66, 72, 96))),
        'model.data_preprocessor.size=(64,64)',
        'model.test_cfg.crop_size=(64,64)',
        'model.test_cfg.stride=(43,43)',
        'param_scheduler.0.end=2',
        'param_scheduler.1.begin=2',
    ],
}


def options(task, arch):
    """What shrinks a recipe, as --cfg-options."""
    iterations, killed = ITERATIONS[arch][task]
    # The data is one batch, so an epoch is one iteration.
    length = 'iters' if task == 'segmentation' else 'epochs'
    return [
        '--cfg-options', *SMALL_LOADERS, *SMALL[task],
        f'train_cfg.max_{length}={iterations}',
        f'train_cfg.val_interval={iterations}',
        f'default_hooks.checkpoint.interval={killed}',
        'default_hooks.checkpoint.max_keep_ckpts=1',
        'default_hooks.logger.interval=1',
        'randomness.seed=0'  # so that a test passes or fails every time
    ]


class Killed(Exception):
    """Stands in for the end of a run that is killed."""


class Watch(Hook):
    """Note what a run does, and end it where it is to be killed."""
    priority = 'LOWEST'

    def __init__(self, killed=None):
        self.killed = killed
        self.iterations, self.losses = [], []
        self.inputs, self.predictions, self.metrics = [], [], {}

    def before_train(self, runner):
        self.first_weights = {
            name: weight.clone()
            for name, weight in runner.model.backbone.state_dict().items()
        }

    def before_train_iter(self, runner, batch_idx, data_batch=None):
        if runner.iter == self.killed:
            raise Killed

    def after_train_iter(self, runner, batch_idx, data_batch=None,
                         outputs=None):
        self.iterations.append(runner.iter)
        self.losses.append(outputs['loss'].item())

    def after_train(self, runner):
        self.not_finite, self.not_trained = [], []
        for name, weight in runner.model.named_parameters():
            if not torch.isfinite(weight).all():
                self.not_finite.append(name)
            if weight not in runner.optim_wrapper.optimizer.state:
                self.not_trained.append(name)
        self.data = runner.train_dataloader.dataset

    def before_test(self, runner):
        model = getattr(runner.model, 'module', runner.model)
        model.backbone.register_forward_pre_hook(
            lambda _, inputs: self.inputs.append(tuple(inputs[0].shape)))

    def after_test_iter(self, runner, batch_idx, data_batch=None,
                        outputs=None):
        self.predictions += outputs

    def after_test_epoch(self, runner, metrics=None):
        self.metrics = metrics


@pytest.fixture(scope='module')
def folder(imagenet, coco, ade20k, tmp_path_factory):
    """A working directory with the data where the configs expect it."""
    folder = tmp_path_factory.mktemp('recipes')
    (folder / 'data/ade').mkdir(parents=True)
    (folder / 'data/imagenet').symlink_to(imagenet)
    (folder / 'data/coco').symlink_to(coco)
    (folder / 'data/ade/ADEChallengeData2016').symlink_to(ade20k)
    return folder


@pytest.fixture(scope='module')
def run_tool(folder, load_tool):
    """Run a tool in this process, which saves the start of another one."""
    lay_out, texts = Config.pretty_text.fget, {}

    def lay_out_once(cfg):
        """The text of a config; a run asks for it some five times."""
        key = repr(cfg)
        if key not in texts:
            texts[key] = lay_out(cfg)
        return texts[key]

    def run(name, *argv, killed=None):
        watch = Watch(killed)
        with pytest.MonkeyPatch.context() as patch:
            patch.syspath_prepend(str(ROOT / 'tools'))
            # A new process would import it, which settles what is global.
            patch.delitem(sys.modules, 'launch', raising=False)
            tool = load_tool(name)
            build_runner = tool.launch.build_runner

            def build(cfg):
                watch.runner = build_runner(cfg)
                watch.runner.register_hook(watch)
                return watch.runner

            patch.setattr(tool.launch, 'build_runner', build)
            patch.setattr(Config, 'pretty_text', property(lay_out_once))
            patch.setenv('LOCAL_RANK', '0')
            patch.delenv('MMCONV2FORMER_WEIGHTS', raising=False)
            patch.chdir(folder)
            try:
                tool.main([str(arg) for arg in argv])
            except Killed:
                assert killed is not None
        runner = vars(watch).pop('runner')
        watch.log = (Path(runner.log_dir) /
                     f'{runner.timestamp}.log').read_text()
        return watch

    return run


def run_recipe(run_tool, folder, task, arch):
    """Train, be killed, resume and test; the last checkpoint stays."""
    name = CONFIGS[task].format(arch)
    config = ROOT / f'configs/{task}/{name}.py'
    small = options(task, arch)
    iterations, killed = ITERATIONS[arch][task]
    work_dir = folder / 'work_dirs' / name
    recipe = SimpleNamespace(task=task, arch=arch)
    trained = [*small, *OPTIONS.get((arch, task), [])]
    recipe.started = run_tool('train', config, *trained, killed=killed)
    recipe.left = [path.name for path in work_dir.glob('*.pth')]
    recipe.resumed = run_tool('train', config, '--resume', *trained)
    recipe.best = [path.name for path in work_dir.glob('best_*.pth')]
    kind = 'iter' if task == 'segmentation' else 'epoch'
    recipe.checkpoint = work_dir / f'{kind}_{iterations}.pth'
    recipe.tested = run_tool('test', config, recipe.checkpoint, *small)
    if task == 'segmentation':
        recipe.augmented = run_tool('test', config, recipe.checkpoint, '--tta',
                                    *small)
    return recipe


def remove_checkpoints(folder):
    """Make room: those of a dense model take 1.5 GB."""
    for path in folder.glob('work_dirs/*/*.pth'):
        path.unlink()


@pytest.fixture(scope='module', params=ITERATIONS)
def arch(request):
    return request.param


@pytest.fixture(scope='module')
def classification(run_tool, folder, arch):
    """The recipe of the classifier; its checkpoint is there for the others."""
    recipe = run_recipe(run_tool, folder, 'classification', arch)
    weights = folder / f'conv2former_{arch}_in1k.pth'
    recipe.checkpoint.rename(weights)
    remove_checkpoints(folder)
    yield recipe
    weights.unlink()


def dense_recipe(run_tool, folder, task, classification):
    recipe = run_recipe(run_tool, folder, task, classification.arch)
    remove_checkpoints(folder)
    weights = torch.load(
        folder / f'conv2former_{recipe.arch}_in1k.pth', weights_only=False)
    recipe.pretrained = {
        name.removeprefix('backbone.'): weight
        for name, weight in weights['state_dict'].items()
        if name.startswith('backbone.')
    }
    return recipe


@pytest.fixture(scope='module')
def detection(run_tool, folder, classification):
    return dense_recipe(run_tool, folder, 'detection', classification)


@pytest.fixture(scope='module')
def segmentation(run_tool, folder, classification):
    return dense_recipe(run_tool, folder, 'segmentation', classification)


@pytest.fixture(params=CONFIGS)
def recipe(request, arch):
    return request.getfixturevalue(request.param)


@pytest.fixture(params=['detection', 'segmentation'])
def dense(request, arch):
    return request.getfixturevalue(request.param)


def test_recipe_trains_every_parameter(recipe):
    assert all(map(math.isfinite, recipe.started.losses))
    assert all(map(math.isfinite, recipe.resumed.losses))
    assert recipe.resumed.not_finite == recipe.resumed.not_trained == []


def test_killed_run_leaves_a_checkpoint_and_is_resumed_from_it(recipe):
    iterations, killed = ITERATIONS[recipe.arch][recipe.task]
    kind = 'iter' if recipe.task == 'segmentation' else 'epoch'
    assert recipe.left == [f'{kind}_{killed}.pth']
    assert recipe.started.iterations == list(range(killed))
    assert recipe.resumed.iterations == list(range(killed, iterations))
    assert f', iter: {killed}\n' in recipe.resumed.log


def test_recipe_is_validated_and_its_best_checkpoint_kept(recipe):
    iterations = ITERATIONS[recipe.arch][recipe.task][0]
    assert len(recipe.best) == 1
    assert recipe.best[0].endswith(f'_{iterations}.pth')


def test_recipe_is_evaluated(recipe):
    assert len(recipe.tested.predictions) == 2
    for name in METRICS[recipe.task]:
        assert math.isfinite(recipe.tested.metrics[name])


@pytest.mark.parametrize('arch', ['n'], indirect=True, scope='module')
def test_recipe_overfits_one_batch(recipe):
    losses = recipe.started.losses + recipe.resumed.losses
    assert sum(losses[-3:]) < 0.9 * sum(losses[:3])


def test_recipe_pipeline_gives_samples_whatever_it_chooses(
        recipe, folder, monkeypatch):
    monkeypatch.chdir(folder)
    for i in range(8):
        assert recipe.resumed.data[i % 2]['inputs'].shape[0] == 3


def test_dense_recipe_starts_from_the_classifier(dense):
    count = len(dense.pretrained)
    assert f'loaded {count} of {count} backbone tensors' in dense.started.log
    assert f'conv2former_{dense.arch}_in1k.pth' in dense.started.log
    for name, weight in dense.pretrained.items():
        torch.testing.assert_close(dense.started.first_weights[name], weight)


def test_segmentation_slides_over_the_image(segmentation):
    # Two windows of 64 pixels on each image, one of 96x64 and one of 64x96.
    assert segmentation.tested.inputs == 4 * [(1, 3, 64, 64)]


def test_segmentation_is_augmented_in_testing(segmentation):
    augmented = segmentation.augmented
    assert math.isfinite(augmented.metrics['mIoU'])
    assert len(augmented.predictions) == 2
    # Two images and their mirror images at six scales, of which three take
    # two windows.
    assert len(augmented.inputs) == 2 * 2 * (3 * 1 + 3 * 2)


def test_two_processes_train_a_dense_recipe(folder):
    done = subprocess.run(
        [
            'bash', ROOT / 'tools/dist_train.sh',
            ROOT / 'configs/segmentation/upernet_conv2former_n_ade20k.py', '2',
            '--work-dir', 'two', *options('segmentation', 'n'),
            'train_cfg.max_iters=2', 'default_hooks.checkpoint.interval=-1',
            'default_hooks.checkpoint.save_last=False',
            'model.backbone.init_cfg=None'
        ],
        cwd=folder,
        env={
            **os.environ, 'OMP_NUM_THREADS': '1',
            'PATH': f'{Path(sys.executable).parent}:{os.environ["PATH"]}'
        },
        capture_output=True,
        text=True,
        timeout=300)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert 'Iter(train) [2/2]' in done.stdout + done.stderr
    assert 'mIoU:' in done.stdout + done.stderr
