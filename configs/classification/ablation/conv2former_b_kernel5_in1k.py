"""Ablation: Conv2Former-B with 5x5 kernels instead of 11x11.

Train: bash tools/dist_train.sh \
    configs/classification/ablation/conv2former_b_kernel5_in1k.py 8 --amp
Batch: 8 GPUs x 128 images = 1024 at lr 1e-3; with another batch,
lr = 1e-3 * (GPUs x images) / 1024, which --auto-scale-lr sets.
All else is conv2former_b_in1k.py, 84.4 % top-1 (paper).
Expected: 84.1 % top-1 (paper).
"""
_base_ = ['../conv2former_b_in1k.py']

model = dict(backbone=dict(kernel_size=5))
