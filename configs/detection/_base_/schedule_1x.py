# The 3x schedule cut to 12 epochs, a tenth of the learning rate from epochs 8
# and 11 on.
_base_ = ['./schedule_3x.py']

param_scheduler = _base_.param_scheduler
param_scheduler[1].update(end=12, milestones=[8, 11])
train_cfg = dict(max_epochs=12)
