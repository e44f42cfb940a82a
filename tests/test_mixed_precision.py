"""The losses of the three tasks in fp16 and bf16.

The option and its optimizer wrapper are tested in test_tools.py. Here the
parts of a step are taken one by one, to see the gradients before they are
dropped.
"""
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from mmengine.config import Config
from mmengine.registry import MODELS, init_default_scope
from mmengine.runner import Runner

import amp

CONFIGS = Path(__file__).resolve().parents[1] / 'configs'
ARCH = dict(depths=[1, 1, 2, 1], dims=[8, 8, 16, 16], kernel_size=5)
NARROW = {
    'classification/conv2former_t_in1k.py': {
        'model.neck.in_channels': 16,
        'model.neck.out_channels': 16,
        'model.head.in_channels': 16,
        'train_dataloader.dataset.pipeline.1.scale': 64,
    },
    'detection/mask_rcnn_conv2former_t_coco.py': {
        'model.neck.in_channels': [8, 8, 16, 16],
        'model.neck.out_channels': 16,
        'model.rpn_head.in_channels': 16,
        'model.rpn_head.feat_channels': 16,
        'model.train_cfg.rpn_proposal.max_per_img': 20,
        **{
            f'model.roi_head.{key}': 16
            for key in (
                'bbox_roi_extractor.out_channels', 'bbox_head.in_channels',
                'bbox_head.fc_out_channels', 'mask_head.in_channels',
                'mask_roi_extractor.out_channels',
                'mask_head.conv_out_channels')
        },
        'model.roi_head.mask_head.num_convs': 1,
        **{
            f'train_dataloader.dataset.pipeline.3.transforms.{key}': value
            for key, value in {
                '0.0.scales': [(96, 64)],
                '1.0.scales': [(96, 64)],
                '1.1.crop_size': (48, 64),
                '1.2.scales': [(96, 64)],
            }.items()
        },
    },
    'segmentation/upernet_conv2former_t_ade20k.py': {
        'model.decode_head.in_channels': [8, 8, 16, 16],
        'model.decode_head.channels': 16,
        'model.decode_head.norm_cfg.type': 'BN',
        'model.auxiliary_head.in_channels': 16,
        'model.auxiliary_head.channels': 16,
        'model.auxiliary_head.norm_cfg.type': 'BN',
        'model.data_preprocessor.size': (64, 64),
        'train_dataloader.dataset.pipeline.2.scale': (128, 64),
        'train_dataloader.dataset.pipeline.3.crop_size': (64, 64),
    },
}


@pytest.fixture(
    scope='module',
    params=zip(NARROW, ('imagenet', 'coco', 'ade20k')),
    ids=lambda pair: pair[1])
def task(request):
    """A narrow model of a recipe, and a batch."""
    config, data = request.param
    cfg = Config.fromfile(CONFIGS / config)
    cfg.model.backbone.arch = ARCH
    cfg.model.backbone.layer_scale_init_value = 1.
    cfg.model.backbone.init_cfg = None
    cfg.merge_from_dict({
        **NARROW[config],
        'train_dataloader.dataset.data_root':
        str(request.getfixturevalue(data)),
        'train_dataloader.batch_size': 2,
        'train_dataloader.num_workers': 0,
        'train_dataloader.persistent_workers': False,
        'train_dataloader.pin_memory': False,
    })
    init_default_scope(cfg.default_scope)
    torch.manual_seed(0)
    if 'data_preprocessor' in cfg:
        cfg.model.data_preprocessor = cfg.data_preprocessor
    model = MODELS.build(cfg.model)
    loader = Runner.build_dataloader(cfg.train_dataloader, seed=0)
    return model, model.data_preprocessor(next(iter(loader)), training=True)


def loss_of(model, batch):
    torch.manual_seed(0)  # what is dropped and sampled
    return model.parse_losses(model(**batch, mode='loss'))[0]


@pytest.mark.parametrize('dtype, scale', [
    ('float16', 2.**16), ('bfloat16', 1.)])
def test_losses_are_scaled_in_fp16_alone(dtype, scale):
    weight = torch.nn.Parameter(torch.ones(()))
    wrapper = amp.CPUAmpOptimWrapper(
        dtype, optimizer=torch.optim.SGD([weight], lr=0.5))
    assert wrapper.loss_scaler.get_scale() == scale
    wrapper.backward(weight * 1.)
    assert weight.grad == scale
    wrapper.step()
    assert weight == 0.5


@pytest.mark.parametrize('dtype, rtol', [
    (torch.float16, 2e-2),
    (torch.bfloat16, 5e-2),
], ids=['fp16', 'bf16'])
def test_loss_and_gradients_are_finite(task, dtype, rtol):
    model, batch = task
    # On the GPU it is for bf16 only; on the CPU mmcv's NMS wants fp32 always.
    hook = amp.BoxesInFloat32()
    hook.before_train(SimpleNamespace(model=model))
    expected = loss_of(model, batch).item()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.)
    # As mmengine makes it: it begins at 2**16 and halves after an overflow.
    scaler = torch.amp.GradScaler('cpu', enabled=dtype == torch.float16)
    for _ in range(16):
        with torch.autocast('cpu', dtype):
            loss = loss_of(model, batch)
        assert loss.item() == pytest.approx(expected, rel=rtol)
        optimizer.zero_grad()
        scaler.scale(loss).backward()
        scaler.unscale_(optimizer)
        before = scaler.get_scale()
        scaler.step(optimizer)
        scaler.update()
        if scaler.get_scale() >= before:
            break
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert torch.isfinite(parameter.grad).all(), name
    assert model.backbone.stages[0][0].attn.v.weight.grad.abs().max() > 0
