"""Data that cannot be used is refused with a message that names the file."""
import json
import os
import pickle
import shutil
import sys
from contextlib import nullcontext
from itertools import count
from pathlib import Path
from types import SimpleNamespace

import mmdet
import numpy as np
import pytest
from mmcv.transforms import LoadImageFromFile
from mmdet.datasets.transforms import LoadAnnotations
from mmengine.config import Config
from mmengine.dataset import pseudo_collate
from mmengine.registry import DATASETS, init_default_scope
from mmengine.runner import Runner
from PIL import Image
from pycocotools import mask as coco_mask
from torch.utils.data import DataLoader

import checked_load
import checkpoint_files
import coco_checks
import config_queries
import data_checks
from data_error import DataError, one_message

CONFIGS = Path(__file__).resolve().parents[1] / 'configs'
COCO = CONFIGS / 'detection/mask_rcnn_conv2former_t_coco.py'
CASCADE = CONFIGS / 'detection/cascade_mask_rcnn_conv2former_t_coco.py'
ADE20K = CONFIGS / 'segmentation/upernet_conv2former_t_ade20k.py'
IN1K = CONFIGS / 'classification/conv2former_t_in1k.py'
TINY = ('dict(_delete_=True, depths=[1, 1, 1, 1], dims=[8, 8, 16, 16], '
        'kernel_size=3)')
# Recipes with models that are built in a moment, read in this process.
SMALL = {
    COCO: """
model = dict(
    backbone=dict(arch={tiny}, init_cfg=None),
    neck=dict(in_channels=[8, 8, 16, 16], out_channels=16),
    rpn_head=dict(in_channels=16, feat_channels=16),
    roi_head=dict(
        bbox_roi_extractor=dict(out_channels=16),
        bbox_head=dict(in_channels=16, fc_out_channels=16),
        mask_roi_extractor=dict(out_channels=16),
        mask_head=dict(num_convs=1, in_channels=16, conv_out_channels=16)),
    train_cfg=dict(rpn_proposal=dict(max_per_img=9)))
train_cfg = dict(max_epochs=1, val_interval=2)
train_dataloader['dataset']['pipeline'] = [
    dict(type='LoadImageFromFile'),
    dict(type='LoadAnnotations', with_bbox=True, with_mask=True),
    dict(type='Resize', scale=(96, 64), keep_ratio=True),
    dict(type='PackDetInputs', meta_keys=(
        'img_id', 'img_path', 'ori_shape', 'img_shape', 'scale_factor'))]
""",
    ADE20K: """
model = dict(
    data_preprocessor=dict(size=(64, 64)),
    backbone=dict(arch={tiny}, init_cfg=None),
    decode_head=dict(in_channels=[8, 8, 16, 16], channels=8),
    auxiliary_head=dict(in_channels=16, channels=8))
train_cfg = dict(max_iters=4, val_interval=9)
param_scheduler = [dict(type='ConstantLR', factor=1., by_epoch=False)]
train_dataloader['dataset']['pipeline'] = [
    dict(type='LoadImageFromFile'),
    dict(type='LoadAnnotations'),
    dict(type='RandomResize', scale=(128, 64), ratio_range=(1., 1.),
         keep_ratio=True),
    dict(type='RandomCrop', crop_size=(64, 64)),
    dict(type='PackSegInputs')]
""",
    IN1K: """
model = dict(
    backbone=dict(arch={tiny}), neck=dict(in_channels=16, out_channels=16),
    head=dict(in_channels=16))
train_cfg = dict(max_epochs=1, val_interval=2)
for loader in (train_dataloader, val_dataloader):
    loader['dataset']['metainfo'] = dict(classes=['a', 'b'])
param_scheduler = [dict(type='ConstantLR', factor=1.)]
"""
}
HERE = """
_base_ = [{base!r}]
train_dataloader = dict(
    batch_size=2, num_workers=0, persistent_workers=False,
    dataset=dict(data_root={data!r}))
val_dataloader = dict(
    num_workers=0, persistent_workers=False, dataset=dict(data_root={data!r}))
test_dataloader = val_dataloader
default_hooks = dict(checkpoint=dict(interval=-1, save_best=None))
"""


@pytest.fixture
def copy(tmp_path):
    """Copy a data set, to damage it."""

    def copy(root):
        return Path(shutil.copytree(root, tmp_path / 'data'))

    return copy


@pytest.fixture
def pictures(tmp_path):
    """Two classes of three pictures as folders, for train and val."""
    for split in ('train', 'val'):
        for name in 'ab':
            folder = tmp_path / 'data' / split / name
            folder.mkdir(parents=True)
            for i in range(3):
                noise = np.random.RandomState(i).randint(0, 255, (64, 64, 3))
                Image.fromarray(noise.astype('uint8')).save(
                    folder / f'{i}.jpg')
    return tmp_path / 'data'


def write_config(base, data):
    path = data.parent / 'config.py'
    text = HERE.format(base=str(base), data=str(data))
    if base == COCO:
        annotations = str(data / 'annotations/instances_val2017.json')
        text += (f'val_evaluator = dict(ann_file={annotations!r})\n'
                 'test_evaluator = val_evaluator\n')
    path.write_text(text + SMALL[base].format(tiny=TINY))
    return path


@pytest.fixture
def train(load_tool, monkeypatch, tmp_path):
    """Train a small model on a data set, as tools/train.py does."""
    monkeypatch.setitem(sys.modules, 'launch', load_tool('launch'))
    monkeypatch.setenv('LOCAL_RANK', '0')
    runs = count()

    def train(base, data, *options):
        load_tool('train').main([
            str(write_config(base, data)), '--work-dir',
            str(tmp_path / 'work'), '--cfg-options',
            # mmengine's logger is found by name: none may be used again.
            f'experiment_name={tmp_path.name}_{next(runs)}', *options
        ])

    return train


@pytest.fixture
def refusal(train):
    """The message with which training ends."""

    def refusal(*args):
        with pytest.raises(SystemExit) as raised:
            train(*args)
        assert isinstance(raised.value.code, str), 'ended without a message'
        return raised.value.code

    return refusal


def log(tmp_path):
    """What the run has logged."""
    text, = (path.read_text() for path in tmp_path.glob('work/*/*.log'))
    return text


def edit(path, change):
    """Change an annotation file."""
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


def build(base, data, part='train', **settings):
    """Build a data loader of a recipe, without a model."""
    cfg = Config.fromfile(write_config(base, data))
    init_default_scope(cfg.default_scope)
    loader = cfg[f'{part}_dataloader']
    loader.dataset.update(settings)
    return data_checks.build_loader(Runner.build_dataloader, loader)


def loader_of(pictures, **settings):
    """A data loader of these pictures."""
    cfg = Config.fromfile(write_config(IN1K, pictures))
    init_default_scope(cfg.default_scope)
    return data_checks.build_loader(
        Runner.build_dataloader, {**cfg.train_dataloader, **settings})


def check(base, data, part='train', sizes=None, exact=True, **settings):
    loader = build(base, data, part, **settings)
    data_checks.check_loader(loader, sizes or {}, exact)
    return loader


def rename_person(content):
    content['categories'][0]['name'] = 'human'


def only_cells(content):
    content['categories'] = [dict(id=1, name='cell')]
    for annotation in content['annotations']:
        annotation['category_id'] = 1


def reverse(content):
    content['categories'].reverse()


def stray(content):
    content['annotations'][0]['category_id'] = 12


