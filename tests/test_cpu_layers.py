"""Layers that CPUs do by other means than torch's are the same layers."""
import copy

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from mmconv2former import Conv2Former, cpu_layers


@pytest.mark.parametrize('training', [True, False])
@pytest.mark.parametrize('dtype', [torch.double, torch.float])
def test_batch_norm_of_cpus_is_that_of_torch(training, dtype):
    torch.manual_seed(0)
    x = (3 + torch.randn(3, 5, 4, 7)).to(dtype).to(
        memory_format=torch.channels_last).requires_grad_()
    norm = nn.BatchNorm2d(5).to(dtype).train(training)
    for t in norm.weight, norm.bias, norm.running_mean:
        nn.init.normal_(t)
    norms, results = (norm, copy.deepcopy(norm)), []
    for function, norm in zip((cpu_layers.batch_norm, lambda x, norm: norm(x)),
                              norms, strict=True):
        out = function(x, norm)
        torch.manual_seed(1)
        grads = torch.autograd.grad(
            out, [x, *norm.parameters()],
            torch.randn(out.shape, dtype=torch.double).to(out))
        results.append((out, *grads, *norm.buffers()))
        is_ours = type(out.grad_fn).__name__ == 'BatchNormFunctionBackward'
        assert is_ours == (function is cpu_layers.batch_norm)
    for own, true in zip(*results, strict=True):
        assert own.stride() == true.stride()
        torch.testing.assert_close(own, true)


def test_batch_norm_of_cpus_sums_bf16_in_fp32():
    torch.manual_seed(0)
    norm = nn.BatchNorm2d(8)
    x = (2 + torch.randn(2, 8, 64, 64)).to(
        memory_format=torch.channels_last)
    rounded = x.bfloat16().requires_grad_()
    out = cpu_layers.batch_norm(rounded, norm)
    assert out.dtype == torch.bfloat16
    torch.testing.assert_close(
        norm.running_mean, 0.1 * rounded.detach().float().mean((0, 2, 3)))
    grad, = torch.autograd.grad(out.float().pow(2).sum(), [norm.bias])
    assert grad.dtype == torch.float32


@pytest.mark.parametrize('training', [True, False])
@pytest.mark.parametrize('dtype', [torch.bfloat16, torch.float16])
def test_batch_norm_of_cpus_is_as_exact_as_torchs_in_16_bits(training, dtype):
    torch.manual_seed(0)
    shape = 4, 12, 33, 20
    x, grad = (torch.randn(shape).to(dtype).to(
        memory_format=torch.channels_last) for _ in range(2))
    norm = nn.BatchNorm2d(12).train(training)
    for t in norm.weight, norm.bias, norm.running_mean:
        nn.init.normal_(t)

    def results(function, dtype, norm):
        norm = copy.deepcopy(norm)
        leaf = x.to(dtype).requires_grad_()
        out = function(leaf, norm)
        return (out, *torch.autograd.grad(
            out, [leaf, *norm.parameters()], grad.to(dtype)))

    exact = results(lambda x, norm: norm(x), torch.double,
                    copy.deepcopy(norm).double())
    plain = results(lambda x, norm: norm(x), dtype, norm)
    ours = results(cpu_layers.batch_norm, dtype, norm)
    for own, other, true in zip(ours, plain, exact, strict=True):
        assert own.dtype == other.dtype
        noise = 1e-6 * true.norm()
        assert (own - true).norm() <= 2 * (other - true).norm() + noise


@pytest.mark.parametrize('dtype', [torch.bfloat16, torch.float16])
def test_batch_norm_of_cpus_takes_moments_in_16_bits(dtype):
    torch.manual_seed(0)
    norm, plain = nn.BatchNorm2d(8).to(dtype), nn.BatchNorm2d(8)
    x = torch.randn(2, 8, 5, 6).to(dtype)
    out = cpu_layers.batch_norm(x, norm)
    assert type(out.grad_fn).__name__ == 'BatchNormFunctionBackward'
    plain(x.float())
    for own, true in zip(norm.buffers(), plain.buffers(), strict=True):
        torch.testing.assert_close(own, true.to(own), rtol=0.01, atol=0.01)


@pytest.mark.parametrize('hooked', [True, False])
def test_gelu_of_cpus_is_the_layer(hooked):
    layer, seen = nn.GELU(), []
    if hooked:
        layer.register_forward_hook(lambda _, x, out: seen.append(out.shape))
    x = torch.randn(2, 5, 4, 7).to(memory_format=torch.channels_last)
    out = cpu_layers.gelu(x, layer)
    assert out.is_contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(out, nn.functional.gelu(x))
    assert seen == hooked * [x.shape]


@pytest.mark.parametrize('change', [
    lambda norm: norm.register_forward_hook(lambda *_: None),
    lambda norm: setattr(norm, 'momentum', None),
    lambda norm: norm.register_parameter('bias', None)])
