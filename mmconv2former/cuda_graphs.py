"""CUDA graphs of the backbone: its kernels are launched as one.

A training step of T launches hundreds of kernels, and launching them may
take the CPU longer than running them takes the GPU. For each kind of batch
the launches are recorded once, and then replayed.
``torch.cuda.make_graphed_callables`` does the same for one kind; its gradients
are wrong where several backward passes add up to one update, because those of
the next pass take the place of what was accumulated.
"""
import os
import threading
from collections import Counter
from collections.abc import Hashable, Iterator, Sequence
from contextlib import contextmanager
from operator import itemgetter
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.func import functional_call

from .dispatch import (
    FUSED_VARIABLE,
    has_global_hooks,
    is_capturing,
    is_intercepted,
    is_transformed,
    log_once,
)

# Batches of a kind that run without a graph before the kind is recorded, so
# that kinds which do not come back take no memory.
WARM_UP = 2
# Module attributes that change what is computed or returned; another value
# needs another recording.
SETTINGS = ('training', 'momentum', 'eps', 'rate', 'fused', 'residual_in_fp32',
            'approximate', 'stride', 'padding', 'padding_mode', 'dilation',
            'groups', 'track_running_stats', 'fusion', 'out_indices',
            'out_norm')


def _autocast(x: Tensor) -> dict[str, Any]:
    device = x.device.type
    return dict(device_type=device, dtype=torch.get_autocast_dtype(device),
                enabled=torch.is_autocast_enabled(device))


def _globals() -> tuple[Hashable, ...]:
    """Settings by which torch and this package choose kernels."""
    cudnn, matmul = torch.backends.cudnn, torch.backends.cuda.matmul
    if hasattr(matmul, 'fp32_precision'):
        # Since torch 2.9, where the old names may raise an error.
        tf32 = matmul.fp32_precision, cudnn.conv.fp32_precision
    else:
        tf32 = matmul.allow_tf32, cudnn.allow_tf32
    return (torch.is_grad_enabled(),
            torch.are_deterministic_algorithms_enabled(), cudnn.enabled,
            cudnn.deterministic, *tf32,
            matmul.allow_fp16_reduced_precision_reduction,
            matmul.allow_bf16_reduced_precision_reduction,
            matmul.allow_fp16_accumulation, os.environ.get(FUSED_VARIABLE))


def _has_saved_tensor_hooks() -> bool:
    """Whether autograd hands what it stores to hooks, such as those of
    torch.utils.checkpoint."""
    try:
        # The only public function that tells.
        with torch.autograd.graph.disable_saved_tensors_hooks('there are'):
            return False
    except RuntimeError:
        return True


class _Watched:
    """What recordings of a module depend on, besides its inputs."""

    def __init__(self, module: nn.Module) -> None:
        self.modules = list(module.modules())
        self.children = [(m._modules, tuple(m._modules.values()))
                         for m in self.modules]
        # Those of a module at a time: there are more than a thousand.
        self.settings = [
            (m.__dict__, itemgetter(*keys)) for m in self.modules
            if (keys := [key for key in SETTINGS if key in m.__dict__])]
        kinds = [type(m).__name__ for m in self.modules]
        self.is_sharded = 'FullyShardedDataParallel' in kinds
        self.synchronized = [m for m, kind in zip(self.modules, kinds)
                             if kind == 'SyncBatchNorm']

    def same_modules(self) -> bool:
        """Whether none was added, removed or replaced."""
        return all(tuple(modules.values()) == children
                   for modules, children in self.children)

    def look(self) -> tuple[list[Hashable], list[Hashable], str]:
        """Which tensors there are and where, settings, and why nothing can be
        recorded, or ''."""
        tensors, obstacle = [], ''
        settings = [read(attributes) for attributes, read in self.settings]
        if has_global_hooks():
            obstacle = 'hooks are registered for all modules'
        if torch.is_grad_enabled() and _has_saved_tensor_hooks():
            # That of a checkpoint would run the module again, in a thread
            # for which the recording one waits.
            obstacle = 'the backbone runs inside a checkpoint, or under ' \
                'other hooks for what the backward pass needs'
        if self.is_sharded:
            obstacle = 'the weights of the backbone are sharded'
        if any(m.training for m in self.synchronized):
            # All processes would have to record at the same time.
            obstacle = 'batch norms are synchronized between processes'
        for m in self.modules:
            for p in m._parameters.values():
                if p is not None:
                    tensors += (id(p), p.data_ptr(), p.dtype)
                    settings.append(p.requires_grad)
            for b in m._buffers.values():
                if b is not None:
                    tensors += (b.data_ptr(), b.dtype)
            if is_intercepted(m):
                obstacle = 'the backbone has hooks, which would not be called'
        return tensors, settings, obstacle


