"""What tools/train.py --resume goes on from, and with what."""
import logging
import shutil
import zipfile
from types import SimpleNamespace

import pytest
import torch
from mmengine.config import Config
from mmengine.optim import (
    LinearLR,
    LinearMomentum,
    LinearParamScheduler,
    OptimWrapper,
)
from mmengine.runner import EpochBasedTrainLoop
from torch.amp import GradScaler

import amp


@pytest.fixture
def resume(load_tool):
    return load_tool('resume')


def test_last_checkpoint_is_found_where_the_work_dir_was_moved(
        resume, tmp_path):
    note = tmp_path / 'last_checkpoint'
    assert resume.latest_checkpoint(str(tmp_path)) is None
    note.write_text('/gone/epoch_2.pth')
    (tmp_path / 'epoch_1.pth').write_bytes(b'of a process that was killed')
    with pytest.raises(SystemExit, match='none that is whole .* without --re'):
        resume.latest_checkpoint(str(tmp_path))
    torch.save({}, tmp_path / 'epoch_1.pth')
    with pytest.raises(SystemExit, match=r'--resume PATH, of epoch_1\.pth'):
        resume.latest_checkpoint(str(tmp_path))
    note.write_text('')  # of a process that was killed
    with pytest.raises(SystemExit, match="names the checkpoint ''"):
        resume.latest_checkpoint(str(tmp_path))
    torch.save({}, tmp_path / 'epoch_2.pth')
    note.write_text('/gone/epoch_2.pth')
    assert resume.latest_checkpoint(str(tmp_path)) == str(
        tmp_path / 'epoch_2.pth')
    copy = tmp_path / 'copy'
    shutil.copytree(tmp_path, copy)
    (copy / 'last_checkpoint').write_text(str(tmp_path / 'epoch_2.pth'))
    assert resume.latest_checkpoint(str(copy)) == str(copy / 'epoch_2.pth')
    (copy / 'epoch_2.pth').unlink()
    assert resume.latest_checkpoint(str(copy)) == str(tmp_path / 'epoch_2.pth')
    note.unlink()  # where only the checkpoints were copied
    with pytest.raises(SystemExit, match='no file last_checkpoint in .*PATH, '
                       r'of epoch_1\.pth, epoch_2\.pth'):
        resume.latest_checkpoint(str(tmp_path))
    for name in 'epoch_1.pth', 'epoch_2.pth':
        (tmp_path / name).rename(tmp_path / name.replace('epoch', 'iter'))
    with pytest.raises(SystemExit, match=r'of iter_1\.pth, iter_2\.pth there'):
        resume.latest_checkpoint(str(tmp_path))


def test_processes_that_resume_different_checkpoints_end(resume,
                                                         monkeypatch):
    cfg = Config(dict(work_dir='w', resume=True, load_from='w/epoch_2.pth'))
    resume.check_processes(cfg)
    monkeypatch.setattr(resume, 'all_gather_object',
                        lambda own: [own, 'none', own])
    with pytest.raises(SystemExit, match=(
            r'checkpoints \(epoch_2.pth, none\), this one epoch_2.pth in ')):
        resume.check_processes(cfg)


def start(type='AdamW', end=10, max_iters=20, **settings):
    """A runner as the hook sees it."""
    settings = dict(lr=0.1) | settings
    model = torch.nn.Linear(2, 2)
    wrapper = OptimWrapper(
        getattr(torch.optim, type)([
            dict(params=[model.weight], lr=settings['lr'] / 2, lr_scale=.5),
            dict(params=[model.bias]),
        ], **settings))
    return SimpleNamespace(
        cfg=Config(dict(load_from='a.pth',
                        train_cfg=dict(max_iters=max_iters))),
        optim_wrapper=wrapper, logger=logging.getLogger('resume'),
        param_schedulers=[LinearLR(wrapper, 0.5, end=end, by_epoch=False)])


def checkpoint(runner, iteration=2):
    """What mmengine would save of it after some iterations."""
    for _ in range(iteration):
        runner.optim_wrapper.step()
        runner.param_schedulers[0].step()
    return dict(
        meta=dict(epoch=0, iter=iteration),
        optimizer=runner.optim_wrapper.state_dict(),
        param_schedulers=[runner.param_schedulers[0].state_dict()])