@pytest.mark.parametrize('split', ['train', 'val'])
def test_class_that_a_coco_file_lacks_is_named_before_training(
        split, coco, copy, refusal, tmp_path):
    data = copy(coco)
    path = data / f'annotations/instances_{split}2017.json'
    edit(path, rename_person)
    message = refusal(COCO, data)
    assert f"'{path}' does not fit" in message
    assert "no category 'person'." in message and "'human'" in message
    assert 'metainfo.classes' in message and 'num_classes' in message
    assert 'Epoch(train)' not in log(tmp_path)


def test_images_of_training_that_share_an_id_are_named(coco, copy):
    data = copy(coco)

    def share(content):
        content['images'][1]['id'] = content['images'][0]['id']

    edit(data / 'annotations/instances_train2017.json', share)
    with pytest.raises(DataError, match=(
            r"train2017\.json' has the id \d+ twice, at entries 0 and 1 of "
            "'images'")):
        check(COCO, data)


def test_categories_in_another_order_are_refused(coco, copy):
    data = copy(coco)
    edit(data / 'annotations/instances_train2017.json', reverse)
    with pytest.raises(
            DataError, match="another order.*'toothbrush'"):
        check(COCO, data)


def test_annotations_of_no_category_are_refused(coco, copy):
    data = copy(coco)
    edit(data / 'annotations/instances_train2017.json', stray)
    with pytest.raises(DataError, match='category_id 12,'):
        check(COCO, data)


def test_file_with_none_of_the_classes_is_refused(coco, copy):
    """mmdet would filter all its images, and fail for want of any."""
    data = copy(coco)
    edit(data / 'annotations/instances_train2017.json', only_cells)
    with pytest.raises(
            DataError,
            match=r"no category 'person'.*\(80\).*Its categories: 'cell'\."):
        check(COCO, data)


def test_classes_may_be_some_of_the_categories(coco, copy):
    loader = check(
        COCO, copy(coco), metainfo=dict(classes=('person', 'toothbrush')))
    assert len(loader.dataset.cat_ids) == 2


def ids_as_text(content):
    for category in content['categories']:
        category['id'] = str(category['id'])


def ids_of_annotations_as_text(content):
    for annotation in content['annotations']:
        annotation['category_id'] = str(annotation['category_id'])


def repeat_id(content):
    content['categories'][1]['id'] = 1


def repeat_name(content):
    content['categories'][1]['name'] = 'person'


@pytest.mark.parametrize('part', ['train', 'val'])
@pytest.mark.parametrize('change, reason', [
    (ids_as_text, "category {'.*'id': '1'.* must be a number, the categ"),
    (ids_of_annotations_as_text, "category_id '1.* its categories are 1, 2"),
    (repeat_id, "one category with the id 1: 'person' and 'bicycle'"),
    (repeat_name, "one category of the name 'person'"),
], ids=['text', 'text in annotations', 'same id', 'same name'])
def test_categories_that_cannot_be_told_apart_are_refused(
        change, reason, part, coco, copy):
    data = copy(coco)
    path = data / f'annotations/instances_{part}2017.json'
    edit(path, change)
    with pytest.raises(DataError, match=f"'{path}' .*{reason}"):
        check(COCO, data, part)


@pytest.mark.parametrize('entries, key', [('annotations', 'category_id'),
                                          ('images', 'height'),
                                          ('categories', 'name')])
def test_incomplete_entry_of_a_coco_file_is_named(entries, key, coco, copy):
    data = copy(coco)
    path = data / 'annotations/instances_train2017.json'
    edit(path, lambda content: content[entries][1].pop(key))
    with pytest.raises(
            DataError,
            match=f"'{path}' .* entry 1 of '{entries}' .* has no '{key}'"):
        check(COCO, data)


@pytest.mark.parametrize('entries, key, value, reason', [
    ('annotations', 'bbox', None, 'bbox=None; expected four numbers'),
    ('annotations', 'bbox', [1, 2, 3], r'bbox=\[1, 2, 3\]; expected four'),
    ('annotations', 'bbox', ['1', '2', '3', '4'], 'expected four numbers'),
    ('annotations', 'area', '12', "area='12'; expected a number"),
    ('images', 'height', '128', "height='128'; expected a number"),
    ('images', 'file_name', 7, 'file_name=7; expected a text')])
def test_entry_of_a_coco_file_with_another_type_is_named(
        entries, key, value, reason, coco, copy):
    data = copy(coco)
    path = data / 'annotations/instances_train2017.json'
    edit(path, lambda content: content[entries][0].update({key: value}))
    with pytest.raises(DataError,
                       match=f"'{path}' .* entry 0 of '{entries}' .*{reason}"):
        check(COCO, data)


@pytest.mark.parametrize('entries, reason', [
    ('annotations', 'entry 0 .*is None'),
    ('categories', 'entry 0 .*is None')])
def test_entry_of_a_coco_file_that_is_none_is_named(entries, reason, coco,
                                                    copy):
    data = copy(coco)
    path = data / 'annotations/instances_train2017.json'
    edit(path, lambda content: content[entries].__setitem__(0, None))
    with pytest.raises(DataError, match=f"'{path}' .*{reason}"):
        check(COCO, data)


def test_measuring_on_more_images_than_are_tested_is_told(coco, copy,
                                                          monkeypatch):
    lines = []
    monkeypatch.setattr(coco_checks, 'print_log',
                        lambda text, **_: lines.append(text))
    data = copy(coco)
    for options in {}, dict(indices=1):
        loader = check(COCO, data, 'val', **options)
        metric = dict(ann_file=loader.dataset.ann_file)
        coco_checks.check_metric(metric, loader, 'val_evaluator')
    line, = lines
    assert 'indices= takes 1 of them: the others count as missed' in line


@pytest.mark.parametrize('part', ['train', 'val'])
@pytest.mark.parametrize('content, reason', [
    ('{}', 'has no list of categories'), ('[]', 'holds a list; expected')])
def test_json_that_is_no_coco_file_is_named(
        content, reason, part, coco, copy):
    data = copy(coco)
    path = data / f'annotations/instances_{part}2017.json'
    path.write_text(content)
    with pytest.raises(DataError, match=f"'{path}' {reason}"):
        check(COCO, data, part)


def of_other_images(content):
    for annotation in content['annotations']:
        annotation['image_id'] += 1000


def images_as_text(content):
    for annotation in content['annotations']:
        annotation['image_id'] = str(annotation['image_id'])


def no_area(content):
    for annotation in content['annotations']:
        annotation['area'] = 0


def in_fractions(content):
    for annotation in content['annotations']:
        annotation['bbox'] = [0.1, 0.2, 0.3, 0.4]


def no_annotations(content):
    content['annotations'].clear()


def no_images(content):
    content['images'].clear()


@pytest.mark.parametrize('filter_cfg', [None, dict(filter_empty_gt=True)])
@pytest.mark.parametrize('change, reason', [
    (of_other_images, 'none is of one of its images: .* image_id 1[0-9]{3}'),
    (images_as_text, "image_id '.* the id .* a text is not the number"),
    (no_area, 'no object to train on.*entry 0 has area=0 and bbox='),
    (in_fractions, r'no object to train on.*bbox=\[0.1, 0.2, 0.3, 0.4\]'),
    (no_annotations, "has no 'annotations'"),
    (no_images, "lists no 'images'"),
])
def test_coco_file_without_an_object_to_train_on_is_refused(
        change, reason, filter_cfg, coco, copy):
    data = copy(coco)
    path = data / 'annotations/instances_train2017.json'
    edit(path, change)
    with pytest.raises(DataError, match=f"'{path}' .*{reason}"):
        check(COCO, data, filter_cfg=filter_cfg)


