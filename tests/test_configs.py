"""Every config builds, and the recipes are the published ones."""
import copy
import functools
import re
from pathlib import Path

import pytest
import torch
from mmengine.config import Config
from mmengine.optim import build_optim_wrapper
from mmengine.registry import (
    DATASETS,
    METRICS,
    MODELS,
    TRANSFORMS,
    init_default_scope,
)
from mmengine.runner import Runner
from torch import nn
from torch.utils.data import DataLoader

from mmconv2former import Conv2Former

ROOT = Path(__file__).resolve().parents[1]
CONFIGS = ROOT / 'configs'
LEAVES = sorted(
    path.relative_to(CONFIGS) for path in CONFIGS.rglob('*.py')
    if '_base_' not in path.parts)
RECIPES = [path for path in LEAVES if 'digits' not in path.stem]
IN1K = 'classification/conv2former_t_in1k.py'
FINE_TUNED = 'classification/conv2former_b_in22k_ft_in1k.py'
COCO = 'detection/mask_rcnn_conv2former_t_coco.py'
CASCADE = 'detection/cascade_mask_rcnn_conv2former_l_coco.py'
ADE20K = 'segmentation/upernet_conv2former_t_ade20k.py'


@functools.cache
def read(config):
    return Config.fromfile(CONFIGS / config)


def load(config):
    """A config that a test may change."""
    return copy.deepcopy(read(Path(config)))


def build_model(cfg):
    init_default_scope(cfg.default_scope)
    # Shapes without memory: the largest model has 240 million parameters.
    with torch.device('meta'):
        return MODELS.build(cfg.model)


def build_schedules(cfg, work_dir, epoch_length=4, paramwise_cfg=None):
    """A runner of a single layer with the config's schedules, and these."""
    runner = Runner(
        model=nn.Linear(1, 1),
        work_dir=str(work_dir),
        train_dataloader=DataLoader(range(epoch_length)),
        train_cfg=cfg.train_cfg,
        optim_wrapper=dict(optimizer=cfg.optim_wrapper.optimizer,
                           paramwise_cfg=paramwise_cfg),
        param_scheduler=cfg.param_scheduler,
        default_scope=cfg.default_scope,
        experiment_name=work_dir.name)
    runner.optim_wrapper = runner.build_optim_wrapper(runner.optim_wrapper)
    assert runner.train_loop is not None  # the schedules ask for its length
    return runner, runner.build_param_scheduler(runner.param_schedulers)


def test_there_are_configs_for_each_task():
    assert {path.parts[0] for path in LEAVES
            } == {'classification', 'detection', 'segmentation'}
    assert {IN1K, FINE_TUNED, COCO, CASCADE, ADE20K
            } <= {path.as_posix() for path in LEAVES}


@pytest.mark.parametrize('config', LEAVES, ids=lambda path: path.stem)
def test_config_builds_model_optimizer_and_schedules(config, tmp_path):
    cfg = load(config)
    model = build_model(cfg)
    assert isinstance(model.backbone, Conv2Former)
    groups = build_optim_wrapper(model, cfg.optim_wrapper).param_groups
    optimized = [id(p) for group in groups for p in group['params']]
    assert len(set(optimized)) == len(optimized)
    # mmengine adds a scalar of its own, which carries the base rate.
    assert set(optimized) >= {
        id(p)
        for p in model.parameters() if p.requires_grad
    }
    if cfg.optim_wrapper.get('constructor'):
        scales = [group['lr_scale'] for group in groups if 'names' in group]
        assert len(scales) < 50 and 0 < min(scales) <= max(scales) == 1
    _, schedulers = build_schedules(cfg, tmp_path)
    assert len(schedulers) == len(cfg.param_scheduler)


