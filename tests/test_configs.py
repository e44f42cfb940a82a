"""Every config builds; the published recipes run on stand-in data."""
from pathlib import Path

import pytest
import torch
from mmengine.config import Config
from mmengine.hooks import Hook
from mmengine.runner import Runner
from torch import nn
from torch.utils.data import DataLoader

from mmconv2former import Conv2Former

CONFIGS = Path(__file__).resolve().parents[1] / 'configs'
LEAVES = sorted(path.relative_to(CONFIGS) for path in CONFIGS.glob('*/*.py'))
IN1K = 'classification/conv2former_t_in1k.py'
COCO = 'detection/mask_rcnn_conv2former_t_coco.py'
ADE20K = 'segmentation/upernet_conv2former_t_ade20k.py'
RECIPES = (IN1K, COCO, ADE20K)
# What shrinks sizes and counts, and nothing else.
SMALL_LOADERS = {
    f'{part}_dataloader.{key}': value
    for part in ('train', 'val')
    for key, value in {
        'batch_size': 2,
        'num_workers': 0,
        'persistent_workers': False,
        'pin_memory': False,
        'dataset.indices': 2,
    }.items()
}
SMALL = {
    IN1K: {
        'train_dataloader.dataset.pipeline.1.scale': 32,
        'val_dataloader.dataset.pipeline.1.scale': 40,
        'val_dataloader.dataset.pipeline.2.crop_size': 32,
        'train_cfg.max_epochs': 2,
        'param_scheduler.0.end': 1,
        'param_scheduler.1.begin': 1,
    },
    COCO: {
        'train_dataloader.dataset.pipeline.3.transforms.0.0.scales':
        [(64, 96)],
        'train_dataloader.dataset.pipeline.3.transforms.1.0.scales':
        [(64, 96)],
        'train_dataloader.dataset.pipeline.3.transforms.1.1.crop_size':
        (48, 64),
        'train_dataloader.dataset.pipeline.3.transforms.1.2.scales':
        [(64, 96)],
        'val_dataloader.batch_size': 1,
        'val_dataloader.dataset.pipeline.1.scale': (96, 64),
        'model.train_cfg.rpn_proposal.max_per_img': 20,
        'model.train_cfg.rcnn.sampler.num': 16,
        'model.test_cfg.rpn.max_per_img': 20,
        'train_cfg.max_epochs': 1,
    },
    ADE20K: {
        'train_dataloader.dataset.pipeline.2.scale': (96, 64),
        'train_dataloader.dataset.pipeline.3.crop_size': (64, 64),
        'val_dataloader.batch_size': 1,
        'val_dataloader.dataset.pipeline.1.scale': (96, 64),
        'model.data_preprocessor.size': (64, 64),
        'model.test_cfg.crop_size': (64, 64),
        'model.test_cfg.stride': (43, 43),
        'train_cfg.max_iters': 1,
        'train_cfg.val_interval': 1,
    },
}


def load(config):
    return Config.fromfile(CONFIGS / config)


def schedule_runner(cfg, work_dir, model, epoch_length=4):
    """A runner of the config's schedules, with numbers instead of data."""
    return Runner(
        model=model,
        work_dir=str(work_dir),
        train_dataloader=DataLoader(range(epoch_length)),
        train_cfg=cfg.train_cfg,
        optim_wrapper=cfg.optim_wrapper,
        param_scheduler=cfg.param_scheduler,
        data_preprocessor=cfg.get('data_preprocessor'),
        default_scope=cfg.default_scope,
        experiment_name=work_dir.name)


def build_schedules(runner):
    runner.optim_wrapper = runner.build_optim_wrapper(runner.optim_wrapper)
    assert runner.train_loop is not None  # the schedules ask for its length
    return runner.build_param_scheduler(runner.param_schedulers)


def test_there_are_configs_for_each_task():
    assert {path.parts[0] for path in LEAVES
            } == {'classification', 'detection', 'segmentation'}
    assert set(RECIPES) <= {path.as_posix() for path in LEAVES}


@pytest.mark.parametrize('config', LEAVES, ids=lambda path: path.stem)
def test_config_builds_model_optimizer_and_schedules(config, tmp_path):
    cfg = load(config)
    runner = schedule_runner(cfg, tmp_path, cfg.model)
    schedulers = build_schedules(runner)

    assert isinstance(runner.model.backbone, Conv2Former)
    optimized = [
        id(p) for group in runner.optim_wrapper.param_groups
        for p in group['params']
    ]
    assert len(set(optimized)) == len(optimized)
    # mmengine adds a scalar of its own, which carries the base rate.
    assert set(optimized) >= {
        id(p)
        for p in runner.model.parameters() if p.requires_grad
    }
    assert len(schedulers) == len(cfg.param_scheduler)


@pytest.mark.parametrize('config', RECIPES)
def test_recipe_says_how_to_run_it_and_what_to_expect(config):
    header = (CONFIGS / config).read_text().split('"""')[1]
    assert f'configs/{config}' in header.replace('\\\n', '')
    assert 'Batch: 8 GPUs x' in header
    assert 'Expected:' in header and '(paper)' in header


