"""Time models against each other: one process, interleaved, with peak memory.

    python tools/benchmark.py --models conv2former-t@official conv2former-t \
        ConvNeXt:tiny SwinTransformer:tiny --mode forward train optimizer \
        --dtype bf16 --batch 128 --device cuda --json benchmarks/FILE.json

tools/benchmark_models.py says which models there are, and
tools/plot_benchmark.py prints the tables of such files anew and plots them.

Every combination of mode, dtype, batch and size is a case. Before a case is
timed, the outputs of the paths of an arch, and in training all gradients, are
compared, without drop path, with those of its first path. A path that differs
is not timed, nor is a model that fails; the run goes on without it, and ends
with an error. A sample is as many steps as take a tenth of a second; the
models take turns.

- forward: inference without gradients, in evaluation mode.
- train: forward, loss, backward and dropping the gradients. The loss of the
  classifier (1000 classes) is the cross-entropy. The backbone returns all
  stages, as dense tasks want it, and gets a random gradient for each.
- optimizer: the step of AdamW alone, with the groups of this package's layer
  decay and with those of mmpretrain's, one for each tensor.

Memory is the peak of the second step: in total, and what was added to model
and batch. On a GPU it is what torch allocated for this model, and in CUDA
graphs what it reserved, which is somewhat more. On the CPU it
is the resident set that Linux counts for a fresh process with this model
alone, where the total includes Python and torch.
"""
import argparse
import contextlib
import datetime
import gc
import itertools
import json
import math
import os
import platform
import re
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from importlib import import_module
from multiprocessing import get_context
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from mmengine.logging import MMLogger
from mmengine.optim import build_optim_wrapper
from torch import Tensor
from torch.utils import collect_env

from argument_types import positive
from benchmark_models import (
    PATHS,
    BuildError,
    arch_of,
    build_model,
    official_forward,
    switched,
)
from mmconv2former import dispatch, fuse_for_inference
from mmconv2former.archs import STEMS
from mmconv2former.cuda_graphs import WARM_UP, CUDAGraphs
from plot_benchmark import describe, report

Steps = dict[str, Callable[[], None]]  # of each model

DTYPES = dict(fp32=torch.float32, bf16=torch.bfloat16, fp16=torch.float16)
# Largest relative difference (2-norm) of an output or a gradient of a
# parameter between paths that agree, unless rounding alone makes more of it.
TOLERANCES = dict(fp32=1e-3, bf16=0.1, fp16=0.03)
SAMPLE_SECONDS = 0.1
MIN_REPEATS = 3  # whatever --seconds says
OUT_OF_MEMORY = 'out of memory'
# Matrix products (FLOP/s), other arithmetic (FLOP/s), memory (bytes/s).
PEAKS = {
    'NVIDIA H200': (790e12, 67e12, 4.3e12),
    'NVIDIA H100 80GB HBM3': (790e12, 67e12, 3.0e12),
}


class Case(NamedTuple):
    """What each of the models does."""
    task: str  # 'classifier' or 'backbone'
    mode: str  # 'forward', 'train' or 'optimizer'
    dtype: str  # of autocast
    batch: int
    height: int
    width: int
    device: str
    weights_dtype: str = 'fp32'  # and that of the images
    channels_last: bool = False  # weights and images
    drop_path: float = 0.
    cudnn_benchmark: bool = False


