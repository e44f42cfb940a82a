"""Pre-trained weights: every layout loads, everything else is refused."""
import argparse
import hashlib
import logging
import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from mmengine.logging import HistoryBuffer, MMLogger
from mmengine.model import ModuleDict, PretrainedInit
from torch import nn

import convert_checkpoint
import official
from mmconv2former import (
    Conv2Former,
    Conv2FormerNeck,
    fuse_for_inference,
)
from mmconv2former.archs import ARCHS, describe_arch, resolve_arch
from mmconv2former.checkpoint import (
    CheckpointError,
    check_finite,
    find_checkpoint,
    infer_arch,
    load_backbone,
    model_weights,
    read_checkpoint,
    rename_classifier,
    safe_globals,
)

MINI = dict(depths=[1, 1, 2, 1], dims=[8, 16, 24, 32], kernel_size=5)
CONVERT = Path(__file__).parents[1] / 'tools' / 'convert_checkpoint.py'


@pytest.fixture
def log():
    records = []
    handler = logging.Handler(logging.INFO)
    handler.emit = lambda record: records.append(record.getMessage())
    logger = MMLogger.get_instance('checkpoint', logger_name='checkpoint')
    logger.addHandler(handler)
    yield records
    logger.removeHandler(handler)


def official_weights(seed=0, arch=MINI):
    """A random official classifier: names as the authors' code has them."""
    torch.manual_seed(seed)
    backbone = Conv2Former(arch)
    weights = {
        key: torch.rand_like(value) if value.is_floating_point() else value
        for key, value in backbone.state_dict().items()
    }
    width = backbone.arch['dims'][-1]
    weights.update({
        'head.0.weight': torch.rand(1280, width, 1, 1),
        'head.0.bias': torch.rand(1280),
        'head.2.weight': torch.rand(1280),
        'head.2.bias': torch.rand(1280),
        'pred.weight': torch.rand(1000, 1280),
        'pred.bias': torch.rand(1000)
    })
    return weights


def prefixed(weights, prefix):
    return {prefix + key: value for key, value in weights.items()}


def backbone_part(weights):
    return {
        key: value
        for key, value in weights.items()
        if not key.startswith(('head.', 'pred.'))
    }


def mm_weights(weights, prefix='backbone.'):
    return {
        **prefixed(backbone_part(weights), prefix), 'decode_head.w':
        torch.rand(3)
    }


GOOD, OTHER = official_weights(0), official_weights(1)
LAYOUTS = {
    'timm': (dict(state_dict=GOOD, args=argparse.Namespace(lr=1e-3)),
             'weights, ignored: head, pred'),
    'timm with EMA and module.': (dict(
        state_dict=prefixed(OTHER, 'module.'),
        state_dict_ema=prefixed(GOOD, 'module.'),
        args=argparse.Namespace(model='conv2former_t', lr=1e-3), epoch=299),
        'EMA weights, ignored: head, pred'),
    'timm with EMA turned off': (dict(state_dict=GOOD, state_dict_ema=None),
                                 'weights, ignored: head, pred'),
    'ConvNeXt with EMA': (dict(model=OTHER, model_ema=GOOD),
                          'EMA weights, ignored: head, pred'),
    'bare': (GOOD, 'weights, ignored: head, pred'),
    'bare backbone': (backbone_part(GOOD), 'weights'),
    'mmengine': (dict(
        meta=dict(epoch=1),
        state_dict=mm_weights(GOOD),
        message_hub=dict(log_scalars=dict(loss=HistoryBuffer([1.], [1]))),
        optimizer=dict(state={}, param_groups=[])),
        'weights, ignored: decode_head'),
    # mmengine's EMAHook swaps the two when it saves
    'mmengine with EMA': (dict(
        state_dict=mm_weights(GOOD),
        ema_state_dict=prefixed(mm_weights(OTHER), 'module.')),
        'EMA weights, ignored: decode_head'),
    'averaged model': (dict(
        state_dict={**prefixed(mm_weights(GOOD), 'module.'),
                    'steps': torch.tensor(3)}),
        'weights, ignored: decode_head, steps'),
    'dense model with output norms': (dict(
        state_dict={**mm_weights(GOOD), 'backbone.norm7.weight':
                    torch.ones(3)}),
        'weights, ignored: decode_head, output norms'),
}


@pytest.mark.parametrize('layout', LAYOUTS)
@pytest.mark.parametrize('out_norm', [False, True])
def test_every_layout_loads_through_init_cfg(layout, out_norm, tmp_path, log):
    content, notes = LAYOUTS[layout]
    path = str(tmp_path / 'weights.pth')
    torch.save(content, path)
    backbone = Conv2Former(
        MINI, out_indices=(0, 1, 2, 3), out_norm=out_norm,
        init_cfg=dict(type='Pretrained', checkpoint=path))
    backbone.init_weights()
    for name, value in backbone.state_dict().items():
        if not name.startswith('norm'):
            assert torch.equal(value, GOOD[name]), name
    count = len(backbone_part(GOOD))
    if out_norm:
        kind, *rest = notes.split(', ', 1)
        notes = ', '.join([kind, 'new: norm0, norm1, norm2, norm3', *rest])
    assert [line for line in log if line.startswith('loaded')] == [
        f'loaded {count} of {count} backbone tensors from {path}, {notes}']


