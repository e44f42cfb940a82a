"""UperNet with Conv2Former-L on ADE20K, crops of 640x640, 160k iterations.

Train: bash tools/dist_train.sh \
           configs/segmentation/upernet_conv2former_l_ade20k.py 8 --amp
Batch: 8 GPUs x 2 images = 16 at lr 1e-4; with another batch,
lr = 1e-4 * (GPUs x images) / 16, which --auto-scale-lr sets.
Memory: --cfg-options model.backbone.with_cp=True recomputes the blocks in the
backward pass; docs/training.md has FSDP.
Weights: conv2former_l_in22k.pth, an ImageNet-22K classifier
(docs/model_zoo.md).
Test: single scale, or six scales and their mirror images with --tta.
Expected: 54.3 mIoU (paper).
"""
_base_ = [
    './_base_/upernet_conv2former.py', './_base_/ade20k_640.py',
    './_base_/schedule_160k.py'
]

# ConvNeXt-L's drop path.
model = dict(
    data_preprocessor=dict(size=(640, 640)),
    backbone=dict(
        arch='large',
        drop_path_rate=0.4,
        init_cfg=dict(
            type='Pretrained', checkpoint='conv2former_l_in22k.pth')),
    decode_head=dict(in_channels=[128, 256, 512, 1024], num_classes=150),
    auxiliary_head=dict(in_channels=512, num_classes=150),
    test_cfg=dict(mode='slide', crop_size=(640, 640), stride=(426, 426)))

optim_wrapper = dict(paramwise_cfg=dict(num_layers=12))
