"""The backbone is found from each library, by both spellings of its type.

Importing the package registers it for the whole process, so each check runs
in a process of its own: this file, called with a library and a spelling.
"""
import subprocess
import sys

import pytest

# What a user writes for the backbone, and what beside it in the config.
SPELLINGS = {
    'short': ('Conv2Former', "custom_imports = dict(imports=['mmconv2former'])"
              ),
    'scoped': ('mmconv2former.Conv2Former', ''),
}
BACKBONE = """dict(
    type='{type}', out_indices=(0, 1, 2, 3), out_norm=True,
    arch=dict(depths=[1, 1, 1, 1], dims=[8, 8, 16, 16], kernel_size=3))"""
CLASSIFIER = """
default_scope = 'mmpretrain'
model = dict(
    type='ImageClassifier', backbone={backbone},
    neck=dict(type='GlobalAveragePooling'),
    head=dict(type='LinearClsHead', in_channels=16, num_classes=5))
"""
RETINANET = """
_base_ = [
    'mmdet::_base_/models/retinanet_r50_fpn.py',
    'mmdet::_base_/datasets/coco_detection.py',
    'mmdet::_base_/default_runtime.py']
model = dict(
    backbone=dict(_delete_=True, **{backbone}),
    neck=dict(in_channels=[8, 8, 16, 16], out_channels=16),
    bbox_head=dict(in_channels=16, feat_channels=16, stacked_convs=1))
"""
MASK2FORMER = """
_base_ = ['mmdet::mask2former/mask2former_r50_8xb2-lsj-50e_coco.py']
model = dict(
    backbone=dict(_delete_=True, **{backbone}),
    panoptic_head=dict(
        in_channels=[8, 8, 16, 16], num_queries=5,
        pixel_decoder=dict(encoder=dict(num_layers=1)),
        transformer_decoder=dict(num_layers=1)),
    train_cfg=dict(num_points=64))
"""
SEGMENTOR = """
default_scope = 'mmseg'
model = dict(
    type='EncoderDecoder', backbone={backbone},
    data_preprocessor=dict(type='SegDataPreProcessor'), {head},
    train_cfg=dict(), test_cfg=dict(mode='whole'))
"""
SEGFORMER_HEAD = """decode_head=dict(
    type='SegformerHead', in_channels=[8, 8, 16, 16], in_index=[0, 1, 2, 3],
    channels=8, num_classes=5)"""
FCN_HEAD = """decode_head=dict(
    type='FCNHead', in_channels=16, in_index=3, channels=8, num_classes=5)"""


@pytest.mark.parametrize('spelling', SPELLINGS)
@pytest.mark.parametrize('library', ['mmpretrain', 'mmdet', 'mmseg'])
def test_backbone_is_found_and_learns(library, spelling, tmp_path):
    done = subprocess.run([sys.executable, __file__, library, spelling],
                          cwd=tmp_path, capture_output=True, text=True,
                          timeout=300)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]


def check_mmpretrain(write):
    """Runner.from_cfg and get_model."""
    import torch
    path = write('classifier.py', CLASSIFIER)
    runner_of(path)
    from mmpretrain import get_model
    from mmpretrain.structures import DataSample
    model = get_model(path)
    samples = [DataSample().set_gt_label(label) for label in (1, 2)]
    losses = model(torch.rand(2, 3, 64, 64), samples, mode='loss')
    check_gradients(model, losses)


def check_mmdet(write):
    """Runner.from_cfg, init_detector, DetInferencer; two architectures."""
    import numpy as np
    path = write('retinanet.py', RETINANET)
    runner_of(path)
    from mmdet.apis import DetInferencer, inference_detector, init_detector
    model = init_detector(path, device='cpu')
    image = np.zeros((64, 64, 3), dtype=np.uint8)
    assert 'pred_instances' in inference_detector(model, image)
    inferencer = DetInferencer(path, device='cpu', show_progress=False)
    assert len(inferencer(image)['predictions']) == 1
    check_gradients(model, detection_losses(model))
    mask2former = runner_of(write('mask2former.py', MASK2FORMER)).model
    check_gradients(mask2former, detection_losses(mask2former))


def detection_losses(model):
    """Losses of a detector on an image with one object."""
    import numpy as np
    import torch
    from mmdet.structures import DetDataSample
    from mmdet.structures.mask import BitmapMasks
    from mmengine.structures import InstanceData
    mask = np.zeros((1, 64, 64), dtype=np.uint8)
    mask[:, 8:40, 8:40] = 1
    sample = DetDataSample(metainfo=dict(
        img_shape=(64, 64), batch_input_shape=(64, 64), pad_shape=(64, 64)))
    sample.gt_instances = InstanceData(
        bboxes=torch.tensor([[8., 8., 40., 40.]]),
        labels=torch.tensor([2]),
        masks=BitmapMasks(mask, 64, 64))
    return model(torch.rand(1, 3, 64, 64), [sample], mode='loss')


def check_mmseg(write):
    """Runner.from_cfg and init_model; two decode heads."""
    import torch
    from mmengine.structures import PixelData
    path = write('segformer.py', SEGMENTOR, head=SEGFORMER_HEAD)
    runner_of(path)
    from mmseg.apis import init_model
    from mmseg.structures import SegDataSample
    for model in (init_model(path, device='cpu'),
                  init_model(
                      write('fcn.py', SEGMENTOR, head=FCN_HEAD),
                      device='cpu')):
        sample = SegDataSample(metainfo=dict(img_shape=(64, 64)))
        sample.gt_sem_seg = PixelData(data=torch.ones(1, 64, 64).long())
        losses = model.train()(
            torch.rand(2, 3, 64, 64), [sample, sample], mode='loss')
        check_gradients(model, losses)


def runner_of(path):
    """The runner of a config file, with the backbone that is wanted."""
    from mmengine.config import Config
    from mmengine.runner import Runner
    cfg = Config.fromfile(path)
    cfg.work_dir = 'work'
    for part in ('train', 'val', 'test'):  # the data is not at hand
        for key in ('dataloader', 'cfg', 'evaluator'):
            cfg.pop(f'{part}_{key}', None)
    cfg.pop('optim_wrapper', None)
    cfg.pop('param_scheduler', None)
    runner = Runner.from_cfg(cfg)
    assert type(runner.model.backbone).__module__ == 'mmconv2former.backbone'
    return runner


def check_gradients(model, losses):
    """A backward pass reaches the stem and the last block."""
    loss, _ = model.parse_losses(losses)
    loss.backward()
    backbone = model.backbone
    assert backbone.downsample_layers[0][0].weight.grad.abs().sum() > 0
    for name, p in backbone.stages.named_parameters():
        assert p.grad is not None, name


def main(library, spelling):
    """Run the checks of a library with a spelling of the type."""
    kind, line = SPELLINGS[spelling]

    def write(name, text, **parts):
        backbone = BACKBONE.format(type=kind)
        with open(name, 'w') as f:
            f.write(line + text.format(backbone=backbone, **parts))
        return name

    assert 'mmconv2former' not in sys.modules
    globals()[f'check_{library}'](write)


if __name__ == '__main__':
    main(*sys.argv[1:])
