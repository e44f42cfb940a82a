"""Metafiles, docs and configs say the same, and the counts are true."""
import functools
import json
import re
import statistics
from pathlib import Path

import mmdet
import mmseg
import modelindex
import numpy as np
import pytest
import yaml
from mmengine.config import Config
from mmengine.registry import DATASETS, init_default_scope
from PIL import Image

ROOT = Path(__file__).resolve().parents[1]
LEAVES = sorted(
    path.relative_to(ROOT).as_posix()
    for path in (ROOT / 'configs').rglob('*.py')
    if '_base_' not in path.parts)
PUBLISHED = [config for config in LEAVES if 'digits' not in config]
INDEX = yaml.safe_load((ROOT / 'model-index.yml').read_text())
ENTRIES = [
    entry for name in INDEX['Import']
    for entry in yaml.safe_load((ROOT / name).read_text())['Models']
]
ENTRY = {entry['Config']: entry for entry in ENTRIES}
ZOO = (ROOT / 'docs/model_zoo.md').read_text()
# The cells of each row of the docs that begins with a link to a config.
ROWS = [[cell.strip() for cell in row.strip('|').split('|')]
        for row in re.findall(r'^\|.*\]\(\.\./configs/.*\|$', ZOO, re.M)]
DATA = (ROOT / 'docs/data.md').read_text()
OWN_DATA = re.findall(r'```python\n(_base_ = .*?)```', DATA, re.DOTALL)
# Images of an epoch; mmdet trains on those of COCO that have objects.
IMAGES = {'ImageNet': 1281167, 'ImageNet21k': 14197122, 'CocoDataset': 117266}
MIM = [Path(package.__file__).parent / '.mim' for package in (mmdet, mmseg)]


def stem(config):
    return Path(config).stem


def config_of(row):
    return re.search(r'\]\(\.\./(configs/[\w/]+\.py)\)', row[0]).group(1)


def metrics_of(config):
    """Values of the metrics of a config in its metafile."""
    return [
        value for result in ENTRY[config].get('Results', [])
        for value in result['Metrics'].values()
    ]


@functools.cache
def load(config):
    """A config; what is built from it does not change what is read here."""
    return Config.fromfile(ROOT / config)


@pytest.fixture(scope='module')
def get_flops(load_tool):
    with pytest.MonkeyPatch.context() as patch:
        # Initial values count for nothing and take half of the time.
        for module in 'backbone', 'neck':
            patch.setattr(f'mmconv2former.{module}.init_convs', lambda _: None)
        yield load_tool('get_flops')


def test_index_is_what_mim_reads():
    index = modelindex.load(str(ROOT / 'model-index.yml'))
    assert index.check(silent=True) == []
    assert {model.config for model in index.models} == set(LEAVES) != set()
    for model in index.models:
        full = model.full_model
        assert full.name == stem(model.config)
        assert full.paper['URL'] and full.metadata.data['Architecture']
        # mim would download what stands there, and we host nothing.
        assert full.weights is None


def test_index_names_every_metafile():
    found = {
        path.relative_to(ROOT).as_posix()
        for path in ROOT.glob('configs/**/metafile.yml')
    }
    assert set(INDEX['Import']) == found != set()


def test_every_config_has_one_entry_and_a_row():
    assert sorted(entry['Config'] for entry in ENTRIES) == LEAVES != []
    assert {config_of(row) for row in ROWS} == set(LEAVES)


@pytest.mark.parametrize('row', ROWS, ids=lambda row: stem(config_of(row)))
def test_row_says_what_the_metafile_says(row):
    entry = ENTRY[config_of(row)]
    metadata = entry['Metadata']
    parameters, macs, metrics = row[1:4]
    assert parameters == f'{metadata["Parameters"]:,}'
    assert macs == f'{metadata["FLOPs"] / 1e9:.2f} G'
    values = [float(value) for value in re.findall(r'\d+\.\d+', metrics)]
    assert values == metrics_of(config_of(row))
    if page := re.search(r'https://pan[^)]*', '|'.join(row)):
        assert page.group() == entry['Converted From']['Weights']


