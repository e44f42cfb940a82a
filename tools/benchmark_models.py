"""The models that tools/benchmark.py compares.

A model is ``conv2former-ARCH``, ``conv2former-ARCH@PATH`` or ``TYPE:ARCH``
(``ResNet:50``) for any backbone of mmpretrain. The paths of ours have the same
weights:

- official: order of operations and layout of the authors' code;
- plain: the package with ``MMCONV2FORMER_FUSED=0``;
- fused, the default: the package as it comes;
- compiled: the same, with the backbone under ``torch.compile``;
- graphs: the same, with ``cuda_graphs`` of the backbone;
- folded: after ``fuse_for_inference``, which knows no training.
"""
import contextlib
import difflib
import inspect
import os
from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mmconv2former import Conv2Former, Conv2FormerNeck
from mmconv2former.archs import resolve_arch
from mmconv2former.dispatch import FUSED_VARIABLE

PATHS = ('official', 'plain', 'fused', 'compiled', 'graphs', 'folded')


def official_norm(norm: nn.Module, x: Tensor) -> Tensor:
    """The authors' layer norm: primitive operations over dimension 1."""
    mean = x.mean(1, keepdim=True)
    variance = (x - mean).pow(2).mean(1, keepdim=True)
    x = (x - mean) / torch.sqrt(variance + norm.eps)
    return norm.weight[:, None, None] * x + norm.bias[:, None, None]


