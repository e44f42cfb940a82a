"""Layer-wise learning-rate decay: groups, scales, errors, resuming."""
import logging

import pytest
import torch
from mmengine.config import Config
from mmengine.logging import MMLogger
from mmengine.optim import CosineAnnealingParamScheduler
from mmengine.registry import OPTIM_WRAPPER_CONSTRUCTORS
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from mmconv2former import Conv2Former, LayerDecayOptimWrapperConstructor
from mmconv2former.checkpoint import CheckpointError
from mmconv2former.layer_decay import describe_groups

MINI = dict(depths=[1, 1, 2, 1], dims=[8, 16, 24, 32], kernel_size=3)
LR, WD = 1e-3, 0.05


class Model(nn.Module):

    def __init__(self, backbone=None, **kwargs):
        super().__init__()
        self.backbone = backbone or Conv2Former(
            MINI, out_indices=(0, 1, 2, 3), out_norm=True, **kwargs)
        self.head = nn.Linear(32, 10)


def build(model, optimizer=None, **paramwise_cfg):
    return LayerDecayOptimWrapperConstructor(
        dict(
            type='OptimWrapper',
            optimizer=optimizer or dict(
                type='AdamW', lr=LR, weight_decay=WD)), paramwise_cfg)(model)


def settings(model, optim_wrapper):
    """name -> (lr scale, weight decay)"""
    names = {id(p): name for name, p in model.named_parameters()}
    return {
        names[id(p)]: (pytest.approx(group['lr'] / LR), group['weight_decay'])
        for group in optim_wrapper.optimizer.param_groups
        for p in group['params']
    }


def test_layer_wise_scales_and_weight_decay_follow_the_expected_table():
    model = Model()
    found = settings(
        model,
        build(model, decay_rate=.5, decay_type='layer_wise', num_layers=6,
              norm_decay_mult=0., bias_decay_mult=0., flat_decay_mult=0.))
    expected = {
        'backbone.downsample_layers.0.0.weight': (.5**7, WD),
        'backbone.downsample_layers.0.2.weight': (.5**7, 0.),
        'backbone.stages.0.0.attn.proj.weight': (.5**6, WD),
        'backbone.stages.0.0.attn.proj.bias': (.5**6, 0.),
        'backbone.stages.0.0.attn.norm.weight': (.5**6, 0.),
        'backbone.stages.0.0.layer_scale_1': (.5**6, 0.),
        'backbone.downsample_layers.1.1.weight': (.5**5, WD),
        'backbone.stages.1.0.mlp.pos.weight': (.5**5, WD),
        'backbone.downsample_layers.2.0.bias': (.5**4, 0.),
        'backbone.stages.2.0.mlp.fc1.weight': (.5**4, WD),
        'backbone.stages.2.1.mlp.fc1.weight': (.5**3, WD),
        'backbone.downsample_layers.3.1.weight': (.5, WD),
        'backbone.stages.3.0.attn.v.weight': (.5, WD),
        'backbone.norm0.weight': (1., 0.),
        'head.weight': (1., WD),
        'head.bias': (1., 0.),
    }
    assert {name: found[name] for name in expected} == expected
    assert set(found) == {name for name, _ in model.named_parameters()}


def test_stage_wise_scales_follow_convnexts_map():
    model = Model()
    found = settings(model, build(model, decay_rate=.5, num_layers=6,
                                  decay_type='stage_wise'))
    for name, scale in {
            'downsample_layers.0.0.weight': .5**7,
            'downsample_layers.3.1.weight': .5**7,
            'stages.0.0.attn.v.weight': .5**6,
            'stages.2.1.attn.v.weight': .5**4,
            'stages.3.0.attn.v.weight': .5**3,
            'norm3.weight': 1.
    }.items():
        assert found['backbone.' + name] == (scale, WD)


