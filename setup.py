"""Package metadata, and the one place where versions are pinned.

tools/setup_env.sh installs from here; the tested torch/torchvision pair, which
depends on the machine rather than on this package, stands in that script.
"""
import re
from pathlib import Path

from setuptools import find_packages, setup

ROOT = Path(__file__).resolve().parent

# For ONNX; onnxscript is what torch's exporter is written in.
EXPORT = ['onnx>=1.16,<2', 'onnxruntime>=1.18,<2', 'onnxscript>=0.5,<1']

# Two families of distributions provide the same import packages (mmengine,
# mmcv, mmdet, ...), so requiring either would break an environment that holds
# the other. The user chooses one, as an extra, or has one already. mmcv is
# compiled against the torch that is installed: install torch first, then mmcv
# with `--no-build-isolation`, then the extra (tools/setup_env.sh does that).
EXTRAS = {
    # maintained
    'onedl': [
        'onedl-mmengine==0.10.12',
        'onedl-mmcv==2.3.6',
        'onedl-mmpretrain==1.3.6',
        'onedl-mmdetection==3.5.1',
        'onedl-mmsegmentation==1.4.2',
        'torchvision',  # mmpretrain imports it without requiring it
    ],
    # original
    'openmmlab': [
        'mmengine==0.10.7',
        'mmcv==2.1.0',
        'mmpretrain==1.2.0',
        'mmdet==3.3.0',
        'mmsegmentation==1.2.2',
        'setuptools<81',  # mmengine and mmcv import pkg_resources
        'torchvision',  # mmpretrain imports it without requiring it
        'ftfy',  # so does mmseg
        'regex',  # and this one
        'opencv-python<5',  # newer than all of these
    ],
    'export': EXPORT,  # tools/export.py to ONNX
    'test': [
        *EXPORT,
        'pytest>=8,<10',
        'pytest-xdist>=3,<4',  # tools/run_tests.sh, gpu_checks.sh
        'ruff==0.17.6',  # its rules change from version to version
        'scikit-learn>=1.5,<2',  # carries the digits
    ],
}


def read_version():
    """Read ``__version__`` without importing the package, which needs torch.

    Returns:
        str: The version.

    Raises:
        RuntimeError: If ``mmconv2former/__init__.py`` assigns none.
    """
    path = ROOT / 'mmconv2former' / '__init__.py'
    found = re.search(r"^__version__ = '([^']+)'",
                      path.read_text(encoding='utf-8'), re.MULTILINE)
    if found is None:
        raise RuntimeError(f"{path} has no line \"__version__ = '...'\"")
    return found.group(1)


if __name__ == '__main__':
    setup(
        name='mmconv2former',
        version=read_version(),
        description='Conv2Former for OpenMMLab: classification, detection '
        'and segmentation from one backbone',
        long_description=(ROOT / 'README.md').read_text(encoding='utf-8'),
        long_description_content_type='text/markdown',
        license='Apache-2.0',
        packages=find_packages(include=['mmconv2former', 'mmconv2former.*']),
        # An editable install puts this folder on the path, then. Otherwise
        # setuptools adds a finder that comes last: next to a clone, Python
        # would take the folder of the clone for the package.
        package_dir={'': '.'},
        package_data={'mmconv2former.cpp_kernels': ['*.cpp', '*.h']},
        python_requires='>=3.10',
        install_requires=['torch'],
        extras_require=EXTRAS,
        classifiers=[
            'Programming Language :: Python :: 3.10',
            'Programming Language :: Python :: 3.11',
            'Programming Language :: Python :: 3.12',
            'Topic :: Scientific/Engineering :: Artificial Intelligence',
        ],
    )
