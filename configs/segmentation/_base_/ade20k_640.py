# ADE20K with crops of 640x640; all else is as with 512x512.
_base_ = ['./ade20k_512.py']

train_pipeline = _base_.train_pipeline
train_pipeline[2].scale = (2560, 640)
train_pipeline[3].crop_size = (640, 640)
test_pipeline = _base_.test_pipeline
test_pipeline[1].scale = (2560, 640)
tta_pipeline = _base_.tta_pipeline
tta_pipeline[1].transforms[0] = [
    dict(
        type='Resize',
        scale=tuple(side * 640 // 512 for side in resize.scale),
        keep_ratio=True) for resize in tta_pipeline[1].transforms[0]
]

train_dataloader = dict(dataset=dict(pipeline=train_pipeline))
val_dataloader = dict(dataset=dict(pipeline=test_pipeline))
test_dataloader = val_dataloader