def neck_of(path, out_channels=None):
    neck = Conv2FormerNeck(
        GOOD['head.0.weight'].shape[1],
        out_channels or len(GOOD['head.0.weight']),
        init_cfg=dict(type='Pretrained', checkpoint=str(path)))
    neck.init_weights()
    return neck


@pytest.mark.parametrize('layout', [
    'timm with EMA and module.', 'bare'])
def test_neck_loads_the_head_of_a_classifier(layout, tmp_path, log):
    content, _ = LAYOUTS[layout]
    torch.save(content, tmp_path / 'weights.pth')
    neck = neck_of(tmp_path / 'weights.pth')
    for name, key in (('conv', 'head.0'), ('norm', 'head.2')):
        for leaf in ('weight', 'bias'):
            assert torch.equal(neck.state_dict()[f'{name}.{leaf}'],
                               GOOD[f'{key}.{leaf}'])
    assert any('loaded 4 of 4 neck tensors' in line for line in log)


def test_neck_refuses_a_file_without_head_and_one_of_another_width(tmp_path):
    path = tmp_path / 'weights.pth'
    torch.save(backbone_part(GOOD), path)
    with pytest.raises(CheckpointError, match='no whole classification head'):
        neck_of(path)
    torch.save(GOOD, path)
    with pytest.raises(CheckpointError, match='does not fit the neck.*conv'):
        neck_of(path, out_channels=7)
    with pytest.raises(FileNotFoundError,
                       match='--cfg-options model.neck.init_cfg=None'):
        neck_of(tmp_path / 'none.pth')


def test_neck_loads_from_a_file_without_the_last_layer(tmp_path):
    torch.save(without('pred.'), tmp_path / 'weights.pth')
    neck = neck_of(tmp_path / 'weights.pth')
    assert torch.equal(neck.conv.weight, GOOD['head.0.weight'])


def test_official_weights_load_under_their_own_names(tmp_path, log):
    for arch in ('n', 't'):
        path = tmp_path / f'{arch}.pth'
        torch.save(official.weights(arch), path)
        with torch.device('meta'):
            backbone = Conv2Former(arch)
        backbone.to_empty(device='cpu')
        load_backbone(backbone, str(path))
        weight = backbone.stages[2][1].mlp.fc1.weight
        assert torch.equal(weight, official.tensor(
            'stages.2.1.mlp.fc1.weight', weight.shape))
    assert 'loaded 445 of 445 backbone tensors' in log[-1]


def test_fewer_stages_load_from_a_whole_model(tmp_path, log):
    path = str(tmp_path / 'weights.pth')
    torch.save(GOOD, path)
    load_backbone(Conv2Former(MINI, out_indices=(1, )), path)
    assert log[-1].endswith('ignored: head, later stages, pred')


def test_weights_of_a_model_whose_blocks_were_compiled_are_read(tmp_path):
    path = str(tmp_path / 'weights.pth')
    torch.save({key.replace('.attn.', '._orig_mod.attn.').replace(
        '.mlp.', '._orig_mod.mlp.'): value for key, value in GOOD.items()},
        path)
    backbone = Conv2Former(MINI)
    load_backbone(backbone, path)
    key = 'stages.0.0.attn.v.bias'
    assert torch.equal(backbone.state_dict()[key], GOOD[key])


def test_models_that_cannot_take_weights_say_so(tmp_path):
    path = str(tmp_path / 'weights.pth')
    torch.save(GOOD, path)
    with torch.device('meta'):
        backbone = Conv2Former(MINI)
        neck = Conv2FormerNeck(32, 1280)
    for module in backbone, neck:
        with pytest.raises(CheckpointError, match='meta device.*to_empty'):
            module.load_pretrained(path)
    folded = fuse_for_inference(Conv2Former(MINI).eval())
    with pytest.raises(CheckpointError, match='cannot be loaded after fuse_'):
        load_backbone(folded, path)


def test_unknown_keys_of_init_cfg_are_named(tmp_path):
    path = str(tmp_path / 'weights.pth')
    torch.save(GOOD, path)
    cfg = dict(type='Pretrained', checkpoint=path, map_location='cpu')
    Conv2Former(MINI, init_cfg=cfg).init_weights()
    backbone = Conv2Former(MINI, init_cfg=dict(cfg, prefx='a', revise_keys=[]))
    with pytest.raises(CheckpointError, match='prefx, revise_keys; it may co'):
        backbone.init_weights()


def test_one_of_several_backbones_is_named_by_prefix(tmp_path):
    path = str(tmp_path / 'weights.pth')
    torch.save({**prefixed(GOOD, 'teacher.backbone.'),
                **prefixed(OTHER, 'student.backbone.')}, path)
    backbone = Conv2Former(MINI)
    with pytest.raises(CheckpointError, match='under .teacher.*name one'):
        load_backbone(backbone, path)
    with pytest.raises(CheckpointError, match="instead of prefix='backbone'"):
        load_backbone(backbone, path, prefix='backbone')
    load_backbone(backbone, path, prefix='student.backbone')
    key = 'stages.0.0.attn.v.bias'
    assert torch.equal(backbone.state_dict()[key], OTHER[key])


def without(key):
    return {k: v for k, v in GOOD.items() if not k.startswith(key)}


