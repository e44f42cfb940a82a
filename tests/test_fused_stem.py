"""The stem with hand-written gradients against autograd's."""
import copy
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from mmconv2former import dispatch, fused_stem, torch_kernels
from mmconv2former.backbone import STEM_LAYERS, Stem


class OtherTensor(torch.Tensor):
    """Of which kernels do not know where its numbers are."""


def make_stem(name='conv', dim=24, **options):
    torch.manual_seed(0)
    stem = Stem(*STEM_LAYERS[name](3, dim), fused=True).double()
    for p in stem.parameters():
        nn.init.normal_(p, std=1. if p.ndim == 1 else p[0].numel()**-0.5)
    for norm in stem[2], stem[5]:
        norm.running_mean.normal_()
        norm.running_var.uniform_(0.5, 2.)
    return stem


def run(function, stem, x, training=None):
    if training is not None:
        stem.train(training)
    buffers = {name: b.clone() for name, b in stem.named_buffers()}
    out = function(x, stem)
    torch.manual_seed(1)
    grads = torch.autograd.grad(out, list(stem.parameters()),
                                torch.randn(out.shape).to(out))
    after = {name: b.clone() for name, b in stem.named_buffers()}
    stem.load_state_dict(buffers, strict=False)
    return out, *grads, *after.values()


def by_function(x, stem, kernels=torch_kernels):
    conv1, _, norm1, conv2, _, norm2, conv3 = stem
    return fused_stem.StemFunction.apply(
        x, kernels, (conv1, norm1, conv2, norm2, conv3), conv1.weight,
        norm1.weight, norm1.bias, conv2.weight, norm2.weight, norm2.bias,
        conv3.weight)


def by_layers(x, stem):
    return nn.Sequential.forward(stem, x)


@pytest.mark.parametrize('name, dim, size', [
    ('conv', 24, (32, 40)), ('conv', 72, (37, 43)), ('3conv', 40, (70, 65))])
@pytest.mark.parametrize('training', [True, False])
def test_stem_and_its_gradients_are_those_of_autograd(name, dim, size,
                                                      training):
    stem = make_stem(name, dim)
    x = torch.randn(2, 3, *size, dtype=torch.double)
    own = run(by_function, stem, x, training)
    true = run(by_layers, stem, x, training)
    for o, t in zip(own, true, strict=True):
        torch.testing.assert_close(o, t)


@pytest.mark.parametrize('index', [2, 5])
def test_batch_norms_in_different_modes(index):
    stem = make_stem().train()
    stem[index].eval()
    x = torch.randn(2, 3, 32, 40, dtype=torch.double)
    own, true = (run(f, stem, x) for f in (by_function, by_layers))
    for o, t in zip(own, true, strict=True):
        torch.testing.assert_close(o, t)


def test_running_moments_in_16_bits_are_widened_first():
    norm = make_stem()[2].to(torch.bfloat16).eval()
    z = torch.zeros(1, 1, 1, norm.num_features, dtype=torch.bfloat16)
    mean, rstd = fused_stem._moments(z, norm, torch_kernels)
    assert torch.equal(mean, norm.running_mean.float())
    assert torch.equal(rstd, (norm.running_var.float() + norm.eps).rsqrt())


def test_stem_has_no_second_derivatives():
    stem = make_stem()
    x = torch.randn(1, 3, 32, 32, dtype=torch.double)
    grad, = torch.autograd.grad(by_function(x, stem).sum(), [stem[6].weight],
                                create_graph=False)
    assert grad.abs().sum() > 0
    with pytest.raises(RuntimeError, match='no second derivatives'):
        torch.autograd.grad(by_function(x, stem).sum(), [stem[6].weight],
                            create_graph=True)


@pytest.mark.parametrize('change', [
    lambda stem: stem[0].register_forward_hook(
        lambda *_: None),
    lambda stem: stem.__setitem__(2, nn.SyncBatchNorm(12)),
    lambda stem: stem.__setitem__(5, nn.Identity()),
    lambda stem: stem.__setitem__(1, nn.GELU('tanh')),
    lambda stem: stem.__setitem__(
        6, nn.Conv2d(12, 24, 3, stride=2, bias=False)),
    lambda stem: stem.__setitem__(
        3, nn.Conv2d(12, 12, 3, padding='same', bias=False)),
    lambda stem: stem.__setitem__(3, nn.Conv2d(12, 12, 3, padding=1)),
    lambda stem: setattr(stem[1], 'forward', torch.relu),
    lambda stem: setattr(stem[2], 'track_running_stats', False),
    lambda stem: setattr(stem[2], 'num_batches_tracked', None),
    lambda stem: setattr(stem[2], 'momentum', None),
    lambda stem: setattr(stem[3], 'padding_mode', 'reflect'),
    lambda stem: setattr(stem[3], 'dilation', (2, 2)),
    lambda stem: stem.__setitem__(
        3, nn.Conv2d(12, 12, 3, padding=1, groups=2, bias=False)),
    lambda stem: setattr(stem[6], 'padding', (1, 1)),
    lambda stem: stem.__setitem__(
        6, nn.Conv2d(12, 24, (2, 4), stride=(2, 4), bias=False)),
    lambda stem: stem.__setitem__(2, nn.BatchNorm2d(12, affine=False)),
    # What kernels would read beyond its end, or nowhere at all.
    lambda stem: stem.__setitem__(2, nn.BatchNorm2d(8)),
    lambda stem: stem.__setitem__(3, nn.Conv2d(8, 12, 3, padding=1,
                                               bias=False)),
    # What they would take for neighbours in memory.
    lambda stem: setattr(stem[5], 'running_mean', torch.zeros(24)[::2]),
    lambda stem: setattr(stem[2], 'weight', nn.Parameter(
        torch.ones(12, 2)[:, 0])),
    lambda stem: stem[2].to('meta'), lambda stem: stem[0].to('meta'),
    lambda stem: setattr(stem[0], 'weight', nn.Parameter(
        stem[0].weight.as_subclass(OtherTensor)))])
