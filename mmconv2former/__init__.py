"""Conv2Former for OpenMMLab: one backbone for mmpretrain, mmdet and mmseg.

Importing the package registers its classes in mmengine.
"""
import torch

try:
    import mmengine  # noqa: F401
except ModuleNotFoundError as error:
    if error.name != 'mmengine':
        raise
    raise ModuleNotFoundError(
        'mmconv2former needs mmengine, which two distributions provide. '
        'Install one of them, in the folder that has setup.py: '
        "pip install '.[onedl]' (the maintained packages, onedl-mmengine) or "
        "pip install '.[openmmlab]' (the original packages, mmengine). "
        'In an environment that has OpenMMLab packages already, take the '
        'same family.', name='mmengine') from error
if torch.__version__ < '2.7.dev0':
    raise ImportError(
        f'found torch {torch.__version__}; mmconv2former expects 2.7 or '
        'later. After a change of torch, mmcv has to be compiled anew')

from .backbone import Conv2Former
from .inference import fuse_for_inference
from .layer_decay import LayerDecayOptimWrapperConstructor
from .neck import Conv2FormerNeck

__version__ = '0.1.0'

__all__ = [
    'Conv2Former', 'Conv2FormerNeck', 'LayerDecayOptimWrapperConstructor',
    'fuse_for_inference', '__version__'
]
