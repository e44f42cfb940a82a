"""The C++ kernels against the functions of the same names in torch.

In the instructions that torch makes use of, AVX-512 or AVX2; a test starts
this file anew for the latter.
"""
import ctypes.util
import inspect
import os
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F

from mmconv2former import cpp_kernels, dispatch, fake_kernels, torch_kernels
from mmconv2former.backbone import Block
from mmconv2former.cpp_kernels import library

EPS = 1e-6
DTYPES = [torch.float32, torch.bfloat16]
# N, H, W, C, K: maps of one and of several tiles, rows whose last positions
# fill blocks of 14 and of 7 and do not, channels that fill vectors and do not.
CASES = [
    (1, 1, 1, 8, 1), (2, 1, 1, 20, 11), (3, 7, 7, 36, 11), (1, 5, 13, 72, 7),
    (2, 13, 14, 100, 5), (1, 14, 15, 144, 11), (2, 9, 22, 16, 9),
    (1, 56, 7, 8, 13), (1, 30, 60, 20, 11), (1, 57, 113, 8, 3),
    (2, 4, 3, 24, 21),
]


@pytest.fixture(scope='module', autouse=True)
def compiled():
    try:
        library._instructions(), library._compiler()
    except library.CompilerError as error:
        pytest.skip(f'the C++ kernels {error}')
    library.load()  # sources that do not compile are a failure


def draw(dtype, *shapes):
    generator = torch.Generator().manual_seed(sum(shapes[0]))
    return [
        torch.randn(s, generator=generator, dtype=torch.double).to(dtype)
        for s in shapes
    ]


def in_double(x):
    if isinstance(x, torch.dtype):
        return torch.double
    return x.double() if torch.is_tensor(x) else x


def copied(x):
    return x.clone() if torch.is_tensor(x) else x


def compare(name, *inputs):
    """The error is at most twice that of torch's operators, plus a rounding.
    """
    plain = getattr(torch_kernels, name)
    true, other = plain(*map(in_double, inputs)), plain(*map(copied, inputs))
    before = list(map(copied, inputs))
    own = getattr(cpp_kernels, name)(*inputs)
    for old, new in zip(before, inputs):
        assert not torch.is_tensor(old) or torch.equal(old, new), \
            'an input was overwritten'
    for o, p, t in zip(*([r] if torch.is_tensor(r) else r
                         for r in (own, other, true)), strict=True):
        if t is None:  # sums that torch's functions leave to their callers
            continue
        assert o.shape == t.shape and o.is_contiguous()
        if not t.numel():
            continue
        rounding = torch.finfo(o.dtype).eps
        for size in torch.linalg.vector_norm, lambda x: x.abs().max():
            assert size(o - t) <= 2 * size(p - t) + rounding * size(t)
    return own


def assert_sums(sums, values):
    """They are of the values before these were rounded."""
    true = values.double().sum((0, 1, 2))
    # Sixteen in a row in fp32 are some 0.8 of this times eps away.
    spread = values.double().square().sum((0, 1, 2)).sqrt()
    bound = torch.finfo(values.dtype).eps * (4 * spread + true.abs())
    assert sums.dtype == torch.float32
    assert ((sums - true).abs() <= bound).all()


@pytest.mark.parametrize('dtype', DTYPES)
@pytest.mark.parametrize('n, h, w, c, k', CASES)
def test_gate_and_its_gradients_are_as_exact(n, h, w, c, k, dtype):
    zv, weight, bias, grad = draw(dtype, (n, h, w, 2 * c), (c, 1, k, k),
                                  (c, ), (n, h, w, c))
    out, a = compare('gate_forward', zv, weight, bias)
    assert out.dtype == a.dtype == dtype
    assert torch.equal(out, cpp_kernels.gate(zv, weight, bias))
    grad_zv, grad_weight, grad_bias, again, sums = compare(
        'gate_backward', grad, zv, a, weight, bias)
    assert grad_zv.dtype == again.dtype == dtype
    assert grad_weight.dtype == grad_bias.dtype == torch.float32
    assert_sums(sums, grad_zv)


