"""The official implementation's names, weights and results.

``data/official_keys.json`` lists the state dict of each official model.
``data/official.npz`` holds what the official code computed with the weights
of :func:`tensor` on the images of :func:`image`: stage outputs (every 16th
channel), logits, and for nano and tiny in training mode the gradient of the
input and the norm of each parameter's gradient.
"""
import json
import zlib
from pathlib import Path

import numpy as np
import torch
from torch import nn

from mmconv2former import Conv2Former, Conv2FormerNeck
from mmconv2former.archs import resolve_arch
from mmconv2former.checkpoint import rename_classifier

DATA = Path(__file__).parent / 'data'
SHAPES = json.loads((DATA / 'official_keys.json').read_text())
RESULTS = np.load(DATA / 'official.npz')
ARCHS = list(SHAPES)


def tensor(name, shape):
    """The tensor that stands for this official name, seeded by the name."""
    rng = np.random.RandomState(zlib.crc32(name.encode()))
    noise = rng.standard_normal(shape).astype(np.float32)
    leaf = name.rsplit('.', 1)[-1]
    if leaf == 'num_batches_tracked':
        value = np.zeros(shape, np.int64)
    elif leaf == 'running_var':
        value = 1 + 0.1 * np.abs(noise)
    elif leaf == 'running_mean':
        value = 0.1 * noise
    elif leaf.startswith('layer_scale'):
        value = 0.5 + 0.1 * noise
    elif leaf == 'bias':
        value = 0.05 * noise
    elif len(shape) == 1:  # the weight of a norm layer
        value = 1 + 0.1 * noise
    else:
        value = noise / np.sqrt(np.prod(shape[1:]), dtype=np.float32)
    return torch.from_numpy(np.asarray(value))


def image(height, width, batch=2):
    """A (batch, 3, height, width) input, already normalised."""
    rng = np.random.RandomState(height * 10007 + width)
    return torch.from_numpy(
        rng.standard_normal((batch, 3, height, width)).astype(np.float32))


def weights(arch):
    """State dict of an official classifier."""
    return {
        name: tensor(name, tuple(shape))
        for name, shape in SHAPES[arch].items()
    }


class Classifier(nn.Module):
    """mmpretrain's ImageClassifier as far as the numbers go."""

    def __init__(self, arch, num_classes=1000, **kwargs):
        super().__init__()
        self.backbone = Conv2Former(arch, **kwargs)
        self.neck = Conv2FormerNeck(resolve_arch(arch)['dims'][-1])
        self.head = nn.Module()
        self.head.fc = nn.Linear(1280, num_classes)

    def forward(self, x):
        return self.head.fc(self.neck(self.backbone(x))[0])


def filled_classifier(arch, **kwargs):
    """Our classifier with the official weights of :func:`weights`."""
    with torch.device('meta'):  # every tensor comes from the official ones
        model = Classifier(arch, **kwargs)
    model.load_state_dict(rename_classifier(weights(arch)), assign=True)
    return model
