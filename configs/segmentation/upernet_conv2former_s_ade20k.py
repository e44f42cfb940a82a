"""UperNet with Conv2Former-S on ADE20K, crops of 512x512, 160k iterations.

Train: bash tools/dist_train.sh \
           configs/segmentation/upernet_conv2former_s_ade20k.py 8 --amp
Batch: 8 GPUs x 2 images = 16 at lr 1e-4; with another batch,
lr = 1e-4 * (GPUs x images) / 16, which --auto-scale-lr sets.
Weights: conv2former_s_in1k.pth, an ImageNet-1K classifier (docs/model_zoo.md).
Test: single scale, or six scales and their mirror images with --tta.
Expected: not trained by us, and no published figure is known to us.
"""
_base_ = [
    './_base_/upernet_conv2former.py', './_base_/ade20k_512.py',
    './_base_/schedule_160k.py'
]

# ConvNeXt-S's drop path.
model = dict(
    data_preprocessor=dict(size=(512, 512)),
    backbone=dict(
        arch='small',
        drop_path_rate=0.3,
        init_cfg=dict(type='Pretrained', checkpoint='conv2former_s_in1k.pth')),
    decode_head=dict(in_channels=[72, 144, 288, 576], num_classes=150),
    auxiliary_head=dict(in_channels=288, num_classes=150),
    test_cfg=dict(mode='slide', crop_size=(512, 512), stride=(341, 341)))

optim_wrapper = dict(paramwise_cfg=dict(num_layers=12))