@pytest.mark.parametrize('dtype', DTYPES)
@pytest.mark.parametrize('n, h, w, c', [case[:4] for case in CASES])
def test_position_and_its_gradients_are_as_exact(n, h, w, c, dtype):
    z, weight, bias, grad = draw(dtype, (n, h, w, c), (c, 1, 3, 3), (c, ),
                                 (n, h, w, c))
    out = compare('position', z, weight, bias)
    grad_z, grad_weight, grad_bias, again, sums = compare(
        'position_backward', grad, z, weight, bias)
    assert out.dtype == grad_z.dtype == dtype
    assert grad_weight.dtype == grad_bias.dtype == torch.float32
    assert torch.equal(out, again)
    assert_sums(sums, grad_z)


@pytest.mark.parametrize('patch', [1, 2, 4])
@pytest.mark.parametrize('dtype', DTYPES)
@pytest.mark.parametrize('n, h, w, c', [case[:4] for case in CASES])
def test_norms_are_as_exact(n, h, w, c, dtype, patch):
    x, residual, weight, bias = draw(dtype, (n, h, w, c), (n, h, w, c), (c, ),
                                     (c, ))
    x, patch = x * 3 + 5, min(patch, h, w)
    out = compare('layer_norm', x, weight, bias, EPS, dtype, patch)
    assert out.dtype == dtype
    compare('layer_norm', x, None, None, EPS, dtype, patch)
    grad, = draw(dtype, out.shape)
    for other in residual, None:
        grad_x, grad_weight, grad_bias, again, _ = compare(
            'layer_norm_backward', grad, x, weight, bias, EPS, other, patch)
        assert grad_x.dtype == again.dtype == dtype
        assert grad_weight.dtype == grad_bias.dtype == torch.float32
        torch.testing.assert_close(again, out)


@pytest.mark.parametrize('dtype', DTYPES)
@pytest.mark.parametrize('n, h, w, c', [case[:4] for case in CASES])
def test_layer_scale_is_as_exact(n, h, w, c, dtype):
    x, y, scale, keep = draw(dtype, (n, h, w, c), (n, h, w, c), (c, ),
                             (n, 1, 1, 1))
    for factors in (scale, keep), (scale, None), (None, keep), (None, None):
        assert compare('scale_residual', x, y, *factors).dtype == dtype
        *outs, sums = compare('scale_residual_backward', x, *factors, dtype)
        assert {t.dtype for t in outs} == {dtype}
        assert_sums(sums, x if factors[1] is None else outs[0])


@pytest.mark.parametrize('dtype', DTYPES)
@pytest.mark.parametrize('n, h, w, c', [case[:4] for case in CASES])
@pytest.mark.parametrize('scaled', [True, False])
@pytest.mark.parametrize('dropped', [True, False])
def test_sum_with_its_norm_is_as_exact(n, h, w, c, dtype, scaled, dropped):
    x, y, grad, weight, bias, scale, keep = draw(
        dtype, *[(n, h, w, c)] * 3, *[(c, )] * 3, (n, 1, 1, 1))
    factors = scale if scaled else None, keep if dropped else None
    for norm in (weight, bias), (None, None):
        out, normed = compare('scale_residual_norm', x, y, *factors, *norm,
                              EPS, dtype)
        assert out.dtype == normed.dtype == dtype
    grad_x, *sums, again, _, own, _, total = compare(
        'scale_residual_norm_backward', grad, out, weight, bias, EPS, y,
        *factors, dtype, False)
    assert grad_x.dtype == again.dtype == dtype
    assert {t.dtype for t in sums} == {torch.float32}
    assert_sums(total, own if dropped else grad_x)


