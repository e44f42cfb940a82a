"""Conv2Former, hierarchical and isotropic, as an OpenMMLab backbone."""
import math
from collections.abc import Iterable, Sequence
from os import PathLike
from typing import Any

import torch
import torch.utils.checkpoint as torch_checkpoint
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from . import cpu_layers, dispatch, fused_stem
from .archs import STEMS, resolve_arch
from .checkpoint import PretrainedModule, load_backbone
from .cuda_graphs import CUDAGraphs
from .fused_block import Branch, fused_block
from .fused_downsampling import downsampling
from .operators import (
    FUSIONS,
    DropPath,
    LayerNorm2d,
    Pointwise,
    add_position,
    at_least_fp32,
    to_nchw,
    to_nhwc,
)
from .registry import MODELS


def _conv_stem(in_channels: int, dim: int) -> list[nn.Module]:
    """The official stem. Mind the order: GELU comes before batch norm."""
    mid = dim // 2
    return [
        nn.Conv2d(in_channels, mid, 3, stride=2, padding=1, bias=False),
        nn.GELU(), nn.BatchNorm2d(mid),
        nn.Conv2d(mid, mid, 3, padding=1, bias=False),
        nn.GELU(), nn.BatchNorm2d(mid),
        nn.Conv2d(mid, dim, 2, stride=2, bias=False)]


def _patch_stem(in_channels: int, dim: int) -> list[nn.Module]:
    return [nn.Conv2d(in_channels, dim, 16, stride=16)]


def _3conv_stem(in_channels: int, dim: int) -> list[nn.Module]:
    """Three convolutions down to stride 16, in the manner of the stem above.

    The paper names the '3-conv patch embedding' without its layers; these
    are our choice.
    """
    mid = dim // 4
    return [
        nn.Conv2d(in_channels, mid, 3, stride=2, padding=1, bias=False),
        nn.GELU(), nn.BatchNorm2d(mid),
        nn.Conv2d(mid, mid, 3, stride=2, padding=1, bias=False),
        nn.GELU(), nn.BatchNorm2d(mid),
        nn.Conv2d(mid, dim, 4, stride=4, bias=False)]


STEM_LAYERS = {'conv': _conv_stem, 'patch': _patch_stem, '3conv': _3conv_stem}


def init_convs(module: nn.Module) -> None:
    """Official initialisation: truncated normal of std 0.02, zero biases."""
    for m in module.modules():
        if isinstance(m, nn.Conv2d):
            nn.init.trunc_normal_(m.weight, std=.02)
            if m.bias is not None:
                nn.init.zeros_(m.bias)


class Stem(nn.Sequential):
    """The layers in front of the first stage.

    Args:
        layers (nn.Module): The layers.
        fused (bool): Whether to take the fused operators where possible.
    """

    def __init__(self, *layers: nn.Module, fused: bool) -> None:
        super().__init__(*layers)
        self.fused = fused

    def forward(self, x: Tensor) -> Tensor:
        """(N, C, H, W) -> (N, C', H', W'), in channels-last memory."""
        if self.fused and fused_stem.available(x, self):
            return fused_stem.stem(x, self)
        if len(self) > 2 and type(self[2]) is nn.Identity \
                and getattr(self[0], 'bias', None) is not None:
            raise RuntimeError(
                'the batch norms of the stem, which come after GELU, were '
                'folded into the convolutions before it, as by '
                'mmcv.cnn.fuse_conv_bn (--fuse-conv-bn); use '
                'mmconv2former.fuse_for_inference on the model as it was')
        x = dispatch.channels_last(x)  # as all that follows
        if not self.fused:
            return super().forward(x)
        better = {nn.Conv2d: cpu_layers.convolution, nn.GELU: cpu_layers.gelu,
                  nn.BatchNorm2d: cpu_layers.batch_norm}
        for layer in self:
            run = better.get(type(layer))
            x = run(x, layer) if run else layer(x)
        return x


