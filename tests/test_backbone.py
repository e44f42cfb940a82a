"""Arguments, shapes, freezing, checkpointing and errors of the backbone."""
import pytest
import torch
from mmcv.cnn import fuse_conv_bn
from torch import nn

from mmconv2former import Conv2Former, Conv2FormerNeck
from mmconv2former.archs import ARCH_ALIASES, ARCHS, resolve_arch
from mmconv2former.backbone import ConvModulation
from mmconv2former.operators import FUSIONS, Pointwise

MINI = dict(depths=[1, 1, 2, 1], dims=[8, 16, 24, 32], kernel_size=5)


def images(height=64, width=64, batch=2, channels=3):
    return torch.rand(batch, channels, height, width)


def test_short_forms_name_rows_of_the_table():
    for alias, name in ARCH_ALIASES.items():
        assert resolve_arch(alias) == resolve_arch(name)
    assert resolve_arch('b_22k') == resolve_arch('base-22k')
    assert set(ARCH_ALIASES.values()) == set(ARCHS)


@pytest.mark.parametrize('size', [(32, 32), (33, 47), (96, 80), (61, 130)])
def test_declared_channels_and_strides_hold_for_any_size(size):
    model = Conv2Former(MINI, out_indices=(0, 1, 2, 3), out_norm=True)
    outs = model(images(*size))
    assert model.out_channels == (8, 16, 24, 32)
    assert model.out_strides == (4, 8, 16, 32)
    assert [out.shape[1] for out in outs] == list(model.out_channels)
    for out, stride in zip(outs, model.out_strides, strict=True):
        # each step rounds down but the first convolution, which rounds up
        height, width = ((side + 1) // 2 // (stride // 2) for side in size)
        assert tuple(out.shape[2:]) == (height, width)


@pytest.mark.parametrize('out_norm', [False, True])
def test_outputs_are_contiguous_because_roi_align_misreads_others(out_norm):
    model = Conv2Former(MINI, out_indices=(0, 1, 2, 3), out_norm=out_norm)
    x = images().contiguous(memory_format=torch.channels_last)
    assert all(out.is_contiguous() for out in model(x))


@pytest.mark.parametrize('arch', ['is', 'is_3conv'])
def test_isotropic_models_return_one_map_of_stride_16(arch):
    for name, dim, millions in ((arch, 320, 23), (arch.replace('is', 'ib'),
                                                 640, 86)):
        with torch.device('meta'):
            model = Conv2Former(name)
            neck = Conv2FormerNeck(dim)
        size = 1281 * 1000 + sum(
            p.numel() for m in (model, neck) for p in m.parameters())
        assert size == pytest.approx(millions * 1e6, rel=.02)
        assert model.out_channels == (dim, ) and model.out_strides == (16, )

    mini = dict(depths=[2], dims=[16], kernel_size=5,
                stem=resolve_arch(arch)['stem'])
    out, = Conv2Former(mini, out_norm=True)(images(64, 48))
    assert out.shape == (2, 16, 4, 3)


@pytest.mark.parametrize('fusion',
                         ['hadamard', 'sum', 'sigmoid', 'l1', 'linear'])
@pytest.mark.parametrize('kernel_size', [1, 7, 21])
def test_every_parameter_gets_a_finite_gradient(fusion, kernel_size):
    model = Conv2Former(
        MINI, kernel_size=kernel_size, fusion=fusion, out_indices=(1, 3),
        out_norm=True, layer_scale_init_value=1.)
    for m in model.modules():
        if isinstance(m, nn.Conv2d):  # away from the near-linear start
            nn.init.kaiming_normal_(m.weight)
    outs = model(images())
    sum((out * torch.randn_like(out)).sum() for out in outs).backward()
    for name, param in model.named_parameters():
        assert param.grad is not None, name
        assert param.grad.isfinite().all(), name
        # 2 x 2 maps give a 21 x 21 kernel zeros outside its centre, and a
        # linear map to (0, 1] cancels any shift; the rest must learn.
        if not (fusion == 'linear' and name.endswith('att.2.bias')):
            assert param.grad.abs().sum() > 0, name


@pytest.mark.parametrize('fusion, fuse', [
    ('hadamard', lambda a, v: a * v),
    ('sum', lambda a, v: a + v),
    ('sigmoid', lambda a, v: v / (1 + torch.exp(-a))),
    ('l1', lambda a, v: v * a / a.abs().sum(1, keepdim=True)),
    # From the least value to the greatest at a position, to 0 and 1.
    ('linear', lambda a, v: v * (a - a.min(1, keepdim=True)[0]) / (
        a.max(1, keepdim=True)[0] - a.min(1, keepdim=True)[0]))])
def test_fusions_are_those_of_the_ablation(fusion, fuse):
    torch.manual_seed(0)
    modulation = ConvModulation(8, 5, fusion).double()
    x = torch.randn(2, 8, 6, 7).double()
    normed = modulation.norm(x)
    a, v = modulation.att(normed), modulation.v(normed)
    torch.testing.assert_close(modulation(x), modulation.proj(fuse(a, v)),
                               rtol=1e-4, atol=1e-4)


def test_linear_fusion_is_positive_and_finite_where_all_channels_are_alike():
    a, v = torch.zeros(1, 8, 2, 2), torch.ones(1, 8, 2, 2)
    assert torch.equal(FUSIONS['linear'](a, v), v)
    a[:, 1:] = torch.rand(1, 7, 2, 2) + 1
    out = FUSIONS['linear'](a, v)
    assert (out > 0).all() and (out <= 1).all()


def test_only_returned_stages_are_built_and_have_norms():
    model = Conv2Former(MINI, out_indices=(2, 0), out_norm=True)
    assert model.out_indices == (0, 2)
    assert len(model.stages) == len(model.downsample_layers) == 3
    norms = {name for name, _ in model.named_children() if 'norm' in name}
    assert norms == {'norm0', 'norm2'}


def test_negative_and_single_out_indices_count_from_the_end():
    assert Conv2Former(MINI).out_indices == (3, )
    assert Conv2Former(MINI, out_indices=[-1, 0]).out_indices == (0, 3)
    assert Conv2Former(MINI, out_indices=iter((0, 1))).out_indices == (0, 1)


def test_arguments_are_not_changed():
    arch = dict(depths=[1, 1], dims=[8, 8], kernel_size=3)
    indices = [1, 0]
    Conv2Former(arch, kernel_size=5, out_indices=indices)
    assert arch == dict(depths=[1, 1], dims=[8, 8], kernel_size=3)
    assert indices == [1, 0]


@pytest.mark.parametrize('frozen_stages', [-1, 0, 2, 4])
def test_frozen_stages_neither_learn_nor_update_statistics(frozen_stages):
    model = Conv2Former(MINI, frozen_stages=frozen_stages, drop_path_rate=.5)
    assert model.train() is model
    frozen = {
        f'{kind}.{i}'
        for kind, count in (('downsample_layers', max(frozen_stages, 1)),
                            ('stages', frozen_stages)) for i in range(count)
    } if frozen_stages >= 0 else set()
    for name, param in model.named_parameters():
        is_frozen = '.'.join(name.split('.')[:2]) in frozen
        assert param.requires_grad != is_frozen, name
    for name, module in model.named_modules():
        if '.'.join(name.split('.')[:2]) in frozen:
            assert not module.training, name
    before = model.downsample_layers[0][2].running_mean.clone()
    model(images())
    changed = not torch.equal(
        before, model.downsample_layers[0][2].running_mean)
    assert changed == (frozen_stages < 0)


def test_norm_eval_keeps_batch_statistics_also_as_sync_bn():
    model = Conv2Former(MINI, norm_eval=True)
    model = nn.SyncBatchNorm.convert_sync_batchnorm(model)
    norms = [m for m in model.modules() if isinstance(m, nn.SyncBatchNorm)]
    model.train()
    assert len(norms) == 2 and not any(m.training for m in norms)
    model.norm_eval = False
    model.train()
    assert all(m.training for m in norms)


def test_checkpointing_changes_neither_outputs_nor_gradients():
    results = []
    for with_cp in (False, True):
        torch.manual_seed(0)
        model = Conv2Former(MINI, with_cp=with_cp, drop_path_rate=0.3,
                            layer_scale_init_value=1.).train()
        x = images(batch=4).requires_grad_()
        torch.manual_seed(1)
        out, = model(x)
        out.square().sum().backward()
        results.append([out, x.grad, *(p.grad for p in model.parameters())])
    for plain, recomputed in zip(*results, strict=True):
        torch.testing.assert_close(plain, recomputed)


def test_drop_path_drops_whole_samples_and_keeps_the_mean():
    drop_path = Conv2Former(MINI, drop_path_rate=.5).stages[3][0].drop_path
    assert drop_path.rate == .5
    torch.manual_seed(0)
    x = torch.ones(2000, 3, 2, 2)
    out = drop_path.train()(x)
    assert set(out.flatten().tolist()) == {0., 2.}
    assert torch.equal(out, out[:, :1, :1, :1].expand_as(out))
    assert out.mean().item() == pytest.approx(1, abs=.1)
    assert torch.equal(drop_path.eval()(x), x)


def test_other_input_channels_and_half_precision_autocast_work():
    model = Conv2Former(MINI, in_channels=1)
    with torch.autocast('cpu', torch.bfloat16):
        out, = model(images(channels=1))
    assert out.isfinite().all()


@pytest.mark.parametrize('kwargs, message', [
    (dict(arch='huge'), r"unknown arch 'huge'.*tiny.*isotropic"),
    (dict(arch=dict(depths=[1], dims=[8])), 'needs depths, dims and kernel'),
    (dict(arch=dict(depths=[1, 1], dims=[8], kernel_size=3)),
     r'one positive integer per stage.*\[1, 1\]'),
    (dict(arch=dict(depths=[1.5], dims=[8], kernel_size=3)), r'\[1.5\]'),
    (dict(arch=dict(depths=[1], dims=[8], kernel_size=3, stem='x')),
     "unknown stem 'x'.*patch"),
    (dict(arch=dict(depths=[1], dims=[8], kernel_size=3, stem=['conv'])),
     r"unknown stem \['conv'\]"),
    (dict(arch=dict(depths=[1], dims=[3], kernel_size=3)), r'got \(3,\)'),
    (dict(fusion='mean'), "unknown fusion 'mean'.*hadamard.*linear"),
    (dict(fusion=['sum']), r"unknown fusion \['sum'\]"),
    (dict(kernel_size=4), 'odd positive integer, got 4'),
    (dict(kernel_size=True), 'odd positive integer, got True'),
    (dict(mlp_ratio=0), 'mlp_ratio must be a number .* got 0'),
    (dict(mlp_ratio='4'), "got '4'"),
    (dict(mlp_ratio=float('inf')), 'mlp_ratio must be a number .* got inf'),
    (dict(mlp_ratio=float('nan')), 'mlp_ratio must be a number .* got nan'),
    (dict(out_indices=(0, 4)), r'-4 \.\. 3 .*\(0, 4\)'),
    (dict(out_indices=()), 'out_indices must name stages'),
    (dict(out_indices=1.), 'out_indices must name stages'),
    (dict(out_indices='3'), "out_indices must name stages .* got '3'"),
    (dict(frozen_stages=5), r'-1 \.\. 4 .*got 5'),
    (dict(frozen_stages=None), r'-1 \.\. 4 .*got None'),
    (dict(drop_path_rate=1.), r'drop_path_rate must be .* in \[0, 1\)'),
    (dict(cuda_graphs=4, with_cp='False'), 'with_cp must be True or False'),
    (dict(fused='False'), "fused must be True or False, got 'False'"),
    (dict(out_norm=dict(type='LN')), 'out_norm must be True or False, got'),
    (dict(drop_path_rate=None), r'in \[0, 1\), got None'),
    (dict(in_channels='3'), "in_channels must be a positive .* got '3'"),
    (dict(layer_scale_init_value=None), 'layer_scale_init_value .* got None'),
    (dict(layer_scale_init_value=float('nan')), 'finite number, got nan'),
    (dict(compile='max-autotune'), "bool or a dict .* got 'max-autotune'"),
    (dict(cuda_graphs='yes'), "cuda_graphs must be a bool .* got 'yes'"),
    (dict(arch=5), 'arch must be a name or a dict, got 5'),
    (dict(arch={**MINI, 'width': 2}), 'got the keys .*width'),
    (dict(arch=dict(depths=[], dims=[], kernel_size=3)), 'per stage each'),
    (dict(arch=dict(depths=[True], dims=[8], kernel_size=3)), r'\[True\]'),
    (dict(arch=dict(depths=[1], dims=8, kernel_size=3)), 'dims 8'),
    (dict(mlp_ratio=.1), 'leaves each MLP a channel, got 0.1'),
    (dict(frozen_stages=-2), r'-1 \.\. 4 .*got -2'),
    (dict(in_channels=0), 'positive integer, got 0'),
    (dict(kernel_size=-3), 'odd positive integer, got -3'),
    (dict(drop_path_rate=-.1), r'in \[0, 1\), got -0.1'),
    (dict(layer_scale_init_value=float('inf')), 'finite number, got inf'),
])
def test_bad_arguments_are_named(kwargs, message):
    with pytest.raises(ValueError, match=message):
        Conv2Former(**{'arch': MINI, **kwargs})


@pytest.mark.parametrize('shape', [(2, 3, 31, 64), (2, 3, 64, 31),
                                   (2, 1, 64, 64), (3, 64, 64), (2, 3, 64),
                                   (2, 3, 64, 64, 64)])
def test_bad_inputs_are_named(shape):
    with pytest.raises(ValueError, match=r'\(N, 3, H, W\).*at least 32.*got'):
        Conv2Former(MINI)(torch.rand(shape))


def test_images_may_be_as_small_as_the_last_stage_allows():
    model = Conv2Former(MINI, out_indices=(0, 1))
    assert [out.shape[2:] for out in model(torch.rand(2, 3, 8, 28))] == [
        (2, 7), (1, 3)]
    with pytest.raises(ValueError, match='H and W at least 8, got'):
        model(torch.rand(2, 3, 7, 28))


def test_pointwise_convolutions_are_made_by_the_arguments_of_others():
    layer = Pointwise(6, 8)
    other = type(layer)(layer.in_channels, 4, layer.kernel_size, layer.stride,
                        layer.padding, bias=False)
    x = torch.randn(2, 6, 3, 5)
    torch.testing.assert_close(
        other(x), torch.nn.functional.conv2d(x, other.weight))
    with pytest.raises(ValueError, match='Pointwise is a 1x1 convolution'):
        Pointwise(6, 8, 3, padding=1)


def test_batch_norms_that_mmcv_folded_across_gelu_are_refused():
    model = fuse_conv_bn(Conv2Former(MINI).eval())
    with pytest.raises(RuntimeError, match='use mmconv2former.fuse_for_inf'):
        model(images())


def test_tracing_with_gradients_on_gives_the_same():
    model = Conv2Former(MINI).eval()
    traced = torch.jit.trace(model, images())
    x = images()
    torch.testing.assert_close(traced(x), model(x))


def test_gradients_per_sample_are_those_of_single_images():
    model = torch.nn.Sequential(
        Conv2Former(MINI, layer_scale_init_value=.5),
        Conv2FormerNeck(32, 8)).double().eval()
    parameters = dict(model.named_parameters())

    def loss(parameters, x):
        out, = torch.func.functional_call(model, parameters, x[None])
        return out.square().sum()

    x = images().double()
    per_sample = torch.func.vmap(torch.func.grad(loss), (None, 0))(
        parameters, x)
    for i in range(len(x)):
        single = torch.autograd.grad(
            model(x[i:i + 1])[0].square().sum(), list(parameters.values()))
        for grads, grad in zip(per_sample.values(), single, strict=True):
            torch.testing.assert_close(grads[i], grad)


def test_neck_pools_the_last_map_after_norm():
    neck = Conv2FormerNeck(6, out_channels=5)
    feats = (torch.rand(2, 4, 4, 4), torch.rand(2, 6, 2, 3))
    out, = neck(feats)
    h = torch.nn.functional.gelu(neck.conv(feats[1]))
    h = (h - h.mean(1, keepdim=True)) / (h.var(1, keepdim=True, correction=0)
                                         + 1e-6).sqrt()
    torch.testing.assert_close(out, h.mean((2, 3)))


@pytest.mark.parametrize('channels', [([32], 8), (32, 0), ('32', 8)])
def test_channels_of_the_neck_are_positive_integers(channels):
    with pytest.raises(ValueError, match='_channels must be a positive int'):
        Conv2FormerNeck(*channels)


def test_names_of_archs_may_be_in_capitals():
    assert resolve_arch('Tiny') == resolve_arch('tiny')


@pytest.mark.parametrize('build', [
    lambda: Conv2Former(MINI), lambda: Conv2FormerNeck(32)])
def test_convolutions_start_as_in_the_official_code(build):
    torch.manual_seed(0)
    convs = [m for m in build().modules() if isinstance(m, nn.Conv2d)]
    weights = torch.cat([m.weight.flatten() for m in convs])
    assert weights.std().item() == pytest.approx(.02, rel=.05)
    assert not any(m.bias.any() for m in convs if m.bias is not None)


def test_options_of_the_compiler_are_passed_on(monkeypatch):
    seen = []
    monkeypatch.setattr(Conv2Former, 'compile',
                        lambda self, **kwargs: seen.append(kwargs))
    Conv2Former(MINI, compile=dict(mode='reduce-overhead'))
    for options in ({}, True, False):
        Conv2Former(MINI, compile=options)
    assert seen == [dict(mode='reduce-overhead'), {}, {}]


@pytest.mark.parametrize('index, channels', [(0, 3), (1, 8)])
def test_stem_and_downsampling_have_second_derivatives_if_not_fused(
        index, channels):
    layer = Conv2Former(MINI, fused=False).downsample_layers[index].double()
    x = torch.rand(2, channels, 8, 8, dtype=torch.double, requires_grad=True)
    grad, = torch.autograd.grad(layer(x).pow(2).sum(), x, create_graph=True)
    grad.pow(2).sum().backward()
    assert x.grad.isfinite().all()
