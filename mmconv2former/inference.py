"""Fewer operations at inference, with the same result."""
from collections import Counter
from itertools import chain
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from . import dispatch
from .backbone import Block, Conv2Former, Downsampling, Stem
from .fused_block import Branch, infer, prepare
from .operators import (
    FUSIONS,
    LayerNorm2d,
    Pointwise,
    add_position,
    to_nchw,
    to_nhwc,
)

# Well within the range of fp16 (65504). Only a batch norm that all but removes
# its channel asks for a greater padding.
_MAX_PADDING = 1e3


def fuse_for_inference(model: nn.Module) -> nn.Module:
    """Rewrite every Conv2Former of a model into fewer operations, in place.

    The rewrites are exact up to rounding, for images of any size: layer
    scales go into the last linear layer of their branch, the affine part of a
    layer norm and the batch norms of the stem into the convolution that
    follows, and the two linear layers that begin convolutional modulation
    become one. Output norms stay, and so do those of the stem and of
    downsampling where a layer beside them was replaced, has hooks, or has
    another place in the model too.

    The new weights are calculated in double precision and have the type and
    the device of the old ones. Fuse first and convert afterwards, to bfloat16
    rather than float16, which loses small layer scales, as autocast to float16
    does. The first call keeps the weights a second time, as the kernels take
    them, until they change; changes through ``.data`` or by
    ``torch.distributed`` go unnoticed. A fused model cannot be trained, and
    its weights have other names: the weights of a model as it was trained have
    to be loaded before.

    Args:
        model (nn.Module): A Conv2Former, or a model with any number of them,
            such as a classifier, a detector or a segmentor, in evaluation
            mode. A fused one is left as it is.

    Returns:
        nn.Module: The same model.

    Raises:
        ValueError: If the model or a part of it is in training mode, has no
            Conv2Former, or has blocks with hooks or other layers than their
            own.

    Examples:
        >>> import torch
        >>> from mmconv2former import Conv2Former, fuse_for_inference
        >>> model = fuse_for_inference(Conv2Former('nano').eval())
        >>> with torch.no_grad():
        ...     features, = model(torch.rand(1, 3, 64, 64))
    """
    modules = list(model.modules())
    training = [name for name, m in model.named_modules() if m.training]
    if training:
        raise ValueError(
            f'{training[0] or "the model"} is in training mode, where '
            'batch norm and drop path cannot be folded: call model.eval() '
            'before fuse_for_inference(model)')
    backbones = [m for m in modules if isinstance(m, Conv2Former)]
    if not backbones:
        raise ValueError(f'the {type(model).__name__} has no Conv2Former; '
                         'give a Conv2Former or a model that contains one')
    children = {block for backbone in backbones
                for stage in backbone.stages for block in stage}
    for block in (m for m in modules if isinstance(m, Block)):
        if block not in children:
            raise ValueError(
                'a block is wrapped in another module, as by activation '
                'checkpointing, and cannot be folded: unwrap it')
        modified = block.modified(
            len(block.layer_scale_1), block.layer_scale_1.device
        ) if dispatch.is_plain(block, Block) else block
        if modified is not None:
            raise ValueError(
                f'the {type(modified).__name__} of a block was replaced or '
                'changed, or has hooks, and cannot be folded: put the '
                'original one back, with the weights that the other stands '
                'for')
    shared = _shared(modules)
    with torch.no_grad():
        for backbone in backbones:
            _fold_backbone(backbone, shared)
    return model.eval()  # new modules begin in training mode


def _shared(modules: list[nn.Module]) -> set[nn.Module]:
    """Modules with several places: what one place has folded into them, they
    would do in the others too."""
    places = Counter(child for m in modules for child in m._modules.values())
    return {m for m, count in places.items() if count > 1}


