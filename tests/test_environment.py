"""What the package imports and requires, and what setup_env.sh does.

The script is run with a stand-in python whose pip only writes down what it
was asked to install, so its whole course is seen in a second.
"""
import ast
import re
import runpy
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGE_FILES = sorted((ROOT / 'mmconv2former').rglob('*.py'))
PYTHON_FILES = PACKAGE_FILES + sorted(
    path for folder in ('configs', 'tools')
    for path in (ROOT / folder).rglob('*.py'))

BLOCK_IMPORTS = """
import sys

class Blocker:
    def find_spec(self, name, path=None, target=None):
        if name.partition('.')[0] in {blocked}:
            raise ModuleNotFoundError(f'No module named {{name!r}}', name=name)

sys.meta_path.insert(0, Blocker())
"""


def run_python(code, blocked=()):
    """Run code in a new interpreter in which some packages do not exist."""
    code = BLOCK_IMPORTS.format(blocked=tuple(blocked)) + code
    return subprocess.run([sys.executable, '-c', code], cwd=ROOT,
                          capture_output=True, text=True)


# ------------------------------------------------------------- the package


def test_package_runs_without_the_task_libraries():
    libraries = ('mmcv', 'mmdet', 'mmseg', 'mmpretrain', 'torchvision')
    done = run_python(
        """
import torch
import mmconv2former

model = mmconv2former.Conv2Former('nano').eval()
with torch.no_grad():
    outputs = model(torch.zeros(1, 3, 32, 32))
print([tuple(x.shape) for x in outputs])
print(sorted({name.partition('.')[0] for name in sys.modules}))
""", blocked=libraries)
    assert done.returncode == 0, done.stderr
    shapes, loaded = done.stdout.strip().splitlines()[-2:]
    assert shapes == '[(1, 512, 1, 1)]'
    assert not set(ast.literal_eval(loaded)) & set(libraries)


def test_missing_mmengine_names_both_ways_to_get_it():
    done = run_python('import mmconv2former', blocked=('mmengine', ))
    assert done.returncode != 0
    message = done.stderr.strip().splitlines()[-1]
    assert message.startswith('ModuleNotFoundError')
    assert "pip install '.[onedl]'" in message
    assert "pip install '.[openmmlab]'" in message


@pytest.mark.parametrize('version, is_old', [
    ('2.6.0+cu124', True), ('2.7.0a0+7c8ec84dab', False), ('2.10.0', False)])
def test_an_old_torch_is_named(version, is_old):
    done = run_python(f"""
import torch
from torch.torch_version import TorchVersion
torch.__version__ = TorchVersion('{version}')
import mmconv2former
""")
    assert (done.returncode != 0) == is_old, done.stderr
    message = f'found torch {version}; mmconv2former expects 2.7 or later'
    assert (message in done.stderr) == is_old