@pytest.mark.parametrize('config', PUBLISHED, ids=stem)
def test_results_are_those_of_the_header_and_marked_as_the_papers(config):
    header = (ROOT / config).read_text().split('"""')[1]
    expected = header.split('Expected:')[1]
    stated = re.findall(r'([\d.]+) (?:% top-1|box AP|mIoU)(?: \(paper\)|,)',
                        expected)
    assert metrics_of(config) == [float(value) for value in stated]
    reported = ENTRY[config]['Metadata'].get('Reported By')
    assert reported == ('paper' if metrics_of(config) else None)


def test_results_on_digits_are_those_of_the_readme():
    measured = dict(re.findall(
        r'(top-1 %|box mAP@50|mask mAP@50|mIoU) +([\d.]+) +[\d.]+ +yes',
        (ROOT / 'README.md').read_text()))
    percent = [float(measured['top-1 %'])] + [
        round(100 * float(measured[name]), 1)
        for name in ('box mAP@50', 'mask mAP@50', 'mIoU')]
    digits = sorted(set(LEAVES) - set(PUBLISHED))
    assert sum(map(metrics_of, digits), []) == percent
    for config in digits:
        assert ENTRY[config]['Metadata']['Reported By'] == 'this project'


@pytest.mark.parametrize('config', LEAVES, ids=stem)
def test_parameters_and_macs_are_as_counted(config, get_flops):
    metadata = ENTRY[config]['Metadata']
    cfg = load(config)
    width, height = map(int, metadata['Input Size'].split('x'))
    if config in PUBLISHED:
        assert get_flops.default_shape(cfg) == (height, width)
    assert get_flops.count(cfg, (height, width))['total'] == (
        metadata['Parameters'], metadata['FLOPs'])


# What the official ConvNeXt repository publishes: M parameters, G MACs.
@pytest.mark.parametrize('config, parameters, macs', [
    ('mask-rcnn_convnext-t-p4-w7_fpn_amp-ms-crop-3x_coco', 48, 262),
    ('cascade-mask-rcnn_convnext-t-p4-w7_fpn_4conv1fc-giou_amp-ms-crop-3x_'
     'coco', 86, 741),
    ('convnext-tiny_upernet_8xb2-amp-160k_ade20k-512x512', 60, 939),
])
def test_counts_of_another_backbone_are_those_that_it_publishes(
        config, parameters, macs, get_flops):
    path, = (
        path for mim in MIM
        for path in mim.glob(f'configs/convnext/{config}.py'))
    cfg = Config.fromfile(path)
    total = get_flops.count(cfg, get_flops.default_shape(cfg))['total']
    assert round(total[0] / 1e6) == parameters
    # mmcv, which counted these, adds norms and pooling.
    assert total[1] / 1e9 == pytest.approx(macs, rel=0.005)


def test_table_of_the_tool_adds_up(get_flops, capsys):
    get_flops.main([
        str(ROOT / 'configs/segmentation/upernet_conv2former_mini_digits.py'),
        '--shape', '64', '96'
    ])
    printed = capsys.readouterr().out
    assert 'input: 96x64' in printed
    rows = {
        name: (int(parameters.replace(',', '')), float(macs))
        for name, parameters, macs in re.findall(
            r'^(\w+) +([\d,]+) +([\d.]+) G$', printed, re.M)
    }
    assert list(rows) == [
        'backbone', 'decode_head', 'auxiliary_head', 'total']
    *parts, total = rows.values()
    assert sum(parameters for parameters, _ in parts) == total[0]
    macs = sum(rows[name][1] for name in ('backbone', 'decode_head'))
    assert total[1] == pytest.approx(macs, abs=0.02)


@pytest.mark.parametrize('has_masks', [True, False])
def test_regions_are_those_that_are_counted(has_masks, get_flops, capsys):
    options = [] if has_masks else [
        '--cfg-options', 'model.roi_head.mask_head=None']
    test_cfg = load('configs/detection/mask_rcnn_conv2former_mini_digits.py'
                    ).model.test_cfg
    get_flops.main([
        str(ROOT / 'configs/detection/mask_rcnn_conv2former_mini_digits.py'),
        *options])
    masks = f', {test_cfg.rcnn.max_per_img} masks' if has_masks else ''
    assert f'\nroi_head: {test_cfg.rpn.max_per_img} boxes{masks}\n' \
        in capsys.readouterr().out


