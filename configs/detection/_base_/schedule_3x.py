# AdamW for 36 epochs: 1000 iterations of warm-up, a tenth of the learning
# rate from epochs 27 and 33 on, and layer-wise decay over the backbone.
# A leaf gives the learning rate and the decay. Biases, norms and layer
# scales are not decayed.
_base_ = ['mmdet::_base_/default_runtime.py']

optim_wrapper = dict(
    type='OptimWrapper',
    optimizer=dict(type='AdamW', betas=(0.9, 0.999), weight_decay=0.05),
    constructor='LayerDecayOptimWrapperConstructor',
    paramwise_cfg=dict(
        decay_type='layer_wise',
        norm_decay_mult=0.,
        bias_decay_mult=0.,
        flat_decay_mult=0.))
auto_scale_lr = dict(enable=False, base_batch_size=16)

param_scheduler = [
    dict(
        type='LinearLR', start_factor=0.001, by_epoch=False, begin=0,
        end=1000),
    dict(
        type='MultiStepLR',
        begin=0,
        end=36,
        by_epoch=True,
        milestones=[27, 33],
        gamma=0.1)
]

train_cfg = dict(type='EpochBasedTrainLoop', max_epochs=36, val_interval=1)
val_cfg = dict(type='ValLoop')
test_cfg = dict(type='TestLoop')

# Our choice: the stem's batch norms go on with their statistics, those of each
# process on 2 images a step; their mean is evaluated and saved.
custom_hooks = [dict(type='SyncBuffersHook')]
default_hooks = dict(
    checkpoint=dict(
        max_keep_ckpts=3, save_best='coco/bbox_mAP', rule='greater'))
