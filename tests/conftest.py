"""Stand-ins: data in the true formats of ImageNet, COCO and ADE20K, and for a
GPU what executes compiled kernels on a CPU."""
import importlib.util
from pathlib import Path
from types import SimpleNamespace

import pytest

import ptx

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


@pytest.fixture
def hopper(monkeypatch, tmp_path):
    """What Triton compiles for, in place of a GPU that it finds."""
    triton = pytest.importorskip('triton')
    target = triton.backends.compiler.GPUTarget('cuda', 90, 32)
    monkeypatch.setenv('TRITON_CACHE_DIR', str(tmp_path / 'triton'))
    monkeypatch.setattr(
        triton.runtime.jit, 'driver', SimpleNamespace(active=SimpleNamespace(
            get_current_device=lambda: 0, get_current_stream=lambda _: 0,
            get_current_target=lambda: target)))


@pytest.fixture
def executed_launches(hopper, monkeypatch):
    """Have launches execute the compiled kernels; names of those that were."""
    launch = importlib.import_module('mmconv2former.triton_kernels.launch')
    names = set()

    def call(self, *tensors):
        names.add(self.kernel.__name__)
        assert self.constants['enable_fp_fusion']
        # One that is compiled serves all values of integers.
        scalars = [p for p in self.kernel.params if not p.is_constexpr]
        for param, value in zip(scalars[len(tensors):], self.scalars,
                                strict=True):
            assert param.do_not_specialize or isinstance(value, float), param
        ptx.execute(self.kernel, self.grid[0], *tensors, *self.scalars,
                    **self.constants)

    monkeypatch.setattr(launch.Launch, '__call__', call)
    return names
