"""A fused model computes what the model that was trained computes."""
import copy
import gc
import io
import weakref

import pytest
import torch
from mmengine.runner.checkpoint import load_state_dict
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import (
    checkpoint_wrapper,
)
from torch.nn.modules.batchnorm import _BatchNorm
from torch.testing._internal.two_tensor import TwoTensor

import official
from mmconv2former import (
    Conv2Former,
    fuse_for_inference,
)
from mmconv2former.archs import ARCHS
from mmconv2former.backbone import Block
from mmconv2former.checkpoint import CheckpointError, load_backbone
from mmconv2former.inference import FoldedBlock
from mmconv2former.operators import FUSIONS, LayerNorm2d, Pointwise

SIZES = [(32, 32), (65, 50), (97, 33)]
SMALL = dict(depths=(1, 2), dims=(16, 24), kernel_size=5)


def fill(model):
    """Weights that make every part of the model matter."""
    model.load_state_dict({
        name: official.tensor(name, tuple(value.shape))
        for name, value in model.state_dict().items()
    })
    return model.eval()


def classifier(arch=SMALL, **kwargs):
    return fill(official.Classifier(arch, 10, **kwargs))


def fused(model):
    return fuse_for_inference(copy.deepcopy(model))


def saved_and_loaded(model):
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


def difference(out, expected):
    """Largest absolute difference over the largest absolute value."""
    assert out.shape == expected.shape
    expected = expected.double()
    return ((out - expected).abs().max() / expected.abs().max()).item()


@pytest.mark.parametrize('name', ARCHS)
def test_every_arch_at_even_and_odd_sizes(name):
    arch = {**ARCHS[name], 'depths': [1] * len(ARCHS[name]['depths'])}
    model = classifier(arch, out_indices=range(len(arch['dims'])),
                       out_norm=True)
    folded = fused(model)
    with torch.no_grad():
        for height, width in SIZES:
            image = official.image(height, width)
            for out, expected in zip(
                    folded.backbone(image), model.backbone(image),
                    strict=True):
                assert difference(out, expected) < 1e-5
            assert difference(folded(image), model(image)) < 1e-5


@pytest.mark.parametrize('arch', ['n', 't'])
def test_whole_official_models(arch):
    model = official.filled_classifier(arch).eval()
    image = official.image(65, 50)
    with torch.no_grad():
        expected = model(image)
        assert difference(fuse_for_inference(model)(image), expected) < 1e-5


@pytest.mark.parametrize('fusion', FUSIONS)
def test_every_fusion(fusion):
    model = classifier(fusion=fusion)
    image = official.image(65, 50)
    with torch.no_grad():
        assert difference(fused(model)(image), model(image)) < 1e-5


@pytest.mark.parametrize('operators', ['plain', 'of torch', 'of oneDNN'])
def test_every_set_of_operators(operators, monkeypatch):
    model = classifier()
    folded = fused(model)
    image = official.image(65, 50)
    if operators == 'plain':
        monkeypatch.setenv('MMCONV2FORMER_FUSED', '0')
    elif operators == 'of torch':
        monkeypatch.setattr('mmconv2former.fused_block.onednn_takes',
                            lambda *args: False)
    elif not torch.backends.mkldnn.is_available():
        pytest.skip('this torch has no oneDNN')
    with torch.no_grad():
        assert difference(folded(image), model(image)) < 1e-5


@pytest.mark.parametrize('stem', ['conv', '3conv'])
@pytest.mark.parametrize('weight, bias', [
    (0., 0.), (0., 3.), (1e-12, 3.), (-2., 3.), (1., -30.),
])
def test_batch_norms_of_any_scale_are_exact_at_the_border(stem, weight, bias):
    model = classifier(dict(SMALL, stem=stem))
    for norm in model.backbone.downsample_layers[0]:
        if isinstance(norm, nn.BatchNorm2d):
            nn.init.constant_(norm.weight[1], weight)
            nn.init.constant_(norm.bias[1], bias)
    folded = fused(model)
    unfolded = [m for m in folded.modules() if isinstance(m, _BatchNorm)]
    # Only the one before padding divides by its scale.
    assert len(unfolded) == (abs(weight) < 1e-6)
    stems = model.backbone.downsample_layers[0], \
        folded.backbone.downsample_layers[0]
    for height, width in SIZES:
        image = official.image(height, width)
        with torch.no_grad():
            expected, out = (stem(image) for stem in stems)
        assert difference(out, expected) < 1e-5


