"""Cascade Mask R-CNN with Conv2Former-T on COCO, 3x schedule (36 epochs).

Train: bash tools/dist_train.sh \
           configs/detection/cascade_mask_rcnn_conv2former_t_coco.py 8 --amp
Batch: 8 GPUs x 2 images = 16 at lr 2e-4; with another batch,
lr = 2e-4 * (GPUs x images) / 16, which --auto-scale-lr sets.
Weights: conv2former_t_in1k.pth, an ImageNet-1K classifier (docs/model_zoo.md).
Expected: more than 1 box AP above Swin-T and ConvNeXt-T (paper).
"""
_base_ = [
    './_base_/cascade_mask_rcnn_conv2former.py',
    './_base_/coco_instance_ms_crop.py',
    './_base_/schedule_3x.py',
]

# ConvNeXt-T's drop path, rate and decay.
model = dict(
    backbone=dict(
        arch='tiny',
        drop_path_rate=0.4,
        init_cfg=dict(type='Pretrained', checkpoint='conv2former_t_in1k.pth')),
    neck=dict(in_channels=[72, 144, 288, 576]))

optim_wrapper = dict(
    optimizer=dict(lr=2e-4),
    paramwise_cfg=dict(decay_rate=0.7, num_layers=6))
