"""What tools/export.py and quantize.py write computes what the model does."""
import importlib.util
from pathlib import Path

import numpy as np
import pytest
import torch
from mmengine.config import Config
from mmengine.registry import MODELS, init_default_scope
from PIL import Image

import config_queries
import official
from mmconv2former import Conv2Former

ROOT = Path(__file__).resolve().parents[1]
ARCH = 'arch=dict(depths=[1, 1], dims=[8, 16], kernel_size=5)'
CLASSIFIER = f"""
_base_ = ['{ROOT}/configs/classification/conv2former_mini_digits.py']
model = dict(
    backbone=dict({ARCH}), neck=dict(in_channels=16, out_channels=24),
    head=dict(in_channels=24, num_classes=7))
"""
DETECTOR = f"""
_base_ = ['{ROOT}/configs/detection/mask_rcnn_conv2former_mini_digits.py']
model = dict(
    backbone=dict({ARCH}, out_indices=[0, 1], init_cfg=None),
    neck=dict(in_channels=[8, 16], out_channels=8))
"""
# None of them is a size that the tool itself tries.
SIZES = [(1, 64, 150), (4, 71, 83)]


@pytest.fixture(scope='module')
def tool(load_tool):
    return load_tool('export')


@pytest.fixture(scope='module')
def make(tmp_path_factory):
    """Write a config and a checkpoint of it; also gives the model."""
    folder = tmp_path_factory.mktemp('export')

    def write(name, text):
        config, checkpoint = folder / f'{name}.py', folder / f'{name}.pth'
        config.write_text(text)
        cfg = Config.fromfile(config)
        init_default_scope(cfg.default_scope)
        model = MODELS.build(cfg.model).eval()
        model.load_state_dict({
            key: official.tensor(key, tuple(value.shape))
            for key, value in model.state_dict().items()
        })
        torch.save(dict(state_dict=model.state_dict()), checkpoint)
        return str(config), str(checkpoint), model

    return write


@pytest.fixture(scope='module')
def classifier(make):
    return make('classifier', CLASSIFIER)


@pytest.fixture(scope='module')
def detector(make):
    pytest.importorskip('mmdet')
    return make('detector', DETECTOR)


def assert_same(outs, expected):
    for out, wanted in zip(outs, expected, strict=True):
        assert out.shape == wanted.shape
        assert (out - wanted).abs().max() < 1e-4 * wanted.abs().max()


def test_classifier_in_both_formats(tool, classifier, tmp_path, capsys):
    onnxruntime = pytest.importorskip('onnxruntime')
    config, checkpoint, model = classifier
    tool.main([config, checkpoint, '--format', 'onnx', 'torch', '--out',
               str(tmp_path / 'new' / 'digits')])
    written = tmp_path / 'new' / 'digits.onnx', tmp_path / 'new' / 'digits.pt2'
    assert sorted((tmp_path / 'new').iterdir()) == sorted(written)

    report = capsys.readouterr().out
    assert 'digits.onnx: ONNX, opset 20' in report
    assert 'digits.pt2: torch.export' in report
    assert report.count('(batch, 3, height, width)') == 2
    assert report.count('logits  (batch, 7)') == 2
    assert '1x224x224' in report and '2x33x47' in report
    assert report.count('largest difference') == 2
    assert 'RGB, mean [123.675, 116.28, 103.53]' in report

    session = onnxruntime.InferenceSession(str(written[0]))
    assert session.get_inputs()[0].shape == ['batch', 3, 'height', 'width']
    program = torch.export.load(written[1]).module()
    for size in SIZES:
        image = tool.images(size, 3)
        with torch.no_grad():
            expected = model(image)
            assert_same([program(image)], [expected])
        out, = session.run(['logits'], {'images': image.numpy()})
        assert_same([torch.from_numpy(out)], [expected])


def test_fused_backbone_of_a_detector(tool, detector, tmp_path, capsys):
    onnxruntime = pytest.importorskip('onnxruntime')
    config, checkpoint, model = detector
    path = tmp_path / 'backbone.onnx'
    tool.main([config, checkpoint, '--fuse', '--opset', '18', '--out',
               str(path)])
    report = capsys.readouterr().out
    assert 'opset 18' in report
    assert 'stage0  (batch, 8, height/4, width/4)' in report
    assert 'stage1  (batch, 16, height/8, width/8)' in report
    session = onnxruntime.InferenceSession(str(path))
    for size in SIZES:
        image = tool.images(size, 3)
        with torch.no_grad():
            expected = model.backbone(image)
        outs = session.run(['stage0', 'stage1'], {'images': image.numpy()})
        assert_same([torch.from_numpy(out) for out in outs], expected)


