"""Stand-in data in the true formats of ImageNet, COCO and ADE20K."""
import json
import os

import numpy as np
import pytest
from PIL import Image

# COCO numbers its 80 classes from 1 to 90.
COCO_IDS = sorted(
    set(range(1, 91)) - {12, 26, 29, 30, 45, 66, 68, 69, 71, 83})


def _photo(path, size=(96, 64), seed=0):
    noise = np.random.RandomState(seed).randint(0, 255, (*size[::-1], 3))
    os.makedirs(path.parent, exist_ok=True)
    Image.fromarray(noise.astype('uint8')).save(path)


@pytest.fixture(scope='session')
def imagenet(tmp_path_factory):
    """1000 class folders for train and val, an image in each."""
    root = tmp_path_factory.mktemp('imagenet')
    _photo(root / 'one.JPEG')
    for split in ('train', 'val'):
        for i in range(1000):
            folder = root / split / f'n{i:08d}'
            folder.mkdir(parents=True)
            os.link(root / 'one.JPEG', folder / 'one.JPEG')
    return root


@pytest.fixture(scope='session')
def coco(tmp_path_factory):
    """Four images for train and for val, two polygons on each."""
    from mmdet.datasets import CocoDataset
    root = tmp_path_factory.mktemp('coco')
    categories = [
        dict(id=key, name=name)
        for key, name in zip(COCO_IDS, CocoDataset.METAINFO['classes'])
    ]
    (root / 'annotations').mkdir()
    for split in ('train2017', 'val2017'):
        images, annotations = [], []
        for i in range(4):
            name = f'{i:012d}.jpg'
            _photo(root / split / name, seed=i)
            images.append(dict(id=i, file_name=name, width=96, height=64))
            for j, category in enumerate((1, 90)):
                x, y, w, h = 8 + 40 * j, 8, 36, 44
                polygon = [x, y, x + w, y, x + w, y + h, x, y + h]
                annotations.append(
                    dict(
                        id=2 * i + j,
                        image_id=i,
                        category_id=category,
                        iscrowd=0,
                        area=w * h,
                        bbox=[x, y, w, h],
                        segmentation=[polygon]))
        with open(root / 'annotations' / f'instances_{split}.json', 'w') as f:
            json.dump(
                dict(
                    images=images,
                    annotations=annotations,
                    categories=categories), f)
    return root


@pytest.fixture(scope='session')
def ade20k(tmp_path_factory):
    """Four images and label maps (0 other, 1 to 150) for train and val."""
    root = tmp_path_factory.mktemp('ade') / 'ADEChallengeData2016'
    for split in ('training', 'validation'):
        for i in range(4):
            name = f'ADE_{split}_{i:08d}'
            _photo(root / 'images' / split / f'{name}.jpg', seed=i)
            labels = np.zeros((64, 96), dtype='uint8')
            labels[8:, 8:48], labels[:32, 48:], labels[32:, 48:] = 1, 75, 150
            folder = root / 'annotations' / split
            folder.mkdir(parents=True, exist_ok=True)
            Image.fromarray(labels).save(folder / f'{name}.png')
    return root