def test_images_of_one_channel():
    model = classifier(in_channels=1)
    image = official.image(65, 50)[:, :1]
    with torch.no_grad():
        assert difference(fused(model)(image), model(image)) < 1e-5


def test_norms_lose_their_parameters_except_those_of_the_output():
    folded = fused(classifier(out_norm=True, out_indices=(0, 1)))
    norms = [
        name for name, m in folded.named_modules()
        if isinstance(m, (nn.LayerNorm, _BatchNorm)) and list(m.parameters())
    ]
    assert norms == ['backbone.norm0', 'backbone.norm1', 'neck.norm']
    assert not any(isinstance(m, Block) for m in folded.modules())


@pytest.mark.parametrize('how, kwargs', [
    ('weights', {}),
    ('weights', dict(residual_in_fp32=True)),
    ('autocast', {}),
    ('autocast', dict(residual_in_fp32=True)),
])
def test_bf16_is_as_exact_as_without_fusing(how, kwargs):
    model = classifier(dict(SMALL, depths=(2, 6)), **kwargs)
    image = official.image(97, 65)
    with torch.no_grad():
        exact = model(image)
        folded, other = fused(model), model
        if how == 'weights':
            folded, other, image = (x.bfloat16()
                                    for x in (folded, other, image))
        with torch.autocast('cpu', torch.bfloat16, enabled=how == 'autocast'):
            out, theirs = folded(image), other(image)
    assert out.dtype == torch.bfloat16
    assert difference(out, exact) <= 2 * difference(theirs, exact)


def test_gradient_of_the_image_is_that_of_the_model():
    model = classifier()
    image = official.image(65, 50).requires_grad_()
    grads = [
        torch.autograd.grad(m(image)[:, 3].sum(), image)[0]
        for m in (fused(model), model)
    ]
    assert difference(*grads) < 1e-5


def in_place(model, other):
    with torch.no_grad():
        for p, q in zip(model.parameters(), other.parameters()):
            p.copy_(q)


def by_loading(model, other):
    model.load_state_dict(other.state_dict())


def by_swapping(model, other):
    for p, q in zip(model.parameters(), other.parameters()):
        p.data = q.data.clone()


@pytest.mark.parametrize('autocast', [True, False])
@pytest.mark.parametrize('created', ['normally', 'in inference mode'])
@pytest.mark.parametrize('change', [in_place, by_loading, by_swapping])
def test_weights_that_change_after_a_call_are_taken_up(
        change, created, autocast):
    image = official.image(65, 50)

    def run(model):
        with torch.inference_mode(), torch.autocast(
                'cpu', torch.bfloat16, enabled=autocast):
            return model(image)

    with torch.inference_mode(created == 'in inference mode'):
        model, other = fused(classifier()), fused(classifier())
        for m in other.modules():
            if isinstance(m, Pointwise):
                m.weight *= 1.1
        before = run(model)
        assert torch.equal(before, run(model))
        change(model, other)
        after = run(model)
    assert not torch.equal(before, after)
    assert torch.equal(after, run(other))


def test_new_weights_in_the_place_of_the_old_are_taken_up():
    model = fused(classifier())
    layer = model.backbone.stages[0][0].fc2
    image = official.image(32, 32)
    with torch.no_grad():
        for _ in range(20):
            model(image)
            weight = torch.randn(layer.weight.shape)
            del layer.weight
            layer.weight = nn.Parameter(weight.clone(), requires_grad=False)
            assert torch.equal(model(image), copy.deepcopy(model)(image))


