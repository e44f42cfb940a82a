"""Cascade Mask R-CNN with Conv2Former-B (1K weights) on COCO, 3x schedule (36
epochs).

Train: bash tools/dist_train.sh \
    configs/detection/cascade_mask_rcnn_conv2former_b_in1k_coco.py 8 --amp
Batch: 8 GPUs x 2 images = 16 at lr 2e-4; with another batch,
lr = 2e-4 * (GPUs x images) / 16, which --auto-scale-lr sets.
Weights: conv2former_b_in1k.pth, an ImageNet-1K classifier (docs/model_zoo.md).
Expected: not trained by us, and no published figure is known to us.
"""
_base_ = [
    './_base_/cascade_mask_rcnn_conv2former.py',
    './_base_/coco_instance_ms_crop.py',
    './_base_/schedule_3x.py',
]

# ConvNeXt-B's drop path, rate and decay from 1K weights.
model = dict(
    backbone=dict(
        arch='base',
        drop_path_rate=0.7,
        init_cfg=dict(type='Pretrained', checkpoint='conv2former_b_in1k.pth')),
    neck=dict(in_channels=[96, 192, 384, 768]))

optim_wrapper = dict(
    optimizer=dict(lr=2e-4),
    paramwise_cfg=dict(decay_rate=0.8, num_layers=12))
