"""The miniature stand-ins, as the libraries read them."""
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from mmdet.datasets import CocoDataset
from mmengine.config import Config
from mmengine.registry import DATASETS, init_default_scope
from PIL import Image
from pycocotools.coco import COCO

CONFIGS = Path(__file__).resolve().parents[1] / 'configs'
IN1K = 'classification/conv2former_t_in1k.py'
MASK_RCNN = 'detection/mask_rcnn_conv2former_t_coco.py'
UPERNET = 'segmentation/upernet_conv2former_t_ade20k.py'
# Few pictures, made in no time.
FEW = dict(
    imagenet=dict(classes=3), coco=dict(images=3), ade20k=dict(images=2))


@pytest.fixture(scope='module')
def made(mini, tmp_path_factory):
    """COCO and ADE20K as the tool makes them by default."""
    root = tmp_path_factory.mktemp('made')
    for data in ('coco', 'ade20k'):
        mini.make_mini_dataset(data, root / data)
    return root


@pytest.fixture(scope='module', params=['train2017', 'val2017'])
def annotated(request, made):
    """Folder of images and annotations, as pycocotools reads them."""
    root = made / 'coco'
    return root / request.param, COCO(
        str(root / f'annotations/instances_{request.param}.json'))


def read(config, part, root, pipeline=()):
    """The data set of a config, with only its root replaced."""
    cfg = Config.fromfile(CONFIGS / config)
    init_default_scope(cfg.default_scope)
    return DATASETS.build(
        dict(
            cfg[f'{part}_dataloader'].dataset,
            data_root=str(root),
            pipeline=list(pipeline)))


def contents(folder):
    return {
        path.relative_to(folder): path.read_bytes()
        for path in folder.rglob('*') if path.is_file()
    }


@pytest.mark.parametrize('part', ['train', 'val'])
def test_imagenet_has_a_folder_for_each_class(imagenet, part):
    data = read(IN1K, part, imagenet)
    assert data.get_gt_labels().tolist() == list(range(1000))
    names = (imagenet / 'classes.txt').read_text().splitlines()
    assert names == list(data.CLASSES)


@pytest.mark.parametrize('part', ['train', 'val'])
def test_imagenet_has_all_shapes_and_a_grey_jpeg(imagenet, part):
    shapes, modes = set(), Counter()
    for path in (imagenet / part).glob('*/*.JPEG'):
        with Image.open(path) as image:
            assert image.format == 'JPEG'
            modes[image.mode] += 1
            shapes.add(np.sign(image.width - image.height))
    assert modes == dict(RGB=999, L=1)
    assert shapes == {-1, 0, 1}


def test_imagenet_shows_in_val_what_train_teaches(imagenet):

    def colours(split):
        """Mean colour of the centre of the first pictures."""
        means = []
        for label in range(2, 12):  # picture 1 is grey
            path, = (imagenet / split / f'n{label:08d}').iterdir()
            image = np.asarray(Image.open(path), float)
            y, x = np.array(image.shape[:2]) // 2
            means.append(image[y - 6:y + 6, x - 6:x + 6].mean((0, 1)))
        return np.array(means)

    distance = colours('train')[:, None] - colours('val')
    nearest = np.linalg.norm(distance, axis=-1).argmin(0)
    assert (nearest == np.arange(10)).mean() >= 0.9


def test_imagenet_may_have_another_number_of_classes(mini, tmp_path):
    mini.main(['imagenet', str(tmp_path / 'mini'), '--classes', '7'])
    init_default_scope('mmpretrain')
    data = DATASETS.build(
        dict(
            type='ImageNet21k',
            data_root=str(tmp_path / 'mini'),
            split='train',
            classes=str(tmp_path / 'mini/classes.txt')))
    assert len(data) == len(data.CLASSES) == 7


