"""UperNet with Conv2Former-N on ADE20K, crops of 512x512, 160k iterations.

Train: bash tools/dist_train.sh \
           configs/segmentation/upernet_conv2former_n_ade20k.py 8 --amp
Batch: 8 GPUs x 2 images = 16 at lr 1e-4; with another batch,
lr = 1e-4 * (GPUs x images) / 16, which --auto-scale-lr sets.
Weights: conv2former_n_in1k.pth, an ImageNet-1K classifier (docs/model_zoo.md).
Test: single scale, or six scales and their mirror images with --tta.
Expected: not trained by us, and no published figure is known to us.
"""
_base_ = [
    './_base_/upernet_conv2former.py', './_base_/ade20k_512.py',
    './_base_/schedule_160k.py'
]

# Our choice of drop path: half of T's, for a model half its size.
model = dict(
    data_preprocessor=dict(size=(512, 512)),
    backbone=dict(
        arch='nano',
        drop_path_rate=0.2,
        init_cfg=dict(type='Pretrained', checkpoint='conv2former_n_in1k.pth')),
    decode_head=dict(in_channels=[64, 128, 256, 512], num_classes=150),
    auxiliary_head=dict(in_channels=256, num_classes=150),
    test_cfg=dict(mode='slide', crop_size=(512, 512), stride=(341, 341)))

optim_wrapper = dict(paramwise_cfg=dict(num_layers=6))
