# ImageNet-1K at 224x224 in the batches of fine-tuning.
_base_ = ['./imagenet_224.py']

# 8 GPUs x 64 = 512, the batch size of the recipe.
train_dataloader = dict(batch_size=64)
val_dataloader = dict(batch_size=64)
test_dataloader = val_dataloader