def test_package_is_found_next_to_the_folder_of_a_clone(tmp_path):
    (tmp_path / 'mmconv2former').mkdir()
    code = 'import mmconv2former; print(mmconv2former.__file__)'
    done = subprocess.run([sys.executable, '-c', code], cwd=tmp_path,
                          capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip().endswith('__init__.py')


def name_of(path):
    return str(path.relative_to(ROOT))


def test_there_are_files_to_check():
    assert len(PACKAGE_FILES) > 3
    assert len(PYTHON_FILES) > len(PACKAGE_FILES)


@pytest.mark.parametrize('path', PACKAGE_FILES, ids=name_of)
def test_package_imports_torch_and_mmengine_only(path):
    allowed = {'torch', 'mmengine', 'mmconv2former', *sys.stdlib_module_names}
    # Imported for GPUs only, as the next test sees.
    if path.parent.name == 'triton_kernels':
        allowed.add('triton')
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            names = [node.module]
        else:
            continue
        foreign = {name.partition('.')[0] for name in names} - allowed
        assert not foreign, f'{name_of(path)}:{node.lineno}'


def test_triton_is_not_imported_before_a_gpu_needs_it():
    code = ('import sys, torch, mmconv2former\n'
            'mmconv2former.Conv2Former("n").eval()(torch.rand(1, 3, 32, 32))\n'
            'print(any(name.startswith("mmconv2former.triton")'
            ' for name in sys.modules))')
    done = subprocess.run([sys.executable, '-c', code], check=True,
                          capture_output=True, text=True, timeout=120)
    assert done.stdout.split()[-1] == 'False'


@pytest.mark.parametrize('path', PYTHON_FILES, ids=name_of)
def test_nothing_touches_the_import_path(path):
    for node in ast.walk(ast.parse(path.read_text())):
        touches = (isinstance(node, ast.Attribute) and node.attr == 'path'
                   and isinstance(node.value, ast.Name)
                   and node.value.id == 'sys')
        touches |= (isinstance(node, ast.ImportFrom) and node.module == 'sys'
                    and any(alias.name == 'path' for alias in node.names))
        assert not touches, f'{name_of(path)}:{node.lineno}'


# ---------------------------------------------------------------- setup.py


@pytest.fixture(scope='module')
def metadata():
    return runpy.run_path(str(ROOT / 'setup.py'))


def test_version_is_read_without_importing(metadata):
    code = "import runpy; print(runpy.run_path('setup.py')['read_version']())"
    done = run_python(code, blocked=('torch', 'mmengine', 'mmconv2former'))
    assert done.returncode == 0, done.stderr
    assert re.fullmatch(r'\d+\.\d+\.\d+', done.stdout.strip())


def test_families_share_no_mm_distribution(metadata):

    def mm_names(extra):
        names = [re.match('[A-Za-z0-9-]+', requirement).group()
                 for requirement in metadata['EXTRAS'][extra]]
        return {name for name in names if 'mm' in name}

    maintained, original = mm_names('onedl'), mm_names('openmmlab')
    assert len(maintained) == len(original) == 5
    assert all(name.startswith('onedl-') for name in maintained)
    assert not any(name.startswith('onedl-') for name in original)
    assert not mm_names('test')


def test_bare_package_requires_torch_only():
    done = run_python("""
import runpy
import setuptools

setuptools.setup = lambda **kwargs: print(kwargs['install_requires'])
runpy.run_path('setup.py', run_name='__main__')
""")
    assert done.returncode == 0, done.stderr
    assert ast.literal_eval(done.stdout) == ['torch']


# ------------------------------------------------------------ setup_env.sh

FAKE_PYTHON = r"""#!/usr/bin/env bash
here=$(dirname "$0")
site=$here/../site
case "$*" in
    *'-m pip '*'--version'*) exit 0 ;;
    *'-m pip '*)
        printf '%s\n' "$*" >>"$here/../pip.txt"
        case "$*" in
            *' list '*) cat "$here/../list.txt" 2>/dev/null ;;
            *' install '*)
                for word in "$@"; do
                    [[ $word == *==* ]] || continue
                    name=${word%%==*}
                    rm -rf "$site/${name//-/_}"-*
                    info=$site/${name//-/_}-${word##*==}.dist-info
                    mkdir "$info"
                    printf 'Name: %s\nVersion: %s\n' "$name" "${word##*==}" \
                        >"$info/METADATA"
                done ;;
        esac
        exit 0 ;;
    *'import nms'*) ! rm "$here/../mmcv-is-unfit" 2>/dev/null; exit $? ;;
    *import*cv2* | *'import mmdet'*) exit 0 ;;
    '-I - '*)
        shift 2
        PYTHONPATH=$site exec "$REAL_PYTHON" -S - "$@" ;;
    *) exec "$REAL_PYTHON" "$@" ;;
esac
"""


class Sandbox:
    """A copy of the script, a stand-in python and a PATH of its own."""
    tools = ('bash', 'env', 'dirname', 'sed', 'cat', 'uname', 'awk', 'grep',
             'tr', 'tee', 'tail', 'cut', 'getconf', 'mkdir', 'rm')

    def __init__(self, folder):
        self.folder = folder
        self.bin = folder / 'bin'
        self.env = folder / 'env'
        for path in self.bin, self.env / 'bin', self.env / 'site':
            path.mkdir(parents=True)
        (folder / 'tools').mkdir()
        shutil.copy(ROOT / 'setup.py', folder)
        self.script = folder / 'tools' / 'setup_env.sh'
        shutil.copy(ROOT / 'tools' / 'setup_env.sh', self.script)
        for tool in self.tools:
            (self.bin / tool).symlink_to(shutil.which(tool))
        self.write('env/bin/python', FAKE_PYTHON)
        self.write('bin/python3', f'#!/bin/sh\nexec {sys.executable} "$@"\n')
        self.write('bin/c++', '#!/bin/sh\ncat >/dev/null\n')
        self.has_free(100)

    def write(self, name, text):
        path = self.folder / name
        path.write_text(text)
        path.chmod(0o755)

    def has_free(self, gigabytes):
        """How large the disk appears, whatever that of this machine is."""
        self.write('bin/df', f'#!/bin/sh\necho\necho disk 0 0 '
                             f'{gigabytes * 2**20} 0% /\n')

    def run(self, *args, active=False, **environ):
        """Run the script from another folder.

        Args:
            args (str): Its arguments.
            active (bool): Whether the stand-in environment is active.
            environ (str): More environment variables.

        Returns:
            subprocess.CompletedProcess: With text output.
        """
        environ.update(PATH=str(self.bin), HOME=str(self.folder),
                       CUDA_HOME=str(self.folder), REAL_PYTHON=sys.executable)
        if active:
            environ['VIRTUAL_ENV'] = str(self.env)
        return subprocess.run(['bash', str(self.script), *args], text=True,
                              cwd=self.env, env=environ, capture_output=True,
                              timeout=60)

    def pip_calls(self):
        """What pip was asked for since the last call, without listings."""
        path = self.env / 'pip.txt'
        calls = path.read_text().splitlines() if path.exists() else []
        path.unlink(missing_ok=True)
        return [call for call in calls if ' list ' not in call]


@pytest.fixture
def sandbox(tmp_path):
    return Sandbox(tmp_path)


def assert_stops(done, *words):
    assert done.returncode != 0
    assert done.stdout == ''
    for word in words:
        assert word in done.stderr


def test_too_old_python_is_named_with_what_to_do(sandbox):
    sandbox.write('bin/python3', """#!/bin/sh
[ "$1" = --version ] && echo 'Python 3.9.2'
exit 1
""")
    assert_stops(sandbox.run(), 'python3 is Python 3.9.2',
                 'Python 3.10, 3.11 or 3.12 is needed',
                 'apt-get install python3.11-venv', 'PYTHON=')


def test_missing_python_is_named(sandbox):
    (sandbox.bin / 'python3').unlink()
    assert_stops(sandbox.run(), 'there is no python3')


@pytest.mark.parametrize('blind, lacks, package', [
    ('*ensurepip*', 'cannot make virtual environments', 'python3-venv'),
    ('*cv2* | *libGL.so.1*', 'no libGL.so.1', 'libgl1'),
    ('*cv2* | *libgthread*', 'no libgthread-2.0.so.0', 'libglib2.0-0'),
])
def test_missing_system_package_is_named(sandbox, blind, lacks, package):
    sandbox.write('bin/python3', f"""#!/bin/sh
case "$*" in {blind}) exit 1 ;; *import*ctypes*) exit 0 ;; esac
exec {sys.executable} "$@"
""")
    assert_stops(sandbox.run(), lacks, 'apt-get install', package)


def test_too_small_a_disk_is_named(sandbox):
    sandbox.has_free(9)
    assert_stops(sandbox.run(), '9 GB of free space', 'needs 10',
                 'larger disk')


def test_missing_compiler_is_named(sandbox):
    (sandbox.bin / 'c++').unlink()
    assert_stops(sandbox.run(), 'no C++ compiler',
                 'apt-get install build-essential')


@pytest.mark.parametrize('command, told', [
    ('none c++', "'none' is not in PATH"),
    ('c++ -fnone', 'c++ -fnone cannot compile')])
def test_compiler_may_be_several_words(command, told, sandbox):
    (sandbox.bin / 'c++').unlink()
    sandbox.write('bin/c++', '#!/bin/sh\n! [ "$1" = -fnone ]')
    assert_stops(sandbox.run(CXX=command), told)


def test_missing_python_headers_are_named(sandbox):
    sandbox.write('bin/python3', f"""#!/bin/sh
case "$*" in *sysconfig*) echo /nowhere; exit ;; esac
exec {sys.executable} "$@"
""")
    assert_stops(sandbox.run(), '/nowhere/Python.h',
                 f'apt-get install python3.{sys.version_info[1]}-dev')


def test_gpu_without_nvcc_is_named(sandbox):
    sandbox.write('bin/nvidia-smi', '#!/bin/sh\n')
    assert_stops(sandbox.run(), 'no nvcc', 'CUDA_VISIBLE_DEVICES=')


@pytest.mark.parametrize('args, message', [
    (('--family', 'stock'), "unknown family 'stock'; known: onedl, original"),
    (('--family', ), "unknown family ''"),
    (('--quick', ), "unknown argument '--quick'"),
])
def test_unknown_arguments_are_named(sandbox, args, message):
    assert_stops(sandbox.run(*args), message)


def test_families_are_not_mixed(sandbox):
    (sandbox.env / 'list.txt').write_text('numpy==2.2.6\nmmcv==2.1.0\n')
    assert_stops(sandbox.run(active=True), 'holds mmcv==2.1.0', '--family')
    (sandbox.env / 'list.txt').write_text('onedl-mmcv==2.3.6\n')
    assert_stops(sandbox.run('--family', 'original', active=True),
                 'holds onedl-mmcv==2.3.6')


def test_broken_environment_is_named(sandbox):
    (sandbox.env / 'bin' / 'python').unlink()
    assert_stops(sandbox.run(active=True), str(sandbox.env), 'no working')


def test_active_conda_environment_is_used_but_not_base(sandbox):
    (sandbox.bin / 'c++').unlink()
    sandbox.write('env/bin/python', '#!/bin/sh\nexit 1\n')
    assert_stops(
        sandbox.run(CONDA_PREFIX=str(sandbox.env), CONDA_DEFAULT_ENV='mm'),
        'no working python')
    assert_stops(
        sandbox.run(CONDA_PREFIX=str(sandbox.env), CONDA_DEFAULT_ENV='base'),
        'no C++ compiler')


@pytest.mark.parametrize('family, mmcv, extra', [
    ('onedl', 'onedl-mmcv==2.3.6', 'onedl'),
    ('original', 'mmcv==2.1.0', 'openmmlab'),
])
def test_order_of_installation(sandbox, family, mmcv, extra):
    done = sandbox.run('--family', family, active=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout == f'{sandbox.env}/bin/python\n'
    tools, torch, built, rest = sandbox.pip_calls()
    assert 'setuptools>=77,<81' in tools
    assert torch.endswith(' torch==2.11.0 torchvision==0.26.0')
    assert '--no-build-isolation' in built and built.endswith(f' {mmcv}')
    assert rest.endswith(f' -e .[{extra},test]')
    assert 'conda activate' in done.stderr


def test_second_run_installs_nothing(sandbox):
    first = sandbox.run(active=True)
    assert first.returncode == 0, first.stderr
    sandbox.pip_calls()
    second = sandbox.run(active=True)
    assert second.returncode == 0, second.stderr
    assert second.stdout == first.stdout
    assert sandbox.pip_calls() == []


def test_changed_pins_are_installed(sandbox):
    assert sandbox.run(active=True).returncode == 0
    sandbox.pip_calls()
    setup = sandbox.folder / 'setup.py'
    setup.write_text(setup.read_text().replace('1.3.6', '1.3.7'))
    assert sandbox.run(active=True).returncode == 0
    assert sandbox.pip_calls()[-1].endswith('-e .[onedl,test]')


def test_torch_of_an_active_environment_is_kept(sandbox):
    info = sandbox.env / 'site' / 'torch-2.5.1.dist-info'
    info.mkdir()
    (info / 'METADATA').write_text('Name: torch\nVersion: 2.5.1\n')
    done = sandbox.run(active=True)
    assert done.returncode == 0, done.stderr
    assert 'keeping torch 2.5.1' in done.stderr
    assert sandbox.pip_calls()[1].endswith(' torch==2.5.1 torchvision')


def test_mmcv_is_built_anew_for_another_torch(sandbox):
    assert sandbox.run(active=True).returncode == 0
    sandbox.pip_calls()
    site = sandbox.env / 'site'
    (site / 'torch-2.11.0.dist-info').rename(site / 'torch-2.12.0.dist-info')
    (site / 'torch-2.12.0.dist-info' / 'METADATA').write_text(
        'Name: torch\nVersion: 2.12.0\n')
    done = sandbox.run(active=True)
    assert done.returncode == 0, done.stderr
    assert 'mmcv was built for torch 2.11.0' in done.stderr
    removed, built = sandbox.pip_calls()[2:4]
    assert removed.endswith('cache remove onedl_mmcv')
    assert '--force-reinstall' in built


def test_unfit_wheel_from_the_cache_is_built_anew(sandbox):
    (sandbox.env / 'mmcv-is-unfit').touch()
    done = sandbox.run(active=True)
    assert done.returncode == 0, done.stderr
    removed, built = sandbox.pip_calls()[-2:]
    assert removed.endswith('cache remove onedl_mmcv')
    assert '--force-reinstall' in built


@pytest.mark.parametrize('reason, further, hint', [
    ('ERROR: No space left on device', 0, 'disk is full'),
    ('error: C++20 or later compatible compiler is required', 99,
     'install an older torch'),
])
def test_failed_step_shows_the_log_and_a_hint(sandbox, reason, further, hint):
    log = [reason, *(f'line {i}' for i in range(further))]
    sandbox.write('env/bin/python', FAKE_PYTHON.replace(
        "*'-m pip '*)", f"*' -e '*) echo '{chr(10).join(log)}'\n"
        "        exit 1 ;;\n    *'-m pip '*)", 1))
    done = sandbox.run(active=True)
    assert_stops(done, f'| {log[-1]}\n', hint, 'mmconv2former-setup.log')
    assert not (sandbox.env / 'mmconv2former-setup.stamp').exists()
