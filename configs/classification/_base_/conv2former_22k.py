# Conv2Former with the 21,841 classes of ImageNet-22K (docs/data.md).
_base_ = ['./conv2former.py']

model = dict(head=dict(num_classes=21841))
