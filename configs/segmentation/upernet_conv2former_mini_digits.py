# UperNet with a small Conv2Former on Digits: scenes of 128x128 pixels,
# background and ten digits. Starts from the weights that
# configs/classification/conv2former_mini_digits.py leaves.
#
#   python tools/train.py \
#       configs/segmentation/upernet_conv2former_mini_digits.py
#
# A template for your own images and label maps: change data_root, data_prefix
# and the suffixes, metainfo, num_classes and class_weight, size and pipelines
# (RandomResize, RandomCrop and RandomFlip for photographs), and the arch with
# its dims.
custom_imports = dict(imports=['mmconv2former'], allow_failed_imports=False)
default_scope = 'mmseg'

num_classes = 11
# Five pixels in six are background: without weights the first hundreds of
# iterations would learn nothing else.
class_weight = [0.4] + [2.0] * 10
norm_cfg = dict(type='BN', requires_grad=True)  # SyncBN on several GPUs
dims = [32, 64, 128, 256]
model = dict(
    type='EncoderDecoder',
    data_preprocessor=dict(
        type='SegDataPreProcessor',
        mean=[123.675, 116.28, 103.53],
        std=[58.395, 57.12, 57.375],
        bgr_to_rgb=True,
        pad_val=0,
        seg_pad_val=255,
        size=(128, 128)),
    backbone=dict(
        type='Conv2Former',
        arch=dict(depths=[1, 1, 2, 1], dims=dims, kernel_size=7),
        layer_scale_init_value=0.3,
        out_indices=(0, 1, 2, 3),
        out_norm=True,
        init_cfg=dict(
            type='Pretrained',
            checkpoint='work_dirs/conv2former_mini_digits/epoch_12.pth')),
    decode_head=dict(
        type='UPerHead',
        in_channels=dims,
        in_index=[0, 1, 2, 3],
        # The last map is 4x4; batch norm wants more than one value a channel.
        pool_scales=(2, 4),
        channels=64,
        dropout_ratio=0.1,
        num_classes=num_classes,
        norm_cfg=norm_cfg,
        align_corners=False,
        loss_decode=dict(
            type='CrossEntropyLoss',
            use_sigmoid=False,
            class_weight=class_weight,
            loss_weight=1.0)),
    auxiliary_head=dict(
        type='FCNHead',
        in_channels=dims[2],
        in_index=2,
        channels=64,
        num_convs=1,
        concat_input=False,
        dropout_ratio=0.1,
        num_classes=num_classes,
        norm_cfg=norm_cfg,
        align_corners=False,
        loss_decode=dict(
            type='CrossEntropyLoss',
            use_sigmoid=False,
            class_weight=class_weight,
            loss_weight=1.0)),
    train_cfg=dict(),
    test_cfg=dict(mode='whole'))

dataset_type = 'BaseSegDataset'
data_root = 'data/digits/scenes'
metainfo = dict(classes=('background', *'0123456789'))
train_pipeline = [
    dict(type='LoadImageFromFile'),
    dict(type='LoadAnnotations'),
    dict(type='PackSegInputs'),  # no flip: a mirrored digit is no digit
]
test_pipeline = [
    dict(type='LoadImageFromFile'),
    dict(type='LoadAnnotations'),
    dict(type='PackSegInputs'),
]
train_dataloader = dict(
    batch_size=4,
    num_workers=1,
    persistent_workers=True,
    sampler=dict(type='InfiniteSampler', shuffle=True),
    dataset=dict(
        type=dataset_type,
        data_root=data_root,
        metainfo=metainfo,
        img_suffix='.png',
        data_prefix=dict(img_path='train', seg_map_path='labels/train'),
        pipeline=train_pipeline))
val_dataloader = dict(
    batch_size=8,
    num_workers=1,
    sampler=dict(type='DefaultSampler', shuffle=False),
    dataset=dict(
        type=dataset_type,
        data_root=data_root,
        metainfo=metainfo,
        img_suffix='.png',
        data_prefix=dict(img_path='val', seg_map_path='labels/val'),
        pipeline=test_pipeline))
test_dataloader = val_dataloader
val_evaluator = dict(type='IoUMetric', iou_metrics=['mIoU'])
test_evaluator = val_evaluator

max_iters = 2000  # 8 times the 1,000 scenes, 4 at a step
train_cfg = dict(
    type='IterBasedTrainLoop', max_iters=max_iters, val_interval=max_iters)
val_cfg = dict(type='ValLoop')
test_cfg = dict(type='TestLoop')
# A rate for this batch size; --auto-scale-lr scales it to another one.
auto_scale_lr = dict(enable=False, base_batch_size=4)
optim_wrapper = dict(
    type='OptimWrapper',
    optimizer=dict(
        type='AdamW', lr=3e-3, betas=(0.9, 0.999), weight_decay=0.05,
        fused=True),
    constructor='LayerDecayOptimWrapperConstructor',
    # The stem learns at 0.8^6 = 0.26 of the rate, the last stage at 0.8 of
    # it, the heads at the whole.
    paramwise_cfg=dict(
        decay_rate=0.8,
        decay_type='layer_wise',
        num_layers=5,
        norm_decay_mult=0.,
        bias_decay_mult=0.,
        flat_decay_mult=0.),
    clip_grad=dict(max_norm=5.0))
param_scheduler = [
    dict(type='LinearLR', start_factor=0.01, by_epoch=False, end=30),
    dict(
        type='CosineAnnealingLR',
        begin=30,
        end=max_iters,
        by_epoch=False,
        eta_min_ratio=1e-6 / 3e-3),
]

# Batch norms go on with their statistics; of several processes their mean is
# evaluated and saved.
custom_hooks = [dict(type='SyncBuffersHook')]
default_hooks = dict(
    timer=dict(type='IterTimerHook'),
    logger=dict(type='LoggerHook', interval=20, log_metric_by_epoch=False),
    param_scheduler=dict(type='ParamSchedulerHook'),
    checkpoint=dict(
        type='CheckpointHook',
        by_epoch=False,
        interval=max_iters,
        max_keep_ckpts=3),
    sampler_seed=dict(type='DistSamplerSeedHook'),
    visualization=dict(type='SegVisualizationHook'))
env_cfg = dict(
    cudnn_benchmark=False,
    mp_cfg=dict(mp_start_method='fork', opencv_num_threads=0),
    dist_cfg=dict(backend='nccl'))
vis_backends = [dict(type='LocalVisBackend')]
visualizer = dict(
    type='SegLocalVisualizer', vis_backends=vis_backends, name='visualizer')
log_processor = dict(by_epoch=False)
log_level = 'INFO'
load_from = None
resume = False
randomness = dict(seed=0)