def test_stem_of_other_layers_is_recognised(change):
    x, stem = torch.zeros(1, 3, 32, 32), make_stem()
    assert fused_stem._is_unmodified_stem(x, list(stem))
    assert not fused_stem._is_unmodified_stem(x[:, :1], list(stem))
    change(stem)
    assert not fused_stem._is_unmodified_stem(x, list(stem))


@pytest.mark.parametrize('name, value', [('track_running_stats', False),
                                         ('num_batches_tracked', None)])
def test_settings_of_batch_norms_are_those_of_torch(name, value):
    stem = make_stem()
    for norm in stem[2], stem[5]:
        setattr(norm, name, value)
    x = torch.randn(2, 3, 32, 32).double()
    own, other = (run(function, copy.deepcopy(stem), x, True)
                  for function in (lambda x, stem: stem(x), by_layers))
    for o, t in zip(own, other, strict=True):
        torch.testing.assert_close(o, t)


@pytest.mark.parametrize('changes, taken', [
    ({}, True), (dict(is_cuda=False), False),
    (dict(requires_grad=True), False), (dict(dtype=torch.float32), False),
    (dict(channels=16), True), (dict(channels=17), False)])
def test_stem_is_taken_where_its_kernels_can_run(changes, taken, monkeypatch):
    kernels = SimpleNamespace()
    monkeypatch.setattr(dispatch, 'TRITON', SimpleNamespace(functions=kernels))
    for name, result in dict(find_obstacle='', kernels_for=kernels,
                             _is_emulated=False).items():
        monkeypatch.setattr(dispatch, name, lambda *_, result=result: result)
    settings = dict(dict(is_cuda=True, requires_grad=False, channels=3,
                         dtype=torch.bfloat16), **changes)
    channels = settings.pop('channels')
    x = SimpleNamespace(**settings, shape=(1, channels, 32, 32),
                        device=torch.device('cpu'))
    stem = Stem(*STEM_LAYERS['conv'](channels, 24), fused=True)
    assert fused_stem.available(x, stem) == taken


def test_cpus_run_the_layers():
    stem = make_stem().float()
    x = torch.randn(2, 3, 32, 32)
    assert not fused_stem.available(x, stem)
    with torch.autocast('cpu', torch.bfloat16):
        assert not fused_stem.available(x, stem)
    torch.testing.assert_close(stem(x), by_layers(x, stem), rtol=1e-3,
                               atol=1e-3)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason='needs a GPU')
@pytest.mark.parametrize('name, dim, size', [
    ('conv', 72, (64, 96)), ('conv', 24, (37, 43)), ('3conv', 72, (97, 70))])
@pytest.mark.parametrize('dtype', [torch.bfloat16, torch.float16])
@pytest.mark.parametrize('training', [True, False])
def test_stem_is_as_exact_as_its_layers_on_a_gpu(name, dim, size, dtype,
                                                 training):
    stem = make_stem(name, dim).cuda()
    x = torch.randn(4, 3, *size, device='cuda')
    true = run(by_layers, stem, x.double(), training)
    stem = stem.float()

    def ours(x, stem):
        with torch.autocast('cuda', dtype):
            assert fused_stem.available(x, stem)
            return stem(x)

    def plain(x, stem):
        with torch.autocast('cuda', dtype):
            return by_layers(
                x.contiguous(memory_format=torch.channels_last), stem)

    own, other = run(ours, stem, x, training), run(plain, stem, x, training)
    again = run(ours, stem, x, training)
    for o, p, t, a in zip(own, other, true, again, strict=True):
        assert o.shape == t.shape and o.dtype == p.dtype
        assert torch.equal(o, a)
        if o.is_floating_point():
            assert (o - t).norm() <= 2 * (p - t).norm() + 1e-6 * t.norm()
