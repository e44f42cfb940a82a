# ImageNet-22K at 224x224, augmented as ImageNet-1K. The data lies in
# data/imagenet22k/train/<class>/<image>; there is no validation set.
_base_ = ['./imagenet_224.py']

data_preprocessor = dict(num_classes=21841)
train_dataloader = dict(
    dataset=dict(type='ImageNet21k', data_root='data/imagenet22k'))
val_dataloader = None
val_evaluator = None
test_dataloader = None
test_evaluator = None