@pytest.mark.parametrize('arch', ['n', 't', 's', 'b', 'l', 'is'])
@pytest.mark.parametrize('num_layers', [None, 6, 12, 18])
def test_depths_rise_evenly_and_never_reach_the_head(arch, num_layers):
    with torch.device('meta'):
        backbone = Conv2Former(arch)
    depths = backbone.arch['depths']
    deep = max(len(depths) - 2, 0)
    default = 12 if arch in ('s', 'b', 'l') else 18 if arch == 'is' else 6
    sizes = [0] * 100
    last = 0
    for block in range(depths[deep]):
        depth, total = backbone.get_layer_depth(
            f'backbone.stages.{deep}.{block}.layer_scale_1', 'backbone.',
            num_layers)
        assert total == (num_layers or default) + 2
        assert last <= depth < total - 1
        last = depth
        sizes[depth] += 1
    used = [size for size in sizes if size]
    if depths[deep] >= total - 2:  # blocks enough for every layer
        assert max(used) - min(used) <= 1
        assert last == total - 2 - (len(depths) > 1)
    assert backbone.get_layer_depth('head.fc.weight', 'backbone.',
                                    num_layers) == (total - 1, total)


def test_groups_are_few_stable_and_cover_each_parameter_once():
    with torch.device('meta'):
        model = Model(Conv2Former('s', out_norm=True))
    options = dict(decay_rate=.8, num_layers=12, norm_decay_mult=0.,
                   bias_decay_mult=0., flat_decay_mult=0.)
    groups = build(model, **options).optimizer.param_groups
    assert len(groups) == 2 * 14
    keys = [(group['layer'], -group['weight_decay']) for group in groups]
    assert keys == sorted(set(keys))
    assert max(group['lr_scale'] for group in groups) == 1.
    params = [id(p) for group in groups for p in group['params']]
    assert len(params) == len(set(params)) == len(list(model.parameters()))
    again = build(model, **options).optimizer.param_groups
    assert [g['names'] for g in groups] == [g['names'] for g in again]


def test_custom_keys_act_on_top_of_the_decay():
    model = Model()
    found = settings(
        model,
        build(model, decay_rate=.5, num_layers=6, custom_keys={
            'stages.3': dict(lr_mult=2., decay_mult=0.),
            'head': dict(lr_mult=10.)
        }))
    assert found['backbone.stages.3.0.attn.v.weight'] == (1., 0.)
    assert found['head.weight'] == (10., WD)
    assert found['backbone.stages.2.1.attn.v.weight'] == (.5**3, WD)


def test_frozen_parameters_are_left_out_and_one_table_is_logged():
    records = []
    handler = logging.Handler(logging.INFO)
    handler.emit = lambda record: records.append(record.getMessage())
    logger = MMLogger.get_instance('decay', logger_name='decay')
    logger.addHandler(handler)
    model = Model(frozen_stages=1)
    optimizer = build(model, decay_rate=.5, num_layers=6).optimizer
    names = {n for group in optimizer.param_groups for n in group['names']}
    assert names == {
        n for n, p in model.named_parameters() if p.requires_grad}
    assert 'backbone.stages.0.0.layer_scale_1' not in names
    table, = records
    assert table.split()[:6] == ['layer', 'lr', 'scale', 'weight', 'decay',
                                 'tensors']
    assert f'frozen: {len(list(model.parameters())) - len(names)}' in table
    assert len(table.splitlines()) == len(optimizer.param_groups) + 2


@pytest.mark.parametrize('disabled', [True, False])
def test_logger_is_left_as_it_was(disabled):
    logger = MMLogger.get_instance('decay', logger_name='decay')
    logger.disabled = disabled
    try:
        build(Model(), decay_rate=.5, num_layers=6)
        assert logger.disabled == disabled
    finally:
        logger.disabled = False