class Candidate:
    """A model, its batch and its step.

    Args:
        name (str): Name of the model.
        case (Case): What it does.
    """

    def __init__(self, name: str, case: Case) -> None:
        self.name, self.case = name, case
        self.path = name.partition('@')[2] or 'fused'
        self.train = case.mode == 'train'
        size = case.height, case.width
        options = dict(device=case.device, dtype=DTYPES[case.weights_dtype])
        if case.channels_last:
            options['memory_format'] = torch.channels_last
        self.model = build_model(name, case.task == 'backbone', case.drop_path,
                                 size, case.device).to(**options)
        self.model.train(self.train)
        if self.path == 'folded':
            fuse_for_inference(self.model)
        self.images = torch.randn(case.batch, 3, *size).to(**options)
        self.labels = torch.randint(1000, (case.batch, )).to(case.device)
        backbone = getattr(self.model, 'backbone', self.model)
        if self.path == 'compiled':
            backbone.compile()
        self.upstream: list[Tensor] = []
        if self.path == 'graphs':
            backbone.cuda_graphs = CUDAGraphs(1)
            for _ in range(WARM_UP + 1):  # so that what is compared is theirs
                self.step()

    def autocast(self) -> torch.autocast:
        """The context of the forward pass."""
        dtype = DTYPES[self.case.dtype]
        return torch.autocast(self.case.device, dtype,
                              enabled=dtype != torch.float32)

    def outputs(self) -> tuple[Tensor, ...]:
        """Logits, or the feature map of each stage."""
        with self.autocast():
            if self.path == 'official':
                outs = official_forward(self.model, self.images)
            else:
                outs = self.model(self.images)
        return outs if isinstance(outs, tuple) else (outs, )

    def backward(self, outs: tuple[Tensor, ...]) -> None:
        """Backward pass from random gradients, the same for all paths."""
        if not self.upstream:
            generator = torch.Generator().manual_seed(1)
            self.upstream = [
                (torch.randn(out.shape, generator=generator) /
                 (out.numel() / out.shape[1])**0.5).to(out) for out in outs
            ]
        torch.autograd.backward(outs, self.upstream)

    def step(self) -> None:
        """What is timed."""
        with switched(self.path), torch.set_grad_enabled(self.train):
            outs = self.outputs()
            if not self.train:
                return
            if self.case.task == 'classifier':
                F.cross_entropy(outs[0].float(), self.labels).backward()
            else:
                self.backward(outs)
            self.model.zero_grad(set_to_none=True)

    def results(self) -> dict[str, Tensor]:
        """Outputs, and in training the gradients of all parameters."""
        with switched(self.path), torch.set_grad_enabled(self.train):
            outs = self.outputs()
            if self.train:
                self.backward(outs)
        found = {f'output {i}': out.detach() for i, out in enumerate(outs)}
        found.update((f'gradient of {name}', p.grad)
                     for name, p in self.model.named_parameters()
                     if p.grad is not None)
        self.model.zero_grad(set_to_none=True)
        return {name: t.float().cpu() for name, t in found.items()}

    def loaded_bytes(self) -> int:
        """Size of the model, the batch and the random gradients."""
        return sum(t.nbytes for t in (
            *self.model.parameters(), *self.model.buffers(), self.images,
            self.labels, *self.upstream))

    def to_fp32(self) -> 'Candidate':
        """The same weights and images, and arithmetic in fp32."""
        self.model.float()
        self.images = self.images.float()
        self.case = self.case._replace(dtype='fp32')
        return self


def differences(results: dict[str, Tensor],
                reference: dict[str, Tensor]) -> dict[str, float]:
    """Relative difference of each tensor in the 2-norm.

    A tensor that is missing or not finite differs infinitely.
    """
    norms = {name: t.norm().item() for name, t in reference.items()}
    # A gradient that is a sum of cancelling numbers may be next to nothing.
    floor = 1e-3 * max(norms.values())
    found = {name: float('inf') for name in results.keys() ^ norms.keys()}
    for name in results.keys() & norms.keys():
        ratio = ((results[name] - reference[name]).norm().item() /
                 max(norms[name], floor))
        found[name] = ratio if math.isfinite(ratio) else float('inf')
    return found


def worst(found: dict[str, float],
          allowed: dict[str, float]) -> tuple[float, float, str]:
    """The difference that is largest beside what is allowed for its tensor,
    that allowance, and the tensor."""
    _, name = max((ratio / allowed[name], name)
                  for name, ratio in found.items())
    return found[name], allowed[name], name


