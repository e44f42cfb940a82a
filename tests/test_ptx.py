"""The compiled kernels, executed without a GPU: see ptx.py.

Whole modules take the path of GPUs on tensors of the CPU, with torch's matrix
products and convolutions.
"""
import copy
import importlib

import pytest
import torch

import ptx
from mmconv2former import (
    Conv2Former,
    dispatch,
    fused_block,
    fused_stem,
    torch_kernels,
)
from mmconv2former.backbone import Block

triton = pytest.importorskip('triton', reason='Triton is not installed')
tl = importlib.import_module('triton.language')
kernels = importlib.import_module('mmconv2former.triton_kernels')
banded, depthwise, launch, norm, stem, sums, tiling, weights = (
    importlib.import_module(f'mmconv2former.triton_kernels.{name}')
    for name in ('banded', 'depthwise', 'launch', 'norm', 'stem', 'sums',
                 'tiling', 'weights'))

MODULES = [depthwise, norm, stem, sums, weights,
           *[banded] * banded.HAS_NARROW_PRODUCTS]
KERNELS = {name for module in MODULES for name in vars(module)
           if name.endswith('_kernel')}

pytestmark = pytest.mark.skipif(
    torch.cuda.is_available(), reason='a GPU runs the kernels itself')


@pytest.fixture
def executed(executed_launches, monkeypatch):
    """Have modules run as on a GPU; names of the kernels that have run."""
    monkeypatch.setattr(dispatch, 'kernels_for', lambda _: kernels)
    monkeypatch.setattr(dispatch, '_is_emulated', lambda _: False)
    monkeypatch.setattr(fused_stem, 'available', lambda *_: True)
    monkeypatch.setattr(fused_block, '_folds_scale',
                        lambda _, dtype: dtype != torch.float16)
    return executed_launches


def compare(module, x, dtype, executed):
    """Outputs and gradients have at most twice the error of plain operators in
    the same precision, against fp64."""
    for p in module.parameters():
        if p.ndim == 1:
            torch.nn.init.uniform_(p, 0.1, 0.5)
    plain = copy.deepcopy(module)
    for m in plain.modules():
        if hasattr(m, 'fused'):
            m.fused = False
    grads = None

    def run(module, dtype):
        nonlocal grads
        exact = dtype == torch.float64
        torch.manual_seed(1)  # of drop path
        with torch.autocast('cpu', torch.bfloat16 if exact else dtype,
                            enabled=dtype.itemsize == 2):
            outs = module(x.double() if exact else x)
        outs = outs if isinstance(outs, tuple) else (outs, )
        grads = grads or [torch.randn(out.shape, dtype=out.dtype)
                          for out in outs]
        return *outs, *torch.autograd.grad(
            outs, list(module.parameters()),
            [grad.to(out.dtype) for grad, out in zip(grads, outs)])

    true = run(copy.deepcopy(plain).double(), torch.float64)
    theirs = run(plain, dtype)
    assert not executed
    names = [name for name, _ in module.named_parameters()]
    names = [f'output {i}' for i in range(len(true) - len(names))] + names
    for name, expected, *found in zip(names, true, theirs, run(module, dtype),
                                      strict=True):
        allowed, error = ((t - expected).norm() / expected.norm()
                          for t in found)
        assert error <= 2 * allowed + 1e-6, f'{name}: {error}, {allowed}'


@pytest.mark.parametrize('shape, k, dtype', [
    ((2, 36, 7, 9), 5, torch.float32),
    ((1, 20, 3, 16), 7, torch.float16),
    ((1, 32, 3, 14), 7, torch.bfloat16),  # strips and lanes without a rest
])
def test_block_is_computed(shape, k, dtype, executed):
    torch.manual_seed(0)
    block = Block(shape[1], k, 4., 'hadamard', 0.3, 1e-6, with_cp=False,
                  fused=True)
    x = torch.randn(shape).contiguous(memory_format=torch.channels_last)
    compare(block, x.to(dtype), dtype, executed)
    assert '_position_kernel' in executed


def test_backbone_is_computed_by_all_kernels(executed, monkeypatch):
    for name in 'takes_input_grad', 'takes_weight_grad':
        monkeypatch.setattr(
            banded, name, lambda shape, *_: banded.HAS_NARROW_PRODUCTS
            and shape[2] > banded.COLUMNS)
    torch.manual_seed(0)
    model = Conv2Former(
        dict(depths=[1, 1, 1, 1], dims=4 * [24], kernel_size=11),
        drop_path_rate=0.3, out_indices=(0, 1, 2, 3)).train()
    compare(model, torch.randn(2, 3, 68, 62), torch.bfloat16, executed)
    assert executed == KERNELS