class CUDAGraphs:
    """The graphs of a module, for a limited number of kinds of batches.

    A kind is a shape with a memory layout and a precision, and whether and
    for which parameters there are gradients. It is recorded at its third
    batch. Those beyond the limit, and modules with hooks, sharded weights or
    synchronized batch norms, run without graphs; the log says why.

    All graphs share their memory: a forward pass that is replayed or recorded,
    also one without gradients, overwrites what an earlier one has stored, and
    the backward pass of that earlier one raises a RuntimeError. So threads may
    infer at the same time, but while one trains, no other may run the module
    between its forward and its backward pass.

    Args:
        limit (int): Greatest number of kinds.
    """

    def __init__(self, limit: int) -> None:
        self.limit, self.turn = limit, 0
        self.lock = threading.RLock()
        self.recording_thread: int | None = None  # its identifier
        self.stream: torch.cuda.Stream | None = None
        self.watched: _Watched | None = None
        self._clear()

    def _clear(self) -> None:
        self.turn += 1  # what forward passes have stored is gone
        self.tensors: list[Hashable] = []
        self.seen: Counter[Hashable] = Counter()
        self.recordings: dict[Hashable, _Recording] = {}
        if self.stream is not None:
            # Its kernels may still use the memory, which another stream may
            # get as soon as it is freed.
            self.stream.synchronize()
        self.memory: _Memory | None = None

    def forget_moved(self) -> None:
        """Give the memory back if the tensors of the module, or their types,
        are no longer those that graphs read."""
        with self.lock:
            if self.watched is not None \
                    and self.watched.look()[0] != self.tensors:
                self._clear()

    def __getstate__(self) -> dict[str, Any]:
        """Copies, such as that of an EMA, have graphs of their own."""
        return dict(limit=self.limit)

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__(**state)

    @staticmethod
    def can_record(x: Tensor) -> bool:
        """Whether a graph could take x: an ordinary tensor on a GPU that needs
        no gradient, outside of compiling, tracing and other recordings."""
        if not x.is_cuda:
            log_once(f'no CUDA graphs on the {x.device.type}')
        return (x.is_cuda and type(x) is Tensor and not x.requires_grad
                and not torch.compiler.is_compiling()
                and not torch.jit.is_tracing() and not is_capturing(x))

    def recording(self, module: nn.Module, x: Tensor) -> '_Recording | None':
        """What stands in for ``module.forward(x)``, if anything does yet.

        Args:
            module (nn.Module): The module; another one than in the first
                call has to run.
            x (Tensor): A batch.

        Returns:
            _Recording: To be called with x. None if the module has to run.

        Raises:
            RuntimeError: If the module does what cannot be recorded.
        """
        if self.recording_thread == threading.get_ident():
            return None  # the module is run to be recorded
        if is_transformed() or not self.can_record(x):
            return None
        with self.lock:
            if getattr(module, '_is_replica', False) \
                    or self.watched is not None \
                    and self.watched.modules[0] is not module:
                log_once('no CUDA graphs for shallow copies of a backbone, '
                         'such as those of DataParallel')
                return None
            if self.watched is None or not self.watched.same_modules():
                self._clear()
                self.watched = _Watched(module)
            tensors, settings, obstacle = self.watched.look()
            if obstacle:
                log_once(f'no CUDA graphs, because {obstacle}')
                return None
            if tensors != self.tensors:  # moved, or replaced
                self._clear()
                self.tensors = tensors
            kind = (x.shape, x.stride(), x.dtype, x.device, *settings,
                    *_autocast(x).values(), *_globals())
            if kind not in self.recordings:
                if len(self.recordings) == self.limit:
                    log_once(f'no more than {self.limit} CUDA graphs; images '
                             'of other shapes run without')
                    return None
                self.seen[kind] += 1
                if self.seen[kind] <= WARM_UP:
                    return None
                self.memory = self.memory or _Memory(x.device)
                self.recording_thread = threading.get_ident()
                needs_grad = torch.is_grad_enabled()
                try:
                    # Tensors that are made in inference mode, also those of
                    # torch for random numbers, could not be used outside.
                    with torch.cuda.device_of(x), self.using_memory(), \
                            torch.inference_mode(False), \
                            torch.set_grad_enabled(needs_grad):
                        self.recordings[kind] = _Recording(self, module, x)
                except BaseException:
                    if not self.recordings:
                        # A pool of which no graph is left takes no others.
                        self.memory = None
                    raise
                finally:
                    self.recording_thread = None
                log_once(f'CUDA graph for images of shape {tuple(x.shape)}')
            return self.recordings[kind]

    @contextmanager
    def using_memory(self) -> Iterator[None]:
        """One at a time, for all graphs have the same memory; what the forward
        pass before has stored there is gone."""
        with self.lock:
            stream = torch.cuda.current_stream(self.memory.device)
            if self.stream not in (None, stream):
                stream.wait_stream(self.stream)
            self.stream = stream
            self.turn += 1
            yield