def optimizer_steps(names: list[str],
                    case: Case) -> tuple[Steps, dict[str, dict]]:
    """Steps of AdamW for each model, with the groups of two constructors.

    Returns:
        tuple[Steps, dict]: As :func:`prepare`.
    """
    MMLogger.get_current_instance().setLevel('WARNING')  # tables of groups
    constructors = (
        ('mmpretrain', 'mmpretrain.LearningRateDecayOptimWrapperConstructor',
         dict(layer_decay_rate=0.9)),
        ('ours', 'mmconv2former.LayerDecayOptimWrapperConstructor',
         dict(decay_rate=0.9)))
    steps, facts = {}, {}
    for name, (whose, constructor, options), extra in itertools.product(
            dict.fromkeys(name.partition('@')[0] for name in names),
            constructors, ({}, dict(fused=True))):
        if name in facts:  # failed
            continue
        try:
            model = build_model(
                name, case.task == 'backbone', 0., (case.height, case.width),
                case.device)
        except BuildError as error:
            facts[name] = dict(failed=str(error))
            continue
        for p in model.parameters():
            p.grad = torch.randn_like(p)
        adamw = dict(type='AdamW', lr=1e-6, weight_decay=0.05, **extra)
        wrapper = dict(
            optimizer=adamw,
            constructor=constructor,
            paramwise_cfg=dict(options, norm_decay_mult=0.))
        try:
            optimizer = build_optim_wrapper(model, wrapper).optimizer
        except (AttributeError, NotImplementedError):
            facts[name] = dict(failed='has no layer depths to group by')
            continue
        groups = f'{len(optimizer.param_groups)} groups'
        label = ', '.join([name, whose, groups, *extra])
        steps[label], facts[label] = optimizer.step, {}
    return steps, facts


def resident(key: str) -> int:
    """Bytes of this process: 'VmRSS' now, 'VmHWM' at the peak."""
    status = Path('/proc/self/status').read_text()
    return 1024 * int(re.search(rf'{key}:\s*(\d+) kB', status)[1])


def cpu_memory(name: str, case: Case, threads: int) -> dict[str, int]:
    """Peak memory of a step; to be called in a fresh process."""
    torch.set_num_threads(threads)
    candidate = Candidate(name, case)
    loaded = resident('VmRSS')
    candidate.step()
    with contextlib.suppress(OSError):  # a container may forbid it
        Path('/proc/self/clear_refs').write_text('5')  # forget the peak
    candidate.step()
    peak = resident('VmHWM')
    return dict(memory_total=peak, memory_step=peak - loaded)


def gpu_memory(path: str) -> int:
    """Bytes that torch has allocated on the GPU.

    Or, for 'graphs', reserved: what the kernels of a graph use stays theirs,
    and does not count as allocated.
    """
    gc.collect()  # models with graphs are cycles
    if path != 'graphs':
        return torch.cuda.memory_allocated()
    torch.cuda.empty_cache()
    return torch.cuda.memory_reserved()


def measure_memory(candidate: Candidate, before: int) -> dict[str, int]:
    """Peak memory of a step in bytes, where it can be had.

    Args:
        candidate (Candidate): The model.
        before (int): Bytes of :func:`gpu_memory` without it.

    Returns:
        dict[str, int]: ``memory_total`` and ``memory_step``, or nothing.
    """
    if candidate.path == 'graphs':
        gpu_memory('graphs')  # what is not in use is given back
        candidate.step()
        total = torch.cuda.memory_reserved() - before
        return dict(memory_total=total,
                    memory_step=total - candidate.loaded_bytes())
    if candidate.case.device == 'cuda':
        loaded = torch.cuda.memory_allocated()
        candidate.step()
        torch.cuda.reset_peak_memory_stats()
        candidate.step()
        peak = torch.cuda.max_memory_allocated()
        return dict(memory_total=peak - before, memory_step=peak - loaded)
    if sys.platform != 'linux':
        return {}
    with ProcessPoolExecutor(1, mp_context=get_context('spawn')) as pool:
        return pool.submit(cpu_memory, candidate.name, candidate.case,
                           torch.get_num_threads()).result()


