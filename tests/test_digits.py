"""Digits: the data, the three configs and the report."""
import base64
import io
import json
import os
import re
import shutil
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from mmengine.config import Config
from mmengine.registry import init_default_scope
from mmengine.runner import Runner
from PIL import Image
from pycocotools import mask as rle

import digits_report as report
import make_digits as make

ROOT = Path(__file__).resolve().parents[1]
CLASSIFIER = 'conv2former_mini_digits'
CONFIGS = {
    CLASSIFIER: 'classification',
    'mask_rcnn_conv2former_mini_digits': 'detection',
    'upernet_conv2former_mini_digits': 'segmentation',
}
SETTINGS = dict(train_scenes=6, val_scenes=6, views=1)


def silent(line):
    pass


@pytest.fixture(scope='module')
def data(tmp_path_factory):
    dest = tmp_path_factory.mktemp('data') / 'digits'
    assert make.make_digits(dest, **SETTINGS, report=silent)
    return dest


@pytest.fixture
def few_sources(monkeypatch):
    """Make data from 150 source digits only, which takes no time."""
    images, labels = make.load_sources()
    monkeypatch.setattr(make, 'load_sources',
                        lambda: (images[:150], labels[:150]))


def contents(folder):
    return {
        path.relative_to(folder): path.read_bytes()
        for path in folder.rglob('*') if path.is_file()
    }


def test_two_runs_make_the_same_files(few_sources, tmp_path):
    for name in 'ab':
        make.make_digits(tmp_path / name, **SETTINGS, report=silent)
    first, second = contents(tmp_path / 'a'), contents(tmp_path / 'b')
    assert len(first) == 150 + 2 * (6 + 6) + 2 + 1
    assert first == second


def test_another_seed_makes_other_pictures(few_sources, tmp_path):
    for seed in (0, 1):
        make.make_digits(
            tmp_path / str(seed), **SETTINGS, seed=seed, report=silent)
    name = 'scenes/val/0000.png'
    assert (tmp_path / '0' / name).read_bytes() != (tmp_path / '1' /
                                                    name).read_bytes()


def test_train_and_val_show_different_source_digits(data):
    manifest = json.loads((data / 'manifest.json').read_text())
    train, val = map(set, (manifest['sources'][split]
                           for split in ('train', 'val')))
    assert len(train) + len(val) == 1797 and not train & val
    shown = dict(train=set(), val=set())
    for name, sources in manifest['files'].items():
        split = Path(name).parts[1]
        assert sources and (data / name).is_file()
        shown[split].update(sources)
    assert shown['train'] == train and shown['val'] == val


def test_manifest_names_the_digits_of_the_annotations(data):
    _, labels = make.load_sources()
    files = json.loads((data / 'manifest.json').read_text())['files']
    coco = json.loads((data / 'scenes/val.json').read_text())
    for image in coco['images']:
        classes = [
            annotation['category_id'] - 1
            for annotation in coco['annotations']
            if annotation['image_id'] == image['id']
        ]
        sources = files[f'scenes/val/{image["file_name"]}']
        assert classes == labels[sources].tolist()


@pytest.mark.parametrize('split', ['train', 'val'])
def test_annotations_agree_with_the_label_maps(data, split):
    coco = json.loads((data / f'scenes/{split}.json').read_text())
    assert [c['name'] for c in coco['categories']] == list('0123456789')
    assert len(coco['images']) == 6
    for image in coco['images']:
        painted = cv2.imread(
            str(data / 'scenes/labels' / split / image['file_name']),
            cv2.IMREAD_UNCHANGED)
        expected = np.zeros((128, 128), np.uint8)
        for item in coco['annotations']:
            if item['image_id'] != image['id']:
                continue
            mask = rle.decode(
                rle.frPyObjects(item['segmentation'], 128, 128)).astype(bool)
            assert item['area'] == mask.sum() > 0
            assert item['iscrowd'] == 0
            y, x = np.nonzero(mask)
            assert item['bbox'] == [
                x.min(), y.min(),
                np.ptp(x) + 1, np.ptp(y) + 1
            ]
            assert not expected[mask].any(), 'two masks share a pixel'
            expected[mask] = item['category_id']
        np.testing.assert_array_equal(painted, expected)


def test_covered_digits_keep_their_visible_pixels():
    images, _ = make.load_sources()
    covered = 0
    for seed in range(20):
        rng = np.random.RandomState(seed)
        _, instances = make.draw_scene(rng, 96, images[:5], (40, 50))
        alone = [
            make.draw_scene(np.random.RandomState(seed), 96, images[:1],
                            (40, 50))[1]
        ]
        # The first digit is drawn alike with and without the later ones.
        visible = (instances == 1).sum() / (alone[0] == 1).sum()
        assert visible >= make.MIN_VISIBLE
        covered += visible < 1
    assert covered > 0