@pytest.mark.parametrize('config', LEAVES, ids=lambda path: path.stem)
def test_config_builds_data_sets_pipelines_and_metrics(config):
    cfg = load(config)
    init_default_scope(cfg.default_scope)
    parts = [
        part for part in ('train', 'val', 'test')
        if cfg.get(f'{part}_dataloader')
    ]
    assert 'train' in parts
    for part in parts:
        data_set = cfg[f'{part}_dataloader'].dataset
        # Lazy: the files are not here, but every argument is taken.
        built = DATASETS.build({**data_set, 'lazy_init': True})
        assert len(built.pipeline.transforms) == len(data_set.pipeline)
    for part in set(parts) - {'train'}:
        metrics = cfg[f'{part}_evaluator']
        for metric in metrics if isinstance(metrics, list) else [metrics]:
            # The metric of COCO reads its file when it is built.
            assert METRICS.build({**metric, 'ann_file': None}
                                 if 'ann_file' in metric else metric)
    if 'tta_pipeline' in cfg:
        for transform in cfg.tta_pipeline:
            assert TRANSFORMS.build(transform)


@pytest.mark.parametrize('config', RECIPES, ids=lambda path: path.stem)
def test_recipe_says_how_to_run_it_and_what_to_expect(config):
    header = (CONFIGS / config).read_text().split('"""')[1]
    command = re.sub(r'\\\n\s+', '', header)
    # On one line, so that it can be pasted.
    assert f'bash tools/dist_train.sh configs/{config.as_posix()} 8 --amp\n' \
        in command
    expected = header.split('Expected:')[1]
    assert re.search(
        r'\(paper\)|the paper gives|not (trained|evaluated|published)',
        expected)


@pytest.mark.parametrize('config', RECIPES, ids=lambda path: path.stem)
def test_recipe_is_a_small_delta(config):
    body = (CONFIGS / config).read_text().split('"""')[2]
    settings = [
        line for line in body.split(']\n', 1)[1].splitlines()
        if line and not line.startswith('#')
    ]
    assert len(settings) <= 16


@pytest.mark.parametrize('config', RECIPES, ids=lambda path: path.stem)
def test_arithmetic_in_the_header_is_that_of_the_config(config):
    header = (CONFIGS / config).read_text().split('"""')[1]
    found = re.search(
        r'Batch: 8 GPUs x (\d+) images = (\d+) at lr (\S+); with another '
        r'batch,\nlr = (\S+) \* \(GPUs x images\) / (\d+)', header)
    images, batch, lr, *again = found.groups()
    cfg = load(config)
    assert again == [lr, batch]
    assert int(images) == cfg.train_dataloader.batch_size
    assert 8 * int(images) == int(batch) == cfg.auto_scale_lr.base_batch_size
    assert cfg.auto_scale_lr.enable is False
    assert float(lr) == cfg.optim_wrapper.optimizer.lr