class _Gradients:
    """Room for gradients, those of a type side by side.

    As one tensor they are copied by one kernel in place of some hundreds.

    Args:
        parameters (list[Tensor]): Whose gradients.
    """

    def __init__(self, parameters: list[Tensor]) -> None:
        self.shapes = [p.shape for p in parameters]
        self.kinds: dict[torch.dtype, list[int]] = {}
        for i, p in enumerate(parameters):
            self.kinds.setdefault(p.dtype, []).append(i)
        self.buffers = [
            parameters[0].new_empty(
                sum(parameters[i].numel() for i in indices), dtype=dtype)
            for dtype, indices in self.kinds.items()]

    def fill(self, grads: Sequence[Tensor]) -> None:
        """Write the gradients."""
        for buffer, indices in zip(self.buffers, self.kinds.values()):
            torch.cat([grads[i].flatten() for i in indices], out=buffer)

    def copies(self) -> list[Tensor]:
        """The gradients as tensors that may become those of parameters."""
        out = [None] * len(self.shapes)
        for buffer, indices in zip(self.buffers, self.kinds.values()):
            parts = buffer.clone().split_with_sizes(
                [self.shapes[i].numel() for i in indices])
            for i, part in zip(indices, parts):
                out[i] = part.view(self.shapes[i])
        return out


