"""Mask R-CNN with Conv2Former-T on COCO, 3x schedule (36 epochs).

Train: bash tools/dist_train.sh \
           configs/detection/mask_rcnn_conv2former_t_coco.py 8 --amp
Batch: 8 GPUs x 2 images = 16 at lr 1e-4. With another number of GPUs or
another batch size, --auto-scale-lr sets lr = 1e-4 * (GPUs x batch) / 16.
Mixed precision: the --amp above, which the recipe trains with; leave it out
for fp32, or add --cfg-options optim_wrapper.dtype=bfloat16 for bf16.
Weights: the ImageNet-1K classifier, looked for as conv2former_t_in1k.pth here
and in the folder that MMCONV2FORMER_WEIGHTS names; to start from another file
--cfg-options model.backbone.init_cfg.checkpoint=FILE, to start from scratch
--cfg-options model.backbone.init_cfg=None.
Expected: 48.0 box AP (paper).
"""
_base_ = [
    './_base_/mask_rcnn_conv2former.py', './_base_/coco_instance_ms_crop.py',
    './_base_/schedule_3x.py'
]

model = dict(
    backbone=dict(
        arch='tiny',
        drop_path_rate=0.4,
        init_cfg=dict(type='Pretrained', checkpoint='conv2former_t_in1k.pth')),
    neck=dict(in_channels=[72, 144, 288, 576]))

optim_wrapper = dict(
    optimizer=dict(lr=1e-4),
    paramwise_cfg=dict(decay_rate=0.95, num_layers=6))