def _fold_backbone(backbone: Conv2Former, shared: set[nn.Module]) -> None:
    stem, *others = backbone.downsample_layers
    if type(stem) is Stem and len(stem) == 7:  # with batch norms
        _fold_stem(stem, shared)
    for downsample in others:
        if type(downsample) is Downsampling and len(downsample) == 2:
            downsample[0] = _fold_norm(*downsample, shared)
    blocks = [(stage, i, block) for stage in backbone.stages
              for i, block in enumerate(stage) if isinstance(block, Block)]
    for stage, i, block in blocks:
        stage[i] = FoldedBlock(block)
    if blocks:
        # The first to see weights, before any layer has taken one.
        backbone.register_load_state_dict_pre_hook(_refuse_unfolded)
    backbone.requires_grad_(False)


def _refuse_unfolded(_: nn.Module, state_dict: dict[str, Tensor],
                     *__: Any) -> None:
    # Also where mmengine would only warn of names that do not match. It gives
    # the backbone its own alone, as torch does.
    if any(key.endswith('.attn.proj.weight') for key in state_dict):
        raise RuntimeError(
            'these weights are of a model that is not fused: load them into a '
            'new model, and call fuse_for_inference after that')


def _takes_affine(layer: nn.Module, shared: set[nn.Module],
                  padding: int = 0) -> bool:
    """Whether an affine map in front of a layer can become part of it."""
    return (layer not in shared and dispatch.is_plain(layer, nn.Conv2d)
            and layer.groups == 1 and layer.padding == (padding, padding)
            and layer.padding_mode == 'zeros')


def _fold_norm(norm: nn.Module, layer: nn.Module,
               shared: set[nn.Module]) -> nn.Module:
    """Move the affine part of a norm into the layer behind it, if it can."""
    if not dispatch.is_plain(norm, LayerNorm2d) or norm.weight is None \
            or norm.bias is None or not _takes_affine(layer, shared):
        return norm
    _set(layer, *_after_affine(layer, norm.weight, norm.bias))
    return LayerNorm2d(*norm.normalized_shape, norm.eps, affine=False)


def _fold_stem(stem: nn.Sequential, shared: set[nn.Module]) -> None:
    """Move the batch norms, which follow GELU, into the convolutions."""
    gelu, norm, conv, _, last_norm, last_conv = range(1, 7)
    if _is_affine(stem[last_norm]) \
            and _takes_affine(stem[last_conv], shared):
        weights = _after_affine(stem[last_conv], *_affine(stem[last_norm]))
        _set(stem[last_conv], *weights)
        stem[last_norm] = nn.Identity()
    if _is_affine(stem[norm]) and dispatch.is_gelu(stem[gelu]) \
            and _takes_affine(stem[conv], shared, padding=1):
        # This convolution pads with zeros behind the norm. In front of it
        # they are what the norm makes zeros of.
        scale, shift = _affine(stem[norm])
        padding = -shift / scale
        if (padding.abs() <= _MAX_PADDING).all():  # not if the scale is 0
            weights = _after_affine(stem[conv], scale, shift)
            _set(stem[conv], *weights)
            stem[gelu] = PaddedGELU(padding.to(stem[conv].weight.dtype))
            stem[norm] = nn.Identity()
            stem[conv].padding = (0, 0)


def _is_affine(norm: nn.Module) -> bool:
    """Whether a layer is a batch norm with all that :func:`_affine` reads."""
    return (isinstance(norm, _BatchNorm) and norm.weight is not None
            and norm.bias is not None and norm.running_mean is not None
            and not dispatch.is_intercepted(norm))


def _affine(norm: _BatchNorm) -> tuple[Tensor, Tensor]:
    """Scale and shift of a batch norm in evaluation mode, in float64."""
    scale = norm.weight.double() / (norm.running_var.double() +
                                    norm.eps).sqrt()
    return scale, norm.bias.double() - norm.running_mean.double() * scale


