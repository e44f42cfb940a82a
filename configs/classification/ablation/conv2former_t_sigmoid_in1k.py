"""Ablation: Conv2Former-T with sigmoid(A) * V.

Train: bash tools/dist_train.sh \
    configs/classification/ablation/conv2former_t_sigmoid_in1k.py 8 --amp
All else is conv2former_t_in1k.py, whose A * V reaches 83.2 % top-1 (paper).
Expected: 82.3 % top-1 (paper).
"""
_base_ = ['../conv2former_t_in1k.py']

model = dict(backbone=dict(fusion='sigmoid'))
