"""Sharded training in two processes computes what training without it does."""
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from mmengine.config import Config
from mmengine.registry import MODELS, init_default_scope

ROOT = Path(__file__).resolve().parents[1]
UPERNET = ROOT / 'configs/segmentation/upernet_conv2former_l_ade20k.py'

# The recipe of L in little, without chance: what differs is the sharding.
CONFIG = """
_base_ = [{base!r}]
model = dict(
    data_preprocessor=dict(size=(64, 64)),
    backbone=dict(
        arch=dict(_delete_=True, depths=[1, 1, 3, 1], dims=[8, 8, 16, 16],
                  kernel_size=3),
        with_cp=True, drop_path_rate=0., init_cfg=None,
        layer_scale_init_value=1.),
    decode_head=dict(in_channels=[8, 8, 16, 16], channels=8, dropout_ratio=0),
    auxiliary_head=dict(in_channels=16, channels=8, dropout_ratio=0),
    test_cfg=dict(crop_size=(64, 64), stride=(43, 43)))
# Images differ in size, and so in the number of windows when validated.
train_pipeline = [
    dict(type='LoadImageFromFile'),
    dict(type='LoadAnnotations'),
    dict(type='Resize', scale=(64, 64)),
    dict(type='PackSegInputs')]
val_pipeline = [
    dict(type='LoadImageFromFile'),
    dict(type='Resize', scale_factor=1.),
    dict(type='LoadAnnotations'),
    dict(type='PackSegInputs')]
train_dataloader = dict(
    num_workers=0, persistent_workers=False,
    dataset=dict(data_root={data!r}, pipeline=train_pipeline))
val_dataloader = dict(
    num_workers=0, persistent_workers=False,
    dataset=dict(data_root={data!r}, pipeline=val_pipeline))
test_dataloader = val_dataloader
randomness = dict(seed=0)
optim_wrapper = dict(clip_grad=dict(max_norm=0.1))  # of larger gradients
param_scheduler = [dict(type='LinearLR', start_factor=0.5, by_epoch=False)]
train_cfg = dict(max_iters=2, val_interval=3)
default_hooks = dict(
    checkpoint=dict(interval=1, max_keep_ckpts=-1, save_best=None))
load_from = 'start.pth'
"""

# Runs in the same two processes, which saves starting them anew. The last are
# by the config that the sharded one has saved.
SCRIPT = """
import test
import train

common = ['--launcher', 'pytorch', '--work-dir']
for arguments in (
        ['config.py', *common, 'plain', '--cfg-options',
         'train_cfg.val_interval=9'],
        ['config.py', *common, 'sharded', '--fsdp', '--cfg-options',
         'train_cfg.val_interval=9'],
        ['sharded/config.py', *common, 'sharded', '--resume', '--cfg-options',
         'train_cfg.max_iters=3', 'train_cfg.val_interval=3']):
    train.main(arguments)
test.main(['sharded/config.py', 'sharded/iter_3.pth', *common, 'tested'])
"""


@pytest.fixture(scope='module')
def folder(ade20k, tmp_path_factory):
    """Where training has run: in plain/, in sharded/, and on from there."""
    folder = tmp_path_factory.mktemp('fsdp')
    config = folder / 'config.py'
    config.write_text(CONFIG.format(base=str(UPERNET), data=str(ade20k)))
    cfg = Config.fromfile(config)
    init_default_scope('mmseg')
    torch.save(
        dict(state_dict=MODELS.build(cfg.model).state_dict()),
        folder / 'start.pth')
    (folder / 'runs.py').write_text(SCRIPT)
    done = subprocess.run(
        [
            sys.executable, '-m', 'torch.distributed.run', '--standalone',
            '--nproc-per-node', '2', 'runs.py'
        ],
        cwd=folder,
        env={
            **os.environ, 'OMP_NUM_THREADS': '1',
            'PYTHONPATH': f'{ROOT}{os.pathsep}{ROOT / "tools"}'
        },
        capture_output=True,
        text=True,
        timeout=120)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return folder


def load(path):
    return torch.load(path, weights_only=False)


def test_sharded_training_ends_with_the_same_weights(folder):
    start = load(folder / 'start.pth')['state_dict']
    plain = load(folder / 'plain/iter_2.pth')['state_dict']
    sharded = load(folder / 'sharded/iter_2.pth')['state_dict']
    assert plain.keys() == sharded.keys() == start.keys()
    changed = 0
    for name, weight in plain.items():
        torch.testing.assert_close(
            sharded[name], weight, rtol=1e-4, atol=1e-6, msg=name)
        changed += not torch.equal(weight, start[name])
    assert changed > len(plain) / 2


def groups(checkpoint):
    """Settings of the parameters, by name."""
    return {
        name.replace('_fsdp_wrapped_module.', ''):
        (group['lr'], group['lr_scale'], group['weight_decay'])
        for group in checkpoint['optimizer']['param_groups']
        for name in group['names']
    }


def test_sharded_parameters_have_the_same_rates_and_decay(folder):
    checkpoints = [
        load(folder / run / 'iter_2.pth') for run in ('plain', 'sharded')
    ]
    first, second = (
        checkpoint['optimizer']['base_param_settings']['lr']
        for checkpoint in checkpoints)
    assert first == second
    plain, sharded = map(groups, checkpoints)
    assert plain == sharded
    assert len({settings[2] for settings in plain.values()}) == 2
    assert len({settings[1] for settings in plain.values()}) > 2


def test_sharded_training_is_resumed(folder):
    before, after = (
        load(folder / f'sharded/iter_{i}.pth') for i in (2, 3))
    assert after['meta']['iter'] == 3
    states = [
        checkpoint['optimizer']['state'] for checkpoint in (before, after)
    ]
    assert states[0].keys() == states[1].keys() and states[0]
    for name, state in states[1].items():
        assert state['step'] == 3 and states[0][name]['step'] == 2


def scores(folder, run):
    """What each run of that work dir has printed as its mIoU."""
    return [re.findall(r'mIoU: +(\S+)', path.read_text())
            for path in sorted(folder.glob(f'{run}/*/*.log'))]


def test_sharded_model_is_validated_with_a_sliding_window(folder):
    trained, resumed = scores(folder, 'sharded')
    assert trained and resumed


def test_config_of_a_sharded_training_tests_a_checkpoint(folder):
    # Not the score of training, where each process has its own batch norms.
    score, = scores(folder, 'tested')
    assert len(score) == 1 and 0 <= float(score[0]) <= 100
    log, = folder.glob('tested/*/*.log')
    assert 'Load checkpoint from sharded/iter_3.pth' in log.read_text()