def test_models_that_predict_no_classes_have_their_backbone_exported(tool):
    """Self-supervised ones have a head, too."""
    model = torch.nn.ModuleDict(dict(
        backbone=Conv2Former('nano', out_indices=(1, 3)),
        head=torch.nn.Identity()))
    assert tool.select(model, None) == (model.backbone, ['stage1', 'stage3'])
    with pytest.raises(SystemExit, match='--part classifier: ModuleDict is'):
        tool.select(model, 'classifier')


@pytest.mark.parametrize('part', [None, 'backbone', 'classifier'])
def test_models_without_a_backbone_are_not_exported(tool, part):
    model = torch.nn.ModuleDict(dict(
        student=torch.nn.Identity(), teacher=torch.nn.Identity()))
    with pytest.raises(SystemExit, match='no backbone, but student, teacher'):
        tool.select(model, part)


@pytest.mark.parametrize('stem', ['patch', '3conv'])
def test_isotropic_models_in_both_formats(tool, make, stem, tmp_path, capsys):
    pytest.importorskip('onnxruntime')
    config, checkpoint, _ = make(f'isotropic_{stem}', f"""
_base_ = ['{ROOT}/configs/classification/conv2former_mini_digits.py']
model = dict(
    backbone=dict(
        arch=dict(depths=[1], dims=[8], kernel_size=5, stem={stem!r})),
    neck=dict(in_channels=8, out_channels=24),
    head=dict(in_channels=24, num_classes=7))
""")
    # The tool compares the files with the model at sizes of its own.
    tool.main([config, checkpoint, '--format', 'onnx', 'torch', '--out',
               str(tmp_path / 'model')])
    assert capsys.readouterr().out.count('largest difference') == 2


def test_other_channels_than_three_have_the_order_of_the_loader(
        tool, make, tmp_path, capsys):
    config, checkpoint, _ = make('four', CLASSIFIER.replace(
        f'dict({ARCH})', f'dict({ARCH}, in_channels=4)'))
    tool.main([config, checkpoint, '--format', 'torch', '--out',
               str(tmp_path / 'model')])
    assert 'pixels: 4 channels in the order of the loader, mean [' in \
        capsys.readouterr().out


@pytest.mark.parametrize('settings, order', [
    (dict(to_rgb=True), 'RGB'), (dict(bgr_to_rgb=True), 'RGB'),
    (dict(bgr_to_rgb=False), 'BGR')])
def test_order_of_the_colours_is_told(settings, order, tool, tmp_path,
                                      monkeypatch, capsys):
    cfg = Config(dict(model=dict(data_preprocessor=settings), work_dir='x'))
    monkeypatch.setattr(tool.launch, 'read_config', lambda args: cfg)
    monkeypatch.setattr(tool, 'load_model', lambda *_: None)
    monkeypatch.setattr(tool, 'select', lambda *_: (None, ['logits']))
    monkeypatch.setattr(tool, 'export', lambda *_: [])
    tool.main(['a.py', 'a.pth', '--format', 'torch', '--out',
               str(tmp_path / 'a')])
    assert f'pixels: {order}, mean None' in capsys.readouterr().out


def test_one_wrong_number_is_a_difference(tool):
    right = torch.full((1000, ), 10.)
    wrong = right.clone()
    wrong[7] += 0.1
    assert tool.difference([wrong], [right]) == pytest.approx(0.01, 1e-3)


@pytest.mark.parametrize('wrong', [
    lambda out: out + 2e-4 * out.abs().max(),
    lambda out: out * float('nan'),
    lambda out: out[:, :-1],
])
def test_file_that_computes_something_else_is_not_kept(
        tool, classifier, tmp_path, monkeypatch, wrong):
    model = classifier[2]
    path = tmp_path / 'digits.pt2'
    path.write_text('an older one')

    def run(x):
        with torch.no_grad():
            return [wrong(model(x))]

    monkeypatch.setattr(torch.export, 'export', lambda *args, **kwargs: None)
    monkeypatch.setattr(tool, 'write',
                        lambda program, path, *_: Path(path).touch())
    monkeypatch.setattr(tool, 'load', lambda path: run)
    with pytest.raises(SystemExit, match='digits.pt2 was not written') as end:
        tool.export(model, ['logits'], [path])
    assert end.value.code != 0
    assert path.read_text() == 'an older one'
    assert [*tmp_path.iterdir()] == [path]