def test_precisions_of_stream_branch_and_what_is_stored_may_differ():
    n, h, w, c = 2, 5, 7, 20
    low = torch.bfloat16
    x, zv, weight, bias, scale = draw(low, (n, h, w, c), (n, h, w, 2 * c),
                                      (c, 1, 3, 3), (c, ), (c, ))
    grad, = draw(torch.float32, (n, h, w, c))
    wide = [t.float() for t in (x, zv)]
    for own, other in (
            # CPUs that emulate bf16 compute in fp32 and store bf16.
        (cpp_kernels.gate_backward(grad, zv, x, weight, bias),
         cpp_kernels.gate_backward(grad, wide[1], wide[0], weight, bias)),
        (cpp_kernels.position_backward(grad, x, weight, bias),
         cpp_kernels.position_backward(grad, wide[0], weight, bias)),
            # A residual in fp32.
        ([cpp_kernels.layer_norm(wide[0], scale, bias, EPS, low)],
         [cpp_kernels.layer_norm(wide[0], scale, bias, EPS,
                                 torch.float32).to(low)]),
        ([cpp_kernels.scale_residual(wide[0], x, scale, None)],
         [cpp_kernels.scale_residual(wide[0], wide[0], scale, None)]),
        ([cpp_kernels.layer_norm_backward(x, wide[0], scale, bias, EPS,
                                          grad)[0]],
         [cpp_kernels.layer_norm_backward(wide[0], wide[0], scale, bias, EPS,
                                          grad)[0]])):
        for o, t in zip(own, other, strict=True):
            assert o.dtype == t.dtype and torch.equal(o, t)


def test_gelu_is_exact_from_end_to_end():
    steps = torch.linspace(-12, 12, 96000)
    far = torch.tensor(
        [-3e38, -1e20, -88., -20., -0., 0., 20., 88., 1e20, 3e38])
    z = torch.cat([steps, far.repeat_interleave(16)]).view(1, 1, -1, 16)
    # Without the convolution h + GELU(0) remains.
    weight, bias = torch.zeros(16, 1, 3, 3), torch.zeros(16)
    z_ = z.double().requires_grad_()
    true = F.gelu(z_)
    true.sum().backward()
    out = cpp_kernels.position(z, weight, bias)
    slope, *_ = cpp_kernels.position_backward(torch.ones_like(z), z, weight,
                                              bias)
    # That of the normal distribution is 2e-7; torch's own is 1e-7.
    assert ((out - true).abs() <= 2e-7 * z.abs()).all()
    assert ((slope - z_.grad).abs() < 1e-6).all()
    nan = torch.full((1, 1, 1, 16), torch.nan)
    assert cpp_kernels.position(nan, weight, bias).isnan().all()
    assert cpp_kernels.position_backward(nan, nan, weight,
                                         bias)[0].isnan().all()


def test_gelu_of_what_is_far_below_zero_is_zero():
    z = -torch.logspace(.75, 20, 64).view(1, 1, 1, 64)
    h = cpp_kernels.position(z, torch.zeros(64, 1, 3, 3), torch.zeros(64))
    assert ((h / z).abs() < 1e-13).all()