def _after_affine(layer: nn.Module, scale: Tensor,
                  shift: Tensor) -> tuple[Tensor, Tensor]:
    """Weight and bias that do ``layer(scale * x + shift)``, in float64."""
    weight = layer.weight.double()
    taps = weight.flatten(2)
    bias = taps.sum(2) @ shift.double()
    if layer.bias is not None:
        bias += layer.bias.double()
    return (taps * scale.double()[:, None]).view_as(weight), bias


def _set(layer: nn.Module, weight: Tensor, bias: Tensor) -> None:
    dtype = layer.weight.dtype
    layer.weight = nn.Parameter(weight.to(dtype), requires_grad=False)
    layer.bias = nn.Parameter(bias.to(dtype), requires_grad=False)


def _pointwise(weight: Tensor, bias: Tensor, dtype: torch.dtype) -> Pointwise:
    """A layer with the weight (O, I, 1, 1) and the bias (O, )."""
    layer = Pointwise(weight.shape[1], len(weight), device='meta', dtype=dtype)
    _set(layer, weight, bias)
    return layer


def _after_norm(norm: nn.LayerNorm, *layers: Pointwise) -> Pointwise:
    """Layers side by side with the affine part of their norm."""
    weights, biases = zip(*(
        _after_affine(layer, norm.weight, norm.bias) for layer in layers))
    return _pointwise(torch.cat(weights), torch.cat(biases),
                      layers[0].weight.dtype)


def _scaled(layer: Pointwise, scale: Tensor) -> Pointwise:
    """A layer with the layer scale behind it."""
    scale = scale.double()
    return _pointwise(layer.weight * scale.view(-1, 1, 1, 1),
                      layer.bias * scale, layer.weight.dtype)


class PaddedGELU(nn.Module):
    """GELU and a border, one pixel wide, with a value for each channel.

    Args:
        value (Tensor): (C, ).
    """

    def __init__(self, value: Tensor) -> None:
        super().__init__()
        self.register_buffer('value', value)

    def forward(self, x: Tensor) -> Tensor:
        """(N, C, H, W) -> (N, C, H + 2, W + 2)."""
        value = self.value.to(x.dtype)[:, None, None]
        y = F.gelu(x)
        if torch.compiler.is_exporting() or torch.jit.is_tracing():
            return F.pad(y - value, (1, 1, 1, 1)) + value
        n, c, h, w = x.shape  # faster, but ONNX has no such assignments
        out = to_nchw(x.new_empty(n, h + 2, w + 2, c))
        out[:, :, ::h + 1] = out[..., ::w + 1] = value
        out[:, :, 1:-1, 1:-1] = y
        return out