def test_images_without_annotations_are_taken_for_testing(coco, copy):
    data = copy(coco)
    edit(data / 'annotations/instances_val2017.json', no_annotations)
    check(COCO, data, 'val')


def test_pictures_of_nothing_may_be_a_part_of_the_data(coco, copy):
    data = copy(coco)
    folder = data / 'annotations'
    edit(folder / 'instances_val2017.json', no_annotations)
    cfg = Config.fromfile(write_config(COCO, data))
    init_default_scope('mmdet')
    inner = cfg.train_dataloader.dataset
    inner.filter_cfg = None
    nothing = {**inner, 'ann_file': 'annotations/instances_val2017.json',
               'data_prefix': dict(img='val2017/')}
    loader = type('Loader', (), dict(drop_last=False, dataset=DATASETS.build(
        dict(type='ConcatDataset', datasets=[inner, nothing]))))
    objects = [bool(info['instances']) for info in map(
        loader.dataset.get_data_info, range(len(loader.dataset)))]
    assert any(objects) and not all(objects)
    data_checks.check_loader(loader, {}, True)


def test_a_part_whose_objects_are_all_left_out_is_refused(coco, copy):
    """They were not meant to be pictures of nothing."""
    data = copy(coco)
    edit(data / 'annotations/instances_train2017.json', no_area)
    cfg = Config.fromfile(write_config(COCO, data))
    init_default_scope('mmdet')
    data_set = DATASETS.build({**cfg.train_dataloader.dataset,
                               'filter_cfg': None})
    with pytest.raises(DataError, match='no object to train on'):
        coco_checks.check_data_set(data_set, alone=False)


def boxes_only(content):
    for annotation in content['annotations']:
        del annotation['segmentation']


def empty_mask(content):
    content['annotations'][-1]['segmentation'] = []


@pytest.fixture
def changed_coco(coco, copy):
    """Copy the data with both annotation files changed."""

    def change(function):
        data = copy(coco)
        for split in ('train', 'val'):
            edit(data / f'annotations/instances_{split}2017.json', function)
        return data

    return change


@pytest.fixture
def boxes(changed_coco):
    """Data without masks."""
    return changed_coco(boxes_only)


def test_boxes_without_masks_are_named_before_training(
        boxes, refusal, tmp_path):
    message = refusal(COCO, boxes)
    assert f"the image '{boxes}/train2017/" in message
    assert "annotations without 'segmentation'" in message
    assert 'model.roi_head.mask_head=None' in message
    assert 'Epoch(train)' not in log(tmp_path)


def test_message_about_boxes_without_masks_says_what_makes_it_run(
        boxes, train, tmp_path):
    train(COCO, boxes, 'model.roi_head.mask_head=None',
          'train_dataloader.dataset.pipeline.1.with_mask=False',
          'val_dataloader.dataset.pipeline.2.with_mask=False',
          'val_evaluator.metric=bbox')
    assert 'Epoch(train)' in log(tmp_path)


def test_box_without_a_mask_is_named_when_it_is_read(
        coco, copy, monkeypatch):
    monkeypatch.setattr(data_checks, 'SAMPLE', 0)
    data = copy(coco)
    edit(data / 'annotations/instances_train2017.json', empty_mask)
    data_set = check(COCO, data).dataset
    with pytest.raises(DataError, match="without 'segmentation'"):
        for i in range(len(data_set)):
            data_set[i]


def mask_of(segmentation):
    """A change of a file that gives its last object such a mask."""

    def change(content):
        content['annotations'][-1]['segmentation'] = segmentation

    return change


@pytest.mark.parametrize('segmentation', [
    [10, 10, 20, 20, 30, 10], [['10', '10', '20', '20', '30', '10']],
    {'size': [64, 64]}, {'size': [64, 64], 'counts': [5, 5]},
    {'size': [64], 'counts': [64]}, {'size': [64, 64], 'counts': '%%%'},
    {'size': [64, 64], 'counts': None}, '10 10 20 20',
    [[10, 10, 20, 20, float('nan'), 10]]])
def test_mask_that_is_none_is_named_when_it_is_read(
        segmentation, coco, copy, monkeypatch):
    monkeypatch.setattr(data_checks, 'SAMPLE', 0)
    data = copy(coco)
    edit(data / 'annotations/instances_train2017.json', mask_of(segmentation))
    data_set = check(COCO, data).dataset
    with pytest.raises(DataError, match='a mask is a list of polygons'):
        for i in range(len(data_set)):
            data_set[i]


def test_run_lengths_are_masks(coco, copy):
    data = copy(coco)
    path = data / 'annotations/instances_train2017.json'
    height, width = (json.loads(path.read_text())['images'][0][key]
                     for key in ('height', 'width'))
    lengths = dict(size=[height, width], counts=[5, 3, height * width - 8])
    packed = coco_mask.frPyObjects(lengths, height, width)
    for counts in lengths['counts'], packed['counts'].decode():
        assert coco_checks._is_mask({**lengths, 'counts': counts})


def test_polygons_of_arrays_are_loaded():
    square = np.array([2, 2, 6, 2, 6, 6, 2, 6], 'float32')
    load = LoadAnnotations(with_bbox=False, with_label=False, with_mask=True)
    results = checked_load.CheckedLoad(load, 'seg_map_path')(dict(
        ori_shape=(8, 8),
        instances=[dict(mask=[square], ignore_flag=0)]))
    assert results['gt_masks'].areas.tolist() == [16]


@pytest.mark.parametrize('segmentation', [
    None, [], [[]], [[10, 10, 20, 20]], [10, 10, 20, 20, 30, 10]])
@pytest.mark.parametrize('metric', ['segm', ['bbox', 'segm']])
def test_mask_that_cannot_be_measured_is_named_before_training(
        segmentation, metric, coco, copy):
    path = copy(coco) / 'annotations/instances_val2017.json'
    loader = check(COCO, path.parents[1], 'val', pipeline=[])
    metric = dict(ann_file=str(path), metric=metric)
    coco_checks.check_metric(metric, loader, 'val_evaluator')
    edit(path, mask_of(segmentation))
    with pytest.raises(DataError, match=r'\(1\).*val_evaluator.metric=bbox'):
        coco_checks.check_metric(metric, loader, 'val_evaluator')
    coco_checks.check_metric({**metric, 'metric': 'bbox'}, loader, '')


def test_objects_that_cannot_be_measured_are_named_before_training(
        coco, copy):
    path = copy(coco) / 'annotations/instances_val2017.json'
    loader = check(COCO, path.parents[1], 'val', pipeline=[])
    edit(path, lambda content: content['annotations'][2].pop('iscrowd'))
    metric = dict(type='CocoMetric', ann_file=str(path))
    with pytest.raises(DataError, match="has no 'iscrowd'"):
        coco_checks.check_metric(metric, loader, 'val_evaluator')
    metric['type'] = 'LVISMetric'
    coco_checks.check_metric(metric, loader, 'val_evaluator')


def share_ids(name):
    def change(content):
        content[name][2]['id'] = content[name][0]['id']
    return change


def test_annotations_of_the_same_id_are_named(coco, copy):
    """Such as those that are counted anew for each image."""
    path = copy(coco) / 'annotations/instances_train2017.json'
    edit(path, share_ids('annotations'))
    with pytest.raises(DataError, match="entries 0 and 2 of 'annotations'"):
        check(COCO, path.parents[1])


