"""Ablation: Conv2Former-B with 15x15 kernels instead of 11x11.

Train: bash tools/dist_train.sh \
    configs/classification/ablation/conv2former_b_kernel15_in1k.py 8 --amp
Batch: 8 GPUs x 128 images = 1024 at lr 1e-3; with another batch,
lr = 1e-3 * (GPUs x images) / 1024, which --auto-scale-lr sets.
All else is conv2former_b_in1k.py, 84.4 % top-1 (paper).
Expected: between the ends that the paper gives, 84.1 (5x5) and 84.5 (21x21).
"""
_base_ = ['../conv2former_b_in1k.py']

model = dict(backbone=dict(kernel_size=15))