def test_prepared_weights_keep_the_place_of_those_that_they_are_of():
    """In which others would be taken for them."""
    model = fused(classifier())
    layer = model.backbone.stages[0][0].fc2
    with torch.no_grad():
        model(official.image(32, 32))
        weight = weakref.ref(layer.weight)
        memory = weakref.ref(layer.weight.untyped_storage())
        layer.weight.data = torch.zeros_like(layer.weight)
        del layer.weight
        gc.collect()
        assert weight() is not None and memory() is not None


def test_prepared_weights_do_not_outlive_a_conversion():
    # New weights could lie where the old ones did.
    model = fused(classifier())
    with torch.no_grad():
        model(official.image(32, 32))
    blocks = [m for m in model.modules() if isinstance(m, FoldedBlock)]
    assert blocks and all(block._prepared for block in blocks)
    model.bfloat16()
    assert not any(block._prepared for block in blocks)


@pytest.mark.parametrize('copies', [copy.deepcopy, saved_and_loaded])
def test_copies_of_a_model_in_use(copies):
    model = fused(classifier())
    image = official.image(65, 50)
    with torch.no_grad():
        expected = model(image)
        assert torch.equal(copies(model)(image), expected)


@pytest.mark.parametrize('copies', [copy.deepcopy, saved_and_loaded])
def test_copies_of_compiled_blocks_have_weights_of_their_own(copies):
    model = fused(classifier())
    for block in model.modules():
        if isinstance(block, FoldedBlock):
            block.compile(backend='eager')
    image = official.image(65, 50)
    with torch.no_grad():
        expected = model(image)
        twin = copies(model)
        assert difference(twin(image), expected) < 1e-5
        for p in twin.backbone.stages.parameters():
            p.zero_()
        assert difference(twin(image), expected) > 1e-2
        assert torch.equal(model(image), expected)


def test_compiled_model_gives_the_same():
    model = classifier()
    image = official.image(65, 50)
    with torch.no_grad():
        compiled = torch.compile(fused(model), backend='aot_eager')
        assert difference(compiled(image), model(image)) < 1e-5


def test_second_call_changes_nothing():
    folded = fused(classifier(out_norm=True))
    modules = list(folded.modules())
    state = {k: v.clone() for k, v in folded.state_dict().items()}
    assert fuse_for_inference(folded) is folded
    assert [*map(id, folded.modules())] == [*map(id, modules)]
    again = folded.state_dict()
    assert again.keys() == state.keys()
    assert all(torch.equal(again[k], v) for k, v in state.items())


@pytest.mark.parametrize('part', ['', 'backbone', 'backbone.stages.0.0'])
def test_training_mode_is_refused(part):
    model = classifier()
    model.get_submodule(part).train()
    with pytest.raises(ValueError, match=part + r'.*call model\.eval\(\) '):
        fuse_for_inference(model)


def test_model_without_a_conv2former_is_refused():
    with pytest.raises(ValueError, match='Sequential has no Conv2Former'):
        fuse_for_inference(nn.Sequential(nn.Conv2d(3, 8, 3)).eval())


@pytest.mark.parametrize('layer', [
    nn.Identity(), nn.Conv2d(24, 96, 1, bias=False), nn.Conv2d(24, 96, 1)])
def test_foreign_layers_are_refused_before_anything_is_changed(layer):
    model = classifier()
    model.backbone.stages[1][1].mlp.fc1 = layer
    names = [*model.eval().state_dict()]
    with pytest.raises(ValueError,
                       match=f'the {type(layer).__name__}'):
        fuse_for_inference(model)
    assert [*model.state_dict()] == names


