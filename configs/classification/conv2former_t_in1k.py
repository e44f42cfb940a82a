"""Conv2Former-T on ImageNet-1K, 300 epochs at 224x224.

Train: bash tools/dist_train.sh configs/classification/conv2former_t_in1k.py 8
Batch: 8 GPUs x 128 images = 1024 at lr 1e-3. With another number of GPUs or
another batch size, --auto-scale-lr sets lr = 1e-3 * (GPUs x batch) / 1024.
Mixed precision: --amp, in bf16 with
--cfg-options optim_wrapper.dtype=bfloat16 as well.
Expected: 83.2 % top-1 (paper).
"""
_base_ = [
    './_base_/conv2former.py', './_base_/imagenet_224.py',
    './_base_/schedule_300e.py'
]

# The paper does not publish the drop path rates; 0.1 is that of ConvNeXt-T.
model = dict(
    backbone=dict(arch='tiny', drop_path_rate=0.1),
    neck=dict(in_channels=576))
