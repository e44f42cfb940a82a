# mmdet's own Mask R-CNN with FPN, on Conv2Former. A leaf gives the arch, its
# drop path, the weights to start from and the FPN's input channels.
_base_ = ['mmdet::_base_/models/mask-rcnn_r50_fpn.py']
custom_imports = dict(imports=['mmconv2former'], allow_failed_imports=False)

model = dict(
    backbone=dict(
        _delete_=True,
        type='Conv2Former',
        out_indices=(0, 1, 2, 3),
        out_norm=True))
