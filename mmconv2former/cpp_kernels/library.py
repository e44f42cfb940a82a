"""The C++ kernels, compiled when they are first needed."""
import ctypes
import hashlib
import os
import platform
import shlex
import shutil
import subprocess
import tempfile
from ctypes import c_float, c_int, c_int64, c_void_p
from functools import cache
from pathlib import Path

import torch
from mmengine.logging import print_log

FOLDER = Path(__file__).resolve().parent
# Arguments of the functions: p for a pointer, l for a size, i for an integer
# that is small, f for a number in fp32. As many as in the sources: ctypes
# passes further ones without a word, and as small integers.
TYPES = {'p': c_void_p, 'l': c_int64, 'i': c_int, 'f': c_float}
FUNCTIONS = {
    'gate': 'ppppp llll iii',
    'gate_backward': 'pppppppp llll iiii',
    'position': 'pppp llll iii',
    'position_backward': 'pppppppp llll iiii',
    'layer_norm': 'pppfp llll iiii',
    'layer_norm_backward': 'ppppfpppp llll iiii',
    'scale_residual': 'ppppp lll iii',
    'scale_residual_backward': 'pppppp lll iii',
    'scale_residual_norm': 'ppppppfpp lll iii',
    'scale_residual_norm_backward': 'ppppfpppppppp lll iii',
}


# g++ has it from version 10 on; without, the kernels round by other means.
_BF16_OPTION = '-mavx512bf16'


class CompilerError(RuntimeError):
    """The kernels cannot run here; the text says why."""


def _instructions() -> list[str]:
    """Options of the compiler for the instructions that this CPU has."""
    # What torch itself makes use of, for which ATEN_CPU_CAPABILITY can ask.
    capability = torch.backends.cpu.get_cpu_capability()
    if capability == 'AVX2':
        return ['-mavx2', '-mfma']
    if not capability.startswith('AVX512'):
        raise CompilerError(
            f'want a CPU with AVX2 or AVX-512, and torch finds {capability}')
    options = ['-mfma', '-mavx512f', '-mavx512bw', '-mavx512dq', '-mavx512vl']
    if torch.cpu._is_avx512_bf16_supported():
        options.append(_BF16_OPTION)
    return options


def _compiler() -> list[str]:
    """The command of the environment variable CXX, or g++, or clang++."""
    commands = [os.environ['CXX']] if os.environ.get('CXX', '').strip() else [
        'g++', 'clang++']
    try:
        commands = [*map(shlex.split, commands)]
    except ValueError as error:
        raise CompilerError('cannot be compiled, because the environment '
                            f'variable CXX is {commands[0]!r}: {error}'
                            ) from error
    for name, *options in commands:
        if program := shutil.which(name):
            return [program, *options]
    raise CompilerError(
        'want a C++ compiler, and there is no '
        f'{" or ".join(map(shlex.join, commands))}: '
        'install one, or name it in the environment variable CXX')


def _compile(target: Path, command: list[str]) -> None:
    print_log(
        'Conv2Former: compiling C++ kernels, once, in ten to twenty seconds',
        logger='current')
    target.parent.mkdir(parents=True, exist_ok=True)
    # Of several processes each compiles, and the last one's file stays.
    with tempfile.TemporaryDirectory(dir=target.parent) as folder:
        built = Path(folder) / target.name
        done = subprocess.run([*command, '-o', str(built)],
                              capture_output=True, text=True,
                              errors='replace')
        if done.returncode:
            raise CompilerError(
                f'cannot be compiled: {" ".join(command)} ended with '
                f'{done.returncode} and says {done.stderr.strip()[:1000]}')
        with built.open('rb') as file:
            os.fsync(file.fileno())  # whole on disk before it has its name
        built.replace(target)


def _library() -> Path:
    """The compiled library in the user's cache folder, made if need be."""
    command = [
        *_compiler(), '-O3', '-std=c++17', '-ffp-contract=fast', '-shared',
        '-fPIC', '-fopenmp', *_instructions()
    ]
    try:
        return _compiled_by(command)
    except CompilerError:
        if _BF16_OPTION not in command:
            raise
    command.remove(_BF16_OPTION)
    return _compiled_by(command)


def _compiled_by(command: list[str]) -> Path:
    sources = sorted(FOLDER.glob('*.cpp'))
    # Machines that share a home may have another C library, or an older one.
    digest = hashlib.sha256(
        os.fsencode(' '.join([*command, *platform.libc_ver()])))
    for path in (*sources, *sorted(FOLDER.glob('*.h'))):
        digest.update(path.read_bytes())
    root = os.environ.get('XDG_CACHE_HOME') or Path.home() / '.cache'
    target = Path(root) / 'mmconv2former' / f'{digest.hexdigest()[:16]}.so'
    if not target.exists():
        _compile(target, [*command, *map(str, sources)])
    return target


@cache
def load() -> ctypes.CDLL:
    """The kernels, compiled if that has not been done yet.

    Returns:
        CDLL: With the functions of the sources, named without ``mmc_``.

    Raises:
        CompilerError: If they cannot be compiled or loaded here.
    """
    try:
        library = ctypes.CDLL(str(_library()))
        for name, arguments in FUNCTIONS.items():
            function = getattr(library, f'mmc_{name}')
            function.argtypes = [
                TYPES[kind] for kind in arguments if kind != ' ']
            function.restype = None
            setattr(library, name, function)
    except CompilerError:
        raise
    # Without a home a RuntimeError, and of a damaged file an AttributeError.
    except (OSError, RuntimeError, AttributeError) as error:
        raise CompilerError(
            f'cannot be written or loaded: {error}; delete that file, or name '
            'another folder for them in the environment variable '
            'XDG_CACHE_HOME') from error
    return library