# What is published, by the authors or by those of ConvNeXt, and what we chose
# where nothing is: see the headers.
@pytest.mark.parametrize('config, arch, drop_path', [
    ('classification/conv2former_n_in1k.py', 'nano', 0.1),
    ('classification/conv2former_t_in1k.py', 'tiny', 0.1),
    ('classification/conv2former_s_in1k.py', 'small', 0.4),
    ('classification/conv2former_b_in1k.py', 'base', 0.5),
    ('classification/conv2former_s_in22k.py', 'small', 0.1),
    ('classification/conv2former_b_in22k.py', 'base-22k', 0.1),
    ('classification/conv2former_b_k11_in22k.py', 'base', 0.1),
    ('classification/conv2former_l_in22k.py', 'large', 0.1),
    ('classification/conv2former_s_in22k_ft_in1k.py', 'small', 0.1),
    ('classification/conv2former_b_in22k_ft_in1k.py', 'base-22k', 0.2),
    ('classification/conv2former_b_k11_in22k_ft_in1k.py', 'base', 0.2),
    ('classification/conv2former_l_in22k_ft_in1k.py', 'large', 0.3),
    ('classification/conv2former_b_in22k_ft_in1k_384.py', 'base-22k', 0.2),
    ('classification/conv2former_b_k11_in22k_ft_in1k_384.py', 'base', 0.2),
    ('classification/conv2former_l_in22k_ft_in1k_384.py', 'large', 0.3),
    ('classification/conv2former_is_in1k.py', 'isotropic-small', 0.1),
    ('classification/conv2former_is_3conv_in1k.py', 'isotropic-small-3conv',
     0.1),
    ('classification/conv2former_ib_in1k.py', 'isotropic-base', 0.2),
    ('classification/conv2former_ib_3conv_in1k.py', 'isotropic-base-3conv',
     0.2),
    ('detection/mask_rcnn_conv2former_n_coco.py', 'nano', 0.2),
    ('detection/mask_rcnn_conv2former_t_coco.py', 'tiny', 0.4),
    ('detection/mask_rcnn_conv2former_t_1x_coco.py', 'tiny', 0.2),
    ('detection/mask_rcnn_conv2former_s_coco.py', 'small', 0.6),
    ('detection/mask_rcnn_conv2former_b_coco.py', 'base', 0.7),
    ('detection/cascade_mask_rcnn_conv2former_t_coco.py', 'tiny', 0.4),
    ('detection/cascade_mask_rcnn_conv2former_s_coco.py', 'small', 0.6),
    ('detection/cascade_mask_rcnn_conv2former_b_coco.py', 'base-22k', 0.6),
    ('detection/cascade_mask_rcnn_conv2former_b_in1k_coco.py', 'base', 0.7),
    ('detection/cascade_mask_rcnn_conv2former_l_coco.py', 'large', 0.7),
    ('segmentation/upernet_conv2former_n_ade20k.py', 'nano', 0.2),
    ('segmentation/upernet_conv2former_t_ade20k.py', 'tiny', 0.4),
    ('segmentation/upernet_conv2former_s_ade20k.py', 'small', 0.3),
    ('segmentation/upernet_conv2former_b_ade20k.py', 'base', 0.4),
    ('segmentation/upernet_conv2former_l_ade20k.py', 'large', 0.4),
])
def test_recipe_has_its_arch_drop_path_and_weights(config, arch, drop_path):
    cfg = load(config)
    backbone = cfg.model.backbone
    assert (backbone.arch, backbone.drop_path_rate) == (arch, drop_path)
    optimizer = cfg.optim_wrapper.optimizer
    assert optimizer.type == 'AdamW'
    assert tuple(optimizer.betas) == (0.9, 0.999)
    fine_tuned = '_ft_' in config
    assert optimizer.weight_decay == (1e-8 if fine_tuned else 0.05)
    if config.startswith('classification') and not fine_tuned:
        assert 'init_cfg' not in backbone
        return
    start = backbone.init_cfg.checkpoint
    assert backbone.init_cfg.type == 'Pretrained'
    from_22k = fine_tuned or arch in ('base-22k', 'large')
    size = re.search(r'conv2former_(b_k11|[a-z]+)_', config)[1]
    assert start == f'conv2former_{size}_{"in22k" if from_22k else "in1k"}.pth'


@pytest.mark.parametrize('config, decay', [
    (IN1K, ('layer_wise', 1., None)),
    (FINE_TUNED, ('layer_wise', 0.8, 12)),
    ('detection/mask_rcnn_conv2former_n_coco.py', ('layer_wise', 0.95, 6)),
    (COCO, ('layer_wise', 0.95, 6)),
    ('detection/mask_rcnn_conv2former_s_coco.py', ('layer_wise', 0.95, 12)),
    ('detection/mask_rcnn_conv2former_b_coco.py', ('layer_wise', 0.95, 12)),
    ('detection/cascade_mask_rcnn_conv2former_t_coco.py', ('layer_wise', 0.7,
                                                           6)),
    ('detection/cascade_mask_rcnn_conv2former_s_coco.py', ('layer_wise', 0.7,
                                                           12)),
    ('detection/cascade_mask_rcnn_conv2former_b_coco.py', ('layer_wise', 0.8,
                                                           12)),
    ('detection/cascade_mask_rcnn_conv2former_b_in1k_coco.py',
     ('layer_wise', 0.8, 12)),
    (CASCADE, ('layer_wise', 0.7, 12)),
    ('segmentation/upernet_conv2former_n_ade20k.py', ('stage_wise', 0.9, 6)),
    (ADE20K, ('stage_wise', 0.9, 6)),
    ('segmentation/upernet_conv2former_s_ade20k.py', ('stage_wise', 0.9, 12)),
    ('segmentation/upernet_conv2former_b_ade20k.py', ('stage_wise', 0.9, 12)),
    ('segmentation/upernet_conv2former_l_ade20k.py', ('stage_wise', 0.9, 12)),
])
def test_recipe_has_its_layer_decay(config, decay):
    paramwise = load(config).optim_wrapper.paramwise_cfg
    assert (paramwise.get('decay_type', 'layer_wise'), paramwise.decay_rate,
            paramwise.get('num_layers')) == decay