@pytest.mark.parametrize('content', [b'', b'no checkpoint', b'PK\x03\x04'])
def test_file_that_is_no_checkpoint_is_told(tool, classifier, tmp_path,
                                            content):
    path = tmp_path / 'weights.pth'
    path.write_bytes(content)
    with pytest.raises(SystemExit, match='weights.pth is damaged or no'):
        tool.main([classifier[0], str(path), '--format', 'torch'])


def test_missing_package_names_the_command(tool, monkeypatch):
    monkeypatch.setattr(importlib.util, 'find_spec', lambda name: None)
    with pytest.raises(SystemExit, match='pip install onnx onnxruntime'):
        tool.main(['config.py', 'checkpoint.pth'])


@pytest.mark.parametrize('opset', ['11', '99'])
def test_operator_set_out_of_range_is_refused(tool, opset):
    with pytest.raises(
            SystemExit, match=f'at least 18 and at most 25.* got {opset}'):
        tool.main(['config.py', 'checkpoint.pth', '--opset', opset])


@pytest.mark.parametrize('out', ['model.pt2', 'model', '.'])
def test_folder_in_the_place_of_the_file_is_told_first(
        out, tool, classifier, tmp_path, monkeypatch):
    (tmp_path / 'model.pt2').mkdir()
    monkeypatch.delattr(tool, 'export')
    with pytest.raises(SystemExit, match='is a folder'):
        tool.main([*classifier[:2], '--format', 'torch', '--out',
                   f'{tmp_path}/{out}'])


def test_operator_set_that_torch_does_not_write_is_refused(
        tool, tmp_path, monkeypatch):
    onnx = pytest.importorskip('onnx')

    def write_18(program, args, path, **kwargs):
        graph = onnx.helper.make_graph([], 'empty', [], [])
        onnx.save(onnx.helper.make_model(
            graph, opset_imports=[onnx.helper.make_opsetid('', 18)]), path)

    monkeypatch.setattr(torch.onnx, 'export', write_18)
    with pytest.raises(SystemExit, match='--opset 40: .* set 18 only'):
        tool.write(None, str(tmp_path / 'x.onnx'), ['logits'], 40, ())


def test_checkpoint_of_another_config_is_refused(tool, classifier, detector):
    with pytest.raises(SystemExit, match='does not fit the config'):
        tool.main([detector[0], classifier[1], '--format', 'torch'])


def test_detector_has_no_classifier(tool, detector):
    with pytest.raises(SystemExit, match='MaskRCNN is none.* the backbone'):
        tool.main([*detector[:2], '--format', 'torch', '--part',
                   'classifier'])


# -------------------------------------------------------------------- int8


def test_models_of_larger_stride_are_checked_on_larger_images(
        tool, tmp_path):
    model = Conv2Former(dict(depths=5 * [1], dims=5 * [8], kernel_size=3),
                        layer_scale_init_value=1.).eval()
    report = '\n'.join(tool.export(
        model, ['stage4'], [tmp_path / 'x.pt2'])).replace('  ', ' ')
    assert 'sides of at least 128' in report
    assert '2x192x256, 1x448x448' in report and 'height/64' in report


def test_only_endings_of_the_formats_are_replaced(tool, classifier, tmp_path,
                                                  monkeypatch):
    written = []
    monkeypatch.setattr(tool, 'export', lambda *args: written.append(
        [path.name for path in args[2]]) or [])
    for name in ('lr0.01', 'lr0.001', 'a.onnx'):
        tool.main([*classifier[:2], '--format', 'onnx', 'torch', '--out',
                   str(tmp_path / name)])
    assert written == [['lr0.01.onnx', 'lr0.01.pt2'],
                       ['lr0.001.onnx', 'lr0.001.pt2'], ['a.onnx', 'a.pt2']]


def test_configs_in_the_new_style_name_no_scope(load_tool, tool, tmp_path):
    """Their types are classes; saved by a run, they are names again."""
    new, saved = tmp_path / 'new.py', tmp_path / 'saved.py'
    new.write_text("""
from mmengine.config import read_base  # which makes the style the new one

from mmpretrain.models import (
    ClsDataPreprocessor,
    CrossEntropyLoss,
    ImageClassifier,
    LinearClsHead,
)

from mmconv2former import Conv2Former, Conv2FormerNeck

default_scope = None
model = dict(
    type=ImageClassifier,
    data_preprocessor=dict(type=ClsDataPreprocessor),
    backbone=dict(type=Conv2Former, arch=dict(
        depths=[1, 1], dims=[8, 16], kernel_size=3)),
    neck=dict(type=Conv2FormerNeck, in_channels=16, out_channels=16),
    head=dict(type=LinearClsHead, in_channels=16, num_classes=7,
              loss=dict(type=CrossEntropyLoss)))
""")
    Config.fromfile(new).dump(saved)
    checkpoint = tmp_path / 'x.pth'
    get_flops = load_tool('get_flops')
    for path in new, saved:
        cfg = Config.fromfile(path)
        assert config_queries.library(cfg) == 'mmpretrain'
        model = get_flops.build_model(cfg)
        torch.save({key: torch.ones(value.shape)
                    for key, value in model.state_dict().items()}, checkpoint)
        assert tool.load_model(cfg, str(checkpoint)).head.fc.weight.all()