def test_kernel_size_can_be_set_on_the_command_line(get_flops, capsys):
    get_flops.main([
        str(ROOT / 'configs/classification/conv2former_t_in1k.py'),
        '--cfg-options', 'model.backbone.kernel_size=21'
    ])
    parameters = ENTRY['configs/classification/ablation/'
                       'conv2former_t_kernel21_in1k.py']['Metadata'][
                           'Parameters']
    assert f'{parameters:,}' in capsys.readouterr().out


def test_stem_of_grey_images_is_smaller(get_flops, capsys):
    config = str(ROOT / 'configs/classification/conv2former_mini_digits.py')
    totals = []
    for channels in (3, 1):
        get_flops.main([config, '--cfg-options',
                        f'model.backbone.in_channels={channels}'])
        totals.append(re.search(r'total +([\d,]+)',
                                capsys.readouterr().out).group(1))
    colour, grey = (int(total.replace(',', '')) for total in totals)
    assert grey < colour


@pytest.mark.parametrize('text, options, expected', [
    ('', [], 'no model'),
    ('model = dict(head=1)', [], 'give it with --shape H W'),
    ('model = dict(type="mmpretrain.ImageClassifier", backbone=dict('
     'type="mmconv2former.Conv2Former", arch=dict(depths=[1], dims=[8], '
     'kernel_size=3)), data_preprocessor=dict('
     'type="mmpretrain.ClsDataPreprocessor"))',
     ['--shape', '2', '64'], r'at least 4.*got \(1, 3, 2, 64.*--shape H W'),
])
def test_what_cannot_be_counted_is_refused(text, options, expected, get_flops,
                                           tmp_path):
    path = tmp_path / 'mine.py'
    path.write_text(text)
    with pytest.raises(SystemExit, match=expected):
        get_flops.main([str(path), *options])


@pytest.mark.parametrize('config, expected', [
    ('detr/detr_r50_8xb2-150e_coco.py', 'DETR cannot be counted.*decoder'),
    ('ms_rcnn/ms-rcnn_r50_fpn_1x_coco.py',
     'MaskScoringRoIHead cannot be counted.*also has mask_iou_head'),
    ('grid_rcnn/grid-rcnn_r50_fpn_gn-head_2x_coco.py', 'also has grid_head'),
    ('htc/htc_r50_fpn_1x_coco.py', 'also has semantic_head'),
    ('point_rend/point-rend_r50-caffe_fpn_ms-1x_coco.py',
     'also has point_head'),
    ('sparse_rcnn/sparse-rcnn_r50_fpn_1x_coco.py',
     'rpn_head EmbeddingRPNHead cannot be counted'),
    ('double_heads/dh-faster-rcnn_r50_fpn_1x_coco.py',
     'roi_head DoubleHeadRoIHead cannot be counted.*x_reg'),
    ('fast_rcnn/fast-rcnn_r50_fpn_1x_coco.py', 'no test_cfg.rpn'),
    ('tood/tood_r50_fpn_1x_coco.py', 'bbox_head TOODHead cannot be counted'),
])
def test_detector_of_another_structure_is_refused(config, expected, get_flops):
    path, = MIM[0].glob(f'configs/{config}')
    with pytest.raises(SystemExit, match=f'(?s){expected}.*may count it$'):
        get_flops.count(Config.fromfile(path), (64, 64))


def test_segmentors_are_counted_at_the_size_of_the_preprocessing(get_flops):
    """In the model or, as for mmengine's runner, at the top of the config."""
    cfg = Config(dict(model=dict(decode_head=dict()),
                      data_preprocessor=dict(size=(64, 64))))
    assert get_flops.default_shape(cfg) == (64, 256)
    cfg.data_preprocessor.size = (64, 96)
    assert get_flops.default_shape(cfg) == (64, 256)
    cfg.model.data_preprocessor = dict(size=(32, 32))
    assert get_flops.default_shape(cfg) == (32, 128)
    cfg.model.data_preprocessor = None
    with pytest.raises(SystemExit, match='data_preprocessor.size for segment'):
        get_flops.default_shape(cfg)


