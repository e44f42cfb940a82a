"""The Triton kernels against the plain functions of the same names.

On a GPU the cases run there. Without one they run at tiny sizes through
Triton's interpreter, which must be switched on before Triton is imported:
one test starts this file anew in a process of its own. With EXECUTE_PTX=1 in
the environment the cases for GPUs run on the CPU, as compiled code (ptx.py).
"""
import functools
import importlib
import inspect
import os
import subprocess
import sys
from collections import defaultdict
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch.torch_version import TorchVersion

from mmconv2former import dispatch, fake_kernels, fused_block, torch_kernels
from mmconv2former.backbone import Block, Downsampling

triton = pytest.importorskip('triton', reason='Triton is not installed')
banded, depthwise, norm, sums, stem, tiling, weights, launches = (
    importlib.import_module(f'mmconv2former.triton_kernels.{name}')
    for name in ('banded', 'depthwise', 'norm', 'sums', 'stem', 'tiling',
                 'weights', 'launch'))
MODULES = banded, depthwise, norm, sums, stem, weights

EPS = 1e-6
INTERPRETED = os.environ.get('TRITON_INTERPRET') == '1'
EXECUTED = os.environ.get('EXECUTE_PTX') == '1'
if INTERPRETED:
    DEVICE = 'cpu'
    CASES = [  # N, H, W, C, K, precision; of bf16 the interpreter is no judge
        (1, 5, 7, 20, 3, torch.float32),
        (1, 1, 5, 36, 5, torch.float16),
        (2, 1, 1, 8, 11, torch.float32),
        (1, 2, 3, 8, 11, torch.float16),
        (1, 1, 17, 8, 21, torch.float32),  # halos wider than a strip
        (1, 1, 14, 32, 17, torch.float32),
        (1, 1, 8, 8, 3, torch.float16),
        (2, 1, 16, 8, 5, torch.float32),
        (1, 2, 15, 8, 7, torch.float16),
        (1, 1, 2, 96, 3, torch.float16),
        (1, 2, 28, 32, 5, torch.float32),  # strips and lanes without a rest
    ]
    CHUNKED = [  # channels in five and nine chunks, which norms alone have
        (1, 1, 2, 80, torch.float16),
        (1, 1, 3, 144, torch.float32),
        (1, 1, 2, 540, torch.float32),
    ]
    BANDED = [  # parts of rows, strips, blocks of channels; groups of images
        (1, 9, 19, 12, torch.float16),
        (17, 4, 3, 8, torch.float16),
        (2, 15, 16, 16, torch.float16),
        (1, 1, 14, 4, torch.float16),
    ]
else:
    DEVICE = 'cpu' if EXECUTED else 'cuda'
    # Few: most of the time goes to the compiler.
    CASES = [
        (20, 56, 56, 72, 11, torch.float32),
        (20, 56, 56, 72, 11, torch.float16),
        (20, 56, 56, 72, 11, torch.bfloat16),
        (136, 13, 13, 144, 11, torch.bfloat16),
        (304, 7, 7, 100, 11, torch.float16),
        (3, 7, 7, 36, 11, torch.bfloat16),
        (2, 1, 1, 8, 11, torch.float32),
        (4, 5, 7, 20, 7, torch.float32),
        (1, 56, 13, 100, 7, torch.bfloat16),
        (2, 13, 56, 8, 5, torch.float16),
        (2, 7, 1, 20, 5, torch.bfloat16),
        (1, 13, 5, 36, 21, torch.float32),
        (2, 56, 56, 20, 21, torch.bfloat16),
        (1, 7, 7, 8, 21, torch.float16),
        (12, 56, 56, 100, 3, torch.bfloat16),
        (5, 7, 7, 144, 3, torch.float32),
        (1, 1, 13, 72, 3, torch.float16),
        (3, 7, 7, 320, 3, torch.float16),  # channels in five, nine and one
        (5, 7, 7, 576, 3, torch.bfloat16),
        (4, 7, 7, 512, 3, torch.bfloat16),
        (2, 9, 28, 64, 21, torch.float16),  # strips and lanes without a rest
    ]
    CHUNKED = []
    BANDED = [
        (20, 56, 56, 72, torch.bfloat16),
        (136, 14, 14, 144, torch.bfloat16),
        (3, 13, 40, 36, torch.float16),
        (17, 7, 7, 100, torch.bfloat16),
        (1, 2, 16, 20, torch.float16),
    ]
SHAPES = [(*case[:4], case[5]) for case in CASES]
NORMS = SHAPES + CHUNKED


def gpu_test(test):
    test = pytest.mark.skipif(INTERPRETED or not torch.cuda.is_available(),
                              reason='needs a GPU')(test)
    return pytest.mark.gpu(test)


def device_test(test):
    """Mark a test that runs on a GPU or on what stands in for one."""
    if EXECUTED:
        test = pytest.mark.usefixtures('executed_launches')(test)
        return pytest.mark.gpu(test)
    return test if INTERPRETED else gpu_test(test)


@pytest.fixture
def kernels(monkeypatch):
    monkeypatch.setattr(torch.backends.cudnn, 'allow_tf32', False)
    from mmconv2former import triton_kernels
    return triton_kernels


def forget_plans():
    """Have all launches made anew."""
    for module in MODULES:
        for function in vars(module).values():
            if hasattr(function, 'cache_clear'):
                function.cache_clear()


@pytest.fixture
def nothing_compiled(monkeypatch, tmp_path):
    """And nothing of the test is left to others."""
    monkeypatch.setenv('TRITON_CACHE_DIR', str(tmp_path))
    monkeypatch.setattr(launches, 'COMPILED', {})
    for module in MODULES:
        for kernel in vars(module).values():
            if isinstance(kernel, triton.JITFunction):
                monkeypatch.setattr(kernel, 'device_caches', defaultdict(
                    kernel.device_caches.default_factory))
    forget_plans()
    yield
    forget_plans()


def draw(dtype, *shapes):
    """Random tensors, the same in each precision that holds them."""
    generator = torch.Generator().manual_seed(sum(shapes[0]))
    return [
        torch.randn(s, generator=generator, dtype=torch.double).to(
            dtype).to(DEVICE) for s in shapes
    ]


