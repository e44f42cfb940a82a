"""The fused operators against the plain path."""
import contextlib
import copy
import functools
import os
import platform
import subprocess
import sys
from collections import Counter
from types import SimpleNamespace

import pytest
import torch
import torch.autograd.forward_ad as fwAD
import torch.nn.functional as F
from functorch.compile import make_boxed_func
from torch import nn
from torch._dynamo.backends.common import aot_autograd
from torch._subclasses.fake_tensor import (
    FakeTensorMode,
    unset_fake_temporarily,
)
from torch.fx.experimental.proxy_tensor import make_fx
from torch.testing._internal.two_tensor import TwoTensor
from torch.utils._pytree import tree_map_only
from torch.utils.checkpoint import (
    checkpoint,
    create_selective_checkpoint_contexts,
)
from torch.utils.flop_counter import FlopCounterMode

from mmconv2former import (
    Conv2Former,
    depthwise,
    dispatch,
    fake_kernels,
    fused_block,
    fused_downsampling,
    operators,
    products,
    torch_kernels,
)
from mmconv2former.backbone import MLP, Block, ConvModulation

ON_GPU = [pytest.mark.gpu, pytest.mark.skipif(
    not torch.cuda.is_available(), reason='needs a GPU')]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
LOW = [torch.bfloat16, torch.float16]


def use_kernels(kind, monkeypatch):
    if kind == 'torch':
        monkeypatch.setattr(dispatch, '_cpp_obstacle', lambda: 'are not asked')


@pytest.fixture(params=['C++', 'torch'])
def kernels(request, monkeypatch):
    """Whose kernels run on the CPU."""
    use_kernels(request.param, monkeypatch)


@pytest.fixture(params=['C++', 'torch', pytest.param('cuda', marks=ON_GPU)])
def device(request, monkeypatch):
    """A device, and on the CPU whose kernels run."""
    use_kernels(request.param, monkeypatch)
    return 'cuda' if request.param == 'cuda' else 'cpu'


def random(*shape, dtype=torch.double, scale=1.):
    return (torch.randn(*shape, dtype=torch.double) * scale).to(dtype)


def block(dim, kernel_size, drop_path_rate=0., **kwargs):
    """A block in double precision, of which no parameter is trivial."""
    kwargs = dict(dict(with_cp=False, fused=True), **kwargs)
    model = Block(dim, kernel_size, 4., 'hadamard', drop_path_rate, 1e-6,
                  **kwargs).double()
    with torch.no_grad():
        for p in model.parameters():
            scale = 1. if p.ndim == 1 else p[0].numel()**-.5
            p.copy_(random(*p.shape, scale=scale))
    return model


def came_from_fused_path(out):
    found, nodes = set(), [out.grad_fn]
    while nodes:
        node = nodes.pop()
        if node is not None and node not in found:
            found.add(node)
            nodes += [n for n, _ in node.next_functions]
    return any('BlockFunction' in node.name() for node in found)


def run(model, x, grad, autocast=None):
    """Output and gradients, and whether the fused operators ran."""
    model.zero_grad()
    x = x.detach().clone().requires_grad_()
    torch.manual_seed(0)  # of drop path
    with torch.autocast(x.device.type, autocast,
                        enabled=autocast is not None):
        out = model(x)
    is_fused = came_from_fused_path(out)
    out.backward(grad.to(out.dtype))
    results = {n: p.grad for n, p in model.named_parameters()}
    return {'out': out.detach(), 'x': x.grad, **results}, is_fused


def three_ways(model, x, grad, monkeypatch, autocast=None):
    """Results in double precision, of the plain and of the fused path."""
    cast = copy.deepcopy(model).to(x.dtype)
    monkeypatch.setenv('MMCONV2FORMER_FUSED', '0')
    exact, _ = run(model, x.double(), grad.double())
    plain, is_fused = run(cast, x, grad, autocast)
    assert not is_fused
    plain = {k: v.clone() for k, v in plain.items()}
    monkeypatch.delenv('MMCONV2FORMER_FUSED')
    ours, is_fused = run(cast, x, grad, autocast)
    assert is_fused
    return exact, plain, ours


def assert_as_exact(exact, plain, ours):
    for name, true in exact.items():
        own, other = ours[name], plain[name]
        assert (own.dtype, own.shape) == (other.dtype, other.shape), name
        # The sums of thousands are taken in another order.
        noise = 1e-6 * true.abs().max()
        assert (own - true).abs().max() <= 2 * (
            other - true).abs().max() + noise, name


@pytest.mark.usefixtures('kernels')
@pytest.mark.parametrize('n, c, h, w, k', [
    (1, 8, 1, 1, 3), (3, 8, 5, 7, 11), (2, 20, 13, 1, 7), (1, 36, 7, 13, 21),
    (2, 72, 7, 7, 11), (1, 100, 5, 5, 5), (2, 144, 13, 13, 11),
    (2, 8, 56, 56, 11), (1, 8, 17, 56, 13), (2, 20, 2, 2, 9),
])
def test_block_is_as_exact_as_the_plain_one(n, c, h, w, k, monkeypatch):
    torch.manual_seed(c * h * w + k)
    x, grad = random(n, c, h, w).float(), random(n, c, h, w).float()
    assert_as_exact(*three_ways(block(c, k, .5), x, grad, monkeypatch))


@pytest.mark.parametrize('dtype', LOW)
@pytest.mark.parametrize('residual', ['low', 'fp32'])
@pytest.mark.parametrize('n, c, h, w, k', [
    (3, 8, 5, 7, 11), (2, 20, 13, 13, 7), (2, 72, 7, 7, 11), (1, 8, 28, 28, 9),
    (2, 20, 33, 37, 5),
])
def test_block_is_as_exact_under_autocast(n, c, h, w, k, residual, dtype,
                                          device, monkeypatch):
    torch.manual_seed(c * h * w + k)
    model = block(c, k).to(device)
    x, grad = (random(n, c, h, w).to(device, dtype).float() for _ in range(2))
    monkeypatch.setenv('MMCONV2FORMER_FUSED', '0')
    exact, _ = run(model, x.double(), grad.double())
    model = model.float()
    if residual == 'low':
        x = x.to(dtype)
    plain, _ = run(model, x, grad, dtype)
    plain = {k: v.clone() for k, v in plain.items()}
    monkeypatch.delenv('MMCONV2FORMER_FUSED')
    ours, is_fused = run(model, x, grad, dtype)
    assert is_fused
    assert ours['out'].dtype == (dtype if residual == 'low' else torch.float)
    # Norms, not maxima: single values differ by a rounding either way.
    rounding = torch.finfo(dtype).eps / 2
    for name, true in exact.items():
        assert ours[name].dtype == plain[name].dtype, name
        own, other = ((r[name] - true).norm() for r in (ours, plain))
        assert own <= 2 * other + rounding * true.norm(), name


@pytest.mark.usefixtures('kernels')
@pytest.mark.parametrize('dtype', LOW)
@pytest.mark.parametrize('autocast', [True, False])
@pytest.mark.parametrize('emulated', [True, False])
def test_cpus_that_emulate_a_type_compute_in_fp32(emulated, autocast, dtype,
                                                  monkeypatch):
    torch.manual_seed(0)
    model = block(20, 7)
    x, grad = (random(2, 20, 9, 9).to(dtype) for _ in range(2))
    if not autocast:  # weights that the type holds
        model = model.to(dtype).double()
    monkeypatch.setenv('MMCONV2FORMER_FUSED', '0')
    exact, _ = run(model, x.double(), grad.double())
    monkeypatch.delenv('MMCONV2FORMER_FUSED')
    model = model.to(torch.float32 if autocast else dtype)
    products, lines = [], []
    dispatch.log_once.cache_clear()
    monkeypatch.setattr(dispatch, 'print_log',
                        lambda line, **_: lines.append(line))
    product = fused_block.linear

    def linear(x, *weights):
        products.append(x.dtype)
        return product(x, *weights)

    monkeypatch.setattr(fused_block, 'linear', linear)
    monkeypatch.setattr(dispatch, '_is_emulated', lambda _: emulated)
    ours, is_fused = run(model, x, grad, dtype if autocast else None)
    assert is_fused
    assert set(products) == {torch.float32 if emulated else dtype}
    assert ours['out'].dtype == ours['x'].dtype == dtype
    errors = [(ours[n] - true).norm() / true.norm()
              for n, true in exact.items()]
    assert max(errors) < (1 if emulated else 6) * torch.finfo(dtype).eps
    with torch.no_grad(), torch.autocast('cpu', dtype, enabled=autocast):
        assert model(x).dtype == dtype
    dispatch.log_once.cache_clear()
    said = [line for line in lines if f'this CPU emulates {dtype}' in line]
    assert len(said) == emulated