def test_distributed_wrapper_and_bare_backbone_work(tmp_path):
    torch.distributed.init_process_group(
        'gloo', init_method=f'file://{tmp_path}/store', rank=0, world_size=1)
    try:
        wrapped = build(
            DistributedDataParallel(Model()), decay_rate=.5, num_layers=6)
    finally:
        torch.distributed.destroy_process_group()
    plain = build(Model(), decay_rate=.5, num_layers=6)
    assert [g['names'] for g in wrapped.optimizer.param_groups
            ] == [g['names'] for g in plain.optimizer.param_groups]
    bare = build(Conv2Former(MINI), decay_rate=.5)
    assert bare.optimizer.param_groups[0]['lr'] == pytest.approx(LR * .5**7)


@pytest.mark.parametrize('wrap', [
    torch.compile,
    lambda model: setattr(model, 'backbone',
                          torch.compile(model.backbone)) or model])
def test_compiled_models_have_the_same_groups(wrap):
    own, plain = build(wrap(Model()), decay_rate=.5), build(
        Model(), decay_rate=.5)
    assert describe_groups(own.optimizer.param_groups) == describe_groups(
        plain.optimizer.param_groups)
    assert [g['names'] for g in own.optimizer.param_groups
            ] == [g['names'] for g in plain.optimizer.param_groups]


def test_a_backbone_without_parameters_is_no_fault():

    class Backbone(nn.Identity):

        def get_layer_depth(self, param_name, prefix=''):
            return 3, 4

    model = Model()
    alone = settings(model, build(model, decay_rate=.5, num_layers=6))
    model.other = Backbone()
    assert settings(model, build(model, decay_rate=.5,
                                 num_layers=6)) == alone


def test_backbones_whose_layers_are_not_found_are_refused():

    class Backbone(nn.Linear):

        def get_layer_depth(self, param_name, prefix=''):
            known = param_name.startswith(prefix + 'stages.')
            return (0 if known else 3), 4

    model = Model()
    model.other = Backbone(2, 2)
    with pytest.raises(ValueError, match='no layer of the backbone: by get_lay'
                       r'er_depth of Backbone all 2 .*the first is other\.we'):
        build(model, decay_rate=.5)


def test_mmpretrains_constructor_and_backbones_work_too():
    pretrain = pytest.importorskip('mmpretrain')
    model = pretrain.get_model(
        Config(dict(model=dict(
            type='ImageClassifier', backbone=dict(
                type='mmconv2former.Conv2Former', arch=MINI)))))
    optim_wrapper = OPTIM_WRAPPER_CONSTRUCTORS.build(
        dict(type='mmpretrain.LearningRateDecayOptimWrapperConstructor',
             optim_wrapper_cfg=dict(optimizer=dict(
                 type='AdamW', lr=LR, weight_decay=WD)),
             paramwise_cfg=dict(layer_decay_rate=.5)))(model)
    assert settings(model, optim_wrapper)[
        'backbone.stages.3.0.attn.v.weight'] == (.5, WD)

    convnext = pretrain.models.ConvNeXt(
        dict(depths=[1, 1, 2, 1], channels=[8, 8, 8, 8]))
    model = Model(convnext)
    found = settings(model, build(model, decay_rate=.5, num_layers=6))
    assert found['backbone.downsample_layers.0.0.weight'] == (.5**7, WD)
    with pytest.raises(ValueError, match='counts 6 layers and num_layers is '
                                         '12; set num_layers=6 or leave'):
        build(model, decay_rate=.5, num_layers=12)
    with pytest.raises(ValueError, match='knows layer_wise decay only'):
        build(model, decay_rate=.5, decay_type='stage_wise')

    classifier = pretrain.models.ImageClassifier(dict(
        type='mmconv2former.Conv2Former', arch=MINI))
    found = settings(classifier, build(classifier, decay_rate=.5))
    assert found['backbone.downsample_layers.0.0.weight'] == (.5**7, WD)


