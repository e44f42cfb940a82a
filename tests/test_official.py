"""The backbone computes what the official implementation computes."""
import numpy as np
import pytest
import torch

import official

PARAMETERS = {  # counted on the official classifiers
    'n': 14_992_840,
    't': 26_697_204,
    's': 50_032_692,
    'b': 90_029_112,
    'b_22k': 88_784_952,
    'l': 198_893_736,
}


@pytest.mark.parametrize('arch', official.ARCHS)
def test_forward_and_parameter_count_match_the_official_model(arch):
    model = official.filled_classifier(arch, out_indices=(0, 1, 2, 3)).eval()
    assert sum(p.numel() for p in model.parameters()) == PARAMETERS[arch]
    sizes = {
        tuple(map(int, key.split('/')[1].split('x')))
        for key in official.RESULTS
        if key.startswith(arch + '/') and key.endswith('/logits')
    }
    assert len(sizes) == 2
    for height, width in sizes:
        with torch.no_grad():
            outs = model.backbone(official.image(height, width))
            logits = model.head.fc(model.neck(outs)[0])
        expected = f'{arch}/{height}x{width}'
        for i, out in enumerate(outs):
            np.testing.assert_allclose(
                out[:, ::16], official.RESULTS[f'{expected}/stage{i}'],
                rtol=0, atol=1e-4)
        np.testing.assert_allclose(
            logits, official.RESULTS[f'{expected}/logits'], rtol=0, atol=1e-4)


@pytest.mark.parametrize('arch', ['n', 't'])
@pytest.mark.parametrize('with_cp', [False, True])
def test_gradients_match_the_official_model(arch, with_cp):
    model = official.filled_classifier(arch, with_cp=with_cp).train()
    expected = official.RESULTS[f'{arch}/grad/input']
    image = official.image(*expected.shape[2:]).requires_grad_()
    upstream = np.random.RandomState(7).standard_normal((2, 1000))
    (model(image) * torch.tensor(upstream, dtype=torch.float32)).sum() \
        .backward()

    error = (image.grad - torch.from_numpy(expected)).abs().max()
    assert error < 1e-3 * np.abs(expected).max()
    norms = dict(zip(official.RESULTS[f'{arch}/gradnorm_names'].tolist(),
                     official.RESULTS[f'{arch}/gradnorm'], strict=True))
    ours = {
        'head.0.': model.neck.conv,
        'head.2.': model.neck.norm,
        'pred.': model.head.fc,
        '': model.backbone,
    }
    for name, norm in norms.items():
        prefix = next(p for p in ours if name.startswith(p))
        grad = ours[prefix].get_parameter(name[len(prefix):]).grad
        assert grad.double().norm().item() == pytest.approx(norm, rel=1e-3)
    assert len(norms) == sum(1 for _ in model.parameters())


@pytest.mark.parametrize('arch', official.ARCHS)
def test_names_and_shapes_are_the_official_ones(arch):
    with torch.device('meta'):
        backbone = official.Conv2Former(arch)
    heads = ('head.', 'pred.')
    assert {k: list(v.shape) for k, v in backbone.state_dict().items()} == {
        k: v
        for k, v in official.SHAPES[arch].items() if not k.startswith(heads)
    }