def warnings(resume, runner, saved, caplog):
    with caplog.at_level(logging.WARNING, 'resume'):
        resume.ResumedSettings().after_load_checkpoint(runner, saved)
    return caplog.messages


def test_resuming_with_the_same_settings_says_nothing(resume, caplog):
    assert not warnings(resume, start(), checkpoint(start()), caplog)


@pytest.mark.parametrize('schedule', [
    lambda wrapper: LinearMomentum(wrapper, 0.5, end=10, by_epoch=False),
    lambda wrapper: LinearParamScheduler(wrapper, 'weight_decay', 0.5, end=10,
                                         by_epoch=False)])
def test_what_a_schedule_has_changed_is_no_other_setting(schedule, resume,
                                                         caplog):
    runners = [start(), start()]
    for runner in runners:
        runner.param_schedulers = [schedule(runner.optim_wrapper)]
    assert not warnings(resume, runners[0], checkpoint(runners[1]), caplog)


def test_groups_that_do_not_learn_are_resumed(resume, caplog):
    runners = [start(), start()]
    for runner in runners:
        group = runner.optim_wrapper.param_groups[0]
        group['lr'] = group['initial_lr'] = group['lr_scale'] = 0.
    assert not warnings(resume, runners[0], checkpoint(runners[1]), caplog)


def test_settings_that_the_checkpoint_overrules_are_told(resume, caplog):
    message, = warnings(
        resume, start(lr=0.105, end=30, max_iters=40, weight_decay=0.3),
        checkpoint(start(weight_decay=0.4)), caplog)
    assert 'lr of the optimizer 0.1 (config: 0.105); ' in message
    assert 'weight_decay of the optimizer 0.4 (config: 0.3); ' in message
    assert 'end of param_scheduler.0 10 (config: 30); ' in message
    assert 'total_iters of param_scheduler.0 9 (config: 29). ' in message
    assert message.endswith('--cfg-options load_from=a.pth')
    assert len(message.split(';')) == 4


@pytest.mark.parametrize('saved, expected', [
    (dict(enabled=False), 2.**16),  # bf16 on a CPU
    (dict(init_scale=1.), 2.**16),  # bf16 on a GPU
    (dict(init_scale=2.**9), 2.**9),
])
def test_fp16_goes_on_from_its_own_loss_scale(saved, expected, resume,
                                              caplog):
    state = dict(param_groups=start().optim_wrapper.state_dict()[
        'param_groups'], loss_scaler=GradScaler('cpu', **saved).state_dict())
    runner = start()
    runner.optim_wrapper = amp.CPUAmpOptimWrapper(
        'float16', optimizer=runner.optim_wrapper.optimizer)
    assert not warnings(resume, runner, dict(meta={}, optimizer=state), caplog)
    runner.optim_wrapper.load_state_dict(dict(state, state={}))
    assert runner.optim_wrapper.loss_scaler.get_scale() == expected


@pytest.mark.parametrize('hooks', [[], [dict(type='EMAHook')]])
def test_averages_that_are_not_gone_on_with_are_told(hooks, resume, caplog):
    runner = start()
    runner.cfg.custom_hooks = hooks
    saved = dict(checkpoint(start()), ema_state_dict={})
    told = warnings(resume, runner, saved, caplog)
    assert len(told) == (not hooks)
    assert all('goes on from the averaged weights' in text for text in told)


def test_settings_of_any_group_are_told(resume, caplog):
    saved = checkpoint(start())
    saved['optimizer']['param_groups'][1]['weight_decay'] = 0.7
    message, = warnings(resume, start(), saved, caplog)
    assert 'weight_decay of the optimizer 0.7 (config: 0.01). ' in message


def test_checkpoints_without_schedules_are_resumed(resume, caplog):
    saved = {**checkpoint(start()), 'param_schedulers': None}
    assert not warnings(resume, start(), saved, caplog)


@pytest.mark.parametrize('length, told', [(5, False), (3, True)])
def test_iterations_are_those_of_epochs_as_long_as_now(length, told, resume,
                                                       caplog):
    runner = start()
    runner.train_loop = EpochBasedTrainLoop.__new__(EpochBasedTrainLoop)
    runner.train_loop.dataloader = range(length)
    saved = checkpoint(start())
    saved['meta'] = dict(epoch=2, iter=10)
    messages = warnings(resume, runner, saved, caplog)
    assert saved['meta']['iter'] == 2 * length
    assert [f'has {length} iterations: the checkpoint is taken for one after '
            f'{2 * length} in place of 10' in text for text in messages
            ] == [True] * told