# The head is at depth num_layers + 1; every depth below costs one factor.
GROUPS = {
    IN1K: {
        'backbone.downsample_layers.0.0.weight': (1., 0.05),
        'backbone.stages.2.11.mlp.fc1.weight': (1., 0.05),
        'backbone.stages.2.11.mlp.fc1.bias': (1., 0.),
        'backbone.stages.0.0.attn.norm.weight': (1., 0.),
        'backbone.stages.0.0.layer_scale_1': (1., 0.),
        'neck.conv.weight': (1., 0.05),
        'head.fc.bias': (1., 0.),
    },
    FINE_TUNED: {
        'backbone.downsample_layers.0.6.weight': (0.8**13, 1e-8),
        'backbone.stages.0.0.attn.v.weight': (0.8**12, 1e-8),
        'backbone.stages.1.3.attn.v.weight': (0.8**11, 1e-8),
        'backbone.downsample_layers.2.1.weight': (0.8**10, 1e-8),
        # 34 blocks on the 9 layers 3 to 11: block 33 is in 3 + 33 * 9 // 34.
        'backbone.stages.2.0.attn.v.weight': (0.8**10, 1e-8),
        'backbone.stages.2.33.attn.v.weight': (0.8**2, 1e-8),
        'backbone.stages.2.33.attn.v.bias': (0.8**2, 0.),
        'backbone.downsample_layers.3.1.weight': (0.8, 1e-8),
        'backbone.stages.3.0.layer_scale_2': (0.8, 0.),
        'neck.norm.weight': (1., 0.),
        'head.fc.weight': (1., 1e-8),
    },
    COCO: {
        'backbone.downsample_layers.0.0.weight': (0.95**7, 0.05),
        'backbone.stages.0.2.mlp.fc2.weight': (0.95**6, 0.05),
        'backbone.stages.1.0.attn.att.2.weight': (0.95**5, 0.05),
        # 12 blocks on the layers 3, 4 and 5.
        'backbone.stages.2.3.attn.att.2.weight': (0.95**4, 0.05),
        'backbone.stages.2.4.attn.att.2.weight': (0.95**3, 0.05),
        'backbone.stages.2.11.attn.att.2.bias': (0.95**2, 0.),
        'backbone.downsample_layers.3.0.weight': (0.95, 0.),
        'backbone.stages.3.2.mlp.pos.weight': (0.95, 0.05),
        'backbone.norm0.weight': (1., 0.),
        'neck.lateral_convs.0.conv.weight': (1., 0.05),
        'roi_head.mask_head.convs.0.conv.bias': (1., 0.),
    },
    CASCADE: {
        'backbone.downsample_layers.0.0.weight': (0.7**13, 0.05),
        'backbone.stages.2.0.mlp.fc1.weight': (0.7**10, 0.05),
        # 48 blocks on the 9 layers 3 to 11.
        'backbone.stages.2.47.mlp.fc1.weight': (0.7**2, 0.05),
        'backbone.stages.3.3.mlp.fc1.weight': (0.7, 0.05),
        'roi_head.bbox_head.2.shared_convs.0.conv.weight': (1., 0.05),
        'roi_head.bbox_head.2.shared_convs.0.bn.weight': (1., 0.),
    },
    ADE20K: {
        # By stages, all downsampling with the stem; num_layers = 6 counts
        # nevertheless, as in ConvNeXt's code.
        'backbone.downsample_layers.0.0.weight': (0.9**7, 0.05),
        'backbone.downsample_layers.3.1.weight': (0.9**7, 0.05),
        'backbone.stages.0.0.attn.v.weight': (0.9**6, 0.05),
        'backbone.stages.1.0.attn.v.weight': (0.9**5, 0.05),
        'backbone.stages.2.0.attn.v.weight': (0.9**4, 0.05),
        'backbone.stages.2.11.attn.v.bias': (0.9**4, 0.),
        'backbone.stages.3.0.attn.v.weight': (0.9**3, 0.05),
        'backbone.norm3.bias': (1., 0.),
        'decode_head.conv_seg.weight': (1., 0.05),
        'auxiliary_head.convs.0.bn.weight': (1., 0.),
    },
}