def roofline_seconds(name: str, case: Case, device_name: str) -> float | None:
    """Least time of a step of a fused Conv2Former in 16 bits.

    Counted are the blocks: matrix products, depthwise convolutions and
    memory, one after the other.

    Args:
        name (str): Name of the model.
        case (Case): What it does.
        device_name (str): Name of the GPU.

    Returns:
        float: Seconds; None for other models and where no peak is known.
    """
    arch = arch_of(name)
    if arch is None or device_name not in PEAKS or case.dtype == 'fp32':
        return None
    matmul, vector, bandwidth = PEAKS[device_name]
    stride, seconds = STEMS[arch['stem']]['stride'], 0.
    for depth, dim in zip(arch['depths'], arch['dims']):
        pixels = case.batch * (case.height // stride) * (case.width // stride)
        # Two FLOPs in each of three passes: forward, and the gradients of
        # input and weights. 92 numbers of 2 bytes are read or written for
        # each number of a feature map.
        products = 6 * pixels * 11 * dim**2
        depthwise = 6 * pixels * dim * (arch['kernel_size']**2 + 4 * 3**2)
        seconds += depth * (
            products / matmul + depthwise / vector +
            92 * 2 * pixels * dim / bandwidth)
        stride *= 2
    return seconds if case.mode == 'train' else seconds / 3


def rounding(name: str, case: Case, results: dict[str, Tensor],
             known: dict[str, dict[str, float]]) -> dict[str, float]:
    """What of the results of a model in 16 bits is rounding.

    The gradient of a bias is a sum over up to a million positions of numbers
    that nearly cancel out, of which bf16 may leave but one digit. Where that
    is so a path may be as wrong twice over, and differ by three times as much.

    Args:
        name (str): The model.
        case (Case): What it does.
        results (dict[str, Tensor]): Its results.
        known (dict[str, dict]): What was found before, for each model.

    Returns:
        dict[str, float]: Relative difference of each tensor from that in
        fp32; nothing if fp32 fails, as where it does not fit into the GPU.
    """
    if name not in known:
        try:
            exact = Candidate(name, case).to_fp32().results()
            known[name] = differences(results, exact)
        except Exception as error:
            failure(error)
            known[name] = {}
    return known[name]


def failure(error: Exception) -> str:
    """Print why a model fails, and say it in a line.

    Errors of Triton and of CUDA have no common base. The other models, and
    what was measured before, shall not be lost.
    """
    if isinstance(error, torch.cuda.OutOfMemoryError):
        return OUT_OF_MEMORY
    if isinstance(error, BuildError):
        print(error, file=sys.stderr, flush=True)
        return str(error)
    traceback.print_exception(error)
    return f'{type(error).__name__}: {error}'


def prepare(names: list[str], case: Case,
            memory: bool) -> tuple[Steps, dict[str, dict]]:
    """Build the models, compare the paths, measure memory.

    Args:
        names (list[str]): Names of the models.
        case (Case): What they do.
        memory (bool): Whether to measure memory.

    Returns:
        tuple[Steps, dict]: The steps of the models that can be timed, and what
        was found for each model: of others why not, as ``failed``.
    """
    steps, facts = {}, {name: {} for name in names}
    references, noises = {}, {}
    tolerance = max(TOLERANCES[case.dtype], TOLERANCES[case.weights_dtype])
    on_gpu, before = case.device == 'cuda', 0
    # Each path draws its own drop path.
    compared = case._replace(drop_path=0.)
    if on_gpu:  # what libraries allocate once is not the first model's
        with contextlib.suppress(Exception):  # it fails below once more
            Candidate(names[0], compared).results()
    for name in names:
        candidate = results = None  # that failed takes no more memory
        if on_gpu:
            before = gpu_memory(name.partition('@')[2])
        try:
            candidate = Candidate(name, compared)
            results = candidate.results()
            if case != compared:
                del candidate  # not two of them in memory
                candidate = Candidate(name, case)
            if memory:
                facts[name].update(measure_memory(candidate, before))
        except Exception as error:
            facts[name]['failed'] = failure(error)
            continue
        if on_gpu:
            facts[name]['roofline'] = roofline_seconds(
                name, case, torch.cuda.get_device_name())
        first, reference = references.setdefault(
            name.partition('@')[0], (name, results))
        if first != name:
            found = differences(results, reference)
            allowed = dict.fromkeys(found, tolerance)
            if max(found.values()) > tolerance > TOLERANCES['fp32']:
                noise = rounding(first, compared, reference, noises)
                # Less than all of it: what is not computed differs by 1.
                allowed = {key: max(tolerance, min(3 * noise.get(key, 0.), .5))
                           for key in found}
            ratio, limit, where = worst(found, allowed)
            if ratio > limit:
                facts[name]['failed'] = (
                    f'differs from {first} by {ratio:.2g} in the {where}, '
                    f'where {limit:.2g} is allowed: one of the two computes '
                    'something else')
                continue
            facts[name].update(difference=ratio, tolerance=limit)
        steps[name] = candidate.step
    return steps, facts


def time_steps(steps: Steps, device: str, args: argparse.Namespace
               ) -> tuple[dict[str, list[float]], dict[str, str]]:
    """Time steps in turn.

    Args:
        steps (Steps): The steps by name; those that fail are taken out.
        device (str): 'cpu' or 'cuda'.
        args (Namespace): With ``burn_in``, ``repeats`` and ``seconds``.

    Returns:
        tuple[dict[str, list[float]], dict[str, str]]: Seconds per step, as
        many samples for each, and why others have failed.
    """
    synchronize = getattr(torch, device).synchronize

    def sample(name: str, count: int) -> float:
        synchronize()
        start = time.perf_counter()
        for _ in range(count):
            steps[name]()
        synchronize()
        return (time.perf_counter() - start) / count

    @contextlib.contextmanager
    def going_on(name: str) -> Iterator[None]:
        try:
            yield
        except Exception as error:
            failed[name] = failure(error)
            del steps[name], samples[name]  # and the model

    began, counts, failed = time.perf_counter(), {}, {}
    samples = {name: [] for name in steps}
    # Now and then it would take some tenths of a second of a single sample.
    gc.collect()
    gc.disable()
    try:
        for name in list(steps):
            with going_on(name):
                sample(name, args.burn_in)
                counts[name] = max(1, int(SAMPLE_SECONDS / sample(name, 1)))
        for repeat in range(args.repeats):
            spent = time.perf_counter() - began
            if args.seconds and repeat >= MIN_REPEATS and spent > args.seconds:
                break
            # To and fro, so that each follows another that heats the chip.
            for name in list(steps)[::-1 if repeat % 2 else 1]:
                with going_on(name):
                    samples[name].append(sample(name, counts[name]))
    finally:
        gc.enable()
    return samples, failed


def print_profile(steps: Steps, case: Case, rows: int) -> None:
    """Print what takes the time of a step of each model.

    Args:
        steps (Steps): The steps by name.
        case (Case): What they do.
        rows (int): Of each table: kernels on a GPU, operators on the CPU.
    """
    device = torch.autograd.DeviceType.CUDA
    activity = torch.profiler.ProfilerActivity
    for name, step in steps.items():
        with torch.profiler.profile(
                activities=[activity.CPU]
                if case.device == 'cpu' else [activity.CUDA],
                acc_events=True) as profiler:
            step()
            getattr(torch, case.device).synchronize()
        averages = profiler.key_averages()
        launches = sum(e.count for e in averages if e.device_type == device)
        print(f'{name}, {describe(case._asdict())}'
              + (f', {launches} kernels' if launches else ''))
        print(averages.table(
            sort_by=f'self_{case.device}_time_total', row_limit=rows,
            max_name_column_width=60))


def run_case(case: Case,
             args: argparse.Namespace) -> tuple[list[dict], Steps]:
    """Measure one case.

    Args:
        case (Case): What the models do.
        args (Namespace): The options.

    Returns:
        tuple[list[dict], Steps]: For each model the case, ``model``,
        ``samples`` (seconds per step) and what else is known:
        ``memory_total``, ``memory_step``, ``difference``, ``tolerance``,
        ``roofline`` (seconds), ``failed``; and the steps that were timed.
    """
    print(f'measuring {describe(case._asdict())}', file=sys.stderr, flush=True)
    if any(name.endswith('@compiled') for name in args.models):
        torch.compiler.reset()  # a second size shall not be a dynamic shape
        gc.collect()  # compiled models are cycles
    if case.mode == 'optimizer':
        steps, facts = optimizer_steps(args.models, case)
    else:
        steps, facts = prepare(args.models, case, args.memory)
    samples, failed = time_steps(steps, case.device, args)
    for name, reason in failed.items():
        facts[name]['failed'] = reason
    rows = [
        dict(case._asdict(), model=name, samples=samples.get(name), **found)
        for name, found in facts.items()
    ]
    return rows, steps


def write(results: dict, path: Path | None) -> None:
    """Write a file as a whole, or leave it as it was."""
    if path:
        part = path.with_name(f'{path.name}.part')
        part.write_text(json.dumps(results, indent=1) + '\n')
        os.replace(part, path)


def same_pixels(batch: int, sides: tuple[int, int],
                first: tuple[int, int]) -> int:
    """Images of a size with about as many pixels as a batch of the first."""
    return max(round(batch * math.prod(first) / math.prod(sides)), 1)


def describe_machine(device: str) -> dict[str, str | int]:
    """Hardware and software, without names of the machine or its users."""
    cpuinfo = Path('/proc/cpuinfo')
    named = re.search(r'model name\s*: (.*)',
                      cpuinfo.read_text()) if cpuinfo.exists() else None
    machine = dict(
        date=datetime.date.today().isoformat(),
        cpu=named[1] if named else platform.processor(),
        cores=os.cpu_count(),
        threads=torch.get_num_threads(),
        torch=torch.__version__)
    if device == 'cuda':
        machine['gpu'] = torch.cuda.get_device_name()
        machine['driver'] = collect_env.get_nvidia_driver_version(
            collect_env.run)
        machine['cudnn'] = torch.backends.cudnn.version()
        # Of the fused operators: Triton, or why torch's own run.
        kernels = dispatch.triton_obstacle(torch.device('cuda', 0))
        machine['kernels'] = \
            kernels or f'Triton {import_module("triton").__version__}'
    return machine


def size(text: str) -> tuple[int, int]:
    """'224' -> (224, 224), '800x1344' -> (800, 1344)."""
    height, _, width = text.partition('x')
    try:
        sides = int(height), int(width or height)
    except ValueError:
        sides = 0, 0
    if min(sides) < 32:
        raise argparse.ArgumentTypeError(
            'expected the side of a square or HEIGHTxWIDTH, in pixels and at '
            f"least 32, got '{text}'")
    return sides


def seconds(text: str) -> float:
    """A number above 0."""
    try:
        if float(text) > 0:
            return float(text)
    except ValueError:
        pass
    raise argparse.ArgumentTypeError(
        f"expected a number of seconds above 0, got '{text}'")


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """Parse the command line.

    Args:
        argv (list[str], optional): Arguments; those of the process if None.

    Returns:
        Namespace: The options.
    """
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add('--models', nargs='+',
        default=['conv2former-t@official', 'conv2former-t'],
        help='conv2former-ARCH, conv2former-ARCH@PATH with a path among '
        f'{", ".join(PATHS)}, or TYPE:ARCH of mmpretrain; the first one is '
        'what speed-up and memory are compared with')
    add('--task', choices=['classifier', 'backbone'], default='classifier')
    add('--mode', nargs='+', choices=['forward', 'train', 'optimizer'],
        default=['forward', 'train'])
    add('--dtype', nargs='+', choices=list(DTYPES), default=['fp32'],
        help='of autocast')
    add('--weights-dtype', choices=list(DTYPES), default='fp32',
        help='of weights and images')
    add('--channels-last', action='store_true',
        help='memory layout of weights and images')
    add('--cudnn-benchmark', action='store_true',
        help='let cuDNN try its algorithms')
    add('--drop-path', type=float, default=0., metavar='RATE')
    add('--batch', nargs='+', type=positive, default=[4])
    add('--size', nargs='+', type=size, default=[(224, 224)],
        help='such as 224 or 800x1344 (height first)')
    add('--device', choices=['cpu', 'cuda'], default='cpu')
    add('--threads', type=positive, default=torch.get_num_threads())
    add('--burn-in', type=positive, default=2, metavar='STEPS')
    add('--repeats', type=positive, default=10, help='samples of each model')
    add('--same-pixels', action='store_true',
        help='the batch is that of the first size; of others take as many '
        'images as have about as many pixels')
    add('--seconds', type=seconds,
        help='begin no further samples of a case after so long')
    add('--no-memory', dest='memory', action='store_false')
    add('--profile', type=positive, metavar='ROWS',
        help='print the operations that take most of a step, after timing')
    add('--json', type=Path, metavar='FILE', help='write what was measured')
    args = parser.parse_args(argv)
    for name in args.models:
        base, at, path = name.partition('@')
        if at and (':' in base or path not in PATHS):
            parser.error(f"'{name}': only conv2former-ARCH has paths, which "
                         f'are {", ".join(PATHS)}')
    if 'train' in args.mode and any(
            name.endswith('@folded') for name in args.models):
        parser.error('a model that is folded for inference cannot be trained; '
                     'measure it with --mode forward alone')
    if args.device == 'cpu' and any(
            name.endswith('@graphs') for name in args.models):
        parser.error('CPUs have no CUDA graphs: measure @graphs with --device '
                     'cuda')
    if args.device == 'cuda' and not torch.cuda.is_available():
        parser.error('--device cuda: torch finds no GPU')
    return args


def main(argv: list[str] | None = None) -> None:
    """Measure all cases and print a table for each.

    Args:
        argv (list[str], optional): Arguments; those of the process if None.
    """
    args = parse_args(argv)
    torch.set_num_threads(args.threads)
    results = dict(machine=describe_machine(args.device), rows=[])
    if args.json:
        if args.json.is_dir():
            raise SystemExit(f"--json '{args.json}' is a folder: name a file")
        try:
            args.json.parent.mkdir(parents=True, exist_ok=True)
            # What is found there later comes from this run.
            write(results, args.json)
        except OSError as error:
            raise SystemExit(f"cannot write '{args.json}': {error.strerror}. "
                             'Name another file with --json') from error
    # fp32 is fp32, for convolutions as for matrix products.
    torch.backends.cudnn.allow_tf32 = False
    torch.backends.cudnn.benchmark = args.cudnn_benchmark
    cases = [
        Case(args.task, mode, dtype,
             same_pixels(batch, sides, args.size[0])
             if args.same_pixels else batch, *sides, args.device,
             args.weights_dtype, args.channels_last, args.drop_path,
             args.cudnn_benchmark)
        for mode in args.mode if mode != 'optimizer'
        for dtype in args.dtype for batch in args.batch for sides in args.size
    ]
    if 'optimizer' in args.mode:  # knows neither batch nor autocast
        cases.insert(
            0, Case(args.task, 'optimizer', 'fp32', 1, 224, 224, args.device))
    for case in dict.fromkeys(cases):
        rows, steps = run_case(case, args)
        results['rows'] += rows
        write(results, args.json)  # what a run has is not lost
        if args.profile:
            print_profile(steps, case, args.profile)
        del steps  # and the models
    print(report(results))
    failed = [f"{row['model']} ({describe(row)}): {row['failed']}"
              for row in results['rows']
              if row.get('failed', OUT_OF_MEMORY) != OUT_OF_MEMORY]
    if failed:
        raise SystemExit('not timed:\n' + '\n'.join(failed))


if __name__ == '__main__':
    main()