class Downsampling(nn.Sequential):
    """Layer norm and a convolution that halves height and width.

    Args:
        in_channels (int): Channels of the input.
        out_channels (int): Channels of the output.
        fused (bool): Whether to take the fused norm where possible.
    """

    def __init__(self, in_channels: int, out_channels: int,
                 fused: bool) -> None:
        super().__init__(
            LayerNorm2d(in_channels),
            nn.Conv2d(in_channels, out_channels, 2, stride=2))
        self.fused = fused

    def forward(self, x: Tensor) -> Tensor:
        """(N, C, H, W) -> (N, C', H // 2, W // 2)."""
        return downsampling(x, *self) if self.fused else super().forward(x)


def _children(module: nn.Module, *names: str) -> list[nn.Module]:
    """Parts of a module; as attributes they take ten times as long."""
    modules = module._modules
    return [modules[name] for name in names]


def _branch(norm: nn.Module, scale: Tensor, layers: Iterable[nn.Module],
            keep: Tensor | None) -> Branch:
    weights = []
    for layer in (norm, *layers):
        parameters = layer._parameters
        weights += parameters['weight'], parameters['bias']
    return Branch(*weights[:2], norm.eps, weights[2:], scale, keep)


class ConvModulation(nn.Module):
    """``W_proj(fuse(DW_k(GELU(W_a LN(x))), W_v LN(x)))`` (paper, eq. 3-5).

    Args:
        dim (int): Channels.
        kernel_size (int): Size of the depthwise kernel, odd.
        fusion (str): How the two branches meet, a key of ``FUSIONS``.
    """

    def __init__(self, dim: int, kernel_size: int, fusion: str) -> None:
        super().__init__()
        self.fusion = fusion
        self.norm = LayerNorm2d(dim)
        self.att = nn.Sequential(
            Pointwise(dim, dim), nn.GELU(),
            nn.Conv2d(
                dim, dim, kernel_size, padding=kernel_size // 2, groups=dim))
        self.v = Pointwise(dim, dim)
        self.proj = Pointwise(dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        """(N, C, H, W) -> (N, C, H, W)."""
        x = self.norm(x)
        return self.proj(FUSIONS[self.fusion](self.att(x), self.v(x)))

    def branch(self, scale: Tensor, keep: Tensor | None) -> Branch:
        """As :func:`mmconv2former.fused_block.fused_block` takes it."""
        norm, att, v, proj = _children(self, 'norm', 'att', 'v', 'proj')
        z, _, depthwise = att._modules.values()
        return _branch(norm, scale, (z, v, depthwise, proj), keep)


class MLP(nn.Module):
    """``W_2 (h + GELU(DW_3 h))`` with ``h = GELU(W_1 LN(x))`` (official code).

    Args:
        dim (int): Channels.
        mlp_ratio (float): Hidden width over ``dim``.
    """

    def __init__(self, dim: int, mlp_ratio: float) -> None:
        super().__init__()
        hidden = int(dim * mlp_ratio)
        self.norm = LayerNorm2d(dim)
        self.fc1 = Pointwise(dim, hidden)
        self.pos = nn.Conv2d(hidden, hidden, 3, padding=1, groups=hidden)
        self.fc2 = Pointwise(hidden, dim)

    def forward(self, x: Tensor) -> Tensor:
        """(N, C, H, W) -> (N, C, H, W)."""
        return self.fc2(add_position(self.fc1(self.norm(x)), self.pos))

    def branch(self, scale: Tensor, keep: Tensor | None) -> Branch:
        """As :func:`mmconv2former.fused_block.fused_block` takes it."""
        norm, *layers = _children(self, 'norm', 'fc1', 'pos', 'fc2')
        return _branch(norm, scale, layers, keep)


class Block(nn.Module):
    """Convolutional modulation and MLP, each a scaled residual branch.

    Args:
        dim (int): Channels.
        kernel_size (int): Size of the depthwise kernel, odd.
        mlp_ratio (float): Hidden width of the MLP over ``dim``.
        fusion (str): A key of ``FUSIONS``.
        drop_path_rate (float): Probability of dropping a branch.
        layer_scale_init_value (float): Initial scale of both branches.
        with_cp (bool): Whether to recompute the block in the backward pass.
        fused (bool): Whether to take the fused operators where possible.
    """

    def __init__(self, dim: int, kernel_size: int, mlp_ratio: float,
                 fusion: str, drop_path_rate: float,
                 layer_scale_init_value: float, with_cp: bool,
                 fused: bool) -> None:
        super().__init__()
        self.attn = ConvModulation(dim, kernel_size, fusion)
        self.mlp = MLP(dim, mlp_ratio)
        self.layer_scale_1 = nn.Parameter(
            torch.full((dim, ), float(layer_scale_init_value)))
        self.layer_scale_2 = nn.Parameter(
            torch.full((dim, ), float(layer_scale_init_value)))
        self.drop_path = DropPath(drop_path_rate)
        self.with_cp = with_cp
        self.fused = fused

    def _forward(self, x: Tensor) -> Tensor:
        branches = ((self.attn, self.layer_scale_1),
                    (self.mlp, self.layer_scale_2))
        if self._is_fusible() and dispatch.available(x, self.modified):
            x = to_nhwc(x).contiguous()
            x = fused_block(x, *(
                branch.branch(scale, self.drop_path.factor(x))
                for branch, scale in branches))
            return to_nchw(x)
        for branch, scale in branches:
            # In the precision of x: the fp32 scale would raise that of the
            # residual under autocast.
            y = scale[:, None, None].to(x.dtype) * branch(x).to(x.dtype)
            x = x + self.drop_path(y)
        return x

    def _load_from_state_dict(self, state_dict: dict[str, Tensor],
                              prefix: str, *args: Any) -> None:
        # Also where mmengine would only warn of names that do not match.
        if f'{prefix}zv.weight' in state_dict:
            raise RuntimeError(
                'these weights are of a model after fuse_for_inference: load '
                'those from before, or call it on this model, too, and load '
                'them after that')
        super()._load_from_state_dict(state_dict, prefix, *args)

    def _is_fusible(self) -> bool:
        return self.fused and getattr(self.attn, 'fusion', '') == 'hadamard'

    def modified(self, dim: int, device: torch.device) -> nn.Module | None:
        """A module that is not as this class makes it, or has hooks, if any.

        The fused path passes all of them by, and reads their parameters.

        Args:
            dim (int): Channels of the input.
            device (torch.device): Of the input.

        Returns:
            nn.Module: The first one, which may be the block itself.
        """
        attn, mlp, drop_path = _children(self, 'attn', 'mlp', 'drop_path')
        for part, kind in ((attn, ConvModulation), (mlp, MLP),
                           (drop_path, DropPath)):
            if not dispatch.is_plain(part, kind):
                return part
        attn_norm, att, v, proj = _children(attn, 'norm', 'att', 'v', 'proj')
        mlp_norm, fc1, pos, fc2 = _children(mlp, 'norm', 'fc1', 'pos', 'fc2')
        if not dispatch.is_plain(att, nn.Sequential) \
                or len(att._modules) != 3:
            return att
        z, gelu, depthwise = att._modules.values()
        if not dispatch.is_gelu(gelu):
            return gelu
        # Narrower layers within a branch are fine, if these fit each other.
        inner, hidden = (getattr(layer, 'out_channels', 0)
                         for layer in (z, fc1))
        k = getattr(depthwise, 'kernel_size', (0, ))[0] | 1  # odd
        for layer, kind, *shape in (
                (attn_norm, LayerNorm2d, dim),
                (z, Pointwise, inner, dim, 1, 1),
                (depthwise, nn.Conv2d, inner, 1, k, k),
                (v, Pointwise, inner, dim, 1, 1),
                (proj, Pointwise, dim, inner, 1, 1),
                (mlp_norm, LayerNorm2d, dim),
                (fc1, Pointwise, hidden, dim, 1, 1),
                (pos, nn.Conv2d, hidden, 1, 3, 3),
                (fc2, Pointwise, dim, hidden, 1, 1)):
            if not dispatch.is_layer(layer, kind, device, *shape):
                return layer
        scales = self.layer_scale_1, self.layer_scale_2
        return None if all(
            dispatch.is_readable(scale, device) and scale.shape == (dim, )
            for scale in scales) else self

    def forward(self, x: Tensor) -> Tensor:
        """(N, C, H, W) -> (N, C, H, W)."""
        if self.with_cp and torch.is_grad_enabled():
            # The re-entrant form marks parameters ready twice under DDP.
            return torch_checkpoint.checkpoint(
                self._forward, x, use_reentrant=False)
        return self._forward(x)


dispatch.remember_forward(LayerNorm2d, Pointwise, DropPath, ConvModulation,
                          MLP, Block)


def _check_switches(**switches: bool) -> None:
    """Refuse what Python would take for True, such as the text 'False'."""
    for name, value in switches.items():
        if not isinstance(value, bool):
            raise ValueError(f'{name} must be True or False, got {value!r}')


@MODELS.register_module()
class Conv2Former(PretrainedModule):
    """Conv2Former backbone.

    From `Conv2Former: A Simple Transformer-Style ConvNet for Visual
    Recognition <https://arxiv.org/abs/2211.11943>`_. Parameter names, shapes
    and results are those of the `official code
    <https://github.com/HVision-NKU/Conv2Former>`_.

    Args:
        arch (str | dict): 'nano', 'tiny', 'small', 'base', 'base-22k',
            'large', 'isotropic-small', 'isotropic-base' (the last two also
            with '-3conv' appended), a short form ('n', 't', 's', 'b',
            'b_22k', 'l', 'is', 'ib'), or a dict with ``depths``, ``dims``,
            ``kernel_size`` and optionally ``stem``. Defaults to 'tiny'.
        in_channels (int): Channels of the input images. Defaults to 3.
        kernel_size (int, optional): Odd size of the depthwise kernel.
            Defaults to None, that of the arch.
        mlp_ratio (float): Hidden width of the MLP over the width of the
            block. Defaults to 4.
        fusion (str): How the modulation weights meet the values: 'hadamard',
            'sum', 'sigmoid', 'l1' or 'linear' (the paper's ablation).
            Defaults to 'hadamard'.
        drop_path_rate (float): Stochastic depth rate of the last block; it
            grows linearly from 0 over the blocks. In [0, 1). Defaults to 0.
        layer_scale_init_value (float): Initial value of the layer scales.
            Defaults to 1e-6.
        out_indices (int | Sequence[int]): Stages to return, counted from 0;
            negative ones count from the end. They are returned in ascending
            order, each once; stages beyond the last are not built. Defaults
            to -1.
        out_norm (bool): Whether each returned feature map passes a layer
            norm of its own (``norm{i}``), as dense tasks want.
            Defaults to False.
        frozen_stages (int): -1 freezes nothing, 0 the stem, k the stem and
            the first k stages with the downsampling in front of them. Norms
            of ``out_norm`` are trained all the same, as ConvNeXt's are.
            Defaults to -1.
        norm_eval (bool): Whether the batch norms of the stem stay in
            evaluation mode while training. Defaults to False.
        with_cp (bool): Whether to recompute the blocks in the backward pass
            to save memory. Defaults to False.
        residual_in_fp32 (bool): Whether the sums of the residual branches
            stay in fp32 under autocast. Defaults to False, the precision of
            autocast.
        fused (bool): Whether to take the fused operators of
            :mod:`mmconv2former.fused_block` where possible; the environment
            variable MMCONV2FORMER_FUSED=0 turns them off everywhere. Defaults
            to True.
        compile (bool | dict): Whether to compile the forward pass when it is
            first called, or the options of ``torch.compile`` to do it with:
            ``dict(mode='reduce-overhead')`` takes CUDA graphs, for images of
            one size. Names of the parameters stay. The compiler gets the
            fused operators on GPUs, the plain ones on CPUs. Defaults to
            False.
        cuda_graphs (bool | int): Whether to record the kernels of the first
            so many kinds of batches, shapes of images above all, and to
            replay them; True for 16. Results are the same. See
            :mod:`mmconv2former.cuda_graphs`. Defaults to False.
        init_cfg (dict | list[dict], optional): Initialisation config of
            mmengine. ``dict(type='Pretrained', checkpoint=...)`` takes the
            files that :func:`mmconv2former.checkpoint.load_backbone` reads
            and is strict. Defaults to None, the official initialisation.

    Attributes:
        out_channels (tuple[int]): Channels of each returned feature map.
        out_strides (tuple[int]): Stride of each returned feature map.

    Raises:
        ValueError: If an argument is not one of those above.

    Examples:
        >>> import torch
        >>> from mmconv2former import Conv2Former
        >>> model = Conv2Former('nano', out_indices=(0, 1, 2, 3))
        >>> [tuple(x.shape) for x in model(torch.rand(1, 3, 64, 64))]
        [(1, 64, 16, 16), (1, 128, 8, 8), (1, 256, 4, 4), (1, 512, 2, 2)]
    """

    def __init__(self,
                 arch: str | dict = 'tiny',
                 in_channels: int = 3,
                 kernel_size: int | None = None,
                 mlp_ratio: float = 4.,
                 fusion: str = 'hadamard',
                 drop_path_rate: float = 0.,
                 layer_scale_init_value: float = 1e-6,
                 out_indices: int | Sequence[int] = -1,
                 out_norm: bool = False,
                 frozen_stages: int = -1,
                 norm_eval: bool = False,
                 with_cp: bool = False,
                 residual_in_fp32: bool = False,
                 fused: bool = True,
                 compile: bool | dict = False,
                 cuda_graphs: bool | int = False,
                 init_cfg: dict | Sequence[dict] | None = None) -> None:
        super().__init__(init_cfg)
        self.arch = resolve_arch(arch)
        if kernel_size is not None:
            self.arch['kernel_size'] = kernel_size
        depths, dims = self.arch['depths'], self.arch['dims']
        _check_switches(out_norm=out_norm, norm_eval=norm_eval,
                        with_cp=with_cp, residual_in_fp32=residual_in_fp32,
                        fused=fused)
        self._check_arguments(in_channels, mlp_ratio, fusion, drop_path_rate,
                              layer_scale_init_value, frozen_stages, with_cp,
                              compile, cuda_graphs)
        self.in_channels = in_channels
        self.out_indices = self._resolve_out_indices(out_indices)
        self.out_norm = out_norm
        self.frozen_stages = frozen_stages
        self.norm_eval = norm_eval
        self.residual_in_fp32 = residual_in_fp32

        stem = self.arch['stem']
        strides = [STEMS[stem]['stride'] * 2**i for i in range(len(dims))]
        self.out_channels = tuple(dims[i] for i in self.out_indices)
        self.out_strides = tuple(strides[i] for i in self.out_indices)

        last = max(sum(depths) - 1, 1)
        rates = [drop_path_rate * i / last for i in range(sum(depths))]
        self.downsample_layers = nn.ModuleList()
        self.stages = nn.ModuleList()
        # A stage that nobody reads would be an unused parameter to DDP.
        for i in range(self.out_indices[-1] + 1):
            self.downsample_layers.append(
                Downsampling(dims[i - 1], dims[i], fused)
                if i else Stem(*STEM_LAYERS[stem](in_channels, dims[0]),
                               fused=fused))
            first = sum(depths[:i])
            self.stages.append(
                nn.Sequential(*(
                    Block(dims[i], self.arch['kernel_size'], mlp_ratio,
                          fusion, rate, layer_scale_init_value, with_cp, fused)
                    for rate in rates[first:first + depths[i]])))
        if out_norm:
            for i in self.out_indices:
                self.add_module(f'norm{i}', LayerNorm2d(dims[i]))
        init_convs(self)
        self._freeze_stages()
        self.cuda_graphs = None
        if cuda_graphs:
            self.cuda_graphs = CUDAGraphs(
                16 if cuda_graphs is True else cuda_graphs)
        if compile is not False:  # also by the defaults, an empty dict
            self.compile(**(compile if isinstance(compile, dict) else {}))

    def _check_arguments(self, in_channels: int, mlp_ratio: float, fusion: str,
                         drop_path_rate: float, layer_scale_init_value: float,
                         frozen_stages: int, with_cp: bool,
                         compile: bool | dict,
                         cuda_graphs: bool | int) -> None:
        if type(in_channels) is not int or in_channels < 1:
            raise ValueError('in_channels must be a positive integer, got '
                             f'{in_channels!r}')
        kernel_size = self.arch['kernel_size']
        if type(kernel_size) is not int or kernel_size < 1 \
                or kernel_size % 2 == 0:
            raise ValueError('kernel_size must be an odd positive integer, '
                             f'got {kernel_size!r}')
        if self.arch['dims'][0] < 4:
            raise ValueError('dims must begin with 4 channels or more, of '
                             'which the first convolutions of the stem make '
                             f'half or a quarter, got {self.arch["dims"]}')
        if not isinstance(fusion, str) or fusion not in FUSIONS:
            raise ValueError(f'unknown fusion {fusion!r}; expected one of '
                             f'{", ".join(FUSIONS)}')
        if not isinstance(mlp_ratio, (int, float)) \
                or not 1 <= mlp_ratio * min(self.arch['dims']) < math.inf:
            raise ValueError('mlp_ratio must be a number that leaves each MLP '
                             f'a channel, got {mlp_ratio!r}')
        if not isinstance(drop_path_rate, (int, float)) \
                or not 0 <= drop_path_rate < 1:
            raise ValueError('drop_path_rate must be a number in [0, 1), got '
                             f'{drop_path_rate!r}')
        if not isinstance(layer_scale_init_value, (int, float)) \
                or not math.isfinite(layer_scale_init_value):
            raise ValueError('layer_scale_init_value must be a finite number, '
                             f'got {layer_scale_init_value!r}')
        num_stages = len(self.arch['depths'])
        if type(frozen_stages) is not int \
                or not -1 <= frozen_stages <= num_stages:
            raise ValueError(
                f'frozen_stages must be an integer in -1 .. {num_stages} (-1 '
                'none, 0 the stem, k the stem and k stages), got '
                f'{frozen_stages!r}')
        if cuda_graphs and (
                compile is not False or with_cp
                or not isinstance(cuda_graphs, int) or cuda_graphs < 0):
            raise ValueError(
                'cuda_graphs must be a bool or a number of kinds of batches, '
                f'without compile and with_cp, got {cuda_graphs!r}, '
                f'compile={compile!r} and with_cp={with_cp!r}')
        if not isinstance(compile, (bool, dict)):
            raise ValueError('compile must be a bool or a dict of options of '
                             f'torch.compile, got {compile!r}')

    def _resolve_out_indices(
            self, out_indices: int | Sequence[int]) -> tuple[int, ...]:
        num_stages = len(self.arch['depths'])
        if isinstance(out_indices, int):
            out_indices = (out_indices, )
        indices = tuple(out_indices) if isinstance(out_indices, Iterable) \
            else ()
        if not indices or not all(
                type(i) is int and -num_stages <= i < num_stages
                for i in indices):
            raise ValueError(
                f'out_indices must name stages in {-num_stages} .. '
                f'{num_stages - 1} of an arch with {num_stages} stages, got '
                f'{out_indices!r}')
        return tuple(sorted({i % num_stages for i in indices}))

    def load_pretrained(self, checkpoint: str | PathLike,
                        prefix: str | None = None) -> None:
        """See :func:`mmconv2former.checkpoint.load_backbone`."""
        load_backbone(self, checkpoint, prefix)

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        """Compute the feature maps.

        Args:
            x (Tensor): Images, (N, in_channels, H, W), H and W at least the
                stride of the last stage, 32 of a whole hierarchical model.

        Returns:
            tuple[Tensor]: One (N, C_i, H_i, W_i) for each returned stage, C_i
            of ``out_channels``. H_i is H over the stride of ``out_strides``,
            where the padded convolutions of stems round up and all other
            steps down.

        Raises:
            ValueError: If the input is smaller or has other channels.
        """
        if x.ndim != 4 or x.shape[1] != self.in_channels \
                or min(x.shape[2:]) < self.out_strides[-1]:
            raise ValueError(
                f'expected images of shape (N, {self.in_channels}, H, W) '
                f'with H and W at least {self.out_strides[-1]}, got '
                f'{tuple(x.shape)}')
        if self.cuda_graphs is not None:
            recording = self.cuda_graphs.recording(self, x)
            if recording is not None:
                return recording(x)
        outs = []
        for i, (downsample, stage) in enumerate(
                zip(self.downsample_layers, self.stages)):
            x = downsample(x)
            # Without autocast layers take inputs of their own type only.
            if self.residual_in_fp32 and dispatch.is_autocast(x):
                x = at_least_fp32(x)
            x = stage(x)
            if i in self.out_indices:
                out = getattr(self, f'norm{i}')(x) if self.out_norm else x
                # The blocks leave channels-last memory, which mmcv's own
                # operators (RoIAlign) misread without a word.
                outs.append(out.contiguous())
        return tuple(outs)

    def _apply(self, *args: Any, **kwargs: Any) -> 'Conv2Former':
        super()._apply(*args, **kwargs)
        if self.cuda_graphs is not None:
            self.cuda_graphs.forget_moved()
        return self

    def _freeze_stages(self) -> None:
        if self.frozen_stages < 0:
            return
        frozen = [
            *self.downsample_layers[:max(self.frozen_stages, 1)],
            *self.stages[:self.frozen_stages]
        ]
        for module in frozen:
            module.eval()
            module.requires_grad_(False)

    def train(self, mode: bool = True) -> 'Conv2Former':
        """Set the mode; frozen stages and, if asked, batch norms stay."""
        super().train(mode)
        if mode:
            self._freeze_stages()
            if self.norm_eval:
                for m in self.modules():
                    if isinstance(m, _BatchNorm):
                        m.eval()
        return self

    def get_layer_depth(self,
                        param_name: str,
                        prefix: str = '',
                        num_layers: int | None = None,
                        decay_type: str = 'layer_wise') -> tuple[int, int]:
        """Depth of a parameter for layer-wise learning-rate decay.

        'layer_wise' counts as ConvNeXt does (stem 0, the first stages one
        layer each, the last stage and its downsampling ``num_layers``), but
        spreads the blocks of the deep stage evenly over the layers between,
        so that no depth of it reaches the head's. 'stage_wise' is ConvNeXt's
        map for segmentation: the stem and all downsampling 0, stage i at
        i + 1.

        Args:
            param_name (str): Name of the parameter.
            prefix (str): What precedes the backbone's own names, such as
                'backbone.'. Defaults to ''.
            num_layers (int, optional): Layers of the backbone; 6 or 12 in
                the published recipes. Defaults to None, which takes 12 if
                the deep stage has more than 12 blocks and 6 otherwise (one
                per block in an isotropic model).
            decay_type (str): 'layer_wise' or 'stage_wise'. Defaults to
                'layer_wise'.

        Returns:
            tuple[int, int]: The depth, and the number of depths
            ``num_layers + 2``. What lies outside the backbone, and the
            output norms, have the greatest depth, ``num_layers + 1``.

        Raises:
            ValueError: If ``num_layers`` is below the number of stages or
                ``decay_type`` is unknown.
        """
        depths = self.arch['depths']
        # The last stage but one is the deep one; an isotropic model has one.
        deep = max(len(depths) - 2, 0)
        if num_layers is None:
            num_layers = depths[0] if len(depths) == 1 else (
                12 if depths[deep] > 12 else 6)
        if type(num_layers) is not int or num_layers < len(depths):
            raise ValueError(
                f'num_layers must be an integer of at least {len(depths)}, '
                f'the number of stages, got {num_layers!r}')
        if decay_type not in ('layer_wise', 'stage_wise'):
            raise ValueError("decay_type must be 'layer_wise' or "
                             f"'stage_wise', got {decay_type!r}")
        head, total = num_layers + 1, num_layers + 2
        if not param_name.startswith(prefix):
            return head, total
        kind, *indices = param_name[len(prefix):].split('.')
        if kind not in ('downsample_layers', 'stages'):
            return head, total
        stage = int(indices[0])
        if decay_type == 'stage_wise':
            return (stage + 1 if kind == 'stages' else 0), total
        if kind == 'downsample_layers' and stage == 0:
            return 0, total
        if stage > deep:
            return num_layers, total
        if kind == 'stages' and stage == deep:
            spread = num_layers - deep - (len(depths) > 1)
            return (deep + 1 + int(indices[1]) * spread // depths[deep],
                    total)
        return stage + 1, total