@pytest.mark.parametrize('name', ['images', 'annotations'])
def test_what_is_measured_has_ids_of_its_own(name, coco, copy):
    path = copy(coco) / 'annotations/instances_val2017.json'
    loader = check(COCO, path.parents[1], 'val', pipeline=[])
    edit(path, share_ids(name))
    metric = dict(type='CocoMetric', ann_file=str(path))
    with pytest.raises(DataError, match=f"entries 0 and 2 of '{name}'"):
        coco_checks.check_metric(metric, loader, 'val_evaluator')


def test_mask_of_a_category_that_is_no_class_is_not_measured(coco, copy):
    path = copy(coco) / 'annotations/instances_val2017.json'
    loader = check(COCO, path.parents[1], 'val', pipeline=[])
    edit(path, mask_of([]))
    args = dict(ann_file=str(path), metric='segm'), loader, 'val_evaluator'
    with pytest.raises(DataError, match='measures masks'):
        coco_checks.check_metric(*args)
    category = json.loads(path.read_text())['annotations'][-1]['category_id']
    loader.dataset.cat_ids.remove(category)
    coco_checks.check_metric(*args)


def test_other_key_errors_are_left_alone(coco, copy):
    with pytest.raises(KeyError, match='NoSuchTransform'):
        build(COCO, copy(coco), pipeline=[dict(type='NoSuchTransform')])


def two_classes(content):
    content['categories'] = [
        dict(id=1, name='cell'), dict(id=2, name='fibre')
    ]
    for annotation in content['annotations']:
        annotation['category_id'] = 1


OWN_CLASSES = [
    *(f'{part}_dataloader.dataset.metainfo.classes=[cell,fibre]'
      for part in ('train', 'val', 'test')),
    'model.roi_head.bbox_head.num_classes=2',
    'model.roi_head.mask_head.num_classes=2'
]


@pytest.fixture
def own_coco(changed_coco):
    """Data of two classes."""
    return changed_coco(two_classes)


def test_metric_with_the_file_of_other_data_is_named_before_training(
        own_coco, coco, refusal, tmp_path):
    own, other = (root / 'annotations/instances_val2017.json'
                  for root in (own_coco, coco))
    message = refusal(COCO, own_coco, *OWN_CLASSES,
                      f'val_evaluator.ann_file={other}')
    assert f"val_evaluator measures with '{other}'" in message
    assert f"its data set reads '{own}'" in message
    assert "the classes are 'cell', 'fibre'" in message
    assert f'Set val_evaluator.ann_file={own}' in message
    assert 'Epoch(train)' not in log(tmp_path)


def test_metric_with_the_file_of_other_data_is_named_before_testing(
        own_coco, coco, load_tool, monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, 'launch', load_tool('launch'))
    monkeypatch.setattr(checkpoint_files, 'load_weights', lambda *args: None)
    checkpoint = tmp_path / 'weights.pth'
    checkpoint.touch()
    with pytest.raises(SystemExit, match='Set test_evaluator.ann_file='):
        load_tool('test').main([
            str(write_config(COCO, own_coco)),
            str(checkpoint), '--work-dir',
            str(tmp_path / 'work'), '--cfg-options', *OWN_CLASSES,
            f'experiment_name={tmp_path.name}', 'test_evaluator.ann_file='
            f'{coco / "annotations/instances_val2017.json"}'
        ])


def renumber(content):
    for image in content['images']:
        image['id'] += 1000


def rename(content):
    for image in content['images']:
        image['file_name'] = f'other_{image["file_name"]}'


def forget(content):
    content['images'].pop()


@pytest.mark.parametrize('change', [renumber, rename, forget])
def test_metric_with_other_images_is_refused(change, coco, copy, tmp_path):
    loader = check(COCO, copy(coco), 'val')
    path = shutil.copy(loader.dataset.ann_file, tmp_path / 'other.json')
    metric = dict(type='CocoMetric', ann_file=str(path))
    coco_checks.check_metric(metric, loader, 'val_evaluator')
    edit(path, change)
    with pytest.raises(DataError, match='images are not the 4'):
        coco_checks.check_metric(metric, loader, 'val_evaluator')


def test_link_to_the_file_of_the_data_is_not_compared(
        coco, copy, tmp_path, monkeypatch):
    loader = check(COCO, copy(coco), 'val')
    path = tmp_path / 'link.json'
    path.symlink_to(loader.dataset.ann_file)
    monkeypatch.delattr(coco_checks, 'read_categories')
    coco_checks.check_metric(dict(ann_file=str(path)), loader, 'val_evaluator')


@pytest.mark.parametrize('content, reason', [
    ('', 'is empty'), ('no json', 'has no list of categories'),
    ('{"categories": [{"id": 3, ', 'are no JSON'),
    ('{"categories": [{"id": 1, "name": "a"}], ', 'is no JSON file')])
def test_metric_file_that_is_damaged_is_told(coco, copy, tmp_path, content,
                                             reason):
    loader = check(COCO, copy(coco), 'val')
    loader.dataset._metainfo['classes'] = ('a', )
    path = tmp_path / 'file.json'
    path.write_text(content)
    with pytest.raises(DataError, match=reason):
        coco_checks.check_metric(dict(ann_file=str(path)), loader,
                                 'val_evaluator')


@pytest.mark.parametrize('content, expected', [
    ('{"categories": [{"id": 3, "name": "cell"}], "images": []}', {3: 'cell'}),
    ('{"images": [], "categories" :\n[{"name": "Küche", "id": 1}]}',
     {1: 'Küche'}),
    ('{"info": {"categories": []}, "images": [{"id": 1, "categories": [1, 2]}]'
     ', "categories": [{"id": 3, "name": "cell"}]}', {3: 'cell'}),
])
def test_categories_are_read_wherever_they_stand(content, expected, tmp_path):
    path = tmp_path / 'file.json'
    path.write_text(content, encoding='utf-8')
    assert coco_checks.read_categories(str(path)) == expected


def test_file_without_categories_is_named(tmp_path):
    path = tmp_path / 'file.json'
    path.write_text('{"images": []}')
    with pytest.raises(DataError, match=f"'{path}' has no list"):
        coco_checks.read_categories(str(path))


def test_message_about_other_classes_says_what_makes_it_run(
        coco, copy, train, refusal, tmp_path):
    """The options that it names, and nothing else, make training start."""
    classes = [
        f'{part}_dataloader.dataset.metainfo.classes=[person,toothbrush]'
        for part in ('train', 'val', 'test')
    ]
    data = copy(coco)
    message = refusal(COCO, data, *classes)
    assert 'has 2 classes' in message
    assert 'roi_head.bbox_head.num_classes=80' in message
    options = message.partition('--cfg-options ')[2].split()
    assert set(options) == {
        'model.roi_head.bbox_head.num_classes=2',
        'model.roi_head.mask_head.num_classes=2'
    }
    # Of the folder no more: mmengine keeps its visualizer, which writes there.
    for path in tmp_path.glob('work/*/*.log'):
        path.unlink()
    train(COCO, data, *classes, *options, 'val_cfg=None',
          'val_dataloader=None', 'val_evaluator=None')
    assert 'Epoch(train)' in log(tmp_path)


def test_text_in_place_of_a_list_of_classes_is_refused(coco, copy):
    with pytest.raises(
            DataError, match=r'classes="\[person\]"'):
        check(COCO, copy(coco), metainfo=dict(classes='person'))