@pytest.mark.parametrize('change', [
    lambda layers: layers[0].__setitem__(1, nn.ReLU()),
    lambda layers: layers[0].__setitem__(1, nn.GELU('tanh')),
    lambda layers: setattr(layers[0][3], 'padding_mode', 'reflect'),
    lambda layers: layers[0].__setitem__(
        3, nn.Conv2d(8, 8, 5, padding=2, bias=False)),
    lambda layers: layers[0].__setitem__(
        3, nn.Conv2d(8, 8, 3, padding=1, groups=2)),
    lambda layers: layers[0].__setitem__(2, nn.BatchNorm2d(8, affine=False)),
    lambda layers: layers[0].__setitem__(
        5, nn.BatchNorm2d(8, track_running_stats=False)),
    lambda layers: layers[0][5].register_forward_hook(
        lambda module, inputs, out: 2 * out),
    lambda layers: layers[1].__setitem__(
        1, nn.Conv2d(16, 24, 3, stride=2, padding=1)),
    lambda layers: nn.utils.parametrize.register_parametrization(
        layers[1][1], 'weight', nn.Tanh()),
    lambda layers: layers[0][2].register_parameter('bias', None),
    lambda layers: layers[0][5].register_parameter('bias', None),
    lambda layers: layers[1][0].register_parameter('bias', None),
    lambda layers: layers[1][0].register_parameter('weight', None),
])
def test_other_layers_of_stem_and_downsampling_compute_the_same(change):
    model = classifier()
    change(model.backbone.downsample_layers)
    model.eval()
    image = official.image(65, 50)
    with torch.no_grad():
        expected = model(image)
        assert difference(fuse_for_inference(model)(image), expected) < 1e-5


@pytest.mark.parametrize('part', ['', '.mlp', '.att'])
def test_blocks_with_hooks_are_refused(part):
    model = classifier()
    block = model.backbone.stages[0][0]
    module = {'': block, '.mlp': block.mlp, '.att': block.attn.att}[part]
    module.register_forward_hook(lambda *_: None)
    with pytest.raises(ValueError, match='hooks'):
        fuse_for_inference(model)


def test_wrapped_blocks_are_refused():
    model = classifier()
    stage = model.backbone.stages[0]
    stage[0] = checkpoint_wrapper(stage[0]).eval()
    with pytest.raises(ValueError, match='a block is wrapped'):
        fuse_for_inference(model)


@pytest.mark.parametrize('strict', [True, False])
def test_weights_of_a_fused_model_are_refused_by_others(strict, tmp_path):
    model = classifier()
    weights = fused(model).state_dict()
    with pytest.raises(RuntimeError, match='after fuse_for_inference'):
        model.load_state_dict(weights, strict=strict)
    path = str(tmp_path / 'weights.pth')
    torch.save(weights, path)
    with pytest.raises(CheckpointError, match='after fuse_for_inference'):
        load_backbone(model.backbone, path)


@pytest.mark.parametrize('is_folded', [True, False])
def test_forward_mode_derivatives_are_those_of_the_plain_path(is_folded):
    model = classifier().double().requires_grad_(False)
    image = official.image(32, 32).double()
    tangent = torch.randn_like(image)
    other = fuse_for_inference(copy.deepcopy(model)) if is_folded else model
    with torch.no_grad():
        out, slope = torch.func.jvp(other, (image, ), (tangent, ))
        step = 1e-6
        slopes = (model(image + step * tangent) -
                  model(image - step * tangent)) / (2 * step)
    assert difference(slope, slopes) < 1e-5


def test_what_reads_the_backbone_is_left_alone():
    model = classifier()
    folded = fused(model)
    for part in 'neck', 'head':
        left, was = (m.get_submodule(part).state_dict()
                     for m in (folded, model))
        assert left.keys() == was.keys()
        assert all(torch.equal(left[name], was[name]) for name in was)


def test_blocks_of_other_classes_are_refused():

    class Doubled(Block):

        def forward(self, x):
            return 2 * super().forward(x)

    model = classifier()
    model.backbone.stages[1][1].__class__ = Doubled
    with pytest.raises(ValueError, match='the Doubled of a block'):
        fuse_for_inference(model)


@pytest.mark.parametrize('stem', [
    nn.Conv2d(3, 16, 4, stride=4),
    nn.Sequential(nn.Conv2d(3, 16, 4, stride=4), LayerNorm2d(16))])