@pytest.mark.parametrize('config', GROUPS)
def test_groups_of_the_optimizer_are_as_expected(config):
    cfg = load(config)
    model = build_model(cfg)
    groups = {
        name: (group['lr_scale'], group['weight_decay'])
        for group in build_optim_wrapper(model, cfg.optim_wrapper).param_groups
        for name in group.get('names', ())
    }
    assert set(groups) == {
        name
        for name, p in model.named_parameters() if p.requires_grad
    }
    for name, expected in GROUPS[config].items():
        assert groups[name] == pytest.approx(expected), name
    for name, p in model.named_parameters():
        if p.ndim == 1 or name.endswith('.bias'):
            assert groups[name][1] == 0, name


@pytest.mark.parametrize('config', [
    path for path in RECIPES if path.parts[0] == 'detection'
], ids=lambda path: path.stem)
def test_detection_trains_for_one_or_three_times_the_schedule(config):
    cfg = load(config)
    epochs, steps = (12, [8, 11]) if '1x' in config.stem else (36, [27, 33])
    warm_up, falls = cfg.param_scheduler
    assert (warm_up.start_factor, warm_up.end, warm_up.by_epoch) == (
        0.001, 1000, False)
    assert (cfg.train_cfg.max_epochs, falls.end, falls.milestones,
            falls.gamma) == (epochs, epochs, steps, 0.1)
    pipeline = cfg.train_dataloader.dataset.pipeline
    crops = [t for t in pipeline if t.type == 'RandomChoice']
    assert len(crops) == (0 if '1x' in config.stem else 1)
    for choice in crops:
        whole, (before, crop, after) = choice.transforms
        assert whole[0].scales == after.scales == [
            (short, 1333) for short in range(480, 801, 32)]
        assert before.scales == [(400, 1333), (500, 1333), (600, 1333)]
        assert crop.crop_size == (384, 600)
    assert cfg.val_evaluator.metric == ['bbox', 'segm']


def test_cascade_has_the_heads_of_the_recipe():
    heads = load(CASCADE).model.roi_head.bbox_head
    assert [head.bbox_coder.target_stds for head in heads] == [
        [0.1, 0.1, 0.2, 0.2], [0.05, 0.05, 0.1, 0.1],
        [0.033, 0.033, 0.067, 0.067]]
    for head in heads:
        assert head.type == 'Shared4Conv1FCBBoxHead'
        assert head.norm_cfg.type == 'SyncBN'
        assert not head.reg_class_agnostic and head.reg_decoded_bbox
        assert (head.loss_bbox.type, head.loss_bbox.loss_weight) == (
            'GIoULoss', 10)


@pytest.mark.parametrize('size', ['n', 't', 's', 'b', 'l'])
def test_segmentation_slides_and_decays_to_zero(size):
    cfg = load(f'segmentation/upernet_conv2former_{size}_ade20k.py')
    warm_up, poly = cfg.param_scheduler
    assert (warm_up.start_factor, warm_up.end) == (1e-6, 1500)
    assert warm_up.by_epoch is poly.by_epoch is False
    assert (poly.power, poly.begin, poly.end, poly.eta_min) == (1, 1500,
                                                                160000, 0)
    assert cfg.train_cfg.max_iters == 160000
    crop, stride = (640, 426) if size == 'l' else (512, 341)
    test_cfg = cfg.model.test_cfg
    assert (test_cfg.mode, test_cfg.crop_size, test_cfg.stride) == (
        'slide', (crop, crop), (stride, stride))
    assert cfg.model.data_preprocessor.size == (crop, crop)
    pipeline = cfg.train_dataloader.dataset.pipeline
    assert [t.type for t in pipeline] == [
        'LoadImageFromFile', 'LoadAnnotations', 'RandomResize', 'RandomCrop',
        'RandomFlip', 'PhotoMetricDistortion', 'PackSegInputs']
    resize, random_crop, flip = pipeline[2:5]
    assert (resize.scale, random_crop.crop_size) == ((4 * crop, crop),
                                                     (crop, crop))
    assert (resize.ratio_range, random_crop.cat_max_ratio, flip.prob) == (
        (0.5, 2.0), 0.75, 0.5)
    for head, weight in ((cfg.model.decode_head, 1.0),
                         (cfg.model.auxiliary_head, 0.4)):
        assert head.loss_decode.loss_weight == weight
        assert head.norm_cfg.type == 'SyncBN'
    assert cfg.test_dataloader.dataset.pipeline[1].scale == (4 * crop, crop)
    scales = [t.scale for t in cfg.tta_pipeline[1].transforms[0]]
    assert scales == [(int(4 * crop * r), int(crop * r))
                      for r in (0.5, 0.75, 1.0, 1.25, 1.5, 1.75)]
    flips = cfg.tta_pipeline[1].transforms[1]
    assert [flip.prob for flip in flips] == [0., 1.]


