# Fine-tuning for 30 epochs (the paper's number): AdamW from 5e-5 along a
# cosine to 1e-6 without warm-up, next to no weight decay, and layer-wise decay
# over the backbone. All but the epochs is ConvNeXt's. The lowest rate is a
# share of that of each group, as ConvNeXt's is.
_base_ = ['mmpretrain::_base_/default_runtime.py']

optim_wrapper = dict(
    type='OptimWrapper',
    # 5e-5 at batch 512; --auto-scale-lr scales it linearly to another one.
    optimizer=dict(
        type='AdamW', lr=5e-5, betas=(0.9, 0.999), weight_decay=1e-8),
    constructor='LayerDecayOptimWrapperConstructor',
    paramwise_cfg=dict(
        decay_rate=0.8,
        decay_type='layer_wise',
        num_layers=12,
        norm_decay_mult=0.,
        bias_decay_mult=0.,
        flat_decay_mult=0.))
auto_scale_lr = dict(enable=False, base_batch_size=512)

param_scheduler = [
    dict(
        type='CosineAnnealingLR',
        eta_min_ratio=1e-6 / 5e-5,
        by_epoch=True,
        convert_to_iter_based=True)
]

train_cfg = dict(by_epoch=True, max_epochs=30, val_interval=1)
val_cfg = dict()
test_cfg = dict()

# Each process has its own statistics in the batch norms of the stem. Their
# mean over the processes is evaluated and saved, as the official code does.
custom_hooks = [dict(type='SyncBuffersHook')]
default_hooks = dict(
    checkpoint=dict(max_keep_ckpts=3, save_best='auto', rule='greater'))