def test_other_batch_norms_run_as_they_are(change):
    norm = nn.BatchNorm2d(5)
    x = torch.randn(3, 5, 4, 7)
    change(norm)
    assert type(cpu_layers.batch_norm(x, norm).grad_fn).__name__ != \
        'BatchNormFunctionBackward'
    with pytest.raises(ValueError, match='more than 1 value per channel'):
        cpu_layers.batch_norm(x[:1, :, :1, :1], nn.BatchNorm2d(5))


@pytest.mark.parametrize('width, kernel_size, stride, padding', [
    (1, 3, 2, 1), (2, 3, 2, 1), (3, 3, 2, 1), (2, 2, 2, 0), (3, 2, 2, 0),
    (4, 2, 2, 0), (4, 4, 4, 0), (7, 4, 4, 0), (8, 4, 4, 0)])
@pytest.mark.parametrize('autocast', [True, False])
def test_convolutions_to_one_column_are_right_in_bf16(
        width, kernel_size, stride, padding, autocast):
    torch.manual_seed(0)
    layer = nn.Conv2d(32, 64, kernel_size, stride, padding)
    x = torch.randn(2, 32, 20, width).bfloat16().float()
    layer.weight.data = layer.weight.data.bfloat16().float()
    expected = layer(x)
    if not autocast:
        layer, x = layer.bfloat16(), x.bfloat16()
    x.requires_grad_()
    with torch.autocast('cpu', torch.bfloat16, enabled=autocast):
        out = cpu_layers.convolution(x, layer)
    assert out.dtype == torch.bfloat16
    torch.testing.assert_close(out.float(), expected, rtol=0.02, atol=0.02)
    out.sum().backward()
    assert x.grad.isfinite().all() and layer.weight.grad.isfinite().all()


@pytest.mark.parametrize('channels, kernel_size, stride, width', [
    (4, 16, 16, 16), (4, 16, 16, 97), (6, 16, 16, 97), (24, 4, 4, 16),
    (8, 8, 3, 29), (8, (3, 12), 2, 40)])
@pytest.mark.parametrize('autocast', [True, False])
def test_convolutions_of_long_rows_of_few_channels_are_right_in_bf16(
        channels, kernel_size, stride, width, autocast):
    torch.manual_seed(0)
    layer = nn.Conv2d(channels, 64, kernel_size, stride)
    x = torch.randn(2, channels, 33, width).bfloat16().float()
    layer.weight.data = layer.weight.data.bfloat16().float()
    grad = torch.randn_like(layer(x)).bfloat16()
    results = []
    for low in False, True:
        own = copy.deepcopy(layer)
        leaf = x.clone()
        if low and not autocast:
            own, leaf = own.bfloat16(), leaf.bfloat16()
        leaf.requires_grad_()
        with torch.autocast('cpu', torch.bfloat16, enabled=low and autocast):
            out = cpu_layers.convolution(leaf, own)
        assert out.dtype == (torch.bfloat16 if low else torch.float)
        out.backward(grad.to(out))
        results.append((out, leaf.grad, own.weight.grad, own.bias.grad))
    for exact, found in zip(*results, strict=True):
        assert (found - exact).norm() < 0.01 * exact.norm()


@pytest.mark.parametrize('change', [
    dict(padding=2, padding_mode='reflect'), dict(groups=2)])
def test_other_convolutions_are_the_layer_in_bf16(change):
    torch.manual_seed(0)
    layer, x = nn.Conv2d(8, 8, 5, **change), torch.randn(1, 8, 9, 9)
    with torch.no_grad(), torch.autocast('cpu', torch.bfloat16):
        out = cpu_layers.convolution(x, layer)
    torch.testing.assert_close(out.float(), layer(x), rtol=0.02, atol=0.02)


def test_convolutions_are_right_where_a_mode_looks_on():

    class Mode(TorchDispatchMode):

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            return func(*args, **kwargs or {})

    torch.manual_seed(0)
    # To one column, and of long rows of few channels.
    for layer, width in ((nn.Conv2d(32, 64, 2, 2), 2),
                         (nn.Conv2d(8, 64, 8, 3), 29)):
        layer = layer.bfloat16()
        x = torch.randn(2, layer.in_channels, 20, width).bfloat16()
        with Mode():
            out = cpu_layers.convolution(x, layer)
        expected = copy.deepcopy(layer).float()(x.float())
        assert (out - expected).norm() < 0.01 * expected.norm()
    # On other CPUs, too, the last one is computed in fp32.
    assert torch.equal(out, expected.bfloat16())


@pytest.mark.parametrize('arch, height, width', [
    (dict(depths=[1], dims=[320], kernel_size=3, stem='3conv'), 64, 24),
    (dict(depths=[1], dims=[64], kernel_size=3), 32, 6)])
def test_thin_images_are_right_in_bf16(arch, height, width):
    torch.manual_seed(0)
    model, x = Conv2Former(arch).eval(), torch.randn(2, 3, height, width)
    with torch.no_grad():
        expected, = model(x)
        with torch.autocast('cpu', torch.bfloat16):
            out, = model(x)
    assert (out - expected).norm() < 0.05 * expected.norm()