def test_heads_are_found_wherever_they_are():
    assert set(config_queries.head_sizes(Config.fromfile(CASCADE).model)) == {
        *(f'model.roi_head.bbox_head.{i}.num_classes' for i in range(3)),
        'model.roi_head.mask_head.num_classes'
    }
    assert config_queries.head_sizes(Config.fromfile(ADE20K).model) == {
        'model.decode_head.num_classes': 150,
        'model.auxiliary_head.num_classes': 150
    }
    assert config_queries.head_sizes(Config.fromfile(IN1K).model) == {
        'model.head.num_classes': 1000
    }


def test_metric_has_to_ignore_what_the_heads_ignore():
    model = Config.fromfile(ADE20K).model
    sizes = config_queries.head_sizes(model)
    assert config_queries.ignored_labels(model) == {
        'model.decode_head.ignore_index': 255,
        'model.auxiliary_head.ignore_index': 255}
    model.decode_head.ignore_index = 200
    model.auxiliary_head = [dict(ignore_index=None), dict(ignore_index=200)]
    ignored = config_queries.ignored_labels(dict(module=model))
    assert ignored == {'model.decode_head.ignore_index': 200,
                       'model.auxiliary_head.1.ignore_index': 200}
    metric, loader = dict(type='IoUMetric'), SimpleNamespace(dataset=None)
    check = data_checks.check_metric
    with pytest.raises(DataError, match='Set test_evaluator.ignore_index=200'):
        check(metric, loader, sizes, ignored, 'test_evaluator')
    metric['ignore_index'] = 200
    check(metric, loader, sizes, ignored, 'test_evaluator')
    # A class that is not learned may count; the first number that is none not.
    check(dict(type='IoUMetric'), loader, {'head': 3}, {'head': 2}, '')
    with pytest.raises(DataError, match='ignore_index=3'):
        check(dict(type='IoUMetric'), loader, {'head': 3}, {'head': 3}, '')
    check(dict(type='Other'), loader, sizes, ignored, '')


def test_heads_with_classes_of_their_own_are_left_out():
    htc = Config.fromfile(Path(mmdet.__file__).parent.joinpath(
        '.mim/configs/htc/htc_r50_fpn_1x_coco.py')).model
    assert 'semantic_head' in htc.roi_head
    assert config_queries.head_sizes(htc) == {
        f'model.roi_head.{kind}_head.{i}.num_classes': 80
        for kind in ('bbox', 'mask') for i in range(3)}
    edges = dict(type='STDCHead', num_classes=1, boundary_threshold=0.1)
    assert config_queries.head_sizes(dict(auxiliary_head=[edges])) == {}
    masks = dict(type='FCNMaskHead', num_classes=1, class_agnostic=True)
    assert config_queries.head_sizes(dict(mask_head=masks)) == {}


def test_heads_for_things_do_not_count_the_stuff_of_panoptic_data(
        coco, copy):
    loader = check(COCO, copy(coco))
    things = loader.dataset.metainfo['classes']
    loader.dataset._metainfo |= dict(
        classes=[*things, 'sky', 'sea'], thing_classes=things)
    sizes = {'model.roi_head.bbox_head.num_classes': len(things)}
    data_set = loader.dataset
    del data_set.cat_ids  # which are compared with the classes
    data_checks.check_loader(loader, sizes, exact=True)
    data_set._metainfo['thing_classes'] = things[1:]
    with pytest.raises(DataError, match=f'has {len(things) - 1} classes'):
        data_checks.check_loader(loader, sizes, exact=True)


def test_classifier_may_have_more_classes_than_the_data(pictures):
    check(IN1K, pictures, sizes={'model.head.num_classes': 9}, exact=False)
    with pytest.raises(
            DataError, match='2 classes.*model.head.num_cla'):
        check(IN1K, pictures, sizes={'model.head.num_classes': 1}, exact=False)


@pytest.mark.parametrize('options, count', [
    (dict(batch_size=6), 1), (dict(batch_size=7, drop_last=False), 1)])
def test_data_of_at_least_one_batch_is_taken(options, count, pictures):
    loader = loader_of(pictures, **{'drop_last': True, **options})
    data_checks.check_loader(loader, {}, exact=False)
    assert len(loader) == count


def test_data_of_less_than_a_batch_is_told_before_training(pictures):
    loader = loader_of(pictures, batch_size=7, drop_last=True)
    with pytest.raises(DataError, match=(
            '6 images for a process, and drop_last=True leaves out what is '
            'less than a batch of 7: make batch_size smaller')):
        data_checks.check_loader(loader, {}, exact=False)


def test_samplers_without_end_need_no_whole_batch(pictures):
    loader = loader_of(pictures, batch_size=7, drop_last=True,
                       sampler=dict(type='InfiniteSampler'))
    data_checks.check_loader(loader, {}, exact=False)
    assert not len(loader)  # as it says
    assert len(next(iter(loader))['data_samples']) == 7


def test_length_of_one_hot_labels_is_a_size_of_the_model():
    cfg = Config.fromfile(IN1K)
    assert config_queries.model_sizes(cfg) == {
        'model.head.num_classes': 1000,
        'data_preprocessor.num_classes': 1000
    }
    cfg.model.data_preprocessor = dict(num_classes=7)
    assert config_queries.model_sizes(cfg) == {
        'model.head.num_classes': 1000,
        'model.data_preprocessor.num_classes': 7
    }
    cfg.model.train_cfg = None  # the labels stay numbers
    assert config_queries.model_sizes(cfg) == {'model.head.num_classes': 1000}
    assert config_queries.model_sizes(Config.fromfile(
        ADE20K)) == config_queries.head_sizes(Config.fromfile(ADE20K).model)


@pytest.mark.parametrize('head, preprocessor, named', [
    (2, 1, ['data_preprocessor']), (1, 1, ['model.head', 'data_preprocessor']),
    (2, 9, ['data_preprocessor']), (9, 2, ['model.head'])])
def test_one_hot_labels_of_another_length_are_refused(
        head, preprocessor, named, pictures):
    sizes = {
        'model.head.num_classes': head,
        'data_preprocessor.num_classes': preprocessor
    }
    with pytest.raises(DataError, match='has 2 classes') as raised:
        check(IN1K, pictures, sizes=sizes, exact=False)
    options = str(raised.value).partition('--cfg-options ')[2].split()
    assert options == [f'{name}.num_classes=2' for name in named]
    sizes = dict.fromkeys(sizes, 9)
    check(IN1K, pictures, sizes=sizes, exact=False)


def compare(data, sizes=None):
    """Check data whose folders are taken for the classes."""
    loaders = [
        check(IN1K, data, part, sizes, exact=False, type='ImageNet21k',
              split='', data_prefix=part, metainfo=None)
        for part in ('train', 'val')
    ]
    data_checks.check_agreement(*loaders)


@pytest.mark.parametrize('label', [2, -1])
@pytest.mark.parametrize('settings', [
    dict(metainfo=dict(classes=['a', 'b'])),
    dict(type='ImageNet21k', metainfo=None)])
def test_label_of_a_list_that_is_no_class_is_named(
        label, settings, pictures, monkeypatch):
    monkeypatch.setattr(data_checks, 'SAMPLE', 1)
    first = sorted((pictures / 'train/a').iterdir())[0]
    settings = dict(settings, data_prefix='train', split='',
                    ann_file=str(pictures / 'list.txt'))
    (pictures / 'list.txt').write_text(
        3 * f'a/{first.name} 1\n' + f'a/{first.name} {label}\n')
    with pytest.raises(DataError, match=(
            f"'.*{first.name}' the label {label}, which is no class: they are "
            '0 to 1')):
        check(IN1K, pictures, sizes={'model.head.num_classes': 2}, exact=False,
              **settings)