class FoldedBlock(nn.Module):
    """A :class:`Block` at inference.

    Args:
        block (Block): The block, whose depthwise convolutions are taken over.
    """

    def __init__(self, block: Block) -> None:
        super().__init__()
        attn, mlp = block.attn, block.mlp
        self.fusion, self.fused = attn.fusion, block.fused
        self.dim = len(block.layer_scale_1)
        self.eps = attn.norm.eps, mlp.norm.eps
        self.zv = _after_norm(attn.norm, attn.att[0], attn.v)
        self.depthwise = attn.att[2]
        self.proj = _scaled(attn.proj, block.layer_scale_1)
        self.fc1 = _after_norm(mlp.norm, mlp.fc1)
        self.pos = mlp.pos
        self.fc2 = _scaled(mlp.fc2, block.layer_scale_2)
        self._prepared = None

    def _layers(self) -> tuple[tuple[nn.Module, ...], ...]:
        """The layers of both branches."""
        return ((self.zv, self.depthwise, self.proj),
                (self.fc1, self.pos, self.fc2))

    def _modified(self, dim: int, device: torch.device) -> nn.Module | None:
        """A layer that the kernels would not compute as it is, if any.

        Layers may be exchanged after folding. The shapes follow from the
        depthwise convolutions; those of even kernels fit none.
        """
        inner, hidden = (getattr(layer, 'out_channels', 0)
                         for layer in (self.depthwise, self.pos))
        k = getattr(self.depthwise, 'kernel_size', (0, ))[0] | 1
        for layer, kind, *shape in (
                (self.zv, Pointwise, 2 * inner, dim, 1, 1),
                (self.depthwise, nn.Conv2d, inner, 1, k, k),
                (self.proj, Pointwise, dim, inner, 1, 1),
                (self.fc1, Pointwise, hidden, dim, 1, 1),
                (self.pos, nn.Conv2d, hidden, 1, 3, 3),
                (self.fc2, Pointwise, dim, hidden, 1, 1)):
            if not dispatch.is_layer(layer, kind, device, *shape):
                return layer
        return None

    def _branches(self) -> list[list[Tensor]]:
        """Weights and biases of both branches."""
        return [[p for m in layers for p in (m.weight, m.bias)]
                for layers in self._layers()]

    def forward(self, x: Tensor) -> Tensor:
        """(N, C, H, W) -> (N, C, H, W)."""
        if self.fused and self.fusion == 'hadamard' \
                and dispatch.available(x, self._modified) \
                and not self._wants_gradients(x):
            return self._fused(x)
        # Of the type of products, also where autocast has the norm return
        # fp32.
        dtype = dispatch.autocast_dtype(x)
        for eps, middle, (first, depthwise, last) in zip(
                self.eps, (self._modulate, add_position), self._layers()):
            # The number, for x.shape would be traced.
            y = F.layer_norm(to_nhwc(x), (self.dim, ), eps=eps).to(dtype)
            y = last(middle(first(to_nchw(y)), depthwise))
            x = x + y.to(x.dtype)
        return x

    def _modulate(self, zv: Tensor, depthwise: nn.Module) -> Tensor:
        z, v = zv.chunk(2, 1)
        return FUSIONS[self.fusion](depthwise(F.gelu(z)), v)

    def _wants_gradients(self, x: Tensor) -> bool:
        """Whether there are to be gradients, which fast operators lack."""
        return torch.is_grad_enabled() and any(
            t.requires_grad for t in (x, *chain(*self._branches())))

    @torch.no_grad()
    def _fused(self, x: Tensor) -> Tensor:
        x = to_nhwc(x).contiguous()
        x = infer(x, *(Branch(None, None, eps, weights)
                       for eps, weights in zip(self.eps, self._prepare(x))))
        return to_nchw(x)

    def _prepare(self, x: Tensor) -> list[list[Tensor]]:
        """What the kernels take for the weights, kept until these change."""
        branches = self._branches()
        parameters = sum(branches, [])
        # Only where a change of them would be noticed: inference tensors have
        # no version, and a replayed CUDA graph does not look.
        keep = not (
            torch.compiler.is_compiling() or dispatch.is_capturing(x)
            or any(p.is_inference() for p in parameters))
        if keep:
            state = [(id(p), p.data_ptr(), p._version) for p in parameters]
            state += dispatch.product_dtype(x), id(dispatch.kernels_for(x))
            if x.is_cuda:  # others would have to wait for its copies
                state.append(torch.cuda.current_stream(x.device))
            kept = self._prepared  # which another thread may replace
            if kept and kept[0] == state:
                return kept[1]
        prepared = prepare(x, branches, pack=keep)
        if keep:
            # With the parameters and their memory, whose place no others can
            # get then.
            held = [(p, p.detach()) for p in parameters]
            self._prepared = state, prepared, held
        return prepared

    def _apply(self, *args: Any, **kwargs: Any) -> 'FoldedBlock':
        self._prepared = None
        return super()._apply(*args, **kwargs)

    def __getstate__(self) -> dict[str, Any]:
        # torch's leaves out what compile() has made of this very block.
        return {**super().__getstate__(), '_prepared': None}