def test_stems_and_downsampling_of_other_classes_are_left_alone(stem):
    model = classifier()
    layers = model.backbone.downsample_layers
    layers[0] = stem.eval()
    layers[1] = nn.Sequential(LayerNorm2d(16), nn.GELU(),
                              nn.Conv2d(16, 24, 2, stride=2)).eval()
    image = official.image(65, 50)
    with torch.no_grad():
        assert difference(fused(model)(image), model(image)) < 1e-5


def test_layers_with_hooks_are_refused():
    model = classifier()
    model.backbone.stages[1][1].mlp.fc1.register_forward_hook(lambda *_: None)
    with pytest.raises(ValueError, match='or has hooks'):
        fuse_for_inference(model)


class Double(nn.Module):

    def forward(self, x):
        return 2 * x


@pytest.mark.parametrize('change', [
    lambda block: block.pos.register_forward_hook(lambda *args: 2 * args[-1]),
    lambda block: setattr(block, 'pos', nn.Sequential(block.pos, Double()))])
@pytest.mark.parametrize('autocast', [True, False])
def test_hooks_and_layers_of_later_than_fusing_run(autocast, change):
    model, other = fused(classifier()), fused(classifier())
    change(model.backbone.stages[1][1])
    layer = other.backbone.stages[1][1].pos
    layer.weight *= 2
    layer.bias *= 2
    with torch.no_grad(), torch.autocast('cpu', torch.bfloat16,
                                         enabled=autocast):
        out, expected = (m(official.image(32, 32)) for m in (model, other))
    assert out.dtype == expected.dtype
    assert difference(out, expected) < (0.02 if autocast else 1e-5)


@pytest.mark.parametrize('change', [
    dict(padding=2, dilation=2), dict(padding=1, padding_mode='reflect'),
    dict(padding=1, groups=1)])
def test_convolutions_of_later_than_fusing_run_as_they_are(
        change, monkeypatch):
    model, image = fused(classifier()), official.image(32, 32)
    block = model.backbone.stages[1][1]
    width = block.pos.out_channels
    block.pos = nn.Conv2d(width, width, 3, **{'groups': width, **change})
    block.pos.requires_grad_(False)
    with torch.no_grad():
        out = model(image)
        monkeypatch.setenv('MMCONV2FORMER_FUSED', '0')
        assert difference(out, model(image)) < 1e-5


def test_weights_of_other_classes_are_not_read_by_the_kernels():
    model, image = fused(classifier()), official.image(32, 32)
    with torch.no_grad():
        expected = model(image)
        layer = model.backbone.stages[0][0].fc1
        layer.weight = nn.Parameter(TwoTensor(*[layer.weight.detach()] * 2))
        assert difference(model(image).a, expected) < 1e-5


def test_a_fused_model_beside_another_loads_its_own_weights():
    model, other = (
        nn.ModuleList([fused(classifier()), classifier()]) for _ in range(2))
    model[1].head.fc.weight.data += 1.
    for load in (nn.Module.load_state_dict, load_state_dict):  # mmengine's
        load(other, model.state_dict(), strict=True)
        assert torch.equal(other[1].head.fc.weight, model[1].head.fc.weight)


