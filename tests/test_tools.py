"""tools/train.py and tools/test.py, alone and in two processes."""
import json
import logging
import os
import pickle
import platform
import re
import subprocess
import sys
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from mmengine.config import Config
from mmengine.model import PretrainedInit
from mmengine.optim import build_optim_wrapper
from mmengine.registry import MODELS, init_default_scope
from PIL import Image

import checkpoint_files
import config_queries
import data_checks
from mmconv2former import Conv2Former, Conv2FormerNeck

ROOT = Path(__file__).resolve().parents[1]
CONFIGS = ROOT / 'configs'
TINY = ('dict(_delete_=True, depths=[1, 1, 1, 1], dims=[8, 8, 16, 16], '
        'kernel_size=3)')

# Written beside the config of the two-process run and imported by it.
RECORD_HOOK = """
import hashlib, json
from mmengine.dist import get_rank
from mmengine.hooks import Hook
from mmengine.registry import HOOKS

def digest(model):
    sha = hashlib.sha256()
    for p in model.parameters():
        sha.update(p.detach().numpy().tobytes())
    return sha.hexdigest()

@HOOKS.register_module()
class Record(Hook):
    def before_train(self, runner):
        self.seen, self.first = [], digest(runner.model)

    def after_train_iter(self, runner, batch_idx, data_batch, outputs=None):
        self.seen += [s.img_path for s in data_batch['data_samples']]

    def after_train(self, runner):
        with open(f'{runner.work_dir}/rank{get_rank()}.json', 'w') as f:
            json.dump(dict(first=self.first, last=digest(runner.model),
                           seen=self.seen), f)
"""

DIGITS = """
_base_ = [{base!r}]
custom_imports = dict(
    imports=['mmconv2former', 'record_hook'], allow_failed_imports=False)
custom_hooks = [dict(type='Record')]
train_dataloader = dict(
    batch_size=4, num_workers=0, dataset=dict(data_root={data!r}))
val_dataloader = dict(
    batch_size=4, num_workers=0, dataset=dict(data_root={data!r}))
test_dataloader = val_dataloader
train_cfg = dict(max_epochs=2, val_interval=1)
param_scheduler = [dict(type='ConstantLR', factor=1.)]
default_hooks = dict(checkpoint=dict(interval=1, max_keep_ckpts=9))
tta_model = dict(type='AverageClsScoreTTA')
tta_pipeline = [
    dict(type='LoadImageFromFile'),
    dict(type='TestTimeAug', transforms=[
        [dict(type='RandomFlip', prob=0.), dict(type='RandomFlip', prob=1.)],
        [dict(type='PackInputs')]])]
"""

GONE = """
_base_ = ['digits.py']
model = dict(backbone=dict(
    init_cfg=dict(type='Pretrained', checkpoint='gone.pth')))
"""

COCO = """
_base_ = [{base!r}]
model = dict(
    backbone=dict(arch={tiny}),
    neck=dict(in_channels=[8, 8, 16, 16], out_channels=16),
    rpn_head=dict(in_channels=16, feat_channels=16),
    roi_head=dict(
        bbox_roi_extractor=dict(out_channels=16),
        bbox_head=dict(in_channels=16, fc_out_channels=16),
        mask_roi_extractor=dict(out_channels=16),
        mask_head=dict(num_convs=1, in_channels=16, conv_out_channels=16)),
    test_cfg=dict(rpn=dict(max_per_img=9), rcnn=dict(score_thr=0.)))
test_pipeline = [
    dict(type='LoadImageFromFile'),
    dict(type='Resize', scale=(96, 64), keep_ratio=True),
    dict(type='LoadAnnotations', with_bbox=True, with_mask=True),
    dict(type='PackDetInputs', meta_keys=(
        'img_id', 'img_path', 'ori_shape', 'img_shape', 'scale_factor'))]
test_dataloader = dict(
    num_workers=0, dataset=dict(data_root={data!r}, pipeline=test_pipeline))
test_evaluator = dict(
    ann_file={data!r} + '/annotations/instances_val2017.json')
"""

ADE20K = """
_base_ = [{base!r}]
model = dict(
    data_preprocessor=dict(size=(64, 64)),
    backbone=dict(arch={tiny}),
    decode_head=dict(in_channels=[8, 8, 16, 16], channels=8),
    auxiliary_head=dict(in_channels=16, channels=8),
    test_cfg=dict(crop_size=(64, 64), stride=(43, 43)))
tta_pipeline = [
    dict(type='LoadImageFromFile'),
    dict(type='TestTimeAug', transforms=[
        [dict(type='Resize', scale=(96, 64), keep_ratio=True)],
        [dict(type='RandomFlip', prob=0., direction='horizontal'),
         dict(type='RandomFlip', prob=1., direction='horizontal')],
        [dict(type='LoadAnnotations')],
        [dict(type='PackSegInputs')]])]
test_dataloader = dict(
    num_workers=0, persistent_workers=False, dataset=dict(data_root={data!r}))
# With the original packages, mmseg's painting makes the runner read the
# training data too.
train_dataloader = dict(dataset=dict(data_root={data!r}))
"""


def write_config(path, text, base, data):
    path.write_text(
        text.format(base=str(CONFIGS / base), data=str(data), tiny=TINY))
    return path


def run(*command, cwd, **env):
    """Run a command as a user would, and return what it printed."""
    done = subprocess.run(
        [str(part) for part in command],
        cwd=cwd,
        env={
            **os.environ, 'PYTHONPATH': str(cwd),
            'OMP_NUM_THREADS': '1',
            'PATH': f'{Path(sys.executable).parent}:{os.environ["PATH"]}',
            **env
        },
        capture_output=True,
        text=True,
        timeout=300)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return done.stdout + done.stderr


@pytest.fixture
def tool(load_tool, monkeypatch):
    """Load a script that uses launch.py, each as a new module."""
    monkeypatch.setitem(sys.modules, 'launch', load_tool('launch'))
    monkeypatch.setenv('LOCAL_RANK', '0')
    return load_tool


def refusal(main, *argv):
    """The message with which a tool ends."""
    with pytest.raises(SystemExit) as raised:
        main([str(arg) for arg in argv])
    assert isinstance(raised.value.code, str), 'ended without a message'
    return raised.value.code


@pytest.fixture(scope='module')
def digits(tmp_path_factory):
    """A folder with a Digits config on ten classes of six flat images."""
    root = tmp_path_factory.mktemp('digits')
    for split, count in (('train', 4), ('val', 2)):
        for label in range(10):
            folder = root / 'data' / split / str(label)
            folder.mkdir(parents=True)
            for i in range(count):
                image = np.full((32, 32, 3), 25 * label, dtype='uint8')
                Image.fromarray(image).save(folder / f'{label}{i}.png')
    (root / 'record_hook.py').write_text(RECORD_HOOK)
    write_config(root / 'digits.py', DIGITS,
                 'classification/conv2former_mini_digits.py', root / 'data')
    (root / 'gone.py').write_text(GONE)
    return root


@pytest.fixture
def in_digits(digits, monkeypatch):
    """The folder of Digits as working directory, with its hook in reach."""
    monkeypatch.chdir(digits)
    monkeypatch.syspath_prepend(digits)


@pytest.fixture(scope='module')
def two_processes(digits):
    """What dist_train.sh printed; the run lies in digits/work."""
    return run(
        'bash', ROOT / 'tools/dist_train.sh', 'digits.py', '2', '--work-dir',
        'work', cwd=digits)


def untrained(config, path):
    """Save the model of a config as mmengine saves checkpoints."""
    cfg = Config.fromfile(config)
    init_default_scope(cfg.default_scope)
    torch.save(dict(state_dict=MODELS.build(cfg.model).state_dict()), path)
    return path


def test_two_processes_end_with_the_same_weights(digits, two_processes):
    ranks = [
        json.loads((digits / f'work/rank{i}.json').read_text())
        for i in range(2)
    ]
    assert ranks[0]['first'] == ranks[1]['first']
    assert ranks[0]['last'] == ranks[1]['last'] != ranks[0]['first']
    # They learnt from different images: what is equal has been exchanged.
    for epoch in (slice(0, 20), slice(20, 40)):
        first, second = (set(rank['seen'][epoch]) for rank in ranks)
        assert len(first) == len(second) == 20 and not first & second


def test_resume_goes_on_without_the_pretrained_file(digits, two_processes):
    log = run(
        sys.executable, ROOT / 'tools/train.py', 'gone.py', '--work-dir',
        'work', '--resume', '--cfg-options', 'train_cfg.max_epochs=3',
        'optim_wrapper.optimizer.lr=7', cwd=digits)
    assert 'resumed epoch: 2' in log
    # mmengine goes on with the rate of the checkpoint.
    assert re.search(r'The checkpoint overrules the config: lr of the '
                     r'optimizer 0\.001 \(config: 7\.0\); end of .* 2 '
                     r'\(config: 3\).*load_from=\S*work/epoch_2\.pth\n', log)
    assert 'Epoch(train) [3]' in log and 'Epoch(train) [2]' not in log
    assert (digits / 'work/epoch_3.pth').is_file()


def test_two_processes_test_without_the_pretrained_file(digits,
                                                        two_processes):
    run('bash', ROOT / 'tools/dist_test.sh', 'gone.py', 'work/epoch_2.pth',
        '2', '--out', 'predictions.pkl', cwd=digits)
    predictions = pickle.loads((digits / 'predictions.pkl').read_bytes())
    paths = [prediction['img_path'] for prediction in predictions]
    assert len(paths) == len(set(paths)) == 20


