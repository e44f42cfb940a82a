# AdamW for 160,000 iterations: 1500 of warm-up from 1e-6 of the learning
# rate, then linear to 0 (poly, power 1), with stage-wise decay over the
# backbone. Biases, norms and layer scales are not decayed.
_base_ = ['./default_runtime.py']

optim_wrapper = dict(
    type='OptimWrapper',
    # 1e-4 at batch 16; --auto-scale-lr scales it linearly to another one.
    optimizer=dict(
        type='AdamW', lr=1e-4, betas=(0.9, 0.999), weight_decay=0.05),
    constructor='LayerDecayOptimWrapperConstructor',
    paramwise_cfg=dict(
        decay_rate=0.9,
        decay_type='stage_wise',
        norm_decay_mult=0.,
        bias_decay_mult=0.,
        flat_decay_mult=0.))
auto_scale_lr = dict(enable=False, base_batch_size=16)

param_scheduler = [
    dict(
        type='LinearLR', start_factor=1e-6, by_epoch=False, begin=0, end=1500),
    dict(
        type='PolyLR',
        power=1.0,
        begin=1500,
        end=160000,
        eta_min=0.,
        by_epoch=False)
]

train_cfg = dict(
    type='IterBasedTrainLoop', max_iters=160000, val_interval=16000)
val_cfg = dict(type='ValLoop')
test_cfg = dict(type='TestLoop')

# Our choice: the stem's batch norms go on with their statistics, those of each
# process on 2 crops a step; their mean is evaluated.
custom_hooks = [dict(type='SyncBuffersHook')]
default_hooks = dict(
    logger=dict(type='LoggerHook', interval=50, log_metric_by_epoch=False),
    checkpoint=dict(
        type='CheckpointHook',
        by_epoch=False,
        interval=16000,
        max_keep_ckpts=3,
        save_best='mIoU',
        rule='greater'))
log_processor = dict(by_epoch=False)