def with_sum(function):
    """Add the sum of the first result, as the kernels do."""

    def wrapped(*inputs):
        outs = function(*inputs)
        x = outs[0]
        return *outs[:-1], x.sum((0, 1, 2), dtype=torch.promote_types(
            x.dtype, torch.float32))

    return wrapped


gate_backward = with_sum(torch_kernels.gate_backward)
position_backward = with_sum(torch_kernels.position_backward)


def scale_residual_backward(grad, scale, keep):
    own, scaled, _ = torch_kernels.scale_residual_backward(
        grad, scale, keep, grad.dtype)
    return own, scaled, (own if own.numel() else grad).sum(
        (0, 1, 2), dtype=torch.promote_types(grad.dtype, torch.float32))


def layer_norm(x, weight, bias):
    return F.layer_norm(x, weight.shape, weight, bias, EPS)


def layer_norm_backward(grad, x, weight, bias, eps, residual, patch,
                        sums_residual):
    """That of autograd; the plain one takes other types on the CPU."""
    assert patch == 1
    inputs = [t.detach().requires_grad_() for t in (x, weight, bias)]
    out = F.layer_norm(inputs[0], weight.shape, *inputs[1:], eps)
    grad_x, *others = torch.autograd.grad(out, inputs, grad)
    total = grad_x.new_empty(0)
    if residual is not None:
        grad_x = grad_x + residual
    if sums_residual:
        total = residual.sum((0, 1, 2), dtype=torch.promote_types(
            residual.dtype, torch.float32))
    return grad_x, *others, out.detach(), total


def plain_sum_and_norm(x, y, scale, keep, weight, bias):
    out = torch_kernels.scale_residual(x, y, scale, keep)
    return out, F.layer_norm(out, out.shape[3:], weight, bias, EPS)


def sum_and_norm_backward(grad, x, weight, bias, eps, residual, scale, keep,
                          dtype, sums_residual):
    grads = layer_norm_backward(grad, x, weight, bias, eps, residual, 1,
                                sums_residual)
    own, scaled, total = scale_residual_backward(grads[0], scale, keep)
    if scale is keep is None:
        total = total.new_empty(0)
    return *grads, own, scaled, total


def double(x):
    return x.double() if torch.is_tensor(x) else x


def compare(ours, plain, *inputs):
    """The error is at most twice that of the plain form, plus a rounding."""
    dtype = next(t.dtype for t in inputs if torch.is_tensor(t))
    true = plain(*map(double, inputs))
    before = [t.clone() for t in inputs if torch.is_tensor(t)]
    # Fills what an operator leaves unwritten with NaN.
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        own = ours(*inputs)
    finally:
        torch.use_deterministic_algorithms(False)
    for old, new in zip(before, filter(torch.is_tensor, inputs)):
        assert torch.equal(old, new), 'an input was overwritten'
    other = plain(*inputs)  # which may overwrite them
    for o, p, t in zip(*([r] if torch.is_tensor(r) else r
                         for r in (own, other, true)), strict=True):
        assert o.shape == t.shape and o.is_contiguous()
        assert o.dtype in (dtype, torch.float32)
        if not t.numel():
            continue
        # Sums in fp32 are taken in another order.
        noise = max(torch.finfo(o.dtype).eps, 1e-6) * t.abs().max()
        assert (o - t).abs().max() <= 2 * (p - t).abs().max() + noise
    return own


@device_test
@pytest.mark.parametrize('n, h, w, c, k, dtype', CASES)
def test_gate_is_as_exact_as_its_plain_form(kernels, n, h, w, c, k, dtype):
    inputs = draw(dtype, (n, h, w, 2 * c), (c, 1, k, k), (c, ))
    out, a = compare(kernels.gate_forward, torch_kernels.gate_forward, *inputs)
    assert out.dtype == a.dtype == dtype
    assert torch.equal(out, kernels.gate(*inputs))


@device_test
@pytest.mark.parametrize('n, h, w, c, k, dtype', CASES)
def test_gradients_of_gate_are_as_exact(kernels, n, h, w, c, k, dtype):
    inputs = draw(dtype, (n, h, w, c), (n, h, w, 2 * c), (n, h, w, c),
                  (c, 1, k, k), (c, ))
    grad_zv, *sums, out, total = compare(
        kernels.gate_backward, gate_backward, *inputs)
    assert grad_zv.dtype == out.dtype == dtype
    assert {t.dtype for t in (*sums, total)} == {torch.float32}


tensor_cores_test = pytest.mark.skipif(not banded.HAS_NARROW_PRODUCTS,
                                       reason='needs Triton 3.5')


@device_test
@tensor_cores_test
@pytest.mark.parametrize('n, h, w, c, dtype', BANDED)
def test_gradients_of_gate_on_tensor_cores_are_as_exact(
        kernels, monkeypatch, n, h, w, c, dtype):
    for name in 'takes_input_grad', 'takes_weight_grad':
        monkeypatch.setattr(banded, name, lambda *_: True)
    # So that it cannot be one of the others.
    for name in '_gate_input_grad_launch', '_weight_grad_launch':
        monkeypatch.delattr(depthwise, name)
    inputs = draw(dtype, (n, h, w, c), (n, h, w, 2 * c), (n, h, w, c),
                  (c, 1, 11, 11), (c, ))
    grad_zv, *_ = compare(kernels.gate_backward, gate_backward, *inputs)
    assert grad_zv.dtype == dtype


