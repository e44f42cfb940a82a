"""Cascade Mask R-CNN with Conv2Former-L on COCO, 3x schedule (36 epochs).

Train: bash tools/dist_train.sh \
           configs/detection/cascade_mask_rcnn_conv2former_l_coco.py 8 --amp
Batch: 8 GPUs x 2 images = 16 at lr 1e-4; with another batch,
lr = 1e-4 * (GPUs x images) / 16, which --auto-scale-lr sets.
Memory: --cfg-options model.backbone.with_cp=True recomputes the blocks in the
backward pass; docs/training.md has FSDP.
Weights: conv2former_l_in22k.pth, an ImageNet-22K classifier
(docs/model_zoo.md).
Expected: not trained by us, and no published figure is known to us.
"""
_base_ = [
    './_base_/cascade_mask_rcnn_conv2former.py',
    './_base_/coco_instance_ms_crop.py',
    './_base_/schedule_3x.py',
]

# ConvNeXt-L's drop path, rate and decay from 22K weights.
model = dict(
    backbone=dict(
        arch='large',
        drop_path_rate=0.7,
        init_cfg=dict(
            type='Pretrained', checkpoint='conv2former_l_in22k.pth')),
    neck=dict(in_channels=[128, 256, 512, 1024]))

optim_wrapper = dict(
    optimizer=dict(lr=1e-4),
    paramwise_cfg=dict(decay_rate=0.7, num_layers=12))