def test_coco_annotations_are_those_of_their_masks(annotated):
    _, coco = annotated
    for item in coco.anns.values():
        info = coco.imgs[item['image_id']]
        mask = coco.annToMask(item)
        assert mask.shape == (info['height'], info['width'])
        assert item['area'] == mask.sum() > 0
        y, x = mask.nonzero()
        assert item['bbox'] == [
            x.min(), y.min(), np.ptp(x) + 1, np.ptp(y) + 1]


def test_coco_has_the_cases_of_the_true_files(annotated):
    folder, coco = annotated
    crowds = [item for item in coco.anns.values() if item['iscrowd']]
    others = [item for item in coco.anns.values() if not item['iscrowd']]
    assert crowds and all(
        isinstance(item['segmentation']['counts'], list) for item in crowds)
    assert {len(item['segmentation']) for item in others} == {1, 2}
    areas = [item['area'] for item in others]
    assert min(areas) < 32**2 < max(areas)
    assert 0 not in coco.anns  # pycocotools takes 0 for 'no match'

    with_objects = {item['image_id'] for item in coco.anns.values()}
    assert len(coco.imgs) == 8 and len(with_objects) == 7
    crowd_alone = {item['image_id'] for item in crowds
                   } - {item['image_id'] for item in others}
    assert len(crowd_alone) == 1
    modes = Counter()
    for info in coco.imgs.values():
        assert info['file_name'] == f'{info["id"]:012d}.jpg'
        with Image.open(folder / info['file_name']) as image:
            assert image.size == (info['width'], info['height'])
            modes[image.mode] += 1
    assert modes == dict(RGB=7, L=1)


def test_coco_numbers_its_categories_with_gaps(annotated):
    coco = annotated[1]
    names = {key: category['name'] for key, category in coco.cats.items()}
    assert list(names.values()) == list(CocoDataset.METAINFO['classes'])
    assert len(names) == 80 and not {0, 12, 91} & set(names)
    assert (names[1], names[13], names[90]) == ('person', 'stop sign',
                                                'toothbrush')
    assert set(coco.dataset) == {
        'info', 'licenses', 'images', 'annotations', 'categories'}


def test_coco_config_reads_all_but_empty_and_narrow_images(made):
    load = [
        dict(type='LoadImageFromFile'),
        dict(type='LoadAnnotations', with_bbox=True, with_mask=True)
    ]
    train = read(MASK_RCNN, 'train', made / 'coco', load)
    val = read(MASK_RCNN, 'val', made / 'coco', load)
    assert (len(train), len(val)) == (6, 8)
    labels, ignored = [], 0
    for sample in train:
        assert sample['gt_masks'].masks.any((1, 2)).all()
        labels += sample['gt_bboxes_labels'].tolist()
        ignored += sample['gt_ignore_flags'].sum()
    assert ignored == 2 and len(set(labels)) > 4
    # Class 13 of 80 has id 15: mmdet has mapped one to the other.
    assert train[0]['gt_bboxes_labels'].tolist() == [0, 13]


@pytest.mark.parametrize('part', ['train', 'val'])
def test_ade20k_shows_150_classes_and_other(made, part):
    data = read(
        UPERNET, part, made / 'ade20k/ADEChallengeData2016',
        [dict(type='LoadImageFromFile'), dict(type='LoadAnnotations')])
    assert len(data) == 8
    shown = set()
    for sample in data:
        assert sample['img'].shape[:2] == sample['gt_seg_map'].shape
        shown |= set(np.unique(sample['gt_seg_map']).tolist())
    assert shown == {*range(150), 255}


def test_ade20k_counts_its_classes(made):
    root = made / 'ade20k/ADEChallengeData2016'
    rows = [
        row.split('\t')
        for row in (root / 'objectInfo150.txt').read_text().splitlines()[1:]
    ]
    assert [int(row[0]) for row in rows] == list(range(1, 151))
    assert rows[0][4] == 'wall'
    assert 0.9 < sum(float(row[1]) for row in rows) < 1
    assert all(int(row[2]) >= 1 <= int(row[3]) for row in rows)
    scenes = (root / 'sceneCategories.txt').read_text().splitlines()
    assert [line.split()[0] for line in scenes] == sorted(
        path.stem for path in root.glob('images/*/*.jpg'))