class _Memory:
    """What all graphs share: a pool, a stream, room for inputs and results."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.pool = torch.cuda.graph_pool_handle()
        self.stream = torch.cuda.Stream(device)
        self.rooms: dict[str, Tensor] = {}
        self.grads: dict[tuple[str, ...], _Gradients] = {}

    def room(self, name: str, like: Tensor) -> Tensor:
        """Where all recordings have their tensors of that name.

        Args:
            name (str): What it is for.
            like (Tensor): A tensor of the shape, type and layout wanted.

        Returns:
            Tensor: Of that shape, type and layout; of what it holds, nothing
            outlasts the use of another recording.
        """
        like = torch.empty_like(like, device='meta')
        room = self.rooms.get(name)
        if room is None or room.numel() < like.nbytes:
            # The smaller one stays with the recordings that have it.
            room = self.rooms[name] = torch.empty(
                -(-like.nbytes // 16) * 16,  # whole numbers of any type
                dtype=torch.uint8, device=self.device)
        return room.view(like.dtype).as_strided(like.shape, like.stride())

    @contextmanager
    def record(self) -> Iterator[torch.cuda.CUDAGraph]:
        graph = torch.cuda.CUDAGraph()
        # Other threads, which load the next batch or watch other processes,
        # may call CUDA meanwhile. The context of the graph does not leave its
        # stream when it fails to end.
        with torch.cuda.stream(self.stream), torch.cuda.graph(
                graph, self.pool, self.stream,
                capture_error_mode='thread_local'):
            yield graph


class _Recording:
    """The graphs of one kind of batch.

    Args:
        owner (CUDAGraphs): Whose memory it uses.
        module (nn.Module): The module.
        x (Tensor): A batch of that kind.

    Raises:
        RuntimeError: If the module does what cannot be recorded.
    """

    def __init__(self, owner: CUDAGraphs, module: nn.Module,
                 x: Tensor) -> None:
        self.owner, self.x = owner, owner.memory.room('images', x)
        # What is recorded is compiled for the memory that it will read.
        self._run_once(module, self.x.copy_(x), owner.memory)
        try:
            self._record(module, owner.memory)
        except RuntimeError as error:
            raise RuntimeError(
                f'the backbone cannot be recorded into CUDA graphs ({error}): '
                'build it with cuda_graphs=False') from error

    def _run_once(self, module: nn.Module, x: Tensor,
                  memory: _Memory) -> None:
        """Find which parameters have gradients, from which of the outputs, and
        make room for these.

        It has to run anyway: libraries choose their kernels, and Triton
        compiles its own, when they are first needed, and that cannot be
        recorded. Random numbers and buffers are as if it had not run.
        """
        buffers = [(b, b.clone()) for b in module.buffers()]
        parameters = {
            name: p
            for name, p in module.named_parameters()
            if p.requires_grad and torch.is_grad_enabled()
        }
        with torch.random.fork_rng([x.device] * x.is_cuda), torch.autocast(
                **_autocast(x), cache_enabled=False):
            leaves = _leaves(parameters)
            outs = functional_call(module, leaves, (x, ))
        # Those of frozen stages have none.
        self.differentiable = [out.requires_grad for out in outs]
        self.outs = [memory.room(f'output {i}', out)
                     for i, out in enumerate(outs)]
        self.grad_outs = [memory.room(f'gradient {i}', out)
                          for i, out in enumerate(outs) if out.requires_grad]
        reached = [
            [grad is not None for grad in torch.autograd.grad(
                out, list(leaves.values()), torch.zeros_like(out),
                retain_graph=True, allow_unused=True)]
            for out in outs if out.requires_grad and leaves
        ]
        del outs
        # In which buffers of all kinds can be written.
        with torch.inference_mode():
            for buffer, value in buffers:
                buffer.copy_(value)
        used = [any(column) for column in zip(*reached)]
        self.parameters = {
            name: p
            for (name, p), is_used in zip(parameters.items(), used) if is_used
        }
        # For each output, which of those parameters it depends on.
        self.reached = [[r for r, is_used in zip(row, used) if is_used]
                        for row in reached]

    def _record(self, module: nn.Module, memory: _Memory) -> None:
        if any(self.differentiable) and not self.parameters:
            raise RuntimeError('its weights are not its parameters')
        # New leaves in the same memory. What autograd, or DDP, has tied to
        # the parameters belongs to other streams than the recording one.
        leaves = _leaves(self.parameters)
        with memory.record() as self.forward, torch.autocast(
                **_autocast(self.x), cache_enabled=False):
            outs = functional_call(module, leaves, (self.x, ))
            # So that the graph's own memory can be that of others, too.
            for room, out in zip(self.outs, outs):
                room.copy_(out.detach())
        if leaves:
            outs = [out for out in outs if out.requires_grad]
            names = tuple(leaves)
            if names not in memory.grads:
                memory.grads[names] = _Gradients(
                    list(leaves.values()))
            self.grads = memory.grads[names]
            with memory.record() as self.backward:
                self.grads.fill(torch.autograd.grad(
                    outs, list(leaves.values()), self.grad_outs))

    def __call__(self, x: Tensor) -> tuple[Tensor, ...]:
        """Replay the forward pass, and the backward pass in its time.

        Args:
            x (Tensor): A batch.

        Returns:
            tuple[Tensor]: What the module returns.
        """
        if self.parameters:
            return _Replay.apply(self, x, *self.parameters.values())
        return self.replay(x)[0]

    def replay(self, x: Tensor) -> tuple[tuple[Tensor, ...], int]:
        """Replay the forward pass; also returns its number."""
        with self.owner.using_memory():
            self.x.copy_(x)
            self.forward.replay()
            return tuple(out.clone() for out in self.outs), self.owner.turn

    def replay_backward(self, turn: int, grads: tuple[Tensor | None, ...]
                        ) -> list[Tensor | None]:
        """Replay the backward pass of the forward pass with that number.

        Args:
            turn (int): The number.
            grads (tuple[Tensor | None]): Of the outputs; None for those that
                nobody used.

        Returns:
            list[Tensor | None]: Of the parameters.

        Raises:
            RuntimeError: If what the forward pass had stored is gone.
        """
        grads = [g for g, d in zip(grads, self.differentiable) if d]
        with self.owner.lock:
            if turn != self.owner.turn:
                raise RuntimeError(
                    'the backbone has run another forward or backward pass '
                    'since the forward pass of these gradients, and its CUDA '
                    'graphs keep the activations of one: build it with '
                    'cuda_graphs=False')
            with self.owner.using_memory():
                for target, grad in zip(self.grad_outs, grads):
                    target.zero_() if grad is None else target.copy_(grad)
                self.backward.replay()
                copies = self.grads.copies()
        rows = [row for row, g in zip(self.reached, grads) if g is not None]
        return [copy if any(column) else None
                for copy, *column in zip(copies, *rows)]


def _leaves(parameters: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: p.detach().requires_grad_()
            for name, p in parameters.items()}


class _Replay(torch.autograd.Function):

    @staticmethod
    def forward(ctx: Any, recording: _Recording, x: Tensor,
                *parameters: Tensor) -> tuple[Tensor, ...]:
        outs, ctx.turn = recording.replay(x)
        ctx.recording = recording
        ctx.save_for_backward(*parameters)
        ctx.set_materialize_grads(False)
        ctx.mark_non_differentiable(*(
            out for out, differentiable in zip(outs, recording.differentiable)
            if not differentiable))
        return outs

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor | None
                 ) -> tuple[Tensor | None, ...]:
        _ = ctx.saved_tensors  # an error if one was changed meanwhile
        return None, None, *ctx.recording.replay_backward(ctx.turn, grads)