@pytest.mark.usefixtures('kernels')
@pytest.mark.parametrize('samples', [1, 2])
@pytest.mark.parametrize('dtype', [torch.float32, torch.bfloat16])
def test_samples_may_be_processed_in_parts(dtype, samples, monkeypatch):
    torch.manual_seed(0)
    model = block(8, 5, .5).to(dtype)
    x, grad = (random(5, 8, 9, 7, dtype=dtype) for _ in range(2))

    def results(model, x, grad):
        torch.manual_seed(0)  # of drop path
        with torch.no_grad():
            out = model(x)
        found = {**run(model, x, grad)[0], 'without gradients': out}
        return {name: value.clone() for name, value in found.items()}

    whole = results(model, x, grad)
    exact = results(copy.deepcopy(model).double(), x.double(), grad.double())
    monkeypatch.setattr(fused_block, 'PART_BYTES', samples * x[0].nbytes * 4)
    hidden = x.permute(0, 2, 3, 1).repeat(1, 1, 1, 4)
    assert [len(part) for part, in torch_kernels.in_parts(
        hidden[0].nbytes, fused_block.PART_BYTES, hidden)] == {
            1: 5 * [1], 2: [2, 2, 1]}[samples]
    added, foreach_add = [], torch._foreach_add_
    monkeypatch.setattr(torch, '_foreach_add_', lambda sums, others: (
        added.extend(sums + others), foreach_add(sums, others)))
    parts = results(model, x, grad)
    assert added and all(t.dtype == torch.float32 for t in added)
    for name, true in exact.items():
        rounding = torch.finfo(dtype).eps * true.norm()
        assert (parts[name] - true).norm() <= 2 * (
            whole[name] - true).norm() + rounding, name


@pytest.mark.skipif(platform.libc_ver()[0] != 'glibc', reason='needs glibc')
def test_memory_of_a_branch_serves_the_next_one():
    code = """
import resource, torch
from mmconv2former.torch_kernels import in_parts

def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    tensors = [torch.ones(2**23, dtype=torch.uint8) for _ in range(5)]
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

in_parts(1, 1, torch.zeros(1))
print(min(faults() for _ in range(5)))
"""
    environment = {name: value for name, value in os.environ.items()
                   if not name.startswith(('MALLOC_', 'GLIBC_TUNABLES'))}
    process = subprocess.run([sys.executable, '-c', code], text=True,
                             env=environment, capture_output=True)
    assert process.returncode == 0, process.stderr
    assert int(process.stdout) < 100  # of 10,240 pages


@pytest.mark.usefixtures('kernels')
@pytest.mark.parametrize('by_onednn', [True, False])
@pytest.mark.parametrize('dtype', [torch.float32, *LOW])
@pytest.mark.parametrize('rate', [0., .5])
@pytest.mark.parametrize('n, c, h, w, k', [
    (2, 8, 5, 7, 11), (1, 20, 13, 13, 7), (2, 72, 14, 14, 11), (1, 8, 1, 1, 3),
])
def test_block_computes_the_same_without_gradients(n, c, h, w, k, rate, dtype,
                                                   by_onednn,
                                                   monkeypatch):
    if not by_onednn:
        monkeypatch.setattr(fused_block, 'onednn_takes',
                            lambda *args: False)
    torch.manual_seed(c * h * w + k)
    model = block(c, k, rate)
    x = random(n, c, h, w).to(dtype).float()

    def forward(model, x, autocast=None):
        torch.manual_seed(0)  # of drop path
        with torch.no_grad(), torch.autocast(
                'cpu', autocast, enabled=autocast is not None):
            return model(x)

    monkeypatch.setenv('MMCONV2FORMER_FUSED', '0')
    exact = forward(model, x.double())
    low = None if dtype == torch.float32 else dtype
    plain = forward(model.float(), x, low)
    monkeypatch.delenv('MMCONV2FORMER_FUSED')
    before = x.clone()
    ours = forward(model, x, low)
    assert torch.equal(x, before)
    assert ours.dtype == plain.dtype
    rounding = torch.finfo(dtype).eps / 2
    assert (ours - exact).norm() <= 2 * (
        plain - exact).norm() + rounding * exact.norm()


@pytest.mark.usefixtures('kernels')
@pytest.mark.parametrize('is_fused', [True, False])
def test_norms_sum_their_gradients_over_large_maps_in_fp32(is_fused):
    torch.manual_seed(0)
    model = block(8, 3, fused=is_fused)
    x, grad = (random(1, 8, 200, 200).bfloat16() for _ in range(2))
    exact, _ = run(model, x.double(), grad.double())
    exact = {k: v.clone() for k, v in exact.items()}
    ours, _ = run(model.float(), x, grad, torch.bfloat16)
    for name in ('attn.norm.weight', 'attn.norm.bias', 'mlp.norm.weight',
                 'mlp.norm.bias'):
        error = (ours[name] - exact[name]).norm() / exact[name].norm()
        assert error < .03, name


