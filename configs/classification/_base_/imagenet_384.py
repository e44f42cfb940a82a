# ImageNet-1K at 384x384, augmented as at 224, in the batches of fine-tuning.
_base_ = ['./imagenet_224_bs64.py']

train_pipeline = _base_.train_pipeline
train_pipeline[1].scale = 384
test_pipeline = _base_.test_pipeline
# The official code evaluates the central 90 %: 384 / 0.9 = 426.
test_pipeline[1].scale = 426
test_pipeline[2].crop_size = 384
tta_pipeline = [*test_pipeline[:-1], _base_.tta_pipeline[-1]]

train_dataloader = dict(dataset=dict(pipeline=train_pipeline))
val_dataloader = dict(dataset=dict(pipeline=test_pipeline))
test_dataloader = val_dataloader