def official_conv(conv: nn.Module, x: Tensor) -> Tensor:
    """1x1 convolution, or depthwise convolution that keeps the size."""
    weight = conv.weight
    groups = len(weight) if weight.shape[1] == 1 else 1
    return F.conv2d(x, weight, conv.bias, 1, weight.shape[-1] // 2, 1, groups)


def official_block(block: nn.Module, x: Tensor) -> Tensor:
    """The authors' block over our parameters."""
    attn, mlp = block.attn, block.mlp
    y = official_norm(attn.norm, x)
    a = official_conv(attn.att[2], F.gelu(official_conv(attn.att[0], y)))
    y = official_conv(attn.proj, a * official_conv(attn.v, y))
    x = x + block.drop_path(block.layer_scale_1[:, None, None] * y)
    y = F.gelu(official_conv(mlp.fc1, official_norm(mlp.norm, x)))
    y = official_conv(mlp.fc2, y + F.gelu(official_conv(mlp.pos, y)))
    return x + block.drop_path(block.layer_scale_2[:, None, None] * y)


def official_forward(model: nn.Module, x: Tensor) -> Tensor | tuple:
    """``model(x)`` of ours as the authors compute it, NCHW throughout."""
    backbone = getattr(model, 'backbone', model)
    outs = []
    for i, (down, stage) in enumerate(
            zip(backbone.downsample_layers, backbone.stages)):
        x = (down[1](official_norm(down[0], x)) if i else
             nn.Sequential.forward(down, x))
        for block in stage:
            x = official_block(block, x)
        if i in backbone.out_indices:
            norm = getattr(backbone, f'norm{i}', None)
            outs.append(official_norm(norm, x) if norm else x)
    if model is backbone:
        return tuple(outs)
    x = F.gelu(official_conv(model.neck.conv, x))
    return model.fc(official_norm(model.neck.norm, x).mean((2, 3)))


class Pool(nn.Module):
    """Global average pooling, where the backbone has not done it."""

    def forward(self, feats: tuple[Tensor, ...]) -> tuple[Tensor]:
        """Feature maps -> the last one as (N, C)."""
        x = feats[-1]
        return (x.mean((2, 3)) if x.ndim == 4 else x, )


class Classifier(nn.Module):
    """A backbone, a neck that pools, and a linear layer to 1000 classes."""

    def __init__(self, backbone: nn.Module, neck: nn.Module,
                 features: int) -> None:
        super().__init__()
        self.backbone, self.neck = backbone, neck
        self.fc = nn.Linear(features, 1000)

    def forward(self, x: Tensor) -> Tensor:
        """(N, 3, H, W) -> (N, 1000)."""
        return self.fc(self.neck(self.backbone(x))[0])

    def get_layer_depth(self, param_name: str) -> tuple[int, int]:
        """mmpretrain's layer decay asks the model, not the backbone."""
        return self.backbone.get_layer_depth(param_name, 'backbone.')


def arch_of(name: str) -> dict | None:
    """Settings of a Conv2Former, None for other models."""
    kind, _, arch = name.partition('@')[0].partition('-')
    return resolve_arch(arch) if kind.lower() == 'conv2former' else None


def _build_ours(arch: dict, dense: bool, drop_path: float,
                device: str) -> nn.Module:
    """Conv2Former with random weights that make every branch matter."""
    options = dict(arch=arch, drop_path_rate=drop_path)
    if dense:
        options.update(out_indices=range(len(arch['dims'])), out_norm=True)
    with torch.device(device):  # CPUs draw the weights of L in seconds
        model = Conv2Former(**options)
        if not dense:
            model = Classifier(model, Conv2FormerNeck(arch['dims'][-1]), 1280)
    for name, p in model.named_parameters():
        if p.ndim > 1:
            nn.init.normal_(p, std=p[0].numel()**-0.5)
        elif name.endswith('bias'):
            nn.init.normal_(p, std=0.05)
        else:
            low, high = (0.1, 0.3) if 'layer_scale' in name else (0.9, 1.1)
            nn.init.uniform_(p, low, high)
    return model


def _build_mmpretrain(name: str, dense: bool, drop_path: float,
                      size: tuple[int, int]) -> nn.Module:
    """A backbone of mmpretrain, or a classifier around it."""
    from mmpretrain.models import BACKBONES
    kind, _, arch = name.partition(':')
    cls = BACKBONES.get(kind)
    if cls is None or not arch:
        near = [] if cls else difflib.get_close_matches(
            kind, BACKBONES.module_dict)
        raise ValueError(
            'expected conv2former-ARCH, or TYPE:ARCH with a backbone of '
            'mmpretrain such as ConvNeXt:tiny' +
            (f'. Did you mean {" or ".join(near)}?' if near else ''))
    options = dict(drop_path_rate=drop_path, pad_small_map=True)
    if dense:
        options.update(out_indices=(0, 1, 2, 3), gap_before_final_norm=False)
    known = inspect.signature(cls).parameters
    options = {key: options[key] for key in options if key in known}
    key, arch = ('arch', arch) if 'arch' in known else ('depth', int(arch))
    backbone = cls(**{key: arch}, **options)
    if dense:
        return backbone
    backbone.eval()
    with torch.no_grad():
        pooled, = Pool()(backbone(torch.zeros(1, 3, *size)))
    return Classifier(backbone, Pool(), pooled.shape[1])


class BuildError(ValueError):
    """A model that cannot be built."""


def build_model(name: str, dense: bool, drop_path: float,
                size: tuple[int, int], device: str) -> nn.Module:
    """Build a model, with the same weights every time.

    Args:
        name (str): Name of the model; the path in it is ignored.
        dense (bool): A backbone that returns all its stages if true, a
            classifier with 1000 classes if not.
        drop_path (float): Stochastic depth rate, where the model has one.
        size (tuple[int, int]): Height and width of the images.
        device (str): Where it is to be.

    Returns:
        nn.Module: The model.

    Raises:
        BuildError: If there is no such model or it refuses the size.
    """
    name = name.partition('@')[0]
    torch.manual_seed(0)
    try:
        arch = arch_of(name)
        if arch:
            return _build_ours(arch, dense, drop_path, device)
        return _build_mmpretrain(name, dense, drop_path, size).to(device)
    # What the backbones of mmpretrain raise for a setting that they lack.
    except (AssertionError, ImportError, KeyError, RuntimeError, TypeError,
            ValueError) as error:
        raise BuildError(f"cannot build '{name}': {error}") from error


@contextlib.contextmanager
def switched(path: str) -> Iterator[None]:
    """Set the package's switch as the path wants it."""
    was = os.environ.pop(FUSED_VARIABLE, None)
    if path == 'plain':
        os.environ[FUSED_VARIABLE] = '0'
    try:
        yield
    finally:
        os.environ.pop(FUSED_VARIABLE, None)
        if was is not None:
            os.environ[FUSED_VARIABLE] = was