@pytest.mark.parametrize('data', FEW)
def test_a_seed_makes_the_same_files_again(mini, data, tmp_path):
    for name, seed in dict(a=0, b=0, c=1).items():
        mini.make_mini_dataset(data, tmp_path / name, seed=seed, **FEW[data])
    first, same, other = (contents(tmp_path / name) for name in 'abc')
    assert first == same and first.keys() == other.keys()
    assert all(first[path] != other[path] for path in first
               if path.suffix.lower() in ('.jpeg', '.jpg'))


@pytest.mark.parametrize('data, dest, config', [
    ('imagenet', 'data/imagenet', IN1K),
    ('coco', 'data/coco', MASK_RCNN),
    ('ade20k', 'data/ade', UPERNET),
])
def test_configs_find_the_data_where_the_tool_makes_it(data, dest, config,
                                                       mini, tmp_path,
                                                       monkeypatch):
    monkeypatch.chdir(tmp_path)
    mini.main([data, dest])
    cfg = Config.fromfile(CONFIGS / config)
    init_default_scope(cfg.default_scope)
    for part in ('train', 'val', 'test'):
        assert len(DATASETS.build(cfg[f'{part}_dataloader'].dataset)) > 5
    assert Path(cfg.val_evaluator.get('ann_file', '.')).exists()


@pytest.mark.parametrize('images', [1, 150, 151])
def test_any_number_of_pictures_shows_all_classes(images, mini, tmp_path,
                                                  monkeypatch):
    monkeypatch.setattr(mini, 'SIZES', [(24, 16)])
    mini.make_mini_dataset('ade20k', tmp_path / 'ade', images=images)
    info, = tmp_path.glob('ade/*/objectInfo150.txt')
    shown = [row.split('\t')[2:4] for row in info.read_text().splitlines()]
    assert len(shown) == 151
    assert all(int(n) >= 1 for row in shown[1:] for n in row)


def test_data_that_is_there_is_not_touched(mini, tmp_path):
    (tmp_path / 'real.jpg').write_text('a photograph')
    with pytest.raises(SystemExit, match='not an empty folder.*another'):
        mini.main(['coco', str(tmp_path)])
    assert [path.name for path in tmp_path.iterdir()] == ['real.jpg']


def test_empty_folder_is_filled(mini, tmp_path):
    (tmp_path / 'mini').mkdir()
    mini.main(['imagenet', str(tmp_path / 'mini'), '--classes', '2'])
    assert len(list(tmp_path.glob('mini/*/*/*.JPEG'))) == 4


def test_failure_leaves_nothing_behind(mini, tmp_path, monkeypatch):
    saved = []

    def save(path, picture):
        if len(saved) == 2:
            raise OSError('no space left')
        saved.append(path)

    monkeypatch.setattr(mini, 'save', save)
    with pytest.raises(SystemExit, match='no space left'):
        mini.main(['coco', str(tmp_path / 'mini')])
    assert len(saved) == 2 and not list(tmp_path.iterdir())


@pytest.mark.parametrize('options, expected', [
    (['coco', '--classes', '3'], '--classes is for imagenet'),
    (['coco', '--images', '0'], "expected a whole number above 0, got '0'"),
    (['coco', '--seed=-1'], 'expected a whole number from 0 to 4294967295'),
])
def test_options_that_make_no_sense_are_refused(options, expected, mini,
                                                tmp_path, capsys):
    with pytest.raises(SystemExit):
        mini.main([options[0], str(tmp_path / 'mini'), *options[1:]])
    assert expected in capsys.readouterr().err
    assert not list(tmp_path.iterdir())
