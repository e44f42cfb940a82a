# mmdet's own Cascade Mask R-CNN with FPN, on Conv2Former, with the box heads
# of Swin and ConvNeXt: four convolutions and a linear layer, synchronised
# batch norm, boxes for each class, and the GIoU loss on decoded boxes.
_base_ = ['mmdet::_base_/models/cascade-mask-rcnn_r50_fpn.py']
custom_imports = dict(imports=['mmconv2former'], allow_failed_imports=False)

model = dict(
    backbone=dict(
        _delete_=True,
        type='Conv2Former',
        out_indices=(0, 1, 2, 3),
        out_norm=True),
    roi_head=dict(bbox_head=[
        dict(
            type='Shared4Conv1FCBBoxHead',
            in_channels=256,
            conv_out_channels=256,
            fc_out_channels=1024,
            roi_feat_size=7,
            num_classes=80,
            bbox_coder=dict(
                type='DeltaXYWHBBoxCoder',
                target_means=[0., 0., 0., 0.],
                target_stds=stds),
            reg_class_agnostic=False,
            reg_decoded_bbox=True,
            norm_cfg=dict(type='SyncBN', requires_grad=True),
            loss_cls=dict(
                type='CrossEntropyLoss', use_sigmoid=False, loss_weight=1.0),
            loss_bbox=dict(type='GIoULoss', loss_weight=10.0))
        # Each stage refines boxes that are closer to the truth.
        for stds in ([0.1, 0.1, 0.2, 0.2], [0.05, 0.05, 0.1, 0.1],
                     [0.033, 0.033, 0.067, 0.067])
    ]))
