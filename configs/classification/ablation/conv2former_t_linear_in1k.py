"""Ablation: Conv2Former-T with A scaled linearly to (0, 1], times V.

Train: bash tools/dist_train.sh \
           configs/classification/ablation/conv2former_t_linear_in1k.py 8 --amp
All else is conv2former_t_in1k.py, whose A * V reaches 83.2 % top-1 (paper).
Expected: 82.2 % top-1 (paper).
"""
_base_ = ['../conv2former_t_in1k.py']

model = dict(backbone=dict(fusion='linear'))