@pytest.mark.parametrize('config, lr, batch_size, drop_path', [
    (IN1K, 1e-3, 1024, 0.1),
    (COCO, 1e-4, 16, 0.4),
    (ADE20K, 1e-4, 16, 0.4),
])
def test_recipe_has_the_published_settings(config, lr, batch_size, drop_path):
    cfg = load(config)
    optimizer = cfg.optim_wrapper.optimizer
    assert (optimizer.type, optimizer.lr) == ('AdamW', lr)
    assert tuple(optimizer.betas) == (0.9, 0.999)
    assert optimizer.weight_decay == 0.05
    assert 8 * cfg.train_dataloader.batch_size == batch_size
    assert cfg.auto_scale_lr == dict(enable=False, base_batch_size=batch_size)
    assert cfg.model.backbone.arch == 'tiny'
    assert cfg.model.backbone.drop_path_rate == drop_path


def test_detection_recipe_decays_layer_wise_over_three_times_the_schedule():
    cfg = load(COCO)
    paramwise = cfg.optim_wrapper.paramwise_cfg
    assert (paramwise.decay_type, paramwise.decay_rate,
            paramwise.num_layers) == ('layer_wise', 0.95, 6)
    warm_up, steps = cfg.param_scheduler
    assert (warm_up.end, warm_up.by_epoch) == (1000, False)
    assert (cfg.train_cfg.max_epochs, steps.milestones) == (36, [27, 33])


def test_segmentation_recipe_decays_stage_wise_to_zero():
    cfg = load(ADE20K)
    paramwise = cfg.optim_wrapper.paramwise_cfg
    assert (paramwise.decay_type, paramwise.decay_rate,
            paramwise.num_layers) == ('stage_wise', 0.9, 6)
    warm_up, poly = cfg.param_scheduler
    assert (warm_up.start_factor, warm_up.end) == (1e-6, 1500)
    assert (poly.power, poly.begin, poly.end, poly.eta_min) == (1, 1500,
                                                                160000, 0)
    assert cfg.train_cfg.max_iters == 160000
    test_cfg = cfg.model.test_cfg
    assert (test_cfg.mode, test_cfg.crop_size,
            test_cfg.stride) == ('slide', (512, 512), (341, 341))


def test_classification_warms_up_and_falls_along_a_cosine(tmp_path):
    cfg = load(IN1K)
    # The schedule does not depend on the model; one layer is enough.
    cfg.optim_wrapper = dict(optimizer=cfg.optim_wrapper.optimizer)
    runner = schedule_runner(cfg, tmp_path, nn.Linear(1, 1))
    schedulers = build_schedules(runner)
    rates = []
    for _ in range(cfg.train_cfg.max_epochs):
        for _ in range(4):
            rates.append(runner.optim_wrapper.get_lr()['lr'][0])
            for scheduler in schedulers:
                if not scheduler.by_epoch:
                    scheduler.step()
        for scheduler in schedulers:
            if scheduler.by_epoch:
                scheduler.step()
    rates = torch.tensor(rates)[::4]
    assert rates[0] == pytest.approx(1e-6)
    assert (rates[:6].diff() > 0).all() and (rates[5:].diff() < 0).all()
    assert rates[5] == rates.max() == pytest.approx(1e-3, rel=0.06)
    assert rates[-1] == pytest.approx(1e-6, rel=0.05)


class Validated(Hook):
    """Collect the predictions of the last validation."""

    def before_val(self, runner):
        self.predictions = []

    def after_val_iter(self, runner, batch_idx, data_batch=None, outputs=None):
        self.predictions.extend(outputs)


@pytest.fixture(
    scope='module',
    params=zip(RECIPES, ('imagenet', 'coco', 'ade20k')),
    ids=lambda pair: pair[1])
def trained(request, tmp_path_factory):
    """A runner that has trained an iteration and validated a recipe."""
    config, data = request.param
    root = str(request.getfixturevalue(data))
    cfg = load(config)
    cfg.merge_from_dict({
        **SMALL_LOADERS,
        **SMALL[config],
        'train_dataloader.dataset.data_root': root,
        'val_dataloader.dataset.data_root': root,
        # No files of 500 MB from a test, and no weights to start from.
        'default_hooks.checkpoint': dict(interval=-1, save_best=None),
        'model.backbone.init_cfg': None,
    })
    if config == COCO:
        cfg.val_evaluator.ann_file = \
            f'{root}/annotations/instances_val2017.json'
    cfg.work_dir = str(tmp_path_factory.mktemp(data))
    runner = Runner.from_cfg(cfg)
    runner.register_hook(Validated())
    runner.train()
    return runner


def test_recipe_trains_on_stand_in_data(trained):
    hub = trained.message_hub
    assert torch.isfinite(
        torch.tensor(hub.get_scalar('train/loss').current()))
    for name, p in trained.model.named_parameters():
        assert torch.isfinite(p).all(), name
        assert p in trained.optim_wrapper.optimizer.state, name


def test_recipe_predicts_every_image_of_the_validation_data(trained):
    validated, = (h for h in trained.hooks if isinstance(h, Validated))
    assert len(validated.predictions) == 2


def test_recipe_pipelines_give_samples_whatever_they_choose(trained):
    for i in range(8):
        sample = trained.train_dataloader.dataset[i % 2]
        assert sample['inputs'].shape[0] == 3


def test_norms_biases_and_layer_scales_are_not_decayed(trained):
    decay = {
        id(p): group['weight_decay']
        for group in trained.optim_wrapper.param_groups
        for p in group['params']
    }
    for name, p in trained.model.named_parameters():
        expected = 0. if p.ndim == 1 or name.endswith('.bias') else 0.05
        assert decay[id(p)] == expected, name