@pytest.mark.parametrize('content, message', [
    (without('stages.2.1.mlp.pos.weight'),
     r'1 missing: stages.2.1.mlp.pos.weight'),
    (without('downsample_layers'), r'missing: downsample_layers.0.0.weight, .'
     r'* and \d+ more'),
    (official_weights(arch={**MINI, 'depths': [1, 1, 3, 1]}),
     r'the model lacks: stages.2.2.*depths 1-1-3-1.*the model is.*1-1-2-1'),
    (official_weights(arch={**MINI, 'kernel_size': 7}),
     r'of another shape: stages.0.0.attn.att.2.weight \(8, 1, 7, 7\) instead '
     r'of \(8, 1, 5, 5\).*kernel 7\), the model is.*kernel 5'),
    (official_weights(arch={**MINI, 'stem': '3conv'}),
     r'kernel 5, stem 3conv\), the model is arch .*kernel 5\)'),
    ({key: value.to(torch.int8) for key, value in GOOD.items()},
     'of another kind of numbers: .* torch.int8 instead of torch.float32'),
    (nn.Conv2d(3, 8, 3).state_dict(), 'not a Conv2Former.*weight, bias'),
    (dict(state_dict={}), r'no tensors in the checkpoint \(keys: none\)'),
    ([1, 2], r'no tensors in the checkpoint \(a list\)'),
    (dict(net=GOOD, epoch=3), "\\(keys: 'net', 'epoch'\\).*or model"),
])
def test_what_does_not_fit_is_refused_and_changes_nothing(
        content, message, tmp_path):
    path = str(tmp_path / 'weights.pth')
    torch.save(content, path)
    backbone = Conv2Former(
        MINI, init_cfg=dict(type='Pretrained', checkpoint=path))
    before = {k: v.clone() for k, v in backbone.state_dict().items()}
    with pytest.raises(CheckpointError, match='(?s)weights.pth.*' + message):
        backbone.init_weights()
    for key, value in backbone.state_dict().items():
        assert torch.equal(value, before[key])


def test_small_weights_do_not_pass_for_tiny_ones(tmp_path):
    path = str(tmp_path / 's.pth')
    torch.save({k: torch.zeros(v) for k, v in official.SHAPES['s'].items()},
               path)
    with torch.device('meta'):
        backbone = Conv2Former('t')
    with pytest.raises(CheckpointError, match=r"seems to be arch 'small' \(de"
                       r"pths 4-4-32-4.*the model is arch 'tiny'"):
        load_backbone(backbone, path)


def test_kernel_of_the_file_is_named(tmp_path):
    path = str(tmp_path / 'b.pth')
    torch.save({k: torch.zeros(v).expand(v)
                for k, v in official.SHAPES['b_22k'].items()}, path)
    with torch.device('meta'):
        backbone = Conv2Former('b')
    with pytest.raises(CheckpointError, match=r"seems to be arch 'base-22k' .*"
                       r"kernel 7\), the model is arch 'base' "):
        load_backbone(backbone, path)


def test_files_of_old_torch_cut_off_anywhere_are_refused(tmp_path):
    path = tmp_path / 'weights.pth'
    torch.save(dict(weight=torch.ones(2)), path,
               _use_new_zipfile_serialization=False)
    whole = path.read_bytes()
    assert read_checkpoint(str(path))['weight'].tolist() == [1, 1]
    for size in range(len(whole)):
        path.write_bytes(whole[:size])
        with pytest.raises(CheckpointError, match=f'^{path} '):
            read_checkpoint(str(path))


@pytest.mark.parametrize('text', ['Gone', 'Quota exceeded', 'http://a/b.pth'])
def test_texts_in_place_of_weights_are_called_damaged(text, tmp_path):
    path = tmp_path / 'weights.pth'
    path.write_text(text)
    with pytest.raises(CheckpointError, match='is damaged or no checkpoint'):
        read_checkpoint(str(path))


