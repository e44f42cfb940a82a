"""What the README says is so, and files that it or the docs name exist."""
import re
from pathlib import Path

import pytest
import torch
from mmengine.config import Config
from mmengine.registry import MODELS, init_default_scope
from mmengine.runner import Runner
from torch.utils.flop_counter import FlopCounterMode

import official

ROOT = Path(__file__).parents[1]
README = (ROOT / 'README.md').read_text()
ROWS = re.findall(
    r'^\| `([\w-]+)`, `(\w+)` \| ([\d,]+)[^|]*\| ([\d.]+) G[^|]*'
    r'\| ([\d.]+) G', README, re.MULTILINE)


def test_table_of_variants_is_whole():
    names = {name for row in ROWS for name in row[:2]}
    from mmconv2former.archs import ARCH_ALIASES
    wanted = set(ARCH_ALIASES.values()) | {
        alias.replace('-', '_') for alias in ARCH_ALIASES}
    assert names == wanted


@pytest.mark.parametrize('row', ROWS, ids=lambda row: row[1])
def test_parameters_and_macs_are_as_counted(row):
    name, alias, parameters, *gmacs = row
    with torch.device('meta'):
        model = official.Classifier(alias).eval()
        for size, expected in zip((224, 384), gmacs, strict=True):
            with FlopCounterMode(display=False) as counter, torch.no_grad():
                model(torch.empty(1, 3, size, size))
            assert f'{counter.get_total_flops() / 2e9:.2f}' == expected
    assert model.backbone.arch == official.resolve_arch(name)
    assert f'{sum(p.numel() for p in model.parameters()):,}' == parameters


def test_the_config_lines_work_in_a_detector(tmp_path):
    pytest.importorskip('mmdet')
    blocks = re.findall(r'```python\n(.*?)```', README, re.DOTALL)
    assert len(blocks) == 2
    path = tmp_path / 'mine.py'
    path.write_text(
        "_base_ = ['mmdet::_base_/models/retinanet_r50_fpn.py',\n"
        "          'mmdet::_base_/schedules/schedule_1x.py']\n" +
        '\n'.join(blocks).replace("arch='tiny'", "arch='nano'").replace(
            '[72, 144, 288, 576]', '[64, 128, 256, 512]'))
    cfg = Config.fromfile(path)
    init_default_scope('mmdet')
    model = MODELS.build(cfg.model)
    assert model.backbone.init_cfg['checkpoint'] == 'conv2former_t_in1k.pth'
    groups = Runner.build_optim_wrapper(
        type('Stub', (), dict(model=model)), cfg.optim_wrapper
    ).optimizer.param_groups
    assert min(group['lr_scale'] for group in groups) == pytest.approx(.95**7)


@pytest.mark.parametrize(
    'path', [ROOT / 'README.md', *sorted(ROOT.glob('docs/*.md'))],
    ids=lambda path: path.name)
def test_every_file_that_is_named_exists(path):
    text = path.read_text()
    named = {ROOT / name for name in re.findall(
        r'\b(?:tools|configs|tests|docs|mmconv2former|benchmarks)/[\w./-]*\w',
        text)}
    named |= {path.parent / link
              for link in re.findall(r'\]\(([\w./-]+)[)#]', text)}
    assert len(named) > 2
    assert [name for name in named if not name.exists()] == []


def test_there_are_docs():
    assert len([*ROOT.glob('docs/*.md')]) > 5


def test_every_module_of_the_package_is_named():
    modules = {path.name for path in (ROOT / 'mmconv2former').glob('*.py')}
    assert [name for name in modules - {'__init__.py'}
            if f'{name}`' not in README] == []


def test_every_tool_that_is_imported_and_not_run_is_named():
    row, = re.findall(r'^\| `tools/`, imported and not run \| (.*) \|$',
                      README, re.MULTILINE)
    assert sorted(re.findall(r'`([\w.]+)`', row)) == sorted(
        path.name for path in (ROOT / 'tools').glob('*.py')
        if "__name__ == '__main__'" not in path.read_text())