def test_class_folder_that_only_one_part_of_the_data_has_is_named(pictures):
    compare(pictures)
    shutil.copytree(pictures / 'val/a', pictures / 'val/c')
    with pytest.raises(
            DataError,
            match="same classes.*only the second of the two has 'c'. Add the"):
        compare(pictures)
    for split in ('train', 'val'):
        (pictures / split / 'empty').mkdir()  # in both, so not the cause
    shutil.rmtree(pictures / 'train/a')
    with pytest.raises(DataError, match="has 'a', 'c'. Add the"):
        compare(pictures)


def test_classes_in_another_order_than_in_training_are_refused(pictures):
    train = check(IN1K, pictures)
    val = build(IN1K, pictures, 'val', metainfo=dict(classes=['b', 'a']))
    with pytest.raises(DataError, match='in another order'):
        data_checks.check_agreement(train, val)


def test_class_folders_in_another_order_than_the_classes_are_named(pictures):
    with pytest.raises(DataError, match=(
            "in another one: 'b', 'a' in place of 'a', 'b'. Sort metainfo")):
        check(IN1K, pictures, metainfo=dict(classes=['b', 'a']))


def test_folders_may_have_other_names_than_their_classes(pictures):
    """As those of ImageNet have in mmpretrain."""
    train = check(IN1K, pictures)
    val = check(IN1K, pictures, 'val', metainfo=dict(classes=['x', 'y']))
    data_checks.check_agreement(train, val)
    (pictures / 'val/b').rename(pictures / 'val/c')
    with pytest.raises(DataError, match='do not have the same classes'):
        data_checks.check_agreement(train, val)


@pytest.mark.parametrize('name', ['.ipynb_checkpoints', 'c'])
def test_class_folder_that_is_hidden_or_empty_is_named(name, pictures):
    (pictures / 'train' / name).mkdir()
    reason = f"'{name}' is hidden or holds no image. Delete such a folder"
    with pytest.raises(DataError, match=reason):
        compare(pictures)
    with pytest.raises(
            DataError, match=f'has 3 classes.*{reason}') as raised:
        compare(pictures, {'model.head.num_classes': 2})
    assert '--cfg-options' not in str(raised.value)
    with pytest.raises(
            DataError, match=f'3 class folders.*{reason}'):
        check(IN1K, pictures)


def test_empty_folder_of_a_class_that_is_listed_is_taken(pictures):
    (pictures / 'val/c').mkdir()
    check(IN1K, pictures, 'val', metainfo=dict(classes=['a', 'b', 'c']))


def test_label_maps_that_are_numbered_in_another_way_are_refused(
        ade20k, copy):
    data = copy(ade20k)
    train = check(ADE20K, data)
    val = check(ADE20K, data, 'val')
    data_checks.check_agreement(train, val)
    val.dataset.reduce_zero_label = False
    with pytest.raises(
            DataError, match=r'reduce_zero_label \(True and Fal'):
        data_checks.check_agreement(train, val)


def test_class_folders_that_are_not_as_many_as_the_classes_are_named(
        pictures, refusal, tmp_path):
    message = refusal(IN1K, pictures,
                      'val_dataloader.dataset.metainfo.classes=[a,b,c]')
    assert (f"ImageNet ({pictures}/val) has 2 class folders ('a', 'b'), and "
            'there are 3 classes') in message
    assert 'train, val and test' in message
    assert 'model.head.num_classes' in message
    assert 'Epoch(train)' not in log(tmp_path)


@pytest.mark.parametrize('kind, metainfo', [
    ('ImageNet', dict(classes=['a', 'b'])),
    ('ImageNet21k', None),  # takes the names of the folders for the classes
])
def test_folder_without_class_folders_is_named(kind, metainfo, pictures):
    """ILSVRC's archive of validation images has none."""
    folder = pictures / 'train'
    (folder / 'a/0.jpg').rename(folder / '0.jpg')
    for name in 'ab':
        shutil.rmtree(folder / name)
    with pytest.raises(
            DataError,
            match=rf'\({folder}\) has no class folders. Sort its images'):
        check(IN1K, pictures, type=kind, metainfo=metainfo)


def read_list(pictures):
    return data_checks.build_loader(Runner.build_dataloader, dict(
        dataset=dict(
            type='mmpretrain.CustomDataset', data_root=str(pictures),
            ann_file='train.txt', data_prefix='train',
            metainfo=dict(classes=['a', 'b']))))


@pytest.mark.parametrize('line', [
    'a/1.jpg', 'a/1.jpg,0', '', 'a/1.jpg cat', '5'])
def test_lines_of_a_list_in_another_form_are_named(line, pictures):
    (pictures / 'train.txt').write_text(f'a/0.jpg 0\n{line}\nb/0.jpg 1\n')
    with pytest.raises(DataError, match=(
            f"line 2 of {pictures}/train.txt is '{line}'; expected the pa")):
        read_list(pictures)


def test_list_in_another_encoding_is_named(pictures):
    path = pictures / 'train.txt'
    path.write_bytes('a/Stra\u00dfe.jpg 0\n'.encode('latin-1'))
    with pytest.raises(DataError, match=f'{path} is no text in UTF-8 .*0xdf'):
        read_list(pictures)


def test_errors_of_data_sets_of_ones_own_are_theirs(monkeypatch):

    class Own:

        def __init__(self, path):
            raise ValueError(f'bad magic number in {path}')

    monkeypatch.setitem(DATASETS.module_dict, 'Own', Own)
    with pytest.raises(ValueError, match='bad magic number in a.bin'):
        data_checks.build_loader(Runner.build_dataloader, dict(
            dataset=dict(type='Own', path='a.bin')))


def test_heads_whose_classes_are_texts_are_left_out():
    assert config_queries.head_sizes(dict(
        type='GroundingDINO', language_model=dict(type='BertModel'),
        bbox_head=dict(type='GroundingDINOHead', num_classes=256))) == {}


def test_class_folders_without_images_are_refused(pictures):
    with pytest.raises(DataError, match='has no images. Compare'):
        check(IN1K, pictures, extensions=['.tiff'])


def test_text_in_place_of_the_classes_of_folders_is_refused(pictures):
    with pytest.raises(DataError, match=r'classes="\[dog\]"'):
        check(IN1K, pictures, metainfo=dict(classes='dog'))


def test_suffix_that_no_image_has_is_refused(ade20k, copy):
    with pytest.raises(
            DataError, match='img_suffix.*has no images'):
        check(ADE20K, copy(ade20k), img_suffix='.tiff')


def test_classes_that_ade20k_does_not_have_are_refused(ade20k, copy):
    with pytest.raises(
            DataError, match="does not have.*'BaseSegDataset'"):
        check(ADE20K, copy(ade20k), metainfo=dict(classes=['cell', 'none']))


def test_annotation_file_that_is_cut_off_is_named(coco, copy):
    data = copy(coco)
    path = data / 'annotations/instances_train2017.json'
    damage(path, 'cut')
    with pytest.raises(
            DataError, match=f'{path.name}.* is no JSON'):
        check(COCO, data)


def test_image_that_an_annotation_file_names_and_that_is_not_there(
        coco, copy):
    data = copy(coco)
    gone = sorted((data / 'val2017').iterdir())[0]
    gone.unlink()
    with pytest.raises(DataError, match=f"'{gone}', which does"):
        check(COCO, data, part='val')


def paint(path, label, kind='uint8'):
    """Put a label into a corner of a label map."""
    labels = np.array(Image.open(path)).astype(kind)
    labels[:2, :3] = label
    Image.fromarray(labels).save(path)


def label_maps(data, split='training'):
    return sorted((data / f'annotations/{split}').iterdir())