@pytest.mark.parametrize('config', [
    IN1K, 'classification/conv2former_l_in22k.py', FINE_TUNED])
def test_classification_is_augmented_as_published(config):
    cfg = load(config)
    _, crop, flip, augment, erase, _ = cfg.train_dataloader.dataset.pipeline
    assert crop.interpolation == 'bicubic'
    assert (flip.prob, flip.direction) == (0.5, 'horizontal')
    assert (augment.policies, augment.num_policies, augment.magnitude_level,
            augment.magnitude_std) == ('timm_increasing', 2, 9, 0.5)
    assert erase.erase_prob == 0.25
    # Images are BGR there, and RGB behind the preprocessor.
    assert erase.fill_color == cfg.data_preprocessor.mean[::-1]
    assert erase.fill_std == cfg.data_preprocessor.std[::-1]
    assert augment.hparams.pad_val == [
        round(x) for x in cfg.data_preprocessor.mean[::-1]]
    loss = cfg.model.head.loss
    assert (loss.type, loss.label_smooth_val) == ('LabelSmoothLoss', 0.1)
    mixed = [(a.type, a.alpha)
             for a in (cfg.model.get('train_cfg') or {}).get('augments', ())]
    assert mixed == ([] if config == FINE_TUNED else
                     [('Mixup', 0.8), ('CutMix', 1.)])


@pytest.mark.parametrize('config', LEAVES, ids=lambda path: path.stem)
def test_images_are_normalised_as_in_the_pre_training(config):
    cfg = load(config)
    settings = cfg.model.get('data_preprocessor') or cfg.data_preprocessor
    assert settings.mean == [123.675, 116.28, 103.53]
    assert settings.std == [58.395, 57.12, 57.375]
    assert settings.get('to_rgb') or settings.get('bgr_to_rgb')


@pytest.mark.parametrize('config', RECIPES, ids=lambda path: path.stem)
def test_best_checkpoint_is_the_one_of_the_greatest_metric(config):
    cfg = load(config)
    keep = cfg.default_hooks.checkpoint
    metric = dict(classification='auto', detection='coco/bbox_mAP',
                  segmentation='mIoU')[config.parts[0]]
    assert (keep.save_best, keep.rule) == (
        metric if cfg.val_dataloader else None, 'greater')


@pytest.mark.parametrize('config, size, edge', [
    (IN1K, 224, 248),
    (FINE_TUNED, 224, 248),
    ('classification/conv2former_l_in22k_ft_in1k_384.py', 384, 426),
])
def test_classification_is_evaluated_on_the_central_90_percent(
        config, size, edge):
    cfg = load(config)
    assert cfg.train_dataloader.dataset.pipeline[1].scale == size
    for pipeline in (cfg.test_dataloader.dataset.pipeline,
                     cfg.val_dataloader.dataset.pipeline, cfg.tta_pipeline):
        assert pipeline[1].scale == edge == int(size / 0.9)
        assert pipeline[1].interpolation == 'bicubic'
        assert pipeline[2].crop_size == size
    flips = cfg.tta_pipeline[-1].transforms[0]
    assert [flip.prob for flip in flips] == [0., 1.]


