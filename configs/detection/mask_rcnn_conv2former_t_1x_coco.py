"""Mask R-CNN with Conv2Former-T on COCO, 1x schedule (12 epochs).

Train: bash tools/dist_train.sh \
           configs/detection/mask_rcnn_conv2former_t_1x_coco.py 8 --amp
Batch: 8 GPUs x 2 images = 16 at lr 1e-4; with another batch,
lr = 1e-4 * (GPUs x images) / 16, which --auto-scale-lr sets.
Weights: conv2former_t_in1k.pth, an ImageNet-1K classifier (docs/model_zoo.md).
Expected: not trained by us, and the paper trains for 36 epochs only.
"""
_base_ = [
    './_base_/mask_rcnn_conv2former.py',
    'mmdet::_base_/datasets/coco_instance.py',
    './_base_/schedule_1x.py',
]

# Our choice: the 3x recipe for a third of the epochs, with half the drop path
# and mmdet's own pipeline of one scale.
model = dict(
    backbone=dict(
        arch='tiny',
        drop_path_rate=0.2,
        init_cfg=dict(type='Pretrained', checkpoint='conv2former_t_in1k.pth')),
    neck=dict(in_channels=[72, 144, 288, 576]))

optim_wrapper = dict(
    optimizer=dict(lr=1e-4),
    paramwise_cfg=dict(decay_rate=0.95, num_layers=6))