@pytest.mark.parametrize('split', ['training', 'validation'])
def test_label_that_is_no_class_is_named_before_training(
        split, ade20k, copy, refusal, tmp_path):
    data = copy(ade20k)
    path = label_maps(data, split)[-1]
    paint(path, 151)
    message = refusal(ADE20K, data)
    assert f"'{path}' has the label 151 (6 pixels)" in message
    assert 'labels 1 to 150, and 0 and 255' in message
    assert 'Iter(train)' not in log(tmp_path)


@pytest.mark.parametrize('workers', [0, 1])
def test_label_that_is_no_class_is_named_when_it_is_read(
        workers, ade20k, copy, refusal, monkeypatch):
    monkeypatch.setattr(data_checks, 'SAMPLE', 1)
    data = copy(ade20k)
    path = label_maps(data)[-1]
    paint(path, 200)
    message = refusal(ADE20K, data, f'train_dataloader.num_workers={workers}',
                      'train_dataloader.sampler.shuffle=False')
    assert message.startswith(f"the label map '{path}' has the label 200")
    assert 'Traceback' not in message


def test_label_maps_of_the_whole_data_are_sampled(ade20k, copy, monkeypatch):
    monkeypatch.setattr(data_checks, 'SAMPLE', 2)  # of four
    data = copy(ade20k)
    paint(label_maps(data)[2], 151)
    with pytest.raises(DataError, match='has the label 151'):
        check(ADE20K, data)


def test_labels_of_data_without_classes_are_those_of_the_heads(ade20k, copy):
    data, key = copy(ade20k), 'model.decode_head.num_classes'
    check(ADE20K, data, sizes={key: 151}, type='BaseSegDataset')
    with pytest.raises(DataError, match='label 150 .* there are 150, with'):
        check(ADE20K, data, sizes={key: 150}, type='BaseSegDataset')


@pytest.mark.parametrize('label', [0, 1, 150, 255])
def test_labels_of_ade20k_are_taken(label, ade20k, copy):
    data = copy(ade20k)
    paint(label_maps(data)[0], label)
    loader = check(ADE20K, data)
    labels = loader.dataset[0]['data_samples'].gt_sem_seg.data
    assert {*labels.unique().tolist()} <= {*range(150), 255}


def test_labels_of_other_data_sets_start_at_zero(ade20k, copy):
    settings = dict(
        type='BaseSegDataset', metainfo=dict(classes=['a', 'b', 'c']))
    data = copy(ade20k)
    for path in label_maps(data):
        labels = np.array(Image.open(path))
        Image.fromarray(np.full_like(labels, 2)).save(path)
    check(ADE20K, data, **settings)
    paint(label_maps(data)[1], 3)
    with pytest.raises(
            DataError, match='label 3 .* 0 to 2, and 255 for'):
        check(ADE20K, data, **settings)
    paint(label_maps(data)[1], 254)
    with pytest.raises(DataError, match='254 .*reduce_zero_label. Another'):
        check(ADE20K, data, **settings)
    settings['ignore_index'] = 254
    check(ADE20K, data, **settings)
    # As long as the model has no heads, which say what is ignored.
    loader = build(ADE20K, data, **settings)
    with pytest.raises(DataError, match='254 .* 0 to 2, and 255 for'):
        data_checks.check_loader(loader, {}, True, {'head': 255})
    with pytest.raises(DataError, match='same label: one=254, two=255'):
        data_checks.check_loader(loader, {}, True, {'one': 254, 'two': 255})
    paint(label_maps(data)[1], 255)
    with pytest.raises(DataError, match='255 .* 0 to 2, and 254 for'):
        check(ADE20K, data, **settings)
    paint(label_maps(data)[1], 253)
    with pytest.raises(DataError, match='253 .* 0 to 2, and 254 for'):
        check(ADE20K, data, **settings)


def test_label_that_takes_two_bytes_is_named_before_training(
        ade20k, copy, refusal, tmp_path):
    """mmseg would train on its last byte."""
    data = copy(ade20k)
    path = label_maps(data)[1]
    paint(path, 300, 'uint16')
    message = refusal(ADE20K, data)
    assert f"'{path}' has the label 300 (6 pixels)" in message
    assert 'labels 1 to 150, and 0 and 255' in message
    assert 'Iter(train)' not in log(tmp_path)


def test_label_that_takes_two_bytes_is_named_when_it_is_read(
        ade20k, copy, monkeypatch):
    monkeypatch.setattr(data_checks, 'SAMPLE', 0)
    data = copy(ade20k)
    path = label_maps(data)[0]
    paint(path, 300, 'uint16')
    data_set = check(ADE20K, data).dataset
    with pytest.raises(DataError, match=f"'{path}' .*label 300 "):
        data_set[0]


@pytest.mark.parametrize('label', [0, 150, 255, 65535])
def test_label_maps_of_two_bytes_are_taken(label, ade20k, copy):
    data = copy(ade20k)
    paint(label_maps(data)[0], label, 'uint16')
    assert check(ADE20K, data).dataset[0] is not None


def other_size(data, split, width, height):
    """Resize a label map; return the message that is expected."""
    path = label_maps(data, split)[0]
    with Image.open(path) as image:
        image.resize((width, height), Image.Resampling.NEAREST).save(path)
    return (f"the label map '{path}' is {width} wide and {height} high, and "
            f"its image '{data}/images/{split}/{path.stem}.jpg' 96 wide and "
            '64 high')


@pytest.mark.parametrize('width, height', [
    (90, 64),
    (64, 96),  # the header of an image may say that it is to be turned
])
@pytest.mark.parametrize('part, split', [('train', 'training'),
                                         ('val', 'validation')])
def test_label_map_of_another_size_than_its_image_is_named_when_it_is_read(
        part, split, width, height, ade20k, copy, monkeypatch):
    monkeypatch.setattr(data_checks, 'SAMPLE', 0)
    data = copy(ade20k)
    message = other_size(data, split, width, height)
    data_set = check(ADE20K, data, part).dataset
    with pytest.raises(DataError, match=message):
        data_set[0]


def test_label_map_of_another_size_than_its_image_is_named_before_training(
        ade20k, copy):
    data = copy(ade20k)
    message = other_size(data, 'training', 90, 64)
    with pytest.raises(DataError, match=message):
        check(ADE20K, data)


def test_image_that_is_stored_lying_on_its_side_is_taken(ade20k, copy):
    data = copy(ade20k)
    path = sorted((data / 'images/training').iterdir())[0]
    exif = Image.Exif()
    exif[0x112] = 6  # orientation: to be turned by 90 degrees
    with Image.open(path) as image:
        image.transpose(Image.Transpose.ROTATE_90).save(path, exif=exif)
    assert check(ADE20K, data).dataset[0] is not None


def test_label_map_of_colours_is_refused(ade20k, copy):
    data = copy(ade20k)
    path = label_maps(data)[2]
    Image.fromarray(np.zeros((64, 96, 3), 'uint8')).save(path)
    with pytest.raises(
            DataError, match=f"'{path}' has 3 channels"):
        check(ADE20K, data)


@pytest.mark.parametrize('colours, is_told', [
    ([0, 255], True), ([0, 1, 255], False), ([1], False), ([255], True)])