def test_second_run_does_nothing(few_sources, tmp_path):
    dest = tmp_path / 'digits'
    assert make.make_digits(dest, **SETTINGS, report=silent)
    (dest / 'scenes/val/0000.png').write_bytes(b'untouched')
    assert not make.make_digits(dest, **SETTINGS, report=silent)
    assert (dest / 'scenes/val/0000.png').read_bytes() == b'untouched'


@pytest.mark.parametrize('name', [
    'scenes/val/0003.png', 'scenes/train.json', 'scenes/labels/val/0003.png'])
@pytest.mark.parametrize('is_empty', [True, False])
def test_folder_that_lost_a_file_is_remade(name, is_empty, few_sources,
                                           tmp_path):
    dest = tmp_path / 'digits'
    make.make_digits(dest, **SETTINGS, report=silent)
    whole = contents(dest)
    (dest / name).unlink()
    if is_empty:
        (dest / name).touch()
    assert make.make_digits(dest, **SETTINGS, report=silent)
    assert contents(dest) == whole and [*tmp_path.iterdir()] == [dest]


def test_folder_beside_the_data_is_not_touched(few_sources, tmp_path):
    kept = tmp_path / 'digits.partial/mine.txt'
    kept.parent.mkdir()
    kept.write_text('of the user')
    make.make_digits(tmp_path / 'digits', **SETTINGS, report=silent)
    assert kept.read_text() == 'of the user'
    assert len([*tmp_path.iterdir()]) == 2


def test_stopped_run_leaves_the_older_data(few_sources, tmp_path,
                                           monkeypatch):
    dest = tmp_path / 'digits'
    make.make_digits(dest, **SETTINGS, report=silent)
    whole = contents(dest)

    def write_scenes(*_):
        raise OSError('no space left')

    monkeypatch.setattr(make, 'write_scenes', write_scenes)
    with pytest.raises(SystemExit, match='no space left'):
        make.main([str(dest), '--seed', '1'])
    assert contents(dest) == whole and [*tmp_path.iterdir()] == [dest]


def test_other_settings_are_made_anew(few_sources, tmp_path):
    dest = tmp_path / 'digits'
    make.make_digits(dest, **SETTINGS, report=silent)
    assert make.make_digits(
        dest, **{
            **SETTINGS, 'val_scenes': 2
        }, report=silent)
    assert len(list((dest / 'scenes/val').iterdir())) == 2


@pytest.mark.parametrize('name, manifest', [
    ('thesis.tex', None),
    ('scenes/beach.jpg', None),
    ('classification/train/0/mine.png', '{"settings": {}}'),
    ('scenes/train.json', '{"settings'),
    ('scenes/train/0000.png', '[]'),
])
def test_folder_of_another_origin_is_not_touched(name, manifest, tmp_path):
    path = tmp_path / 'mine' / name
    path.parent.mkdir(parents=True)
    path.write_text('all of it')
    if manifest:
        (tmp_path / 'mine/manifest.json').write_text(manifest)
    before = contents(tmp_path)
    with pytest.raises(SystemExit, match=f'{name}.* no manifest.*empty'):
        make.main([str(tmp_path / 'mine')])
    assert contents(tmp_path) == before


def test_file_that_was_put_into_the_data_is_not_lost(few_sources, tmp_path):
    dest = tmp_path / 'digits'
    make.make_digits(dest, **SETTINGS, report=silent)
    (dest / 'scenes/val/notes.txt').write_text('of the user')
    before = contents(dest)
    with pytest.raises(SystemExit, match='notes.txt, which no manifest'):
        make.main([str(dest), '--seed', '1'])
    assert contents(dest) == before


def test_link_that_leads_nowhere_is_not_lost(few_sources, tmp_path):
    dest = tmp_path / 'digits'
    make.make_digits(dest, **SETTINGS, report=silent)
    (dest / 'link').symlink_to(tmp_path / 'nowhere')
    with pytest.raises(SystemExit, match='holds link, which no manifest'):
        make.main([str(dest), '--seed', '1'])
    assert (dest / 'link').is_symlink()