@pytest.fixture(scope='module')
def augmented(digits, two_processes):
    """What test.py printed; the predictions lie in digits/augmented.pkl."""
    return run(
        sys.executable, ROOT / 'tools/test.py', 'digits.py',
        'work/epoch_2.pth', '--tta', '--out', 'augmented.pkl', cwd=digits)


def test_classification_is_augmented(augmented):
    assert 'AverageClsScoreTTA' in augmented and 'accuracy/top1' in augmented


def test_fused_model_predicts_the_same(digits, augmented):
    log = run(
        sys.executable, ROOT / 'tools/test.py', 'digits.py',
        'work/epoch_2.pth', '--tta', '--fuse', '--out', 'fused.pkl',
        cwd=digits)
    assert 'Load checkpoint from work/epoch_2.pth, and fuse' in log
    unfused, fused = (
        torch.stack([
            prediction['pred_score']
            for prediction in pickle.loads((digits / name).read_bytes())
        ]) for name in ('augmented.pkl', 'fused.pkl'))
    assert fused.shape == (20, 10)
    torch.testing.assert_close(fused, unfused, rtol=1e-4, atol=1e-5)


def test_classification_paints_predictions(digits, two_processes):
    run(sys.executable, ROOT / 'tools/test.py', 'digits.py',
        'work/epoch_2.pth', '--show-dir', 'painted', cwd=digits)
    assert len(list((digits / 'painted').iterdir())) == 20


def test_detection_saves_and_paints_predictions(coco, tmp_path):
    config = write_config(tmp_path / 'coco.py', COCO,
                          'detection/mask_rcnn_conv2former_t_coco.py', coco)
    untrained(config, tmp_path / 'model.pth')
    # The config starts from a pre-trained file that is not here.
    log = run(
        sys.executable, ROOT / 'tools/test.py', 'coco.py', 'model.pth',
        '--out', 'predictions.pkl', '--show-dir', 'painted', cwd=tmp_path)
    assert 'coco/bbox_mAP' in log and 'coco/segm_mAP' in log
    predictions = pickle.loads((tmp_path / 'predictions.pkl').read_bytes())
    assert len(predictions) == 4
    assert {'bboxes', 'labels', 'masks'} <= set(
        predictions[0]['pred_instances'])
    assert len(list((tmp_path / 'painted').glob('*.jpg'))) == 4


def test_segmentation_is_augmented_saved_and_painted(ade20k, tmp_path):
    config = write_config(
        tmp_path / 'ade.py', ADE20K,
        'segmentation/upernet_conv2former_t_ade20k.py', ade20k)
    untrained(config, tmp_path / 'model.pth')
    log = run(
        sys.executable, ROOT / 'tools/test.py', 'ade.py', 'model.pth',
        '--tta', '--out', 'labels', '--show-dir', 'painted', cwd=tmp_path)
    assert 'SegTTAModel' in log and 'mIoU' in log
    labels = sorted((tmp_path / 'labels').glob('*.png'))
    assert len(labels) == 4
    assert np.array(Image.open(labels[0])).shape == (64, 96)
    assert len(list((tmp_path / 'painted').rglob('*.png'))) == 4