@pytest.mark.parametrize('paramwise_cfg, message', [
    (dict(decay_rate=.9, layer_decay=.9), 'unknown keys.*: layer_decay;.*deca'
     'y_rate, decay_type, num_layers'),
    (dict(num_layers=6), r'decay_rate in \(0, 1\], got None'),
    (dict(decay_rate=1.1), r'decay_rate in \(0, 1\], got 1.1'),
    (dict(decay_rate=0), r'decay_rate in \(0, 1\], got 0'),
    (dict(decay_rate=.9, decay_type='block'), "'layer_wise' or 'stage_wise'"),
    (dict(decay_rate=.9, num_layers=3), 'at least 4, the number of stages'),
    (dict(decay_rate=.9, num_layers=6.5), 'an integer of .* got 6.5'),
    (dict(decay_rate=.9, num_layers='6'), "an integer of .* got '6'"),
    (dict(decay_rate=.9, custom_keys=dict(head=.1)),
     r"custom_keys\['head'\] of paramwise_cfg must be a dict .* got 0.1"),
])
def test_bad_settings_are_named(paramwise_cfg, message):
    with pytest.raises(ValueError, match=message):
        build(Model(), **paramwise_cfg)


def test_backbone_without_depths_is_told_what_to_implement():
    backbone = nn.Module()
    backbone.stages = nn.ModuleList([nn.Linear(2, 2)])
    for model in (Model(backbone), backbone):
        with pytest.raises(TypeError, match=r'get_layer_depth\(self, param_'):
            build(model, decay_rate=.9)


def test_backbones_anywhere_in_a_model_decay():
    model = Model()
    own = settings(model, build(model, decay_rate=.5))
    parts = dict(student=Model(), teacher=Model().requires_grad_(False))
    # Two streams, the second with other layers; one in a list.
    parts['student'].depth_backbone = Conv2Former(dict(
        depths=(1, 2), dims=(16, 16), kernel_size=3))
    parts['encoder'] = nn.Sequential(Model().backbone, nn.Linear(32, 2))
    model = nn.ModuleDict(parts)
    found = settings(model, build(model, decay_rate=.5))
    assert {name.partition('.')[0] for name in found} == {'student', 'encoder'}
    for name, expected in own.items():
        assert found[f'student.{name}'] == expected
        if name.startswith('backbone.'):
            _, _, name = name.partition('.')
            assert found[f'encoder.0.{name}'] == expected
    assert found['encoder.1.weight'] == found['student.head.weight'] == (1, WD)
    stream = 'student.depth_backbone.'
    assert [found[stream + name][0] for name in (
        'downsample_layers.0.0.weight', 'stages.0.0.attn.v.weight',
        'stages.1.1.attn.v.weight')] == [.5**7, .5**6, .5]


def test_default_weight_decay_of_the_optimizer_holds():
    optim_wrapper = build(Model(), optimizer=dict(type='AdamW', lr=LR),
                          decay_rate=.5)
    assert {group['weight_decay']
            for group in optim_wrapper.optimizer.param_groups} == {.01}


def test_layers_that_share_weights_learn_once():
    model = Model()
    model.other = nn.Linear(32, 10)
    model.other.weight = model.head.weight
    before = model.head.weight.detach().clone()
    optim_wrapper = build(model, decay_rate=.5)
    model.head.weight.grad = torch.ones_like(before)
    optim_wrapper.optimizer.step()
    # AdamW's first step is as long as the rate.
    torch.testing.assert_close(model.head.weight,
                               before * (1 - LR * WD) - LR)
    with pytest.raises(ValueError, match='leave out bypass_duplicate=False'):
        build(model, decay_rate=.5, bypass_duplicate=False)


def train_a_step(model, optim_wrapper):
    out = model.backbone(torch.rand(2, 3, 32, 32))[-1].mean((2, 3))
    optim_wrapper.update_params(model.head(out).square().mean())


def test_resuming_continues_with_the_same_groups():
    model = Model()
    optim_wrapper = build(model, decay_rate=.5, num_layers=6)
    train_a_step(model, optim_wrapper)
    saved = optim_wrapper.state_dict()
    again = build(model, decay_rate=.5, num_layers=6)
    again.load_state_dict(saved)
    for old, new in zip(optim_wrapper.optimizer.state.values(),
                        again.optimizer.state.values(), strict=True):
        assert torch.equal(old['exp_avg'], new['exp_avg'])


