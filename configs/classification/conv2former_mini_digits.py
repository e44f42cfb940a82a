# A small Conv2Former on Digits: 10 classes, 4,314 training images of 64x64.
#
#   python tools/make_digits.py data/digits
#   python tools/train.py configs/classification/conv2former_mini_digits.py
#
# A template for your own images in class folders: change data_root,
# num_classes, the image size in the pipelines (224 or 384 for photographs) and
# the arch ('nano', 'tiny', ...) with the in_channels of the neck (512, 576,
# ...), and start from pre-trained weights with
# init_cfg=dict(type='Pretrained', checkpoint=...).
_base_ = ['mmpretrain::_base_/default_runtime.py']
custom_imports = dict(imports=['mmconv2former'], allow_failed_imports=False)

num_classes = 10
model = dict(
    type='ImageClassifier',
    backbone=dict(
        type='Conv2Former',
        arch=dict(depths=[1, 1, 2, 1], dims=[32, 64, 128, 256], kernel_size=7),
        # 1,620 iterations from nothing leave no time to grow layer
        # scales from 1e-6 or weights from a std of 0.02, the values for
        # hundreds of epochs.
        layer_scale_init_value=0.3,
        init_cfg=dict(
            type='Kaiming',
            layer='Conv2d',
            mode='fan_in',
            nonlinearity='linear')),
    neck=dict(type='Conv2FormerNeck', in_channels=256, out_channels=256),
    head=dict(
        type='LinearClsHead',
        in_channels=256,
        num_classes=num_classes,
        loss=dict(type='CrossEntropyLoss', loss_weight=1.0)))
data_preprocessor = dict(
    num_classes=num_classes,
    mean=[123.675, 116.28, 103.53],
    std=[58.395, 57.12, 57.375],
    to_rgb=True)

dataset_type = 'CustomDataset'  # one folder per class
data_root = 'data/digits/classification'
train_pipeline = [
    dict(type='LoadImageFromFile'),
    # No flip: a mirrored digit is no digit.
    dict(type='RandomResize', scale=(64, 64), ratio_range=(0.8, 1.2)),
    dict(type='RandomCrop', crop_size=64, padding=4, padding_mode='reflect'),
    dict(type='ColorJitter', brightness=0.3, contrast=0.3),
    dict(type='PackInputs'),
]
test_pipeline = [
    dict(type='LoadImageFromFile'),
    dict(type='PackInputs'),
]
train_dataloader = dict(
    batch_size=32,
    num_workers=1,
    persistent_workers=True,
    sampler=dict(type='DefaultSampler', shuffle=True),
    # As lists: some images stay below 64 pixels. The preprocessor pads them.
    collate_fn=dict(type='pseudo_collate'),
    dataset=dict(
        type=dataset_type,
        data_root=data_root,
        data_prefix='train',
        pipeline=train_pipeline))
val_dataloader = dict(
    batch_size=64,
    num_workers=1,
    sampler=dict(type='DefaultSampler', shuffle=False),
    dataset=dict(
        type=dataset_type,
        data_root=data_root,
        data_prefix='val',
        pipeline=test_pipeline))
test_dataloader = val_dataloader
val_evaluator = dict(type='Accuracy', topk=(1, ))
test_evaluator = val_evaluator

max_epochs = 12  # x 135 iterations (4,314 images / 32)
train_cfg = dict(by_epoch=True, max_epochs=max_epochs, val_interval=max_epochs)
val_cfg = dict()
test_cfg = dict()
# A rate for this batch size; --auto-scale-lr scales it to another one.
auto_scale_lr = dict(enable=False, base_batch_size=32)
optim_wrapper = dict(
    optimizer=dict(
        type='AdamW', lr=1e-3, weight_decay=0.05, fused=True),
    # Without layer decay (a rate of 1), for its few parameter groups: mmengine
    # makes one of each tensor, and goes through 125 of them at every step.
    constructor='LayerDecayOptimWrapperConstructor',
    paramwise_cfg=dict(
        decay_rate=1., norm_decay_mult=0., bias_decay_mult=0.),
    clip_grad=dict(max_norm=5.0))
param_scheduler = [
    dict(
        type='LinearLR', start_factor=0.01, end=1, convert_to_iter_based=True),
    dict(
        type='CosineAnnealingLR',
        begin=1,
        end=max_epochs,
        eta_min=1e-6,
        convert_to_iter_based=True),
]
# Batch norms go on with their statistics; of several processes their mean is
# evaluated and saved.
custom_hooks = [dict(type='SyncBuffersHook')]
default_hooks = dict(
    logger=dict(interval=20),
    checkpoint=dict(interval=max_epochs, max_keep_ckpts=3))
randomness = dict(seed=0)