def test_wrong_input_ends_with_a_message_and_no_traceback(tmp_path):
    done = subprocess.run(
        [sys.executable, ROOT / 'tools/train.py', 'missing.py'],
        cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert done.returncode == 1
    assert "config 'missing.py' does not exist" in done.stderr
    assert 'Traceback' not in done.stderr and not list(tmp_path.iterdir())


@pytest.mark.parametrize('text, reason', [
    ("_base_ = ['gone.py']", 'FileNotFoundError: .*gone.py'),
    ("_base_ = ['mmdet::mask_rcnn/gone.py']", '.*gone.py'),
    ("_base_ = ['mmdet::gone.py']", 'ValueError: .*mmdet::'),
    ('model = dict(', 'SyntaxError: .*was never closed'),
    (f"_base_ = ['{CONFIGS}/segmentation/upernet_conv2former_t_ade20k.py']\n"
     'model = dict(backbone=dict(arch=dict(depths=[1])))',
     'TypeError: .*_delete_=True'),
    ("custom_imports = dict(imports=['gone'])", 'ImportError: .*gone')])
def test_config_that_cannot_be_read_is_named(tool, text, reason, tmp_path):
    path = tmp_path / 'config.py'
    path.write_text(text)
    with pytest.raises(SystemExit, match=(
            f"^config '{path}' cannot be read: {reason}")):
        tool('train').main([str(path)])


def test_folders_in_place_of_files_are_called_so(tool, tmp_path):
    message = f"'{tmp_path}' is a folder; name a file in it"
    assert message in refusal(tool('train').main, tmp_path)
    assert message in refusal(
        tool('test').main, CONFIGS / 'classification/conv2former_t_in1k.py',
        tmp_path)


def test_missing_config_is_answered_with_near_names(tool):
    message = refusal(
        tool('train').main, 'configs/classification/conv2former_tiny_in1k.py')
    assert 'does not exist' in message
    assert 'classification/conv2former_t_in1k.py' in message


@pytest.mark.parametrize('config, expected', [
    ('classification/conv2former_t_in1k.py',
     ['data/imagenet/train', 'data/imagenet/val', 'one folder per class']),
    ('detection/mask_rcnn_conv2former_t_coco.py', [
        'data/coco/train2017', 'data/coco/val2017',
        'data/coco/annotations/instances_train2017.json'
    ]),
    ('classification/conv2former_b_in22k.py',
     ['data/imagenet22k/train', 'one folder per class']),
    ('segmentation/upernet_conv2former_t_ade20k.py', [
        'ADEChallengeData2016/images/training',
        'ADEChallengeData2016/annotations/validation'
    ]),
])
def test_missing_data_is_answered_with_the_layout(config, expected, tool,
                                                  monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    message = refusal(
        tool('train').main, CONFIGS / config, '--cfg-options',
        'model.backbone.init_cfg=None')
    for path in expected:
        assert path in message
    assert '[MISSING]' in message and '[found]' not in message
    assert not list(tmp_path.iterdir())


def test_data_found_in_part_is_marked_so(tool, coco, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    message = refusal(
        tool('train').main,
        CONFIGS / 'detection/mask_rcnn_conv2former_t_coco.py', '--cfg-options',
        'model.backbone.init_cfg=None',
        f'train_dataloader.dataset.data_root={coco}')
    lines = message.splitlines()
    assert any('[found]' in x and 'train2017.json' in x for x in lines)
    assert any('[MISSING]' in x and 'val2017.json' in x for x in lines)


def test_wrapped_data_sets_are_checked(tool, tmp_path):
    launch = tool('launch')
    (tmp_path / 'here').mkdir()
    leaf = dict(type='CustomDataset', data_root=str(tmp_path))
    cfg = Config(
        dict(
            train_dataloader=dict(
                dataset=dict(
                    type='RepeatDataset',
                    dataset=dict(
                        type='ConcatDataset',
                        datasets=[
                            dict(data_prefix='here', **leaf),
                            dict(data_prefix=dict(img='gone'), **leaf)
                        ])))))
    with pytest.raises(SystemExit) as raised:
        launch.check_data(cfg, ('train', 'val'))
    message = raised.value.code
    assert f'[found] {tmp_path}/here' in message
    assert f'[MISSING] {tmp_path}/gone' in message
    assert 'train_dataloader.dataset.dataset.datasets.1' in message


def test_root_of_the_data_may_be_a_path(tmp_path):
    assert config_queries.data_paths(Config(dict(
        type='CustomDataset', data_root=tmp_path, data_prefix='train'))) == {
            'data_prefix.images, one folder per class': f'{tmp_path}/train'}


def test_data_in_other_storages_is_not_looked_for(tool):
    launch = tool('launch')
    leaf = dict(type='CustomDataset', data_prefix='gone')
    assert config_queries.data_paths({**leaf, 'data_root': 's3://a'}) == {}
    storage = dict(backend='petrel')
    launch.check_data(
        Config(dict(
            val_dataloader=dict(dataset=dict(
                data_root='gone', backend_args=storage, **leaf)),
            val_evaluator=dict(type='CocoMetric', ann_file='gone.json',
                               backend_args=storage))), ('val', ))


def test_data_sets_that_name_no_path_are_left_to_their_class(tool):
    cfg = Config(
        dict(
            train_dataloader=dict(
                dataset=dict(type='CIFAR10', data_root='gone',
                             split='train'))))
    launch = tool('launch')
    assert config_queries.data_paths(cfg.train_dataloader.dataset) == {}
    launch.check_data(cfg, ('train', ))


def test_folder_of_classes_named_by_data_root_alone_is_looked_for(tool):
    cfg = Config(
        dict(
            train_dataloader=dict(
                dataset=dict(type='CustomDataset', data_root='gone'))))
    launch = tool('launch')
    with pytest.raises(SystemExit, match=r'\[MISSING\] gone  \(data_root'):
        launch.check_data(cfg, ('train', ))


def test_work_dir_that_cannot_be_made_is_refused(tool, digits, monkeypatch):
    monkeypatch.chdir(digits)
    monkeypatch.syspath_prepend(str(digits))
    message = refusal(
        tool('train').main, 'digits.py', '--work-dir', 'digits.py/work')
    assert "cannot write in 'digits.py/work'" in message
    assert '--work-dir' in message


def test_missing_pretrained_file_is_refused_before_training(tool, tmp_path,
                                                            monkeypatch):
    monkeypatch.delenv('MMCONV2FORMER_WEIGHTS', raising=False)
    monkeypatch.chdir(tmp_path)
    message = refusal(
        tool('train').main,
        CONFIGS / 'detection/mask_rcnn_conv2former_t_coco.py')
    assert "'conv2former_t_in1k.pth'" in message
    assert 'MMCONV2FORMER_WEIGHTS' in message


def test_missing_pretrained_file_is_refused_for_all_parts_that_want_it(
        tool, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv('MMCONV2FORMER_WEIGHTS', raising=False)
    config = CONFIGS / 'classification/conv2former_b_in22k_ft_in1k.py'
    message = refusal(tool('train').main, config)
    assert ('model.backbone.init_cfg.checkpoint=PATH '
            'model.neck.init_cfg.checkpoint=PATH') in message
    without = ['model.backbone.init_cfg=None', 'model.neck.init_cfg=None']
    assert ' '.join(without) in message
    # What is proposed helps: next the data are looked for.
    message = refusal(tool('train').main, config, '--cfg-options', *without)
    assert 'no checkpoint' not in message and 'data/imagenet' in message


@pytest.mark.parametrize('config, last, message', [
    ('classification/conv2former_t_in1k.py', 'train_cfg.max_epochs=5',
     'train_cfg.max_epochs=5: the schedule of the learning rate begins after '
     '5 epochs of warm-up'),
    ('classification/conv2former_t_in1k.py', 'train_cfg.max_epochs=6', ''),
    # Whose schedule has an end of its own.
    ('segmentation/upernet_conv2former_t_ade20k.py', 'train_cfg.max_iters=4',
     '')])
def test_training_that_ends_in_the_warm_up_is_refused(config, last, message,
                                                      tool):
    cfg = train_config(tool, '--cfg-options', last, config=config)
    told = ''
    try:
        tool('train').check_schedule(cfg)
    except SystemExit as error:
        told = str(error)
    assert told.startswith(message) and bool(told) == bool(message)


def test_training_begins_with_looks_at_schedules_and_checkpoints(
        tool, in_digits, tmp_path, monkeypatch, caplog):
    train, compared = tool('train'), []
    monkeypatch.setattr(
        train.launch, 'build_runner', lambda cfg: SimpleNamespace(
            logger=logging.getLogger('told'), train=lambda: None))
    monkeypatch.setattr(train.resume, 'check_processes', compared.append)
    with caplog.at_level(logging.WARNING, 'told'):
        train.main([
            'digits.py', '--resume', '--work-dir', str(tmp_path),
            '--cfg-options', 'optim_wrapper.paramwise_cfg.decay_rate=0.9',
            "param_scheduler=[dict(type='PolyLR',eta_min=1e-5)]"])
    assert len(compared) == 1
    assert f'no checkpoint in {tmp_path}; training begins' in caplog.text
    assert 'param_scheduler.0: eta_min=1e-05 is one rate' in caplog.text
    assert 'begins after 5 epochs of warm-up' in refusal(
        train.main, CONFIGS / 'classification/conv2former_t_in1k.py',
        '--cfg-options', 'train_cfg.max_epochs=5')


def test_resume_needs_neither_backbone_nor_neck_to_be_pretrained(
        tool, tmp_path):
    train = tool('train')
    checkpoint = tmp_path / 'epoch_1.pth'
    torch.save(dict(meta={}, optimizer={}, state_dict=dict(
        weight=torch.zeros(1))), checkpoint)
    config = CONFIGS / 'classification/conv2former_b_in22k_ft_in1k.py'
    for resume, count in (([], 2), (['--resume', str(checkpoint)], 0)):
        args = train.parse_args([str(config), *resume])
        cfg = train.merge_args(sys.modules['launch'].read_config(args), args)
        assert len(train.pretrained_weights(cfg)) == count


def test_pretrained_file_in_a_list_of_initializations_is_seen(tool):
    cfg = train_config(tool)
    train = tool('train')
    cfg.model.backbone.init_cfg = [
        dict(type='Kaiming', layer='Conv2d'),
        dict(type='Pretrained', checkpoint='gone.pth')]
    assert train.pretrained_weights(cfg) == {
        'model.backbone.init_cfg.1': 'gone.pth'}
    with pytest.raises(SystemExit, match=(
            r'init_cfg.1.checkpoint=PATH\n.*model.backbone.init_cfg=None$')):
        train.check_pretrained(cfg)
    cfg.load_from = 'epoch_1.pth'
    with pytest.raises(SystemExit, match=(
            r'init_cfg=None\n- Start from load_from alone: with the same op')):
        train.check_pretrained(cfg)
    # What is proposed are settings that mmengine knows.
    cfg.merge_from_dict({'model.backbone.init_cfg.1.checkpoint': 'here.pth'})
    assert [*train.pretrained_weights(cfg).values()] == ['here.pth']
    cfg.merge_from_dict({'model.backbone.init_cfg.1.checkpoint': None})
    with pytest.raises(SystemExit, match='init_cfg.1.checkpoint must be a pa'):
        train.check_pretrained(cfg)
    cfg.model.backbone.init_cfg[1].checkpoint = 'here.pth'
    cfg.model.backbone.init_cfg[1].type = PretrainedInit
    assert [*train.pretrained_weights(cfg).values()] == ['here.pth']
    cfg.merge_from_dict({'model.backbone.init_cfg': None})
    assert train.pretrained_weights(cfg) == {}
    # Of other backbones the libraries find them.
    cfg.model.backbone = dict(type='ConvNeXt', init_cfg=dict(
        type='Pretrained', checkpoint='open-mmlab://convnext'))
    assert train.pretrained_weights(cfg) == {}


def test_pretrained_parts_anywhere_in_a_model_are_seen(tool, tmp_path):
    """Such as in the detector of mmdet's SoftTeacher."""
    cfg = train_config(tool)
    train = tool('train')
    backbone = dict(cfg.model.backbone, init_cfg=dict(
        type='Pretrained', checkpoint='gone.pth'))
    cfg.model = dict(type='SoftTeacher', detector=dict(
        type='FasterRCNN', backbone=backbone, neck=[dict(type='FPN')]))
    with pytest.raises(SystemExit, match=(
            r'model\.detector\.backbone\.init_cfg\.checkpoint=PATH\n')):
        train.check_pretrained(cfg)
    assert train.own_parts(cfg) == {
        'model.detector.backbone': cfg.model.detector.backbone}


def test_data_sets_of_several_tasks_are_described(tool):
    """Whose data_prefix is a text."""
    data_set = SimpleNamespace(ann_file='a.json', data_prefix='images')
    assert sys.modules['data_error'].describe(data_set) == (
        'SimpleNamespace (a.json, images)')


def test_pretrained_file_is_looked_for_in_the_named_folder(tool, tmp_path,
                                                           monkeypatch):
    (tmp_path / 'conv2former_t_in1k.pth').touch()
    monkeypatch.setenv('MMCONV2FORMER_WEIGHTS', str(tmp_path))
    monkeypatch.chdir(tmp_path)
    message = refusal(
        tool('train').main,
        CONFIGS / 'detection/mask_rcnn_conv2former_t_coco.py')
    assert message.startswith('the data is not where')


@pytest.mark.parametrize('content, reason', [
    (b'text', 'no checkpoint'),
    (dict(state_dict={}), 'no tensors in the checkpoint'),
    (dict(state_dict=dict(weight=torch.zeros(1))),
     r'backbone.downsample_layers.0.0.weight'),
])
def test_checkpoint_without_the_weights_is_not_tested(
        tool, in_digits, tmp_path, content, reason):
    path = tmp_path / 'weights.pth'
    if isinstance(content, bytes):
        path.write_bytes(content)
    else:
        torch.save(content, path)
    message = refusal(tool('test').main, 'digits.py', path, '--work-dir',
                      tmp_path)
    assert str(path) in message and reason in message


def test_checkpoint_of_another_width_is_not_tested(tool, in_digits, tmp_path):
    path = untrained('digits.py', tmp_path / 'weights.pth')
    message = refusal(
        tool('test').main, 'digits.py', path, '--work-dir', tmp_path,
        '--cfg-options', 'model.backbone.mlp_ratio=2')
    assert 'size mismatch' in message and 'mlp' in message


def test_pretrained_weights_that_do_not_fit_end_in_one_message(
        tool, in_digits, tmp_path):
    path = untrained('digits.py', tmp_path / 'weights.pth')
    message = refusal(
        tool('train').main, 'digits.py', '--work-dir', tmp_path,
        '--cfg-options', 'model.backbone.mlp_ratio=2',
        'model.backbone.init_cfg._delete_=True',
        'model.backbone.init_cfg.type=Pretrained',
        f'model.backbone.init_cfg.checkpoint={path}')
    assert 'and so is the model: compare in_channels, mlp_ratio' in message


def test_weights_alone_are_not_resumed(tool, in_digits, tmp_path):
    path = untrained('digits.py', tmp_path / 'weights.pth')
    message = refusal(tool('train').main, 'digits.py', '--resume', path)
    assert 'has no meta and no optimizer' in message
    assert f'load_from={path}' in message


def test_training_of_another_model_is_not_resumed(tool, in_digits, tmp_path):
    path = untrained('digits.py', tmp_path / 'weights.pth')
    checkpoint = torch.load(path)
    torch.save({**checkpoint, 'meta': {}, 'optimizer': {}}, path)
    message = refusal(
        tool('train').main, 'digits.py', '--work-dir', tmp_path / 'work',
        '--resume', path, '--cfg-options', 'model.head.num_classes=12')
    assert 'does not fit the config' in message and 'head.fc' in message


def test_configs_need_not_say_that_nothing_is_resumed(tool, in_digits,
                                                      tmp_path, monkeypatch):
    train, steps = tool('train'), []
    monkeypatch.setattr(
        train.launch, 'build_runner', lambda cfg: SimpleNamespace(
            logger=logging.getLogger(),
            train=lambda: steps.append(cfg.resume)))
    config = tmp_path / 'config.py'
    config.write_text(f"_base_ = ['{Path('digits.py').resolve()}']\n")
    read = train.launch.read_config

    def without_resume(args):
        cfg = read(args)
        cfg.pop('resume')
        return cfg

    monkeypatch.setattr(train.launch, 'read_config', without_resume)
    train.main([str(config), '--work-dir', str(tmp_path)])
    assert steps == [False]


@pytest.mark.parametrize('is_first', [True, False])
def test_run_in_the_folder_of_an_earlier_one_is_told(
        is_first, tool, in_digits, tmp_path, monkeypatch, caplog):
    train = tool('train')
    monkeypatch.setattr(
        train.launch, 'build_runner', lambda cfg: SimpleNamespace(
            logger=logging.getLogger('earlier'), train=lambda: None))
    if not is_first:
        (tmp_path / 'last_checkpoint').write_text('epoch_2.pth')
    with caplog.at_level(logging.WARNING, 'earlier'):
        train.main(['digits.py', '--work-dir', str(tmp_path)])
    assert ('has checkpoints of an earlier run' in caplog.text) != is_first


def test_resuming_in_a_folder_replaces_nothing(tool, in_digits, tmp_path,
                                               monkeypatch, caplog):
    train = tool('train')
    (tmp_path / 'last_checkpoint').write_text(str(tmp_path / 'epoch_2.pth'))
    torch.save(dict(meta={}, optimizer={},
                    state_dict=dict(weight=torch.zeros(1))),
               tmp_path / 'epoch_2.pth')
    monkeypatch.setattr(
        train.launch, 'build_runner', lambda cfg: SimpleNamespace(
            logger=logging.getLogger('earlier'), model=None,
            register_hook=lambda hook: None, train=lambda: None))
    with caplog.at_level(logging.WARNING, 'earlier'):
        train.main(['digits.py', '--resume', '--work-dir', str(tmp_path)])
    assert 'has checkpoints of an earlier run' not in caplog.text


@pytest.mark.parametrize('wrapper, dtype, is_wanted', [
    ('AmpOptimWrapper', 'bfloat16', True),
    ('CPUAmpOptimWrapper', 'float16', True),
    ('AmpOptimWrapper', 'float16', False), ('OptimWrapper', None, False)])
def test_boxes_are_in_fp32_where_16_bits_do_not_do(
        wrapper, dtype, is_wanted, tool, in_digits, tmp_path, monkeypatch):
    train, hooks = tool('train'), []
    monkeypatch.setattr(
        train, 'get_device',
        lambda: 'cpu' if wrapper.startswith('CPU') else 'cuda')
    monkeypatch.setattr(
        train.launch, 'build_runner', lambda cfg: SimpleNamespace(
            logger=logging.getLogger(), train=lambda: None,
            register_hook=lambda hook: hooks.append(type(hook).__name__)))
    train.main(['digits.py', '--work-dir', str(tmp_path), '--cfg-options',
                f'optim_wrapper.type={wrapper}',
                *[f'optim_wrapper.dtype={dtype}'] * bool(dtype)])
    assert hooks == ['BoxesInFloat32'] * is_wanted


def test_missing_weights_to_start_from_are_told(tool, in_digits, tmp_path):
    message = refusal(
        tool('train').main, 'digits.py', '--work-dir', tmp_path,
        '--cfg-options', 'load_from=gone.pth')
    assert "load_from 'gone.pth' does not exist" in message


def test_option_without_a_value_is_told(tool, capsys):
    with pytest.raises(SystemExit):
        tool('test').main(['c.py', 'c.pth', '--cfg-options', 'a=1', 'b'])
    error = capsys.readouterr().err
    assert "--cfg-options: expected KEY=VALUE, got 'b'" in error


def test_slip_in_an_option_is_told(tool):
    message = refusal(
        tool('train').main, CONFIGS / 'classification/conv2former_t_in1k.py',
        '--cfg-options', 'train_dataloder.batch_size=4')
    assert "Did you mean 'train_dataloader'?" in message


def test_variable_of_the_config_that_changes_nothing_is_told(
        tool, in_digits, monkeypatch):
    train, told = tool('train'), []
    monkeypatch.setattr(train.launch, 'print_log',
                        lambda text, **_: told.append(text))
    train.launch.read_config(train.parse_args([
        str(CONFIGS / 'classification/conv2former_mini_digits.py'),
        '--cfg-options', 'max_epochs=2', 'train_cfg.max_epochs=2']))
    text, = told
    assert text.startswith("--cfg-options max_epochs: 'max_epochs' is a varia")


def test_weights_of_other_names_are_not_started_from(tool, in_digits,
                                                     tmp_path):
    path = str(tmp_path / 'official.pth')
    torch.save({f'module.{name}': value for name, value in Conv2Former(
        dict(depths=[1], dims=[8], kernel_size=3)).state_dict().items()}, path)
    message = refusal(
        tool('train').main, 'digits.py', '--work-dir', tmp_path,
        '--cfg-options', f'load_from={path}')
    assert f"load_from: '{path}' has no weights by the names" in message
    assert 'such as module.downsample_layers.0' in message
    assert 'tools/convert_checkpoint.py' in message
    advice = message.rpartition('--cfg-options ')[2].split()
    train = tool('train')
    cfg = train.launch.read_config(
        train.parse_args(['digits.py', '--cfg-options', *advice]))
    assert cfg.model.backbone.init_cfg == dict(
        type='Pretrained', checkpoint=path)
    assert cfg.load_from is None


@pytest.mark.parametrize('init_cfg', [
    '', 'init_cfg=None', "init_cfg=dict(type='Kaiming', layer='Conv2d')"])
def test_pretrained_file_takes_the_place_of_any_initialisation(
        init_cfg, tool, tmp_path):
    path = tmp_path / 'config.py'
    path.write_text(f'model = dict(backbone=dict({init_cfg}))')
    train, key = tool('train'), 'model.backbone.init_cfg'
    cfg = train.launch.read_config(train.parse_args([
        str(path), '--cfg-options', f'{key}._delete_=True',
        f'{key}.type=Pretrained', f'{key}.checkpoint=a.pth']))
    assert cfg.model.backbone.init_cfg == dict(
        type='Pretrained', checkpoint='a.pth')


@pytest.mark.parametrize('name, is_refused', [
    ('module.backbone.weight', False), ('backbone.bias', False),
    ('weight', True)])
def test_weights_of_some_of_the_names_are_started_from(name, is_refused,
                                                       tmp_path):
    path = str(tmp_path / 'a.pth')
    model = torch.nn.ModuleDict(dict(backbone=torch.nn.Linear(2, 2)))
    torch.save({name: torch.zeros(2), 'head.bias': torch.zeros(2)}, path)
    told = ''
    try:
        checkpoint_files.check_weight_names(model, path)
    except SystemExit as error:
        told = str(error)
    assert ('no weights by the names of this model' in told) == is_refused


@pytest.mark.parametrize('path, message', [
    ('https://host.test/c.pth', ''), ('host.test/c.pth', "it 'host.test/c.pth'"
                                      ' does not exist')])
def test_checkpoint_may_be_a_url(path, message):
    told = ''
    try:
        checkpoint_files.check_file(path, 'it')
    except SystemExit as error:
        told = str(error)
    assert told.startswith(message) and bool(told) == bool(message)


def test_versions_of_layers_are_loaded_with_their_weights(tmp_path):
    class Layer(torch.nn.Linear):
        _version = 3

        def _load_from_state_dict(self, state, prefix, metadata, *args):
            seen.append(metadata.get('version'))
            super()._load_from_state_dict(state, prefix, metadata, *args)

    model, seen = torch.nn.Sequential(Layer(1, 1)), []
    torch.save(dict(state_dict=model.state_dict()), tmp_path / 'a.pth')
    checkpoint_files.load_weights(model, str(tmp_path / 'a.pth'))
    assert seen == [3]


def test_missing_checkpoint_is_refused(tool):
    message = refusal(
        tool('test').main, CONFIGS / 'classification/conv2former_t_in1k.py',
        'gone.pth')
    assert "checkpoint 'gone.pth' does not exist" in message


def train_config(tool, *options, device='cpu',
                 config='classification/conv2former_t_in1k.py'):
    """The config as train.py makes it of the options."""
    train = tool('train')
    train.get_device = lambda: device
    args = train.parse_args([str(CONFIGS / config), *options])
    return train.merge_args(sys.modules['launch'].read_config(args), args)


def test_weights_of_another_arch_are_described(tmp_path):
    path = str(tmp_path / 'a.pth')
    small, large = (torch.nn.ModuleDict(dict(backbone=Conv2Former(
        dict(depths=[1], dims=[dim], kernel_size=3)))) for dim in (8, 16))
    torch.save(small.state_dict(), path)
    load = checkpoint_files.load_weights
    load(small, path)
    # As DDP names them, and as old versions of torch wrote them.
    torch.save({f'module.{key}': value
                for key, value in small.state_dict().items()
                if not key.endswith('num_batches_tracked')},
               tmp_path / 'b.pth')
    load(torch.nn.DataParallel(small), str(tmp_path / 'b.pth'))
    with pytest.raises(SystemExit, match=(
            r'config: 31 tensors, such as: size mismatch for .*\. The file '
            r'holds arch of its own \(depths 1, dims 8, kernel 3\)\. Name')):
        load(large, path)


@pytest.mark.parametrize('extra, name', [
    (dict(depth=2), 'backbone.stages.0.1'),
    (dict(out_norm=True), 'backbone.norm0'),
    (dict(neck=Conv2FormerNeck(8, 4)), 'neck.conv')])
def test_weights_of_a_larger_model_are_refused(extra, name, tmp_path):

    def model(depth=1, neck=None, **kwargs):
        backbone = Conv2Former(dict(depths=[depth], dims=[8], kernel_size=3),
                               **kwargs)
        return torch.nn.ModuleDict(dict(
            backbone=backbone, neck=neck or torch.nn.Identity()))

    path = str(tmp_path / 'a.pth')
    small, large = model(), model(**extra)
    # A part that the model has not got does no harm.
    torch.save({**large.state_dict(), 'auxiliary_head.weight': torch.ones(1)},
               path)
    load = checkpoint_files.load_weights
    load(large, path)
    with pytest.raises(SystemExit, match=(
            rf'has \d+ tensors more, such as {re.escape(name)}')):
        load(small, path)


@pytest.mark.parametrize('value, expected', [
    ('/a b/c', '/a b/c'), ('"/a b/c"', '/a b/c'), ('[1, 2]', [1, 2]),
    ('(1, 2)', (1, 2)), ('1, 2', [1, 2]), ('True', True), ('(1)', (1, )),
    ("['traffic light', 'cat']", ['traffic light', 'cat']),
    ("('0', '1')", ('0', '1')), ('(cat, )', ('cat', )),
    ('[[1, 2], [3]]', [[1, 2], [3]])])
def test_settings_keep_the_spaces_of_paths(tool, value, expected):
    args = tool('train').parse_args(['a.py', '--cfg-options', f'key={value}'])
    assert args.cfg_options == dict(key=expected)


@pytest.mark.parametrize('value', [
    "[dict(type='A', size=(8, 8))]", "[{'type': 'A', 'size': (8, 8)}]"])
def test_settings_may_be_dicts(tool, value):
    args = tool('train').parse_args(['a.py', '--cfg-options', f'key={value}'])
    assert args.cfg_options == dict(key=[dict(type='A', size=(8, 8))])


@pytest.mark.parametrize('value', [
    "[dict(type='A']", '[{type: A}]', 'dict(1)', 'dict(a=1/0)'])
def test_settings_that_are_no_dicts_are_told(tool, value, capsys):
    with pytest.raises(SystemExit):
        tool('train').parse_args(['a.py', '--cfg-options', f'key={value}'])
    error = capsys.readouterr().err
    assert f'--cfg-options: {value} is not as Python writes dicts' in error


@pytest.mark.parametrize('setting, reason', [
    ('param_scheduler.7.end=5', 'Index 7 exceeds the length of list'),
    ('param_scheduler.0=5', "'int' object has no attribute 'items'"),
    ('train_cfg.by_epoch.a=5', 'by_epoch is a dict in the child config')])
def test_settings_that_the_config_has_no_place_for_are_told(
        tool, setting, reason):
    with pytest.raises(SystemExit, match=f'^--cfg-options .*: .*{reason}'):
        train_config(tool, '--cfg-options', setting)


def test_setting_with_half_a_list_is_told(tool, capsys):
    with pytest.raises(SystemExit):
        tool('test').main(['c.py', 'c.pth', '--cfg-options', 'a=[1,2'])
    assert '--cfg-options: Imbalanced brackets' in capsys.readouterr().err


@pytest.mark.parametrize('name, part', [
    ('train', 'train_dataloader'), ('train', 'optim_wrapper'),
    ('test', 'test_evaluator')])
def test_config_that_lacks_a_part_is_told(tool, name, part):
    config = CONFIGS / 'classification/conv2former_t_in1k.py'
    message = refusal(tool(name).main, config, *['a.pth'] * (name == 'test'),
                      '--cfg-options', f'{part}=None')
    assert message.endswith(f'has no {part}')


def test_missing_checkpoint_to_resume_is_refused(tool):
    with pytest.raises(SystemExit, match="'gone.pth' does not exist"):
        train_config(tool, '--resume', 'gone.pth')


def test_config_that_a_resumed_run_has_saved_is_resumed_and_tested(
        tool, tmp_path):
    path = str(tmp_path / 'epoch_1.pth')
    saved = ['--cfg-options', 'resume=True', f'load_from={path}']
    with pytest.raises(SystemExit, match=f"'{path}' does not exist"):
        train_config(tool, *saved)
    torch.save(dict(meta={}, optimizer={}, state_dict=dict(
        weight=torch.zeros(1))), path)
    cfg = train_config(tool, *saved)
    assert cfg.resume is True and cfg.load_from == path
    cfg = options_of_test(
        tool, 'classification/conv2former_t_in1k.py', *saved)
    assert cfg.resume is False and cfg.load_from == __file__


def test_config_taken_for_a_checkpoint_to_resume_is_explained(tool, capsys):
    with pytest.raises(SystemExit):
        tool('train').parse_args(['--resume', 'config.py'])
    assert ("got 'config.py'; if that is the config, put --resume after it"
            in ' '.join(capsys.readouterr().err.split()))


def test_resume_of_a_work_dir_without_checkpoint_starts_anew(tool, tmp_path):
    cfg = train_config(
        tool, '--resume', '--work-dir', str(tmp_path), '--cfg-options',
        'load_from=weights.pth')
    assert cfg.resume is False and cfg.load_from == 'weights.pth'


@pytest.mark.parametrize('options, dtype, loss_scale', [
    (['--amp'], 'float16', 'dynamic'),
    (['--amp', 'fp16'], 'float16', 'dynamic'),
    (['--amp', 'bf16'], 'bfloat16', 1.),
    (['--amp', 'bf16', '--cfg-options', 'optim_wrapper.loss_scale=8.'],
     'bfloat16', 8.),
    # What the config sets stays where nothing else is asked for.
    (['--amp', '--cfg-options', 'optim_wrapper.dtype=bfloat16'], 'bfloat16',
     1.),
    (['--amp', 'fp16', '--cfg-options', 'optim_wrapper.dtype=bfloat16',
      'optim_wrapper.loss_scale=8.'], 'float16', 8.),
])
def test_amp_is_one_switch(tool, options, dtype, loss_scale):
    settings = train_config(tool, *options, device='cuda').optim_wrapper
    assert settings.type == 'AmpOptimWrapper'
    assert settings.dtype == dtype
    # 'dynamic' is the default of mmengine.
    assert settings.get('loss_scale', 'dynamic') == loss_scale
    assert settings.optimizer.type == 'AdamW'


@pytest.mark.parametrize('wrapper', ['AmpOptimWrapper', 'CPUAmpOptimWrapper'])
@pytest.mark.parametrize('device', ['cpu', 'cuda'])
def test_mixed_precision_of_the_config_is_that_of_the_device(
        tool, wrapper, device):
    settings = train_config(
        tool, '--cfg-options', f'optim_wrapper.type={wrapper}',
        device=device).optim_wrapper
    assert settings.type == 'CPU' * (device == 'cpu') + 'AmpOptimWrapper'
    assert settings.dtype == 'float16'


@pytest.mark.parametrize('dtype, options, scale', [
    ('fp16', [], 2.**16),
    ('fp16', ['optim_wrapper.loss_scale=8.'], 8.),
    ('fp16', ['optim_wrapper.loss_scale.init_scale=4.'], 4.),
    ('bf16', [], 1.),
])
def test_mixed_precision_trains_on_the_cpu(tool, dtype, options, scale):
    cfg = train_config(tool, '--amp', dtype, '--cfg-options', 'work_dir=x',
                       *options)
    for key in ('constructor', 'paramwise_cfg'):  # meant for a backbone
        cfg.optim_wrapper.pop(key, None)
    model = torch.nn.Linear(2, 2)
    wrapper = build_optim_wrapper(model, cfg.optim_wrapper)
    seen = []
    model.weight.register_hook(lambda grad: seen.append(grad.clone()))
    before = model.weight.detach().clone()
    with wrapper.optim_context(model):
        out = model(torch.ones(1, 2))
    assert out.dtype == getattr(torch, cfg.optim_wrapper.dtype)
    assert not torch.is_autocast_enabled('cpu')
    wrapper.update_params(out.float().sum() / 4)
    assert (seen[0] == scale / 4).all()
    assert (model.weight != before).all()
    assert model.weight.dtype == torch.float32


def test_sharding_with_a_loss_scale_is_refused_on_the_cpu(tool):
    for dtype in 'bf16', 'fp16':
        options = '--amp', dtype, '--fsdp', '--launcher', 'pytorch'
        refused = ''
        try:
            train_config(tool, *options)
        except SystemExit as error:
            refused = str(error)
        assert ('--amp bf16, or without' in refused) == (dtype == 'fp16')


@pytest.mark.parametrize('launcher, folders', [
    ('none', ['w']), ('pytorch', ['w', '.'])])
def test_folder_where_processes_collect_results_is_checked_first(
        launcher, folders, tool, monkeypatch):
    launch, checked = tool('launch'), []
    monkeypatch.setattr(launch, 'check_writable',
                        lambda folder, _: checked.append(folder))
    launch.check_folders(Config(dict(work_dir='w', launcher=launcher)))
    assert checked == folders


def test_loss_scale_of_another_type_is_refused(tool):
    cfg = train_config(tool, '--amp', '--cfg-options',
                       'optim_wrapper.loss_scale=8')
    for key in ('constructor', 'paramwise_cfg'):
        cfg.optim_wrapper.pop(key, None)
    with pytest.raises(TypeError, match="'dynamic', a float or a dict.* 8"):
        build_optim_wrapper(torch.nn.Linear(2, 2), cfg.optim_wrapper)


def test_fp16_on_the_cpu_skips_an_update_that_overflowed(tool):
    cfg = train_config(tool, '--amp')
    for key in ('constructor', 'paramwise_cfg'):
        cfg.optim_wrapper.pop(key, None)
    model = torch.nn.Linear(2, 2)
    wrapper = build_optim_wrapper(model, cfg.optim_wrapper)
    before = model.weight.detach().clone()
    with wrapper.optim_context(model):
        loss = 16 * model(torch.ones(1, 2)).float().sum()
    wrapper.update_params(loss)  # 16 * 2**16 is no number of fp16
    assert (model.weight == before).all()
    assert wrapper.state_dict()['loss_scaler']['scale'] == 2.**15


def test_config_taken_for_a_value_of_amp_is_explained(tool, capsys):
    with pytest.raises(SystemExit):
        tool('train').parse_args(['--amp', 'config.py'])
    assert "got 'config.py'; if that is the config, put --amp after it" in \
        ' '.join(capsys.readouterr().err.split())


def test_loss_scale_that_is_set_does_not_grow(tool):
    cfg = train_config(tool, '--amp', '--cfg-options',
                       'optim_wrapper.loss_scale=8.')
    for key in ('constructor', 'paramwise_cfg'):
        cfg.optim_wrapper.pop(key, None)
    model = torch.nn.Linear(2, 2)
    wrapper = build_optim_wrapper(model, cfg.optim_wrapper)
    wrapper.loss_scaler.set_growth_interval(1)
    with wrapper.optim_context(model):
        loss = model(torch.ones(1, 2)).float().sum()
    wrapper.update_params(loss)
    assert wrapper.loss_scaler.get_scale() == 8


def fit_lr(tool, *options):
    """The config and the line for the log that train.py makes of options."""
    cfg = train_config(tool, *options)
    return cfg, tool('train').fit_lr(cfg)


@pytest.mark.parametrize('launcher, variable', [
    ('none', 'WORLD_SIZE'),
    ('pytorch', 'WORLD_SIZE'),
    ('slurm', 'SLURM_NTASKS'),
    ('mpi', 'OMPI_COMM_WORLD_SIZE'),
])
def test_learning_rate_is_scaled_to_the_images_of_an_update(
        launcher, variable, tool, monkeypatch):
    monkeypatch.setenv(variable, '4')
    cfg, (level, text) = fit_lr(
        tool, '--auto-scale-lr', '--launcher', launcher, '--cfg-options',
        'train_dataloader.batch_size=16', 'optim_wrapper.accumulative_counts=2'
    )
    processes = 1 if launcher == 'none' else 4
    # 1e-3 is meant for 1024.
    assert cfg.optim_wrapper.optimizer.lr == pytest.approx(
        1e-3 * processes * 16 * 2 / 1024)
    # What the run saves says what the rate is meant for now, and mmengine,
    # which knows nothing of accumulated steps, does not scale it once more.
    assert cfg.auto_scale_lr == dict(
        enable=False, base_batch_size=processes * 32)
    assert level == logging.INFO and f'sees {processes * 32} images' in text


def test_learning_rate_of_a_resumed_training_is_that_of_its_checkpoint(tool):
    cfg = train_config(tool)
    cfg.resume = True
    _, text = tool('train').fit_lr(cfg)
    assert text.endswith('That of the checkpoint goes on.')


def test_batch_that_the_learning_rate_does_not_fit_is_reported(tool):
    cfg, (level, text) = fit_lr(tool)
    assert level == logging.WARNING
    assert 'sees 128 images' in text and '0.001 is meant for 1024' in text
    assert 'would make it 0.000125: add --auto-scale-lr' in text
    assert cfg.optim_wrapper.optimizer.lr == 1e-3


def test_batch_that_the_learning_rate_fits_is_not_reported(tool, monkeypatch):
    monkeypatch.setenv('WORLD_SIZE', '2')
    _, note = fit_lr(tool, '--launcher', 'pytorch', '--cfg-options',
                     'optim_wrapper.accumulative_counts=4')
    assert note is None


@pytest.mark.parametrize('scope, kind, expected', [
    ('mmseg', 'EncoderDecoder', 'mmseg'),
    ('mmengine', 'mmdet.MaskRCNN', 'mmdet'),
    (None, 'mmpretrain.models.classifiers.image.ImageClassifier',
     'mmpretrain'),
    (None, type('Mine', (Conv2Former, ), {'__module__': 'mmdet.models'}),
     'mmdet'),
    (None, Conv2Former, ''),
    (None, None, '')])
def test_library_of_a_config(scope, kind, expected):
    cfg = Config(dict(default_scope=scope, model=dict(type=kind)))
    assert config_queries.library(cfg) == expected


@pytest.mark.parametrize('option', ['auto_scale_lr=None',
                                    'auto_scale_lr.base_batch_size=0'])
def test_auto_scale_lr_without_a_batch_size_is_refused(option, tool):
    with pytest.raises(SystemExit, match='base_batch_size'):
        fit_lr(tool, '--auto-scale-lr', '--cfg-options', option)
    assert fit_lr(tool, '--cfg-options', option)[1] is None


def test_scaled_and_decayed_rates_reach_the_optimizer(
        tool, ade20k, tmp_path, monkeypatch):
    config = write_config(
        tmp_path / 'ade.py', ADE20K,
        'segmentation/upernet_conv2former_t_ade20k.py', ade20k)
    monkeypatch.chdir(tmp_path)
    groups = {}
    for name, options in dict(plain=[], scaled=['--auto-scale-lr']).items():
        tool('train').main([
            str(config), '--work-dir', name, *options, '--cfg-options',
            f'experiment_name={name}',
            'model.backbone.init_cfg=None', 'train_dataloader.num_workers=0',
            'train_dataloader.dataset.pipeline.2.scale=(128,64)',
            'train_dataloader.dataset.pipeline.3.crop_size=(64,64)',
            'optim_wrapper.accumulative_counts=4', 'val_cfg=None',
            'val_dataloader=None', 'val_evaluator=None',
            'train_cfg.max_iters=1', 'train_cfg.val_interval=1',
            'default_hooks.checkpoint.save_best=None'
        ])
        checkpoint = torch.load(
            tmp_path / name / 'iter_1.pth', weights_only=False)
        groups[name] = checkpoint['optimizer']['param_groups']
        log, = (path.read_text() for path in tmp_path.glob(f'{name}/*/*.log'))
        assert ('It has been scaled to 5e-05' in log) == bool(options)
    assert len(groups['plain']) == len(groups['scaled']) > 4
    for plain, scaled in zip(groups['plain'], groups['scaled']):
        assert plain['initial_lr'] == pytest.approx(1e-4 * plain['lr_scale'])
        assert scaled['lr_scale'] == plain['lr_scale']
        # 1 process x 2 images x 4 steps of the 16 that the rate is meant for
        for key in ('lr', 'initial_lr'):
            assert scaled[key] == pytest.approx(plain[key] / 2)


@pytest.mark.parametrize('setting, text', [
    ("[dict(type='OneCycleLR',eta_max=1e-3)]",
     'param_scheduler.0: OneCycleLR has one rate for all groups'),
    ("[dict(type='PolyLR',eta_min=1e-5)]",
     'param_scheduler.0: eta_min=1e-05 is one rate for all groups')])
def test_schedules_that_undo_the_layer_decay_are_told(tool, setting, text):
    cfg = train_config(
        tool, '--cfg-options', f'param_scheduler={setting}',
        config='segmentation/upernet_conv2former_t_ade20k.py')
    found, = tool('train').flat_schedules(cfg)
    assert found.startswith(text)
    for rate in 1., .9:
        cfg.optim_wrapper.paramwise_cfg.decay_rate = rate
        assert len(tool('train').flat_schedules(cfg)) == (rate != 1)
    cfg.optim_wrapper.pop('constructor')
    assert not tool('train').flat_schedules(cfg)


def test_schedules_of_a_momentum_may_end_above_nothing(tool):
    cfg = train_config(
        tool, '--cfg-options', "param_scheduler=[dict(type="
        "'CosineAnnealingMomentum',eta_min=0.85)]",
        config='segmentation/upernet_conv2former_t_ade20k.py')
    assert not tool('train').flat_schedules(cfg)


def test_no_schedule_of_the_configs_undoes_the_layer_decay(tool):
    for path in CONFIGS.glob('*/*.py'):
        assert not tool('train').flat_schedules(Config.fromfile(path)), path


def test_sharding_needs_several_processes(tool):
    with pytest.raises(SystemExit, match='dist_train.sh'):
        train_config(tool, '--fsdp')


@pytest.mark.parametrize('config', [
    'classification/conv2former_mini_digits.py',  # names no optim_wrapper.type
    'segmentation/upernet_conv2former_t_ade20k.py'])
def test_settings_of_sharding_are_kept(config, tool):
    cfg = train_config(tool, '--fsdp', '--launcher', 'pytorch',
                       '--cfg-options', 'strategy.model_wrapper.a=5',
                       config=config)
    assert cfg.runner_type == 'FlexibleRunner'
    assert cfg.strategy == dict(type='ShardedStrategy',
                                model_wrapper=dict(a=5))


def test_sharding_of_averaged_weights_is_refused(tool):
    hook = "[dict(type='EMAHook')]"
    with pytest.raises(SystemExit, match='--fsdp cannot train with EMAHook'):
        train_config(tool, '--fsdp', '--launcher', 'pytorch', '--cfg-options',
                     f'custom_hooks={hook}')


@pytest.mark.parametrize('launcher', ['slurm', 'mpi'])
def test_launchers_of_gpus_are_refused_without_one(launcher, tool):
    launch = tool('launch')
    launch.get_device = lambda: 'cpu'
    with pytest.raises(SystemExit, match=f'--launcher {launcher} needs GPUs'):
        launch.build_runner(Config(dict(launcher=launcher)))


@pytest.mark.skipif(platform.libc_ver()[0] != 'glibc', reason='needs glibc')
def test_freed_memory_serves_the_next_tensors():
    code = """
import resource, sys
sys.path.insert(0, 'tools')
import launch, torch

def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    torch.ones(2**25, dtype=torch.uint8)  # 8,192 pages
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

launch.keep_freed_memory()
print(min(faults() for _ in range(5)))
"""
    others = {name: value for name, value in os.environ.items()
              if not name.startswith(('MALLOC_', 'GLIBC_TUNABLES'))}
    process = subprocess.run([sys.executable, '-c', code], cwd=ROOT, text=True,
                             env=others, capture_output=True)
    assert process.returncode == 0, process.stderr
    assert int(process.stdout.split()[-1]) < 100


@pytest.mark.parametrize('libc, variable, calls', [
    ('glibc', 'OTHER', [-1, -3]),
    ('', 'OTHER', []),  # musl, macOS
    ('glibc', 'MALLOC_TRIM_THRESHOLD_', []),  # the user's own settings
    ('glibc', 'GLIBC_TUNABLES', []),
])
def test_thresholds_are_for_glibc_and_those_of_the_user_stay(
        tool, monkeypatch, libc, variable, calls):
    launch, found = tool('launch'), []

    def mallopt(parameter, value):
        found.append(parameter)
        return 1

    monkeypatch.setattr(launch.platform, 'libc_ver', lambda: (libc, '2'))
    monkeypatch.setattr(launch.ctypes, 'CDLL',
                        lambda name: SimpleNamespace(mallopt=mallopt))
    for name in list(os.environ):
        if name.startswith(('MALLOC_', 'GLIBC_TUNABLES')):
            monkeypatch.delenv(name)
    monkeypatch.setenv(variable, '1')
    launch.keep_freed_memory()
    assert found == calls


@pytest.mark.parametrize('spelling', ['--local-rank', '--local_rank'])
def test_both_spellings_of_local_rank_are_taken(tool, spelling):
    assert tool('train').parse_args(['c.py', spelling, '1']).local_rank == 1
    assert tool('test').parse_args(['c.py', 'p', f'{spelling}=1'
                                    ]).local_rank == 1


@pytest.mark.parametrize('environment, expected', [('1', '1'), (None, '2')])
def test_rank_of_a_launcher_is_kept(environment, expected, tool, monkeypatch):
    monkeypatch.delenv('LOCAL_RANK', raising=False)
    if environment is not None:
        monkeypatch.setenv('LOCAL_RANK', environment)
    else:  # and is taken away again
        monkeypatch.setitem(os.environ, 'LOCAL_RANK', '')
        del os.environ['LOCAL_RANK']
    train_config(tool, '--local-rank', '2')
    assert os.environ['LOCAL_RANK'] == expected


def test_work_dir_is_named_after_the_config(tool):
    assert train_config(tool).work_dir == 'work_dirs/conv2former_t_in1k'
    assert train_config(tool, '--work-dir', 'x').work_dir == 'x'
    assert train_config(tool, '--cfg-options', 'work_dir=y').work_dir == 'y'


def options_of_test(tool, config, *options):
    """The config as test.py makes it of the options."""
    test = tool('test')
    args = test.parse_args([str(CONFIGS / config), __file__, *options])
    return test.merge_args(sys.modules['launch'].read_config(args), args)


def test_masks_are_saved_as_run_lengths(tool, tmp_path):
    path = str(tmp_path / 'a.pkl')
    cfg = options_of_test(
        tool, 'detection/mask_rcnn_conv2former_t_coco.py', '--out', path)
    assert cfg.test_evaluator[-1] == dict(
        type='mmdet.DumpDetResults', out_file_path=path)


def test_missing_data_of_testing_are_answered_with_the_layout(
        tool, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    message = refusal(
        tool('test').main, CONFIGS / 'classification/conv2former_t_in1k.py',
        __file__)
    assert '[MISSING] data/imagenet/val' in message
    assert 'data/imagenet/train' not in message


def test_work_dir_of_testing_that_cannot_be_made_is_refused(tool, in_digits):
    message = refusal(tool('test').main, 'digits.py', __file__,
                      '--work-dir', 'digits.py/work')
    assert "cannot write in 'digits.py/work'" in message


def test_wrapped_data_sets_are_augmented(tool):
    cfg = Config.fromfile(CONFIGS / 'classification/conv2former_t_in1k.py')
    inner = cfg.test_dataloader.dataset
    cfg.test_dataloader.dataset = dict(type='ConcatDataset', datasets=[inner])
    tool('test')._augment(cfg)
    assert cfg.test_dataloader.dataset.datasets == [
        dict(inner, pipeline=cfg.tta_pipeline)]


def test_label_maps_are_not_saved_in_a_pickle(tool, tmp_path):
    path = tmp_path / 'a.pth'
    path.touch()
    message = refusal(
        tool('test').main,
        CONFIGS / 'segmentation/upernet_conv2former_t_ade20k.py', path,
        '--out', tmp_path / 'a.pkl')
    assert 'label maps are written, as pictures; name a folder' in message


@pytest.mark.parametrize('topk, is_right', [
    (1, True), ((1, 5), True), (11, False), ([1, 20], False), (None, True)])
def test_metric_of_more_classes_than_there_are_is_told(topk, is_right):
    check, loader = data_checks.check_metric, SimpleNamespace(dataset=None)
    metric = dict(type='Accuracy', topk=topk)
    check(metric, loader, {}, {}, 'val_evaluator')
    right = nullcontext() if is_right else pytest.raises(
        ValueError, match=r'val_evaluator: topk=.* the model has 10: set topk')
    with right:
        check(metric, loader, {'model.head.num_classes': 10}, {},
              'val_evaluator')


@pytest.mark.parametrize('config', ['mask_rcnn', 'cascade_mask_rcnn'])
def test_augmenting_instance_segmentation_is_refused(tool, config):
    with pytest.raises(SystemExit, match='instance segmentation.*a larger'):
        options_of_test(tool, f'detection/{config}_conv2former_t_coco.py',
                        '--tta')


def test_masks_that_are_not_there_do_not_forbid_augmenting(tool):
    """A detector made of a config with masks can be augmented."""
    with pytest.raises(SystemExit, match='no tta_model and tta_pipeline'):
        options_of_test(
            tool, 'detection/mask_rcnn_conv2former_t_coco.py', '--tta',
            '--cfg-options', 'model.roi_head.mask_head=None')


def test_augmenting_without_a_pipeline_is_refused(tool):
    with pytest.raises(SystemExit, match='no tta_model and tta_pipeline'):
        options_of_test(tool, 'classification/conv2former_mini_digits.py',
                        '--tta')


def test_fusing_beside_a_hook_that_exchanges_weights_is_refused(
        tool, in_digits):
    options = [Path('digits.py').resolve(), '--fuse', '--cfg-options']
    with pytest.raises(SystemExit, match=r'EMAHook.*custom_hooks="\[\]"'):
        options_of_test(tool, *options, 'custom_hooks.0.type=EMAHook')
    assert options_of_test(tool, *options, 'custom_hooks=[]').load_from is None


def test_fusing_a_model_without_conv2former_is_refused(
        tool, in_digits, tmp_path):
    options = [
        'model._delete_=True', 'model.type=mmpretrain.ImageClassifier',
        'model.backbone.type=mmpretrain.LeNet5',
        'model.backbone.num_classes=10'
    ]
    weights = MODELS.build(
        dict(type='mmpretrain.LeNet5', num_classes=10)).state_dict()
    torch.save({f'backbone.{key}': weights[key] for key in weights},
               tmp_path / 'weights.pth')
    message = refusal(
        tool('test').main, 'digits.py', tmp_path / 'weights.pth', '--fuse',
        '--work-dir', tmp_path, '--cfg-options', *options)
    assert message.startswith('--fuse: the ImageClassifier has no Conv2Former')


@pytest.mark.parametrize('options, expected', [
    (['--launcher', 'pytorch'], 'first process only'),
    (['--tta'], 'cannot paint augmented images'),
])
def test_painting_what_a_library_cannot_paint_is_refused(
        options, expected, tool, tmp_path):
    with pytest.raises(SystemExit, match=expected):
        options_of_test(tool, 'classification/conv2former_t_in1k.py',
                        '--show-dir', str(tmp_path / 'painted'), *options)
    assert not list(tmp_path.iterdir())


def test_predictions_of_boxes_go_to_a_pickle_only(tool):
    with pytest.raises(SystemExit, match='.pkl'):
        options_of_test(tool, 'detection/mask_rcnn_conv2former_t_coco.py',
                        '--out', 'predictions.json')


def test_predictions_are_saved_by_an_evaluator_too(tool, tmp_path):
    test = tool('test')
    metrics = [dict(type='Accuracy')]
    cfg = Config(dict(default_scope='mmpretrain', model=dict(), test_evaluator=
                      dict(type='Evaluator', metrics=metrics[0])))
    assert config_queries.evaluators(cfg, 'test') == metrics
    path = str(tmp_path / 'a.pkl')
    test._dump(cfg, path)
    assert cfg.test_evaluator == dict(type='Evaluator', metrics=[
        *metrics, dict(type='DumpResults', out_file_path=path)])
    cfg.test_evaluator.type = 'MultiDatasetsEvaluator'
    with pytest.raises(SystemExit, match='is a MultiDatasetsEvaluator'):
        test._dump(cfg, path)


@pytest.mark.parametrize('scope, found', [('mmpretrain', True),
                                          ('mmdet', False)])
def test_home_is_known_where_a_library_knows_it(
        scope, found, tool, tmp_path, monkeypatch):
    monkeypatch.setenv('HOME', str(tmp_path))
    (tmp_path / 'data').mkdir()
    cfg = Config(dict(default_scope=scope, model=dict(), train_dataloader=dict(
        dataset=dict(type='Own', data_root='~/data', data_prefix='.'))))
    expected = nullcontext() if found else pytest.raises(
        SystemExit, match='MISSING')
    with expected:
        tool('launch').check_data(cfg, ('train', ))


def test_predictions_do_not_go_to_a_folder(tool, tmp_path):
    (tmp_path / 'a.pkl').mkdir()
    with pytest.raises(SystemExit, match=r'a.pkl. is a folder; name a file'):
        options_of_test(tool, 'classification/conv2former_t_in1k.py',
                        '--out', str(tmp_path / 'a.pkl'))


def test_types_may_be_classes(tool, tmp_path):
    """As in the new style of mmengine's configs."""
    from mmpretrain.datasets import CustomDataset
    from mmpretrain.engine import VisualizationHook
    cfg = Config.fromfile(CONFIGS / 'classification/conv2former_t_in1k.py')
    cfg.launcher, test = 'none', tool('test')
    hook = cfg.default_hooks.visualization
    hook.type = VisualizationHook
    test._paint(cfg, str(tmp_path / 'painted'), tta=False)
    assert hook.enable and hook.out_dir == str(tmp_path / 'painted')
    data_set = Config(dict(data=dict(type=CustomDataset, data_root='x'))).data
    launch = sys.modules['launch']
    assert config_queries.data_paths(data_set) == {
        'data_root, one folder per class': 'x'}
    assert launch.without_sync_bn(
        dict(type=torch.nn.SyncBatchNorm)) == dict(type='BN')


def test_settings_of_the_wrapper_are_kept_on_a_cpu(tool, monkeypatch):
    launch = tool('launch')
    monkeypatch.setattr(launch, 'get_device', lambda: 'cpu')
    monkeypatch.setattr(launch, 'keep_freed_memory', lambda: None)
    monkeypatch.setattr(torch.distributed, 'is_initialized', lambda: True)
    monkeypatch.setattr(launch.Runner, 'from_cfg', lambda cfg: SimpleNamespace(
        build_dataloader=None, build_val_loop=None, build_test_loop=None))
    cfg = Config(dict(
        launcher='pytorch', model=dict(type='A'), find_unused_parameters=True,
        model_wrapper_cfg=dict(static_graph=True)))
    launch.build_runner(cfg)
    assert cfg.model_wrapper_cfg == dict(
        type='MMDistributedDataParallel', broadcast_buffers=False,
        find_unused_parameters=True, static_graph=True, device_ids=None)


def test_batch_norm_is_not_synchronised_without_a_gpu(tool):
    cfg = Config.fromfile(
        CONFIGS / 'segmentation/upernet_conv2former_t_ade20k.py')
    model = tool('launch').without_sync_bn(cfg.model)
    assert model['decode_head']['norm_cfg']['type'] == 'BN'
    assert 'SyncBN' in str(cfg.model) and 'SyncBN' not in str(model)
    assert str(model) == str(cfg.model.to_dict()).replace('SyncBN', 'BN')


@pytest.mark.parametrize('script, given', [
    ('dist_train.sh', ['c.py']),
    ('dist_train.sh', ['c.py', '0']),
    ('dist_train.sh', ['8', 'c.py']),
    ('dist_train.sh', ['c.py', '--amp']),
    ('dist_test.sh', ['c.py', 'p.pth']),
    ('dist_test.sh', ['c.py', 'p.pth', '-1']),
    ('slurm_train.sh', ['part', 'job', 'c.py', '--amp']),
    ('slurm_test.sh', ['part', 'job', 'c.py']),
])
def test_scripts_say_how_they_are_called(script, given):
    done = subprocess.run(['bash', ROOT / 'tools' / script, *given],
                          capture_output=True, text=True, timeout=60)
    assert done.returncode == 2 and 'usage: ' in done.stderr


@pytest.mark.skipif(torch.cuda.is_available(), reason='there is a GPU')
def test_gpu_checks_want_a_gpu_and_a_known_step(tmp_path):
    def checks(*given):
        return subprocess.run(
            ['bash', ROOT / 'tools/gpu_checks.sh', '--out', tmp_path, *given],
            env=dict(os.environ, PYTHON=sys.executable), capture_output=True,
            text=True, timeout=120)

    done = checks()
    assert done.returncode == 1 and 'torch finds no GPU here' in done.stderr
    done = checks('--only', 'everything')
    assert done.returncode == 2 and 'operators digits' in done.stderr
    for given, message in ((['--only'], "unknown step ''; known: tiny"),
                           (['--out'], '--out needs a folder'),
                           (['--wheels', '/nothere'],
                            "--wheels '/nothere' is no folder")):
        done = checks(*given)
        assert done.returncode == 2 and message in done.stderr
    assert not list(tmp_path.iterdir())


@pytest.fixture
def slurm(tmp_path):
    """Run a script with a stand-in for srun that prints what it is given."""
    srun = tmp_path / 'srun'
    srun.write_text('#!/bin/sh\necho "port $MASTER_PORT: $@"\n')
    srun.chmod(0o755)

    def slurm(script, *arguments, **env):
        return run('bash', ROOT / 'tools' / script, *arguments, cwd=tmp_path,
                   PATH=f'{tmp_path}:{os.environ["PATH"]}', **env).strip()

    return slurm


def test_slurm_trains_with_a_task_per_gpu(slurm):
    printed = slurm('slurm_train.sh', 'gpu', 'name', 'c.py', 'work', '--amp',
                    'bf16', GPUS='16')
    assert ('--partition=gpu --job-name=name --gres=gpu:8 --ntasks=16 '
            '--ntasks-per-node=8 --cpus-per-task=8 --kill-on-bad-exit=1 '
            'python -u ') in printed
    assert printed.endswith(
        'train.py c.py --work-dir work --amp bf16 --launcher slurm')
    assert re.match(r'port 2\d{4}: ', printed)


def test_slurm_tests_with_what_the_environment_sets(slurm):
    printed = slurm(
        'slurm_test.sh', 'gpu', 'name', 'c.py', 'p.pth', '--out', 'o.pkl',
        GPUS='4', CPUS_PER_TASK='3', SRUN_ARGS='--time=1:00 --account=us',
        MASTER_PORT='1234')
    assert printed.startswith('port 1234: ')
    assert ('--gres=gpu:4 --ntasks=4 --ntasks-per-node=4 --cpus-per-task=3 '
            '--kill-on-bad-exit=1 --time=1:00 --account=us python') in printed
    assert printed.endswith(
        'test.py c.py p.pth --out o.pkl --launcher slurm')


@pytest.mark.parametrize('script, env, told', [
    ('slurm_train.sh', dict(GPUS='8x'), 'got GPUS=8x GPUS_PER_NODE='),
    ('slurm_train.sh', dict(GPUS='0'), 'got GPUS=0'),
    ('slurm_train.sh', dict(GPUS='8', GPUS_PER_NODE='09'),
     'GPUS=8 GPUS_PER_NODE=09'),
    ('torchrun.sh', dict(NNODES='1:2'), "NNODES must be a number from 1, got "
     "'1:2'")])
def test_numbers_of_the_environment_are_checked(script, env, told):
    done = subprocess.run(
        ['bash', ROOT / 'tools' / script, '1', 'train.py', 'c.py', 'work'],
        env={**os.environ, **env}, capture_output=True, text=True, timeout=60)
    assert done.returncode == 2 and told in done.stderr


@pytest.mark.parametrize('missing', ['NODE_RANK', 'MASTER_ADDR'])
def test_several_machines_have_to_be_told_where_they_meet(missing, tmp_path):
    env = {**os.environ, 'NNODES': '2', 'NODE_RANK': '1',
           'MASTER_ADDR': '10.0.0.1', missing: ''}
    done = subprocess.run(
        ['bash', ROOT / 'tools/dist_train.sh', 'c.py', '8'], env=env,
        capture_output=True, text=True, timeout=60)
    assert done.returncode == 2
    assert f'NNODES=2 machines need {missing}: a NODE_RANK from 0 to 1' in \
        done.stderr


@pytest.mark.parametrize('rank', ['2', 'one', '-1'])
def test_machine_that_is_none_of_several_is_told(rank):
    env = {**os.environ, 'NNODES': '2', 'NODE_RANK': rank,
           'MASTER_ADDR': '10.0.0.1'}
    done = subprocess.run(
        ['bash', ROOT / 'tools/dist_train.sh', 'c.py', '8'], env=env,
        capture_output=True, text=True, timeout=60)
    assert done.returncode == 2
    assert f"number from 0 to 1, got '{rank}'" in done.stderr


@pytest.mark.parametrize('env, expected', [
    (dict(NNODES='2', NODE_RANK='1', MASTER_ADDR='10.0.0.1', PORT='1234'),
     '--nnodes 2 --node-rank 1 --master-addr 10.0.0.1 --master-port 1234'),
    (dict(NODE_RANK='3'), '--standalone --local-addr 127.0.0.1'),
    (dict(PORT='1234'), '--nnodes 1 --node-rank 0 --master-addr 127.0.0.1 '
     '--master-port 1234')])
def test_machines_meet_where_they_are_told(env, expected, tmp_path):
    """What torchrun is given; a stand-in for python prints it."""
    python = tmp_path / 'python'
    python.write_text('#!/bin/sh\necho "$@"\n')
    python.chmod(0o755)
    printed = run(
        'bash', ROOT / 'tools/dist_train.sh', 'c.py', '8', '--amp',
        cwd=tmp_path, PATH=f'{tmp_path}:{os.environ["PATH"]}', **env)
    assert f'.run {expected} --nproc-per-node 8 ' in printed
    assert printed.strip().endswith('train.py c.py --amp --launcher pytorch')
