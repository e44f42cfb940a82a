"""Where the package's classes are registered: mmengine's root registries.

mmengine looks a type up in the scope of the library that asks and then in the
root, so what is registered once here is found from mmpretrain, mmdet and
mmseg alike. mmengine imports the module ``<scope>.registry`` for a type
written ``'mmconv2former.Conv2Former'``; importing this file imports the
package, which is why such a type needs no ``custom_imports``.
"""
from mmengine.registry import MODELS, OPTIM_WRAPPER_CONSTRUCTORS

__all__ = ['MODELS', 'OPTIM_WRAPPER_CONSTRUCTORS']
