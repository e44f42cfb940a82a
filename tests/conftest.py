"""Stand-in data in the true formats of ImageNet, COCO and ADE20K."""
import importlib.util
from pathlib import Path

import pytest

TOOLS = Path(__file__).resolve().parents[1] / 'tools'


@pytest.fixture(scope='session')
def load_tool():
    """Load a script of tools/ as a new module."""

    def load(name):
        spec = importlib.util.spec_from_file_location(name,
                                                      TOOLS / f'{name}.py')
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        return module

    return load


@pytest.fixture(scope='session')
def mini(load_tool):
    """The module that makes the data."""
    return load_tool('make_mini_dataset')


@pytest.fixture(scope='session')
def imagenet(mini, tmp_path_factory):
    """1000 class folders for train and val, an image in each."""
    root = tmp_path_factory.mktemp('mini') / 'imagenet'
    mini.make_mini_dataset('imagenet', root)
    return root


@pytest.fixture(scope='session')
def coco(mini, tmp_path_factory):
    """Four images for train and for val; one has a crowd, one nothing."""
    root = tmp_path_factory.mktemp('mini') / 'coco'
    mini.make_mini_dataset('coco', root, images=4)
    return root


@pytest.fixture(scope='session')
def ade20k(mini, tmp_path_factory):
    """Four images and label maps (0 other, 1 to 150) for train and val."""
    root = tmp_path_factory.mktemp('mini') / 'ade'
    mini.make_mini_dataset('ade20k', root, images=4)
    return root / 'ADEChallengeData2016'
