"""Isotropic Conv2Former-IB with a 16x16 patch embedding
on ImageNet-1K, 300 epochs at 224x224.

Train: bash tools/dist_train.sh \
           configs/classification/conv2former_ib_in1k.py 8 --amp
Batch: 8 GPUs x 128 images = 1024 at lr 1e-3; with another batch,
lr = 1e-3 * (GPUs x images) / 1024, which --auto-scale-lr sets.
Expected: 82.7 % top-1 (paper).
"""
_base_ = [
    './_base_/conv2former.py', './_base_/imagenet_224.py',
    './_base_/schedule_300e.py'
]

# Our choices: the width (README.md, Variants), and the drop path, which is
# that of the isotropic ConvNeXt-B. Its warm-up of 50 epochs is left out.
model = dict(
    backbone=dict(arch='isotropic-base', drop_path_rate=0.2),
    neck=dict(in_channels=640))
