"""UperNet with Conv2Former-T on ADE20K, crops of 512x512, 160k iterations.

Train: bash tools/dist_train.sh \
           configs/segmentation/upernet_conv2former_t_ade20k.py 8 --amp
Batch: 8 GPUs x 2 images = 16 at lr 1e-4. With another number of GPUs or
another batch size, --auto-scale-lr sets lr = 1e-4 * (GPUs x batch) / 16.
Mixed precision: the --amp above, which the recipe trains with; leave it out
for fp32, or add --cfg-options optim_wrapper.dtype=bfloat16 for bf16.
Weights: the ImageNet-1K classifier, looked for as conv2former_t_in1k.pth here
and in the folder that MMCONV2FORMER_WEIGHTS names; to start from another file
--cfg-options model.backbone.init_cfg.checkpoint=FILE, to start from scratch
--cfg-options model.backbone.init_cfg=None.
Expected: 48.0 mIoU (paper).
"""
_base_ = [
    './_base_/upernet_conv2former.py', './_base_/ade20k_512.py',
    './_base_/schedule_160k.py'
]

model = dict(
    data_preprocessor=dict(size=(512, 512)),
    backbone=dict(
        arch='tiny',
        drop_path_rate=0.4,
        init_cfg=dict(type='Pretrained', checkpoint='conv2former_t_in1k.pth')),
    decode_head=dict(in_channels=[72, 144, 288, 576], num_classes=150),
    auxiliary_head=dict(in_channels=288, num_classes=150),
    test_cfg=dict(mode='slide', crop_size=(512, 512), stride=(341, 341)))