def test_ablations_change_one_setting_of_the_main_model():
    ablations = [path for path in LEAVES if 'ablation' in path.parts]
    seen = set()
    for path in ablations:
        main, change, value = re.fullmatch(
            r'(conv2former_[tb])_(kernel|)(\w+)_in1k', path.stem).groups()
        setting = dict(kernel_size=int(value)) if change else dict(
            fusion=value)
        cfg = load(path)
        reference = load(f'classification/{main}_in1k.py')
        reference.model.backbone.update(setting)
        assert cfg.to_dict() == reference.to_dict()
        assert (CONFIGS / path).read_text().startswith('"""Ablation: ')
        seen.add((main[-1], value))
    # An 11x11 kernel and the Hadamard product are the main models.
    assert seen == {(m, k) for m in 'tb'
                    for k in ('5', '7', '9', '15', '21')} | {
                        ('t', f) for f in ('sum', 'sigmoid', 'l1', 'linear')}


def rates(cfg, tmp_path, epoch_length=4):
    """The learning rate of each iteration, for the first group."""
    runner, schedulers = build_schedules(cfg, tmp_path, epoch_length)
    seen = []
    for _ in range(cfg.train_cfg.max_epochs):
        for _ in range(epoch_length):
            seen.append(runner.optim_wrapper.get_lr()['lr'][0])
            for scheduler in schedulers:
                if not scheduler.by_epoch:
                    scheduler.step()
        for scheduler in schedulers:
            if scheduler.by_epoch:
                scheduler.step()
    return torch.tensor(seen)


@pytest.mark.parametrize('config, epochs', [
    (IN1K, 300), ('classification/conv2former_l_in22k.py', 90)])
def test_classification_warms_up_and_falls_along_a_cosine(
        config, epochs, tmp_path):
    by_epoch = rates(load(config), tmp_path)[::4]
    assert len(by_epoch) == epochs
    assert by_epoch[0] == pytest.approx(1e-6)
    assert (by_epoch[:6].diff() > 0).all() and (by_epoch[5:].diff() < 0).all()
    assert by_epoch[5] == by_epoch.max() == pytest.approx(1e-3, rel=0.06)
    assert by_epoch[-1] == pytest.approx(1e-6, abs=1e-6)


def test_fine_tuning_falls_along_a_cosine_from_the_start(tmp_path):
    seen = rates(load(FINE_TUNED), tmp_path)
    assert len(seen) == 30 * 4 and (seen.diff() < 0).all()
    assert seen[0] == pytest.approx(5e-5)
    assert seen[-1] == pytest.approx(1e-6, rel=0.1)


def test_every_group_falls_along_its_own_cosine(tmp_path):
    share = 0.8**12
    runner, schedulers = build_schedules(
        load(FINE_TUNED), tmp_path, paramwise_cfg=dict(
            custom_keys=dict(bias=dict(lr_mult=share))))
    for _ in range(30 * 4):
        weight, bias = runner.optim_wrapper.get_lr()['lr']
        assert bias == pytest.approx(weight * share)
        for scheduler in schedulers:
            scheduler.step()
    assert weight == pytest.approx(1e-6, rel=0.1)


@pytest.mark.parametrize('config', RECIPES, ids=lambda path: path.stem)
def test_statistics_of_batch_norms_are_averaged_over_processes(config):
    assert dict(type='SyncBuffersHook') in load(config).custom_hooks


def test_22k_pretraining_has_its_classes_and_no_validation():
    cfg = load('classification/conv2former_l_in22k.py')
    assert cfg.model.head.num_classes == 21841
    assert cfg.data_preprocessor.num_classes == 21841
    assert not cfg.val_dataloader and not cfg.val_cfg


def test_fine_tuning_takes_the_neck_and_starts_the_head_near_zero():
    model = load(FINE_TUNED).model
    assert model.neck.init_cfg == model.backbone.init_cfg
    assert model.head.num_classes == 1000
    assert model.head.init_cfg.std == pytest.approx(2e-5)
    assert model.get('train_cfg') is None  # no mixup, no cutmix
