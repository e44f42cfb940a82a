"""Mask R-CNN with Conv2Former-N on COCO, 3x schedule (36 epochs).

Train: bash tools/dist_train.sh \
           configs/detection/mask_rcnn_conv2former_n_coco.py 8 --amp
Batch: 8 GPUs x 2 images = 16 at lr 1e-4; with another batch,
lr = 1e-4 * (GPUs x images) / 16, which --auto-scale-lr sets.
Weights: conv2former_n_in1k.pth, an ImageNet-1K classifier (docs/model_zoo.md).
Expected: not trained by us, and no published figure is known to us.
"""
_base_ = [
    './_base_/mask_rcnn_conv2former.py',
    './_base_/coco_instance_ms_crop.py',
    './_base_/schedule_3x.py',
]

# Our choice: T's recipe with half its drop path, for a model half its size.
model = dict(
    backbone=dict(
        arch='nano',
        drop_path_rate=0.2,
        init_cfg=dict(type='Pretrained', checkpoint='conv2former_n_in1k.pth')),
    neck=dict(in_channels=[64, 128, 256, 512]))

optim_wrapper = dict(
    optimizer=dict(lr=1e-4),
    paramwise_cfg=dict(decay_rate=0.95, num_layers=6))
