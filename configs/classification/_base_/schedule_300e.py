# AdamW for 300 epochs: 5 epochs of linear warm-up from 1e-6 to 1e-3, then a
# cosine to 1e-6. Biases, norms and layer scales are not decayed, as in timm.
_base_ = ['mmpretrain::_base_/default_runtime.py']

optim_wrapper = dict(
    type='OptimWrapper',
    # 1e-3 at batch 1024; --auto-scale-lr scales it linearly to another one.
    optimizer=dict(
        type='AdamW', lr=1e-3, betas=(0.9, 0.999), weight_decay=0.05),
    # A rate of 1 decays no learning rate; it is the constructor that puts the
    # parameters into a few groups where mmengine's own makes one of each.
    constructor='LayerDecayOptimWrapperConstructor',
    paramwise_cfg=dict(
        decay_rate=1.,
        norm_decay_mult=0.,
        bias_decay_mult=0.,
        flat_decay_mult=0.))
auto_scale_lr = dict(enable=False, base_batch_size=1024)

param_scheduler = [
    dict(
        type='LinearLR',
        start_factor=1e-6 / 1e-3,
        by_epoch=True,
        end=5,
        convert_to_iter_based=True),
    dict(
        type='CosineAnnealingLR',
        eta_min_ratio=1e-6 / 1e-3,
        by_epoch=True,
        begin=5),
]

train_cfg = dict(by_epoch=True, max_epochs=300, val_interval=1)
val_cfg = dict()
test_cfg = dict()

# Each process has its own statistics in the batch norms of the stem. Their
# mean over the processes is evaluated and saved, as the official code does.
custom_hooks = [dict(type='SyncBuffersHook')]
default_hooks = dict(
    checkpoint=dict(max_keep_ckpts=3, save_best='auto', rule='greater'))