def test_resuming_goes_on_with_another_base_rate():
    """The scales are quotients, which differ in the last digit."""
    scales = []
    for lr in 1e-4, 7.5e-5, 1.1e-3, 3e-4, 1e-3 / 3:
        optimizer = dict(type='AdamW', lr=lr, weight_decay=WD)
        model = Model()
        again = build(model, optimizer, decay_rate=.95)
        again.load_state_dict(
            build(Model(), decay_rate=.95).state_dict())
        scales.append([group['lr_scale'] for group in build(
            model, optimizer, decay_rate=.95).optimizer.param_groups])
    assert any(scale != scales[0] for scale in scales)


def test_runs_with_a_schedule_of_the_weight_decay_are_resumed():
    runs = []
    for steps in 3, 0:
        optim_wrapper = build(Model(), decay_rate=.5)
        schedule = CosineAnnealingParamScheduler(
            optim_wrapper, 'weight_decay', eta_min=WD / 10, T_max=9,
            by_epoch=False)
        for _ in range(steps):
            optim_wrapper.step()
            schedule.step()
        runs.append(optim_wrapper)
    saved, own = runs
    assert saved.param_groups[0]['weight_decay'] < WD
    own.load_state_dict(saved.state_dict())
    assert own.param_groups[0]['weight_decay'] < WD


def test_a_process_resumes_its_share_of_the_state():
    """Of what others have, ZeroRedundancyOptimizer makes None."""
    model, sgd = Model(), dict(type='SGD', lr=LR, momentum=.9)
    optim_wrapper = build(model, sgd, decay_rate=.5)
    train_a_step(model, optim_wrapper)
    saved = optim_wrapper.state_dict()
    saved['state'] = {number: value if number % 2 else None
                      for number, value in saved['state'].items()}
    again = build(Model(), sgd, decay_rate=.5)
    again.load_state_dict(saved)
    kept = list(filter(None, again.optimizer.state.values()))
    assert kept and len(kept) == len(saved['state']) // 2


@pytest.mark.parametrize('change', [
    dict(decay_rate=.6), dict(num_layers=8), dict(norm_decay_mult=0.)])
def test_resuming_with_other_groups_names_both_sets(change):
    options = dict(decay_rate=.5, num_layers=6)
    saved = build(Model(), **options).state_dict()
    other = build(Model(), **{**options, **change})
    with pytest.raises(CheckpointError, match=(
            r'(?s)cannot be resumed.*In the checkpoint:\n.*layer.*In this '
            r'config:\n.*layer')):
        other.load_state_dict(saved)


@pytest.mark.parametrize('optimizer', [
    dict(type='AdamW', lr=LR), dict(type='SGD', lr=LR, momentum=.9),
    dict(type='Adagrad', lr=LR)])
def test_resuming_with_parameters_of_another_shape_is_refused(optimizer):
    """A fused optimizer would read beyond the end of the saved averages."""
    model = Model()
    optim_wrapper = build(model, optimizer, decay_rate=.5, num_layers=6)
    train_a_step(model, optim_wrapper)
    wider = Model(Conv2Former(MINI, mlp_ratio=2, out_norm=True,
                              out_indices=(0, 1, 2, 3)))
    with pytest.raises(CheckpointError, match=(
            'was trained with backbone.stages.0.0.mlp.fc1.* of shape')):
        build(wider, optimizer, decay_rate=.5, num_layers=6).load_state_dict(
            optim_wrapper.state_dict())


def test_optimizers_with_state_of_other_shapes_resume():
    """Adafactor keeps sums over rows and columns."""
    model, adafactor = Model(), dict(type=torch.optim.Adafactor, lr=LR)
    optim_wrapper = build(model, adafactor, decay_rate=.5)
    train_a_step(model, optim_wrapper)
    again = build(model, adafactor, decay_rate=.5)
    again.load_state_dict(optim_wrapper.state_dict())
    for old, new in zip(optim_wrapper.optimizer.state.values(),
                        again.optimizer.state.values(), strict=True):
        for name in old:
            assert torch.equal(old[name], new[name]), name