def test_validation_has_one_picture_of_each_fifth_digit(few_sources, tmp_path):
    make.make_digits(tmp_path, **{**SETTINGS, 'views': 2}, report=silent)
    manifest = json.loads((tmp_path / 'manifest.json').read_text())
    for split, views in (('train', 2), ('val', 1)):
        pictures = [name for name in manifest['files']
                    if name.startswith(f'classification/{split}/')]
        assert len(pictures) == views * len(manifest['sources'][split])
    _, labels = make.load_sources()
    for label in range(10):
        chosen = [i for i in manifest['sources']['val'] if labels[i] == label]
        assert len(chosen) == round(0.2 * (labels == label).sum())


def test_path_that_cannot_become_a_folder_is_told(tmp_path):
    (tmp_path / 'file').touch()
    with pytest.raises(SystemExit, match='is a file'):
        make.main([str(tmp_path / 'file')])
    with pytest.raises(SystemExit, match='cannot make the data'):
        make.main([str(tmp_path / 'file/digits')])


@pytest.mark.parametrize('option, value', [
    ('--train-scenes', '0'), ('--train-scenes', '-1'), ('--val-scenes', '0'),
    ('--views', '0'), ('--seed', '-1'), ('--seed', str(2**32)),
    ('--seed', 'x'),
])
def test_numbers_that_make_no_data_are_refused(option, value, tmp_path,
                                               capsys):
    with pytest.raises(SystemExit):
        make.main([str(tmp_path / 'digits'), f'{option}={value}'])
    error = capsys.readouterr().err
    assert f'{option}: expected a whole number ' in error
    assert f"got '{value}'" in error
    assert not [*tmp_path.iterdir()]


@pytest.fixture(scope='module')
def runs(data, tmp_path_factory):
    """Work dirs of the three configs after two iterations and a test."""
    work_dirs = tmp_path_factory.mktemp('work_dirs')
    checkpoint = None
    for name, task in CONFIGS.items():
        cfg = Config.fromfile(ROOT / 'configs' / task / f'{name}.py')
        cfg.work_dir = str(work_dirs / name)
        # mmengine hands a visualizer of the same name to every later runner
        # of the process, which then logs to the folder of the first.
        cfg.visualizer.name = name
        cfg.log_level = 'ERROR'
        cfg.default_hooks.logger.interval = 1
        for split in ('train', 'val', 'test'):
            loader = cfg[f'{split}_dataloader']
            loader.update(
                batch_size=2, num_workers=0, persistent_workers=False)
            root = loader.dataset.data_root
            loader.dataset.data_root = root.replace('data/digits', str(data))
            loader.dataset.indices = 4 if split == 'train' else 6
        if task == 'classification':
            cfg.train_cfg.max_epochs = 1
        else:
            cfg.model.backbone.init_cfg.checkpoint = checkpoint
            cfg.train_cfg = dict(
                type='IterBasedTrainLoop', max_iters=2, val_interval=2)
            cfg.param_scheduler = []
        cfg.default_hooks.checkpoint.update(interval=1, by_epoch=False)
        out = work_dirs / name / 'test/predictions'
        if task == 'segmentation':
            cfg.val_evaluator.output_dir = str(out)
        else:
            if task == 'detection':
                cfg.val_evaluator.ann_file = str(data / 'scenes/val.json')
                cfg.model.test_cfg.rcnn.score_thr = 0.
            kind = 'DumpDetResults' if task == 'detection' else 'DumpResults'
            cfg.val_evaluator = [
                cfg.val_evaluator,
                dict(type=kind, out_file_path=f'{out}.pkl')
            ]
        cfg.test_evaluator = cfg.val_evaluator
        out.parent.mkdir(parents=True)
        Runner.from_cfg(cfg).train()
        checkpoint = checkpoint or str(work_dirs / name / 'iter_2.pth')

        cfg.work_dir = str(work_dirs / name / 'test')
        cfg.load_from = str(work_dirs / name / 'iter_2.pth')
        Runner.from_cfg(cfg).test()
    return work_dirs


@pytest.mark.parametrize('name', CONFIGS)
def test_config_trains_and_is_evaluated(runs, name):
    losses = report.read_losses(runs / name)[1]
    assert len(losses) == 2 and np.isfinite(losses).all()
    metrics = report.read_metrics(runs / name)
    task = next(task for task in report.TASKS if task.run == name)
    assert {metric.key for metric in task.metrics} <= set(metrics)


def test_training_images_of_several_sizes_make_a_batch(data):
    cfg = Config.fromfile(ROOT / f'configs/classification/{CLASSIFIER}.py')
    init_default_scope('mmpretrain')
    cfg.train_dataloader.dataset.data_root = str(data / 'classification')
    # mmpretrain's own tools/train.py has this where a config says nothing.
    loader = Runner.build_dataloader({
        'collate_fn': dict(type='default_collate'), **cfg.train_dataloader,
        'num_workers': 0, 'persistent_workers': False}, seed=0)
    sizes = {image.shape for batch in loader for image in batch['inputs']}
    assert {(3, 64, 64), (3, 59, 59)} <= sizes