@pytest.fixture(scope='module')
def quantizer(load_tool):
    pytest.importorskip('onnxruntime')
    return load_tool('quantize')


@pytest.fixture(scope='module')
def photographs(tmp_path_factory):
    """Seven classes of three noise images each, for training and testing."""
    root = tmp_path_factory.mktemp('photographs')
    rng = np.random.RandomState(0)
    for part in ('train', 'val'):
        for i in range(21):
            path = root / part / f'class{i % 7}' / f'{i}.png'
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(rng.randint(
                256, size=(64, 64, 3), dtype=np.uint8)).save(path)
    return root


@pytest.fixture(scope='module')
def quantize(quantizer, tool, classifier, photographs, tmp_path_factory):
    """Run tools/quantize.py; gives the files before and after."""
    folder = tmp_path_factory.mktemp('int8')
    model = folder / 'model.onnx'
    tool.export(classifier[2], ['logits'], [model])

    def run(*options, model=model, config=()):
        config = [*config]
        for part in ('train', 'test'):
            config.append(f'{part}_dataloader.dataset.data_root={photographs}')
        quantizer.main([classifier[0], str(model), *options, '--cfg-options',
                        *config])

    return run, model, folder / 'model_int8.onnx'


def test_int8_classifier_of_any_size(quantizer, tool, quantize, monkeypatch,
                                     capsys):
    run, model, written = quantize
    monkeypatch.setattr(quantizer, 'MAX_LOSS', 100)  # the weights are random
    run()
    report = capsys.readouterr().out
    assert 'top-1 %' in report and 'int8' in report and str(written) in report
    assert written.stat().st_size < model.stat().st_size
    for size in [(3, 64, 64), (1, 71, 83)]:
        image = tool.images(size, 3)
        out, = tool.load(str(written))(image)
        expected, = tool.load(str(model))(image)
        assert torch.cosine_similarity(out, expected).min() > 0.98
    with pytest.raises(SystemExit, match='is quantised already; expected'):
        run(model=written)


def test_model_is_not_written_over(quantize):
    run, model, _ = quantize
    before = model.read_bytes()
    for same in (model, model.parent / '..' / model.parent.name / model.name):
        with pytest.raises(SystemExit, match='is the model itself'):
            run('--out', str(same))
    with pytest.raises(SystemExit, match='is a folder; name a file'):
        run('--out', str(model.parent))
    assert model.read_bytes() == before


def test_model_of_another_number_of_classes_is_refused(quantize):
    run = quantize[0]
    with pytest.raises(SystemExit, match='has 7 classes.* has 1000; give'):
        run(config=['model.head.num_classes=1000'])


def test_model_of_other_channels_than_the_data_is_refused(
        quantizer, quantize, monkeypatch):
    monkeypatch.setattr(quantizer, 'check_onnx', lambda path: (4, 7))
    with pytest.raises(SystemExit, match='images of 4 channels.* has 3; give'):
        quantize[0]()


def test_file_that_is_no_classifier_is_told(quantizer, tool, classifier,
                                            tmp_path):
    path = tmp_path / 'model.onnx'
    with pytest.raises(SystemExit, match='does not exist; write it with'):
        quantizer.main([classifier[0], str(path)])
    with pytest.raises(SystemExit, match='is a folder; write it with'):
        quantizer.main([classifier[0], str(tmp_path)])
    path.write_bytes(b'no model')
    with pytest.raises(SystemExit, match='is no ONNX file; write it with'):
        quantizer.main([classifier[0], str(path)])
    tool.export(classifier[2].backbone, ['stage3'], [path])
    with pytest.raises(SystemExit, match='turns images into stage3'):
        quantizer.main([classifier[0], str(path)])


