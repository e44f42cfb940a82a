# COCO 2017 instances, the short side between 480 and 800, and half of the
# time a crop in between, as in DETR and ConvNeXt. The data lies in data/coco.
_base_ = ['mmdet::_base_/datasets/coco_instance.py']

scales = [(short, 1333) for short in range(480, 801, 32)]

train_pipeline = [
    dict(type='LoadImageFromFile'),
    dict(type='LoadAnnotations', with_bbox=True, with_mask=True),
    dict(type='RandomFlip', prob=0.5),
    dict(
        type='RandomChoice',
        transforms=[
            [dict(type='RandomChoiceResize', scales=scales, keep_ratio=True)],
            [
                dict(
                    type='RandomChoiceResize',
                    scales=[(400, 1333), (500, 1333), (600, 1333)],
                    keep_ratio=True),
                dict(
                    type='RandomCrop',
                    crop_type='absolute_range',
                    crop_size=(384, 600),
                    allow_negative_crop=True),
                dict(
                    type='RandomChoiceResize', scales=scales, keep_ratio=True)
            ]
        ]),
    dict(type='PackDetInputs')
]

# 8 GPUs x 2 = 16 images a step.
train_dataloader = dict(batch_size=2, dataset=dict(pipeline=train_pipeline))
