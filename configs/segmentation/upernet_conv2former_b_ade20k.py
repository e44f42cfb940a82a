"""UperNet with Conv2Former-B on ADE20K, crops of 512x512, 160k iterations.

Train: bash tools/dist_train.sh \
           configs/segmentation/upernet_conv2former_b_ade20k.py 8 --amp
Batch: 8 GPUs x 2 images = 16 at lr 1e-4; with another batch,
lr = 1e-4 * (GPUs x images) / 16, which --auto-scale-lr sets.
Weights: conv2former_b_in1k.pth, an ImageNet-1K classifier (docs/model_zoo.md).
Test: single scale, or six scales and their mirror images with --tta.
Expected: 1.1 mIoU above ConvNeXt-B (paper).
"""
_base_ = [
    './_base_/upernet_conv2former.py', './_base_/ade20k_512.py',
    './_base_/schedule_160k.py'
]

# ConvNeXt-B's drop path.
model = dict(
    data_preprocessor=dict(size=(512, 512)),
    backbone=dict(
        arch='base',
        drop_path_rate=0.4,
        init_cfg=dict(type='Pretrained', checkpoint='conv2former_b_in1k.pth')),
    decode_head=dict(in_channels=[96, 192, 384, 768], num_classes=150),
    auxiliary_head=dict(in_channels=384, num_classes=150),
    test_cfg=dict(mode='slide', crop_size=(512, 512), stride=(341, 341)))

optim_wrapper = dict(paramwise_cfg=dict(num_layers=12))
