"""The part of the official classification head before the linear layer."""
from collections.abc import Sequence
from os import PathLike

import torch.nn.functional as F
from torch import Tensor, nn

from . import dispatch
from .backbone import init_convs
from .checkpoint import PretrainedModule, load_neck
from .operators import LayerNorm2d
from .registry import MODELS


@MODELS.register_module()
class Conv2FormerNeck(PretrainedModule):
    """1x1 convolution - GELU - layer norm - global average pooling.

    In front of mmpretrain's ``LinearClsHead`` it makes the official
    classifier (``Conv2Former.head`` in the `official code
    <https://github.com/HVision-NKU/Conv2Former>`_).

    Args:
        in_channels (int): Channels of the last feature map, 576 for tiny.
        out_channels (int): Width of the head. Defaults to 1280.
        init_cfg (dict, optional): Initialisation config of mmengine.
            ``dict(type='Pretrained', checkpoint=...)`` takes the head of a
            pre-trained classifier, for fine-tuning on other classes. Defaults
            to None, the official initialisation.

    Raises:
        ValueError: If channels are no positive integers.
    """

    def __init__(self,
                 in_channels: int,
                 out_channels: int = 1280,
                 init_cfg: dict | None = None) -> None:
        super().__init__(init_cfg)
        for name, value in dict(in_channels=in_channels,
                                out_channels=out_channels).items():
            if type(value) is not int or value < 1:
                raise ValueError(
                    f'{name} must be a positive integer, got {value!r}')
        self.conv = nn.Conv2d(in_channels, out_channels, 1)
        self.norm = LayerNorm2d(out_channels)
        init_convs(self)

    def load_pretrained(self, checkpoint: str | PathLike,
                        prefix: str | None = None) -> None:
        """See :func:`mmconv2former.checkpoint.load_neck`."""
        load_neck(self, checkpoint, prefix)

    def forward(self, feats: Sequence[Tensor]) -> tuple[Tensor]:
        """Pool the last feature map.

        Args:
            feats (Sequence[Tensor]): Feature maps of the backbone; the last
                one, (N, in_channels, H, W), is used.

        Returns:
            tuple[Tensor]: One tensor, (N, out_channels).
        """
        # The layout in which the norm reads.
        x = self.norm(F.gelu(self.conv(dispatch.channels_last(feats[-1]))))
        return (x.mean((2, 3)), )