@pytest.mark.parametrize('unit', ['epoch', 'iter'])
def test_training_that_has_ended_is_told(unit, resume, caplog):
    runner = start()
    runner.cfg.train_cfg = {f'max_{unit}s': 20}
    saved = checkpoint(start())
    saved['meta'][unit] = 20
    message, = warnings(resume, runner, saved, caplog)
    assert message.startswith(
        f'Nothing is left to train: train_cfg.max_{unit}s is 20, and the '
        'checkpoint has seen 20. Validation that was cut short is not made up')


@pytest.mark.parametrize('missing', ['meta', 'optimizer', 'state_dict'])
def test_checkpoints_with_a_part_missing_are_refused(missing, resume,
                                                     tmp_path):
    weights = dict(weight=torch.zeros(1))
    whole = dict(meta={}, optimizer={}, state_dict=weights, model=weights)
    torch.save({key: value for key, value in whole.items() if key != missing},
               tmp_path / 'a.pth')
    with pytest.raises(SystemExit, match=f"a.pth', has no {missing}, as a"):
        resume.check_resumable(str(tmp_path / 'a.pth'), Config({}))


def test_another_optimizer_is_refused(resume, caplog):
    saved = checkpoint(start('SGD', momentum=0.9))
    with pytest.raises(SystemExit, match=(
            'another optimizer than AdamW: it has dampening, momentum, '
            'nesterov and no amsgrad, betas, .*eps.* start without --resume')):
        warnings(resume, start(), saved, caplog)


@pytest.mark.parametrize('names', [{}, dict(names=['weight'])])
def test_other_groups_are_refused_where_nothing_else_compares_them(
        names, resume, caplog):
    saved, runner = checkpoint(start()), start()
    one, other = saved['optimizer']['param_groups']
    saved['optimizer']['param_groups'] = [
        {**one, 'params': one['params'] + other['params']}]
    runner.optim_wrapper.param_groups[0].update(names)
    refused = ''
    try:
        warnings(resume, runner, saved, caplog)
    except SystemExit as error:
        refused = str(error)
    assert bool(refused) != bool(names)
    assert not refused or (
        'checkpoint: 2 tensors, number of groups 1; in this config 2, number '
        'of groups 2.' in refused and 'start without --resume' in refused)


def test_settings_of_other_versions_of_torch_are_no_other_optimizer(
        resume, caplog):
    saved = checkpoint(start())
    for group in saved['optimizer']['param_groups']:
        del group['fused']
    assert not warnings(resume, start(), saved, caplog)


@pytest.mark.parametrize('made, here', [(True, False), (False, True)])
def test_sharded_training_is_resumed_as_such_only(resume, tmp_path, made,
                                                  here):
    path = str(tmp_path / 'a.pth')
    params = ['weight'] if made else [0]
    torch.save(dict(meta={}, state_dict=dict(weight=torch.ones(1)),
                    optimizer=dict(state={}, param_groups=[
                        dict(params=params)])), path)
    kinds = {False: Config({}),
             True: Config(dict(strategy=dict(type='ShardedStrategy')))}
    resume.check_resumable(path, kinds[made])
    word = {False: 'without', True: 'with'}
    with pytest.raises(SystemExit, match=(
            f'was made {word[made]} --fsdp, and this run is {word[here]} it')):
        resume.check_resumable(path, kinds[here])


def test_whole_checkpoints_beside_a_damaged_one_are_named(resume, tmp_path):
    for name in 'epoch_1.pth', 'epoch_2.pth':
        torch.save(dict(meta={}, optimizer={}, state_dict={}),
                   tmp_path / name)
    path = tmp_path / 'epoch_2.pth'
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(SystemExit, match=(
            r'epoch_2\.pth is damaged .* for --resume PATH: epoch_1\.pth$')):
        resume.check_resumable(str(path), Config({}))
    with zipfile.ZipFile(path, 'w') as file:  # whole, and no checkpoint
        file.writestr('a.txt', 'a')
    with pytest.raises(SystemExit, match=r'--resume PATH: epoch_1\.pth$'):
        resume.check_resumable(str(path), Config({}))