def test_crop_is_found_in_wrapped_data_sets(get_flops):
    from mmpretrain.datasets import RandomResizedCrop
    inner = dict(type='CustomDataset', pipeline=[
        dict(type='LoadImageFromFile'),
        dict(type=RandomResizedCrop, scale=64)])
    cfg = Config(dict(
        model=dict(head=dict()), test_dataloader=dict(
            dataset=dict(type='CustomDataset', pipeline=[])),
        train_dataloader=dict(
            dataset=dict(type='RepeatDataset', times=2, dataset=inner))))
    assert get_flops.default_shape(cfg) == (64, 64)


@pytest.mark.parametrize('name, key', [
    ('CenterCrop', 'crop_size'), ('RandomCrop', 'crop_size'),
    ('RandomResizedCrop', 'scale')])
def test_crop_that_is_no_square_counts_as_it_crops(name, key, get_flops):
    from mmpretrain.registry import TRANSFORMS
    crop, other = ({'type': f'mmpretrain.{name}', key: size}
                   for size in ((48, 32), (16, 16)))
    image = TRANSFORMS.build(crop)(dict(img=np.zeros((64, 64, 3))))['img']
    cfg = Config(dict(
        model=dict(head=dict()),
        train_dataloader=dict(
            dataset=dict(type='CustomDataset', pipeline=[other])),
        test_dataloader=dict(
            dataset=dict(type='CustomDataset', pipeline=[crop]))))
    assert get_flops.default_shape(cfg) == image.shape[:2]


def estimate(config):
    """Hours on 8 GPUs by the formula of the docs."""
    cfg = load(config)
    macs = ENTRY[config]['Metadata']['FLOPs']
    task = 'dense' if cfg.model.type != 'ImageClassifier' else 'classifiers'
    rate = float(
        re.search(rf'R = (\d+) TFLOP/s for {task}', ZOO).group(1)) * 1e12
    if 'decode_head' in cfg.model:
        macs /= 4
        images = cfg.train_cfg.max_iters * cfg.auto_scale_lr.base_batch_size
    else:
        images = cfg.train_cfg.max_epochs * IMAGES[
            cfg.train_dataloader.dataset.type]
    return 3 * 2 * macs * images / (8 * rate * 3600)


@pytest.mark.parametrize('row', [row for row in ROWS if row[-1][-2:] == ' h'],
                         ids=lambda row: stem(config_of(row)))
def test_estimated_hours_follow_the_formula(row):
    hours = float(row[-1].removesuffix(' h').replace(',', ''))
    assert hours == float(f'{estimate(config_of(row)):.2g}')


@pytest.mark.parametrize('task, file, macs', [
    ('classifiers', 'tiny.json', 128 * 4.36e9),
    ('dense', 'detection.json', 2 * 92.64e9)  # get_flops.py --shape 800 1344
])
def test_rates_of_the_estimates_are_those_of_measured_steps(task, file, macs):
    rows = json.loads((ROOT / 'benchmarks/gpu' / file).read_text())['rows']
    step, = (statistics.median(row['samples']) for row in rows
             if (row['model'], row['mode']) == ('conv2former-t', 'train'))
    rate = 3 * 2 * macs / step / 1e12
    assert f'R = {rate:.0f} TFLOP/s for {task}' in ZOO


def test_every_published_recipe_has_an_estimate():
    assert {config_of(row) for row in ROWS if row[-1].endswith(' h')
            } == set(PUBLISHED) != set()


@pytest.mark.parametrize(
    'row', [row for row in ROWS if row[4:] and row[4].endswith('.pth`')],
    ids=lambda row: stem(config_of(row)))
def test_dense_models_start_from_the_weights_that_the_docs_name(row):
    cfg = load(config_of(row))
    assert row[4] == f'`{cfg.model.backbone.init_cfg.checkpoint}`'


