# Conv2Former with the official classification head: a 1x1 conv to 1280
# channels, GELU, LN and global average pooling (the neck), then a linear
# layer. A leaf gives the arch, its drop path and the neck's input channels.
custom_imports = dict(imports=['mmconv2former'], allow_failed_imports=False)

model = dict(
    type='ImageClassifier',
    backbone=dict(type='Conv2Former'),
    neck=dict(type='Conv2FormerNeck', out_channels=1280),
    head=dict(
        type='LinearClsHead',
        num_classes=1000,
        in_channels=1280,
        loss=dict(
            type='LabelSmoothLoss', label_smooth_val=0.1, mode='original'),
        topk=(1, 5),
        init_cfg=dict(type='TruncNormal', layer='Linear', std=0.02, bias=0.)),
    # One of the two for each batch, each half of the time.
    train_cfg=dict(augments=[
        dict(type='Mixup', alpha=0.8),
        dict(type='CutMix', alpha=1.0),
    ]))
