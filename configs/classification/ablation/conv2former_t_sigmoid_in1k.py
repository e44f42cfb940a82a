"""Ablation: Conv2Former-T with sigmoid(A) * V.

Train: bash tools/dist_train.sh \
    configs/classification/ablation/conv2former_t_sigmoid_in1k.py 8 --amp
Batch: 8 GPUs x 128 images = 1024 at lr 1e-3; with another batch,
lr = 1e-3 * (GPUs x images) / 1024, which --auto-scale-lr sets.
All else is conv2former_t_in1k.py, whose A * V reaches 83.2 % top-1 (paper).
Expected: 82.3 % top-1 (paper).
"""
_base_ = ['../conv2former_t_in1k.py']

model = dict(backbone=dict(fusion='sigmoid'))