def test_resuming_with_another_model_names_the_parameters():
    saved = build(Model(), decay_rate=.5, num_layers=6).state_dict()
    deeper = Model(Conv2Former({**MINI, 'depths': [1, 1, 3, 1]},
                               out_indices=(0, 1, 2, 3), out_norm=True))
    with pytest.raises(ValueError, match=r'Only in this model: backbone.stag'
                       r'es.2.2'):
        build(deeper, decay_rate=.5, num_layers=6).load_state_dict(saved)


def test_decay_rate_of_one_leaves_the_base_rate_everywhere():
    groups = build(Model(), decay_rate=1).optimizer.param_groups
    assert {group['lr'] for group in groups} == {LR}


@pytest.mark.parametrize('options, name', [
    (dict(norm_decay_mult=0.), 'norm_decay_mult'),
    (dict(custom_keys={'head': dict(decay_mult=0.)}),
     r"custom_keys\['head'\]\.decay_mult")])
def test_multipliers_of_a_weight_decay_that_is_not_set_are_refused(
        options, name):
    with pytest.raises(ValueError, match=(
            f'{name} of paramwise_cfg needs weight_decay in the optimizer')):
        build(Model(), dict(type='AdamW', lr=LR), decay_rate=.5, **options)
    # One that is set to nothing is set.
    none = dict(type='AdamW', lr=LR, weight_decay=0.)
    groups = build(Model(), none, decay_rate=.5, **options)
    assert {g['weight_decay'] for g in groups.optimizer.param_groups} == {0.}


def test_learning_rate_may_begin_at_nothing():
    groups = build(Model(), dict(type='AdamW', lr=0.), decay_rate=.5
                   ).optimizer.param_groups
    assert [group['lr_scale'] for group in groups] == [
        group['lr_scale'] for group in build(
            Model(), decay_rate=.5).optimizer.param_groups]


def test_optimizers_without_weight_decay_work():
    groups = build(Model(), dict(type='SGD', lr=LR),
                   decay_rate=.5).optimizer.param_groups
    assert {group['weight_decay'] for group in groups} == {0.}


def test_optimizer_without_a_rate_is_named():
    with pytest.raises(ValueError, match='decay needs lr in the optimizer'):
        build(Model(), dict(type='AdamW'), decay_rate=.5)


def test_resuming_with_another_weight_decay_is_refused():
    saved = build(Model(), decay_rate=.5).state_dict()
    other = build(Model(), dict(type='AdamW', lr=LR, weight_decay=2 * WD),
                  decay_rate=.5)
    with pytest.raises(CheckpointError, match='cannot be resumed'):
        other.load_state_dict(saved)


def test_resuming_from_training_without_decay_is_refused():
    model = Model()
    saved = torch.optim.AdamW(model.parameters(), lr=LR).state_dict()
    with pytest.raises(CheckpointError, match=(
            'trained without LayerDecayOptimWrapperConstructor.*cannot be '
            r'resumed.*load the weights alone \(load_from=')):
        build(model, decay_rate=.5).optimizer.load_state_dict(saved)


def test_table_has_the_multipliers_of_custom_keys_in_it():
    groups = build(Model(), decay_rate=.5, custom_keys={
        'head': dict(lr_mult=10.)}).optimizer.param_groups
    assert groups[-1]['lr_scale'] == pytest.approx(10.)


def test_other_options_of_custom_keys_have_groups_of_their_own():
    groups = build(Model(), decay_rate=.5, custom_keys={
        'head.weight': dict(betas=(.5, .9))}).optimizer.param_groups
    assert [group['betas'] for group in groups if 'head.weight' in
            group['names']] == [(.5, .9)]
    assert [group['betas'] for group in groups if 'head.bias' in
            group['names']] == [(.9, .999)]