@tensor_cores_test
def test_tensor_cores_take_what_fills_them():
    stages = (56, 72), (28, 144), (14, 288), (7, 576)

    def taken(shapes, k=11, dtype=torch.bfloat16):
        return [(banded.takes_weight_grad(shape, k, dtype),
                 banded.takes_input_grad(shape, k, dtype))
                for shape in shapes]

    for n in 64, 128, 256:
        assert taken([(n, s, s, c) for s, c in stages]) == 3 * [
            (True, True)] + [(True, False)]
    # Detection: two images make 30 and 16 parts of rows, then few.
    dense = [(2, 800 // d, 1344 // d, c)
             for d, (_, c) in zip((4, 8, 16, 32), stages)]
    assert taken(dense) == 2 * [(True, False)] + 2 * [(False, False)]
    one = [(1, s, s, c) for s, c in stages]
    assert not any(map(any, taken(one)))
    others = (11, torch.float32), (7, torch.float16), (17, torch.float16)
    for k, dtype in others:
        assert taken([(128, 56, 56, 72)], k, dtype) == [(False, False)]
    # Channels that are no multiple of eight.
    assert taken([(128, 56, 56, 36)]) == [(False, True)]
    # Offsets within an image are counted in 32 bits.
    assert taken([(16, 3864, 3864, 72)]) == [(False, False)]


def test_older_triton_gets_no_products_on_tensor_cores(monkeypatch):
    monkeypatch.setattr(banded, 'HAS_NARROW_PRODUCTS', False)
    forget_plans()
    for takes in banded.takes_weight_grad, banded.takes_input_grad:
        assert not takes((128, 56, 56, 72), 11, torch.bfloat16)
    forget_plans()


@device_test
@pytest.mark.parametrize('n, h, w, c, dtype', SHAPES)
def test_position_and_its_gradients_are_as_exact(kernels, n, h, w, c, dtype):
    grad, *inputs = draw(dtype, (n, h, w, c), (n, h, w, c), (c, 1, 3, 3),
                         (c, ))
    out = compare(kernels.position, torch_kernels.position, *inputs)
    grad_z, *sums, again, total = compare(
        kernels.position_backward, position_backward, grad, *inputs)
    assert torch.equal(out, again)
    assert out.dtype == grad_z.dtype == dtype
    assert {t.dtype for t in (*sums, total)} == {torch.float32}


@device_test
def test_images_too_large_for_offsets_of_32_bits(kernels, monkeypatch):
    n, h, w, c = 2, 5, 7, 20
    zv, x, y, weight, bias, scale, keep = draw(
        torch.float32, (n, h, w, 2 * c), *[(n, h, w, c)] * 2, (c, 1, 3, 3),
        (c, ), (c, ), (n, 1, 1, 1))
    calls = [lambda: [kernels.gate(zv, weight, bias)],
             lambda: kernels.scale_residual_norm(x, y, scale, keep, bias, bias,
                                                 EPS, torch.float32)]
    expected = [call() for call in calls]
    monkeypatch.setattr(tiling, 'MAX_OFFSETS', w * 2 * c + 1)
    assert tiling.small_images((n, h, w, c), 2 * c) == (n * h, 1, w, c)
    forget_plans()
    for call, outs in zip(calls, expected):
        assert all(map(torch.equal, call(), outs))
    forget_plans()


@device_test
@pytest.mark.parametrize('n, h, w, c, dtype', NORMS)
def test_norms_are_as_exact_as_their_plain_forms(kernels, n, h, w, c, dtype):
    x, y, grad, weight, bias, scale, keep = draw(
        dtype, *[(n, h, w, c)] * 3, *[(c, )] * 3, (n, 1, 1, 1))
    normed = compare(
        lambda *inputs: kernels.layer_norm(*inputs, EPS, dtype), layer_norm,
        x, weight, bias)
    assert normed.dtype == dtype
    grad_x, grad_weight, grad_bias, again, total = compare(
        kernels.layer_norm_backward, layer_norm_backward, grad, x, weight,
        bias, EPS, y, 1, True)
    assert grad_x.dtype == dtype
    assert {t.dtype for t in (grad_weight, grad_bias, total)} \
        == {torch.float32}
    torch.testing.assert_close(again, normed)
    alone, *_ = compare(kernels.layer_norm_backward, layer_norm_backward, grad,
                        x, weight, bias, EPS, None, 1, False)
    assert not torch.equal(alone, grad_x)
    for factors in (scale, keep), (scale, None), (None, keep), (None, None):
        out = compare(kernels.scale_residual, torch_kernels.scale_residual,
                      x, y, *factors)
        assert out.dtype == dtype
        *outs, total = compare(
            lambda *inputs: kernels.scale_residual_backward(*inputs, dtype),
            scale_residual_backward, grad, *factors)
        assert {t.dtype for t in outs} == {dtype}
        assert total.dtype == torch.float32


@device_test
@pytest.mark.parametrize('n, h, w, c, dtype', NORMS[::3] + NORMS[2:3])
@pytest.mark.parametrize('scaled, dropped', [
    (True, True), (False, True), (False, False)])
def test_sum_with_its_norm_is_as_exact(kernels, n, h, w, c, dtype, scaled,
                                       dropped):
    x, y, grad, weight, bias, scale, keep = draw(
        dtype, *[(n, h, w, c)] * 3, *[(c, )] * 3, (n, 1, 1, 1))
    factors = scale if scaled else None, keep if dropped else None

    def with_dtype(function):
        return lambda *inputs: function(*inputs[:-1], inputs[0].dtype,
                                        *inputs[-1:])

    for affine in (weight, bias), (None, None):
        out, normed = compare(
            lambda *inputs: kernels.scale_residual_norm(*inputs, EPS, dtype),
            plain_sum_and_norm, x, y, *factors, *affine)
        assert out.dtype == normed.dtype == dtype
    for sums_residual in True, False:
        grad_x, *sums, again, total, own, scaled_, own_total = compare(
            with_dtype(kernels.scale_residual_norm_backward),
            with_dtype(sum_and_norm_backward), grad, out, weight, bias, EPS, y,
            *factors, sums_residual)
        assert {t.dtype for t in (grad_x, again, own, scaled_)} == {dtype}
        assert {t.dtype for t in (*sums, total, own_total)} == {torch.float32}


@pytest.fixture
def stem_kernels(kernels):
    return stem


@device_test
@pytest.mark.parametrize('n, h, w, c, dtype', SHAPES)
@pytest.mark.parametrize('patch', [1, 2])
def test_gelu_and_batch_norm_of_the_stem_are_as_exact(
        stem_kernels, n, h, w, c, dtype, patch):
    used, patch = c - 3, min(patch, h, w)
    c = -(-c // 8) * 8  # as the stem pads them
    wider = c + 16
    x, weight, bias, mean, var = draw(dtype, (n, h, w, c),
                                      *[(used, )] * 4)
    results, running = {}, {}
    for name, module, inputs in (
            ('own', stem_kernels, (x, mean, var)),
            ('plain', torch_kernels, (x, mean, var)),
            ('true', torch_kernels, [t.double() for t in (x, mean, var)])):
        x_, *running[name] = (t.clone() for t in inputs)
        results[name] = *module.gelu_moments(x_, *running[name], EPS, 0.1), \
            *running[name]
    for own, plain, true in zip(*results.values(), strict=True):
        noise = max(torch.finfo(own.dtype).eps, 1e-6) * true.abs().max()
        assert (own - true).abs().max() <= \
            2 * (plain - true).abs().max() + noise
    mean, rstd, *_ = results['own']
    out = compare(
        *(functools.partial(module.gelu_norm, patch=patch, channels=wider)
          for module in (stem_kernels, torch_kernels)),
        x, mean, rstd, weight, bias)
    assert out.dtype == dtype
    grad, = draw(dtype, out.shape)
    for training in (True, False):
        grad_x, *grads = compare(
            *(functools.partial(module.gelu_norm_backward, training=training,
                                patch=patch, channels=wider)
              for module in (stem_kernels, torch_kernels)),
            grad, x, mean, rstd, weight)
        assert grad_x.dtype == dtype
        assert {t.dtype for t in grads} == {torch.float32}


@device_test
@pytest.mark.parametrize('channels_last', [True, False])
def test_images_get_their_channels_last(stem_kernels, channels_last):
    x, = draw(torch.float32, (2, 3, 5, 9))
    if channels_last:
        x = x.contiguous(memory_format=torch.channels_last)
    own, plain = (module.pixels_first(x, 8, torch.float16)
                  for module in (stem_kernels, torch_kernels))
    assert own.is_contiguous() and torch.equal(own, plain)


@device_test
def test_moments_of_large_numbers_are_exact(stem_kernels):
    x, = draw(torch.float32, (2, 16, 16, 8))
    x += 1000
    running = [torch.zeros(8, device=DEVICE) for _ in range(2)]
    mean, rstd = stem_kernels.gelu_moments(x, *running, EPS, 1.)
    var, true = torch.var_mean(x.double(), (0, 1, 2))
    torch.testing.assert_close(mean, true.float())
    torch.testing.assert_close(running[1], var.float(), rtol=1e-4, atol=0)


@device_test
def test_moments_have_no_error_of_one_sign(stem_kernels):
    x, = draw(torch.float16, (1, 64, 64, 8))
    running = [torch.zeros(8, device=DEVICE) for _ in range(2)]
    mean, _ = stem_kernels.gelu_moments(x, *running, EPS, 1.)
    true = F.gelu(x.double()).mean((0, 1, 2))
    assert ((mean - true).abs() <= 1e-6 * true).all()


@device_test
@pytest.mark.parametrize('o, i, dtype', [(20, 8, torch.float32),
                                         (72, 1100, torch.float16)])
def test_gradients_of_the_layer_scales_are_as_exact(kernels, o, i, dtype):
    inputs = [t for size in (i, 4 * i) for t in draw(
        dtype, (o, size), (o, ), (o, size), (o, ), (o, ))]
    outs = compare(
        *(lambda *tensors, f=module.scaled_linear_backward: f(
            *zip(tensors[:5], tensors[5:]))
          for module in (kernels, torch_kernels)), *inputs)
    assert len(outs) == 6 and {t.dtype for t in outs} == {torch.float32}


@device_test
@pytest.mark.parametrize('outs, mlp_outs, ks', [
    ((8, 8), (20, ), (5, 3)), ((20, ), (1300, ), (3, 3)),
    ((1300, ), (8, 8), (3, 7))])
@pytest.mark.parametrize('dtype', [torch.float32, torch.float16])
@pytest.mark.parametrize('scaled', [(0, 0), (1, 1), (0, 1)])
def test_weights_are_joined_and_cast(kernels, outs, mlp_outs, ks, dtype,
                                     scaled):
    branches = []
    for (c, *others), k in zip((outs, mlp_outs), ks):
        shapes = [shape for o in (c, *others)
                  for shape in ((o, 8, 1, 1), (o, ))]
        branches.append(draw(torch.float32, *shapes, (c, 1, k, k), (c, ),
                             (8, c, 1, 1), (8, )))
    scales = [draw(torch.float32, (8, ))[0] if s else None for s in scaled]
    own = kernels.operands(branches, dtype, scales)
    true = torch_kernels.join_operands(branches, dtype, scales,
                                       filters=kernels.filters)
    assert [len(branch) for branch in own] == [6 + s for s in scaled]
    for o, t in zip(sum(own, []), sum(true, []), strict=True):
        assert o.shape == t.shape and o.dtype == t.dtype
        assert o.stride() == t.stride() and torch.equal(o, t)


@device_test
def test_filters_are_laid_out_once(kernels):
    weight, bias = draw(torch.float16, (8, 1, 5, 5), (8, ))
    once, _ = kernels.filters(weight, bias, torch.float16)
    again, _ = kernels.filters(once, bias, torch.float16)
    assert torch.equal(once, weight.float())
    assert again.data_ptr() == once.data_ptr()


@device_test
def test_precisions_of_stream_and_branch_may_differ(kernels):
    x, weight, bias = draw(torch.float32, (2, 3, 5, 8), (8, ), (8, ))
    y, = draw(torch.float16, x.shape)
    out = kernels.scale_residual(x, y, weight, None)
    assert out.dtype == torch.float32
    torch.testing.assert_close(out, x + weight * y)
    normed = kernels.layer_norm(x, None, None, EPS, torch.float16)
    assert normed.dtype == torch.float16
    torch.testing.assert_close(
        normed, F.layer_norm(x, (8, ), eps=EPS).half())
    inputs = (x, weight, bias, EPS, x)
    grad_x, *_, again, _ = kernels.layer_norm_backward(y, *inputs)
    true, *_ = layer_norm_backward(y.float(), *inputs, 1, False)
    assert grad_x.dtype == torch.float32 and again.dtype == torch.float16
    torch.testing.assert_close(grad_x, true)
    out, normed = kernels.scale_residual_norm(x, y, weight, None, None, None,
                                              EPS, torch.float16)
    assert out.dtype == torch.float32 and normed.dtype == torch.float16
    # The gradient of the branch is another tensor then.
    grad_x, *_, own, scaled, total = kernels.scale_residual_norm_backward(
        y, *inputs, None, None, torch.float16, False)
    torch.testing.assert_close(grad_x, true)
    assert torch.equal(own, grad_x.half()) and not scaled.numel()
    torch.testing.assert_close(total, own.float().sum((0, 1, 2)), rtol=1e-5,
                               atol=1e-5)
    again, *_ = kernels.scale_residual_backward(grad_x, None, None,
                                                torch.float16)
    assert torch.equal(again, own)


@device_test
def test_number_of_splits_changes_nothing_but_the_rounding(
        kernels, monkeypatch):
    """Many programs that sum, or one for the whole batch."""

    def results():
        grad, zv, z, weight, bias = draw(
            torch.float32, (2, 3, 8, 8), (2, 3, 8, 16), (2, 3, 8, 8),
            (8, 1, 3, 3), (8, ))
        return [
            *compare(kernels.gate_backward, gate_backward, grad, zv, z, weight,
                     bias),
            *compare(
                lambda *inputs: kernels.scale_residual_backward(
                    *inputs, torch.float32), scale_residual_backward, grad,
                bias, None)[1:],
            *compare(kernels.layer_norm_backward, layer_norm_backward, grad, z,
                     bias, bias, EPS, z, 1, True),
            *compare(kernels.position_backward, position_backward, grad, z,
                     weight, bias)]

    assert tiling.split_count(6, 1) == 6
    many = results()
    for module in (tiling, depthwise):
        monkeypatch.setattr(module, 'PROGRAMS', 1)
    monkeypatch.setattr(depthwise, 'WAVES', 1)  # several items a program
    forget_plans()
    assert tiling.split_count(6, 1) == 1
    one = results()
    forget_plans()
    for own, other in zip(one, many, strict=True):
        scale = other.abs().max()
        torch.testing.assert_close(own / scale, other / scale, rtol=0,
                                   atol=1e-6)


@device_test
@tensor_cores_test
def test_program_on_tensor_cores_sums_several_groups(kernels, monkeypatch):
    for name in 'takes_input_grad', 'takes_weight_grad':
        monkeypatch.setattr(banded, name, lambda *_: True)
    monkeypatch.setattr(banded, 'RESIDENT', 1)
    forget_plans()
    n, h, w, c = 17, 1, 9, 8
    launch, _ = banded.weight_grad_launch((n, h, w, c), 11, c)
    assert n > banded.IMAGES and launch.scalars[:2] == (n, 1)  # not divided
    compare(kernels.gate_backward, gate_backward, *draw(
        torch.float16, (n, h, w, c), (n, h, w, 2 * c), (n, h, w, c),
        (c, 1, 11, 11), (c, )))
    forget_plans()


@pytest.mark.skipif(not INTERPRETED, reason='chooses among programs')
@pytest.mark.skipif(
    os.sysconf('SC_PAGE_SIZE') * os.sysconf('SC_PHYS_PAGES') < 2**34,
    reason='less memory than 16 GiB may not be asked for so much at once')
@pytest.mark.parametrize('name', [
    'gate', 'gate_backward', 'banded', 'position', 'position_backward',
    'norm', 'norm_backward', 'residual', 'residual_backward', 'stem',
    'stem_backward'])
def test_last_of_many_images_gives_what_it_gives_alone(kernels, monkeypatch,
                                                       name):
    """With 2**31 numbers before it.

    Only the last programs of each launch run, so that hardly any of the
    memory is touched.
    """
    interpreter = triton.runtime.interpreter
    builder = interpreter.interpreter_builder
    # Would copy all tensors onto themselves.
    monkeypatch.setattr(interpreter.GridExecutor, '_restore_args_dev',
                        lambda *_: None)
    dim, index = builder.set_grid_dim, builder.set_grid_idx

    def launch(self, *tensors):
        """The last programs."""
        count = self.grid[0]
        if 'weight_grad' in self.kernel.__name__:  # reads all images
            return
        few = min(count, 8 if name == 'banded' else 2)
        monkeypatch.setattr(builder, 'set_grid_dim',
                            lambda *_: dim(count, 1, 1))
        monkeypatch.setattr(builder, 'set_grid_idx',
                            lambda x, *_: index(count - few + x, 0, 0))
        self.kernel[(few, )](*tensors, *self.scalars, **self.constants)

    monkeypatch.setattr(launches.Launch, '__call__', launch)
    monkeypatch.setattr(sums, '_launch', lambda _: None)
    for module in depthwise, tiling:  # an item for each program
        monkeypatch.setattr(module, 'PROGRAMS', 2**24)
    for takes in 'takes_input_grad', 'takes_weight_grad':
        monkeypatch.setattr(banded, takes, lambda *_: name == 'banded')
    h, w, c = 2, 7, 64
    n = 2**31 // (h * w * c) + 2
    x, zv, weight, bias = draw(torch.float16, (1, h, w, c), (1, h, w, 2 * c),
                               (c, 1, 3, 3), (c, ))
    long, = draw(torch.float16, (c, 1, 11, 11))
    mean = rstd = bias.float()

    def run(x, zv):
        return dict(
            gate=lambda: kernels.gate_forward(zv, weight, bias),
            gate_backward=lambda: kernels.gate_backward(
                x, zv, x, weight, bias)[::3],
            banded=lambda: kernels.gate_backward(x, zv, x, long, bias)[::3],
            position=lambda: [kernels.position(x, weight, bias)],
            position_backward=lambda: kernels.position_backward(
                x, x, weight, bias)[::3],
            norm=lambda: [kernels.layer_norm(x, bias, bias, EPS, x.dtype)],
            norm_backward=lambda: kernels.layer_norm_backward(
                x, x, bias, bias, EPS, x)[::3],
            residual=lambda: [kernels.scale_residual(x, x, bias, None)],
            residual_backward=lambda: kernels.scale_residual_backward(
                x, bias, x[:, :1, :1, :1] + 2, x.dtype)[:2],
            stem=lambda: [
                stem.pixels_first(x.permute(0, 3, 1, 2), c, x.dtype),
                stem.gelu_norm(x, mean, rstd, bias, bias, 2, c)],
            stem_backward=lambda: stem.gelu_norm_backward(
                x, x, mean, rstd, bias, False, 1, c)[:1],
        )[name]()

    def among_many(x):
        out = x.new_empty((n, *x.shape[1:]))
        out[-1] = x[0]
        return out

    forget_plans()
    for out, alone in zip(run(among_many(x), among_many(zv)), run(x, zv)):
        assert torch.equal(out[-1:], alone) and alone.any()
    forget_plans()


@device_test
def test_inputs_may_be_strided(kernels):
    grad, z, zv, weight, bias, keep = draw(
        torch.float32, (2, 2, 2, 8), (2, 2, 2, 8), (2, 2, 2, 16), (8, 1, 3, 3),
        (8, ), (2, 1, 1, 1))

    def strided(x, kind):
        """A slice of the channels, or channels that are not the last."""
        if x.shape[:3] != z.shape[:3]:
            return x.repeat_interleave(2, 0)[::2]
        if kind == 1:
            pixels = x.flatten(0, 2).t().contiguous().t()
            return pixels.unflatten(0, x.shape[:3])
        wide = torch.zeros(*x.shape[:-1], 3 + x.shape[-1], device=DEVICE)
        wide[..., 2:-1] = x
        return wide[..., 2:-1]

    calls = {
        kernels.gate: (zv, weight, bias),
        kernels.gate_forward: (zv, weight, bias),
        kernels.gate_backward: (grad, zv, z, weight, bias),
        kernels.position: (z, weight, bias),
        kernels.position_backward: (grad, z, weight, bias),
        kernels.layer_norm: (z, bias, bias, EPS, torch.float32),
        kernels.layer_norm_backward: (grad, z, bias, bias, EPS, zv[..., 8:], 1,
                                      True),
        kernels.scale_residual: (z, grad, bias, keep),
        kernels.scale_residual_backward: (grad, bias, keep, torch.float32),
        kernels.scale_residual_norm: (z, grad, bias, keep, bias, bias, EPS,
                                      torch.float32),
        kernels.scale_residual_norm_backward: (
            grad, z, bias, bias, EPS, zv[..., 8:], bias, keep, torch.float32,
            True),
    }
    for function, inputs in calls.items():
        others = [strided(x, i % 2) if torch.is_tensor(x) else x
                  for i, x in enumerate(inputs)]
        for out, other in zip(function(*inputs), function(*others),
                              strict=True):
            torch.testing.assert_close(out, other, rtol=1e-6, atol=1e-5,
                                       msg=function.__name__)


@device_test
def test_weights_may_be_strided_and_have_many_rows(kernels):
    rows = 1300
    shapes = [(8, 8, 1, 1), (8, ), (8, 8, 1, 1), (8, ), (8, 1, 3, 3), (8, ),
              (rows, 8, 1, 1), (rows, )]
    branches = [draw(torch.float32, *shapes) for _ in range(2)]
    scales = draw(torch.float32, (rows, ), (rows, ))
    *others, other_scales = [
        [p.repeat_interleave(2, 0)[::2] for p in group]
        for group in (*branches, scales)]
    for own, other, branch in zip(
            kernels.operands(branches, torch.float32, scales),
            kernels.operands(others, torch.float32, other_scales), branches):
        assert all(map(torch.equal, own, other))
        assert torch.equal(own[5], branch[7])


@device_test
@pytest.mark.parametrize('rate', [0., 0.5])
@pytest.mark.parametrize('folds', [True, False])
def test_block_computes_with_them_what_it_does_without(
        kernels, monkeypatch, rate, folds):
    monkeypatch.setattr(fused_block, '_folds_scale', lambda *_: folds)
    torch.manual_seed(0)
    block = Block(8, 3, 4., 'hadamard', rate, 1e-6, with_cp=False, fused=True)
    for p in block.parameters():
        torch.nn.init.normal_(
            p, std=1. if p.ndim == 1 else p[0].numel()**-0.5)
    block = block.to(DEVICE)
    x, grad = draw(torch.float32, (2, 8, 2, 9), (2, 8, 2, 9))

    def run(module):
        monkeypatch.setattr(dispatch, 'kernels_for', lambda _: module)
        torch.manual_seed(1)  # of drop path
        inputs = [x.requires_grad_(), *block.parameters()]
        out = block(x)
        return out, *torch.autograd.grad(out, inputs, grad)

    for own, other in zip(run(kernels), run(torch_kernels), strict=True):
        scale = other.abs().max()
        torch.testing.assert_close(own / scale, other / scale, rtol=0,
                                   atol=1e-5)


@device_test
def test_deferred_sums_are_those_of_a_launch_each(kernels, monkeypatch):
    partials = draw(torch.float32, *[
        (parts, kinds, strips, c) for parts, kinds, strips, c in (
            (3, 10, 2, 8), (700, 1, 1, 8), (2, 3, 5, 40), (1, 2, 1, 33),
            (2100, 1, 2, 33), (2, 2, 2, 8))])
    calls = [(partials[:2], 9), (partials[2:3], 0), (partials[3:5], 0),
             (partials[5:], 1)]
    launched = []
    launch = sums._launch
    monkeypatch.setattr(sums, '_launch', lambda sets: (
        launched.append(len(sets)), launch(sets)))
    alone = [[p.sum((0, 2), dtype=torch.double) for p in group]
             for group, _ in calls]
    with kernels.deferred_sums():
        found = [
            sums.sum_partials(*group, taps=taps) for group, taps in calls]
        assert launched == [3]  # five would be too many
    assert launched == [3, 3]
    for (group, taps), out, true in zip(calls, found, alone):
        torch.testing.assert_close(
            out, sums.sum_partials(*group, taps=taps), rtol=1e-5, atol=1e-4)
        true = [true[0][:taps].t(), true[0][taps:], *true[1:]]
        torch.testing.assert_close(
            out.double(), torch.cat([t.flatten() for t in true]), rtol=1e-5,
            atol=1e-4)
    with kernels.deferred_sums():
        first = sums.sum_partials(*partials[:2], taps=9)
        with kernels.deferred_sums():
            second = sums.sum_partials(*partials[:2], taps=9)
        assert torch.equal(second, found[0])
    assert torch.equal(first, found[0])
    launched.clear()
    with pytest.raises(LookupError), kernels.deferred_sums():
        sums.sum_partials(partials[0])
        raise LookupError
    assert not launched  # of what failed nothing


@device_test
def test_sums_of_one_thread_do_not_wait_for_those_of_another(kernels):
    partial, = draw(torch.float32, (3, 2, 2, 8))
    with kernels.deferred_sums(), ThreadPoolExecutor(1) as pool:
        out = pool.submit(sums.sum_partials, partial).result()
        torch.testing.assert_close(out, partial.sum((0, 2)).flatten())


@device_test
def test_outputs_of_operators_share_no_memory(kernels):
    grad, x, zv, weight, bias, keep = draw(
        torch.float32, (2, 1, 2, 6), (2, 1, 2, 6), (2, 1, 2, 12), (6, 1, 3, 3),
        (6, ), (2, 1, 1, 1))
    calls = dict(
        gate_backward=(grad, zv, x, weight, bias),
        position_backward=(grad, x, weight, bias),
        layer_norm_backward=(grad, x, bias, bias, EPS, x, 1, True),
        scale_residual_norm_backward=(grad, x, bias, bias, EPS, x, bias, keep,
                                      x.dtype, True),
        scaled_linear_backward=([x[0, 0]] * 2, [x[0, 0, :, 0]] * 2,
                                [x[0, 0]] * 2, [x[0, 0, :, 0]] * 2,
                                [x[0, 0, :, 0]] * 2))
    for name, inputs in calls.items():
        function = getattr(kernels, name)
        outs = dispatch._as_operator(function)(*inputs)
        assert len({t.untyped_storage().data_ptr() for t in outs}) == len(outs)
        for out, true in zip(outs, function(*inputs), strict=True):
            assert out.storage_offset() == 0 and torch.equal(out, true)


@device_test
def test_layer_norm_without_eps_has_gradients(kernels):
    grad, x, weight, bias = draw(torch.float32, (1, 3, 5, 8), (1, 3, 5, 8),
                                 (8, ), (8, ))
    outs = compare(kernels.layer_norm_backward, layer_norm_backward, grad, x,
                   weight, bias, 0., None, 1, False)
    assert all(out.isfinite().all() for out in outs)


@device_test
def test_norm_of_the_downsampling_computes_the_same(kernels, monkeypatch):
    torch.manual_seed(0)
    layer = Downsampling(8, 20, fused=True).to(DEVICE)
    torch.nn.init.normal_(layer[0].weight)
    x, grad = draw(torch.float32, (2, 8, 5, 6), (2, 20, 2, 3))

    def run(module):
        monkeypatch.setattr(dispatch, 'kernels_for', lambda _: module)
        inputs = [x.requires_grad_(), *layer.parameters()]
        out = layer(x)
        is_ours = 'DownsamplingFunctionBackward' == \
            out.grad_fn.next_functions[0][0].name()
        assert is_ours == (module is kernels)
        return out, *torch.autograd.grad(out, inputs, grad)

    for own, other in zip(run(kernels), run(torch_kernels), strict=True):
        torch.testing.assert_close(own, other, rtol=1e-5, atol=1e-5)


@device_test
def test_gelu_is_exact_to_the_rounding_of_fp32(kernels):
    """With a filter of zeros the position operator is GELU(z) + GELU(0)."""
    z = torch.linspace(-12, 12, 896, device=DEVICE).view(1, 2, 14, 32)
    weight, bias = (torch.zeros(*s, device=DEVICE)
                    for s in ((32, 1, 3, 3), (32, )))
    grad_z, *_, s, _ = kernels.position_backward(
        torch.ones_like(z), z, weight, bias)
    exact = z.double().requires_grad_()
    true = F.gelu(exact)
    slope, = torch.autograd.grad(true.sum(), exact)
    assert ((s - true).abs() <= 3e-7 * z.abs()).all()
    assert (grad_z - slope).abs().max() <= 5e-7


@pytest.mark.skipif(INTERPRETED, reason='starts this process')
@pytest.mark.skipif(
    TorchVersion(triton.__version__) < (
        (3, 7) if TorchVersion(np.__version__) >= (2, 4) else (3, 4)),
    reason='the interpreter needs Triton 3.4, or 3.7 with NumPy 2.4')
def test_kernels_in_the_interpreter():
    result = subprocess.run(
        [sys.executable, '-m', 'pytest', '-q', '-x', '-p', 'no:cacheprovider',
         __file__], env={**os.environ, 'TRITON_INTERPRET': '1'},
        cwd=Path(__file__).resolve().parents[1], text=True,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    assert result.returncode == 0, result.stdout
    assert ' passed' in result.stdout


@pytest.mark.skipif(INTERPRETED, reason='compiles')
def test_second_launch_passes_to_the_compiled_kernel_what_the_first_did(
        kernels, monkeypatch, nothing_compiled):
    """Of which the first goes by Triton's own choice among the compiled."""
    stub = SimpleNamespace(
        get_current_device=lambda: -1,  # as of a tensor on the CPU
        get_current_stream=lambda device: 7 + device,
        get_current_target=lambda: triton.backends.compiler.GPUTarget(
            'cuda', 90, 32))
    calls = []
    compiled = triton.compiler.CompiledKernel
    for module in (triton.runtime.jit, triton.compiler.compiler, launches):
        monkeypatch.setattr(module, 'driver', SimpleNamespace(active=stub))
    monkeypatch.setattr(compiled, '_init_handles',
                        lambda self: setattr(self, 'function', self.hash))
    monkeypatch.setattr(compiled, 'run', property(
        lambda self: lambda *args: calls.append((self, *args))),
        raising=False)
    x, y, scale, short = (torch.zeros(shape, dtype=torch.bfloat16) for shape in
                          (*[(2, 2, 3, 8)] * 2, (8, ), (9, )))
    keep = torch.ones(2, dtype=torch.bfloat16)

    def launch(*inputs):
        kernels.scale_residual(*inputs)
        kernel, *where = calls[-1][:7]
        assert where[3:] == [6, kernel.hash, kernel.packed_metadata]
        addresses = [t.data_ptr() if torch.is_tensor(t) else t
                     for t in calls[-1][10:]]
        out = addresses.pop(6)  # is new each time
        return kernel, where, addresses, out % 16

    first = launch(x, y, scale, keep)
    with monkeypatch.context() as patch:
        patch.delattr(triton.JITFunction, 'run')
        assert launch(x, y, scale, keep) == first
    kept, = launches.COMPILED.values()
    assert len(kept) == 1
    # Other types, no drop path, pointers that are not aligned.
    others = [launch(x.float(), y, scale, keep), launch(x, y, scale, None),
              launch(x, y, None, keep), launch(x, y, short[1:], keep)]
    assert len({kernel for kernel, *_ in [first, *others]}) == 5
    assert len(kept) == 4
    # Multiples of 8 bytes, but not of 16.
    long = torch.zeros(12, dtype=torch.bfloat16)[4:]
    assert launch(x, y, long, keep)[0] is others[-1][0]
    assert len(kept) == 4


@pytest.mark.skipif(INTERPRETED, reason='compiles')
def test_each_device_has_what_is_compiled_for_it(nothing_compiled,
                                                 monkeypatch):
    ran = []

    class Compiled:
        function = packed_metadata = None

        def __init__(self, name):
            self.name = name
            self.run = lambda *_: ran.append(name)

    monkeypatch.setattr(launches, 'CompiledKernel', Compiled)
    monkeypatch.setattr(launches, 'driver', SimpleNamespace(
        active=SimpleNamespace(get_current_stream=lambda _: 0)))

    class Kernel:
        __name__, arg_names = 'kernel', ['x', 'n']

        def __getitem__(self, grid):
            return lambda x, n, **_: Compiled(x.get_device())

    launch = launches.Launch(Kernel(), 1, 5)
    for device in 0, 1, 0, 1:
        launch(SimpleNamespace(get_device=lambda device=device: device,
                               data_ptr=lambda: 0, dtype=torch.float32))
    assert ran == [0, 1]


def test_launches_share_what_is_compiled_for_them_alone(nothing_compiled):
    """Not if constants differ, or scalars need more bits."""
    kernel = SimpleNamespace(__name__='kernel', arg_names=['x', 'n', 'BLOCK'])
    first, again, wide, other = (
        launches.Launch(kernel, 1, n, BLOCK=block).compiled
        for n, block in ((5, 1), (6, 1), (2**31, 1), (5, 2)))
    assert first is again
    assert len({id(found) for found in (first, wide, other)}) == 3


def test_signatures_are_those_of_the_plain_functions(kernels):
    for name in ('operands', *fake_kernels.KERNELS):
        assert list(inspect.signature(getattr(kernels, name)).parameters) \
            == list(inspect.signature(
                getattr(torch_kernels, name)).parameters), name


def test_an_old_triton_is_named(monkeypatch):
    monkeypatch.setattr('triton.__version__', '3.2.0')
    with pytest.raises(ImportError, match='found Triton 3.2.0; expected 3.3'):
        importlib.reload(launches)


@gpu_test
def test_two_runs_give_the_same_bits(kernels):
    grad, z, zv, weight, bias = draw(
        torch.bfloat16, (32, 28, 28, 144), (32, 28, 28, 144),
        (32, 28, 28, 288), (144, 1, 11, 11), (144, ))
    small = weight[..., :3, :3].contiguous()
    runs = [(*kernels.gate_backward(grad, zv, z, weight, bias),
             *kernels.position_backward(grad, z, small, bias),
             *kernels.layer_norm_backward(grad, z, bias, bias, EPS, grad))
            for _ in range(3)]
    for run in runs[1:]:
        assert all(map(torch.equal, runs[0], run))


@gpu_test
def test_more_than_2_to_the_31_elements(kernels):
    """The last of the images gives what it gives alone."""
    n, h, w, c = 33, 256, 256, 1024
    if torch.cuda.mem_get_info()[0] < 60e9:
        pytest.skip('needs 60 GB of free GPU memory')
    assert n * h * w * c > 2**31
    torch.manual_seed(0)
    z = torch.randn(n, h, w, c, device=DEVICE, dtype=torch.bfloat16)
    weight, bias = draw(torch.bfloat16, (c, 1, 3, 3), (c, ))
    last = z[-1:].clone()
    assert torch.equal(
        kernels.position(z, weight, bias)[-1:],
        kernels.position(last, weight, bias))
    for i in (0, 3):
        assert torch.equal(
            kernels.position_backward(z, z, weight, bias)[i][-1:],
            kernels.position_backward(last, last, weight, bias)[i])
    for i in (0, 3):
        assert torch.equal(
            kernels.layer_norm_backward(z, z, bias, bias, EPS, z)[i][-1:],
            kernels.layer_norm_backward(last, last, bias, bias, EPS, last)[i])
    assert torch.equal(
        kernels.scale_residual(z, z, bias, None)[-1:],
        kernels.scale_residual(last, last, bias, None))
    half = slice(c // 2)
    grad = z[..., half].contiguous()
    for i in (0, 3):
        assert torch.equal(
            kernels.gate_backward(grad, z, grad, weight[half],
                                  bias[half])[i][-1:],
            kernels.gate_backward(grad[-1:], last, grad[-1:], weight[half],
                                  bias[half])[i])


@gpu_test
def test_double_precision_takes_the_operators_of_torch():
    x = torch.zeros(1, 2, 2, 8, device=DEVICE)
    assert dispatch.kernels_for(x.double()) is torch_kernels
    assert dispatch.kernels_for(x) is not torch_kernels