def test_each_norm_keeps_its_own_eps():
    model = classifier()
    for block in (m for m in model.modules() if isinstance(m, Block)):
        block.attn.norm.eps, block.mlp.norm.eps = 1., 0.1
    for i, downsample in enumerate(model.backbone.downsample_layers[1:]):
        downsample[0].eps = 0.1 * (i + 1)
    image = official.image(65, 50)
    with torch.no_grad():
        torch.testing.assert_close(fused(model)(image), model(image),
                                   rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize('strict', [True, False])
def test_weights_of_an_unfused_model_are_refused(strict):
    model = classifier()
    folded = fused(model)
    before = {name: t.clone() for name, t in folded.state_dict().items()}
    with pytest.raises(RuntimeError, match='load them into a new model'):
        folded.load_state_dict(model.state_dict(), strict=strict)
    assert all(torch.equal(before[name], t)
               for name, t in folded.state_dict().items())


def test_own_weights_can_be_loaded():
    model = classifier()
    folded = fused(model)
    other = fuse_for_inference(official.Classifier(SMALL, 10).eval())
    other.load_state_dict(folded.state_dict())
    image = official.image(65, 50)
    with torch.no_grad():
        assert torch.equal(other(image), folded(image))


def test_parameters_that_are_to_learn_again_have_their_gradients():
    folded = fuse_for_inference(Conv2Former(SMALL).eval())
    x = torch.randn(1, 3, 32, 32)
    with torch.no_grad():
        expected, = folded(x)
    weight = folded.stages[-1][0].fc1.weight.requires_grad_()
    out, = folded(x)
    torch.testing.assert_close(out, expected)
    out.sum().backward()
    assert weight.grad.abs().sum() > 0
    assert folded.stages[0][0].fc1.weight.grad is None


def test_fused_backbones_want_no_gradients():
    folded = fuse_for_inference(Conv2Former(SMALL, out_norm=True).eval())
    assert not any(p.requires_grad for p in folded.parameters())


@pytest.mark.parametrize('part', [
    'backbone.downsample_layers.0.3', 'backbone.downsample_layers.0.6',
    'backbone.downsample_layers.1.1', 'backbone.downsample_layers.1',
    'backbone.stages.1.0.attn.proj', 'backbone.stages.1.0', 'head.fc', 'head'])
def test_parts_that_models_share_are_folded_for_none_or_all(part):
    model, other = classifier(), classifier()
    for norm in other.modules():  # those of the two are different
        if isinstance(norm, (nn.LayerNorm, nn.BatchNorm2d)):
            nn.init.normal_(norm.weight, 1., .2)
            nn.init.normal_(norm.bias)
    where, _, name = part.rpartition('.')
    setattr(other.get_submodule(where), name, model.get_submodule(part))
    both = nn.ModuleList([model, other]).eval()
    image = official.image(65, 50)
    with torch.no_grad():
        expected = [m(image) for m in both]
        assert difference(*expected) > 1e-3
        for out, true in zip([m(image) for m in fuse_for_inference(both)],
                             expected):
            assert difference(out, true) < 1e-5


def test_plain_path_that_is_asked_for_stays_plain(monkeypatch):
    model, image, called = classifier(fused=False), official.image(32, 32), []
    monkeypatch.setattr(FoldedBlock, '_fused',
                        lambda self, x: called.append(x) or x)
    with torch.no_grad():
        assert difference(fused(model)(image), model(image)) < 1e-5
    assert not called


def test_prepared_weights_are_for_the_kernels_that_take_them():

    class Other(torch.Tensor):
        pass

    folded, image = fused(classifier()), official.image(32, 32)
    with torch.no_grad(), torch.autocast('cpu', torch.bfloat16):
        expected = folded(image)
        out = folded(image.as_subclass(Other))
    assert difference(out.as_subclass(torch.Tensor), expected) < .05


@pytest.mark.filterwarnings('ignore')  # it is deprecated
def test_exporter_of_mmdeploy_takes_fused_models(tmp_path):
    onnxruntime = pytest.importorskip('onnxruntime')
    model, path = fused(classifier()), str(tmp_path / 'model.onnx')
    torch.onnx.export(model, official.image(64, 150), path, dynamo=False,
                      input_names=['image'], opset_version=17,
                      dynamic_axes=dict(image={0: 'n', 2: 'h', 3: 'w'}))
    image = official.image(71, 83, batch=3)
    with torch.no_grad():
        expected = model(image)
    out, = onnxruntime.InferenceSession(path).run(
        None, dict(image=image.numpy()))
    assert difference(torch.from_numpy(out), expected) < 1e-5


def test_fused_models_run_on_the_meta_device():
    folded = fuse_for_inference(classifier()).to('meta')
    assert folded(torch.rand(1, 3, 32, 32, device='meta')).shape == (1, 10)


def test_prepared_weights_follow_autocast():
    folded, image = fused(classifier()), official.image(65, 50)
    with torch.no_grad():
        expected = folded(image)
        with torch.autocast('cpu', torch.bfloat16):
            folded(image)
        assert torch.equal(folded(image), expected)