@pytest.mark.parametrize('damage', ['truncated', 'empty', 'text'])
def test_damaged_files_are_called_so(damage, tmp_path):
    path = tmp_path / 'weights.pth'
    torch.save(GOOD, path)
    whole = path.read_bytes()
    path.write_bytes({'truncated': whole[:len(whole) // 2], 'empty': b'',
                      'text': b'<html>not found</html>'}[damage])
    with pytest.raises(CheckpointError, match='weights.pth is damaged or no .*'
                       'fetch or copy it again') as info:
        load_backbone(Conv2Former(MINI), str(path))
    assert 'weights_only' not in str(info.value)  # torch's advice


def test_files_of_another_kind_are_called_so(tmp_path):
    inner = tmp_path / 'weights.pth'
    torch.save(GOOD, inner)
    cases = {'a.safetensors': 'format of safetensors. Convert'}
    # What the library writes: a length, a header in JSON, numbers.
    (tmp_path / 'a.safetensors').write_bytes(
        (16).to_bytes(8, 'little') + b'{"weight": null}' + bytes(64))
    shutil.copy(tmp_path / 'a.safetensors', tmp_path / 'named.pth')
    cases['named.pth'] = cases['a.safetensors']
    for kind in 'tar', 'zip':
        shutil.make_archive(tmp_path / 'archive', kind, tmp_path, inner.name)
        cases[f'archive.{kind}'] = 'an archive of other files. Unpack it'
    np.savez(tmp_path / 'arrays.npz', np.ones(2))
    cases['arrays.npz'] = cases['archive.zip']
    for name, message in cases.items():
        with pytest.raises(CheckpointError, match=f'{name} is .*{message}'):
            read_checkpoint(str(tmp_path / name))


@pytest.mark.parametrize('url, reason', [
    ('http://127.0.0.1:9/a.pth', 'URLError.*refused'),  # nothing listens
    ('torchvision://resnet50', "KeyError: 'torchvision'"),
    ('s3://bucket/a.pth', 'ImportError')])
def test_urls_that_cannot_be_fetched_are_named(url, reason):
    backbone = Conv2Former(
        MINI, init_cfg=dict(type='Pretrained', checkpoint=url))
    with pytest.raises(CheckpointError, match=f'cannot fetch {url} .*{reason}'
                       '.*Get the file by other means'):
        backbone.init_weights()


@pytest.mark.parametrize('checkpoint', [None, ['a.pth']])
def test_checkpoints_that_are_no_paths_are_named(checkpoint):
    backbone = Conv2Former(
        MINI, init_cfg=dict(type='Pretrained', checkpoint=checkpoint))
    with pytest.raises(CheckpointError, match='backbone.init_cfg.checkpoint '
                       'must be a path or a URL, got .*from scratch: --cfg-opt'
                       'ions model.backbone.init_cfg=None'):
        backbone.init_weights()


class Evil:

    def __reduce__(self):
        return exec, ("raise SystemExit('code of the file ran')", )


def test_code_in_a_pickle_is_never_run(tmp_path):
    path = str(tmp_path / 'weights.pth')
    torch.save(dict(state_dict=GOOD, args=Evil()), path)
    with pytest.raises(CheckpointError, match=r'pickled \S*exec.*convert_chec'
                       'kpoint.py SRC DST --trust-pickle'):
        load_backbone(Conv2Former(MINI), path)


class Blocked:

    def __reduce__(self):
        return os.system, ('false', )


def test_code_of_modules_that_torch_blocks_is_named(tmp_path):
    path = str(tmp_path / 'weights.pth')
    torch.save(dict(state_dict=GOOD, args=Blocked()), path)
    with pytest.raises(CheckpointError, match=r'pickled \w+\.system, and unp'):
        read_checkpoint(path)


def test_counters_that_were_cast_with_the_rest_are_taken(tmp_path):
    path, backbone = str(tmp_path / 'half.pth'), Conv2Former(MINI)
    half = {key: value.half() for key, value in GOOD.items()}
    assert any(key.endswith('num_batches_tracked') for key in half)
    torch.save(half, path)
    load_backbone(backbone, path)
    assert torch.equal(backbone.stages[0][0].attn.v.bias,
                       half['stages.0.0.attn.v.bias'].float())


@pytest.mark.parametrize('change', [
    lambda value: value.to('meta'), lambda value: value.to_sparse()])
def test_tensors_without_numbers_are_named(change):
    key = 'stages.0.0.attn.v.bias'
    with pytest.raises(CheckpointError, match=f'{key} in the .* no numbers'):
        model_weights({**GOOD, key: change(GOOD[key])})


class Reach:
    """Pickled as what getattr finds, as the methods of log buffers are."""

    def __init__(self, owner, name):
        self.found = owner, name

    def __reduce__(self):
        return getattr, self.found


@pytest.mark.parametrize('owner, name', [
    (getattr, '__self__'),  # the module with eval
    (torch._utils._rebuild_parameter, '__globals__'),
    (HistoryBuffer, '__init__')])
def test_pickles_reach_nothing_but_what_log_buffers_have(owner, name,
                                                         tmp_path):
    path = str(tmp_path / 'weights.pth')
    torch.save(dict(state_dict=GOOD, args=Reach(owner, name)), path)
    with pytest.raises(CheckpointError, match='pickled builtins.getattr, and '
                       'unpickling can run code'):
        read_checkpoint(path)
    torch.save(Reach(HistoryBuffer, 'mean'), path)
    assert read_checkpoint(path) is HistoryBuffer.mean


@pytest.mark.parametrize('value', [
    np.float32(.5), np.float64(.5), np.int64(3), np.bool_(True),
    np.arange(3.), np.array([[1, 2]]).T,
    *(np.arange(3, dtype=kind) for kind in 'efbhiBHIL')])
def test_numbers_and_arrays_of_numpy_are_read(value, tmp_path):
    """Such as the accuracy that a training script put beside the weights."""
    torch.save(dict(state_dict={}, best=value), tmp_path / 'weights.pth')
    own = read_checkpoint(str(tmp_path / 'weights.pth'))['best']
    assert type(own) is type(value)
    assert own.dtype == value.dtype
    np.testing.assert_array_equal(own, value)


def test_arrays_that_numpy_1_wrote_are_read(tmp_path):
    new, old = tmp_path / 'new.pth', tmp_path / 'old.pth'
    torch.save(dict(state_dict={}, best=np.arange(3.)), new)
    with zipfile.ZipFile(new) as src, zipfile.ZipFile(old, 'w') as dst:
        for name in src.namelist():
            dst.writestr(name, src.read(name).replace(
                b'cnumpy._core.', b'cnumpy.core.'))
    assert b'cnumpy.core.' in old.read_bytes()
    np.testing.assert_array_equal(read_checkpoint(str(old))['best'],
                                  np.arange(3.))


@pytest.mark.parametrize('value', [np.array([None]), np.str_('a')])
def test_other_arrays_of_numpy_are_told_as_pickled(value, tmp_path):
    path = str(tmp_path / 'weights.pth')
    torch.save(dict(state_dict=GOOD, names=value), path)
    with pytest.raises(CheckpointError, match=r'pickled numpy\.dtypes\.\w+, '
                       'and unpickling can run code'):
        read_checkpoint(path)
    assert read_checkpoint(path, trust_pickle=True)['names'] == value


@pytest.mark.parametrize('name', ARCHS)
def test_arch_is_read_off_the_weights(name):
    with torch.device('meta'):
        model = Conv2Former(name)
    weights = model.state_dict()
    arch = infer_arch(weights)
    assert arch == resolve_arch(name) == model.arch
    assert infer_arch(dict(reversed(weights.items()))) == arch
    assert describe_arch(arch).startswith(f"arch '{name}' (depths ")


def test_arch_is_read_off_weights_in_any_order():
    weights = Conv2Former('tiny').state_dict()
    assert list(weights).index('stages.2.10.attn.proj.weight') > list(
        weights).index('stages.2.2.attn.proj.weight')
    assert infer_arch(dict(sorted(weights.items()))) == resolve_arch('tiny')


def test_arch_that_has_no_row_is_described():
    tiny = resolve_arch('tiny')
    assert describe_arch({**tiny, 'kernel_size': 9}) == (
        "arch 'tiny' with kernel_size=9 (depths 3-3-12-3, dims "
        '72-144-288-576, kernel 9)')
    assert describe_arch({**resolve_arch('base'), 'kernel_size': 9}
                         ).startswith("arch 'base' with kernel_size=9 (")
    assert describe_arch({**tiny, 'depths': (1, 1, 1, 1)}).startswith(
        'arch of its own (depths 1-1-1-1, ')


def test_what_others_allow_to_be_loaded_stays_allowed(tmp_path):
    path = str(tmp_path / 'weights.pth')
    torch.save(dict(state_dict=GOOD, args=argparse.Namespace(lr=1.)), path)
    # As tools/launch.py does, for the length of the process.
    torch.serialization.add_safe_globals(safe_globals())
    read_checkpoint(path)
    assert torch.load(path, weights_only=True)['args'].lr == 1.


def test_missing_file_says_where_weights_are_and_how_to_do_without(
        tmp_path, monkeypatch):
    # As where no shell expands it, such as in a Dockerfile.
    monkeypatch.setenv('HOME', str(tmp_path.parent))
    with pytest.raises(FileNotFoundError, match='no checkpoint .~nobody-here'):
        find_checkpoint('~nobody-here/t.pth')
    monkeypatch.setenv('MMCONV2FORMER_WEIGHTS', f'~/{tmp_path.name}')
    backbone = Conv2Former(
        MINI, init_cfg=dict(type='Pretrained', checkpoint='t.pth'))
    with pytest.raises(FileNotFoundError) as error:
        backbone.init_weights()
    for part in ("no checkpoint 't.pth'", str(tmp_path / 't.pth'),
                 'HVision-NKU/Conv2Former', 'convert_checkpoint.py',
                 'model.backbone.init_cfg=None', 'MMCONV2FORMER_WEIGHTS'):
        assert part in str(error.value)
    # The same one, once the file is there.
    torch.save(GOOD, tmp_path / 't.pth')
    backbone.init_weights()
    assert torch.equal(backbone.stages[0][0].attn.v.bias,
                       GOOD['stages.0.0.attn.v.bias'])


def test_pretrained_without_a_checkpoint_is_named():
    backbone = Conv2Former(MINI, init_cfg=dict(type='Pretrained'))
    with pytest.raises(CheckpointError, match="a checkpoint, got {'type'"):
        backbone.init_weights()


@pytest.mark.parametrize('init_cfg', ['a.pth', dict(checkpoint='a.pth')])
def test_what_is_no_init_cfg_is_refused(init_cfg):
    with pytest.raises(CheckpointError, match=r"must be dict\(type='Pretrain"):
        Conv2Former(MINI, init_cfg=init_cfg).init_weights()


def test_other_init_cfgs_still_work_and_pretrained_comes_last(tmp_path):
    path = str(tmp_path / 'weights.pth')
    torch.save(GOOD, path)
    constant = dict(type='Constant', layer='Conv2d', val=.25)
    backbone = Conv2Former(MINI, init_cfg=constant)
    backbone.init_weights()
    assert (backbone.stages[0][0].attn.v.weight == .25).all()
    backbone = Conv2Former(
        MINI, init_cfg=[dict(type='Pretrained', checkpoint=path), constant])
    backbone.init_weights()
    assert torch.equal(backbone.stages[0][0].attn.v.weight,
                       GOOD['stages.0.0.attn.v.weight'])
    assert backbone.init_cfg[0]['type'] == 'Pretrained'


def test_table_of_initialisations_names_the_file(tmp_path, log):
    path = str(tmp_path / 'weights.pth')
    torch.save(GOOD, path)
    init_cfg = dict(type='Pretrained', checkpoint=path)
    sizes = GOOD['head.0.weight'].shape[1::-1]
    ModuleDict(dict(
        backbone=Conv2Former(MINI, init_cfg=init_cfg),
        neck=Conv2FormerNeck(*sizes, init_cfg=init_cfg))).init_weights()
    found = {line.split(' - ')[0].strip(): line for line in log}
    for name in 'backbone.stages.0.0.attn.v.weight', 'neck.conv.weight':
        assert f'PretrainedInit: load from {path}' in found[name]
    # Of the backbone alone it would say that nothing has changed.
    log.clear()
    Conv2Former(MINI, init_cfg=init_cfg).init_weights()
    line, = log
    assert line.startswith('loaded')
    log.clear()
    Conv2Former(MINI, init_cfg=dict(
        type='Constant', layer='Conv2d', val=.25)).init_weights()
    assert any('ConstantInit' in line for line in log)


def test_a_failed_initialisation_keeps_the_init_cfg():
    cfgs = [dict(type='Pretrained', checkpoint='a.pth'),
            dict(type='Constant', layer='Conv2d', value=.25)]  # it is val
    backbone = Conv2Former(MINI, init_cfg=cfgs)
    with pytest.raises(TypeError, match='ConstantInit'):
        backbone.init_weights()
    assert backbone.init_cfg == cfgs


def test_conversion_that_cannot_write_the_checksum_changes_nothing(tmp_path):
    src, dst = tmp_path / 'official.pth.tar', tmp_path / 'ours.pth'
    torch.save(LAYOUTS['timm with EMA and module.'][0], src)
    dst.write_text('before')
    (tmp_path / 'ours.pth.sha256').mkdir()
    with pytest.raises(IsADirectoryError, match='ours.pth.sha256 is a dir'):
        convert_checkpoint.convert(src, dst)
    assert dst.read_text() == 'before'
    assert len(list(tmp_path.iterdir())) == 3


def test_conversion_proves_and_records_what_it_did(tmp_path):
    src, dst = tmp_path / 'official.pth.tar', tmp_path / 'ours.pth'
    torch.save(LAYOUTS['timm with EMA and module.'][0], src)
    done = subprocess.run([sys.executable, CONVERT, src, dst],
                          capture_output=True, text=True, check=True)
    digests = [hashlib.sha256(path.read_bytes()).hexdigest()
               for path in (src, dst)]
    assert all(digest in done.stdout for digest in digests)
    assert 'depths 1-1-2-1' in done.stdout and 'EMA weights' in done.stdout
    assert Path(f'{dst}.sha256').read_text() == f'{digests[1]}  ours.pth\n'

    ours = torch.load(dst, weights_only=True)
    assert ours['meta']['source_sha256'] == digests[0]
    model = official.Classifier(MINI)
    model.load_state_dict(ours['state_dict'])  # strict
    assert torch.equal(model.head.fc.weight, GOOD['pred.weight'])
    assert torch.equal(model.neck.conv.weight, GOOD['head.0.weight'])
    assert torch.equal(model.backbone.stages[3][0].layer_scale_2,
                       GOOD['stages.3.0.layer_scale_2'])


def test_conversion_of_the_backbone_alone_and_of_our_own_file(tmp_path):
    convert = convert_checkpoint.convert
    src, dst, again = (tmp_path / name for name in ('a.pth', 'b.pth', 'c.pth'))
    torch.save(GOOD, src)
    convert(src, dst)
    convert(dst, again, backbone_only=True)
    weights, _ = model_weights(read_checkpoint(str(again)))
    assert set(weights) == {'backbone.' + k for k in backbone_part(GOOD)}


@pytest.mark.parametrize('content, options, message', [
    (dict(state_dict=GOOD, args=Evil()), (), r'pickled \S*exec'),
    (backbone_part(GOOD), (), 'no whole classification head.*--backbone-only'),
    (without('stages.2.1.mlp.pos'), (),
     '^[^ ]*a.pth does not fit .*missing: stages.2.1.mlp.pos.weight'),
    (without('stages.0.0.mlp.fc1.weight'), (),
     '1 missing: stages.0.0.mlp.fc1.weight'),
    (without('downsample_layers.0.0'), (),
     '1 missing: downsample_layers.0.0.weight'),
    ({**GOOD, 'downsample_layers.0.6.weight': torch.ones(8, 4, 3, 3)}, (),
     'the stem is of another kind'),
    (without('stages.1.'), (), 'a.pth: stage 1 of the backbone has no blocks'),
    ({**GOOD, 'stages.2.1.attn.proj.weight': torch.ones(())}, (),
     r'stages\.2\.1'),
    ({**GOOD, 'pred.weight': torch.ones(5, 12)}, (),
     r'a.pth: the linear layer .*\(5, 12\).*expected \(classes, 1280\)'),
])
def test_a_failed_conversion_leaves_nothing_behind(
        content, options, message, tmp_path):
    src, dst = tmp_path / 'a.pth', tmp_path / 'out' / 'b.pth'
    dst.parent.mkdir()
    torch.save(content, src)
    with pytest.raises(CheckpointError, match=message):
        convert_checkpoint.convert(src, dst)
    assert list(dst.parent.iterdir()) == []


def test_conversion_takes_one_of_several_by_its_prefix(tmp_path):
    src, dst = tmp_path / 'a.pth', tmp_path / 'b.pth'
    torch.save({**prefixed(GOOD, 'teacher.backbone.'),
                **prefixed(OTHER, 'student.backbone.')}, src)
    with pytest.raises(CheckpointError, match='or --prefix of tools/convert'):
        convert_checkpoint.convert(src, dst, backbone_only=True)
    subprocess.run([sys.executable, CONVERT, src, dst, '--backbone-only',
                    '--prefix', 'student.backbone'], check=True)
    weights, _ = model_weights(read_checkpoint(str(dst)))
    key = 'stages.0.0.attn.v.bias'
    assert torch.equal(weights['backbone.' + key], OTHER[key])


@pytest.mark.parametrize('ratio', [3, 2.67, 8 / 3, 1.3])
def test_conversion_takes_models_of_any_mlp_ratio(ratio, tmp_path):
    src, dst = tmp_path / 'a.pth', tmp_path / 'b.pth'
    torch.save(Conv2Former(MINI, mlp_ratio=ratio).state_dict(), src)
    convert_checkpoint.convert(src, dst, backbone_only=True)
    assert dst.is_file()


def test_conversion_errors_are_one_message_without_traceback(tmp_path):
    done = subprocess.run(
        [sys.executable, CONVERT, tmp_path / 'none.pth', tmp_path / 'b.pth'],
        capture_output=True, text=True)
    assert done.returncode == 1
    assert 'file to convert does not exist' in done.stderr
    assert 'Traceback' not in done.stderr


def test_directory_is_no_file_to_convert_to(tmp_path):
    src, dst = tmp_path / 'a.pth', tmp_path / 'folder'
    torch.save(GOOD, src)
    dst.mkdir()
    with pytest.raises(IsADirectoryError, match='folder is a directory; name'):
        convert_checkpoint.convert(src, dst)
    assert sorted(tmp_path.iterdir()) == [src, dst]
    with pytest.raises(IsADirectoryError, match='folder is a directory; name'):
        convert_checkpoint.convert(dst, tmp_path / 'b.pth')


@pytest.mark.parametrize('name', ['stages.2.1.mlp.fc1.weight',
                                  'head.0.bias', 'pred.weight'])
def test_weights_that_are_no_numbers_are_refused(name, tmp_path):
    src, dst = tmp_path / 'a.pth', tmp_path / 'b.pth'
    broken = {key: value.clone() for key, value in GOOD.items()}
    broken[name].view(-1)[0] = float('nan')
    torch.save(broken, src)
    with pytest.raises(CheckpointError, match='a.pth: 1 tensors hold NaN'):
        convert_checkpoint.convert(src, dst)
    assert list(tmp_path.iterdir()) == [src]
    if name.startswith('stages'):
        with pytest.raises(CheckpointError, match=f'hold NaN .*{name}'):
            load_backbone(Conv2Former(MINI), str(src))
    elif name.startswith('head'):
        with pytest.raises(CheckpointError, match='NaN .* them conv.bias'):
            neck_of(src)


@pytest.mark.parametrize('dtype', [
    torch.float8_e4m3fn, torch.float16, torch.int8, torch.bool])
def test_weights_of_small_types_are_looked_at(dtype):
    weights = dict(a=torch.ones(2).to(dtype))
    check_finite(weights, 'a.pth')
    if dtype.is_floating_point:
        weights['b'] = torch.full((2, ), float('nan')).to(dtype)
        with pytest.raises(CheckpointError, match='1 tensors .* them b, as'):
            check_finite(weights, 'a.pth')


def test_conversion_does_not_overwrite_its_source(tmp_path):
    src = tmp_path / 'a.pth'
    torch.save(GOOD, src)
    before = src.read_bytes()
    with pytest.raises(FileExistsError, match='is the file to convert'):
        convert_checkpoint.convert(src, src.parent / '.' / src.name)
    assert src.read_bytes() == before


@pytest.mark.parametrize('name, hint', [
    ('conv2former_t_in1k.pth', 'official weights are behind the links'),
    ('a/conv2former_b_in22k.pth',
     'not published.*conv2former_b_in22k.py leaves.*b_in22k_ft_in1k.pth'),
    ('work_dirs/conv2former_mini_digits/epoch_12.pth',
     'config conv2former_mini_digits.py; run that first')])
def test_missing_file_says_where_it_comes_from(name, hint, tmp_path,
                                               monkeypatch):
    monkeypatch.chdir(tmp_path)  # the quickstart leaves one of them in here
    monkeypatch.delenv('MMCONV2FORMER_WEIGHTS', raising=False)
    with pytest.raises(FileNotFoundError, match=f'To get it: .*{hint}'):
        find_checkpoint(name)


class Settings:
    """Stands for an object of the training code."""


def test_trusted_pickles_are_converted_to_tensors_only(tmp_path):
    src, dst = tmp_path / 'a.pth', tmp_path / 'b.pth'
    torch.save(dict(state_dict=GOOD, args=Settings()), src)
    convert = convert_checkpoint.convert
    with pytest.raises(CheckpointError, match='pickled test_checkpoint.Sett'):
        convert(src, dst)
    convert(src, dst, trust_pickle=True)
    assert set(torch.load(dst, weights_only=True)) == {'meta', 'state_dict'}


def test_module_that_a_trusted_pickle_lacks_is_named(tmp_path, monkeypatch):
    path = tmp_path / 'a.pth'
    with monkeypatch.context() as context:
        context.setitem(sys.modules, 'gone', sys.modules[__name__])
        context.setattr(Settings, '__module__', 'gone')
        torch.save(dict(state_dict=GOOD, args=Settings()), path)
    with pytest.raises(CheckpointError, match="not installed here .*'gone'"):
        read_checkpoint(str(path), trust_pickle=True)


def test_classifier_is_taken_from_one_model_of_a_file():
    """Not the backbone of one and the head of another."""
    own = {name: value + 1 for name, value in GOOD.items()}
    weights = {**{f'teacher.{name}': value for name, value in GOOD.items()},
               **own}
    for prefix, expected in (('teacher.', GOOD), ('', own)):
        found = rename_classifier(weights, prefix=prefix)
        for name, value in rename_classifier(expected).items():
            assert torch.equal(found[name], value), name


@pytest.mark.parametrize('wrap', [lambda m: m, lambda m: dict(model=m)])
def test_pickled_modules_are_converted(wrap, tmp_path):
    src, dst = tmp_path / 'a.pth', tmp_path / 'b.pth'
    model = Conv2Former(MINI)
    torch.save(wrap(model), src)
    with pytest.raises(CheckpointError, match='pickled mmconv2former.backbone'
                       '.*convert_checkpoint.py SRC DST --trust-pickle'):
        load_backbone(Conv2Former(MINI), src)
    convert_checkpoint.convert(src, dst, backbone_only=True, trust_pickle=True)
    loaded = Conv2Former(MINI)
    load_backbone(loaded, dst)
    for name, value in model.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], value)


