# Conv2Former to be fine-tuned on ImageNet-1K from ImageNet-22K weights: no
# mixup and no cutmix, and a new linear layer that starts at a thousandth, so
# that it does not disturb what is trained. As ConvNeXt does; what the authors
# of Conv2Former did is not published.
_base_ = ['./conv2former.py']

model = dict(
    head=dict(init_cfg=dict(std=0.02 * 0.001)),
    train_cfg=None)
