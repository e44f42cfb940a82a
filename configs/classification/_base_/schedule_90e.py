# The schedule of ImageNet-1K for the 90 epochs of ImageNet-22K. ConvNeXt's
# 4e-3 at batch 4096 is the same rate for each image.
_base_ = ['./schedule_300e.py']

train_cfg = dict(max_epochs=90)
val_cfg = None
test_cfg = None
default_hooks = dict(checkpoint=dict(save_best=None))