def test_wrong_prefix_is_refused_also_for_a_single_backbone(tmp_path):
    path = str(tmp_path / 'weights.pth')
    torch.save(prefixed(GOOD, 'teacher.backbone.'), path)
    with pytest.raises(CheckpointError, match="instead of prefix='student"):
        load_backbone(Conv2Former(MINI), path, prefix='student')


def test_prefix_in_init_cfg_names_the_backbone_and_its_head(tmp_path):
    path = str(tmp_path / 'weights.pth')
    torch.save({**prefixed(OTHER, 'teacher.'), **prefixed(GOOD, 'student.')},
               path)
    init_cfg = dict(type='Pretrained', checkpoint=path, prefix='student.')
    backbone = Conv2Former(MINI, init_cfg=init_cfg)
    neck = Conv2FormerNeck(*GOOD['head.0.weight'].shape[1::-1],
                           init_cfg=init_cfg)
    for module in (backbone, neck):
        module.init_weights()
    assert torch.equal(backbone.stages[0][0].attn.v.bias,
                       GOOD['stages.0.0.attn.v.bias'])
    assert torch.equal(neck.conv.weight, GOOD['head.0.weight'])


@pytest.mark.parametrize('content', [
    dict(model=GOOD), dict(model=GOOD, model_ema=None)])