def test_numbers_are_rounded_to_the_nearest():
    bits = torch.arange(-2**31, 2**31, 4099 * 7, dtype=torch.int64)
    x = bits.to(torch.int32).view(torch.float32)
    x = torch.cat([x, torch.tensor([torch.inf, -torch.inf, torch.nan, 0.])])
    x = x[:len(x) // 16 * 16].view(1, 1, -1, 16)
    # Below are numbers that instructions for bf16 take for zero.
    x = torch.where(x.abs() < torch.finfo(torch.float32).tiny, 1., x)
    out = cpp_kernels.layer_norm(x, None, None, EPS, torch.bfloat16)
    assert out.shape == x.shape
    zeros, ones = torch.zeros(x.shape), torch.ones(16)
    out = cpp_kernels.scale_residual(zeros.bfloat16(), x, ones, None)
    assert torch.equal(out.isnan(), x.isnan())
    assert torch.equal(out.nan_to_num(), x.bfloat16().nan_to_num())


def test_any_number_of_threads_gives_the_same_bits():
    n, h, w, c, k = 3, 31, 29, 40, 11
    zv, a, grad, weight, bias, small = draw(
        torch.float32, (n, h, w, 2 * c), (n, h, w, c), (n, h, w, c),
        (c, 1, k, k), (c, ), (c, 1, 3, 3))
    threads, results = torch.get_num_threads(), []
    try:
        for count in 1, 2, 5, 2, 5, 2, 5:  # a race has several chances
            torch.set_num_threads(count)
            results.append([
                *cpp_kernels.gate_forward(zv, weight, bias),
                *cpp_kernels.gate_backward(grad, zv, a, weight, bias),
                *cpp_kernels.position_backward(grad, a, small, bias),
                *cpp_kernels.layer_norm_backward(grad, a, bias, bias, EPS,
                                                 grad)[:4],
                *cpp_kernels.scale_residual_backward(grad, bias, None,
                                                     grad.dtype)])
    finally:
        torch.set_num_threads(threads)
    for others in results[1:]:
        for first, other in zip(results[0], others, strict=True):
            assert torch.equal(first, other)


def test_sums_of_thousands_of_samples_are_exact():
    x = torch.linspace(0.1, 0.8, 8).repeat(20000, 1, 1, 1)
    weight, bias = torch.full((8, 1, 3, 3), 0.1), torch.full((8, ), 0.1)
    for name, *inputs in (
            ('gate_backward', x, x.repeat(1, 1, 1, 2), x, weight, bias),
            ('position_backward', x, x, weight, bias),
            ('layer_norm_backward', x, x, bias, bias, EPS, None),
            ('scale_residual_backward', x, bias, None, x.dtype)):
        own = getattr(cpp_kernels, name)(*inputs)
        true = getattr(torch_kernels, name)(*map(in_double, inputs))
        for o, t in zip(own, true, strict=True):
            if t is not None:  # of what comes first
                torch.testing.assert_close(o.double(), t, rtol=1e-6,
                                           atol=1e-6)


def test_norms_and_gradients_are_of_what_is_stored():
    low = torch.bfloat16
    x, y, residual = draw(low, *[(2, 5, 7, 20)] * 3)
    scale, weight, bias = draw(torch.float32, *[(20, )] * 3)
    keep = torch.tensor([1.25, 0.]).view(2, 1, 1, 1)
    out, normed = cpp_kernels.scale_residual_norm(
        x, y, scale, keep, weight, bias, EPS, low)
    assert torch.equal(out, cpp_kernels.scale_residual(x, y, scale, keep))
    assert torch.equal(
        normed, cpp_kernels.layer_norm(out, weight, bias, EPS, low))
    grad, *_, own, scaled, sums = cpp_kernels.scale_residual_norm_backward(
        y, out, weight, bias, EPS, residual, scale, keep, low, False)
    for o, t in zip((own, scaled, sums), cpp_kernels.scale_residual_backward(
            grad, scale, keep, low), strict=True):
        assert torch.equal(o, t)
    grad = grad.float() * keep
    assert torch.equal(own, grad.to(low))
    assert torch.equal(scaled, (grad * scale).to(low))


def test_inputs_may_have_any_strides():
    n, h, w, c = 2, 5, 7, 20
    tensors = draw(torch.float32, (n, h, w, 2 * c), *[(n, h, w, c)] * 2,
                   (c, 1, 3, 3), (c, ), (n, 1, 1, 1))
    strided = [
        torch.stack([t, torch.full_like(t, torch.nan)], -1)[..., 0]
        for t in tensors
    ]
    assert not any(t.is_contiguous() for t in strided if t.numel() > n)

    def run(zv, x, y, weight, bias, keep):
        return [
            *cpp_kernels.gate_forward(zv, weight, bias),
            *cpp_kernels.gate_backward(y, zv, x, weight, bias),
            cpp_kernels.position(x, weight, bias),
            *cpp_kernels.position_backward(y, x, weight, bias),
            cpp_kernels.layer_norm(x, bias, bias, EPS, torch.float32),
            *cpp_kernels.layer_norm_backward(y, x, bias, bias, EPS, y)[:4],
            cpp_kernels.scale_residual(x, y, bias, keep),
            *cpp_kernels.scale_residual_backward(x, bias, keep, x.dtype),
            *cpp_kernels.scale_residual_norm(x, y, bias, keep, bias, bias, EPS,
                                             x.dtype),
            *cpp_kernels.scale_residual_norm_backward(
                y, x, bias, bias, EPS, y, bias, keep, x.dtype, False)[:4]]

    for own, true in zip(run(*strided), run(*tensors), strict=True):
        assert torch.equal(own, true)


@pytest.mark.parametrize('dtype, k', [(torch.float16, 5), (torch.float32, 23)])
def test_torch_has_what_the_kernels_do_not_take(dtype, k):
    zv, grad, weight, bias = draw(dtype, (1, 5, 7, 16), (1, 5, 7, 8),
                                  (8, 1, k, k), (8, ))
    out, a = cpp_kernels.gate_forward(zv, weight, bias)
    plain = torch_kernels.gate_forward(zv, weight, bias)
    assert torch.equal(out, plain[0]) and torch.equal(a, plain[1])
    own = cpp_kernels.gate_backward(grad, zv, a, weight, bias)
    plain = torch_kernels.gate_backward(grad, zv, a, weight, bias)
    for o, p in zip(own[:4], plain[:4], strict=True):
        assert torch.equal(o, p)
    x = grad
    if dtype == torch.float16:
        for name, inputs in (
                ('position', (x, weight, bias)),
                ('layer_norm', (x, bias, bias, EPS, dtype)),
                ('scale_residual', (x, x, bias, None)),
                ('scale_residual_backward', (x, bias, None, dtype)),
                ('scale_residual_norm', (x, x, bias, None, bias, bias, EPS,
                                         dtype)),
                ('scale_residual_norm_backward', (
                    x, x, bias, bias, EPS, x, bias, None, dtype, False))):
            outs = [getattr(module, name)(*inputs)
                    for module in (cpp_kernels, torch_kernels)]
            for o, p in zip(*([out] if torch.is_tensor(out) else out
                              for out in outs), strict=True):
                assert o is p is None or torch.equal(o, p), name


def test_torch_has_what_is_in_part_of_such_a_type():
    half, low = torch.float16, torch.bfloat16
    x, zv, bias, weight = draw(torch.float32, (2, 5, 7, 8), (2, 5, 7, 16),
                               (8, ), (8, 1, 3, 3))
    norm = bias, bias, EPS
    for name, *inputs in (
            ('gate_backward', x, zv.half(), x.half(), weight, bias),
            ('position_backward', x, x.half(), weight, bias),
            ('layer_norm_backward', x.half(), x, *norm, None),
            ('scale_residual', x, x.half(), bias, None),
            ('scale_residual_backward', x, bias, None, half),
            ('scale_residual_norm', x, x, bias, None, *norm, low),
            ('scale_residual_norm_backward', x, x, *norm, x, bias, None, low,
             False)):
        outs = [getattr(module, name)(*map(copied, inputs))
                for module in (cpp_kernels, torch_kernels)]
        for o, p in zip(*([out] if torch.is_tensor(out) else out
                          for out in outs), strict=True):
            assert o is p is None or torch.equal(o, p), name


def test_what_goes_along_has_the_type_of_the_rest():
    low = torch.bfloat16
    x, zv, bias, weight = draw(low, (2, 5, 7, 8), (2, 5, 7, 16), (8, ),
                               (8, 1, 3, 3))
    wide, norm = x.float(), (bias, bias, EPS)
    for name, mixed, same in (
            ('gate_backward', (wide, zv.float(), x, weight, bias),
             (wide, zv.float(), wide, weight, bias)),
            ('layer_norm_backward', (wide, wide, *norm, x),
             (wide, wide, *norm, wide)),
            ('scale_residual_norm_backward',
             (x, wide, *norm, x, bias, None, low, False),
             (x, wide, *norm, wide, bias, None, low, False))):
        outs = [getattr(cpp_kernels, name)(*map(copied, inputs))
                for inputs in (mixed, same)]
        for o, t in zip(*outs, strict=True):
            assert o is t is None or torch.equal(o, t), name


def test_signatures_are_those_of_torchs_functions():
    for name in (*fake_kernels.KERNELS, 'filters', 'operands'):
        own, plain = (inspect.signature(getattr(module, name)).parameters
                      for module in (cpp_kernels, torch_kernels))
        assert list(own) == list(plain), name


def python(code, **environment):
    return subprocess.run([sys.executable, '-c', code], text=True,
                          env={**os.environ, **environment},
                          capture_output=True)


def test_kernels_are_compiled_once(tmp_path):
    code = ('from mmconv2former.cpp_kernels.library import load\n'
            'load()\nprint("loaded")')
    process = python(code, XDG_CACHE_HOME=str(tmp_path), CXX=' ')
    assert process.stdout.endswith('loaded\n'), process.stderr
    assert 'compiling C++ kernels' in process.stdout + process.stderr
    built, = (tmp_path / 'mmconv2former').iterdir()
    made = built.stat().st_mtime_ns
    process = python(code, XDG_CACHE_HOME=str(tmp_path), CXX='')
    assert process.stdout == 'loaded\n', process.stderr
    assert built.stat().st_mtime_ns == made


@pytest.mark.parametrize('environment, reason', [
    (dict(CXX='env false'), 'cannot be compiled'),
    (dict(CXX="g++ '"), 'No closing quotation'),
    # What it says need not be UTF-8.
    (dict(CXX="sh -c 'printf \"\\374\" >&2; exit 1'", LANG='C.UTF-8'),
     'cannot be compiled'),
    (dict(XDG_CACHE_HOME='/dev/null'), 'cannot be written or loaded'),
])
def test_kernels_that_cannot_be_compiled_say_why(environment, reason, tmp_path,
                                                 monkeypatch):
    for name, value in {'XDG_CACHE_HOME': str(tmp_path),
                        **environment}.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(library.CompilerError, match=reason):
        library.load.__wrapped__()
    assert not list(tmp_path.rglob('*.so'))


@pytest.mark.parametrize('environment, reason', [
    (dict(CXX='no-compiler'), 'there is no no-compiler'),
    (dict(ATEN_CPU_CAPABILITY='default'), 'AVX-512, and torch finds'),
])
def test_torchs_operators_run_where_nothing_can_be_compiled(
        environment, reason, tmp_path):
    code = """
import torch
from mmconv2former import Conv2Former
model = Conv2Former('nano').eval()
with torch.no_grad():
    model(torch.rand(1, 3, 64, 64))
model(torch.rand(1, 3, 64, 64))[0].sum().backward()
"""
    process = python(code, **{'XDG_CACHE_HOME': str(tmp_path), **environment})
    assert process.returncode == 0, process.stderr
    log = process.stdout + process.stderr
    assert log.count('fused operators of torch alone, because the C++') == 1
    assert reason in log
    assert not list(tmp_path.rglob('*.so'))


def test_compiler_that_knows_no_bf16_compiles_without(tmp_path, monkeypatch):
    commands = []

    def compile_(target, command):
        commands.append(command)
        if '-mavx512bf16' in command:
            raise library.CompilerError('unrecognized option')

    monkeypatch.setenv('XDG_CACHE_HOME', str(tmp_path))
    monkeypatch.setattr(library, '_compile', compile_)
    monkeypatch.setattr(library, '_instructions',
                        lambda: ['-mavx512f', '-mavx512bf16'])
    library._library()
    first, second = commands
    assert [option for option in first if option != '-mavx512bf16'] == second


@pytest.mark.parametrize('content', [b'', b'no library', None])
def test_damaged_library_is_told(content, tmp_path, monkeypatch):
    path = tmp_path / 'a.so'
    if content is None:  # one without our functions
        path = ctypes.util.find_library('m')
    else:
        path.write_bytes(content)
    monkeypatch.setattr(library, '_library', lambda: path)
    library.load.cache_clear()
    with pytest.raises(library.CompilerError, match='delete that file, or'):
        library.load()


def test_files_in_the_cache_are_no_others(tmp_path, monkeypatch):
    """None of another CPU, C library or state of the sources is loaded."""
    names = set()
    monkeypatch.setenv('XDG_CACHE_HOME', str(tmp_path))
    monkeypatch.setattr(library, '_compile',
                        lambda target, command: names.add(target))
    sources = tmp_path / 'sources'
    sources.mkdir()
    for path in library.FOLDER.iterdir():
        if path.suffix in ('.cpp', '.h'):
            (sources / path.name).write_bytes(path.read_bytes())
    monkeypatch.setattr(library, 'FOLDER', sources)
    library._library()
    library._library()
    assert len(names) == 1
    with (sources / 'vector.h').open('a') as file:
        file.write('// changed\n')
    library._library()
    assert len(names) == 2
    monkeypatch.setattr(library, '_instructions', lambda: ['-mavx2'])
    library._library()
    assert len(names) == 3
    monkeypatch.setattr(library.platform, 'libc_ver',
                        lambda: ('glibc', '2.17'))
    library._library()
    assert len(names) == 4


class Subclass(torch.Tensor):
    pass


def test_blocks_take_them_and_say_so(monkeypatch):
    called, lines = [], []
    monkeypatch.setattr(dispatch, 'print_log',
                        lambda text, **_: lines.append(text))
    dispatch.log_once.cache_clear()
    for name in 'gate_forward', 'gate_backward', 'position_backward':
        function = getattr(cpp_kernels, name)
        monkeypatch.setattr(
            cpp_kernels, name,
            lambda *inputs, f=function, n=name: called.append(n) or f(*inputs))
    block = Block(8, 5, 4., 'hadamard', 0., 1., False, True)
    x = torch.rand(1, 8, 6, 6)
    block(x).sum().backward()
    assert called == ['gate_forward', 'position_backward', 'gate_backward']
    with torch.autocast('cpu', torch.float16):
        block(x)
    called.clear()
    block(x.as_subclass(Subclass)).sum().backward()
    block.double()(x.double()).sum().backward()
    dispatch.log_once.cache_clear()
    assert not called
    alone = 'Conv2Former: fused operators of torch alone, because '
    assert lines == [
        'Conv2Former: fused operators with C++ kernels',
        'Conv2Former: fused operators with C++ kernels, and of torch for what '
        'is in fp16',
        alone + 'they get a Subclass', alone + 'the model is in fp64'
    ]


@pytest.mark.skipif(
    torch.backends.cpu.get_cpu_capability() == 'AVX2',
    reason='this process has no other instructions')
def test_kernels_for_avx2_are_as_exact():
    process = subprocess.run(
        [sys.executable, '-m', 'pytest', '-q', '-rs', __file__, '-k',
         'exact or nearest or threads or strides'],
        env={**os.environ, 'ATEN_CPU_CAPABILITY': 'avx2'}, text=True,
        capture_output=True)
    assert process.returncode == 0, process.stdout
    assert 'the C++ kernels' not in process.stdout  # skipped


@pytest.mark.skipif(
    not torch.cpu._is_avx512_bf16_supported(),
    reason='this process rounds without instructions for bf16 anyway')
def test_kernels_without_instructions_for_bf16_round_to_the_nearest(tmp_path):
    compiler = library._compiler()
    refuses = tmp_path / 'compiler'
    refuses.write_text(
        '#!/bin/sh\ncase "$*" in *avx512bf16*) exit 1; esac\n'
        f'exec {" ".join(compiler)} "$@"\n')
    refuses.chmod(0o755)
    process = subprocess.run(
        [sys.executable, '-m', 'pytest', '-q', '-rs', __file__, '-k',
         'nearest and not instructions'],
        env={**os.environ, 'CXX': str(refuses), 'XDG_CACHE_HOME': str(tmp_path)
             }, text=True, capture_output=True)
    assert process.returncode == 0, process.stdout
    assert 'the C++ kernels' not in process.stdout  # skipped