@pytest.mark.parametrize('dtype', [torch.float32, torch.bfloat16])
@pytest.mark.parametrize('n, c, h, w, k', [
    (3, 8, 56, 56, 11), (1, 20, 13, 13, 11), (4, 8, 5, 7, 11),
    (3, 8, 1, 1, 11), (2, 20, 1, 13, 7), (5, 8, 2, 2, 7), (2, 72, 13, 5, 5),
    (2, 8, 56, 13, 21), (1, 8, 7, 7, 21), (2, 8, 16, 9, 15),
    (2, 8, 30, 30, 13), (2, 8, 9, 9, 3), (5, 8, 1, 1, 7), (5, 8, 1, 2, 11),
])
def test_depthwise_weight_gradient_is_as_exact_as_torchs(
        n, c, h, w, k, dtype):
    torch.manual_seed(h * w + k)
    x, grad = (random(n, h, w, c, dtype=dtype) for _ in range(2))

    def torchs(x, grad):
        weight = torch.zeros(
            c, 1, k, k, dtype=x.dtype, requires_grad=True)
        out = F.conv2d(x.permute(0, 3, 1, 2), weight, padding=k // 2, groups=c)
        out.backward(grad.permute(0, 3, 1, 2))
        return weight.grad

    exact = torchs(x.double(), grad.double())
    ours = depthwise.depthwise_grad_weight(grad, x, k)
    assert ours.dtype == torch.float32
    error = (torchs(x, grad) - exact).abs().max()
    noise = 1e-6 * exact.abs().max()
    assert (ours - exact).abs().max() <= 2 * error + noise


@pytest.mark.parametrize('dtype', [torch.float32, torch.bfloat16])
@pytest.mark.parametrize('n, h, w', [(1, 9, 8), (2, 20, 20), (2, 50, 48)])
@pytest.mark.parametrize('outs, ins', [(24, 10), (10, 10), (10, 24)])
@pytest.mark.parametrize('mkl_is_fast', [True, False])
def test_gradients_of_linear_layers_are_as_exact_as_torchs(
        mkl_is_fast, outs, ins, n, h, w, dtype, monkeypatch):
    monkeypatch.setattr(products, '_mkl_is_fast', lambda: mkl_is_fast)
    torch.manual_seed(h * outs)
    grad, x = random(n, h, w, outs).to(dtype), random(n, h, w, ins).to(dtype)
    weight = random(outs, ins).to(dtype)
    found = (*products.linear_grad_params(grad, x),
             products.linear_grad_input(grad, weight))

    def by_torch(grad, x, weight):
        grad, x = grad.flatten(0, 2), x.flatten(0, 2)
        return grad.t() @ x, grad.sum(0), (grad @ weight).view(n, h, w, ins)

    exact = by_torch(grad.double(), x.double(), weight.double())
    for ours, plain, truth in zip(found, by_torch(grad, x, weight), exact):
        assert ours.shape == truth.shape and ours.is_contiguous()
        rounding = torch.finfo(dtype).eps / 2 * truth.norm()
        assert (ours - truth).norm() <= 2 * (plain - truth).norm() + rounding


@pytest.mark.parametrize('keep', [None, [0., 2.]])
@pytest.mark.parametrize('mlp_keep', [None, [2., 0.]])
def test_gradients_in_double_precision(keep, mlp_keep):
    torch.manual_seed(0)
    c, hidden, k = 2, 3, 5
    keep, mlp_keep = (
        None if factors is None else torch.tensor(factors).double().view(
            2, 1, 1, 1) for factors in (keep, mlp_keep))
    shapes = [*[(c, )] * 3, *[(c, c), (c, )] * 2, (c, 1, k, k), (c, ),
              (c, c, 1, 1), (c, )]
    mlp_shapes = [*[(c, )] * 3, (hidden, c), (hidden, ), (hidden, 1, 3, 3),
                  (hidden, ), (c, hidden, 1, 1), (c, )]
    inputs = [random(*shape) for shape in ((2, 3, 4, c), *shapes, *mlp_shapes)]

    def both(x, *parameters):
        return fused_block.BlockFunction.apply(
            x, keep, mlp_keep, (1e-6, 1e-3), len(shapes), *parameters)

    assert torch.autograd.gradcheck(
        both, [t.requires_grad_() for t in inputs])


def test_plain_path_has_second_derivatives_and_the_fused_one_says_so():
    torch.manual_seed(0)
    x = random(1, 2, 3, 3).requires_grad_()
    model = block(2, 3)
    with pytest.raises(RuntimeError, match='MMCONV2FORMER_FUSED=0'):
        torch.autograd.grad(
            model(x).pow(2).sum(), x, create_graph=True)
    plain = block(2, 3, fused=False)
    assert torch.autograd.gradcheck(plain, x)
    assert torch.autograd.gradgradcheck(plain, x)


@pytest.mark.parametrize('dtype', [None, torch.bfloat16])
def test_recomputed_blocks_and_changed_weights_give_the_same_bits(dtype,
                                                                  device):
    torch.manual_seed(0)
    kept, again = (block(20, 7, with_cp=with_cp).float().to(device)
                   for with_cp in (False, True))
    again.load_state_dict(kept.state_dict())
    x, grad = (random(2, 20, 9, 9).float().to(device) for _ in range(2))
    results = []
    for _ in range(2):
        first, _ = run(kept, x, grad, dtype)
        second, _ = run(again, x, grad, dtype)
        for name, value in first.items():
            assert torch.equal(value, second[name]), name
        results.append(first['out'])
        with torch.no_grad():
            for model in (kept, again):
                model.attn.att[2].weight.mul_(-2)
    assert not torch.equal(*results)


@pytest.mark.parametrize('fused', [True, False])
@pytest.mark.parametrize('name', ['attn.proj', 'mlp.fc1', 'mlp.fc2'])
def test_changes_before_the_backward_pass_are_told_as_ever(name, fused):
    model = block(20, 7, fused=fused).float()
    out = model(random(2, 20, 9, 9).float())
    with torch.no_grad():
        model.get_submodule(name).weight.add_(1)
    with pytest.raises(RuntimeError, match='modified by an inplace operation'):
        out.sum().backward()


def test_changes_of_a_downsampling_are_told_as_ever():
    layers = [operators.LayerNorm2d(8), torch.nn.Conv2d(8, 12, 2, stride=2)]
    # So is what the kernels take a view.
    layers[1].to(memory_format=torch.channels_last)
    out = fused_downsampling.downsampling(random(2, 8, 8, 8).float(), *layers)
    with torch.no_grad():
        layers[1].weight.add_(1)
    with pytest.raises(RuntimeError, match='modified by an inplace operation'):
        out.sum().backward()


@pytest.mark.parametrize('fused', [True, False])
def test_output_may_be_changed_in_place(fused):
    """As by a neck that begins with ReLU(inplace=True)."""
    model = block(20, 7, fused=fused).float()
    x, grad = (random(2, 20, 9, 9).float() for _ in range(2))
    parameters = list(model.parameters())
    found, expected = (
        torch.autograd.grad(F.relu(model(x), inplace=inplace), parameters,
                            grad) for inplace in (True, False))
    assert all(map(torch.equal, found, expected))


@pytest.mark.usefixtures('kernels')
@pytest.mark.parametrize('dtype', LOW)
def test_weights_in_low_precision_train_as_exactly(dtype, monkeypatch):
    torch.manual_seed(0)
    model = block(20, 7)
    x, grad = (random(2, 20, 9, 9).to(dtype) for _ in range(2))
    monkeypatch.setenv('MMCONV2FORMER_FUSED', '0')
    exact, _ = run(model.to(dtype).double(), x.double(), grad.double())
    plain, _ = run(model.to(dtype), x, grad)
    plain = {k: v.clone() for k, v in plain.items()}
    monkeypatch.delenv('MMCONV2FORMER_FUSED')
    ours, is_fused = run(model, x, grad)
    assert is_fused
    rounding = torch.finfo(dtype).eps / 2
    for name, true in exact.items():
        assert ours[name].dtype == plain[name].dtype == dtype, name
        own, other = ((r[name] - true).norm() for r in (ours, plain))
        assert own <= 2 * other + rounding * true.norm(), name


@pytest.mark.usefixtures('kernels')
def test_two_runs_give_the_same_bits():
    torch.manual_seed(0)
    model = block(20, 11, .5).float()
    x, grad = random(2, 20, 9, 9).float(), random(2, 20, 9, 9).float()
    first, second = ({k: v.clone() for k, v in run(model, x, grad)[0].items()}
                     for _ in range(2))
    for name, value in first.items():
        assert torch.equal(value, second[name]), name


def test_frozen_blocks_pass_gradients_on():
    torch.manual_seed(0)
    model = block(8, 5).float().requires_grad_(False)
    x = random(1, 8, 9, 9).float().requires_grad_()
    model(x).sum().backward()
    assert x.grad is not None
    assert all(p.grad is None for p in model.parameters())


def test_empty_batches_have_gradients():
    model = block(8, 5).float()
    x = torch.zeros(0, 8, 9, 9).requires_grad_()
    model(x).sum().backward()
    assert x.grad.shape == x.shape
    assert not model.mlp.pos.weight.grad.any()


@pytest.mark.usefixtures('kernels')
def test_less_is_kept_for_the_backward_pass(monkeypatch):
    model = block(16, 11).float()
    x = random(2, 16, 20, 20).float().requires_grad_()

    def kept():
        sizes = {}

        def pack(t):
            sizes[t.untyped_storage().data_ptr()] = t.untyped_storage(
            ).nbytes() // 4
            return t

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
            out = model(x)
        assert out.requires_grad
        own = {p.untyped_storage().data_ptr() for p in model.parameters()}
        return sum(v for k, v in sizes.items() if k not in own) / x.numel()

    ours = kept()
    monkeypatch.setenv('MMCONV2FORMER_FUSED', '0')
    assert 9 <= ours < 10 and kept() > 20


@pytest.mark.usefixtures('kernels')
@pytest.mark.parametrize('memory_format', [
    torch.contiguous_format, torch.channels_last, 'strided'])
def test_any_layout_of_the_input_will_do(memory_format, monkeypatch):
    torch.manual_seed(0)
    model = block(8, 5).float()
    x = random(2, 8, 9, 12).float()
    if memory_format == 'strided':
        y = x.repeat_interleave(2, 3)[..., ::2]
    else:
        y = x.contiguous(memory_format=memory_format)
    out = model(y)
    assert out.is_contiguous(memory_format=torch.channels_last)
    monkeypatch.setenv('MMCONV2FORMER_FUSED', '0')
    torch.testing.assert_close(out, model(x), rtol=1e-5, atol=1e-5)


def takes_fused(model):
    return came_from_fused_path(model(torch.randn(1, 3, 32, 32))[0])


TINY = dict(depths=[1], dims=[8], kernel_size=5)


def test_fused_operators_are_taken_unless_something_is_in_the_way(monkeypatch):
    assert takes_fused(Conv2Former(TINY))
    assert not takes_fused(Conv2Former(TINY, fused=False))
    assert not takes_fused(Conv2Former(TINY, fusion='sum'))

    hooked = Conv2Former(TINY)
    handle = hooked.stages[0][0].mlp.fc1.register_forward_hook(
        lambda *_: None)
    assert not takes_fused(hooked)
    handle.remove()
    assert takes_fused(hooked)

    class Adapter(nn.Module):

        def __init__(self, layer):
            super().__init__()
            self.layer = layer

        def forward(self, x):
            return self.layer(x) + 1

    adapted = Conv2Former(TINY)
    adapted.stages[0][0].attn.v = Adapter(adapted.stages[0][0].attn.v)
    assert not takes_fused(adapted)

    for change in (
            lambda block: block.attn.att.__setitem__(1, nn.ReLU()),
            lambda block: setattr(block.mlp, 'fc1', nn.Conv2d(
                8, 32, 1, bias=False)),
            lambda block: setattr(block.mlp, 'fc2', nn.Conv2d(
                32, 8, 3, padding=1)),
            lambda block: setattr(block.mlp, 'pos', nn.Conv2d(
                32, 32, 3, padding=2, dilation=2, groups=32)),
            lambda block: setattr(block.mlp, 'norm', operators.LayerNorm2d(
                8, affine=False))):
        other = Conv2Former(TINY)
        change(other.stages[0][0])
        assert not takes_fused(other)

    monkeypatch.setenv('MMCONV2FORMER_FUSED', '0')
    assert not takes_fused(Conv2Former(TINY))


def test_plain_path_calls_every_layer():
    model = Conv2Former(TINY)
    modules = list(model.stages[0][0].modules())
    called = []
    for module in modules:
        module.register_forward_hook(lambda m, *_: called.append(m))
    model(torch.randn(1, 3, 32, 32))
    assert {id(m) for m in called} == {id(m) for m in modules}


@pytest.mark.parametrize('register', [
    lambda module, call: module.register_forward_hook(call),
    # As mmengine's activation checkpointing does.
    lambda module, call: setattr(module, 'forward', functools.partial(
        lambda forward, x: (call(), forward(x))[1], module.forward))])
@pytest.mark.parametrize('name', [
    'attn', 'attn.norm', 'attn.att', 'attn.att.1', 'attn.proj', 'mlp',
    'mlp.pos', 'drop_path'])
def test_hooks_of_every_module_of_a_block_are_called(name, register):
    model, x = Conv2Former(TINY), torch.randn(1, 3, 32, 32)
    model(x)
    called = []
    register(model.stages[0][0].get_submodule(name),
             lambda *_: called.append(1))
    model(x)
    assert set(called) == {1}


@pytest.mark.parametrize('kind', [
    ConvModulation, MLP, operators.DropPath, operators.Pointwise,
    operators.LayerNorm2d, nn.Conv2d, nn.GELU, nn.BatchNorm2d])
def test_a_forward_that_a_class_gets_later_is_called(kind, monkeypatch):
    model = Conv2Former(dict(depths=[1, 1], dims=[8, 16], kernel_size=5))
    called, forward = set(), kind.forward
    monkeypatch.setattr(kind, 'forward', lambda self, x: (
        called.add(self), forward(self, x))[1])
    model(torch.randn(1, 3, 32, 32))
    assert called == {m for m in model.modules() if type(m) is kind}


@pytest.mark.parametrize('index', [0, 1])
def test_replaced_forward_of_a_downsampling_is_called(index):
    model = Conv2Former(dict(depths=[1, 1], dims=[8, 16], kernel_size=5))
    called = []
    layer = model.downsample_layers[1][index]
    layer.forward = lambda x, own=layer.forward: (called.append(1), own(x))[1]
    model(torch.randn(1, 3, 32, 32))
    assert called == [1]


def test_hooks_of_all_modules_are_called_for_each():
    model = Conv2Former(TINY)
    called = []
    handle = nn.modules.module.register_module_forward_hook(
        lambda module, *_: called.append(module))
    try:
        model(torch.randn(1, 3, 32, 32))
    finally:
        handle.remove()
    assert {id(m) for m in called} == {
        id(m) for m in model.modules() if not isinstance(m, nn.ModuleList)}


@pytest.mark.parametrize('kind', [
    'forward_pre_hook', 'full_backward_hook', 'full_backward_pre_hook'])
def test_other_hooks_of_all_modules_are_called(kind):
    model, called = Conv2Former(TINY), set()
    handle = getattr(nn.modules.module, f'register_module_{kind}')(
        lambda module, *_: called.add(module))
    try:
        model(torch.randn(1, 3, 32, 32))[0].sum().backward()
    finally:
        handle.remove()
    assert {model.stages[0][0].attn.v, model.stages[0][0].mlp.fc1} <= called


@pytest.mark.parametrize('change', [
    lambda block: setattr(block, 'layer_scale_1',
                          nn.Parameter(torch.ones(1))),
    lambda block: setattr(block.mlp, 'pos', nn.Conv2d(
        32, 32, 23, padding=11, groups=32)),
    lambda block: block.attn.att.__setitem__(2, operators.Pointwise(8, 8)),
    lambda block: block.attn.att.__setitem__(1, operators.LayerNorm2d(8)),
    lambda block: setattr(block.attn, 'v', nn.Conv2d(8, 8, 3, padding=1,
                                                     groups=8)),
    lambda block: setattr(block.mlp, 'fc1', nn.Conv2d(8, 32, 1)),
    lambda block: setattr(block.attn, 'fusion', 'sum')])
def test_blocks_changed_in_ways_that_work_compute_the_same(change,
                                                           monkeypatch):
    torch.manual_seed(0)
    model, x = block(8, 5).float(), torch.randn(2, 8, 6, 7)
    assert came_from_fused_path(model(x))
    change(model)
    out = model(x)
    assert not came_from_fused_path(out)
    monkeypatch.setenv('MMCONV2FORMER_FUSED', '0')
    assert torch.equal(out, model(x))


@pytest.mark.parametrize('change, error', [
    (lambda block: setattr(block.attn, 'norm', operators.LayerNorm2d(4)),
     'normalized_shape'),
    (lambda block: block.attn.att.__setitem__(2, nn.Conv2d(
        8, 8, 4, padding=2, groups=8)), 'size of tensor'),
    (lambda block: setattr(block.mlp.fc1, 'bias', nn.Parameter(
        torch.ones(31))), 'expected bias')])
def test_layers_that_do_not_fit_are_errors_of_torch(change, error):
    model, x = block(8, 5).float(), torch.randn(2, 8, 6, 7)
    model(x)
    change(model)
    with pytest.raises(RuntimeError, match=error):
        model(x)


@pytest.mark.parametrize('name', ['attn.att.2', 'mlp.pos'])
@pytest.mark.parametrize('option, value', [
    ('stride', (2, 2)), ('dilation', (2, 2)), ('padding', (0, 0)),
    ('groups', 1), ('padding_mode', 'reflect'), ('bias', None)])
def test_depthwise_convolutions_of_other_options_are_recognised(name, option,
                                                                value):
    model = block(8, 5)
    assert model.modified(8, torch.device('cpu')) is None
    layer = model.get_submodule(name)
    setattr(layer, option, value)
    assert model.modified(8, torch.device('cpu')) is layer


def test_gelu_of_tanh_is_recognised():
    model = block(8, 5)
    assert model.modified(8, torch.device('cpu')) is None
    model.attn.att[1].approximate = 'tanh'
    assert model.modified(8, torch.device('cpu')) is model.attn.att[1]


def test_further_layers_of_a_branch_are_recognised():
    model = block(8, 5)
    assert model.modified(8, torch.device('cpu')) is None
    model.attn.att.append(nn.Identity())
    assert model.modified(8, torch.device('cpu')) is model.attn.att


def test_weights_cut_in_place_are_recognised():
    model = block(8, 5)
    assert model.modified(8, torch.device('cpu')) is None
    model.mlp.fc2.weight.data = model.mlp.fc2.weight.data[:4]
    assert model.modified(8, torch.device('cpu')) is model.mlp.fc2
    model = block(8, 5)
    assert model.modified(8, torch.device('cpu')) is None
    assert model.modified(4, torch.device('cpu')) is model.attn.norm
    assert model.modified(8, torch.device('meta')) is model.attn.norm


@pytest.mark.parametrize('capability, has_bf16, has_fp16, emulated', [
    ('AVX2', False, False, {torch.bfloat16, torch.float16}),
    ('AVX512', True, False, {torch.float16}),
    ('AVX512', False, True, {torch.bfloat16}),
    ('DEFAULT', False, False, set())])
def test_types_that_cpus_emulate(capability, has_bf16, has_fp16, emulated,
                                 monkeypatch):
    monkeypatch.setattr(torch.backends.cpu, 'get_cpu_capability',
                        lambda: capability)
    monkeypatch.setattr(torch.cpu, '_is_avx512_bf16_supported',
                        lambda: has_bf16)
    monkeypatch.setattr(torch.cpu, '_is_amx_tile_supported', lambda: False)
    monkeypatch.setattr(torch.ops.mkldnn, '_is_mkldnn_fp16_supported',
                        lambda: has_fp16)
    assert {dtype for dtype in DTYPES
            if dispatch._is_emulated.__wrapped__(dtype)} == emulated


def test_forward_mode_takes_the_plain_path():
    torch.manual_seed(0)
    model, x, tangent = block(8, 5), random(1, 8, 4, 4), random(1, 8, 4, 4)
    with fwAD.dual_level():
        out = fwAD.unpack_dual(model(fwAD.make_dual(x, tangent))).tangent
    step = 1e-6 * tangent
    torch.testing.assert_close(
        out, (model(x + step) - model(x - step)) / 2e-6, rtol=1e-4, atol=1e-4)


def test_weights_of_a_functional_call_are_fused():
    torch.manual_seed(0)
    model, x = block(8, 5), random(2, 8, 6, 7)
    weights = {k: random(*p.shape) for k, p in model.named_parameters()}
    out = torch.func.functional_call(model, weights, x)
    model.load_state_dict(weights)
    expected = model(x)
    assert came_from_fused_path(expected) and torch.equal(out, expected)


@pytest.mark.usefixtures('kernels')
@pytest.mark.parametrize('names', [
    ['attn'], ['mlp'], ['layer_scale_1'], ['layer_scale_2'], ['attn.norm'],
    ['mlp.norm'], ['attn.v.bias', 'mlp.pos.weight']])
def test_parts_of_a_block_learn_where_the_rest_is_frozen(names):
    torch.manual_seed(0)
    model = block(8, 5)
    x, grad = random(2, 8, 6, 7), random(2, 8, 6, 7)
    expected = dict(zip(dict(model.named_parameters()), torch.autograd.grad(
        model(x), list(model.parameters()), grad)))
    for name, p in model.named_parameters():
        p.requires_grad_(any(name.startswith(part) for part in names))
    out = model(x)
    assert came_from_fused_path(out)
    out.backward(grad)
    assert any(p.requires_grad for p in model.parameters())
    for name, p in model.named_parameters():
        if p.requires_grad:
            torch.testing.assert_close(p.grad, expected[name])
        else:
            assert p.grad is None


def test_parameters_on_another_device_are_not_read():
    model, x = block(8, 5).float(), torch.randn(2, 8, 6, 7)
    for name, p in list(model.named_parameters()):
        module, _, key = name.rpartition('.')
        module = model.get_submodule(module)
        setattr(module, key, nn.Parameter(p.to('meta')))
        assert model.modified(8, x.device) is module, name
        setattr(module, key, p)
    assert came_from_fused_path(model(x))
    model.mlp.norm.to('meta')
    with pytest.raises(RuntimeError, match='device'):
        model(x)


def test_weights_that_are_tensors_of_other_classes_take_the_plain_path():
    model = block(8, 5).float()
    expected = model(torch.ones(2, 8, 6, 7))
    for layer in model.mlp.pos, model.attn.norm:
        layer.weight = nn.Parameter(TwoTensor(*[layer.weight.detach()] * 2))
    out = model(torch.ones(2, 8, 6, 7))
    assert not came_from_fused_path(out)
    torch.testing.assert_close(out.a, expected)


def test_inputs_of_other_classes_are_not_read_by_the_kernels():
    torch.manual_seed(0)
    model, x = block(8, 5).float(), torch.randn(2, 8, 6, 7)
    with torch.no_grad():
        torch.testing.assert_close(model(TwoTensor(x, x.clone())).a, model(x))


@pytest.mark.parametrize('train', [True, False])
def test_parameters_may_have_strides(train, monkeypatch):
    torch.manual_seed(0)
    model = Conv2Former(dict(depths=[1, 1], dims=[8, 16], kernel_size=5),
                        layer_scale_init_value=1.)
    model.load_state_dict({
        k: (torch.randn(*v.shape, 2) * .1)[..., 0]
        for k, v in model.named_parameters()}, assign=True, strict=False)
    assert not model.stages[0][0].mlp.fc1.bias.is_contiguous()
    model.eval().requires_grad_(train)
    x = torch.randn(2, 3, 32, 32)
    out, = model(x)
    assert came_from_fused_path(out) == train
    monkeypatch.setenv('MMCONV2FORMER_FUSED', '0')
    torch.testing.assert_close(out, model(x)[0], rtol=1e-4, atol=1e-4)


def test_narrower_branches_are_fused(monkeypatch):
    torch.manual_seed(0)
    model = block(8, 5)
    attn = model.attn
    attn.att[0], attn.v = (operators.Pointwise(8, 6) for _ in range(2))
    attn.att[2] = nn.Conv2d(6, 6, 5, padding=2, groups=6)
    attn.proj = operators.Pointwise(6, 8)
    model.double()
    x = random(2, 8, 6, 7)
    out = model(x)
    assert came_from_fused_path(out)
    monkeypatch.setenv('MMCONV2FORMER_FUSED', '0')
    torch.testing.assert_close(out, model(x))


def test_frozen_blocks_store_nothing():
    torch.manual_seed(0)
    model = Conv2Former(TINY, frozen_stages=1).double()
    own = model.stages[0][0]
    x = random(2, 8, 6, 7)
    out = own(x)
    assert out.grad_fn is None
    torch.testing.assert_close(
        out, copy.deepcopy(own).requires_grad_(True)(x).detach())
    assert own(x.requires_grad_()).grad_fn is not None


@pytest.mark.parametrize('autocast', [True, False])
@pytest.mark.parametrize('train', [True, False])
def test_feature_maps_have_the_type_asked_for_where_cpus_emulate_it(
        train, autocast, monkeypatch):
    monkeypatch.setattr(dispatch, '_is_emulated', lambda _: True)
    model = Conv2Former(dict(depths=[1, 1], dims=[8, 16], kernel_size=5),
                        out_indices=(0, 1)).train(train)
    x = torch.randn(2, 3, 32, 32)
    if not autocast:
        model, x = model.bfloat16(), x.bfloat16()
    with torch.set_grad_enabled(train), \
            torch.autocast('cpu', torch.bfloat16, enabled=autocast):
        outs = model(x)
    assert {out.dtype for out in outs} == {torch.bfloat16}


def test_branches_of_other_classes_are_called():

    class Other(MLP):

        def forward(self, x):
            return 0 * super().forward(x)

    model = Conv2Former(TINY)
    assert takes_fused(model)
    block = model.stages[0][0]
    block.mlp = Other(8, 4.)
    assert not takes_fused(model)
    assert block.modified(8, torch.device('cpu')) is block.mlp


@pytest.mark.parametrize('train', [True, False])
def test_kernels_run_on_the_device_of_their_operands(train, monkeypatch):
    """With autocast off, in the context that makes the device current."""
    inside, called = [], set()

    class Context(dispatch._WithoutAutocast):

        def __enter__(self):
            inside.append(1)
            super().__enter__()

        def __exit__(self, *args):
            inside.pop()
            super().__exit__(*args)

    class Kernels:

        def __getattr__(self, name):
            assert inside, name
            called.add(name)
            return getattr(torch_kernels, name)

    monkeypatch.setattr(dispatch, '_WithoutAutocast', Context)
    monkeypatch.setattr(dispatch, 'kernels_for', lambda _: Kernels())
    monkeypatch.setattr(fused_block, 'onednn_takes', lambda *_: False)
    model = Conv2Former(dict(depths=[1, 1], dims=[8, 16], kernel_size=5),
                        drop_path_rate=.5).train(train)
    with torch.set_grad_enabled(train):
        out, = model(torch.randn(2, 3, 32, 32))
        if train:
            out.sum().backward()
    assert called == {
        'operands', 'layer_norm', 'scale_residual', 'scale_residual_norm'} | (
            {'gate_forward', 'gate_backward', 'position', 'position_backward',
             'scale_residual_backward', 'scale_residual_norm_backward',
             'layer_norm_backward', 'scaled_linear_backward', 'deferred_sums'}
            if train else {'gate', 'position'})


@pytest.mark.parametrize('current', [0, 1])
def test_current_device_is_left_as_it_was(current, monkeypatch):
    """By torch's context, which leaves GPUs alone that are not in use."""
    steps = []

    @contextlib.contextmanager
    def context(device):
        steps.append(device.index)
        yield
        steps.append('back')

    monkeypatch.setattr(torch.cuda, 'current_device', lambda: current)
    monkeypatch.setattr(torch.cuda, 'device', context)
    x = SimpleNamespace(device=torch.device('cuda', 1))
    with dispatch.without_autocast(x):
        assert steps == [1] * (current != 1)
    assert steps == [1, 'back'] * (current != 1)


@pytest.mark.skipif(not products._MM_IN_FP32,
                    reason='torch has no such products')
@pytest.mark.parametrize('dtype, in_16_bits, expected', [
    (torch.bfloat16, False, torch.float32), (torch.float16, False,
                                             torch.float32),
    (torch.bfloat16, True, torch.float32), (torch.float16, True,
                                            torch.float16)])
def test_weight_gradients_are_in_fp32_where_torch_has_that(
        dtype, in_16_bits, expected):
    matmul = torch.backends.cuda.matmul
    before = matmul.allow_fp16_accumulation
    with FakeTensorMode():
        grad, x = (torch.empty(1, 2, 3, c, device='cuda', dtype=dtype)
                   for c in (8, 16))
        matmul.allow_fp16_accumulation = in_16_bits
        try:
            found = products.linear_grad_weight(grad, x)
        finally:
            matmul.allow_fp16_accumulation = before
    assert found.dtype == expected


def test_transforms_of_torch_get_the_plain_path():
    model = Conv2Former(TINY).double().eval()
    x = torch.randn(1, 3, 32, 32).double()
    grad = torch.func.grad(lambda x: model(x)[0].square().sum())(x)
    x.requires_grad_()
    true, = torch.autograd.grad(model(x)[0].square().sum(), x)
    torch.testing.assert_close(grad, true)
    out, = model(x)
    with pytest.raises(RuntimeError, match='no batches of gradients'):
        torch.autograd.grad(out, x, torch.ones(2, *out.shape).to(out),
                            is_grads_batched=True)


@pytest.mark.parametrize('fused', [True, False])
@pytest.mark.parametrize('dtype', [torch.double, torch.bfloat16])
def test_residual_in_fp32_is_for_autocast(fused, dtype):
    model = Conv2Former(TINY, residual_in_fp32=True, out_norm=True,
                        fused=fused).to(dtype)
    for mode in True, False:
        out, = model.train(mode)(torch.randn(1, 3, 32, 32, dtype=dtype))
        assert out.dtype == dtype
        with torch.no_grad():
            assert model(torch.ones(1, 3, 32, 32, dtype=dtype)
                         )[0].dtype == dtype


def test_threads_may_need_the_kernels_at_the_same_time():
    pytest.importorskip('triton')
    code = """
from concurrent.futures import ThreadPoolExecutor
from threading import Barrier
from mmconv2former import dispatch, triton_kernels
barrier = Barrier(4)
def make(_):
    barrier.wait()
    return dispatch._make_triton_operators.__wrapped__()
with ThreadPoolExecutor(4) as pool:
    print(list(pool.map(make, range(4))))
"""
    done = subprocess.run([sys.executable, '-c', code], capture_output=True,
                          text=True)
    assert done.stdout == "['', '', '', '']\n", done.stderr


def test_double_precision_trains_under_autocast():
    torch.manual_seed(0)
    model = block(8, 5)
    x = random(2, 8, 6, 7)
    out = model(x)
    with torch.autocast('cpu', torch.bfloat16):
        again = model(x)
    assert again.dtype == torch.double and torch.equal(out, again)
    again.sum().backward()
    assert all(p.grad is not None for p in model.parameters())


def test_log_says_once_which_path_runs_and_why(monkeypatch):
    lines = []
    monkeypatch.setattr(dispatch, 'print_log',
                        lambda text, **_: lines.append(text))
    monkeypatch.setattr(dispatch, '_cpp_obstacle', lambda: 'there is no C++')
    dispatch.log_once.cache_clear()
    x = torch.randn(2, 3, 32, 32)
    model = Conv2Former(TINY)
    for _ in range(2):
        model(x)
    monkeypatch.setenv('MMCONV2FORMER_FUSED', '0')
    model(x)
    dispatch.log_once.cache_clear()
    assert lines == [
        'Conv2Former: fused operators of torch alone, because there is no C++',
        'Conv2Former: plain operators, because MMCONV2FORMER_FUSED=0'
    ]


@pytest.mark.parametrize('value', ['false', 'off', '2'])
def test_unknown_value_of_the_switch_is_an_error(value, monkeypatch):
    monkeypatch.setenv('MMCONV2FORMER_FUSED', value)
    with pytest.raises(ValueError,
                       match=f"MMCONV2FORMER_FUSED must be 0 or 1.*'{value}'"):
        Conv2Former(TINY)(torch.randn(1, 3, 32, 32))


@pytest.mark.parametrize('switch', ['0', '1'])
def test_compiled_backbone_trains_alike(switch, monkeypatch):
    monkeypatch.setenv('MMCONV2FORMER_FUSED', switch)
    torch.manual_seed(0)
    eager = Conv2Former(TINY)
    # The tracing is what can fail; code for the CPU takes a minute to build.
    compiled = Conv2Former(
        TINY, compile=dict(backend='aot_eager', fullgraph=True))
    compiled.load_state_dict(eager.state_dict(), strict=True)
    x = torch.randn(2, 3, 32, 32)

    def step(model):
        out = model(x)[0]
        out.pow(2).mean().backward()
        return [out, *(p.grad for p in model.parameters())]

    torch._dynamo.utils.counters.clear()
    for own, other in zip(step(compiled), step(eager), strict=True):
        torch.testing.assert_close(own, other, rtol=1e-4, atol=1e-6)
    assert torch._dynamo.utils.counters['stats']['unique_graphs'] == 1
    with torch.no_grad():
        for own, other in zip(compiled(x), eager(x), strict=True):
            torch.testing.assert_close(own, other, rtol=1e-4, atol=1e-6)


@pytest.fixture
def triton_on_cpu(monkeypatch):
    """The operators of the Triton kernels, computed by plain functions."""
    pytest.importorskip('triton')
    assert dispatch._make_triton_operators() == ''
    torch._dynamo.reset()  # it compiles a function so many times only

    def compute(name, *inputs):
        # Which plain functions overwrite.
        inputs = tree_map_only(torch.Tensor, torch.clone, inputs)
        outs = getattr(torch_kernels, name)(*inputs)
        if not isinstance(outs, tuple) or name == 'scaled_linear_backward':
            return outs
        if name in ('gate_backward', 'position_backward'):
            return *outs[:-1], outs[0].sum((0, 1, 2))
        if name == 'scale_residual_backward':
            return *outs[:2], (outs[0] if outs[0].numel() else inputs[0]).sum(
                (0, 1, 2))
        none = inputs[0].new_empty(0)
        if name == 'scale_residual_norm_backward':
            own = outs[5] if outs[5].numel() else outs[0]
            total = own.sum((0, 1, 2)) \
                if outs[5].numel() + outs[6].numel() else none
            residual = inputs[5].sum((0, 1, 2)) if inputs[9] else none
            return *outs[:4], residual, *outs[5:7], total
        if name == 'layer_norm_backward':
            return *outs[:4], inputs[5].sum(
                (0, 1, 2)) if inputs[7:] == (True, ) else none
        return outs

    def kernels(x):
        obstacle = dispatch.triton_obstacle(x.device)
        return dispatch.TRITON if not obstacle else torch_kernels

    monkeypatch.setattr(dispatch, 'kernels_for', kernels)
    monkeypatch.setattr(dispatch, '_try_triton', functools.cache(lambda _: ''))
    with torch.library._scoped_library('mmconv2former', 'IMPL') as library:
        for name in fake_kernels.KERNELS:
            library.impl(name, functools.partial(compute, name), 'CPU')
        yield


@pytest.mark.parametrize('rate', [0., .5])
def test_scale_in_the_weight_changes_nothing(rate, monkeypatch):
    torch.manual_seed(0)
    model = block(8, 5, rate).double()
    x, grad = random(3, 8, 5, 7), random(3, 8, 5, 7)

    def results():
        torch.manual_seed(0)  # of drop path
        return {k: v.clone() for k, v in run(model, x, grad)[0].items()}

    scaled = results()
    monkeypatch.setattr(fused_block, '_folds_scale', lambda *_: True)
    torch.testing.assert_close(results(), scaled)


def test_scale_in_the_weight_goes_with_a_sum_in_fp32(monkeypatch):
    """Whose gradient is of another type than the products."""
    torch.manual_seed(0)
    model = block(8, 5)
    x, grad = random(3, 8, 5, 7).float(), random(3, 8, 5, 7).float()
    monkeypatch.setattr(fused_block, '_folds_scale', lambda *_: True)
    monkeypatch.setattr(dispatch, '_is_emulated', lambda _: False)
    exact, _, ours = three_ways(model, x, grad, monkeypatch, torch.bfloat16)
    for name, true in exact.items():
        assert (ours[name] - true).norm() <= 0.02 * true.norm(), name


def test_compiled_backbone_has_the_kernels_of_gpus(triton_on_cpu,
                                                    monkeypatch):
    monkeypatch.setattr(fused_block, '_folds_scale', lambda *_: True)
    found = set()

    def record(module, _):
        found.update(str(n.target).split('.')[1] for n in module.graph.nodes
                     if str(n.target).startswith('mmconv2former.'))
        return make_boxed_func(module.forward)

    torch.manual_seed(0)
    options = dict(backend=aot_autograd(fw_compiler=record), fullgraph=True)
    eager, compiled = (Conv2Former(TINY, compile=c) for c in (False, options))
    compiled.load_state_dict(eager.state_dict(), strict=True)
    x = torch.randn(2, 3, 32, 32)
    grads = []
    for model in (eager, compiled):
        model(x)[0].pow(2).mean().backward()
        grads.append([p.grad for p in model.parameters()])
    for own, other in zip(*grads, strict=True):
        torch.testing.assert_close(own, other, rtol=1e-4, atol=1e-6)
    used = set(fake_kernels.KERNELS)
    # Scales are folded into the weight.
    assert found == used - {'gate', 'scale_residual_backward'}
    with torch.no_grad():
        compiled(x)
    assert found == used - {'scale_residual_backward'}
    dropping = Conv2Former(TINY, compile=options)
    for block in dropping.stages[0]:
        block.drop_path.rate = 0.5
    dropping(x)[0].sum().backward()
    assert found == used


def test_lack_of_memory_at_the_first_launch_may_pass(monkeypatch):
    pytest.importorskip('triton')

    def launch(*_):
        raise torch.OutOfMemoryError('out of memory')

    assert dispatch._make_triton_operators() == ''
    monkeypatch.setattr(dispatch.TRITON, 'scale_residual', launch)
    monkeypatch.setattr(torch.cuda, 'get_device_capability', lambda _: (9, 0))
    find_obstacle = functools.cache(dispatch._try_triton.__wrapped__)
    with pytest.raises(torch.OutOfMemoryError):
        find_obstacle(torch.device('cpu'))
    monkeypatch.setattr(dispatch.TRITON, 'scale_residual', lambda *_: None)
    assert find_obstacle(torch.device('cpu')) == ''


@pytest.mark.parametrize('folds', [True, False])
def test_gradients_pass_through_all_stages_of_a_compiled_backbone(
        folds, triton_on_cpu, monkeypatch):
    monkeypatch.setattr(fused_block, '_folds_scale', lambda *_: folds)
    torch.manual_seed(0)
    arch = dict(depths=[1, 1, 1], dims=[8, 12, 16], kernel_size=3)
    eager, compiled = (
        Conv2Former(arch, layer_scale_init_value=.5, out_norm=True,
                    out_indices=(1, 2), compile=c)
        for c in (False, dict(backend='aot_eager', fullgraph=True)))
    compiled.load_state_dict(eager.state_dict(), strict=True)
    x = torch.randn(2, 3, 32, 48)
    for model in (eager, compiled):
        sum(out.pow(3).mean() for out in model(x)).backward()
    for (name, own), other in zip(compiled.named_parameters(),
                                  eager.parameters(), strict=True):
        error = (own.grad - other.grad).norm() / other.grad.norm()
        assert error < 1e-4, name


@pytest.mark.parametrize('device', [pytest.param('cuda', marks=ON_GPU)])
def test_cuda_graphs_of_the_compiler_train_alike(device, monkeypatch):
    torch.manual_seed(0)
    replay, replayed = torch.cuda.CUDAGraph.replay, []
    monkeypatch.setattr(torch.cuda.CUDAGraph, 'replay',
                        lambda graph: (replayed.append(graph), replay(graph)))
    eager = Conv2Former(TINY).to(device)
    graphs = Conv2Former(TINY, compile=dict(backend='cudagraphs')).to(device)
    graphs.load_state_dict(eager.state_dict(), strict=True)

    def step(model, x):
        model.zero_grad()
        out = model(x)[0]
        out.pow(2).mean().backward()
        return [t.clone() for t in (out, *(p.grad
                                           for p in model.parameters()))]

    # Warmed up, recorded, which ends with a replay, and replayed.
    for x in torch.randn(4, 2, 3, 32, 32, device='cuda'):
        for own, other in zip(step(graphs, x), step(eager, x), strict=True):
            torch.testing.assert_close(own, other, rtol=1e-3, atol=1e-5)
    # Those of the forward and of the backward pass at least.
    assert sum(count > 1 for count in Counter(replayed).values()) > 1


def test_residual_stays_in_fp32_if_asked():
    x = torch.randn(1, 3, 32, 32)
    for wanted, dtype in ((False, torch.bfloat16), (True, torch.float32)):
        model = Conv2Former(TINY, residual_in_fp32=wanted)
        with torch.autocast('cpu', torch.bfloat16):
            assert model(x)[0].dtype == dtype


def test_switch_leaves_the_kernels_alone(monkeypatch):
    asked = []  # which would compile them
    monkeypatch.setattr(dispatch, 'kernels_for', asked.append)
    monkeypatch.setenv('MMCONV2FORMER_FUSED', '0')
    model = Conv2Former(dict(depths=[1, 1], dims=[8, 16], kernel_size=5))
    model(torch.randn(1, 3, 32, 32))[0].sum().backward()
    assert not asked
    assert all(p.grad is not None for p in model.parameters())


def test_norm_of_the_downsampling_has_the_precision_of_products(monkeypatch):
    kernels = SimpleNamespace(**vars(torch_kernels))
    monkeypatch.setattr(dispatch, 'kernels_for', lambda _: kernels)
    monkeypatch.setattr(dispatch, '_is_emulated', lambda _: False)
    x = torch.randn(2, 8, 4, 4, requires_grad=True)
    layers = operators.LayerNorm2d(8), torch.nn.Conv2d(8, 12, 2, stride=2)
    with torch.autocast('cpu', torch.bfloat16):
        out = fused_downsampling.downsampling(x, *layers)
    assert type(out.grad_fn.next_functions[0][0]).__name__ == \
        'DownsamplingFunctionBackward'
    assert out.dtype == torch.bfloat16
    out.float().sum().backward()
    assert x.grad.dtype == torch.float32


@pytest.mark.parametrize('dtype', LOW)
@pytest.mark.parametrize('emulated', [True, False])
def test_downsampling_has_the_type_that_is_asked_for(emulated, dtype,
                                                     monkeypatch):
    monkeypatch.setattr(dispatch, '_is_emulated', lambda _: emulated)
    norm, conv = operators.LayerNorm2d(8), nn.Conv2d(8, 12, 2, 2)
    with torch.autocast('cpu', dtype):
        out = fused_downsampling.downsampling(
            torch.randn(2, 8, 6, 6), norm, conv)
    assert out.dtype == dtype
    out.backward(torch.ones_like(out))
    assert conv.weight.grad.dtype == torch.float32


def test_downsampling_of_which_nothing_is_learned_has_a_gradient():
    norm, conv = operators.LayerNorm2d(8), nn.Conv2d(8, 12, 2, 2)
    for name in 'weight', 'bias':
        norm.register_parameter(name, None)
    conv.requires_grad_(False)
    x = torch.randn(2, 8, 6, 6, requires_grad=True)
    out = fused_downsampling.downsampling(x, norm, conv)
    grad, true = (torch.autograd.grad(y.square().sum(), x)[0]
                  for y in (out, conv(norm(x))))
    torch.testing.assert_close(grad, true)


def test_downsampling_says_that_it_has_no_second_derivatives():
    x = torch.randn(2, 8, 6, 6, requires_grad=True)
    out = fused_downsampling.downsampling(
        x, operators.LayerNorm2d(8), nn.Conv2d(8, 12, 2, 2))
    with pytest.raises(RuntimeError, match='no second derivatives'):
        torch.autograd.grad(out.pow(2).sum(), x, create_graph=True)


def test_switch_reaches_the_downsampling(monkeypatch):
    kernels = SimpleNamespace(**vars(torch_kernels))
    monkeypatch.setattr(dispatch, 'kernels_for', lambda _: kernels)
    x = torch.randn(2, 8, 4, 4)
    layers = operators.LayerNorm2d(8), torch.nn.Conv2d(8, 12, 2, stride=2)
    names = []
    for switch in '10':
        monkeypatch.setenv('MMCONV2FORMER_FUSED', switch)
        node = fused_downsampling.downsampling(x, *layers).grad_fn
        names.append({node.name(), *(
            n.name() for n, _ in node.next_functions if n is not None)})
    fused, plain = ('DownsamplingFunctionBackward' in n for n in names)
    assert fused and not plain


@pytest.mark.parametrize('size', [(4, 6), (5, 7), (9, 4)])
@pytest.mark.parametrize('patch', [2, 4])
def test_downsampling_is_a_product_over_patches(monkeypatch, size, patch):
    kernels = SimpleNamespace(**vars(torch_kernels))
    layers = [operators.LayerNorm2d(8),
              torch.nn.Conv2d(8, 12, patch, stride=patch)]
    for p in (p for layer in layers for p in layer.double().parameters()):
        torch.nn.init.normal_(p)
    x = random(2, 8, *size).requires_grad_()
    inputs = x, *(p for layer in layers for p in layer.parameters())
    grad = random(2, 12, *(s // patch for s in size))
    true = fused_downsampling.downsampling(x, *layers)
    expected = true, *torch.autograd.grad(true, inputs, grad)
    monkeypatch.setattr(dispatch, 'kernels_for', lambda _: kernels)
    own = fused_downsampling.downsampling(x, *layers)
    assert type(own.grad_fn) is not type(true.grad_fn)
    for o, t in zip((own, *torch.autograd.grad(own, inputs, grad)), expected,
                    strict=True):
        torch.testing.assert_close(o, t)


@pytest.mark.parametrize('change', [
    lambda layers: layers[1].register_forward_hook(print),
    lambda layers: layers.__setitem__(0, torch.nn.Identity()),
    lambda layers: layers.__setitem__(0, torch.nn.BatchNorm2d(8)),
    lambda layers: layers.__setitem__(1, torch.nn.Conv2d(8, 12, 3, 2)),
    lambda layers: layers.__setitem__(
        1, torch.nn.Conv2d(8, 12, 2, 2, bias=False)),
    lambda layers: setattr(layers[1], 'forward', layers[1].forward),
    lambda layers: setattr(layers[1], 'dilation', (2, 2)),
    lambda layers: layers.__setitem__(
        1, torch.nn.Conv2d(8, 12, 2, 2, padding=1)),
    lambda layers: layers.__setitem__(
        1, torch.nn.Conv2d(8, 12, (2, 3), (2, 3))),
    lambda layers: layers[0].register_parameter('bias', None),
    lambda layers: layers[0].register_parameter('weight', None)])
def test_other_layers_of_a_downsampling_run_as_they_are(monkeypatch, change):
    kernels = SimpleNamespace(layer_norm=torch_kernels.layer_norm)
    monkeypatch.setattr(dispatch, 'kernels_for', lambda _: kernels)
    layers = [operators.LayerNorm2d(8), torch.nn.Conv2d(8, 12, 2, 2)]
    x = torch.randn(1, 8, 6, 6)
    assert fused_downsampling._is_unmodified(x, *layers)
    assert not fused_downsampling._is_unmodified(x[:, :4], *layers)
    change(layers)
    assert not fused_downsampling._is_unmodified(x, *layers)
    norm, conv = layers
    torch.testing.assert_close(
        fused_downsampling.downsampling(x, norm, conv), conv(norm(x)))


def test_kernels_match_their_plain_operators():
    torch.manual_seed(0)
    zv, weight, bias = random(2, 5, 7, 16), random(8, 1, 5, 5), random(8)
    z, v = (t.permute(0, 3, 1, 2) for t in zv.chunk(2, -1))
    torch.testing.assert_close(
        torch_kernels.gate(zv, weight, bias).permute(0, 3, 1, 2),
        F.conv2d(F.gelu(z), weight, bias, padding=2, groups=8) * v)
    weight = random(8, 1, 3, 3)
    torch.testing.assert_close(
        torch_kernels.position(z.permute(0, 2, 3, 1), weight,
                       bias).permute(0, 3, 1, 2),
        operators.add_position(
            z, lambda h: F.conv2d(h, weight, bias, padding=1, groups=8)))
    x, y, scale = random(2, 3, 3, 8), random(2, 3, 3, 8), random(8)
    keep = torch.tensor([0., 2.]).double().view(2, 1, 1, 1)
    torch.testing.assert_close(
        torch_kernels.scale_residual(x, y, scale, keep), x + keep * scale * y)
    grad, residual = random(2, 3, 3, 8), random(2, 3, 3, 8)
    inputs = [x, scale, random(8)]
    out = F.layer_norm(*[inputs[0].requires_grad_()], (8, ),
                       *[t.requires_grad_() for t in inputs[1:]], 1e-6)
    expected = list(torch.autograd.grad(out, inputs, grad))
    expected[0] += residual
    with torch.no_grad():
        *outs, total = torch_kernels.layer_norm_backward(
            grad, x, *inputs[1:], 1e-6, residual)
        assert total is None
        for own, other in zip(outs, [*expected, out], strict=True):
            torch.testing.assert_close(own, other)


def test_kernels_of_gpus_are_operators_of_torch_with_the_same_results():
    pytest.importorskip('triton')
    assert dispatch._make_triton_operators() == ''
    kernels = dispatch.TRITON
    c = 8
    zv, z, x = (torch.randn(2, 3, 5, n).half() for n in (2 * c, c, c))
    filters = torch.randn(c, 1, 5, 5).half(), torch.randn(c).half()
    small = torch.randn(c, 1, 3, 3).half(), torch.randn(c).half()
    weight, bias = torch.rand(c).half(), torch.rand(c).half()
    keep, vectors = torch.rand(2, 1, 1, 1).half(), [torch.rand(c)] * 2
    calls = dict(
        gate=(zv, *filters), gate_forward=(zv, *filters),
        gate_backward=(x, zv, x, *filters),
        position=(z, *small), position_backward=(x, z, *small),
        layer_norm=(x, weight, bias, 1e-6, torch.half),
        layer_norm_backward=(x, x, weight, bias, 1e-6, x, 1, True),
        scale_residual=(x, x, weight.float(), keep),
        scale_residual_backward=(x, weight, keep, torch.half),
        scale_residual_norm=(x, x, weight, keep, weight, bias, 1e-6,
                             torch.half),
        scale_residual_norm_backward=(x, x, weight, bias, 1e-6, x, weight,
                                      keep, torch.half, False),
        scaled_linear_backward=(
            [torch.rand(c, 5).half(), torch.rand(c, 7).half()], vectors,
            [torch.rand(c, 5), torch.rand(c, 7)], vectors, vectors))
    assert set(calls) == set(fake_kernels.KERNELS) == \
        set(vars(kernels)) - {'operands', 'functions', 'deferred_sums'}
    # At the end, where the functions of torch have None.
    sums = dict(gate_backward=2 * c, position_backward=c,
                layer_norm_backward=c, scale_residual_backward=c,
                scale_residual_norm_backward=c)
    with FakeTensorMode() as mode:
        for name, inputs in calls.items():
            out = getattr(kernels, name)(*tree_map_only(
                torch.Tensor, lambda t: mode.from_tensor(t).to('cuda'),
                inputs))
            with unset_fake_temporarily():
                reference = getattr(torch_kernels, name)(*inputs)
            if isinstance(out, torch.Tensor):
                out, reference = [out], [reference]
            if name in sums:
                reference = *reference[:-1], torch.zeros(sums[name])
            for own, other in zip(out, reference, strict=True):
                if other is None:  # the sum of the residual, not asked for
                    other = torch.zeros(0)
                assert own.is_cuda and own.is_contiguous(), name
                assert (own.shape, own.dtype) == (other.shape,
                                                  other.dtype), name


@pytest.mark.parametrize('capability, failure, reason', [
    ((7, 5), None, 'Ampere'),
    ((8, 0), None, None),
    ((9, 0), RuntimeError('Failed to find C compiler'), 'find C compiler'),
    # Triton's own are of no usual class.
    ((9, 0), type('PTXASError', (Exception, ), {})('sm_999'), 'sm_999'),
    ((9, 0), None, None),
])
def test_gpus_without_what_triton_needs_get_the_kernels_of_torch(
        capability, failure, reason, monkeypatch):

    def scale_residual(*_):
        if failure:
            raise failure

    zeros = torch.zeros
    monkeypatch.setattr(torch, 'zeros', lambda *size, device: zeros(*size))
    monkeypatch.setattr(torch.cuda, 'get_device_capability',
                        lambda _: capability)
    monkeypatch.setattr(dispatch, '_make_triton_operators', lambda: '')
    monkeypatch.setattr(dispatch, 'TRITON',
                        SimpleNamespace(scale_residual=scale_residual))
    found = dispatch._try_triton.__wrapped__(torch.device('cuda:0'))
    assert found == '' if reason is None else reason in found


@pytest.mark.parametrize('change', [
    lambda layers: layers.__setitem__(0, operators.LayerNorm2d(4)),
    lambda layers: setattr(layers[0], 'weight', nn.Parameter(
        layers[0].weight.detach().to('meta')))])
def test_layers_of_a_downsampling_that_cannot_run_are_recognised(change):
    layers = [operators.LayerNorm2d(8), torch.nn.Conv2d(8, 12, 2, 2)]
    change(layers)
    assert not fused_downsampling._is_unmodified(
        torch.randn(1, 8, 6, 6), *layers)


@pytest.mark.parametrize('register', [
    lambda module, call: module.register_forward_pre_hook(call),
    lambda module, call: module.register_full_backward_hook(call),
    lambda module, call: module.register_full_backward_pre_hook(call)])
@pytest.mark.parametrize('name', ['attn', 'attn.norm', 'mlp.fc1'])
def test_all_kinds_of_hooks_are_called(name, register):
    model, called = Conv2Former(TINY), []
    register(model.stages[0][0].get_submodule(name),
             lambda *_: called.append(1) and None)
    model(torch.randn(1, 3, 32, 32))[0].sum().backward()
    assert called == [1]


@pytest.mark.parametrize('dtype', DTYPES)
def test_gradient_of_a_bias_is_in_fp32(dtype):
    grad = torch.ones(1, 4, 128, 1, dtype=dtype)
    torch.testing.assert_close(
        products.linear_grad_bias(grad), torch.tensor([512.]))


def test_empty_switch_is_no_switch(monkeypatch):
    monkeypatch.setenv('MMCONV2FORMER_FUSED', '')
    assert dispatch.find_obstacle(torch.ones(1, 8, 4, 4)) == ''


def test_other_devices_run_plain_operators():
    assert 'device meta has no fused operators' == dispatch.find_obstacle(
        torch.ones(1, 8, 4, 4, device='meta'))


@pytest.mark.parametrize('dtype', [torch.float32, torch.bfloat16])
def test_a_mode_may_look_on_in_the_backward_pass_alone(dtype):
    torch.manual_seed(0)
    model, x = Conv2Former(TINY), torch.randn(2, 3, 32, 32)

    def grads(mode):
        with torch.autocast('cpu', torch.bfloat16,
                            enabled=dtype == torch.bfloat16):
            out, = model(x)
        with mode:
            return torch.autograd.grad(out.float().square().sum(),
                                       [*model.parameters()])

    tolerance = 0.05 if dtype == torch.bfloat16 else 1e-5
    for own, other in zip(grads(FlopCounterMode(display=False)),
                          grads(contextlib.nullcontext()), strict=True):
        assert (own - other).norm() <= tolerance * other.norm()


def test_selective_checkpoints_may_keep_what_convolutions_return():
    model, x = Conv2Former(TINY).double(), torch.randn(2, 3, 32, 32).double()
    aten = torch.ops.aten
    kept = functools.partial(
        create_selective_checkpoint_contexts,
        [aten.convolution.default, aten.gelu.default, aten.clone.default])
    results = []
    for run in model, functools.partial(checkpoint, model, use_reentrant=False,
                                        context_fn=kept):
        torch.manual_seed(0)
        out, = run(x)
        results.append((out, *torch.autograd.grad(
            out, [*model.parameters()], torch.randn_like(out))))
    torch.testing.assert_close(*results)


def test_traced_training_steps_can_be_run_with_gradients():
    model, x = Conv2Former(TINY).eval(), torch.randn(2, 3, 32, 32)

    def step(x):
        out, = model(x)
        return torch.autograd.grad(out.square().sum(), [*model.parameters()])

    traced = make_fx(step)(x)
    torch.testing.assert_close(traced(x), step(x))


@pytest.mark.parametrize('tracing_mode', ['real', 'fake', 'symbolic'])
def test_traced_operators_are_all_there_are(tracing_mode):
    model = Conv2Former(TINY, layer_scale_init_value=1.).eval()
    x, other = torch.randn(2, 2, 3, 32, 32)
    with torch.no_grad():
        traced = make_fx(model, tracing_mode=tracing_mode,
                         _allow_non_fake_inputs=True)(x)
        for images in x, other:
            torch.testing.assert_close(traced(images), model(images))


def test_batches_of_2_to_the_31_positions_run_plain_operators():
    with FakeTensorMode():
        x = torch.empty(2**21, 8, 32, 32, device='cuda')
    assert 'positions' in dispatch.find_obstacle(x)
    assert dispatch.find_obstacle(x[1:]) == ''


def test_drop_path_without_gradients_drops_in_bf16_too(monkeypatch):
    model = block(8, 5, .5).float().train()
    x = torch.randn(16, 8, 6, 7).bfloat16()
    dropped = []
    for switch in '10':
        monkeypatch.setenv('MMCONV2FORMER_FUSED', switch)
        torch.manual_seed(0)
        with torch.no_grad(), torch.autocast('cpu', torch.bfloat16):
            out = model(x)
        # Samples of which both branches are dropped stay as they were.
        dropped.append([torch.equal(*pair) for pair in zip(out, x)])
    assert dropped[0] == dropped[1] and 0 < sum(dropped[0]) < 16


@pytest.mark.parametrize('low', LOW)
@pytest.mark.parametrize('channels, kernel_size, ends', [
    (16, 15, False), (16, 13, True), (24, 15, True)])
def test_convolutions_that_onednn_does_not_end_are_left_to_fp32(
        channels, kernel_size, ends, low, monkeypatch):
    taken, conv2d = [], F.conv2d
    monkeypatch.setattr(F, 'conv2d', lambda x, *args, **kwargs: (
        taken.append(x.dtype), conv2d(x, *args, **kwargs))[1])
    x = random(1, 3, 4, channels, dtype=low)
    weight = random(channels, 1, kernel_size, kernel_size, dtype=low)
    out = depthwise.depthwise(x, weight, weight[:, 0, 0, 0])
    assert taken == [low if ends else torch.float32] and out.dtype == low
    expected = depthwise.depthwise(x.float(), weight.float(),
                                   weight[:, 0, 0, 0].float())
    torch.testing.assert_close(out.float(), expected, rtol=0.02, atol=0.02)