@pytest.mark.parametrize('name', list(CONFIGS)[1:])
def test_dense_config_names_the_weights_that_the_classifier_leaves(name):
    classifier = Config.fromfile(
        ROOT / f'configs/classification/{CLASSIFIER}.py')
    dense = Config.fromfile(ROOT / f'configs/{CONFIGS[name]}/{name}.py')
    assert dense.model.backbone.init_cfg == dict(
        type='Pretrained',
        checkpoint=f'work_dirs/{CLASSIFIER}/'
        f'epoch_{classifier.train_cfg.max_epochs}.pth')
    for key in ('type', 'arch', 'layer_scale_init_value'):
        assert dense.model.backbone[key] == classifier.model.backbone[key]


@pytest.mark.parametrize('name', list(CONFIGS)[1:])
def test_dense_config_starts_from_the_classifier(runs, name, tmp_path):
    trained = torch.load(
        runs / CLASSIFIER / 'iter_2.pth', weights_only=False)['state_dict']
    cfg = Config.fromfile(ROOT / f'configs/{CONFIGS[name]}/{name}.py')
    cfg.work_dir, cfg.log_level = str(tmp_path), 'ERROR'
    cfg.model.backbone.init_cfg.checkpoint = str(
        runs / CLASSIFIER / 'iter_2.pth')
    for key in list(cfg):
        if key.startswith(('train_', 'val_', 'test_')) or key in (
                'optim_wrapper', 'param_scheduler'):
            cfg.pop(key)
    model = Runner.from_cfg(cfg).model
    model.init_weights()
    carried = model.state_dict()
    backbone = [key for key in trained if key.startswith('backbone.')]
    assert len(backbone) > 100
    for key in backbone:
        torch.testing.assert_close(carried[key], trained[key])


def test_report_shows_table_curves_and_pictures(runs, data, tmp_path, capsys):
    names = [
        f'{step} {name}' for name in CONFIGS for step in ('train', 'test')
    ]
    work_dirs = tmp_path / 'work_dirs'
    shutil.copytree(runs, work_dirs)
    (work_dirs / 'digits').mkdir()
    (work_dirs / 'digits/seconds.tsv').write_text(''.join(
        f'{name}\t30\n' for name in names) + 'total\t210\n')
    top1 = report.newest(work_dirs / CLASSIFIER / 'test', '*/*.json')
    top1.write_text(json.dumps({'accuracy/top1': 96.9}))
    for name in list(CONFIGS)[1:]:
        shutil.copytree(work_dirs / name,
                        work_dirs / f'{name}{report.SCRATCH}')
    report.main([
        '--work-dirs', str(work_dirs), '--data', str(data), '--compare',
        '--scenes', '1000', '--picture', str(tmp_path / 'docs/digits.png')])
    printed = capsys.readouterr().out
    table = printed[:printed.index('report:')].splitlines()
    assert len(table) == 2 + 4 + 1
    for row, target in zip(table[2:], ('97.0', '0.850', '0.800', '0.750')):
        assert target in row and 'NO' in row
    assert table[-1].split()[-1] == '3.5'
    assert sum('+0.000' in row for row in table) == 3
    page = (work_dirs / 'digits/report.html').read_text()
    assert page.count('<img ') == 3 and page.count('class="missed"') == 4
    assert 'http' not in page
    drawn = re.findall('src="data:image/png;base64,([^"]*)"', page)
    assert len(drawn) == 3
    for png in drawn:  # Curves, red titles or masks: not empty axes.
        pixels = np.array(Image.open(io.BytesIO(base64.b64decode(png))
                                     ).convert('RGB')).astype(int)
        assert (np.ptp(pixels, 2) > 50).sum() > 100
    picture = cv2.imread(str(tmp_path / 'docs/digits.png'))
    assert picture.std() > 10
    assert (tmp_path / 'docs/digits.png').stat().st_size < 300_000

    (tmp_path / 'file').touch()
    for option, path, message in (
            ('--picture', 'docs', 'docs is a folder: name a PNG'),
            ('--picture', 'file/a.png', 'cannot be written: .*file'),
            ('--out', 'file/a.html', 'cannot be written: .*file'),
            ('--data', 'docs', 'no scenes in .*quickstart.sh')):
        with pytest.raises(SystemExit) as end:
            report.main(['--work-dirs', str(work_dirs), '--data', str(data),
                         '--scenes', '1', option, str(tmp_path / path)])
        told = capsys.readouterr().err or str(end.value)
        assert re.search(message, told), told