def test_last_part_of_the_rows_may_be_shorter(executed_launches, monkeypatch):
    monkeypatch.setattr(tiling, 'PROGRAMS', 2)
    depthwise._weight_grad_launch.cache_clear()
    torch.manual_seed(0)
    x, zv, weight, bias = (torch.randn(shape) for shape in (
        (1, 7, 8, 8), (1, 7, 8, 16), (8, 1, 3, 3), (8, )))
    launch, _ = depthwise._weight_grad_launch((1, 7, 8, 8), 3)
    assert launch.scalars[:2] == (7, 2)  # rows, and parts of them
    for own, true in zip(*(module.gate_backward(x, zv, x, weight, bias)[1:3]
                           for module in (kernels, torch_kernels))):
        torch.testing.assert_close(own, true, rtol=1e-4, atol=1e-4)
    depthwise._weight_grad_launch.cache_clear()


def test_gelu_is_rounded_alike_where_it_is_computed_again(hopper, monkeypatch):
    """Left to the compiler, one of the seven products here was none of an FMA
    in the forward pass; in the backward pass, all were of one."""
    compiled = []
    monkeypatch.setattr(
        launch.Launch, '__call__', lambda self, *tensors: compiled.append(
            self.kernel.warmup(*tensors, *self.scalars, grid=self.grid,
                               **self.constants)))
    z, weight, bias = (torch.zeros(shape, dtype=torch.float16) for shape in
                       ((304, 7, 7, 100), (100, 1, 3, 3), (100, )))
    kernels.position(z, weight, bias)
    forward, = compiled
    assert 'fma.rn.f32' in forward.asm['ptx']
    assert 'mul.f32' not in forward.asm['ptx']


@triton.jit
def _copy_kernel(x_ptr, out_ptr, count, STEP: tl.constexpr,
                 BLOCK: tl.constexpr):
    at = tl.program_id(0) * STEP + tl.arange(0, BLOCK)
    x = tl.load(x_ptr + at, at < count)
    tl.store(out_ptr + at, x + tl.program_id(0), at < count)


@pytest.mark.parametrize('size, step, expected', [
    (200, 128, ''),
    (199, 128, '1 threads outside of all tensors: @%p1 st.global.b32'),
    (200, 64, 'two programs in one place: @%p1 st.global.b32'),
])
def test_access_to_memory_is_checked(size, step, expected, hopper):
    x, out = torch.arange(200.), torch.zeros(size)
    fault = ''
    try:
        ptx.execute(_copy_kernel, 2, x, out, 200, STEP=step, BLOCK=128)
    except ptx.Fault as error:
        fault = str(error)
    assert fault.startswith(expected) and bool(fault) == bool(expected)
    assert fault or torch.equal(out, x + (torch.arange(200) >= 128))


@triton.jit
def _total_kernel(x_ptr, out_ptr, BLOCK: tl.constexpr):
    x = tl.load(x_ptr + tl.arange(0, BLOCK))
    tl.store(out_ptr + tl.arange(0, 2), tl.sum(x, 0) + tl.arange(0, 2))


def test_exchange_between_warps_is_checked(hopper):
    x, out = torch.randn(512), torch.zeros(2)
    kernel = _total_kernel.warmup(x, out, grid=(1, ), BLOCK=512)
    text, shared = kernel.asm['ptx'], kernel.metadata.shared
    ptx.run(text, shared, 1, [x, out])
    torch.testing.assert_close(out, x.sum() + torch.arange(2))
    assert 'bar.sync' in text
    without = '\n'.join(line for line in text.splitlines()
                        if 'bar.sync' not in line)
    with pytest.raises(ptx.Fault, match='no barrier: .*ld.shared'):
        ptx.run(without, shared, 1, [x, out])
    with pytest.raises(ptx.Fault, match='outside of shared memory'):
        ptx.run(text, shared // 2, 1, [x, out])
    with pytest.raises(ptx.Fault, match='no multiple of 16: .*ld.global.v4'):
        ptx.run(text, shared, 1, [torch.randn(513)[1:], out])


def test_instruction_that_is_not_known_is_named(hopper):
    x, out = torch.randn(512), torch.zeros(2)
    text = _total_kernel.warmup(x, out, grid=(1, ), BLOCK=512).asm['ptx']
    with pytest.raises(NotImplementedError, match='cosh.f32'):
        ptx.run(text.replace('add.f32', 'cosh.f32'), 64, 1, [x, out])