def test_official_files_have_the_name_that_configs_look_for():
    names = re.findall(r'\[(\w+)\.pth\]\((https://pan[^)]*)\)', ZOO)
    assert dict(names) == {
        entry['Name']: entry['Converted From']['Weights']
        for entry in ENTRIES if 'Converted From' in entry
    } != {}


# ------------------------------------------------------------- docs/data.md


def image(path, mode='RGB', size=(64, 48), colour=1):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new(mode, size, colour).save(path)


@pytest.fixture
def own_data(tmp_path, monkeypatch):
    """What the examples of the docs call data/pets and data/mine."""
    monkeypatch.chdir(tmp_path)
    data = tmp_path / 'data'
    for split in ('train', 'val'):
        for name in ('cat', 'dog'):
            image(data / f'pets/{split}/{name}/1.jpg')
        image(data / f'mine/images/{split}/1.jpg')
        image(data / f'mine/labels/{split}/1.png', mode='L')
        box = [4, 4, 32, 32]
        annotations = [
            dict(id=i, image_id=1, category_id=10 * i, iscrowd=0, area=1024,
                 bbox=box, segmentation=[[4, 4, 36, 4, 36, 36, 4, 36]])
            for i in (1, 2)]
        (data / f'mine/{split}.json').write_text(json.dumps(dict(
            images=[dict(id=1, file_name=f'{split}/1.jpg', width=64,
                         height=48)],
            annotations=annotations,
            categories=[dict(id=10, name='cell'), dict(id=20, name='fibre')])))
    return data


def own_config(lines, folder):
    """Config of lines in docs/data.md, as if beside its bases."""
    names = re.findall(r"'\./([\w/]+\.py)'", lines)
    assert names and lines.startswith('_base_ = ')
    for name in names:
        base, = ROOT.glob(f'configs/*/{name}')
        lines = lines.replace(f'./{name}', str(base))
    path = folder / 'mine.py'
    path.write_text(lines)
    return Config.fromfile(path)


@pytest.mark.parametrize('lines', [
    lines for lines in OWN_DATA if 'train_dataloader' in lines
])
def test_lines_for_own_data_read_it(lines, own_data, tmp_path):
    cfg = own_config(lines, tmp_path)
    init_default_scope(cfg.default_scope)
    for loader in (cfg.train_dataloader, cfg.val_dataloader,
                   cfg.test_dataloader):
        data_set = DATASETS.build(loader.dataset)
        assert len(data_set) == 2 - ('pets' not in lines)
        assert len(data_set.metainfo['classes']) == 2
        assert data_set[0]['inputs'].shape[0] == 3
    if 'mine.json' in lines:
        assert cfg.test_evaluator.ann_file == 'data/mine/val.json'


def class_numbers(model):
    """Every num_classes in the config of a model."""
    if isinstance(model, dict):
        for key, value in model.items():
            yield from [value] if key == 'num_classes' else class_numbers(
                value)
    elif isinstance(model, (list, tuple)):
        for part in model:
            yield from class_numbers(part)


@pytest.mark.parametrize('lines', OWN_DATA)
def test_lines_for_own_data_set_every_number_of_classes(lines, tmp_path):
    cfg = own_config(lines, tmp_path)
    numbers = list(class_numbers([cfg.model, cfg.get('data_preprocessor')]))
    assert set(numbers) == {2}, numbers


def test_lines_that_list_imagenet_22k_make_what_the_config_reads(
        own_data, monkeypatch, capsys):
    code, = re.findall(r'```python\n(from pathlib.*?)```', DATA, re.DOTALL)
    for name in ('n02', 'n01'):
        image(own_data / f'imagenet22k/train/{name}/{name}_1.JPEG')
    exec(code, {})
    assert capsys.readouterr().out == '2 classes\n'
    cfg = load('configs/classification/conv2former_l_in22k.py')
    init_default_scope(cfg.default_scope)
    data_set = DATASETS.build(cfg.train_dataloader.dataset)
    assert data_set.ann_file.endswith('meta/train.txt')
    samples = [data_set.get_data_info(i) for i in range(len(data_set))]
    assert [(Path(sample['img_path']).name, sample['gt_label'])
            for sample in samples] == [('n01_1.JPEG', 0), ('n02_1.JPEG', 1)]