def test_int8_that_loses_accuracy_is_not_written(quantizer, quantize,
                                                 monkeypatch):
    run, model, written = quantize
    written.unlink(missing_ok=True)
    monkeypatch.setattr(quantizer, 'quantize',
                        lambda model, out, data: Path(out).touch())
    monkeypatch.setattr(quantizer, 'compare',
                        lambda paths, data: [(90., 2.), (89.49, 1.)])
    with pytest.raises(SystemExit, match='int8 loses 0.51 points'):
        run()
    assert [*model.parent.iterdir()] == [model]
    other, found = model.parent / 'other.onnx', [89.5, 93.]
    monkeypatch.setattr(quantizer, 'compare',
                        lambda paths, data: [(90., 2.), (found.pop(), 1.)])
    while found:
        run('--out', str(other))
        other.unlink()
    assert [*model.parent.iterdir()] == [model]


def test_accuracy_of_each_file_is_that_of_all_images(quantizer, monkeypatch):
    labels, rows = torch.tensor([0, 1, 2, 0]), torch.arange(4)
    scores = dict(right=torch.eye(3)[labels],
                  half=torch.eye(3)[torch.tensor([0, 1, 0, 1])])
    monkeypatch.setattr(quantizer.export, 'load',
                        lambda path: lambda rows: [scores[path][rows]])
    (right, _), (half, _) = quantizer.compare(
        ['right', 'half'], [(rows[:3], labels[:3]), (rows[3:], labels[3:])])
    assert (right, half) == (100, 50)


def test_data_of_training_calibrate_and_those_of_testing_compare(
        quantizer, quantize, monkeypatch):
    run, _, written = quantize
    parts = []
    monkeypatch.setattr(quantizer, 'batches', lambda cfg, part, count: (
        parts.append((part, count)), iter([(torch.zeros(1, 3, 8, 8), 0)]))[1])
    monkeypatch.setattr(quantizer, 'quantize',
                        lambda model, out, data: Path(out).touch())
    monkeypatch.setattr(quantizer, 'compare',
                        lambda paths, data: [(90., 2.), (90., 1.)])
    run('--images', '7')
    written.unlink()
    assert parts == [('train', 256), ('test', 7)]


def test_accuracy_is_counted_on_images_as_testing_sees_them(
        quantizer, classifier, photographs, monkeypatch):
    cfg = Config.fromfile(classifier[0])
    init_default_scope(cfg.default_scope)
    monkeypatch.setattr(quantizer, 'BATCH', 8)
    for part in ('train', 'test'):
        cfg[f'{part}_dataloader'].dataset.data_root = str(photographs)
        batches = list(quantizer.batches(cfg, part, 18))
        assert [len(labels) for _, labels in batches] == [8, 8, 2]
        images, labels = (torch.cat(x) for x in zip(*batches))
        assert images.shape == (18, 3, 64, 64)
        path = photographs / ('train' if part == 'train' else 'val')
        mean, std = (torch.tensor(cfg.data_preprocessor[key]).view(3, 1, 1)
                     for key in ('mean', 'std'))
        known = {
            file: (torch.from_numpy(np.array(Image.open(file))).permute(
                2, 0, 1) - mean) / std
            for file in path.rglob('*.png')
        }
        for image, label in zip(images, labels):
            file, = (f for f, x in known.items()
                     if torch.allclose(x, image, atol=1e-5))
            assert file.parent.name == f'class{label}'


def test_pipeline_of_a_wrapped_test_set_is_found(quantizer, classifier,
                                                photographs):
    cfg = Config.fromfile(classifier[0])
    init_default_scope(cfg.default_scope)
    for part in 'train', 'test':
        data_set = cfg[f'{part}_dataloader'].dataset
        data_set.data_root = str(photographs)
    cfg.test_dataloader.dataset = dict(
        type='ConcatDataset', datasets=[cfg.test_dataloader.dataset])
    images, labels = next(quantizer.batches(cfg, 'train', 4))
    assert images.shape == (4, 3, 64, 64) and len(labels) == 4


def test_damaged_image_of_the_calibration_is_named(quantize, photographs):
    path = photographs / 'train/class0/0.png'
    whole = path.read_bytes()
    path.write_bytes(whole[:20])
    try:
        with pytest.raises(SystemExit, match=f"'{path}': it is damaged"):
            quantize[0]()
    finally:
        path.write_bytes(whole)


def test_only_classifiers_are_quantised(quantizer, detector, tmp_path):
    model = tmp_path / 'model.onnx'
    model.touch()
    with pytest.raises(SystemExit, match='only a classifier with data'):
        quantizer.main([detector[0], str(model)])