@pytest.mark.parametrize('seconds, missing', [
    (None, 'seconds.tsv'),
    ('data\t3\n', 'no total in'),
    ('data\t3\ntot', 'seconds.tsv is damaged'),
    ('total\t3\n', r'no \*/\*\.json in'),
])
def test_report_says_what_is_missing(seconds, missing, tmp_path):
    (tmp_path / 'digits').mkdir()
    if seconds:
        (tmp_path / 'digits/seconds.tsv').write_text(seconds)
    with pytest.raises(
            SystemExit, match=f'{missing}.*quickstart.sh --compare first'):
        report.main(['--compare', '--work-dirs', str(tmp_path)])


@pytest.mark.parametrize('read, file', [
    (report.read_metrics, 'test/*/*.json'),
    (report.read_losses, '*/vis_data/scalars.json'),
    (report.read_predictions, 'test/predictions.pkl'),
])
def test_report_names_a_file_that_was_cut(read, file, runs, tmp_path):
    run = tmp_path / CLASSIFIER
    shutil.copytree(runs / CLASSIFIER, run)
    assert read(run)
    path = report.newest(run, file)
    path.write_bytes(path.read_bytes()[:-3])
    with pytest.raises(report.DataError, match=f'{path.name} is damaged'):
        read(run)


def test_last_test_is_the_newest_whatever_its_name(tmp_path):
    for age, name in enumerate('bca'):
        (tmp_path / name).touch()
        os.utime(tmp_path / name, (9 - age, 9 - age))
    assert report.newest(tmp_path, '*').name == 'b'


def test_rows_compare_with_target_and_scratch(tmp_path, monkeypatch):
    metric = report.Metric('top-1 %', 'top1', 100, 97, 1)
    monkeypatch.setattr(
        report, 'TASKS', (report.Task('a', 'run', (metric, ), True), ))
    values = {'run': 0.97, 'run_scratch': 0.5}
    monkeypatch.setattr(report, 'read_metrics', lambda run, keys: {
        'top1': values[run.name]})
    row, _ = report.make_rows(tmp_path, {
        'train run': 60., 'test run': 30., 'train run_scratch': 600.,
        'total': 90.}, True)
    assert row == {
        'task': 'a', 'metric': 'top-1 %', 'value': '97.0', 'target': '97.0',
        'met': 'yes', 'minutes': '1.5', 'from scratch': '50.0',
        'difference': '+47.0'}


def test_sure_digits_are_drawn_as_what_they_are(data):
    mask = rle.encode(np.asfortranarray(np.ones((4, 4), 'uint8')))
    instances = dict(
        bboxes=torch.tensor([[0., 0., 4., 4.], [0., 0., 2., 2.]]),
        masks=[mask, mask], labels=torch.tensor([3, 4]),
        scores=torch.tensor([0.9, 0.4]))
    found = report.read_detections([
        dict(img_path='x/a.png', pred_instances=instances)])
    digit, = found['a.png']
    assert (digit.label, digit.box) == (3, (0, 0, 4, 4))
    truth = report.read_truth(data / 'scenes/val.json')
    coco = json.loads((data / 'scenes/val.json').read_text())
    names = {c['id']: int(c['name']) for c in coco['categories']}
    assert sorted(d.label for digits in truth.values() for d in digits) == \
        sorted(names[a['category_id']] for a in coco['annotations'])


@pytest.mark.parametrize('size', [100, 10])
def test_report_names_a_picture_that_was_cut(size, tmp_path):
    path = tmp_path / 'a.png'
    noise = np.random.RandomState(0).randint(256, size=(20, 20))
    Image.fromarray(noise.astype(np.uint8)).save(path)
    assert report.read_picture(path).shape == (20, 20)
    path.write_bytes(path.read_bytes()[:size])
    with pytest.raises(report.DataError, match='a.png is damaged'):
        report.read_picture(path)


def test_report_says_which_metric_is_missing(runs, tmp_path):
    run = tmp_path / CLASSIFIER
    shutil.copytree(runs / CLASSIFIER, run)
    with pytest.raises(report.DataError, match='json has no accuracy/top5'):
        report.read_metrics(run, ['accuracy/top1', 'accuracy/top5'])


def test_report_refuses_predictions_of_other_scenes(runs, data):
    with pytest.raises(report.DataError, match='of other scenes .*x.png is'):
        report.paint_scenes(runs, data, ['x.png'])
