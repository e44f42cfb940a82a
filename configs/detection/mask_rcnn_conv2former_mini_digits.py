# Mask R-CNN with a small Conv2Former on Digits: scenes of 128x128 pixels, ten
# classes, boxes and masks. Starts from the weights that
# configs/classification/conv2former_mini_digits.py leaves.
#
#   python tools/train.py \
#       configs/detection/mask_rcnn_conv2former_mini_digits.py
#
# A template for your own COCO file: change data_root, ann_file, metainfo and
# num_classes, the scale in both pipelines, and the arch with its dims. The
# heads are a quarter of the usual width, and fewer boxes are looked at,
# because small images hold few digits: leave these lines out for photographs,
# and the settings of the base apply.
_base_ = [
    'mmdet::_base_/models/mask-rcnn_r50_fpn.py',
    'mmdet::_base_/default_runtime.py',
]
custom_imports = dict(imports=['mmconv2former'], allow_failed_imports=False)

num_classes = 10
dims = [32, 64, 128, 256]
model = dict(
    backbone=dict(
        _delete_=True,
        type='Conv2Former',
        arch=dict(depths=[1, 1, 2, 1], dims=dims, kernel_size=7),
        layer_scale_init_value=0.3,
        out_indices=(0, 1, 2, 3),
        out_norm=True,
        init_cfg=dict(
            type='Pretrained',
            checkpoint='work_dirs/conv2former_mini_digits/epoch_12.pth')),
    neck=dict(in_channels=dims, out_channels=64, num_outs=4),
    rpn_head=dict(
        in_channels=64,
        feat_channels=64,
        # anchors of 16, 32, 64 and 128 pixels: 4 x stride
        anchor_generator=dict(scales=[4], strides=[4, 8, 16, 32])),
    roi_head=dict(
        bbox_roi_extractor=dict(
            out_channels=64, roi_layer=dict(sampling_ratio=1)),
        bbox_head=dict(
            in_channels=64, fc_out_channels=256, num_classes=num_classes),
        mask_roi_extractor=dict(
            out_channels=64, roi_layer=dict(sampling_ratio=1)),
        mask_head=dict(
            num_convs=2,
            in_channels=64,
            conv_out_channels=64,
            num_classes=num_classes)),
    train_cfg=dict(
        rpn=dict(sampler=dict(num=128)),
        rpn_proposal=dict(nms_pre=500, max_per_img=200),
        rcnn=dict(sampler=dict(num=64))),
    test_cfg=dict(
        rpn=dict(nms_pre=500, max_per_img=100),
        rcnn=dict(max_per_img=20)))

dataset_type = 'CocoDataset'
data_root = 'data/digits/scenes/'
metainfo = dict(classes=tuple('0123456789'))
train_pipeline = [
    dict(type='LoadImageFromFile'),
    dict(type='LoadAnnotations', with_bbox=True, with_mask=True),
    dict(type='Resize', scale=(128, 128), keep_ratio=True),
    dict(type='PackDetInputs'),  # no flip: a mirrored digit is no digit
]
test_pipeline = [
    dict(type='LoadImageFromFile'),
    dict(type='Resize', scale=(128, 128), keep_ratio=True),
    dict(
        type='PackDetInputs',
        meta_keys=('img_id', 'img_path', 'ori_shape', 'img_shape',
                   'scale_factor')),
]
train_dataloader = dict(
    batch_size=8,
    num_workers=1,
    persistent_workers=True,
    sampler=dict(type='DefaultSampler', shuffle=True),
    dataset=dict(
        type=dataset_type,
        data_root=data_root,
        metainfo=metainfo,
        ann_file='train.json',
        data_prefix=dict(img='train/'),
        pipeline=train_pipeline))
val_dataloader = dict(
    batch_size=8,
    num_workers=1,
    sampler=dict(type='DefaultSampler', shuffle=False),
    dataset=dict(
        type=dataset_type,
        data_root=data_root,
        metainfo=metainfo,
        ann_file='val.json',
        data_prefix=dict(img='val/'),
        test_mode=True,
        pipeline=test_pipeline))
test_dataloader = val_dataloader
val_evaluator = dict(
    type='CocoMetric',
    ann_file=data_root + 'val.json',
    metric=['bbox', 'segm'])
test_evaluator = val_evaluator

max_epochs = 2  # x 125 iterations (1,000 scenes / 8)
train_cfg = dict(
    type='EpochBasedTrainLoop', max_epochs=max_epochs, val_interval=max_epochs)
val_cfg = dict(type='ValLoop')
test_cfg = dict(type='TestLoop')
# A rate for this batch size; --auto-scale-lr scales it to another one.
auto_scale_lr = dict(enable=False, base_batch_size=8)
optim_wrapper = dict(
    type='OptimWrapper',
    optimizer=dict(
        type='AdamW', lr=1e-3, betas=(0.9, 0.999), weight_decay=0.05,
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
        end=max_epochs,
        eta_min_ratio=1e-6 / 1e-3,
        convert_to_iter_based=True),
]
# Batch norms go on with their statistics; of several processes their mean is
# evaluated and saved.
custom_hooks = [dict(type='SyncBuffersHook')]
default_hooks = dict(
    logger=dict(interval=10),
    checkpoint=dict(interval=max_epochs, max_keep_ckpts=3))
randomness = dict(seed=0)