def test_weights_under_model_load(content, tmp_path):
    path = str(tmp_path / 'weights.pth')
    torch.save(content, path)
    backbone = Conv2Former(MINI)
    load_backbone(backbone, path)
    assert torch.equal(backbone.stages[0][0].attn.v.bias,
                       GOOD['stages.0.0.attn.v.bias'])


def test_weights_are_loaded_once(tmp_path):
    path = str(tmp_path / 'weights.pth')
    torch.save(GOOD, path)
    backbone = Conv2Former(
        MINI, init_cfg=dict(type='Pretrained', checkpoint=path))
    backbone.init_weights()
    nn.init.ones_(backbone.stages[0][0].attn.v.bias)
    backbone.init_weights()
    assert (backbone.stages[0][0].attn.v.bias == 1).all()


@pytest.mark.parametrize('kind', [
    'Pretrained', 'PretrainedInit', 'mmengine.Pretrained', PretrainedInit])
def test_pretrained_has_several_names(kind, tmp_path):
    path = str(tmp_path / 'weights.pth')
    torch.save(without('stages.2.1.mlp.pos.weight'), path)
    backbone = Conv2Former(MINI, init_cfg=dict(type=kind, checkpoint=path))
    with pytest.raises(CheckpointError, match='1 missing'):
        backbone.init_weights()


