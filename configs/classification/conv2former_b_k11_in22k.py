"""Conv2Former-B with 11x11 kernels on ImageNet-22K, 90 epochs at 224x224.

The official code's B for ImageNet-22K has 7x7 kernels
(conv2former_b_in22k.py).

Train: bash tools/dist_train.sh \
           configs/classification/conv2former_b_k11_in22k.py 8 --amp
Batch: 8 GPUs x 128 images = 1024 at lr 1e-3; with another batch,
lr = 1e-3 * (GPUs x images) / 1024, which --auto-scale-lr sets.
Expected: not evaluated by itself; fine-tuned on ImageNet-1K, see
conv2former_b_k11_in22k_ft_in1k.py.
"""
_base_ = [
    './_base_/conv2former_22k.py', './_base_/imagenet22k_224.py',
    './_base_/schedule_90e.py'
]

# Our choice of drop path: the paper publishes none; 0.1 is ConvNeXt-B's.
model = dict(
    backbone=dict(arch='base', drop_path_rate=0.1),
    neck=dict(in_channels=768))