def test_masks_in_black_and_white_are_told(colours, is_told, ade20k, copy,
                                           monkeypatch):
    data, told = copy(ade20k), []
    monkeypatch.setattr(data_checks, 'print_log',
                        lambda text, **_: told.append(text))
    for path in (data / 'annotations/training').iterdir():
        labels = np.array(Image.open(path))
        labels[:] = np.resize(colours, labels.shape)
        Image.fromarray(labels).save(path)
    check(ADE20K, data, type='BaseSegDataset', reduce_zero_label=False,
          metainfo=dict(classes=['background', 'cell']), img_suffix='.jpg',
          seg_map_suffix='.png')
    assert len(told) == is_told
    if is_told:
        share = '50%' if 0 in colours else '100%'
        names = "'background'" if 0 in colours else 'none'
        assert (f'of 2 classes, the 4 label maps that were looked at have '
                f'{names}. {share} of their pixels are 255') in told[0]


def test_label_maps_of_other_types_are_not_counted(ade20k, copy, monkeypatch):
    told = []
    monkeypatch.setattr(data_checks, 'print_log',
                        lambda text, **_: told.append(text))
    monkeypatch.setattr(
        checked_load.CheckedLoad, '__call__', lambda self, info: dict(
            gt_seg_map=np.full((2, 2), 65535), **info))
    monkeypatch.setattr(data_checks, 'check_header', lambda *_: None)
    check(ADE20K, copy(ade20k))
    assert not told


@pytest.mark.parametrize('size', [(7, 1), (1, 5)])
def test_label_maps_keep_sides_of_one_pixel(size, ade20k, copy):
    data = copy(ade20k)
    pipeline = [dict(type='LoadImageFromFile'), dict(type='LoadAnnotations')]
    for folder in 'images', 'annotations':
        path = sorted((data / folder / 'training').iterdir())[0]
        Image.new('L' if folder == 'annotations' else 'RGB', size).save(path)
    sample = check(ADE20K, data, pipeline=pipeline).dataset[0]
    assert sample['gt_seg_map'].shape == sample['img'].shape[:2] == size[::-1]


def test_label_map_with_a_side_of_one_pixel_of_another_size_is_named(
        ade20k, copy, monkeypatch):
    monkeypatch.setattr(data_checks, 'SAMPLE', 0)
    data = copy(ade20k)
    path = sorted((data / 'annotations/training').iterdir())[0]
    Image.new('L', (1, 5)).save(path)
    data_set = check(ADE20K, data).dataset
    with pytest.raises(DataError, match=f"'{path}' is .* high, and its image"):
        data_set[0]


def damage(path, how):
    content = path.read_bytes()
    path.write_bytes({
        'empty': b'',
        'cut': content[:len(content) // 2],
        'garbage': os.urandom(len(content))
    }[how])


@pytest.mark.parametrize('how', ['empty', 'cut', 'garbage'])
@pytest.mark.parametrize('base, data, folder, kind', [
    (IN1K, 'pictures', 'train/a', 'image'),
    (COCO, 'coco', 'train2017', 'image'),
    (ADE20K, 'ade20k', 'images/training', 'image'),
    (ADE20K, 'ade20k', 'annotations/training', 'label map'),
], ids=['imagenet', 'coco', 'ade20k', 'label map'])
def test_damaged_file_is_named_when_it_is_read(
        base, data, folder, kind, how, copy, request, monkeypatch):
    monkeypatch.setattr(data_checks, 'SAMPLE', 0)
    root = request.getfixturevalue(data)
    root = root if data == 'pictures' else copy(root)
    path = sorted((root / folder).iterdir())[0]
    damage(path, how)
    data_set = check(base, root).dataset
    with pytest.raises(DataError) as raised:
        for i in range(len(data_set)):
            data_set[i]
    assert f"cannot read the {kind} '{path}': it is damaged" in str(
        raised.value)
    assert 'Put a good copy there' in str(raised.value)


@pytest.mark.parametrize('size, is_refused', [
    ((60, 80), True),  # turned
    ((40, 30), True),  # made smaller
    ((80, 60), False), ((200, 200), False)])
def test_image_of_another_size_than_its_boxes_are_for_is_named(
        size, is_refused, tmp_path):
    path = str(tmp_path / 'a.png')
    Image.new('RGB', size).save(path)
    load = checked_load.CheckedLoad(LoadImageFromFile(), 'img_path')
    sample = dict(img_path=path, width=80, height=60, instances=[
        dict(bbox=[1, 1, 9, 9]), dict(bbox=[50, 5, 79.5, 30])])
    told = pytest.raises(DataError, match=(
        f"'{path}' is {size[0]} wide and {size[1]} high, .* one 80 wide and "
        r'60 high: a box ends at \(79.5, 30\)'))
    with told if is_refused else nullcontext():
        assert load(dict(sample))['ori_shape'] == size[::-1]


def test_file_that_may_not_be_read_is_not_called_damaged():

    def load(_):
        raise PermissionError(13, 'Permission denied')

    with pytest.raises(DataError, match="'a.jpg': you may not read it. Chan"):
        checked_load.CheckedLoad(load, 'img_path')(dict(img_path='a.jpg'))


def test_training_ends_with_the_name_of_a_damaged_image(pictures, refusal):
    path = pictures / 'train/b/2.jpg'
    damage(path, 'cut')
    message = refusal(IN1K, pictures, 'train_dataloader.num_workers=1')
    assert message.startswith(f"cannot read the image '{path}': it is damaged")
    assert 'Traceback' not in message


def test_workers_that_are_spawned_name_the_file_too(ade20k, copy):
    data = copy(ade20k)
    path = sorted((data / 'images/training').iterdir())[1]
    damage(path, 'garbage')
    loader = DataLoader(
        check(ADE20K, data).dataset, num_workers=1, collate_fn=pseudo_collate,
        multiprocessing_context='spawn')
    with pytest.raises(SystemExit) as raised, one_message():
        list(loader)
    assert raised.value.code.startswith(
        f"cannot read the image '{path}': it is damaged")


def test_steps_inside_test_time_augmentation_are_checked(ade20k, copy):
    data = copy(ade20k)
    pipeline = Config.fromfile(ADE20K).tta_pipeline
    loader = check(ADE20K, data, part='val', pipeline=pipeline)
    damage(label_maps(data, 'validation')[0], 'cut')
    with pytest.raises(DataError, match='label map'):
        loader.dataset[0]


def test_wrapped_data_sets_are_checked_once(ade20k, copy):
    data = copy(ade20k)
    init_default_scope('mmseg')
    inner = dict(Config.fromfile(write_config(
        ADE20K, data)).train_dataloader.dataset)
    data_set = DATASETS.build(
        dict(
            type='RepeatDataset', times=2,
            dataset=dict(type='ConcatDataset', datasets=[inner, inner])))
    loader = type('Loader', (), dict(dataset=data_set, drop_last=False))
    for _ in range(2):
        data_checks.check_loader(loader, {}, True)
    for leaf in data_set.dataset.datasets:
        first, second = leaf.pipeline.transforms[:2]
        for step in (first, second):
            assert type(step) is checked_load.CheckedLoad
            assert type(step.load).__name__.startswith('Load')


def test_checked_step_survives_pickling_and_changes_no_sample(ade20k, copy):
    data = copy(ade20k)
    pipeline = [
        dict(type='LoadImageFromFile'), dict(type='LoadAnnotations')
    ]
    plain = build(ADE20K, data, pipeline=pipeline).dataset
    checked = check(ADE20K, data, pipeline=pipeline).dataset
    checked.pipeline = pickle.loads(pickle.dumps(checked.pipeline))
    for i in range(len(plain)):
        expected, sample = plain[i], checked[i]
        assert expected.keys() == sample.keys()
        for key in ('img', 'gt_seg_map'):
            assert np.array_equal(expected[key], sample[key])
