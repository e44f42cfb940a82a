"""Cascade Mask R-CNN with Conv2Former-B (7x7 kernels, 22K weights) on COCO, 3x
schedule (36 epochs).

Train: bash tools/dist_train.sh \
           configs/detection/cascade_mask_rcnn_conv2former_b_coco.py 8 --amp
Batch: 8 GPUs x 2 images = 16 at lr 1e-4; with another batch,
lr = 1e-4 * (GPUs x images) / 16, which --auto-scale-lr sets.
Weights: conv2former_b_in22k.pth, an ImageNet-22K classifier
(docs/model_zoo.md).
Expected: not trained by us, and no published figure is known to us.
"""
_base_ = [
    './_base_/cascade_mask_rcnn_conv2former.py',
    './_base_/coco_instance_ms_crop.py',
    './_base_/schedule_3x.py',
]

# ConvNeXt-B's drop path, rate and decay from 22K weights.
model = dict(
    backbone=dict(
        arch='base-22k',
        drop_path_rate=0.6,
        init_cfg=dict(
            type='Pretrained', checkpoint='conv2former_b_in22k.pth')),
    neck=dict(in_channels=[96, 192, 384, 768]))

optim_wrapper = dict(
    optimizer=dict(lr=1e-4),
    paramwise_cfg=dict(decay_rate=0.8, num_layers=12))