def test_urls_and_paths_from_home_are_found(tmp_path, monkeypatch):
    monkeypatch.setenv('HOME', str(tmp_path))
    (tmp_path / 't.pth').touch()
    assert find_checkpoint('~/t.pth') == str(tmp_path / 't.pth')
    assert find_checkpoint('https://a.b/t.pth') == 'https://a.b/t.pth'


def test_directory_is_no_checkpoint(tmp_path):
    with pytest.raises(FileNotFoundError, match=r'no checkpoint.*a folder\)'):
        find_checkpoint(str(tmp_path))


def test_counts_of_batch_norms_may_be_missing(tmp_path, log):
    path = str(tmp_path / 'weights.pth')
    torch.save({key: value for key, value in GOOD.items()
                if not key.endswith('num_batches_tracked')}, path)
    backbone = Conv2Former(MINI)
    load_backbone(backbone, path)
    key = 'downsample_layers.0.2.running_var'
    assert torch.equal(backbone.state_dict()[key], GOOD[key])
    count = len(backbone.state_dict()) - 2
    assert f'loaded {count} of {count} backbone tensors' in log[-1]


def test_model_of_another_mlp_ratio_is_told_what_to_compare(tmp_path):
    path = str(tmp_path / 'weights.pth')
    torch.save(GOOD, path)
    with pytest.raises(CheckpointError, match='compare in_channels, mlp_rat'):
        load_backbone(Conv2Former(MINI, mlp_ratio=2), path)
